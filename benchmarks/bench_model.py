"""Tokens per second and peak memory of a whole model per attention backend: training step and decoding.

    python benchmarks/bench_model.py                                               # SmolLM2-135M's shape
    python benchmarks/bench_model.py --models llama-8b --contexts 8192 32768 --backends sdpa flashmla
    python benchmarks/bench_model.py --models mistral-7b --modes decode --batch_size 8

Weights are random (the shapes are published ones), each point runs in a process of its own, and points that would not fit
or take too long are skipped by name. Training is forward and backward with LoRA r=16 on every projection; decoding is
``generate`` after a prompt, greedy, the prompt's own time taken off.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import memory_report
import models
import records
import render_results
from measure_model import Measurement
from tqdm import tqdm

from flashmla_hf.host_memory import GIB
from flashmla_hf.training import machine

DEFAULTS = {  # device -> models, contexts
    "cpu": (["smollm2-135m"], [512, 2048]),
    "cuda": (["smollm2-135m", "llama-1b", "llama-8b", "mistral-7b"], [4096, 16384]),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=machine.default_device())
    parser.add_argument("--models", nargs="+", choices=list(models.SHAPES), help="default: by device")
    parser.add_argument("--contexts", nargs="+", type=int, metavar="TOKENS", help="default: by device")
    parser.add_argument("--backends", nargs="+", default=list(memory_report.BACKENDS), metavar="NAME")
    parser.add_argument("--modes", nargs="+", choices=("train", "decode"), default=["train", "decode"])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the faster one here")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--new_tokens", type=int, default=32, help="decoded tokens")
    parser.add_argument("--full", action="store_true", help="train all weights instead of LoRA")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--time_limit", type=float, default=120, metavar="S", help="longest step to attempt")
    parser.add_argument("--time_budget", type=float, metavar="S", help="per model and mode: begin no point after this")
    parser.add_argument("--name", help="name of the JSON file; default: model-DEVICE")
    parser.add_argument("--output_dir", type=Path, default=records.RESULTS, help="default: benchmarks/results")
    records.add_dirty_option(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    records.refuse_dirty_tree("bench_model", args.output_dir, args.allow_dirty)

    default_models, default_contexts = DEFAULTS[args.device]
    dtype = args.dtype or machine.fastest_dtype(args.device)
    record = records.describe(args.device)
    path = args.output_dir / f"{args.name or 'model-' + records.slug(record['device'])}.json"
    document = {"kind": "model", "environment": record, "points": []}
    contexts = sorted(args.contexts or default_contexts)
    names = args.models or default_models
    bar = tqdm(total=len(names) * len(args.modes) * len(contexts) * len(args.backends), unit="point", desc="measuring")

    def keep(result: Measurement) -> None:
        document["points"].append(result.as_dict())
        records.write_json(document, path)
        bar.update()
        bar.write(describe(result))

    for name in names:
        for mode in args.modes:
            points = memory_report.points_for(
                name,
                args.backends,
                contexts,
                mode=mode,
                device=args.device,
                dtype=dtype,
                batch_size=args.batch_size,
                new_tokens=args.new_tokens,
                use_peft=not args.full,
                gradient_checkpointing=args.gradient_checkpointing,
                repeats=args.repeats,
            )
            memory_report.measure_all(points, args.time_limit, args.time_budget, keep)
    bar.close()
    print(f"written: {path} and {render_results.write(args.output_dir)}")
    failed = [p for p in document["points"] if p["status"] == "error"]
    if failed:
        sys.exit(f"bench_model: {len(failed)} points failed; first: {failed[0]['reason']}")


def describe(result: Measurement) -> str:
    point = result.point
    label = f"{point.model} {point.mode} {point.attn_implementation:>9} {point.context:>7,} tokens: "
    if result.status != "ok":
        return f"{label}{result.status.replace('_', ' ')}: {result.reason}"
    return f"{label}{result.tokens_per_second:,.1f} tokens/s, {result.peak_bytes / GIB:.2f} GiB"


if __name__ == "__main__":
    main()
