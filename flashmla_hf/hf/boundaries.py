"""Turns Transformers' masks into boundaries (``cu_seqlens``) over flattened tokens, which the kernel reads.

The kernel knows causal masks, windows and boundaries only. Padding and packing become boundaries without moving a token: the
tensors [batch, seqlen, heads, dim] are read as [batch * seqlen, heads, dim], and hidden tokens become sequences of their
own. One row with valid keys ``start ... end`` is at most five sequences, some of them empty:

==================  =============  ==============  =======================================================
sequence            its queries    its keys        effect
==================  =============  ==============  =======================================================
queries before      0 ... a        none            a query that sees no key gives exactly 0
keys before         none           0 ... start     a key that no query sees
the valid part      a ... b        start ... end   attention
queries after       b ... Q        none            0
keys after          none           end ... K       not seen
==================  =============  ==============  =======================================================

The number of sequences depends on shapes alone, so nothing is read back from the GPU and ``torch.compile`` sees one
static graph. FlashAttention's unpadding instead gathers the valid tokens: two copies and a synchronisation in every
layer.

All layers of a model share one mask tensor, so boundaries are kept with it (:func:`memo`), and a forward pass (:func:`enter`)
synchronises at most once per mask. Only eager mode synchronises: to find holes (valid keys that are not one range, which
boundaries cannot express) and to count packed sequences.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from flashmla_hf.torch_state import is_in_backward, values_are_readable

# Under torch.compile the number of packed sequences is data, but the shape of cu_seqlens is not. A graph has room for this many
# sequences, of which the unused ones are empty. More of them raise an error (see segment_boundaries).
MIN_COMPILED_SEGMENTS = 256
MIN_COMPILED_TOKENS_PER_SEGMENT = 16


_pass_numbers = itertools.count()


class _Pass(threading.local):
    """The forward pass that this thread is in, and the layers that it has come through."""

    def __init__(self) -> None:
        self.number = next(_pass_numbers)
        self.layers: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


_pass = _Pass()


def enter(layer: torch.nn.Module) -> None:
    """Says that ``layer`` computes attention. A layer that comes again begins a new forward pass of this thread.

    What runs again in backward belongs to the pass that it repeats.
    """
    if torch.compiler.is_compiling() or is_in_backward():
        return
    if layer in _pass.layers:
        _pass.number, _pass.layers = next(_pass_numbers), weakref.WeakSet()
    _pass.layers.add(layer)


class _State(NamedTuple):
    """What a memo depends on. ``pass_number`` is ``None`` if this package has made the tensor, which nobody else changes."""

    version: int
    is_inference: bool
    pass_number: int | None


# The dictionaries stand beside the tensors: an attribute would be pickled with a tensor that the user saves. An entry must not
# be a view of its tensor, or the two would keep each other alive. The state of an inference-mode tensor is None.
_memos = WeakTensorKeyDictionary()


def memo(x: torch.Tensor) -> dict:
    """A dictionary that lives as long as the tensor ``x`` and is dropped when ``x`` is changed in place.

    Of a user's tensor it is dropped after the forward pass, too: torch does not count the changes by a collective, by
    ``x.data``, or through numpy. It keeps nothing while compiling, and nothing for a user's inference-mode tensor, which does
    not count its changes. Entries derived in inference mode are dropped outside of it, since autograd may not save such
    tensors.
    """
    if torch.compiler.is_compiling():
        return {}
    state, kept = _memos.get(x, (None, None))
    if x.is_inference():
        return {} if kept is None else kept
    number = _pass.number
    if state is not None and (state.pass_number is None or is_in_backward()):
        number = state.pass_number
    now = _State(x._version, torch.is_inference_mode_enabled(), number)
    if state != now:
        kept = {}
        _memos[x] = (now, kept)
    return kept


def mark_constant(mask: torch.Tensor) -> torch.Tensor:
    """Returns ``mask``, which this package has made and nobody changes: inference mode may keep a memo of it, and passes may
    share one."""
    if not torch.compiler.is_compiling():
        state = None if mask.is_inference() else _State(mask._version, torch.is_inference_mode_enabled(), None)
        _memos[mask] = (state, {})
    return mask


def view_with_memo(mask: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    """``view``, a reshaping of ``mask`` with the same content, which shares the memo of ``mask``."""
    if not torch.compiler.is_compiling():
        state = None if view.is_inference() else _State(view._version, torch.is_inference_mode_enabled(), None)
        _memos[view] = (state, memo(mask))
    return view


@dataclass(frozen=True)
class KeyRanges:
    """Which keys of each row are valid, as one range per row.

    start, end: int32 [batch]. ``uniform``: the one (start, end) of all rows, or ``None`` if rows differ or cannot be
    read. ``common_end``: the end that all rows have, or ``None`` likewise. ``has_holes``: the valid keys of some row are
    not one range, so start and end mean nothing (in eager mode; a compiled graph asserts instead).
    """

    start: torch.Tensor
    end: torch.Tensor
    uniform: tuple[int, int] | None
    common_end: int | None
    has_holes: bool
    boundaries: dict = field(default_factory=dict)

    def up_to(self, end: torch.Tensor | int) -> KeyRanges:
        """These ranges, each up to ``end`` (int32 [] if a tensor): no token of a causal row sees the padding after it. A row
        without valid keys stays empty."""
        ends = torch.zeros_like(self.end) + end
        common_end = end if isinstance(end, int) else None
        return KeyRanges(torch.where(self.end > 0, self.start, ends), ends, None, common_end, False)


def key_ranges(valid: torch.Tensor) -> KeyRanges:
    """The ranges of ``valid``, boolean [batch, seqlen_kv], true where a key may be seen. A row may have none.

    Raises: RuntimeError from the running graph (on a GPU a device assertion) if compiled code meets a mask with holes.
    """
    kept = memo(valid)
    if "ranges" in kept:
        return kept["ranges"]
    seqlen = valid.shape[1]
    # int64, as the length is in a graph of dynamic shapes: torch 2.11 compiles no reduction of int32 beside it.
    position = torch.arange(seqlen, device=valid.device)
    start = torch.where(valid, position, seqlen).amin(dim=1).to(torch.int32)
    end = torch.where(valid, position + 1, 0).amax(dim=1).to(torch.int32)
    start = torch.minimum(start, end)  # a row without valid keys: 0 ... 0
    is_contiguous = (valid.sum(dim=1) == end - start).all()
    uniform, common_end, has_holes = None, None, False
    if values_are_readable(valid):
        # The one synchronisation of this mask.
        extremes = torch.stack([start.amin(), start.amax(), end.amin(), end.amax(), is_contiguous.to(torch.int32)])
        first_start, last_start, first_end, last_end, contiguous = extremes.tolist()
        has_holes = not contiguous
        if not has_holes and first_end == last_end:
            common_end = first_end
            uniform = (first_start, first_end) if first_start == last_start else None
    elif not valid.is_meta:
        torch._assert_async(
            is_contiguous,
            "flashmla: attention_mask in a compiled model: expected one range of valid keys per row, got keys that are not one "
            "range per row. Run this model without torch.compile, or pass a 4-D mask",
        )
    kept["ranges"] = KeyRanges(start, end, uniform, common_end, has_holes)
    return kept["ranges"]


def range_boundaries(
    ranges: KeyRanges,
    seqlen_q: int,
    seqlen_kv: int,
    queries_are_keys: bool,
    num_keys: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """cu_seqlens_q, cu_seqlens_kv, int32 [5 * batch + 1], of the table above.

    ``queries_are_keys``: self-attention, where query i stands at key position ``i + seqlen_kv - seqlen_q`` and is
    padding where that key is; ``num_keys``, int32 [], stands for seqlen_kv there if only the first so many of the keys
    are in use. Otherwise (cross-attention, or an encoder without window) every query sees the valid
    keys.
    """
    # As the key of a dictionary, a length would be a constant of a compiled graph: one graph for each.
    key = None if torch.compiler.is_compiling() else (seqlen_q, seqlen_kv, queries_are_keys)
    if key is None or key not in ranges.boundaries:
        start, end = ranges.start, ranges.end
        if queries_are_keys:
            shift = (seqlen_kv if num_keys is None else num_keys) - seqlen_q
            first = (start - shift).clamp(min=0)
            last = torch.maximum((end - shift).clamp(min=0), first)
        else:
            first = torch.zeros_like(start)
            last = torch.full_like(end, seqlen_q)
        none_q, all_q = torch.zeros_like(start), torch.full_like(start, seqlen_q)
        none_kv, all_kv = torch.zeros_like(start), torch.full_like(start, seqlen_kv)
        # Where each of a row's five sequences ends.
        ends_q = torch.stack([first, first, last, all_q, all_q], dim=1)
        ends_kv = torch.stack([none_kv, start, end, end, all_kv], dim=1)
        row = torch.arange(start.shape[0], device=start.device, dtype=torch.int32)[:, None]
        ranges.boundaries[key] = tuple(
            torch.cat([none_q[:1], (ends + row * seqlen).flatten()])
            for ends, seqlen in ((ends_q, seqlen_q), (ends_kv, seqlen_kv))
        )
    return ranges.boundaries[key]


def segment_boundaries(
    segments: torch.Tensor, padding: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """cu_seqlens_q, cu_seqlens_kv of ``segments``, int32 [batch, seqlen]: a packed sequence ends where the number
    changes and at the end of a row.

    padding: bool [batch, seqlen], true for real tokens; those of a row are one range. A run of padding is then two
    sequences, as in the table above: its queries without keys and its keys without queries.

    Under torch.compile the tensors have a fixed size and repeat their last boundary (empty sequences). Raises:
    RuntimeError from the running graph if there are more sequences than room was made for.
    """
    kept = memo(segments)
    if "boundaries" in kept and kept["boundaries"][0] is padding:
        return kept["boundaries"][1]
    total = segments.numel()
    is_first = torch.ones_like(segments, dtype=torch.bool)
    is_first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    if padding is not None:
        is_first[:, 1:] |= padding[:, 1:] != padding[:, :-1]
    number = is_first.flatten().cumsum(0, dtype=torch.int32)  # 1, 1, 1, 2, 2, 3, ...
    if values_are_readable(segments):
        capacity = int(number[-1])  # the one synchronisation of this mask
    else:
        # Every row begins a sequence, and may have padding at both ends.
        capacity = min(total, max(MIN_COMPILED_SEGMENTS, total // MIN_COMPILED_TOKENS_PER_SEGMENT) + 3 * len(segments))
        if not segments.is_meta:
            torch._assert_async(
                number[-1] <= capacity,
                # Constants alone: a formatted length would make every length a graph of its own.
                f"flashmla: packed sequences in a compiled model: expected at most {MIN_COMPILED_SEGMENTS}, or one for every "
                f"{MIN_COMPILED_TOKENS_PER_SEGMENT} tokens, got more. Pass cu_seq_lens_q/k "
                "(DataCollatorWithFlattening(return_flash_attn_kwargs=True)), or run without torch.compile",
            )
    wanted = torch.arange(1, capacity + 2, device=segments.device, dtype=torch.int32)
    # Where number first reaches 1, 2, 3, ...; past the last one that is total.
    ends = torch.searchsorted(number, wanted, out_int32=True)
    boundaries = (ends, ends)
    if padding is not None:
        begin, end = ends[:-1], ends[1:]
        is_real = padding.flatten()[begin.clamp(max=total - 1)]
        ends_q = torch.stack([end, end], dim=1).flatten()
        ends_kv = torch.stack([torch.where(is_real, end, begin), end], dim=1).flatten()
        boundaries = (torch.nn.functional.pad(ends_q, (1, 0)), torch.nn.functional.pad(ends_kv, (1, 0)))
    kept["boundaries"] = (padding, boundaries)
    return boundaries


def as_boundaries(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """``cu_seqlens`` [num_sequences + 1] as the contiguous int32 that the kernel reads: the same tensor in every layer,
    so that what an implementation derives from it is derived once."""
    if cu_seqlens.dtype == torch.int32 and cu_seqlens.is_contiguous():
        return cu_seqlens
    kept = memo(cu_seqlens)
    if "boundaries" not in kept:
        kept["boundaries"] = cu_seqlens.to(torch.int32, memory_format=torch.contiguous_format, copy=True)
    return kept["boundaries"]


def segments_from_positions(
    position_ids: torch.Tensor | None, batch: int, seqlen: int, is_causal: bool, padding: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Segment numbers, int32 [batch, seqlen], if position_ids say that rows are packed; ``None`` if they do not.

    position_ids [batch or 1, seqlen]. padding: bool [batch, seqlen], true for real tokens, or ``None``.

    This is for masks that do not say it: Transformers' mask layer looks for packed rows if there is neither a padding
    mask nor a cache, and eager attention mixes the sequences otherwise. So a causal row is cut only where it begins
    anew, which is how Transformers' flash path reads positions: where the position returns to that of the row's first
    token, the row's lowest. Nothing else cuts, as in eager attention: positions may skip, repeat and fall. A position
    that repeats the lowest one begins a sequence (after one of a single token) in a row that otherwise only counts.

    Without causality positions are those of patches, which jump inside an image, and a sequence begins at each lowest
    position (Pixtral).
    """
    if seqlen == 1 or position_ids is None or position_ids.is_floating_point():
        return None
    is_patch_grid = position_ids.dim() == 2 and batch == 1 and tuple(position_ids.shape) == (seqlen, 2) and seqlen != 2
    if not is_patch_grid and (
        position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != seqlen
    ):
        return None  # three-dimensional rotary positions and the like say nothing about packing
    kept, key = memo(position_ids), None if torch.compiler.is_compiling() else ("segments", batch, is_causal)
    if key in kept and kept[key][0] is padding:
        return kept[key][1]
    if is_patch_grid:
        # Pixtral in Transformers 5.17: (row, column) of each patch, each image beginning at (0, 0).
        is_first = (position_ids == 0).all(dim=-1)[None].clone()
        is_first[:, 0] = True
    elif is_causal:
        is_first = _begins_anew(position_ids, padding)
    else:
        is_first = position_ids == position_ids.amin(dim=-1, keepdim=True)
        is_first[:, 0] = True
    segments = None
    if not values_are_readable(position_ids) or bool(is_first[:, 1:].any()):
        segments = is_first.cumsum(-1, dtype=torch.int32).expand(batch, -1)
    kept[key] = (padding, segments)
    return segments


def _begins_anew(position_ids: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
    """Bool [batch or 1, seqlen], true for the first token of a row and of each sequence packed into it."""
    if padding is None:
        first, lowest = position_ids[:, :1], position_ids.amin(dim=-1, keepdim=True)
        is_pair = torch.ones_like(position_ids[:, 1:], dtype=torch.bool)
    else:
        position_ids = position_ids.expand(len(padding), -1)
        first = position_ids.gather(1, padding.to(torch.int8).argmax(dim=1, keepdim=True))
        lowest = position_ids.masked_fill(~padding, torch.iinfo(position_ids.dtype).max).amin(dim=-1, keepdim=True)
        is_pair = padding[:, 1:] & padding[:, :-1]
    step = position_ids.diff(dim=-1)
    is_lowest = (position_ids[:, 1:] == first) & (first == lowest) & is_pair
    is_count = (step == 1) & is_pair
    only_counts = (is_count | is_lowest | ~is_pair).all(dim=-1, keepdim=True) & is_count.any(dim=-1, keepdim=True)
    begins = is_lowest & ((step < 0) | ((step == 0) & only_counts))
    return torch.nn.functional.pad(begins, (1, 0), value=True)


def segments_from_boundaries(cu_seqlens: torch.Tensor, total: int) -> torch.Tensor:
    """Segment numbers, int32 [1, total], of the packed sequences that ``cu_seqlens`` [num_sequences + 1] separates."""
    position = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, position, right=True, out_int32=True)[None]


def is_same_segment(segments: torch.Tensor) -> torch.Tensor:
    """Bool [batch, 1, seqlen, seqlen], true where query and key have one number in ``segments`` [batch, seqlen]."""
    return segments[:, None, :, None] == segments[:, None, None, :]
