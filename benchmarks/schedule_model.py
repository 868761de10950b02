"""Why a shape is slow, by a small model of the Hopper kernels' schedule: what is computed in vain, and where CTAs wait.

It reads the sizes of tiles from csrc/sm90/tiles.h and repeats, for whole multiprocessors, what csrc/sm90/scheduling/schedule.cu
and csrc/sm90/backward/launch_backward.cuh decide: which configuration runs a call, which query heads share a tile, in which
order tiles are walked, and how many kv heads' sums of dQ are held at a time. It knows nothing of clocks, caches or
instructions: what it does not explain is to be looked for there.
"""

from __future__ import annotations

import functools
import heapq
import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import records
from shapes import Shape

NUM_SMS = 132  # H100 SXM and H200
# schedule.cu and launch_backward.cuh; tests/test_random_suite.py compares them with the sources.
FORWARD_SECTION_BYTES = 128 << 20
BACKWARD_SECTION_BYTES = 24 << 20
USUAL_SUMS, LARGEST_SUMS = 256 << 20, 512 << 20
WORTHWHILE = 0.05
# Beyond this many tiles per multiprocessor the last wave does not count, and is not simulated.
MOST_ROUNDS = 64


@functools.cache
def tiles_of_sm90() -> ModuleType | None:
    """csrc/sm90/tiles.py; ``None`` beside an installed package, which has no sources."""
    path = records.REPOSITORY / "csrc" / "sm90" / "tiles.py"
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location("sm90_tiles", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def _entries(kind: str) -> tuple[dict, ...]:
    return tuple(tiles_of_sm90().entries(kind))


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Losses:
    """Factors on the time, 1.0 for nothing lost, and the words for each."""

    padding: float  # products of the columns that a call lacks of its kernel's head dims, and products done twice
    tiles: float  # scores of visited tiles over visible pairs
    tail: float  # the last multiprocessor's time over the mean, of all passes together
    padding_words: str  # the kernel that runs the call
    tail_words: str

    @property
    def total(self) -> float:
        return self.padding * self.tiles * self.tail

    @property
    def reason(self) -> str:
        """The losses above 3 %, largest first; what to say if there is none."""
        named = {
            self.padding_words: self.padding,
            "rounding of the mask to tiles": self.tiles,
            self.tail_words: self.tail,
        }
        large = sorted(((loss, words) for words, loss in named.items() if loss > 1.03), reverse=True)
        return "; ".join(f"{words}: {loss:.2f}×" for loss, words in large) or "nothing that the schedule explains"

    def record(self) -> dict:
        return {"padding": self.padding, "tiles": self.tiles, "tail": self.tail, "reason": self.reason}


def losses(shape: Shape, mode: str, num_sms: int = NUM_SMS) -> Losses | None:
    """Of "fwd" or "bwd"; ``None`` if the Hopper kernels do not run the shape, or their sources are not there."""
    tiles = tiles_of_sm90()
    if mode not in ("fwd", "bwd") or shape.dtype == "fp32" or shape.is_latent or tiles is None:
        return None
    limits = tiles.limits()
    for head_dim in (shape.head_dim_qk, shape.head_dim_v):
        if head_dim % limits["head_dim_multiple"] or head_dim > limits["largest_head_dim"]:
            return None
    return _forward(shape, num_sms) if mode == "fwd" else _backward(shape, num_sms)


def _config(kind: str, shape: Shape) -> dict:
    """The first entry that is wide enough; of the forward that of the shape's mask."""
    mask = "kNone" if not shape.is_causal else "any"
    found = [
        e for e in _entries(kind) if shape.head_dim_qk <= e["head_dims"][0] and shape.head_dim_v <= e["head_dims"][1]
    ]
    (*same,) = (e for e in found if e["head_dims"] == found[0]["head_dims"])
    exact = [e for e in same if e["mask"] is not None and e["mask"].endswith(mask)]
    return (exact or [e for e in same if e["mask"] in (None, "kMask")])[0]


def _dims(head_dims: tuple[int, int]) -> str:
    return str(head_dims[0]) if head_dims[0] == head_dims[1] else f"{head_dims[0]}/{head_dims[1]}"


def _forward(shape: Shape, num_sms: int) -> Losses:
    config = _config("Forward", shape)
    num_ctas = tiles_of_sm90().num_ctas(config["head_dims"][1])  # of a tile, each with whole queries
    num_sms //= num_ctas
    wide_qk, wide_v = config["head_dims"]
    padding = (wide_qk + wide_v) / (shape.head_dim_qk + shape.head_dim_v)
    block_q, block_kv = config["kBlockQ"], config["kBlockKV"]
    group = shape.heads_q // shape.heads_kv
    heads_packed = _heads_packed(shape, block_q, group, num_ctas)
    rows = _queries_per_block(block_q, heads_packed, num_ctas)
    num_heads = shape.heads_q // heads_packed
    entries, longest = (1, shape.lengths()) if shape.is_packed else (shape.batch, shape.lengths()[:1])
    pairs_per_kv_head = max(1, num_heads // shape.heads_kv)
    pairs = num_heads * entries
    keys = sum(longest) if shape.is_packed else shape.seqlen_kv
    bytes_row = 2 * (shape.head_dim_qk + shape.head_dim_v)
    if not shape.is_packed and not shape.is_causal:
        section = pairs_per_kv_head
    else:
        most_heads_kv = max(1, FORWARD_SECTION_BYTES // (keys * bytes_row))
        wanted = min(num_sms // 4, most_heads_kv * pairs_per_kv_head)
        most = max(1, wanted // pairs_per_kv_head) * pairs_per_kv_head
        section = _ceil_div(_ceil_div(pairs, _ceil_div(pairs, most)), pairs_per_kv_head) * pairs_per_kv_head
    costs = [cost for length in longest for cost in _query_tiles(shape, length, rows, block_kv)]
    return _losses(shape, padding, costs, [(pairs, section)], block_q * block_kv, num_sms, config["head_dims"])


def _backward(shape: Shape, num_sms: int) -> Losses:
    config = _config("Backward", shape)
    num_sms //= tiles_of_sm90().num_ctas(config["head_dims"][1])
    wide_qk, wide_v = config["head_dims"]
    by_columns = config["kSplitsColumns"]
    # By columns dQ has a kernel of its own, which computes scores and dP once more.
    products = 4 * wide_qk + 3 * wide_v if by_columns else 3 * wide_qk + 2 * wide_v
    padding = products / (3 * shape.head_dim_qk + 2 * shape.head_dim_v)
    block_q, block_kv = config["kBlockQ"], config["kBlockKV"]
    lengths = shape.lengths()
    entries, documents = (1, lengths) if shape.is_packed else (shape.batch, lengths[:1])
    heads_kv, num_splits = backward_plan(shape, config, num_sms)
    rows_q = sum(documents) if shape.is_packed else shape.seqlen_q
    rows_kv = sum(documents) if shape.is_packed else shape.seqlen_kv
    group = shape.heads_q // shape.heads_kv
    bytes_row = group / num_splits * (6 * shape.head_dim_qk + 2 * shape.head_dim_v)
    wanted = max(1, int(BACKWARD_SECTION_BYTES // (rows_q * bytes_row)))
    if shape.is_packed or shape.is_causal:
        wanted = min(max(_ceil_div(4 * num_sms * block_kv, rows_kv), wanted), max(wanted, num_sms // 4))
    costs = [
        cost * group // num_splits for length in documents for cost in _key_tiles(shape, length, block_q, block_kv)
    ]
    passes = []
    for first in range(0, shape.heads_kv, heads_kv):
        pairs = min(heads_kv, shape.heads_kv - first) * num_splits * entries
        passes.append((pairs, _ceil_div(pairs, _ceil_div(pairs, wanted))))
    return _losses(shape, padding, costs, passes, block_q * block_kv, num_sms, config["head_dims"], by_columns)


def backward_plan(shape: Shape, config: dict, num_sms: int = NUM_SMS) -> tuple[int, int]:
    """(kv heads worked on at a time, tiles that share a group's query heads): plan_backward of launch_backward.cuh."""
    group, heads_kv = shape.heads_q // shape.heads_kv, shape.heads_kv
    block_q = config["kBlockQ"]
    total = shape.batch * shape.seqlen_q
    blocks = _ceil_div(total, block_q) + shape.batch + 1
    if not shape.is_packed:
        blocks = _ceil_div(shape.seqlen_q, block_q) * shape.batch
    if shape.is_packed:
        tiles = _ceil_div(total, config["kBlockKV"])
    else:
        tiles = shape.batch * _ceil_div(shape.seqlen_kv, config["kBlockKV"])

    def num_splits(heads: int) -> int:
        splits = 1
        while not shape.is_packed and splits < group and 2 * tiles * heads * splits < 3 * num_sms:
            more = next(n for n in range(splits + 1, group + 1) if group % n == 0)
            if tiles * heads * more * config["kBlockKV"] * sum(config["head_dims"]) * 4 > USUAL_SUMS:
                break
            splits = more
        return splits

    def time_of_pass(heads: int) -> float:
        if heads == 0:
            return 0.0
        splits = num_splits(heads)
        rounds = tiles * heads * splits / num_sms
        is_equal = not shape.is_packed and not shape.is_causal
        return (math.ceil(rounds) if is_equal else max(2.0, rounds + 0.5)) / splits

    def time(heads: int) -> float:
        return heads_kv // heads * time_of_pass(heads) + time_of_pass(heads_kv % heads)

    def passes_of(limit: int) -> int:
        most = min(max(limit // max(1, blocks * group * block_q * config["head_dims"][0] * 4), 1), heads_kv)
        return _ceil_div(heads_kv, most)

    best = heads_kv
    if not config["kSplitsColumns"]:
        usual = passes_of(USUAL_SUMS)
        best = _ceil_div(heads_kv, usual)
        for passes in range(usual - 1, passes_of(LARGEST_SUMS) - 1, -1):
            heads = _ceil_div(heads_kv, passes)
            if time(heads) < (1.0 - WORTHWHILE) * time(best):
                best = heads
    return best, num_splits(best)


def _queries_per_block(block_q: int, heads: int, num_parts: int) -> int:
    """As in csrc/sm90/scheduling/schedule.cu: ``heads`` of each query; each of a tile's parts has whole queries."""
    return block_q // num_parts // heads * num_parts


def _heads_packed(shape: Shape, block_q: int, group: int, num_parts: int) -> int:
    if group == 1 or group > block_q // num_parts:
        return 1
    longest = max(shape.lengths())
    tiles = _ceil_div(longest, block_q) * group
    packed = _ceil_div(longest, _queries_per_block(block_q, group, num_parts))
    return group if 10 * packed <= 9 * tiles else 1


def _query_tiles(shape: Shape, length: int, rows: int, block_kv: int) -> Iterator[int]:
    """Tiles of keys that each block of query rows visits, from the last block to the first."""
    keys = length if shape.is_packed else shape.seqlen_kv
    for start in reversed(range(0, length, rows)):
        first, last = 0, keys - 1
        if shape.is_causal:
            last = min(last, min(start + rows, length) - 1 + keys - length)
            first = 0 if shape.window is None else max(0, start + keys - length - shape.window)
        yield last // block_kv - first // block_kv + 1 if last >= first else 0


def _key_tiles(shape: Shape, length: int, block_q: int, block_kv: int) -> Iterator[int]:
    """Tiles of query rows that each block of keys is seen by, from the first block to the last."""
    keys = length if shape.is_packed else shape.seqlen_kv
    for start in range(0, keys, block_kv):
        first, last = 0, length - 1
        if shape.is_causal:
            first = max(0, start - keys + length)
            if shape.window is not None:
                last = min(last, min(start + block_kv, keys) - 1 + shape.window - keys + length)
        yield last // block_q - first // block_q + 1 if last >= first else 0


def _losses(
    shape: Shape,
    padding: float,
    costs: list[int],
    passes: list[tuple[int, int]],
    area: int,
    num_sms: int,
    kernel: tuple[int, int],
    is_twice: bool = False,
) -> Losses:
    """``costs`` of one pair's tiles, in tiles of ``area`` scores; ``passes``: (pairs, pairs per section)."""
    work = sum(costs) * sum(pairs for pairs, _ in passes)
    ends = sum(_makespan(costs, pairs, section, num_sms) for pairs, section in passes)
    visible = shape.visible_pairs() * shape.heads_q
    padding_words = " and ".join(
        [f"head dim {_dims((shape.head_dim_qk, shape.head_dim_v))} in the kernel of {_dims(kernel)}"]
        * ((shape.head_dim_qk, shape.head_dim_v) != kernel)
        + ["scores computed twice"] * is_twice
    )
    tail_words = f"tail of {len(costs) * passes[0][0]:,} tiles on {num_sms} multiprocessors"
    if len(passes) > 1:
        tail_words += f", in each of {len(passes)} passes of dQ"
    return Losses(
        padding,
        max(1.0, work * area / visible),
        max(1.0, ends * num_sms / work),
        padding_words,
        tail_words,
    )


def _makespan(costs: list[int], pairs: int, section: int, num_sms: int) -> float:
    """When the last multiprocessor is done, if each takes the next tile as soon as it is free."""
    total = sum(costs) * pairs
    if len(costs) * pairs > MOST_ROUNDS * num_sms:
        return total / num_sms + max(costs) / 2
    ordered = sorted(costs, reverse=True)
    free = [0.0] * num_sms
    for start in range(0, pairs, section):
        width = min(section, pairs - start)
        for cost in ordered:
            for _ in range(width):
                heapq.heapreplace(free, free[0] + cost)
    return max(free)
