"""Decoding steps of a model: attention that reads keys and values where they lie in Transformers' caches.

A cache of latents (the patch "mla_decode") holds one row a token, whose first columns are the values. The patch leaves a
:class:`Latents` on the layer, and its layers call the attention function with ``value=None``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from flashmla_hf import decode
from flashmla_hf.hf import boundaries, paged

# Queries a row up to which keys are read where they lie in a cache. More of them share K and V among tiles of queries.
MOST_QUERIES = 16
LATENTS = "_flashmla_latents"  # the attribute of a layer


class Latents(Protocol):
    """How a layer attends to latents: rows [batch, 1, seqlen_kv, width] whose first ``head_dim_v`` columns are values."""

    head_dim_v: int

    def absorb(self, query: torch.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """The layer's queries [batch, heads_q, seqlen_q, head_dim_qk] as queries to latents [..., width]; and the function that
        makes sums of latents [batch, seqlen_q, heads_q, head_dim_v] the layer's output [..., the layer's own head_dim_v]."""


def latents_of(module: torch.nn.Module) -> Latents:
    """What the patch left on ``module``, which passed no values."""
    found: Latents | None = getattr(module, LATENTS, None)
    if found is None:
        raise ValueError(f"flashmla in {type(module).__name__}: value: expected a torch.Tensor, got None")
    return found


def from_rows(q, k, v, *, deterministic=None, precision: None = None, **options: Any) -> torch.Tensor:
    """Attention to all rows of a cache of latents, k, whose columns v is a view of. As ``flashmla_hf.attention``."""
    out = decode.decode_attention(q, k, None, head_dim_v=v.shape[-1], **options)
    assert isinstance(out, torch.Tensor)
    return out


def from_cache(q, k, v, ranges: boundaries.KeyRanges, options, are_latents: bool = False) -> torch.Tensor | None:
    """Decoding with padding or with the unused rows of a static cache, where k and v lie; ``None`` if no kernel does that.

    Either every query sees the keys of ``ranges``, or the last query stands at the last key and ``ranges`` all end there.
    """
    tensors = [x for x in (q, k, v, options["sinks"]) if x is not None]
    needs_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if needs_gradients or not decode.has_kernel(q, k, v, are_latents):
        return None
    names = ("scale", "softcap", "sinks", "is_causal", "window")
    options = {name: options[name] for name in names} | {"cache_seqlens": ranges.end, "kv_start": ranges.start}
    if are_latents:
        return from_rows(q, k, v, **options)
    out = decode.decode_attention(q, k, v, **options)
    assert isinstance(out, torch.Tensor)
    return out


def from_pages(q, pages: paged.Pages, k, v, options) -> torch.Tensor:
    """A decoding step of continuous batching. q, k, v [1, num_sequences, heads, dim], a new token of each sequence."""
    q, k, v = (x[0][:, None].to(pages.k_cache.dtype) for x in (q, k, v))
    out = decode.decode_attention(
        q, pages.k_cache, pages.v_cache, cache_seqlens=pages.cache_seqlens, block_table=pages.block_table, k=k, v=v,
        **options,
    )  # fmt: skip
    assert isinstance(out, torch.Tensor)
    return out[:, 0][None]
