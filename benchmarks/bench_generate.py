"""Decoding of a whole model by Transformers' generate(), per attention and kind of cache: ms a token and peak memory.

    python benchmarks/bench_generate.py                                    # Llama-3.1-8B's shape on a GPU, a tiny one on a CPU
    python benchmarks/bench_generate.py --time_budget 500                  # again: goes on where the file ends
    python benchmarks/bench_generate.py --groups dynamic --contexts 2048 --batch_sizes 1
    python benchmarks/bench_generate.py --groups compiled --contexts 32768 131072 --batch_sizes 1 8 --time_budget 290
    python benchmarks/bench_generate.py --groups fp8 --layers 16 --contexts 131072 --batch_sizes 8 --padded   # bf16's too fits
    python benchmarks/bench_generate.py --list                             # the points in their order

Weights are random, made on the device. The cache is filled with random numbers up to the point's length, so a long context
costs no prefill; generate() then goes on from it as from any cache it is given. A batch of --padded has rows of different
lengths, padded on the left.

How it measures. A first call makes 8 tokens: it compiles, captures and chooses, and its peak memory is the one reported,
weights and cache included. A second call makes the timed tokens. generate() waits for the device at every token, so the time
between two of its stopping checks is a token's time; the median is reported. "compiled" is a static cache with the step
compiled by generate() itself, as it does on a GPU: torch.compile with CUDA graphs. "static" is the same cache without. The
group "fp8" has our Fp8Cache, static and compiled ("compiled-fp8") beside a compiled 16-bit cache, and growing ("fp8") beside a
dynamic one.

No number without right logits: those of short rows, prefilled and decoded, are compared with eager attention in float32, and
those of the point's own first tokens, which are given, with eager attention in the point's dtype. The bound is four times
eager's own error in that dtype against float32, and at least 1 % of the largest logit in bfloat16, 0.1 % in float32.
"""

from __future__ import annotations

import argparse

import inference_results
import models
import point_runs
from generation import COMPILED, Generation, Point
from point_runs import Program

from flashmla_hf.host_memory import GIB
from flashmla_hf.training.options import at_least

# What is measured first is what matters most. Of each group: the kinds of cache, one after the other for each shape, and the
# attentions, which take turns.
GROUPS = {
    "dynamic": (("dynamic",), ("flashmla", "sdpa")),
    "compiled": (("compiled",), ("flashmla", "sdpa")),
    "eager": (("dynamic",), ("eager",)),
    "compiled-eager": (("compiled",), ("eager",)),
    "static": (("static",), ("flashmla", "sdpa", "eager")),
    "fp8": (("compiled-fp8", "compiled", "fp8", "dynamic"), ("flashmla",)),
}
DEFAULT_GROUPS = {"cuda": ("dynamic", "compiled", "eager", "compiled-eager"), "cpu": ("dynamic", "static", "eager")}
CONTEXTS = {"cuda": (2048, 32768, 131072), "cpu": (128, 512)}
BATCH_SIZES = {"cuda": (1, 8, 32), "cpu": (1, 4)}
PADDED = {"cuda": (8,), "cpu": (4,)}


def points_of(args: argparse.Namespace) -> list[Point]:
    """Group by group; in a group the smaller caches first, so that a budget covers as many points as it can."""
    shapes = [
        (batch, context, batch in args.padded)
        for context in args.contexts or CONTEXTS[args.device]
        for batch in args.batch_sizes or BATCH_SIZES[args.device]
    ]
    shapes.sort(key=lambda shape: shape[0] * shape[1])
    points = [
        Point(args.model, attention, cache, *shape, dtype=args.dtype, tokens=args.tokens, layers=args.layers)
        for caches, attentions in (GROUPS[name] for name in args.groups)
        for shape in shapes
        for cache in caches
        for attention in (args.attentions or attentions)
        if attention in attentions
    ]
    return list(dict.fromkeys(points))


def start(args: argparse.Namespace):
    return Generation(args.model, args.dtype, args.device, args.layers).measure


def describe(record: dict) -> str:
    padded = " padded" if record["is_padded"] else ""
    head = (
        f"{record['cache']:<12} B{record['batch_size']:<3}{record['context']:>7,}{padded:<7} {record['attention']:<9}"
    )
    if record["status"] != "ok":
        return f"{head} {record['status'].replace('_', ' ')}: {record['reason']}"
    memory = "" if record["peak_bytes"] is None else f", {record['peak_bytes'] / GIB:.2f} GiB"
    errors = ", ".join(f"{error:.1e}" for error in record["errors"].values())
    graphs = (
        f", {record['graphs']} graphs, {record['graph_breaks']} breaks, {record['cudagraph_skips']} skips"
        if "graphs" in record
        else ""
    )
    return (
        f"{head}{1e3 * record['seconds']:9.3f} ms ±{100 * record['spread']:.0f} %{memory}, first call "
        f"{record['first_seconds']:.1f} s, errors {errors} of {record['bound']:.1e}{graphs}"
    )


def expected_seconds(point: Point) -> float:
    """What a point must find left of the budget to begin. torch.compile takes about as long for every layer: 35 to 46 s for the
    32 of 8B's shape with 16 CPU cores."""
    layers = point.layers or models.SHAPES[point.model].num_hidden_layers
    return 5 + 1.25 * layers if point.cache in COMPILED else point_runs.LEAST_SECONDS


PROGRAM = Program(
    "bench_generate", "generate", start, describe, inference_results.section, expected_seconds=expected_seconds
)


def main(argv: list[str] | None = None) -> None:
    parser = point_runs.parser_of(__doc__, PROGRAM.kind)
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), help="default: by device")
    parser.add_argument("--contexts", nargs="+", type=at_least(64), metavar="TOKENS", help="default: by device")
    parser.add_argument("--batch_sizes", nargs="+", type=at_least(1), metavar="ROWS", help="default: by device")
    parser.add_argument("--padded", nargs="*", type=int, metavar="ROWS", help="batches whose rows differ in length")
    parser.add_argument("--attentions", nargs="+", metavar="NAME", help="of each group's; default: all")
    parser.add_argument("--layers", type=at_least(1), metavar="N", help="of the model; default: its own")
    parser.add_argument("--tokens", type=at_least(1), default=32, help="timed (default: 32)")
    args = parser.parse_args(argv)
    point_runs.set_defaults(args)
    args.groups = args.groups or DEFAULT_GROUPS[args.device]
    args.padded = PADDED[args.device] if args.padded is None else args.padded
    point_runs.run(PROGRAM, points_of(args), args)


if __name__ == "__main__":
    main()
