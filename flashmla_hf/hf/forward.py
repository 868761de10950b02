"""The forward of ``attn_implementation="flashmla"`` in Hugging Face Transformers.

The attention layers of a model call :func:`attention_forward`. It turns Transformers' calling convention (masks, window
conventions, packed rows, caches, autocast) into one call of :func:`flashmla_hf.attention`.
"""

from __future__ import annotations

from typing import Any

import torch

from flashmla_hf import reference
from flashmla_hf.dispatch import attention
from flashmla_hf.hf import boundaries, check, decoding, heads, masks, paged, transformers_private
from flashmla_hf.notices import warn_once
from flashmla_hf.torch_state import values_are_readable


# Longer than 80 lines: more than half of it is Transformers' signature and the meaning of its arguments.
def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | torch.Tensor | None = None,
    max_length_k: int | torch.Tensor | None = None,
    output_attentions: bool | None = False,
    deterministic: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention for one layer of a Transformers model, by Transformers' calling convention.

    Args:
        module: the layer; read for ``is_causal``, ``config`` and ``layer_idx``.
        query: [batch, heads_q, seqlen_q, head_dim_qk], any strides; float32, float16 or bfloat16. Under autocast query, key
            and value may differ in dtype.
        key, value: [batch, heads_kv, seqlen_kv, head_dim_qk or head_dim_v]; heads not repeated. A static cache passes all
            its rows. ``None`` as value: key holds latents (:class:`decoding.Latents`), from a layer of the patch "mla_decode".
        attention_mask: a mask of :mod:`masks`, or a user's [batch, 1 or heads_q, seqlen_q, seqlen_kv], boolean (true
            keeps) or additive. Either defines the visible keys alone: no causal mask or window is added. Or key padding
            [batch, seqlen_kv], bool or a number that is not 0 for a real token, from models that skip the mask layer.
        dropout: probability of dropping a weight; exact, outside the fused kernel, with one warning.
        scaling: factor on the scores; ``None`` means ``head_dim_qk ** -0.5``.
        is_causal, sliding_window: causality (``None`` means ``module.is_causal``), and the number of keys that a causal query
            sees, itself included. Both apply if the mask does not define them (:func:`_without_mask`).
        softcap: as in :func:`flashmla_hf.attention`. s_aux: [heads_q] sinks, with gradient.
        position_bias: [1 or batch, heads_q, seqlen_q, at least seqlen_kv], added to the scores (T5); exact, outside the
            fused kernel, with one warning.
        position_ids: [1 or batch, seqlen_q]; read to find packed rows if the mask does not define them.
        cu_seq_lens_q, cu_seq_lens_k: [num_sequences + 1] boundaries of packed sequences over the flattened tokens; they
            replace a 2-D mask, which says less.
        max_length_q, max_length_k: the lengths of the longest packed sequences, as numbers or tensors.
        output_attentions: also return the weights, computed exactly outside the kernel, with one warning.
        deterministic: as in :func:`flashmla_hf.attention`; ``None`` and ``False`` follow torch's switches.
        **kwargs: the arguments of continuous batching (:mod:`paged`), and everything else that a model passes down.

    Returns:
        ``(out, weights)``: out [batch, seqlen_q, heads_q, head_dim_v]; weights [batch, heads_q, seqlen_q, seqlen_kv] in
        out's dtype if asked for, else ``None``. Padding queries are 0.

    Raises:
        ValueError: an unsupported argument that may change attention (sparse models pass the indices of selected keys).
        NotImplementedError: context parallelism is active, or an input is a DTensor. It also raises everything that
        :func:`flashmla_hf.attention` raises.
    """
    latents = decoding.latents_of(module) if value is None else None
    if latents is not None:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        (query, expand), value = latents.absorb(query), key
    pages = paged.pages(module, key, value, cu_seq_lens_k, max_length_k, kwargs)
    gathered = None
    if pages is None:
        gathered = paged.gather(module, key, value, cu_seq_lens_k, max_length_q, max_length_k, kwargs)
    if gathered is not None:
        key, value, cu_seq_lens_k, max_length_q, max_length_k = gathered
        attention_mask = None  # the boundaries say everything
    _refuse_unknown(module, kwargs)
    _refuse_parallel(module, query)

    query, key, value = _one_dtype(query, key, value)
    if query.shape[0] != key.shape[0]:  # learned queries of batch 1 (SDPA broadcasts them)
        batch = max(query.shape[0], key.shape[0])
        query, key, value = (x.expand(batch, -1, -1, -1) for x in (query, key, value))
    if isinstance(scaling, torch.Tensor):  # a learned scale: let autograd see it
        query, scaling = query * scaling.to(query.dtype), 1.0
    # Layout of the kernel: [batch, seqlen, heads, dim]. These are views.
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    q, k, v = (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (q, k, v))
    if latents is not None:
        v = k[..., : latents.head_dim_v]

    is_paged = pages is not None or gathered is not None
    is_causal, window = _without_mask(module, is_causal, sliding_window, is_paged)
    options: dict[str, Any] = {"scale": scaling, "softcap": float(softcap or 0.0)}
    options["sinks"] = heads.own_heads(s_aux, q.shape[2])
    if pages is not None:
        return decoding.from_pages(q, pages, k, v, options | {"window": window}), None
    pattern, mask = _read_mask(module, attention_mask, masks.Pattern(is_causal, window), q, k.shape[1])
    options |= {"deterministic": True if deterministic else None}
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None and pattern is not None:
        cu_seqlens = (boundaries.as_boundaries(cu_seq_lens_q), boundaries.as_boundaries(cu_seq_lens_k))
        if not output_attentions and position_bias is None:
            options |= {"is_causal": pattern.is_causal, "window": pattern.window}
            longest = (_as_int(max_length_q), _as_int(max_length_k))
            return _packed(q, k, v, cu_seqlens, longest, dropout_p=dropout, **options), None
        segments = _segments_from_boundaries(module, q, k, *cu_seqlens)
        pattern = pattern._replace(padding=None, segments=segments)
    elif position_ids is not None and pattern is not None and (attention_mask is None or pattern.is_causal):
        pattern = _cut_by_positions(pattern, position_ids, q, k.shape[1])

    needs_dense = bool(output_attentions) or position_bias is not None or dropout > 0.0
    out, weights = None, None
    if pattern is not None and not needs_dense:
        out = _fused(q, k, v, pattern, options, latents is not None)
    if out is None:
        wants_weights = bool(output_attentions)
        out, weights = _dense(module, q, k, v, pattern, mask, position_bias, dropout, wants_weights, options)
    return (out if latents is None else expand(out)), weights


def _without_mask(
    module, is_causal: bool | None, sliding_window: int | None, is_paged: bool
) -> tuple[bool, tuple[int, int] | None]:
    """Causality and window of a layer whose mask does not define them: it has no mask, or one of key padding.

    The layer defines them, as for SDPA: by the argument, else by its attribute ``is_causal``. A layer without either sees every
    key, as in eager attention. So does every layer of a model for which Transformers declares neither SDPA nor a flash
    implementation: nobody has checked its ``is_causal``.
    """
    if is_paged:  # continuous batching makes no masks, for causal models
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    elif not transformers_private.is_trusted(type(getattr(module, "config", None))):
        return False, None
    elif is_causal is None:
        is_causal = getattr(module, "is_causal", False)
    return bool(is_causal), _window(module, bool(is_causal), sliding_window)


def _read_mask(
    module, mask, without_mask: masks.Pattern, q, seqlen_kv: int
) -> tuple[masks.Pattern | None, torch.Tensor | None]:
    """``mask`` as a pattern, or as a 4-D mask if only its numbers describe it. q [batch, seqlen_q, ...]."""
    if mask is None:
        return without_mask, None
    pattern = masks.pattern_of(mask)
    if pattern is not None and pattern.hides_nothing():
        return pattern, None  # eager gets no mask for it, so it fits any length
    if pattern is not None and mask.shape[2] == q.shape[1] and mask.shape[3] == seqlen_kv:
        padding, segments = (
            x if x is None or x.shape[0] == q.shape[0] else x.expand(q.shape[0], -1)
            for x in (pattern.padding, pattern.segments)
        )
        return pattern._replace(padding=padding, segments=segments), None
    mask = _checked_mask(module, mask.dense() if isinstance(mask, masks.LazyMask) else mask, q, seqlen_kv)
    if mask.dim() == 2:
        return without_mask._replace(padding=mask), None
    if mask.dtype == torch.bool and mask.shape[1] == mask.shape[2] == 1:
        # The mask names the keys that every query sees; causality and window do not apply.
        padding = boundaries.view_with_memo(mask, mask[:, 0, 0, :].expand(q.shape[0], -1))
        return masks.Pattern(False, None, padding), None
    return None, mask


def _cut_by_positions(pattern: masks.Pattern, position_ids, q, seqlen_kv: int) -> masks.Pattern:
    """``pattern`` with the packed rows that only the positions show.

    Transformers' mask layer does not look for them if there is a cache (the default outside Trainer) or a padding mask.
    """
    num_keys = seqlen_kv if pattern.padding is None else pattern.padding.shape[1]
    if pattern.segments is not None or q.shape[1] != num_keys:
        return pattern
    segments = boundaries.segments_from_positions(
        position_ids, q.shape[0], q.shape[1], pattern.is_causal, pattern.padding
    )
    return pattern if segments is None else pattern._replace(segments=segments)


def _fused(q, k, v, pattern: masks.Pattern, options, are_latents: bool = False) -> torch.Tensor | None:
    """The kernel's output for q, k, v [batch, seqlen, heads, dim]; ``None`` if the call needs a dense mask.

    ``are_latents``: v is a view of columns of k, which the kernels of caches read, and no others.
    """
    seqlen_q, whole = q.shape[1], decoding.from_rows if are_latents else _attention
    padding = pattern.padding
    options = options | {"is_causal": pattern.is_causal, "window": pattern.window}
    if padding is None:
        if pattern.segments is None:
            return whole(q, k, v, **options)
        if are_latents:
            return None
        return _packed(q, k, v, boundaries.segment_boundaries(pattern.segments), (None, None), **options)
    k, v = k[:, : padding.shape[1]], v[:, : padding.shape[1]]
    seqlen_kv = k.shape[1]
    ranges = boundaries.key_ranges(padding)
    if ranges.has_holes or (are_latents and pattern.segments is not None):
        return None
    if pattern.segments is not None:
        return _packed(q, k, v, boundaries.segment_boundaries(pattern.segments, padding), (None, None), **options)
    queries_are_keys = pattern.is_causal or pattern.window is not None
    if queries_are_keys and seqlen_q > seqlen_kv:
        return None
    if ranges.uniform is not None:
        # All rows are alike, as in an unpadded batch under a static cache. A slice avoids the copy of the cache below.
        start, end = ranges.uniform
        if not queries_are_keys or (end == seqlen_kv and start <= seqlen_kv - seqlen_q):
            return whole(q, k[:, start:end], v[:, start:end], **options)
    if seqlen_q <= decoding.MOST_QUERIES and (not queries_are_keys or ranges.common_end == seqlen_kv):
        out = decoding.from_cache(q, k, v, ranges, options, are_latents)
        if out is not None:
            return out
    if are_latents:
        return None
    cu_seqlens = boundaries.range_boundaries(ranges, seqlen_q, seqlen_kv, queries_are_keys)
    return _packed(q, k, v, cu_seqlens, (seqlen_q, seqlen_kv), **options)


def _attention(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
    """:func:`flashmla_hf.attention` without the lse."""
    out = attention(*tensors, **options)
    assert isinstance(out, torch.Tensor)
    return out


def _packed(q, k, v, cu_seqlens, longest, **options) -> torch.Tensor:
    """Attention over flattened tokens. q [batch, seqlen_q, heads_q, dim] -> [batch, seqlen_q, heads_q, head_dim_v].

    Training and prefill without a cache keep tokens dense in memory, and a batch of one always does: flattening is a
    view. A cache [batch, heads, seqlen, dim] of a padded batch is copied, once per layer and step; so does flash-attn.
    """
    batch, seqlen_q = q.shape[:2]
    packed = [x.squeeze(0) if x.shape[0] == 1 else x.flatten(0, 1) for x in (q, k, v)]
    out = _attention(
        *packed,
        cu_seqlens_q=cu_seqlens[0],
        cu_seqlens_kv=cu_seqlens[1],
        max_seqlen_q=longest[0],
        max_seqlen_kv=longest[1],
        **options,
    )
    return out.unflatten(0, (batch, seqlen_q))


def _dense(module, q, k, v, pattern, mask, position_bias, dropout, wants_weights, options):
    """Exact attention with a materialised mask, for calls that no fused kernel computes.

    Either ``pattern`` or the 4-D ``mask`` defines the visible keys; the shapes of q, k, v are as in :func:`_fused`.
    """
    num_keys = k.shape[1]
    options = options | {"is_causal": False, "window": None}
    if pattern is not None:
        options |= {"is_causal": pattern.is_causal, "window": pattern.window}
        if pattern.padding is not None:
            k, v = k[:, : pattern.padding.shape[1]], v[:, : pattern.padding.shape[1]]
            mask = pattern.padding[:, None, None, :]
        if pattern.segments is not None:
            is_same = pattern.segments[:, None, :, None] == pattern.segments[:, None, None, :]
            mask = is_same if mask is None else mask & is_same
    if position_bias is not None:
        warn_once(
            f"flashmla: {type(module).__name__} adds a position_bias to its scores. This is computed exactly, but "
            "not by the fused kernel: memory grows with seqlen_q * seqlen_kv.",
            stacklevel=3,
        )
        bias = position_bias[..., : k.shape[1]].to(q.dtype)
        if mask is None:
            mask = bias
        elif mask.dtype == torch.bool:
            mask = bias.masked_fill(~mask, float("-inf"))
        else:
            mask = bias + mask.to(q.dtype)
    if not wants_weights:
        # Models call .view on the result.
        return _attention(q, k, v, attn_mask=mask, dropout_p=dropout, **options).contiguous(), None

    warn_once(
        "flashmla: output_attentions=True is computed exactly, but not by the fused kernel, which never holds the "
        "weights: memory grows with seqlen_q * seqlen_kv.",
        stacklevel=3,
    )
    window = options["window"] or (-1, -1)
    out, _, weights = reference.attention(
        q,
        k,
        v,
        sinks=options["sinks"],
        attn_mask=mask,
        scale=q.shape[-1] ** -0.5 if options["scale"] is None else options["scale"],
        window_left=-1 if window[0] is None else window[0],
        window_right=0 if options["is_causal"] else (-1 if window[1] is None else window[1]),
        softcap=options["softcap"],
        dropout_p=dropout,
        return_weights=True,
    )
    # A static cache's unused rows have weight 0.
    weights = torch.nn.functional.pad(weights.to(q.dtype), (0, num_keys - k.shape[1]))
    return out.contiguous(), weights


def _segments_from_boundaries(module, q, k, cu_seqlens_q, cu_seqlens_kv) -> torch.Tensor:
    if q.shape[0] != 1 or q.shape[1] != k.shape[1]:
        raise ValueError(
            f"flashmla in {type(module).__name__}: cu_seq_lens with output_attentions or position_bias: expected "
            f"one packed row with equally many queries and keys, got query {[*q.shape]} and key {[*k.shape]} "
            "[batch, seqlen, heads, dim]"
        )
    return boundaries.segments_from_boundaries(cu_seqlens_q, q.shape[1])


def _checked_mask(module, mask, q: torch.Tensor, seqlen_kv: int) -> torch.Tensor:
    """The user's ``mask`` as bool [batch, num_keys] or as 4-D mask, for q [batch, seqlen_q, ...] and at most
    ``seqlen_kv`` keys."""
    if not isinstance(mask, torch.Tensor) or mask.dim() not in (2, 4):
        actual = f"{mask.dim()} dimensions" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(
            f"flashmla in {type(module).__name__}: attention_mask: expected None or 2 or 4 dimensions, got {actual}"
        )
    if mask.dim() == 4 and mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"flashmla in {type(module).__name__}: attention_mask: expected bool (true keeps) or a floating dtype "
            f"(added) for a 4-D mask, got {mask.dtype}"
        )
    if mask.dim() == 2 and mask.shape[0] != q.shape[0]:
        mask = mask.expand(q.shape[0], -1)
    if mask.dim() == 2 and mask.dtype != torch.bool:
        # Models that skip Transformers' mask layer pass the tokenizer's mask of ones and zeros, in any dtype.
        kept = boundaries.memo(mask)
        if "as bool" not in kept:
            kept["as bool"] = boundaries.mark_constant(mask != 0)
        mask = kept["as bool"]
    if mask.shape[-1] <= seqlen_kv:
        return mask
    # A sliding cache holds the last keys of a 2-D mask. A 4-D mask may cover all rows of a static cache.
    cut = mask[:, -seqlen_kv:] if mask.dim() == 2 else mask[..., :seqlen_kv]
    if mask.dim() == 4 and mask.shape[2] > 1:
        return cut
    if torch.compiler.is_compiling():
        return cut
    kept, key = boundaries.memo(mask), ("cut", seqlen_kv)
    if key not in kept:
        kept[key] = boundaries.mark_constant(cut.clone())
    return kept[key]


def _window(module, is_causal: bool, sliding_window: int | None) -> tuple[int, int] | None:
    """``sliding_window`` as (left, right), both ends included; ``None`` if there is none."""
    if sliding_window is None:
        return None
    if is_causal:
        return (sliding_window - 1, 0)
    # Bidirectional: flash-attn's convention is |i - j| < sliding_window, and ModernBERT passes config.sliding_window
    # + 1. The mask that eager follows is |i - j| <= config.sliding_window. Layers that pass the config's value as it
    # is (the encoder of T5Gemma; causal models switched to is_causal=False) are off by one under Transformers' flash
    # path.
    is_config_value = sliding_window == transformers_private.attribute(
        getattr(module, "config", None), "sliding_window"
    )
    reach = sliding_window if is_config_value else sliding_window - 1
    return (reach, reach)


def _one_dtype(query, key, value):
    """query, key and value in one dtype. Autocast mixes dtypes: rotary embeddings and norms give fp32, projections bf16.

    The dtype is autocast's under autocast, as for any matrix product. Otherwise it is that of ``value``, which no norm or
    rotation has changed.
    """
    device_type = query.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
    else:
        dtype = value.dtype
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _as_int(length: int | torch.Tensor | None) -> int | None:
    """The length if Python knows it without a synchronisation, else ``None`` (the packed length is then the bound)."""
    if isinstance(length, torch.Tensor):
        return int(length) if length.device.type == "cpu" and values_are_readable(length) else None
    return length


def _refuse_unknown(module, kwargs: dict) -> None:
    """Raises for an argument that eager attention would honour, or that the layer passes in eager's place.

    Every other argument was given to the model for another part of it: Transformers passes it down to all layers, and eager's
    attention function ignores it.
    """
    for name, given in kwargs.items():
        if given is not None and check.is_about_attention(type(module), name):
            model = transformers_private.attribute(getattr(module, "config", None), "model_type") or "unknown"
            raise ValueError(
                f"flashmla: {type(module).__name__} of model type {model!r} passed an unsupported argument {name!r}. It may "
                "change the result (sparse models pass their selected keys this way), so it is not ignored. Use "
                'attn_implementation="eager" or "sdpa" for this model, or leave the argument out of the call'
            )


def _refuse_parallel(module, query) -> None:
    if type(query).__name__ == "DTensor":
        raise NotImplementedError(
            f"flashmla in {type(module).__name__}: query: expected a local tensor, got a DTensor. Use "
            'tp_plan="auto" or FSDP, which pass local tensors, or attn_implementation="sdpa"'
        )
    if transformers_private.context_parallel_is_active():
        raise NotImplementedError(
            f"flashmla in {type(module).__name__}: torch's context parallelism is active. It shards the sequence and "
            "replaces torch's SDPA only, so this attention would see one shard of the keys. Use "
            'attn_implementation="sdpa" inside context_parallel, or divide the sequence by Ulysses (accelerate: sp_size)'
        )
