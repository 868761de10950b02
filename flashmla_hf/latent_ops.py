"""The operators of attention to latents, ``torch.ops.flashmla.flash_attn_latent`` and its backward.

Rows of k are keys, and in their first ``head_dim_v`` columns values. The forward is the kernel of caches
(:mod:`decode_ops`), the backward a stream of matrix products by torch (:mod:`latent_stream`), on CPUs and Hopper GPUs alike.

``flash_attn_latent(q, k, sinks, head_dim_v, scale, window_left, window_right, softcap) -> (out, lse)``
``flash_attn_latent_backward(dout, dlse, q, k, out, lse, sinks, ..., needs_dq, needs_dk, needs_dsinks) -> (dq, dk, dsinks)``

As strict as the operators of :mod:`ops`, whose rules of derivatives they share: first ones, ``torch.func`` included; second and
forward-mode ones raise. A gradient that is not needed has no elements.

=======  ============================================  ============================
q        [batch, seqlen_q, heads_q, head_dim_qk]       fp32, fp16, bf16
k        [batch, seqlen_kv, heads_kv, head_dim_qk]     dtype of q
sinks    [heads_q]                                     fp32
out      [batch, seqlen_q, heads_q, head_dim_v]        dtype of q
lse      [batch, heads_q, seqlen_q]                    fp32, natural log
=======  ============================================  ============================
"""

from __future__ import annotations

import typing

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from flashmla_hf import decode_ops, latent_stream
from flashmla_hf.latent_stream import Options
from flashmla_hf.ops import (
    check_tensor,
    dtype_name,
    needs_graph,
    refuse,
    refuse_tangents,
    without_second_derivative,
    without_transforms,
)

FORWARD, BACKWARD = "flash_attn_latent", "flash_attn_latent_backward"
_OPTIONS = "SymInt head_dim_v, float scale, SymInt window_left, SymInt window_right, float softcap"
_NUM_TENSORS = 3  # q, k and sinks: the arguments that may have a gradient

for _operator, _schema in {
    FORWARD: f"(Tensor q, Tensor k, Tensor? sinks, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    BACKWARD: "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor out, Tensor lse, Tensor? sinks, "
    f"{_OPTIONS}, bool needs_dq, bool needs_dk, bool needs_dsinks) -> (Tensor dq, Tensor dk, Tensor dsinks)",
}.items():
    torch.library.define(f"flashmla::{_operator}", _schema, tags=(torch.Tag.pt2_compliant_tag,))


# ---- Fake kernels ----------------------------------------------------------------------------------------------------


@torch.library.register_fake(f"flashmla::{FORWARD}")
def _forward_fake(q, k, sinks, head_dim_v, *_options):
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # imports sympy, which only traced calls need

    if k.dim() == 4 and (guard_or_false(head_dim_v < 1) or guard_or_false(head_dim_v > k.shape[-1])):
        _refuse_columns(FORWARD, k, head_dim_v)
    return decode_ops.outputs_of(FORWARD, q, k, k[..., :head_dim_v], q.dtype, sinks, None, None, None)


@torch.library.register_fake(f"flashmla::{BACKWARD}")
def _backward_fake(dout, dlse, q, k, out, lse, sinks, head_dim_v, *options):
    for name, x, dtype, shape in _tensors_of_backward(dout, dlse, q, k, out, lse, sinks, head_dim_v):
        check_tensor(BACKWARD, name, x, q, dtype, shape)
    needs = options[-_NUM_TENSORS:]
    dq, dk = (x.new_empty(x.shape if need else (0,)) for x, need in zip((q, k), needs, strict=False))
    return dq, dk, q.new_empty((q.shape[2] if needs[2] else 0,), dtype=torch.float32)


def _tensors_of_backward(dout, dlse, q, k, out, lse, sinks, head_dim_v):
    """(name, tensor, dtype, shape) that q and k ask of each other tensor."""
    for name, x in (("q", q), ("k", k)):
        if x.dim() != 4:
            refuse(BACKWARD, name, "4 dimensions", f"shape {[*x.shape]}")
    batch, seqlen_q, heads_q, head_dim = q.shape
    yield "k", k, q.dtype, (batch, *k.shape[1:3], head_dim)
    for name, x in (("dout", dout), ("out", out)):
        yield name, x, q.dtype, (batch, seqlen_q, heads_q, head_dim_v)
    for name, x in (("dlse", dlse), ("lse", lse)):
        yield name, x, torch.float32, (batch, heads_q, seqlen_q)
    yield "sinks", sinks, torch.float32, (heads_q,)


def _refuse_columns(operator: str, k: torch.Tensor, head_dim_v: int) -> typing.NoReturn:
    refuse(operator, "head_dim_v", f"from 1 to {k.shape[-1]} (the columns of k)", head_dim_v)


# ---- Kernels ---------------------------------------------------------------------------------------------------------


def _forward(q, k, sinks, head_dim_v, *options):
    for name, x in (("q", q), ("k", k)):
        if x.dim() != 4:
            refuse(FORWARD, name, "4 dimensions", f"shape {[*x.shape]}")
    if not 1 <= head_dim_v <= k.shape[-1]:
        _refuse_columns(FORWARD, k, head_dim_v)
    # The operator of caches checks all else, if there is something to compute.
    if q.numel() == 0 or k.numel() == 0:
        decode_ops.outputs_of(FORWARD, q, k, k[..., :head_dim_v], q.dtype, sinks, None, None, None)
    return latent_stream.forward(q, k, sinks, Options(head_dim_v, *options))


def _backward(dout, dlse, q, k, out, lse, sinks, head_dim_v, *options):
    for name, x, dtype, shape in _tensors_of_backward(dout, dlse, q, k, out, lse, sinks, head_dim_v):
        if x is None:
            continue
        if (x.device, x.dtype, tuple(x.shape)) != (q.device, dtype, tuple(shape)):
            expected, got = (
                f"{dtype_name(kind)} {[*size]} on {device}"
                for kind, size, device in ((dtype, shape, q.device), (x.dtype, x.shape, x.device))
            )
            refuse(BACKWARD, name, expected, got)
    if not 1 <= head_dim_v <= k.shape[-1]:
        _refuse_columns(BACKWARD, k, head_dim_v)
    if k.shape[2] == 0 or q.shape[2] % k.shape[2] != 0:
        refuse(BACKWARD, "q", f"a multiple of the {k.shape[2]} kv heads", f"{q.shape[2]} heads")
    *numbers, needs_dq, needs_dk, needs_dsinks = options
    needs = (needs_dq, needs_dk, needs_dsinks)
    return latent_stream.backward(dout, dlse, q, k, out, lse, sinks, Options(head_dim_v, *numbers), needs)


_library = torch.library.Library("flashmla", "FRAGMENT")
for _device in ("CPU", "CUDA"):
    _library.impl(FORWARD, _forward, _device)
    _library.impl(BACKWARD, _backward, _device)


# ---- Autograd --------------------------------------------------------------------------------------------------------


class _LatentAttention(torch.autograd.Function):
    """The formula of the gradients; ``output`` is (out, lse), already computed."""

    @staticmethod
    def forward(ctx, q, k, sinks, options, output):
        ctx.options = options
        ctx.save_for_backward(q, k, *output, sinks)
        # An unused lse (or out) arrives in backward as None instead of a tensor of zeros.
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, out, lse, sinks = ctx.saved_tensors
        needs = ctx.needs_input_grad[:_NUM_TENSORS]
        if (dout is None and dlse is None) or not any(needs):
            return (None,) * 5
        dout = torch.zeros_like(out) if dout is None else dout
        gradients = torch.ops.flashmla.flash_attn_latent_backward(
            dout, dlse, q, k, out, lse, sinks, *ctx.options, *needs
        )
        return (*(grad if need else None for grad, need in zip(gradients, needs, strict=True)), None, None)


_apply_attention = without_transforms(_LatentAttention)


def _differentiable_forward(*inputs):
    tensors, options = inputs[:_NUM_TENSORS], inputs[_NUM_TENSORS:]
    if forward_ad._current_level >= 0:
        refuse_tangents(FORWARD, "q k sinks", inputs)
    with torch._C._AutoDispatchBelowAutograd():
        output = torch.ops.flashmla.flash_attn_latent.default(*inputs)
    if not needs_graph(tensors):
        return output
    with enable_single_level_autograd_function():
        return _apply_attention(*tensors, options, output)


def _differentiable_backward(*inputs):
    overload = torch.ops.flashmla.flash_attn_latent_backward.default
    return without_second_derivative(overload, "dout dlse q k out lse sinks", inputs)


_library.impl(FORWARD, _differentiable_forward, "Autograd")
_library.impl(BACKWARD, _differentiable_backward, "Autograd")


def flash_attn_latent(
    q: torch.Tensor, k: torch.Tensor, sinks: torch.Tensor | None, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of ``torch.ops.flashmla.flash_attn_latent``."""
    numbers = (options.head_dim_v, options.scale, options.window_left, options.window_right, options.softcap)
    return torch.ops.flashmla.flash_attn_latent(q, k, sinks, *numbers)
