"""Builds the package with another release of torch, then runs doctor and the operator tests: `make test-other-torch`.

The registry's wheels of torch for Linux are built with CUDA and load 3 GB of CUDA's libraries, of which a machine without a
GPU calls nothing. Only the CUDA runtime is installed, with which torch's kernels register when they are loaded; in the place
of each other library stands one whose functions all end the process. Everything else is the environment's that runs this.

All is made under build/torch-RELEASE, from a copy of the tracked files, so the package in place stays as it is.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = tuple(
    f"tests/test_{subject}.py"
    for subject in ("operator", "cpu_kernel", "cpu_errors", "direct", "decode", "decode_append", "decode_refusals")
)
RUNTIMES = {"libcudart.so.12": "nvidia-cuda-runtime-cu12", "libcudart.so.13": "nvidia-cuda-runtime"}
# Libraries whose symbols have another version than the library's name, or none: the version, the symbols' prefix.
OTHER_VERSIONS = {
    "libcuda.so.1": ("", "cu"),
    "libcufile.so.0": ("", "cuFile"),
    "libcusparseLt.so.0": ("", "cusparseLt"),
    "libnccl.so.2": ("", "nccl"),
    "libnvshmem_host.so.3": ("NVSHMEM", ""),
}


def main(release: str, tests: list[str]) -> None:
    directory = ROOT / "build" / f"torch-{release}"
    packages, source = directory / "packages", directory / "source"
    if not packages.exists():
        install(release, packages)
    copy_of_tracked_files(source)

    kept = {key: value for key, value in os.environ.items() if not key.startswith("FLASHMLA_")}
    environment = {**kept, "PYTHONPATH": f"{packages}{os.pathsep}{source}"}

    def python(*arguments: str, **changes: str) -> None:
        subprocess.run([sys.executable, *arguments], cwd=source, env={**environment, **changes}, check=True)

    python("setup.py", "-q", "build_ext", "--inplace", FLASHMLA_BUILD="cpu", FLASHMLA_TORCH_DIR=str(packages / "torch"))
    # What is tested is what was built here.
    python(
        "-c",
        "import flashmla_hf, torch\n"
        f"assert torch.__version__.split('+')[0] == {release!r}, torch.__version__\n"
        f"assert flashmla_hf.__file__.startswith({str(source)!r}), flashmla_hf.__file__\n",
    )
    python("-m", "flashmla_hf", "doctor")
    python("-m", "pytest", "-q", *(tests or TESTS))


def copy_of_tracked_files(target: Path) -> None:
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = {name for name in names.split("\0") if (ROOT / name).is_file()}
    for path in target.rglob("*") if target.exists() else ():
        if path.suffix == ".py" and str(path.relative_to(target)) not in tracked:
            path.unlink()
    for name in tracked:
        here, there = ROOT / name, target / name
        # Of unchanged files the time stays, and what was compiled of them is up to date.
        if not there.exists() or here.read_bytes() != there.read_bytes():
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(here, there)


def install(release: str, packages: Path, python: str = sys.executable) -> None:
    """Puts this release of torch for ``python`` into the folder ``packages``, with stand-ins for the libraries of CUDA."""
    temporary = packages.with_name("packages.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pip = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-cache-dir", "--target", str(temporary)]
    subprocess.run([*pip, f"torch=={release}"], check=True)
    libraries = sorted((temporary / "torch/lib").glob("*.so*"))
    needed = {
        name for library in libraries for name in re.findall(r"NEEDED.*\[(.+)\]", output("readelf", "-d", library))
    }
    for runtime in sorted(needed & RUNTIMES.keys()):
        subprocess.run([*pip, "--upgrade", RUNTIMES[runtime]], check=True)
    system = output("ldconfig", "-p")
    names = {library.name for library in libraries}
    missing = [name for name in needed - names - RUNTIMES.keys() if f"\t{name} " not in system]
    undefined, defined = symbols(libraries)
    for name in sorted(missing):
        version, prefix = OTHER_VERSIONS.get(name, (name, ""))
        wanted = undefined.get(version, set()) - (set() if version else defined)
        make_stand_in(
            temporary / "torch/lib" / name, version, {symbol for symbol in wanted if symbol.startswith(prefix)}
        )
    temporary.rename(packages)


def symbols(libraries: list[Path]) -> tuple[dict[str, set[str]], set[str]]:
    """Names that the libraries want, by version ("" for none), and those that they define."""
    undefined: dict[str, set[str]] = {}
    defined: set[str] = set()
    for library in libraries:
        for line in output("nm", "-D", library).splitlines():
            kind, symbol = line.split()[-2:]
            name, _, version = symbol.partition("@")
            if kind in "Uw":
                undefined.setdefault(version, set()).add(name)
            else:
                defined.add(name)
    return undefined, defined


def make_stand_in(library: Path, version: str, names: set[str]) -> None:
    source, script = library.with_suffix(".s"), library.with_suffix(".map")
    source.write_text("".join(f".globl {name}\n.type {name}, @function\n{name}: ud2\n" for name in sorted(names)))
    script.write_text(f"{version or 'none'} {{ global: {' '.join(f'{name};' for name in sorted(names))} }};\n")
    versioned = [f"-Wl,--version-script={script}"] if version and names else []
    subprocess.run(
        ["gcc", "-shared", "-nostdlib", f"-Wl,-soname,{library.name}", *versioned, str(source), "-o", str(library)],
        check=True,
    )
    source.unlink()
    script.unlink()


def output(*command: object) -> str:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: other_torch.py RELEASE [what pytest is given]")
    main(sys.argv[1], sys.argv[2:])
