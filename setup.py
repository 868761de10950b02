"""Builds the compiled libraries of flashmla_hf and packages them.

One shared library per backend, beside the Python sources: ``libflashmla_cpu.so`` always, ``libflashmla_sm90.so`` where nvcc
and CUTLASS's headers can be had; no GPU is needed. They use torch's stable ABI and no Python symbol. ``_direct.abi3.so``,
the short way from Python to them, is of Python's limited API and is built where Python's headers are. So one wheel serves
every torch >= 2.10 and every Python >= 3.10, and building needs torch's headers but never imports torch: ``pip install .``
works under build isolation and finds the torch of the environment it installs into.

Environment:

FLASHMLA_BUILD        auto (CUDA if torch has it and it can be compiled, else one sentence says why not), cpu, or cuda (also for
                      a torch without CUDA, as for a wheel that serves both; the build fails if it cannot be had)
MAX_JOBS              compilers at a time; all cores otherwise
CXX                   the C++ compiler, nvcc's host compiler too
CUDA_HOME             the CUDA toolkit, where nvcc is not on PATH
TORCH_CUDA_ARCH_LIST  no CUDA library where it is set and does not name 9.0 (or 9.0a, or Hopper)
FLASHMLA_CUTLASS_DIR  a CUTLASS checkout: the directory that holds include/cutlass
FLASHMLA_TORCH_DIR    the ``torch`` package directory, where it is not found by itself
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# A build backend has this folder on no path, nor the folder that it imports from.
sys.path.insert(0, str(ROOT / "csrc"))
from flashmla_build.compiling import LOCAL_RUNTIME, CompilerError, Job, compile_all, listing_headers, run  # noqa: E402
from flashmla_build.environment import (  # noqa: E402
    MINIMUM_TORCH,
    find_cxx,
    find_torch,
    missing_for_direct,
    torch_without_cuda,
)
from flashmla_build.sources import (  # noqa: E402
    BACKENDS,
    CPU,
    DIRECT,
    SM90,
    head_dim_limits,
    macros_and_includes,
    source_table,
    sources_of,
)
from flashmla_build.terminal import fail, tell  # noqa: E402
from flashmla_build.toolchain import Cuda, CudaUnavailable, find_cuda  # noqa: E402


class BuildLibraries(build_ext):
    """Compiles each source to an object of its own, in one pool, and links without Python."""

    def get_ext_filename(self, fullname: str) -> str:
        names = fullname.split(".")  # setuptools asks with the package and without
        return str(Path(*names)) + (".abi3.so" if DIRECT.endswith(f".{names[-1]}") else ".so")

    def run(self) -> None:
        self.torch_dir = find_torch()
        self.cxx = find_cxx()
        self.cuda, self.no_cuda = self._decide_on_cuda()
        self.nvcc_failed = False
        self.no_direct = missing_for_direct(self.torch_dir)
        if self.no_direct is not None:
            tell(f"flashmla_hf: building without _direct, calls take some microseconds longer: {self.no_direct}")
        for name, reason in ((SM90, self.no_cuda), (DIRECT, self.no_direct)):
            if reason is not None:
                self._leave_out(name)
        started = time.monotonic()
        super().run()
        tell(self._what_was_built(time.monotonic() - started))

    def _what_was_built(self, seconds: float) -> str:
        """The last line of a build; the manifest keeps the same for ``doctor``."""
        names = ", ".join(self._filenames(ext.name for ext in self.extensions))
        without = (
            "without CUDA, as FLASHMLA_BUILD=cpu asks" if self.mode == "cpu" else "without CUDA, for the reason above"
        )
        cuda = f"with CUDA {self.cuda.release} for Hopper" if self.cuda else without
        return f"flashmla_hf: built {names} in {seconds:.0f} s, {cuda}. `python -m flashmla_hf doctor` tests what is installed."

    def _leave_out(self, name: str) -> None:
        self.extensions = [ext for ext in self.extensions if ext.name != name]
        # Of an earlier build, and a wheel takes whatever lies there.
        (Path(self.build_lib) / self.get_ext_filename(name)).unlink(missing_ok=True)

    def _decide_on_cuda(self) -> tuple[Cuda | None, str | None]:
        """What to build the CUDA library with, or why there will be none."""
        self.mode = os.environ.get("FLASHMLA_BUILD", "auto")
        if self.mode not in ("auto", "cpu", "cuda"):
            fail(f"FLASHMLA_BUILD: expected auto, cpu or cuda, got {self.mode!r}.")
        if self.mode == "cpu":
            return None, "FLASHMLA_BUILD=cpu asked for the CPU library alone."
        if self.mode == "auto" and (reason := torch_without_cuda(self.torch_dir)):
            return None, self._without_cuda(reason)
        try:
            return find_cuda(Path(self.get_finalized_command("build").build_base)), None
        except CudaUnavailable as reason:
            return None, self._without_cuda(str(reason))

    def _without_cuda(self, reason: str) -> str:
        """The reason, printed, if the CPU library alone will do; else the end of the build."""
        if self.mode == "cuda":
            fail(f"FLASHMLA_BUILD=cuda: {reason}")
        tell(f"flashmla_hf: building the CPU library alone: {reason}")
        return reason

    def build_extensions(self) -> None:
        jobs = {ext.name: self._jobs(ext.name) for ext in self.extensions}
        for name, error in compile_all(jobs, dispensable={SM90} if self.mode == "auto" else set()).items():
            self._give_up(name, error)
        for ext in list(self.extensions):
            try:
                self._link(ext.name, [str(job.object) for job in jobs[ext.name]])
            except CompilerError as error:
                self._give_up(ext.name, error)
        self._write_manifest()

    def _give_up(self, name: str, error: CompilerError) -> None:
        """Goes on without the CUDA library if FLASHMLA_BUILD does not ask for it; any other library ends the build."""
        if name != SM90:
            fail(f"compiling failed with {error}; the compiler's message is above.")
        if self.mode == "cuda":
            fail(
                f"compiling failed with {error}; the compiler's message is above; FLASHMLA_BUILD=cpu builds without CUDA."
            )
        self.no_cuda = self._without_cuda(
            f"nvcc {self.cuda.release} failed with {error}; FLASHMLA_BUILD=cuda pip install -v . shows its whole message."
        )
        self.cuda, self.nvcc_failed = None, True
        self._leave_out(SM90)

    def _link(self, name: str, objects: list[str]) -> None:
        library = Path(self.get_ext_fullpath(name))
        library.parent.mkdir(parents=True, exist_ok=True)
        # Linked under a temporary name: a process that has the old library mapped keeps it.
        temporary = library.with_suffix(".tmp")
        link = {CPU: self._link_cpu, SM90: self._link_sm90, DIRECT: self._link_direct}[name]
        run([*link(objects), "-o", str(temporary)])
        temporary.replace(library)

    def _jobs(self, name: str) -> list[Job]:
        common = macros_and_includes(name, self.torch_dir)
        backend = BACKENDS[name]
        compiler = [*self._nvcc(), "-isystem", str(self.cuda.cutlass)] if name == SM90 else self.cxx
        objects = Path(self.build_temp) / name
        objects.mkdir(parents=True, exist_ok=True)
        return [
            Job(
                source,
                target,
                [*compiler, *flags, *common, *listing_headers(target), "-c", str(source), "-o", str(target)],
            )
            for source, flags in sources_of(backend)
            for target in [objects / f"{source.stem}.o"]
        ]

    def _nvcc(self) -> list[str]:
        # CXX may hold a launcher before the compiler (ccache g++) and options after it; nvcc takes the compiler alone.
        host = [word for word in self.cxx if not word.startswith("-")][-1:] if os.environ.get("CXX") else []
        return [self.cuda.nvcc, "-gencode", source_table("sm90")["gencode"], *(["-ccbin", *host] if host else [])]

    def _link_cpu(self, objects: list[str]) -> list[str]:
        return [*self.cxx, "-shared", *objects, f"-L{self.torch_dir / 'lib'}", "-ltorch_cpu",
                "-Wl,--as-needed", *LOCAL_RUNTIME,
                "-Wl,-z,defs" if sys.platform == "linux" else "-Wl,-undefined,dynamic_lookup"]  # fmt: skip

    def _link_direct(self, objects: list[str]) -> list[str]:
        """Python's symbols are the interpreter's; torch's are asked for by name when the module is imported."""
        return [
            *self.cxx,
            "-shared",
            *objects,
            *LOCAL_RUNTIME,
            *(["-Wl,-undefined,dynamic_lookup"] if sys.platform == "darwin" else []),
        ]

    def _link_sm90(self, objects: list[str]) -> list[str]:
        """Against a stand-in for libtorch_cuda.so, which a torch without CUDA lacks; the real one answers at run time.

        A symbol that sources.json does not name under "torch_cuda_symbols" ends the link on every machine alike.
        """
        symbols = source_table("sm90")["torch_cuda_symbols"]
        directory = Path(self.build_temp) / "stand-in"
        directory.mkdir(exist_ok=True)
        source = directory / "libtorch_cuda.cpp"
        source.write_text("".join(f'extern "C" void {name}() {{}}\n' for name in symbols))
        run([*self.cxx, "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", str(source),
             "-o", str(directory / "libtorch_cuda.so")])  # fmt: skip
        # The CUDA runtime is inside and exports nothing: torch's own, of whatever release, stays apart from it.
        return [*self._nvcc(), "-shared", "-cudart", "static", *objects, f"-L{directory}", f"-L{self.torch_dir / 'lib'}",
                "-ltorch_cuda", "-ltorch_cpu", "-Xlinker", "-z", "-Xlinker", "defs",
                "-Xlinker", "--exclude-libs=ALL", "-lgcc_s"]  # fmt: skip

    def _write_manifest(self) -> None:
        """What was built, for ``python -m flashmla_hf doctor``."""
        compiler = subprocess.run([*self.cxx, "--version"], capture_output=True, text=True).stdout.splitlines()
        gencode = source_table("sm90")["gencode"]
        manifest = {
            "version": self.distribution.get_version(),
            "torch_target": ".".join(map(str, MINIMUM_TORCH)),
            "compiler": compiler[0] if compiler else " ".join(self.cxx),
            "libraries": self._filenames(ext.name for ext in self.extensions),
            "machine": platform.machine(),
            "cuda": self.cuda.release if self.cuda else None,
            "archs": re.findall(r"sm_(\w+)", gencode) if self.cuda else [],
            "sm90": head_dim_limits(),
            "no_cuda": self.no_cuda,
            "no_direct": self.no_direct,
        }
        path = Path(self.get_ext_fullpath(CPU)).with_name("_build.json")
        # In place, a CUDA library of an earlier build stays where it is, and so does what is known of it.
        if self.cuda is None and path.exists() and Path(self.get_ext_fullpath(SM90)).exists():
            before = json.loads(path.read_text())
            if before.get("cuda"):
                manifest |= {key: before[key] for key in ("cuda", "archs", "no_cuda")}
                manifest["libraries"] = self._filenames([*(ext.name for ext in self.extensions), SM90])
        path.write_text(json.dumps(manifest, indent=1) + "\n")

    def _filenames(self, names: Iterable[str]) -> list[str]:
        wanted = set(names)
        return [Path(self.get_ext_filename(name)).name for name in BACKENDS if name in wanted]

    def copy_extensions_to_source(self) -> None:
        """In-place and editable builds: the manifest goes beside the library there too."""
        super().copy_extensions_to_source()
        if self.nvcc_failed:  # a library of older sources would pass for this build's
            Path(self.get_ext_fullpath(SM90)).unlink(missing_ok=True)
        self._write_manifest()


class WheelForEveryPython(bdist_wheel):
    """The libraries hold no Python symbols or those of every Python >= 3.10: the wheel depends on the platform alone."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension(name, [str(path.relative_to(ROOT)) for path, _ in sources_of(backend)])
            for name, backend in BACKENDS.items()
        ],
        cmdclass={"build_ext": BuildLibraries, "bdist_wheel": WheelForEveryPython},
    )
