"""What only the Hopper kernel can get wrong: its refusals, copies, padding, addresses, streams, graphs and boundaries.

    python3 -m pytest tests/test_sm90.py                       # about a minute and a half on an H100
    python3 -m pytest tests/test_sm90.py -k "not elements"     # without the tests that want 20 GB

The backward has a file of its own, tests/test_sm90_backward.py. What every GPU implementation promises is in tests/test_gpu.py; random calls by the thousand are in tests/test_fuzz.py.
Checks that may end their process are functions called by ``in_subprocess``.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gpu_support
import numerics
import pytest
import sanitize_gpu
import torch
from cases import SM90_ROWS, Case, calls, without_pairs
from counting import counted_calls
from gpu_support import DEVICE, IMPL, WIDTHS, cu, exact, half, needs_memory, needs_sm90, offset_by, rows
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from flashmla_hf import attention, libraries

TESTS = Path(__file__).parent


def check(case, dtype=torch.bfloat16, **options):
    return numerics.check(IMPL, case, dtype, DEVICE, **options)


def tensors(seqlen_q=100, seqlen_kv=None, head_dim=64, dtype=torch.bfloat16, device=None, heads=(4, 2), batch=2):
    """q, k, v of one dense call."""
    case = Case(
        batch=batch, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, heads_q=heads[0], heads_kv=heads[1], head_dim_qk=head_dim
    )
    inputs = case.inputs(dtype, device or DEVICE)
    return {"q": inputs.q, "k": inputs.k, "v": inputs.v}


def operator(q, k, v, cu_seqlens_q=None, cu_seqlens_kv=None, **changes):
    """The operator itself, past dispatch."""
    options = {
        "sinks": None, "max_seqlen_q": q.shape[-3], "max_seqlen_kv": k.shape[-3], "scale": 0.125, "window_left": -1,
        "window_right": -1, "softcap": 0.0, "deterministic": False,
    }  # fmt: skip
    return torch.ops.flashmla.flash_attn_forward(
        q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_kv, **(options | changes)
    )


# ---- Every kernel ----------------------------------------------------------------------------------------------------


@needs_sm90
@half
@pytest.mark.parametrize("dims", WIDTHS, ids=lambda dims: f"{dims[0]}/{dims[1]}")
def test_every_head_dim_equals_the_reference_under_every_mask(dims, dtype):
    shape = {"batch": 2, "heads_q": 4, "heads_kv": 2, "head_dim_qk": dims[0], "head_dim_v": dims[1]}
    for mask in ({}, {"is_causal": True}, {"window": (70, 5)}, {"window": (None, 9)}, {"window": (130, None)}):
        check(Case(seqlen_q=200, seqlen_kv=333, **shape, **mask), dtype)


@needs_sm90
@rows
def test_what_lies_beside_the_tensors_has_no_say(row):
    """Head dims below a row are padded by the copy engine: with neighbours in memory that are NaN nothing may change."""
    narrow = (row[0] - 8, row[1] - 8)
    case = Case(batch=2, seqlen_q=150, heads_q=4, heads_kv=2, head_dim_qk=narrow[0], head_dim_v=narrow[1])
    plain = case.inputs(torch.bfloat16, DEVICE)
    beside = replace(case, layout="sliced").inputs(torch.bfloat16, DEVICE)  # the same values between NaNs
    assert not beside.q.is_contiguous()
    for mask in ({}, {"is_causal": True}, {"window": (20, 0)}):
        results = [attention(x.q, x.k, x.v, impl=IMPL, return_lse=True, **mask) for x in (plain, beside)]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_sm90
@rows
@half
def test_repeating_a_forward_gives_the_same_bits_in_every_kernel(row, dtype):
    inputs = Case(batch=2, seqlen_q=500, seqlen_kv=700, heads_q=6, heads_kv=2, head_dim_qk=row[0], head_dim_v=row[1]).inputs(dtype, DEVICE)  # fmt: skip
    for mask in ({}, {"is_causal": True}, {"window": (100, 0)}):
        first = attention(inputs.q, inputs.k, inputs.v, return_lse=True, impl=IMPL, **mask)
        for _ in range(5):
            again = attention(inputs.q, inputs.k, inputs.v, return_lse=True, impl=IMPL, **mask)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@needs_sm90
@pytest.mark.parametrize("magnitude", [10.0, 100.0])
@half
def test_outliers_keep_the_error_rule(magnitude, dtype):
    check(Case(seqlen_q=500, heads_q=4, is_causal=True, outliers=magnitude, head_dim_qk=128), dtype)


@needs_sm90
def test_scores_of_any_size_give_finite_results():
    """Scores up to 1e7, where softmax is the largest key alone, and all equal: no overflow on the way through exp2."""
    q, k, v = tensors(seqlen_q=200).values()
    for scale in (1e-30, 1e4, -1e4, 1e6):
        out, lse = attention(q, k, v, scale=scale, is_causal=True, return_lse=True, impl=IMPL)
        assert out.isfinite().all()
        assert lse.isfinite().all()
    flat = attention(q, k, v, scale=0.0, impl=IMPL)  # the mean of V
    mean = v.double().mean(1, keepdim=True).repeat_interleave(2, dim=2).expand(flat.shape)
    assert (flat.double() - mean).abs().max() < 4e-3


# ---- Properties ------------------------------------------------------------------------------------------------------

small = settings(max_examples=25, derandomize=True, suppress_health_check=list(HealthCheck))
space = {"rows": SM90_ROWS, "max_seqlen": 300, "max_scores": 2**21}
dense = calls(**space, is_packed=False)


def run(inputs, case, **changes):
    """(out, lse) of the case on these inputs, with arguments of ``attention`` changed."""
    arguments = {
        "q": inputs.q, "k": inputs.k, "v": inputs.v, "sinks": inputs.sinks, "cu_seqlens_q": inputs.cu_seqlens_q,
        "cu_seqlens_kv": inputs.cu_seqlens_kv, **case.options,
    }  # fmt: skip
    return attention(**(arguments | changes), return_lse=True, impl=IMPL)


def assert_same(got, expected, v):
    """Two ways to compute one thing: apart by what rounding P and the result may cost."""
    (out, lse), (expected_out, expected_lse) = got, expected
    allowed = 3 * torch.finfo(out.dtype).eps * max(1.0, float(v.abs().max()) if v.numel() else 1.0)
    torch.testing.assert_close(out.double(), expected_out.double(), rtol=0, atol=allowed)
    torch.testing.assert_close(lse, expected_lse, rtol=2e-5, atol=2e-5)


@needs_sm90
@small
@given(case=dense, dtype=st.sampled_from(gpu_support.HALF))
def test_a_kv_head_serves_its_group_as_if_it_were_repeated(case, dtype):
    inputs = case.inputs(dtype, DEVICE)
    k, v = (x.repeat_interleave(case.heads_q // case.heads_kv, dim=2) for x in (inputs.k, inputs.v))
    assert_same(run(inputs, case), run(inputs, case, k=k, v=v), v)


@needs_sm90
@small
@given(case=dense, dtype=st.sampled_from(gpu_support.HALF))
def test_a_batch_packed_is_the_batch(case, dtype):
    inputs = case.inputs(dtype, DEVICE)
    assume(case.seqlen_q > 0)
    boundaries = {
        f"cu_seqlens_{name}": cu(*(n * length for n in range(case.batch + 1)))
        for name, length in (("q", case.seqlen_q), ("kv", case.seqlen_kv))
    }
    flat = {name: getattr(inputs, name).flatten(0, 1) for name in "qkv"}
    out, lse = run(inputs, case, **flat, **boundaries)
    lse = lse.view(case.heads_q, case.batch, case.seqlen_q).transpose(0, 1)
    assert_same((out.view(case.batch, case.seqlen_q, *out.shape[1:]), lse), run(inputs, case), inputs.v)


@needs_sm90
@small
@given(case=dense, dtype=st.sampled_from(gpu_support.HALF), cut=st.floats(0.0, 1.0))
def test_two_parts_of_the_keys_joined_by_their_lse_are_the_whole(case, dtype, cut):
    assume(case.seqlen_q > 0)
    case = replace(case, window=None, is_causal=False, has_sinks=False)
    inputs = case.inputs(dtype, DEVICE)
    cut = round(cut * case.seqlen_kv)
    parts = [run(inputs, case, k=inputs.k[:, part], v=inputs.v[:, part]) for part in (slice(cut), slice(cut, None))]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    weights = [(part_lse - lse).nan_to_num(0.0).exp().transpose(1, 2)[..., None] for _, part_lse in parts]
    out = sum(weight * part_out.float() for weight, (part_out, _) in zip(weights, parts, strict=True))
    assert_same((out.to(dtype), lse), run(inputs, case), inputs.v)


@needs_sm90
@small
@given(case=dense, dtype=st.sampled_from(gpu_support.HALF), seed=st.integers(0, 99))
def test_the_order_of_keys_does_not_matter_without_a_mask(case, dtype, seed):
    case = replace(case, window=None, is_causal=False)
    inputs = case.inputs(dtype, DEVICE, seed)
    order = torch.randperm(case.seqlen_kv, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    assert_same(run(inputs, case, k=inputs.k[:, order], v=inputs.v[:, order]), run(inputs, case), inputs.v)


@needs_sm90
@small
@given(case=dense, dtype=st.sampled_from(gpu_support.HALF))
def test_a_window_is_what_it_says_key_by_key(case, dtype):
    """The visible keys of one row, alone and unmasked, give that row."""
    assume(case.seqlen_q > 0 and case.seqlen_kv > 0)
    inputs = case.inputs(dtype, DEVICE)
    out, lse = run(inputs, case)
    left, right = (-1 if bound is None else bound for bound in case.window or (None, None))
    right = 0 if case.is_causal else right
    for row in {0, case.seqlen_q // 2, case.seqlen_q - 1}:
        position = row + case.seqlen_kv - case.seqlen_q
        first = max(0, position - left) if left >= 0 else 0
        last = min(case.seqlen_kv, position + right + 1) if right >= 0 else case.seqlen_kv
        keys = slice(first, max(first, last))
        alone = run(
            inputs, case, q=inputs.q[:, row : row + 1], k=inputs.k[:, keys], v=inputs.v[:, keys], window=None,
            is_causal=False,
        )  # fmt: skip
        assert_same((out[:, row : row + 1], lse[:, :, row : row + 1]), alone, inputs.v)


@needs_sm90
def test_the_comparison_of_the_properties_can_fail():
    case = Case(seqlen_q=200, is_causal=True)
    inputs = case.inputs(torch.bfloat16, DEVICE)
    for wrong in ({"window": (150, 0)}, {"scale": 0.13}, {"softcap": 8.0}, {"v": inputs.v.roll(1, dims=1)}):
        with pytest.raises(AssertionError):
            assert_same(run(inputs, case, **wrong), run(inputs, case), inputs.v)


# ---- Empty things ----------------------------------------------------------------------------------------------------


@needs_sm90
@half
@pytest.mark.parametrize("has_sinks", [False, True])
def test_nothing_to_attend_to_gives_zeros_and_the_sink(has_sinks, dtype):
    for case in without_pairs(heads_q=4, heads_kv=2, has_sinks=has_sinks):
        for mask in ({}, {"is_causal": True}, {"window": (3, 3)}):
            inputs = case.inputs(dtype, DEVICE)
            out, lse = run(inputs, case, **mask)
            assert (out == 0).all()
            in_sequences = sum(case.seqlens_q) if case.is_packed else case.seqlen_q
            alone = inputs.sinks if has_sinks else torch.full((4,), -math.inf, device=DEVICE)
            assert (lse[..., :in_sequences] == alone[:, None]).all()
            assert (lse[..., in_sequences:] == -math.inf).all()


@needs_sm90
def test_rows_after_the_last_sequence_get_zero_and_minus_infinity():
    case = Case(seqlens_q=(70, 0, 61), seqlens_kv=(70, 5, 90), rest_q=300, rest_kv=200, heads_q=4, heads_kv=1)
    inputs = case.inputs(torch.bfloat16, DEVICE)
    # Not NaN: README's limits say why. A weight other than 0 would show all the same.
    inputs.q[131:], inputs.k[165:], inputs.v[165:] = math.nan, 1e4, 1e30
    for mask in ({}, {"is_causal": True}, {"window": (5, 5)}):
        out, lse = run(inputs, case, **mask)
        assert (out[131:] == 0).all()
        assert (lse[:, 131:] == -math.inf).all()
        assert out.abs().max() < 100, "rows of no sequence reach those of a sequence"
    assert (out[:131] != 0).any()


@needs_sm90
@pytest.mark.parametrize("place", [0, 150, 300])
def test_one_sequence_among_three_hundred_empty_ones(place):
    lengths = (0,) * place + (201,) + (0,) * (300 - place)
    check(Case(seqlens_q=lengths, heads_q=4, heads_kv=2, is_causal=True, rest_q=3))


@needs_sm90
def test_empty_sequences_cost_next_to_nothing():
    """20,000 of them, with a generous bound on the lengths: 0.1 s is a hundred times what they need."""
    q, k, v = (x.flatten(0, 1) for x in tensors(seqlen_q=100).values())
    boundaries = torch.zeros(20_001, dtype=torch.int32, device=DEVICE)
    boundaries[-1] = 200
    options = {"cu_seqlens_q": boundaries, "cu_seqlens_kv": boundaries, "is_causal": True, "impl": IMPL}
    out = attention(q, k, v, **options)
    expected = attention(q, k, v, **options | {"cu_seqlens_q": cu(0, 200), "cu_seqlens_kv": cu(0, 200)})
    torch.testing.assert_close(out, expected, rtol=0, atol=0.02)
    if DEVICE == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        attention(q, k, v, **options)
        end.record()
        end.synchronize()
        assert start.elapsed_time(end) < 100


# ---- Refusals --------------------------------------------------------------------------------------------------------

# name -> (arguments of attention on this device, pattern of the reason)
REFUSED = {
    "float32": (lambda: tensors(dtype=torch.float32), r"dtype float32: expected float16 or bfloat16"),
    "float64": (lambda: tensors(dtype=torch.float64), r"dtype float64: expected float16 or bfloat16"),
    "attn_mask": (
        lambda: {**tensors(), "attn_mask": torch.ones(100, 100, dtype=torch.bool, device=DEVICE)},
        r"attn_mask is given: expected none \(impl='sdpa' and impl='reference' take one\)",
    ),
    "dropout": (
        lambda: {**tensors(), "dropout_p": 0.1},
        r"dropout_p=0\.1: expected 0 \(impl='sdpa' and impl='reference' compute dropout\)",
    ),
    "a head dim beyond 256": (lambda: tensors(head_dim=264), r"264.*256|256.*264"),
    "a head dim beyond 256 that is no multiple of 8 either": (lambda: tensors(head_dim=260), r"260.*256|256.*260"),
    "a head dim that is no multiple of 8": (lambda: tensors(head_dim=44), r"44.*8|8.*44"),
    "a value head dim that is no multiple of 8": (
        lambda: {**tensors(), "v": tensors(head_dim=44)["v"]},
        r"44.*8|8.*44",
    ),
    "tensors on the CPU": (lambda: tensors(device="cpu"), r"the tensors are on cpu: expected a Hopper GPU"),
}


@needs_sm90
@pytest.mark.skipif(DEVICE == "cpu", reason="the words of sm90")
@pytest.mark.parametrize("name", REFUSED)
def test_what_sm90_does_not_compute_is_refused_with_the_reason(name):
    arguments, pattern = REFUSED[name]
    arguments = arguments()
    prefix = re.escape("flashmla attention: impl='sm90' cannot compute this call: ")
    with pytest.raises(RuntimeError, match=f"^{prefix}.*(?:{pattern})"):
        attention(**arguments, impl="sm90")


@needs_sm90
@pytest.mark.skipif(DEVICE == "cpu", reason="the choice on a GPU")
@pytest.mark.parametrize("name", [name for name in REFUSED if "head dim" in name or name == "float32"])
def test_what_sm90_does_not_compute_is_left_to_flex_by_the_automatic_choice(name):
    with counted_calls(stub=("flex",)) as chosen:
        attention(**REFUSED[name][0]())
        attention(**tensors())
    assert chosen == {"flex": 1, "sm90": 1}


# ---- Alignment -------------------------------------------------------------------------------------------------------


def with_heads_apart(x, stride):
    """x with ``stride`` elements from one head to the next."""
    wide = x.new_zeros(*x.shape[:-1], stride)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


MISALIGNED = {
    "pointer": lambda x: offset_by(x, 1),
    "pointer by eight bytes": lambda x: offset_by(x, 4),
    "stride of heads": lambda x: with_heads_apart(x, 68),
    "stride of rows": lambda x: with_heads_apart(x.flatten(2), x[0, 0].numel() + 4).unflatten(2, x.shape[2:]),
    "stride of the batch": lambda x: with_heads_apart(x.flatten(1), x[0].numel() + 2).unflatten(1, x.shape[1:]),
}
by_tensor = pytest.mark.parametrize("name", ["q", "k", "v"])


@needs_sm90
@by_tensor
@pytest.mark.parametrize("kind", MISALIGNED)
def test_a_misaligned_tensor_is_copied_by_the_automatic_choice_and_refused_by_name_elsewhere(kind, name):
    arguments = tensors()
    expected = attention(**arguments, is_causal=True, impl=IMPL)
    aligned = arguments[name]
    arguments[name] = MISALIGNED[kind](aligned)
    assert torch.equal(arguments[name], aligned)
    with counted_calls() as chosen:
        assert torch.equal(attention(**arguments, is_causal=True), expected)
    assert chosen == {IMPL: 1}
    if DEVICE == "cuda":
        with pytest.raises(RuntimeError, match=rf"impl='sm90' cannot compute this call: .*\b{name}\b"):
            attention(**arguments, is_causal=True, impl="sm90")
        with pytest.raises(RuntimeError, match=rf"flash_attn_forward: {name}: expected .*, got "):
            operator(**arguments)


@needs_sm90
@by_tensor
def test_a_tensor_of_stride_zero_is_never_read_wrongly(name):
    """Expanded over the batch and over the heads: computed, or refused by name; copied by the automatic choice."""
    for dim in (0, 2):
        arguments = tensors()
        arguments[name] = arguments[name].narrow(dim, 0, 1).expand(arguments[name].shape)
        assert arguments[name].stride(dim) == 0
        written_out = {**arguments, name: arguments[name].contiguous()}
        expected = attention(**written_out, is_causal=True, impl=IMPL)
        assert torch.equal(attention(**arguments, is_causal=True), expected)
        try:
            got = attention(**arguments, is_causal=True, impl=IMPL)
        except RuntimeError as error:
            got, reason = None, str(error)
        if got is None:
            assert re.search(rf"cannot compute this call: .*\b{name}\b", reason)
        else:
            assert torch.equal(got, expected)


@needs_sm90
@by_tensor
def test_strides_of_dimensions_of_one_element_do_not_matter(name):
    arguments = tensors(batch=1, seqlen_q=1, seqlen_kv=1, heads=(1, 1))
    expected = attention(**arguments, impl=IMPL)
    for strides in ((3, 5, 7, 1), (0, 0, 0, 1), (1, 1, 1, 1), (2**40 + 1, 2**40 + 1, 2**40 + 1, 1)):
        view = torch.as_strided(arguments[name], arguments[name].shape, strides)
        assert torch.equal(attention(**{**arguments, name: view}, impl=IMPL), expected)


@needs_sm90
@pytest.mark.skipif(DEVICE == "cpu", reason="the words of sm90")
def test_the_operator_names_the_argument_it_does_not_take():
    good = tensors()
    wrong = {
        "q": ({"q": good["q"].float(), "k": good["k"].float(), "v": good["v"].float()}, "float16 or bfloat16.*float32"),
        "k": ({"k": good["k"].half()}, "dtype bfloat16.*float16"),
        "v": ({"v": good["v"][:, :50]}, "shape"),
        "cu_seqlens_kv": ({"cu_seqlens_q": cu(0, 5)}, "None"),
    }
    for name, (change, words) in wrong.items():
        with pytest.raises(RuntimeError, match=rf"flash_attn_forward: {name}: expected .*{words}"):
            operator(**{**good, **change})
    with pytest.raises(RuntimeError, match=r"flash_attn_forward: (q|head_dim).*: expected .*got.*264"):
        operator(**tensors(head_dim=264))
    on_cpu = {"k": good["k"].cpu()}
    with pytest.raises((RuntimeError, NotImplementedError), match="device"):
        operator(**{**good, **on_cpu})


# ---- Addresses beyond 2^31 elements ----------------------------------------------------------------------------------


def assert_near(got, expected):
    (out, lse), (expected_out, expected_lse) = got, expected
    largest = float(expected_out.abs().max())
    assert float((out.double() - expected_out).abs().max()) <= 0.02 * largest, f"largest value {largest:.2e}"
    assert float((lse.double() - expected_lse).abs().max()) <= 1e-3


ROWS_OF_2_31 = 2**31 // (8 * 128)  # of [rows, 8 heads, 128]


@needs_sm90
@pytest.mark.skipif(DEVICE == "cpu", reason="wants a GPU's memory")
def test_keys_beyond_2_31_elements_are_found():
    needs_memory(20)
    rows_kv = ROWS_OF_2_31 + 3001
    generator = torch.Generator(DEVICE).manual_seed(0)
    k, v = (
        torch.empty(1, rows_kv, 8, 128, dtype=torch.bfloat16, device=DEVICE).normal_(generator=generator)
        for _ in range(2)
    )
    assert k.numel() > 2**31
    q = torch.randn(1, 70, 16, 128, generator=generator, device=DEVICE).bfloat16()
    # One key of each kv head, past the edge, stands out for one query: whoever misses it is far off.
    k[0, rows_kv - 9] = q[0, 3, ::2] * 2.0
    got = attention(q, k, v, return_lse=True, impl=IMPL)
    expected = exact(q, k, v, 128**-0.5)
    for part in (slice(0, 3), slice(3, 4), slice(4, 70)):  # each beside its own largest value
        assert_near(*((out[:, part], lse[:, :, part]) for out, lse in (got, expected)))
    assert float((expected[0][0, 3, 0] - v[0, rows_kv - 9, 0].double()).abs().max()) < 1.0
    # Few keys, all of them past the edge.
    window = {"window": (1500, 0), "return_lse": True, "impl": IMPL}
    first = rows_kv - 1571
    assert_near(
        attention(q, k, v, **window),
        (lambda out, lse: (out.double(), lse.double()))(
            *attention(q, k[:, first:].clone(), v[:, first:].clone(), **window)
        ),
    )
    last = slice(69, 70)
    assert_near(
        [x[:, last] if x.dim() == 4 else x[:, :, last] for x in attention(q, k, v, **window)],
        exact(q[:, last], k, v, 128**-0.5, first_key=rows_kv - 1501),
    )


@needs_sm90
@pytest.mark.skipif(DEVICE == "cpu", reason="wants a GPU's memory")
def test_queries_and_outputs_beyond_2_31_elements_are_found():
    needs_memory(20)
    rows_q = ROWS_OF_2_31 + 1001
    q = torch.empty(1, rows_q, 8, 128, dtype=torch.bfloat16, device=DEVICE).normal_()
    arguments = tensors(batch=1, seqlen_q=65, head_dim=128, heads=(8, 2))
    out, lse = attention(q, arguments["k"], arguments["v"], return_lse=True, impl=IMPL)
    assert out.numel() > 2**31
    for part in (slice(0, 100), slice(ROWS_OF_2_31 - 50, ROWS_OF_2_31 + 50), slice(rows_q - 100, rows_q)):
        expected = exact(q[:, part], arguments["k"], arguments["v"], 128**-0.5)
        assert_near((out[:, part], lse[:, :, part]), expected)


@needs_sm90
@pytest.mark.skipif(DEVICE == "cpu", reason="wants a GPU's memory")
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "rows", "heads"])
def test_strides_beyond_2_31_elements_reach_the_right_place(dim):
    needs_memory(12)
    base = torch.zeros(2**31 + 2**20, dtype=torch.bfloat16, device=DEVICE)
    strides = [64 * 9, 64 * 3, 64, 1]  # [batch 2, rows 3, heads 2, dim 64], then one dimension far apart
    shape = [2, 3, 2, 64]
    shape[dim] = 2
    strides[dim] = 2**31
    values = torch.randn(shape, device=DEVICE).bfloat16()
    far = base.as_strided(shape, strides)
    far.copy_(values)
    assert torch.equal(far, values), "the view overlaps itself"
    small_q, small_k, small_v = (x[: shape[0]] for x in tensors(seqlen_q=shape[1], head_dim=64, heads=(2, 2)).values())
    small_q = small_q[:, :, : shape[2]]
    for arguments in ((far, small_k, small_v), (small_q, far, values), (small_q, values, far)):
        near = [x.contiguous() for x in arguments]
        assert torch.equal(attention(*arguments, impl=IMPL), attention(*near, impl=IMPL))


# ---- Boundaries that are wrong ---------------------------------------------------------------------------------------


def in_subprocess(call):
    """Run ``test_sm90.<call>`` in a fresh Python; its standard output. Fails with its standard error."""
    result = subprocess.run(
        [sys.executable, "-c", f"import test_sm90 as t; t.{call}"],
        env=os.environ | {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout.strip()


def survive(values):
    """Calls with these boundaries, which promise nothing but that they end, and that the process and the tensors beside
    survive."""
    rows_q, wrong = 100, cu(*values)
    right = cu(0, 40, rows_q)
    for dims in ((64, 64), (128, 128), (192, 128), (256, 256)):
        case = Case(heads_q=2, heads_kv=1, head_dim_qk=dims[0], head_dim_v=dims[1], seqlens_q=(40, 60))
        inputs = case.inputs(torch.bfloat16, DEVICE)
        before = attention(inputs.q, inputs.k, inputs.v, cu_seqlens_q=right, cu_seqlens_kv=right, impl=IMPL)
        kept = [x.clone() for x in (inputs.q, inputs.k, inputs.v, before)]
        leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        for boundaries in ((wrong, right), (right, wrong), (wrong, wrong)):
            for mask in ({}, {"is_causal": True}, {"window": (9, 9)}):
                for bound in (None, 7, 10**6):
                    try:
                        out = attention(
                            *leaves, cu_seqlens_q=boundaries[0], cu_seqlens_kv=boundaries[1], max_seqlen_q=bound,
                            max_seqlen_kv=bound, impl=IMPL, deterministic=bound is None, **mask,
                        )  # fmt: skip
                        torch.autograd.grad(out, leaves, inputs.dout)
                    except RuntimeError as error:  # the CPU kernel reads them
                        if "seqlen" not in str(error):
                            raise
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        assert all(torch.equal(x, y) for x, y in zip((inputs.q, inputs.k, inputs.v, before), kept, strict=True))
        after = attention(inputs.q, inputs.k, inputs.v, cu_seqlens_q=right, cu_seqlens_kv=right, impl=IMPL)
        assert torch.equal(after, before)
    print("survived")


@needs_sm90
@pytest.mark.parametrize("values", sanitize_gpu.CORRUPT.values(), ids=sanitize_gpu.CORRUPT.keys())
def test_wrong_boundaries_do_not_crash_the_process(values):
    assert in_subprocess(f"survive({values!r})") == "survived"


@needs_sm90
def test_a_crash_in_the_subprocess_is_noticed():
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        in_subprocess("attention(1 / 0)")


# ---- Streams, graphs, torch.compile ----------------------------------------------------------------------------------


@needs_sm90
@pytest.mark.skipif(DEVICE == "cpu", reason="streams are a GPU's")
@rows
def test_a_call_runs_on_the_current_stream_and_waits_for_nothing(row):
    """Behind work that takes longer than the call: the call must come back before, and see what that work wrote."""
    case = Case(seqlens_q=(300, 41, 100), heads_q=4, heads_kv=2, head_dim_qk=row[0], head_dim_v=row[1], has_sinks=True)
    inputs = case.inputs(torch.bfloat16, DEVICE)
    q = torch.zeros_like(inputs.q)
    expected = run(inputs, case)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    done = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # a tenth of a second
            q.copy_(inputs.q)
            got = run(inputs, case, q=q)
            done.record()
            was_running = not done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert was_running, "the call waited for the stream"
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@needs_sm90
@pytest.mark.skipif(DEVICE == "cpu", reason="graphs are a GPU's")
@pytest.mark.parametrize("is_packed", [False, True])
@rows
def test_a_cuda_graph_of_every_kernel_replays_with_changed_inputs(row, is_packed):
    shape = {"seqlens_q": (150, 50), "seqlens_kv": (90, 110)} if is_packed else {"batch": 2, "seqlen_q": 100}
    case = Case(heads_q=4, heads_kv=2, head_dim_qk=row[0], head_dim_v=row[1], is_causal=True, has_sinks=True, **shape)
    inputs = case.inputs(torch.bfloat16, DEVICE)
    run(inputs, case)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(inputs, case)
    other = (replace(case, seqlens_q=(20, 180), seqlens_kv=(199, 1)) if is_packed else case).inputs(
        torch.bfloat16, DEVICE, seed=1
    )
    for name in ("q", "k", "v", "sinks", "cu_seqlens_q", "cu_seqlens_kv"):
        if getattr(inputs, name) is not None:
            getattr(inputs, name).copy_(getattr(other, name))
    for x in captured:
        x.fill_(math.nan)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(other, case), strict=True))


@needs_sm90
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_second_gpu_computes_and_the_current_one_stays():
    arguments = tensors(seqlen_q=300)
    expected = attention(**arguments, is_causal=True, impl="sm90")
    for device in range(torch.cuda.device_count() - 1, -1, -1):
        there = {name: x.to(f"cuda:{device}") for name, x in arguments.items()}
        got = attention(**there, is_causal=True, impl="sm90")
        assert got.device == torch.device("cuda", device)
        assert torch.equal(got.cpu(), expected.cpu())
        assert torch.cuda.current_device() == 0
    with pytest.raises(ValueError, match="k: expected device cuda:0"):
        attention(**{**arguments, "k": arguments["k"].to("cuda:1")}, impl="sm90")


@needs_sm90
@pytest.mark.parametrize("impl", [IMPL, None])
def test_torch_compile_takes_a_call_whole_with_the_same_bits(impl):
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, dynamic=True)
    with torch.no_grad(), counted_calls() as chosen:
        for seqlen in (100, 333):
            arguments = {**tensors(seqlen_q=seqlen), "sinks": torch.ones(4, device=DEVICE), "window": (50, 0)}
            got = compiled(**arguments, return_lse=True, impl=impl)
            expected = attention(**arguments, return_lse=True, impl=impl)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert set(chosen) == {IMPL}


@needs_sm90
def test_torch_compile_takes_packed_sequences_whole():
    torch._dynamo.reset()
    case = Case(seqlens_q=(70, 0, 45), rest_q=9, heads_q=4, heads_kv=2, is_causal=True)
    inputs = case.inputs(torch.bfloat16, DEVICE)
    expected = run(inputs, case)

    @torch.compile(fullgraph=True)
    def layer(q, k, v, cu_seqlens):
        return attention(
            q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, is_causal=True, return_lse=True, impl=IMPL
        )

    got = layer(inputs.q, inputs.k, inputs.v, inputs.cu_seqlens_q)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@needs_sm90
def test_opcheck():
    q, k, v = tensors(seqlen_q=70).values()
    numbers = (70, 70, 0.125, 20, 0, 0.0, False)
    torch.library.opcheck(
        torch.ops.flashmla.flash_attn_forward.default,
        (q, k, v, None, None, None, *numbers),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


# ---- The sanitizer's sweep, on every machine -------------------------------------------------------------------------


def test_the_sweep_for_the_sanitizer_is_right_on_the_cpu_and_covers_every_kernel():
    if "cpu" in libraries.unavailable:
        pytest.skip(libraries.unavailable["cpu"])
    assert sanitize_gpu.sweep("cpu") == []
    covered = {(c.sm90_row, c.mask_kind, c.is_packed) for c, _ in sanitize_gpu.sweep_cases()}
    assert len(covered) == len(SM90_ROWS) * 3 * 2
    assert {(case.sm90_row, dtype) for case, dtype in sanitize_gpu.sweep_cases()} == {
        (row, dtype) for row in SM90_ROWS for dtype in gpu_support.HALF
    }


def test_the_sweep_for_the_sanitizer_finds_wrong_results():
    if "cpu" in libraries.unavailable:
        pytest.skip(libraries.unavailable["cpu"])
    forward = torch.ops.flashmla.flash_attn_forward

    def unmasked(*arguments):
        return forward(*arguments[:9], -1, -1, *arguments[11:])

    def shifted(*arguments):
        out, lse = forward(*arguments)
        return out.roll(1, dims=-1), lse

    for wrong in (unmasked, shifted):
        assert len(sanitize_gpu.sweep("cpu", wrong)) >= 12


@needs_sm90
@pytest.mark.skipif(DEVICE == "cpu", reason="is the same test")
def test_the_sweep_for_the_sanitizer_is_right_on_this_gpu():
    result = subprocess.run([sys.executable, TESTS / "sanitize_gpu.py"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert " 0 wrong results" in result.stdout
