"""Compiles all host code against the headers of every supported torch, and of the oldest CUDA and a new one: `make headers`.

Nothing is linked or run: a name that one release lacks is found in seconds, without installing that release. The headers are
of packages of the registry, fetched once into build/headers. A torch wheel for macOS is the smallest that has them, and what
this package includes of them is the same on every platform. Kernels need an nvcc of the release: `make cuda`.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "csrc"))
from flashmla_build import environment, sources  # noqa: E402

TORCH = ("2.10.0", "2.11.0", "2.12.0", "2.13.0", "2.14.1", "2.15.0")
# The first is the oldest that README.md names; flashmla_build.toolchain.MINIMUM_NVCC is held to it.
CUDA = {
    "12.4": ("nvidia-cuda-runtime-cu12==12.4.127", "nvidia-cuda-nvcc-cu12==12.4.131"),
    "13.0": ("nvidia-cuda-runtime==13.0.96", "nvidia-cuda-crt==13.0.88"),
}
HEADERS = ROOT / "build" / "headers"


def main() -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        torches = list(pool.map(torch_headers, TORCH))
        cudas = list(pool.map(cuda_headers, CUDA))
        names, commands = zip(*jobs(torches, cudas), strict=True)
        results = list(pool.map(compile_one, commands))
    for name, output in zip(names, results, strict=True):
        print(f"{'ok    ' if output is None else 'FAILED'} {name}")
    failures = [f"\n{name}:\n{output}" for name, output in zip(names, results, strict=True) if output is not None]
    print("".join(failures), file=sys.stderr, end="")
    sys.exit(f"flashmla_hf: {len(failures)} of {len(names)} compilations failed" if failures else 0)


def jobs(torches: list[Path], cudas: list[list[Path]]):
    """(name, command) of every source that sees the headers of torch or CUDA."""
    for release, torch_dir in zip(TORCH, torches, strict=True):
        for source, library in (("ops_cpu.cpp", sources.CPU), ("direct/direct.cpp", sources.DIRECT)):
            yield f"torch {release}: {source}", command(library, torch_dir, sources.CSRC / source)
        for cuda, includes in zip(CUDA, cudas, strict=True):
            yield (
                f"torch {release}, CUDA {cuda}: ops_sm90.cpp",
                command(sources.SM90, torch_dir, sources.CSRC / "ops_sm90.cpp", includes),
            )
    # Of the host code of the kernels, what is not compiled by nvcc alone.
    headers = HEADERS / "sm90_headers.cpp"
    headers.write_text(
        "".join(f'#include "{path.relative_to(sources.CSRC)}"\n' for path in sorted(sources.CSRC.glob("sm90/**/*.h")))
    )
    for cuda, includes in zip(CUDA, cudas, strict=True):
        for source in (sources.CSRC / "sm90/dispatch.cpp", headers):
            yield f"CUDA {cuda}: {source.name}", command(sources.SM90, torches[0], source, includes)


def command(library: str, torch_dir: Path, source: Path, cuda: list[Path] = ()) -> list[str]:
    table = sources.source_table(sources.BACKENDS[library])
    flags = [flag for flag in table["common_flags"] if flag.startswith(("-D", "-std="))]
    includes = [word for directory in cuda for word in ("-isystem", str(directory))]
    return [
        *environment.find_cxx(), "-fsyntax-only", "-Wall", "-Wextra", "-Werror", *flags,
        *sources.macros_and_includes(library, torch_dir), *includes, str(source),
    ]  # fmt: skip


def compile_one(words: list[str]) -> str | None:
    result = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return None if result.returncode == 0 else result.stdout


def torch_headers(release: str) -> Path:
    mac = ["--platform", "macosx_14_0_arm64", "--platform", "macosx_11_0_arm64", "--python-version", "3.12"]
    return fetch(f"torch-{release}", (f"torch=={release}",), mac) / "torch"


def cuda_headers(release: str) -> list[Path]:
    return sorted(fetch(f"cuda-{release}", CUDA[release]).glob("nvidia/*/include"))


def fetch(name: str, requirements: tuple[str, ...], options: list[str] = ()) -> Path:
    """A directory with the headers and the version of these packages."""
    target = HEADERS / name
    if target.exists():
        return target
    temporary = HEADERS / f"{name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *options,
         "--dest", str(temporary), *requirements], check=True,
    )  # fmt: skip
    for wheel in temporary.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            wanted = [m for m in archive.namelist() if "/include/" in m or m == "torch/version.py"]
            archive.extractall(temporary, wanted)
        wheel.unlink()
    temporary.rename(target)
    return target


if __name__ == "__main__":
    main()
