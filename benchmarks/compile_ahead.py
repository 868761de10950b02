"""Peers that compile a kernel for each kind of call, compiled in several processes side by side, before anything is measured.

FlashAttention 4 needs seconds for each new head dim, mask, group of heads and direction, and keeps what it compiled on disk if
FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED is 1. A run over random shapes would mostly wait for it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from check import Inputs
from peers import PEERS
from shapes import Shape
from timing import timed_call

from flashmla_hf.training.arguments import first_line

CACHE = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"
COMPILED = ("fa4", "fa4-deterministic")


def smaller(shape: Shape) -> Shape:
    """A shape of the same kind that costs next to nothing: compiled code does not depend on lengths and batch."""
    seqlen = min(shape.seqlen_q, 1024)
    window = None if shape.window is None else min(shape.window, 256)
    return dataclasses.replace(shape, batch=min(shape.batch, 2), seqlen_q=seqlen, seqlen_kv=seqlen, window=window)


def compile_ahead(
    shapes: list[Shape], peers: list[str], device: str, processes: int = 8, timeout_seconds: float = 240
) -> list[str]:
    """Compiles for ``shapes`` in child processes. The result names what went wrong there; measuring meets it again."""
    os.environ[CACHE] = "1"  # before this process imports the peer
    kinds = [str(shape) for shape in dict.fromkeys(map(smaller, shapes))]
    started = time.monotonic()
    children = []
    for part in (kinds[i::processes] for i in range(min(processes, len(kinds)))):
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            "--device",
            device,
            "--peers",
            *peers,
            "--shape",
            *part,
        ]
        children.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    problems = []
    for child in children:
        try:
            said, _ = child.communicate(timeout=max(1.0, timeout_seconds - (time.monotonic() - started)))
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            problems.append(f"not compiled within {timeout_seconds:.0f} s")
            continue
        problems += [line for line in said.splitlines() if line.startswith("refused: ")]
        if child.returncode != 0:
            problems.append(f"a process that compiles ended with {child.returncode}: {said.strip()[-300:]}")
    return problems


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), required=True)
    parser.add_argument("--shape", nargs="+", required=True)
    args = parser.parse_args(argv)
    for shape in map(Shape.parse, args.shape):
        inputs = Inputs.random(shape, args.device)
        for name in args.peers:
            try:
                peer = PEERS[name](shape, args.device)
                with peer.context():
                    for mode in ("fwd", "fwd+bwd"):
                        timed_call(peer, inputs, mode).call()
            except Exception as error:  # whatever a peer says no with; the measuring records it
                print(f"refused: {name} at {shape}: {first_line(error)[:160]}")
    if args.device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
