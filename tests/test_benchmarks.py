"""The benchmarks: the check that refuses wrong results, how peers take turns, and what a tiny run writes."""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections import Counter

import bench_attention
import bench_model
import check
import compare
import measure_model
import pytest
import render_results
import series
import timing
import torch
from check import Inputs
from measure_support import in_fork
from peers import PEERS, Peer, Unsupported
from shapes import Shape

from flashmla_hf import attention

SMALL = Shape.parse("d64 B2 H4/2 S160 causal fp32")


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
    truth = check.expected(SMALL, inputs, needs_gradients=True)
    problem, _ = check.verdict(SMALL, Peer(run), inputs, truth, training=True)
    assert problem is not None
    assert said in problem
    problem, _ = check.verdict(SMALL, Peer(run), inputs, truth, training=False)
    assert (problem is None) == said.startswith("d")  # without gradients only the output can be wrong


def test_a_pack_taken_for_one_sequence_gets_no_number():
    shape = Shape.parse("d64 B4 H4/2 S80 causal ragged fp32")
    inputs = Inputs.random(shape, "cpu")
    truth = check.expected(shape, inputs, needs_gradients=False)
    whole = Peer(lambda q, k, v: attention(q[None], k[None], v[None], is_causal=True)[0])
    problem, _ = check.verdict(shape, whole, inputs, truth, training=False)
    assert "O is off" in problem


@pytest.mark.parametrize(
    "text",
    [
        "d64 B2 H4/2 S160 causal fp32",
        "d64 B1 H2/2 S300 full bf16",
        "d64 B1 H4/1 S300 window40 fp16",
        "d96/64 B1 H2/2 S100/170 causal bf16",
        "d64 B1 H2/2 S170/100 causal fp32",
        "d64 B4 H4/2 S80 causal ragged fp32",
        "d64 B3 H2/2 S80 window40 packed fp32",
    ],
)
@pytest.mark.parametrize("peer", ["flashmla", "flashmla-operator", "sdpa", "sdpa-math", "eager"])
def test_right_implementations_pass_the_check(text, peer):
    shape = Shape.parse(text)
    if shape.seqlen_q > shape.seqlen_kv and not peer.startswith("flashmla"):
        pytest.skip("rows that see no key: the peers give the mean of V or NaN there, flashmla zero")
    if shape.is_packed and peer != "flashmla":
        with pytest.raises(Unsupported):
            PEERS[peer](shape, "cpu")
        return
    inputs = Inputs.random(shape, "cpu")
    truth = check.expected(shape, inputs, needs_gradients=True)
    problem, errors = check.verdict(shape, PEERS[peer](shape, "cpu"), inputs, truth, training=True)
    assert problem is None, errors


def test_a_tiny_run_writes_json_and_the_page(tmp_path, capsys):
    bench_attention.main(
        ["--suite", "tiny", "--device", "cpu", "--repeats", "3", "--seconds", "0.03", "--output_dir", str(tmp_path)]
    )
    (path,) = tmp_path.glob("attention-*.json")
    document = json.loads(path.read_text())
    assert {r["status"] for r in document["records"]} == {"ok"}
    assert len(document["records"]) == 2 * 2 * 3  # shapes, modes, peers
    for record in document["records"]:
        shape = Shape.parse(record["shape"])
        assert record["flops_per_second"] == pytest.approx(shape.flops(record["mode"]) / record["seconds"])
        assert record["errors"]["dK" if record["mode"] == "fwd+bwd" else "O"] < 1e-4
    page = (tmp_path / "RESULTS.md").read_text()
    assert document["environment"]["device"] in page
    assert re.search(r"\| d64 B1 H4/2 S256 causal fp32 \| \d+ \(±\d+ %\)", page)
    assert "geometric mean over 2 shapes" in page


class _Event:
    """A CUDA event whose clock is the number of calls so far."""

    clock = 0.0

    def __init__(self, enable_timing):
        self.at = None

    def record(self):
        self.at = _Event.clock

    def synchronize(self):
        assert self.at is not None

    def elapsed_time(self, other):
        return other.at - self.at


def test_peers_take_turns_call_by_call(monkeypatch):
    """On a GPU: one call per turn where a call is long, rounds in order, a slow peer in some of them, queued ahead."""
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    order = []

    def call(name, milliseconds):
        def run():
            order.append(name)
            _Event.clock += milliseconds

        return timing.Timed(Peer(run), run)

    calls = {"a": call("a", 1.0), "b": call("b", 2.0), "slow": call("slow", 5.0), "short": call("short", 0.1)}
    halfway = []
    times = timing.interleaved(calls, "cuda", "fwd", 4, 0.04, lambda: halfway.append(len(order)))
    assert {name: len(turns) for name, turns in times.items()} == {"a": 40, "b": 20, "slow": 8, "short": 100}
    assert {name: pytest.approx(turns) for name, turns in times.items()} == {
        "a": [1e-3] * 40, "b": [2e-3] * 20, "slow": [5e-3] * 8, "short": [1e-4] * 100
    }  # fmt: skip
    timed = order[-(40 + 20 + 8 + 4 * 100) :]
    between = "".join({"slow": "s", "short": "."}.get(name, name) for name in timed).split("a")
    assert max(map(len, between)) <= 5 * 4 + 2  # never more than five rounds without "a"
    assert len(halfway) == 1


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
def test_every_peer_follows_every_other_equally_often(n):
    names = [str(i) for i in range(n)]
    orders = timing.balanced_orders(names)
    assert all(sorted(order) == names for order in orders)
    after = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert set(after) == {(a, b) for a in names for b in names if a != b}
    assert len(set(after.values())) <= 1


def test_host_time_is_measured_over_many_calls_with_one_wait(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(None))
    calls = []
    timed = timing.Timed(Peer(calls.append), lambda: calls.append(None))
    timing.interleaved({"a": timed}, "cuda", "host", 5, 1e-6, lambda: None)
    assert len(waits) == 5 + 3  # three turns to find out how long it takes
    assert 5 * timing.HOST_CALLS < len(calls) <= 5 * timing.HOST_CALLS + 7


def _jobs(*arguments, earlier=()):
    args = {"suite": None, "shape": None, "dtype": None, "peers": None, "directions": None, "device": "cuda"}
    return bench_attention.BENCHMARK.jobs(argparse.Namespace(**args | dict(arguments)), list(earlier))


def test_suites_share_their_shapes_and_peers():
    jobs = {job.shape: job.peers for job in _jobs(("suite", ["anchors", "deterministic", "overhead"]))}
    assert len(jobs) == 23 + 6 + 3  # of the suite deterministic, the others are anchors
    both = jobs[Shape.parse("d128 B1 H32/8 S4096 causal bf16")]
    assert "flashmla-deterministic" not in both["fwd"]
    assert {"sdpa-cudnn", "flashmla-deterministic"} <= set(both["bwd"])
    assert set(jobs[Shape.parse("d128 B1 H32/8 S512 causal bf16")]) == {"host", "host+grad"}
    (half,) = {job.shape.dtype for job in _jobs(("suite", ["anchors"]), ("dtype", "fp16"))}
    assert half == "fp16"


def test_resume_measures_missing_peers_beside_earlier_ones():
    text = "d64 B1 H2/2 S128 causal bf16"
    earlier = [
        {"shape": text, "peer": "sdpa", "mode": "fwd", "status": "ok"},
        {"shape": text, "peer": "fa4", "mode": None, "status": "unsupported"},
    ]
    ask = ("shape", [text]), ("directions", ["fwd"])
    assert _jobs(*ask, ("peers", ["sdpa", "fa4"]), earlier=earlier) == []
    (job,) = _jobs(*ask, ("peers", ["eager"]), earlier=earlier)
    assert job.peers == {"fwd": ["sdpa", "eager"]}
    new = [{"shape": text, "peer": peer, "mode": "fwd", "status": "ok"} for peer in ("sdpa", "eager")]
    assert series.merge(earlier, new) == [earlier[1], *new]


def test_a_peer_without_a_backward_keeps_its_forward(monkeypatch):
    monkeypatch.setitem(PEERS, "flashmla-sm90", lambda shape, device: Peer(lambda q, k, v: _right(q, k, v).detach()))
    job = series.Job(SMALL, {mode: ["flashmla-sm90", "sdpa"] for mode in ("fwd", "bwd", "host")})
    records = bench_attention.measure_shape(job, "cpu", repeats=2, seconds=0.01)
    assert {(r["peer"], r["mode"]) for r in records if r["status"] == "ok"} == {
        ("flashmla-sm90", "fwd"), ("flashmla-sm90", "host"), ("sdpa", "fwd"), ("sdpa", "bwd"), ("sdpa", "host")
    }  # fmt: skip
    (refused,) = [r for r in records if r["status"] != "ok"]
    assert refused["reason"].startswith("bwd: ")


def test_a_run_with_a_wrong_kernel_names_it_and_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench_attention.PEERS, "flashmla", lambda shape, device: Peer(WRONG["mask off by one"][0]))
    with pytest.raises(SystemExit, match="WRONG RESULTS, not timed: flashmla"):
        bench_attention.main(
            ["--shape", str(SMALL), "--device", "cpu", "--peers", "flashmla", "sdpa", "--repeats", "3",
             "--seconds", "0.03", "--output_dir", str(tmp_path), "--name", "wrong"]
        )  # fmt: skip
    document = json.loads((tmp_path / "wrong.json").read_text())
    statuses = {(r["peer"], r["status"]) for r in document["records"]}
    assert statuses == {("flashmla", "wrong"), ("sdpa", "ok")}
    assert "flashmla at d64 B2 H4/2 S160 causal fp32: wrong: O is off" in (tmp_path / "RESULTS.md").read_text()


def test_a_used_up_time_budget_names_the_shapes_left_out(tmp_path, capsys):
    bench_attention.main(
        ["--suite", "tiny", "--device", "cpu", "--time_budget", "0", "--output_dir", str(tmp_path), "--name", "none"]
    )
    assert len(json.loads((tmp_path / "none.json").read_text())["skipped"]) == 2
    assert "was used up: d64 B1 H4/2 S256 causal fp32" in capsys.readouterr().out


def test_bench_model_measures_training_and_decoding(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure_model, "in_subprocess", in_fork)
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


@pytest.mark.parametrize("module", [bench_attention, bench_model, compare, render_results])
def test_every_program_prints_a_help(module, capsys):
    with pytest.raises(SystemExit) as caught:
        module.main(["--help"])
    assert caught.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 8
