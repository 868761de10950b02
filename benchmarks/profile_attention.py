"""How busy each part of a Hopper GPU is under every attention kernel, and so what limits it, from Nsight Compute.

    python benchmarks/profile_attention.py                      # every head-dim row, forward and backward, about a minute
    python benchmarks/profile_attention.py --rows 128/128 192/128 --seqlen 16384 --causal
    python benchmarks/profile_attention.py --decode             # attention to latents, and the shapes that are named behind it
    python benchmarks/profile_attention.py --ncu /opt/nsight-compute/ncu --name profile-mine --output_dir results/mine

Each kernel runs once, with caches and clocks as ncu sets them: rates are not those of bench_attention.py, shares of the peak
are what counts. JSON goes to --output_dir, and RESULTS.md is made again from all files there.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import profile_results
import records
import render_results
from decode_shapes import LATENT_ARITHMETIC, LATENT_MEMORY, DecodeShape
from profile_results import SHARES

ROWS = ("64/64", "96/96", "128/128", "192/128", "192/192", "256/256")
KERNELS = "forward_kernel|backward_kernel|backward_queries_kernel"
LATENTS = (LATENT_MEMORY, LATENT_ARITHMETIC[0])
CYCLES, SECONDS = "sm__cycles_elapsed.max", "gpu__time_duration.sum"


def run_kernels(rows: list[str], seqlen: int, is_causal: bool) -> None:
    """The work that ncu watches: a forward and a backward of each row, 2,048 columns of heads, 16,384 tokens or one
    sequence."""
    import torch

    import flashmla_hf

    for row in rows:
        head_dim_qk, head_dim_v = map(int, row.split("/"))
        heads, batch = max(1, 2048 // head_dim_qk), max(1, 16384 // seqlen)
        q, k, v = (
            torch.randn(batch, seqlen, heads, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for d in (head_dim_qk, head_dim_qk, head_dim_v)
        )
        out = flashmla_hf.attention(q, k, v, is_causal=is_causal, impl="sm90")
        out.backward(torch.randn_like(out))
    torch.cuda.synchronize()


def run_decoding(shapes: list[DecodeShape]) -> None:
    """The work that ncu watches: a call of each shape."""
    import torch
    from decode_check import Inputs
    from decode_peers import PEERS

    for shape in shapes:
        inputs = Inputs.random(shape, "cuda")
        inputs.calls(PEERS["flashmla-fp8" if shape.is_e4m3 else "flashmla"](shape, inputs, "cuda"))[0]()
    torch.cuda.synchronize()


def parse(text: str, shapes: Sequence[DecodeShape] = ()) -> list[dict]:
    """ncu's CSV (one line of names, one of units, one a kernel) as records, by head dims or by the decoded shapes in order."""
    lines = text[text.index('"ID"') :].splitlines()
    names, units, *rows = csv.reader(lines)
    kernels = []
    for row in rows:
        cells = dict(zip(names, row, strict=True))
        number = {name: float(cells[name].replace(",", "")) for name in (*SHARES, CYCLES, SECONDS)}
        unit = units[names.index(SECONDS)]
        found = re.match(r"(?:void )?(?:[\w:]+::)?(\w+)(?:<(.*)>)?", cells["Kernel Name"])
        # Head dims are the first two numbers of the template's arguments; one number is both.
        dims = re.findall(r"(?<![\w)])(?:\(int\))?(\d+)", found[2] or "")[:2]
        kernels.append(
            {
                "kernel": found[1].removesuffix("_kernel"),
                "head_dims": "/".join(dims) if len(dims) == 2 else "/".join(dims * 2),
                "cycles": int(number[CYCLES]),
                "seconds": number[SECONDS]
                * {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}[unit.replace("second", "s")],
                "shares": {column: number[name] / 100 for name, column in SHARES.items()},
            }
        )
    if shapes:
        for record, shape in zip(kernels, shapes, strict=True):
            record["shape"] = str(shape)
    return kernels


def decode_shape(text: str) -> DecodeShape:
    try:
        return DecodeShape.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="QK/V", help=", ".join(ROWS))
    parser.add_argument("--seqlen", type=int, default=4096, help="tokens of a sequence; default: 4096")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument(
        "--decode",
        nargs="*",
        type=decode_shape,
        metavar="SHAPE",
        help=f"instead; default: {', '.join(map(str, LATENTS))}",
    )
    parser.add_argument("--ncu", help="Nsight Compute; default: the one on PATH or beside CUDA")
    parser.add_argument("--time_limit", type=float, default=180, metavar="S")
    parser.add_argument("--name", default="profile", help="of the JSON file; default: profile")
    parser.add_argument("--output_dir", type=Path, default=records.RESULTS)
    records.add_dirty_option(parser)
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    shapes = [] if args.decode is None else args.decode or list(LATENTS)
    if args.run:
        return run_decoding(shapes) if shapes else run_kernels(args.rows, args.seqlen, args.causal)
    records.refuse_dirty_tree("profile_attention", args.output_dir, args.allow_dirty)
    ncu = args.ncu or shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if ncu is None:
        sys.exit("profile_attention: Nsight Compute (ncu) was not found: name it with --ncu")
    command = [
        ncu,
        "--csv",
        "--page",
        "raw",
        "--print-units",
        "base",
        "-k",
        f"regex:^({'decode_kernel' if shapes else KERNELS})$",
    ]
    command += [
        "--metrics",
        ",".join((*SHARES, CYCLES, SECONDS)),
        sys.executable,
        __file__,
        "--run",
        "--rows",
        *args.rows,
    ]
    command += ["--seqlen", str(args.seqlen), *(["--causal"] if args.causal else [])]
    command += ["--decode", *map(str, shapes)] if shapes else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.time_limit)
    except subprocess.TimeoutExpired:
        sys.exit(f"profile_attention: no end after {args.time_limit:g} s: profile fewer --rows, or raise --time_limit")
    if done.returncode or '"ID"' not in done.stdout:
        sys.exit(f"profile_attention: ncu ended with {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}")
    document = {
        "kind": "profile",
        "environment": records.describe("cuda"),
        "seqlen": args.seqlen,
        "is_causal": args.causal,
        "records": parse(done.stdout, shapes),
    }
    path = args.output_dir / f"{args.name}.json"
    records.write_json(document, path)
    print(profile_results.section(document))
    print(f"written: {path}, {render_results.write(args.output_dir)}")


if __name__ == "__main__":
    main()
