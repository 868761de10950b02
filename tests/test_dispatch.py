"""The dispatch layer: every refusal by its exact words, the table of choices, and the flash-attn signatures."""

import logging
import math
import re
import warnings
from fractions import Fraction

import numpy
import pytest
import torch
from cases import Case
from numerics import assert_close_to_reference, check
from torch.fx.experimental.proxy_tensor import make_fx

from flashmla_hf import attention, direct, dispatch, flash_attn_func, flash_attn_varlen_func, libraries, notices
from flashmla_hf.backend import Backend

P = "flashmla attention: "


def x(*shape, **options):
    return torch.zeros(shape, **options)


def cu(*values, **options):
    return torch.tensor(values, **{"dtype": torch.int32, **options})


def qkv(**changes):
    return {"q": x(2, 5, 4, 8), "k": x(2, 6, 2, 8), "v": x(2, 6, 2, 8), **changes}


def packed(**changes):
    return {
        "q": x(9, 4, 8), "k": x(9, 2, 8), "v": x(9, 2, 8), "cu_seqlens_q": cu(0, 4, 9), "cu_seqlens_kv": cu(0, 4, 9), **changes,
    }  # fmt: skip


# (arguments, exception, the whole message). One wrong thing each.
WRONG_CALLS = [
    (qkv(q=[1.0]), TypeError, P + "q: expected a torch.Tensor, got list"),
    (qkv(q=x(5, 4, 8)), ValueError, P + "q: expected [batch, seqlen, heads, dim] without cu_seqlens, got 3 dimensions [5, 4, 8]"),
    (packed(q=x(1, 9, 4, 8)), ValueError, P + "q: expected [total, heads, dim] with cu_seqlens, got 4 dimensions [1, 9, 4, 8]"),
    (qkv(k=x(2, 6, 2, 8, dtype=torch.float16)), TypeError, P + "k: expected dtype float32 (that of q), got float16"),
    (qkv(k=x(2, 6, 2, 8, device="meta")), ValueError, P + "k: expected device cpu (that of q), got meta"),
    (qkv(v=x(2, 6, 2, 0)), ValueError, P + "v: expected at least one head and one dimension, got shape [2, 6, 2, 0]"),
    (qkv(k=x(2, 6, 0, 8)), ValueError, P + "k: expected at least one head and one dimension, got shape [2, 6, 0, 8]"),
    (qkv(q=x(2, 5, 4, 16)[..., ::2]), ValueError, P + "q: expected a contiguous last dimension (call .contiguous()), got stride 2"),
    (qkv(k=x(2, 6, 8, 2).transpose(2, 3)), ValueError, P + "k: expected a contiguous last dimension (call .contiguous()), got stride 2"),
    ({name: x(2, 5, 4, 8, dtype=torch.int32) for name in "qkv"}, TypeError, P + "q: expected a floating dtype, got int32"),
    (qkv(k=x(2, 6, 2, 16)), ValueError, P + "k: expected head_dim 8 (that of q), got 16"),
    (qkv(v=x(2, 7, 2, 8)), ValueError, P + "v: expected shape [2, 6, 2] before the last dimension (that of k), got [2, 7, 2]"),
    (qkv(k=x(3, 6, 2, 8), v=x(3, 6, 2, 8)), ValueError, P + "k: expected batch 2 (that of q), got 3"),
    (qkv(k=x(2, 6, 3, 8), v=x(2, 6, 3, 8)), ValueError, P + "k: expected a number of heads that divides q's 4, got 3"),
    (qkv(k=x(2, 6, 8, 8), v=x(2, 6, 8, 8)), ValueError, P + "k: expected a number of heads that divides q's 4, got 8"),
    (qkv(q=x(2, 5, 4, 8).to_sparse()), TypeError, P + "q: expected a dense strided tensor (pack ragged batches with cu_seqlens), got a sparse or nested tensor"),
    (qkv(scale="1"), TypeError, P + "scale: expected a number, got str"),
    (qkv(scale=math.nan), ValueError, P + "scale: expected a finite number, got nan"),
    (qkv(softcap=-1.0), ValueError, P + "softcap: expected 0 (none) or a positive number, got -1.0"),
    (qkv(softcap=math.inf), ValueError, P + "softcap: expected a finite number, got inf"),
    (qkv(dropout_p=1.0), ValueError, P + "dropout_p: expected a number in [0, 1), got 1.0"),
    (qkv(dropout_p=True), TypeError, P + "dropout_p: expected a number, got bool"),
    (qkv(window=4), TypeError, P + "window: expected a pair (left, right), got 4"),
    (qkv(window=(-2, 0)), ValueError, P + "window left: expected a bound >= 0, or -1 or None for unbounded, got -2"),
    (qkv(window=(3, 1.5)), TypeError, P + "window right: expected an int or None, got 1.5"),
    (qkv(window=("a", 0)), TypeError, P + "window left: expected an int or None, got 'a'"),
    (qkv(window=(0, True)), TypeError, P + "window right: expected an int or None, got True"),
    (qkv(window=(torch.tensor(1.0), 0)), TypeError, P + "window left: expected an int or None, got a tensor [] of float32"),
    (qkv(window=(torch.tensor([1, 2]), 0)), TypeError, P + "window left: expected an int or None, got a tensor [2] of int64"),
    (qkv(scale=10**400), ValueError, P + f"scale: expected a finite number, got {10**400}"),
    (qkv(scale=1j), TypeError, P + "scale: expected a number, got complex"),
    (qkv(scale=torch.ones(2)), TypeError, P + "scale: expected a number, got a tensor [2] of float32"),
    (qkv(scale=torch.tensor(0.5, requires_grad=True)), TypeError, P + "scale: expected a number, for which no gradient is computed (multiply q by it), got a tensor that requires one"),
    (packed(max_seqlen_q="8"), TypeError, P + "max_seqlen_q: expected an int, got '8'"),
    (packed(max_seqlen_kv=torch.tensor(-1)), ValueError, P + "max_seqlen_kv: expected a length >= 0, got -1"),
    (packed(max_seqlen_kv=torch.tensor([9, 9])), TypeError, P + "max_seqlen_kv: expected an int, got a tensor [2] of int64"),
    (qkv(attn_mask=x(1, 2, 1, 5, 6)), ValueError, P + "attn_mask: expected a shape that broadcasts to [2, 4, 5, 6], got [1, 2, 1, 5, 6]"),
    (qkv(attn_mask=x(5)), ValueError, P + "attn_mask: expected a shape that broadcasts to [2, 4, 5, 6], got [5]"),
    (qkv(sinks=x(2)), ValueError, P + "sinks: expected shape [4] (one logit per query head), got [2]"),
    (qkv(sinks=x(4, dtype=torch.int64)), TypeError, P + "sinks: expected a floating dtype, got int64"),
    (qkv(sinks=x(4, device="meta")), ValueError, P + "sinks: expected device cpu (that of q), got meta"),
    (qkv(attn_mask=x(2, 1, 5, 5)), ValueError, P + "attn_mask: expected a shape that broadcasts to [2, 4, 5, 6], got [2, 1, 5, 5]"),
    (qkv(attn_mask=x(2, 1, 5, 6, dtype=torch.int64)), TypeError, P + "attn_mask: expected dtype bool (true keeps) or a floating dtype (added), got int64"),
    (packed(attn_mask=x(1)), ValueError, P + "attn_mask: expected none with packed sequences (cu_seqlens already separate them), got a mask"),
    (packed(cu_seqlens_kv=None), ValueError, P + "cu_seqlens_kv: expected a tensor, since the other cu_seqlens is given (pass both or neither), got None"),
    (packed(cu_seqlens_q=None), ValueError, P + "cu_seqlens_q: expected a tensor, since the other cu_seqlens is given (pass both or neither), got None"),
    (packed(cu_seqlens_q=cu(0, 4, 9, dtype=torch.int64)), TypeError, P + "cu_seqlens_q: expected dtype int32, got int64"),
    (packed(cu_seqlens_q=cu(0, 0, 4, 0, 9)[::2]), ValueError, P + "cu_seqlens_q: expected a contiguous tensor [num_sequences + 1], got shape [3], stride (2,)"),
    (packed(cu_seqlens_q=cu(0, 9)), ValueError, P + "cu_seqlens_kv: expected 2 boundaries (as cu_seqlens_q), got 3"),
    (packed(max_seqlen_q=-1), ValueError, P + "max_seqlen_q: expected a length >= 0, got -1"),
    (packed(max_seqlen_kv=2.0), TypeError, P + "max_seqlen_kv: expected an int, got 2.0"),
    (qkv(max_seqlen_q=5), ValueError, P + "max_seqlen_q: expected none without cu_seqlens, got 5"),
    (qkv(impl="cuda"), ValueError, P + "impl: expected one of ['sm90', 'cpu', 'flex', 'sdpa', 'reference'] or None, got 'cuda'"),
    ({name: x(2, 5, 4, 8, dtype=torch.float64) for name in "qkv"}, RuntimeError, P + "no implementation computes this call. cpu: dtype float64: expected float32, float16 or bfloat16 (impl='reference' computes float64)"),
    (qkv(impl="cpu", dropout_p=0.5), RuntimeError, P + "impl='cpu' cannot compute this call: dropout_p=0.5: expected 0 (impl='sdpa' and impl='reference' compute dropout)"),
    (qkv(impl="cpu", attn_mask=x(5, 6)), RuntimeError, P + "impl='cpu' cannot compute this call: attn_mask is given: expected none (impl='sdpa' and impl='reference' take one)"),
    (qkv(impl="flex"), RuntimeError, P + "impl='flex' cannot compute this call: the tensors are on cpu: expected a GPU"),
    (qkv(impl="sdpa", softcap=2.0), RuntimeError, P + "impl='sdpa' cannot compute this call: softcap is given: torch's SDPA has none (impl='reference' computes it)"),
    (qkv(impl="sdpa", return_lse=True), RuntimeError, P + "impl='sdpa' cannot compute this call: return_lse=True: torch's SDPA returns none (impl='reference' does)"),
    (packed(impl="sdpa"), RuntimeError, P + "impl='sdpa' cannot compute this call: cu_seqlens are given: expected the dense layout"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG_CALLS, ids=lambda value: None)
def test_wrong_calls_raise_with_the_argument_the_expectation_and_the_value(arguments, error, message):
    with pytest.raises(error) as caught:
        attention(**arguments)
    assert str(caught.value) == message


# The values of cu_seqlens are read where they are used: by the C++ host code, and by the reference.
WRONG_BOUNDARIES = {
    "does not begin at 0": cu(1, 4, 9),
    "falls": cu(0, 5, 4),
    "ends past the pack": cu(0, 4, 10),
    "negative": cu(0, -1, 9),
}


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("side", ["q", "kv"])
@pytest.mark.parametrize("values", WRONG_BOUNDARIES.values(), ids=WRONG_BOUNDARIES.keys())
def test_wrong_boundaries_raise_instead_of_reading_past_the_end(impl, side, values):
    with pytest.raises((ValueError, RuntimeError), match=f"cu_seqlens_{side}"):
        attention(**packed(**{f"cu_seqlens_{side}": values}, impl=impl))


def test_too_small_a_bound_on_the_sequence_length_raises():
    with pytest.raises(RuntimeError, match="max_seqlen_q"):
        attention(**packed(max_seqlen_q=4))


def test_a_missing_library_is_refused_with_the_reason_and_the_way_out(monkeypatch):
    monkeypatch.setitem(libraries.unavailable, "cpu", "libflashmla_cpu.so was not built")
    monkeypatch.setattr(direct, "enabled", False)  # which had found the library
    with pytest.raises(RuntimeError, match=re.escape("cpu: libflashmla_cpu.so was not built; reinstall flashmla_hf")):
        attention(**qkv())


@pytest.mark.parametrize(
    "arguments",
    [
        {"attn_mask": torch.rand(2, 1, 5, 6) > 0.3},
        {"attn_mask": torch.randn(5, 6)},
        {"dropout_p": 0.0, "is_causal": True},
    ],
    ids=["bool", "float", "none"],
)
def test_sdpa_path_equals_the_reference(arguments):
    tensors = {name: torch.randn(value.shape) for name, value in qkv().items()}
    expected = attention(**tensors, **arguments, impl="reference")
    torch.testing.assert_close(attention(**tensors, **arguments, impl="sdpa"), expected)


# ---- attn_mask: every shape, dtype and implementation, held to softmax in float64 ------------------------------------

SHAPES = [(), (1,), (6,), (1, 1), (5, 6), (5, 1), (1, 6), (4, 1, 6), (1, 5, 6), (4, 5, 1), (2, 1, 5, 6), (1, 4, 5, 6), (2, 4, 5, 6),
          (2, 1, 1, 6), (1, 1, 1, 1), (2, 4, 1, 1)]  # fmt: skip
FEATURES = {
    "alone": {}, "causal": {"is_causal": True}, "window": {"window": (2, 1)}, "softcap": {"softcap": 3.0},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}, "lse": {"return_lse": True},
}  # fmt: skip


def truth(q, k, v, mask, *, is_causal=False, window=(None, None), softcap=0.0, sinks=None, **_):
    """Softmax in float64; rows that see nothing are 0."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    row, key = torch.arange(5)[:, None] + 1, torch.arange(6)
    left, right = window[0], 0 if is_causal else window[1]
    hidden = torch.zeros(5, 6, dtype=torch.bool)
    hidden |= (key < row - left) if left is not None else hidden
    hidden |= (key > row + right) if right is not None else hidden
    if mask.dtype == torch.bool:
        hidden = hidden | ~mask
    else:
        scores = scores + mask.double()
        hidden = hidden | (mask == -math.inf)
    scores = scores.masked_fill(hidden, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[None, :, None, None].expand(2, 4, 5, 1)], dim=-1)
    dead = (scores == -math.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)[..., :6]
    return (weights @ v).transpose(1, 2)


@pytest.mark.filterwarnings("ignore:flashmla attention. attn_mask")
@pytest.mark.parametrize("kind", ["bool", "float32", "float64", "bfloat16", "minus infinity", "gradient"])
@pytest.mark.parametrize("feature", FEATURES)
def test_masks_of_any_shape_are_exact_with_gradients(feature, kind):
    options = FEATURES[feature]
    for number, shape in enumerate(SHAPES):
        generator = torch.Generator().manual_seed(number)
        q, k, v = (
            torch.randn(s, generator=generator, requires_grad=True) for s in ((2, 5, 4, 8), (2, 6, 2, 8), (2, 6, 2, 8))
        )
        mask = torch.randn(shape, generator=generator) * 3
        if kind == "bool":
            mask = mask > -1.0
        elif kind == "minus infinity":
            mask = mask.masked_fill(mask < -1.0, -math.inf)
        elif kind == "gradient":
            mask.requires_grad_()
        else:
            mask = mask.to(getattr(torch, kind))
        leaves = [q, k, v, *([mask] if kind == "gradient" else [])]
        expected = truth(q, k, v, mask, **options)
        weights = torch.randn(expected.shape, generator=generator)
        gradients = torch.autograd.grad((expected * weights).sum(), leaves, allow_unused=True)
        for impl in (None, "reference") if feature in ("softcap", "sinks", "lse") else (None, "sdpa", "reference"):
            out = attention(q, k, v, attn_mask=mask, impl=impl, **options)
            out = out[0] if feature == "lse" else out
            assert out.dtype == q.dtype
            torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
            for mine, other in zip(torch.autograd.grad((out * weights).sum(), leaves), gradients, strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:flashmla attention. ")
@pytest.mark.parametrize("shape", [(), (6,), (1, 6), (5, 1), (2, 1, 5, 6)], ids=str)
def test_masks_of_any_shape_go_with_dropout(shape):
    for mask in (torch.ones(shape, dtype=torch.bool), torch.zeros(shape)):
        for impl in (None, "sdpa", "reference"):
            torch.manual_seed(0)
            out = attention(**{**qkv(), "v": torch.ones(2, 6, 2, 8)}, attn_mask=mask, dropout_p=0.5, impl=impl)
            assert 0.5 < out.mean() < 1.5
            assert out.std() > 0.05


@pytest.mark.filterwarnings("ignore:flashmla attention. attn_mask")
@pytest.mark.parametrize("options", [{}, {"return_lse": True}, {"impl": "sdpa"}, {"impl": "reference"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_bias_of_more_precision_than_q_is_not_rounded(dtype, options):
    q, k, v = (torch.randn(1, 64, 2, 64).to(dtype) for _ in range(3))
    bias = torch.randn(64, 64) * 100
    bias[0] = torch.finfo(torch.float32).min  # overflows 16 bits, where it would hide the row
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / 8 + bias.double()
    expected = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v.double())
    out = attention(q, k, v, attn_mask=bias, **options)
    out = out[0] if "return_lse" in options else out
    assert out.dtype == dtype
    assert (out.double() - expected).abs().max() <= 2 * torch.finfo(dtype).eps * expected.abs().max()


AUTOCAST = {
    "no mask": {}, "cpu": {"impl": "cpu"}, "bool": {"attn_mask": torch.rand(40, 40) > 0.3},
    "bias": {"attn_mask": torch.randn(40, 40)}, "bias with gradient": {"attn_mask": torch.randn(40, 40, requires_grad=True)},
    "sinks": {"attn_mask": torch.rand(40, 40) > 0.3, "sinks": torch.randn(2)}, "reference": {"impl": "reference", "is_causal": True},
    "sdpa": {"impl": "sdpa", "is_causal": True},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:flashmla attention. attn_mask")
@pytest.mark.parametrize("backward", ["inside", "outside"])
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", AUTOCAST)
def test_autocast_changes_neither_dtype_nor_precision(kind, to, backward):
    options = AUTOCAST[kind]
    leaves = [torch.randn(1, 40, 2, 64, requires_grad=True) for _ in range(3)]
    if options.get("attn_mask") is not None and options["attn_mask"].requires_grad:
        leaves.append(options["attn_mask"])
    weights = torch.randn(1, 40, 2, 64)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    reference = {**options, "impl": "reference"} | ({"attn_mask": exact[3]} if len(exact) == 4 else {})
    expected = attention(*exact[:3], **reference)
    expected = (expected, *torch.autograd.grad((expected * weights).sum(), exact))
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", to):
        out = attention(*leaves[:3], **options)
        assert out.dtype == torch.float32
        if backward == "inside":
            found = torch.autograd.grad(out, leaves, weights)
    if backward == "outside":
        found = torch.autograd.grad(out, leaves, weights)
    for mine, other in zip((out, *found), expected, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), other, rtol=1e-4, atol=1e-5)


def test_sdpa_whose_backward_autocast_would_round_is_refused():
    mask = torch.randn(5, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(
            RuntimeError, match="autocast to bfloat16 is on and torch's SDPA has no fused kernel for this call"
        ):
            attention(**qkv(attn_mask=mask), impl="sdpa")
        with torch.no_grad():
            assert attention(**qkv(attn_mask=mask), impl="sdpa").dtype == torch.float32
        half = {name: tensor.bfloat16() for name, tensor in qkv().items()}
        assert attention(**half, attn_mask=mask.bfloat16(), impl="sdpa").dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:flashmla attention. ")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["bool", "bias", "causal and dropout", "padding"])
def test_a_key_hidden_by_a_mask_reaches_no_row_whatever_it_holds(kind, bad):
    q, k, v = (torch.randn(2, 6, 2, 8, requires_grad=True) for _ in range(3))
    visible = torch.ones(6, 6).tril().bool()
    options = {
        "bool": {"attn_mask": visible},
        "bias": {"attn_mask": torch.zeros(6, 6).masked_fill(~visible, -math.inf)},
        "causal and dropout": {"is_causal": True, "dropout_p": 1e-9},
        "padding": {"attn_mask": torch.arange(6) < 5},
    }[kind]
    spoilt_k, spoilt_v = k.detach().clone(), v.detach().clone()
    spoilt_k[:, 5], spoilt_v[:, 5] = bad, bad
    spoilt_k.requires_grad_(), spoilt_v.requires_grad_()
    rows = slice(6 if kind == "padding" else 5)
    results = []
    for leaves in ((q, k, v), (q, spoilt_k, spoilt_v)):
        out = attention(*leaves, **options)[:, rows]
        gradients = torch.autograd.grad(out.square().sum(), leaves)
        # Of keys, too, if no row sees the spoilt one; a row that does has weights of NaN for all that it sees.
        results.append([out, *(grad[:, rows] for grad in gradients[: 3 if kind == "padding" else 1])])
    for mine, expected in zip(*results, strict=True):
        assert expected.isfinite().all()
        torch.testing.assert_close(mine, expected)


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


def test_strides_of_tensors_without_elements_mean_nothing():
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
def test_more_heads_or_sequences_than_a_grid_has_columns(count):
    q = torch.randn(1, 2, count, 1)
    torch.testing.assert_close(attention(q, q, q, is_causal=True), attention(q, q, q, is_causal=True, impl="sdpa"))
    rows = torch.randn(count, 1, 2)
    boundaries = torch.arange(count + 1, dtype=torch.int32)
    out = attention(
        rows, rows, rows, cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries, max_seqlen_q=1, max_seqlen_kv=1
    )
    torch.testing.assert_close(out, rows)  # each sees itself


def test_rows_masked_by_sdpa_masks_give_zero_and_no_nan_gradients():
    mask = torch.ones(2, 1, 5, 6, dtype=torch.bool)
    mask[0, 0, 3] = False
    for attn_mask in (mask, torch.zeros(2, 1, 5, 6).masked_fill(~mask, -math.inf)):
        tensors = {name: torch.randn(value.shape, requires_grad=True) for name, value in qkv().items()}
        results = []
        for impl in ("sdpa", "reference"):
            out = attention(**tensors, attn_mask=attn_mask, impl=impl)
            assert (out[0, 3] == 0).all()
            results.append((out, *torch.autograd.grad(out.square().sum(), list(tensors.values()))))
        for mine, expected in zip(*results, strict=True):
            torch.testing.assert_close(mine, expected)


def test_masks_and_dropout_warn_once_and_name_the_implementation(monkeypatch):
    monkeypatch.setattr(notices, "_warned", set())
    with pytest.warns(UserWarning, match="attn_mask is computed by impl='sdpa', exactly but not by the fused kernel"):
        attention(**qkv(attn_mask=x(5, 6)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(**qkv(attn_mask=x(5, 6)))
    with pytest.warns(UserWarning, match="attn_mask is computed by impl='reference'"):
        attention(**qkv(attn_mask=x(5, 6), softcap=1.0))


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
def test_dropout_keeps_the_expectation(impl):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 64, 4, 8), torch.randn(1, 64, 4, 8), torch.ones(1, 64, 4, 8)
    out = attention(q, k, v, dropout_p=0.5, impl=impl)  # each weight is dropped or doubled; V is 1, so the mean stays 1
    assert out.std() > 0.05
    assert abs(out.mean() - 1) < 0.1


def test_choices_are_logged_once_with_the_reason(monkeypatch, caplog):
    monkeypatch.setattr(notices, "LOG_CHOICES", True)
    monkeypatch.setattr(notices, "_logged", set())
    with caplog.at_level(logging.WARNING, logger="flashmla_hf"):
        for _ in range(2):
            attention(**qkv())
        attention(**qkv(impl="reference"))
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "q[2, 5, 4, 8] k[2, 6, 2, 8] head_dim_v=8 float32 -> cpu (first choice on cpu)",
        "q[2, 5, 4, 8] k[2, 6, 2, 8] head_dim_v=8 float32 -> reference (explicit)",
    ]


def test_deterministic_follows_torch(monkeypatch):
    seen = []
    monkeypatch.setattr(direct, "enabled", False)
    monkeypatch.setitem(
        dispatch.IMPLEMENTATIONS,
        "cpu",
        Backend(lambda call: None, lambda call: (seen.append(call.deterministic), None)),
    )
    attention(**qkv())
    attention(**qkv(deterministic=True))
    torch.use_deterministic_algorithms(True)
    try:
        attention(**qkv())
        attention(**qkv(deterministic=False))
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [False, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flash_attn_signatures_are_thin_over_attention(dtype):
    case = Case(batch=2, seqlen_q=20, heads_q=4, heads_kv=2, head_dim_qk=16, has_sinks=True)
    t = case.inputs(dtype)
    out, lse, weights = flash_attn_func(
        t.q, t.k, t.v, 0.0, 0.3, True, window_size=(7, -1), softcap=5.0, return_attn_probs=True, s_aux=t.sinks
    )
    options = {"scale": 0.3, "is_causal": True, "window": (7, -1), "softcap": 5.0, "sinks": t.sinks}
    expected, expected_lse = attention(t.q, t.k, t.v, return_lse=True, **options)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    assert weights is None

    cu_seqlens = cu(0, 20, 40)
    flat = [tensor.reshape(40, *tensor.shape[2:]) for tensor in (t.q, t.k, t.v)]
    varlen = flash_attn_varlen_func(
        *flat, cu_seqlens, cu_seqlens, 20, 20, 0.0, 0.3, True, window_size=(7, -1), softcap=5.0, s_aux=t.sinks
    )
    torch.testing.assert_close(varlen.view(2, 20, 4, 16), expected)


def test_flash_attn_signatures_refuse_what_they_do_not_compute():
    q, k, v = qkv().values()
    with pytest.raises(ValueError, match="alibi_slopes: expected none"):
        flash_attn_func(q, k, v, alibi_slopes=x(4))
    with pytest.raises(ValueError, match="block_table: expected none"):
        flash_attn_varlen_func(q[0], k[0], v[0], cu(0, 5), cu(0, 6), 5, 6, block_table=x(1, 1))


def test_max_seqlen_may_be_a_tensor_as_some_collators_hand_it():
    bound = torch.tensor(5)
    expected = attention(**packed(q=torch.ones(9, 4, 8)))
    assert torch.equal(attention(**packed(q=torch.ones(9, 4, 8), max_seqlen_q=bound, max_seqlen_kv=bound)), expected)


def test_outliers_keep_the_error_rule():
    """Ten-fold queries: the softmax is peaked, and a kernel that skips or reorders rescaling shows it."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        check("cpu", Case(seqlen_q=200, heads_q=2, is_causal=True, magnitude=10.0), dtype)


def test_the_error_rule_itself_can_fail():
    """A wrong result must not pass: halved, zeroed, and one stray element."""
    ref = torch.randn(50, 8, dtype=torch.float64)
    eager = ref.to(torch.bfloat16)
    stray = eager.clone()
    stray[3, 3] += 0.1
    infinite = eager.clone()
    infinite[0, 0] = math.inf
    for wrong in (eager / 2, torch.zeros_like(eager), stray, infinite):
        with pytest.raises(AssertionError):
            assert_close_to_reference("wrong", wrong, eager, ref)


@pytest.mark.parametrize(
    "change", [{"window": (6, 0)}, {"softcap": 1.9}, {"scale": 0.26}], ids=lambda change: next(iter(change))
)
def test_the_check_of_a_whole_call_can_fail(change):
    """The suites decide by numerics.check: a slightly wrong window, softcap or scale must not pass it."""
    case = Case(seqlen_q=70, head_dim_qk=16, window=(5, 0), softcap=2.0, scale=0.25)
    check("cpu", case, torch.bfloat16)
    with pytest.raises(AssertionError):
        check(lambda **arguments: attention(**{**arguments, **change}), case, torch.bfloat16)
