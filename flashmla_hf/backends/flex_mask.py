"""The masks of implementation ``flex``: arrays of visible ranges, and the block lists of FlexAttention's BlockMask.

Every mask of this package gives query row i one contiguous range of visible keys, ``begin[i] <= j < end[i]``, and neither
bound falls from one row to the next: causal masks, windows, packed sequences and rows outside every sequence differ in these
two arrays only. So one mask_mod serves them all. The block structure is contiguous, too: a range of key blocks per row block,
and of row blocks per key block, computed from the bounds of blocks. ``create_block_mask`` would evaluate
seqlen_q * seqlen_kv elements for the same lists; nothing of that size exists here.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import NamedTuple

import torch

# The mask's block size is torch's default, 128, until a mask would have more blocks than this on a side. A BlockMask
# holds four int32 matrices of blocks², so this bounds a mask at 4 MiB whatever the sequence length.
BLOCK = 128
_MAX_BLOCKS = 512

# Masks are kept for the following layers of a model, which ask for the same ones.
_MAX_CACHED_MASKS = 16


class Mask(NamedTuple):
    """The visible keys of each row, and the lists of a BlockMask.

    begin, end: int32 [row_blocks * block] (see :func:`_visible_range`). The lists name, for each row block, the key blocks that
    need the mask ("kv") and those that need none ("full_kv"), and transposed for the backward pass ("q", "full_q"). Counts are
    int32 [1, 1, row_blocks], indices int32 [1, 1, row_blocks, kv_blocks] (transposed: [1, 1, kv_blocks],
    [1, 1, kv_blocks, row_blocks]).
    """

    begin: torch.Tensor
    end: torch.Tensor
    kv_counts: torch.Tensor
    kv_indices: torch.Tensor
    full_kv_counts: torch.Tensor
    full_kv_indices: torch.Tensor
    q_counts: torch.Tensor
    q_indices: torch.Tensor
    full_q_counts: torch.Tensor
    full_q_indices: torch.Tensor


def find(q, k, cu_seqlens_q, cu_seqlens_kv, window_left: int, window_right: int) -> tuple[Mask, int]:
    """The mask of a call (q, k with a batch dimension) and its block size, from the cache if a cached mask is still valid."""
    seqlen_q, seqlen_kv = q.shape[1], k.shape[1]
    block = BLOCK
    while max(seqlen_q, seqlen_kv) > block * _MAX_BLOCKS:
        block *= 2
    # A bound beyond both lengths hides nothing. As a number it could overflow int32 below.
    longest = max(seqlen_q, seqlen_kv)
    window_left = -1 if window_left >= longest else window_left
    window_right = -1 if window_right >= longest else window_right
    arguments = (seqlen_q, seqlen_kv, cu_seqlens_q, cu_seqlens_kv, window_left, window_right, q.device, block)

    if torch.compiler.is_compiling():
        return Mask(*torch.ops.flashmla.flex_mask(*arguments)), block
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        # The mask's memory belongs to the CUDA graph: other calls would read it between replays, and the cache could free
        # memory that the graph still reads.
        return build(*arguments), block

    # A mask is built asynchronously: another stream could read it before this one has written it.
    stream = torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else None
    boundaries = (cu_seqlens_q, cu_seqlens_kv) if cu_seqlens_q is not None else ()
    if any(x.is_inference() for x in boundaries):  # they count no changes in place, so a cached mask could be outdated
        return build(*arguments), block
    key = (*((id(x), x._version) for x in boundaries), seqlen_q, seqlen_kv, window_left, window_right, q.device, stream)
    found = _masks.get(key)
    # A new tensor can have the id of one that was freed.
    if found is not None and all(ref() is x for ref, x in zip(found[1], boundaries, strict=True)):
        _masks.move_to_end(key)
        return found[0], block
    with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not be saved for a backward pass
        mask = build(*arguments)
    _masks[key] = (mask, tuple(weakref.ref(x) for x in boundaries))
    if len(_masks) > _MAX_CACHED_MASKS:
        _masks.popitem(last=False)
    return mask, block


_masks: OrderedDict[tuple, tuple[Mask, tuple[weakref.ref, ...]]] = OrderedDict()


def build(
    seqlen_q: int,
    seqlen_kv: int,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_kv: torch.Tensor | None,
    window_left: int,
    window_right: int,
    device: torch.device,
    block: int,
) -> Mask:
    begin, end = _visible_range(seqlen_q, seqlen_kv, cu_seqlens_q, cu_seqlens_kv, window_left, window_right, device)
    return _block_structure(begin, end, seqlen_kv, block)


@torch.library.custom_op("flashmla::flex_mask", mutates_args=())
def _mask_operator(
    seqlen_q: int,
    seqlen_kv: int,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_kv: torch.Tensor | None,
    window_left: int,
    window_right: int,
    device: torch.device,
    block: int,
) -> list[torch.Tensor]:
    """:func:`build` as one node of a caller's graph. If dynamo traced it, begin and end would be inlined into
    the mask_mod, which torch 2.11 cannot lower (``'int' object has no attribute 'free_symbols'``)."""
    return list(build(seqlen_q, seqlen_kv, cu_seqlens_q, cu_seqlens_kv, window_left, window_right, device, block))


@_mask_operator.register_fake
def _(*arguments) -> list[torch.Tensor]:
    return list(build(*arguments))


def _visible_range(seqlen_q, seqlen_kv, cu_seqlens_q, cu_seqlens_kv, window_left, window_right, device):
    """begin, end: int32 [seqlen_q]: row i sees the keys begin[i] <= j < end[i]; neither array ever falls.

    With ``p`` the key position of row i (bottom-right aligned), begin is ``p - window_left`` and end
    ``p + window_right + 1``, both clamped to the keys of the row's sequence. Packed: seqlen is the packed length. For a row
    outside every sequence begin is ``end + 1``, which tells it from a row that sees no key.
    """
    row = torch.arange(seqlen_q, device=device, dtype=torch.int32)
    if cu_seqlens_q is None:
        first = torch.zeros_like(row)
        last = torch.full_like(row, seqlen_kv)
        position = row + (seqlen_kv - seqlen_q)
    else:
        # Nobody has checked these values; clamped, they cannot lead the kernel out of K and V.
        cu_seqlens_kv = cu_seqlens_kv.clamp(0, seqlen_kv)
        # Searching behind the last of equal boundaries finds the sequence that holds the row, not an empty one before it.
        sequence = torch.searchsorted(cu_seqlens_q, row, right=True) - 1
        is_outside = sequence >= cu_seqlens_q.shape[0] - 1
        sequence = sequence.clamp(0, cu_seqlens_q.shape[0] - 2)
        last = cu_seqlens_kv[sequence + 1]
        first = torch.where(is_outside, last, cu_seqlens_kv[sequence])
        position = row - cu_seqlens_q[sequence + 1] + last
    begin = first if window_left < 0 else torch.minimum(torch.maximum(position - window_left, first), last)
    end = last if window_right < 0 else torch.minimum(torch.maximum(position + (window_right + 1), first), last)
    return (begin, end) if cu_seqlens_q is None else (begin + is_outside.to(torch.int32), end)


def _block_structure(begin: torch.Tensor, end: torch.Tensor, seqlen_kv: int, block: int) -> Mask:
    """The block lists of a mask given by row ranges (see :func:`_visible_range`), in O(blocks²) integers.

    Since begin and end never fall, row block I touches exactly the key blocks ``first[I] <= J < last[I]``. All its rows see
    the whole of the blocks ``full_first[I] <= J < full_last[I]``. These four arrays never fall either, so the row blocks of a
    key block J are contiguous: from the number of row blocks with ``last <= J`` to the number with ``first <= J``.
    """
    seqlen_q = begin.shape[0]
    # At least two blocks a side: torch.compile makes an extra graph for every dimension of length one.
    rows, columns = (max(2, (length + block - 1) // block) for length in (seqlen_q, seqlen_kv))
    # Rows that pad the last row block see nothing. Their range is empty and begins at the next key block, so it widens no range
    # and an incomplete row block does not count as wholly visible.
    beyond = ((end[-1:] + (block - 1)) // block * block).expand(rows * block - seqlen_q)
    begin, end = torch.cat([begin, beyond]), torch.cat([end, beyond])

    first = begin[::block] // block
    last = (end[block - 1 :: block] + (block - 1)) // block
    full_first = torch.minimum(torch.maximum((begin[block - 1 :: block] + (block - 1)) // block, first), last)
    full_last = torch.minimum(torch.maximum(end[::block] // block, full_first), last)

    key_block = torch.arange(columns, device=begin.device, dtype=torch.int32)[:, None]
    touched_from, touched_to, full_from, full_to = (
        (bound <= key_block).sum(dim=1, dtype=torch.int32) for bound in (last, first, full_last, full_first)
    )
    full_from = torch.minimum(torch.maximum(full_from, touched_from), touched_to)
    full_to = torch.minimum(torch.maximum(full_to, full_from), touched_to)

    return Mask(
        begin,
        end,
        *_block_lists(first, last, full_first, full_last, columns),
        *_block_lists(touched_from, touched_to, full_from, full_to, rows),
    )


def _block_lists(first, last, full_first, full_last, columns: int) -> tuple[torch.Tensor, ...]:
    """counts, indices of [first, last) without [full_first, full_last); full counts, full indices of the latter.

    No entry behind a list's count is used as a block. They are clamped because the kernels read the first one all the same.
    """
    n = torch.arange(columns, device=first.device, dtype=torch.int32)
    before = (full_first - first)[:, None]
    indices = torch.where(n < before, first[:, None] + n, full_last[:, None] + n - before)
    full_indices = full_first[:, None] + n
    lists = (
        full_first - first + last - full_last,
        indices.clamp(0, columns - 1),
        full_last - full_first,
        full_indices.clamp(0, columns - 1),
    )
    # Copies, because dynamo also guards on the sizes of the tensor that a view looks into.
    return tuple(x[None, None].clone() for x in lists)
