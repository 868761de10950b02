"""The forward of ``attn_implementation="flashmla"`` (and ``"flashmla_fp8"``) in Hugging Face Transformers.

The attention layers of a model call :func:`attention_forward` (or :func:`fp8_forward`). It turns Transformers' calling
convention (masks, window conventions, packed rows, caches, autocast) into one call of :func:`flashmla_hf.attention`.
"""

from __future__ import annotations

from typing import Any

import torch

from flashmla_hf import decode, reference
from flashmla_hf.dispatch import attention, drops_in_a_fused_kernel
from flashmla_hf.hf import (
    boundaries,
    decoding,
    fp8_rows,
    heads,
    masks,
    paged,
    patterns,
    refusals,
    transformers_private,
)
from flashmla_hf.notices import warn_once
from flashmla_hf.torch_state import values_are_readable

# By this name fp8_forward says its precision: not a parameter of attention_forward, so that no layer's argument means it.
_PRECISION = "flashmla_precision"


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
            its rows, an Fp8Cache :class:`fp8_rows.Fp8Rows`. ``None`` as value: key holds latents (:class:`decoding.Latents`),
            from a layer of the patch "mla_decode".
        attention_mask: a mask of :mod:`masks`, or a user's [batch, 1 or heads_q, seqlen_q, seqlen_kv], boolean (true
            keeps) or additive. Either defines the visible keys alone: no causal mask or window is added. Or key padding
            [batch, seqlen_kv], bool or a number that is not 0 for a real token, from models that skip the mask layer.
        dropout: probability of dropping a weight, by ``torch_flash`` on a GPU; where that does not compute the call, exact,
            outside the fused kernels, with one warning.
        scaling: factor on the scores; ``None`` means ``head_dim_qk ** -0.5``.
        is_causal, sliding_window: causality (``None`` means ``module.is_causal``), and the number of keys that a causal query
            sees, itself included. Both apply if the mask does not define them (:func:`patterns.without_mask`).
        softcap: as in :func:`flashmla_hf.attention`. s_aux: [heads_q] sinks, with gradient.
        position_bias: [1 or batch, heads_q, seqlen_q, at least seqlen_kv], added to the scores (T5); exact, outside the
            fused kernel, with one warning.
        position_ids: [1 or batch, seqlen_q]; read to find packed rows if the mask does not define them.
        cu_seq_lens_q, cu_seq_lens_k: [num_sequences + 1] boundaries of packed sequences over the flattened tokens; they
            replace a 2-D mask, which says less, and cut a 4-D one of a single row of as many keys as queries.
        max_length_q, max_length_k: the lengths of the longest packed sequences, as numbers or tensors.
        output_attentions: also return the weights, computed exactly outside the kernel, with one warning.
        deterministic: as in :func:`flashmla_hf.attention`; ``None`` and ``False`` follow torch's switches.
        **kwargs: the arguments of continuous batching (:mod:`paged`), and everything else that a model passes down.

    Returns:
        ``(out, weights)``: out [batch, seqlen_q, heads_q, head_dim_v]; weights [batch, heads_q, seqlen_q, seqlen_kv] in
        out's dtype if asked for, else ``None``. Padding queries are 0.

    Raises:
        ValueError: an unsupported argument that may change attention (sparse models pass the indices of selected keys).
        NotImplementedError: context parallelism is active, an input is a DTensor, or fp8 does not cover the call. It also
        raises everything that :func:`flashmla_hf.attention` raises.
    """
    boundaries.enter(module)
    precision = kwargs.pop(_PRECISION, None)
    output_attentions = output_attentions or transformers_private.weights_are_recorded()
    if isinstance(key, fp8_rows.Fp8Rows):
        refusals.refuse_beyond_fp8_cache(
            module, dropout, position_bias, output_attentions, (cu_seq_lens_q, cu_seq_lens_k)
        )
        default = masks.Pattern(*patterns.without_mask(module, is_causal, sliding_window, False))
        given: dict[str, Any] = {"scale": scaling, "softcap": float(softcap or 0.0), "sinks": s_aux}
        return _from_fp8_cache(module, query, key, value, attention_mask, default, given, kwargs), None
    latents = decoding.latents_of(module) if value is None else None
    if latents is not None:
        refusals.refuse_latents_in_fp8(module, precision)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        (query, expand), value = latents.absorb(query), key
    pages = paged.pages(module, key, value, cu_seq_lens_k, max_length_k, kwargs)
    gathered = None
    if pages is None:
        gathered = paged.gather(module, key, value, cu_seq_lens_k, max_length_q, max_length_k, kwargs)
    if gathered is not None:
        key, value, cu_seq_lens_k, max_length_q, max_length_k = gathered
        attention_mask = None  # the boundaries say everything
    refusals.refuse_unknown(module, kwargs)
    refusals.refuse_parallel(module, query, precision)

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
    is_causal, window = patterns.without_mask(module, is_causal, sliding_window, is_paged)
    options: dict[str, Any] = {
        "scale": scaling,
        "softcap": float(softcap or 0.0),
        "sinks": heads.own_heads(s_aux, q.shape[2]),
    }
    if pages is not None:
        refusals.refuse_pages_in_fp8(module, precision)
        return decoding.from_pages(q, pages, k, v, options | {"window": window}), None
    options |= {"deterministic": True if deterministic else None, "precision": precision}
    pattern, mask = patterns.read_mask(module, attention_mask, masks.Pattern(is_causal, window), q, k.shape[1])
    packed = None
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        cu_seqlens = (boundaries.as_boundaries(cu_seq_lens_q), boundaries.as_boundaries(cu_seq_lens_k))
        packed = (cu_seqlens, (_as_int(max_length_q), _as_int(max_length_k)))
    elif cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        refusals.refuse_half_of_boundaries(module, "cu_seq_lens_k" if cu_seq_lens_k is None else "cu_seq_lens_q")
    elif position_ids is not None and pattern is not None and (attention_mask is None or pattern.is_causal):
        pattern = patterns.cut_by_positions(pattern, position_ids, q, k.shape[1])
    dense = (position_bias, dropout, bool(output_attentions))
    out, weights = _attend(module, q, k, v, pattern, mask, packed, dense, options, latents is not None)
    return (out if latents is None else expand(out)), weights


def fp8_forward(module: torch.nn.Module, *tensors, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`attention_forward`, in fp8, for ``attn_implementation="flashmla_fp8"``."""
    given: dict[str, Any] = kwargs | {_PRECISION: "fp8"}
    return attention_forward(module, *tensors, **given)


def _attend(module, q, k, v, pattern, mask, packed, dense, options, are_latents):
    """Attention of q, k, v [batch, seqlen, heads, dim], and the weights if wanted.

    pattern, or the 4-D mask, says which keys are visible, and packed, ``(boundaries, longest lengths)`` or ``None``, in its
    place where sequences begin. dense: ``(position_bias, dropout, whether weights are wanted)``.
    """
    position_bias, dropout, wants_weights = dense
    if packed is not None and pattern is not None:
        cu_seqlens, longest = packed
        if not wants_weights and position_bias is None:
            options = options | {"is_causal": pattern.is_causal, "window": pattern.window, "dropout_p": dropout}
            return _packed(q, k, v, cu_seqlens, longest, **options), None
        segments = _segments_from_boundaries(module, q, k, *cu_seqlens)
        pattern = pattern._replace(padding=None, segments=segments, end=None)
    elif packed is not None and q.shape[:2] == (1, k.shape[1]):  # of images that see themselves, say
        is_same = boundaries.is_same_segment(boundaries.segments_from_boundaries(packed[0][0], q.shape[1]))
        mask = mask & is_same if mask.dtype == torch.bool else mask.masked_fill(~is_same, float("-inf"))
    if pattern is not None and not wants_weights and position_bias is None:
        dropping = options | {"dropout_p": dropout} if dropout > 0.0 else options
        if dropout == 0.0 or _is_fused_with_dropout(q, k, v, dropping, are_latents):
            out = _fused(q, k, v, pattern, dropping, are_latents)
            if out is not None:
                return out, None
    if options["precision"] is not None:
        refusals.refuse_dense(module, *refusals.FP8, dropout, position_bias, wants_weights)
    if pattern is not None and pattern.end is not None:
        pattern = None  # the mask says the same
    return _dense(module, q, k, v, pattern, mask, position_bias, dropout, wants_weights, options)


def _is_fused_with_dropout(q, k, v, options: dict[str, Any], are_latents: bool) -> bool:
    if are_latents or options["precision"] is not None:
        return False
    options = {name: options[name] for name in ("scale", "softcap", "sinks", "deterministic", "dropout_p")}
    return drops_in_a_fused_kernel(q, k, v, **options)


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
    common_end: torch.Tensor | int | None = pattern.end
    if common_end is None and pattern.is_causal and torch.compiler.is_compiling():
        common_end = seqlen_kv  # a graph does not know whether rows end in padding: of a causal row no token sees it
    ends_together = not queries_are_keys or ranges.common_end == seqlen_kv or common_end is not None
    # The kernel of caches is exact, so it does not serve fp8 of a 16-bit cache, and it has no dropout.
    may_read_caches = options["precision"] is None and "dropout_p" not in options
    if may_read_caches and seqlen_q <= decoding.MOST_QUERIES and ends_together:
        seen = ranges if common_end is None else ranges.up_to(common_end)
        out = decoding.from_cache(q, k, v, seen, options, are_latents)
        if out is not None:
            return out
    if are_latents:
        return None
    cu_seqlens = boundaries.range_boundaries(ranges, seqlen_q, seqlen_kv, queries_are_keys, pattern.end)
    return _packed(q, k, v, cu_seqlens, (seqlen_q, seqlen_kv), **options)


def _from_fp8_cache(
    module, query, key, value, attention_mask, default: masks.Pattern, options: dict[str, Any], others: dict[str, Any]
) -> torch.Tensor:
    """Attention to rows of an Fp8Cache. query [batch, heads_q, seqlen_q, dim] -> [batch, seqlen_q, heads_q, head_dim_v]."""
    refusals.refuse_unknown(module, others)
    refusals.refuse_parallel(module, query)
    if key.is_second:
        refusals.refuse_cache_of_both_attentions(module)
    q = query.to(_common_dtype(query, value)).transpose(1, 2)
    pattern, mask = patterns.read_mask(module, attention_mask, default, q, key.shape[2])
    if pattern is None and mask is not None:
        pattern = patterns.of_added_mask(mask, q.shape[0])
    if pattern is None or pattern.segments is not None:
        refusals.refuse_dense(module, *refusals.FP8_CACHE, 0.0, None, False)
    if pattern.is_causal and pattern.window is None:
        refusals.refuse_window_of_cache(module, key.shape[2])
    # int32 [batch], the keys of each sequence; None: all rows. Of a static cache Python does not know it.
    in_use = lengths = key.lengths
    starts = None
    if pattern.padding is not None:
        ranges = boundaries.key_ranges(pattern.padding)
        num_keys = key.shape[2]
        if pattern.is_causal and not ranges.has_holes and (in_use is not None or ranges.common_end != num_keys):
            # Padding at a causal row's end is seen by no token, and a row may have no key yet.
            ranges = ranges.up_to(num_keys if in_use is None else in_use)
        queries_are_keys = pattern.is_causal or pattern.window is not None
        ends_together = ranges.common_end == num_keys or (pattern.is_causal and in_use is not None)
        if ranges.has_holes or (queries_are_keys and not ends_together):
            refusals.refuse_dense(module, *refusals.FP8_CACHE, 0.0, None, False)
        lengths, starts = ranges.end, ranges.start
        if in_use is not None and not pattern.is_causal:
            lengths = torch.minimum(lengths, in_use)
    if isinstance(options["scale"], torch.Tensor):
        q, options = q * options["scale"].to(q.dtype), options | {"scale": 1.0}
    k, v = (x.e4m3.transpose(1, 2) for x in (key, value))
    out = decode.decode_attention(
        q if q.stride(-1) == 1 else q.contiguous(), k, v, cache_seqlens=lengths, kv_start=starts,
        k_descale=key.scale.transpose(1, 2), v_descale=value.scale.transpose(1, 2), is_causal=pattern.is_causal,
        window=pattern.window, **(options | {"sinks": heads.own_heads(options["sinks"], q.shape[2])}),
    )  # fmt: skip
    assert isinstance(out, torch.Tensor)
    return out


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
            is_same = boundaries.is_same_segment(pattern.segments)
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


def _one_dtype(query, key, value):
    dtype = _common_dtype(query, value)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _common_dtype(query, value) -> torch.dtype:
    """The one dtype of query, key and value. Autocast mixes dtypes: rotary embeddings and norms give fp32, projections bf16.

    The dtype is autocast's under autocast, as for any matrix product. Otherwise it is that of ``value``, which no norm or
    rotation has changed.
    """
    device_type = query.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type) and query.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return value.dtype


def _as_int(length: int | torch.Tensor | None) -> int | None:
    """The length if Python knows it without a synchronisation, else ``None`` (the packed length is then the bound)."""
    if isinstance(length, torch.Tensor):
        return int(length) if length.device.type == "cpu" and values_are_readable(length) else None
    return length
