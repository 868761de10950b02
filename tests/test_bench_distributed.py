"""The benchmark of several GPUs: every kind of point runs, on a CPU over gloo, and finds the numbers of one process."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path

import bench_distributed
import distributed_points
import distributed_predictions
import distributed_results
import gloo_processes
import measure_distributed
import pytest
from distributed_points import GROUPS, MILLION, PACKS_PER_STEP, SCALED, expected_seconds
from measure_distributed import MARK, Point

from flashmla_hf.host_memory import GIB
from flashmla_hf.training.child_process import Outcome

ARGUMENTS = ["--tiny", "--gpus", "2"]


def points(monkeypatch, *arguments: str) -> list[Point]:
    """Those of a command line, in their order."""
    found: list[Point] = []
    monkeypatch.setattr(bench_distributed.point_runs, "run", lambda program, points, args: found.extend(points))
    bench_distributed.main([*ARGUMENTS, *arguments])
    return found


def measured(point: Point) -> dict:
    # Started as torchrun starts it; a point of one process is Python alone.
    environment = point.variables()
    return gloo_processes.run(measure_distributed.measure, point, processes=point.gpus, **environment)[0]


def test_the_most_important_points_come_first_and_options_choose_among_them(monkeypatch):
    every = points(monkeypatch)
    assert list(dict.fromkeys(p.group for p in every)) == [name for name in GROUPS if name != "longest"]
    assert len(set(every)) == len(every) > 30
    assert (
        points(monkeypatch, "--only", "attention", "long", "--limit", "2")
        == [p for p in every if p.group == "attention"][:2]
    )
    assert {p.layers for p in points(monkeypatch, "--layers", "8") if p.kind != "same"} == {None}  # tiny has its own


@pytest.mark.parametrize("name", ["same", "gradient", "train", "attention"])
def test_every_kind_of_point_runs_and_gives_the_numbers_of_one_process(name, monkeypatch):
    chosen = [p for p in points(monkeypatch) if p.kind == name]
    if not gloo_processes.HAS_DEEPSPEED:
        chosen = [p for p in chosen if p.engine != "ulysses"]
    if name == "train":  # each engine once
        chosen = list(
            {
                (p.engine, p.attention, p.model, p.steps == distributed_points.TINY_STEPS, p.window): p for p in chosen
            }.values()
        )
        assert len(chosen) > (8 if gloo_processes.HAS_DEEPSPEED else 5)
    found = [{"status": "ok", **vars(point), **measured(point)} for point in chosen]
    assert {(r["engine"], r["documents"]) for r in found} == {(p.engine, p.documents) for p in chosen}
    for record in found:
        assert distributed_results.describe(record)
        if name == "gradient":
            assert record["gradient_error"] < 1e-5, record
            assert record["gradients"] > 10
        if name == "same":
            same = ("documents", "model", "window")
            alone = [r for r in found if r["gpus"] == 1 and all(r[n] == record[n] for n in same)]
            assert alone
            assert all(distributed_results.loss_difference(record, one) < 1e-5 for one in alone), record
            assert record["losses"][0] != record["losses"][-1]
        if name in ("train", "attention"):
            assert record["seconds"] > 0
    page = distributed_results.section({"points": found})
    assert "Without a number" not in page
    assert page.startswith("### ")
    if name == "train":
        lines = page.split("### The losses of fewer GPUs")[1].split("###")[0].strip().splitlines()[2:]
        assert len(lines) >= (2 if gloo_processes.HAS_DEEPSPEED else 1)
        assert all(float(line.split("|")[-2]) < 1e-5 for line in lines), lines


def test_a_run_writes_its_file_and_the_page_and_goes_on_where_it_was(tmp_path, capsys):
    """Really: a torchrun for each point."""
    arguments = [*ARGUMENTS, "--only", "same", "--output_dir", str(tmp_path), "--time_limit", "200"]
    bench_distributed.main([*arguments, "--limit", "1"])
    bench_distributed.main([*arguments, "--limit", "2", "--time_budget", "0"])
    assert "1 of 2 points to measure" in capsys.readouterr().out
    (path,) = tmp_path.glob("distributed-tiny.json")
    first, second = json.loads(path.read_text())["points"]
    assert (first["engine"], first["status"], second["engine"], second["status"]) == ("one", "ok", "ddp", "skipped")
    assert len(first["losses"]) == distributed_points.TINY_STEPS
    assert "Without a number" in (tmp_path / "RESULTS.md").read_text()


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("no model"), "error"), (MemoryError(), "out_of_memory")], ids=["error", "memory"]
)
def test_a_point_that_fails_says_why_and_ends_its_process(error, status, monkeypatch, capsys):
    def failing(point):
        raise error

    def exit(code):
        raise SystemExit(code)

    point = points(monkeypatch, "--limit", "1")[0]
    monkeypatch.setattr(measure_distributed, "measure", failing)
    monkeypatch.setattr(measure_distributed.os, "_exit", exit)
    monkeypatch.setattr(measure_distributed.sys, "argv", ["measure", json.dumps(dataclasses.asdict(point))])
    with pytest.raises(SystemExit):
        measure_distributed.main()
    (told,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(MARK)]
    found = json.loads(told.removeprefix(MARK))
    assert found["status"] == status
    assert str(error) in found["reason"]


# ---------------------------------------------------------------- eight GPUs, and what is predicted


def dry(tmp_path, *arguments: str) -> list[dict]:
    """The points of a dry run, with their predictions, as its file has them."""
    bench_distributed.main([*arguments, "--dry_run", "--output_dir", str(tmp_path)])
    (path,) = tmp_path.glob("*-predicted.json")
    return json.loads(path.read_text())["points"]


def point_of(record: dict) -> Point:
    return Point(**{field.name: record[field.name] for field in dataclasses.fields(Point)})


def test_a_dry_run_of_eight_gpus_predicts_every_point_that_was_asked_for(tmp_path, capsys):
    records = dry(tmp_path, "--gpus", "8")
    out = capsys.readouterr().out
    assert len(out.splitlines()) == len(records) + 1
    steps = [r for r in records if r["kind"] == "train"]
    whole = [r for r in steps if not r["use_peft"] and r["context"] == MILLION and r["is_patched"]]
    assert {(r["model"], r["engine"]) for r in whole if r["memory_gib"] == distributed_points.LEAN} == {
        (model, engine) for model in ("llama-8b", "qwen3-8b") for engine in ("ulysses", "ring")
    }
    held = [r for r in steps if r["group"] == "million" and r["context"] == SCALED]
    assert {(r["engine"], r["gpus"]) for r in held} == {("ulysses", 4), ("ulysses", 8), ("ring", 8)}
    lora = [r for r in steps if r["group"] == "long" and r["context"] == MILLION and not r["layers"]]
    assert {(r["engine"], r["documents"] > 1, r["window"]) for r in lora} == {
        ("ulysses", False, None), ("ring", False, None), ("ulysses", True, None), ("ulysses", False, distributed_points.WINDOW),
    }  # fmt: skip
    assert [r["gpus"] for r in steps if r["group"] == "scaling"] == [8, 4, 2, 1]
    assert {r["documents"] > 1 for r in records if r["kind"] == "attention"} == {True, False}
    for record in steps:
        assert record["predicted"]["seconds"] > 0, record
        assert record["predicted"]["peak_bytes"] > 2 * GIB, record
        assert f"{record['predicted']['seconds']:.4g} s, peak at least" in out
    assert all(PACKS_PER_STEP % point_of(r).groups == 0 for r in records if r["kind"] == "same")
    assert not [r for r in dry(tmp_path / "four", "--gpus", "4") if r["group"] == "million"]


@pytest.mark.parametrize("gpus", ["2", "4", "8"])
def test_no_point_takes_longer_than_its_limit_because_layers_are_cut(gpus, tmp_path):
    limit = bench_distributed.TIME_LIMIT
    assert limit < 600  # of a call, with this program's start and end
    found = dry(tmp_path / "short", "--gpus", gpus)
    assert max(expected_seconds(point_of(r)) for r in found) <= limit
    cut = [r for r in found if r["layers"] and r["kind"] == "train"]
    assert bool(cut) == (gpus != "2")
    assert all(f", {r['layers']} layers" in distributed_results.model_of(r) for r in cut)
    with_time = dry(tmp_path / "long", "--gpus", gpus, "--time_limit", "86400")
    assert not [r for r in with_time if r["layers"] and r["kind"] == "train"]
    short = dry(tmp_path / "budget", "--gpus", gpus, "--time_budget", "300")
    assert max(expected_seconds(point_of(r)) for r in short) <= 300


def test_a_prediction_knows_documents_windows_rings_and_the_host():
    step = Point("long", "train", "ulysses", 8, "llama-8b", MILLION)
    one = distributed_predictions.predict(step)
    assert one["mfu"] == pytest.approx(0.43, rel=0.01)

    def predicted(**fields) -> dict:
        return distributed_predictions.predict(dataclasses.replace(step, **fields))

    assert predicted(documents=64)["seconds"] < 0.2 * one["seconds"]
    assert predicted(window=4096)["seconds"] < predicted(documents=64)["seconds"]
    assert predicted(engine="ring")["exchange_seconds"] == 0 < one["exchange_seconds"]
    assert predicted(layers=16)["seconds"] == pytest.approx(one["seconds"] / 2, rel=0.05)
    # Beyond the host's memory the GPU keeps what has no room there.
    longer = predicted(context=4 * MILLION)
    assert longer["pinned_bytes"] <= distributed_predictions.MOST_HOST_GIB * GIB < 4 * one["pinned_bytes"]
    assert longer["peak_bytes"] > 6 * one["peak_bytes"]
    assert not distributed_predictions.fits(dataclasses.replace(step, context=4 * MILLION))
    longest = dataclasses.replace(step, context=distributed_predictions.longest_by_ledger(step))
    assert distributed_predictions.fits(longest)
    assert not distributed_predictions.fits(dataclasses.replace(longest, context=longest.context + 2**14))
    assert distributed_predictions.predict(dataclasses.replace(step, model="sinks-1b")) is None
    alone = distributed_predictions.predict(Point("attention", "attention", "one", 1, "llama-8b", 65536))
    assert alone["share_of_one_gpu"] == 1


# ---------------------------------------------------------------- searches


def options(**fields) -> argparse.Namespace:
    """As of a command line for GPUs."""
    given = {"gpus": 4, "tiny": False, "only": ["longest"], "limit": None, "layers": None, "gpu_memory": 78.0}
    given |= {"time_limit": 560.0, "time_budget": None, "points": None, "starting": 90.0, "turns": None}
    given |= {"output_dir": Path("none"), "name": "none"}
    return argparse.Namespace(**given | fields)


def searched(args: argparse.Namespace, holds: dict[str, int], failure: str = "out_of_memory") -> list[dict]:
    """The trials of all searches, if an engine holds so many tokens, with a peak in proportion."""
    records: list[dict] = []
    while (point := distributed_points.following(args, records)) is not None:
        engine = "ours" if point.is_patched else point.engine
        is_ok = point.context <= holds[engine]
        peak = {"peak_bytes": int(70 * GIB * point.context / holds[engine])} if is_ok else {"reason": failure}
        records.append(dataclasses.asdict(point) | {"status": "ok" if is_ok else failure} | peak)
        assert len(records) < 60
    return records


@pytest.mark.parametrize("failure", ["out_of_memory", "timeout"])
def test_a_search_finds_each_longest_step_in_few_trials_and_goes_on_where_it_was(failure):
    holds = {"ring": 300_000, "ulysses": 210_000, "ours": 1_500_000}
    records = searched(options(), holds, failure)
    searches: dict[tuple, list[dict]] = {}
    beside = [r for r in records if r["is_patched"] and not r["window"]]
    for r in (r for r in records if r not in beside):
        searches.setdefault(("ours" if r["is_patched"] else r["engine"], r["use_peft"]), []).append(r)
    assert set(searches) == {(name, use_peft) for name in holds for use_peft in (True, False)}
    for (name, _), trials in searches.items():
        assert len(trials) <= distributed_points.MOST_TRIALS
        longest = max(r["context"] for r in trials if r["status"] == "ok")
        assert 0.85 * holds[name] < longest <= holds[name], (name, trials)
        assert all(r["context"] % (2 * r["gpus"]) == 0 for r in trials)  # what the ring divides
        assert all(expected_seconds(point_of(r)) <= 560 for r in trials)
    # Ours at each length that a peer ended with: all at the same settings but the engine's.
    ended = {(r["use_peft"], r["context"]) for r in beside}
    assert len(beside) == len(ended) == 4
    assert ended == {
        (key[1], max(r["context"] for r in trials if r["status"] == "ok"))
        for key, trials in searches.items()
        if key[0] != "ours"
    }
    args = options()
    for done in range(len(records)):  # at any place the file is what counts
        following = distributed_points.following(args, records[:done])
        assert dataclasses.asdict(following).items() <= records[done].items()
    numbers = {"seconds": 1.0, "tokens_per_second": 100.0, "mfu": 0.4, "pinned_bytes": 0}
    rates = [{"mfu": 0.6} if r["is_patched"] else {} for r in records]
    text = distributed_results.section({"points": [r | numbers | rate for r, rate in zip(records, rates, strict=True)]})
    longest = text.split("### The longest steps")[1].split("\n\n")[1]
    assert len(longest.strip().splitlines()) == 2 + len(searches)
    assert text.split("### Beside what people do today")[1].split("###")[0].count("| 1.50 × |") == 4
    assert failure.replace("_", " ") in text


def test_an_error_of_a_peer_ends_its_search_alone_and_a_budget_none():
    def all_records(status: str, count: int) -> list[dict]:
        records: list[dict] = []
        while len(records) < count and (point := distributed_points.following(options(), records)) is not None:
            records.append(dataclasses.asdict(point) | {"status": status, "reason": "", "peak_bytes": 0})
        return records

    records = all_records("error", 20)
    assert len(records) == 6  # one trial each
    first, again = all_records("skipped", 2)
    assert first == again
    assert distributed_points.following(options(limit=1), records[:1]) is None
    assert distributed_points.following(options(only=["same"]), []) is None


def test_the_system_that_kills_a_process_is_a_lack_of_memory(monkeypatch, tmp_path):
    said = {"reason": "  exitcode  : -9 (pid: 7)"}
    monkeypatch.setattr(bench_distributed.child_process, "run", lambda *_, **__: Outcome("error", said["reason"]))
    measure = bench_distributed.start(options(tiny=True, output_dir=tmp_path))
    point = Point("longest", "train", "ring", 4, "llama-8b", SCALED)
    assert measure(point)["status"] == "out_of_memory"
    assert measure(point)["predicted"]["seconds"] > 0
    said["reason"] = "  exitcode  : -11 (pid: 7)"
    assert measure(point)["status"] == "error"


# ---------------------------------------------------------------- several runs at once


def test_points_are_chosen_by_their_numbers_in_the_order_of_these(monkeypatch, capsys):
    every = points(monkeypatch)
    assert points(monkeypatch, "--points", "7", "0") == [every[7], every[0]]
    bench_distributed.main([*ARGUMENTS, "--list"])
    listed = capsys.readouterr().out.splitlines()
    assert listed == [f"{number} {point}" for number, point in enumerate(every)]
    with pytest.raises(SystemExit):
        bench_distributed.main([*ARGUMENTS, "--points", str(len(every))])
    assert "--points: expected numbers of --list" in capsys.readouterr().err
    assert distributed_points.following(options(points=[0], only=["longest"]), []) is None


def test_steps_that_are_compared_have_the_same_number_of_layers(tmp_path):
    found = dry(tmp_path, "--gpus", "4", "--time_limit", "100", "--starting", "70", "--only", "scaling", "peers")
    for use_peft in (True, False):
        (layers,) = {r["layers"] for r in found if r["use_peft"] == use_peft}
        assert 1 < layers < 32
    found = dry(tmp_path / "named", "--gpus", "4", "--layers", "16", "--time_limit", "9999")
    assert {r["layers"] for r in found if r["kind"] == "train" and r["group"] != "longest"} == {16}


def run_of_its_own(folder: Path) -> None:
    """The first process runs as "a", the second as "b", each as if it alone had been started."""
    name, number = (("a", "0"), ("b", "2"))[int(os.environ["RANK"])]
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[variable]
    given = ["--output_dir", str(folder), "--turns", str(folder / "turn")]
    bench_distributed.main([*ARGUMENTS, *given, "--name", name, "--points", number])


def test_runs_of_other_names_and_one_turn_become_one_file(tmp_path, capsys):
    """Two runs at once, of which one measures at a time, in processes that really are started."""
    gloo_processes.run(run_of_its_own, tmp_path, limit=200)
    bench_distributed.main([*ARGUMENTS, "--output_dir", str(tmp_path), "--merge", "a", "b", "a", "--name", "both"])
    assert "both.json" in capsys.readouterr().out
    found = json.loads((tmp_path / "both.json").read_text())["points"]
    assert [(r["engine"], r["gpus"], r["status"]) for r in found] == [("one", 1, "ok"), ("fsdp2", 1, "ok")]


def test_a_failed_point_leaves_what_its_processes_said(monkeypatch, tmp_path):
    outcome = Outcome("error", "no kernel", log="Traceback\\nno kernel")
    monkeypatch.setattr(bench_distributed.child_process, "run", lambda *_, **__: outcome)
    measure = bench_distributed.start(options(tiny=True, output_dir=tmp_path, name="x"))
    assert measure(Point("same", "same", "ring", 2, "tiny-heads", 64, device="cpu"))["status"] == "error"
    (log,) = (tmp_path / "x-logs").iterdir()
    assert "Traceback\\nno kernel" in log.read_text()
    late = Outcome("error", "a peer is gone", log="  exitcode  : -14 (pid: 7)  (SIGALRM)")
    monkeypatch.setattr(bench_distributed.child_process, "run", lambda *_, **__: late)
    assert measure(Point("same", "same", "ring", 2, "tiny-heads", 64, device="cpu"))["status"] == "timeout"
