"""The search for the longest context finds it, writes it, and counts a trial out of memory as too long."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from training_support import ON_PATH, options

from flashmla_hf.host_memory import GIB
from flashmla_hf.training import finetune, ledger, machine, max_length

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")


def test_the_search_finds_the_length_and_writes_it(tiny_model, tmp_path, monkeypatch, capsys):
    """The processes are real for two lengths; what would not fit is told by a limit of ours, as the machine's memory is large."""
    monkeypatch.setenv("PYTHONPATH", ON_PATH["PYTHONPATH"])
    real, limit = max_length.run_trial, 2500

    def limited(argv, length, timeout):
        if length > limit:
            return {"length": length, "status": "out_of_memory", "reason": "finetune: out of memory"}
        if length < 600:
            return real(argv, length, timeout)
        return {"length": length, "status": "ok", "peak_bytes": 2**20 * length, "seconds": 1.0}

    monkeypatch.setattr(max_length, "run_trial", limited)
    monkeypatch.setattr(ledger.Ledger, "longest", lambda self, memory: 512)
    monkeypatch.setattr(machine, "memory_available", lambda device: 4 * GIB)
    arguments = options(tiny_model, tmp_path, tmp_path / "out", use_peft=True, find_max_length=True)
    finetune.main(arguments)
    result = json.loads((tmp_path / "out" / "max_length.json").read_text())
    assert result["trials"][0]["status"] == "ok", result
    assert result["trials"][0]["peak_bytes"] > 0
    assert 0.96 * limit <= result["max_length"] <= limit < result["first_that_does_not_fit"]
    assert "max_length: " in capsys.readouterr().out


def test_a_trial_without_host_memory_counts_as_too_long(tmp_path, monkeypatch):
    program = tmp_path / "finetune.py"
    said = "finetune: flashmla_hf.patch: patch 'offload': host memory: expected 3 GiB"
    program.write_text(f"import sys\nsys.exit({said!r})\n")
    monkeypatch.setattr(max_length, "PROGRAM", (str(program),))
    assert max_length.run_trial([], 64, 60) == {"length": 64, "status": "out_of_memory", "reason": said}
    assert machine.is_out_of_memory(RuntimeError(said))


def test_a_trial_beyond_the_memory_ends_with_the_ledgers_advice(tiny_model, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", ON_PATH["PYTHONPATH"])
    program = (
        "import sys; from flashmla_hf.training import finetune, machine; "
        "machine.memory_available = lambda device: 3 * 2**30; finetune.main(sys.argv[1:])"
    )
    arguments = options(tiny_model, tmp_path, tmp_path, attn_implementation="eager", trial_length=16384)
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], env=ON_PATH, capture_output=True, text=True, timeout=120
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("finetune: out of memory; by the ledger"), last
    assert "are scores of eager attention: use --attn_implementation flashmla" in last
