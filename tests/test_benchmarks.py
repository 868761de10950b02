"""The benchmarks: formulas, the check that refuses wrong results, and what a tiny run writes."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

# Before torch is: other work on the machine must not slow a test tenfold (see scripts/finetune.py).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "scripts")]

import bench_attention  # noqa: E402
import bench_model  # noqa: E402
import render_results  # noqa: E402
from bench_attention import Inputs, Shape  # noqa: E402

from flashmla_hf import attention  # noqa: E402

SMALL = Shape.parse("d64 B2 H4/2 S160 causal fp32")


def test_flop_formulas():
    full = Shape(2, 8, 4, 1000, 1000, 128, 64)
    pairs = 2 * 8 * 1000 * 1000
    assert full.flops("fwd") == 2 * pairs * (128 + 64)
    assert full.flops("bwd") == 2 * pairs * (3 * 128 + 2 * 64)
    assert full.flops("fwd+bwd") == full.flops("fwd") + full.flops("bwd")
    causal = Shape(2, 8, 4, 1000, 1000, 128, 64, is_causal=True)
    assert causal.flops("fwd") * 2 == full.flops("fwd")


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_kv", "window"),
    [(50, 50, None), (50, 50, 7), (20, 50, None), (20, 50, 7), (50, 20, None), (50, 20, 7)],
)
def test_visible_pairs_are_those_of_the_mask(seqlen_q, seqlen_kv, window):
    shape = Shape(1, 1, 1, seqlen_q, seqlen_kv, 8, 8, True, window)
    position = torch.arange(seqlen_q)[:, None] + seqlen_kv - seqlen_q
    key = torch.arange(seqlen_kv)
    visible = (key <= position) & (key >= position - (seqlen_kv if window is None else window))
    assert shape.visible_pairs() == int(visible.sum())


def test_a_window_counts_its_pairs_and_full_causal_half_the_square():
    windowed = Shape(1, 1, 1, 8192, 8192, 64, 64, True, 512)
    assert windowed.flops("fwd") == 2 * windowed.visible_pairs() * 128
    assert windowed.flops("fwd") < 0.13 * Shape(1, 1, 1, 8192, 8192, 64, 64, True).flops("fwd")


@pytest.mark.parametrize("suite", bench_attention.SUITES)
def test_shapes_read_back_as_they_are_printed(suite):
    for shape in bench_attention.SUITES[suite]:
        assert Shape.parse(str(shape)) == shape


@pytest.mark.parametrize("text", ["d64", "d64 B1 H3/2 S8 causal", "d64 B1 H2 S8 sideways"])
def test_a_shape_that_is_none_is_refused_with_the_form(text):
    with pytest.raises(SystemExit, match="--shape"):
        bench_attention.main(["--shape", text, "--device", "cpu"])


def _right(q, k, v):
    return attention(q, k, v, is_causal=True)


def _late_in_one_row(q, k, v):
    out = _right(q, k, v).clone()
    out[-1, -1, -1] = attention(q[:, -1:], k[:, :-1], v[:, :-1])[-1, 0, -1]  # the last query misses its own key
    return out


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k):
        return k.clone()

    @staticmethod
    def backward(ctx, dk):
        return 1.01 * dk


WRONG = {
    "zeros": (lambda q, k, v: 0 * _right(q, k, v), "O is off"),
    "half scale": (lambda q, k, v: _right(q / 2, k, v), "O is off"),
    "mask ignored": (lambda q, k, v: attention(q, k, v), "O is off"),
    "mask off by one": (lambda q, k, v: attention(q, k, v, window=(None, 1)), "O is off"),
    "one row misses a key": (_late_in_one_row, "O is off"),
    "wrong kv head": (lambda q, k, v: _right(q, k.flip(2), v), "O is off"),
    "infinite elsewhere": (lambda q, k, v: _right(q, k, v).index_fill(2, torch.tensor([0]), torch.inf), "not finite"),
    "heads and rows swapped": (lambda q, k, v: _right(q, k, v).transpose(1, 2), "the output has shape"),
    "dK one percent large": (lambda q, k, v: _right(q, _WrongGradient.apply(k), v), "dK is off"),
    "no gradient to V": (lambda q, k, v: _right(q, k, v.detach() + 0 * v), "dV is off"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_implementation_gets_no_number(wrong):
    run, said = WRONG[wrong]
    inputs = Inputs.random(SMALL, "cpu")
    truth = bench_attention.expected(SMALL, inputs, needs_gradients=True)
    problem, _ = bench_attention.verdict(SMALL, run, inputs, truth)
    assert problem is not None
    assert said in problem


@pytest.mark.parametrize(
    "text",
    [
        "d64 B2 H4/2 S160 causal fp32",
        "d64 B1 H2/2 S300 full bf16",
        "d64 B1 H4/1 S300 window40 fp16",
        "d96/64 B1 H2/2 S100/170 causal bf16",
        "d64 B1 H2/2 S170/100 causal fp32",
    ],
)
@pytest.mark.parametrize("peer", ["flashmla", "sdpa", "eager"])
def test_right_implementations_pass_the_check(text, peer):
    shape = Shape.parse(text)
    if shape.seqlen_q > shape.seqlen_kv and peer != "flashmla":
        pytest.skip("rows that see no key: the peers give the mean of V or NaN there, flashmla zero")
    inputs = Inputs.random(shape, "cpu")
    truth = bench_attention.expected(shape, inputs, needs_gradients=True)
    problem, errors = bench_attention.verdict(shape, bench_attention.PEERS[peer](shape, "cpu"), inputs, truth)
    assert problem is None, errors


def test_a_tiny_run_writes_json_and_the_page(tmp_path, capsys):
    bench_attention.main(
        ["--suite", "tiny", "--device", "cpu", "--repeats", "3", "--slice", "0.01", "--output_dir", str(tmp_path)]
    )
    (path,) = tmp_path.glob("attention-*.json")
    document = json.loads(path.read_text())
    assert {r["status"] for r in document["records"]} == {"ok"}
    assert len(document["records"]) == 2 * 2 * 3  # shapes, modes, peers
    for record in document["records"]:
        shape = Shape.parse(record["shape"])
        assert record["flops_per_second"] == pytest.approx(shape.flops(record["mode"]) / record["seconds"])
        assert record["errors"]["dK"] < 1e-4
    page = (tmp_path / "RESULTS.md").read_text()
    assert document["environment"]["device"] in page
    assert re.search(r"\| d64 B1 H4/2 S256 causal fp32 \| \d+ \(±\d+ %\)", page)
    assert "geometric mean over 2 shapes" in page


def test_a_run_with_a_wrong_kernel_names_it_and_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench_attention.PEERS, "flashmla", lambda shape, device: WRONG["mask off by one"][0])
    with pytest.raises(SystemExit, match="WRONG RESULTS, not timed: flashmla"):
        bench_attention.main(
            ["--shape", str(SMALL), "--device", "cpu", "--peers", "flashmla", "sdpa", "--repeats", "3",
             "--slice", "0.01", "--output_dir", str(tmp_path), "--name", "wrong"]
        )  # fmt: skip
    document = json.loads((tmp_path / "wrong.json").read_text())
    statuses = {(r["peer"], r["status"]) for r in document["records"]}
    assert statuses == {("flashmla", "wrong"), ("sdpa", "ok")}
    assert "flashmla at d64 B2 H4/2 S160 causal fp32: wrong: O is off" in (tmp_path / "RESULTS.md").read_text()


def test_a_used_up_time_budget_is_said(tmp_path, capsys):
    bench_attention.main(
        ["--suite", "tiny", "--device", "cpu", "--time_budget", "0", "--output_dir", str(tmp_path), "--name", "none"]
    )
    assert len(json.loads((tmp_path / "none.json").read_text())["skipped"]) == 2
    assert "was used up: d64 B1 H4/2 S256 causal fp32" in capsys.readouterr().out


def test_bench_model_measures_training_and_decoding(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    bench_model.main(
        ["--models", "tiny", "--contexts", "256", "--backends", "flashmla", "--device", "cpu", "--repeats", "1",
         "--new_tokens", "4", "--output_dir", str(tmp_path), "--name", "model"]
    )  # fmt: skip
    train, decode = json.loads((tmp_path / "model.json").read_text())["points"]
    assert (train["status"], decode["status"]) == ("ok", "ok"), (train, decode)
    assert train["tokens_per_second"] == pytest.approx(256 / train["seconds"])
    assert decode["tokens_per_second"] == pytest.approx(1 / decode["seconds"])
    page = (tmp_path / "RESULTS.md").read_text()
    assert "Training step" in page
    assert "Decoding" in page


@pytest.mark.parametrize("module", [bench_attention, bench_model, render_results])
def test_help_helps(module, capsys):
    with pytest.raises(SystemExit) as caught:
        module.main(["--help"])
    assert caught.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 8
