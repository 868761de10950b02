"""The functions of the package flash-attn, for code written against it."""

from __future__ import annotations

import torch

from flashmla_hf.dispatch import attention
from flashmla_hf.validation import fail


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
    # flash-attn's deterministic=False is a default, not a wish: the global switches still count.
    options["deterministic"] = options["deterministic"] or None
    out = attention(q, k, v, return_lse=return_attn_probs, **options)
    return (*out, None) if return_attn_probs else out
