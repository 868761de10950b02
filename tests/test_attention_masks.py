"""``attn_mask`` of every shape, dtype and implementation, dropout and autocast beside them, held to softmax in float64."""

import math

import pytest
import torch
from small_calls import qkv

from flashmla_hf import attention


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


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
def test_dropout_keeps_the_expectation(impl):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 64, 4, 8), torch.randn(1, 64, 4, 8), torch.ones(1, 64, 4, 8)
    out = attention(q, k, v, dropout_p=0.5, impl=impl)  # each weight is dropped or doubled; V is 1, so the mean stays 1
    assert out.std() > 0.05
    assert abs(out.mean() - 1) < 0.1
