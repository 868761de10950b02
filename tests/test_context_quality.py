"""The held-out loss by context length, beside the curve of eager attention."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import context_quality
import documents
import pytest

from flashmla_hf.training import finetune, machine

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")


def _quality(folder, output_dir, *more):
    arguments = ["--model", str(folder), "--contexts", "64", "128", "--tokens_per_step", "128", "--max_steps", "3"]
    context_quality.main(
        [*arguments, "--device", "cpu", "--eager_context", "64", "--output_dir", str(output_dir), *more]
    )


def _run_here(command):
    """A run of finetune in this process: importing takes longer than its three steps."""
    assert command[:3] == [sys.executable, "-m", "flashmla_hf.training.finetune"]
    finetune.main(command[3:])
    return SimpleNamespace(returncode=0)


def test_the_loss_by_context_stands_beside_eagers_curve(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(context_quality, "subprocess", SimpleNamespace(run=_run_here))
    text = " ".join(f"{word} {i}" for i in range(150) for word in ("alpha", "beta", "gamma"))
    monkeypatch.setattr(documents, "standard_library", lambda: {f"{i}.py": text[i:] for i in range(6)})
    monkeypatch.setattr(machine, "fastest_dtype", lambda device: "float32")
    _quality(tiny_model, tmp_path)
    document = json.loads((tmp_path / "context_quality.json").read_text())
    assert [p["context"] for p in document["points"]] == [64, 128]
    curves = context_quality.beside_eager(document)
    assert len(curves["mine"]) == len(curves["eager"]) == 3
    assert 0 <= curves["apart"] <= curves["allowed"]
    assert "At 64 tokens also by eager attention" in (tmp_path / "context_quality.md").read_text()
    assert (tmp_path / "context_quality.png").read_bytes().startswith(b"\x89PNG")

    def again(folder, context, files, output_dir, args, attn_implementation="flashmla"):
        if attn_implementation == "eager":
            document["eager"]["losses"][-1] += 0.01
            return document["eager"]
        return next(p for p in document["points"] if p["context"] == context)

    monkeypatch.setattr(context_quality, "train_one", again)
    with pytest.raises(SystemExit, match=r"the losses differ by .*e-0[12] nats, allowed 1e-03"):
        _quality(tiny_model, tmp_path / "again")
    with pytest.raises(SystemExit, match="expected one of --contexts"):
        _quality(tiny_model, tmp_path, "--eager_context", "32")
