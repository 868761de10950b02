"""The Makefile asks for a GPU once, and `make headers` (csrc/check_headers.py) compiles against every supported release."""

import os
import re
import subprocess

import pytest
import torch
from build_support import ROOT


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


def test_the_oldest_releases_are_those_that_the_build_and_the_readme_name(headers, build):
    assert headers.TORCH[0].startswith(".".join(map(str, build.environment.MINIMUM_TORCH)) + ".")
    assert tuple(map(int, next(iter(headers.CUDA)).split("."))) == build.toolchain.MINIMUM_NVCC
    text = (ROOT / "README.md").read_text() + (ROOT / "docs" / "install.md").read_text()
    assert text.count(f"torch >= {'.'.join(map(str, build.environment.MINIMUM_TORCH))} already there") == 2
    assert text.count(f"`nvcc` ≥ {'.'.join(map(str, build.toolchain.MINIMUM_NVCC))} is found") == 2


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
        str(path.relative_to(build.sources.CSRC))
        for backend in build.sources.BACKENDS.values()
        for path, _ in build.sources.sources_of(backend)
        if path.suffix == ".cpp" and re.search(r"#include (?:<torch|\"host\.h|\"direct/objects\.h)", path.read_text())
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
    output = headers.compile_one(headers.command(build.sources.CPU, tmp_path / "torch", source))
    assert (output is None) if error is None else (error in output)
