"""Calls in fp8: tensors that are fp8 already, and what is refused, in words and by name."""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flashmla_hf import attention, decode_attention, flash_attn_func, flash_attn_varlen_func, libraries
from flashmla_hf.flash_attn_api import flash_attn_with_kvcache

E4M3 = torch.float8_e4m3fn


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fp8_tensors(batch=2, seqlen=150, heads_q=4, heads_kv=2, dim=32):
    q, k, v = normal(batch, seqlen, heads_q, dim), *(normal(batch, seqlen, heads_kv, dim, seed=n) for n in (1, 2))
    descales = [torch.rand(batch, heads_kv, generator=torch.Generator().manual_seed(n)) + 0.5 for n in range(3)]
    return [x.to(E4M3) for x in (q, k, v)], dict(zip(("q_descale", "k_descale", "v_descale"), descales, strict=True))


def scaled(x, descale):
    """[batch, seqlen, heads, dim] times the factor of (sequence, kv head)."""
    return x.float() * descale.repeat_interleave(x.shape[2] // descale.shape[1], dim=1)[:, None, :, None]


@pytest.mark.parametrize("impl", ["cpu", "reference", None])
def test_fp8_tensors_are_what_they_are_times_their_descales(impl):
    (q, k, v), descales = fp8_tensors()
    out, lse = attention(q, k, v, **descales, is_causal=True, return_lse=True, impl=impl)
    assert out.dtype == torch.bfloat16
    values = [scaled(x, d) for x, d in zip((q, k, v), descales.values(), strict=True)]
    expected, expected_lse = attention(*values, is_causal=True, return_lse=True)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
    error = (out.float() - expected).abs().max() / expected.abs().max()
    assert error < (0.01 if impl != "reference" else 0.06)
    with_precision = attention(q, k, v, **descales, is_causal=True, precision="fp8", impl=impl)
    assert torch.equal(with_precision, out)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_packed_fp8_tensors_have_a_descale_for_each_sequence(impl):
    (q, k, v), descales = fp8_tensors()
    bounds = torch.tensor([0, 150, 300], dtype=torch.int32)
    packed = attention(
        *(x.flatten(0, 1) for x in (q, k, v)), **descales, cu_seqlens_q=bounds, cu_seqlens_kv=bounds, impl=impl
    )  # fmt: skip
    assert torch.equal(packed, attention(q, k, v, **descales, impl=impl).flatten(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_fp8_tensors_take_sinks(impl, dtype):
    (q, k, v), descales = fp8_tensors()
    sinks = normal(4, dtype=dtype)
    _, lse = attention(q, k, v, **descales, sinks=sinks, return_lse=True, impl=impl)
    values = [scaled(x, d) for x, d in zip((q, k, v), descales.values(), strict=True)]
    _, expected = attention(*values, sinks=sinks.float(), return_lse=True)
    torch.testing.assert_close(lse, expected, rtol=1e-5, atol=1e-5)


def call(**changes):
    tensors = {"q": normal(1, 20, 4, 16), "k": normal(1, 20, 2, 16), "v": normal(1, 20, 2, 16), "precision": "fp8"}
    return attention(**tensors | changes)


def fp8_call(**changes):
    (q, k, v), descales = fp8_tensors()
    return attention(**{"q": q, "k": k, "v": v, **descales} | changes)


REFUSED = {
    "precision": (lambda: call(precision="fp16"), ValueError, "precision: expected None (that of the tensors) or 'fp8', got 'fp16'"),
    "a mask": (lambda: call(attn_mask=torch.ones(20, 20, dtype=torch.bool)), RuntimeError, "attn_mask is given: expected none in fp8"),
    "a mask, reference": (
        lambda: call(attn_mask=torch.ones(20, 20, dtype=torch.bool), impl="reference"), RuntimeError, "attn_mask is given",
    ),
    "dropout": (lambda: call(dropout_p=0.1), RuntimeError, "dropout_p=0.1: expected none in fp8; precision=None"),
    "float64": (
        lambda: call(q=normal(1, 20, 4, 16).double(), k=normal(1, 20, 2, 16).double(), v=normal(1, 20, 2, 16).double()),
        RuntimeError, "dtype float64: expected float32, float16, bfloat16 or float8_e4m3fn",
    ),
    "sm90": (lambda: call(impl="sm90"), RuntimeError, "no implementation computes this call in fp8. sm90: "),
    "flex": (lambda: call(impl="flex"), RuntimeError, "impl='flex' cannot compute this call in fp8: pass precision=None"),
    "an unknown impl": (
        lambda: call(impl="fast"), ValueError, "impl: expected one of ['sm90', 'cpu', 'reference'] or None, got 'fast'",
    ),
    "vmap": (
        lambda: torch.vmap(lambda x: attention(x, x, x, precision='fp8'))(normal(3, 1, 20, 4, 16)), RuntimeError, "a transform of torch.func is active",
    ),
    "descale without fp8": (
        lambda: call(k_descale=torch.ones(1, 2)), ValueError, "k_descale: expected none, since q, k and v are not float8_e4m3fn",
    ),
    "descale alone": (
        lambda: call(precision=None, v_descale=torch.ones(1, 2)), ValueError, "v_descale: expected none",
    ),
    "fp8 without a descale": (
        lambda: fp8_call(k_descale=None), ValueError, "k_descale: expected fp32 [2, 2] (batch, heads_kv), since q is float8_e4m3fn",
    ),
    "a descale's shape": (lambda: fp8_call(q_descale=torch.ones(2, 4)), ValueError, "q_descale: expected shape [2, 2]"),
    "a descale's dtype": (
        lambda: fp8_call(q_descale=torch.ones(2, 2).half()), TypeError, "q_descale: expected dtype float32, got float16",
    ),
    "a descale's type": (lambda: fp8_call(q_descale=1.0), TypeError, "q_descale: expected a torch.Tensor, got float"),
    "one tensor in fp8": (
        lambda: call(q=normal(1, 20, 4, 16).to(E4M3)), TypeError, "k: expected dtype float8_e4m3fn (that of q), got float32",
    ),
    "a gradient of fp8": (
        lambda: fp8_call(v=fp8_tensors()[0][2].requires_grad_()), TypeError, "q, k and v: expected a tensor that requires no gradient",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_covered_raises_in_words(name):
    run, kind, message = REFUSED[name]
    with pytest.raises(kind, match=re.escape(message)):
        run()


def test_a_gpu_without_the_kernel_of_fp8_caches_says_so(monkeypatch):
    """Fake tensors: no GPU is needed to be refused."""
    monkeypatch.setitem(libraries.unavailable, "sm90", "it was not built")
    with FakeTensorMode():
        cache, descale = torch.empty(1, 512, 2, 64, dtype=E4M3, device="cuda"), torch.empty(1, 512, 2, device="cuda")
        query = torch.empty(1, 1, 4, 64, dtype=torch.bfloat16, device="cuda")
        with pytest.raises(
            RuntimeError, match=r"cannot read the float8_e4m3fn k_cache: it was not built\. Keep the cache in 16 bits"
        ):
            decode_attention(query, cache, cache, k_descale=descale, v_descale=descale)


def test_meta_tensors_have_the_shapes():
    q, k = (
        torch.empty(2, 150, 4, 32, device="meta", dtype=torch.bfloat16),
        torch.empty(2, 150, 2, 32, device="meta", dtype=torch.bfloat16),
    )
    out, lse = attention(q, k, k, precision="fp8", return_lse=True)
    assert (out.shape, out.dtype, lse.shape) == (q.shape, torch.bfloat16, (2, 4, 150))


def test_functions_without_factors_name_those_that_have_them():
    """flash-attn's arguments have none, so an error that asks for one would be no way out."""
    (q, k, v), _ = fp8_tensors()
    wide, bounds = q.float(), torch.tensor([0, 150, 300], dtype=torch.int32)
    for name, function, way_out in (
        ("q", lambda: flash_attn_func(q, k, v), "attention, with q_descale, k_descale and v_descale"),
        ("k", lambda: flash_attn_func(wide, k, v), "attention, with q_descale, k_descale and v_descale"),
        (
            "q", lambda: flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), bounds, bounds, 150, 150),
            "attention, with q_descale, k_descale and v_descale",
        ),
        ("k_cache", lambda: flash_attn_with_kvcache(wide, k, v), "decode_attention with caches in fp8, k_descale and v_descale"),
    ):  # fmt: skip
        message = rf"{name}: expected dtype float32, float16 or bfloat16 \(for fp8 call flashmla_hf\.{way_out}\), got float8_e4m3fn"
        with pytest.raises(TypeError, match=message):
            function()
