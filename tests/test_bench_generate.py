"""The benchmark of generate(): wrong attention gets no number, what does not fit is known before, and a run goes on where it was."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from types import SimpleNamespace

import bench_generate
import generation
import inference_results
import models
import point_runs
import pytest
import torch
import verdicts
from generation import Generation, Point
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from flashmla_hf.host_memory import GIB

SMALL = ["--device", "cpu", "--contexts", "256", "--batch_sizes", "3", "--padded", "3", "--tokens", "3"]


def run(folder, *arguments):
    bench_generate.main([*SMALL, "--output_dir", str(folder), *arguments])


def points(folder):
    (path,) = folder.glob("generate-*.json")
    return json.loads(path.read_text())["points"]


def test_a_tiny_run_writes_json_and_the_page_and_goes_on_where_it_was(tmp_path, capsys):
    run(tmp_path, "--groups", "dynamic", "--time_budget", "0")
    assert {r["status"] for r in points(tmp_path)} == {"skipped"}
    assert "Without a number" in (tmp_path / "RESULTS.md").read_text()
    run(tmp_path, "--groups", "dynamic", "static")
    first = points(tmp_path)
    assert len(first) == 5
    for record in first:
        assert record["status"] == "ok", record
        assert 0 < record["seconds"] < 1
        assert len(record["all_seconds"]) == 3
        assert set(record["errors"]) == {"equal rows", "padded rows", "these rows"}
        assert max(record["errors"].values()) < 1e-5
    assert {(r["cache"], r["attention"]) for r in first} == {
        ("dynamic", "flashmla"), ("dynamic", "sdpa"), ("static", "flashmla"), ("static", "sdpa"), ("static", "eager"),
    }  # fmt: skip
    page = (tmp_path / "RESULTS.md").read_text()
    assert "### Dynamic cache" in page
    assert page.split("### Dynamic cache")[1].split("![")[0].strip() in capsys.readouterr().out
    assert "| 3, padded | 256 | " in page
    assert "| batch | tokens | flashmla | sdpa | flashmla / sdpa, time |" in page
    assert "Without a number" not in page
    (path,) = tmp_path.glob("generate-*.png")
    assert path.stat().st_size > 1000

    capsys.readouterr()
    run(tmp_path, "--groups", "dynamic", "static")
    assert "0 of 5 points to measure" in capsys.readouterr().out
    run(tmp_path, "--groups", "eager", "--batch_sizes", "1")
    assert points(tmp_path)[:5] == first
    assert len(points(tmp_path)) == 6


def test_generate_compiles_the_step_into_one_graph(tmp_path, monkeypatch):
    monkeypatch.setitem(generation.COMPILE_OPTIONS, "cpu", {"mode": None, "backend": "eager"})
    run(tmp_path, "--groups", "compiled")
    assert [r["attention"] for r in points(tmp_path)] == ["flashmla", "sdpa"]
    for record in points(tmp_path):
        assert record["status"] == "ok", record
        assert (record["graphs"], record["graph_breaks"]) == (1, 0)
        assert record["errors"]["these rows"] < 1e-5
    assert "the step compiled by generate()" in (tmp_path / "RESULTS.md").read_text()


def test_a_compiled_point_does_not_begin_without_the_time_to_compile(tmp_path, monkeypatch):
    assert 35 < bench_generate.expected_seconds(Point("llama-8b", "sdpa", "compiled", 1, 2048)) < 50
    assert bench_generate.expected_seconds(Point("llama-8b", "sdpa", "dynamic", 1, 2048)) == point_runs.LEAST_SECONDS
    monkeypatch.setattr(models.SHAPES["tiny"], "num_hidden_layers", 1000)
    run(tmp_path, "--groups", "compiled", "--time_budget", "600")
    assert all(r["reason"].startswith("the time budget is used up; 1255 s are expected, ") for r in points(tmp_path))


def without_mask(module, query, key, value, attention_mask, **options):
    return sdpa_attention_forward(module, query, key, value, None, **options)


def other_heads_of_a_long_cache(module, query, key, value, attention_mask, **options):
    value = value.flip(1) if key.shape[2] > generation.SHORT else value
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def other_rows_of_a_long_cache(module, query, key, value, attention_mask, **options):
    value = value.roll(1, 0) if key.shape[2] > generation.SHORT else value
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def not_a_number(module, query, key, value, attention_mask, **options):
    out, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return out * torch.nan, weights


WRONG = {
    without_mask: ("dynamic", "logits of padded rows are off by"),
    other_heads_of_a_long_cache: ("dynamic", "logits of these rows are off by"),
    other_rows_of_a_long_cache: ("static", "logits of these rows are off by"),
    not_a_number: ("static", "logits of equal rows are off by inf"),
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda f: f.__name__)
def test_wrong_attention_gets_no_number(wrong, monkeypatch, tmp_path):
    cache, said = WRONG[wrong]
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", wrong)
    with pytest.raises(SystemExit, match=r"bench_generate: 1 points failed; first: .*wrong: logits"):
        run(tmp_path, "--groups", cache, "--attentions", "flashmla", "sdpa")
    ours, theirs = points(tmp_path)
    assert ours["status"] == "ok"
    assert theirs["status"] == "wrong"
    assert said in theirs["reason"]
    page = (tmp_path / "RESULTS.md").read_text()
    assert f"- sdpa, {cache}, batch 3 padded, 256: wrong: logits" in page.split("Without a number")[1]


def test_an_fp8_cache_has_a_bound_of_its_own_that_finds_another_row(monkeypatch, tmp_path):
    monkeypatch.setitem(generation.COMPILE_OPTIONS, "cpu", {"mode": None, "backend": "eager"})
    options = ("--groups", "fp8", "--layers", "1")
    run(tmp_path, *options)
    records = points(tmp_path)
    assert [r["cache"] for r in records] == ["compiled-fp8", "compiled", "fp8", "dynamic"]
    assert {(r["attention"], r["layers"], r["status"]) for r in records} == {("flashmla", 1, "ok")}
    for fp8, exact in (records[:2], records[2:]):
        assert exact["errors"]["these rows"] < 1e-5 < fp8["errors"]["these rows"] < generation.FP8_FLOOR
        assert fp8["cache_bytes"] * 64 == exact["cache_bytes"] * 20  # fp32 rows of 16 numbers
    for record in records[:2]:
        assert (record["graphs"], record["graph_breaks"]) == (1, 0)
    page = (tmp_path / "RESULTS.md").read_text()
    assert "### Fp8 cache" in page
    assert "### Static fp8 cache, the step compiled by generate()" in page
    assert "tiny's shape, 1 layers deep, float32" in page

    update = generation.Fp8Cache.update
    other_rows = lambda self, k, v, *rest, **options: update(self, k, v.roll(1, 0), *rest, **options)  # noqa: E731
    monkeypatch.setattr(generation.Fp8Cache, "update", other_rows)
    with pytest.raises(SystemExit, match="logits of these rows are off by"):
        run(tmp_path, *options, "--overwrite")


def on_a_gpu_of(monkeypatch, memory):
    """The model of 8B's shape as it would be on a GPU of ``memory`` bytes, without its weights."""
    monkeypatch.setattr(generation.machine, "memory_limit", lambda device: memory)
    made = Generation.__new__(Generation)
    made.model = SimpleNamespace(config=models.SHAPES["llama-8b"])
    made.dtype, made.device, made.weight_bytes = torch.bfloat16, "cuda", 8_030_261_248 * 2
    return made


def test_what_does_not_fit_is_known_by_arithmetic(monkeypatch):
    made = on_a_gpu_of(monkeypatch, int(79.2 * GIB))
    assert made.bytes_per_token() == 128 * 1024
    fits = {
        (batch, context)
        for batch in bench_generate.BATCH_SIZES["cuda"]
        for context in bench_generate.CONTEXTS["cuda"]
        if made.refusal(Point("llama-8b", "flashmla", "dynamic", batch, context)) is None
    }
    assert fits == {(1, 2048), (1, 32768), (1, 131072), (8, 2048), (8, 32768), (32, 2048)}
    # Measured first, as nothing else is needed for it: no model is built in this test.
    record = made.measure(Point("llama-8b", "flashmla", "dynamic", 32, 131072))
    assert record["status"] == "does_not_fit"
    assert record["reason"] == "would take 609 GiB of 79: 15 of weights, 512 of cache"


def test_rows_of_a_padded_batch_have_different_lengths():
    padded = Point("tiny", "flashmla", "dynamic", 8, 2048, is_padded=True)
    starts = padded.starts()
    assert len(set(starts)) == 8
    assert starts[0] == 0
    assert padded.rows / 2 * 0.8 < starts[-1] < padded.rows / 2
    assert Point("tiny", "flashmla", "dynamic", 2, 2048).starts() == [0, 0]
    assert padded.rows + 1 + padded.warmup + padded.tokens == padded.context


@pytest.mark.parametrize("is_padded", [False, True])
def test_every_kind_of_cache_holds_the_same_numbers_and_poison_only_in_padding(is_padded):
    made = Generation("tiny", "float32", "cpu")
    point = Point("tiny", "eager", "dynamic", 2, 96, is_padded)
    dynamic, static = (generation.Decoding(made, point, kind) for kind in ("dynamic", "static"))
    for ours, theirs in zip(dynamic.cache.layers, static.cache.layers, strict=True):
        assert ours.keys.shape[2] == point.rows
        assert torch.equal(ours.keys, theirs.keys[:, :, : point.rows])
        assert torch.equal(ours.values, theirs.values[:, :, : point.rows])
        poisoned = (ours.values == generation.POISON).all(-1).all(1)
        assert torch.equal(poisoned, dynamic.mask[:, :-1] == 0)
    torch.testing.assert_close(dynamic.warm_up(), static.warm_up())  # other widths of a product may be summed otherwise


def test_what_matters_most_comes_first(capsys):
    bench_generate.main(["--device", "cuda", "--list"])
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 54
    assert all("cache='dynamic'" in line and "attention='eager'" not in line for line in listed[:18])
    assert "batch_size=1, context=2048, is_padded=False" in listed[0]
    assert "batch_size=8, context=2048, is_padded=True" in listed[2]
    assert all("cache='compiled'" in line and "attention='eager'" not in line for line in listed[18:36])
    assert all("attention='eager'" in line for line in listed[36:])


# ---------------------------------------------------------------- a run of points


@dataclass(frozen=True)
class Task:
    name: str
    sizes: tuple[int, int] = (1, 2)


def run_tasks(folder, measure, *names, budget=None, limit=30.0, retry=(), **program_fields):
    parser = point_runs.parser_of("", "tasks")
    given = ["--retry", *retry] if retry else []
    args = parser.parse_args(["--device", "cpu", "--output_dir", str(folder), "--name", "tasks", *given])
    args.time_budget, args.time_limit = budget, limit
    point_runs.set_defaults(args)
    program = point_runs.Program(
        "tasks", "tasks", lambda args: measure, lambda record: record["name"], lambda document: "the table",
        **program_fields,
    )  # fmt: skip
    point_runs.run(program, [Task(name) for name in names], args)


def read(folder):
    return {
        r["name"]: (r["status"], r.get("reason")) for r in json.loads((folder / "tasks.json").read_text())["points"]
    }


def test_a_point_that_hangs_costs_its_limit_and_the_file_is_written_after_each(tmp_path):
    seen = []

    def measure(task):
        if (tmp_path / "tasks.json").exists():
            seen.append(sorted(read(tmp_path)))
        while task.name == "hangs":
            try:
                time.sleep(0.01)
            except Exception:  # nothing on the way swallows the end of the time
                continue
        if task.name == "big":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return {"status": "ok"}

    started = time.monotonic()
    run_tasks(tmp_path, measure, "a", "hangs", "big", "b", limit=0.3)
    assert time.monotonic() - started < 10
    assert read(tmp_path) == {
        "a": ("ok", None), "hangs": ("timeout", "not done in 0 s"), "big": ("out_of_memory", "the allocation failed"),
        "b": ("ok", None),
    }  # fmt: skip
    assert seen == [["a"], ["a", "hangs"], ["a", "big", "hangs"]]
    # A point without a number is tried again, one with a number is not: tuples in the file are lists.
    done = []
    run_tasks(tmp_path, lambda task: done.append(task.name) or {"status": "ok"}, "a", "hangs", "big", "b")
    assert done == ["hangs", "big"]


def test_a_budget_leaves_points_to_the_next_run_and_final_ones_are_not_repeated(tmp_path):
    """What the rest of a budget is too short for does not begin; what failed comes after what never ran."""
    final = (*point_runs.FINAL, "out_of_memory", "timeout")
    seconds = {"long": 100.0, "short": 3.0, "hangs": 3.0, "big": 3.0, "bad": 3.0}
    done = []

    def measure(task):
        done.append(task.name)
        if task.name == "hangs":
            time.sleep(20)
        if task.name == "bad":
            raise ValueError("a fault")
        return {"status": "out_of_memory" if task.name == "big" else "ok", "reason": ""}

    def run(*names, **fields):
        done.clear()
        run_tasks(tmp_path, measure, *names, final=final, expected_seconds=lambda task: seconds[task.name], **fields)

    run("long", "short", "big", budget=50.0)
    assert done == ["short", "big"]
    status, reason = read(tmp_path)["long"]
    assert status == "skipped"
    assert reason.startswith("the time budget is used up; 100 s are expected, ")
    with pytest.raises(SystemExit, match="1 points failed"):
        run("bad", "short", "big", "hangs", limit=0.3)
    assert (done, read(tmp_path)["hangs"]) == (["bad", "hangs"], ("timeout", "not done in 0 s"))
    with pytest.raises(SystemExit, match="1 points failed"):
        run("bad", "hangs", "big", "long")
    assert done == ["long", "bad"]
    with pytest.raises(SystemExit, match="1 points failed"):
        run("bad", "hangs", "big", retry=["out_of_memory"])
    assert set(done) == {"bad", "big"}


def test_a_point_that_the_budget_ends_is_not_one_that_takes_too_long(tmp_path):
    run_tasks(tmp_path, lambda task: time.sleep(30), "a", budget=3.5)
    status, reason = read(tmp_path)["a"]
    assert status == "skipped"
    assert reason.startswith("the time budget ended it: not done in 3 s")


def test_points_follow_from_records_until_none_does(tmp_path):
    done = []

    def measure(task):
        done.append(task.name)
        return {"status": "ok"}

    def following(args, records):
        return Task(f"{len(records)}") if len(records) < 4 else None

    run_tasks(tmp_path, measure, "a", following=following)
    assert done == ["a", "1", "2", "3"]
    run_tasks(tmp_path, measure, "a", following=following)
    assert len(done) == 4
    # One that the budget leaves is not asked for again in the same run.
    run_tasks(tmp_path, measure, "a", following=lambda args, records: Task("b"), budget=0)
    assert read(tmp_path)["b"][0] == "skipped"


def test_an_error_of_a_point_with_processes_of_its_own_does_not_end_the_run(tmp_path):
    def measure(task):
        return {"status": "error" if task.name == "a" else "ok", "reason": "CUDA error: an illegal memory access"}

    with pytest.raises(SystemExit, match="1 points failed"):
        run_tasks(tmp_path, measure, "a", "b", has_processes=True)
    assert read(tmp_path)["b"][0] == "ok"


def test_an_error_is_recorded_and_a_lost_context_ends_the_run(tmp_path):
    def measure(task):
        raise RuntimeError("a fault" if task.name == "a" else "CUDA error: an illegal memory access was encountered")

    with pytest.raises(SystemExit, match=r"tasks: RuntimeError: CUDA error.*the points before it are in"):
        run_tasks(tmp_path, measure, "a", "b", "c")
    assert read(tmp_path)["a"] == ("error", "RuntimeError: a fault")
    assert "c" not in read(tmp_path)


def test_a_file_of_another_device_is_not_gone_on_with(tmp_path):
    document = {"kind": "tasks", "environment": {"device": "another"}, "points": []}
    (tmp_path / "tasks.json").write_text(json.dumps(document))
    with pytest.raises(SystemExit, match="is of another kind or device"):
        run_tasks(tmp_path, print, "a")


# ---------------------------------------------------------------- the bars


def document_of(times):
    """A GPU run's records from (cache, attention, batch, context) -> ms."""
    names = {
        "model": "llama-8b",
        "dtype": "bfloat16",
        "tokens": 32,
        "commit": "abc",
        "is_padded": False,
        "status": "ok",
    }
    return {
        "kind": "generate",
        "environment": {"device": "a GPU", "device_type": "cuda", "commit": "abc"},
        "points": [
            {**names, "cache": cache, "attention": attention, "batch_size": batch, "context": context, "seconds": ms / 1e3,
             "peak_bytes": 20 * GIB}
            for (cache, attention, batch, context), ms in times.items()
        ],
    }  # fmt: skip


def test_the_bars_are_those_of_the_issue():
    times = {
        ("dynamic", "flashmla", 1, 2048): 20.0, ("dynamic", "sdpa", 1, 2048): 20.0,
        ("dynamic", "flashmla", 1, 131072): 17.0, ("dynamic", "sdpa", 1, 131072): 20.0,
        ("compiled", "flashmla", 1, 131072): 15.0, ("compiled", "sdpa", 1, 131072): 20.0,
        ("compiled", "flashmla", 1, 2048): 10.3, ("compiled", "sdpa", 1, 2048): 10.0,
        ("compiled", "eager", 1, 2048): 30.0,
    }  # fmt: skip
    document = document_of(times)
    assert verdicts.lines(inference_results.bars(document)) == [
        "pass  dynamic cache: at most 1.0× sdpa's time a token at every point: highest 1.00× (batch 1, 2,048), geometric mean "
        "0.92× over 2",
        "FAIL  dynamic cache, batch 1, 131,072, aim: at most 0.8× sdpa's time: 0.85×",
        "FAIL  compiled cache: at most 1.0× sdpa's time a token at every point: highest 1.03× (batch 1, 2,048), geometric mean "
        "0.88× over 2",
        "pass  compiled cache, batch 1, 131,072, aim: at most 0.8× sdpa's time: 0.75×",
    ]
    page = inference_results.section(document)
    assert "| 1 | 2,048 | 10.30 ms, 20.00 GiB | 10.00 ms, 20.00 GiB | 30.00 ms, 20.00 GiB | 1.03× | 0.34× |" in page
    assert [*inference_results.readme_rows(document)] == [
        "| `generate()`, llama-8b's shape, dynamic cache, a GPU, batch 1, 131,072 tokens | 17.0 ms a token, 0.85 × sdpa's time; "
        "geometric mean over 2 points 0.92 × |",
    ]
