"""The compiled CPU kernel at operator level: instruction sets, determinism, memory, skipped gradients, layouts.

The public API's promises are tested elsewhere for every implementation; these are the errors that only this kernel can make.
Checks that need their own process (another instruction set, peak memory) are functions called by ``in_subprocess``.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import forked_python
import pytest
import torch
from cpu_support import DTYPES, ISAS, kernel, make_inputs, needs_cpu_library
from fresh_python import in_subprocess
from numerics import tolerance_floor

pytestmark = needs_cpu_library


def eager(q, k, v, dout, dlse, sinks, window, softcap, dtype):
    """The formulas of csrc/params.h in plain PyTorch: matrix products in ``dtype``, softmax at least in float32."""
    q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
    statistics = torch.promote_types(dtype, torch.float32)
    sinks = None if sinks is None else sinks.to(statistics).requires_grad_()
    group = q.shape[2] // k.shape[2]
    keys, values = (x.transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))
    scores = (q.transpose(1, 2) @ keys.transpose(-1, -2)).to(statistics) * q.shape[-1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    seqlen_q, seqlen_kv = scores.shape[-2:]
    position = torch.arange(seqlen_q)[:, None] + seqlen_kv - seqlen_q
    key = torch.arange(seqlen_kv)
    hidden = torch.zeros(seqlen_q, seqlen_kv, dtype=torch.bool)
    if window[0] >= 0:
        hidden |= key < position - window[0]
    if window[1] >= 0:
        hidden |= key > position + window[1]
    scores = scores.masked_fill(hidden, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    lse = torch.logsumexp(scores, -1)
    dead = lse == -math.inf
    probabilities = torch.exp(scores - lse.masked_fill(dead, 0.0)[..., None])[..., :seqlen_kv]
    out = (probabilities.to(dtype) @ values).transpose(1, 2)
    loss = (out * dout.to(dtype)).sum() + (lse.masked_fill(dead, 0.0) * dlse).sum()
    wanted = (q, k, v) if sinks is None else (q, k, v, sinks)
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, wanted)]


def assert_as_exact_as_eager(q, k, v, dout, dlse, sinks, window=(-1, -1), softcap=0.0):
    got = kernel(q, k, v, dout, dlse, sinks, window=window, softcap=softcap)
    exact = eager(q, k, v, dout, dlse, sinks, window, softcap, torch.float64)
    usual = eager(q, k, v, dout, dlse, sinks, window, softcap, q.dtype)
    for name, x, y, z in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), got, exact, usual, strict=False):
        dead = y == -math.inf
        assert torch.equal(x == -math.inf, dead), name
        error = (x.double() - y).masked_fill(dead, 0.0).abs().max().item()
        allowed = 2 * (z.double() - y).masked_fill(dead, 0.0).abs().max().item()
        floor = tolerance_floor(q.dtype, y)
        assert error <= allowed + floor, f"{name} {q.dtype}: error {error:.2e}, allowed {allowed:.2e} + {floor:.1e}"


# batch, seqlen_q, seqlen_kv, heads_q, heads_kv, head_dim_qk, head_dim_v, window
SHAPES = (
    (2, 100, 100, 4, 2, 64, 64, (-1, -1)),
    (1, 257, 257, 2, 1, 128, 128, (-1, 0)),  # ragged against every tile size
    (1, 37, 300, 6, 2, 80, 48, (-1, 0)),  # fewer queries than keys: bottom-right aligned
    (1, 300, 37, 3, 3, 40, 24, (-1, 0)),  # more: the first rows see nothing
    (1, 130, 500, 2, 2, 32, 32, (100, 20)),
    (1, 300, 300, 1, 1, 64, 64, (0, 0)),  # every query sees its own key only
    (1, 1, 1000, 8, 1, 64, 64, (-1, 0)),  # decoding
    (2, 2, 333, 4, 2, 72, 40, (-1, 0)),  # four rows: K and V are not packed
    (1, 70, 70, 2, 1, 576, 512, (-1, 0)),
    (2, 33, 33, 2, 2, 3, 5, (-1, -1)),
    (1, 600, 600, 1, 1, 16, 16, (-1, 0)),  # several chunks of keys add to one dq
)


def check_against_float64():
    for index, (*shape, window) in enumerate(SHAPES):
        for turn, dtype in enumerate(DTYPES, start=index):  # sinks and softcap take turns
            q, k, v, dout, dlse, sinks = make_inputs(*shape, dtype, seed=index)
            assert_as_exact_as_eager(
                q, k, v, dout, dlse, (sinks, None)[turn % 2], window, softcap=(0.0, 0.0, 2.0)[turn % 3]
            )
    print(torch.ops.flashmla.cpu_isa())


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_is_as_exact_as_eager(isa):
    best = torch.ops.flashmla.cpu_isa()
    if "FLASHMLA_CPU_ISA" not in os.environ and ISAS.index(isa) > ISAS.index(best):
        pytest.skip(f"this machine offers {best}")
    call, run = "check_against_float64()", forked_python.run_program
    assert in_subprocess("test_cpu_kernel", call, 300, run, FLASHMLA_CPU_ISA=isa) == isa


def test_an_unknown_instruction_set_is_an_error_at_the_first_call():
    call = "torch.ops.flashmla.cpu_isa()"
    with pytest.raises(AssertionError, match="FLASHMLA_CPU_ISA is not one of baseline, avx2, avx512, avx512_bf16, amx"):
        in_subprocess("test_cpu_kernel", call, 60, forked_python.run_program, FLASHMLA_CPU_ISA="sse9")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gain", [100.0, 1000.0])  # float16 eager overflows beyond
def test_scores_of_ten_thousand_neither_overflow_nor_lose_precision(dtype, gain):
    q, k, v, dout, dlse, sinks = make_inputs(1, 150, 290, 2, 1, 64, 64, dtype, gain=gain)
    assert_as_exact_as_eager(q, k, v, dout, dlse, None, (-1, 0))
    out, lse, *grads = kernel(q, k, v, dout, dlse, sinks * 100, window=(-1, 0))
    assert all(x.isfinite().all() for x in (out, lse, *grads))


def test_rows_whose_scores_are_all_minus_infinity_give_zero_and_minus_infinity():
    q, k, v, dout, dlse, _ = make_inputs(1, 40, 40, 1, 1, 64, 64, torch.float32)
    q[:, 7] = 0.0
    q[:, 7, :, 0] = math.inf
    k[..., 0] = -1.0
    out, lse, dq, *_ = kernel(q, k, v, dout, dlse)
    assert (out[:, 7] == 0).all()
    assert (lse[..., 7] == -math.inf).all()
    other = torch.arange(40) != 7
    assert out[:, other].isfinite().all()
    assert dq[:, other].isfinite().all()


def test_nan_reaches_the_rows_that_see_it_and_no_other():
    for dtype in DTYPES:
        q, k, v, *_ = make_inputs(1, 200, 200, 1, 1, 64, 64, dtype)
        k[0, 120, 0, 3] = math.nan
        out, lse = kernel(q, k, v, window=(-1, 0))
        assert out[:, 120:].isnan().all()
        assert lse[..., 120:].isnan().all()
        assert out[:, :120].isfinite().all()


def run_on_threads(num_threads, dtype, **options):
    q, k, v, dout, dlse, sinks = make_inputs(2, 333, 777, 4, 2, 64, 48, dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        return kernel(q, k, v, dout, dlse, sinks, **options)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (200, 0)])
def test_results_are_bitwise_the_same_for_every_number_of_threads(dtype, window):
    expected = run_on_threads(1, dtype, window=window)
    for num_threads in (1, 2, 2, 3, 7):
        for x, y in zip(run_on_threads(num_threads, dtype, window=window), expected, strict=True):
            assert torch.equal(x, y)


def test_a_row_does_not_depend_on_the_rows_beside_it():
    for dtype in DTYPES:
        q, k, v, *_ = make_inputs(1, 300, 300, 2, 1, 64, 64, dtype)
        out, lse = kernel(q, k, v)
        part, part_lse = kernel(q[:, 96:200], k, v)
        assert torch.equal(out[:, 96:200], part)
        assert torch.equal(lse[..., 96:200], part_lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("needs", [(n & 1 > 0, n & 2 > 0, n & 4 > 0, n & 8 > 0) for n in range(16)])
def test_unneeded_gradients_are_empty_and_change_no_other(dtype, needs):
    q, k, v, dout, dlse, sinks = make_inputs(1, 90, 160, 2, 1, 40, 24, dtype)
    expected = kernel(q, k, v, dout, dlse, sinks, window=(-1, 0))[2:]
    got = kernel(q, k, v, dout, dlse, sinks, window=(-1, 0), needs=needs)[2:]
    for need, x, y in zip(needs, got, expected, strict=True):
        assert torch.equal(x, y) if need else x.shape == (0,)


def test_unneeded_gradients_cost_no_time():
    q, k, v, dout, *_ = make_inputs(1, 1024, 1024, 2, 2, 64, 64, torch.float32)
    nothing, everything = (False, False, False, False), (True, True, True, False)
    dv_alone, dq_alone = (False, False, True, False), (True, False, False, False)
    seconds = dict.fromkeys((nothing, everything, dv_alone, dq_alone), math.inf)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # thread time: other processes do not count, but for the core they share
    try:
        for _ in range(20):  # in turn, the least of each: a neighbour that slows the core down comes and goes
            for needs in seconds:
                start = time.thread_time()
                kernel(q, k, v, dout, needs=needs)
                seconds[needs] = min(seconds[needs], time.thread_time() - start)
    finally:
        torch.set_num_threads(before)
    backward = {needs: least - seconds[nothing] for needs, least in seconds.items()}
    # 2 products of 5 for dv alone, 4 of 5 without dv.
    assert backward[dv_alone] < 0.65 * backward[everything]
    assert backward[dq_alone] < 0.85 * backward[everything]


def test_dlse_alone_and_expanded_gives_the_same_gradients():
    q, k, v, dout, dlse, _ = make_inputs(2, 50, 60, 2, 1, 32, 32, torch.float32)
    ones = torch.ones(()).expand_as(dlse)
    expected = kernel(q, k, v, torch.zeros_like(dout), torch.ones_like(dlse))
    for x, y in zip(kernel(q, k, v, torch.zeros_like(dout), ones), expected, strict=True):
        assert torch.equal(x, y)
    assert expected[2].abs().max() > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_with_a_contiguous_last_dimension_give_the_same_bits(dtype):
    q, k, v, dout, dlse, _ = make_inputs(2, 70, 90, 4, 2, 40, 24, dtype)
    expected = kernel(q, k, v, dout, dlse, window=(-1, 0))

    def transposed(x):  # [batch, heads, seqlen, dim] in memory
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def sliced(x):  # inside a larger tensor full of NaN, as a fused qkv projection is
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 7), math.nan, dtype=dtype)
        wide[..., 3:-4] = x
        return wide[..., 3:-4]

    for change in (transposed, sliced):
        for x, y in zip(kernel(*map(change, (q, k, v, dout)), dlse, window=(-1, 0)), expected, strict=True):
            assert torch.equal(x, y)
            assert x.is_contiguous()


def test_expanded_inputs_give_the_same_bits():
    q, k, v, dout, dlse, _ = make_inputs(1, 40, 50, 1, 1, 32, 32, torch.float32)
    sizes = ((3, 40, 4, 32), (3, 50, 2, 32), (3, 50, 2, 32), (3, 40, 4, 32))
    expanded = [x.expand(size) for x, size in zip((q, k, v, dout), sizes, strict=True)]
    dlse = dlse.expand(3, 4, 40)
    expected = kernel(*[x.contiguous() for x in expanded], dlse.contiguous())
    for x, y in zip(kernel(*expanded, dlse), expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_sequences_equal_separate_calls_bit_for_bit(dtype):
    lengths_q, lengths_kv = (17, 0, 130, 1, 64), (40, 9, 0, 129, 64)
    total_q, total_kv = sum(lengths_q) + 5, sum(lengths_kv) + 3
    *dense, _, sinks = make_inputs(1, total_q, total_kv, 4, 2, 48, 40, dtype)
    q, k, v, dout = (x[0] for x in dense)
    cu = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_kv)]
    out, lse, dq, dk, dv, dsinks = kernel(q, k, v, dout, None, sinks, window=(-1, 0), cu=cu)
    total = torch.zeros(4)
    for i in range(len(lengths_q)):
        rows_q, rows_kv = (slice(int(x[i]), int(x[i + 1])) for x in cu)
        part = kernel(
            q[None, rows_q], k[None, rows_kv], v[None, rows_kv], dout[None, rows_q], None, sinks, window=(-1, 0)
        )
        assert torch.equal(part[0][0], out[rows_q])
        assert torch.equal(part[1][0], lse[:, rows_q])
        for x, y in zip(part[2:5], (dq[rows_q], dk[rows_kv], dv[rows_kv]), strict=True):
            assert torch.equal(x[0], y)
        total += part[5]
    torch.testing.assert_close(dsinks, total, rtol=1e-5, atol=1e-5)
    for x in (out[-5:], dq[-5:], dk[-3:], dv[-3:]):
        assert (x == 0).all()
    assert (lse[:, -5:] == -math.inf).all()


@pytest.mark.parametrize(("batch", "seqlen_q", "seqlen_kv"), [(0, 4, 4), (2, 0, 4), (2, 4, 0), (0, 0, 0), (2, 0, 0)])
def test_empty_dimensions_give_empty_or_zero_results(batch, seqlen_q, seqlen_kv):
    for dtype in DTYPES:
        q, k, v, dout, dlse, sinks = make_inputs(batch, seqlen_q, seqlen_kv, 2, 1, 16, 24, dtype)
        out, lse, dq, dk, dv, dsinks = kernel(q, k, v, dout, dlse, sinks)
        assert [x.shape for x in (out, lse, dq, dk, dv)] == [x.shape for x in (dout, dlse, q, k, v)]
        assert all((x == 0).all() for x in (out, dq, dk, dv))
        if seqlen_kv == 0:  # the sink is all there is: lse = sink
            assert torch.equal(lse, sinks[None, :, None].expand_as(lse))
            torch.testing.assert_close(dsinks, dlse.sum((0, 2)))
            assert (kernel(q, k, v)[1] == -math.inf).all()


def measure_peak_of_64k_tokens(dtype_name, head_dim):
    """Prints the peak of resident memory during forward + backward, less what was before and less the results: MiB."""
    n = 65536
    q, k, v, dout = make_inputs(1, n, n, 1, 1, head_dim, head_dim, getattr(torch, dtype_name))[:4]
    small = [x[:, :64].contiguous() for x in (q, k, v, dout)]
    kernel(*small)  # threads, code and torch's lazy parts are there before the measurement

    def status(key):
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) / 1024

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    # The window spares the time, not the memory: workspaces depend on the lengths.
    results = kernel(q, k, v, dout, window=(512, 0))
    print(status("VmHWM") - before - sum(x.nbytes for x in results) / 2**20)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs")
@pytest.mark.parametrize(("dtype_name", "head_dim"), [("float32", 128), ("bfloat16", 128)])
def test_temporaries_of_64k_tokens_stay_under_200_mib(dtype_name, head_dim):
    temporaries = float(
        in_subprocess("test_cpu_kernel", f"measure_peak_of_64k_tokens({dtype_name!r}, {head_dim})", 300)
    )
    assert temporaries < 200
    if dtype_name == "bfloat16":
        assert temporaries > 20  # dq in fp32 takes 32: the measurement sees something
