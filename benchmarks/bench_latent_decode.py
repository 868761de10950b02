"""Decoding from latents, before and after the patch "mla_decode": ms a token and peak memory of a model, µs of one layer.

    python benchmarks/bench_latent_decode.py                  # DeepSeek-V2-Lite's shape and V3's layer on a GPU, else tiny ones
    python benchmarks/bench_latent_decode.py --tiny           # the tiny ones on any device
    python benchmarks/bench_latent_decode.py --groups layer   # the layer alone
    python benchmarks/bench_latent_decode.py --list           # the points in their order
    python benchmarks/bench_decode.py --suite latent          # the kernel alone: GB/s and TFLOP/s in a CUDA graph

A model's points are measured as bench_generate.py's: random weights, a cache of random latents up to the point's length, then
generate(). A layer's point is one step of the attention block alone on a full static cache, 20 calls in a CUDA graph. The ways
are "flashmla+mla_decode" (patched), "flashmla" and "sdpa" (both expand the cache at each step).

No number without a right answer: a model's logits are compared with eager attention, unpatched; a layer's result with sdpa in
float32. The bound is four times the error of sdpa in the point's dtype, relative to the norm.
"""

from __future__ import annotations

import argparse

import latent_results
import point_runs
from generation import Point
from latent_points import LAYER, LAYER_MODELS, WAYS, Measured
from point_runs import Program

from flashmla_hf.host_memory import GIB
from flashmla_hf.training.options import at_least

GROUPS = {
    "layer": (LAYER, WAYS),
    "dynamic": ("dynamic", WAYS),
    "compiled": ("compiled", WAYS[:2]),
    "static": ("static", WAYS[:2]),
}
DEFAULT_GROUPS = {"cuda": ("layer", "dynamic", "compiled"), "cpu": ("layer", "dynamic", "static")}
CONTEXTS = {"cuda": (2048, 32768, 131072), "cpu": (128, 512)}
BATCH_SIZES = {"cuda": (1, 16), "cpu": (1, 2)}


def points_of(args: argparse.Namespace) -> list[Point]:
    """Group by group; in a group the smaller caches first, and of each the ways."""
    size = "cpu" if args.tiny else args.device
    shapes = [
        (batch, context)
        for context in args.contexts or CONTEXTS[size]
        for batch in args.batch_sizes or BATCH_SIZES[size]
    ]
    shapes.sort(key=lambda shape: shape[0] * shape[1])
    return [
        Point(LAYER_MODELS[size] if cache == LAYER else args.model, way, cache, *shape, dtype=args.dtype, tokens=args.tokens)
        for cache, ways in (GROUPS[name] for name in args.groups)
        for shape in shapes
        for way in (args.ways or ways)
        if way in ways
    ]  # fmt: skip


def describe(record: dict) -> str:
    head = f"{record['cache']:<9}B{record['batch_size']:<3}{record['context']:>7,} {record['attention']:<20}"
    if record["status"] != "ok":
        return f"{head} {record['status'].replace('_', ' ')}: {record['reason']}"
    memory = "" if record["peak_bytes"] is None else f", {record['peak_bytes'] / GIB:.2f} GiB"
    (error,) = record["errors"].values()
    return (
        f"{head}{1e3 * record['seconds']:9.3f} ms ±{100 * record['spread']:.0f} %{memory}, error {error:.1e} of "
        f"{record['bound']:.1e}"
    )


def start(args: argparse.Namespace):
    return Measured(args.model, args.dtype, args.device).measure


PROGRAM = Program("bench_latent_decode", "latent", start, describe, latent_results.section)


def main(argv: list[str] | None = None) -> None:
    parser = point_runs.parser_of(__doc__, PROGRAM.kind)
    parser.add_argument("--tiny", action="store_true", help="the tiny model and layer, and short caches, as on a CPU")
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), help="default: by device")
    parser.add_argument("--contexts", nargs="+", type=at_least(64), metavar="TOKENS", help="default: by device")
    parser.add_argument("--batch_sizes", nargs="+", type=at_least(1), metavar="ROWS", help="default: by device")
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="of each group's; default: all")
    parser.add_argument("--tokens", type=at_least(1), default=16, help="timed, of a model (default: 16)")
    args = parser.parse_args(argv)
    is_tiny = args.tiny or args.device == "cpu"
    args.model = args.model or ("tiny-mla" if is_tiny else "deepseek-v2-lite")
    args.tiny = args.tiny or "tiny" in args.model
    args.groups = args.groups or DEFAULT_GROUPS[args.device]
    point_runs.set_defaults(args)
    point_runs.run(PROGRAM, points_of(args), args)


if __name__ == "__main__":
    main()
