"""Which keys the queries of a layer's call see: its mask, arguments and attributes, as a pattern that the kernel computes."""

from __future__ import annotations

import torch

from flashmla_hf.hf import boundaries, masks, refusals, transformers_private
from flashmla_hf.torch_state import values_are_readable


def without_mask(
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


def read_mask(
    module, mask, default: masks.Pattern, q, seqlen_kv: int
) -> tuple[masks.Pattern | None, torch.Tensor | None]:
    """``mask`` as a pattern, or as a 4-D mask if only its numbers describe it. q [batch, seqlen_q, ...]."""
    if mask is None:
        return default, None
    pattern = masks.pattern_of(mask)
    if pattern is not None and pattern.hides_nothing():
        return pattern, None  # eager gets no mask for it, so it fits any length
    if pattern is not None and mask.shape[2] == q.shape[1] and mask.shape[3] == seqlen_kv:
        padding, segments = (
            x if x is None or x.shape[0] == q.shape[0] else x.expand(q.shape[0], -1)
            for x in (pattern.padding, pattern.segments)
        )
        # Of an unknown end no dense mask can be made again.
        return pattern._replace(padding=padding, segments=segments), None if pattern.end is None else mask
    mask = _checked_mask(module, mask.dense() if isinstance(mask, masks.LazyMask) else mask, q, seqlen_kv)
    if mask.dim() == 2:
        return default._replace(padding=mask), None
    if mask.dtype == torch.bool and mask.shape[1] == mask.shape[2] == 1 and mask.shape[3] == seqlen_kv:
        # The mask names the keys that every query sees; causality and window do not apply.
        padding = boundaries.view_with_memo(mask, mask[:, 0, 0, :].expand(q.shape[0], -1))
        return masks.Pattern(False, None, padding), None
    return None, mask


def of_added_mask(mask: torch.Tensor, batch: int) -> masks.Pattern | None:
    """The pattern of a floating mask [batch or 1, 1, 1, seqlen_kv] of one query that hides keys or leaves them as they are, and
    hides all of no row; ``None`` for others, and where it has no values to read."""
    if not mask.is_floating_point() or mask.shape[1] != 1 or mask.shape[2] != 1 or not values_are_readable(mask):
        return None
    kept, key = boundaries.memo(mask), ("visible", batch)
    if key not in kept:
        row = mask[:, 0, 0, :].expand(batch, -1)
        visible = row == 0
        is_plain = (visible | (row <= torch.finfo(mask.dtype).min)).all() & visible.any(-1).all()
        kept[key] = boundaries.mark_constant(visible) if bool(is_plain) else None
    return None if kept[key] is None else masks.Pattern(False, None, kept[key])


def cut_by_positions(pattern: masks.Pattern, position_ids, q, seqlen_kv: int) -> masks.Pattern:
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


def _checked_mask(module, mask, q: torch.Tensor, seqlen_kv: int) -> torch.Tensor:
    """The user's ``mask`` as bool [batch, num_keys] of at most ``seqlen_kv`` keys, or as a 4-D mask that broadcasts to
    [batch, heads_q, seqlen_q, seqlen_kv]; q is [batch, seqlen_q, heads_q, ...]."""
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
    if mask.dim() == 4:
        if mask.shape[3] not in (1, seqlen_kv):
            refusals.refuse_mask_of_other_keys(module, mask.shape[3], seqlen_kv)
        shape = (q.shape[0], q.shape[2], q.shape[1])
        if any(mine not in (1, full) for mine, full in zip(mask.shape[:3], shape, strict=True)):
            raise ValueError(
                f"flashmla in {type(module).__name__}: attention_mask: expected a 4-D mask that broadcasts to "
                f"{[*shape, seqlen_kv]} [batch, heads, queries, keys], got {[*mask.shape]}"
            )
        return mask
    width = transformers_private.width_before_cut(mask)
    if width is not None and width != seqlen_kv:
        refusals.refuse_mask_of_other_keys(module, width, seqlen_kv)
    if mask.shape[0] not in (1, q.shape[0]):
        raise ValueError(
            f"flashmla in {type(module).__name__}: attention_mask: expected the batch of the queries, {q.shape[0]}, got "
            f"{[*mask.shape]}"
        )
    if mask.shape[0] != q.shape[0]:
        mask = mask.expand(q.shape[0], -1)
    if mask.dtype != torch.bool:
        # Models that skip Transformers' mask layer pass the tokenizer's mask of ones and zeros, in any dtype.
        kept = boundaries.memo(mask)
        if "as bool" not in kept:
            kept["as bool"] = boundaries.mark_constant(mask != 0)
        mask = kept["as bool"]
    if mask.shape[-1] <= seqlen_kv:
        return mask
    cut = mask[:, -seqlen_kv:]  # a sliding cache holds the last keys
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
