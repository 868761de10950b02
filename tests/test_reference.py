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


# ---- What is hidden from a row never reaches it ----------------------------------------------------------------------

NO_NUMBERS = (math.nan, math.inf, -math.inf)


def gradients_of(function, tensors, dout, dlse):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out, lse = function(*leaves)
    found = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    return [out.detach(), lse.detach(), *found]


@pytest.mark.parametrize("bad", NO_NUMBERS)
@pytest.mark.parametrize("kind", ["bool", "bias", "causal", "window"])
def test_values_hidden_from_a_row_never_reach_it(kind, bad):
    """Rows 0 to 4 see nothing of keys 5 to 8, rows 5 to 8 nothing of keys 0 to 2: each side is computed alone, whatever
    the other holds, in values and in gradients."""
    visible = torch.zeros(9, 9, dtype=torch.bool)
    visible[:5, :5] = torch.ones(5, 5).tril().bool()
    visible[5:, 3:] = True
    options = {
        "bool": {"attn_mask": visible},
        "bias": {"attn_mask": torch.zeros(9, 9, dtype=torch.float64).masked_fill(~visible, -math.inf)},
        "causal": {"window_right": 0},
        "window": {"window_right": 0, "window_left": 2},
    }[kind]
    if kind == "causal":
        visible = torch.ones(9, 9).tril().bool()
    if kind == "window":
        visible = torch.ones(9, 9).tril().bool() & ~torch.ones(9, 9).tril(-3).bool()
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 9, 2, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    dout = torch.randn(1, 9, 2, 4, generator=generator, dtype=torch.float64)
    dlse = torch.randn(1, 2, 9, generator=generator, dtype=torch.float64)

    def function(q, k, v):
        return reference.attention(q, k, v, scale=0.5, softcap=5.0, **options)

    sound = gradients_of(function, tensors, dout, dlse)
    assert all(x.isfinite().all() for x in sound)
    for key in range(9):
        # A key that is not a number: rows that do not see it are as they were.
        rows = ~visible[:, key]
        changed = [x.clone() for x in tensors]
        changed[1][:, key, :, 1] = bad
        changed[2][:, key, :, 2] = bad
        out, lse, dq, *_ = gradients_of(function, changed, dout, dlse)
        assert torch.equal(out[:, rows], sound[0][:, rows])
        assert torch.equal(lse[:, :, rows], sound[1][:, :, rows])
        assert torch.equal(dq[:, rows], sound[2][:, rows])
        assert not out[:, ~rows].isfinite().all(dim=-1).any(), "a row that sees it"
    for row in range(9):
        # A query, or a gradient that arrives at it, that is not a number: keys hidden from it are as they were.
        keys = ~visible[row]
        for where in ("q", "dout", "dlse"):
            changed, grads = [x.clone() for x in tensors], {"dout": dout.clone(), "dlse": dlse.clone()}
            if where == "q":
                changed[0][:, row] = bad
            elif where == "dout":
                grads["dout"][:, row] = bad
            else:
                grads["dlse"][:, :, row] = bad
            out, _, dq, dk, dv = gradients_of(function, changed, **grads)
            others = torch.arange(9) != row
            assert torch.equal(dq[:, others], sound[2][:, others])
            assert torch.equal(dk[:, keys], sound[3][:, keys])
            assert torch.equal(dv[:, keys], sound[4][:, keys])
            if visible[row].any():
                assert not dk[:, ~keys].isfinite().all()


@pytest.mark.parametrize("bad", NO_NUMBERS)
def test_rows_that_see_nothing_take_no_gradient_and_sequences_no_neighbour(bad):
    q, k, v = (torch.randn(12, 2, 4, dtype=torch.float64) for _ in range(3))
    cu_q, cu_kv = torch.tensor([0, 4, 9], dtype=torch.int32), torch.tensor([0, 2, 9], dtype=torch.int32)

    def function(q, k, v):
        return reference.attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_kv=cu_kv, scale=0.5, window_right=0)

    dout, dlse = torch.randn(12, 2, 4, dtype=torch.float64), torch.randn(2, 12, dtype=torch.float64)
    sound = gradients_of(function, (q, k, v), dout, dlse)
    changed = [x.clone() for x in (q, k, v)]
    for x in (*changed, dout):
        x[9:] = bad  # no sequence's
    changed[0][:2], dout[:2] = bad, bad  # rows before the first key
    dlse[:, :2] = dlse[:, 9:] = bad
    for mine, expected in zip(gradients_of(function, changed, dout, dlse), sound, strict=True):
        assert torch.equal(mine, expected)
    for x in changed:
        x[4:9] = bad  # the second sequence
    found = gradients_of(function, changed, dout, dlse)
    for mine, expected, last in zip(found, sound, (4, 4, 4, 2, 2), strict=True):
        rows = (slice(None), slice(last)) if mine.dim() == 2 else slice(last)
        assert torch.equal(mine[rows], expected[rows])


def test_nan_and_infinite_values_are_summed_as_ieee_arithmetic_sums_them():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        a = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        a[torch.rand(3, 4, generator=generator) < 0.2] = 0.0
        b = torch.randn(4, 5, generator=generator, dtype=torch.float64)
        for bad in NO_NUMBERS:
            b[torch.rand(4, 5, generator=generator) < 0.15] = bad
        visible = torch.rand(3, 4, generator=generator) < 0.6
        expected = torch.stack(
            [torch.stack([(a[i] * b[:, d])[visible[i]].sum() for d in range(5)]) for i in range(3)]
        )  # fmt: skip
        found = reference.sum_over_visible(a.masked_fill(~visible, 0.0), b, visible)
        torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("way", ["function", "traced"])
def test_derivatives_of_any_order_agree_with_finite_differences(way, monkeypatch):
    if way == "traced":
        monkeypatch.setattr(reference, "is_functionalizing", lambda: True)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 3, 1, 2, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    bias[0, 1:] = -math.inf
    bias.requires_grad_()

    def function(q, k, v, bias):
        return reference.attention(q, k, v, attn_mask=bias, scale=0.7, softcap=3.0)

    assert torch.autograd.gradcheck(function, (q, k, v, bias), check_forward_ad=True, masked=True)
    assert torch.autograd.gradgradcheck(
        lambda q, k, v: function(q, k, v, bias.detach()), (q, k, v), check_fwd_over_rev=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_finite_minimum_in_all_of_a_row_gives_the_mean(dtype):
    """The padding of Transformers' four-dimensional masks. -inf in all of a row gives 0."""
    q, k, v = (torch.randn(1, 64, 2, 16).to(dtype) for _ in range(3))
    statistics = torch.promote_types(dtype, torch.float32)
    mask = torch.zeros(64, 64, dtype=statistics)
    mask[0], mask[1] = torch.finfo(statistics).min, -math.inf
    mask.requires_grad_()
    q.requires_grad_()
    out, lse = reference.attention(q, k, v, attn_mask=mask, scale=0.25, softcap=50.0)
    torch.testing.assert_close(out[0, 0], v[0].double().mean(0).to(dtype))
    assert (out[0, 1] == 0).all()
    assert (lse[0, :, 1] == -math.inf).all()
    grad_q, grad_mask = torch.autograd.grad(lse[0, :, 0].sum(), (q, mask))
    torch.testing.assert_close(grad_mask[0], torch.full((64,), 2 / 64, dtype=statistics))
    assert grad_q.isfinite().all()


def test_window_bounds_beyond_every_key_hide_nothing():
    for far in (2**40, 2**62, 2**63 - 1):
        assert reference.visible_keys(4, 6, far, 0).equal(reference.visible_keys(4, 6, -1, 0))
        assert reference.visible_keys(4, 6, 1, far).equal(reference.visible_keys(4, 6, 1, -1))
        assert reference.visible_keys(4, 6, -1, far).all()


@pytest.mark.parametrize("sink", [math.nan, math.inf, -math.inf])
def test_nan_and_infinite_sinks_give_what_eager_gives(sink):
    q, k, v = (torch.randn(1, n, 2, 4, dtype=torch.float64) for n in (8, 5, 5))
    sinks = torch.tensor([sink, 0.5], dtype=torch.float64)
    out, lse = reference.attention(q, k, v, sinks=sinks, scale=0.5, window_right=0)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * 0.5
    scores = scores.masked_fill(~reference.visible_keys(8, 5, -1, 0), -math.inf)
    scores = torch.cat([scores, sinks[None, :, None, None].expand(1, 2, 8, 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :-1]
    expected, expected_lse = torch.einsum("bhij,bjhd->bihd", weights, v), torch.logsumexp(scores, dim=-1)
    if sink == -math.inf:  # rows that see nothing: zero is ours
        expected = expected.nan_to_num(0.0)
    torch.testing.assert_close(out, expected, equal_nan=True)
    torch.testing.assert_close(lse, expected_lse, equal_nan=True)
    assert (reference.attention(q, k[:, :0], v[:, :0], sinks=sinks, scale=0.5)[0] == 0).all()
