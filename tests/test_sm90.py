"""The Hopper forward: every kernel beside float64, properties that results must have, and calls in which nothing is attended to.

    python3 -m pytest tests/test_sm90*.py                                  # about two and a half minutes on an H100

The backward is in tests/test_sm90_backward*.py. tests/test_gpu.py has the promises of every GPU implementation,
tests/test_fuzz.py random calls by the thousand.
"""

from __future__ import annotations

import math
from dataclasses import replace

import gpu_support
import pytest
import torch
from cases import SM90_ROWS, Case, calls, without_pairs
from gpu_support import DEVICE, IMPL, WIDTHS, cu, half, needs_sm90, rows
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from sm90_support import check, run, tensors

from flashmla_hf import attention

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
def test_memory_beside_the_tensors_changes_no_result(row):
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
@pytest.mark.parametrize("dims", WIDTHS, ids=lambda dims: f"{dims[0]}/{dims[1]}")
def test_a_crowd_of_short_documents_gives_the_same_bits(dims):
    """Short tiles one after the other, of which some see a K/V tile less than their neighbours: two CTAs that share one, and
    were two steps apart, overwrote what the other was reading in one of 50 calls (docs/log.md, 2026-11-28)."""
    case = Case(
        seqlens_q=(221, 134, 447, 307), rest_kv=5, heads_q=21, heads_kv=3, head_dim_qk=dims[0], head_dim_v=dims[1],
        is_causal=True, softcap=1.5, magnitude=4.0, layout="sliced",
    )  # fmt: skip
    inputs = case.inputs(torch.bfloat16, DEVICE)
    longest = {"max_seqlen_q": 447, "max_seqlen_kv": 447}  # heads are packed by it
    first, _ = run(inputs, case, **longest)
    for _ in range(150):
        assert torch.equal(run(inputs, case, **longest)[0], first)
    check(case, torch.bfloat16)


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
def test_a_packed_batch_equals_the_dense_batch(case, dtype):
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
def test_two_parts_of_the_keys_joined_by_their_lse_equal_the_whole(case, dtype, cut):
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
def test_a_row_of_a_window_equals_its_visible_keys_alone(case, dtype):
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


# ---- Empty calls -----------------------------------------------------------------------------------------------------


@needs_sm90
@half
@pytest.mark.parametrize("has_sinks", [False, True])
def test_calls_without_keys_give_zero_output_and_the_sink_as_lse(has_sinks, dtype):
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
