"""The Hopper forward finds rows beyond 2^31 elements. Each test wants about 20 GB of GPU memory: one process."""

from __future__ import annotations

import pytest
import torch
from gpu_support import DEVICE, IMPL, exact, needs_memory, needs_sm90, on_gpu
from sm90_support import ROWS_OF_2_31, tensors

from flashmla_hf import attention


def assert_near(got, expected):
    (out, lse), (expected_out, expected_lse) = got, expected
    largest = float(expected_out.abs().max())
    assert float((out.double() - expected_out).abs().max()) <= 0.02 * largest, f"largest value {largest:.2e}"
    assert float((lse.double() - expected_lse).abs().max()) <= 1e-3


@needs_sm90
@on_gpu
def test_keys_beyond_2_31_elements_are_found():
    needs_memory(20)
    rows_kv = ROWS_OF_2_31 + 3001
    generator = torch.Generator(DEVICE).manual_seed(0)
    k, v = (
        torch.empty(1, rows_kv, 8, 128, dtype=torch.bfloat16, device=DEVICE).normal_(generator=generator)
        for _ in range(2)
    )
    assert k.numel() > 2**31
    q = torch.randn(1, 70, 16, 128, generator=generator, device=DEVICE).bfloat16()
    # One key of each kv head, past the edge, stands out for one query: whoever misses it is far off.
    k[0, rows_kv - 9] = q[0, 3, ::2] * 2.0
    got = attention(q, k, v, return_lse=True, impl=IMPL)
    expected = exact(q, k, v, 128**-0.5)
    for part in (slice(0, 3), slice(3, 4), slice(4, 70)):  # each beside its own largest value
        assert_near(*((out[:, part], lse[:, :, part]) for out, lse in (got, expected)))
    assert float((expected[0][0, 3, 0] - v[0, rows_kv - 9, 0].double()).abs().max()) < 1.0
    # Few keys, all of them past the edge.
    window = {"window": (1500, 0), "return_lse": True, "impl": IMPL}
    first = rows_kv - 1571
    assert_near(
        attention(q, k, v, **window),
        (lambda out, lse: (out.double(), lse.double()))(
            *attention(q, k[:, first:].clone(), v[:, first:].clone(), **window)
        ),
    )
    last = slice(69, 70)
    assert_near(
        [x[:, last] if x.dim() == 4 else x[:, :, last] for x in attention(q, k, v, **window)],
        exact(q[:, last], k, v, 128**-0.5, first_key=rows_kv - 1501),
    )


@needs_sm90
@on_gpu
def test_queries_and_outputs_beyond_2_31_elements_are_found():
    needs_memory(20)
    rows_q = ROWS_OF_2_31 + 1001
    q = torch.empty(1, rows_q, 8, 128, dtype=torch.bfloat16, device=DEVICE).normal_()
    arguments = tensors(batch=1, seqlen_q=65, head_dim=128, heads=(8, 2))
    out, lse = attention(q, arguments["k"], arguments["v"], return_lse=True, impl=IMPL)
    assert out.numel() > 2**31
    for part in (slice(0, 100), slice(ROWS_OF_2_31 - 50, ROWS_OF_2_31 + 50), slice(rows_q - 100, rows_q)):
        expected = exact(q[:, part], arguments["k"], arguments["v"], 128**-0.5)
        assert_near((out[:, part], lse[:, :, part]), expected)


@needs_sm90
@on_gpu
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "rows", "heads"])
def test_strides_beyond_2_31_elements_reach_the_right_place(dim):
    needs_memory(12)
    base = torch.zeros(2**31 + 2**20, dtype=torch.bfloat16, device=DEVICE)
    strides = [64 * 9, 64 * 3, 64, 1]  # [batch 2, rows 3, heads 2, dim 64], then one dimension far apart
    shape = [2, 3, 2, 64]
    shape[dim] = 2
    strides[dim] = 2**31
    values = torch.randn(shape, device=DEVICE).bfloat16()
    far = base.as_strided(shape, strides)
    far.copy_(values)
    assert torch.equal(far, values), "the view overlaps itself"
    small_q, small_k, small_v = (x[: shape[0]] for x in tensors(seqlen_q=shape[1], head_dim=64, heads=(2, 2)).values())
    small_q = small_q[:, :, : shape[2]]
    for arguments in ((far, small_k, small_v), (small_q, far, values), (small_q, values, far)):
        near = [x.contiguous() for x in arguments]
        assert torch.equal(attention(*arguments, impl=IMPL), attention(*near, impl=IMPL))
