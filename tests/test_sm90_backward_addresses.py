"""The Hopper backward finds rows beyond 2^31 elements. Each test wants up to 45 GB of GPU memory: one process."""

from __future__ import annotations

from dataclasses import replace

import numerics
import pytest
import torch
from cases import Case
from gpu_support import DEVICE, IMPL, exact, needs_memory, needs_sm90, on_gpu
from sm90_support import ROWS_OF_2_31, assert_same_bits, gradients

from flashmla_hf import attention

pytestmark = needs_sm90


def exact_gradients(q, k, v, dout, scale, chunk=2**15):
    """dq, dk, dv in float64 of an unmasked call of one sequence, a chunk of its queries at a time."""
    group = q.shape[2] // k.shape[2]
    key, value = (x.transpose(1, 2).double().repeat_interleave(group, 1) for x in (k, v))
    dk, dv, dq = (
        torch.zeros_like(key),
        torch.zeros_like(value),
        torch.empty(q.shape, dtype=torch.float32, device=q.device),
    )
    for begin in range(0, q.shape[1], chunk):
        query, back = (x[:, begin : begin + chunk].transpose(1, 2).double() for x in (q, dout))
        weights = (query @ key.transpose(-1, -2) * scale).softmax(-1)
        dv += weights.transpose(-1, -2) @ back
        dweights = back @ value.transpose(-1, -2)
        dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True)) * scale
        dk += dscores.transpose(-1, -2) @ query
        dq[:, begin : begin + chunk] = (dscores @ key).transpose(1, 2)
    return dq, *(x.transpose(1, 2).unflatten(2, (-1, group)).sum(3) for x in (dk, dv))


def assert_near(name, got, expected):
    """What is read or written at a wrong place is off by about its own size. Rounding puts up to 2.6 % (seen) into dk of a
    key with half of a query's weight: delta is made from an out in bf16."""
    largest = float(expected.abs().max())
    error = float((got.double() - expected).abs().max())
    assert error <= 0.05 * largest, f"{name}: error {error:.2e}, largest value {largest:.2e}"


def normal(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_()


def test_the_yardstick_of_large_calls_agrees_with_the_reference():
    case = Case(seqlen_q=90, seqlen_kv=65, heads_q=4, heads_kv=2)
    inputs = case.inputs(torch.bfloat16, DEVICE)
    got = exact_gradients(inputs.q, inputs.k, inputs.v, inputs.dout, case.head_dim_qk**-0.5, chunk=40)
    truth = numerics.reference64(case, inputs, wants=("q", "k", "v"), has_dlse=False)
    for name, grad in zip("qkv", got, strict=True):
        torch.testing.assert_close(grad.double(), truth.grads[name], rtol=1e-5, atol=1e-6)


@on_gpu
def test_queries_and_sums_beyond_2_31_elements_get_their_gradients():
    """q, out, dout and dq, and the fp32 sums of dQ if they were held at once."""
    needs_memory(45)
    rows_q = ROWS_OF_2_31 + 1001
    q, dout = normal(1, rows_q, 8, 128), normal(1, rows_q, 8, 128)
    k, v = normal(1, 65, 2, 128), normal(1, 65, 2, 128)
    assert q.numel() > 2**31
    leaves = [x.requires_grad_() for x in (q, k, v)]
    dq, dk, dv = torch.autograd.grad(attention(*leaves, impl=IMPL), leaves, dout)
    expected = exact_gradients(q.detach(), k.detach(), v.detach(), dout, 128**-0.5)
    for begin in (0, ROWS_OF_2_31 // 2 - 500, ROWS_OF_2_31 - 500, rows_q - 1000):
        part = slice(begin, begin + 1000)
        assert_near(f"dq from row {begin}", dq[:, part], expected[0][:, part])
    assert_near("dk", dk, expected[1])
    assert_near("dv", dv, expected[2])


@on_gpu
def test_keys_beyond_2_31_elements_get_their_gradients():
    needs_memory(45)
    rows_kv, scale = ROWS_OF_2_31 + 3001, 128**-0.5
    q, dout = normal(1, 70, 16, 128), normal(1, 70, 16, 128)
    k, v = normal(1, rows_kv, 8, 128), normal(1, rows_kv, 8, 128)
    assert k.numel() > 2**31
    # One key of each kv head, past the edge, has about half of the weight of one query. (With all of it, dP - delta would
    # be the rounding error of out.)
    k[0, rows_kv - 9] = q[0, 3, ::2] * 1.3
    leaves = [x.requires_grad_() for x in (q, k, v)]
    dq, dk, dv = torch.autograd.grad(attention(*leaves, impl=IMPL), leaves, dout)
    q, k, v = (x.detach() for x in leaves)
    out, lse = exact(q, k, v, scale)
    delta = (out * dout.double()).sum(-1).transpose(1, 2)[..., None]
    query, back = (x.transpose(1, 2).double() for x in (q, dout))
    expected_dq = torch.zeros_like(query)
    edges = (0, ROWS_OF_2_31 // 2 - 500, ROWS_OF_2_31 - 500, rows_kv - 1000)
    for begin in sorted({*range(0, rows_kv, 2**15), *edges}):
        rows_of_dq = begin % 2**15 == 0
        part = slice(begin, begin + (2**15 if rows_of_dq else 1000))
        key, value = (x[:, part].transpose(1, 2).double().repeat_interleave(2, 1) for x in (k, v))
        weights = (query @ key.transpose(-1, -2) * scale - lse[..., None]).exp()
        dscores = weights * (back @ value.transpose(-1, -2) - delta) * scale
        if rows_of_dq:
            expected_dq += dscores @ key
        if begin in edges:
            for name, grad, sums in (
                ("dk", dk, dscores.transpose(-1, -2) @ query),
                ("dv", dv, weights.transpose(-1, -2) @ back),
            ):
                expected = sums.transpose(1, 2).unflatten(2, (-1, 2)).sum(3)[:, :1000]
                assert_near(f"{name} from row {begin}", grad[:, begin : begin + 1000], expected)
    expected_dq = expected_dq.transpose(1, 2)
    for part in (slice(0, 3), slice(3, 4), slice(4, 70)):  # each beside its own largest value
        assert_near(f"dq of rows {part}", dq[:, part], expected_dq[:, part])


@on_gpu
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "rows", "heads"])
def test_strides_beyond_2_31_elements_reach_the_right_place(dim):
    needs_memory(12)
    base = torch.zeros(2**31 + 2**20, dtype=torch.bfloat16, device=DEVICE)
    strides, shape = [64 * 9, 64 * 3, 64, 1], [2, 3, 2, 64]
    shape[dim], strides[dim] = 2, 2**31
    case = Case(batch=shape[0], seqlen_q=shape[1], heads_q=shape[2])
    inputs = case.inputs(torch.bfloat16, DEVICE)
    expected = gradients(case, inputs, deterministic=True)
    for name in ("q", "k", "v", "dout"):
        far = base.as_strided(shape, strides)
        far.copy_(getattr(inputs, name))
        assert torch.equal(far, getattr(inputs, name)), "the view overlaps itself"
        assert_same_bits(gradients(case, replace(inputs, **{name: far}), deterministic=True), expected)
