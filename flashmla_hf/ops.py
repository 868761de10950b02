"""The operator layer: schemas, fake kernels and autograd of ``torch.ops.flashmla``.

Two operators, defined here and implemented by the compiled libraries (one per backend, see :data:`LIBRARIES`):

``flash_attn_forward(q, k, v, ...) -> (out, lse)``
``flash_attn_backward(dout, dlse, q, k, v, out, lse, ...) -> (dq, dk, dv, dsinks)``

Their names contain ``flash_attn`` on purpose: TRL's selective activation checkpointing keeps the outputs of operators so
named instead of recomputing them.

The operators are strict and carry no policy. Arguments are already resolved (a scale, not ``None``; a causal mask is
``window_right=0``), tensors are checked for memory safety by the C++ host code, and anything a backend cannot do is an error.
Choosing a backend, defaults and friendly messages are :mod:`flashmla_hf.dispatch`'s job.

They have autograd and batching rules of their own, by torch's dispatcher, so that transforms of ``torch.func`` in any order and
under ``torch.compile`` come to the right derivative; second and forward-mode derivatives are refused.

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

import contextlib
import functools
import logging
import os
import threading
from pathlib import Path

import torch
from torch._functorch.utils import enable_single_level_autograd_function
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

# It goes past all that watches calls in these releases. Others may have more to go past: there it is off.
DIRECT_TESTED_WITH = ("2.10", "2.11", "2.12", "2.13", "2.14")

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


def without_autocast(device: torch.device):
    """A context in which torch's functions keep the dtypes of their arguments."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def values_are_readable(x: torch.Tensor) -> bool:
    """Whether Python may look at the values of ``x`` now: not while compiling, tracing or capturing, nor on meta."""
    if torch.compiler.is_compiling() or x.is_meta or torch.jit.is_tracing():
        return False
    if isinstance(x, torch._subclasses.FakeTensor):
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- Fake kernels ----------------------------------------------------------------------------------------------------


def _lse_shape(q: torch.Tensor, cu_seqlens_q: torch.Tensor | None) -> tuple:
    if cu_seqlens_q is None:
        batch, seqlen_q, heads_q, _ = q.shape
        return (batch, heads_q, seqlen_q)
    total_q, heads_q, _ = q.shape
    return (heads_q, total_q)


def _refuse(operator: str, name: str, expected: object, got: object):
    """In the words of the host code (csrc/checks.h)."""
    raise RuntimeError(f"{operator}: {name}: expected {expected}, got {got}")


def _check_tensor(operator: str, name: str, x: torch.Tensor | None, q: torch.Tensor, dtype: torch.dtype, shape: tuple):
    """A fake call is refused as the real one would be. Sizes that nobody knows yet are the host's to check."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # imports sympy: not for calls that are not traced

    if x is None:
        return
    if x.device != q.device:
        # Torch sends a call with one tensor on "meta" here, whatever the others are on.
        _refuse(operator, name, f"a tensor on {q.device} (the device of q)", f"one on {x.device}")
    if x.dtype != dtype:
        _refuse(operator, name, f"dtype {dtype_name(dtype)}", dtype_name(x.dtype))
    if len(x.shape) != len(shape) or any(guard_or_false(a != b) for a, b in zip(x.shape, shape, strict=True)):
        _refuse(operator, name, f"shape {[*shape]}", f"shape {[*x.shape]}")


def _check_inputs(operator: str, q, k, v, sinks, cu_seqlens_q, cu_seqlens_kv):
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    if (cu_seqlens_q is None) != (cu_seqlens_kv is None):
        name = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_kv"
        _refuse(operator, name, "a tensor, since the other cu_seqlens is one", "None")
    rank = 4 if cu_seqlens_q is None else 3
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != rank:
            _refuse(operator, name, f"{rank} dimensions", f"shape {[*x.shape]}")
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        _refuse(operator, "q", "dtype float32, float16 or bfloat16", dtype_name(q.dtype))
    rows = (q.shape[0], k.shape[1]) if rank == 4 else (k.shape[0],)
    heads_q, heads_kv = q.shape[-2], k.shape[-2]
    _check_tensor(operator, "k", k, q, q.dtype, (*rows, heads_kv, q.shape[-1]))
    _check_tensor(operator, "v", v, q, q.dtype, (*rows, heads_kv, v.shape[-1]))
    if guard_or_false(heads_kv == 0) or guard_or_false(heads_q % heads_kv != 0):
        _refuse(operator, "q", f"a multiple of the {heads_kv} kv heads", f"{heads_q} heads")
    _check_tensor(operator, "sinks", sinks, q, torch.float32, (heads_q,))
    if cu_seqlens_q is not None:
        _check_tensor(operator, "cu_seqlens_q", cu_seqlens_q, q, torch.int32, (cu_seqlens_q.shape[0],))
        _check_tensor(operator, "cu_seqlens_kv", cu_seqlens_kv, q, torch.int32, (cu_seqlens_q.shape[0],))


@torch.library.register_fake("flashmla::flash_attn_forward")
def _forward_fake(q, k, v, sinks, cu_seqlens_q, cu_seqlens_kv, *_options):
    _check_inputs("flash_attn_forward", q, k, v, sinks, cu_seqlens_q, cu_seqlens_kv)
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    return out, q.new_empty(_lse_shape(q, cu_seqlens_q), dtype=torch.float32)


@torch.library.register_fake("flashmla::flash_attn_backward")
def _backward_fake(dout, dlse, q, k, v, out, lse, sinks, cu_seqlens_q, cu_seqlens_kv, *options):
    operator = "flash_attn_backward"
    _check_inputs(operator, q, k, v, sinks, cu_seqlens_q, cu_seqlens_kv)
    for name, x in (("dout", dout), ("out", out)):
        _check_tensor(operator, name, x, q, q.dtype, (*q.shape[:-1], v.shape[-1]))
    for name, x in (("lse", lse), ("dlse", dlse)):
        _check_tensor(operator, name, x, q, torch.float32, _lse_shape(q, cu_seqlens_q))
    needs = options[-4:]
    grads = [x.new_empty(x.shape if need else (0,)) for x, need in zip((q, k, v), needs[:3], strict=True)]
    heads_q = q.shape[-2]
    return (*grads, q.new_empty((heads_q if needs[3] else 0,), dtype=torch.float32))


# ---- Autograd --------------------------------------------------------------------------------------------------------


def _gradients(ctx, dout, dlse) -> tuple:
    """Of q, k, v and sinks; ``None`` where nobody needs one."""
    q, k, v, out, lse, sinks, cu_seqlens_q, cu_seqlens_kv = ctx.saved_tensors
    needs = ctx.needs_input_grad[:4]
    if (dout is None and dlse is None) or not any(needs):
        return (None, None, None, None)
    if dout is None:
        dout = torch.zeros_like(out)
    if dout.stride(-1) != 1:
        # Not contiguous(), which gives a tensor without elements back as it is, strides 0 and all.
        dout = dout.clone(memory_format=torch.contiguous_format)
    inputs = (q, k, v, sinks, cu_seqlens_q, cu_seqlens_kv, *ctx.options)
    # A graph of this (create_graph=True) is the operator's to refuse; who watches operators is to see this one.
    if _direct is not None and not torch.compiler.is_compiling() and not torch.is_grad_enabled():
        grads = _direct.backward(dout, dlse, out, lse, *needs, *inputs)
        if grads is not None:
            return grads
    grads = torch.ops.flashmla.flash_attn_backward.default(dout, dlse, q, k, v, out, lse, *inputs[3:], *needs)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


class _Keeper(threading.local):
    """Who keeps this thread's (out, lse) from one run of a layer to its recomputation in backward; ``None`` is nobody.

    ``store.load()`` gives the (out, lse) of the call that comes next, or ``None``: then the kernel runs and ``store.save(out,
    lse)`` is told. The tensors that ``load`` gives must be the caller's own (autograd writes its history into them).
    """

    store = None


keeper = _Keeper()


class _FlashAttention(torch.autograd.Function):
    """The formula of the gradients, for a call from Python and for the operator.

    ``output`` is (out, lse) where that is computed already. Gives out, and lse where it is wanted.
    """

    @staticmethod
    def forward(ctx, q, k, v, sinks, others, output, wants_lse):
        inputs = (q, k, v, sinks, *others)
        if output is None:
            output = _take_or_compute(inputs)
        cu_seqlens_q, cu_seqlens_kv, *ctx.options = others
        ctx.save_for_backward(q, k, v, *output, sinks, cu_seqlens_q, cu_seqlens_kv)
        # An unused lse (or out) arrives in backward as None instead of a tensor of zeros.
        ctx.set_materialize_grads(False)
        return output if wants_lse else output[0]

    @staticmethod
    def backward(ctx, dout, dlse=None):
        return (*_gradients(ctx, dout, dlse), None, None, None)


class _RefuseSecondDerivative(torch.autograd.Function):
    """Gives ``gradients`` on; without a formula autograd would pass zeros back, with a warning."""

    @staticmethod
    def forward(ctx, gradients, *tensors):
        return gradients

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "flash_attn_backward: has no derivative: expected a first-order loss (a gradient of a gradient, as in "
            "gradient penalties, needs impl='reference')"
        )


def _without_transforms(function: type[torch.autograd.Function]):
    """``function.apply`` less its look for torch.func: for places that torch.func, if it is there, has passed already."""
    return super(torch.autograd.Function, function).apply


_apply_attention = _without_transforms(_FlashAttention)
_apply_refusal = _without_transforms(_RefuseSecondDerivative)


def flash_attn(*inputs):
    """``torch.ops.flashmla.flash_attn_forward(*inputs)``, with less overhead where nothing is being traced."""
    if torch.compiler.is_compiling() or has_transforms():
        return torch.ops.flashmla.flash_attn_forward(*inputs)
    if forward_ad._current_level >= 0:
        _refuse_tangents("flash_attn_forward", "q k v sinks", inputs)
    if _needs_graph(inputs[:4]):
        return _FlashAttention.apply(*inputs[:4], inputs[4:], None, True)
    return _call_operator(*inputs)


def has_transforms() -> bool:
    """Whether a transform of torch.func is at work. A tensor that it wraps says of itself what is true inside alone: one of
    ``vmap`` requires no gradient, whatever it holds. The dispatcher brings a call to each transform in turn."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_functionalizing() -> bool:
    """Whether ``torch.func.functionalize`` is among these transforms."""
    if not has_transforms():
        return False
    stack = torch._C._functorch.get_interpreter_stack()
    return any(interpreter.key() == torch._C._functorch.TransformType.Functionalize for interpreter in stack)


def _refuse_tangents(operator, names, tensors):
    """They would be dropped without a word."""
    for name, x in zip(names.split(), tensors, strict=False):
        if x is not None and forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(
                f"{operator}: {name}: expected no tangent, got a dual tensor: forward-mode derivatives need "
                "impl='reference'"
            )


def _call_operator(*inputs):
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.flashmla.flash_attn_forward.default(*inputs)


def _needs_graph(tensors) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


# The operators' own autograd, below which a call reaches the next transform or a backend. torch.library.register_autograd
# makes a function that torch.func.grad does not take.


def _differentiable_forward(*inputs):
    if forward_ad._current_level >= 0:
        _refuse_tangents("flash_attn_forward", "q k v sinks", inputs)
    output = _call_operator(*inputs)
    if not _needs_graph(inputs[:4]):
        return output
    with enable_single_level_autograd_function():
        return _apply_attention(*inputs[:4], inputs[4:], output, True)


def _differentiable_backward(*inputs):
    if forward_ad._current_level >= 0:
        _refuse_tangents("flash_attn_backward", "dout dlse q k v out lse sinks", inputs)
    with torch._C._AutoDispatchBelowAutograd():
        gradients = torch.ops.flashmla.flash_attn_backward.default(*inputs)
    if not _needs_graph(inputs[:8]):
        return gradients
    with enable_single_level_autograd_function():
        return _apply_refusal(gradients, *inputs[:8])


_library = torch.library.Library("flashmla", "FRAGMENT")
_library.impl("flash_attn_forward", _differentiable_forward, "Autograd")
_library.impl("flash_attn_backward", _differentiable_backward, "Autograd")


# ---- torch.vmap ------------------------------------------------------------------------------------------------------
#
# One call computes all of a vmapped dimension: it becomes a part of the batch, or of the heads where something belongs to
# the heads (sinks) or nothing to a batch (packed sequences). Group sizes stay: head h of copy b is head b * heads + h.


class _Fold:
    """Where a dimension of ``size`` goes, and comes back from. Tensors that do not have it are repeated."""

    def __init__(self, operator: str, size: int, dims: dict[str, int | None], is_packed: bool):
        for name in ("cu_seqlens_q", "cu_seqlens_kv"):
            if dims[name] is not None:
                _refuse(
                    operator,
                    name,
                    "boundaries that all of torch.vmap share (in_dims None)",
                    f"a vmapped dimension {dims[name]}: call flashmla_hf.attention in a loop, or pack once more",
                )
        self.size, self.dims = size, dims
        self.is_by_heads = is_packed or dims["sinks"] is not None

    def __call__(self, name: str, x: torch.Tensor | None) -> torch.Tensor | None:
        if x is None:
            return None
        dim = self.dims[name]
        if name == "sinks" and not self.is_by_heads:
            return x
        x = x.unsqueeze(0).expand(self.size, *x.shape) if dim is None else x.movedim(dim, 0)
        if name == "sinks":
            return x.flatten()
        # Heads stand last but one, in lse [..., heads, seqlen] as in q [..., heads, head_dim].
        x = x.movedim(0, -3).flatten(-3, -2) if self.is_by_heads else x.flatten(0, 1)
        x = x.contiguous()
        return x.clone() if x.is_cuda and x.storage_offset() % 8 != 0 else x  # TMA's alignment

    def undo(self, x: torch.Tensor, is_needed: bool = True) -> tuple[torch.Tensor, int | None]:
        """x with the dimension, and where that is; of a gradient that nobody needs (no elements), none."""
        if not is_needed:
            return x, None
        if x.dim() == 1:  # dsinks
            return x.unflatten(0, (self.size, x.shape[0] // self.size)), 0
        dim = x.dim() - 2 if self.is_by_heads else 0
        return x.unflatten(dim, (self.size, x.shape[dim] // self.size)), dim


_NAMES = ("q", "k", "v", "sinks", "cu_seqlens_q", "cu_seqlens_kv")


@functools.partial(torch.library.register_vmap, "flashmla::flash_attn_forward")
def _vmap_forward(info, in_dims, *inputs):
    dims = dict(zip(_NAMES, in_dims, strict=False))
    fold = _Fold("flash_attn_forward", info.batch_size, dims, is_packed=inputs[4] is not None)
    folded = [fold(name, x) for name, x in zip(_NAMES[:4], inputs, strict=False)]
    out, lse = torch.ops.flashmla.flash_attn_forward(*folded, *inputs[4:])
    (out, out_dim), (lse, lse_dim) = fold.undo(out), fold.undo(lse)
    return (out, lse), (out_dim, lse_dim)


@functools.partial(torch.library.register_vmap, "flashmla::flash_attn_backward")
def _vmap_backward(info, in_dims, *inputs):
    names = ("dout", "dlse", "q", "k", "v", "out", "lse", *_NAMES[3:])
    needs = inputs[-4:]
    dims = dict(zip(names, in_dims, strict=False))
    if needs[3]:
        # Every copy wants a sum of its own over its rows.
        dims["sinks"] = 0 if dims["sinks"] is None else dims["sinks"]
    sinks = inputs[7]
    if needs[3] and in_dims[7] is None:
        sinks = sinks.expand(info.batch_size, *sinks.shape)
    fold = _Fold("flash_attn_backward", info.batch_size, dims, is_packed=inputs[8] is not None)
    folded = [fold(name, x) for name, x in zip(names[:8], (*inputs[:7], sinks), strict=True)]
    gradients = torch.ops.flashmla.flash_attn_backward(*folded, *inputs[8:])
    undone = [fold.undo(x, need) for x, need in zip(gradients, needs, strict=True)]
    return tuple(x for x, _ in undone), tuple(dim for _, dim in undone)


def _take_or_compute(inputs):
    store = keeper.store
    output = store.load() if store is not None else None
    if output is None:
        output = _call_operator(*inputs)
        if store is not None:
            store.save(*output)
    return output


def is_tested_torch() -> bool:
    """Whether :data:`DIRECT` was tested with the release of torch that is imported."""
    return ".".join(torch.__version__.split(".")[:2]) in DIRECT_TESTED_WITH


def _load_direct():
    """The module, or ``None``."""
    if not Path(__file__).with_name(DIRECT).exists():
        unavailable["direct"] = f"{DIRECT} was not built"
        return None
    if not is_tested_torch():
        unavailable["direct"] = (
            f"off: tested with torch {', '.join(DIRECT_TESTED_WITH)}, and this is {torch.__version__}; every call takes "
            "the way by torch's dispatcher"
        )
        level = logging.WARNING if os.environ.get("FLASHMLA_LOG", "0") == "1" else logging.INFO
        logging.getLogger("flashmla_hf").log(level, "%s: %s", DIRECT, unavailable["direct"])
        return None
    device_types = {"CPU": 0, "CUDA": 1}  # c10/core/DeviceType.h
    loaded = [
        (device_types[key], impl, str(Path(__file__).with_name(filename)))
        for key, (impl, filename) in LIBRARIES.items()
        if impl not in unavailable
    ]
    try:
        from flashmla_hf import _direct

        # In the absence of torch.func alone _direct.attend goes on.
        _direct.set_up(_apply_attention, tuple(loaded))
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
