"""Patch "mla_decode": decoding steps of multi-head latent attention attend to the latents, and never expand them.

DeepSeek-V2's attention computes keys and values of every head from one latent c of ``kv_lora_rank`` numbers a token, and one
rotated key r that all heads share. With ``kv_b_proj``'s rows K_h and V_h of head h, and the head's query (q, p):

    score_h = q · K_h c + p · r = (q K_h, p) · (c, r)        out_h = Σ w V_h c = V_h (Σ w c)

So a decoding step folds K_h into the query and V_h into the output. All heads then attend to the same rows (c, r), whose first
columns are the values. Without the patch, Transformers expands its cache to the keys and values of all heads at each step.

==============================================  ========================================================================
the call                                        what a patched block does
==============================================  ========================================================================
no cache                                        nothing else than before
up to :data:`decoding.MOST_QUERIES` new tokens  writes their rows (c, r) into the cache, and attends to the cache's rows
a row, no gradients, evaluation mode
every other call with a cache                   writes their rows, expands what the cache returns, and attends as before
==============================================  ========================================================================

The cache holds the rows as keys, [batch, 1, tokens, kv_lora_rank + qk_rope_head_dim], and values of width 0. Expanding n rows
takes ``rank (nope + v)`` multiplications a row and head; attention to rows takes ``2 rank - nope - v`` more for each pair of a
query and a row. They are equal at 171 queries in DeepSeek-V3; the kernels that read caches are made for a few dozen.

Source: DeepSeek-AI, "DeepSeek-V2", arXiv 2405.04434, section 2.1.2 (absorption of W^UK and W^UV).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers import Cache

from flashmla_hf import decode
from flashmla_hf.hf import decoding, fp8_cache, names, paged
from flashmla_hf.notices import warn_once
from flashmla_hf.patches import forwards, latent_rows, linear, quantized, structure, weights
from flashmla_hf.patches.replacements import Replacements

NAME = "mla_decode"
EXPAND, UPDATE, INTERFACE = "expand_kv", "update", "attention_interface"  # names in Transformers' forwards
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TOLERANCE = 1e-3  # of the trial, relative to the largest number, in float32; other dtypes have their own


class _Rows:
    """Stands between a patched block and its cache in one call: the cache holds rows (c, r) instead of the two parts."""

    def __init__(self, absorption: Absorption, cache: Any, may_absorb: bool) -> None:
        self._absorption, self._cache, self._may_absorb = absorption, cache, may_absorb

    def update(
        self, latents: torch.Tensor, rotated: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the new rows, and returns what ``expand_kv`` gets: the parts [batch, 1, tokens, rank] and
        [batch, 1, tokens, rotated width] to expand, or all rows and a part of width 0 to attend to."""
        rows = torch.cat((latents, rotated), dim=-1)
        self._absorption.check_cache(self._cache, layer_idx)
        kept, _ = self._cache.update(rows, rows[..., :0], layer_idx, *args, **kwargs)
        latent_rows.mark(self._cache, layer_idx)
        if self._may_absorb and self._absorption.takes(rows, kept):
            return kept, kept[..., :0]
        if kept.shape[2] == rows.shape[2]:
            return latents, rotated  # the whole cache was computed just now
        return kept[..., : latents.shape[-1]], kept[..., latents.shape[-1] :]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class Absorption:
    """How one attention block attends to rows of latents (:class:`decoding.Latents`)."""

    def __init__(self, attention: Any, name: str) -> None:
        self.attention, self.name = attention, name
        self.nope, self.rotated = attention.qk_nope_head_dim, attention.qk_rope_head_dim
        self.head_dim_v = attention.kv_lora_rank
        self.heads = attention.kv_b_proj.out_features // (self.nope + attention.v_head_dim)
        self.width = self.head_dim_v + self.rotated

    def takes(self, rows: torch.Tensor, kept: torch.Tensor) -> bool:
        """Whether the step of the new ``rows`` attends to the ``kept`` ones: what the module's table says."""
        attention = self.attention
        if rows.shape[2] > decoding.MOST_QUERIES or attention.training or not structure.uses_flashmla(attention):
            return False
        if torch.is_grad_enabled() and (
            rows.requires_grad or kept.requires_grad or any(p.requires_grad for p in attention.parameters())
        ):
            return False
        if kept.shape[2] <= self.head_dim_v and not self._is_readable(rows):
            return False  # its matrix costs as many rows as there are latent columns
        reason = no_kernel(kept, self.head_dim_v, self.heads, rows.shape[2])
        if reason is not None:
            warn_once(
                f"flashmla_hf.patch: patch {NAME!r}: {self.name} expands its latents at each step, as without the patch: no "
                f"kernel attends to them here. The reason: {reason}.",
                stacklevel=3,
            )
        return reason is None

    def absorb(self, query: torch.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        keys, values = self._matrices(query)
        batch, _, seqlen, _ = query.shape
        q, rotated = query[..., : self.nope], query[..., self.nope :]
        by_head = q.transpose(0, 1).reshape(-1, batch * seqlen, self.nope).to(keys.dtype)
        latent = torch.bmm(by_head, keys).view(-1, batch, seqlen, self.head_dim_v).transpose(0, 1)

        def expand(out: torch.Tensor) -> torch.Tensor:
            by_head = out.permute(2, 0, 1, 3).reshape(-1, batch * seqlen, self.head_dim_v).to(values.dtype)
            # Models call .view on the result.
            return (
                torch.bmm(by_head, values.mT).view(-1, batch, seqlen, values.shape[1]).permute(1, 2, 0, 3).contiguous()
            )

        return torch.cat((latent, rotated.to(latent.dtype)), dim=-1), expand

    def check_cache(self, cache: Any, layer_idx: int) -> None:
        """Raises PatchError if ``cache`` cannot hold rows, before anything is written."""
        got = None
        layers = getattr(cache, "layers", ())
        layer = layers[layer_idx] if layer_idx < len(layers) else None
        keys = getattr(layer, "keys", None)
        if isinstance(cache, paged.PagedAttentionCache):
            got = (
                "the cache of continuous batching (its pages have the shape of all heads). Call generate(), or "
                "flashmla_hf.unpatch(model) before generate_batch"
            )
        elif isinstance(cache, fp8_cache.Fp8Cache) or hasattr(layer, "_quantize"):
            name = type(cache if isinstance(cache, fp8_cache.Fp8Cache) else layer).__name__
            got = f"a {name}. Use a DynamicCache or a StaticCache"
        elif keys is not None and keys.numel() > 0 and keys.shape[-1] != self.width:
            got = (
                f"keys of width {keys.shape[-1]}: it was filled without the patch. Begin with an empty cache after "
                "flashmla_hf.patch"
            )
        if got is not None:
            raise structure.PatchError(
                f"flashmla_hf.patch: patch {NAME!r}: {self.name}: cache: expected one that holds rows of {self.width} numbers, "
                f"got {got}"
            )

    def _is_readable(self, x: torch.Tensor) -> bool:
        """Whether kv_b_proj's weight may be read: a plain linear layer whose weight is here."""
        projection = self.attention.kv_b_proj
        if type(projection) is not nn.Linear or torch.compiler.is_compiling():
            return type(projection) is nn.Linear
        return linear.is_plain(projection) and weights.unreadable(projection, x) is None

    def _matrices(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K [heads, nope, rank] and V [heads, v, rank] of kv_b_proj.

        The matrix of a linear layer is its result for the identity, whatever its class does with its weight: adapters, packed
        weights, weights that hooks bring for each call.
        """
        projection = self.attention.kv_b_proj
        if self._is_readable(x):
            matrix = projection.weight
        else:
            matrix = projection(torch.eye(self.head_dim_v, dtype=x.dtype, device=x.device)).mT
        heads = matrix.view(-1, self.nope + self.attention.v_head_dim, self.head_dim_v)
        return heads[:, : self.nope], heads[:, self.nope :]


def no_kernel(rows: torch.Tensor, head_dim_v: int, heads: int, seqlen_q: int = 1) -> str | None:
    """The reason why no kernel attends to ``rows`` [batch, 1, tokens, width] with so many heads and queries a row; ``None`` if
    one does."""
    rows = rows.transpose(1, 2)
    query = rows[:, :seqlen_q].expand(-1, -1, heads, -1)  # of the shape of the queries: none are computed yet
    return decode.kernel_refusal(query, rows, rows[..., :head_dim_v], is_latent=True)


def patch_mla_decode(model: nn.Module, replacements: Replacements) -> None:
    """Replaces ``forward`` and ``expand_kv`` of every block of latent attention, after a trial of each class."""
    tried: set[type] = set()
    for name, attention in structure.latent_attentions(model, NAME).items():
        where = f"{name} ({type(attention).__name__})"
        if (reason := _unsupported(attention)) is not None:
            raise structure.refuse(model, NAME, where, *reason)
        absorption = Absorption(attention, where)
        if type(attention) not in tried:
            tried.add(type(attention))
            _try(model, where, absorption)
        replacements.set(attention, decoding.LATENTS, absorption)
        replacements.set(attention, "forward", _with_rows(attention, absorption))
        replacements.set(attention, EXPAND, _expanding(attention))


def _unsupported(attention: Any) -> tuple[str, str] | None:
    """(expected, got) if ``attention`` cannot attend to latents; else ``None``."""
    if hasattr(attention, "indexer"):
        return "attention to all keys", "sparse attention: an indexer selects the keys of each query"
    forward = forwards.that_names(type(attention), EXPAND)
    if forward is None or not callable(getattr(type(attention), EXPAND, None)):
        return (
            f"a forward that caches latents and expands them by {EXPAND}",
            "one that caches expanded keys and values",
        )
    for source, target in ((UPDATE, EXPAND), (EXPAND, INTERFACE)):
        if (use := forwards.other_use(forward, source, target)) is not None:
            return f"a forward that only hands the results of {source} to {target}", f"{use!r}"
    if getattr(attention.kv_b_proj, "bias", None) is not None:
        return "kv_b_proj without a bias", "one"
    if attention.qk_rope_head_dim < 1:
        return "a rotated part of the keys", f"qk_rope_head_dim={attention.qk_rope_head_dim}"
    implementation = structure.implementation_of(attention)
    if not structure.uses_flashmla(attention) or names.is_fp8(implementation):
        return "attn_implementation='flashmla' (it reads latents)", repr(implementation)
    return None


def _try(model: nn.Module, where: str, absorption: Absorption) -> None:
    """Compares scores and sums of three random rows with those of the block's own expanded keys and values.

    It also refuses a device without a kernel: steps by the reference would take longer than without the patch.
    """
    attention, projection = absorption.attention, absorption.attention.kv_b_proj
    parameters = [
        *projection.parameters(),
        *attention.kv_a_layernorm.parameters(),
    ]  # those of packed weights have no such dtype
    one = next(p for p in parameters if p.dtype in DTYPES)
    rows = torch.empty(1, 1, 3, absorption.width, dtype=one.dtype, device=one.device)
    if (reason := no_kernel(rows, absorption.head_dim_v, absorption.heads)) is not None:
        expected = f"a device with a kernel for latents of {absorption.head_dim_v} of {absorption.width} columns"
        raise structure.refuse(model, NAME, where, expected, reason)
    if rows.is_meta or (rows.device.type == "cpu" and any(map(quantized.is_4bit, projection.modules()))):
        return  # loaded later; or a call would pack the weight, and no other patch could read it
    was_training = [m for m in projection.modules() if m.training]
    try:
        for module in was_training:  # dropout of an adapter
            module.training = False
        differing = _differing(absorption, rows)
    finally:
        for module in was_training:
            module.training = True
    if differing is not None:
        expected = f"keys and values that are kv_b_proj's of {EXPAND}'s inputs"
        raise structure.refuse(model, NAME, where, expected, differing)


@torch.no_grad()
def _differing(absorption: Absorption, rows: torch.Tensor) -> str | None:
    """What differs between attention to ``rows``, overwritten by random ones, and to what they expand to; or ``None``."""
    attention = absorption.attention
    generator = torch.Generator().manual_seed(0)
    rows.copy_(torch.randn(rows.shape, generator=generator))
    latents, rotated = rows[..., : absorption.head_dim_v], rows[..., absorption.head_dim_v :]
    keys, values = getattr(type(attention), EXPAND)(attention, latents, rotated)  # [1, heads, 3, dim]
    query = torch.randn(1, keys.shape[1], 2, keys.shape[-1], generator=generator).to(rows)
    weight = torch.rand(1, keys.shape[1], 2, 3, generator=generator).to(rows)
    latent_query, expand = absorption.absorb(query)
    pairs = (
        ("scores", latent_query @ rows.mT, query @ keys.mT),
        ("values", expand((weight @ latents).transpose(1, 2)), (weight @ values).transpose(1, 2)),
    )
    allowed = max(TOLERANCE, 16 * torch.finfo(rows.dtype).eps)
    for what, got, wanted in pairs:
        error = (got.float() - wanted.float()).abs().max() / wanted.float().abs().max().clamp(min=1e-12)
        if not error <= allowed:
            return f"{what} that differ by {float(error):.2g} of the largest"
    return None


def _expanding(attention: Any) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """``expand_kv`` of ``attention``: rows to attend to, which :class:`_Rows` marks by a part of width 0, stay as they are."""
    expand = getattr(attention, EXPAND)

    @wraps(expand)
    def expand_kv(latents: torch.Tensor, rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return (latents, None) if rotated.shape[-1] == 0 else expand(latents, rotated)

    return expand_kv


def _with_rows(attention: Any, absorption: Absorption) -> Callable[..., Any]:
    """A forward for ``attention`` that gives it :class:`_Rows` in place of its cache."""
    forward = attention.forward

    @wraps(forward)
    def latent_forward(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(x, Cache) for x in args):
            raise structure.PatchError(
                f"flashmla_hf.patch: patch {NAME!r}: {absorption.name}: expected the cache by its name, got it by position"
            )
        # Packed sequences have no place in the kernels of caches.
        may_absorb = kwargs.get("cu_seq_lens_q") is None
        for name in structure.CACHE_NAMES:
            if kwargs.get(name) is not None:
                kwargs[name] = _Rows(absorption, kwargs[name], may_absorb)
        return forward(*args, **kwargs)

    return latent_forward
