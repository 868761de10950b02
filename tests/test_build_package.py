"""A package of two small sources, built from its sources to the wheel, with a program that answers as nvcc does."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

LIBRARIES = ["libflashmla_cpu.so", "libflashmla_sm90.so", "_direct.abi3.so"]


def test_cuda_builds_every_library_into_the_wheel(package):
    package.build("bdist_wheel", FLASHMLA_BUILD="cuda")
    assert {f"flashmla_hf/{name}" for name in LIBRARIES} <= set(package.wheel_names())
    package.build("bdist_wheel", FLASHMLA_BUILD="cpu")  # the other library is no longer in the build directory
    assert "flashmla_hf/libflashmla_sm90.so" not in package.wheel_names()


def test_auto_builds_cuda_if_it_can(package):
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
    assert build.environment.torch_without_cuda(Path(package.torch_that_says(line))).startswith(
        f"torch {torch.__version__} has no"
    )


@pytest.mark.parametrize("line", ["cuda = '12.8'", "cuda: Optional[str] = '13.0'", "hip = None", ""])
def test_a_torch_that_may_have_cuda_is_no_reason(build, package, line):
    assert build.environment.torch_without_cuda(Path(package.torch_that_says(f"{line}\nhip: str = None"))) is None


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
    monkeypatch.setattr(build.compiling, "STILL_COMPILING", 0.2)
    slow = build.compiling.Job(tmp_path / "slow.cu", tmp_path / "slow.o", ["sleep", "1"])
    assert build.compiling.compile_all({build.sources.SM90: [slow]}, dispensable=set()) == {}
    printed = capsys.readouterr().out
    assert re.search(r"^flashmla_hf: still compiling after 0 s: slow.cu$", printed, re.M)
    assert re.search(r"^flashmla_hf: 1 of 1 sources compiled, \d s: slow.cu$", printed, re.M)


def test_mode_cuda_ends_with_the_reason_if_cuda_cannot_be_built(package):
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
    assert package.build(FLASHMLA_BUILD="cuda") == {"kernel.cu"}
    (package.directory / "csrc/cpu/cpu.cpp").touch()
    assert package.build(FLASHMLA_BUILD="cuda") == {"cpu.cpp"}
    (package.directory / "csrc/params.h").touch()
    assert package.build(FLASHMLA_BUILD="cuda") == {"cpu.cpp", "kernel.cu"}
    (package.directory / "csrc/sm90/kernel.cuh").unlink()
    (package.directory / "csrc/sm90/kernel.cu").write_text('#include "params.h"\nextern "C" int sm90() { return 1; }\n')
    assert package.build(FLASHMLA_BUILD="cuda") == {"kernel.cu"}
    (lists,) = {path.parent for path in package.directory.glob("build/**/kernel.d")}
    (lists / "kernel.d").unlink()  # of an object whose files nobody knows
    assert package.build(FLASHMLA_BUILD="cuda") == {"kernel.cu"}
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
def test_the_direct_module_is_left_out_with_a_reason_if_headers_are_missing(package, tmp_path, missing):
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


def test_a_compiler_error_in_a_kernel_names_the_remedy(package):
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


def test_sources_after_the_first_error_of_a_library_are_not_compiled(package):
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
