"""The Hopper kernels of fp8: their operators, their calls, and the backward pass.

``flash_attn_fp8_forward(q, k, v, ...) -> (out, lse)`` rotates and quantises q, k and v of 16 bits (:mod:`quantization`), and
attends to them as :mod:`emulation` says. Arguments, shapes and dtypes are those of ``flash_attn_forward`` (:mod:`ops`).
``flash_attn_e4m3_forward(q, k, v, q_descale, k_descale, v_descale, ...)`` attends to tensors that are e4m3, of factors fp32
[batch, heads_kv]; out is bf16, and there is no backward. ``flash_attn_fp8_round(q, k, v, ...)`` gives what
``flash_attn_fp8_forward`` multiplied, in bf16, which holds it exactly: contiguous, the shapes of q, k and v. No operator has
a derivative of its own: :func:`run` has.

**Backward.** The bf16 backward kernel at the rounded q, k and v, which are rounded once more instead of kept: the bits are the
same. It takes P from the lse, which has summed P before its rounding, so P is exact, and the sums over keys of P times dP from
the output. That has the rounding of P, an error far below that of the rounded v in dP. The gradients of the rotated q and k are
then rotated back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from flashmla_hf import decode_ops, libraries, ops
from flashmla_hf.backends import sm90
from flashmla_hf.fp8.quantization import DTYPE, rotation
from flashmla_hf.torch_state import without_autocast
from flashmla_hf.validation import Call

FORWARD, ROUND, E4M3_FORWARD = "flash_attn_fp8_forward", "flash_attn_fp8_round", "flash_attn_e4m3_forward"
_DIFFERENTIABLE = {
    FORWARD: ("q", "k", "v", "sinks"),
    ROUND: ("q", "k", "v"),
    E4M3_FORWARD: ("q", "k", "v", "q_descale", "k_descale", "v_descale", "sinks"),
}
_NUM_TENSORS = 6  # these and the boundaries, which come first among the arguments

_ARGUMENTS = ops.schema_arguments(ops.Arguments)
_ROUNDED = [
    argument for argument in _ARGUMENTS if argument.split()[-1] in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_kv")
]
_FACTORS = [f"Tensor {name}_descale" for name in "qkv"]
for _operator, _schema in {
    FORWARD: f"({', '.join(_ARGUMENTS)}) -> (Tensor out, Tensor lse)",
    E4M3_FORWARD: f"({', '.join([*_ARGUMENTS[:3], *_FACTORS, *_ARGUMENTS[3:]])}) -> (Tensor out, Tensor lse)",
    ROUND: f"({', '.join(_ROUNDED)}) -> (Tensor q, Tensor k, Tensor v)",
}.items():
    torch.library.define(f"flashmla::{_operator}", _schema, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.register_fake(f"flashmla::{FORWARD}")
def _forward_fake(q, k, v, sinks, cu_seqlens_q, cu_seqlens_kv, *_options):
    return ops.forward_outputs(FORWARD, q, k, v, sinks, cu_seqlens_q, cu_seqlens_kv)


@torch.library.register_fake(f"flashmla::{E4M3_FORWARD}")
def _e4m3_forward_fake(q, k, v, q_descale, k_descale, v_descale, sinks, cu_seqlens_q, cu_seqlens_kv, *_options):
    outputs = ops.forward_outputs(E4M3_FORWARD, q, k, v, sinks, cu_seqlens_q, cu_seqlens_kv, dtypes=(DTYPE,))
    sequences = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    for name, factor in (("q_descale", q_descale), ("k_descale", k_descale), ("v_descale", v_descale)):
        ops.check_tensor(E4M3_FORWARD, name, factor, q, torch.float32, (sequences, k.shape[-2]))
    return outputs


@torch.library.register_fake(f"flashmla::{ROUND}")
def _round_fake(q, k, v, cu_seqlens_q, cu_seqlens_kv):
    ops.forward_outputs(ROUND, q, k, v, None, cu_seqlens_q, cu_seqlens_kv)
    return tuple(x.new_empty(x.shape, dtype=torch.bfloat16) for x in (q, k, v))


def _below_autograd(operator: str):
    """The operator for tensors that ask for no derivative; it raises for others."""
    overload = getattr(torch.ops.flashmla, operator).default

    def call(*inputs):
        decode_ops.refuse_gradients(operator, zip(_DIFFERENTIABLE[operator], inputs, strict=False))
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*inputs)

    return call


_library = torch.library.Library("flashmla", "FRAGMENT")
for _operator in _DIFFERENTIABLE:
    _library.impl(_operator, _below_autograd(_operator), "Autograd")


# ---- Calls -----------------------------------------------------------------------------------------------------------


def refusal(call: Call) -> str | None:
    """Why the kernel does not compute this call in fp8, beyond what no implementation of fp8 does; ``None`` if it does."""
    if "sm90" in libraries.unavailable:
        return libraries.unavailable["sm90"]
    limits = libraries.sm90_limits
    assert limits is not None  # otherwise the library is unavailable
    is_e4m3 = call.q.dtype == DTYPE
    multiple = limits.e4m3_multiple if is_e4m3 else limits.multiple
    largest = (limits.largest_fp8, limits.largest_fp8)
    return sm90.device_refusal(
        call.q, call.v, largest, multiple, (torch.float16, torch.bfloat16, DTYPE)
    ) or sm90.alignment_refusal(call)


def run(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse), differentiable in q, k, v and sinks."""
    call = sm90.readable(call)
    inputs = call.in_order()
    tensors, options = inputs[:_NUM_TENSORS], inputs[_NUM_TENSORS:]
    if ops.needs_graph(tensors):
        return _Attention.apply(*tensors, options)
    return torch.ops.flashmla.flash_attn_fp8_forward(*inputs)


def run_e4m3(call: Call, descales: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of tensors that are e4m3, whose factors are ``descales``, fp32 [batch, heads_kv] each."""
    inputs = sm90.readable(call).in_order()
    return torch.ops.flashmla.flash_attn_e4m3_forward(*inputs[:3], *descales, *inputs[3:])


class _Attention(torch.autograd.Function):
    """The formula of the gradients."""

    @staticmethod
    def forward(ctx, q, k, v, sinks, cu_seqlens_q, cu_seqlens_kv, options):
        tensors = (q, k, v, sinks, cu_seqlens_q, cu_seqlens_kv)
        out, lse = torch.ops.flashmla.flash_attn_fp8_forward(*tensors, *options)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, sinks, cu_seqlens_q, cu_seqlens_kv, out, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        if (dout is None and dlse is None) or not any(needs):
            return (None,) * 7
        rounded = torch.ops.flashmla.flash_attn_fp8_round(q, k, v, cu_seqlens_q, cu_seqlens_kv)
        gradients = gradients_at(
            rounded, out, lse, dout, dlse, (sinks, cu_seqlens_q, cu_seqlens_kv, *ctx.options), needs, q.dtype
        )
        return (*gradients, None, None, None)


def gradients_at(
    rounded: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    options: tuple[Any, ...],
    needs: tuple[bool, ...],
    dtype: torch.dtype,
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of q, k, v, in ``dtype``, and of sinks; ``None`` for one that is not needed.

    ``rounded``: q, k and v as the forward has multiplied them, in bf16. ``options``: the arguments of ``flash_attn_forward``
    from sinks on.
    """
    out = out.bfloat16()
    dout = torch.zeros_like(out) if dout is None else dout.bfloat16()
    if dout.stride(-1) != 1:
        dout = dout.clone(memory_format=torch.contiguous_format)
    dq, dk, dv, dsinks = torch.ops.flashmla.flash_attn_backward(dout, dlse, *rounded, out, lse, *options, *needs)

    def unrotated(x: torch.Tensor, is_key: bool) -> torch.Tensor:
        # Powers of two: a product in bf16 is exact, and torch sums in fp32.
        with without_autocast(x.device):
            return (x @ rotation(x.shape[-1], is_key).T.to(x.device, x.dtype)).to(dtype)

    return (
        unrotated(dq, False) if needs[0] else None,
        unrotated(dk, True) if needs[1] else None,
        dv.to(dtype) if needs[2] else None,
        dsinks if needs[3] else None,
    )
