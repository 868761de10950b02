"""Builds the compiled libraries of flashmla_hf and packages them.

One shared library per backend, beside the Python sources: ``libflashmla_cpu.so`` always, ``libflashmla_sm90.so`` where nvcc
and its sources are present. They use torch's stable ABI and no Python symbol, so one binary serves every torch >= 2.10 and
every Python >= 3.10, and building needs torch's headers but never imports torch: ``pip install .`` works under build
isolation and finds the torch of the environment it installs into.

Environment: FLASHMLA_BUILD=auto|cpu|cuda (auto: CUDA where possible; cuda: fail without it), MAX_JOBS, CXX, CUDA_HOME,
FLASHMLA_TORCH_DIR (the ``torch`` package directory, where it is not found by itself).
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
MINIMUM_TORCH = (2, 10)
# The oldest torch whose stable ABI the libraries use (torch/csrc/stable/version.h).
TORCH_TARGET_VERSION = "0x020a000000000000"


def fail(sentence: str) -> None:
    raise SystemExit(f"flashmla_hf: {sentence}")


def find_torch() -> Path:
    """The directory of the torch package in the environment being installed into.

    pip's build isolation hides site-packages from ``sys.path`` but runs the environment's own interpreter, so sysconfig
    still names the right directories.
    """
    override = os.environ.get("FLASHMLA_TORCH_DIR")
    places = [Path(override).parent] if override else []
    places += [Path(sysconfig.get_path(key)) for key in ("purelib", "platlib")]
    if "VIRTUAL_ENV" in os.environ:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        places.append(Path(os.environ["VIRTUAL_ENV"]) / "lib" / version / "site-packages")
    places += [Path(p) for p in (*site.getsitepackages(), site.getusersitepackages(), *sys.path)]
    for place in places:
        package = place / "torch"
        if (package / "version.py").is_file():
            text = (package / "version.py").read_text()
            version = re.search(r"__version__ = '([^']+)'", text).group(1)
            if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_TORCH:
                fail(f"torch {version} is too old: install torch >= {'.'.join(map(str, MINIMUM_TORCH))} first.")
            return package
    fail(
        "torch was not found in this environment: install it first (pip install torch), or name its directory in "
        "FLASHMLA_TORCH_DIR, or build with --no-build-isolation."
    )


def find_cxx() -> list[str]:
    for candidate in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if candidate and shutil.which(shlex.split(candidate)[0]):
            return shlex.split(candidate)
    fail("no C++ compiler was found: install g++ (>= 9) or clang++ (>= 10), or name one in CXX.")


def cpu_sources() -> list[tuple[Path, list[str]]]:
    """(source, flags) of the CPU library on this machine's architecture, from csrc/cpu/sources.json."""
    table = json.loads((CSRC / "cpu" / "sources.json").read_text())
    machine = platform.machine()
    return [
        (ROOT / row["file"], [*table["common_flags"], *row["flags"]])
        for row in table["sources"]
        if row["arch"] in (None, machine)
    ]


class BuildLibraries(build_ext):
    """Compiles each source with its own flags (one per instruction set), in parallel, and links without Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extensions(self) -> None:
        self.torch_dir = find_torch()
        self.cxx = find_cxx()
        super().build_extensions()
        self._write_manifest()

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        objects_dir = Path(self.build_temp) / ext.name
        objects_dir.mkdir(parents=True, exist_ok=True)
        newest_header = max(path.stat().st_mtime for path in CSRC.rglob("*") if path.suffix in {".h", ".inc", ".json"})

        def compile_one(job: tuple[Path, list[str]]) -> Path:
            source, flags = job
            target = objects_dir / f"{source.stem}.o"
            if target.exists() and target.stat().st_mtime > max(newest_header, source.stat().st_mtime):
                return target
            # -isystem: warnings in torch's headers are not ours to see.
            command = [*self.cxx, *flags, f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", f"-I{CSRC}",
                       "-isystem", str(self.torch_dir / "include"), "-c", str(source), "-o", str(target)]  # fmt: skip
            run(command)
            return target

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            objects = list(pool.map(compile_one, cpu_sources()))
        # Linked under a temporary name: a process that has the old library mapped keeps it.
        temporary = library.with_suffix(".tmp")
        run([*self.cxx, "-shared", "-o", str(temporary), *map(str, objects), f"-L{self.torch_dir / 'lib'}", "-ltorch_cpu",
             "-Wl,--as-needed", "-Wl,-z,defs" if sys.platform == "linux" else "-Wl,-undefined,dynamic_lookup"])  # fmt: skip
        temporary.replace(library)

    def _write_manifest(self) -> None:
        """What was built, for ``python -m flashmla_hf doctor``."""
        compiler = subprocess.run([*self.cxx, "--version"], capture_output=True, text=True).stdout.splitlines()
        manifest = {
            "version": self.distribution.get_version(),
            "torch_target": ".".join(map(str, MINIMUM_TORCH)),
            "compiler": compiler[0] if compiler else " ".join(self.cxx),
            "libraries": [Path(self.get_ext_filename(ext.name)).name for ext in self.extensions],
            "machine": platform.machine(),
            "cuda": None,
            "archs": [],
        }
        library = Path(self.get_ext_fullpath(self.extensions[0].name))
        library.with_name("_build.json").write_text(json.dumps(manifest, indent=1) + "\n")

    def copy_extensions_to_source(self) -> None:
        """In-place and editable builds: the manifest goes beside the library there too."""
        super().copy_extensions_to_source()
        self._write_manifest()


class WheelForEveryPython(bdist_wheel):
    """The libraries hold no Python symbols: the wheel depends on the platform alone."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def run(command: list[str]) -> None:
    print(shlex.join(command), flush=True)
    result = subprocess.run(command)
    if result.returncode != 0:
        fail(f"compiling failed with exit code {result.returncode}; the compiler's message is above.")


def extensions() -> list[Extension]:
    mode = os.environ.get("FLASHMLA_BUILD", "auto")
    if mode not in ("auto", "cpu", "cuda"):
        fail(f"FLASHMLA_BUILD: expected auto, cpu or cuda, got {mode!r}.")
    if mode == "cuda":
        fail("FLASHMLA_BUILD=cuda: this version has no CUDA library; GPUs go through FlexAttention. Use auto or cpu.")
    return [Extension("flashmla_hf.libflashmla_cpu", [str(path.relative_to(ROOT)) for path, _ in cpu_sources()])]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildLibraries, "bdist_wheel": WheelForEveryPython})
