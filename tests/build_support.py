"""Scaffolding of the tests of the build: its environment, a stand-in for nvcc, and a package of two small sources."""

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
SUBPACKAGES = sorted(path.parent.name for path in (ROOT / "flashmla_hf").glob("*/__init__.py"))


def environment_of_a_build(**changes):
    kept = {key: value for key, value in os.environ.items() if key not in SETTINGS}
    return {**kept, "FLASHMLA_BUILD": "cpu", **changes}


def load(path):
    spec = importlib.util.spec_from_file_location(f"flashmla_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refusal(build, function, *arguments):
    with pytest.raises(build.toolchain.CudaUnavailable) as error:
        function(*arguments)
    return str(error.value)


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


def cutlass(include, version="4.2.0"):
    (include / "cutlass").mkdir(parents=True)
    (include / "cutlass" / "cutlass.h").touch()
    parts = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
    (include / "cutlass" / "version.h").write_text("".join(f"#define CUTLASS_{name} {n}\n" for name, n in parts))
    return include


class Package:
    """setup.py with one small source per library."""

    def __init__(self, directory):
        self.directory = directory / "package"
        folders = ("csrc/cpu", "csrc/flashmla_build", "csrc/sm90", "csrc/direct")
        for name in (*folders, *(f"flashmla_hf/{name}" for name in SUBPACKAGES)):
            (self.directory / name).mkdir(parents=True)
        for name in (
            "setup.py", "pyproject.toml", "README.md", "LICENSE",
            *(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/flashmla_build").glob("*.py")),
            "csrc/sm90/check_build.py", "csrc/sm90/tiles.py", "csrc/sm90/tiles.h", "csrc/direct/sources.json",
        ):  # fmt: skip
            shutil.copy(ROOT / name, self.directory / name)
        for name, text in {
            "flashmla_hf/__init__.py": "__version__ = '1.0'\n",
            **{f"flashmla_hf/{name}/__init__.py": "" for name in SUBPACKAGES},
            "csrc/params.h": "",
            "csrc/direct.h": "",
            "csrc/checks.h": "",
            "csrc/checks_decode.h": "",
            "csrc/direct/direct.cpp": 'extern "C" int direct() { return FLASHMLA_DIRECT_ABI != 0; }\n',
            "csrc/cpu/cpu.h": "",
            "csrc/cpu/cpu.cpp": '#include "params.h"\nextern "C" int cpu() { return 0; }\n',
            "csrc/sm90/kernel.cuh": "",
            "csrc/sm90/kernel.cu": '#include "params.h"\n#include "sm90/kernel.cuh"\n'
            'extern "C" int aoti_torch_get_current_cuda_stream(int, void**);\n'
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
