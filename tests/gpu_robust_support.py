"""Calls that the tests of a GPU kernel's robustness share: the operators past dispatch, and all results of one call."""

from __future__ import annotations

import math

import numerics
import pytest
import torch
from cases import Case
from gpu_support import DEVICE

from flashmla_hf import attention

MASKS = {"full": {}, "causal": {"is_causal": True}, "window": {"window": (40, 9)}}
masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
ALL_NEEDED = (True, True, True, False)


def operator(inputs: dict, is_deterministic: bool = False):
    """forward() -> (out, lse) and backward(dout, dlse, out, lse) -> gradients by the operators, past dispatch and autograd."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    boundaries = inputs.get("cu_seqlens_q"), inputs.get("cu_seqlens_kv")
    numbers = (q.shape[-3], k.shape[-3], q.shape[-1] ** -0.5, -1, 0, 0.0, is_deterministic)

    def forward():
        return torch.ops.flashmla.flash_attn_forward(q, k, v, None, *boundaries, *numbers)

    def backward(dout, dlse, out, lse):
        return torch.ops.flashmla.flash_attn_backward(
            dout, dlse, q, k, v, out, lse, None, *boundaries, *numbers, *ALL_NEEDED
        )[:3]

    return forward, backward


def call_of(row, *, is_packed: bool = False, device: str | torch.device = DEVICE, seed: int = 0) -> dict:
    """q, k, v, dout and the boundaries of one call."""
    shape = {"seqlens_q": (333, 1, 500), "rest_q": 7} if is_packed else {"batch": 2, "seqlen_q": 421}
    case = Case(heads_q=4, heads_kv=2, head_dim_qk=row[0], head_dim_v=row[1], **shape)
    inputs = case.inputs(torch.bfloat16, device, seed)
    found = {"q": inputs.q, "k": inputs.k, "v": inputs.v}
    if is_packed:
        found |= {"cu_seqlens_q": inputs.cu_seqlens_q, "cu_seqlens_kv": inputs.cu_seqlens_kv}
    return found


def results_of(impl, case: Case, inputs) -> dict[str, torch.Tensor]:
    """out, lse and the gradients of one call. inputs.dout and inputs.dlse flow back unchanged, in rows without keys, too."""
    leaves = {name: getattr(inputs, name).detach().requires_grad_() for name in "qkv"}
    if inputs.sinks is not None:
        leaves["sinks"] = inputs.sinks.detach().requires_grad_()
    arguments = {"cu_seqlens_q": inputs.cu_seqlens_q, "cu_seqlens_kv": inputs.cu_seqlens_kv, **case.options}
    if impl == "eager":
        out, lse = numerics.eager(**leaves, **arguments)
    else:
        out, lse = attention(**leaves, **arguments, return_lse=True, impl=impl)
    flowing = (inputs.dout.to(out.dtype), inputs.dlse.to(lse.dtype))
    if impl == "eager":  # logsumexp of nothing gives NaN to autograd
        flowing = (flowing[0], flowing[1].masked_fill(lse == -math.inf, 0.0))
    grads = torch.autograd.grad((out, lse), list(leaves.values()), flowing)
    named = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"out": out.detach(), "lse": lse.detach(), **named}
