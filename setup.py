"""Builds the compiled libraries of flashmla_hf and packages them.

One shared library per backend, beside the Python sources: ``libflashmla_cpu.so`` always, ``libflashmla_sm90.so`` where nvcc
and CUTLASS's headers can be had; no GPU is needed. They use torch's stable ABI and no Python symbol. ``_direct.abi3.so``,
the short way from Python to them, is of Python's limited API and is built where Python's headers are. So one wheel serves
every torch >= 2.10 and every Python >= 3.10, and building needs torch's headers but never imports torch: ``pip install .``
works under build isolation and finds the torch of the environment it installs into.

Environment:

FLASHMLA_BUILD        auto (CUDA if it can be compiled, else one sentence says why not), cpu, or cuda (fail without it)
MAX_JOBS              compilers at a time; all cores otherwise
CXX                   the C++ compiler, nvcc's host compiler too
CUDA_HOME             the CUDA toolkit, where nvcc is not on PATH
TORCH_CUDA_ARCH_LIST  no CUDA library where it is set and does not name 9.0 (or 9.0a, or Hopper)
FLASHMLA_CUTLASS_DIR  a CUTLASS checkout: the directory that holds include/cutlass
FLASHMLA_TORCH_DIR    the ``torch`` package directory, where it is not found by itself
"""

from __future__ import annotations

import importlib.util
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
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
MINIMUM_TORCH = (2, 10)
# The oldest torch whose stable ABI the libraries use (torch/csrc/stable/version.h).
TORCH_TARGET_VERSION = "0x020a000000000000"
# The oldest nvcc that was seen to compile the kernels; csrc/check_headers.py compiles host code with its headers.
MINIMUM_NVCC = (12, 4)
CPU, SM90, DIRECT = "flashmla_hf.libflashmla_cpu", "flashmla_hf.libflashmla_sm90", "flashmla_hf._direct"
# Some compilers link their C++ runtime statically. If other libraries saw it, it would mix with the one that torch has loaded,
# of another release, and the first exception would end the process. The unwinder must be the process's own: an exception of
# ours passes through torch's frames, and an unwinder that never ran has no table of registers yet.
LOCAL_RUNTIME = ["-Wl,--exclude-libs,ALL", "-lgcc_s"] if sys.platform == "linux" else []
BACKENDS = {CPU: "cpu", SM90: "sm90", DIRECT: "direct"}  # directories of csrc


def fail(sentence: str) -> None:
    raise SystemExit(f"flashmla_hf: {sentence}")


class NoCuda(Exception):
    """One sentence: why libflashmla_sm90.so cannot be built here, and the way out."""


class CompilerError(Exception):
    """What a compiler or linker failed on: its exit code and the first error it printed."""


def site_packages() -> Iterator[Path]:
    """The package directories of the environment being installed into.

    pip's build isolation hides site-packages from ``sys.path`` but runs the environment's own interpreter, so sysconfig
    still names the right directories.
    """
    yield from (Path(sysconfig.get_path(key)) for key in ("purelib", "platlib"))
    if "VIRTUAL_ENV" in os.environ:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        yield Path(os.environ["VIRTUAL_ENV"]) / "lib" / version / "site-packages"
    yield from (Path(p) for p in (*site.getsitepackages(), site.getusersitepackages(), *sys.path))


def find_torch() -> Path:
    override = os.environ.get("FLASHMLA_TORCH_DIR")
    for place in [*([Path(override).parent] if override else []), *site_packages()]:
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


def missing_for_direct(torch_dir: Path) -> str | None:
    """One sentence: why _direct.abi3.so cannot be built here; it saves a few microseconds a call, and all else works."""
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's headers (Python.h, of a package like python3-dev) were not found."
    if "struct DLPackExchangeAPI" not in (torch_dir / "include" / "ATen" / "dlpack.h").read_text():
        return "this torch's ATen/dlpack.h has no DLPackExchangeAPI."
    return None


def find_cxx() -> list[str]:
    for candidate in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if candidate and shutil.which(shlex.split(candidate)[0]):
            return shlex.split(candidate)
    fail("no C++ compiler was found: install g++ (>= 9) or clang++ (>= 10), or name one in CXX.")


# ---- What CUDA needs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cuda:
    nvcc: str
    release: str
    cutlass: Path  # the include directory


def find_cuda(downloads: Path) -> Cuda:
    """Everything libflashmla_sm90.so is built with, or :class:`NoCuda`."""
    check_arch_list()
    nvcc, release = find_nvcc()
    return Cuda(nvcc, release, find_cutlass(downloads))


def check_arch_list() -> None:
    listed = re.split(r"[\s;,]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(" ;,"))
    if listed == [""]:
        return
    others = [arch for arch in listed if arch.lower().removesuffix("+ptx") not in ("9.0", "9.0a", "hopper")]
    if len(others) == len(listed):
        raise NoCuda(
            f"TORCH_CUDA_ARCH_LIST: expected 9.0 among the entries, got {' '.join(listed)!r}, and the library is for Hopper "
            "GPUs alone: add 9.0, or unset it."
        )
    if others:
        print(
            f"flashmla_hf: TORCH_CUDA_ARCH_LIST: {', '.join(others)} ignored, the CUDA library is for Hopper (9.0) alone."
        )


def find_nvcc() -> tuple[str, str]:
    """(program, release): of CUDA_HOME where that is set, else of PATH or of the toolkit's usual place."""
    oldest = ".".join(map(str, MINIMUM_NVCC))
    home = os.environ.get("CUDA_HOME")
    if home:
        nvcc = shutil.which("nvcc", path=str(Path(home) / "bin"))
        if nvcc is None:
            raise NoCuda(f"CUDA_HOME: expected the directory of a CUDA toolkit, got {home!r}, which has no bin/nvcc.")
    else:
        nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
        if nvcc is None:
            raise NoCuda(
                f"nvcc was not found: put a CUDA toolkit >= {oldest} on PATH, or name its directory in CUDA_HOME."
            )
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"release (\d+)\.(\d+)", answer)
    if match is None:
        raise NoCuda(
            f"{nvcc} --version: expected a line with its release, got {answer.strip()!r}: reinstall the toolkit."
        )
    if tuple(map(int, match.groups())) < MINIMUM_NVCC:
        raise NoCuda(
            f"nvcc {'.'.join(match.groups())} is too old: expected CUDA >= {oldest}; install a newer toolkit, or name one in "
            "CUDA_HOME."
        )
    return nvcc, ".".join(match.groups())


def find_cutlass(downloads: Path) -> Path:
    """CUTLASS's include directory: FLASHMLA_CUTLASS_DIR, else an installed nvidia-cutlass, else downloaded once.

    Downloaded here and not by a build requirement (pyproject.toml, a PEP 517 hook): pip would install six packages this
    one depends on and the compiler does not need, and without a network it would end the CPU build, too.
    """
    table = source_table("sm90")
    override = os.environ.get("FLASHMLA_CUTLASS_DIR")
    if override:
        if not (Path(override) / "include" / "cutlass" / "cutlass.h").is_file():
            raise NoCuda(
                "FLASHMLA_CUTLASS_DIR: expected a CUTLASS checkout, which holds include/cutlass/cutlass.h, got "
                f"{override!r}, which does not."
            )
        return Path(override) / "include"
    name, version = table["cutlass"].split("==")
    inside = Path("cutlass_library") / "source" / "include"
    target = downloads / f"cutlass-{version}"
    for place in (*site_packages(), target):
        # Of another release what the kernels use may be missing or differ.
        if cutlass_version(place / inside) == version.split(".")[:3]:
            return (place / inside).resolve()

    temporary = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    requirement = temporary / "requirement.txt"
    requirement.write_text(f"{table['cutlass']} --hash=sha256:{table['cutlass_sha256']}\n")
    # Without PYTHONPATH: through it build isolation hides the environment's pip. An environment made by uv has no pip.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # Short waits: where there is no network, a build for the CPU shall not wait for minutes.
    environment |= {"PIP_DEFAULT_TIMEOUT": "15", "UV_HTTP_TIMEOUT": "15", "PIP_RETRIES": "1", "PIP_USER": "0"}
    programs = [[sys.executable, "-m", "pip"], *([[shutil.which("uv"), "pip"]] if shutil.which("uv") else [])]
    for program in programs:
        command = [*program, "install", "--quiet", "--no-deps", "--only-binary", ":all:", "--require-hashes",
                   "--target", str(temporary), "-r", str(requirement)]  # fmt: skip
        print(shlex.join(command), flush=True)
        try:
            subprocess.run(command, env=environment, timeout=120, check=True, capture_output=True, text=True)
        except subprocess.TimeoutExpired:
            problem = "no answer in 120 seconds"
        except subprocess.CalledProcessError as error:
            problem = ([line for line in error.stderr.splitlines() if line.strip()] or ["no message"])[-1]
        else:
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
            return (target / inside).resolve()
    shutil.rmtree(temporary)
    raise NoCuda(
        f"CUTLASS's headers could not be downloaded ({problem}): install them into this environment (pip install --no-deps "
        f"{name}=={version}), or name a CUTLASS checkout in FLASHMLA_CUTLASS_DIR."
    )


def cutlass_version(include: Path) -> list[str] | None:
    header = include / "cutlass" / "version.h"
    if not header.is_file():
        return None
    return re.findall(r"#define CUTLASS_(?:MAJOR|MINOR|PATCH)\s+(\d+)", header.read_text())


# ---- Compiling and linking -------------------------------------------------------------------------------------------


def source_table(backend: str) -> dict:
    return json.loads((CSRC / backend / "sources.json").read_text())


def sources_of(backend: str) -> list[tuple[Path, list[str]]]:
    """(source, flags) of a library on this machine's architecture."""
    table = source_table(backend)
    return [
        (path, [*table["common_flags"], *row.get("flags", [])])
        for row in table["sources"]
        if row.get("arch") in (None, platform.machine())
        for path in (sorted(ROOT.glob(row["file"])) if "*" in row["file"] else [ROOT / row["file"]])
    ]


def head_dim_limits() -> dict[str, int]:
    """Which head dims the Hopper kernels take, from their table."""
    spec = importlib.util.spec_from_file_location("sm90_tiles", CSRC / "sm90" / "tiles.py")
    tiles = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiles)
    return tiles.limits()


def macros_and_includes(name: str, torch_dir: Path) -> list[str]:
    """Options of every source of a library; csrc/check_headers.py compiles with them, too."""
    # -isystem: warnings in the headers of others are not ours to see.
    options = [f"-DFLASHMLA_DIRECT_ABI={direct_abi()}u", f"-I{CSRC}", "-isystem", str(torch_dir / "include")]
    if name == DIRECT:  # of torch it sees DLPack's structures, which are an ABI of their own
        return [*options, "-isystem", sysconfig.get_path("include")]
    return [*options, f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]


@dataclass(frozen=True)
class Job:
    """One object. ``object`` with the suffix .json is its record: the command, what the compiler said, and how long."""

    source: Path
    object: Path
    command: list[str]
    newest_header: float


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
            print(
                f"flashmla_hf: building without _direct, calls take some microseconds longer: {self.no_direct}",
                flush=True,
            )
        for name, reason in ((SM90, self.no_cuda), (DIRECT, self.no_direct)):
            if reason is not None:
                self._leave_out(name)
        super().run()

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
        try:
            return find_cuda(Path(self.get_finalized_command("build").build_base)), None
        except NoCuda as reason:
            return None, self._without_cuda(str(reason))

    def _without_cuda(self, reason: str) -> str:
        """The reason, printed, if the CPU library alone will do; else the end of the build."""
        if self.mode == "cuda":
            fail(f"FLASHMLA_BUILD=cuda: {reason}")
        print(f"flashmla_hf: building the CPU library alone: {reason}", flush=True)
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
        files = (*CSRC.glob("*"), *(CSRC / backend).rglob("*"))
        newest_header = max(path.stat().st_mtime for path in files if path.suffix in {".h", ".inc", ".cuh"})
        objects = Path(self.build_temp) / name
        objects.mkdir(parents=True, exist_ok=True)
        return [
            Job(source, target, [*compiler, *flags, *common, "-c", str(source), "-o", str(target)], newest_header)
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


def direct_abi() -> int:
    """Of the types that csrc/direct/direct.cpp and the libraries share: of another build they are not called directly."""
    return zlib.crc32(b"".join((CSRC / name).read_bytes() for name in ("direct.h", "checks.h", "checks_decode.h")))


def compile_all(jobs: dict[str, list[Job]], dispensable: set[str]) -> dict[str, CompilerError]:
    """The first error of each library that has one. No job of that library begins afterwards, and no job at all if the
    library is not dispensable."""
    failed: dict[str, CompilerError] = {}

    def compile_unless_failed(task: tuple[str, Job]) -> None:
        name, job = task
        if name in failed or failed.keys() - dispensable:
            return
        try:
            compile_one(job)
        except CompilerError as error:
            failed.setdefault(name, error)

    # One pool for all, the CUDA sources first: they take longest.
    tasks = [(name, job) for name, group in jobs.items() for job in group]
    tasks.sort(key=lambda task: task[1].source.suffix != ".cu")
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        list(pool.map(compile_unless_failed, tasks))
    return failed


def compile_one(job: Job) -> None:
    """Compiles unless the object is newer than all it is made of and made by the same command."""
    record = job.object.with_suffix(".json")
    if record.exists() and job.object.exists():
        before = json.loads(record.read_text())
        # The start counts: what was edited during the compilation is not in the object.
        newest = max(job.newest_header, job.source.stat().st_mtime)
        if before["command"] == job.command and before["started"] > newest:
            return
        record.unlink()
    started = time.time()
    output = run(job.command)
    facts = {"command": job.command, "started": started, "seconds": round(time.time() - started, 1), "output": output}
    record.write_text(json.dumps(facts, indent=1) + "\n")


def run(command: list[str]) -> str:
    """Everything the command said; printed, too, without ptxas's lines on each kernel: check_build.py makes a table of them."""
    print(shlex.join(command), flush=True)
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    statistics = re.compile(r"ptxas info\s+: (?!.*Performance Loss)|    \d+ bytes stack frame")
    lines = [line for line in result.stdout.splitlines() if not statistics.match(line)]
    if lines:
        print("\n".join(lines), flush=True)
    if result.returncode != 0:
        said = [line.strip() for line in lines if line.strip()] or ["no message"]
        errors = [line for line in said if re.search(r"\b(?:error|fatal|undefined reference)\b", line)]
        raise CompilerError(f"exit code {result.returncode} ({[*errors, said[-1]][0][:300]})")
    return result.stdout


if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension(name, [str(path.relative_to(ROOT)) for path, _ in sources_of(backend)])
            for name, backend in BACKENDS.items()
        ],
        cmdclass={"build_ext": BuildLibraries, "bdist_wheel": WheelForEveryPython},
    )
