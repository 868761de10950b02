"""Implementation ``flex``: exact attention on any GPU by PyTorch's FlexAttention, always compiled, never unfused.

FlexAttention computes ``O = softmax(score_mod(Q Kᵀ) where mask_mod) V`` in one Triton kernel, block-sparse by a
BlockMask. Uncompiled, it runs plain matrix products and holds the whole score matrix; and ``torch.compile`` falls back
to that, with one log line, once a function was compiled for eight combinations of shapes and grad modes. Not here:

* every kind of call (:func:`_signature`) has a code object of its own: kinds do not use up each other's limit;
* it is compiled once for all lengths (``dynamic=True``): mask, scale and softcap are data, not code;
* ``fullgraph=True`` turns the limit, should it still be hit, into an error; and
* :func:`_require_fused` raises wherever Python, and not dynamo, executes the function that calls FlexAttention.

The mask. Every mask of this package gives query row i one contiguous range of visible keys, ``begin[i] <= j < end[i]``,
and neither bound ever falls from one row to the next: causal, windows, packed sequences and rows of no sequence differ
in those two arrays only. So one mask_mod serves them all, and the block structure, too, is a contiguous range of key
blocks per row block and of row blocks per key block, written down by arithmetic on block bounds.
``create_block_mask`` would evaluate seqlen_q * seqlen_kv elements for the same; nothing of that size exists here.

Sources: FlexAttention, arXiv 2412.05496; torch/nn/attention/flex_attention.py and torch/_inductor/kernel/flex of torch
2.11 and 2.13 (the lse comes back in natural log, fp32, -inf for a row that sees nothing; gradients flow through it).
"""

from __future__ import annotations

import importlib.util
import math
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

# tl.dot multiplies no fewer than 16 columns: smaller head dims are padded with zeros, which changes no product.
_MIN_HEAD_DIM = 16
# The tile of the kernel spans the head dim: 512 is what fits with the smallest useful tiles.
_MAX_HEAD_DIM = 512
# Batch and heads are the second and third dimension of a CUDA grid.
_MAX_GRID = 65535

# The mask's block size is torch's default, 128, until a mask would have more blocks than this on a side. A BlockMask
# holds four int32 matrices of blocks², so this bounds a mask at 4 MiB whatever the sequence length.
_BLOCK = 128
_MAX_BLOCKS = 512

# Masks are kept for the layers that follow with the same one.
_MAX_CACHED_MASKS = 16
_MAX_CACHED_SCALARS = 64

# Shared memory of a thread block that torch's own tile sizes assume at head dim 256 (A100 has 163 KiB, H100 227 KiB).
_LARGE_SHARED_MEMORY = 160 * 1024

_HAS_TRITON = importlib.util.find_spec("triton") is not None


class _Mask(NamedTuple):
    """begin, end: int32 [row_blocks * block], the visible keys of each row (see :func:`_visible_range`). The rest is
    what BlockMask holds: for each row block, which key blocks need the mask ("kv") and which need none ("full_kv"),
    and the transposed lists for the backward pass ("q", "full_q"); counts int32 [1, 1, row_blocks], indices int32
    [1, 1, row_blocks, kv_blocks] (transposed: [1, 1, kv_blocks], [1, 1, kv_blocks, row_blocks])."""

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


def refusal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why FlexAttention cannot compute attention of these tensors on their GPU, or ``None``."""
    if not _HAS_TRITON:
        return "triton is not installed, and FlexAttention without it is not fused: install the triton that torch names"
    for name, head_dim in (("head_dim_qk", q.shape[-1]), ("head_dim_v", v.shape[-1])):
        if head_dim > _MAX_HEAD_DIM:
            return f"{name} {head_dim}: expected at most {_MAX_HEAD_DIM}"
    if q.dim() == 4 and q.shape[0] > _MAX_GRID:
        return f"batch {q.shape[0]}: expected at most {_MAX_GRID}"
    if q.shape[-2] > _MAX_GRID:
        return f"heads_q {q.shape[-2]}: expected at most {_MAX_GRID}"
    return None


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    sinks: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_kv: torch.Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out, lse)`` with the shapes, dtypes and meaning of ``torch.ops.flashmla.flash_attn_forward`` (see :mod:`ops`),
    differentiable in q, k, v, sinks and through lse. The values of cu_seqlens stay on the GPU, unread and unchecked.

    Raises:
        RuntimeError: torch.compile is switched off, or compiled this kind of call too often.
    """
    is_packed = cu_seqlens_q is not None
    if is_packed:
        q, k, v = q[None], k[None], v[None]
    if q.numel() == 0 or k.numel() == 0 or (is_packed and cu_seqlens_q.shape[0] == 1):
        out, lse = _nothing_visible(q, k, v, sinks, cu_seqlens_q)
    else:
        mask, block = _mask(q, k, cu_seqlens_q, cu_seqlens_kv, window_left, window_right)
        scalars = _scalars(scale, softcap, q.device)
        head_dim_v = v.shape[-1]
        q, k, v = (_pad_head_dim(x) for x in (q, k, v))
        if torch.compiler.is_compiling():
            # Part of the caller's own graph: FlexAttention is compiled with it.
            out, lse = _fused(q, k, v, sinks, *scalars, mask, block, _is_small_gpu(q.device))
        else:
            kernel = _kernel(q, k, v, sinks, softcap > 0.0, block)
            try:
                with torch.autocast(q.device.type, enabled=False):  # the dtype is q's; and one graph less
                    out, lse = kernel(q, k, v, sinks, *scalars, mask, block, _is_small_gpu(q.device))
                _allow_retain_graph(out)
            except torch._dynamo.exc.FailOnRecompileLimitHit as error:
                raise RuntimeError(
                    "flashmla attention: impl='flex': torch.compile reached its recompile limit for one kind of call "
                    "and would run it unfused, with memory seqlen_q * seqlen_kv; raise "
                    f"torch._dynamo.config.recompile_limit (now {torch._dynamo.config.recompile_limit}), or report the "
                    "call: TORCH_LOGS=recompiles names it"
                ) from error
        out = out[..., :head_dim_v]
    return (out[0], lse[0]) if is_packed else (out, lse)


def _nothing_visible(q, k, v, sinks, cu_seqlens_q) -> tuple[torch.Tensor, torch.Tensor]:
    """out, lse where there is no query or no key: zero, and -inf or the sink; still a function of every input."""
    batch, seqlen_q, heads_q, _ = q.shape
    zero = sum(x.flatten()[:0].sum() for x in (q, k, v))  # empty sums: no value of theirs is read
    out = zero + q.new_zeros(batch, seqlen_q, heads_q, v.shape[-1])
    if sinks is None:
        lse = q.new_full((batch, heads_q, seqlen_q), -math.inf, dtype=torch.float32)
    else:
        lse = sinks.float()[None, :, None].expand(batch, heads_q, seqlen_q)
        if cu_seqlens_q is not None:
            is_outside = torch.arange(seqlen_q, device=q.device) >= cu_seqlens_q[-1]
            lse = lse.masked_fill(is_outside, -math.inf)
    return out, lse + zero.float()


def _pad_head_dim(x: torch.Tensor) -> torch.Tensor:
    missing = _MIN_HEAD_DIM - x.shape[-1]
    return functional.pad(x, (0, missing)) if missing > 0 else x


# ---- The mask -------------------------------------------------------------------------------------------------------


def _mask(q, k, cu_seqlens_q, cu_seqlens_kv, window_left: int, window_right: int) -> tuple[_Mask, int]:
    """The mask of a call (q, k with a batch dimension) and its block size, from the cache where that is sound."""
    seqlen_q, seqlen_kv = q.shape[1], k.shape[1]
    block = _BLOCK
    while max(seqlen_q, seqlen_kv) > block * _MAX_BLOCKS:
        block *= 2
    # A bound past both lengths is no bound, and must not overflow int32 below.
    longest = max(seqlen_q, seqlen_kv)
    window_left = -1 if window_left >= longest else window_left
    window_right = -1 if window_right >= longest else window_right
    arguments = (seqlen_q, seqlen_kv, cu_seqlens_q, cu_seqlens_kv, window_left, window_right, q.device, block)

    if torch.compiler.is_compiling():
        return _Mask(*torch.ops.flashmla.flex_mask(*arguments)), block
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        # The mask's memory belongs to the CUDA graph: it must not be handed to others, who would read it between
        # replays; and nothing the cache may free can be in a graph.
        return _build_mask(*arguments), block

    # A mask is built asynchronously: another stream must not read what this one has yet to write.
    stream = torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else None
    boundaries = (cu_seqlens_q, cu_seqlens_kv) if cu_seqlens_q is not None else ()
    if any(x.is_inference() for x in boundaries):  # has no version by which a change in place would show
        return _build_mask(*arguments), block
    key = (*((id(x), x._version) for x in boundaries), seqlen_q, seqlen_kv, window_left, window_right, q.device, stream)
    found = _masks.get(key)
    # An id may be that of a new tensor where the old one died.
    if found is not None and all(ref() is x for ref, x in zip(found[1], boundaries, strict=True)):
        _masks.move_to_end(key)
        return found[0], block
    with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not be saved for a backward pass
        mask = _build_mask(*arguments)
    _masks[key] = (mask, tuple(weakref.ref(x) for x in boundaries))
    if len(_masks) > _MAX_CACHED_MASKS:
        _masks.popitem(last=False)
    return mask, block


_masks: OrderedDict[tuple, tuple[_Mask, tuple[weakref.ref, ...]]] = OrderedDict()


def _build_mask(
    seqlen_q: int,
    seqlen_kv: int,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_kv: torch.Tensor | None,
    window_left: int,
    window_right: int,
    device: torch.device,
    block: int,
) -> _Mask:
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
    """:func:`_build_mask` as one node of a caller's graph. Traced through instead, begin and end would be inlined into
    the mask_mod, which torch 2.11 cannot lower (``'int' object has no attribute 'free_symbols'``)."""
    return list(_build_mask(seqlen_q, seqlen_kv, cu_seqlens_q, cu_seqlens_kv, window_left, window_right, device, block))


@_mask_operator.register_fake
def _(*arguments) -> list[torch.Tensor]:
    return list(_build_mask(*arguments))


def _visible_range(seqlen_q, seqlen_kv, cu_seqlens_q, cu_seqlens_kv, window_left, window_right, device):
    """begin, end: int32 [seqlen_q]: row i sees the keys begin[i] <= j < end[i]; neither array ever falls.

    With ``p`` the key position of row i (bottom-right aligned), begin is ``p - window_left`` and end
    ``p + window_right + 1``, both clamped to the keys of the row's sequence. Packed: seqlen is the packed length; a row
    of no sequence begins one behind its end, the last key of all, by which it is told from one that sees no key.
    """
    row = torch.arange(seqlen_q, device=device, dtype=torch.int32)
    if cu_seqlens_q is None:
        first = torch.zeros_like(row)
        last = torch.full_like(row, seqlen_kv)
        position = row + (seqlen_kv - seqlen_q)
    else:
        # Values nobody has checked must not lead the kernel out of K and V.
        cu_seqlens_kv = cu_seqlens_kv.clamp(0, seqlen_kv)
        # Behind the last of equal boundaries: the sequence that holds the row, not an empty one before it.
        sequence = torch.searchsorted(cu_seqlens_q, row, right=True) - 1
        is_outside = sequence >= cu_seqlens_q.shape[0] - 1
        sequence = sequence.clamp(0, cu_seqlens_q.shape[0] - 2)
        last = cu_seqlens_kv[sequence + 1]
        first = torch.where(is_outside, last, cu_seqlens_kv[sequence])
        position = row - cu_seqlens_q[sequence + 1] + last
    begin = first if window_left < 0 else torch.minimum(torch.maximum(position - window_left, first), last)
    end = last if window_right < 0 else torch.minimum(torch.maximum(position + (window_right + 1), first), last)
    return (begin, end) if cu_seqlens_q is None else (begin + is_outside.to(torch.int32), end)


def _block_structure(begin: torch.Tensor, end: torch.Tensor, seqlen_kv: int, block: int) -> _Mask:
    """The block lists of a mask given by row ranges (see :func:`_visible_range`), in O(blocks²) integers.

    Since begin and end never fall, row block I touches exactly the key blocks ``first[I] <= J < last[I]``, visible
    whole to all of its rows for ``full_first[I] <= J < full_last[I]``; and these four never fall either, so that the
    row blocks of a key block J are contiguous: from the number of those with ``last <= J`` to that with ``first <= J``.
    """
    seqlen_q = begin.shape[0]
    # At least two blocks a side: torch.compile makes an extra graph for every dimension of length one.
    rows, columns = (max(2, (length + block - 1) // block) for length in (seqlen_q, seqlen_kv))
    # Rows that fill the last row block up see nothing, at the next key block, so that they stretch no range and that no
    # incomplete row block counts as visible whole.
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

    return _Mask(
        begin,
        end,
        *_block_lists(first, last, full_first, full_last, columns),
        *_block_lists(touched_from, touched_to, full_from, full_to, rows),
    )


def _block_lists(first, last, full_first, full_last, columns: int) -> tuple[torch.Tensor, ...]:
    """counts, indices, full counts, full indices from ranges: [first, last) without [full_first, full_last), and that.

    Entries behind a list's count are never used as blocks; they are clamped because the kernels do read the first one.
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
    # Copies, since dynamo also guards on the sizes of what a view is a view of.
    return tuple(x[None, None].clone() for x in lists)


# ---- The kernel -----------------------------------------------------------------------------------------------------


def _scalars(scale: float, softcap: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """inner, softcap: fp32 tensors [], so that no value of theirs is compiled into a kernel. The score of a product is
    ``inner * product``, or ``softcap * tanh(inner * product)``."""
    values = (scale / softcap, softcap) if softcap > 0.0 else (scale, None)

    def full(value: float | None) -> torch.Tensor | None:
        # A fill is a kernel: no copy from the host, no synchronisation, and fine to capture.
        return None if value is None else torch.full((), value, dtype=torch.float32, device=device)

    if torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return full(values[0]), full(values[1])  # for the reasons in _mask
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    key = (*values, device, stream)
    found = _scalar_tensors.get(key)
    if found is None:
        with torch.inference_mode(False):
            found = _scalar_tensors[key] = (full(values[0]), full(values[1]))
        if len(_scalar_tensors) > _MAX_CACHED_SCALARS:
            _scalar_tensors.popitem(last=False)
    return found


_scalar_tensors: OrderedDict[tuple, tuple[torch.Tensor, torch.Tensor | None]] = OrderedDict()


def _require_fused() -> None:
    """Raises where FlexAttention would run unfused. Dynamo evaluates the condition while it compiles, and drops it."""
    if not torch.compiler.is_dynamo_compiling():
        raise RuntimeError(
            "flashmla attention: impl='flex': torch.compile is switched off here (TORCH_COMPILE_DISABLE, "
            "torch._dynamo.config.disable or suppress_errors, torch.compiler.set_stance or disable), and FlexAttention "
            "would run unfused, with memory seqlen_q * seqlen_kv; switch it on, or choose impl='sdpa' or 'reference'"
        )


def _fused(
    q: torch.Tensor,  # [batch, seqlen_q, heads_q, head_dim_qk]
    k: torch.Tensor,  # [batch, seqlen_kv, heads_kv, head_dim_qk]
    v: torch.Tensor,  # [batch, seqlen_kv, heads_kv, head_dim_v]
    sinks: torch.Tensor | None,  # fp32 [heads_q]
    inner: torch.Tensor,  # fp32 []
    softcap: torch.Tensor | None,  # fp32 []
    mask: _Mask,
    block: int,
    is_small_gpu: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [batch, seqlen_q, heads_q, head_dim_v], lse fp32 [batch, heads_q, seqlen_q]. What dynamo compiles."""
    _require_fused()
    begin, end = mask.begin, mask.end

    def is_visible(batch, head, row, key):
        return (key >= begin[row]) & (key < end[row])

    def score(product, batch, head, row, key):
        return product * inner

    def capped_score(product, batch, head, row, key):
        return torch.tanh(product * inner) * softcap

    block_mask = BlockMask(
        seq_lengths=(q.shape[1], k.shape[1]),
        kv_num_blocks=mask.kv_counts,
        kv_indices=mask.kv_indices,
        full_kv_num_blocks=mask.full_kv_counts,
        full_kv_indices=mask.full_kv_indices,
        q_num_blocks=mask.q_counts,
        q_indices=mask.q_indices,
        full_q_num_blocks=mask.full_q_counts,
        full_q_indices=mask.full_q_indices,
        BLOCK_SIZE=(block, block),
        mask_mod=is_visible,
    )
    out, statistics = flex_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        score_mod=score if softcap is None else capped_score,
        block_mask=block_mask,
        scale=1.0,  # applied by score_mod: a number here would be compiled into the kernel
        enable_gqa=True,
        kernel_options=_kernel_options(q.dtype, q.shape[-1], v.shape[-1], block, is_small_gpu),
        return_aux=AuxRequest(lse=True),
    )
    out, lse = out.transpose(1, 2), statistics.lse
    if sinks is not None:
        # One more key of logit sinks[h] and value zero scales what the others sum to: out * exp(lse - new lse). A row
        # that sees no other key has lse -inf; it is taken out first, since logaddexp has no gradient at -inf.
        # Softmax of a sink of +inf is NaN, as of one that is NaN, in all of a row.
        is_dead = lse == -math.inf
        sink = sinks[None, :, None].expand_as(lse)
        live_lse = lse.masked_fill(is_dead, 0.0)
        share = torch.sigmoid(live_lse - sink)  # of the keys in the denominator
        share = torch.where(sink == math.inf, math.nan, share)
        out = (out * share.transpose(1, 2)[..., None]).to(q.dtype)
        lse = torch.where(is_dead, sink, torch.logaddexp(live_lse, sink))
        is_outside = (begin > end)[: q.shape[1]]  # no sequence, no sink
        lse = lse.masked_fill(is_outside, -math.inf)
    return out, lse


def _kernel_options(dtype: torch.dtype, head_dim_qk: int, head_dim_v: int, block: int, is_small_gpu: bool) -> dict:
    """FlexAttention's kernel options: torch's own tile sizes where it has measured some, smaller ones where those would
    not fit into shared memory (Q, and K and V twice, head dims rounded up to a power of two)."""
    # Not the decoding kernel, whose choice depends on whether the batch happens to be a constant of the graph.
    options: dict = {"BACKEND": "TRITON"}
    if block != _BLOCK:
        # A length that is a multiple of 128 is no reason to skip bound checks when mask blocks are larger than that.
        options["IS_DIVISIBLE"] = False
    largest = max(head_dim_qk, head_dim_v)
    if largest > 256:
        tile = (16, 16) if dtype == torch.float32 else (32, 32)
    elif is_small_gpu and largest > (64 if dtype == torch.float32 else 128):
        tile = (32, 16) if dtype == torch.float32 else (32, 32)
    elif dtype == torch.float32 and largest > 128 and not head_dim_qk == head_dim_v == 256:
        tile = (32, 32)
    elif 128 < head_dim_qk < 256 and head_dim_v > 128:
        tile = (64, 32)  # torch's (64, 64) takes 224 KiB on a Hopper GPU, and more than an A100 has
    else:
        return options
    options.update(fwd_BLOCK_M=tile[0], fwd_BLOCK_N=tile[1], fwd_num_stages=2, fwd_num_warps=4)
    if is_small_gpu and largest <= 256 and dtype != torch.float32:
        options.update(
            bwd_BLOCK_M1=32, bwd_BLOCK_N1=32, bwd_BLOCK_M2=32, bwd_BLOCK_N2=32, bwd_num_stages=1, bwd_num_warps=4
        )  # fmt: skip
    return options


def _is_small_gpu(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    # Unlike get_device_capability, a constant to dynamo. AMD GPUs do not have the attribute, and 64 KiB.
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 0) < _LARGE_SHARED_MEMORY


_kernels: dict[tuple, Callable] = {}


def _kernel(q, k, v, sinks, has_softcap: bool, block: int) -> Callable:
    """:func:`_fused`, compiled for this kind of call and all lengths, on its first call, which takes seconds."""
    signature = _signature(q, k, v, sinks, has_softcap, block)
    kernel = _kernels.get(signature)
    if kernel is None:
        # dynamo keeps compiled code, and counts it against the recompile limit, per code object: this one is new.
        code = _fused.__code__.replace(co_name=f"flex_attention_{len(_kernels)}")
        function = types.FunctionType(code, _fused.__globals__, code.co_name)
        kernel = _kernels[signature] = _FirstCall(signature, torch.compile(function, fullgraph=True, dynamic=True))
    return kernel


_first_calls = threading.RLock()


class _FirstCall:
    """A compiled function before the call that traces it; then puts the function itself into its place."""

    def __init__(self, signature: tuple, compiled: Callable) -> None:
        self.signature, self.compiled = signature, compiled

    def __call__(self, *args):
        # Without this, lengths that are equal in the first call by coincidence (batch and number of blocks, queries and
        # keys) are taken to be equal always, and the next call compiles again. One thread at a time: in releases of torch
        # where these settings belong to the process, two that overlap would leave theirs behind.
        with _first_calls, torch.fx.experimental._config.patch(use_duck_shape=False), _without_donated_buffers():
            results = self.compiled(*args)
        _kernels[self.signature] = self.compiled
        return results


def _without_donated_buffers():
    """A context in which a backward is compiled that writes over nothing it was given, so that it can run again."""
    return torch._functorch.config.patch(donated_buffer=False)


def _allow_retain_graph(out: torch.Tensor) -> None:
    """Says of the compiled backward of ``out`` that no buffer is donated to it, which torch otherwise takes for unknown, and
    refuses ``retain_graph=True``."""
    node = out.grad_fn
    while node is not None and not hasattr(getattr(node, "_forward_cls", None), "metadata"):
        node = node.next_functions[0][0] if node.next_functions else None
    if node is not None and getattr(node._forward_cls.metadata, "bw_donated_idxs", []) is None:
        node._forward_cls.metadata.bw_donated_idxs = []


def _signature(q, k, v, sinks, has_softcap: bool, block: int) -> tuple:
    """What a graph is compiled for: all that dynamo guards on except lengths, of which it tells one from more."""

    def facts(x: torch.Tensor | None) -> tuple | None:
        if x is None:
            return None
        if x.dim() == 1:
            return (x.requires_grad, x.is_inference())
        batch, seqlen, heads, head_dim = x.shape
        layout = (x.is_contiguous(), x.transpose(1, 2).is_contiguous())
        if x._base is not None:
            layout += (x._base.is_contiguous(), *(length == 1 for length in x._base.shape))
        return (batch == 1, seqlen == 1, heads, head_dim, layout, x.requires_grad, x.is_inference())

    modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled())
    return (q.dtype, q.device, *(facts(x) for x in (q, k, v, sinks)), has_softcap, block, *modes)
