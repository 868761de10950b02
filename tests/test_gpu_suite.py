"""The runner of the GPU parts (tests/gpu_suite.py), as far as a machine without a GPU can tell."""

import re
import sys
import time
from pathlib import Path

import gpu_suite
import pytest
from gpu_suite import PARTS, Step, verdict

ROOT = Path(__file__).resolve().parent.parent
STEPS = [step for steps in PARTS.values() for step in steps]


def selections(path):
    return [step.arguments[step.arguments.index("-k") + 1] for step in STEPS if path in step.arguments]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_every_step_names_a_file_that_is_there(step):
    for argument in step.arguments:
        if argument.endswith(".py"):
            assert (ROOT / argument).is_file()


def test_every_test_of_a_file_that_is_split_is_in_exactly_one_step():
    assert selections("tests/test_gpu.py") == ["sm90 or not flex", "flex"]
    for pattern in ("test_sm90*.py", "test_gpu_*.py"):
        for path in sorted((ROOT / "tests").glob(pattern)):
            name = f"tests/{path.name}"
            steps = [step.name for step in STEPS if name in step.arguments and "-k" not in step.arguments]
            assert len(steps) == (name != "tests/test_gpu_suite.py"), name


def test_the_part_decode_selects_what_needs_a_hopper():
    (step,) = PARTS["decode"]
    files = [name for name in step.arguments if name.endswith(".py")]
    assert files == [f"tests/{path.name}" for path in sorted((ROOT / "tests").glob("test_decode*.py"))] != []
    # Tests of the GPU alone have no parameter that names sm90: their names must not hold a word that is left out.
    for name in files:
        text = (ROOT / name).read_text()
        for decorated in re.findall(r"@gpu_support\.needs_sm90\n(?:@.*\n)*def (\w+)", text):
            assert not re.search("cpu|reference", decorated), decorated


def test_a_step_that_hangs_is_ended_and_what_it_printed_is_kept(tmp_path, capsys):
    log = tmp_path / "log"
    started = time.monotonic()
    program = "import time; print('before', flush=True); time.sleep(60)"
    assert gpu_suite.run([sys.executable, "-c", program], 3, log) is None
    assert time.monotonic() - started < 20
    assert log.read_text() == "before\n"
    assert "before" in capsys.readouterr().out


def test_exit_codes_and_words_become_verdicts(tmp_path):
    assert gpu_suite.run([sys.executable, "-c", "raise SystemExit(3)"], 20, tmp_path / "log") == 3
    tests, tool = Step("t", (*gpu_suite.PYTEST, "x"), 9), Step("memcheck", ("x",), 9, "memcheck")
    control = PARTS["sanitize"][0]
    wrote = "control: wrote past the end"
    for step, code, output, expected in (
        (tests, 0, "3 passed, 1 skipped in 0.1s", "passed"),
        (tests, 0, "4 skipped in 0.1s", "not run"),
        (tests, 1, "1 failed, 3 passed in 0.1s", "FAILED"),
        (tests, None, "..", "FAILED"),
        (tool, 0, "0 errors", "passed"),
        (tool, gpu_suite.SANITIZER_ERROR, "1 error", "FAILED"),
        (tool, 1, "Error: Device not supported", "not run"),
        (control, gpu_suite.SANITIZER_ERROR, wrote, "passed"),
        (control, 0, wrote, "FAILED"),
        (control, 1, "AttributeError", "not run"),
    ):
        assert verdict(step, code, output).split(":")[0].split(" (")[0] == expected, (step, code)


def test_an_unknown_part_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        gpu_suite.main(["sm91"])
    assert (
        "unknown part 'sm91': expected some of doctor, sm90, decode, latent, fp8, robust, sweep"
        in capsys.readouterr().err
    )
