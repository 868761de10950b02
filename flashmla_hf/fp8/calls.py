"""Calls of :func:`flashmla_hf.attention` in fp8: their checks, their implementations, and their gradients.

=============  =====================================================================================================
``cpu``        exact attention, in fp32, of the quantised q, k and v: P is not rounded
``sm90``       the Hopper kernel (:mod:`~flashmla_hf.fp8.kernel`): quantises q, k and v of 16 bits, or takes them in fp8
``reference``  the emulation of the kernel (:mod:`~flashmla_hf.fp8.emulation`): P is rounded as there, sums are exact
others         raise
=============  =====================================================================================================

**Gradients.** Write ``r(x)`` for the rotation of q or k (none of v), and ``e`` for the error that quantisation makes of a
rotated tensor, ``dequantize(quantize(r(x))) - r(x)``, held constant. The gradients, in the dtype of the inputs, are those of

    attention(r(q) + e_q, r(k) + e_k, v + e_v)

with exact probabilities: straight through the rounding of q, k and v, and with ``reference`` through that of P. So P is
recomputed from the quantised q and k and matches the lse of the forward pass, and the products of the backward pass take the
quantised q, k and v. Since those are exact in bf16, a backward kernel of that dtype computes the same. Sinks and the lse have
gradients as ever.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from flashmla_hf import ops, reference
from flashmla_hf.backend import Backend
from flashmla_hf.backends import cpu
from flashmla_hf.fp8 import emulation, kernel
from flashmla_hf.fp8.quantization import BLOCK_ROWS, DTYPE, Quantized, block_of_rows, quantize, rotate
from flashmla_hf.notices import log_choice
from flashmla_hf.ops import dtype_name
from flashmla_hf.scalars import fail
from flashmla_hf.torch_state import is_transformed_eagerly
from flashmla_hf.validation import Call, check_float32

Descales = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_FIELDS = tuple(field.name for field in fields(Call))  # here: torch.compile does not trace fields()
_KERNELS = {"cuda": "sm90", "cpu": "cpu", "meta": "cpu"}


@dataclass(slots=True)
class Fp8Call(Call):
    """A validated call in fp8. ``descales``: fp32 [batch, heads_kv] each, if q, k and v are e4m3, else ``None``."""

    descales: Descales | None

    @property
    def out_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.descales is not None else self.q.dtype


def checked(call: Call, precision: Any, descales: tuple[Any, Any, Any]) -> Fp8Call:
    """``call`` as one in fp8; raises for arguments that do not fit."""
    if precision is not None and not (isinstance(precision, str) and precision == "fp8"):
        fail(ValueError, "precision", "None (that of the tensors) or 'fp8'", repr(precision))
    given = dict(zip(("q_descale", "k_descale", "v_descale"), descales, strict=True))
    is_quantized = call.q.dtype == DTYPE
    for name, x in given.items():
        if not is_quantized and x is not None:
            expected = "none, since q, k and v are not float8_e4m3fn (precision='fp8' quantises and scales them)"
            fail(ValueError, name, expected, "a tensor")
        if is_quantized:
            _check_descale(name, x, call)
    if is_quantized and ops.needs_graph((call.q, call.k, call.v)):
        expected = (
            "a tensor that requires no gradient, since it is quantised (pass 16 bits and precision='fp8' to train)"
        )
        fail(TypeError, "q, k and v", expected, "one that does")
    values = {name: getattr(call, name) for name in _FIELDS}
    return Fp8Call(**values, descales=descales if is_quantized else None)


def _check_descale(name: str, x: Any, call: Call) -> None:
    sequences = call.q.shape[0] if call.cu_seqlens_q is None else call.cu_seqlens_q.shape[0] - 1
    shape = [sequences, call.k.shape[-2]]
    if x is None:
        expected = f"fp32 {shape} (batch, heads_kv), since q is float8_e4m3fn (torch.ones for tensors without a scale)"
        fail(ValueError, name, expected, None)
    check_float32(name, x, shape, "batch, heads_kv", call.q.device, "q")


# ---- Choice ----------------------------------------------------------------------------------------------------------


def choose(call: Fp8Call, implementations: dict[str, Backend], others: Any) -> Backend:
    """The implementation for this call; raises if there is none. ``others`` are the names without fp8."""
    impl = call.impl
    if impl is not None and impl not in implementations and impl not in others:
        fail(ValueError, "impl", f"one of {list(implementations)} or None", repr(impl))
    if impl is not None and impl not in implementations:
        raise RuntimeError(f"flashmla attention: impl={impl!r} cannot compute this call in fp8: {_way_out(call)}")
    name = impl or _KERNELS.get(call.q.device.type)
    if name is None:
        raise RuntimeError(
            f"flashmla attention: no implementation computes this call on {call.q.device}: {_way_out(call)}"
        )
    reason = implementations[name].refusal(call)
    if reason is not None:
        raise RuntimeError(f"flashmla attention: no implementation computes this call in fp8. {name}: {reason}")
    log_choice(call, name, "fp8, explicit" if impl else "fp8")
    return implementations[name]


def _way_out(call: Fp8Call) -> str:
    instead = "precision=None" if call.descales is None else "tensors of float16 or bfloat16"
    return (
        f"pass {instead} for the exact kernels (flashmla in place of flashmla_fp8), or impl='reference', which emulates fp8 in "
        "float64 (slow, memory grows with seqlen_q)"
    )


def _refusal(call: Call) -> str | None:
    if call.attn_mask is not None or call.dropout_p > 0.0:
        argument = "attn_mask is given" if call.attn_mask is not None else f"dropout_p={call.dropout_p}"
        return f"{argument}: expected none in fp8; precision=None (in Transformers flashmla) computes it exactly"
    if is_transformed_eagerly():
        return "a transform of torch.func is active: expected none in fp8; precision=None has transforms"
    return None


def cpu_refusal(call: Call) -> str | None:
    reason = _refusal(call) or cpu.device_refusal(call.q)
    if reason is None and call.q.dtype not in (*_DTYPES, DTYPE):
        reason = f"dtype {dtype_name(call.q.dtype)}: expected float32, float16, bfloat16 or float8_e4m3fn"
    return reason


# ---- Implementations -------------------------------------------------------------------------------------------------


class _StraightThrough(torch.autograd.Function):
    """``value``, a rounded x, with the gradient of x."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def quantized(call: Fp8Call) -> tuple[tuple[Quantized, torch.Tensor], ...]:
    """q, k and v in fp8, each with the tensor that stands for it in autograd: its values before rounding."""
    tensors = ((call.q, call.cu_seqlens_q), (call.k, call.cu_seqlens_kv), (call.v, call.cu_seqlens_kv))
    if call.descales is not None:
        heads = [x.shape[-2] for x, _ in tensors]
        return tuple(
            (_from_descale(x, descale, count, cu_seqlens), x)
            for (x, cu_seqlens), descale, count in zip(tensors, call.descales, heads, strict=True)
        )
    rotated = (rotate(call.q, is_key=False), rotate(call.k, is_key=True), call.v)
    return tuple(
        (quantize(x, cu_seqlens, block_rows=BLOCK_ROWS), x) for x, (_, cu_seqlens) in zip(rotated, tensors, strict=True)
    )


def _from_descale(x: torch.Tensor, descale: torch.Tensor, heads: int, cu_seqlens) -> Quantized:
    """``descale`` [batch, heads_kv] for the e4m3 tensor x: a block for each sequence.

    A scale is finite and not negative: a negative factor becomes the sign of the numbers, another makes them NaN.
    """
    is_finite = descale.isfinite()
    sign = torch.where(is_finite, torch.where(descale.signbit(), -1.0, 1.0), math.nan)
    descale = torch.where(is_finite, descale.abs(), 1.0)

    def by_block(factor: torch.Tensor) -> torch.Tensor:
        factors = factor.repeat_interleave(heads // factor.shape[1], dim=1)[..., None]  # [batch, heads, 1]
        if cu_seqlens is None:
            return factors
        return torch.nn.functional.pad(factors[..., 0], (0, 0, 0, 1), value=1.0).T  # [heads, batch + 1]

    block, _ = block_of_rows(x.shape[-3], cu_seqlens, None, x.device)
    signs = Quantized(x, by_block(sign), block).row_scales()
    return Quantized((x.float() * signs[..., None]).to(DTYPE), by_block(descale), block)


def _dequantized(call: Fp8Call, tensors: tuple[tuple[Quantized, torch.Tensor], ...], dtype: torch.dtype) -> Fp8Call:
    q, k, v = (
        x8.dequantize(dtype) if call.descales is not None else _StraightThrough.apply(x.to(dtype), x8.dequantize(dtype))
        for x8, x in tensors
    )
    return replace(call, q=q, k=k, v=v)


def run_cpu(call: Fp8Call) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = cpu.run(_dequantized(call, quantized(call), torch.float32))
    return out.to(call.out_dtype), lse


def run_reference(call: Fp8Call) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = quantized(call)
    exact = _dequantized(call, tensors, torch.float64)
    out, lse = reference.attention(
        exact.q, exact.k, exact.v, sinks=call.sinks, cu_seqlens_q=call.cu_seqlens_q, cu_seqlens_kv=call.cu_seqlens_kv,
        scale=call.scale, window_left=call.window_left, window_right=call.window_right, softcap=call.softcap,
    )  # fmt: skip
    q8, k8, v8 = (x8 for x8, _ in tensors)
    emulated = emulation.attention(q8, k8, v8, call)
    out = _StraightThrough.apply(out, emulated)
    return out.to(call.out_dtype), lse.to(torch.promote_types(call.out_dtype, torch.float32))


def sm90_refusal(call: Fp8Call) -> str | None:
    reason = _refusal(call)
    if reason is None and (limit := kernel.refusal(call)) is not None:
        return f"{limit}: {_way_out(call)}"
    return reason


def run_sm90(call: Fp8Call) -> tuple[torch.Tensor, torch.Tensor]:
    return kernel.run(call) if call.descales is None else kernel.run_e4m3(call, call.descales)


IMPLEMENTATIONS: dict[str, Backend] = {
    "sm90": Backend(sm90_refusal, run_sm90),  # type: ignore[arg-type]
    "cpu": Backend(cpu_refusal, run_cpu),  # type: ignore[arg-type]
    "reference": Backend(_refusal, run_reference),  # type: ignore[arg-type]
}
