"""Lengths, bounds and scales of every kind: none, zero, NumPy's, tensors, symbolic ones, more than a grid has columns."""

from fractions import Fraction

import numpy
import pytest
import torch
from small_calls import cu, packed, qkv
from torch.fx.experimental.proxy_tensor import make_fx

from flashmla_hf import attention, flash_attn_varlen_func

# ---- No queries, no keys, no batch -----------------------------------------------------------------------------------

EMPTY = {"no batch": (0, 5, 5), "no queries": (2, 0, 5), "no keys": (2, 5, 0), "nothing": (0, 0, 0)}


@pytest.mark.filterwarnings("ignore:flashmla attention. ")
@pytest.mark.parametrize("impl", ["cpu", "sdpa", "reference"])
@pytest.mark.parametrize("shape", EMPTY.values(), ids=EMPTY.keys())
def test_empty_calls_have_a_backward_for_any_gradient(shape, impl):
    batch, seqlen_q, seqlen_kv = shape
    masks = (
        (None,) if impl == "cpu" else (None, torch.ones(seqlen_q, seqlen_kv, dtype=torch.bool), torch.zeros(seqlen_kv))
    )
    for mask in masks:
        for is_causal in (False, True):
            q = torch.randn(batch, seqlen_q, 2, 8, requires_grad=True)
            k, v = (torch.randn(batch, seqlen_kv, 2, 8, requires_grad=True) for _ in range(2))
            out = attention(q, k, v, attn_mask=mask, is_causal=is_causal, impl=impl)
            assert out.shape == q.shape
            assert (out == 0).all()
            for dout in (
                torch.ones_like(out),
                torch.ones(()).expand(out.shape),
                torch.ones(8, 2, 1, 1).expand(8, 2, *out.shape[1::-1]).permute(3, 2, 1, 0),
            ):
                for grad, like in zip(
                    torch.autograd.grad(out, (q, k, v), dout, retain_graph=True), (q, k, v), strict=True
                ):
                    assert grad.shape == like.shape
                    assert (grad == 0).all()


def test_strides_of_tensors_without_elements_are_ignored():
    odd = torch.empty(2, 0, 2, 16)[..., ::2]
    assert odd.contiguous().stride(-1) == 2
    assert attention(odd, odd, odd).shape == (2, 0, 2, 8)
    assert attention(torch.ones(2, 3, 2, 8), odd, odd).abs().max() == 0
    cu_seqlens = cu(0, 0, 0)
    q = odd[0].detach().requires_grad_()
    attention(q, q, q, cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens).sum().backward()
    assert q.grad.shape == q.shape


# ---- Numbers of every kind -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_numbers_may_be_numpy_s_and_tensors_without_dimensions(impl):
    tensors = {name: torch.randn(t.shape) for name, t in qkv().items()}
    expected = attention(**tensors, scale=0.25, softcap=2.0, window=(2, 1), impl=impl)
    for scale in (
        torch.tensor(0.25),
        torch.tensor(0.25, dtype=torch.float64),
        numpy.float32(0.25),
        numpy.float64(0.25),
        Fraction(1, 4),
    ):
        for two, one in ((2, 1), (torch.tensor(2), torch.tensor(1)), (numpy.int64(2), numpy.int32(1))):
            found = attention(**tensors, scale=scale, softcap=numpy.float16(2.0), window=(two, one), impl=impl)
            assert torch.equal(found, expected)
    for far in (2**63 - 1, 2**70):
        unbounded = attention(**tensors, window=(far, far), impl=impl)
        torch.testing.assert_close(unbounded, attention(**tensors, impl=impl))


def test_numbers_and_lengths_may_be_numpy_s_in_packs():
    expected = attention(**packed(q=torch.ones(9, 4, 8)))
    for length in (numpy.int64(5), numpy.int32(9), torch.tensor(5, dtype=torch.int32)):
        found = attention(**packed(q=torch.ones(9, 4, 8), max_seqlen_q=length, max_seqlen_kv=length))
        assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_tracers_that_make_sizes_symbolic_take_the_default_scale():
    q, other = torch.randn(2, 7, 3, 8), torch.randn(2, 7, 3, 16)

    class Net(torch.nn.Module):
        def forward(self, q):
            return attention(q, q * 2, q.sin(), is_causal=True)

    for trace in (
        lambda: make_fx(Net(), tracing_mode="symbolic")(q),
        lambda: torch.export.export(
            Net(), (q,), dynamic_shapes=({3: torch.export.Dim("d", min=2, max=512)},), strict=False
        ).module(),
    ):
        traced = trace()
        for x in (q, other):
            torch.testing.assert_close(traced(x), Net()(x))
    torch.testing.assert_close(torch.jit.trace(Net(), q)(q), Net()(q))


def test_a_length_from_the_data_compiles_into_one_graph():
    q, boundaries = torch.randn(9, 2, 8), cu(0, 4, 9)

    def as_item(q, boundaries):
        longest = boundaries.diff().max().item()
        return flash_attn_varlen_func(q, q, q, boundaries, boundaries, longest, longest, causal=True)

    def as_tensor(q, boundaries):
        longest = boundaries.diff().max()
        return flash_attn_varlen_func(q, q, q, boundaries, boundaries, longest, longest, causal=True)

    for function in (as_item, as_tensor):
        torch._dynamo.reset()
        with torch._dynamo.config.patch(capture_scalar_outputs=True):
            compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(q, boundaries), function(q, boundaries))
            with pytest.raises(RuntimeError, match="max_seqlen_q"):
                torch.compile(
                    lambda q, b: flash_attn_varlen_func(q, q, q, b, b, b.min().item() - 1, 9),
                    fullgraph=True,
                    backend="aot_eager",
                )(q, boundaries)


@pytest.mark.parametrize("count", [65_536, 70_001])
def test_more_heads_or_sequences_than_a_grid_has_columns_are_computed(count):
    q = torch.randn(1, 2, count, 1)
    torch.testing.assert_close(attention(q, q, q, is_causal=True), attention(q, q, q, is_causal=True, impl="sdpa"))
    rows = torch.randn(count, 1, 2)
    boundaries = torch.arange(count + 1, dtype=torch.int32)
    out = attention(
        rows, rows, rows, cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries, max_seqlen_q=1, max_seqlen_kv=1
    )
    torch.testing.assert_close(out, rows)  # each sees itself


def test_max_seqlen_may_be_a_tensor_as_some_collators_hand_it():
    bound = torch.tensor(5)
    expected = attention(**packed(q=torch.ones(9, 4, 8)))
    assert torch.equal(attention(**packed(q=torch.ones(9, 4, 8), max_seqlen_q=bound, max_seqlen_kv=bound)), expected)
