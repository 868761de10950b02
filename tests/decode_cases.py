"""Calls of :func:`flashmla_hf.decode_attention`: plain numbers, their tensors, the truth, random ones, and how they are judged.

Everything that no query may see is NaN in the caches an implementation gets: rows before ``kv_start`` and before every query's
window, rows behind the last key, pages that no sequence uses; table entries behind those needed name no page. The truth is
computed on clean copies, by a mask of absolute positions.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import gpu_support
import numerics
import pytest
import torch
from cases import sm90_tiles
from cpu_support import DTYPES

from flashmla_hf import libraries, reference
from flashmla_hf.decode import decode_attention

LAYOUTS = ("contiguous", "transposed", "sliced")
PAGE_SIZES = (16, 48, 64, 256)
IMPLEMENTATIONS = ("cpu", "sm90", "reference")


def missing(impl: str) -> str | None:
    """Why ``impl`` cannot run here; ``None`` if it can."""
    return {"cpu": libraries.unavailable.get("cpu"), "sm90": gpu_support.sm90_missing(), "reference": None}[impl]


def device_of(impl: str) -> str:
    return "cuda" if impl == "sm90" else "cpu"


def dtypes_of(impl: str) -> tuple[torch.dtype, ...]:
    return gpu_support.HALF if impl == "sm90" else DTYPES


def each_of(*names: str):
    """A test for each of these implementations, skipped if it cannot run here."""
    return pytest.mark.parametrize(
        "impl",
        [pytest.param(name, marks=pytest.mark.skipif(missing(name) is not None, reason=f"{name}: {missing(name)}"))
         for name in names],
    )  # fmt: skip


each_impl, each_kernel = each_of(*IMPLEMENTATIONS), each_of("cpu", "sm90")


@dataclass(frozen=True)
class DecodeCase:
    lengths: tuple[int, ...]  # keys of each sequence
    seqlen_q: int = 1
    starts: tuple[int, ...] | None = None
    capacity: int = 0  # at least; 0: the longest
    page_size: int = 0  # 0: a dense cache
    has_lengths: bool = True  # else cache_seqlens is None, and all are full
    heads_q: int = 4
    heads_kv: int = 2
    head_dim_qk: int = 64
    head_dim_v: int | None = None
    scale: float | None = None
    is_causal: bool = True
    window: tuple[int | None, int | None] | None = None
    softcap: float = 0.0
    has_sinks: bool = False
    layout: str = "contiguous"
    magnitude: float = 1.0
    num_splits: int = 0
    is_latent: bool = False  # values are the first head_dim_v columns of the keys' rows

    @property
    def rows(self) -> int:
        """The rows that a sequence may have."""
        rows = max(self.capacity, *self.lengths, 0)
        return -(-rows // self.page_size) * self.page_size if self.page_size else rows

    @property
    def counts(self) -> tuple[int, ...]:
        return self.lengths if self.has_lengths else (self.rows,) * len(self.lengths)

    @property
    def bounds(self) -> tuple[int, int]:
        left, right = (-1 if bound is None else bound for bound in self.window or (None, None))
        return left, 0 if self.is_causal else right

    @property
    def options(self) -> dict:
        return {
            "scale": self.scale, "is_causal": self.is_causal, "window": self.window, "softcap": self.softcap,
            "num_splits": self.num_splits,
        }  # fmt: skip

    def first_key(self, b: int) -> int:
        """The first key that some query of sequence b may see."""
        first, left = self.starts[b] if self.starts else 0, self.bounds[0]
        if left >= 0:
            first = max(first, self.counts[b] - self.seqlen_q - left)
        return max(0, first)


@dataclass(frozen=True)
class DecodeInputs:
    """What a call gets, and the clean caches [batch, rows, heads_kv, dim] the truth is made of."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor | None
    sinks: torch.Tensor | None
    cache_seqlens: torch.Tensor | None
    kv_start: torch.Tensor | None
    block_table: torch.Tensor | None
    clean_k: torch.Tensor
    clean_v: torch.Tensor
    head_dim_v: int | None = None  # of latents; v_cache is then None

    @property
    def tensors(self) -> dict:
        names = ("q", "k_cache", "v_cache", "sinks", "cache_seqlens", "kv_start", "block_table")
        latent = {} if self.head_dim_v is None else {"head_dim_v": self.head_dim_v}
        return {name: getattr(self, name) for name in names} | latent


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """x [n, rows, heads, dim] in another memory layout, with NaN in the gaps."""
    if layout == "transposed":  # [n, heads, rows, dim] in memory, as Transformers' caches
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 8), math.nan, dtype=x.dtype, device=x.device)
        wide[..., 8 : 8 + x.shape[-1]] = x
        return wide[..., 8 : 8 + x.shape[-1]]
    return x


def int32(values, device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def inputs_of(case: DecodeCase, dtype: torch.dtype, device: str, seed: int = 0) -> DecodeInputs:
    generator = torch.Generator(device).manual_seed(seed)
    batch, rows, dims = len(case.lengths), case.rows, (case.head_dim_qk, case.head_dim_v or case.head_dim_qk)

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, device=device) * std).to(dtype)

    q = normal(batch, case.seqlen_q, case.heads_q, dims[0], std=case.magnitude)
    clean = [normal(batch, rows, case.heads_kv, dim) for dim in dims[: 1 if case.is_latent else 2]]
    row = torch.arange(rows, device=device)
    first, end = (
        torch.tensor(x, device=device).reshape(batch, 1) for x in ([*map(case.first_key, range(batch))], case.counts)
    )
    is_hidden = ((row < first) | (row >= end))[..., None, None]
    caches = [x.masked_fill(is_hidden, math.nan) for x in clean]
    table = None
    if case.page_size:
        shuffle = random.Random(seed)
        pages = rows // case.page_size
        places = shuffle.sample(range(batch * pages + 3), batch * pages)
        where = torch.tensor(places, dtype=torch.int64, device=device)
        for i, x in enumerate(caches):
            paged = x.new_full((batch * pages + 3, case.page_size, *x.shape[2:]), math.nan)
            paged[where] = x.reshape(batch * pages, case.page_size, *x.shape[2:])
            caches[i] = paged
        nowhere = (-1, 2**31 - 1, batch * pages + 3)
        entries = [
            [place if case.first_key(b) < (n + 1) * case.page_size and n * case.page_size < case.counts[b] else
             shuffle.choice((place, *nowhere)) for n, place in enumerate(places[b * pages : (b + 1) * pages])]
            for b in range(batch)
        ]  # fmt: skip
        table = torch.tensor(entries, dtype=torch.int32, device=device).reshape(batch, pages)
    sinks = torch.randn(case.heads_q, generator=generator, device=device) if case.has_sinks else None
    laid_out = [lay_out(x, case.layout) for x in caches]
    if case.is_latent:
        clean, laid_out = [clean[0], clean[0][..., : dims[1]]], [laid_out[0], None]
    return DecodeInputs(
        lay_out(q, case.layout), *laid_out, sinks,
        int32(case.lengths, device) if case.has_lengths else None,
        int32(case.starts, device) if case.starts else None, table, *clean, dims[1] if case.is_latent else None,
    )  # fmt: skip


def truth(case: DecodeCase, inputs: DecodeInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse in float64: keys are visible by a mask of absolute positions."""
    outs, lses = [], []
    left, right = case.bounds
    scale = case.head_dim_qk**-0.5 if case.scale is None else case.scale
    sinks = None if inputs.sinks is None else inputs.sinks.double()
    for b, count in enumerate(case.counts):
        q, k, v = (x[b : b + 1].double() for x in (inputs.q, inputs.clean_k[:, :count], inputs.clean_v[:, :count]))
        key = torch.arange(count, device=q.device)
        position = count - case.seqlen_q + torch.arange(case.seqlen_q, device=q.device)[:, None]
        visible = (key >= (case.starts[b] if case.starts else 0)).expand(case.seqlen_q, count)
        if left >= 0:
            visible = visible & (key >= position - left)
        if right >= 0:
            visible = visible & (key <= position + right)
        out, lse = reference.attention(q, k, v, sinks=sinks, attn_mask=visible, scale=scale, softcap=case.softcap)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def eager(case: DecodeCase, inputs: DecodeInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """As Transformers' eager functions compute it, in the dtype of the call."""
    outs, lses = [], []
    for b, count in enumerate(case.counts):
        start = min(case.starts[b], count) if case.starts else 0
        q, k, v = inputs.q[b : b + 1], inputs.clean_k[b : b + 1, start:count], inputs.clean_v[b : b + 1, start:count]
        window = (case.bounds[0], case.bounds[1])
        out, lse = numerics.eager(q, k, v, scale=case.scale, window=window, softcap=case.softcap, sinks=inputs.sinks)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def check(impl: str, case: DecodeCase, dtype: torch.dtype, seed: int = 0, function=decode_attention) -> None:
    """Holds a call to the rule of numerics.py: at most twice eager's error, and a floor; with a second look."""
    device = device_of(impl)
    inputs = inputs_of(case, dtype, device, seed)
    got = function(**inputs.tensors, **case.options, return_lse=True, impl=impl)
    expected, others = eager(case, inputs), None
    numerics.looks.calls += 1
    for i, (name, ref) in enumerate(zip(("out", "lse"), truth(case, inputs), strict=True)):
        floor = numerics.tolerance_floor(got[i].dtype, ref)
        error = numerics.largest_error(expected[i], ref)
        if numerics.largest_error(got[i], ref) > 2.0 * error + floor:
            if others is None:
                numerics.looks.second += 1
                others = [_relative_errors(case, dtype, device, seed + n) for n in range(1, 26)]
            error = max(error, *(errors[i] * numerics._largest(ref) for errors in others))
        numerics.assert_within(f"{case} {name}", got[i], expected[i], ref, 2.0 * error + floor)


def _relative_errors(case, dtype, device, seed) -> list[float]:
    inputs = inputs_of(case, dtype, device, seed)
    tiny = torch.finfo(torch.float32).tiny
    return [
        numerics.largest_error(x, ref) / max(numerics._largest(ref), tiny)
        for x, ref in zip(eager(case, inputs), truth(case, inputs), strict=True)
    ]


# On a CPU a tenth of the random calls took over half of the time, in the truth's keys and values of every query head.
MOST_REPEATED, MOST_PRODUCTS = 4_000_000, 20_000_000


def _not_too_large(case: DecodeCase) -> DecodeCase:
    """``case``, or it with its first sequence and kv head alone: every other property stays."""
    repeated = len(case.lengths) * case.rows * case.heads_q * (case.head_dim_qk + (case.head_dim_v or case.head_dim_qk))
    if repeated <= MOST_REPEATED and repeated * case.seqlen_q <= MOST_PRODUCTS:
        return case
    return replace(
        case, lengths=case.lengths[:1], starts=case.starts and case.starts[:1],
        heads_q=case.heads_q // case.heads_kv, heads_kv=1,
    )  # fmt: skip


def random_case(source: random.Random, impl: str, most_keys: int = 500) -> DecodeCase:
    """Dense in corners: empty sequences, one key, fewer keys than queries, page and tile edges."""
    integer, choice = source.randint, source.choice

    def length() -> int:
        kind = choice(["corner", "edge", "any", "any", "any"])
        if kind == "corner":
            return integer(0, 4)
        if kind == "edge":
            return min(most_keys, max(0, choice([16, 48, 64, 128, 256, 384]) + integer(-1, 1)))
        return integer(0, most_keys)

    if impl == "sm90":
        dims = choice(sm90_tiles.head_dims("Decode"))
        if choice([False, True]):
            dims = tuple(dim - 8 * integer(0, min(3, dim // 8 - 1)) for dim in dims)
    else:
        dims = choice([(8, 8), (64, 64), (128, 128), (192, 128), (256, 256), (integer(1, 100), integer(1, 100))])
    lengths = tuple(length() for _ in range(choice([1, 1, 2, 3, 5])))
    heads_kv = choice([1, 1, 2, 3])
    is_causal = choice([True, True, True, False])
    bound = [None, 0, integer(0, 20), integer(0, most_keys)]
    case = DecodeCase(
        lengths=lengths,
        seqlen_q=choice([1, 1, 1, 2, 4, integer(1, 16), integer(1, 16), integer(17, 40)]),
        starts=choice([None, tuple(choice([0, integer(0, n), integer(0, n)]) for n in lengths)]),
        capacity=choice([0, most_keys + integer(0, 70)]),
        page_size=choice([0, 0, *PAGE_SIZES, 16 * integer(1, 20)]),
        has_lengths=integer(1, 12) > 1,
        heads_q=heads_kv * choice([1, 2, 4, 5, 7, 8, 16]),
        heads_kv=heads_kv,
        head_dim_qk=dims[0],
        head_dim_v=dims[1],
        scale=choice([None, None, None, 0.0, integer(-256, 256) / 256]),
        is_causal=is_causal,
        window=choice([None, None, (choice(bound), None), (choice(bound), 0 if is_causal else choice(bound))]),
        softcap=choice([0.0, 0.0, 1.5, 30.0]),
        has_sinks=choice([False, False, True]),
        layout=choice(LAYOUTS),
        magnitude=choice([1.0, 1.0, 4.0]),
        num_splits=choice([0, 0, 1]),
    )
    return case if impl == "sm90" else _not_too_large(case)


# Columns of a latent row, and those that are values: DeepSeek-V2 and V3, MiniCPM3, and others.
LATENT_DIMS = ((576, 512), (576, 512), (288, 256), (96, 64), (40, 40))


def random_latent_case(source: random.Random, impl: str, most_keys: int = 500) -> DecodeCase:
    """As :func:`random_case`, on rows that hold the values among the keys. A GPU's kernel knows 576/512 and one kv head."""
    case, choice = random_case(source, impl, most_keys), source.choice
    width = source.randint(1, 80)
    dims = (576, 512) if impl == "sm90" else choice([*LATENT_DIMS, (width, source.randint(1, width))])
    heads_kv = 1 if impl == "sm90" else choice([1, 1, 1, 2])
    heads_q = heads_kv * choice([1, 2, 5, 16, 16, 40] if impl != "sm90" else [16, 16, 32, 64, 128])
    case = replace(
        case, is_latent=True, head_dim_qk=dims[0], head_dim_v=dims[1], heads_kv=heads_kv, heads_q=heads_q,
        seqlen_q=min(case.seqlen_q, choice([1, 2, 4, 20])),
    )  # fmt: skip
    return case if impl == "sm90" else _not_too_large(case)


def random_cases(impl: str, dtype: torch.dtype, count: int, seed: int) -> list[tuple[DecodeCase, int]]:
    source = random.Random(f"{impl} {dtype} {seed}")
    return [(random_case(source, impl), source.randint(0, 2**31)) for _ in range(count)]


def reproducer(impl: str, case: DecodeCase, dtype: torch.dtype, seed: int) -> str:
    call = f"decode_cases.check({impl!r}, {case!r}, {dtype}, {seed})"
    return f'PYTHONPATH=.:tests python3 -c "import torch, decode_cases; from decode_cases import DecodeCase; {call}"'


def without_pages(case: DecodeCase) -> DecodeCase:
    return replace(case, page_size=0, capacity=case.rows)
