"""The oracle itself: against closed forms, against torch, and the streaming algorithm against it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashmla_hf import reference

# The example of the issue tracker: three queries, three keys, blocks of two, so the last block is short.
Q = torch.tensor([[0.5, 0.2], [0.1, 0.9], [0.4, 0.3]], dtype=torch.float64)
K = torch.tensor([[0.6, 0.1], [0.2, 0.7], [0.9, 0.5]], dtype=torch.float64)
V = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], dtype=torch.float64)


def softmax_attention(q, k, v, scale):
    return torch.softmax(scale * q @ k.T, dim=-1) @ v


def test_streaming_equals_softmax_on_the_worked_example():
    out, lse = reference.streaming_attention(Q, K, V, scale=1.0, block_size=2)
    torch.testing.assert_close(out, softmax_attention(Q, K, V, 1.0), rtol=0, atol=1e-15)
    torch.testing.assert_close(lse, torch.logsumexp(Q @ K.T, dim=-1), rtol=0, atol=1e-15)


def test_normalising_each_block_by_itself_is_wrong():
    """The popular sketch: softmax within each block, outputs added up (or averaged). Neither is attention."""
    exact = softmax_attention(Q, K, V, 1.0)
    blocks = [softmax_attention(Q, K[block], V[block], 1.0) for block in (slice(0, 2), slice(2, 4))]
    summed, averaged = sum(blocks), sum(blocks) / 2
    # Its rows sum to 2: two whole softmaxes were added. (Each row of V sums to 1, so exact rows sum to 1.)
    torch.testing.assert_close(summed.sum(dim=-1), torch.full((3,), 2.0, dtype=torch.float64))
    # Averaging repairs the sum, not the weights: the single key of the last block weighs as much as the first two.
    assert (averaged - exact).abs().max() > 0.01
    # Weighing each block by its share of the denominator is the repair, and is what the running maximum and sum do.
    block_lse = torch.stack([torch.logsumexp(Q @ K[block].T, dim=-1) for block in (slice(0, 2), slice(2, 4))])
    shares = torch.softmax(block_lse, dim=0)
    repaired = sum(share[:, None] * block for share, block in zip(shares, blocks, strict=True))
    torch.testing.assert_close(repaired, exact, rtol=0, atol=1e-15)


@given(
    seqlen_q=st.integers(1, 9),
    seqlen_kv=st.integers(1, 33),
    block_size=st.integers(1, 40),
    magnitude=st.sampled_from([1e-3, 1.0, 30.0, 1e3]),
    seed=st.integers(0, 2**31),
)
def test_streaming_is_the_same_for_every_block_size(seqlen_q, seqlen_kv, block_size, magnitude, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (seqlen_q, seqlen_kv, seqlen_kv))
    out, lse = reference.streaming_attention(magnitude * q, k, v, scale=1.0, block_size=block_size)
    torch.testing.assert_close(out, softmax_attention(magnitude * q, k, v, 1.0), rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, torch.logsumexp(magnitude * q @ k.T, dim=-1), rtol=1e-14, atol=1e-12)


def run(seqlen_q, seqlen_kv, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, seqlen_q, 4, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(2, seqlen_kv, 2, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    out, lse = reference.attention(q, k, v, scale=0.3, **options)
    return q, k, v, out, lse


@pytest.mark.parametrize(("seqlen_q", "seqlen_kv"), [(1, 1), (5, 5), (3, 9), (1, 7)])
def test_causal_is_bottom_right_aligned(seqlen_q, seqlen_kv):
    q, k, v, out, lse = run(seqlen_q, seqlen_kv, window_right=0)
    for i in range(seqlen_q):
        seen = i + seqlen_kv - seqlen_q + 1
        for head in range(4):
            scores = 0.3 * k[:, :seen, head // 2] @ q[:, i, head, :, None]  # [batch, seen, 1]
            expected = (torch.softmax(scores, dim=1) * v[:, :seen, head // 2]).sum(dim=1)
            torch.testing.assert_close(out[:, i, head], expected)
            torch.testing.assert_close(lse[:, head, i], torch.logsumexp(scores[..., 0], dim=1))


def test_fully_masked_rows_give_zero_output_and_minus_inf_lse():
    *_, out, lse = run(7, 3, window_right=0)  # queries 0 to 3 stand before the first key
    assert (out[:, :4] == 0).all()
    assert (lse[:, :, :4] == -math.inf).all()
    assert (out[:, 4:] != 0).all()
    assert lse[:, :, 4:].isfinite().all()


def test_a_sink_is_one_more_key_without_a_value():
    sinks = torch.tensor([0.3, -2.0, 5.0, 0.0], dtype=torch.float64)
    *_, out, lse = run(6, 6, sinks=sinks)
    *_, plain_out, plain_lse = run(6, 6)
    expected_lse = torch.logaddexp(plain_lse, sinks[None, :, None])
    torch.testing.assert_close(lse, expected_lse)
    torch.testing.assert_close(out, plain_out * torch.exp(plain_lse - expected_lse).transpose(1, 2)[..., None])


def test_window_keeps_both_ends():
    visible = reference.visible_keys(4, 6, 1, 1)
    assert visible.int().tolist() == [[0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1]]
    assert reference.visible_keys(4, 6, -1, -1) is None


def test_packed_sequences_equal_each_sequence_alone():
    lengths = [3, 0, 5, 1]
    cu_seqlens = torch.tensor([0, 3, 3, 8, 9], dtype=torch.int32)
    q, k, v = (torch.randn(11, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))  # two rows past the end
    options = {"scale": 0.5, "window_right": 0}
    out, lse = reference.attention(q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, **options)
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        if length:
            alone, alone_lse = reference.attention(q[None, rows], k[None, rows], v[None, rows], **options)
            torch.testing.assert_close(out[rows], alone[0])
            torch.testing.assert_close(lse[:, rows], alone_lse[0])
        start += length
    assert (out[9:] == 0).all()
    assert (lse[:, 9:] == -math.inf).all()


def test_gradients_agree_with_finite_differences():
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(1, 3, 2, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 5, 1, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    v = torch.randn(1, 5, 1, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(2, generator=generator, dtype=torch.float64, requires_grad=True)

    def function(q, k, v, sinks):
        return reference.attention(q, k, v, sinks=sinks, scale=0.7, softcap=3.0, window_left=2, window_right=0)

    assert torch.autograd.gradcheck(function, (q, k, v, sinks))
