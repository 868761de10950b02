"""The benchmark of several GPUs: every kind of point runs, on a CPU over gloo, and finds the numbers of one process."""

from __future__ import annotations

import dataclasses
import json

import bench_distributed
import distributed_results
import gloo_processes
import measure_distributed
import pytest
from bench_distributed import GROUPS
from measure_distributed import MARK, Point

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
    assert list(dict.fromkeys(p.group for p in every)) == list(GROUPS)
    assert len(set(every)) == len(every) > 20
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
        chosen = list({(p.engine, p.attention): p for p in chosen}.values())
    found = [{"status": "ok", **vars(point), **measured(point)} for point in chosen]
    assert {(r["engine"], r["documents"]) for r in found} == {(p.engine, p.documents) for p in chosen}
    for record in found:
        assert distributed_results.describe(record)
        if name == "gradient":
            assert record["gradient_error"] < 1e-5, record
            assert record["gradients"] > 10
        if name == "same" and record["engine"] != "one":
            (alone,) = (r for r in found if r["engine"] == "one" and r["documents"] == record["documents"])
            assert distributed_results.loss_difference(record, alone) < 1e-5, record
            assert record["losses"][0] != record["losses"][-1]
        if name in ("train", "attention"):
            assert record["seconds"] > 0
    page = distributed_results.section({"points": found})
    assert "Without a number" not in page
    assert page.startswith("### ")


def test_a_run_writes_its_file_and_the_page_and_goes_on_where_it_was(tmp_path, capsys):
    """Really: a torchrun for each point."""
    arguments = [*ARGUMENTS, "--only", "same", "--output_dir", str(tmp_path), "--time_limit", "100"]
    bench_distributed.main([*arguments, "--limit", "1"])
    bench_distributed.main([*arguments, "--limit", "2", "--time_budget", "0"])
    assert "1 of 2 points to measure" in capsys.readouterr().out
    (path,) = tmp_path.glob("distributed-tiny.json")
    first, second = json.loads(path.read_text())["points"]
    assert (first["engine"], first["status"], second["engine"], second["status"]) == ("one", "ok", "ulysses", "skipped")
    assert len(first["losses"]) == bench_distributed.TINY_STEPS
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
