"""All contexts of one way to train, measured in one process within a number of seconds: demo.py's picture on a GPU.

A process takes many seconds to start and to build a model, so it is kept: it measures one context after another, and recovers
from running out of memory. A context that would take longer than what is left is left out and says so. Ours is measured at its
longest context as soon as three short ones tell how long that takes; the contexts between follow while there is time.

    python benchmarks/measure_way.py        # reads one line of JSON: {"points": [...], "seconds": 60, "longest_first": true}
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import measure_model
import torch
from measure_model import RESULT_MARK, Measurement, Point, Step
from memory_report import extrapolated

from flashmla_hf.host_memory import GIB
from flashmla_hf.training import child_process, machine
from flashmla_hf.training.shape import Shape

# A step that is predicted to take longer is not timed a second time.
REPEATED = 8
CAUTION = 1.2  # for predictions
BEST = 0.6  # of the device's rate
PROBES = 3  # contexts from which the longest one's time is predicted
SHARE = 0.7
GRACE = 10  # seconds past its own time after which a process is ended


def measure_points(
    points: list[Point],
    seconds: float,
    longest_first: bool,
    emit: Callable[[Measurement], None],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Measures ``points``, which differ in context alone, for ``seconds``. ``emit`` gets one result for each of them."""
    deadline = clock() + seconds
    waiting = sorted(points, key=lambda p: p.context)
    done: list[Measurement] = []
    step: Step | None = None
    while waiting:
        point = _next(waiting, done, step, deadline - clock(), longest_first)
        if point is None:
            for late in waiting:
                emit(Measurement(late, "skipped", _why_not(late, done, step, max(0.0, deadline - clock()))))
            return
        waiting.remove(point)
        needed = _predicted(point, done, step)
        repeats = 1 if needed is None or (needed < REPEATED and 2 * needed < deadline - clock()) else 0
        result, step = _measure(dataclasses.replace(point, repeats=repeats), step)
        emit(result)
        if result.status == "ok":
            done.append(result)
            continue
        # What is longer does not fit either.
        for beyond in [p for p in waiting if p.context > point.context or not done]:
            waiting.remove(beyond)
            emit(Measurement(beyond, "skipped", f"{point.context:,} tokens: out of memory"))


def _next(
    waiting: list[Point], done: list[Measurement], step: Step | None, left: float, longest_first: bool
) -> Point | None:
    """The point to measure now; ``None`` if there is no time for any."""
    if len(done) < PROBES and longest_first:
        fits = [p for p in waiting if (_predicted(p, done, step) or 0.0) <= left]
        return fits[0] if fits and left > 0 else None
    order = reversed(waiting) if longest_first and len(done) == PROBES else waiting
    return next((p for p in order if left > 0 and (_predicted(p, done, step) or 0.0) <= left), None)


def _why_not(point: Point, done: list[Measurement], step: Step | None, left: float) -> str:
    """Why ``point`` is left out with ``left`` seconds to go: it does not fit, if the contexts before it say so, or time."""
    measured = [(r.point.context, r.peak_bytes) for r in sorted(done, key=lambda r: r.point.context)]
    if measured and not point.fills_memory:
        needed, available = extrapolated(measured, point.context) + done[0].model_bytes, done[0].memory_bytes
        if available is not None and needed > available:
            return f"would take about {needed / GIB:.0f} GiB of {available / GIB:.0f}"
    seconds = _predicted(point, done, step)
    return f"{f'would take about {seconds:.0f} s' if seconds else 'not begun'}; {left:.0f} s were left"


def _predicted(point: Point, done: list[Measurement], step: Step | None) -> float | None:
    """Seconds of one step of ``point``, by its operations; ``None`` before anything is measured.

    As memory_report.py extrapolates, but no faster than BEST of the device's rate: short contexts do not show what attention
    will take.
    """
    if not done or step is None:
        return None
    shorter = sorted((r for r in done if r.point.context < point.context), key=lambda r: r.point.context)
    measured = [(r.point.context, r.seconds) for r in shorter] or [(done[0].point.context, done[0].seconds)]
    least = 0.0
    if step.peak_flops is not None and point.device == "cuda":
        least = Shape.of(step.model.config).training_flops([point.context], point.use_peft) / (
            BEST * step.peak_flops[0]
        )
    return max(CAUTION * extrapolated(measured, point.context), least)


def _measure(point: Point, step: Step | None) -> tuple[Measurement, Step | None]:
    reason = None
    try:
        if step is None:
            step = Step(point)
            step.run(step.ids(point, min(point.warmup, point.context)))
        return measure_model.measure(point, step), step
    except (RuntimeError, MemoryError) as error:
        if not machine.is_out_of_memory(error):
            raise
        reason = measure_model.out_of_memory_reason(error)
    # Here, where the error with the frames that held the tensors is gone.
    if step is not None:
        step.model.zero_grad(set_to_none=True)
    gc.collect()
    if point.device == "cuda":
        torch.cuda.empty_cache()
    return Measurement(point, "out_of_memory", reason), step


# ---------------------------------------------------------------- in the parent


class Way:
    """A process for the points of one way. It imports while others measure, and begins when it is told to."""

    def __init__(self, points: list[Point], longest_first: bool = False) -> None:
        self.points, self.longest_first = points, longest_first
        self._start()

    def _start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={"OMP_WAIT_POLICY": "PASSIVE", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} | os.environ,
        )  # fmt: skip
        self.guard = ExitStack()
        self.guard.enter_context(child_process.guarded(self.process))
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.errors: list[str] = []
        threading.Thread(target=self._read, args=(self.process, self.lines), daemon=True).start()
        threading.Thread(target=lambda p=self.process: self.errors.extend(p.stderr), daemon=True).start()

    @staticmethod
    def _read(process: subprocess.Popen, lines: queue.Queue[str | None]) -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    def measure(
        self, seconds: float, on_result: Callable[[Measurement], None], most: float | None = None
    ) -> list[Measurement]:
        """Measures for ``seconds``; every point has a result. A process that dies begins once more, without that point.

        A step that takes longer than predicted may end later, but the process is ended GRACE after ``most`` seconds.
        """
        started = time.monotonic()
        deadline = started + seconds
        self.end_at = started + (seconds if most is None else most) + GRACE
        results = self._measure_once(self.points, deadline, on_result)
        missing = [p for p in self.points if all(r.point.context != p.context for r in results)]
        if missing and self.has_died and deadline - time.monotonic() > GRACE:
            died = Measurement(missing[0], "error", self.last_error())
            on_result(died)
            self.end()
            self._start()
            results += [died, *self._measure_once(missing[1:], deadline, on_result)]
            missing = [p for p in self.points if all(r.point.context != p.context for r in results)]
        for point in missing:
            status = ("error", self.last_error()) if self.has_died else ("timeout", f"not done in {seconds:.0f} s")
            results.append(Measurement(point, *status))
            on_result(results[-1])
        self.end()
        return results

    def _measure_once(
        self, points: list[Point], deadline: float, on_result: Callable[[Measurement], None]
    ) -> list[Measurement]:
        self.has_died = False
        results: list[Measurement] = []
        if not points:
            return results
        seconds = deadline - time.monotonic()
        order = {
            "points": [dataclasses.asdict(p) for p in points], "seconds": seconds, "longest_first": self.longest_first
        }  # fmt: skip
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        except OSError:
            self.has_died = True
            return results
        while len(results) < len(points):
            try:
                line = self.lines.get(timeout=max(0.1, self.end_at - time.monotonic()))
            except queue.Empty:
                self.end()
                return results
            if line is None:
                self.has_died = True
                return results
            if line.startswith(RESULT_MARK):
                found = json.loads(line.removeprefix(RESULT_MARK))
                results.append(Measurement(**found | {"point": Point(**found["point"])}))
                on_result(results[-1])
        return results

    def last_error(self) -> str:
        """The last line that the process wrote to stderr."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5)
        return next((line.strip() for line in reversed(self.errors) if line.strip()), "the process died")

    def end(self) -> None:
        """Ends the process, whatever it does."""
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.guard.close()


def measure_ways(ways: list[Way], seconds: float, on_result: Callable[[Measurement], None]) -> list[Measurement]:
    """Measures ``ways`` one after another for ``seconds`` in all.

    Each gets SHARE of what is left, the last all of it: the first ones, which go furthest, get most.
    """
    deadline = time.monotonic() + seconds - GRACE
    results: list[Measurement] = []
    try:
        for i, way in enumerate(ways):
            left = max(0.0, deadline - time.monotonic())
            results += way.measure(left if i == len(ways) - 1 else SHARE * left, on_result, left)
    finally:
        for way in ways:
            way.end()
    return results


def main() -> None:
    line = sys.stdin.readline()
    if not line:  # whoever started this has ended
        return
    order = json.loads(line)
    points = [Point(**p) for p in order["points"]]

    def emit(result: Measurement) -> None:
        print(RESULT_MARK + json.dumps(result.as_dict()), flush=True)

    measure_points(points, order["seconds"], order["longest_first"], emit)


if __name__ == "__main__":
    main()
