"""A benchmark of points in one process: its common arguments, the points that the file lacks, and the file after each point.

bench_generate.py and bench_serving.py build a model once and measure one point after another with it. A point has a time
limit, the run has a budget, and the file is written after each point: a run that is cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import models
import records
import render_results
import torch
from timing import free

from flashmla_hf.training import machine
from flashmla_hf.training.arguments import first_line

FINAL = ("ok", "does_not_fit")  # of a record's status: such a point is not measured again
FAILED = ("wrong", "error")
WAITING = "skipped"  # the budget left no time for the point
LEAST_SECONDS = 3  # of the budget, to begin a point


class OutOfTimeError(BaseException):
    """A point's time is over. Not an Exception: nothing between the alarm and the run may take it for a failed call.

    ``numbers`` go into the record: what is known of a point that did not end.
    """

    def __init__(self, reason: str, numbers: dict | None = None) -> None:
        super().__init__(reason)
        self.numbers = numbers or {}


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTimeError in the main thread after ``seconds``, between two instructions of Python."""

    def ring(*_) -> None:
        raise OutOfTimeError(f"not done in {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def parser_of(description: str, kind: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=machine.default_device())
    parser.add_argument("--model", choices=list(models.SHAPES), help="default: llama-8b on a GPU, tiny on a CPU")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--time_limit", type=float, default=120, metavar="S", help="of one point (default: 120)")
    parser.add_argument("--time_budget", type=float, metavar="S", help="of the run: no point goes on after it")
    parser.add_argument("--name", help=f"name of the JSON file; default: {kind}-DEVICE")
    parser.add_argument("--output_dir", type=Path, default=records.RESULTS, help="default: benchmarks/results")
    parser.add_argument("--overwrite", action="store_true", help="measure again the points that the file has")
    parser.add_argument(
        "--retry",
        nargs="+",
        metavar="STATUS",
        default=[],
        help="measure again the points that the file has with one of these",
    )
    parser.add_argument("--list", action="store_true", help="print the points in their order and end")
    parser.add_argument("--merge", nargs="+", metavar="NAME", help="measure nothing: join the files of these names")
    records.add_dirty_option(parser)
    return parser


def set_defaults(args: argparse.Namespace) -> None:
    """The model and the dtype of the device, unless the command line names them."""
    args.model = args.model or ("llama-8b" if args.device == "cuda" else "tiny")
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")


@dataclasses.dataclass(frozen=True)
class Program:
    """What :func:`run` needs of a benchmark. ``measure`` and ``describe`` get a point and a record (a point's fields, its
    status and its numbers)."""

    name: str
    kind: str
    start: Callable[
        [argparse.Namespace], Callable[[object], dict]
    ]  # builds the model; gives the function that measures
    describe: Callable[[dict], str]  # a line for the terminal
    section: Callable[[dict], str]  # of the whole file, in Markdown
    final: tuple[str, ...] = FINAL
    has_processes: bool = False  # a point runs in processes of its own: what breaks one breaks no other point
    expected_seconds: Callable[[object], float] = lambda point: LEAST_SECONDS  # to begin it within the budget
    following: Callable[[argparse.Namespace, list[dict]], object | None] = lambda args, records: None


def run(program: Program, points: list, args: argparse.Namespace) -> None:
    """Measures the ``points`` (dataclasses) that the file lacks, in their order. Ends the program if one failed.

    After them come those that ``program.following`` names, of the records of the file so far, until it names none.

    A record of the file has the point's fields, ``status`` and either numbers or a ``reason``. The status is one of ok, wrong,
    does_not_fit, out_of_memory, timeout, skipped and error. Points whose status is one of ``program.final`` are not repeated;
    those that failed before come after those that never ran.
    """
    begun = time.monotonic()
    if args.list:
        print(*points, sep="\n")
        return
    if args.merge:
        merge(program, type(points[0]), args)
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"{program.name}: --device cuda: torch sees no GPU here")
    records.refuse_dirty_tree(program.name, args.output_dir, args.allow_dirty)
    path = args.output_dir / f"{args.name or f'{program.kind}-{records.slug(machine.device_name(args.device))}'}.json"
    document = _document(program, path, args)
    known = {_key(r, points[0]): r["status"] for r in document["points"]} if points else {}
    status = {point: known.get(_key(dataclasses.asdict(point), point), WAITING) for point in points}
    final = set(program.final) - set(args.retry)
    waiting = sorted(
        (point for point in points if status[point] not in final), key=lambda point: status[point] != WAITING
    )
    print(f"{len(waiting)} of {len(points)} points to measure", flush=True)
    measure = program.start(args) if waiting else None
    if waiting:
        print(f"{args.model} is on the {args.device} after {time.monotonic() - begun:.0f} s", flush=True)
    done: list[dict] = []
    for point in _waiting(program, args, waiting, document, done):
        measure = measure or program.start(args)
        left = None if args.time_budget is None else args.time_budget - (time.monotonic() - begun)
        record = dataclasses.asdict(point) | _measured(
            measure, point, args.time_limit, left, program.expected_seconds(point)
        )
        record |= {"commit": document["environment"]["commit"], "date": document["environment"]["date"]}
        free(args.device)
        done.append(record)
        key = _key(record, point)
        document["points"] = [r for r in document["points"] if _key(r, point) != key] + [record]
        records.write_json(document, path)
        print(f"{time.monotonic() - begun:6.1f} s  {program.describe(record)}", flush=True)
        if not program.has_processes and "CUDA error" in record.get("reason", ""):  # every later call fails with it
            sys.exit(f"{program.name}: {record['reason']}; the points before it are in {path}")
    print(f"\n{program.section(document)}")  # here too: a run's last words outlive a file that is lost
    print(f"written: {path} and {render_results.write(args.output_dir)}")
    if failed := [r for r in done if r["status"] in FAILED]:
        sys.exit(f"{program.name}: {len(failed)} points failed; first: {program.describe(failed[0])}")


def merge(program: Program, point_type: type, args: argparse.Namespace) -> None:
    """Writes the points of the files of ``args.merge`` into that of ``args.name``, and prints its tables.

    A point that several have is that of the first that measured it. Ends the program without --name, and if the files' devices
    differ.
    """
    if not args.name:
        sys.exit(f"{program.name}: --merge: expected --name, the file to write")
    documents = [json.loads((args.output_dir / f"{name}.json").read_text()) for name in args.merge]
    if len(devices := {document["environment"]["device"] for document in documents}) > 1:
        sys.exit(f"{program.name}: --merge: expected files of one device, got {', '.join(sorted(devices))}")
    points: dict[tuple, dict] = {}
    for record in itertools.chain.from_iterable(document["points"] for document in documents):
        key = _key(record, point_type)
        if key not in points or (points[key]["status"] not in program.final and record["status"] in program.final):
            points[key] = record
    document = documents[0] | {"points": list(points.values())}
    path = args.output_dir / f"{args.name}.json"
    records.write_json(document, path)
    print(f"{program.section(document)}\nwritten: {path}")


def _waiting(
    program: Program, args: argparse.Namespace, waiting: list, document: dict, done: list[dict]
) -> Iterator[object]:
    """The points to measure: ``waiting``, then what follows from the records. ``done`` grows meanwhile."""
    yield from waiting
    while True:
        kept = [record for record in document["points"] if record["status"] not in args.retry or record in done]
        point = program.following(args, kept)
        if point is None or any(_key(record, point) == _key(dataclasses.asdict(point), point) for record in done):
            return  # nothing is left, or it waits for the budget of another run
        yield point


def _key(record: dict, point) -> tuple:
    """The fields of a point, out of its record: new ones hold tuples, those of a file lists."""
    return tuple(json.dumps(record.get(field.name)) for field in dataclasses.fields(point))


def _document(program: Program, path: Path, args: argparse.Namespace) -> dict:
    """The file before the first point. Ends the program if the file there was measured on another device."""
    document = {"kind": program.kind, "environment": records.describe(args.device), "points": []}
    if path.exists() and not args.overwrite:
        earlier = json.loads(path.read_text())
        if earlier.get("kind") != program.kind or earlier["environment"]["device"] != document["environment"]["device"]:
            sys.exit(f"{program.name}: {path} is of another kind or device: name another --name, or --overwrite it")
        document["points"] = earlier["points"]
    return document


def _measured(
    measure: Callable[[object], dict], point, limit: float, left: float | None, expected: float = LEAST_SECONDS
) -> dict:
    """The status and the numbers of one point, whatever happens."""
    if left is not None and left < max(expected, LEAST_SECONDS):
        wanted = f"; {expected:.0f} s are expected, {max(left, 0):.0f} s are left" if expected > LEAST_SECONDS else ""
        return {"status": WAITING, "reason": f"the time budget is used up{wanted}"}
    try:
        with time_limit(limit if left is None else min(limit, left)):
            return measure(point)
    except OutOfTimeError as error:
        if left is not None and left < limit:
            return {"status": WAITING, "reason": f"the time budget ended it: {error}"}
        return {"status": "timeout", "reason": str(error), **error.numbers}
    except Exception as error:  # an implementation's refusal can be any exception; it is recorded, and the others go on
        if machine.is_out_of_memory(error):
            return {"status": "out_of_memory", "reason": "the allocation failed"}
        return {"status": "error", "reason": f"{type(error).__name__}: {first_line(error)}"[:300]}
