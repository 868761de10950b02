"""The operators of caches, ``torch.ops.flashmla.flash_attn_decode`` and ``append_to_cache``: schemas, fake kernels, refusals.

It stands beside those of :mod:`flashmla_hf.ops` and is as strict: arguments are resolved, the C++ host code checks tensors for
memory safety, and it raises for anything that its backend cannot do. :mod:`flashmla_hf.decode` is the public function.

Sequence b has ``L = cache_seqlens[b]`` keys. Query i stands at key position ``p = L - seqlen_q + i`` and sees the keys
``max(kv_start[b], p - window_left) ... min(L - 1, p + window_right)``; a negative window is unbounded. Key j is row ``j`` of
k[b], or with ``block_table`` row ``j % page_size`` of page ``block_table[b, j // page_size]``.

=============  =======================================================================  ===========================
q              [batch, seqlen_q, heads_q, head_dim_qk]                                  fp32, fp16, bf16
k, v           [batch, capacity, heads_kv, head_dim_qk or head_dim_v]                   dtype of q
k, v           with ``block_table``: [num_pages, page_size, heads_kv, head_dim_...]     dtype of q
sinks          [heads_q]                                                                fp32
cache_seqlens  [batch]; None: capacity, or pages of a sequence * page_size              int32, device of q
kv_start       [batch]; None: 0                                                         int32, device of q
block_table    [batch, pages of a sequence]                                             int32, device of q
out            [batch, seqlen_q, heads_q, head_dim_v]                                   dtype of q, contiguous
lse            [batch, heads_q, seqlen_q]                                               fp32, natural log
=============  =======================================================================  ===========================

``page_size`` is a multiple of :data:`PAGE_SIZE_MULTIPLE`. ``can_split`` lets CTAs share the keys of a sequence, in a way that
depends on the rest of the batch; it changes nothing on a CPU. On a GPU the values of the int32 tensors are not read back:
lengths are clamped to the capacity, and pages outside the cache hold zeros. On a CPU such values raise.

``append_to_cache(k_cache, v_cache, k, v, cache_seqlens, block_table, k_descale, v_descale)`` writes row i of k[b] and v[b],
[batch, seqlen_new, heads_kv, head_dim_...], where key ``cache_seqlens[b] + i`` lies, and returns ``cache_seqlens +
seqlen_new``. Hopper GPUs alone have it, for fp16 and bf16. A key beyond the rows that a sequence may have, or of a page outside
the cache, is not written. v_cache and v are None if the values are columns of k. No row of k or v may lie where this call
writes. Caches of float8_e4m3fn have k_descale and v_descale, fp32 [batch or num_pages, rows, heads_kv]: k and v are quantised
as :func:`flashmla_hf.fp8.quantization.quantize_tokens` does, and their factors written there. For other caches they are None.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass, fields

import torch
from torch.autograd import forward_ad

from flashmla_hf.ops import check_tensor, dtype_name, refuse, schema_arguments
from flashmla_hf.torch_state import is_traced_or_transformed

OPERATOR = "flash_attn_decode"
PAGE_SIZE_MULTIPLE = 16  # csrc/checks_decode.h


@dataclass(slots=True)  # not frozen, as ops.Arguments
class DecodeArguments:
    """The arguments of ``flash_attn_decode``. The order of the fields is the operator's; Python spells it here alone."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sinks: torch.Tensor | None
    cache_seqlens: torch.Tensor | None
    kv_start: torch.Tensor | None
    block_table: torch.Tensor | None
    scale: float
    window_left: int
    window_right: int
    softcap: float
    can_split: bool


_NAMES = tuple(field.name for field in fields(DecodeArguments))

_SCHEMA = f"({', '.join(schema_arguments(DecodeArguments))}) -> (Tensor out, Tensor lse)"
torch.library.define(f"flashmla::{OPERATOR}", _SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.register_fake(f"flashmla::{OPERATOR}")
def _decode_fake(q, k, v, *others):
    return outputs_of(OPERATOR, q, k, v, q.dtype, *others)


def outputs_of(operator, q, k, v, dtype_kv, sinks, cache_seqlens, kv_start, block_table, *_options):
    """(out, lse) of a call without its numbers: new tensors like q. Raises for shapes and dtypes that do not fit."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # imports sympy, which only traced calls need

    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            refuse(operator, name, "4 dimensions", f"shape {[*x.shape]}")
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        refuse(operator, "q", "dtype float32, float16 or bfloat16", dtype_name(q.dtype))
    batch, seqlen_q, heads_q, head_dim = q.shape
    pages, page_size, heads_kv, _ = k.shape
    if block_table is not None:
        if block_table.dim() != 2:
            refuse(operator, "block_table", f"shape [{batch}, pages of a sequence]", f"shape {[*block_table.shape]}")
        check_tensor(operator, "block_table", block_table, q, torch.int32, (batch, block_table.shape[1]))
        if guard_or_false(page_size < 1) or guard_or_false(page_size % PAGE_SIZE_MULTIPLE != 0):
            refuse(
                operator, "k", f"a page_size (its size 1) that is a multiple of {PAGE_SIZE_MULTIPLE}", f"{page_size}"
            )
    check_tensor(
        operator, "k", k, q, dtype_kv, (batch if block_table is None else pages, page_size, heads_kv, head_dim)
    )
    check_tensor(operator, "v", v, q, dtype_kv, (pages, page_size, heads_kv, v.shape[-1]))
    if guard_or_false(heads_kv == 0) or guard_or_false(heads_q % heads_kv != 0):
        refuse(operator, "q", f"a multiple of the {heads_kv} kv heads", f"{heads_q} heads")
    check_tensor(operator, "sinks", sinks, q, torch.float32, (heads_q,))
    check_tensor(operator, "cache_seqlens", cache_seqlens, q, torch.int32, (batch,))
    check_tensor(operator, "kv_start", kv_start, q, torch.int32, (batch,))
    out = q.new_empty((batch, seqlen_q, heads_q, v.shape[-1]))
    return out, q.new_empty((batch, heads_q, seqlen_q), dtype=torch.float32)


def refuse_gradients(subject: str, tensors: typing.Iterable[tuple[str, torch.Tensor | None]]) -> None:
    """Raises for a tensor that asks for a derivative, which attention to caches does not have. Callers refuse other types."""
    for name, x in tensors:
        if not isinstance(x, torch.Tensor):
            continue
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{subject}: {name}: expected a tensor that requires no gradient, got one that does: attention to a cache has "
                "no derivative. Call it under torch.no_grad(), or call flashmla_hf.attention on k and v (on latents, "
                "latent_attention)"
            )
        # dynamo does not trace unpack_dual; the operator checks again.
        is_tracing = torch.compiler.is_compiling()
        if not is_tracing and forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(
                f"{subject}: {name}: expected no tangent, got a dual tensor: attention to a cache has no derivative. Call "
                "flashmla_hf.attention with impl='reference' on k and v"
            )


def _decode_without_gradients(*inputs):
    refuse_gradients(OPERATOR, zip(_NAMES[:4], inputs, strict=False))
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.flashmla.flash_attn_decode.default(*inputs)


_library = torch.library.Library("flashmla", "FRAGMENT")
_library.impl(OPERATOR, _decode_without_gradients, "Autograd")

_APPEND = "append_to_cache"
_APPENDED = (
    "Tensor(a!) k_cache",
    "Tensor(b!)? v_cache",
    "Tensor k",
    "Tensor? v",
    "Tensor cache_seqlens",
    "Tensor? block_table",
    "Tensor(c!)? k_descale=None",
    "Tensor(d!)? v_descale=None",
)
torch.library.define(f"flashmla::{_APPEND}", f"({', '.join(_APPENDED)}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.register_fake(f"flashmla::{_APPEND}")
def _append_fake(k_cache, v_cache, k, v, cache_seqlens, block_table, k_descale=None, v_descale=None):
    return k.new_empty((k.shape[0],), dtype=torch.int32)


def _append_without_gradients(k_cache, v_cache, k, v, *others):
    refuse_gradients(_APPEND, (("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v)))
    with torch._C._AutoDispatchBelowAutograd():
        lengths = torch.ops.flashmla.append_to_cache.default(k_cache, v_cache, k, v, *others)
    for written in (k_cache, v_cache, *others[2:]):
        if written is not None:
            torch.autograd.graph.increment_version(written)  # autograd sees that a saved tensor was written
    return lengths


_library.impl(_APPEND, _append_without_gradients, "Autograd")


def flash_attn_decode(arguments: DecodeArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of ``torch.ops.flashmla.flash_attn_decode``. The caller has refused gradients."""
    inputs = [getattr(arguments, name) for name in _NAMES]
    if is_traced_or_transformed():
        return torch.ops.flashmla.flash_attn_decode(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.flashmla.flash_attn_decode.default(*inputs)
