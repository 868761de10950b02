"""``python -m flashmla_hf doctor``: what it reports, that it fails where something is wrong, and its exit code."""

import builtins
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpu_support import needs_cpu_library

from flashmla_hf import __main__, direct, doctor, libraries
from flashmla_hf.backend import Backend
from flashmla_hf.dispatch import IMPLEMENTATIONS
from flashmla_hf.tested_releases import TESTED


@pytest.fixture(scope="module")
def report():
    return doctor.examine()


def test_the_report_is_plain_data(report):
    assert json.loads(json.dumps(report)) == report


@needs_cpu_library
def test_a_sound_machine_passes(report):
    assert report["problems"] == []
    assert report["passed"]
    assert report["versions"]["torch"] == torch.__version__
    cpu = report["implementations"]["cpu"]
    assert cpu["available"]
    assert report["fp8"].startswith("kernels on Hopper GPUs, of caches none yet; emulated on the CPU")
    assert [test["dtype"] for test in cpu["self-tests"]] == ["float32", "bfloat16"]
    for test in cpu["self-tests"]:
        assert set(test["errors"]) == {"out", "dq", "dk", "dv"}
        assert all(0 < x["error"] <= x["allowed"] for x in test["errors"].values())


@pytest.mark.parametrize("name", ["torch", "transformers", "accelerate", "peft"])
def test_releases_newer_than_the_tests_have_seen_are_named(report, capsys, name):
    newest = TESTED[name][-1]
    versions = {**dict.fromkeys(doctor.PACKAGES), name: "99.1.0+cpu"}
    (sentence,) = doctor._newer_than_tested(versions)
    assert sentence.startswith(f"{name} 99.1.0+cpu is newer than {newest}, the newest release that flashmla_hf ")
    assert doctor._newer_than_tested({**versions, name: f"{newest}.7"}) == []
    doctor.show({**report, "newer than tested": [sentence]})
    assert "newer than" in capsys.readouterr().out


def test_releases_are_compared_as_numbers():
    assert (
        doctor._newer_than_tested({"torch": "2.9.1", "transformers": "5.3.0", "peft": "0.9", "accelerate": "1"}) == []
    )


def test_the_tested_releases_are_those_that_the_tests_install(headers):
    """One table is the statement for users; what the Makefile and CI install must be it."""
    root = Path(__file__).resolve().parent.parent
    makefile = (root / "Makefile").read_text()
    assert [".".join(release.split(".")[:2]) for release in headers.TORCH] == list(TESTED["torch"])
    assert re.search(r"^TORCH \?= torch==(\d+\.\d+)", makefile, re.M)[1] in TESTED["torch"]
    older = re.search(r"^OLDER_TRANSFORMERS := (.+)$", makefile, re.M)[1].split()
    pins = dict(re.findall(r"^(\w+)==(\d+\.\d+)", (root / "requirements.txt").read_text(), re.M))
    assert (*(re.match(r"\d+\.\d+", release)[0] for release in older), pins["transformers"]) == TESTED["transformers"]
    assert (pins["accelerate"],) == TESTED["accelerate"]
    assert (pins["peft"],) == TESTED["peft"]
    newest = dict(re.findall(r"^(\w+)>=(\d+\.\d+)$", (root / "requirements-newest.txt").read_text(), re.M))
    assert newest == {package: releases[-1] for package, releases in TESTED.items()}


def test_direct_calls_are_off_with_an_untested_torch():
    """In a process of its own, where torch says it is another."""
    program = (
        "import json, logging, torch\n"
        "logging.basicConfig(level=logging.INFO)\n"
        "torch.__version__ = torch.torch_version.TorchVersion('9.1.0')\n"
        "from flashmla_hf import attention, direct, doctor\n"
        "assert not direct.enabled\n"
        "q = torch.randn(1, 5, 2, 8, requires_grad=True)\n"
        "attention(q, q, q).sum().backward()\n"
        "problems = []\n"
        "print(json.dumps([doctor._built(problems)['libraries'][direct.FILENAME], problems]))\n"
    )
    for log, level in (("0", "INFO"), ("1", "WARNING")):
        environment = {**os.environ, "FLASHMLA_LOG": log, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr
        state, problems = json.loads(result.stdout.strip().splitlines()[-1])
        assert state.startswith("off: tested with torch ")
        assert "this is 9.1.0" in state
        assert problems == []
        lines = [line for line in result.stderr.splitlines() if direct.FILENAME in line]
        assert lines == [f"{level}:flashmla_hf:{direct.FILENAME}: {state}"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_report_says_why_an_implementation_is_unavailable(report):
    for name in ("sm90", "torch_flash", "flex"):
        entry = report["implementations"][name]
        assert entry == {"available": False, "reason": "no GPU that torch can use", "self-tests": []}
    assert report["gpus"] == []


def test_registration_is_reported(report):
    pytest.importorskip("transformers")
    assert report["transformers"]["registered names"] == ["flashmla", "fmla", "flashmla/flash-attn3", "flashmla_fp8"]


def test_an_unregistered_name_is_a_problem(monkeypatch):
    pytest.importorskip("transformers")
    from flashmla_hf.hf import register

    monkeypatch.setattr(register.modeling_utils, "ALL_ATTENTION_FUNCTIONS", dict.fromkeys(register.NAMES[1:]))
    problems = []
    doctor._examine_transformers(problems)
    assert problems == ["attn_implementation ['flashmla'] is not registered with Transformers"]


def test_switched_off_autoload_is_named(monkeypatch):
    monkeypatch.setenv("FLASHMLA_AUTOLOAD", "0")
    assert "switched off by FLASHMLA_AUTOLOAD=0" in doctor._examine_transformers([])["autoload"]


def replaced(monkeypatch, name, run):
    monkeypatch.setitem(IMPLEMENTATIONS, name, Backend(lambda call: None, run))


@pytest.mark.parametrize(
    ("wrong", "failure"),
    [
        (lambda out: out * 1.01, "out: error"),
        (lambda out: out * float("nan"), "out: error nan"),
        (lambda out: out + (out - out.detach()), "dq: error"),  # right, with gradients twice as large
        (lambda out: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_wrong_implementation_fails_its_self_test(wrong, failure, monkeypatch):
    reference = IMPLEMENTATIONS["reference"].run

    def run(call):
        out, lse = reference(call)
        return wrong(out), lse

    replaced(monkeypatch, "cpu", run)
    monkeypatch.delitem(libraries.unavailable, "cpu", raising=False)
    problems = []
    entry = doctor._examine_implementation("cpu", problems)
    assert failure in entry["self-tests"][0]["failure"]
    assert problems[0].startswith("cpu fails its self-test in float32: ")


def test_a_library_that_does_not_load_is_a_problem(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "doctor.py"))
    monkeypatch.setitem(libraries.unavailable, "cpu", "libflashmla_cpu.so does not load into torch 9: missing symbol")
    monkeypatch.setitem(libraries.unavailable, "sm90", "libflashmla_sm90.so was not built")
    (tmp_path / "libflashmla_cpu.so").touch()
    (tmp_path / "_build.json").write_text("{")
    problems = []
    built = doctor._built(problems)
    assert built["manifest"] is None
    assert built["libraries"]["libflashmla_sm90.so"] == "libflashmla_sm90.so was not built"
    assert "_build.json is not JSON" in problems[0]
    assert "missing symbol; reinstall flashmla_hf" in problems[1]


def test_a_cuda_library_that_was_not_built_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "doctor.py"))
    monkeypatch.setitem(libraries.unavailable, "sm90", "libflashmla_sm90.so was not built")
    (tmp_path / "_build.json").write_text(json.dumps({"no_cuda": "nvcc was not found: put it on PATH."}))
    assert doctor._built([])["libraries"]["libflashmla_sm90.so"] == (
        "libflashmla_sm90.so was not built: nvcc was not found: put it on PATH."
    )


@pytest.mark.parametrize(("cuda", "count"), [(None, 0), ("13.0", 1)])
def test_a_cuda_library_is_a_problem_only_where_torch_has_cuda(monkeypatch, tmp_path, cuda, count):
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "doctor.py"))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setitem(libraries.unavailable, "sm90", "libflashmla_sm90.so does not load")
    (tmp_path / "libflashmla_sm90.so").touch()
    problems = []
    doctor._built(problems)
    assert len([problem for problem in problems if "sm90" in problem]) == count


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA")
def test_a_torch_without_cuda_is_named_as_such(tmp_path):
    """Not as the missing libtorch_cuda.so that the loader reports."""
    package = tmp_path / "flashmla_hf"
    package.mkdir()
    for path in Path(doctor.__file__).parent.glob("*.py"):
        shutil.copy(path, package)
    (package / "libflashmla_sm90.so").write_text("not a library")
    program = "from flashmla_hf import libraries; print(libraries.unavailable['sm90'])"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert result.stdout == f"libflashmla_sm90.so needs a torch with CUDA: torch {torch.__version__} has none\n", (
        result.stderr
    )


def test_the_manifest_of_the_build_is_shown(monkeypatch, tmp_path, capsys, report):
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "doctor.py"))
    manifest = {
        "compiler": "g++ 99",
        "libraries": ["libflashmla_sm90.so"],
        "cuda": "12.9",
        "archs": ["90a"],
        "no_cuda": None,
    }
    (tmp_path / "_build.json").write_text(json.dumps(manifest))
    built = doctor._built([])
    doctor.show({**report, "built": built})
    text = capsys.readouterr().out
    assert all(fact in text for fact in ("g++ 99", "12.9", "90a"))


@pytest.mark.parametrize("has_rich", [True, False])
@pytest.mark.parametrize("problems", [[], ["the [bold]sky[/] falls"]])
def test_the_printed_report_names_every_field(has_rich, problems, report, monkeypatch, capsys):
    if has_rich:
        pytest.importorskip("rich")
        monkeypatch.setenv("COLUMNS", "200")
    else:
        real_import = builtins.__import__

        def without_rich(name, *arguments, **options):
            if name.split(".")[0] == "rich":
                raise ImportError(name)
            return real_import(name, *arguments, **options)

        monkeypatch.setattr(builtins, "__import__", without_rich)
    doctor.show({**report, "problems": problems, "passed": not problems})
    text = capsys.readouterr().out
    for expected in ("torch", torch.__version__, "libflashmla_cpu.so", "sm90", "flex", "autoload"):
        assert expected in text
    assert ("All is well." in text) == (not problems)
    assert all(problem in text for problem in problems)


def test_without_transformers_not_all_is_well(report, capsys):
    state = {**report["transformers"], "registered names": None}
    doctor.show({**report, "transformers": state, "problems": [], "passed": True})
    text = " ".join(capsys.readouterr().out.split())
    assert "Transformers is not installed" in text
    assert "All is well for attention without Transformers; " in text
    assert "All is well." not in text


def test_the_exit_code_says_pass_or_fail(report, monkeypatch, capsys):
    for passed, code in ((True, 0), (False, 1)):
        monkeypatch.setattr(doctor, "examine", lambda passed=passed: {**report, "passed": passed})
        assert __main__.main(["doctor", "--json"]) == code
        assert json.loads(capsys.readouterr().out)["passed"] is passed


def test_without_a_command_the_help_is_printed(capsys):
    assert __main__.main([]) == 0
    assert "doctor" in capsys.readouterr().out


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        __main__.main(["nurse"])
    assert stop.value.code == 2
    assert "nurse" in capsys.readouterr().err


@needs_cpu_library
def test_the_command_runs_as_a_module():
    result = subprocess.run([sys.executable, "-m", "flashmla_hf", "doctor", "--json"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads(result.stdout)["passed"]
