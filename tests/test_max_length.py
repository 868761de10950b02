"""The search for the longest context finds it, writes it, and counts a trial out of memory as too long."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import engine_cases
import gloo_processes
import pytest
from training_support import ON_PATH, options

from flashmla_hf.host_memory import GIB
from flashmla_hf.training import finetune, ledger, machine, max_length

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")


def test_the_search_finds_the_length_and_writes_it(tiny_model, tmp_path, monkeypatch, capsys):
    """The processes are real for two lengths; what would not fit is told by a limit of ours, as the machine's memory is large."""
    monkeypatch.setenv("PYTHONPATH", ON_PATH["PYTHONPATH"])
    real, limit = max_length.run_trial, 2500

    def limited(argv, length, timeout, *_):
        if length > limit:
            return {"length": length, "status": "out_of_memory", "reason": "finetune: out of memory"}
        if length < 600:
            return real(argv, length, timeout)
        return {"length": length, "status": "ok", "peak_bytes": 2**20 * length, "seconds": 1.0}

    monkeypatch.setattr(max_length, "run_trial", limited)
    monkeypatch.setattr(ledger.Ledger, "longest", lambda self, memory: 512)
    monkeypatch.setattr(machine, "memory_available", lambda device: 4 * GIB)
    arguments = options(tiny_model, tmp_path, tmp_path / "out", use_peft=True, find_max_length=True, max_length=4096)
    finetune.main(arguments)
    result = json.loads((tmp_path / "out" / "max_length.json").read_text())
    assert result["trials"][0]["status"] == "ok", result
    assert result["trials"][0]["peak_bytes"] > 0
    assert 0.96 * limit <= result["max_length"] <= limit < result["first_that_does_not_fit"]
    said = capsys.readouterr().out
    assert "max_length: " in said
    assert "bounded by max_length 4,096, beyond the model's 2,048 positions" in said


def test_the_search_ends_at_the_positions_of_the_model(tiny_model, tmp_path, monkeypatch, capsys):
    def fits(argv, length, timeout, *_):
        return {"length": length, "status": "ok", "peak_bytes": 2**20 * length, "seconds": 1.0}

    monkeypatch.setattr(max_length, "run_trial", fits)
    for predicted in (10**7, 512):
        monkeypatch.setattr(ledger.Ledger, "longest", lambda self, memory, predicted=predicted: predicted)
        finetune.main(options(tiny_model, tmp_path, tmp_path / "out"), "max-length")
        result = json.loads((tmp_path / "out" / "max_length.json").read_text())
        assert result["max_length"] == max(trial["length"] for trial in result["trials"]) == 2048
        said = capsys.readouterr().out
        first = min(predicted, 2048)
        assert f"trying {first:,} tokens, for at most 600 s\n{first:>9,} tokens: ok" in said
        assert (
            said.count("bounded by the model's 2,048 positions (max_position_embeddings); a larger --max_length") == 2
        )
    assert max_length.search_bound(None, 10**6) == (None, "")
    assert max_length.search_bound(512, 1024)[0] == 512  # 1024 is the default: nobody asked for it


def test_an_interrupted_search_says_what_it_has_found(tiny_model, tmp_path, monkeypatch, capsys):
    trials, allowed = [], [0]

    def interrupted(argv, length, timeout, *_):
        if len(trials) == allowed[0]:
            raise KeyboardInterrupt
        trials.append(length)
        return {"length": length, "status": "ok", "peak_bytes": 2**20 * length, "seconds": 1.0}

    monkeypatch.setattr(max_length, "run_trial", interrupted)
    monkeypatch.setattr(ledger.Ledger, "longest", lambda self, memory: 512)
    for count, said in ((0, "no trial has ended"), (1, "up to 512 tokens fit so far; the trials that ended are in ")):
        allowed[0] = count
        with pytest.raises(SystemExit) as caught:
            finetune.main(options(tiny_model, tmp_path, tmp_path / "out"), "max-length")
        assert caught.value.code == 130
        found = capsys.readouterr().err
        assert f"max-length: interrupted; {said}" in found
        assert "--resume" not in found


@contextlib.contextmanager
def _default_signals():
    """A child started here has them: one inherits what is ignored, as SIGHUP under nohup and SIGINT in a script's job."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGHUP, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


ENDED_BY = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL]


@pytest.mark.parametrize("number", ENDED_BY, ids=lambda number: number.name)
def test_a_signal_that_ends_the_search_ends_the_trial(number, tmp_path):
    """The trial has a child of its own; both are gone, and the parent ends as the signal ends any Python process."""
    written = tmp_path / "pids"
    child = (
        "import os, subprocess, sys, time; "
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        f"open({str(written) + '.part'!r}, 'w').write(f'{{os.getpid()}} {{p.pid}}'); "
        f"os.rename({str(written) + '.part'!r}, {str(written)!r}); time.sleep(60)"
    )
    program = f"import sys; from flashmla_hf.training import child_process as c; c.run([sys.executable, '-c', {child!r}], 'X', 60)"
    with _default_signals():
        parent = subprocess.Popen([sys.executable, "-c", program], env=ON_PATH, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 50
    while not written.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = [int(pid) for pid in written.read_text().split()]
    os.kill(parent.pid, number)
    assert parent.wait(20) == -number
    deadline = time.monotonic() + 10
    while any(map(_is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_is_running, pids))


def test_nothing_is_left_of_a_trial_that_ends_by_itself(tmp_path):
    """Not the process that would end the trial with this one, nor is a later process of the trial's number ended."""
    program = (
        f"from flashmla_hf.training import child_process as c; print(c.run({['true']!r}, 'X', 60).reason); input()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], env=ON_PATH, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout.readline() == "no output\n"
    assert Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split() == []
    parent.communicate("\n", timeout=20)
    assert parent.returncode == 0


@pytest.mark.parametrize("end", ["its time", "a signal"])
def test_a_worker_in_a_session_of_its_own_ends_with_the_trial(end, tmp_path):
    """As torchrun starts its workers: killing torchrun's session does not reach them."""
    written = tmp_path / "pid"
    child = (
        "import os, subprocess, sys, time; p = subprocess.Popen(['sleep', '60'], start_new_session=True, "
        "stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL); "
        f"open({str(written) + '.part'!r}, 'w').write(str(p.pid)); os.rename({str(written) + '.part'!r}, {str(written)!r}); "
        "time.sleep(60)"
    )
    limit = 3 if end == "its time" else 60
    program = f"import sys; from flashmla_hf.training import child_process as c; print(c.run([sys.executable, '-c', {child!r}], 'X', {limit}).status)"
    parent = subprocess.Popen([sys.executable, "-c", program], env=ON_PATH, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 50
    while not written.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    worker = int(written.read_text())
    assert _is_running(worker)
    if end == "a signal":
        os.kill(parent.pid, signal.SIGKILL)
    told, _ = parent.communicate(timeout=50)
    assert told == ("timeout\n" if end == "its time" else "")
    deadline = time.monotonic() + 10
    while _is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(worker)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_trial_without_host_memory_counts_as_too_long(tmp_path, monkeypatch):
    program = tmp_path / "finetune.py"
    said = "finetune: flashmla_hf.patch: patch 'offload': host memory: expected 3 GiB"
    program.write_text(f"import sys\nsys.exit({said!r})\n")
    monkeypatch.setattr(max_length, "PROGRAM", (str(program),))
    assert max_length.run_trial([], 64, 60) == {"length": 64, "status": "out_of_memory", "reason": said}
    assert machine.is_out_of_memory(RuntimeError(said))


def with_little_memory(arguments: list[str], folder: Path) -> dict | str:
    machine.memory_available = lambda device: 3 * GIB
    return engine_cases.finetune("", arguments, folder)


def test_a_trial_beyond_the_memory_ends_with_the_ledgers_advice(tiny_model, tmp_path):
    """Really: the system refuses memory beyond the limit of a trial's process."""
    arguments = options(tiny_model, tmp_path, tmp_path, attn_implementation="eager", trial_length=16384)
    (told,) = gloo_processes.run(with_little_memory, arguments, tmp_path, processes=1)
    assert told.startswith("finetune: out of memory; by the ledger"), told
    assert "are scores of eager attention: use --attn_implementation flashmla" in told


def test_a_trial_on_several_processes_reports_the_fullest_of_them(tiny_model, tmp_path, monkeypatch):
    """By torchrun, as on several GPUs."""
    monkeypatch.setenv("PYTHONPATH", ON_PATH["PYTHONPATH"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = options(tiny_model, tmp_path, tmp_path / "out", gpus=2)
    trial = max_length.run_trial(arguments, 64, 90, gpus=2)
    assert trial["status"] == "ok", trial
    assert trial["peak_bytes"] > 2**20


def test_the_sentence_of_a_process_that_fails_is_found_beside_the_launchers_words(tmp_path, monkeypatch):
    """By torchrun; what ends as finetune does stands in for it. test_launch.py has finetune itself say its sentence."""
    program = tmp_path / "finetune.py"
    program.write_text("import os, sys\nsys.exit(f'finetune: process {os.environ[\"RANK\"]}: a mistake')\n")
    monkeypatch.setattr(max_length, "PROGRAM", (str(program),))
    told = max_length.run_trial([], 64, 90, gpus=2)
    assert told["status"] == "error"
    assert told["reason"] in ("finetune: process 0: a mistake", "finetune: process 1: a mistake")


def test_gpus_are_an_option_of_the_search_alone(tiny_model, corpus, tmp_path):
    with pytest.raises(SystemExit, match="--gpus and --fsdp are options of max-length"):
        finetune.main(options(tiny_model, corpus, tmp_path, gpus=2))
    with pytest.raises(SystemExit, match="--sp_size: expected a divisor of --gpus 2, got 3"):
        finetune.main(options(tiny_model, corpus, tmp_path, gpus=2, sp_size=3), "max-length")
