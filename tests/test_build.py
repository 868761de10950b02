"""Building and installing as a user does: pip's build isolation, what the wheel holds, and the sentences of failure.

What concerns CUDA runs everywhere: a program that answers as nvcc does builds a package of two small sources.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# Of the caller's shell, these would choose what is built; the CPU library alone is the quickest.
SETTINGS = ("FLASHMLA_BUILD", "FLASHMLA_CUTLASS_DIR", "FLASHMLA_TORCH_DIR", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CXX")


def environment_of_a_build(**changes):
    kept = {key: value for key, value in os.environ.items() if key not in SETTINGS}
    return {**kept, "FLASHMLA_BUILD": "cpu", **changes}


def test_the_library_binds_to_no_python_and_to_the_oldest_supported_torch():
    """Undefined symbols: torch's stable C functions only, no CPython, no c10 or at C++ symbols."""
    library = ROOT / "flashmla_hf" / "libflashmla_cpu.so"
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    names = [line.split()[-1] for line in symbols.splitlines()]
    assert not [name for name in names if name.startswith("Py") or "_ZN2at" in name or "_ZN3c10" in name]
    torch_names = [name for name in names if name.startswith(("aoti_torch", "torch_"))]
    assert torch_names
    header = Path(torch.__file__).parent / "include/torch/csrc/stable/c/shim.h"
    text = header.read_text()
    newer = text[text.index("TORCH_VERSION_2_11_0") :] if "TORCH_VERSION_2_11_0" in text else ""
    assert not [name for name in torch_names if re.search(rf"\b{name}\(", newer)]


def test_the_direct_module_is_of_the_limited_api_and_binds_to_no_torch():
    """Undefined symbols: what Python 3.10 promises every later one, and nothing of torch's."""
    library = ROOT / "flashmla_hf" / "_direct.abi3.so"
    symbols = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in symbols.stdout.splitlines()]
    assert not [
        name for name in names if name.startswith(("aoti_torch", "torch_")) or "_ZN2at" in name or "c10" in name
    ]
    # The private ones are what Py_DECREF, Py_None and PY_SSIZE_T_CLEAN become.
    private = {name for name in names if name.startswith("_Py")}
    assert private <= {"_Py_Dealloc", "_Py_NoneStruct", "_Py_TrueStruct", "_Py_FalseStruct", "_Py_BuildValue_SizeT",
                       "_PyArg_ParseTuple_SizeT", "_PyObject_CallFunction_SizeT", "_Py_DecRef", "_Py_IncRef"}  # fmt: skip


def setup(directory, **environment):
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(directory / "lib"), "--build-temp", str(directory / "tmp")],
        cwd=ROOT, capture_output=True, text=True, env=environment_of_a_build(**environment),
    )  # fmt: skip


def test_a_missing_compiler_ends_with_one_sentence(tmp_path):
    result = setup(tmp_path, PATH=str(tmp_path), CXX="")
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == (
        "flashmla_hf: no C++ compiler was found: install g++ (>= 9) or clang++ (>= 10), or name one in CXX."
    )


def test_a_missing_torch_ends_with_one_sentence(tmp_path):
    program = (
        "import runpy, site, sys, sysconfig\n"
        f"site.getsitepackages = lambda: []; site.getusersitepackages = lambda: {str(tmp_path)!r}\n"
        "paths = sysconfig.get_path\n"
        f"sysconfig.get_path = lambda name, *a, **k: {str(tmp_path)!r} if name in ('purelib', 'platlib') else paths(name, *a, **k)\n"
        "import setuptools.command.bdist_wheel\n"
        f"sys.argv = ['setup.py', 'build_ext', '--build-lib', {str(tmp_path / 'lib')!r}, '--build-temp', {str(tmp_path / 'tmp')!r}]\n"
        "sys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
    )
    environment = {
        key: value for key, value in environment_of_a_build().items() if key not in ("VIRTUAL_ENV", "PYTHONPATH")
    }
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 1, result.stdout
    assert "flashmla_hf: torch was not found in this environment: install it first (pip install torch)" in result.stderr


def test_an_old_torch_ends_with_one_sentence(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.9.1+cpu'\n")
    result = setup(tmp_path, FLASHMLA_TORCH_DIR=str(tmp_path / "torch"))
    assert result.returncode == 1
    assert "flashmla_hf: torch 2.9.1+cpu is too old: install torch >= 2.10 first." in result.stderr


def test_an_unknown_build_mode_ends_with_one_sentence(tmp_path):
    result = setup(tmp_path, FLASHMLA_BUILD="gpu")
    assert result.returncode == 1
    assert "flashmla_hf: FLASHMLA_BUILD: expected auto, cpu or cuda, got 'gpu'." in result.stderr


# ---- CUDA: what is looked for, and the sentence where it is not there ------------------------------------------------


def load(path):
    spec = importlib.util.spec_from_file_location(f"flashmla_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def build(monkeypatch):
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    return load(ROOT / "setup.py")


def refusal(build, function, *arguments):
    with pytest.raises(build.NoCuda) as error:
        function(*arguments)
    return str(error.value)


@pytest.mark.parametrize("is_ours", [True, False], ids=["our link arguments", "without them"])
def test_an_exception_reaches_torch_from_a_compiler_that_links_its_runtime_statically(build, tmp_path, is_ours):
    """The library that throws is linked as ours, torch is played by one of the shared runtime that catches."""
    (tmp_path / "throws.cpp").write_text(
        '#include <stdexcept>\nextern "C" void throws() { throw std::runtime_error("refused"); }\n'
    )
    (tmp_path / "catches.cpp").write_text(
        '#include <exception>\nextern "C" int catches(void (*call)()) {\n'
        "  try { call(); } catch (const std::exception&) { return 7; }\n  return 0;\n}\n"
    )
    ours = ["-static-libstdc++", "-static-libgcc", "-Wl,--as-needed", *(build.LOCAL_RUNTIME if is_ours else [])]
    for name, arguments in (("throws", ours), ("catches", [])):
        command = ["g++", "-shared", "-fPIC", str(tmp_path / f"{name}.cpp"), "-o", str(tmp_path / f"{name}.so")]
        subprocess.run([*command, *arguments], check=True)
    program = (
        "import ctypes\n"
        "throws, catches = (ctypes.CDLL(f'./{name}.so') for name in ('throws', 'catches'))\n"
        "print(catches.catches(throws.throws))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert (result.stdout.strip() == "7") == is_ours, result.stderr


@pytest.mark.parametrize("listed", ["9.0", "9.0a", "9.0+PTX", "Hopper", " 9.0a; ", ""])
def test_an_architecture_list_with_hopper_is_silent(build, monkeypatch, capsys, listed):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    build.check_arch_list()
    assert capsys.readouterr().out == ""


def test_other_architectures_beside_hopper_are_named(build, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a 10.0+PTX")
    build.check_arch_list()
    assert capsys.readouterr().out == (
        "flashmla_hf: TORCH_CUDA_ARCH_LIST: 8.0, 10.0+PTX ignored, the CUDA library is for Hopper (9.0) alone.\n"
    )


def test_an_architecture_list_without_hopper_is_a_reason(build, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;8.6")
    assert refusal(build, build.check_arch_list) == (
        "TORCH_CUDA_ARCH_LIST: expected 9.0 among the entries, got '8.0 8.6', and the library is for Hopper GPUs alone: "
        "add 9.0, or unset it."
    )


NVCC = """#!{python}
import subprocess, sys
words, command = sys.argv[1:], ["g++"]
if words == ["--version"]:
    print({version!r})
    sys.exit()
while words:
    word = words.pop(0)
    if word in ("-gencode", "-Xptxas", "-ccbin", "-cudart"):
        words.pop(0)
    elif word == "-Xcompiler":
        command += words.pop(0).split(",")
    elif word == "-Xlinker":
        command.append("-Wl," + words.pop(0))
    elif word.endswith(".cu"):
        command += ["-x", "c++", word]
        print({ptxas!r})
    elif not word.startswith(("--use_fast", "--expt")):
        command.append(word)
sys.exit(subprocess.run(command).returncode)
"""
PTXAS = (
    "ptxas info    : Compiling entry function '_Z4tinyILi64EEvi' for 'sm_90a'\n"
    "ptxas info    : Function properties for _Z4tinyILi64EEvi\n"
    "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
    "ptxas info    : Used 168 registers, used 16 barriers, 1024 bytes smem"
)


def toolkit(directory, version="Cuda compilation tools, release 12.4, V12.4.131", ptxas=PTXAS):
    """The directory for CUDA_HOME of an nvcc that compiles with g++ and says what it is told to."""
    nvcc = directory / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True, exist_ok=True)
    nvcc.write_text(NVCC.format(python=sys.executable, version=version, ptxas=ptxas))
    nvcc.chmod(0o755)
    return str(directory / "toolkit")


def test_nvcc_is_taken_from_cuda_home(build, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", toolkit(tmp_path))
    assert build.find_nvcc() == (str(tmp_path / "toolkit/bin/nvcc"), "12.4")


@pytest.mark.parametrize(
    ("version", "sentence"),
    [
        ("release 12.3, V12.3.107", "nvcc 12.3 is too old: expected CUDA >= 12.4; install a newer toolkit, or name one in CUDA_HOME."),
        ("nothing", "nvcc --version: expected a line with its release, got 'nothing': reinstall the toolkit."),
    ],
)  # fmt: skip
def test_an_nvcc_that_does_not_serve_is_a_reason(build, monkeypatch, tmp_path, version, sentence):
    monkeypatch.setenv("CUDA_HOME", toolkit(tmp_path, version))
    assert refusal(build, build.find_nvcc).endswith(sentence)


def test_a_cuda_home_without_nvcc_is_a_reason(build, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert refusal(build, build.find_nvcc) == (
        f"CUDA_HOME: expected the directory of a CUDA toolkit, got {str(tmp_path)!r}, which has no bin/nvcc."
    )


def test_no_nvcc_at_all_is_a_reason(build, monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda *_, **__: None)
    assert refusal(build, build.find_nvcc) == (
        "nvcc was not found: put a CUDA toolkit >= 12.4 on PATH, or name its directory in CUDA_HOME."
    )


def cutlass(include, version="4.2.0"):
    (include / "cutlass").mkdir(parents=True)
    (include / "cutlass" / "cutlass.h").touch()
    parts = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
    (include / "cutlass" / "version.h").write_text("".join(f"#define CUTLASS_{name} {n}\n" for name, n in parts))
    return include


def test_cutlass_is_taken_from_its_variable_whatever_its_version(build, monkeypatch, tmp_path):
    monkeypatch.setenv("FLASHMLA_CUTLASS_DIR", str(tmp_path))
    assert refusal(build, build.find_cutlass, tmp_path / "downloads") == (
        "FLASHMLA_CUTLASS_DIR: expected a CUTLASS checkout, which holds include/cutlass/cutlass.h, got "
        f"{str(tmp_path)!r}, which does not."
    )
    include = cutlass(tmp_path / "include", "4.3.1")
    assert build.find_cutlass(tmp_path / "downloads") == include


INSIDE = Path("cutlass_library/source/include")


def test_an_installed_cutlass_of_the_pinned_release_is_used(build, monkeypatch, tmp_path):
    cutlass(tmp_path / "other" / INSIDE, "3.9.0")
    wanted = cutlass(tmp_path / "wanted" / INSIDE)
    monkeypatch.setattr(
        build, "site_packages", lambda: iter([tmp_path / "none", tmp_path / "other", tmp_path / "wanted"])
    )
    assert build.find_cutlass(tmp_path / "downloads") == wanted


def test_cutlass_is_downloaded_once_without_its_dependencies(build, monkeypatch, tmp_path):
    commands = []

    def install(command, **_):
        commands.append(command)
        target = Path(command[command.index("--target") + 1])
        assert re.fullmatch(
            r"nvidia-cutlass==4\.2\.0\.0 --hash=sha256:[0-9a-f]{64}\n", (target / "requirement.txt").read_text()
        )
        cutlass(target / INSIDE)

    monkeypatch.setattr(build, "site_packages", lambda: iter(()))
    monkeypatch.setattr(build.subprocess, "run", install)
    for _ in range(2):
        assert build.find_cutlass(tmp_path) == tmp_path / "cutlass-4.2.0.0" / INSIDE
    assert len(commands) == 1
    assert {"--no-deps", "--require-hashes"} <= set(commands[0])


def test_without_a_network_the_sentence_names_the_ways_out(build, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "site_packages", lambda: iter(()))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("UV_OFFLINE", "1")
    sentence = refusal(build, build.find_cutlass, tmp_path)
    assert sentence.startswith("CUTLASS's headers could not be downloaded (")
    assert sentence.endswith(
        "): install them into this environment (pip install --no-deps nvidia-cutlass==4.2.0.0), or name a CUTLASS checkout "
        "in FLASHMLA_CUTLASS_DIR."
    )


# ---- CUDA: a package of two small sources, from sources to wheel -----------------------------------------------------


class Package:
    """setup.py with one small source per library."""

    def __init__(self, directory):
        self.directory = directory / "package"
        for name in (
            "flashmla_hf/backends",
            "flashmla_hf/hf",
            "flashmla_hf/patches",
            "flashmla_hf/training",
            "csrc/cpu",
            "csrc/sm90",
            "csrc/direct",
        ):
            (self.directory / name).mkdir(parents=True)
        for name in (
            "setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc/sm90/check_build.py", "csrc/sm90/tiles.py", "csrc/sm90/tiles.h", "csrc/direct/sources.json",
        ):  # fmt: skip
            shutil.copy(ROOT / name, self.directory / name)
        for name, text in {
            "flashmla_hf/__init__.py": "__version__ = '1.0'\n",
            "flashmla_hf/backends/__init__.py": "",
            "flashmla_hf/hf/__init__.py": "",
            "flashmla_hf/patches/__init__.py": "",
            "flashmla_hf/training/__init__.py": "",
            "csrc/params.h": "",
            "csrc/direct.h": "",
            "csrc/checks.h": "",
            "csrc/direct/direct.cpp": 'extern "C" int direct() { return FLASHMLA_DIRECT_ABI != 0; }\n',
            "csrc/cpu/cpu.h": "",
            "csrc/cpu/cpu.cpp": 'extern "C" int cpu() { return 0; }\n',
            "csrc/sm90/kernel.cuh": "",
            "csrc/sm90/kernel.cu": 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**);\n'
            'extern "C" int sm90() { return aoti_torch_get_current_cuda_stream(0, nullptr); }\n',
            "csrc/sm90/host.cpp": 'extern "C" int host() { return 0; }\n',
        }.items():
            (self.directory / name).write_text(text)
        cpu = json.loads((ROOT / "csrc/cpu/sources.json").read_text())
        cpu["sources"] = [{"file": "csrc/cpu/cpu.cpp", "flags": [], "arch": None}]
        (self.directory / "csrc/cpu/sources.json").write_text(json.dumps(cpu))
        sm90 = json.loads((ROOT / "csrc/sm90/sources.json").read_text())
        sm90["sources"] = [{"file": "csrc/sm90/host.cpp"}, {"file": "csrc/sm90/kernel.cu"}]
        (self.directory / "csrc/sm90/sources.json").write_text(json.dumps(sm90))
        cutlass(directory / "cutlass" / "include")
        self.defaults = {
            "CUDA_HOME": toolkit(directory),
            "FLASHMLA_CUTLASS_DIR": str(directory / "cutlass"),
            "FLASHMLA_TORCH_DIR": self.torch_that_says("cuda: Optional[str] = '13.0'"),
        }

    def torch_that_says(self, line):
        """The directory of a torch with the installed one's headers and libraries, and this line about CUDA."""
        directory = self.directory.parent / f"torch-{zlib.crc32(line.encode())}" / "torch"
        directory.mkdir(parents=True)
        for name in ("include", "lib"):
            (directory / name).symlink_to(Path(torch.__file__).parent / name)
        (directory / "version.py").write_text(f"__version__ = '{torch.__version__}'\n{line}\n")
        return str(directory)

    def run(self, *arguments, **environment):
        """What was printed; ``exit_code`` and ``stderr`` are the last run's."""
        result = subprocess.run(
            [sys.executable, *arguments], cwd=self.directory, capture_output=True, text=True,
            env=environment_of_a_build(**{**self.defaults, **environment}),
        )  # fmt: skip
        self.exit_code, self.stderr = result.returncode, result.stderr
        return result.stdout

    def build(self, *arguments, **environment):
        """The names of the sources that were compiled."""
        stdout = self.run("setup.py", *(arguments or ("build_ext", "--inplace")), **environment)
        assert self.exit_code == 0, stdout + self.stderr
        return {Path(name).name for name in re.findall(r" -c (\S+) ", stdout)}

    def manifest(self):
        return json.loads((self.directory / "flashmla_hf/_build.json").read_text())

    def wheel_names(self):
        (path,) = self.directory.glob("dist/*.whl")
        assert re.fullmatch(r"flashmla_hf-1\.0-py3-none-\w+\.whl", path.name)
        return zipfile.ZipFile(path).namelist()


@pytest.fixture
def package(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    return Package(tmp_path)


LIBRARIES = ["libflashmla_cpu.so", "libflashmla_sm90.so", "_direct.abi3.so"]


def test_cuda_builds_every_library_into_the_wheel(package):
    package.build("bdist_wheel", FLASHMLA_BUILD="cuda")
    assert {f"flashmla_hf/{name}" for name in LIBRARIES} <= set(package.wheel_names())
    package.build("bdist_wheel", FLASHMLA_BUILD="cpu")  # the other library is no longer in the build directory
    assert "flashmla_hf/libflashmla_sm90.so" not in package.wheel_names()


def test_auto_builds_cuda_where_it_can(package):
    package.build(FLASHMLA_BUILD="auto")
    manifest = package.manifest()
    assert manifest["libraries"] == LIBRARIES
    assert (manifest["cuda"], manifest["archs"], manifest["no_cuda"]) == ("12.4", ["90a"], None)


def test_an_editable_build_leaves_every_library_in_place(package):
    package.run("-c", "from setuptools import build_meta; build_meta.build_editable('.')", FLASHMLA_BUILD="cuda")
    assert package.exit_code == 0, package.stderr
    assert package.manifest()["libraries"] == LIBRARIES
    assert all((package.directory / "flashmla_hf" / name).exists() for name in package.manifest()["libraries"])


def test_auto_says_once_why_it_builds_for_the_cpu_alone(package):
    stdout = package.run("setup.py", "build_ext", "--inplace", FLASHMLA_BUILD="auto", TORCH_CUDA_ARCH_LIST="8.0")
    assert package.exit_code == 0
    assert stdout.count("flashmla_hf: building the CPU library alone: TORCH_CUDA_ARCH_LIST: expected 9.0 among") == 1
    manifest = package.manifest()
    assert (manifest["libraries"], manifest["cuda"], manifest["archs"]) == (
        ["libflashmla_cpu.so", "_direct.abi3.so"],
        None,
        [],
    )
    assert manifest["no_cuda"].startswith("TORCH_CUDA_ARCH_LIST: expected 9.0")


def test_auto_compiles_no_cuda_for_a_torch_without_it_and_cuda_does(package):
    torch_dir = package.torch_that_says("cuda: Optional[str] = None")
    stdout = package.run("setup.py", "build_ext", "--inplace", FLASHMLA_BUILD="auto", FLASHMLA_TORCH_DIR=torch_dir)
    assert package.exit_code == 0, package.stderr
    reason = (
        f"torch {torch.__version__} has no CUDA, and the Hopper library, minutes of compiling, would not load into it; "
        "FLASHMLA_BUILD=cuda builds it all the same."
    )
    assert stdout.count(f"flashmla_hf: building the CPU library alone: {reason}\n") == 1
    assert package.manifest()["no_cuda"] == reason
    assert package.manifest()["libraries"] == ["libflashmla_cpu.so", "_direct.abi3.so"]
    package.build(FLASHMLA_BUILD="cuda", FLASHMLA_TORCH_DIR=torch_dir)
    assert package.manifest()["libraries"] == LIBRARIES


@pytest.mark.parametrize("line", ["cuda = None", "cuda: Optional[str] = None", "cuda: str | None = None  # CPU"])
def test_a_torch_without_cuda_is_known_from_its_files(build, package, line):
    assert build.torch_without_cuda(Path(package.torch_that_says(line))).startswith(f"torch {torch.__version__} has no")


@pytest.mark.parametrize("line", ["cuda = '12.8'", "cuda: Optional[str] = '13.0'", "hip = None", ""])
def test_a_torch_that_may_have_cuda_is_no_reason(build, package, line):
    assert build.torch_without_cuda(Path(package.torch_that_says(f"{line}\nhip: str = None"))) is None


def test_a_build_tells_what_it_compiles_and_at_its_end_what_was_built(package):
    stdout = package.run("setup.py", "build_ext", "--inplace", FLASHMLA_BUILD="cuda", MAX_JOBS="1")
    ours = [line for line in stdout.splitlines() if line.startswith("flashmla_hf: ")]
    assert ours[0] == (
        "flashmla_hf: compiling 4 sources, 1 at a time (MAX_JOBS), 2 of them for CUDA: minutes; FLASHMLA_BUILD=cpu leaves "
        "those out"
    )
    steps = [re.fullmatch(r"flashmla_hf: (\d) of 4 sources compiled, \d+ s: (\S+)", line) for line in ours[1:-1]]
    assert [step[1] for step in steps] == ["1", "2", "3", "4"]
    assert {step[2] for step in steps} == {"kernel.cu", "host.cpp", "cpu.cpp", "direct.cpp"}
    built = r"flashmla_hf: built libflashmla_cpu.so, libflashmla_sm90.so, _direct.abi3.so in \d+ s, with CUDA 12.4 for Hopper. "
    assert re.match(built, stdout.splitlines()[-1])
    again = package.run("setup.py", "build_ext", "--inplace", FLASHMLA_BUILD="cpu")
    assert "compiling" not in again
    assert "without CUDA, as FLASHMLA_BUILD=cpu asks. `python -m flashmla_hf doctor` tests" in again.splitlines()[-1]


def test_a_source_that_takes_long_is_named_meanwhile(build, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(build, "STILL_COMPILING", 0.2)
    slow = build.Job(tmp_path / "slow.cu", tmp_path / "slow.o", ["sleep", "1"], 0.0)
    assert build.compile_all({build.SM90: [slow]}, dispensable=set()) == {}
    printed = capsys.readouterr().out
    assert re.search(r"^flashmla_hf: still compiling after 0 s: slow.cu$", printed, re.M)
    assert re.search(r"^flashmla_hf: 1 of 1 sources compiled, \d s: slow.cu$", printed, re.M)


def test_cuda_ends_with_the_reason_where_it_cannot_be_had(package):
    package.run("setup.py", "build_ext", "--inplace", FLASHMLA_BUILD="cuda", TORCH_CUDA_ARCH_LIST="8.0")
    assert package.exit_code == 1
    assert (
        package.stderr.strip()
        .splitlines()[-1]
        .startswith("flashmla_hf: FLASHMLA_BUILD=cuda: TORCH_CUDA_ARCH_LIST: expected 9.0")
    )


def test_only_what_changed_is_compiled_again(package):
    every = {"cpu.cpp", "host.cpp", "kernel.cu", "direct.cpp"}
    assert package.build(FLASHMLA_BUILD="cuda") == every
    assert package.build(FLASHMLA_BUILD="cuda") == set()
    (package.directory / "csrc/sm90/kernel.cuh").touch()
    assert package.build(FLASHMLA_BUILD="cuda") == {"host.cpp", "kernel.cu"}
    (package.directory / "csrc/cpu/cpu.cpp").touch()
    assert package.build(FLASHMLA_BUILD="cuda") == {"cpu.cpp"}
    (package.directory / "csrc/params.h").touch()
    assert package.build(FLASHMLA_BUILD="cuda") == every
    # With CXX the commands differ, nvcc's by its host compiler.
    assert package.build(FLASHMLA_BUILD="cuda", CXX="g++") == {"host.cpp", "kernel.cu"}


def test_a_cuda_library_in_place_outlives_a_build_for_the_cpu(package):
    package.build(FLASHMLA_BUILD="cuda")
    before = package.manifest()
    package.build(FLASHMLA_BUILD="cpu")
    assert (package.directory / "flashmla_hf/libflashmla_sm90.so").exists()
    assert package.manifest() == before


def test_the_cuda_library_asks_for_torch_cuda_at_run_time(package):
    package.build(FLASHMLA_BUILD="cuda")
    library = package.directory / "flashmla_hf/libflashmla_sm90.so"
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "[libtorch_cuda.so]" in dynamic


def test_libraries_know_whether_they_share_the_types_of_a_direct_call(package):
    package.build()
    before = direct_abis(package)
    assert len(set(before)) == 1
    (package.directory / "csrc/checks.h").write_text("// another type\n")
    package.build()
    assert len(set(direct_abis(package))) == 1
    assert direct_abis(package) != before


def direct_abis(package):
    records = (json.loads(path.read_text()) for path in package.directory.glob("build/temp*/*/*.json"))
    return [word for record in records for word in record["command"] if word.startswith("-DFLASHMLA_DIRECT_ABI=")]


@pytest.mark.parametrize("missing", ["Python.h", "DLPackExchangeAPI"])
def test_without_its_headers_the_direct_way_is_left_out_with_a_reason(package, tmp_path, missing):
    """The rest is built; and what an earlier build left is not taken into a wheel."""
    package.build("bdist_wheel", FLASHMLA_BUILD="cpu")
    if missing == "Python.h":
        program = (
            "import runpy, sys, sysconfig\n"
            "paths = sysconfig.get_path\n"
            f"sysconfig.get_path = lambda name, *a, **k: {str(tmp_path)!r} if name == 'include' else paths(name, *a, **k)\n"
            "sys.argv = ['setup.py', 'bdist_wheel']\n"
            "runpy.run_path('setup.py', run_name='__main__')\n"
        )
        stdout, reason = (
            package.run("-c", program, FLASHMLA_BUILD="cpu"),
            "Python's headers (Python.h, of a package like ",
        )
    else:
        torch_dir = tmp_path / "torch"
        (torch_dir / "include/ATen").mkdir(parents=True)
        (torch_dir / "version.py").write_text("__version__ = '2.10.0'\n")
        (torch_dir / "include/ATen/dlpack.h").write_text("struct DLTensor;\n")
        (torch_dir / "lib").symlink_to(Path(torch.__file__).parent / "lib")
        environment = {"FLASHMLA_BUILD": "cpu", "FLASHMLA_TORCH_DIR": str(torch_dir)}
        stdout, reason = package.run("setup.py", "bdist_wheel", **environment), "this torch's ATen/dlpack.h has no "
    assert package.exit_code == 0, stdout + package.stderr
    assert f"flashmla_hf: building without _direct, calls take some microseconds longer: {reason}" in stdout
    names = package.wheel_names()
    assert "flashmla_hf/libflashmla_cpu.so" in names
    assert "flashmla_hf/_direct.abi3.so" not in names


def test_a_compiler_error_in_a_kernel_names_the_way_out(package):
    spoil_the_compiler(package)
    stdout = package.run("setup.py", "build_ext", "--inplace", FLASHMLA_BUILD="cuda")
    assert package.exit_code == 1
    assert "the sky falls" in stdout
    assert "the compiler's message is above; FLASHMLA_BUILD=cpu builds without CUDA." in package.stderr


def spoil_the_compiler(package):
    (package.directory / "csrc/sm90/kernel.cu").write_text("#error the sky falls\n")


def spoil_the_link(package):
    with (package.directory / "csrc/sm90/kernel.cu").open("a") as file:
        file.write('extern "C" int aoti_torch_unlisted();\nextern "C" int other() { return aoti_torch_unlisted(); }\n')


def spoil_nvcc(package):
    nvcc = Path(package.defaults["CUDA_HOME"]) / "bin/nvcc"
    answer = 'if [ "$1" = --version ]; then echo "release 12.4"; else echo "nvcc fatal   : no licence"; exit 255; fi\n'
    nvcc.write_text("#!/bin/sh\n" + answer)


@pytest.mark.parametrize(
    ("spoil", "code", "error"),
    [
        (spoil_the_compiler, 1, "error: #error the sky falls"),
        (spoil_the_link, 1, "aoti_torch_unlisted"),
        (spoil_nvcc, 255, "nvcc fatal   : no licence"),
    ],
)
@pytest.mark.parametrize("arguments", [("build_ext", "--inplace"), ("bdist_wheel",)])
def test_auto_builds_the_cpu_library_alone_if_nvcc_fails_and_records_why(package, spoil, code, error, arguments):
    package.build(*arguments, FLASHMLA_BUILD="cuda")
    spoil(package)
    stdout = package.run("setup.py", *arguments, FLASHMLA_BUILD="auto")
    assert package.exit_code == 0, stdout + package.stderr
    (line,) = [line for line in stdout.splitlines() if "building the CPU library alone" in line]
    reason = line.removeprefix("flashmla_hf: building the CPU library alone: ")
    assert reason.startswith(f"nvcc 12.4 failed with exit code {code} (")
    assert error in reason
    assert reason.endswith("); FLASHMLA_BUILD=cuda pip install -v . shows its whole message.")
    built = package.directory if "--inplace" in arguments else next(package.directory.glob("build/lib*"))
    manifest = json.loads((built / "flashmla_hf/_build.json").read_text())
    assert (manifest["no_cuda"], manifest["cuda"], manifest["archs"]) == (reason, None, [])
    assert manifest["libraries"] == ["libflashmla_cpu.so", "_direct.abi3.so"]
    # The library of the sources before them is gone: it would pass for this build's.
    assert not (built / "flashmla_hf/libflashmla_sm90.so").exists()
    if arguments == ("bdist_wheel",):
        assert "flashmla_hf/libflashmla_sm90.so" not in package.wheel_names()

    package.run("setup.py", *arguments, FLASHMLA_BUILD="cuda")
    assert package.exit_code == 1


@pytest.mark.parametrize("source", ["csrc/cpu/cpu.cpp", "csrc/direct/direct.cpp"])
def test_auto_ends_with_the_error_of_a_source_that_is_not_cuda_s(package, source):
    (package.directory / source).write_text("#error the sky falls\n")
    stdout = package.run("setup.py", "build_ext", "--inplace", FLASHMLA_BUILD="auto")
    assert package.exit_code == 1
    assert "building the CPU library alone" not in stdout
    assert re.search(r"flashmla_hf: compiling failed with exit code 1 \(.*the sky falls\)", package.stderr)
    assert "FLASHMLA_BUILD" not in package.stderr


def test_what_remains_of_a_library_is_not_compiled_after_its_first_error(package):
    names = [f"csrc/sm90/kernel_{number}.cu" for number in range(4)]
    for name in names:
        (package.directory / name).write_text("#error the sky falls\n")
    path = package.directory / "csrc/sm90/sources.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sources": [{"file": name} for name in names]}))
    stdout = package.run("setup.py", "build_ext", "--inplace", FLASHMLA_BUILD="auto", MAX_JOBS="1")
    assert package.exit_code == 0
    assert stdout.count("error: #error the sky falls") == 2  # the compiler's and the reason's
    assert package.manifest()["libraries"] == ["libflashmla_cpu.so", "_direct.abi3.so"]


def test_a_symbol_of_torch_that_is_not_listed_ends_the_link(package):
    spoil_the_link(package)
    stdout = package.run("setup.py", "build_ext", "--inplace", FLASHMLA_BUILD="cuda")
    assert package.exit_code == 1
    assert "aoti_torch_unlisted" in stdout


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_real_nvcc_builds_a_kernel(package):
    with (package.directory / "csrc/sm90/kernel.cu").open("a") as file:
        file.write(
            "__global__ void scale(float* x) { x[threadIdx.x] *= 2.f; }\nvoid launch(float* x) { scale<<<1, 32>>>(x); }\n"
        )
    package.defaults.pop("CUDA_HOME")
    stdout = package.run("csrc/sm90/check_build.py")
    assert package.exit_code == 0, stdout + package.stderr
    assert re.search(r"\n  scale +\d+ +0 +0 +0 +\d+\n", stdout), stdout
    library = package.directory / "flashmla_hf/libflashmla_sm90.so"
    symbols = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True).stdout
    assert "U aoti_torch_get_current_cuda_stream" in symbols
    assert not re.search(r" cuda[A-Z]", symbols)  # the CUDA runtime is inside, and nothing sees it


def test_every_kernel_source_is_built(build):
    built = {path for path, _ in build.sources_of("sm90")}
    assert {path for path in (ROOT / "csrc/sm90").rglob("*") if path.suffix in (".cu", ".cpp")} <= built
    assert all(path.is_file() for path in built)


# ---- make cuda -------------------------------------------------------------------------------------------------------


def test_make_cuda_shows_a_table_and_checks_what_is_up_to_date(package):
    for _ in range(2):
        stdout = package.run("csrc/sm90/check_build.py")
        assert package.exit_code == 0, stdout + package.stderr
        assert "csrc/sm90/kernel.cu: " in stdout
        assert re.search(r"\n  tiny<64> +168 +0 +0 +1024 +16\n", stdout), stdout


@pytest.mark.parametrize(
    ("ptxas", "sentence"),
    [
        (PTXAS.replace("0 bytes spill stores", "8 bytes spill stores"), "tiny<64> spills 8 bytes of registers: expected 0"),
        (
            PTXAS + "\nptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x",
            "(C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x",
        ),
        ("", "ptxas reported no kernel: expected -Xptxas -v among the flags of sources.json"),
    ],
)  # fmt: skip
def test_make_cuda_fails_on_what_ptxas_reports(package, tmp_path, ptxas, sentence):
    toolkit(tmp_path, ptxas=ptxas)
    for _ in range(2):  # the second time the object is up to date
        package.run("csrc/sm90/check_build.py")
        assert package.exit_code == 1
        assert re.search(rf"flashmla_hf: csrc/sm90/kernel.cu: .*{re.escape(sentence)}\n", package.stderr)


@pytest.mark.parametrize(
    ("name", "text", "warning"),
    [
        ("csrc/cpu/cpu.cpp", "static int spare() { return 0; }\n", r"csrc/cpu/cpu.cpp: csrc/cpu/cpu.cpp:2:12: warning: .*spare"),
        ("csrc/direct.h", "#warning old\n", r"csrc/direct/direct.cpp: csrc/direct.h:1:2: warning: #warning old"),
        ("csrc/sm90/host.cpp", "#warning old\n", r"csrc/sm90/host.cpp: csrc/sm90/host.cpp:2:2: warning: #warning old"),
    ],
)  # fmt: skip
def test_make_cuda_fails_on_a_warning_of_the_host_compiler_in_csrc(package, name, text, warning):
    if name == "csrc/direct.h":
        with (package.directory / "csrc/direct/direct.cpp").open("a") as file:
            file.write('#include "direct.h"\n')
    with (package.directory / name).open("a") as file:
        file.write(text)
    for _ in range(2):  # the second time the object is up to date
        package.run("csrc/sm90/check_build.py")
        assert package.exit_code == 1
        assert re.search(rf"flashmla_hf: {warning}", package.stderr), package.stderr


@pytest.mark.parametrize(
    ("said", "failure"),
    [
        ("{csrc}/sm90/kernel.cuh(71): warning #20050-D: inline qualifier ignored", "csrc/sm90/kernel.cuh(71): warning #20050-D: inline qualifier ignored (2 times)"),
        ("{csrc}/sm90/kernel.cuh(71): remark #1-D: that line", "csrc/sm90/kernel.cuh(71): remark #1-D: that line (2 times)"),
        ("ptxas warning : Value of threads per SM is out of range", "ptxas warning : Value of threads per SM is out of range (2 times)"),
        ("nvcc warning : that option", "nvcc warning : that option (2 times)"),
        ("/elsewhere/cute/tensor.hpp(71): warning #20050-D: inline qualifier ignored", None),
    ],
)  # fmt: skip
def test_make_cuda_fails_on_a_warning_of_nvcc_unless_another_project_s_file_has_it(package, tmp_path, said, failure):
    said = said.format(csrc=package.directory.resolve() / "csrc")
    toolkit(tmp_path, ptxas=f"{PTXAS}\n{said}\n{said}")
    package.run("csrc/sm90/check_build.py")
    assert package.exit_code == (failure is not None), package.stderr
    assert failure is None or f"flashmla_hf: csrc/sm90/kernel.cu: {failure}\n" in package.stderr


def test_headers_of_other_projects_do_not_warn(package):
    """Of CUTLASS, of torch and of Python, whose include directories come after -isystem."""
    (Path(package.defaults["FLASHMLA_CUTLASS_DIR"]) / "include/cutlass/cutlass.h").write_text(
        "inline int theirs() { return 1 / 0; }\n"
    )
    with (package.directory / "csrc/sm90/kernel.cu").open("a") as file:
        file.write("#include <cutlass/cutlass.h>\n")
    stdout = package.run("csrc/sm90/check_build.py")
    assert package.exit_code == 0, stdout + package.stderr
    assert "theirs" not in stdout


# ---- The Makefile ----------------------------------------------------------------------------------------------------


@pytest.fixture
def headers(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return load(ROOT / "csrc/check_headers.py")


def make_without_running(tmp_path, *goals, sees_a_gpu=False):
    """(what make would run, how often it asked PYTHON whether it sees a GPU)."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho asked >> {tmp_path}/asked\necho {int(sees_a_gpu)}\n")
    program.chmod(0o755)
    (tmp_path / "asked").write_text("")
    command = ["make", "--dry-run", f"PYTHON={program}", *goals]
    kept = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=kept)
    return result.stdout, (tmp_path / "asked").read_text().count("asked")


@pytest.mark.parametrize("goal", ["clean", "lint", "format", "sanitize", "test-older-transformers", "test-newest"])
def test_make_imports_torch_for_no_target_that_does_without(tmp_path, goal):
    assert make_without_running(tmp_path, goal)[1] == 0


@pytest.mark.parametrize(
    ("goal", "program"),
    [("demo", "scripts/demo.py"), ("gpu", "tests/gpu_suite.py"), ("cuda", "csrc/sm90/check_build.py")],
)
def test_make_asks_once_for_a_gpu_and_uses_the_python_that_sees_one(tmp_path, goal, program):
    commands, asked = make_without_running(tmp_path, goal, sees_a_gpu=True)
    assert asked == 1
    assert f"PYTHONPATH={ROOT} {tmp_path}/python {program}" in commands
    assert "pip install" not in commands
    assert ("setup.py -q build_ext --inplace" in commands) == (goal != "cuda")
    commands, asked = make_without_running(tmp_path, goal)
    assert asked == 1
    assert f".venv/bin/python {program}" in commands


def test_the_oldest_torch_and_every_older_transformers_have_their_tests(headers):
    makefile = (ROOT / "Makefile").read_text()
    assert f"OTHER_TORCH ?= {headers.TORCH[0]}\n" in makefile
    oldest, *others = re.search(r"^OLDER_TRANSFORMERS := (.+)$", makefile, re.M)[1].split()
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'"transformers>={oldest.removesuffix(".0")}"' in pyproject
    for release in (oldest, *others):
        assert re.search(rf"^TESTS_{re.escape(release)} := tests/test_hf_", makefile, re.M)


# ---- make headers ----------------------------------------------------------------------------------------------------


def test_the_oldest_releases_are_those_that_the_build_and_the_readme_name(headers, build):
    assert headers.TORCH[0].startswith(".".join(map(str, build.MINIMUM_TORCH)) + ".")
    assert tuple(map(int, next(iter(headers.CUDA)).split("."))) == build.MINIMUM_NVCC
    text = (ROOT / "README.md").read_text()
    assert f"torch >= {'.'.join(map(str, build.MINIMUM_TORCH))} already there" in text
    assert f"`nvcc` ≥ {'.'.join(map(str, build.MINIMUM_NVCC))} is found" in text


def test_every_minor_release_of_torch_up_to_the_installed_one_is_compiled_against(headers):
    minors = [tuple(map(int, release.split(".")[:2])) for release in headers.TORCH]
    installed = tuple(map(int, torch.__version__.split(".")[:2]))
    assert minors == [(2, minor) for minor in range(10, minors[-1][1] + 1)]
    assert installed <= minors[-1]


def test_every_host_source_that_sees_torch_or_cuda_is_compiled_against_each(headers, build, monkeypatch, tmp_path):
    monkeypatch.setattr(headers, "HEADERS", tmp_path)
    torches = [tmp_path / release for release in headers.TORCH]
    names = [name for name, _ in headers.jobs(torches, [[tmp_path]] * len(headers.CUDA))]
    seers = {
        str(path.relative_to(build.CSRC))
        for backend in build.BACKENDS.values()
        for path, _ in build.sources_of(backend)
        if path.suffix == ".cpp" and re.search(r"#include (?:<torch|<ATen|\"host\.h)", path.read_text())
    }
    assert seers == {"ops_cpu.cpp", "ops_sm90.cpp", "direct/direct.cpp"}
    for release in headers.TORCH:
        assert {name.split(": ")[1] for name in names if name.startswith(f"torch {release}")} == seers
    for release in headers.CUDA:
        assert f"CUDA {release}: dispatch.cpp" in names
    text = (tmp_path / "sm90_headers.cpp").read_text()
    paths = [path.relative_to(ROOT / "csrc") for path in (ROOT / "csrc/sm90").rglob("*.h")]
    assert len(paths) > 4
    assert all(f'"{path}"' in text for path in paths)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("#include <torch/here.h>\n", None),
        ("#include <torch/gone.h>\n", "torch/gone.h: No such file"),
        ("#include <torch/here.h>\nint use() { return kGone; }\n", "kGone"),
        ("void use() { int spare; }\n", "spare"),  # warnings, too
    ],
)
def test_make_headers_fails_on_what_a_release_lacks(headers, build, tmp_path, text, error):
    (tmp_path / "torch/include/torch").mkdir(parents=True)
    (tmp_path / "torch/include/torch/here.h").write_text("inline void theirs() { int spare; }\n")
    source = tmp_path / "source.cpp"
    source.write_text(text)
    output = headers.compile_one(headers.command(build.CPU, tmp_path / "torch", source))
    assert (output is None) if error is None else (error in output)
