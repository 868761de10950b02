"""Training on several GPUs of one host: the numbers of one GPU, the longest steps, scaling, and what people do today.

    python benchmarks/bench_distributed.py --gpus 8 --dry_run              # the ledger's predictions, and as JSON
    python benchmarks/bench_distributed.py --gpus 8 --time_budget 570      # again: goes on where the file ends
    python benchmarks/bench_distributed.py --gpus 2 --only same scaling --limit 3
    python benchmarks/bench_distributed.py --gpus 4 --list                 # the points in their order, with their numbers
    python benchmarks/bench_distributed.py --gpus 4 --tiny                 # tries every line of it on a CPU

Each point is a torchrun of its own (measure_distributed.py) with a time limit, the most important points first. Weights are
random, made on each GPU. Groups:

same       20 steps on packed documents, of Ulysses, FSDP2 and DDP; of whole documents, by the ring; with a window and with
           gpt-oss's sinks, by Ulysses: each beside one GPU in the same arithmetic; the gradients of one step in float32
million    of 8 GPUs: 1,048,576 tokens a step, all weights of the shapes of Llama-3.1-8B and Qwen3-8B, by Ulysses and ring, in
           the published step's 56 GB; losses beside half of the GPUs; what was published, measured here
long       LoRA of the 8B shape at 131,072 tokens for each GPU, by Ulysses, by our ring, packed and with a window; and longer
full       all weights of the 8B shape by FSDP2 at 65,536 and 131,072 tokens for each GPU
scaling    LoRA of the 8B shape at 131,072 tokens, on all GPUs, on half of them, and so on to one
peers      what people do today at that length: accelerate's ring and Ulysses, over torch's attention, with Liger
longest    a search for the longest step of each of them, and of ours: a point for each trial
attention  packed and dense attention alone, on one GPU and divided

No point exceeds --time_limit: a step that would, by its prediction, has fewer layers, which the tables name (--time_limit 3600
measures the whole); steps that are compared with each other have the same number. A point that the rest of --time_budget is
too short for is left to the next call.

Several runs at once use a host's time well. Points of fewer GPUs run beside each other if each run has its own --points,
--name and CUDA_VISIBLE_DEVICES. Two runs on the same GPUs share --turns FILE: one measures, and the processes of the other
start meanwhile; --time_limit counts from the turn. --merge NAME makes one file of those of several runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import sys
from pathlib import Path

import distributed_predictions
import distributed_results
import point_runs
import records
import torch
from distributed_points import GROUPS, STARTING, Point, expected_seconds, following, points_of
from measure_distributed import MARK, TURN, TURN_SECONDS
from point_runs import Program

from flashmla_hf.training import child_process
from flashmla_hf.training.options import at_least

MEASURE = Path(__file__).with_name("measure_distributed.py")
TIME_LIMIT = 560  # seconds of a point: with this program's own start and end, a call of ten minutes
KILLED = "  exitcode  : -9"  # of torchrun's report: the system has killed a process
ALARMED = "  exitcode  : -14"  # a process was at its turn for --time_limit seconds
WAITED = 6  # times --time_limit: of a point that waits for its turn
LOG = 60_000  # characters, the last ones, of a failed point's standard error
# A length that does not fit and a point that takes too long are results.
FINAL = (*point_runs.FINAL, "out_of_memory", "timeout")


def command_of(point: Point) -> list[str]:
    """torchrun, or Python alone for one process that shards nothing."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(point.gpus)]
    return [
        sys.executable, *(launcher if point.gpus > 1 or point.variables() else []), str(MEASURE),
        json.dumps(dataclasses.asdict(point)),
    ]  # fmt: skip


def start(args: argparse.Namespace):
    variables = {"OMP_NUM_THREADS": "1"} if args.tiny else {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    if args.turns:
        variables |= {TURN: str(args.turns.resolve()), TURN_SECONDS: str(math.ceil(args.time_limit))}
    limit = args.time_limit * (WAITED if args.turns else 1)  # a point that waits ends with the budget
    logs = args.output_dir / f"{args.name}-logs"
    begun = itertools.count()

    def measure(point: Point) -> dict:
        outcome = child_process.run(
            command_of(point), MARK, limit, variables | point.variables(), speaker=KILLED.split(":")[0]
        )
        found = outcome.result or {"status": outcome.status, "reason": outcome.reason[-300:]}
        if found["status"] == "error" and found["reason"].startswith(KILLED):
            found = {"status": "out_of_memory", "reason": "the system killed a process"}
        if found["status"] == "error" and ALARMED in outcome.log:
            found = {"status": "timeout", "reason": f"not done in {args.time_limit:.0f} s"}
        number = next(begun)
        if found["status"] != "ok":
            logs.mkdir(parents=True, exist_ok=True)
            name = f"{number}-{point.kind}-{point.engine}-{point.gpus}.txt"
            (logs / name).write_text(f"{point}\n{found}\n{outcome.log[-LOG:]}")
        return found | {"predicted": distributed_predictions.predict(point)}

    return measure


PROGRAM = Program(
    "bench_distributed", "distributed", start, distributed_results.describe, distributed_results.section,
    final=FINAL, has_processes=True, expected_seconds=expected_seconds, following=following,
)  # fmt: skip


def predict(args: argparse.Namespace, points: list[Point]) -> None:
    """Prints what is predicted of each point, and writes it beside the measured file."""
    document = distributed_predictions.document_of(points, args)
    for record in document["points"]:
        print(distributed_results.describe(record | {"status": "predicted"}))
    path = args.output_dir / f"{args.name}-predicted.json"
    records.write_json(document, path)
    print(f"written: {path}")


def main(argv: list[str] | None = None) -> None:
    parser = point_runs.parser_of(__doc__, PROGRAM.kind)
    parser.add_argument("--gpus", type=at_least(2), help="default: those of this host; 2 with --tiny")
    parser.add_argument(
        "--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups of points, in this order"
    )
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="the first N points alone")
    parser.add_argument(
        "--points",
        type=at_least(0),
        nargs="+",
        metavar="N",
        help="those of these numbers of --list alone, in this order",
    )
    parser.add_argument(
        "--layers",
        type=at_least(1),
        metavar="N",
        help="of the timed steps (not those of longest); default: as many as --time_limit allows",
    )
    parser.add_argument(
        "--starting", type=float, default=STARTING, metavar="S", help="that a point's start is expected to take"
    )
    parser.add_argument("--turns", type=Path, metavar="FILE", help="runs that share it measure one after the other")
    parser.add_argument("--gpu_memory", type=float, default=78.0, metavar="GIB", help="of each GPU (default: 78)")
    parser.add_argument("--tiny", action="store_true", help="tiny models on this CPU, over gloo")
    parser.add_argument(
        "--dry_run", action="store_true", help="measure nothing: print and write what the ledger predicts"
    )
    parser.set_defaults(time_limit=TIME_LIMIT)
    args = parser.parse_args(argv)
    args.device = "cpu" if args.tiny else args.device
    is_dry = args.list or args.dry_run or args.merge
    if not args.tiny and args.device == "cpu" and not is_dry:
        parser.error("torch sees no GPU here: --tiny tries the program on a CPU")
    args.gpus = args.gpus or (2 if args.tiny else max(2, torch.cuda.device_count()))
    args.name = args.name or f"distributed-{'tiny' if args.tiny else f'{args.gpus}gpus'}"
    point_runs.set_defaults(args)
    points = _points(args, parser)
    if args.dry_run:
        predict(args, points)
    elif args.list:
        print(*(f"{number} {point}" for number, point in enumerate(points)), sep="\n")
    else:
        program = dataclasses.replace(
            PROGRAM,
            start=lambda _: start(args),
            expected_seconds=functools.partial(expected_seconds, starting=args.starting),
        )
        limit = (
            args.time_limit * (WAITED if args.turns else 1) + 5
        )  # the end by `measure` comes first: it keeps the log
        point_runs.run(program, points, argparse.Namespace(**vars(args) | {"time_limit": limit}))


def _points(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Point]:
    try:
        points = points_of(args)
    except IndexError:
        parser.error(f"--points: expected numbers of --list, got {' '.join(map(str, args.points))}")
    most = max((point.gpus for point in points), default=1) if args.points else args.gpus
    if not (args.tiny or args.list or args.dry_run or args.merge) and most > torch.cuda.device_count():
        parser.error(f"--gpus: expected at most the {torch.cuda.device_count()} of this host, got {most}")
    return points


if __name__ == "__main__":
    main()
