"""The operator layer: schemas, fake kernels and autograd of ``torch.ops.flashmla``.

Two operators, defined here and implemented by the compiled libraries (one per backend, see :data:`LIBRARIES`):

``flash_attn_forward(q, k, v, ...) -> (out, lse)``
``flash_attn_backward(dout, dlse, q, k, v, out, lse, ...) -> (dq, dk, dv, dsinks)``

Their names contain ``flash_attn`` on purpose: TRL's selective activation checkpointing keeps the outputs of operators so
named instead of recomputing them.

The operators are strict and carry no policy. Arguments are already resolved (a scale, not ``None``; a causal mask is
``window_right=0``), tensors are checked for memory safety by the C++ host code, and anything a backend cannot do is an error.
Choosing a backend, defaults and friendly messages are :mod:`flashmla_hf.dispatch`'s job.

Shapes (dense layout; the packed layout drops ``batch`` and reads ``total`` for ``seqlen``):

=========  ==========================================  =====================
q          [batch, seqlen_q, heads_q, head_dim_qk]     fp32, fp16, bf16
k          [batch, seqlen_kv, heads_kv, head_dim_qk]   dtype of q
v          [batch, seqlen_kv, heads_kv, head_dim_v]    dtype of q
sinks      [heads_q]                                   fp32
cu_seqlens [num_sequences + 1]                         int32, device of q
out        [batch, seqlen_q, heads_q, head_dim_v]      dtype of q, contiguous
lse        [batch, heads_q, seqlen_q] or [heads_q, total_q]   fp32, natural log
=========  ==========================================  =====================
"""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from torch.autograd import forward_ad

FORWARD_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? cu_seqlens_q, Tensor? cu_seqlens_kv, "
    "SymInt max_seqlen_q, SymInt max_seqlen_kv, float scale, SymInt window_left, SymInt window_right, "
    "float softcap, bool deterministic) -> (Tensor out, Tensor lse)"
)
BACKWARD_SCHEMA = (
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? sinks, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_kv, SymInt max_seqlen_q, SymInt max_seqlen_kv, float scale, "
    "SymInt window_left, SymInt window_right, float softcap, bool deterministic, "
    "bool needs_dq, bool needs_dk, bool needs_dv, bool needs_dsinks) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)"
)

# Dispatch key -> (implementation name, shared library beside this file). The libraries hold no Python symbols and use
# torch's stable ABI, so one file serves every torch >= 2.10 and every Python.
LIBRARIES = {"CPU": ("cpu", "libflashmla_cpu.so"), "CUDA": ("sm90", "libflashmla_sm90.so")}

# The module past torch's dispatcher, of Python's limited API (csrc/direct/direct.cpp).
DIRECT = "_direct.abi3.so"

# Why an implementation's library is not loaded; no entry means it is loaded and registered. "direct" is
# that module: without it every call goes by way of the operators.
unavailable: dict[str, str] = {}

for _name, _schema in (("flash_attn_forward", FORWARD_SCHEMA), ("flash_attn_backward", BACKWARD_SCHEMA)):
    torch.library.define(f"flashmla::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))


def _load_libraries() -> None:
    for impl, filename in LIBRARIES.values():
        path = Path(__file__).with_name(filename)
        if not path.exists():
            unavailable[impl] = f"{filename} was not built"
            continue
        try:
            torch.ops.load_library(path)
        except OSError as error:
            if impl == "sm90" and torch.version.cuda is None:
                # The loader would say that libtorch_cuda.so is missing.
                unavailable[impl] = f"{filename} needs a torch with CUDA: torch {torch.__version__} has none"
            else:
                unavailable[impl] = f"{filename} does not load into torch {torch.__version__}: {error}"


_load_libraries()


def _lse_shape(q: torch.Tensor, cu_seqlens_q: torch.Tensor | None) -> tuple:
    if cu_seqlens_q is None:
        batch, seqlen_q, heads_q, _ = q.shape
        return (batch, heads_q, seqlen_q)
    total_q, heads_q, _ = q.shape
    return (heads_q, total_q)


@torch.library.register_fake("flashmla::flash_attn_forward")
def _forward_fake(q, k, v, sinks, cu_seqlens_q, *_args):
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    return out, q.new_empty(_lse_shape(q, cu_seqlens_q), dtype=torch.float32)


@torch.library.register_fake("flashmla::flash_attn_backward")
def _backward_fake(dout, dlse, q, k, v, out, lse, sinks, *args):
    needs = args[-4:]
    grads = [x.new_empty(x.shape if need else (0,)) for x, need in zip((q, k, v), needs[:3], strict=True)]
    heads_q = q.shape[-2]
    return (*grads, q.new_empty((heads_q if needs[3] else 0,), dtype=torch.float32))


def _setup_context(ctx, inputs, output):
    q, k, v, sinks, cu_seqlens_q, cu_seqlens_kv, *ctx.options = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, sinks, cu_seqlens_q, cu_seqlens_kv)
    # An unused lse (or out) arrives in backward as None instead of a tensor of zeros.
    ctx.set_materialize_grads(False)


def _gradients(ctx, dout, dlse) -> tuple:
    """Of q, k, v and sinks; ``None`` where nobody needs one."""
    q, k, v, out, lse, sinks, cu_seqlens_q, cu_seqlens_kv = ctx.saved_tensors
    needs = ctx.needs_input_grad[:4]
    if (dout is None and dlse is None) or not any(needs):
        return (None, None, None, None)
    if dout is None:
        dout = torch.zeros_like(out)
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    inputs = (q, k, v, sinks, cu_seqlens_q, cu_seqlens_kv, *ctx.options)
    # A graph of this (create_graph=True) is the operator's to refuse; who watches operators is to see this one.
    if _direct is not None and not torch.compiler.is_compiling() and not torch.is_grad_enabled():
        grads = _direct.backward(dout, dlse, out, lse, *needs, *inputs)
        if grads is not None:
            return grads
    grads = torch.ops.flashmla.flash_attn_backward.default(dout, dlse, q, k, v, out, lse, *inputs[3:], *needs)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


def _backward(ctx, dout, dlse):
    return (*_gradients(ctx, dout, dlse), *(None,) * (len(ctx.options) + 2))


torch.library.register_autograd("flashmla::flash_attn_forward", _backward, setup_context=_setup_context)


class _Keeper(threading.local):
    """Who keeps this thread's (out, lse) from one run of a layer to its recomputation in backward; ``None`` is nobody.

    ``store.take()`` gives the (out, lse) of the call that comes next, or ``None``: then the kernel runs and ``store.put(out,
    lse)`` is told. The tensors that ``take`` gives must be the caller's own (autograd writes its history into them).
    """

    store = None


keeper = _Keeper()


class _FlashAttention(torch.autograd.Function):
    """The same formula for a call from Python, without torch.library's wrapping, which costs more than a short kernel.

    ``output`` is (out, lse) where that is computed already. Gives out, and lse where it is wanted.
    """

    @staticmethod
    def forward(ctx, q, k, v, sinks, others, output, wants_lse):
        inputs = (q, k, v, sinks, *others)
        if output is None:
            output = _take_or_compute(inputs)
        _setup_context(ctx, inputs, output)
        return output if wants_lse else output[0]

    @staticmethod
    def backward(ctx, dout, dlse=None):
        return (*_gradients(ctx, dout, dlse), None, None, None)


def flash_attn(*inputs):
    """``torch.ops.flashmla.flash_attn_forward(*inputs)``, with less overhead where nothing is being traced."""
    if torch.compiler.is_compiling():
        return torch.ops.flashmla.flash_attn_forward(*inputs)
    if forward_ad._current_level >= 0:
        _refuse_tangents(inputs[:4])
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs[:4]):
        return _FlashAttention.apply(*inputs[:4], inputs[4:], None, True)
    return _call_operator(*inputs)


def _refuse_tangents(tensors):
    """torch.library would drop them without a word."""
    for name, x in zip(("q", "k", "v", "sinks"), tensors, strict=True):
        if x is not None and forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(
                f"flash_attn_forward: {name}: expected no tangent, got a dual tensor: forward-mode derivatives need "
                "impl='reference'"
            )


def _call_operator(*inputs):
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.flashmla.flash_attn_forward.default(*inputs)


def _take_or_compute(inputs):
    store = keeper.store
    output = store.take() if store is not None else None
    if output is None:
        output = _call_operator(*inputs)
        if store is not None:
            store.put(*output)
    return output


def _load_direct():
    """The module, or ``None``."""
    if not Path(__file__).with_name(DIRECT).exists():
        unavailable["direct"] = f"{DIRECT} was not built"
        return None
    device_types = {"CPU": 0, "CUDA": 1}  # c10/core/DeviceType.h
    loaded = [
        (device_types[key], impl, str(Path(__file__).with_name(filename)))
        for key, (impl, filename) in LIBRARIES.items()
        if impl not in unavailable
    ]
    try:
        from flashmla_hf import _direct

        # torch.autograd.Function.apply less its look for torch.func, in whose absence alone _direct.attend goes on.
        _direct.set_up(super(torch.autograd.Function, _FlashAttention).apply, tuple(loaded))
    except (ImportError, AttributeError, RuntimeError) as error:
        # A torch without what it uses, or libraries of another build.
        unavailable["direct"] = f"{DIRECT} is not used with torch {torch.__version__}: {error}"
        return None
    return _direct


_direct = _load_direct()


def attend_directly(*arguments):
    """``flashmla_hf.attention`` of plain calls, past torch's dispatcher, which takes longer than the launch of a short kernel.

    Takes (q, k, v, scale, is_causal, window, softcap, sinks, dropout_p, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q,
    max_seqlen_kv, deterministic, impl, return_lse) as they come. ``None`` where that way is not open: somebody wants to see
    operators called (a dispatch mode, a profiler, ``torch.func``), keeps outputs, a tensor is not plain (a subclass, a view
    that negates), has to be copied first, or something is wrong. Nothing has been computed then, and nothing says why: the
    long way does.
    """
    return _direct.attend(*arguments) if _direct is not None and keeper.store is None else None


def _refuse_second_derivative(ctx, *grads):
    raise RuntimeError(
        "flash_attn_backward: has no derivative: expected a first-order loss (a gradient of a gradient, as in gradient "
        "penalties, needs impl='reference')"
    )


# Without a formula autograd would pass zeros on, with a warning.
torch.library.register_autograd("flashmla::flash_attn_backward", _refuse_second_derivative)
