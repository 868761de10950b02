"""Calls of the Hopper kernels, forward and backward, and comparisons of their results."""

from __future__ import annotations

from dataclasses import fields

import numerics
import torch
from cases import Case
from gpu_support import DEVICE, HALF, IMPL

from flashmla_hf import attention


def check(case, dtype=torch.bfloat16, **options):
    return numerics.check(IMPL, case, dtype, DEVICE, **options)


def tensors(seqlen_q=100, seqlen_kv=None, head_dim=64, dtype=torch.bfloat16, device=None, heads=(4, 2), batch=2):
    """q, k, v of one dense call."""
    case = Case(
        batch=batch, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, heads_q=heads[0], heads_kv=heads[1], head_dim_qk=head_dim
    )
    inputs = case.inputs(dtype, device or DEVICE)
    return {"q": inputs.q, "k": inputs.k, "v": inputs.v}


def run(inputs, case, **changes):
    """(out, lse) of the case on these inputs, with arguments of ``attention`` changed."""
    arguments = {
        "q": inputs.q, "k": inputs.k, "v": inputs.v, "sinks": inputs.sinks, "cu_seqlens_q": inputs.cu_seqlens_q,
        "cu_seqlens_kv": inputs.cu_seqlens_kv, **case.options,
    }  # fmt: skip
    return attention(**(arguments | changes), return_lse=True, impl=IMPL)


ROWS_OF_2_31 = 2**31 // (8 * 128)  # of [rows, 8 heads, 128]
NAMES = ("q", "k", "v", "sinks")
MASKS = {"none": {}, "causal": {"is_causal": True}, "window": {"window": (70, 5)}}
BACKWARD = torch.ops.flashmla.flash_attn_backward.default


def gradients(case, inputs, wants=NAMES, flows=("dout", "dlse"), **changes):
    """The gradients of ``wants`` by name; ``flows`` names what flows back, ``changes`` are arguments of attention."""
    leaves = {name: getattr(inputs, name) for name in NAMES if getattr(inputs, name) is not None}
    leaves = {name: x.detach().requires_grad_(name in wants) for name, x in leaves.items()}
    out, lse = attention(
        **leaves, cu_seqlens_q=inputs.cu_seqlens_q, cu_seqlens_kv=inputs.cu_seqlens_kv, return_lse=True,
        **{"impl": IMPL, **case.options, **changes},
    )  # fmt: skip
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    results, back = zip(
        *((result, getattr(inputs, name)) for name, result in (("dout", out), ("dlse", lse)) if name in flows),
        strict=True,
    )
    return dict(zip(wanted, torch.autograd.grad(results, list(wanted.values()), back), strict=True))


def saved(case, inputs):
    """out, lse of the forward, as the operator of the backward wants them."""
    return attention(
        inputs.q, inputs.k, inputs.v, sinks=inputs.sinks, cu_seqlens_q=inputs.cu_seqlens_q,
        cu_seqlens_kv=inputs.cu_seqlens_kv, return_lse=True, impl=IMPL, **case.options,
    )  # fmt: skip


def operator(case, inputs, out, lse, wants=NAMES, deterministic=False):
    """The operator of the backward itself: dq, dk, dv, dsinks."""
    left, right = (-1 if bound is None else bound for bound in case.window or (None, None))
    scale = case.head_dim_qk**-0.5 if case.scale is None else case.scale
    return torch.ops.flashmla.flash_attn_backward(
        inputs.dout, inputs.dlse, inputs.q, inputs.k, inputs.v, out, lse, inputs.sinks, inputs.cu_seqlens_q,
        inputs.cu_seqlens_kv, inputs.q.shape[-3], inputs.k.shape[-3], scale, left, 0 if case.is_causal else right,
        case.softcap, deterministic, *(name in wants for name in NAMES),
    )  # fmt: skip


def assert_same_bits(got, expected):
    assert got.keys() == expected.keys()
    for name in got:
        assert torch.equal(got[name], expected[name]), f"d{name} differs"


def assert_same_up_to_rounding(got, expected):
    """The same sums in another order: a rounding of the result apart, and one of the fp32 sums."""
    assert got.keys() == expected.keys()
    for name, grad in got.items():
        eps, largest = torch.finfo(grad.dtype).eps, float(expected[name].abs().max())
        allowed = (2 * eps if grad.dtype in HALF else 1e-5) * largest
        torch.testing.assert_close(
            grad, expected[name], rtol=0, atol=allowed, msg=lambda text, name=name: f"d{name}: {text}"
        )


def copy_inputs(inputs, other):
    """Writes the values of every tensor of ``other`` into that of ``inputs``, as a replay of a graph wants new inputs."""
    for field in fields(inputs):
        if (tensor := getattr(inputs, field.name)) is not None:
            tensor.copy_(getattr(other, field.name))
