"""Implementation ``flex``: exact attention on any GPU by PyTorch's FlexAttention, always compiled, never unfused.

FlexAttention computes ``O = softmax(score_mod(Q Kᵀ) where mask_mod) V`` in one Triton kernel, block-sparse by a
BlockMask (:mod:`flex_mask`). Uncompiled, it runs plain matrix products and holds the whole score matrix. ``torch.compile``
falls back to that, with one log line, after it has compiled a function for eight combinations of shapes and grad modes. This
module prevents it:

* every kind of call (:func:`_signature`) has its own code object, so kinds do not use up each other's limit;
* a kind is compiled once for all lengths (``dynamic=True``): mask, scale and softcap are data, not code;
* ``fullgraph=True`` turns reaching the limit into an error; and
* :func:`_require_fused` raises if Python executes the function that calls FlexAttention, instead of dynamo tracing it.

Sources: FlexAttention, arXiv 2412.05496; torch/nn/attention/flex_attention.py and torch/_inductor/kernel/flex of torch
2.11 and 2.13 (the lse comes back in natural log, fp32, -inf for a row that sees nothing; gradients flow through it).
"""

from __future__ import annotations

import importlib.util
import math
import threading
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from flashmla_hf.backend import Backend, kernel_refusal
from flashmla_hf.backends import flex_mask
from flashmla_hf.backends.flex_mask import Mask
from flashmla_hf.validation import Call

# tl.dot multiplies no fewer than 16 columns: smaller head dims are padded with zeros, which changes no product.
_MIN_HEAD_DIM = 16
# The tile of the kernel spans the head dim: 512 is what fits with the smallest useful tiles.
_MAX_HEAD_DIM = 512
# Batch and heads are the second and third dimension of a CUDA grid.
_MAX_GRID = 65535

_MAX_CACHED_SCALARS = 64

# Shared memory of a thread block that torch's own tile sizes assume at head dim 256 (A100 has 163 KiB, H100 227 KiB).
_LARGE_SHARED_MEMORY = 160 * 1024

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def refusal(call: Call) -> str | None:
    if call.q.device.type != "cuda":
        return f"the tensors are on {call.q.device}: expected a GPU"
    return kernel_refusal(call) or size_refusal(call.q, call.k, call.v)


def size_refusal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why FlexAttention cannot compute attention of these tensors on their GPU, or ``None``."""
    if not _HAS_TRITON:
        return (
            "triton is not installed, and FlexAttention is fused only with it: install the triton that torch requires"
        )
    for name, head_dim in (("head_dim_qk", q.shape[-1]), ("head_dim_v", v.shape[-1])):
        if head_dim > _MAX_HEAD_DIM:
            return f"{name} {head_dim}: expected at most {_MAX_HEAD_DIM}"
    if q.dim() == 4 and q.shape[0] > _MAX_GRID:
        return f"batch {q.shape[0]}: expected at most {_MAX_GRID}"
    if q.shape[-2] > _MAX_GRID:
        return f"heads_q {q.shape[-2]}: expected at most {_MAX_GRID}"
    return None


def run(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    return attention(
        call.q,
        call.k,
        call.v,
        sinks=call.sinks,
        cu_seqlens_q=call.cu_seqlens_q,
        cu_seqlens_kv=call.cu_seqlens_kv,
        scale=call.scale,
        window_left=call.window_left,
        window_right=call.window_right,
        softcap=call.softcap,
    )


BACKEND = Backend(refusal, run)


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
    differentiable in q, k, v, sinks and through lse. The values of cu_seqlens stay on the GPU and are not checked.

    Raises:
        RuntimeError: torch.compile is switched off, or compiled this kind of call too often.
    """
    is_packed = cu_seqlens_q is not None
    if is_packed:
        q, k, v = q[None], k[None], v[None]
    if q.numel() == 0 or k.numel() == 0 or (cu_seqlens_q is not None and cu_seqlens_q.shape[0] == 1):
        out, lse = _nothing_visible(q, k, v, sinks, cu_seqlens_q)
    else:
        mask, block = flex_mask.find(q, k, cu_seqlens_q, cu_seqlens_kv, window_left, window_right)
        scalars = _scalars(scale, softcap, q.device)
        head_dim_v = v.shape[-1]
        q, k, v = (_pad_head_dim(x) for x in (q, k, v))
        if torch.compiler.is_compiling():
            # The caller's own graph contains FlexAttention and compiles it.
            out, lse = _fused(q, k, v, sinks, *scalars, mask, block, _is_small_gpu(q.device))
        else:
            kernel = _kernel(q, k, v, sinks, softcap > 0.0, block)
            try:
                with torch.autocast(
                    q.device.type, enabled=False
                ):  # the dtype is q's, and dynamo compiles one graph less
                    out, lse = kernel(q, k, v, sinks, *scalars, mask, block, _is_small_gpu(q.device))
                _allow_retain_graph(out)
            except torch._dynamo.exc.FailOnRecompileLimitHit as error:
                raise RuntimeError(
                    "flashmla attention: impl='flex': torch.compile reached its recompile limit for one kind of call and "
                    "would run it unfused, with memory seqlen_q * seqlen_kv. Raise torch._dynamo.config.recompile_limit (now "
                    f"{torch._dynamo.config.recompile_limit}), or report the call, which TORCH_LOGS=recompiles names"
                ) from error
        out = out[..., :head_dim_v]
    return (out[0], lse[0]) if is_packed else (out, lse)


def _nothing_visible(q, k, v, sinks, cu_seqlens_q) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse if there is no query or no key: zero, and -inf or the sink. Both stay functions of every input."""
    batch, seqlen_q, heads_q, _ = q.shape
    zero = sum(x.flatten()[:0].sum() for x in (q, k, v))  # empty sums, which read no value
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


# ---- The kernel -----------------------------------------------------------------------------------------------------

_Scalars = tuple[torch.Tensor, torch.Tensor | None]


def _scalars(scale: float, softcap: float, device: torch.device) -> _Scalars:
    """inner, softcap: fp32 tensors [], so that their values are not compiled into a kernel. The score of a product is
    ``inner * product``, or ``softcap * tanh(inner * product)``."""
    values = (scale / softcap, softcap) if softcap > 0.0 else (scale, None)

    def tensors() -> _Scalars:
        # A fill is a kernel: it copies nothing from the host, does not synchronise, and can be captured.
        inner, cap = (None if x is None else torch.full((), x, dtype=torch.float32, device=device) for x in values)
        assert inner is not None
        return inner, cap

    if torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return tensors()  # for the reasons in flex_mask.find
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    key = (*values, device, stream)
    found = _scalar_tensors.get(key)
    if found is None:
        with torch.inference_mode(False):
            found = _scalar_tensors[key] = tensors()
        if len(_scalar_tensors) > _MAX_CACHED_SCALARS:
            _scalar_tensors.popitem(last=False)
    return found


_scalar_tensors: OrderedDict[tuple, _Scalars] = OrderedDict()


def _require_fused() -> None:
    """Raises if FlexAttention would run unfused. Dynamo evaluates the condition while it compiles, and drops it."""
    if not torch.compiler.is_dynamo_compiling():
        raise RuntimeError(
            "flashmla attention: impl='flex': torch.compile is switched off here (TORCH_COMPILE_DISABLE, "
            "torch._dynamo.config.disable or suppress_errors, torch.compiler.set_stance or disable), so FlexAttention "
            "would run unfused, with memory seqlen_q * seqlen_kv. Switch it on, or pass impl='sdpa' or 'reference'"
        )


def _fused(
    q: torch.Tensor,  # [batch, seqlen_q, heads_q, head_dim_qk]
    k: torch.Tensor,  # [batch, seqlen_kv, heads_kv, head_dim_qk]
    v: torch.Tensor,  # [batch, seqlen_kv, heads_kv, head_dim_v]
    sinks: torch.Tensor | None,  # fp32 [heads_q]
    inner: torch.Tensor,  # fp32 []
    softcap: torch.Tensor | None,  # fp32 []
    mask: Mask,
    block: int,
    is_small_gpu: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [batch, seqlen_q, heads_q, head_dim_v], lse fp32 [batch, heads_q, seqlen_q]. Dynamo compiles this function."""
    _require_fused()
    begin, end = mask.begin, mask.end

    def is_visible(batch, head, row, key):
        return (key >= begin[row]) & (key < end[row])

    def score(product, batch, head, row, key):
        return product * inner

    def capped_score(product, batch, head, row, key):
        return torch.tanh(product * inner) * softcap  # type: ignore[operator]

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
    out, statistics = flex_attention(  # type: ignore[call-overload]
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
        # A sink is one more key, of logit sinks[h] and value zero. It scales the sum of the others: out * exp(lse - new lse). A
        # row that sees no other key has lse -inf and is excluded, since logaddexp has no gradient at -inf. The softmax of a
        # sink of +inf is NaN in a whole row, like that of a sink that is NaN.
        is_dead = lse == -math.inf
        sink = sinks[None, :, None].expand_as(lse)
        live_lse = lse.masked_fill(is_dead, 0.0)
        share = torch.sigmoid(live_lse - sink)  # of the keys in the denominator
        share = torch.where(sink == math.inf, math.nan, share)
        out = (out * share.transpose(1, 2)[..., None]).to(q.dtype)
        lse = torch.where(is_dead, sink, torch.logaddexp(live_lse, sink))
        is_outside = (begin > end)[: q.shape[1]]  # rows outside every sequence have no sink
        lse = lse.masked_fill(is_outside, -math.inf)
    return out, lse


def _kernel_options(dtype: torch.dtype, head_dim_qk: int, head_dim_v: int, block: int, is_small_gpu: bool) -> dict:
    """FlexAttention's kernel options: torch's own tile sizes, or smaller ones if those do not fit into shared memory.

    A tile holds Q, and K and V twice, with head dims rounded up to a power of two.
    """
    # This excludes the decoding kernel, whose choice depends on whether the batch happens to be a constant of the graph.
    options: dict[str, Any] = {"BACKEND": "TRITON"}
    if block != flex_mask.BLOCK:
        # torch skips bound checks for lengths that are multiples of 128. With larger mask blocks the checks are needed.
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
    # Unlike get_device_capability, this is a constant to dynamo. AMD GPUs have 64 KiB, and lack the attribute.
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 0) < _LARGE_SHARED_MEMORY


_kernels: dict[tuple, Callable] = {}


def _kernel(q, k, v, sinks, has_softcap: bool, block: int) -> Callable:
    """:func:`_fused`, compiled for this kind of call and all lengths. The first call compiles it, which takes seconds."""
    signature = _signature(q, k, v, sinks, has_softcap, block)
    kernel = _kernels.get(signature)
    if kernel is None:
        # dynamo keeps compiled code, and counts it against the recompile limit, per code object. This one is new.
        code = _fused.__code__.replace(co_name=f"flex_attention_{len(_kernels)}")
        function = types.FunctionType(code, _fused.__globals__, code.co_name)
        kernel = _kernels[signature] = _FirstCall(signature, torch.compile(function, fullgraph=True, dynamic=True))
    return kernel


_first_calls = threading.RLock()


class _FirstCall:
    """A compiled function before its first call, which traces it; afterwards the table holds the function itself."""

    def __init__(self, signature: tuple, compiled: Callable) -> None:
        self.signature, self.compiled = signature, compiled

    def __call__(self, *args):
        # Without use_duck_shape=False, dynamo assumes that lengths which are equal in the first call by coincidence (batch and
        # number of blocks, queries and keys) are always equal, and the next call compiles again. The lock is for releases of
        # torch in which these settings belong to the process: two threads that overlap would leave theirs behind.
        with _first_calls, _without_duck_shapes(), _without_donated_buffers():
            results = self.compiled(*args)
        _kernels[self.signature] = self.compiled
        return results


def _without_duck_shapes() -> Any:
    """A context in which dynamo does not assume that lengths which are equal once are always equal."""
    config: Any = torch.fx.experimental._config
    return config.patch(use_duck_shape=False)


def _without_donated_buffers() -> Any:
    """A context in which the compiled backward overwrites none of its inputs, so that it can run again."""
    return torch._functorch.config.patch(donated_buffer=False)


def _allow_retain_graph(out: torch.Tensor) -> None:
    """Declares that no buffer is donated to the compiled backward of ``out``.

    Otherwise torch does not know whether one is, and refuses ``retain_graph=True``.
    """
    node: Any = out.grad_fn
    while node is not None and not hasattr(getattr(node, "_forward_cls", None), "metadata"):
        node = node.next_functions[0][0] if node.next_functions else None
    if node is not None and getattr(node._forward_cls.metadata, "bw_donated_idxs", []) is None:
        node._forward_cls.metadata.bw_donated_idxs = []


def _signature(q, k, v, sinks, has_softcap: bool, block: int) -> tuple:
    """What a graph is compiled for: everything that dynamo guards on, except that of a length it only knows whether it is 1."""

    def facts(x: torch.Tensor | None) -> tuple | None:
        if x is None:
            return None
        if x.dim() == 1:
            return (x.requires_grad, x.is_inference())
        batch, seqlen, heads, head_dim = x.shape
        layout: tuple[bool, ...] = (x.is_contiguous(), x.transpose(1, 2).is_contiguous())
        if x._base is not None:
            layout += (x._base.is_contiguous(), *(length == 1 for length in x._base.shape))
        return (batch == 1, seqlen == 1, heads, head_dim, layout, x.requires_grad, x.is_inference())

    modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled())
    return (q.dtype, q.device, *(facts(x) for x in (q, k, v, sinks)), has_softcap, block, *modes)
