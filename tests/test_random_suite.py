"""The suite of random shapes: what is drawn, the model of the schedule, the distribution, cuDNN's frontend, compiling ahead."""

from __future__ import annotations

import json
import re
import types
from pathlib import Path

import bench_attention
import check
import compile_ahead
import distribution
import peers
import pytest
import random_shapes
import render_results
import schedule_model
import torch
from check import Inputs
from peers import PEERS, Peer, Unsupported
from shapes import Shape
from test_benchmark_results import _gpu_document

from flashmla_hf import attention

ROOT = Path(__file__).resolve().parent.parent


# ---- What is drawn ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_seed_draws_the_same_bounded_shapes_and_another_seed_others(device):
    shapes = random_shapes.draw(3, 20, device)
    assert shapes == random_shapes.draw(3, 20, device)
    assert len(set(shapes)) == 20
    assert len(set(shapes) & set(random_shapes.draw(4, 20, device))) < 3
    assert random_shapes.draw(3, 10, device) == shapes[:10]
    bounds = random_shapes.BOUNDS[device]
    for shape in shapes:
        assert random_shapes.is_within(shape, bounds)
        assert Shape.parse(str(shape)) == shape
        assert bounds.seqlen[0] <= shape.seqlen_q <= bounds.seqlen[1]
        assert shape.head_dim_qk % 8 == 0


def test_many_seeds_reach_every_kind():
    shapes = [shape for seed in range(30) for shape in random_shapes.draw(seed, 20, "cuda")]
    assert {shape.head_dim_qk for shape in shapes} == set(random_shapes.HEAD_DIMS)
    assert {shape.heads_q // shape.heads_kv for shape in shapes} == set(random_shapes.GROUPS)
    assert {shape.layout for shape in shapes} == {"dense", "packed", "ragged"}
    assert {shape.batch for shape in shapes} >= {1, 2, 3, 8}
    assert (192, 128) in {(shape.head_dim_qk, shape.head_dim_v) for shape in shapes}
    kinds = {"window" if shape.window else "causal" if shape.is_causal else "full" for shape in shapes}
    assert kinds == {"window", "causal", "full"}
    assert any(shape.seqlen_q % 2 for shape in shapes)
    octaves = {shape.seqlen_q.bit_length() for shape in shapes}
    assert octaves >= {11, 12, 13, 14, 15, 16}


# ---- The model of the schedule ---------------------------------------------------------------------------------------


def test_the_model_has_the_sources_constants():
    schedule = (ROOT / "csrc/sm90/scheduling/schedule.cu").read_text()
    launch = (ROOT / "csrc/sm90/backward/launch_backward.cuh").read_text()
    for text, name, mine in (
        (schedule, "kForwardSectionBytes", schedule_model.FORWARD_SECTION_BYTES),
        (schedule, "kBackwardSectionBytes", schedule_model.BACKWARD_SECTION_BYTES),
        (launch, "kUsualSums", schedule_model.USUAL_SUMS),
        (launch, "kLargestSums", schedule_model.LARGEST_SUMS),
    ):
        number, shift = re.search(rf"{name} = int64_t\{{(\d+)\}} << (\d+)[,;]", text).groups()
        assert int(number) << int(shift) == mine, name
    assert float(re.search(r"kWorthwhile = ([\d.]+);", launch)[1]) == schedule_model.WORTHWHILE


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        ("d80 B4 H16/16 S8192 causal bf16", "bwd", r"head dim 80 in the kernel of 96: 1.20×"),
        ("d80 B4 H16/16 S8192 causal bf16", "fwd", r"head dim 80 in the kernel of 96: 1.20×"),
        ("d192 B4 H16/16 S8192 full bf16", "bwd", r"^scores computed twice: 1.40×"),
        (
            "d200 B4 H16/16 S8192 full bf16",
            "bwd",
            r"head dim 200 in the kernel of 256 and scores computed twice: 1.79×",
        ),
        ("d128 B1 H12/12 S1024 full bf16", "fwd", r"tail of 96 tiles on 132 multiprocessors: 1.38×"),
        ("d128 B3 H56/8 S4096 full bf16", "bwd", r"in each of 2 passes of dQ"),
        ("d128 B4 H16/16 S8192 window100 bf16", "fwd", r"rounding of the mask to tiles"),
        ("d128 B4 H32/32 S8192 full bf16", "fwd", r"nothing that the schedule explains"),
    ],
)
def test_reasons_name_what_is_lost(text, mode, said):
    losses = schedule_model.losses(Shape.parse(text), mode)
    assert re.search(said, losses.reason), losses.reason
    assert losses.total >= 1.0


@pytest.mark.parametrize("mode", ["fwd", "bwd"])
def test_the_models_tiles_are_those_that_hold_a_visible_pair(mode):
    """By the masks of shapes.py, which are tested against the mask itself."""
    for text in (
        "d128 B2 H4/2 S1000 causal bf16",
        "d128 B1 H2/2 S1000 window130 bf16",
        "d128 B3 H2/1 S900 causal ragged bf16",
    ):
        shape = Shape.parse(text)
        config = schedule_model._config("Forward" if mode == "fwd" else "Backward", shape)
        block_q, block_kv = config["kBlockQ"], config["kBlockKV"]
        visited = shape.tiles_visited(block_q, block_kv)
        documents = shape.lengths()
        if mode == "fwd":
            tiles = [c for n in documents for c in schedule_model._query_tiles(shape, n, block_q, block_kv)]
        else:
            tiles = [c for n in documents for c in schedule_model._key_tiles(shape, n, block_q, block_kv)]
        assert sum(tiles) == visited


def test_passes_and_splits_are_those_of_the_launcher():
    config = {"kBlockQ": 64, "kBlockKV": 128, "kSplitsColumns": False, "head_dims": (128, 128)}
    shape = Shape.parse("d128 B3 H56/8 S4096 full bf16")  # 42 MiB of dQ a kv head: 6 fit, and 4 are half of 8
    assert schedule_model.backward_plan(shape, config) == (4, 1)
    assert schedule_model.backward_plan(Shape.parse("d128 B3 H35/5 S4096 causal bf16"), config) == (5, 1)
    assert schedule_model.backward_plan(Shape.parse("d128 B3 H63/9 S4096 causal bf16"), config) == (9, 1)
    assert schedule_model.backward_plan(Shape.parse("d128 B1 H16/2 S1024 full bf16"), config) == (2, 8)
    assert schedule_model.backward_plan(Shape.parse("d128 B1 H32/8 S131072 full bf16"), config) == (1, 1)
    assert schedule_model.backward_plan(Shape.parse("d128 B4 H14/2 S2215 causal bf16"), config) == (2, 7)
    assert schedule_model.backward_plan(Shape.parse("d128 B1 H12/2 S2048 causal bf16"), config) == (2, 6)
    assert schedule_model.backward_plan(Shape.parse("d128 B1 H71/1 S2048 causal bf16"), config) == (1, 71)
    assert schedule_model.backward_plan(Shape.parse("d128 B10 H71/1 S2048 causal bf16"), config) == (
        1,
        1,
    )  # 1.4 GiB of parts


def test_there_is_no_model_of_what_the_hopper_kernels_do_not_run(monkeypatch):
    assert schedule_model.losses(Shape.parse("d128 B1 H1 S1024 full fp32"), "fwd") is None
    assert schedule_model.losses(Shape.parse("d520 B1 H1 S1024 full bf16"), "fwd") is None
    assert schedule_model.losses(Shape.parse("d44 B1 H1 S1024 full bf16"), "fwd") is None
    assert schedule_model.losses(Shape.parse("d128 B1 H1 S1024 full bf16"), "host") is None
    monkeypatch.setattr(schedule_model, "tiles_of_sm90", lambda: None)
    assert schedule_model.losses(Shape.parse("d128 B1 H1 S1024 full bf16"), "fwd") is None


@pytest.mark.parametrize("seed", range(3))
def test_every_random_shape_has_a_reason_in_no_time(seed):
    for shape in random_shapes.draw(seed, 20, "cuda"):
        for mode in ("fwd", "bwd"):
            record = schedule_model.losses(shape, mode).record()
            assert json.loads(json.dumps(record)) == record
            assert record["reason"]


# ---- The run and its distribution ------------------------------------------------------------------------------------


def test_a_tiny_run_of_random_shapes_writes_the_distribution(tmp_path, capsys):
    def run(*arguments):
        bench_attention.main(
            ["--suite", "random", "--device", "cpu", "--peers", "flashmla", "sdpa-flash", "cudnn", "fa4", "--repeats", "2",
             "--seconds", "0.01", "--output_dir", str(tmp_path), "--name", "random", *arguments]
        )  # fmt: skip

    run("--seed", "5", "--shapes", "3")
    document = json.loads((tmp_path / "random.json").read_text())
    assert document["seeds"] == [5]
    assert {Shape.parse(r["shape"]) for r in document["records"]} == set(random_shapes.draw(5, 3, "cpu"))
    assert {r["status"] for r in document["records"] if r["peer"] == "flashmla"} == {"ok"}
    reasons = {r["peer"]: r["reason"] for r in document["records"] if r["status"] != "ok"}
    assert reasons["cudnn"] == "cuDNN runs on GPUs"
    assert reasons["fa4"].startswith("flash_attn.cute: ")
    said = capsys.readouterr().out
    assert re.search(r"fwd: \d shapes, geometric mean \d+\.\d+× the best other peer", said)
    page = (tmp_path / "RESULTS.md").read_text()
    assert "Random shapes of seeds 5, fwd: flashmla / best other peer." in page
    assert "Random shapes of seeds 5, bwd" in page

    run("--seed", "6", "--shapes", "2", "--resume", "--directions", "fwd")
    document = json.loads((tmp_path / "random.json").read_text())
    assert document["seeds"] == [5, 6]
    assert len({r["shape"] for r in document["records"]}) == 5


def test_the_list_shows_what_a_seed_draws(capsys):
    bench_attention.main(["--list", "--seed", "9", "--shapes", "4", "--device", "cuda"])
    said = capsys.readouterr().out
    for shape in random_shapes.draw(9, 4, "cuda"):
        assert f"  {shape}\n" in said


def _document(ratios, mode="fwd"):
    """A GPU run of random shapes in which ours is ``ratios`` times as fast as FlashAttention 4, cuDNN being slower."""
    shapes = random_shapes.draw(0, len(ratios), "cuda")
    rates = {}
    for shape, ratio in zip(shapes, ratios, strict=True):
        rates |= {(str(shape), mode, "flashmla"): 500 * ratio, (str(shape), mode, "fa4"): 500}
        rates[str(shape), mode, "cudnn"] = 300
    document = _gpu_document(rates=rates) | {"seeds": [0]}
    for record in document["records"]:
        if record["peer"] == "flashmla":
            record["schedule"] = schedule_model.losses(Shape.parse(record["shape"]), mode).record()
    return document, shapes


def test_the_distribution_is_worst_first_with_reasons(tmp_path):
    document, shapes = _document([1.2, 0.8, 0.96, 1.1])
    (found,) = distribution.distributions(document)
    assert [round(ratio, 2) for ratio, _ in found.ratios] == [0.8, 0.96, 1.1, 1.2]
    assert (found.share_below(0.95), found.share_below(0.97)) == (0.25, 0.5)
    assert found.mean == pytest.approx((1.2 * 0.8 * 0.96 * 1.1) ** 0.25)
    head, worst, second, *rest = distribution.lines(document)
    assert head.startswith("fwd: 4 shapes, geometric mean 1.003× the best other peer, 25% below 0.95, 50% below 0.97")
    assert worst.startswith(f"   0.80× fa4          {shapes[1]}")
    assert "57% of the matrix product" in worst
    assert schedule_model.losses(shapes[1], "fwd").reason in worst
    assert schedule_model.losses(shapes[2], "fwd").reason in second
    assert all(line.endswith("of the matrix product") for line in rest)
    (tmp_path / "random.json").write_text(json.dumps(document))
    page = render_results.write(tmp_path).read_text()
    reason = schedule_model.losses(shapes[1], "fwd").reason
    assert f"| 0.80× | {shapes[1]} | fa4 | 400 TFLOP/s | 57% | {reason} |" in page
    assert "at least cuDNN on every shape" not in page  # the bars of tuned shapes


@pytest.mark.parametrize(
    ("ratios", "met"),
    [
        ([1.1] * 20, [True, True, True]), ([1.1] * 19 + [0.96], [True, True, False]),
        ([1.1] * 19 + [0.9], [True, False, False]), ([1.0] * 10 + [0.99] * 10, [False, True, False]),
    ],
)  # fmt: skip
def test_the_bars_of_random_shapes(ratios, met):
    document, _ = _document(ratios)
    assert [bar.met for bar in bench_attention.BENCHMARK.bars(document)] == met


def test_a_kernel_without_a_model_says_so():
    document, _ = _document([0.5])
    del document["records"][0]["schedule"]
    assert "no model of this kernel" in distribution.lines(document)[1]


def test_the_gpus_records_carry_the_schedule(monkeypatch):
    """What the run does on a GPU and a CPU does not: the record of our kernel says what its schedule loses."""
    shape = Shape.parse("d64 B1 H2/1 S64 causal bf16")
    monkeypatch.setattr(bench_attention, "Inputs", types.SimpleNamespace(random=lambda s, d: Inputs.random(s, "cpu")))
    monkeypatch.setattr(bench_attention, "free", lambda device: None)
    monkeypatch.setattr(bench_attention, "peak_memory", lambda call, device: 0)
    monkeypatch.setattr(bench_attention, "first_call_seconds", lambda call, device: 0.0)
    interleaved = bench_attention.interleaved
    monkeypatch.setattr(bench_attention, "interleaved", lambda calls, device, *rest: interleaved(calls, "cpu", *rest))
    monkeypatch.setitem(bench_attention.PEERS, "flashmla", lambda s, d: Peer(lambda *x: attention(*x, is_causal=True)))
    job = bench_attention.Job(shape, {"fwd": ["flashmla"]})
    (record,) = bench_attention.measure_shape(job, "cuda", repeats=2, seconds=0.01)
    assert record["schedule"] == schedule_model.losses(shape, "fwd").record()


def test_what_does_not_fit_beside_the_others_costs_the_largest_of_them(monkeypatch):
    shape, peaks = Shape.parse("d64 B1 H2/1 S64 causal bf16"), iter((5, 9))
    taken = []

    def interleaved(calls, *rest):
        taken.append([*calls])
        if len(calls) > 1:
            raise torch.OutOfMemoryError("32 GiB")
        return {name: [1.0, 1.0] for name in calls}

    monkeypatch.setattr(bench_attention, "peak_memory", lambda call, device: next(peaks))
    monkeypatch.setattr(bench_attention, "interleaved", interleaved)
    for name in ("flashmla", "sdpa"):
        monkeypatch.setitem(bench_attention.PEERS, name, lambda s, d: Peer(lambda *x: attention(*x, is_causal=True)))
    job = bench_attention.Job(shape, {"bwd": ["flashmla", "sdpa"]})
    found = bench_attention.measure_shape(job, "cpu", repeats=2, seconds=0.01)
    assert taken == [["flashmla", "sdpa"], ["flashmla"]]
    assert [(r["peer"], r["status"]) for r in found] == [("sdpa", "out_of_memory"), ("flashmla", "ok")]


# ---- Peers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["d64 B2 H4/2 S100 window20 bf16", "d64 B2 H4/2 S100 causal ragged bf16"])
def test_torchs_flash_operator_gets_windows_and_documents(text):
    from flash_operator import FlashOperator

    shape, stand_in = Shape.parse(text), FlashOperator()
    library = stand_in.install()
    try:
        inputs = Inputs.random(shape, "cpu")
        truth = check.expected(shape, inputs, needs_gradients=True)
        problem, errors = check.verdict(shape, peers._flash_operator(shape, "cpu"), inputs, truth, training=True)
    finally:
        library._destroy()
    assert problem is None, (problem, errors)


def test_peers_that_cannot_say_so():
    with pytest.raises(Unsupported, match="one head dim for q, k and v"):
        peers._flash_operator(Shape.parse("d192/128 B2 H4/2 S100 window20 bf16"), "cuda")
    with pytest.raises(Unsupported, match="has no window"):
        PEERS["sdpa-cudnn"](Shape.parse("d64 B1 H1 S65536 window20 bf16"), "cpu")


# ---- Compiling ahead -------------------------------------------------------------------------------------------------


def test_kinds_are_compiled_side_by_side(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv(compile_ahead.CACHE, "0")
    shapes = [Shape.parse(text) for text in ("d64 B1 H2/1 S64 causal fp32", "d64 B1 H2/1 S64 causal ragged fp32")]
    problems = compile_ahead.compile_ahead(shapes, ["flashmla", "fa4"], "cpu", processes=2)
    assert compile_ahead.os.environ[compile_ahead.CACHE] == "1"
    assert len(problems) == 2  # flashmla has none
    for problem, shape in zip(problems, shapes, strict=True):
        assert problem.startswith(f"refused: fa4 at {shape}: flash_attn.cute: ")


def test_the_compiled_kinds_are_small_and_each_is_there_once():
    large = Shape.parse("d128 B16 H32/8 S16384 window4096 ragged bf16")
    assert str(compile_ahead.smaller(large)) == "d128 B2 H32/8 S1024 window256 ragged bf16"


def test_preparing_compiles_for_runs_of_several_shapes_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(bench_attention, "compile_ahead", lambda *arguments: seen.append(arguments) or ["refused: x"])
    monkeypatch.setattr(bench_attention.importlib.util, "find_spec", lambda name: object())
    job = bench_attention.Job(Shape.parse("d64 B1 H2/1 S64 causal bf16"), {"fwd": ["flashmla", "fa4"]})
    bench_attention.BENCHMARK.prepare([job] * 3, "cuda")
    bench_attention.BENCHMARK.prepare([job] * 4, "cpu")
    assert seen == []
    bench_attention.BENCHMARK.prepare([job] * 4, "cuda")
    assert seen == [([job.shape] * 4, ["fa4"], "cuda")]
