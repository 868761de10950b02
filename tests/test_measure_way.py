"""One process for all contexts of a way to train: order, time, running out of memory, and a process that dies."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace

import demo
import measure_model
import measure_way
import memory_report
import models
import pytest
import torch
from measure_model import Measurement, Point
from measure_way import Way, measure_points, measure_ways

CONTEXTS = (2048, 8192, 32768, 65536, 131072)


class Machine:
    """A device with room for ``most`` tokens, on which a step takes time as its operations do. Nothing is computed."""

    def __init__(self, monkeypatch, most=10**9, rate=4e14):
        self.now, self.most, self.rate, self.log, self.cleared = 0.0, most, rate, [], 0
        machine = self

        class Step:
            def __init__(self, point):
                machine.now += 20.0
                self.peak_flops = None
                self.model = SimpleNamespace(config=models.SHAPES["llama-8b"], zero_grad=self.zero_grad)

            def zero_grad(self, set_to_none):
                machine.cleared += 1

            def ids(self, point, context):
                return context

            def run(self, context):
                machine.now += machine.seconds(context)

        def measure(point, step):
            machine.log.append((point.context, point.repeats))
            if point.context > machine.most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
            machine.now += machine.seconds(point.context) * (1 + point.repeats)
            memory = {"peak_bytes": point.context * 600 * 1024, "model_bytes": 16 << 30, "memory_bytes": 80 << 30}
            return Measurement(point, "ok", seconds=machine.seconds(point.context), **memory)

        monkeypatch.setattr(measure_way, "Step", Step)
        monkeypatch.setattr(measure_model, "measure", measure)

    def seconds(self, context):
        shape = models.SHAPES["llama-8b"]
        return 0.2 + measure_way.Shape.of(shape).training_flops([context], True) / self.rate

    def measure(self, seconds, longest_first=False, contexts=CONTEXTS):
        results = []
        points = [Point("llama-8b", "flashmla", context) for context in contexts]
        measure_points(points, seconds, longest_first, results.append, clock=lambda: self.now)
        assert sorted(r.point.context for r in results) == sorted(contexts)
        return {r.point.context: r for r in results}


def test_the_longest_context_is_measured_although_there_is_no_time_for_all(monkeypatch):
    machine = Machine(monkeypatch)
    needed = 20.5 + sum(2 * machine.seconds(n) for n in (2048, 8192, 32768)) + 1.3 * machine.seconds(131072)
    found = machine.measure(needed, longest_first=True)
    assert [n for n, _ in machine.log][:4] == [2048, 8192, 32768, 131072]
    assert found[131072].status == "ok"
    assert found[65536].status == "skipped"
    assert "would take about" in found[65536].reason
    assert machine.now <= needed


def test_a_context_that_would_not_fit_says_so_and_not_that_time_was_short(monkeypatch):
    machine = Machine(monkeypatch)
    needed = 20.5 + sum(2 * machine.seconds(n) for n in (2048, 8192, 32768)) + 1.3 * machine.seconds(65536)
    found = machine.measure(needed)
    assert found[131072].reason == "would take about 91 GiB of 80"
    assert found[65536].status == "ok"


def test_the_contexts_between_follow_while_there_is_time(monkeypatch):
    machine = Machine(monkeypatch)
    found = machine.measure(10**6, longest_first=True)
    assert [n for n, _ in machine.log] == [2048, 8192, 32768, 131072, 65536]
    assert all(r.status == "ok" for r in found.values())
    # A short step is timed apart from the first one; a long one is not run twice.
    assert dict(machine.log)[8192] == 1
    assert dict(machine.log)[131072] == 0


def test_out_of_memory_ends_a_way_and_not_its_process(monkeypatch):
    machine = Machine(monkeypatch, most=40000)
    found = machine.measure(10**6)
    assert [found[n].status for n in CONTEXTS] == ["ok", "ok", "ok", "out_of_memory", "skipped"]
    assert "65,536 tokens: out of memory" in found[131072].reason
    assert [n for n, _ in machine.log][-1] == 65536
    assert machine.cleared == 1


def test_a_longest_context_that_does_not_fit_leaves_the_shorter_ones(monkeypatch):
    machine = Machine(monkeypatch, most=100000)
    found = machine.measure(10**6, longest_first=True)
    assert [found[n].status for n in CONTEXTS] == ["ok", "ok", "ok", "ok", "out_of_memory"]


def test_another_error_is_not_taken_for_memory(monkeypatch):
    Machine(monkeypatch)
    monkeypatch.setattr(measure_model, "measure", lambda point, step: [][0])
    with pytest.raises(IndexError):
        measure_points([Point("llama-8b", "sdpa", 2048)], 100, False, print)


def test_a_model_that_does_not_fit_is_out_of_memory(monkeypatch):
    Machine(monkeypatch)

    def no_room(point):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16 GiB")

    monkeypatch.setattr(measure_way, "Step", no_room)
    results = []
    measure_points([Point("llama-8b", "sdpa", n) for n in CONTEXTS], 100, False, results.append)
    assert [r.status for r in results] == ["out_of_memory", *["skipped"] * 4]


def test_processes_measure_real_steps_and_one_that_dies_begins_again(monkeypatch):
    """The second of three points kills its process; the series "nonsense" cannot even begin."""
    points = memory_report.points_for("tiny", ["flashmla+all", "nonsense"], [64, 128, 192], device="cpu")
    points = [replace(p, memory_limit=None, dtype="no such dtype" if p.context == 128 else "float32") for p in points]
    # A process that measured the points before it alone: dtype decides when it is built.
    ways = [Way([p for p in points if p.series == name and p.context != 128]) for name in ("flashmla+all", "nonsense")]
    shown = []
    results = measure_ways(ways, 400, shown.append)
    assert shown == results
    found = {(r.point.series, r.point.context): r for r in results}
    assert len(found) == 4
    assert all(found["flashmla+all", n].status == "ok" and found["flashmla+all", n].seconds > 0 for n in (64, 192))
    assert all(found["nonsense", n].status == "error" for n in (64, 192))
    assert "nonsense" in found["nonsense", 64].reason
    assert all(way.process.poll() is not None for way in ways)


def test_a_step_that_takes_longer_than_predicted_may_use_the_time_of_the_others(monkeypatch):
    points = memory_report.points_for("tiny", ["sdpa"], [64, 128], device="cpu", dtype="float32")
    way = Way(points)
    results = way.measure(0.01, lambda r: None, most=60)
    assert [r.status for r in results] == ["ok", "skipped"] or [r.status for r in results] == ["skipped"] * 2
    assert all("s were left" in r.reason for r in results if r.status == "skipped")


def test_a_process_that_hangs_is_ended_with_its_time(monkeypatch):
    monkeypatch.setattr(measure_way, "GRACE", 0.5)
    points = memory_report.points_for("smollm2-135m", ["sdpa"], [8192], device="cpu", dtype="float32")
    way = Way(points)
    started = time.monotonic()
    (result,) = way.measure(1.0, lambda r: None)
    assert result.status == "timeout"
    assert time.monotonic() - started < 10
    assert way.process.poll() is not None


def test_the_demo_says_where_patches_cost_time():
    def result(series, context, seconds, status="ok"):
        point = Point("llama-8b", series.split("+")[0], context, series=series)
        ok = {"seconds": seconds, "tokens_per_second": context / seconds, "peak_bytes": 1} if status == "ok" else {}
        return Measurement(point, status, **ok)

    text = demo.verdicts(
        [
            result("flashmla+all", 2048, 0.4), result("flashmla+all", 8192, 1.0), result("flashmla+all", 131072, 40.0),
            result("sdpa", 2048, 0.2), result("sdpa", 8192, 1.2), result("sdpa", 131072, 1, "out_of_memory"),
        ]
    )  # fmt: skip
    assert "sdpa: longest measured: 8,192 tokens, 6,827 tokens/s; out of memory at 131,072" in text
    assert "flashmla+all: longest measured: 131,072 tokens" in text
    assert "at 2,048 tokens the memory patches cost time: 0.40 s a step beside 0.20 s of sdpa" in text
    assert "at 8,192 tokens the memory" not in text
