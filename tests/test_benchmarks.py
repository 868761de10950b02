"""The benchmarks: formulas, the check that refuses wrong results, and what a tiny run writes."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

# Before torch is: other work on the machine must not slow a test tenfold (see flashmla_hf/training/finetune.py).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parent.parent

import bench_attention  # noqa: E402
import bench_model  # noqa: E402
import check  # noqa: E402
import compare  # noqa: E402
import records  # noqa: E402
import render_results  # noqa: E402
import timing  # noqa: E402
import verdicts  # noqa: E402
from check import Inputs  # noqa: E402
from peers import PEERS, Peer, Unsupported  # noqa: E402
from shapes import SUITES, Shape  # noqa: E402

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


@pytest.mark.parametrize("layout", ["packed", "ragged"])
def test_a_pack_counts_its_documents(layout):
    shape = Shape(16, 4, 2, 1024, 1024, 64, 64, True, layout=layout)
    lengths = shape.lengths()
    assert (len(lengths), sum(lengths)) == (16, 16 * 1024)
    assert [d.stop - d.start for d in shape.documents()] == lengths
    assert shape.visible_pairs() == sum(n * (n + 1) // 2 for n in lengths)
    assert shape.flops("fwd") == 2 * 4 * 128 * (sum(n * n for n in lengths) // 2)
    assert (min(lengths), max(lengths)) == ((209, 3228) if layout == "ragged" else (1024, 1024))  # as documented


@pytest.mark.parametrize(
    "text",
    ["d64 B2 H1 S300 full", "d64 B1 H1 S300 causal", "d64 B1 H1 S100/300 causal", "d64 B1 H1 S300/100 causal",
     "d64 B1 H1 S300 window40", "d64 B1 H1 S200/300 window100", "d64 B3 H1 S90 causal ragged"],
)  # fmt: skip
def test_tiles_visited_are_those_with_a_visible_pair(text):
    shape, tiles = Shape.parse(text), 0
    for length in shape.lengths():
        seqlen_kv = length if shape.is_packed else shape.seqlen_kv
        position, key = torch.arange(length)[:, None] + seqlen_kv - length, torch.arange(seqlen_kv)
        visible = torch.ones(length, seqlen_kv, dtype=torch.bool)
        if shape.is_causal:
            window = seqlen_kv if shape.window is None else shape.window
            visible = (key <= position) & (key >= position - window)
        tiles += sum(bool(tile.any()) for rows in visible.split(64) for tile in rows.split(32, dim=1))
    assert shape.tiles_visited(64, 32) == tiles


@pytest.mark.parametrize("suite", SUITES)
def test_shapes_read_back_as_they_are_printed(suite):
    for shape in SUITES[suite].shapes:
        assert Shape.parse(str(shape)) == shape


@pytest.mark.parametrize(
    "text", ["d64", "d64 B1 H3/2 S8 causal", "d64 B1 H2 S8 sideways", "d64 B2 H2 S8/9 causal ragged"]
)
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
def test_every_peer_comes_after_every_other_as_often(n):
    names = [str(i) for i in range(n)]
    orders = timing.balanced_orders(names)
    assert all(sorted(order) == names for order in orders)
    after = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert set(after) == {(a, b) for a in names for b in names if a != b}
    assert len(set(after.values())) <= 1


def test_host_time_is_of_many_calls_and_one_wait(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(None))
    calls = []
    timed = timing.Timed(Peer(calls.append), lambda: calls.append(None))
    timing.interleaved({"a": timed}, "cuda", "host", 5, 1e-6, lambda: None)
    assert len(waits) == 5 + 3  # three turns to find out how long it takes
    assert 5 * timing.HOST_CALLS < len(calls) <= 5 * timing.HOST_CALLS + 7


def _jobs(*arguments, earlier=()):
    args = {"suite": None, "shape": None, "dtype": None, "peers": None, "directions": None, "device": "cuda"}
    return bench_attention.jobs(argparse.Namespace(**args | dict(arguments)), list(earlier))


def test_suites_share_their_shapes_and_peers():
    jobs = {job.shape: job.peers for job in _jobs(("suite", ["anchors", "deterministic", "overhead"]))}
    assert len(jobs) == 23 + 3
    both = jobs[Shape.parse("d128 B1 H32/8 S4096 causal bf16")]
    assert "flashmla-deterministic" not in both["fwd"]
    assert {"sdpa-cudnn", "flashmla-deterministic"} <= set(both["bwd"])
    assert set(jobs[Shape.parse("d128 B1 H32/8 S512 causal bf16")]) == {"host", "host+grad"}
    (half,) = {job.shape.dtype for job in _jobs(("suite", ["anchors"]), ("dtype", "fp16"))}
    assert half == "fp16"


def test_resume_measures_what_is_missing_beside_what_was_there():
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
    assert bench_attention.merge(earlier, new) == [earlier[1], *new]


def _gpu_document(**rates):
    """A GPU run's records from (shape, mode, peer) -> TFLOP/s, or µs for host modes."""
    records = []
    for (text, mode, peer), rate in rates["rates"].items():
        record = {"shape": text, "mode": mode, "peer": peer, "status": "ok", "spread": 0.01, "errors": {}}
        if mode.startswith("host"):
            record["seconds"] = rate * 1e-6
        else:
            shape = Shape.parse(text)
            record |= {"flops_per_second": rate * 1e12, "seconds": shape.flops(mode) / rate / 1e12, "watts": 600.0}
            record |= {"peak_bytes": 2**30, "output_bytes": 2**29, "sm_mhz": 1755}
        records.append(record)
    environment = {
        "device": "a GPU", "device_type": "cuda", "clocks": "", "memory_gib": 80, "python": "3", "versions": {},
        "commit": "abc", "date": "today",
    }  # fmt: skip
    return {
        "kind": "attention", "environment": environment, "matmul_flops_per_second": {"bf16": 7e14},
        "copy_bytes_per_second": 3e12, "driver": "580", "window_tile": [128, 128], "records": records,
    }  # fmt: skip


LONG_TEXT, SHORT_TEXT = "d128 B1 H32/8 S4096 causal bf16", "d128 B1 H32/8 S512 causal bf16"
PACK, DENSE = "d128 B16 H16/16 S1024 causal ragged bf16", "d128 B16 H16/16 S1024 causal bf16"
WINDOW = "d128 B1 H32/8 S4096 window1024 bf16"


def test_the_bars_are_judged_and_written(tmp_path):
    rates = {
        (LONG_TEXT, "fwd", "flashmla"): 660, (LONG_TEXT, "fwd", "sdpa-cudnn"): 550, (LONG_TEXT, "fwd", "fa4"): 670,
        (LONG_TEXT, "fwd", "eager"): 22, (DENSE, "fwd", "flashmla"): 400, (DENSE, "fwd", "sdpa-cudnn"): 440,
        (PACK, "fwd", "flashmla"): 390, (PACK, "fwd", "fa4"): 380, (WINDOW, "fwd", "flashmla"): 500,
        (SHORT_TEXT, "fwd", "flashmla"): 10, (SHORT_TEXT, "fwd", "sdpa-cudnn"): 20,
        (SHORT_TEXT, "host", "flashmla"): 25, (SHORT_TEXT, "host", "sdpa"): 20,
    }  # fmt: skip
    document = _gpu_document(rates=rates)
    found = {bar.what: (bar.measured, bar.met) for bar in verdicts.bars(document)}
    cudnn, best, aim, host, ragged, window = found.values()
    assert cudnn == ("1 of 2 shapes below 0.97×, lowest 0.91×, geometric mean 1.04×", False)  # short ones do not count
    assert best == ("0.946× over 2 shapes", False)
    assert aim[1] is False
    assert host == ("1.25× its time", False)
    assert ragged == ("0.97×", True)
    tiles = Shape.parse(WINDOW).tiles_visited(128, 128) / Shape.parse(LONG_TEXT).tiles_visited(128, 128)
    assert f"for {tiles:.3f} of its tiles" in window[0]
    assert window[1] is None
    assert verdicts.lines(document)[0].startswith("FAIL  fwd: at least cuDNN")
    (tmp_path / "gpu.json").write_text(json.dumps(document))
    page = render_results.write(tmp_path).read_text()
    assert "driver 580; SM clock while measuring 1755 to 1755 MHz, power 600 to 600 W" in page
    assert "copy within the device: 3,000 GB/s" in page
    row = f"| {LONG_TEXT} | 660 (±1 %) | 550 (±1 %) | 670 (±1 %) | 22 (±1 %) | 1.20× | 0.99× (fa4) | 94 % |"
    assert row in page
    assert f"| {DENSE} | flashmla | 400 | – | 390 | 0.97× |" in page
    assert "30× | 1.00× |" in page  # times faster, times smaller than eager
    assert "![gpu-fwd: TFLOP/s per shape](gpu-fwd.png)" in page
    assert (tmp_path / "gpu-fwd.png").stat().st_size > 1000


def test_a_clean_run_passes():
    document = _gpu_document(
        rates={(LONG_TEXT, "bwd", "flashmla"): 600, (LONG_TEXT, "bwd", "sdpa-cudnn"): 500}
        | {(LONG_TEXT, "bwd", "flashmla-deterministic"): 500}
    )
    assert [bar.met for bar in verdicts.bars(document)] == [True] * 3
    assert "| flashmla-deterministic | 1.20× |" in render_results.attention_section(document)


def test_stored_results_still_render(tmp_path):
    stored = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    for path in stored:
        shutil.copy(path, tmp_path)
    page = render_results.write(tmp_path).read_text()
    assert [f"## {path.stem}" in page for path in stored] == [True] * len(stored)


def test_a_peer_without_a_backward_keeps_its_forward(monkeypatch):
    monkeypatch.setitem(PEERS, "flashmla-sm90", lambda shape, device: Peer(lambda q, k, v: _right(q, k, v).detach()))
    job = bench_attention.Job(SMALL, {mode: ["flashmla-sm90", "sdpa"] for mode in ("fwd", "bwd", "host")})
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


@pytest.mark.parametrize("module", [bench_attention, bench_model, compare, render_results])
def test_help_helps(module, capsys):
    with pytest.raises(SystemExit) as caught:
        module.main(["--help"])
    assert caught.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 8


def test_a_profile_is_read_from_what_ncu_prints():
    import profile_attention

    columns = [*render_results.SHARES, profile_attention.CYCLES, profile_attention.SECONDS]
    head = '"ID","Kernel Name",' + ",".join(f'"{column}"' for column in columns)
    units = '"","",' + ",".join(['"%"'] * len(render_results.SHARES) + ['"cycle"', '"ns"'])
    numbers = ",".join(f'"{10 * (i + 1)}.0"' for i in range(len(render_results.SHARES))) + ',"4,089,644","2,830,000"'
    kernels = (
        "void forward_kernel<192, 128, 1, bfloat16_t>(ForwardArguments)",
        "void flashmla::sm90::backward_queries_kernel<(int)256, cutlass::bfloat16_t>(flashmla::sm90::Arguments)",
    )
    rows = "\n".join(f'"{i}","{kernel}",{numbers}' for i, kernel in enumerate(kernels))
    records = profile_attention.parse(f"==PROF== Connected\n{head}\n{units}\n{rows}\n")
    assert [(r["kernel"], r["head_dims"]) for r in records] == [("forward", "192/128"), ("backward_queries", "256/256")]
    assert records[0]["cycles"] == 4_089_644
    assert records[0]["seconds"] == pytest.approx(2.83e-3)
    assert records[0]["shares"]["tensor cores"] == pytest.approx(0.1)
    table = render_results.profile_section({"seqlen": 4096, "is_causal": False, "records": records})
    assert "| forward | 192/128 | 4,089,644 | 10% | 20% | 30% | 40% | 50% | **60%** |" in table


# ---------------------------------------------------------------- provenance and comparison


def test_a_result_names_its_command_and_commit(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/bench_attention.py", "--suite", "tiny"])
    record = records.describe("cpu")
    assert record["command"] == ["bench_attention.py", "--suite", "tiny"]
    assert "`bench_attention.py --suite tiny`" in records.sentence(record)


def test_a_dirty_tree_is_one_with_other_changes_than_results(tmp_path, monkeypatch):
    def git(*arguments):
        names = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *names, *arguments], check=True, capture_output=True)

    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "code.py").write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    monkeypatch.setattr(records, "REPOSITORY", tmp_path)
    (tmp_path / "benchmarks" / "results" / "new.json").write_text("{}")
    (tmp_path / "benchmarks" / "RESULTS.md").write_text("new")
    assert not records.commit().endswith("+")
    (tmp_path / "code.py").write_text("2")
    assert records.commit().endswith("+")


@pytest.mark.parametrize("module", [bench_attention, bench_model])
def test_a_dirty_tree_does_not_write_into_the_results(module, monkeypatch):
    monkeypatch.setattr(records, "commit", lambda: "abc+")
    with pytest.raises(SystemExit, match=rf"{module.__name__}: .*uncommitted changes: .*--output_dir.*--allow_dirty"):
        module.main(["--device", "cpu"])
    records.refuse_dirty_tree("x", records.RESULTS, allow_dirty=True)
    monkeypatch.setattr(records, "commit", lambda: "abc")
    records.refuse_dirty_tree("x", records.RESULTS, allow_dirty=False)


def _slower(document, factor, peer):
    copy = json.loads(json.dumps(document))
    for record in copy["records"]:
        record["seconds"] *= factor if record["peer"] == peer else 1
    return copy


def test_compare_gives_ratios_and_fails_on_a_slower_run(tmp_path, capsys):
    texts = ("d64 B1 H2/2 S128 causal bf16", "d64 B1 H2/2 S256 causal bf16")
    old = _gpu_document(rates={(text, "fwd", peer): 100.0 for text in texts for peer in ("flashmla", "sdpa")})
    new = _slower(old, 1.04, "flashmla")
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, document in zip(paths, (old, new), strict=True):
        path.write_text(json.dumps(document))
    arguments = [str(path) for path in paths]
    compare.main(arguments)
    out = capsys.readouterr().out
    assert f" 0.962×  fwd       flashmla               {texts[0]}" in out
    assert " 1.000×  fwd       sdpa                   geometric mean" in out
    with pytest.raises(SystemExit, match=r"fwd flashmla: geometric mean 0\.962×, expected at least 0\.970×"):
        compare.main([*arguments, "--tolerance", "0.03"])
    compare.main([*arguments, "--tolerance", "0.03", "--peers", "sdpa"])
    with pytest.raises(SystemExit, match="no shape, mode and peer in common"):
        compare.main([*arguments, "--peers", "fa4"])
    paths[1].write_text("{}")
    with pytest.raises(SystemExit, match="is not a file of bench_attention"):
        compare.main(arguments)
