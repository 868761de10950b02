"""What attention to caches refuses: the public function, the operator on real and fake tensors, and gradients."""

import math
import warnings

import gpu_support
import pytest
import torch
from decode_cases import DecodeCase, inputs_of, int32
from torch._subclasses.fake_tensor import FakeTensorMode

from flashmla_hf import decode_ops, notices
from flashmla_hf.decode import decode_attention

DECODE = torch.ops.flashmla.flash_attn_decode


def arguments(page_size=0, **changes):
    case = DecodeCase(lengths=(20, 3), starts=(1, 0), capacity=32, page_size=page_size, has_sinks=True, head_dim_qk=16)
    return {**inputs_of(case, torch.float32, "cpu").tensors, **changes}


def at(name, change, page_size=0):
    """The arguments with one of them changed."""
    tensors = arguments(page_size)
    return {**tensors, name: change(tensors[name])}


# (changes, exception, message), after "flashmla attention: "
WRONG = [
    ({name: torch.ones(2, rows, 2, 16, dtype=torch.int32) for name, rows in (("q", 1), ("k_cache", 32), ("v_cache", 32))},
     TypeError, "q: expected a floating dtype, got int32"),
    ({name: torch.ones(2, rows, 2, 16).to(torch.float8_e5m2) for name, rows in (("q", 1), ("k_cache", 32), ("v_cache", 32))},
     TypeError, "q: expected a floating dtype of 16 bits or more, got float8_e5m2"),
    ({"q": None}, TypeError, "q: expected a torch.Tensor, got NoneType"),
    ({"q": torch.ones(2, 4, 16)}, ValueError, "q: expected [batch, seqlen_q, heads_q, dim], got 3 dimensions [2, 4, 16]"),
    ({"k_cache": torch.ones(2, 4, 16)}, ValueError,
     "k_cache: expected [batch, capacity, heads_kv, dim] without block_table, got 3 dimensions [2, 4, 16]"),
    ({"k_cache": torch.ones(2, 32, 2, 16).half()}, TypeError, "k_cache: expected dtype float32 (that of q), got float16"),
    ({"k_cache": torch.ones(2, 32, 2, 16, device="meta")}, ValueError, "k_cache: expected device cpu (that of q), got meta"),
    ({"k_cache": torch.ones(2, 32, 2, 8)}, ValueError, "k_cache: expected head_dim 16 (that of q), got 8"),
    ({"k_cache": torch.ones(3, 32, 2, 16), "v_cache": torch.ones(3, 32, 2, 16)}, ValueError,
     "k_cache: expected batch 2 (that of q), or pass block_table, got 3"),
    ({"k_cache": torch.ones(2, 32, 3, 16), "v_cache": torch.ones(2, 32, 3, 16)}, ValueError,
     "k_cache: expected a number of heads that divides q's 4, got 3"),
    ({"k_cache": torch.ones(2, 32, 0, 16), "v_cache": torch.ones(2, 32, 0, 16)}, ValueError,
     "k_cache: expected at least one head and one dimension, got shape [2, 32, 0, 16]"),
    ({"v_cache": torch.ones(2, 31, 2, 16)}, ValueError,
     "v_cache: expected shape [2, 32, 2] before the last dimension (that of k_cache), got [2, 31, 2]"),
    ({"v_cache": torch.ones(2, 32, 16, 2).mT}, ValueError,
     "v_cache: expected a contiguous last dimension (call .contiguous()), got stride 2"),
    ({"cache_seqlens": [20, 3]}, TypeError,
     "cache_seqlens: expected a torch.Tensor (torch.tensor([...], dtype=torch.int32, device=q.device)), got list"),
    ({"cache_seqlens": 20}, TypeError,
     "cache_seqlens: expected a torch.Tensor (torch.tensor([...], dtype=torch.int32, device=q.device)), got int"),
    ({"k_cache": torch.ones(2, 2, 32, 16), "v_cache": torch.ones(2, 2, 32, 16)}, ValueError,
     "k_cache: expected a number of heads that divides q's 4, got 32: tensors are [batch, seqlen, heads, head_dim]: call "
     ".transpose(1, 2)"),
    ({"q": torch.ones(2, 4, 1, 16), "k_cache": torch.ones(2, 2, 32, 16), "v_cache": torch.ones(2, 2, 32, 16)}, ValueError,
     "k_cache: expected a number of heads that divides q's 1, got 32: tensors are [batch, seqlen, heads, head_dim]: call "
     ".transpose(1, 2)"),
    ({"cache_seqlens": torch.tensor([20, 3])}, TypeError, "cache_seqlens: expected dtype int32 (call .int()), got int64"),
    ({"cache_seqlens": int32([20], "cpu")}, ValueError,
     "cache_seqlens: expected a contiguous tensor [2] (batch of q), got shape [1], stride (1,)"),
    ({"cache_seqlens": int32([20, 3], "meta")}, ValueError, "cache_seqlens: expected device cpu (that of q), got meta"),
    ({"kv_start": torch.tensor([2.0, 3.0])}, TypeError, "kv_start: expected dtype int32 (call .int()), got float32"),
    ({"kv_start": int32([[1], [2]], "cpu")}, ValueError,
     "kv_start: expected a contiguous tensor [2] (batch of q), got shape [2, 1], stride (1, 1)"),
    ({"sinks": torch.ones(5)}, ValueError, "sinks: expected shape [4] (one logit per query head), got [5]"),
    ({"cache_seqlens": int32([20, 20, 3, 3], "cpu")[::2]}, ValueError,
     "cache_seqlens: expected a contiguous tensor [2] (batch of q), got shape [2], stride (2,)"),
    ({"scale": 1e300}, ValueError, "scale: expected at most 3.4e+38 in magnitude (scores are float32), got 1e+300"),
    ({"scale": math.nan}, ValueError, "scale: expected a finite number, got nan"),
    ({"softcap": -1.0}, ValueError, "softcap: expected 0 (none) or a positive number, got -1.0"),
    ({"is_causal": "no"}, TypeError, "is_causal: expected True or False, got 'no'"),
    ({"return_lse": "no"}, TypeError, "return_lse: expected True or False, got 'no'"),
    ({"impl": []}, TypeError, "impl: expected the name of an implementation or None, got []"),
    ({"k_cache": torch.ones(2, 1, 2, 16).expand(2, 32, 2, 16), "k": torch.ones(2, 1, 2, 16), "v": torch.ones(2, 1, 2, 16)},
     ValueError, "k_cache: expected rows of their own, since new ones are written there (call .contiguous() before the first "
     "append), got an expanded tensor of strides (32, 0, 16, 1)"),
    ({**dict.fromkeys(("k_cache", "v_cache"), torch.ones(2, 32, 2, 16)), "k": torch.ones(2, 1, 2, 16),
      "v": torch.ones(2, 1, 2, 16)},
     ValueError, "v_cache: expected other memory than k_cache's, since new values would be written over new keys, got the same "
     "(values that are columns of k_cache: v_cache=None with head_dim_v)"),
    ({"window": 5}, TypeError, "window: expected a pair (left, right), got 5"),
    ({"window": (-2, 0)}, ValueError, "window left: expected a bound >= 0, or -1 or None for unbounded, got -2"),
    ({"num_splits": 2}, ValueError,
     "num_splits: expected 0 (as many as are fast) or 1 (a sequence's result does not depend on the rest of the batch), got 2"),
    ({"num_splits": True}, TypeError, "num_splits: expected 0 or 1, got True"),
    ({"impl": "flex"}, ValueError, "impl: expected one of ['sm90', 'cpu', 'reference'] or None, got 'flex'"),
    ({"k": torch.ones(2, 1, 2, 16)}, ValueError, "v: expected a tensor, since k is given (pass both or neither), got None"),
    ({"v": torch.ones(2, 1, 2, 16)}, ValueError, "k: expected a tensor, since v is given (pass both or neither), got None"),
    ({"k": torch.ones(2, 1, 3, 16), "v": torch.ones(2, 1, 2, 16)}, ValueError,
     "k: expected shape [2, 1, 2, 16], got [2, 1, 3, 16]"),
    ({"k": torch.ones(2, 1, 2, 16), "v": torch.ones(2, 2, 2, 16)}, ValueError,
     "v: expected shape [2, 1, 2, 16], got [2, 2, 2, 16]"),
    ({"k": torch.ones(2, 2, 16), "v": torch.ones(2, 2, 16)}, ValueError,
     "k: expected shape [2, seqlen_new, 2, 16], got [2, 2, 16]"),
    ({"k": torch.ones(2, 1, 2, 16).half(), "v": torch.ones(2, 1, 2, 16)}, TypeError,
     "k: expected dtype float32 (that of the cache), got float16"),
    ({"k": torch.ones(2, 1, 2, 16), "v": torch.ones(2, 1, 2, 16, device="meta")}, ValueError,
     "v: expected device cpu (that of the cache), got meta"),
    ({"k": torch.ones(2, 40, 2, 16), "v": torch.ones(2, 40, 2, 16)}, ValueError,
     "k: expected at most 32 new keys (the rows a sequence may have), got 40"),
    ({"k": torch.ones(2, 1, 2, 16), "v": torch.ones(2, 1, 2, 16), "cache_seqlens": None}, ValueError,
     "cache_seqlens: expected a tensor, since k and v are given (they begin there), got None"),
]  # fmt: skip
WRONG_PAGES = [
    ({"block_table": torch.tensor([[0, 1], [2, 3]])}, TypeError, "block_table: expected dtype int32 (call .int()), got int64"),
    ({"block_table": int32([0, 1], "cpu")}, ValueError,
     "block_table: expected shape [2, pages of a sequence] (batch of q), got [2]"),
    ({"block_table": int32([[0, 1]], "cpu")}, ValueError,
     "block_table: expected shape [2, pages of a sequence] (batch of q), got [1, 2]"),
    ({"block_table": int32([[0, 1], [2, 3]], "cpu").T}, ValueError,
     "block_table: expected contiguous rows (call .contiguous()), got stride 2"),
    ({"k_cache": torch.ones(7, 24, 2, 16), "v_cache": torch.ones(7, 24, 2, 16)}, ValueError,
     "k_cache: expected a page_size (its size 1) that is a multiple of 16, got 24: allocate pages of such a size, or gather them "
     "into caches [batch, capacity, heads_kv, dim]"),
    ({"k_cache": torch.ones(7, 0, 2, 16), "v_cache": torch.ones(7, 0, 2, 16)}, ValueError,
     "k_cache: expected a page_size (its size 1) that is a multiple of 16, got 0: allocate pages of such a size, or gather them "
     "into caches [batch, capacity, heads_kv, dim]"),
    ({"k_cache": torch.ones(2, 4, 16)}, ValueError,
     "k_cache: expected [num_pages, page_size, heads_kv, dim] with block_table, got 3 dimensions [2, 4, 16]"),
    ({"k_cache": torch.ones(0, 16, 2, 16), "v_cache": torch.ones(0, 16, 2, 16), "k": torch.ones(2, 1, 2, 16),
      "v": torch.ones(2, 1, 2, 16)}, ValueError, "k_cache: expected at least one page, since k and v are given, got 0"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("page_size", "changes", "kind", "message"),
    [(0, *each) for each in WRONG] + [(16, *each) for each in WRONG_PAGES],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_arguments_are_refused_by_name(page_size, changes, kind, message):
    with pytest.raises(kind) as error:
        decode_attention(**arguments(page_size, **changes))
    assert str(error.value) == f"flashmla attention: {message}"


def test_two_sequences_that_append_to_one_row_are_refused():
    tensors = arguments(16, cache_seqlens=int32([17, 18], "cpu"), kv_start=None)
    tensors["block_table"] = int32([[0, 2], [1, 2]], "cpu")
    new = torch.ones(2, 2, 2, 16)
    before = tensors["k_cache"].clone()
    message = "block_table: expected no row of a page to which two sequences append, got row 2 of page 2 for sequences 0 and 1"
    with pytest.raises(ValueError, match=message):
        decode_attention(**tensors, k=new, v=new)
    torch.testing.assert_close(tensors["k_cache"], before, rtol=0, atol=0, equal_nan=True)
    decode_attention(**tensors, k=new[:, :1], v=new[:, :1])  # rows 1 and 2 of the page they share


@pytest.mark.parametrize("first", [0, 8, -8])
def test_values_are_not_written_over_keys(first):
    memory = torch.zeros(2, 32, 2, 32)
    k_cache, v_cache = memory[..., 8:24], memory[..., 8 + first : 24 + first]
    tensors = arguments(k_cache=k_cache, v_cache=v_cache)
    with pytest.raises(ValueError, match=r"v_cache: expected other memory than k_cache's, .*, got the same"):
        decode_attention(**tensors, k=torch.ones(2, 1, 2, 16), v=torch.ones(2, 1, 2, 16))
    assert not memory.any()
    tensors |= {"k_cache": memory[..., :16], "v_cache": memory[..., 16:]}  # side by side
    decode_attention(**tensors, k=torch.ones(2, 1, 2, 16), v=torch.full((2, 1, 2, 16), 2.0))
    assert memory.sum() == 2 * 2 * 16 * (1 + 2)


def test_nothing_is_written_before_a_refusal():
    tensors = arguments()
    before = tensors["k_cache"].clone()
    new = torch.ones(2, 1, 2, 16)
    for options in ({"impl": "sm90" if not torch.cuda.is_available() else "flex"}, {"v": torch.ones(2, 2, 2, 16)}):
        with pytest.raises((RuntimeError, ValueError)):
            decode_attention(**tensors, **{"k": new, "v": new, **options})
    torch.testing.assert_close(tensors["k_cache"], before, rtol=0, atol=0, equal_nan=True)


VALUES = [
    (0, "cache_seqlens", [33, 3], "numbers from 0 to 32 (the rows a sequence may have), got 33 for sequence 0"),
    (0, "cache_seqlens", [20, -1], "numbers from 0 to 32 (the rows a sequence may have), got -1 for sequence 1"),
    (16, "cache_seqlens", [20, 33], "numbers from 0 to 32 (the rows a sequence may have), got 33 for sequence 1"),
    (0, "kv_start", [-1, 3], "numbers from 0 to 32 (the rows a sequence may have), got -1 for sequence 0"),
    (0, "kv_start", [1, 33], "numbers from 0 to 32 (the rows a sequence may have), got 33 for sequence 1"),
    (16, "block_table", [[0, 7], [1, 0]], "pages from 0 to 6 where keys are read, got 7 at [0, 1]"),
    (16, "block_table", [[0, 1], [-1, 0]], "pages from 0 to 6 where keys are read, got -1 at [1, 0]"),
]


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize(("page_size", "name", "values", "message"), VALUES)
def test_values_that_name_no_row_are_refused(impl, page_size, name, values, message):
    tensors = arguments(page_size, **{name: int32(values, "cpu")})
    for options in ({}, {"return_lse": True}):
        with pytest.raises(ValueError) as error:
            decode_attention(**tensors, impl=impl, **options)
        assert str(error.value) == f"flashmla attention: {name}: expected {message}"
    operator_tensors = dict(zip(NAMES, tensors.values(), strict=True))
    with pytest.raises(RuntimeError) as error:
        call(operator_tensors)
    assert str(error.value) == f"flash_attn_decode: {name}: expected {message}"


# With one new key a sequence.
VALUES_BEFORE_AN_APPEND = [
    (0, "kv_start", [-1, 3], "kv_start: expected numbers from 0 to 32 (the rows a sequence may have), got -1 for sequence 0"),
    (0, "kv_start", [0, 33], "kv_start: expected numbers from 0 to 32 (the rows a sequence may have), got 33 for sequence 1"),
    (0, "cache_seqlens", [32, 3],
     "cache_seqlens: expected numbers from 0 to 31 (the rows a sequence may have, less the 1 of k), got 32 for sequence 0"),
    (16, "kv_start", [0, -5], "kv_start: expected numbers from 0 to 32 (the rows a sequence may have), got -5 for sequence 1"),
    (16, "block_table", [[7, 1], [2, 0]], "block_table: expected pages from 0 to 6 where keys are read, got 7 at [0, 0]"),
    (16, "block_table", [[0, 1], [-1, 0]],
     "block_table: expected pages from 0 to 6 where k and v are appended, got -1 at [1, 0]"),
]  # fmt: skip


@pytest.mark.parametrize("impl", [None, "cpu", "reference"])
@pytest.mark.parametrize(("page_size", "name", "values", "message"), VALUES_BEFORE_AN_APPEND)
def test_values_are_refused_before_new_keys_are_written(impl, page_size, name, values, message):
    tensors = arguments(page_size, **{name: int32(values, "cpu")})
    before = [tensors[cache].clone() for cache in ("k_cache", "v_cache")]
    new = torch.ones(2, 1, 2, 16)
    with pytest.raises(ValueError) as error:
        decode_attention(**tensors, k=new, v=new, impl=impl)
    assert str(error.value) == f"flashmla attention: {message}"
    for cache, kept in zip(("k_cache", "v_cache"), before, strict=True):
        torch.testing.assert_close(tensors[cache], kept, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_pages_that_neither_a_query_nor_an_append_needs_may_be_anything(impl):
    tensors = arguments(16, cache_seqlens=int32([20, 3], "cpu"), block_table=int32([[-1, 1], [2, 99]], "cpu"))
    tensors["kv_start"] = int32([16, 0], "cpu")
    for cache in ("k_cache", "v_cache"):
        tensors[cache] = tensors[cache].nan_to_num(1.0)
    new = torch.ones(2, 1, 2, 16)
    assert torch.isfinite(decode_attention(**tensors, k=new, v=new, impl=impl)).all()
    windowed = {**tensors, "kv_start": None}
    assert torch.isfinite(decode_attention(**windowed, k=new, v=new, window=(4, 0), impl=impl)).all()


# ---- Implementations -------------------------------------------------------------------------------------------------


def test_an_implementation_never_falls_back():
    tensors = arguments()
    if gpu_support.sm90_missing() is None:
        with pytest.raises(RuntimeError, match="impl='sm90' cannot compute this call: the tensors are on cpu"):
            decode_attention(**tensors, impl="sm90")
    else:
        with pytest.raises(RuntimeError, match="impl='sm90' cannot compute this call: "):
            decode_attention(**tensors, impl="sm90")
    doubles = {name: x if x is None or x.dtype == torch.int32 else x.double() for name, x in tensors.items()}
    with pytest.raises(
        RuntimeError, match="impl='cpu' cannot compute this call: dtype float64: expected float32, float16 or"
    ):
        decode_attention(**doubles, impl="cpu")


def test_without_a_kernel_the_reference_computes_with_one_warning(monkeypatch):
    monkeypatch.setattr(notices, "_warned", set())
    tensors = {name: x if x is None or x.dtype == torch.int32 else x.double() for name, x in arguments().items()}
    with pytest.warns(UserWarning, match=r"computed by impl='reference'.*The reason: dtype float64") as warned:
        got = decode_attention(**tensors)
    assert [warning.filename for warning in warned] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(decode_attention(**tensors), got)
        assert torch.equal(decode_attention(**tensors, impl="reference"), got)


# ---- The operator ----------------------------------------------------------------------------------------------------

NAMES = ("q", "k", "v", "sinks", "cache_seqlens", "kv_start", "block_table")


def operands(page_size=16, device="cpu"):
    tensors = dict(zip(NAMES, arguments(page_size).values(), strict=True))
    return {name: x if x is None else x.to(device) for name, x in tensors.items()}


def call(tensors, scale=0.3, window_left=-1, window_right=0, softcap=0.0):
    return DECODE(*tensors.values(), scale, window_left, window_right, softcap, True)


CHANGES = {
    "dtype": lambda x: x.to(torch.float64),
    "rank": lambda x: x[None],
    "first size": lambda x: torch.cat([x, x]),
    "last size": lambda x: torch.cat([x, x], dim=-1),
}
# Sizes that are free: the pages of the cache belong to both k and v; the width of v and of the table to nobody else.
FREE = {("v", "last size"), ("block_table", "last size")}


@pytest.mark.parametrize(
    ("name", "change"), [(name, change) for name in NAMES for change in CHANGES if (name, change) not in FREE]
)
def test_wrong_dtypes_and_shapes_are_refused_by_fake_and_real_alike(name, change):
    tensors = operands()
    tensors[name] = CHANGES[change](tensors[name])
    for device in ("cpu", "meta"):
        with pytest.raises(RuntimeError, match=r"^flash_attn_decode: \w+: expected "):
            call({n: x.to(device) for n, x in tensors.items()})


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_on_another_device_is_refused(name):
    for tensors in (
        {**operands(), name: operands()[name].to("meta")},
        {**operands(device="meta"), name: operands()[name]},
    ):
        with pytest.raises(
            RuntimeError, match=r"flash_attn_decode: \w+: expected a tensor on (cpu|meta) \(the device of q\)"
        ):
            call(tensors)


@pytest.mark.parametrize("page_size", [0, 16])
def test_fakes_have_the_shapes_of_results(page_size):
    tensors = operands(page_size)
    tensors["v"] = torch.cat([tensors["v"], tensors["v"]], dim=-1)
    real = call(tensors)
    with FakeTensorMode() as mode:
        fake = call({name: x if x is None else mode.from_tensor(x) for name, x in tensors.items()})
    meta = call({name: x if x is None else x.to("meta") for name, x in tensors.items()})
    for made in (fake, meta):
        assert [(x.shape, x.dtype, x.stride()) for x in made] == [(x.shape, x.dtype, x.stride()) for x in real]


STRIDES = {
    "q": (lambda x: x.mT.contiguous().mT, "a contiguous last dimension (stride 1), got stride 4"),
    "block_table": (lambda x: x.T.contiguous().T, "a contiguous last dimension (stride 1), got stride 2"),
    "cache_seqlens": (lambda x: torch.stack([x, x], 1)[:, 0], "a contiguous tensor, got stride 2"),
    "kv_start": (lambda x: torch.stack([x, x], 1)[:, 0], "a contiguous tensor, got stride 2"),
    "sinks": (lambda x: torch.stack([x, x], 1)[:, 0], "a contiguous tensor, got stride 2"),
}


@pytest.mark.parametrize("name", STRIDES)
def test_the_host_refuses_strides_that_no_kernel_reads(name):
    change, message = STRIDES[name]
    tensors = operands()
    with pytest.raises(RuntimeError) as error:
        call({**tensors, name: change(tensors[name])})
    assert str(error.value) == f"flash_attn_decode: {name}: expected {message}"


HOST = [
    ({"k": torch.ones(7, 24, 2, 16), "v": torch.ones(7, 24, 2, 16)}, "k: expected a page_size (its size 1) that is a multiple of 16, got 24"),
    ({"q": torch.ones(2, 1, 3, 16), "sinks": None}, "q: expected a multiple of the 2 kv heads, got 3 heads"),
]  # fmt: skip
NUMBERS = [
    ({"scale": math.inf}, "scale: expected a finite number, got inf"),
    ({"window_left": -2}, "window_left: expected at least -1, got -2"),
    ({"window_right": -2}, "window_right: expected at least -1, got -2"),
    ({"softcap": -1.0}, "softcap: expected 0 (none) or a finite positive number, got -1"),
]


@pytest.mark.parametrize(("changes", "message"), HOST)
def test_the_host_refuses_shapes(changes, message):
    for device in ("cpu", "meta"):
        tensors = {**operands(), **changes}
        with pytest.raises(RuntimeError) as error:
            call({name: x if x is None else x.to(device) for name, x in tensors.items()})
        assert str(error.value) == f"flash_attn_decode: {message}"


@pytest.mark.parametrize(("numbers", "message"), NUMBERS)
def test_the_host_refuses_numbers(numbers, message):
    with pytest.raises(RuntimeError) as error:
        call(operands(), **numbers)
    assert str(error.value) == f"flash_attn_decode: {message}"


def test_the_host_refuses_products_beyond_any_memory():
    tensors = operands()
    names = ("q", "sinks", "cache_seqlens", "kv_start")
    tensors = {name: None if name in names[1:] else x[:1] for name, x in tensors.items()}
    tensors["q"] = tensors["q"].expand(2**20, -1, -1, -1)
    tensors["k"], tensors["v"] = (tensors[name][:, :1].expand(-1, 2**30, -1, -1) for name in ("k", "v"))
    tensors["block_table"] = int32([[0] * 16], "cpu").expand(2**20, -1)
    with pytest.raises(RuntimeError, match=r"q, k and v: expected fewer than 2\^53 numbers"):
        call(tensors)


def test_the_schema_is_that_of_the_arguments():
    schema = str(DECODE.default._schema)
    assert "cache_seqlens, Tensor? kv_start, Tensor? block_table, float scale, SymInt window_left" in schema
    assert [argument.name for argument in DECODE.default._schema.arguments] == list(decode_ops._NAMES)


# ---- Derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "sinks", "k", "v"])
def test_a_tensor_that_requires_a_gradient_is_refused_except_without_grad(impl, name):
    tensors = {**arguments(), "k": torch.ones(2, 1, 2, 16), "v": torch.ones(2, 1, 2, 16)}
    tensors[name] = tensors[name].detach().requires_grad_()
    with pytest.raises(RuntimeError) as error:
        decode_attention(**tensors, impl=impl)
    assert str(error.value) == (
        f"flashmla attention: {name}: expected a tensor that requires no gradient, got one that does: attention to a cache has no "
        "derivative. Call it under torch.no_grad(), or call flashmla_hf.attention on k and v (on latents, latent_attention)"
    )
    with torch.no_grad():
        decode_attention(**tensors, impl=impl)
    with torch.inference_mode():
        decode_attention(**tensors, impl=impl)


def test_the_operator_refuses_gradients_and_transforms():
    tensors = operands()
    with pytest.raises(RuntimeError, match=r"^flash_attn_decode: v: expected a tensor that requires no gradient"):
        call({**tensors, "v": tensors["v"].clone().requires_grad_()})
    with pytest.raises(RuntimeError, match="q: expected a tensor that requires no gradient"):
        torch.func.grad(lambda q: call({**tensors, "q": q})[0].sum())(tensors["q"])
    with pytest.raises(RuntimeError, match="q: expected no tangent, got a dual tensor"):
        torch.func.jvp(lambda q: call({**tensors, "q": q})[0], (tensors["q"],), (tensors["q"],))


def test_opcheck():
    for page_size in (0, 16):
        torch.library.opcheck(DECODE.default, (*operands(page_size).values(), 0.3, 9, 0, 2.0, True))
