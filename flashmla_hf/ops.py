"""The operator layer: schemas, fake kernels and autograd of ``torch.ops.flashmla``.

Two operators, defined here and implemented by the compiled libraries (one per backend, see :mod:`flashmla_hf.libraries`);
the third, for caches, is :mod:`flashmla_hf.decode_ops`'s:

``flash_attn_forward(q, k, v, ...) -> (out, lse)``
``flash_attn_backward(dout, dlse, q, k, v, out, lse, ...) -> (dq, dk, dv, dsinks)``

Their names contain ``flash_attn`` on purpose: TRL's selective activation checkpointing keeps the outputs of operators so
named instead of recomputing them.

The operators are strict and carry no policy. Arguments are already resolved (a scale, not ``None``; a causal mask is
``window_right=0``), the C++ host code checks tensors for memory safety, and an operator raises for anything that its backend
cannot do. :mod:`flashmla_hf.dispatch` chooses a backend, resolves defaults and explains errors.

The operators have their own autograd and batching rules, registered with torch's dispatcher, so that transforms of
``torch.func``, in any order and under ``torch.compile``, give the right derivative; second and forward-mode derivatives raise.

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

import functools
import typing
from dataclasses import dataclass, fields

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from flashmla_hf import direct, recompute_cache
from flashmla_hf.torch_state import is_traced_or_transformed


@dataclass(slots=True)  # not frozen: a frozen one takes three times as long to build, and every call builds one
class Arguments:
    """The arguments of ``flash_attn_forward``. The order of the fields is the operator's; Python spells it here alone."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sinks: torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_kv: torch.Tensor | None
    max_seqlen_q: int
    max_seqlen_kv: int
    scale: float
    window_left: int
    window_right: int
    softcap: float
    deterministic: bool

    def in_order(self) -> tuple:
        """The values as the operators take them."""
        return tuple([getattr(self, name) for name in _NAMES])


_NAMES = tuple(field.name for field in fields(Arguments))
_NUM_TENSORS = 4  # q, k, v and sinks: the arguments that may have a gradient


def schema_arguments(arguments: type) -> list[str]:
    """The arguments of an operator's schema, from the fields of their dataclass."""
    kinds = {torch.Tensor: "Tensor", torch.Tensor | None: "Tensor?", int: "SymInt", float: "float", bool: "bool"}
    return [f"{kinds[kind]} {name}" for name, kind in typing.get_type_hints(arguments).items()]


def _schemas() -> dict[str, str]:
    """The operators' schemas, from the fields of :class:`Arguments`."""
    forward = schema_arguments(Arguments)
    backward = ["Tensor dout", "Tensor? dlse", *forward[:3], "Tensor out", "Tensor lse", *forward[3:]]
    backward += ["bool needs_dq", "bool needs_dk", "bool needs_dv", "bool needs_dsinks"]
    return {
        "flash_attn_forward": f"({', '.join(forward)}) -> (Tensor out, Tensor lse)",
        "flash_attn_backward": f"({', '.join(backward)}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)",
    }


for _operator, _schema in _schemas().items():
    torch.library.define(f"flashmla::{_operator}", _schema, tags=(torch.Tag.pt2_compliant_tag,))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_names(dtypes: tuple[torch.dtype, ...]) -> str:
    """``"float32, float16 or bfloat16"``, as the host code says it."""
    *others, last = map(dtype_name, dtypes)
    return f"{', '.join(others)} or {last}" if others else last


# ---- Fake kernels ----------------------------------------------------------------------------------------------------

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _lse_shape(q: torch.Tensor, cu_seqlens_q: torch.Tensor | None) -> tuple:
    if cu_seqlens_q is None:
        batch, seqlen_q, heads_q, _ = q.shape
        return (batch, heads_q, seqlen_q)
    total_q, heads_q, _ = q.shape
    return (heads_q, total_q)


def refuse(operator: str, name: str, expected: object, got: object) -> typing.NoReturn:
    """Raises an error in the words of the host code (csrc/checks.h)."""
    raise RuntimeError(f"{operator}: {name}: expected {expected}, got {got}")


def check_tensor(
    operator: str, name: str, x: torch.Tensor | None, q: torch.Tensor, dtype: torch.dtype, shape: tuple
) -> None:
    """Raises for a fake call what the host raises for a real one. The host checks sizes that are not known yet."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # imports sympy, which only traced calls need

    if x is None:
        return
    if x.device != q.device:
        # Torch runs the fake kernel if one tensor is on "meta", whatever device the others are on.
        refuse(operator, name, f"a tensor on {q.device} (the device of q)", f"one on {x.device}")
    if x.dtype != dtype:
        refuse(operator, name, f"dtype {dtype_name(dtype)}", dtype_name(x.dtype))
    if len(x.shape) != len(shape) or any(guard_or_false(a != b) for a, b in zip(x.shape, shape, strict=True)):
        refuse(operator, name, f"shape {[*shape]}", f"shape {[*x.shape]}")


def _check_inputs(operator: str, q, k, v, sinks, cu_seqlens_q, cu_seqlens_kv, dtypes=_DTYPES):
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    if (cu_seqlens_q is None) != (cu_seqlens_kv is None):
        name = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_kv"
        refuse(operator, name, "a tensor, since the other cu_seqlens is one", "None")
    rank = 4 if cu_seqlens_q is None else 3
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != rank:
            refuse(operator, name, f"{rank} dimensions", f"shape {[*x.shape]}")
    if q.dtype not in dtypes:
        refuse(operator, "q", f"dtype {dtype_names(dtypes)}", dtype_name(q.dtype))
    rows = (q.shape[0], k.shape[1]) if rank == 4 else (k.shape[0],)
    heads_q, heads_kv = q.shape[-2], k.shape[-2]
    check_tensor(operator, "k", k, q, q.dtype, (*rows, heads_kv, q.shape[-1]))
    check_tensor(operator, "v", v, q, q.dtype, (*rows, heads_kv, v.shape[-1]))
    if guard_or_false(heads_kv == 0) or guard_or_false(heads_q % heads_kv != 0):
        refuse(operator, "q", f"a multiple of the {heads_kv} kv heads", f"{heads_q} heads")
    check_tensor(operator, "sinks", sinks, q, torch.float32, (heads_q,))
    if cu_seqlens_q is not None:
        check_tensor(operator, "cu_seqlens_q", cu_seqlens_q, q, torch.int32, (cu_seqlens_q.shape[0],))
        check_tensor(operator, "cu_seqlens_kv", cu_seqlens_kv, q, torch.int32, (cu_seqlens_q.shape[0],))


def forward_outputs(
    operator: str, q, k, v, sinks, cu_seqlens_q, cu_seqlens_kv, dtypes: tuple[torch.dtype, ...] = _DTYPES
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of a fake call of a forward operator; raises what its host would."""
    _check_inputs(operator, q, k, v, sinks, cu_seqlens_q, cu_seqlens_kv, dtypes)
    out_dtype = torch.bfloat16 if q.dtype == torch.float8_e4m3fn else q.dtype
    out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=out_dtype)
    return out, q.new_empty(_lse_shape(q, cu_seqlens_q), dtype=torch.float32)


@torch.library.register_fake("flashmla::flash_attn_forward")
def _forward_fake(q, k, v, sinks, cu_seqlens_q, cu_seqlens_kv, *_options):
    return forward_outputs("flash_attn_forward", q, k, v, sinks, cu_seqlens_q, cu_seqlens_kv)


@torch.library.register_fake("flashmla::flash_attn_backward")
def _backward_fake(dout, dlse, q, k, v, out, lse, sinks, cu_seqlens_q, cu_seqlens_kv, *options):
    operator = "flash_attn_backward"
    _check_inputs(operator, q, k, v, sinks, cu_seqlens_q, cu_seqlens_kv)
    for name, x in (("dout", dout), ("out", out)):
        check_tensor(operator, name, x, q, q.dtype, (*q.shape[:-1], v.shape[-1]))
    for name, x in (("lse", lse), ("dlse", dlse)):
        check_tensor(operator, name, x, q, torch.float32, _lse_shape(q, cu_seqlens_q))
    needs = options[-4:]
    grads = [x.new_empty(x.shape if need else (0,)) for x, need in zip((q, k, v), needs[:3], strict=True)]
    heads_q = q.shape[-2]
    return (*grads, q.new_empty((heads_q if needs[3] else 0,), dtype=torch.float32))


# ---- Autograd --------------------------------------------------------------------------------------------------------


def _gradients(ctx, dout, dlse) -> tuple:
    """The gradients of q, k, v and sinks; ``None`` for a tensor that needs none."""
    q, k, v, out, lse, sinks, cu_seqlens_q, cu_seqlens_kv = ctx.saved_tensors
    needs = ctx.needs_input_grad[:_NUM_TENSORS]
    if (dout is None and dlse is None) or not any(needs):
        return (None, None, None, None)
    if dout is None:
        dout = torch.zeros_like(out)
    if dout.stride(-1) != 1:
        # Not contiguous(): it returns a tensor without elements unchanged, strides 0 included.
        dout = dout.clone(memory_format=torch.contiguous_format)
    inputs = (q, k, v, sinks, cu_seqlens_q, cu_seqlens_kv, *ctx.options)
    grads = direct.backward(dout, dlse, out, lse, needs, inputs)
    if grads is not None:
        return grads
    grads = torch.ops.flashmla.flash_attn_backward.default(dout, dlse, q, k, v, out, lse, *inputs[3:], *needs)
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))


class _FlashAttention(torch.autograd.Function):
    """The formula of the gradients, for a call from Python and for the operator.

    ``output`` is (out, lse) if that is already computed, else ``None``. Returns (out, lse) with ``wants_lse``, else out.
    """

    @staticmethod
    def forward(ctx, q, k, v, sinks, others, output, wants_lse):
        inputs = (q, k, v, sinks, *others)
        if output is None:
            output = _load_or_compute(inputs)
        cu_seqlens_q, cu_seqlens_kv, *ctx.options = others
        ctx.save_for_backward(q, k, v, *output, sinks, cu_seqlens_q, cu_seqlens_kv)
        # An unused lse (or out) arrives in backward as None instead of a tensor of zeros.
        ctx.set_materialize_grads(False)
        return output if wants_lse else output[0]

    @staticmethod
    def backward(ctx, dout, dlse=None):
        return (*_gradients(ctx, dout, dlse), None, None, None)


def _load_or_compute(inputs: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse), from this thread's :mod:`recompute_cache` if it holds them."""
    cache = recompute_cache.active.cache
    output = cache.load() if cache is not None else None
    if output is None:
        output = _call_operator(*inputs)
        if cache is not None:
            cache.save(*output)
    return output


class _RefuseSecondDerivative(torch.autograd.Function):
    """Returns ``gradients``, of the operator of that name. Its backward raises: without a formula autograd would pass zeros
    back, with a warning."""

    @staticmethod
    def forward(ctx, operator, gradients, *tensors):
        ctx.operator = operator
        return gradients

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f"{ctx.operator}: has no derivative: expected a first-order loss, got a gradient of a gradient (as in gradient "
            "penalties). Use impl='reference'"
        )


def without_transforms(function: type[torch.autograd.Function]) -> typing.Callable:
    """``function.apply`` without its check for torch.func: for code that runs below every transform."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


_apply_attention = without_transforms(_FlashAttention)
_apply_refusal = without_transforms(_RefuseSecondDerivative)


def flash_attn(arguments: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of ``torch.ops.flashmla.flash_attn_forward``, with less overhead if nothing is traced."""
    inputs = arguments.in_order()
    if is_traced_or_transformed():
        return torch.ops.flashmla.flash_attn_forward(*inputs)
    if forward_ad._current_level >= 0:
        refuse_tangents("flash_attn_forward", "q k v sinks", inputs)
    if needs_graph(inputs[:_NUM_TENSORS]):
        return _FlashAttention.apply(*inputs[:_NUM_TENSORS], inputs[_NUM_TENSORS:], None, True)
    return _call_operator(*inputs)


def refuse_tangents(operator: str, names: str, tensors: tuple) -> None:
    """Raises for a dual tensor, whose tangent the operators would drop silently."""
    for name, x in zip(names.split(), tensors, strict=False):
        if x is not None and forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(
                f"{operator}: {name}: expected no tangent, got a dual tensor. Use impl='reference', which has forward-mode "
                "derivatives"
            )


def _call_operator(*inputs):
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.flashmla.flash_attn_forward.default(*inputs)


def needs_graph(tensors) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


# The operators' own autograd; below it a call reaches the next transform or a backend. torch.library.register_autograd does
# not serve here: torch.func.grad refuses the function that it makes.


def _differentiable_forward(*inputs):
    if forward_ad._current_level >= 0:
        refuse_tangents("flash_attn_forward", "q k v sinks", inputs)
    output = _call_operator(*inputs)
    if not needs_graph(inputs[:_NUM_TENSORS]):
        return output
    with enable_single_level_autograd_function():
        return _apply_attention(*inputs[:_NUM_TENSORS], inputs[_NUM_TENSORS:], output, True)


def _differentiable_backward(*inputs):
    names = "dout dlse q k v out lse sinks"
    return without_second_derivative(torch.ops.flashmla.flash_attn_backward.default, names, inputs)


def without_second_derivative(overload: torch._ops.OpOverload, names: str, inputs: tuple) -> tuple:
    """The gradients of an operator, whose own derivatives raise. ``names``: of its tensors, the first inputs."""
    operator, tensors = overload._schema.name.removeprefix("flashmla::"), inputs[: len(names.split())]
    if forward_ad._current_level >= 0:
        refuse_tangents(operator, names, inputs)
    with torch._C._AutoDispatchBelowAutograd():
        gradients = overload(*inputs)
    if not needs_graph(tensors):
        return gradients
    with enable_single_level_autograd_function():
        return _apply_refusal(operator, gradients, *tensors)


_library = torch.library.Library("flashmla", "FRAGMENT")
_library.impl("flash_attn_forward", _differentiable_forward, "Autograd")
_library.impl("flash_attn_backward", _differentiable_backward, "Autograd")


# ---- torch.vmap ------------------------------------------------------------------------------------------------------
#
# One call computes the whole vmapped dimension. It becomes part of the batch, or of the heads if sinks are vmapped (they belong
# to heads) or sequences are packed (they have no batch). Group sizes stay: head h of copy b is head b * heads + h.


class _Fold:
    """Folds a vmapped dimension of ``size`` into the batch or the heads, and back. Tensors without it are repeated."""

    def __init__(self, operator: str, size: int, dims: dict[str, int | None], is_packed: bool):
        for name in ("cu_seqlens_q", "cu_seqlens_kv"):
            if dims[name] is not None:
                refuse(
                    operator,
                    name,
                    "boundaries shared by all copies of torch.vmap (in_dims=None)",
                    f"a vmapped dimension {dims[name]}. Call flashmla_hf.attention in a loop, or pack the copies together",
                )
        if size == 0:
            name = next(name for name, dim in dims.items() if dim is not None)
            refuse(operator, name, "at least one copy in torch.vmap", "a vmapped dimension of size 0")
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
        # Heads are the last dimension but one, in lse [..., heads, seqlen] as in q [..., heads, head_dim].
        x = x.movedim(0, -3).flatten(-3, -2) if self.is_by_heads else x.flatten(0, 1)
        x = x.contiguous()
        return x.clone() if x.is_cuda and x.storage_offset() % 8 != 0 else x  # TMA's alignment

    def undo(self, x: torch.Tensor, is_needed: bool = True) -> tuple[torch.Tensor, int | None]:
        """x with the vmapped dimension, and its position; x unchanged and ``None`` for a gradient that is not needed."""
        if not is_needed:
            return x, None
        if x.dim() == 1:  # dsinks
            return x.unflatten(0, (self.size, x.shape[0] // self.size)), 0
        dim = x.dim() - 2 if self.is_by_heads else 0
        return x.unflatten(dim, (self.size, x.shape[dim] // self.size)), dim


@functools.partial(torch.library.register_vmap, "flashmla::flash_attn_forward")
def _vmap_forward(info, in_dims, *inputs):
    dims = dict(zip(_NAMES, in_dims, strict=False))
    fold = _Fold("flash_attn_forward", info.batch_size, dims, is_packed=inputs[4] is not None)
    folded = [fold(name, x) for name, x in zip(_NAMES[:_NUM_TENSORS], inputs, strict=False)]
    out, lse = torch.ops.flashmla.flash_attn_forward(*folded, *inputs[_NUM_TENSORS:])
    (out, out_dim), (lse, lse_dim) = fold.undo(out), fold.undo(lse)
    return (out, lse), (out_dim, lse_dim)


@functools.partial(torch.library.register_vmap, "flashmla::flash_attn_backward")
def _vmap_backward(info, in_dims, *inputs):
    names = ("dout", "dlse", *_NAMES[:3], "out", "lse", *_NAMES[3:])
    needs = inputs[-4:]
    dims = dict(zip(names, in_dims, strict=False))
    if needs[3]:
        # Every copy needs its own sum over its own rows.
        dims["sinks"] = 0 if dims["sinks"] is None else dims["sinks"]
    sinks = inputs[7]
    if needs[3] and in_dims[7] is None:
        sinks = sinks.expand(info.batch_size, *sinks.shape)
    fold = _Fold("flash_attn_backward", info.batch_size, dims, is_packed=inputs[8] is not None)
    folded = [fold(name, x) for name, x in zip(names[:8], (*inputs[:7], sinks), strict=True)]
    gradients = torch.ops.flashmla.flash_attn_backward(*folded, *inputs[8:])
    undone = [fold.undo(x, need) for x, need in zip(gradients, needs, strict=True)]
    return tuple(x for x, _ in undone), tuple(dim for _, dim in undone)


direct.load(_apply_attention)
