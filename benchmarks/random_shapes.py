"""Shapes in no list: drawn by a seed, and bounded in work and memory, so that a run of them takes as long as another.

`bench_attention.py --suite random --seed N --shapes 20`. The same seed, number and device give the same shapes.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from shapes import DTYPES, Shape

# What models have: half of the draws. The other half is any multiple of 8 from 40 to 256.
COMMON_HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (128, 128), (192, 128), (256, 256))
HEAD_DIMS = tuple(range(40, 257, 8))
GROUPS = (1, 1, 2, 3, 4, 5, 6, 7, 8, 8, 12, 16)  # query heads a kv head
MASKS = ("causal", "causal", "full", "window")
LAYOUTS = ("dense", "dense", "dense", "packed", "ragged")
BATCHES = (1, 16)
HEADS_KV = (1, 16)
MOST_HEADS_Q = 128


@dataclass(frozen=True)
class Bounds:
    """What a shape may cost. Below ``least_flops`` the launch is measured, not the kernel."""

    seqlen: tuple[int, int]
    least_flops: float  # of the forward
    most_flops: float
    most_bytes: int  # of q, k, v, the output and their gradients together
    most_checked_pairs: int  # float64 scores of the slice that check.py computes
    dtype: str


BOUNDS = {
    # 2e13 operations: about 35 ms forward and 90 ms backward on an H100, ten turns of a few peers.
    "cuda": Bounds((1024, 65536), 2e10, 2e13, 4 * 2**30, 2**35, "bf16"),
    "cpu": Bounds((64, 512), 1e6, 4e8, 2**26, 2**24, "fp32"),
}


def draw(seed: int, count: int, device: str) -> list[Shape]:
    """``count`` different shapes. Lengths go round the octaves of the range, so that each has its share of them."""
    bounds = BOUNDS[device]
    generator = random.Random(f"flashmla {seed}")
    low, high = (math.log2(length) for length in bounds.seqlen)
    octaves = max(1, round(high - low))
    shapes: list[Shape] = []
    while len(shapes) < count:
        start = low + len(shapes) % octaves * (high - low) / octaves
        seqlen = 2 ** generator.uniform(start, start + (high - low) / octaves)
        shape = _draw(generator, seqlen, bounds)
        if shape not in shapes and is_within(shape, bounds):
            shapes.append(shape)
    return shapes


def _draw(generator: random.Random, seqlen: float, bounds: Bounds) -> Shape:
    step = generator.choice((1, 64))
    length = min(bounds.seqlen[1], max(bounds.seqlen[0], round(seqlen / step) * step))
    if generator.random() < 0.5:
        head_dims = generator.choice(COMMON_HEAD_DIMS)
    else:
        head_dims = (generator.choice(HEAD_DIMS),) * 2
    mask = generator.choice(MASKS)
    layout = generator.choice(LAYOUTS)
    batch = _log_uniform(generator, *BATCHES)
    if layout != "dense":
        batch = max(2, batch)
    heads_kv = _log_uniform(generator, *HEADS_KV)
    window = _log_uniform(generator, 32, max(33, length // 2)) if mask == "window" else None
    heads_q = heads_kv * generator.choice(GROUPS)
    return Shape(
        batch, heads_q, heads_kv, length, length, *head_dims, mask != "full", window, dtype=bounds.dtype, layout=layout
    )


def _log_uniform(generator: random.Random, low: int, high: int) -> int:
    return round(math.exp(generator.uniform(math.log(low), math.log(high))))


def is_within(shape: Shape, bounds: Bounds) -> bool:
    tokens = shape.batch * shape.seqlen_q
    columns = (shape.heads_q + shape.heads_kv) * (shape.head_dim_qk + shape.head_dim_v)
    longest = max(shape.lengths())
    return (
        shape.heads_q <= MOST_HEADS_Q
        and bounds.least_flops <= shape.flops("fwd") <= bounds.most_flops
        and 2 * tokens * columns * DTYPES[shape.dtype].itemsize <= bounds.most_bytes
        and shape.heads_q // shape.heads_kv * longest**2 <= bounds.most_checked_pairs
    )
