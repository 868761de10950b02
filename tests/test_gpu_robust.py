"""A GPU kernel bears scores and sinks of any size, empty calls, retained graphs, errors of others, few multiprocessors.

    python3 -m pytest tests/test_gpu_robust.py                                   # on a Hopper GPU
    FLASHMLA_SM90_TESTS_ON=cpu python3 -m pytest tests/test_gpu_robust.py        # the same promises of the CPU kernel

Float64 decides. Checks that need a process of their own are functions called by ``in_subprocess``.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numerics
import pytest
import torch
from cases import Case
from fresh_python import in_subprocess
from gpu_robust_support import MASKS, call_of, masks, operator, results_of
from gpu_support import DEVICE, IMPL, cu, half, needs_sm90, on_gpu, rows

from flashmla_hf import attention

pytestmark = needs_sm90


# ---- Scores and sinks of any size ------------------------------------------------------------------------------------


@rows
@half
@pytest.mark.parametrize("value", [1e4, 2e4, 40064.0, 6e4])
def test_one_visible_key_gives_its_value_however_large_the_score(row, dtype, value):
    """Scores of 1e9 to 6e10: exact in no dtype, but one key's weight is 1, and the row is alive."""
    q = torch.full((1, 70, 2, row[0]), value, device=DEVICE).to(dtype)
    k = q[:, :1].clone()
    v = torch.randn(1, 1, 2, row[1], device=DEVICE).to(dtype)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = attention(*leaves, return_lse=True, impl=IMPL)
    assert torch.equal(out, v.expand_as(out))
    score = row[0] ** 0.5 * float(q.detach().flatten()[0]) ** 2
    torch.testing.assert_close(lse.double(), torch.full_like(lse, score, dtype=torch.float64), rtol=1e-5, atol=0)
    dout = torch.randn_like(out)
    dq, dk, dv = torch.autograd.grad(out, leaves, dout)
    expected = dout.double().sum(1, keepdim=True)
    torch.testing.assert_close(dv.double(), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
    assert all(x.isfinite().all() for x in (dq, dk))


@rows
@half
@masks
def test_the_largest_of_huge_scores_wins(row, dtype, mask):
    """Values of 2e4, scores of 1e9: where float64 gives one key all of the weight, the row is that key's value."""
    case = Case(seqlen_q=200, seqlen_kv=260, heads_q=4, heads_kv=2, head_dim_qk=row[0], head_dim_v=row[1], magnitude=2e4, **mask)  # fmt: skip
    inputs = case.inputs(dtype, DEVICE)
    leaves = [getattr(inputs, name).clamp(-6e4, 6e4).requires_grad_() for name in "qkv"]
    out, lse = attention(*leaves, return_lse=True, impl=IMPL, **case.options)
    wide = [x.detach().double() for x in leaves]
    exact, exact_lse = attention(*wide, return_lse=True, impl="reference", **case.options)
    scores = torch.einsum("bihd,bjhd->bhij", wide[0], wide[1].repeat_interleave(2, 2)) * row[0] ** -0.5
    visible = numerics.visible_keys(200, 260, *case_bounds(case), device=DEVICE)
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    best = scores.topk(2, dim=-1).values
    decided = (best[..., 0] - best[..., 1] > 1e-4 * best[..., 0].abs() + 1e3).transpose(1, 2)
    assert decided.float().mean() > 0.9
    assert out.isfinite().all()
    torch.testing.assert_close(out[decided].double(), exact[decided], rtol=0, atol=0.05)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=0)
    grads = torch.autograd.grad(out, leaves, inputs.dout)
    assert all(grad.isfinite().all() for grad in grads)


def case_bounds(case: Case) -> tuple[int, int]:
    left, right = (-1 if bound is None else bound for bound in case.window or (None, None))
    return left, 0 if case.is_causal else right


SINKS = (math.nan, math.inf, -math.inf, 0.5)


@rows
@half
@pytest.mark.parametrize("is_packed", [False, True], ids=["dense", "packed"])
def test_sinks_of_nan_and_infinity_give_what_float64_gives(row, dtype, is_packed):
    """A head each; some rows see no key and some do. Whatever one head's sink is, the next head is untouched."""
    shape = (
        {"seqlens_q": (80, 33), "seqlens_kv": (60, 50), "rest_q": 5}
        if is_packed
        else {"batch": 2, "seqlen_q": 90, "seqlen_kv": 70}
    )
    case = Case(heads_q=4, head_dim_qk=row[0], head_dim_v=row[1], is_causal=True, has_sinks=True, **shape)
    inputs = case.inputs(dtype, DEVICE)
    inputs = replace(inputs, sinks=torch.tensor(SINKS, device=DEVICE), dlse=torch.zeros_like(inputs.dlse))
    got, exact = results_of(IMPL, case, inputs), results_of("reference", case, inputs.to(torch.float64))
    for name in ("out", "lse"):
        x, ref = got[name].double(), exact[name]
        same = torch.where(ref.isnan(), x.isnan(), torch.where(ref.isinf(), x == ref, x.isfinite()))
        heads = same.flatten(0, -3).all(0).all(-1) if name == "out" else same.movedim(-2, 0).flatten(1).all(1)
        assert heads.all(), f"{name}: sinks {[s for s, is_same in zip(SINKS, heads, strict=True) if not is_same]}"
        finite = ref.isfinite()
        torch.testing.assert_close(x[finite], ref[finite], rtol=0.02, atol=0.02)
    plain = slice(2, 4)  # -inf: no sink at all; 0.5
    for name in ("dq", "dk", "dv"):
        ref = exact[name][..., plain, :]
        torch.testing.assert_close(
            got[name][..., plain, :].double(), ref, rtol=0.03, atol=0.03 * float(ref.abs().max())
        )
    torch.testing.assert_close(got["dsinks"][plain].double(), exact["dsinks"][plain], rtol=0.03, atol=0.03)


# ---- Empty calls -----------------------------------------------------------------------------------------------------


@half
@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 0), (2, 0, 7), (2, 7, 0)], ids=str)
@pytest.mark.parametrize("way", ["attention", "compiled"])
def test_a_sum_over_an_empty_output_has_a_backward(shape, dtype, way):
    """The gradient of .sum() is expanded: strides of zero, also where there are no elements to be told apart."""
    torch._dynamo.reset()
    call = torch.compile(attention, fullgraph=True, backend="aot_eager") if way == "compiled" else attention
    batch, seqlen_q, seqlen_kv = shape
    q, k, v = (
        torch.randn(batch, n, 2, 64, device=DEVICE, dtype=dtype, requires_grad=True)
        for n in (seqlen_q, seqlen_kv, seqlen_kv)
    )
    for mask in MASKS.values():
        out = call(q, k, v, impl=IMPL, **mask)
        assert out.shape == q.shape
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        for x, grad in zip((q, k, v), grads, strict=True):
            assert grad.shape == x.shape
            assert (grad == 0).all()


@half
def test_packs_of_empty_sequences_have_a_backward(dtype):
    for boundaries, total in ((cu(0, 0, 0), 0), (cu(0), 0), (cu(0, 0), 5), (cu(0), 5)):
        q = torch.randn(total, 2, 64, device=DEVICE, dtype=dtype, requires_grad=True)
        out = attention(q, q, q, cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries, is_causal=True, impl=IMPL)
        (grad,) = torch.autograd.grad(out.sum(), q)
        assert (out == 0).all()
        assert (grad == 0).all()


def test_a_compiled_call_takes_length_zero_after_others():
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for seqlen in (70, 0, 33, 0):
        q, k, v = (
            torch.randn(2, seqlen, 2, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
        )
        out = compiled(q, k, v, is_causal=True, impl=IMPL)
        expected = attention(q, k, v, is_causal=True, impl=IMPL)
        assert torch.equal(out, expected)
        for x, y in zip(*(torch.autograd.grad(o.sum(), (q, k, v)) for o in (out, expected)), strict=True):
            torch.testing.assert_close(x, y, rtol=0.02, atol=0.02)


# ---- Graphs that are kept, errors of others, shared GPUs -------------------------------------------------------------


@pytest.mark.parametrize("impl", [IMPL, pytest.param("flex", marks=on_gpu)])
def test_a_graph_that_is_kept_gives_its_gradients_twice(impl):
    """``flex`` may refuse with a message of this package, not with torch's error about donated buffers."""
    q, k, v = (torch.randn(1, 256, 4, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    exact = attention(*(x.double() for x in (q, k, v)), is_causal=True, impl="reference")
    expected = torch.autograd.grad(exact.sum(), (q, k, v))
    out = attention(q, k, v, is_causal=True, impl=impl)
    for _ in range(2):
        refusal = None
        try:
            grads = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
        except RuntimeError as error:
            refusal = str(error)
        if refusal is not None:
            assert impl == "flex", refusal
            assert "flashmla" in refusal, refusal
            assert "retain_graph" in refusal, refusal
            return
        for x, y in zip(grads, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=0.05, atol=0.05)


def call_after_somebody_elses_error():
    """In a fresh process: an error of the CUDA runtime is pending, and is not ours."""
    inputs = call_of((128, 128))
    packed = call_of((128, 128), is_packed=True)
    leaves = [x.requires_grad_() for x in (inputs["q"], inputs["k"], inputs["v"])]
    for _ in range(2):
        error = torch.cuda.cudart().cudaHostRegister(0, 4096, 0)
        assert int(error) != 0, "expected an error"
        out = attention(*leaves, is_causal=True, impl=IMPL)
        torch.autograd.grad(out, leaves, out.detach())
        attention(**packed, is_causal=True, impl=IMPL)
    print("went on")


@on_gpu
def test_an_error_left_by_other_code_is_not_reported_as_ours():
    assert in_subprocess("test_gpu_robust", "call_after_somebody_elses_error()").endswith("went on")


def deterministic_backward_on_few_multiprocessors():
    """In a fresh process: a green context of some of the GPU's multiprocessors. Computed, or refused; never a hang."""
    from torch.cuda.green_contexts import GreenContext

    inputs = Case(batch=4, seqlen_q=3000, heads_q=8, heads_kv=2, head_dim_qk=128).inputs(torch.bfloat16, DEVICE)
    forward, backward = operator({"q": inputs.q, "k": inputs.k, "v": inputs.v}, is_deterministic=True)
    out, lse = forward()
    expected = backward(inputs.dout, None, out, lse)
    torch.cuda.synchronize()
    context = GreenContext.create(num_sms=16, device_id=0)
    context.set_context()
    try:
        got = backward(inputs.dout, None, out, lse)
        torch.cuda.current_stream().synchronize()
    except RuntimeError as error:
        if "flash_attn_backward" not in str(error):
            raise
        print("refused")
        return
    finally:
        context.pop_context()
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    print("computed")


@on_gpu
def test_the_deterministic_backward_ends_where_it_has_few_multiprocessors():
    pytest.importorskip("torch.cuda.green_contexts")
    try:
        printed = in_subprocess("test_gpu_robust", "deterministic_backward_on_few_multiprocessors()", timeout=90)
    except AssertionError as error:
        if "not supported" in str(error) or "Green Context" in str(error):
            pytest.skip("this driver has no green contexts")
        raise
    assert printed.splitlines()[-1] in ("computed", "refused")
