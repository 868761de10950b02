"""New keys and values of a call on caches, and flash_attn_with_kvcache, which flash-attn 2 gives its signature."""

import inspect
import itertools
import math
import re
from dataclasses import replace
from random import Random

import decode_cases
import gpu_support
import numpy as np
import pytest
import torch
import torch._dynamo.testing
from decode_cases import DecodeCase, device_of, dtypes_of, each_impl, inputs_of, int32
from operator_names import OperatorNames
from torch._dynamo.testing import CompileCounter

import flashmla_hf
from flashmla_hf import decode, flash_attn_with_kvcache
from flashmla_hf.decode import decode_attention

LENGTHS = (20, 0, 7, 33)


def appended(impl, page_size, layout="contiguous", seqlen_new=3):
    """Inputs whose caches hold all but the last ``seqlen_new`` keys, these keys and values, and the result with all."""
    lengths = tuple(n + seqlen_new for n in LENGTHS)
    case = DecodeCase(lengths=lengths, seqlen_q=2, capacity=48, page_size=page_size, layout=layout)
    inputs = inputs_of(case, dtypes_of(impl)[-1], device_of(impl))
    expected = decode_attention(**inputs.tensors, impl=impl)
    news = [
        torch.stack([x[b, n : n + seqlen_new] for b, n in enumerate(LENGTHS)]) for x in (inputs.clean_k, inputs.clean_v)
    ]
    tensors = {**inputs.tensors, "cache_seqlens": int32(LENGTHS, device_of(impl))}
    for name in ("k_cache", "v_cache"):
        tensors[name] = tensors[name].clone()
        for b, n in enumerate(LENGTHS):
            for j in range(n, n + seqlen_new):
                page, row = place(tensors, page_size, b, j)
                tensors[name][page, row] = math.nan
    return inputs, tensors, news, expected


def place(tensors, page_size, b, j):
    return (b, j) if not page_size else (tensors["block_table"][b, j // page_size].item(), j % page_size)


@each_impl
@pytest.mark.parametrize("layout", decode_cases.LAYOUTS)
@pytest.mark.parametrize("page_size", [0, 16])
def test_new_keys_are_written_and_seen(impl, page_size, layout):
    inputs, tensors, (k, v), expected = appended(impl, page_size, layout)
    before = tensors["cache_seqlens"].clone()
    got = decode_attention(**tensors, k=k, v=v, impl=impl)
    assert torch.equal(got, expected)
    assert torch.equal(tensors["cache_seqlens"], before)
    for name in ("k_cache", "v_cache"):
        torch.testing.assert_close(tensors[name], inputs.tensors[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("source", "target"), [(2, 3), (4, 3), (2, 2)])
def test_new_keys_may_be_rows_of_the_cache(source, target):
    """They are those from before the append, also where they lie on the rows that it writes."""
    caches = [torch.randn(1, 16, 2, 8) for _ in range(2)]
    expected = [cache.clone() for cache in caches]
    for copy, cache in zip(expected, caches, strict=True):
        copy[:, target : target + 3] = cache[:, source : source + 3]
    k, v = (cache[:, source : source + 3] for cache in caches)
    decode_attention(torch.randn(1, 1, 2, 8), *caches, k=k, v=v, cache_seqlens=int32([target], "cpu"))
    for cache, copy in zip(caches, expected, strict=True):
        assert torch.equal(cache, copy)


def test_new_values_may_be_keys_of_the_cache_that_the_append_overwrites():
    k_cache, v_cache = torch.randn(1, 16, 2, 8), torch.randn(1, 16, 2, 8)
    there = k_cache[:, 3:4].clone()
    k, v = torch.randn(1, 1, 2, 8), k_cache[:, 3:4]
    decode_attention(torch.randn(1, 1, 2, 8), k_cache, v_cache, k=k, v=v, cache_seqlens=int32([3], "cpu"))
    assert torch.equal(v_cache[:, 3:4], there)


@each_impl
def test_no_new_keys_change_nothing(impl):
    inputs = inputs_of(DecodeCase(lengths=(9, 30), page_size=16), dtypes_of(impl)[-1], device_of(impl))
    k, v = (x[:, :0] for x in (inputs.clean_k, inputs.clean_v))
    before = inputs.k_cache.clone()
    assert torch.equal(
        decode_attention(**inputs.tensors, k=k, v=v, impl=impl), decode_attention(**inputs.tensors, impl=impl)
    )
    torch.testing.assert_close(inputs.k_cache, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("page_size", [0, 16])
def test_on_a_cpu_new_keys_that_do_not_fit_raise_and_nothing_is_written(impl, page_size):
    _, tensors, (k, v), _ = appended(impl, page_size)
    before = tensors["k_cache"].clone()
    for lengths, got in (([20, 46, 7, 33], "46 for sequence 1"), ([20, 0, -1, 33], "-1 for sequence 2")):
        changed = {**tensors, "cache_seqlens": int32(lengths, "cpu")}
        with pytest.raises(ValueError, match=f"cache_seqlens: expected numbers from 0 to 45 .*, got {got}"):
            decode_attention(**changed, k=k, v=v, impl=impl)
    if page_size:
        tensors["block_table"][3, 2] = tensors["k_cache"].shape[0]
        with pytest.raises(ValueError, match=f"block_table: expected pages from 0 to 14 .*, got {before.shape[0]}"):
            decode_attention(**tensors, k=k, v=v, impl=impl)
    torch.testing.assert_close(tensors["k_cache"], before, rtol=0, atol=0, equal_nan=True)


# What nobody may check (a GPU's values, values while something traces) is masked instead.


def unchecked_append(tensors, k, v, page_size, lengths, monkeypatch):
    """The caches after an append whose values cannot be read, and what they should be."""
    monkeypatch.setattr(decode, "values_are_readable", lambda x: False)
    expected = [tensors["k_cache"].clone(), tensors["v_cache"].clone()]
    table, capacity, num_pages = tensors["block_table"], 48, tensors["k_cache"].shape[0]
    for b, n in enumerate(lengths):
        for i, j in enumerate(range(n, n + k.shape[1])):
            page, row = (
                (b, j) if not page_size else (table[b, min(max(j, 0), capacity - 1) // page_size].item(), j % page_size)
            )
            if 0 <= j < capacity and 0 <= page < num_pages:
                expected[0][page, row], expected[1][page, row] = k[b, i], v[b, i]
    call = decode.validate_decode(
        tensors["q"], tensors["k_cache"], tensors["v_cache"], int32(lengths, k.device), table, None, None, True, None, 0.0, None,
        0, None,
    )  # fmt: skip
    lengths_after = call.cache_seqlens + k.shape[1]
    for append in [decode.append] if k.device.type == "cpu" else [decode.append, decode._append_by_kernel]:
        caches = call.k.clone(), call.v.clone()
        assert torch.equal(append(replace(call, k=caches[0], v=caches[1]), k, v), lengths_after)
        for got, want in zip(caches, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


OVERFLOWS = {
    "all fit": LENGTHS,
    "one does not": (20, 0, 48, 33),
    "part of one does not": (20, 46, 47, 33),
    "the first do not": (60, 50, 3, 45),
    "none fits": (48, 60, 10**6, 2**31 - 1),
    "before the beginning": (-2, 0, -3, -(2**31)),
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[gpu_support.needs_sm90, gpu_support.on_gpu])])
@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("name", OVERFLOWS)
def test_values_that_cannot_be_read_write_nothing_outside_the_cache(device, page_size, name, monkeypatch):
    _, tensors, (k, v), _ = appended("sm90" if device == "cuda" else "cpu", page_size)
    unchecked_append(tensors, k, v, page_size, OVERFLOWS[name], monkeypatch)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[gpu_support.needs_sm90, gpu_support.on_gpu])])
@pytest.mark.parametrize("sequences", [(0,), (3,), (0, 1, 2, 3)])
def test_pages_outside_the_cache_are_not_written(device, sequences, monkeypatch):
    _, tensors, (k, v), _ = appended("sm90" if device == "cuda" else "cpu", 16)
    for b, page in zip(sequences, (-1, 2**31 - 1, -(2**31), tensors["k_cache"].shape[0]), strict=False):
        tensors["block_table"][b] = page
    unchecked_append(tensors, k, v, 16, LENGTHS, monkeypatch)


@gpu_support.needs_sm90
@gpu_support.on_gpu
@pytest.mark.parametrize("page_size", [0, 16])
def test_appending_waits_for_nothing(page_size):
    _, tensors, (k, v), expected = appended("sm90", page_size)
    q = tensors["q"].clone()
    got = gpu_support.run_behind_other_work(
        lambda: tensors["q"].copy_(q), lambda: decode_attention(**tensors, k=k, v=v, impl="sm90")
    )
    assert torch.equal(got, expected)


@gpu_support.needs_sm90
@gpu_support.on_gpu
@pytest.mark.parametrize("page_size", [0, 16])
def test_appending_is_one_launch(page_size):
    _, tensors, (k, v), expected = appended("sm90", page_size)
    with OperatorNames() as operators:
        got = decode_attention(**tensors, k=k, v=v)
    assert torch.equal(got, expected)
    assert operators.names == ["flashmla::append_to_cache", "flashmla::flash_attn_decode"]


@gpu_support.needs_sm90
@gpu_support.on_gpu
@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("is_fp8", [False, True])
def test_the_kernel_that_appends_writes_what_torch_writes(seed, is_fp8):
    """Also into caches and from rows of strides and addresses that are multiples of an element's bytes alone. Fp8: bit for bit,
    of outliers, zeros, numbers that are denormal or not finite."""
    random = Random(seed)
    batch, new, heads = random.randint(1, 9), random.choice([1, 1, 2, 5, 300]), random.randint(1, 9)
    dim_k, dim_v = random.choice([(64, 64), (128, 128), (192, 128), (256, 8), (72, 40)])
    page_size, pages = random.choice([(0, batch), (16, 200), (48, 60), (256, 19)])
    dtype = random.choice([torch.float16, torch.bfloat16])

    def tensor(rows, dim):
        slack = random.choice([0, 0, 1, 8])
        is_heads_first = random.random() < 0.5
        shape = (rows[0], heads, rows[1]) if is_heads_first else (*rows, heads)
        x = torch.randn(*shape, dim + slack, device="cuda").to(dtype)[..., slack:]
        return x.transpose(1, 2) if is_heads_first else x

    rows = (pages, page_size or 700)
    k_cache, v_cache = tensor(rows, dim_k), tensor(rows, dim_v)
    k, v = tensor((batch, new), dim_k), tensor((batch, new), dim_v)
    descales = [None, None]
    if is_fp8:
        k_cache, v_cache = (x.to(torch.float8_e4m3fn) for x in (k_cache, v_cache))
        wide = torch.rand(*rows, heads, 5, device="cuda")
        descales = [wide[..., 1], wide.transpose(1, 2).contiguous().transpose(1, 2)[..., 2]]
        for x in (k, v):
            odd = torch.tensor([0.0, math.nan, math.inf, -math.inf, 3e-39, -6e-8, 6e4, 448.0, 1e30], device="cuda")
            where = torch.rand_like(x, dtype=torch.float32) < random.choice([0.0, 0.02, 0.9])
            x.copy_(torch.where(where, odd.to(dtype)[torch.randint(9, x.shape, device="cuda")], x))
            x.mul_(10.0 ** random.choice([0, 0, -4, -38, 3]))
    table = None
    if page_size:
        each = pages // batch
        table = torch.randperm(pages)[: batch * each].view(batch, each).int().cuda()
        table[random.randrange(batch), random.randrange(each)] = random.choice([-1, pages, 2**31 - 1])
    capacity = 700 if table is None else table.shape[1] * page_size
    lengths = torch.tensor([random.randint(-2, capacity) for _ in range(batch)], dtype=torch.int32, device="cuda")
    call = decode.validate_decode(
        tensor((batch, 1), dim_k),
        k_cache,
        v_cache,
        lengths,
        table,
        None,
        None,
        True,
        None,
        0.0,
        None,
        0,
        None,
        False,
        *descales,
    )
    names = ("k", "v", *(("k_descale", "v_descale") if is_fp8 else ()))
    expected = replace(call, **{name: getattr(call, name).clone() for name in names})
    assert torch.equal(decode.append(expected, k, v), decode._append_by_kernel(call, k, v))
    for name in names:
        written, wanted = getattr(call, name), getattr(expected, name)
        if written.dtype == torch.float8_e4m3fn:  # NaN may have either sign
            written, wanted = (torch.where(x.float().isnan(), math.nan, x.float()) for x in (written, wanted))
        torch.testing.assert_close(written, wanted, rtol=0, atol=0, equal_nan=True, msg=name)


@gpu_support.needs_sm90
@gpu_support.on_gpu
def test_the_kernel_that_appends_refuses_what_it_would_misread():
    cache, new = torch.zeros(2, 16, 1, 64, device="cuda").half(), torch.zeros(2, 1, 1, 64, device="cuda").half()
    lengths = torch.zeros(2, dtype=torch.int32, device="cuda")
    good = {
        "k_cache": cache,
        "v_cache": cache.clone(),
        "k": new,
        "v": new,
        "cache_seqlens": lengths,
        "block_table": None,
    }
    for name, value, expected in (
        ("k_cache", cache.float(), "dtype float16, bfloat16 or float8_e4m3fn"),
        ("k_cache", cache.cpu(), "a tensor on a Hopper GPU"),
        ("k", new.bfloat16(), "dtype float16"),
        ("k", new.expand(2, 1, 2, 64), r"shape \[2, 1, 1, 64\]"),
        ("v", None, "a tensor if v_cache is one"),
        ("v_cache", cache[:, :8], r"shape \[2, 16, 1, 64\]"),
        ("cache_seqlens", lengths.long(), "dtype int32"),
        ("cache_seqlens", lengths[:1], r"shape \[2\]"),
        ("block_table", lengths, "pages of a sequence"),
    ):
        with pytest.raises(RuntimeError, match=f"^append_to_cache: {name}: expected .*{expected}"):
            torch.ops.flashmla.append_to_cache(*{**good, name: value}.values())
    assert torch.ops.flashmla.append_to_cache(*{**good, "k": new[:, :0], "v": new[:, :0]}.values()).tolist() == [0, 0]
    factors = torch.ones(2, 16, 1, device="cuda")
    in_fp8 = {name: good[name].to(torch.float8_e4m3fn) for name in ("k_cache", "v_cache")}
    fp8 = good | in_fp8 | {"k_descale": factors, "v_descale": factors.clone()}
    for name, value, expected in (
        ("k_descale", None, "a tensor, since k_cache is float8_e4m3fn"),
        ("k_descale", factors[:1], r"shape \[2, 16, 1\]"),
        ("v_descale", factors.double(), "dtype float32"),
        ("v_cache", cache, "dtype float8_e4m3fn"),
        ("k", new.float(), "dtype float16 or bfloat16"),
        ("v", new.bfloat16(), "dtype float16"),
    ):
        with pytest.raises(RuntimeError, match=f"^append_to_cache: {name}: expected .*{expected}"):
            torch.ops.flashmla.append_to_cache(*{**fp8, name: value}.values())
    with pytest.raises(RuntimeError, match=r"^append_to_cache: k_descale: expected None"):
        torch.ops.flashmla.append_to_cache(*{**good, "k_descale": factors}.values())


@pytest.mark.parametrize("page_size", [0, 16])
def test_torch_compile_has_no_graph_breaks_and_the_same_results(page_size):
    _, tensors, (k, v), expected = appended("cpu", page_size)
    copies = {name: x if x is None else x.clone() for name, x in tensors.items()}
    compiled = torch.compile(decode_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**tensors, k=k, v=v), expected)
    decode_attention(**copies, k=k, v=v)
    for name in ("k_cache", "v_cache"):
        torch.testing.assert_close(tensors[name], copies[name], rtol=0, atol=0, equal_nan=True)
    tensors["cache_seqlens"] = int32([20, 46, 7, 33], "cpu")
    with pytest.raises(RuntimeError, match=r"cache_seqlens: expected numbers from 0 to 48 .*, got 49 for sequence 1"):
        compiled(**tensors, k=k, v=v)


def test_torch_compile_with_dynamic_shapes_compiles_once():
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(decode_attention, fullgraph=True, dynamic=True, backend=counter)
    for capacity, batch in ((48, 5), (100, 3), (70, 7)):
        inputs = inputs_of(DecodeCase(lengths=(9,) * batch, capacity=capacity), torch.float32, "cpu")
        assert torch.equal(compiled(**inputs.tensors), decode_attention(**inputs.tensors))
    assert counter.frame_count == 1


# ---- flash_attn_with_kvcache -----------------------------------------------------------------------------------------

# flash-attn 2.8's, in order.
SIGNATURE = [
    "q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx", "cache_leftpad",
    "block_table", "softmax_scale", "causal", "window_size", "softcap", "rotary_interleaved", "alibi_slopes", "num_splits",
    "return_softmax_lse",
]  # fmt: skip


def test_it_has_flash_attns_signature():
    parameters = inspect.signature(flash_attn_with_kvcache).parameters
    assert [*parameters][: len(SIGNATURE)] == SIGNATURE
    assert [*parameters][len(SIGNATURE) :] == ["s_aux"]
    defaults = {name: parameters[name].default for name in SIGNATURE[3:]}
    assert {name: value for name, value in defaults.items() if value is not None} == {
        "causal": False, "window_size": (-1, -1), "softcap": 0.0, "rotary_interleaved": True, "num_splits": 0,
        "return_softmax_lse": False,
    }  # fmt: skip
    assert flashmla_hf.flash_attn_with_kvcache is flash_attn_with_kvcache


@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window_size": (4, 0)}, {"window_size": (4, 2)}, {"softcap": 2.0}], ids=str
)
def test_it_is_decode_attention(page_size, options):
    case = DecodeCase(lengths=(20, 3, 33), starts=(2, 0, 33), seqlen_q=4, capacity=48, page_size=page_size)
    x = inputs_of(case, torch.float32, "cpu")
    out, lse = flash_attn_with_kvcache(
        x.q, x.k_cache, x.v_cache, cache_seqlens=x.cache_seqlens, cache_leftpad=x.kv_start, block_table=x.block_table,
        return_softmax_lse=True, softmax_scale=0.3, **options,
    )  # fmt: skip
    expected = decode_attention(
        **x.tensors, is_causal=options.get("causal", False), window=options.get("window_size"), scale=0.3,
        softcap=options.get("softcap", 0.0), return_lse=True,
    )  # fmt: skip
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


def test_new_keys_begin_at_cache_seqlens_which_may_be_an_int():
    _, tensors, (k, v), _ = appended("cpu", 0)
    tensors["k_cache"].nan_to_num_(0.0)
    tensors["v_cache"].nan_to_num_(0.0)
    copies = [tensors[name].clone() for name in ("k_cache", "v_cache")]
    got = flash_attn_with_kvcache(tensors["q"], *copies, k, v, cache_seqlens=30, causal=True)
    assert torch.equal(copies[0][:, 30:33], k)
    assert torch.equal(copies[1][:, 30:33], v)
    expected = decode_attention(tensors["q"], *copies, cache_seqlens=int32([33] * 4, "cpu"))
    assert torch.equal(got, expected)


def test_cache_batch_idx_says_where_a_sequence_lies():
    x = inputs_of(DecodeCase(lengths=(20, 3, 33), capacity=48), torch.float32, "cpu")
    caches = [cache[torch.tensor([2, 0, 1, 1])] for cache in (x.k_cache, x.v_cache)]
    index = int32([1, 3, 0], "cpu")
    got = flash_attn_with_kvcache(x.q, *caches, cache_seqlens=x.cache_seqlens, cache_batch_idx=index)
    assert torch.equal(got, flash_attn_with_kvcache(x.q, x.k_cache, x.v_cache, cache_seqlens=x.cache_seqlens))
    k = torch.ones(3, 1, *caches[0].shape[2:])
    flash_attn_with_kvcache(x.q, *caches, k, k, cache_seqlens=x.cache_seqlens, cache_batch_idx=index)
    assert (caches[0][index.long(), x.cache_seqlens.long()] == 1).all()


REFUSED = {
    "rotary_cos": (torch.ones(9, 8), "rotary_cos: expected none (rotate q and k before the call)"),
    "rotary_sin": (torch.ones(9, 8), "rotary_sin: expected none (rotate q and k before the call)"),
    "alibi_slopes": (torch.ones(4), "alibi_slopes: expected none"),
    "num_splits": (4, "num_splits: expected 0 (as many as are fast) or 1"),
    "cache_batch_idx": (
        int32([0, 0, 0], "cpu"),
        "cache_batch_idx: expected none, or a capacity that is a multiple of 16",
    ),
    "k": (torch.ones(3, 1, 2, 64), "v: expected a tensor, since k is given"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_covered_is_refused_by_name(name):
    x = inputs_of(DecodeCase(lengths=(20, 3, 33), capacity=50), torch.float32, "cpu")
    value, message = REFUSED[name]
    with pytest.raises(ValueError) as error:
        flash_attn_with_kvcache(x.q, x.k_cache, x.v_cache, cache_seqlens=x.cache_seqlens, **{name: value})
    assert str(error.value).startswith(f"flashmla attention: {message}")


BAD_INDICES = [
    (torch.tensor([0, 1]), TypeError, "expected dtype int32 (call .int()), got int64"),
    ([0, 1], TypeError, "expected a torch.Tensor (torch.tensor([...], dtype=torch.int32, device=q.device)), got list"),
    (int32([0], "cpu"), ValueError, "expected shape [2] (batch of q), got [1]"),
    (int32([[0], [1]], "cpu"), ValueError, "expected shape [2] (batch of q), got [2, 1]"),
    (int32([0, 3], "cpu"), ValueError, "expected rows of the cache, 0 to 2, got 3 for sequence 1"),
    (int32([-1, 2], "cpu"), ValueError, "expected rows of the cache, 0 to 2, got -1 for sequence 0"),
]


@pytest.mark.parametrize(("index", "kind", "message"), BAD_INDICES)
def test_a_wrong_cache_batch_idx_is_refused_by_its_name(index, kind, message):
    x = inputs_of(DecodeCase(lengths=(20, 3, 33), capacity=48), torch.float32, "cpu")
    before = x.k_cache.clone()
    k, v = x.clean_k[:2, :1], x.clean_v[:2, :1]
    with pytest.raises(kind) as error:
        flash_attn_with_kvcache(x.q[:2], x.k_cache, x.v_cache, k, v, cache_seqlens=3, cache_batch_idx=index)
    assert str(error.value) == f"flashmla attention: cache_batch_idx: {message}"
    torch.testing.assert_close(x.k_cache, before, rtol=0, atol=0, equal_nan=True)


def test_what_is_no_tensor_is_refused_by_its_name():
    x = inputs_of(DecodeCase(lengths=(20,), capacity=48), torch.float32, "cpu")
    index = int32([0], "cpu")
    with pytest.raises(TypeError, match=r"^flashmla attention: k_cache: expected a torch.Tensor, got list$"):
        flash_attn_with_kvcache(x.q, [1], x.v_cache, cache_batch_idx=index)
    with pytest.raises(TypeError, match=r"^flashmla attention: q: expected a torch.Tensor, got NoneType$"):
        flash_attn_with_kvcache(None, x.k_cache, x.v_cache, cache_seqlens=3)
    with pytest.raises(ValueError, match=r"^flashmla attention: k_cache: expected \[batch, capacity, heads_kv, dim\] "):
        flash_attn_with_kvcache(x.q, x.k_cache[0], x.v_cache, cache_batch_idx=index)
    k, latents = x.clean_k[:, :1], {"v_cache": None, "head_dim_v": 8}
    for name, given in (("k", {"k": 1.0, "v": k}), ("v", {"k": k, "v": "v"}), ("v", {"k": k, "v": [k], **latents})):
        with pytest.raises(TypeError, match=rf"^flashmla attention: {name}: expected a torch.Tensor, got "):
            decode_attention(x.q, x.k_cache, **{"v_cache": x.v_cache, "cache_seqlens": x.cache_seqlens, **given})


BY_FLASH_ATTNS_NAMES = {
    "softmax_scale": ("no", TypeError, "softmax_scale: expected a number, got str"),
    "causal": (None, TypeError, "causal: expected True or False, got None"),
    "window_size": ((-2, 0), ValueError, "window_size left: expected a bound >= 0"),
    "s_aux": (torch.ones(3), ValueError, "s_aux: expected shape [4]"),
    "softcap": (-1.0, ValueError, "softcap: expected 0 (none) or a positive number, got -1.0"),
}
FLAGS = (torch.ones(2), np.array([1, 2]), "no")


@pytest.mark.parametrize("name", BY_FLASH_ATTNS_NAMES)
def test_wrong_arguments_are_refused_by_flash_attns_names(name):
    value, kind, message = BY_FLASH_ATTNS_NAMES[name]
    q, k, bounds = torch.ones(2, 16, 4, 8), torch.ones(2, 16, 2, 8), int32([0, 16, 32], "cpu")
    packed = [x.flatten(0, 1) for x in (q, k, k)]
    calls = (
        lambda **wrong: flash_attn_with_kvcache(q, k, k, **wrong),
        lambda **wrong: flashmla_hf.flash_attn_func(q, k, k, **wrong),
        lambda **wrong: flashmla_hf.flash_attn_varlen_func(*packed, bounds, bounds, 16, 16, **wrong),
    )
    for call in calls:
        with pytest.raises(kind, match=re.escape(f"flashmla attention: {message}")):
            call(**{name: value})
    for call, flag in itertools.product(calls[1:], FLAGS):
        with pytest.raises(TypeError, match=r"flashmla attention: deterministic: expected True or False, got "):
            call(deterministic=flag)


def test_the_other_names_that_differ_are_flash_attns():
    q, bounds = torch.ones(2, 16, 2, 8), int32([0, 16, 32], "cpu")
    packed = [q.flatten(0, 1)] * 3
    with pytest.raises(ValueError, match=r"^flashmla attention: cu_seqlens_k: "):
        flashmla_hf.flash_attn_varlen_func(*packed, bounds, bounds[:2], 16, 16)
    with pytest.raises(ValueError, match=r"^flashmla attention: max_seqlen_k: "):
        flashmla_hf.flash_attn_varlen_func(*packed, bounds, bounds, 16, 2)
    with pytest.raises(TypeError, match=r"^flashmla attention: return_attn_probs: "):
        flashmla_hf.flash_attn_func(q, q, q, return_attn_probs="no")
    with pytest.raises(TypeError, match=r"^flashmla attention: return_softmax_lse: "):
        flash_attn_with_kvcache(q, q, q, return_softmax_lse="no")
    with pytest.raises(ValueError, match=r"^flashmla attention: cache_leftpad: .* got 17 for sequence 1"):
        flash_attn_with_kvcache(q, q, q, cache_leftpad=int32([0, 17], "cpu"))
    with pytest.raises(ValueError, match=r"^flashmla attention: cache_batch_idx: .* to which two sequences append"):
        flash_attn_with_kvcache(q, q, q.clone(), q, q, cache_seqlens=0, cache_batch_idx=int32([1, 1], "cpu"))


def test_a_bound_on_the_lengths_may_be_any_number():
    q, bounds = torch.randn(32, 2, 8), int32([0, 16, 32], "cpu")
    got = flashmla_hf.flash_attn_varlen_func(q, q, q, bounds, bounds, 2**70, 2**31)
    assert torch.equal(got, flashmla_hf.flash_attn_varlen_func(q, q, q, bounds, bounds, 16, 16))


def test_cache_seqlens_may_be_any_int():
    x = inputs_of(DecodeCase(lengths=(20, 20), capacity=48), torch.float32, "cpu")
    expected = flash_attn_with_kvcache(x.q, x.k_cache, x.v_cache, cache_seqlens=20)
    assert torch.equal(flash_attn_with_kvcache(x.q, x.k_cache, x.v_cache, cache_seqlens=np.int64(20)), expected)
    for wrong in (-1, 2**31, 2**70):
        with pytest.raises(ValueError, match=f"cache_seqlens: expected from 0 to 2147483647, got {wrong}$"):
            flash_attn_with_kvcache(x.q, x.k_cache, x.v_cache, cache_seqlens=wrong)
    for wrong in (True, 20.0):
        with pytest.raises(
            TypeError, match=rf"cache_seqlens: expected an int, or a torch.Tensor int32 \[batch\], got {wrong}$"
        ):
            flash_attn_with_kvcache(x.q, x.k_cache, x.v_cache, cache_seqlens=wrong)


def test_flash_attns_functions_have_no_graph_breaks():
    q, bounds = torch.randn(2, 16, 2, 8), int32([0, 16, 32], "cpu")
    packed = [q.flatten(0, 1)] * 3
    calls = (
        lambda q: flashmla_hf.flash_attn_func(q, q, q, causal=True),
        lambda q: flashmla_hf.flash_attn_varlen_func(*packed, bounds, bounds, 16, 16),
        lambda q: flash_attn_with_kvcache(q, q, q, cache_seqlens=bounds[1:] // 2),
    )
    for call in calls:
        torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="eager")(q), call(q))


def test_cache_batch_idx_and_block_table_exclude_each_other():
    x = inputs_of(DecodeCase(lengths=(20,), page_size=16), torch.float32, "cpu")
    with pytest.raises(ValueError, match="cache_batch_idx: expected none with block_table"):
        flash_attn_with_kvcache(x.q, x.k_cache, x.v_cache, block_table=x.block_table, cache_batch_idx=int32([0], "cpu"))
