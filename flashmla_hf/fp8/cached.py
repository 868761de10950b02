"""Attention to caches of e4m3 keys and values with a scale per token and head: ``decode_attention`` with descales.

=============  =====================================================================================================
``sm90``       Hopper's kernel (csrc/sm90/decode/e4m3_decode.cuh), for fp16 and bf16 queries
``cpu``        in a stream over blocks of keys: a block is dequantised, attended to in fp32, and forgotten
``reference``  the oracle on caches that are dequantised as a whole, in float64
=============  =====================================================================================================

Exact attention of the quantised keys and values. The kernel multiplies in fp16, which holds every e4m3 number, with fp32 sums:
``k_descale`` is a factor of a column of scores and ``v_descale`` one of a column of P, and what is rounded is their product
with P, to fp16. The others do not round it.

**The operator** ``torch.ops.flashmla.flash_attn_decode_e4m3`` has the arguments of ``flash_attn_decode`` (:mod:`decode_ops`),
with ``k_descale`` and ``v_descale`` behind v; k and v are float8_e4m3fn, q fp16 or bf16. Any strides of the factors will do;
where a head's factors lie side by side (as in an Fp8Cache), the kernel reads fewest bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from flashmla_hf import decode_ops, libraries, reference
from flashmla_hf.backends import cpu, sm90
from flashmla_hf.fp8.quantization import DTYPE, quantize_tokens
from flashmla_hf.ops import check_tensor as check_operand
from flashmla_hf.ops import dtype_name, refuse, schema_arguments
from flashmla_hf.scalars import fail
from flashmla_hf.torch_state import (
    has_transforms,
    is_traced_or_transformed,
    is_transformed_eagerly,
    values_are_readable,
    without_autocast,
)
from flashmla_hf.validation import DecodeCall, check_float32, check_tensor

KEYS_AT_A_TIME = 1024  # a multiple of no page size in particular: pages are gathered row by row


OPERATOR = "flash_attn_decode_e4m3"
_DESCALES = ("k_descale", "v_descale")
_ARGUMENTS = schema_arguments(decode_ops.DecodeArguments)
_NAMES = tuple(argument.split()[-1] for argument in _ARGUMENTS)
_SCHEMA = [*_ARGUMENTS[:3], *(f"Tensor {name}" for name in _DESCALES), *_ARGUMENTS[3:]]
torch.library.define(
    f"flashmla::{OPERATOR}", f"({', '.join(_SCHEMA)}) -> (Tensor out, Tensor lse)", tags=(torch.Tag.pt2_compliant_tag,)
)


@torch.library.register_fake(f"flashmla::{OPERATOR}")
def _fake(q, k, v, k_descale, v_descale, *others):
    for name, x in (("k", k), ("v", v)):
        if x.dtype != DTYPE:
            refuse(OPERATOR, name, f"dtype {dtype_name(DTYPE)}", dtype_name(x.dtype))
    # What it needs of shapes is what the operator of other caches needs.
    outputs = decode_ops.outputs_of(OPERATOR, q, k, v, DTYPE, *others)
    for name, x in (("k_descale", k_descale), ("v_descale", v_descale)):
        check_operand(OPERATOR, name, x, q, torch.float32, tuple(k.shape[:-1]))
    return outputs


def _without_gradients(*inputs):
    names = (*_NAMES[:3], *_DESCALES, _NAMES[3])
    decode_ops.refuse_gradients(OPERATOR, zip(names, inputs, strict=False))
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.flashmla.flash_attn_decode_e4m3.default(*inputs)


_library = torch.library.Library("flashmla", "FRAGMENT")
_library.impl(OPERATOR, _without_gradients, "Autograd")


def check_descales(k_cache: Any, v_cache: Any, k_descale: Any, v_descale: Any) -> None:
    """Raises if the dtypes of caches and the descales do not fit: both caches e4m3 and both descales there, or neither."""
    are_fp8 = [getattr(x, "dtype", None) == DTYPE for x in (k_cache, v_cache)]
    pairs = (("k_descale", k_descale, k_cache), ("v_descale", v_descale, v_cache))
    if not any(are_fp8):
        for name, x, _ in pairs:
            if x is not None:
                fail(ValueError, name, "none, since the caches are not float8_e4m3fn", "a tensor")
        return
    if not all(are_fp8):
        name, cache = ("v_cache", v_cache) if are_fp8[0] else ("k_cache", k_cache)
        check_tensor(name, cache)
        fail(TypeError, name, "dtype float8_e4m3fn (that of the other cache)", dtype_name(cache.dtype))
    for name, x, cache in pairs:
        shape = [*cache.shape[:-1]]
        if x is None:
            expected = f"fp32 {shape} (a factor for each row and head), since the caches are float8_e4m3fn"
            fail(ValueError, name, f"{expected} (torch.ones for rows without)", None)
        check_float32(name, x, shape, "that of the cache without its last dimension", cache.device, "the cache")


def write_rows(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, k_factors: torch.Tensor,
    v_factors: torch.Tensor, begins: torch.Tensor,
) -> None:  # fmt: skip
    """Quantises k and v [batch, seqlen_new, heads_kv, dim] into the rows from ``begins[b]`` on of e4m3 caches [batch, capacity,
    heads_kv, dim], and their factors into fp32 [batch, capacity, heads_kv]: on a Hopper GPU in one launch. ``begins``: int32
    [batch], the same for every sequence. The caller knows that the rows are there."""
    if _has_kernel_of_writing(k, v):
        torch.ops.flashmla.append_to_cache(k_cache, v_cache, k.detach(), v.detach(), begins, None, k_factors, v_factors)
        return
    row = torch.arange(k.shape[1], device=k.device) + begins[:1]
    for x, cache, factors in ((k, k_cache, k_factors), (v, v_cache, v_factors)):
        data, scale = quantize_tokens(x)
        # Bits: torch copies no rows of fp8 by an index.
        cache.view(torch.uint8).index_copy_(1, row, data.view(torch.uint8))
        factors.index_copy_(1, row, scale)


def _has_kernel_of_writing(k: torch.Tensor, v: torch.Tensor) -> bool:
    if k.device.type != "cuda" or is_transformed_eagerly() or "sm90" in libraries.unavailable:
        return False
    return sm90.device_refusal(k, v, _largest(), 1) is None and k.stride(-1) == v.stride(-1) == 1


def _rows(call: DecodeCall, begin: int, end: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Rows [begin, end) of all sequences: k, v [batch, rows, heads_kv, dim] and their scales [batch, rows, heads_kv], and which
    positions there are; those behind a sequence's table or cache hold anything."""
    tensors = (call.k, call.v, call.k_descale, call.v_descale)
    position = torch.arange(begin, end, device=call.q.device)
    if call.block_table is None:
        return tuple(x[:, begin:end] for x in tensors), position  # type: ignore[index]
    page_size = call.k.shape[1]
    # Entries behind those needed may be anything; what they name is hidden by the lengths.
    page = call.block_table[:, position // page_size].long().clamp(0, max(call.k.shape[0] - 1, 0))
    return tuple(x[page, position % page_size] for x in tensors), position  # type: ignore[index]


def run_cpu(call: DecodeCall) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) by online softmax over blocks of keys, the rows of a kv head's query heads side by side."""
    with without_autocast(call.q.device):
        return _stream(call)


def _stream(call: DecodeCall) -> tuple[torch.Tensor, torch.Tensor]:
    batch, seqlen_q, heads_q, _ = call.q.shape
    heads_kv, device = call.k.shape[2], call.q.device
    lengths = _numbers(call.cache_seqlens, batch, call.capacity, device)
    starts = _numbers(call.kv_start, batch, 0, device)
    at = (lengths[:, None] - seqlen_q + torch.arange(seqlen_q, device=device))[:, None, None, :, None]
    dtype = torch.promote_types(call.q.dtype, torch.float32)
    # [batch, heads_kv, group, seqlen_q, dim]
    query = call.q.to(dtype).unflatten(2, (heads_kv, -1)).permute(0, 2, 3, 1, 4)
    row_max = query.new_full((*query.shape[:-1], 1), -math.inf)
    row_sum, out = torch.zeros_like(row_max), query.new_zeros(*query.shape[:-1], call.v.shape[-1])
    first, last = _visible_rows(call, lengths, starts)
    for begin in range(first, last, KEYS_AT_A_TIME):
        (k, v, k_scale, v_scale), position = _rows(call, begin, min(begin + KEYS_AT_A_TIME, last))
        key, value = ((x.to(dtype) * s[..., None]).transpose(1, 2)[:, :, None] for x, s in ((k, k_scale), (v, v_scale)))
        visible = (position < lengths[:, None]) & (position >= starts[:, None])
        visible = visible[:, None, None, None, :]
        if call.window_left >= 0:
            visible = visible & (position >= at - call.window_left)
        if call.window_right >= 0:
            visible = visible & (position <= at + call.window_right)
        scores = query @ key.mT * call.scale
        if call.softcap > 0.0:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        scores = scores.masked_fill(~visible, -math.inf)
        new_max = torch.maximum(row_max, scores.amax(-1, keepdim=True))
        relative_to = new_max.masked_fill(new_max == -math.inf, 0.0)
        correction, p = torch.exp(row_max - relative_to), torch.exp(scores - relative_to)
        row_sum = correction * row_sum + p.sum(-1, keepdim=True)
        out = correction * out + reference.sum_over_visible(p, value, visible)
        row_max = new_max
    if call.sinks is not None:
        sink = call.sinks.to(dtype).unflatten(0, (heads_kv, -1))[None, :, :, None, None]
        new_max = torch.maximum(row_max, sink)
        relative_to = new_max.masked_fill(new_max == -math.inf, 0.0)
        correction = torch.exp(row_max - relative_to)
        out, row_sum, row_max = out * correction, row_sum * correction + torch.exp(sink - relative_to), new_max
    is_dead = row_sum == 0.0
    out = (out / row_sum.masked_fill(is_dead, 1.0)).masked_fill(is_dead, 0.0)
    lse = (row_max + row_sum.log()).masked_fill(is_dead, -math.inf)
    # An infinite sink: infinity minus itself made a NaN of the sum.
    lse = torch.where(row_max == math.inf, math.inf, lse)
    return (
        # Not -1 for the last: it would be ambiguous without sequences or queries.
        out.permute(0, 3, 1, 2, 4).reshape(batch, seqlen_q, heads_q, call.v.shape[-1]).to(call.q.dtype),
        lse[..., 0].reshape(batch, heads_q, seqlen_q),
    )


def _visible_rows(call: DecodeCall, lengths: torch.Tensor, starts: torch.Tensor) -> tuple[int, int]:
    """(first, end) of the rows that some query may see: those of all sequences where lengths and starts have no values."""
    batch, seqlen_q = call.q.shape[:2]
    if not (batch and seqlen_q and call.k.shape[0]):
        return 0, 0
    if not all(values_are_readable(x) for x in (lengths, starts)) or has_transforms():
        return 0, call.capacity
    first = int(starts.min())
    if call.window_left >= 0:
        first = max(first, int(lengths.min()) - seqlen_q - call.window_left)
    return first, int(lengths.max())


def _numbers(x: torch.Tensor | None, batch: int, default: int, device: torch.device) -> torch.Tensor:
    return torch.full((batch,), default, device=device) if x is None else x.long()


def run_reference(call: DecodeCall) -> tuple[torch.Tensor, torch.Tensor]:
    assert call.k_descale is not None
    assert call.v_descale is not None
    k, v = (x.double() * s.double()[..., None] for x, s in ((call.k, call.k_descale), (call.v, call.v_descale)))
    out, lse = reference.decode_attention(
        call.q.double(), k, v, sinks=call.sinks, cache_seqlens=call.cache_seqlens, kv_start=call.kv_start,
        block_table=call.block_table, scale=call.scale, window_left=call.window_left, window_right=call.window_right,
        softcap=call.softcap,
    )  # fmt: skip
    return out.to(call.q.dtype), lse.to(torch.promote_types(call.q.dtype, torch.float32))


def _largest() -> tuple[int, int]:
    """The head dims, of q and k and of v, that the kernel takes."""
    assert libraries.sm90_limits is not None  # otherwise the library is unavailable
    return (libraries.sm90_limits.largest_e4m3_decode,) * 2


def _sm90_refusal(call: DecodeCall) -> str | None:
    if "sm90" in libraries.unavailable:
        return libraries.unavailable["sm90"]
    assert libraries.sm90_limits is not None  # otherwise the library is unavailable
    multiple = libraries.sm90_limits.e4m3_multiple
    return sm90.device_refusal(call.q, call.v, _largest(), multiple) or sm90.cache_alignment_refusal(call)


def run_sm90(call: DecodeCall) -> tuple[torch.Tensor, torch.Tensor]:
    call = sm90.with_readable_query(call)
    inputs = [getattr(call, name) for name in _NAMES]
    inputs[3:3] = [call.k_descale, call.v_descale]
    if is_traced_or_transformed():
        return torch.ops.flashmla.flash_attn_decode_e4m3(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.flashmla.flash_attn_decode_e4m3.default(*inputs)


Run = Callable[[DecodeCall], tuple[torch.Tensor, torch.Tensor]]
IMPLEMENTATIONS: dict[str, tuple[Callable[[DecodeCall], str | None], Run]] = {
    "sm90": (_sm90_refusal, run_sm90),
    "cpu": (lambda call: cpu.device_refusal(call.q), run_cpu),
    "reference": (lambda call: None, run_reference),
}
