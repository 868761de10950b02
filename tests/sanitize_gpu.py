"""Tiny calls of the compiled operators that reach every kernel, for compute-sanitizer; exits with 1 on a wrong result.

    compute-sanitizer --tool memcheck --error-exitcode 86 python3 tests/sanitize_gpu.py
    (likewise racecheck, synccheck; `python3 tests/gpu_suite.py sanitize` runs all three, and tests/racecheck.py reads the second)

The first thing that touches the GPU is a copy and the last one is a copy: every kernel launched here is ours, nothing is
uninitialised but what they allocate, and every tensor is an allocation of its own, so that memcheck sees an overrun by one
element. Values beside the tensors are NaN. ``--device cpu`` runs the same sweep on the CPU kernel. ``--control`` only
launches a kernel that writes past its allocation: a sanitizer that does not complain is not looking.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import decode_cases
import torch
from cases import SM90_ROWS, Case, sm90_tiles
from decode_cases import DecodeCase, DecodeInputs

import flashmla_hf.ops  # noqa: F401 (registers the operators)
from flashmla_hf import attention, libraries, reference
from flashmla_hf.fp8.quantization import quantize_tokens, rotate

# Largest error, relative to the largest value (at least 1): a wrong index, mask or stride is far beyond.
TOLERANCES = {torch.bfloat16: (2e-2, 5e-2), torch.float16: (3e-3, 8e-3)}  # of out, of gradients
LSE_TOLERANCE = 3e-4

MASKS = {"none": {}, "causal": {"is_causal": True}, "window": {"window": (40, 9)}}
# (seqlen_q, seqlen_kv): one row, one row beyond a tile of 64, several tiles, more queries than keys.
LENGTHS = ((65, 65), (1, 200), (200, 65), (65, 200), (200, 200), (130, 1), (129, 193))
HEADS = ((2, 2), (4, 1), (6, 2), (3, 1), (8, 1))
FEATURES = ({}, {"has_sinks": True}, {"softcap": 2.0}, {"has_sinks": True, "softcap": 5.0, "scale": -0.1})
LAYOUTS = ("contiguous", "sliced", "transposed", "mixed")
PACKS = (
    {"seqlens_q": (65, 0, 1, 33), "seqlens_kv": (65, 3, 0, 200), "rest_q": 3, "rest_kv": 2},
    {"seqlens_q": (1, 130, 7)},
    {"seqlens_q": (200, 64), "seqlens_kv": (64, 200), "rest_q": 70},
)


def sweep_cases() -> list[tuple[Case, torch.dtype]]:
    """Every head-dim row, mask kind and layout of sequences; the rest takes turns. Then the calls without work."""
    found = []
    for n, (row, mask, is_packed) in enumerate(product(SM90_ROWS, MASKS, (False, True))):
        # Of the three masks of a row and layout, one in three is narrower than the row.
        narrower = 8 * ((n // 2) % 3 == 2)
        shape = PACKS[n // 2 % len(PACKS)] if is_packed else dict(
            zip(("batch", "seqlen_q", "seqlen_kv"), (1 + n % 2, *LENGTHS[n % len(LENGTHS)]), strict=True)
        )  # fmt: skip
        heads_q, heads_kv = HEADS[n % len(HEADS)]
        case = Case(
            f"{row[0] - narrower}/{row[1] - narrower} {mask} {'packed' if is_packed else 'dense'}",
            heads_q=heads_q, heads_kv=heads_kv, head_dim_qk=row[0] - narrower, head_dim_v=row[1] - narrower,
            layout=LAYOUTS[n % len(LAYOUTS)], **shape, **MASKS[mask], **FEATURES[n // 3 % len(FEATURES)],
        )  # fmt: skip
        found.append((case, (torch.bfloat16, torch.float16)[(n + n // 6) % 2]))
    found += [
        (case, torch.bfloat16)
        for case in (
            Case("v wider than qk", seqlen_q=65, head_dim_qk=40, head_dim_v=72, is_causal=True),
            # More tiles than three a multiprocessor: blocks ask a counter for them.
            Case("many tiles", batch=110, seqlen_q=65, heads_q=4, is_causal=True),
            Case("many tiles, dQ apart", batch=110, seqlen_q=65, heads_q=4, head_dim_qk=192),
            Case("no keys", seqlen_q=9, seqlen_kv=0, has_sinks=True),
            Case("no queries", seqlen_q=0, seqlen_kv=9),
            Case("no batch", batch=0, seqlen_q=9),
            Case("only empty sequences", seqlens_q=(0,) * 70, rest_q=4, rest_kv=4),
            Case("no sequence", seqlens_q=(), rest_q=4, rest_kv=4),
        )
    ]
    return found


LATENT_ROWS = tuple(sm90_tiles.head_dims("Latent"))
DECODE_ROWS = (*sm90_tiles.head_dims("Decode"), *LATENT_ROWS)
# A cache in the layouts and with the bounds that a call may have; keys are two or three blocks of 64, so that CTAs share them.
DECODE_KINDS = {
    "dense": {"lengths": (150, 150), "has_lengths": False, "heads_q": 6, "has_sinks": True},
    "dense, first keys hidden": {
        "lengths": (130, 0, 1, 200), "starts": (70, 0, 0, 5), "capacity": 203, "layout": "transposed", "seqlen_q": 4,
    },
    "pages of 16, window": {
        "lengths": (130, 3, 190), "page_size": 16, "window": (70, None), "seqlen_q": 3, "softcap": 2.0, "has_sinks": True,
    },
    # 16 heads of a group and 9 queries: three tiles for a kv head.
    "pages of 48, tiles": {
        "lengths": (140, 20), "starts": (17, 0), "page_size": 48, "seqlen_q": 9, "heads_q": 32, "layout": "sliced",
        "scale": -0.1,
    },
}  # fmt: skip


def decode_row(case: DecodeCase) -> tuple[int, int]:
    dims = case.head_dim_qk, case.head_dim_v or case.head_dim_qk
    return next(row for row in DECODE_ROWS if dims[0] <= row[0] and dims[1] <= row[1])


def decode_cases_of_sweep() -> list[tuple[DecodeCase, torch.dtype]]:
    """Every head-dim row, dense and paged, shared among CTAs and not; dtypes and narrower head dims take turns."""
    found = []
    for n, (row, kind) in enumerate(product(DECODE_ROWS, DECODE_KINDS)):
        narrower, turn = 8 * (n % 3 == 2), n + n // len(DECODE_KINDS)
        dims = {"head_dim_qk": row[0] - narrower, "head_dim_v": row[1] - narrower, "num_splits": turn // 2 % 2}
        if row in LATENT_ROWS:
            dims |= {"is_latent": True, "heads_kv": 1}
        found.append((DecodeCase(**dims, **DECODE_KINDS[kind]), (torch.bfloat16, torch.float16)[turn % 2]))
    found += [
        (case, torch.bfloat16)
        for case in (
            # More tiles than CTAs: a CTA ends one tile, has whole ones, and begins another.
            DecodeCase(lengths=(40, 100, 65, 130) * 36, heads_q=2),
            # Equal ones: a CTA has two whole tiles.
            DecodeCase(lengths=(70,) * 260, has_lengths=False, heads_q=2),
            # As many parts as a row of combine_kernel reads ahead (64), and more.
            DecodeCase(lengths=(4500,), heads_q=2, heads_kv=1),
            DecodeCase(lengths=(4500,), heads_q=2, heads_kv=1, head_dim_qk=256, page_size=64),
            DecodeCase(
                lengths=(4500, 40),
                heads_q=128,
                heads_kv=1,
                head_dim_qk=576,
                head_dim_v=512,
                page_size=64,
                is_latent=True,
            ),
            DecodeCase(lengths=(0, 0), capacity=10),
            DecodeCase(lengths=(9,), seqlen_q=0),
        )
    ]
    return found


# Lengths, starts and pages of two sequences of up to four pages of 16 in a cache of six pages, that no right caller passes.
CORRUPT_CACHES = {
    "lengths past the end": {"cache_seqlens": (1000, 2**31 - 1)},
    "negative lengths": {"cache_seqlens": (-1, -(2**31))},
    "starts past the end": {"kv_start": (1000, 2**31 - 1)},
    "negative starts": {"kv_start": (-1, -(2**31))},
    "no such pages": {"block_table": (6, 2**31 - 1, -1, -(2**31), 10**6, 7, -6, 5)},
    "all of it": {"cache_seqlens": (10**6, -9), "kv_start": (-7, 10**9), "block_table": (6, -1, 2**30, 0) * 2},
}

# Boundaries of 100 packed rows that no right caller passes: the kernels must stay inside the tensors.
CORRUPT = {
    "past the end": (0, 40, 400),
    "far past the end": (0, 40, 2**30),
    "falling": (0, 90, 20),
    "negative": (0, -50, 100),
    "all negative": (-(2**30), -7, -1),
    "begins late": (60, 80, 130),
}


def place(x: torch.Tensor | None, device: str) -> torch.Tensor | None:
    """x with its strides and everything around it in its storage, by one plain copy."""
    if x is None or device == "cpu":
        return x
    base = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return base.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def numbers(case: Case) -> tuple:
    """Those of an operator's arguments that are not tensors."""
    left, right = (-1 if bound is None else bound for bound in case.window or (None, None))
    longest = (
        (max(case.seqlens_q, default=0), max(case.seqlens_kv, default=0))
        if case.is_packed
        else (case.seqlen_q, case.seqlen_kv)
    )
    scale = case.head_dim_qk**-0.5 if case.scale is None else case.scale
    return *longest, scale, left, 0 if case.is_causal else right, case.softcap, False


def difference(name: str, got: torch.Tensor, ref: torch.Tensor, tolerance: float) -> str | None:
    """What is wrong with ``got``, if anything; infinities must stand where ref has them."""
    got = got.double()
    if got.shape != ref.shape:
        return f"{name}: shape {[*got.shape]}, expected {[*ref.shape]}"
    if not torch.equal(got.isfinite(), ref.isfinite()) or not (got == ref)[~ref.isfinite()].all():
        return f"{name}: infinities or NaNs at other places"
    error, size = (float(x[ref.isfinite()].abs().max()) if ref.numel() and ref.isfinite().any() else 0.0
                   for x in (got - ref, ref))  # fmt: skip
    return None if error <= tolerance * max(1.0, size) else f"{name}: error {error:.2e}, largest value {size:.2e}"


def run_case(case: Case, dtype: torch.dtype, device: str, forward: Callable) -> list[str]:
    """Every difference of one call from float64, forward and backward."""
    inputs = case.inputs(dtype)
    names = ("q", "k", "v", "sinks", "cu_seqlens_q", "cu_seqlens_kv")
    host = [getattr(inputs, name) for name in names]
    tensors = [place(x, device) for x in host]
    options = numbers(case)
    out, lse = forward(*tensors, *options)

    leaves = [x.double().requires_grad_() if x is not None and n < 4 else x for n, x in enumerate(host)]
    _, _, scale, left, right, softcap, _ = options
    ref_out, ref_lse = reference.attention(
        *leaves[:3], sinks=leaves[3], cu_seqlens_q=leaves[4], cu_seqlens_kv=leaves[5], scale=scale, window_left=left,
        window_right=right, softcap=softcap,
    )  # fmt: skip
    of_out, of_grads = TOLERANCES[dtype]
    found = [difference("out", out.cpu(), ref_out.detach(), of_out),
             difference("lse", lse.cpu(), ref_lse.detach(), LSE_TOLERANCE)]  # fmt: skip
    needs = (True, True, True, case.has_sinks)
    dout, dlse = place(inputs.dout, device), place(inputs.dlse, device)
    deterministic = (*options[:-1], case.has_sinks)  # both kinds
    grads = torch.ops.flashmla.flash_attn_backward(
        dout, dlse, *tensors[:3], out, lse, *tensors[3:], *deterministic, *needs
    )
    finite_lse = ref_lse.masked_fill(ref_lse == -torch.inf, 0.0)
    loss = (ref_out * inputs.dout.double()).sum() + (finite_lse * inputs.dlse.double()).sum()
    wanted = [x for x in leaves[:4] if x is not None]
    expected = torch.autograd.grad(loss, wanted, allow_unused=True) if loss.requires_grad else [None] * len(wanted)
    for name, leaf, grad, ref in zip(names, wanted, grads, expected, strict=False):
        ref = torch.zeros_like(leaf) if ref is None else ref
        found.append(difference(f"d{name}", grad.cpu(), ref, of_grads))
    return [f"{case.name} {dtype}: {text}" for text in found if text is not None]


def run_corrupt(device: str, forward: Callable) -> int:
    """Calls with boundaries that are wrong, on either side; returns how many were computed (the CPU kernel refuses). What
    comes out means nothing; whether anything outside the tensors is touched is the sanitizer's to say."""
    computed = 0
    for n, (values, side) in enumerate(product(CORRUPT.values(), ("q", "kv", "both"))):
        row = SM90_ROWS[(n + n // 6) % len(SM90_ROWS)]
        case = Case(heads_q=2, heads_kv=1, head_dim_qk=row[0], head_dim_v=row[1], seqlens_q=(40, 60), is_causal=True)
        inputs = case.inputs(torch.bfloat16)
        wrong = torch.tensor(values, dtype=torch.int32)
        boundaries = [wrong if side in (name, "both") else inputs.cu_seqlens_q for name in ("q", "kv")]
        tensors = [place(x, device) for x in (inputs.q, inputs.k, inputs.v, None, *boundaries)]
        # Of a forward with such boundaries there may be rows that nobody wrote: the backward gets others.
        saved = [place(x, device) for x in (inputs.dout, inputs.dlse, inputs.dout, inputs.dlse)]
        try:
            for most, is_deterministic in ((100, True), (3000, False)):  # whatever bound the caller gives
                options = (most, most, *numbers(case)[2:-1], is_deterministic)
                out, _ = forward(*tensors, *options)
                grads = torch.ops.flashmla.flash_attn_backward(
                    *saved[:2], *tensors[:3], *saved[2:], *tensors[3:], *options, True, True, True, False
                )
                for x in (out, *grads):
                    x.cpu()
                computed += 1
        except RuntimeError as error:
            if "cu_seqlens" not in str(error):
                raise
    return computed


def decode_numbers(case: DecodeCase) -> tuple:
    scale = case.head_dim_qk**-0.5 if case.scale is None else case.scale
    return scale, *case.bounds, case.softcap, case.num_splits != 1


DECODE_TENSORS = ("q", "k_cache", "v_cache", "sinks", "cache_seqlens", "kv_start", "block_table")


def placed_cache(host: dict, case: DecodeCase, device: str) -> list[torch.Tensor | None]:
    tensors = {name: place(x, device) for name, x in host.items()}
    if case.is_latent:
        tensors["v_cache"] = tensors["k_cache"][..., : case.head_dim_v]
    return list(tensors.values())


def run_decode(case: DecodeCase, dtype: torch.dtype, device: str, decode: Callable) -> list[str]:
    """Every difference of one call from float64."""
    inputs: DecodeInputs = decode_cases.inputs_of(case, dtype, "cpu")
    tensors = placed_cache({name: getattr(inputs, name) for name in DECODE_TENSORS}, case, device)
    got = decode(*tensors, *decode_numbers(case))
    tolerances = (TOLERANCES[dtype][0], LSE_TOLERANCE)
    truth = decode_cases.truth(case, inputs)
    found = [difference(*rest) for rest in zip(("out", "lse"), (x.cpu() for x in got), truth, tolerances, strict=True)]
    return [f"{case} {dtype}: {text}" for text in found if text is not None]


def run_corrupt_caches(device: str, decode: Callable) -> int:
    """As :func:`run_corrupt`, of caches."""
    computed = 0
    for n, values in enumerate(CORRUPT_CACHES.values()):
        row = DECODE_ROWS[n % len(DECODE_ROWS)]
        case = DecodeCase(
            lengths=(40, 60), starts=(0, 3), page_size=16, head_dim_qk=row[0], head_dim_v=row[1], num_splits=n // 2 % 2,
            is_latent=row in LATENT_ROWS,
        )  # fmt: skip
        inputs = decode_cases.inputs_of(case, torch.bfloat16, "cpu")
        host = {name: getattr(inputs, name) for name in DECODE_TENSORS}
        host |= {name: torch.tensor(x, dtype=torch.int32).view_as(host[name]) for name, x in values.items()}
        try:
            decode(*placed_cache(host, case, device), *decode_numbers(case))[0].cpu()
            computed += 1
        except RuntimeError as error:
            if not any(name in str(error) for name in values):
                raise
    return computed


E4M3_DIMS = tuple(dim for dim, _ in sm90_tiles.head_dims("E4m3Decode"))


def e4m3_cases_of_sweep() -> list[tuple[DecodeCase, torch.dtype]]:
    """Calls to caches of e4m3: every head dim and kind; then tiles that are split and whole, and a cluster."""
    found = []
    for n, (dim, kind) in enumerate(product(E4M3_DIMS, DECODE_KINDS)):
        dims = {"head_dim_qk": dim - 16 * (n % 3 == 2), "head_dim_v": dim - 16 * (n % 2), "num_splits": n // 2 % 2}
        found.append((DecodeCase(**dims, **DECODE_KINDS[kind]), (torch.bfloat16, torch.float16)[n % 2]))
    for dim, options in product(E4M3_DIMS, (
        {"lengths": (40, 100, 65, 130) * 36, "heads_q": 2},
        {"lengths": (4500,), "heads_q": 2, "heads_kv": 1, "page_size": 64},
        # synccheck loses barriers of 128 CTAs in clusters with 24 each (docs/log.md, 2026-11-28): two clusters.
        {"lengths": (1000,), "heads_q": 2, "heads_kv": 2, "has_lengths": False},
    )):  # fmt: skip
        found.append((DecodeCase(head_dim_qk=dim, **options), torch.bfloat16))
    return found


def run_e4m3_decode(case: DecodeCase, dtype: torch.dtype) -> list[str]:
    """Every difference of one call to e4m3 caches on a GPU from float64 on what they hold; a head's scales lie side by side."""
    inputs: DecodeInputs = decode_cases.inputs_of(case, dtype, "cpu")
    host = {name: getattr(inputs, name) for name in DECODE_TENSORS}
    clean, scales = {}, []
    for name in ("k", "v"):
        cache = host[f"{name}_cache"]
        host[f"{name}_cache"], scale = quantize_tokens(cache)
        scale = scale.masked_fill(cache.isnan().all(-1), torch.nan)  # of rows that no query sees
        scales.append(place(scale.transpose(1, 2).contiguous().transpose(1, 2), "cuda"))
        data, factor = quantize_tokens(getattr(inputs, f"clean_{name}"))
        clean[f"clean_{name}"] = data.double() * factor.double()[..., None]
    tensors = placed_cache(host, case, "cuda")
    got = torch.ops.flashmla.flash_attn_decode_e4m3(*tensors[:3], *scales, *tensors[3:], *decode_numbers(case))
    truth = decode_cases.truth(case, replace(inputs, **clean))
    tolerances = (TOLERANCES[dtype][0], LSE_TOLERANCE)
    found = [difference(*rest) for rest in zip(("out", "lse"), (x.cpu() for x in got), truth, tolerances, strict=True)]
    return [f"e4m3 {case} {dtype}: {text}" for text in found if text is not None]


def run_append(page_size: int, dtype: torch.dtype, is_e4m3: bool) -> list[str]:
    """New rows written into caches on a GPU, also at lengths and in pages that there are not: what is in them afterwards."""
    rows, heads, dim = page_size or 96, 3, 80
    batch, pages = (4, 24) if page_size else (4, 4)
    begins, table = [5, 90, -3, 2**31 - 1], None
    k, v = (torch.randn(batch, 9, heads, dim).to(dtype) for _ in range(2))
    caches = [torch.zeros(pages, rows, heads, dim, dtype=torch.float8_e4m3fn if is_e4m3 else dtype) for _ in range(2)]
    scales = [torch.zeros(pages, heads, rows).transpose(1, 2) for _ in range(2)] if is_e4m3 else [None, None]
    if page_size:
        table = torch.arange(pages, dtype=torch.int32).view(batch, -1)
        table[1, -1] = pages
    on_gpu = [place(x, "cuda") for x in (*caches, k, v, torch.tensor(begins, dtype=torch.int32), table, *scales)]
    torch.ops.flashmla.append_to_cache(*on_gpu)
    capacity = rows if table is None else table.shape[1] * page_size
    for x, cache, scale in zip((k, v), caches, scales, strict=True):
        for b, i in product(range(batch), range(9)):
            key = begins[b] + i
            if not 0 <= key < capacity:
                continue
            page, row = (b, key) if table is None else (int(table[b, key // page_size]), key % page_size)
            if page >= pages:
                continue
            if scale is None:
                cache[page, row] = x[b, i]
            else:
                cache[page, row], scale[page, row] = quantize_tokens(x[b, i])
    expected = [x for x in (*caches, *scales) if x is not None]
    written = [x.cpu() for x in (*on_gpu[:2], *on_gpu[6:]) if x is not None]
    same = all(torch.equal(x.float(), y.float()) for x, y in zip(written, expected, strict=True))
    return [] if same else [f"append to pages of {page_size}, {dtype}, e4m3 {is_e4m3}: other rows than expected"]


FP8_ROWS = tuple(sm90_tiles.head_dims("Fp8Forward"))
FP8_TOLERANCES = (0.15, 0.03)  # of out, of the lse: an element of P beside a boundary falls on either side


def fp8_cases_of_sweep() -> list[tuple[Case, torch.dtype]]:
    """Every head-dim row, mask and layout of sequences; the rest takes turns."""
    found = []
    for n, (row, mask, is_packed) in enumerate(product(FP8_ROWS, MASKS, (False, True))):
        shape = PACKS[n // 2 % len(PACKS)] if is_packed else {"batch": 2, "seqlen_q": LENGTHS[n][0], "seqlen_kv": LENGTHS[n][1]} \
            if n < len(LENGTHS) else {"seqlen_q": 300, "seqlen_kv": 450}  # fmt: skip
        heads_q, heads_kv = HEADS[n % len(HEADS)]
        dims = {"head_dim_qk": row[0] - 8 * (n % 3 == 2), "head_dim_v": row[1] - 16 * (n % 4 == 3)}
        case = Case(
            f"fp8 {row[0]} {mask} {'packed' if is_packed else 'dense'}", heads_q=heads_q, heads_kv=heads_kv, **dims,
            layout=LAYOUTS[n % len(LAYOUTS)], **shape, **MASKS[mask], **FEATURES[n // 3 % len(FEATURES)],
        )  # fmt: skip
        found.append((case, (torch.bfloat16, torch.float16)[n // 2 % 2]))
    return found


def run_fp8(case: Case, dtype: torch.dtype) -> list[str]:
    """Every difference of one call in fp8 on a GPU from its emulation, and of the rounded q, k and v from what they round."""
    inputs = case.inputs(dtype)
    names = ("q", "k", "v", "sinks", "cu_seqlens_q", "cu_seqlens_kv")
    host = [getattr(inputs, name) for name in names]
    tensors = [place(x, "cuda") for x in host]
    got = torch.ops.flashmla.flash_attn_fp8_forward(*tensors, *numbers(case))
    expected = attention(
        **dict(zip(names, host, strict=True)), **case.options, precision="fp8", impl="reference", return_lse=True
    )
    found = [difference(*x) for x in zip(("out", "lse"), (x.cpu() for x in got), (x.double() for x in expected),
                                         FP8_TOLERANCES, strict=True)]  # fmt: skip
    rounded = torch.ops.flashmla.flash_attn_fp8_round(*tensors[:3], *tensors[4:])
    rows = [sum(case.seqlens_q) if case.is_packed else None, *[sum(case.seqlens_kv) if case.is_packed else None] * 2]
    wanted = (rotate(host[0], False), rotate(host[1], True), host[2])
    for name, x, want, end in zip("qkv", rounded, wanted, rows, strict=True):
        found.append(difference(f"rounded {name}", x.cpu()[:end], want[:end].double(), 0.07))
    return [f"{case.name} {dtype}: {text}" for text in found if text is not None]


def sweep(device: str, forward: Callable | None = None, decode: Callable | None = None) -> list[str]:
    """Everything; what is wrong. ``forward`` and ``decode`` take the operators' places (the tests' negative controls)."""
    forward = forward or torch.ops.flashmla.flash_attn_forward
    decode = decode or torch.ops.flashmla.flash_attn_decode
    wrong, started = [], time.monotonic()
    cases = sweep_cases()
    for case, dtype in cases:
        wrong += run_case(case, dtype, device, forward)
    computed = run_corrupt(device, forward)
    of_caches = decode_cases_of_sweep()
    for case, dtype in of_caches:
        wrong += run_decode(case, dtype, device, decode)
    computed_caches = run_corrupt_caches(device, decode)
    if device == "cuda":  # no other device has a kernel
        for case, dtype in fp8_cases_of_sweep():
            wrong += run_fp8(case, dtype)
        for case, dtype in e4m3_cases_of_sweep():
            wrong += run_e4m3_decode(case, dtype)
        for page_size, dtype, is_e4m3 in product((0, 16), (torch.bfloat16, torch.float16), (False, True)):
            wrong += run_append(page_size, dtype, is_e4m3)
    if device == "cuda" and 0 in (computed, computed_caches):
        wrong.append("no call with corrupt boundaries, or none with a corrupt cache, was computed")
    print(f"{len(cases)} calls and {computed} with corrupt boundaries, forward and backward, {len(of_caches)} to caches and "
          f"{computed_caches} to corrupt ones in {time.monotonic() - started:.1f} s: {len(wrong)} wrong results")  # fmt: skip
    return wrong


def write_past_the_end() -> None:
    """The control: a kernel of its own that writes one element past an allocation of 64. Ends the process with 0, so that
    another exit code is the sanitizer's."""
    kernel = torch.cuda._compile_kernel(
        'extern "C" __global__ void past_the_end(float* x) { x[64] = 1.0f; }', "past_the_end"
    )
    x = torch.zeros(64).to("cuda")
    kernel(grid=(1, 1, 1), block=(1, 1, 1), args=[x])
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:  # memcheck ends the CUDA context
        print(str(error).splitlines()[0])
    print("control: wrote past the end", flush=True)
    os._exit(0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--control", action="store_true", help="only write past the end of an allocation")
    args = parser.parse_args(arguments)
    # torch reads this when it first allocates. It is set here and not at import, because test files import this module, and
    # without the cache every allocation waits for the GPU and none can be captured in a graph.
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    if args.control:
        write_past_the_end()
        return 0
    impl = "cpu" if args.device == "cpu" else "sm90"
    if impl in libraries.unavailable:
        print(f"sanitize_gpu: {libraries.unavailable[impl]}")
        return 2
    torch.set_num_threads(min(4, os.cpu_count() or 1))
    wrong = sweep(args.device)
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
