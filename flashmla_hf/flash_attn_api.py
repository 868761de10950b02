"""The functions of the package flash-attn, for code written against it."""

from __future__ import annotations

import re
from typing import NoReturn

import torch

from flashmla_hf.decode import decode_attention
from flashmla_hf.dispatch import attention
from flashmla_hf.fp8.quantization import DTYPE
from flashmla_hf.scalars import fail, flag, integer
from flashmla_hf.torch_state import has_transforms, values_are_readable
from flashmla_hf.validation import check_cached_layout, check_int32

# Our names of arguments -> flash-attn's, where they differ.
_NAMES = {
    "scale": "softmax_scale",
    "is_causal": "causal",
    "window": "window_size",
    "sinks": "s_aux",
    "cu_seqlens_kv": "cu_seqlens_k",
    "max_seqlen_kv": "max_seqlen_k",
    "kv_start": "cache_leftpad",
}
_LARGEST_INT32 = 2**31 - 1


def _raise_under_its_names(error: Exception, **names: str) -> NoReturn:
    """Raises ``error`` with the name of the argument that its caller gave, by _NAMES and ``names``."""
    names = _NAMES | names
    found = re.match(r"(\w+(?: attention)?: )(\w+)(.*)", str(error), re.DOTALL)
    if found is None or found[2] not in names:
        raise error
    raise type(error)(found[1] + names[found[2]] + found[3]) from None


def _refuse_fp8(way_out: str, **tensors: torch.Tensor) -> None:
    """Under the name that the caller gave: their factors are arguments that these functions have not."""
    for name, x in tensors.items():
        if getattr(x, "dtype", None) == DTYPE:
            fail(TypeError, name, f"dtype float32, float16 or bfloat16 (for fp8 {way_out})", "float8_e4m3fn")


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, None]:
    """:func:`flashmla_hf.attention` under flash-attn 2's name and argument order, for code written against that package.

    q, k, v [batch, seqlen, heads, dim]; ``s_aux`` [heads_q] are the sinks. With ``return_attn_probs`` returns
    ``(out, lse, None)``: the weights themselves are never materialised. ``alibi_slopes`` raises.
    """
    return _flash_attn(
        q, k, v, alibi_slopes, return_attn_probs, dropout_p=dropout_p, scale=softmax_scale, is_causal=causal,
        window=window_size, softcap=softcap, deterministic=deterministic, sinks=s_aux,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, None]:
    """:func:`flashmla_hf.attention` on packed [total, heads, dim] tensors under flash-attn 2's name and argument order.

    As :func:`flash_attn_func`; ``block_table`` (a paged cache) raises.
    """
    if block_table is not None:
        fail(ValueError, "block_table", "none (gather the pages into packed k and v first)", "a tensor")
    return _flash_attn(
        q, k, v, alibi_slopes, return_attn_probs, cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_kv=max_seqlen_k, dropout_p=dropout_p, scale=softmax_scale,
        is_causal=causal, window=window_size, softcap=softcap, deterministic=deterministic, sinks=s_aux,
    )  # fmt: skip


def _flash_attn(q, k, v, alibi_slopes, return_attn_probs, **options):
    if alibi_slopes is not None:
        fail(ValueError, "alibi_slopes", "none (pass the bias to flashmla_hf.attention as attn_mask)", "a tensor")
    _refuse_fp8("call flashmla_hf.attention, with q_descale, k_descale and v_descale", q=q, k=k, v=v)
    # flash-attn's deterministic=False is a default, not a wish: the global switches still count.
    options["deterministic"] = flag("deterministic", options["deterministic"]) or None
    try:
        out = attention(q, k, v, return_lse=return_attn_probs, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        _raise_under_its_names(error, return_lse="return_attn_probs")
    return (*out, None) if return_attn_probs else out


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """:func:`flashmla_hf.decode_attention` under flash-attn 2's name and argument order.

    q [batch, seqlen_q, heads, dim]; the caches [batch, capacity, heads_kv, dim], or with ``block_table`` [num_pages, page_size,
    heads_kv, dim]. k and v are written into the caches at ``cache_seqlens`` first. As there, causal and window_size are aligned
    to the last key, and ``cache_leftpad`` is the first key of each sequence. ``cache_batch_idx`` int32 [batch] is the cache's
    row of each sequence, on a CPU refused if there is no such row; it needs a capacity that is a multiple of 16. ``s_aux``
    [heads] are the sinks. ``rotary_cos``, ``rotary_sin``, ``alibi_slopes`` and a ``num_splits`` above 1 raise.

    Returns out, and with ``return_softmax_lse`` also lse fp32 [batch, heads, seqlen_q].
    """
    for name, x in (("rotary_cos", rotary_cos), ("rotary_sin", rotary_sin)):
        if x is not None:
            fail(ValueError, name, "none (rotate q and k before the call)", "a tensor")
    if alibi_slopes is not None:
        fail(ValueError, "alibi_slopes", "none (pass the bias to flashmla_hf.attention as attn_mask)", "a tensor")
    way_out = "call flashmla_hf.decode_attention with caches in fp8, k_descale and v_descale"
    _refuse_fp8(way_out, q=q, k_cache=k_cache, v_cache=v_cache)
    check_cached_layout(q, k_cache, v_cache, block_table)
    if cache_seqlens is not None and not isinstance(cache_seqlens, (torch.Tensor, list, tuple)):
        length = integer("cache_seqlens", cache_seqlens, "an int, or a torch.Tensor int32 [batch]")
        if not 0 <= length <= _LARGEST_INT32:
            fail(ValueError, "cache_seqlens", f"from 0 to {_LARGEST_INT32}", length)
        cache_seqlens = torch.full((q.shape[0],), length, dtype=torch.int32, device=q.device)
    names = {"return_lse": "return_softmax_lse"}
    if cache_batch_idx is not None:
        if block_table is not None:
            fail(ValueError, "cache_batch_idx", "none with block_table (which says where a sequence lies)", "a tensor")
        _check_cache_batch_idx(cache_batch_idx, q, k_cache.shape[0])
        if k_cache.shape[1] % 16 != 0:
            expected = "none, or a capacity that is a multiple of 16 (or pass k_cache[cache_batch_idx])"
            fail(ValueError, "cache_batch_idx", expected, f"a tensor and a capacity of {k_cache.shape[1]}")
        block_table = cache_batch_idx[:, None]  # a row of the cache is a page
        names["block_table"] = "cache_batch_idx"
    try:
        return decode_attention(
            q, k_cache, v_cache, cache_seqlens=cache_seqlens, block_table=block_table, kv_start=cache_leftpad, k=k, v=v,
            scale=softmax_scale, is_causal=causal, window=window_size, softcap=softcap, sinks=s_aux, num_splits=num_splits,
            return_lse=return_softmax_lse,
        )  # fmt: skip
    except (TypeError, ValueError, RuntimeError) as error:
        _raise_under_its_names(error, **names)


def _check_cache_batch_idx(cache_batch_idx: torch.Tensor, q: torch.Tensor, rows: int) -> None:
    """Under its own name: decode_attention would call it block_table."""
    check_int32("cache_batch_idx", cache_batch_idx, q)
    if tuple(cache_batch_idx.shape) != (q.shape[0],):
        fail(ValueError, "cache_batch_idx", f"shape [{q.shape[0]}] (batch of q)", [*cache_batch_idx.shape])
    if q.device.type != "cpu" or not values_are_readable(cache_batch_idx) or has_transforms():
        return
    for b, row in enumerate(cache_batch_idx.tolist()):
        if not 0 <= row < rows:
            fail(ValueError, "cache_batch_idx", f"rows of the cache, 0 to {rows - 1}", f"{row} for sequence {b}")
