"""Training on several GPUs of one host: the numbers of one GPU, the longest steps, scaling, and what people do today.

    python benchmarks/bench_distributed.py --gpus 4 --time_budget 560      # again: goes on where the file ends
    python benchmarks/bench_distributed.py --gpus 2 --only same scaling --limit 3
    python benchmarks/bench_distributed.py --gpus 4 --list                 # the points in their order
    python benchmarks/bench_distributed.py --gpus 2 --tiny                 # tries every line of it on a CPU

Each point is a torchrun of its own (measure_distributed.py) with a time limit, the most important points first. Weights are
random, made on each GPU. Groups:

same       20 steps on packed documents, of one GPU, Ulysses, FSDP2 and DDP; of whole documents, by the ring; the gradients
           of one step in float32
long       LoRA of the 8B shape at 131,072 tokens for each GPU, and at 262,144
full       all weights of the 8B shape by FSDP2 at 65,536 tokens for each GPU
scaling    LoRA of the 8B shape at 131,072 tokens, on one GPU and on all
peers      what people do today at that length: accelerate's ring and Ulysses, over torch's attention, with Liger
attention  packed and dense attention alone, on one GPU and divided

A step of 1,048,576 tokens of the whole 8B shape takes ten minutes on 4 GPUs, by the ledger: --layers N cuts the depth, and the
step's time with it, and tables name it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import distributed_results
import point_runs
import torch
from measure_distributed import MARK, Point
from point_runs import Program

from flashmla_hf.training import child_process
from flashmla_hf.training.options import at_least

MEASURE = Path(__file__).with_name("measure_distributed.py")
GROUPS = ("same", "long", "full", "scaling", "peers", "attention")
SHORT, SCALED = 8192, 131072  # tokens of a row
TINY = {"model": "tiny", "dtype": "float32", "device": "cpu", "memory_gib": None, "layers": None}
TINY_SHORTER = 1024  # times
STEPS, TINY_STEPS = 20, 3


def points_of(args: argparse.Namespace) -> list[Point]:
    """Group by group, in the order of GROUPS."""
    gpus, steps = args.gpus, TINY_STEPS if args.tiny else STEPS
    small = {"model": "llama-1b", "use_peft": False, "context": SHORT}
    packed = {**small, "documents": 4, "steps": steps}
    peer = {"is_patched": False, "liger": not args.tiny, "attention": "sdpa"}
    long = {"model": "llama-8b"}
    found = {
        "same": [
            *(("same", engine, 1 if engine == "one" else gpus, packed) for engine in ("one", "ulysses", "fsdp2", "ddp")),
            *(("same", engine, 1 if engine == "one" else gpus, {**small, "steps": steps}) for engine in ("one", "ring")),
            # A small model: float32 runs on no Hopper kernel, and every process holds the whole, too.
            *(
                ("gradient", engine, gpus, {**small, "model": "small-heads", "documents": 4, "dtype": "float32"})
                for engine in ("ulysses", "fsdp2", "ddp")
            ),
        ],
        "long": [
            ("train", "ulysses", gpus, {**long, "context": 131072 * gpus}),
            ("train", "ulysses", gpus, {**long, "layers": args.layers, "context": 262144 * gpus}),
        ],
        "full": [("train", "ulysses", gpus, {**long, "use_peft": False, "context": 65536 * gpus})],
        "scaling": [("train", e, g, {**long, "context": SCALED, "steps": 2}) for e, g in (("ulysses", gpus), ("one", 1))],
        "peers": [
            ("train", engine, gpus, {**long, **peer, "context": SCALED, "use_peft": use_peft, "steps": 2})
            for use_peft in (True, False)
            for engine in ("ring", "ulysses")
        ]
        + [("train", "ulysses", gpus, {**long, "context": SCALED, "use_peft": False, "steps": 2})],
        "attention": [
            ("attention", engine, g, {"model": "llama-8b", "context": 65536 * gpus, "documents": documents, "steps": 3})
            for documents in (4 * gpus, 1)
            for engine, g in (("ulysses", gpus), ("one", 1))
        ],
    }  # fmt: skip
    points = [
        _point(group, *one, tiny=args.tiny, gpu_memory=args.gpu_memory) for group in args.only for one in found[group]
    ]
    return list(dict.fromkeys(points))[: args.limit]


def _point(group: str, kind: str, engine: str, gpus: int, given: dict, tiny: bool, gpu_memory: float | None) -> Point:
    given = {"memory_gib": gpu_memory, **given}
    if tiny:
        given |= TINY | {"context": max(64, given["context"] // TINY_SHORTER)}
    elif given["model"] == "small-heads":
        given |= {"model": "llama-1b", "layers": 2}
    return Point(group=group, kind=kind, engine=engine, gpus=gpus, **given)


def command_of(point: Point) -> list[str]:
    """torchrun, or Python alone for one process."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(point.gpus)]
    return [
        sys.executable, *(launcher if point.gpus > 1 else []), str(MEASURE), json.dumps(dataclasses.asdict(point)),
    ]  # fmt: skip


def start(args: argparse.Namespace):
    variables = {"OMP_NUM_THREADS": "1"} if args.tiny else {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}

    def measure(point: Point) -> dict:
        outcome = child_process.run(command_of(point), MARK, args.time_limit, variables | point.variables())
        return outcome.result or {"status": outcome.status, "reason": outcome.reason[-300:]}

    return measure


PROGRAM = Program("bench_distributed", "distributed", start, distributed_results.describe, distributed_results.section)


def main(argv: list[str] | None = None) -> None:
    parser = point_runs.parser_of(__doc__, PROGRAM.kind)
    parser.add_argument("--gpus", type=at_least(2), help="default: those of this host; 2 with --tiny")
    parser.add_argument(
        "--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups of points, in this order"
    )
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="the first N points alone")
    parser.add_argument(
        "--layers", type=at_least(1), metavar="N", help="of the 8B shape's longest step; default: its 32"
    )
    parser.add_argument("--gpu_memory", type=float, default=78.0, metavar="GIB", help="of each GPU (default: 78)")
    parser.add_argument("--tiny", action="store_true", help="tiny models on this CPU, over gloo")
    parser.set_defaults(time_limit=480)
    args = parser.parse_args(argv)
    args.device = "cpu" if args.tiny else args.device
    if not args.tiny and args.device == "cpu" and not args.list:
        parser.error("torch sees no GPU here: --tiny tries the program on a CPU")
    args.gpus = args.gpus or (2 if args.tiny else max(2, torch.cuda.device_count()))
    if not args.tiny and args.gpus > torch.cuda.device_count() and not args.list:
        parser.error(f"--gpus: expected at most the {torch.cuda.device_count()} of this host, got {args.gpus}")
    args.name = args.name or f"distributed-{'tiny' if args.tiny else f'{args.gpus}gpus'}"
    point_runs.set_defaults(args)
    point_runs.run(PROGRAM, points_of(args), args)


if __name__ == "__main__":
    main()
