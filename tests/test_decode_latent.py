"""Attention to caches of latents: one row a token, whose first columns are the values. For every implementation there is.

    FLASHMLA_LATENT_CASES=20000 FLASHMLA_FUZZ_SEED=1 python3 -m pytest tests/test_decode_latent.py -k random

A GPU without a kernel for such rows skips the cases of ``sm90``.
"""

import dataclasses
import os
import random

import decode_cases
import numerics
import pytest
import torch
from decode_cases import DecodeCase, check, device_of, dtypes_of, inputs_of, int32
from torch._dynamo.testing import CompileCounter

from flashmla_hf import attention, libraries, notices
from flashmla_hf.decode import decode_attention, has_kernel, kernel_refusal

RANDOM_CASES = int(os.environ.get("FLASHMLA_LATENT_CASES", "600"))
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
    count = RANDOM_CASES // len(dtypes) // (4 if impl == "reference" else 1)
    failures = []
    for dtype in dtypes:
        source = random.Random(f"latents {impl} {dtype} {SEED}")
        for _ in range(count):
            case, seed = decode_cases.random_latent_case(source, impl), source.randint(0, 2**31)
            try:
                check(impl, case, dtype, seed)
            except (AssertionError, RuntimeError) as error:
                failures.append(f"{str(error).splitlines()[0]}\n  {decode_cases.reproducer(impl, case, dtype, seed)}")
    assert not failures, f"{len(failures)} calls break the rule:\n" + "\n".join(failures[:12])
    judged = numerics.looks - before
    assert judged.calls == count * len(dtypes)
    assert judged.second <= max(2, numerics.MOST_SECOND_LOOKS * judged.calls), judged


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


def test_a_gpus_library_without_such_a_kernel_says_so(monkeypatch):
    """As on a Hopper GPU: device_refusal is asked of tensors that claim to be there."""
    from flashmla_hf.backends import sm90

    class Properties:
        major, minor, name = 9, 0, "a Hopper GPU"

    class OnGpu:
        def __init__(self, x):
            self.x, self.device, self.dtype, self.shape = x, torch.device("cuda"), torch.bfloat16, x.shape

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(libraries, "sm90_limits", libraries.Sm90Limits(8, 256, 256))
    monkeypatch.delitem(libraries.unavailable, "sm90", raising=False)
    if sm90.device_refusal(OnGpu(torch.ones(1, 1, 1, 576)), OnGpu(torch.ones(1, 1, 1, 512)), is_decode=True) is None:
        pytest.skip("this build has the kernel")
    q, rows, values = (OnGpu(torch.ones(1, 1, 1, width)) for width in (576, 576, 512))
    reason = kernel_refusal(q, rows, values, is_latent=True)
    assert reason == (
        "q and k: head_dim 576: expected a multiple of 8 up to 256 (this build has no kernel for wider latents)"
    )
    assert not has_kernel(q, rows, values, is_latent=True)


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
