"""Building and installing as a user does: pip's build isolation, what the wheel holds, and the sentences of failure."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from build_support import ROOT, environment_of_a_build


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
    local = build.compiling.LOCAL_RUNTIME if is_ours else []
    ours = ["-static-libstdc++", "-static-libgcc", "-Wl,--as-needed", *local]
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


def test_every_kernel_source_is_built(build):
    built = {path for path, _ in build.sources.sources_of("sm90")}
    assert {path for path in (ROOT / "csrc/sm90").rglob("*") if path.suffix in (".cu", ".cpp")} <= built
    assert all(path.is_file() for path in built)
