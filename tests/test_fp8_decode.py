"""Attention to fp8 caches: the rule of numerics.py on values that the caches hold exactly, appended keys, and refusals."""

import dataclasses
import math
import os
import re
from dataclasses import replace

import decode_cases
import numerics
import pytest
import torch
from cpu_support import DTYPES
from decode_cases import DecodeCase, int32
from torch._subclasses.fake_tensor import FakeTensorMode

from flashmla_hf import libraries
from flashmla_hf.decode import decode_attention
from flashmla_hf.fp8 import cached
from flashmla_hf.fp8.quantization import DTYPE, quantize_tokens

RANDOM_CASES = int(os.environ.get("FLASHMLA_FP8_CASES", "400")) // 2
SEED = int(os.environ.get("FLASHMLA_FUZZ_SEED", "0"))
each_impl = pytest.mark.parametrize("impl", ["cpu", "reference"])


def rounded(x):
    data, scale = quantize_tokens(x)
    return (data.float() * scale[..., None]).to(x.dtype)


def in_fp8(q, k_cache, v_cache, **options):
    """decode_attention to the caches in fp8."""
    (k8, k_descale), (v8, v_descale) = quantize_tokens(k_cache), quantize_tokens(v_cache)
    return decode_attention(q, k8, v8, k_descale=k_descale, v_descale=v_descale, **options)


@pytest.fixture
def exact_values(monkeypatch):
    """Caches whose numbers e4m3 and a power of two hold: then eager in the call's dtype is the yardstick, as without fp8."""
    inputs_of = decode_cases.inputs_of

    def rounded_inputs(*args):
        inputs = inputs_of(*args)
        return replace(
            inputs, **{name: rounded(getattr(inputs, name)) for name in ("k_cache", "v_cache", "clean_k", "clean_v")}
        )

    monkeypatch.setattr(decode_cases, "inputs_of", rounded_inputs)


@each_impl
def test_random_calls_keep_the_error_rule(impl, exact_values):
    before, failures = dataclasses.replace(numerics.looks), []
    for dtype in DTYPES:
        for case, seed in decode_cases.random_cases(impl, dtype, RANDOM_CASES // len(DTYPES), SEED):
            try:
                decode_cases.check(impl, case, dtype, seed, in_fp8)
            except (AssertionError, RuntimeError) as error:
                failures.append(f"{dtype} {seed} {str(error).splitlines()[0]}")
    assert not failures, "\n".join(failures[:12])
    assert (numerics.looks - before).calls == RANDOM_CASES // len(DTYPES) * len(DTYPES)


@pytest.mark.parametrize("page_size", [0, 48])
def test_long_sequences_are_read_in_blocks(exact_values, page_size):
    case = DecodeCase(
        (2 * cached.KEYS_AT_A_TIME + 77, 5, cached.KEYS_AT_A_TIME), starts=(900, 0, 3), seqlen_q=3, page_size=page_size
    )
    for window in (None, (1500, None), (40, None)):
        decode_cases.check("cpu", replace(case, window=window), torch.bfloat16, 0, in_fp8)


@each_impl
@pytest.mark.parametrize(("batch", "seqlen_q", "capacity"), [(0, 3, 5), (2, 0, 5), (0, 0, 5), (2, 3, 0)])
def test_calls_without_sequences_queries_or_keys(impl, batch, seqlen_q, capacity):
    q, k, v = torch.randn(batch, seqlen_q, 4, 8), torch.randn(batch, capacity, 2, 8), torch.randn(batch, capacity, 2, 6)
    out, lse = in_fp8(q, k, v, return_lse=True, impl=impl)
    assert out.shape == (batch, seqlen_q, 4, 6)
    assert lse.shape == (batch, 4, seqlen_q)
    assert not out.any()


def test_the_rule_finds_a_forgotten_scale(exact_values):
    def wrong(q, k_cache, v_cache, **options):
        (k8, k_descale), (v8, v_descale) = quantize_tokens(k_cache), quantize_tokens(v_cache)
        return decode_attention(q, k8, v8, k_descale=k_descale, v_descale=v_descale.roll(1, dims=1), **options)

    with pytest.raises(AssertionError, match=r"error|infinities"):
        decode_cases.check("cpu", DecodeCase((300, 200)), torch.float32, 0, wrong)


@pytest.mark.parametrize("page_size", [0, 16])
def test_appended_keys_are_quantised_with_their_scales(page_size):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 4, 32, generator=generator)
    k, v = (torch.randn(2, 60, 2, 32, generator=generator) * 3 for _ in range(2))
    lengths, table = int32([40, 17], "cpu"), None
    (k8, k_scale), (v8, v_scale) = quantize_tokens(k), quantize_tokens(v)
    expected_k, expected_v = k8.clone(), v8.clone()
    new = [torch.randn(2, 3, 2, 32, generator=generator) for _ in range(2)]
    caches = [torch.nn.functional.pad(x.float(), (0, 0, 0, 0, 0, 4)).to(DTYPE) for x in (k8, v8)]
    scales = [torch.nn.functional.pad(x, (0, 0, 0, 4)) for x in (k_scale, v_scale)]
    if page_size:
        table = torch.arange(8, dtype=torch.int32).flip(0).reshape(2, 4)
        order = table.flatten().long().argsort()
        caches, scales = ([x.reshape(8, 16, *x.shape[2:])[order] for x in xs] for xs in (caches, scales))
    out = decode_attention(
        q, *caches, cache_seqlens=lengths, block_table=table, k=new[0], v=new[1], k_descale=scales[0], v_descale=scales[1]
    )  # fmt: skip
    for b, length in enumerate(lengths.tolist()):
        keys, values = (
            torch.cat([rounded(x)[b : b + 1, :length], rounded(n)[b : b + 1]], 1)
            for x, n in zip((k, v), new, strict=True)
        )
        expected = decode_attention(q[b : b + 1], keys, values)
        torch.testing.assert_close(out[b : b + 1], expected, rtol=1e-5, atol=1e-5)
    rows = [x if table is None else x[table.long()].flatten(1, 2) for x in (*caches, *scales)]
    assert torch.equal(rows[0][0, :40].float(), expected_k[0, :40].float())
    assert torch.equal(rows[1][1, :17].float(), expected_v[1, :17].float())
    assert torch.equal(rows[0][1, 17:20].float() * rows[2][1, 17:20, :, None], rounded(new[0])[1])
    assert not torch.equal(rows[2][0, 40:43], k_scale[0, 40:43])


def test_half_the_bytes():
    k = torch.randn(1, 1000, 2, 128, dtype=torch.bfloat16)
    data, scale = quantize_tokens(k)
    assert data.nbytes + scale.nbytes == (0.5 + 4 / 256) * k.nbytes


def call(**changes):
    cache = torch.zeros(2, 64, 2, 32).to(DTYPE)
    if "k" in changes:
        changes = {"cache_seqlens": int32([3, 4], "cpu"), **changes}
    arguments = {
        "q": torch.randn(2, 1, 4, 32), "k_cache": cache, "v_cache": cache.clone(), "k_descale": torch.ones(2, 64, 2),
        "v_descale": torch.ones(2, 64, 2),
    }  # fmt: skip
    return decode_attention(**arguments | changes)


REFUSED = {
    "no k_descale": ({"k_descale": None}, ValueError, "k_descale: expected fp32 [2, 64, 2] (a factor for each row and head), since"),
    "no descales": ({"k_descale": None, "v_descale": None}, ValueError, "k_descale: expected fp32 [2, 64, 2]"),
    "a descale's shape": ({"v_descale": torch.ones(2, 2)}, ValueError, "v_descale: expected shape [2, 64, 2]"),
    "a descale's dtype": ({"v_descale": torch.ones(2, 64, 2).half()}, TypeError, "v_descale: expected dtype float32, got float16"),
    "one cache in fp8": ({"v_cache": torch.zeros(2, 64, 2, 32)}, TypeError, "v_cache: expected dtype float8_e4m3fn (that of the other"),
    "descales without fp8": (
        {"k_cache": torch.zeros(2, 64, 2, 32), "v_cache": torch.zeros(2, 64, 2, 32)}, ValueError,
        "k_descale: expected none, since the caches are not float8_e4m3fn",
    ),
    "an unknown impl": ({"impl": "fast"}, ValueError, "impl: expected one of"),
    "a gradient": ({"q": torch.randn(2, 1, 4, 32, requires_grad=True)}, RuntimeError, "q: expected a tensor that requires no gradient"),
    "new keys in fp8": (
        {"k": torch.zeros(2, 1, 2, 32).to(DTYPE), "v": torch.zeros(2, 1, 2, 32).to(DTYPE)},
        TypeError, "k: expected dtype float32 (that of q, they are quantised here), got float8_e4m3fn",
    ),
    "a gradient of a descale": ({"v_descale": torch.ones(2, 64, 2, requires_grad=True)}, RuntimeError, "v_descale: expected a tensor that"),
    "new keys for one factor": (
        {"k": torch.ones(2, 1, 2, 32), "v": torch.ones(2, 1, 2, 32), "k_descale": torch.ones(1).expand(2, 64, 2)},
        ValueError, "k_descale: expected rows of their own, since new ones are written there",
    ),
    "new keys and values for the same factors": (
        {"k": torch.ones(2, 1, 2, 32), "v": torch.ones(2, 1, 2, 32)} | dict.fromkeys(("k_descale", "v_descale"), torch.ones(2, 64, 2)),
        ValueError, "v_descale: expected other memory than k_descale's",
    ),
    "fp8 queries": ({"q": torch.ones(2, 1, 4, 32).to(DTYPE)}, TypeError, "q: expected a floating dtype of 16 bits or more, got"),
    "a length beyond": ({"cache_seqlens": int32([3, 65], "cpu")}, ValueError, "cache_seqlens: expected numbers from 0 to 64"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_covered_raises_in_words(name):
    changes, kind, message = REFUSED[name]
    with pytest.raises(kind, match=re.escape(message)):
        call(**changes)


# ---- What is refused on a Hopper GPU ---------------------------------------------------------------------------------


class _Hopper:
    major, minor, name = 9, 0, "a Hopper GPU"


class _Other:
    major, minor, name = 8, 0, "another GPU"


def _tensors(dtype=torch.bfloat16, dim=64, dim_v=None, sliced=False):
    """q, k_cache, v_cache, k_descale, v_descale of a fake GPU."""
    q = torch.empty(2, 1, 4, dim, dtype=dtype, device="cuda")
    k, v = (
        torch.empty_strided((2, 32, 2, width), (64 * row, 2 * row, row, 1), dtype=DTYPE, device="cuda")
        for width, row in ((dim, dim + 8 * sliced), (dim_v or dim, (dim_v or dim) + 8 * sliced))
    )
    return q, k, v, *(torch.empty(2, 32, 2, device="cuda") for _ in range(2))


ON_A_GPU = {
    "another GPU": (_Other, {}, "another GPU is not a Hopper GPU (compute capability 9.0). Keep the cache in 16 bits"),
    "float32": (_Hopper, {"dtype": torch.float32}, "dtype float32: expected float16 or bfloat16. Keep the cache in 16 bits"),
    "too wide": (_Hopper, {"dim": 272}, "q and k: head_dim 272: expected a multiple of 16 up to 256. Keep"),
    "too wide values": (_Hopper, {"dim_v": 320}, "v: head_dim 320: expected a multiple of 16 up to 256. Keep"),
    "no multiple of 16": (_Hopper, {"dim": 72}, "q and k: head_dim 72: expected a multiple of 16 up to 256. Keep"),
    "rows of 72 bytes": (_Hopper, {"sliced": True}, "k_cache: expected an address and strides in multiples of 16 bytes. Keep"),
}  # fmt: skip


@pytest.mark.parametrize("name", ON_A_GPU)
def test_what_the_kernel_does_not_cover_raises_with_the_way_out(name, monkeypatch):
    """Fake tensors: no GPU is needed to be refused."""
    properties, tensors, message = ON_A_GPU[name]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(libraries, "sm90_limits", libraries.Sm90Limits(8, 256, 256, (576, 512), 128, 16, 256))
    monkeypatch.delitem(libraries.unavailable, "sm90", raising=False)
    with FakeTensorMode():
        q, k, v, k_descale, v_descale = _tensors(**tensors)
        with pytest.raises(
            RuntimeError, match=re.escape(f"impl='sm90' cannot read the float8_e4m3fn k_cache: {message}")
        ):
            decode_attention(q, k, v, k_descale=k_descale, v_descale=v_descale)


def test_what_the_kernel_covers_is_its(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: _Hopper)
    monkeypatch.setattr(libraries, "sm90_limits", libraries.Sm90Limits(8, 256, 256, (576, 512), 128, 16, 256))
    monkeypatch.delitem(libraries.unavailable, "sm90", raising=False)
    for tensors in ({}, {"dtype": torch.float16, "dim": 256, "dim_v": 16}):
        with FakeTensorMode():
            q, k, v, k_descale, v_descale = _tensors(**tensors)
            out, lse = decode_attention(q, k, v, k_descale=k_descale, v_descale=v_descale, return_lse=True)
        assert (out.dtype, [*out.shape], [*lse.shape]) == (q.dtype, [2, 1, 4, v.shape[-1]], [2, 4, 1])


def test_without_the_library_a_gpu_says_why(monkeypatch):
    monkeypatch.setitem(libraries.unavailable, "sm90", "libflashmla_sm90.so was not built")
    with FakeTensorMode():
        q, k, v, k_descale, v_descale = _tensors()
        with pytest.raises(RuntimeError, match=r"k_cache: libflashmla_sm90.so was not built. Keep the cache in 16"):
            decode_attention(q, k, v, k_descale=k_descale, v_descale=v_descale)


@each_impl
def test_nan_in_a_cache_is_seen_where_it_is_visible(impl):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, n, h, 16, generator=generator) for n, h in ((4, 4), (50, 2), (50, 2)))
    k[0, 48, 1] = math.nan
    out = in_fp8(q, k, v, impl=impl)
    assert torch.equal(out.isnan().any(-1)[0], torch.tensor([[False] * 4] * 2 + [[False, False, True, True]] * 2))


# ---- Lengths whose values cannot be read -----------------------------------------------------------------------------


def _to_caches(q, k8, v8, k_descale, v_descale, lengths, starts=None):
    return decode_attention(
        q, k8, v8, k_descale=k_descale, v_descale=v_descale, cache_seqlens=lengths, kv_start=starts, window=(9, None),
        return_lse=True,
    )  # fmt: skip


def _caches(capacity, device="cpu"):
    generator = torch.Generator().manual_seed(capacity)
    q = torch.randn(2, 1, 4, 16, generator=generator)
    k8, v8 = (torch.randn(2, capacity, 2, 16, generator=generator).to(DTYPE) for _ in "kv")
    descales = (torch.rand(2, capacity, 2, generator=generator) + 0.5 for _ in "kv")
    lengths, starts = int32([capacity, 3], device), int32([0, 2], device)
    return (*(x.to(device) for x in (q, k8, v8, *descales)), lengths, starts)


def test_torch_compile_has_no_graph_breaks_and_the_same_results():
    torch._dynamo.reset()
    compiled = torch.compile(_to_caches, fullgraph=True, backend="aot_eager")
    for capacity in (16, 40, 1100):
        for got, expected in zip(compiled(*_caches(capacity)), _to_caches(*_caches(capacity)), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_calls_without_values_have_shapes():
    out, lse = _to_caches(*_caches(40, "meta"))
    assert out.shape == (2, 1, 4, 16)
    assert lse.shape == (2, 4, 1)
    with torch._subclasses.FakeTensorMode() as mode:
        out, lse = _to_caches(*(mode.from_tensor(x) for x in _caches(40)))
    assert out.shape == (2, 1, 4, 16)
    assert lse.shape == (2, 4, 1)


def test_lengths_may_be_vmapped():
    *tensors, _, _ = _caches(40)
    lengths = int32([[40, 3], [1, 0], [7, 39]], "cpu")
    outs, lses = torch.func.vmap(lambda x: _to_caches(*tensors, x))(lengths)
    for out, lse, x in zip(outs, lses, lengths, strict=True):
        torch.testing.assert_close((out, lse), _to_caches(*tensors, x), rtol=1e-5, atol=1e-6)


def test_queries_in_float64_keep_their_precision():
    q, k8, v8, k_descale, v_descale, lengths, starts = _caches(40)
    tensors = (q.double(), k8, v8, k_descale, v_descale)
    got, _ = _to_caches(*tensors, lengths, starts)
    expected = decode_attention(
        *tensors[:3], k_descale=k_descale, v_descale=v_descale, cache_seqlens=lengths, kv_start=starts, window=(9, None),
        impl="reference",
    )  # fmt: skip
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
