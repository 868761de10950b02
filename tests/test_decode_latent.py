"""Attention to caches of latents: one row a token, whose first columns are the values. For every implementation there is.

    FLASHMLA_LATENT_CASES=20000 FLASHMLA_FUZZ_SEED=1 python3 -m pytest tests/test_decode_latent.py -k random

A GPU without a kernel for such rows skips the cases of ``sm90``.
"""

import dataclasses
import math
import os
import random

import decode_cases
import gpu_support
import numerics
import pytest
import torch
from decode_cases import DecodeCase, check, device_of, dtypes_of, inputs_of, int32
from torch._dynamo.testing import CompileCounter

from flashmla_hf import attention, libraries, notices
from flashmla_hf.decode import decode_attention, has_kernel, kernel_refusal
from flashmla_hf.libraries import Sm90Limits

RANDOM_CASES = {
    impl: int(os.environ.get("FLASHMLA_LATENT_CASES", count))
    for impl, count in (("sm90", 1200), ("cpu", 600), ("reference", 150))
}
SEED = int(os.environ.get("FLASHMLA_FUZZ_SEED", "0"))
DIMS = {"head_dim_qk": 576, "head_dim_v": 512, "heads_kv": 1, "is_latent": True}


def missing(impl: str) -> str | None:
    """Why ``impl`` computes no latents here."""
    reason = decode_cases.missing(impl)
    if reason is None and impl == "sm90":
        rows = torch.zeros(1, 16, 1, 576, dtype=torch.bfloat16, device="cuda")
        reason = kernel_refusal(rows.expand(1, 16, 16, 576).contiguous(), rows, rows[..., :512], is_latent=True)
    return reason


IMPLEMENTATIONS = [
    pytest.param(name, marks=pytest.mark.skipif(missing(name) is not None, reason=f"{name}: {missing(name)}"))
    for name in decode_cases.IMPLEMENTATIONS
]
each_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


@each_impl
def test_random_calls_keep_the_error_rule(impl):
    before, dtypes = dataclasses.replace(numerics.looks), dtypes_of(impl)
    count = RANDOM_CASES[impl] // len(dtypes)
    failures = []
    for dtype in dtypes:
        source = random.Random(f"latents {impl} {dtype} {SEED}")
        for _ in range(count):
            case, seed = decode_cases.random_latent_case(source, impl), source.randint(0, 2**31)
            try:
                check(impl, case, dtype, seed)
            except (AssertionError, RuntimeError) as error:
                failures.append(f"{str(error).splitlines()[0]}\n  {decode_cases.reproducer(impl, case, dtype, seed)}")
    numerics.assert_rule_was_kept(failures, before, count * len(dtypes))


CASES = {
    "one token": DecodeCase(lengths=(300,), heads_q=16, **DIMS),
    "one key": DecodeCase(lengths=(1, 1), heads_q=16, **DIMS),
    "no key": DecodeCase(lengths=(0, 5), heads_q=16, seqlen_q=2, **DIMS),
    "128 heads, 2 queries, pages": DecodeCase(lengths=(300, 65), heads_q=128, seqlen_q=2, page_size=64, **DIMS),
    "left padding": DecodeCase(lengths=(200, 200), starts=(0, 77), heads_q=16, seqlen_q=4, capacity=256, **DIMS),
    "a static cache of Transformers": DecodeCase(
        lengths=(33, 7), heads_q=16, capacity=512, layout="transposed", **DIMS
    ),
    "every column is a value": DecodeCase(
        lengths=(90,), heads_q=4, head_dim_qk=64, head_dim_v=64, heads_kv=2, is_latent=True
    ),
}


@each_impl
@pytest.mark.parametrize("name", CASES)
def test_cases_keep_the_error_rule(impl, name):
    if impl == "sm90" and CASES[name].head_dim_qk != 576:
        pytest.skip("a shape without a kernel on a GPU")
    for dtype in dtypes_of(impl):
        check(impl, CASES[name], dtype)


def _last_columns(*, k_cache, head_dim_v, **arguments):
    return decode_attention(k_cache=k_cache.roll(-1, -1), head_dim_v=head_dim_v, **arguments)


def test_the_cases_find_values_of_other_columns():
    with pytest.raises(AssertionError):
        check("cpu", CASES["one token"], torch.float32, function=_last_columns)


@each_impl
@pytest.mark.parametrize("page_size", [0, 16])
def test_it_is_a_call_with_a_view_bit_for_bit(impl, page_size):
    case = DecodeCase(lengths=(90, 7), heads_q=16, seqlen_q=2, page_size=page_size, **DIMS)
    inputs = inputs_of(case, dtypes_of(impl)[-1], device_of(impl))
    tensors = inputs.tensors
    for return_lse in (False, True):
        got = decode_attention(**tensors, return_lse=return_lse, impl=impl)
        view = {name: x for name, x in tensors.items() if name != "head_dim_v"}
        view["v_cache"] = tensors["k_cache"][..., :512]
        expected = decode_attention(**view, return_lse=return_lse, impl=impl)
        pairs = zip(got, expected, strict=True) if return_lse else [(got, expected)]
        assert all(torch.equal(x, y) for x, y in pairs)


@each_impl
@pytest.mark.parametrize("page_size", [0, 16])
def test_new_rows_are_written_once_and_seen(impl, page_size):
    lengths, seqlen_new = (20, 0, 33), 3
    case = DecodeCase(
        lengths=tuple(n + seqlen_new for n in lengths), heads_q=16, seqlen_q=2, capacity=48, page_size=page_size, **DIMS
    )
    inputs = inputs_of(case, dtypes_of(impl)[-1], device_of(impl))
    expected = decode_attention(**inputs.tensors, impl=impl)
    k = torch.stack([inputs.clean_k[b, n : n + seqlen_new] for b, n in enumerate(lengths)])
    tensors = {**inputs.tensors, "cache_seqlens": int32(lengths, device_of(impl))}
    tensors["k_cache"] = tensors["k_cache"].clone()
    for b, n in enumerate(lengths):
        for j in range(n, n + seqlen_new):
            page, row = (b, j) if not page_size else (tensors["block_table"][b, j // 16].item(), j % 16)
            tensors["k_cache"][page, row] = torch.nan
    assert torch.equal(decode_attention(**tensors, k=k, impl=impl), expected)
    torch.testing.assert_close(tensors["k_cache"], inputs.k_cache, rtol=0, atol=0, equal_nan=True)


def test_torch_compile_has_no_graph_breaks_and_the_same_results():
    case = DecodeCase(lengths=(20, 7), heads_q=4, capacity=32, **DIMS)
    inputs = inputs_of(case, torch.float32, "cpu")
    tensors = inputs.tensors
    tensors["k_cache"] = tensors["k_cache"].nan_to_num(0.0)
    k, copy = torch.ones(2, 1, 1, 576), tensors["k_cache"].clone()
    expected = decode_attention(**{**tensors, "k_cache": copy}, k=k)
    counter = CompileCounter()
    compiled = torch.compile(decode_attention, fullgraph=True, backend=counter)
    assert torch.equal(compiled(**tensors, k=k), expected)
    assert torch.equal(tensors["k_cache"], copy)
    assert counter.frame_count == 1


# ---- Refusals --------------------------------------------------------------------------------------------------------

ROWS, Q = torch.ones(2, 32, 1, 96), torch.ones(2, 1, 4, 96)
NEW = torch.ones(2, 1, 1, 96)
LENGTHS = int32([3, 5], "cpu")
REFUSED = [
    ({"head_dim_v": None}, TypeError,
     "v_cache: expected a torch.Tensor, or None with head_dim_v (values that are columns of k_cache), got None without "
     "head_dim_v"),
    ({"v_cache": ROWS}, ValueError, "head_dim_v: expected none, since v_cache is given (the values are either), got 64"),
    ({"head_dim_v": 97}, ValueError, "head_dim_v: expected from 1 to 96 (the columns of k_cache), got 97"),
    ({"head_dim_v": 0}, ValueError, "head_dim_v: expected from 1 to 96 (the columns of k_cache), got 0"),
    ({"head_dim_v": 64.0}, TypeError, "head_dim_v: expected an int, got 64.0"),
    ({"head_dim_v": True}, TypeError, "head_dim_v: expected an int, got True"),
    ({"k_cache": [1]}, TypeError, "k_cache: expected a torch.Tensor, got list"),
    ({"k_cache": ROWS[0]}, ValueError,
     "k_cache: expected [batch, capacity, heads_kv, dim] without block_table, got 3 dimensions [32, 1, 96]"),
    ({"k_cache": ROWS[..., :80]}, ValueError, "k_cache: expected head_dim 96 (that of q), got 80"),
    ({"k": NEW, "v": NEW[..., :64], "cache_seqlens": LENGTHS}, ValueError,
     "v: expected none, since head_dim_v is given (the values are columns of k), got shape [2, 1, 1, 64]"),
    ({"v": NEW[..., :64], "cache_seqlens": LENGTHS}, ValueError,
     "v: expected none, since head_dim_v is given (the values are columns of k), got shape [2, 1, 1, 64]"),
    ({"k": NEW[..., :64], "cache_seqlens": LENGTHS}, ValueError, "k: expected shape [2, 1, 1, 96], got [2, 1, 1, 64]"),
    ({"k": NEW}, ValueError, "cache_seqlens: expected a tensor, since k is given (they begin there), got None"),
    ({"k": NEW, "cache_seqlens": int32([32, 5], "cpu")}, ValueError,
     "cache_seqlens: expected numbers from 0 to 31 (the rows a sequence may have, less the 1 of k), got 32 for sequence 0"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "kind", "message"), REFUSED, ids=[message[:60] for _, _, message in REFUSED])
def test_arguments_are_refused_by_name(changes, kind, message):
    arguments = {"q": Q, "k_cache": ROWS.clone(), "v_cache": None, "head_dim_v": 64, **changes}
    with pytest.raises(kind) as error:
        decode_attention(**arguments)
    assert str(error.value) == f"flashmla attention: {message}"


class _OnGpu:
    """A tensor that claims to be on a Hopper GPU, for who only asks."""

    def __init__(self, width):
        x = torch.ones(1, 16, 1, width)
        self.device, self.dtype, self.shape = torch.device("cuda"), torch.bfloat16, x.shape
        self.stride, self.storage_offset, self.untyped_storage, self.numel = (
            x.stride, x.storage_offset, x.untyped_storage, x.numel,
        )  # fmt: skip
        self.element_size = lambda: self.dtype.itemsize


@pytest.mark.parametrize(("width", "values", "is_latent", "expected"), [
    (576, 512, True, None), (288, 256, True, None), (96, 64, True, None), (128, 128, False, None),
    (584, 512, True, "q and k: head_dim 584: expected a multiple of 8 up to 576"),
    (576, 520, True, "v: head_dim 520: expected a multiple of 8 up to 512"),
    (573, 512, True, "q and k: head_dim 573: expected a multiple of 8 up to 576"),
    # Values that are a tensor of their own.
    (576, 512, False, "q and k: head_dim 576: expected a multiple of 8 up to 256"),
])  # fmt: skip
def test_a_hopper_gpu_has_a_kernel_for_latents_up_to_its_width(width, values, is_latent, expected, monkeypatch):
    class Properties:
        major, minor, name = 9, 0, "a Hopper GPU"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(libraries, "sm90_limits", Sm90Limits(8, 256, 256, (576, 512), 128, 16, 256))
    monkeypatch.delitem(libraries.unavailable, "sm90", raising=False)
    tensors = _OnGpu(width), _OnGpu(width), _OnGpu(values)
    assert kernel_refusal(*tensors, is_latent=is_latent) == expected
    assert has_kernel(*tensors, is_latent=is_latent) == (expected is None)


def test_without_a_kernel_the_reference_computes_with_one_warning(monkeypatch):
    monkeypatch.setattr(notices, "_warned", set())
    q, rows = Q.double(), ROWS.double()
    with pytest.warns(UserWarning, match=r"computed by impl='reference'.*The reason: dtype float64"):
        got = decode_attention(q, rows, None, head_dim_v=64)
    assert torch.equal(got, decode_attention(q, rows, None, head_dim_v=64, impl="reference"))


def test_a_row_that_requires_a_gradient_is_refused_by_name():
    with pytest.raises(RuntimeError, match="k_cache: expected a tensor that requires no gradient"):
        decode_attention(Q, ROWS.clone().requires_grad_(), None, head_dim_v=64)


# ---- Gradients: attention on latents ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "values"), [(576, 512), (96, 64), (40, 40)])
@pytest.mark.parametrize("options", [{}, {"window": (20, 0)}, {"is_causal": False}], ids=str)
def test_gradients_of_queries_and_latents(width, values, options):
    """A row is a key and, in its first columns, a value: its gradient is the sum of both."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 37, 4, width), (2, 37, 1, width), (2, 37, 4, values))
    q, rows, dout = (torch.randn(shape, generator=generator) for shape in shapes)
    options = {"is_causal": True, **options, "scale": width**-0.5}

    def gradients(dtype, **more):
        leaves = [x.to(dtype).requires_grad_() for x in (q, rows)]
        out = attention(*leaves, leaves[1][..., :values], **options, **more)
        return out, *torch.autograd.grad(out, leaves, dout.to(dtype))

    truth = gradients(torch.float64, impl="reference")
    for dtype in (torch.float32, torch.bfloat16):
        # Eager attention, in the dtype, on rows repeated for every head.
        leaves = [x.to(dtype).requires_grad_() for x in (q, rows)]
        window = options.get("window", (None, None))
        bounds = (-1 if window[0] is None else window[0], 0 if options["is_causal"] else -1)
        eager_out, _ = numerics.eager(*leaves, leaves[1][..., :values], scale=options["scale"], window=bounds)
        eager = eager_out, *torch.autograd.grad(eager_out, leaves, dout.to(dtype))
        for name, got, other, ref in zip(
            ("out", "dq", "drows"), gradients(dtype, impl="cpu"), eager, truth, strict=True
        ):
            allowed = 2.0 * numerics.largest_error(other, ref) + numerics.tolerance_floor(dtype, ref)
            numerics.assert_within(f"{name} {dtype}", got, other, ref, allowed)


# ---- A GPU -----------------------------------------------------------------------------------------------------------

BATCH = DecodeCase(
    lengths=(300, 1, 64, 0, 5000, 129), starts=(7, 0, 40, 0, 0, 0), page_size=64, seqlen_q=2, heads_q=32, **DIMS
)
on_sm90 = [gpu_support.needs_sm90, gpu_support.on_gpu]


def _marked(test):
    for mark in on_sm90:
        test = mark(test)
    return test


@_marked
@gpu_support.half
@pytest.mark.parametrize("page_size", [0, 64])
def test_a_sequences_bits_do_not_depend_on_its_batch_nor_on_repeats(page_size, dtype):
    inputs = inputs_of(dataclasses.replace(BATCH, page_size=page_size), dtype, "cuda")
    together = decode_attention(**inputs.tensors, num_splits=1, return_lse=True, impl="sm90")
    names = ["q", "cache_seqlens", "kv_start", "block_table" if page_size else "k_cache"]
    for b in range(len(BATCH.lengths)):
        alone = {**inputs.tensors, **{name: inputs.tensors[name][b : b + 1] for name in names}}
        for got, expected in zip(
            decode_attention(**alone, num_splits=1, return_lse=True, impl="sm90"), together, strict=True
        ):
            assert torch.equal(got[0], expected[b])
    first, *others = (decode_attention(**inputs.tensors, impl="sm90") for _ in range(20))
    assert all(torch.equal(first, other) for other in others)


@_marked
def test_a_cuda_graph_follows_lengths_starts_and_tables():
    cases = [
        dataclasses.replace(BATCH, capacity=5120),
        dataclasses.replace(BATCH, capacity=5120, lengths=(1, 5000, 0, 77, 3, 512), starts=(0, 100, 0, 0, 2, 1)),
    ]
    both = [inputs_of(case, torch.bfloat16, "cuda", seed) for seed, case in enumerate(cases)]
    static = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in both[0].tensors.items()}
    for num_splits in (0, 1):
        graph, out = gpu_support.captured(lambda n=num_splits: decode_attention(**static, num_splits=n, impl="sm90"))
        for inputs in (both[1], both[0], both[1]):
            for name, x in inputs.tensors.items():
                if isinstance(x, torch.Tensor):
                    static[name].copy_(x)
            graph.replay()
            assert torch.equal(out, decode_attention(**inputs.tensors, num_splits=num_splits, impl="sm90"))


@_marked
def test_a_call_waits_for_nothing_and_runs_on_the_current_stream():
    inputs = inputs_of(BATCH, torch.bfloat16, "cuda")
    expected = decode_attention(**inputs.tensors, impl="sm90")
    later = {**inputs.tensors, "q": torch.zeros_like(inputs.q)}
    got = gpu_support.run_behind_other_work(
        lambda: later["q"].copy_(inputs.q), lambda: decode_attention(**later, impl="sm90")
    )
    assert torch.equal(got, expected)


@_marked
def test_a_million_keys():
    """The same page again and again weighs as one."""
    case = DecodeCase(lengths=(64,), page_size=64, heads_q=16, **DIMS)
    inputs = inputs_of(case, torch.bfloat16, "cuda")
    tensors = {**inputs.tensors, "block_table": inputs.block_table.repeat(1, 2**14), "cache_seqlens": None}
    out, lse = decode_attention(**tensors, return_lse=True, impl="sm90")
    expected, expected_lse = decode_cases.truth(dataclasses.replace(case, page_size=0), inputs)
    numerics.assert_within("out", out, out, expected, 4 * torch.finfo(torch.bfloat16).eps)
    numerics.assert_within("lse", lse, lse, expected_lse + math.log(2**14), 1e-4)


@_marked
@pytest.mark.parametrize("dims", [(576, 512), (288, 256), (320, 256), (576, 256), (264, 8), (304, 296)], ids=str)
@pytest.mark.parametrize("heads_kv", [1, 2])
def test_narrower_latents_and_several_kv_heads(dims, heads_kv):
    for page_size, heads_q in ((0, 16), (48, 10), (80, 128)):
        case = DecodeCase(
            lengths=(700, 0, 33), seqlen_q=3, page_size=page_size, heads_q=heads_q * heads_kv, heads_kv=heads_kv,
            head_dim_qk=dims[0], head_dim_v=dims[1], is_latent=True,
        )  # fmt: skip
        for dtype in gpu_support.HALF:
            check("sm90", case, dtype)


@_marked
def test_many_shares_and_many_rows():
    """Tiles that begin in one CTA and end in others, whole ones, and four tiles of query rows for a sequence."""
    for lengths, heads_q, seqlen_q in (
        ((40, 100, 65, 130) * 36, 16, 1),
        ((70,) * 260, 64, 1),
        ((9000, 3), 128, 4),
        ((20_000,), 16, 1),
    ):
        for num_splits in (0, 1):
            case = DecodeCase(lengths=lengths, heads_q=heads_q, seqlen_q=seqlen_q, num_splits=num_splits, **DIMS)
            check("sm90", case, torch.bfloat16)


@_marked
def test_one_call_a_thousand_times_ends():
    """Two warpgroups hand each block's P over; who is late must not wait for ever."""
    inputs = inputs_of(BATCH, torch.bfloat16, "cuda")
    outs = [decode_attention(**inputs.tensors, impl="sm90") for _ in range(1000)]
    torch.cuda.synchronize()
    assert all(torch.equal(outs[0], out) for out in outs[1:])
