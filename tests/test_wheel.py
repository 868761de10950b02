"""The source archive and the wheel: what they hold, that the archive builds by itself, and that the wheel serves other Pythons
and other releases of torch.

FLASHMLA_TEST_INSTALLS=1 (`make test-wheel`) also downloads the other release of torch, a gigabyte. FLASHMLA_TEST_WHEEL names a
wheel to install instead of the one that is built here.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import other_torch
import pytest
import torch
from build_support import ROOT, SETTINGS, cutlass, load, toolkit

import flashmla_hf

OLDEST_TORCH = "2.10.0"
# torch's own requirements but for CUDA's libraries.
OF_TORCH = ("filelock", "typing-extensions", "sympy", "networkx", "jinja2", "fsspec")
NO_REGISTRY = r"NewConnectionError|No matching distribution found for|Temporary failure in name resolution"


def run(*command, cwd=None, **environment):
    kept = {key: value for key, value in os.environ.items() if key not in (*SETTINGS, "PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**kept, "FLASHMLA_BUILD": "cpu", **environment},
    )


def ran(*command, **environment):
    """What the command printed. Without a package registry, the test is skipped."""
    result = run(*command, **environment)
    if result.returncode != 0 and re.search(NO_REGISTRY, result.stdout + result.stderr):
        pytest.skip("no package registry")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout + result.stderr  # pip -v puts what a build prints into stderr


def tracked_files():
    result = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if result.returncode != 0:
        pytest.skip("not a git checkout")
    return [name for name in result.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Made from a copy of the tracked files, so nothing that lies about in the checkout gets in."""
    source, output = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("sdist")
    for name in tracked_files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    program = f"from setuptools import build_meta; build_meta.build_sdist({str(output)!r})"
    result = subprocess.run([sys.executable, "-c", program], cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (path,) = output.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(archive, tmp_path_factory):
    """Built from the archive alone, under pip's isolation: torch is not importable there, and is not downloaded either."""
    if "FLASHMLA_TEST_WHEEL" in os.environ:
        return Path(os.environ["FLASHMLA_TEST_WHEEL"]).resolve()
    directory = tmp_path_factory.mktemp("wheel")
    printed = ran(sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", directory, archive)
    assert "torch-" not in printed  # no torch archive was collected
    assert re.search(r"flashmla_hf: compiling \d+ sources", printed)
    assert re.search(r"flashmla_hf: built libflashmla_cpu\.so, _direct\.abi3\.so in \d+ s, without CUDA", printed)
    (path,) = directory.glob("*.whl")
    return path


def test_the_source_archive_holds_all_that_a_build_reads(archive):
    with tarfile.open(archive) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    needed = {name for name in tracked_files() if name.startswith(("csrc/", "flashmla_hf/"))}
    needed |= {"setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"}
    assert needed <= held, sorted(needed - held)
    assert not [name for name in held if name.endswith((".so", ".pyc", "_build.json"))]


@pytest.mark.slow
def test_the_wheel_serves_every_python_and_holds_the_library(wheel):
    assert re.fullmatch(rf"flashmla_hf-{flashmla_hf.__version__}-py3-none-\w*linux_\w+\.whl", wheel.name), wheel.name
    names = {*zipfile.ZipFile(wheel).namelist()}
    assert {
        f"flashmla_hf/{name}" for name in ("libflashmla_cpu.so", "_direct.abi3.so", "_build.json", "py.typed")
    } <= names
    assert {name for name in tracked_files() if name.startswith("flashmla_hf/") and name.endswith(".py")} == {
        name for name in names if name.startswith("flashmla_hf/") and name.endswith(".py")
    }
    assert not any(name.startswith(("tests/", "csrc/")) for name in names)
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    assert "flashmla_hf.autoload:install" in zipfile.ZipFile(wheel).read(entry_points).decode()


@pytest.mark.slow
def test_the_installed_wheel_computes_outside_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = (
        "import torch, flashmla_hf\n"
        "q = torch.randn(1, 9, 2, 8)\n"
        "torch.testing.assert_close(flashmla_hf.attention(q, q, q), flashmla_hf.attention(q, q, q, impl='reference'))\n"
        "print(flashmla_hf.__file__)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(tmp_path / "site"))


# ---- Fresh environments ----------------------------------------------------------------------------------------------


def pythons():
    """Minor version -> program, of every Python >= 3.10 with venv that this machine has."""
    found = {}
    places = [Path(name) for name in os.environ["PATH"].split(os.pathsep)]
    places += (Path.home() / ".pyenv" / "versions").glob("*/bin")
    for place in places:
        for program in place.glob("python3.[0-9]*"):
            minor = re.fullmatch(r"python3\.(\d+)", program.name)
            if minor and int(minor[1]) >= 10 and int(minor[1]) not in found:
                works = subprocess.run([program, "-c", "import ensurepip, ssl"], capture_output=True).returncode == 0
                if works:
                    found[int(minor[1])] = program
    return found


def doctor_in(environment, directory):
    # From a folder without the checkout, which -m would put first on the path.
    report = run(environment / "bin/python", "-m", "flashmla_hf", "doctor", "--json", cwd=directory)
    assert report.returncode == 0, report.stdout + report.stderr
    report = json.loads(report.stdout)
    assert report["versions"]["flashmla_hf at"].startswith(str(directory))
    assert report["built"]["libraries"]["libflashmla_cpu.so"] == "loaded"
    assert report["built"]["libraries"]["_direct.abi3.so"] == "loaded"
    return report["versions"]


@pytest.mark.slow
def test_the_wheel_passes_doctor_beside_the_installed_torch_in_a_fresh_environment(wheel, tmp_path):
    """pip installs torch and all that it needs: done only if there is a file of torch without CUDA, of 200 MB."""
    if torch.version.cuda is not None:
        pytest.skip("torch has CUDA: its file and those that it needs are gigabytes")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    pip = [tmp_path / "env/bin/python", "-m", "pip", "install", "-q"]
    ran(*pip, f"torch=={torch.__version__}")
    ran(*pip, wheel)
    versions = doctor_in(tmp_path / "env", tmp_path)
    assert versions["torch"] == torch.__version__
    assert versions["transformers"] is None  # it needs torch alone


@pytest.mark.slow
def test_the_wheel_passes_doctor_under_another_python_and_the_oldest_torch(wheel, tmp_path):
    """The oldest Python of this machine that is not the one that compiled the wheel."""
    others = sorted(minor for minor in pythons() if minor != sys.version_info.minor)
    if not others:
        pytest.skip("no second Python >= 3.10")
    program = pythons()[others[0]]
    packages = ROOT / "build" / f"torch-{OLDEST_TORCH}-3.{others[0]}" / "packages"
    if not packages.exists():
        if os.environ.get("FLASHMLA_TEST_INSTALLS") != "1":
            pytest.skip(f"a gigabyte to download: `make test-wheel` installs torch {OLDEST_TORCH}")
        try:
            other_torch.install(OLDEST_TORCH, packages, str(program))
        except subprocess.CalledProcessError as error:
            pytest.skip(f"torch {OLDEST_TORCH} for Python 3.{others[0]} cannot be installed: {error}")
    subprocess.run([program, "-m", "venv", tmp_path / "env"], check=True)
    ran(tmp_path / "env/bin/python", "-m", "pip", "install", "-q", *OF_TORCH)
    # Without what torch requires: in the place of CUDA's libraries stand those of other_torch.py.
    ran(tmp_path / "env/bin/python", "-m", "pip", "install", "-q", "--no-deps", wheel)
    (site,) = (tmp_path / "env/lib").glob("python3.*/site-packages")
    (site / "torch.pth").write_text(f"{packages}\n")
    versions = doctor_in(tmp_path / "env", tmp_path)
    assert versions["torch"].split("+")[0] == OLDEST_TORCH
    assert versions["python"].startswith(f"3.{others[0]}.")


# ---- make wheel ------------------------------------------------------------------------------------------------------


@pytest.fixture
def make_wheel():
    return load(ROOT / "csrc/make_wheel.py")


@pytest.mark.parametrize(("has_cuda", "mode"), [(True, "cuda"), (False, "cpu")])
def test_auto_puts_cuda_into_the_wheel_whatever_torch_is_here(
    make_wheel, monkeypatch, tmp_path, capsys, has_cuda, mode
):
    if has_cuda:
        cutlass(tmp_path / "cutlass" / "include")
        monkeypatch.setenv("CUDA_HOME", toolkit(tmp_path))
        monkeypatch.setenv("FLASHMLA_CUTLASS_DIR", str(tmp_path / "cutlass"))
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    else:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert make_wheel.mode("auto") == mode
    assert ("the wheel is for the CPU alone: TORCH_CUDA_ARCH_LIST" in capsys.readouterr().out) == (not has_cuda)
    assert [make_wheel.mode(name) for name in ("cpu", "cuda")] == ["cpu", "cuda"]


def test_a_wheel_that_auditwheel_refuses_keeps_its_tag_and_says_why(make_wheel, monkeypatch, tmp_path, capsys):
    answer = subprocess.CompletedProcess([], 1, "", "INFO: looking\nauditwheel: error: too-recent versioned symbols\n")
    monkeypatch.setattr(make_wheel.subprocess, "run", lambda *_, **__: answer)
    built = tmp_path / "flashmla_hf-1.0-py3-none-linux_x86_64.whl"
    built.touch()
    (tmp_path / "dist").mkdir()
    assert make_wheel.tagged(built, tmp_path / "dist") == tmp_path / "dist" / built.name
    assert capsys.readouterr().out == (
        "flashmla_hf: auditwheel gives no manylinux tag, so the wheel keeps its own: auditwheel: error: too-recent versioned "
        "symbols\n"
    )


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_the_versions_of_the_system_s_symbols_are_read_from_the_library(make_wheel):
    versions = make_wheel.newest_versions((ROOT / "flashmla_hf" / "libflashmla_cpu.so").read_bytes())
    assert [version.partition("_")[0] for version in versions] == ["CXXABI", "GCC", "GLIBC", "GLIBCXX"]
