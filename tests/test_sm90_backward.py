"""The Hopper backward: splits of a group, the order of sums, gradients that nobody wants, layouts, rows without a gradient.

    python3 -m pytest tests/test_sm90_backward*.py                      # about a minute on an H100

tests/test_sm90.py has the error rule for every head dim under every mask, gradients included; tests/test_gpu.py the promises of
every GPU implementation, tests/test_fuzz.py random calls by the thousand.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from dataclasses import replace

import numerics
import pytest
import torch
from cases import SM90_ROWS, Case, without_pairs
from counting import counted_calls
from gpu_support import DEVICE, HALF, IMPL, WIDTHS, half, needs_sm90, offset_by, on_gpu, rows
from sm90_support import (
    BACKWARD,
    MASKS,
    NAMES,
    assert_same_bits,
    assert_same_up_to_rounding,
    check,
    gradients,
    operator,
    saved,
)
from torch.utils._python_dispatch import TorchDispatchMode

from flashmla_hf import attention

pytestmark = needs_sm90


def sliced(x):
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 8), math.nan, dtype=x.dtype, device=x.device)
    wide[..., 8 : 8 + x.shape[-1]] = x
    return wide[..., 8 : 8 + x.shape[-1]]


def with_odd_strides(x):
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 1), math.nan, dtype=x.dtype, device=x.device)
    wide[..., :-1] = x
    return wide[..., :-1]


LAYOUTS = {
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "sliced": sliced,
    "sliced to odd strides": with_odd_strides,
    "misaligned by two bytes": lambda x: offset_by(x, 1),
    "misaligned by eight bytes": lambda x: offset_by(x, 4),
}


@contextlib.contextmanager
def filled_memory():
    """What is allocated inside holds NaN until somebody writes it: a gradient left out shows, and so does one that is
    made of memory nobody wrote."""
    torch.use_deterministic_algorithms(True)  # which switches that on
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# ---- Every kernel ----------------------------------------------------------------------------------------------------


@half
@pytest.mark.parametrize("dims", WIDTHS, ids=lambda dims: f"{dims[0]}/{dims[1]}")
def test_every_head_dim_with_softcap_and_sinks_keeps_the_error_rule(dims, dtype):
    """Not every kernel has registers for softcap: such a call runs in a wider one."""
    shape = {"batch": 2, "heads_q": 4, "heads_kv": 2, "head_dim_qk": dims[0], "head_dim_v": dims[1]}
    for mask in MASKS.values():
        check(Case(seqlen_q=150, seqlen_kv=210, softcap=2.0, magnitude=2.0, has_sinks=True, **shape, **mask), dtype)


@rows
@pytest.mark.parametrize("group", [1, 2, 3, 4, 6, 7, 8, 11])
def test_the_heads_of_a_group_are_summed_with_few_keys_and_with_many(row, group):
    """Few tiles of keys for a GPU: its blocks share out the heads of a group, as a divisor of their number says, and their
    sums are merged. 2 heads and up to 6 tiles are few, 16 and 8 some (two blocks an even group), 50 sequences many."""
    dtype = HALF[group % 2]
    dims = {"head_dim_qk": row[0], "head_dim_v": row[1]}
    for case in (
        Case(seqlen_q=200, seqlen_kv=700, heads_q=2 * group, heads_kv=2, is_causal=True, **dims),
        Case(seqlen_q=300, heads_q=2 * group, heads_kv=2, has_sinks=True, window=(100, 20), **dims),
        Case(seqlen_q=130, seqlen_kv=1, heads_q=2 * group, heads_kv=2, **dims),
        Case(batch=2, seqlen_q=40, seqlen_kv=1000, heads_q=8 * group, heads_kv=8, **dims),
        Case(batch=50, seqlen_q=40, seqlen_kv=130, heads_q=4 * group, heads_kv=4, is_causal=True, **dims),
        Case(seqlens_q=(200, 30), seqlens_kv=(130, 300), heads_q=2 * group, heads_kv=2, is_causal=True, **dims),
    ):
        check(case, dtype)


@on_gpu
@pytest.mark.parametrize("seqlen", [128, 256, 512, 1024])
def test_the_heads_of_a_llama_are_summed_at_short_lengths(seqlen):
    check(Case(seqlen_q=seqlen, heads_q=32, heads_kv=8, head_dim_qk=128, is_causal=True))


@rows
@pytest.mark.parametrize("flows", [("dout",), ("dlse",)], ids=str)
def test_gradients_flow_through_either_result_alone(row, flows):
    case = Case(batch=2, seqlen_q=150, seqlen_kv=100, heads_q=4, heads_kv=2, head_dim_qk=row[0], head_dim_v=row[1], is_causal=True, has_sinks=True)  # fmt: skip
    check(case, has_dout="dout" in flows, has_dlse="dlse" in flows)


class OfReference(torch.autograd.Function):
    """out and lse of the float64 reference, rounded, and the gradients that the operator makes of them."""

    @staticmethod
    def forward(ctx, case, inputs, lay_out, *leaves):
        truth = numerics.reference64(case, inputs, wants=())
        ctx.case, ctx.inputs, ctx.lay_out = case, inputs, lay_out
        out, lse = truth.out.to(inputs.q.dtype), truth.lse.float()
        ctx.save_for_backward(out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        out, lse = ctx.saved_tensors
        return None, None, None, *operator(ctx.case, replace(ctx.inputs, dout=dout, dlse=dlse), ctx.lay_out(out), lse)


@rows
@half
def test_gradients_follow_from_an_out_and_lse_of_any_origin_and_layout(row, dtype):
    case = Case(batch=2, seqlen_q=150, heads_q=4, heads_kv=2, head_dim_qk=row[0], head_dim_v=row[1], is_causal=True, has_sinks=True)  # fmt: skip
    for lay_out in (lambda x: x, *LAYOUTS.values()):

        def from_reference(*, q, k, v, sinks, lay_out=lay_out, **_):
            inputs = replace(case.inputs(dtype, DEVICE), q=q, k=k, v=v, sinks=sinks)
            return OfReference.apply(case, inputs, lay_out, q, k, v, sinks)

        numerics.check(from_reference, case, dtype, DEVICE)


def test_wrong_gradients_break_the_rule():
    """The negative control of this file and of test_sm90.py: one gradient off by a little, the others right."""

    def without_a_row(grad):
        grad = grad.clone()
        grad[:, 1] = 0
        return grad

    wrong = {
        "5% too large": lambda grad: grad * 1.05,
        "of the next row": lambda grad: grad.roll(1, dims=min(1, grad.dim() - 1)),
        "of the next head": lambda grad: grad.roll(1, dims=max(0, grad.dim() - 2)),
        "without a row": without_a_row,
        "not written": lambda grad: grad * math.nan,
    }
    case = Case(seqlen_q=100, heads_q=4, heads_kv=2, is_causal=True, has_sinks=True)
    for name, (what, change) in itertools.product(NAMES, wrong.items()):
        if name == "sinks" and what == "without a row":
            continue

        def broken(*, name=name, change=change, **arguments):
            x = arguments[name] * 1
            if x.requires_grad:
                x.register_hook(change)
            return attention(**{**arguments, name: x}, impl=IMPL)

        with pytest.raises(AssertionError, match=f"d{name}: (error|infinities)"):
            numerics.check(broken, case, torch.bfloat16, DEVICE)


# ---- The order of sums -----------------------------------------------------------------------------------------------

REPEATS, LENGTH = (100, 700) if DEVICE == "cuda" else (3, 150)


@pytest.mark.parametrize("is_packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("mask", MASKS)
@rows
def test_deterministic_gradients_have_the_same_bits_a_hundred_times(row, mask, is_packed):
    dims = {"heads_q": 8, "heads_kv": 2, "head_dim_qk": row[0], "head_dim_v": row[1]}
    lengths = {"seqlens_q": (LENGTH, 0, 33, LENGTH // 2)} if is_packed else {"batch": 2, "seqlen_q": LENGTH}
    case = Case(has_sinks=True, **lengths, **dims, **MASKS[mask])
    inputs = case.inputs(torch.bfloat16, DEVICE)
    out, lse = saved(case, inputs)
    first = dict(zip(NAMES, operator(case, inputs, out, lse, deterministic=True), strict=True))
    for _ in range(REPEATS - 1):
        again = operator(case, inputs, out, lse, deterministic=True)
        assert_same_bits(dict(zip(NAMES, again, strict=True)), first)
    usual = dict(zip(NAMES, operator(case, inputs, out, lse), strict=True))
    assert_same_up_to_rounding(usual, first)
    # Of the other way only the sums of dQ have no order.
    for _ in range(5):
        again = dict(zip(NAMES, operator(case, inputs, out, lse), strict=True))
        assert_same_bits(again | {"q": usual["q"]}, usual)


class Deterministic(TorchDispatchMode):
    """Notes what the operator of the backward is told."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is BACKWARD:
            self.seen.append(args[16])
        return func(*args, **(kwargs or {}))


def test_torch_s_switch_for_deterministic_algorithms_reaches_the_kernel():
    case = Case(batch=2, seqlen_q=LENGTH, heads_q=8, heads_kv=2, is_causal=True)
    inputs = case.inputs(torch.bfloat16, DEVICE)
    with Deterministic() as told:
        expected = gradients(case, inputs, deterministic=True)
        gradients(case, inputs)
        torch.use_deterministic_algorithms(True)
        try:
            got = gradients(case, inputs)
        finally:
            torch.use_deterministic_algorithms(False)
    assert told.seen == [True, False, True]
    assert_same_bits(got, expected)


# ---- Gradients that nobody wants -------------------------------------------------------------------------------------

SUBSETS = [wants for n in range(1, 5) for wants in itertools.combinations(NAMES, n)]


@rows
@pytest.mark.parametrize("is_packed", [False, True], ids=["dense", "packed"])
def test_each_input_that_wants_a_gradient_gets_it_and_no_other_does(row, is_packed):
    """All 15 subsets. What is not wanted takes no memory."""
    lengths = {"seqlens_q": (100, 70)} if is_packed else {"batch": 2, "seqlen_q": 90}
    case = Case(heads_q=4, heads_kv=2, head_dim_qk=row[0], head_dim_v=row[1], is_causal=True, has_sinks=True, **lengths)
    inputs = case.inputs(torch.bfloat16, DEVICE)
    out, lse = saved(case, inputs)
    whole = gradients(case, inputs)
    assert whole.keys() == set(NAMES)
    assert len(SUBSETS) == 15
    for wants in SUBSETS:
        leaves = {name: getattr(inputs, name).detach().requires_grad_(name in wants) for name in NAMES}
        boundaries = {"cu_seqlens_q": inputs.cu_seqlens_q, "cu_seqlens_kv": inputs.cu_seqlens_kv}
        results = attention(**leaves, **boundaries, **case.options, return_lse=True, impl=IMPL)
        torch.autograd.backward(results, [inputs.dout, inputs.dlse])
        got = {name: x.grad for name, x in leaves.items() if x.grad is not None}
        assert_same_up_to_rounding(got, {name: whole[name] for name in wants})
        grads = operator(case, inputs, out, lse, wants=wants)
        for name, grad in zip(NAMES, grads, strict=True):
            assert grad.shape == (getattr(inputs, name).shape if name in wants else (0,))
            assert (grad.untyped_storage().nbytes() > 0) == (name in wants)


# ---- What flows back, in any layout ----------------------------------------------------------------------------------


def case_of_layouts(**changes):
    case = Case(batch=2, seqlen_q=130, heads_q=4, heads_kv=2, is_causal=True, has_sinks=True, **changes)
    return case, case.inputs(torch.bfloat16, DEVICE)


def with_the_last_dimension_apart(x):
    return x.transpose(1, -1).contiguous().transpose(1, -1)


@pytest.mark.parametrize(
    "lay_out", [*LAYOUTS.values(), with_the_last_dimension_apart], ids=[*LAYOUTS, "transposed whole"]
)
def test_dout_may_have_any_memory_layout(lay_out):
    case, inputs = case_of_layouts()
    moved = replace(inputs, dout=lay_out(inputs.dout))
    assert torch.equal(moved.dout, inputs.dout)
    assert moved.dout.stride() != inputs.dout.stride() or moved.dout.storage_offset() > 0
    expected = gradients(case, inputs, deterministic=True)
    assert_same_bits(gradients(case, moved, deterministic=True), expected)


@pytest.mark.parametrize("dim", [None, 0, 1, 2, 3], ids=["all", "batch", "rows", "heads", "head dim"])
def test_dout_and_dlse_may_be_expanded(dim):
    """As ``out.sum().backward()`` hands them."""
    case, inputs = case_of_layouts()
    dout = inputs.dout[:1, :1, :1, :1] if dim is None else inputs.dout.narrow(dim, 0, 1)
    dlse = inputs.dlse[:1, :1, :1] if dim is None else inputs.dlse.narrow(min(dim, 2), 0, 1)
    moved = replace(inputs, dout=dout.expand(inputs.dout.shape), dlse=dlse.expand(inputs.dlse.shape))
    assert 0 in moved.dout.stride()
    assert 0 in moved.dlse.stride()
    written_out = replace(moved, dout=moved.dout.contiguous(), dlse=moved.dlse.contiguous())
    expected = gradients(case, written_out, deterministic=True)
    assert_same_bits(gradients(case, moved, deterministic=True), expected)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_an_input_that_the_automatic_choice_copies_gets_its_gradient(name):
    case, inputs = case_of_layouts()
    moved = replace(inputs, **{name: offset_by(getattr(inputs, name), 1)})
    with counted_calls() as chosen:
        got = gradients(case, moved, deterministic=True, impl=None)
    assert chosen == {IMPL: 1}
    assert_same_bits(got, gradients(case, inputs, deterministic=True))


def test_dlse_may_be_transposed():
    case, inputs = case_of_layouts()
    moved = replace(inputs, dlse=inputs.dlse.transpose(1, 2).contiguous().transpose(1, 2))
    expected = gradients(case, inputs, deterministic=True)
    assert_same_bits(gradients(case, moved, deterministic=True), expected)


@rows
def test_memory_beside_the_tensors_changes_no_result(row):
    """NaN between the rows of q, k, v and dout, and where a head dim below the row is padded."""
    for less, mask in itertools.product((0, 8), MASKS.values()):
        case = Case(
            batch=2, seqlen_q=150, heads_q=4, heads_kv=2, head_dim_qk=row[0] - less, head_dim_v=row[1] - less, **mask
        )
        inputs = case.inputs(torch.bfloat16, DEVICE)
        beside = replace(inputs, **{name: sliced(getattr(inputs, name)) for name in ("q", "k", "v", "dout")})
        expected = gradients(case, inputs, deterministic=True)
        assert_same_bits(gradients(case, beside, deterministic=True), expected)
        keys = gradients(case, inputs, wants=("k", "v"))
        assert_same_bits(gradients(case, beside, wants=("k", "v")), keys)


# ---- Rows without a gradient -----------------------------------------------------------------------------------------


@half
@pytest.mark.parametrize("has_sinks", [False, True])
def test_rows_that_see_nothing_and_keys_that_nobody_sees_have_gradients_of_exactly_zero(has_sinks, dtype):
    for row in SM90_ROWS:
        shape = {
            "batch": 2,
            "heads_q": 4,
            "heads_kv": 2,
            "head_dim_qk": row[0],
            "head_dim_v": row[1],
            "has_sinks": has_sinks,
        }
        blind = Case(seqlen_q=300, seqlen_kv=100, is_causal=True, **shape)  # the first 200 queries
        unseen = Case(seqlen_q=50, seqlen_kv=300, window=(10, 0), **shape)  # the first 240 keys
        with filled_memory():
            of_blind, of_unseen = (gradients(x, x.inputs(dtype, DEVICE), deterministic=False) for x in (blind, unseen))
        assert (of_blind["q"][:, :200] == 0).all()
        assert (of_blind["q"][:, 201:] != 0).any(-1).all()
        for name in "kv":
            assert (of_unseen[name][:, :240] == 0).all()
            assert (of_unseen[name][:, 240:] != 0).any(-1).all()


@rows
@pytest.mark.parametrize("deterministic", [False, True])
def test_empty_sequences_and_rows_of_no_sequence_have_gradients_of_exactly_zero(row, deterministic):
    """Of (queries, keys): 70/70, 0/5, 61/0, 130/90, then 300 and 200 rows of no sequence."""
    case = Case(
        seqlens_q=(70, 0, 61, 130), seqlens_kv=(70, 5, 0, 90), rest_q=300, rest_kv=200, heads_q=4, heads_kv=2,
        head_dim_qk=row[0], head_dim_v=row[1], has_sinks=True,
    )  # fmt: skip
    inputs = case.inputs(torch.bfloat16, DEVICE)
    # Not NaN: README's limits say why. A weight other than 0 would show all the same.
    inputs.q[261:], inputs.k[165:], inputs.v[165:], inputs.dout[261:], inputs.dlse[:, 261:] = 1e4, 1e4, 1e15, 1e15, 1e30
    for mask in MASKS.values():
        with filled_memory():
            got = gradients(replace(case, **mask), inputs, deterministic=deterministic)
        for name, zeros in (("q", (slice(70, 131), slice(261, None))), ("k", (slice(70, 75), slice(165, None)))):
            for part in zeros:
                for x in (got["k"], got["v"]) if name == "k" else (got["q"],):
                    assert (x[part] == 0).all()
        for name in NAMES:
            assert got[name].abs().max() < 1000, "rows of no sequence reach those of a sequence"
            assert (got[name] != 0).any()


@pytest.mark.parametrize("has_sinks", [False, True])
def test_calls_without_keys_give_zero_gradients_and_the_sink_that_of_lse(has_sinks):
    for case in without_pairs(heads_q=4, heads_kv=2, has_sinks=has_sinks):
        inputs = case.inputs(torch.bfloat16, DEVICE)
        in_sequences = sum(case.seqlens_q) if case.is_packed else case.seqlen_q
        for mask, deterministic in itertools.product(MASKS.values(), (False, True)):
            with filled_memory():
                got = gradients(replace(case, **mask), inputs, deterministic=deterministic)
            assert all((got[name] == 0).all() for name in "qkv")
            if has_sinks:
                dlse = inputs.dlse[..., :in_sequences]
                torch.testing.assert_close(got["sinks"], dlse.sum(-1) if case.is_packed else dlse.sum((0, 2)))


# ---- Memory, and addresses beyond 2^31 elements ----------------------------------------------------------------------


@on_gpu
def test_kv_heads_in_unequal_passes_are_those_of_a_call_each():
    """128 MiB of dQ a kv head: two, two and one at a time. Of one kv head there are tiles enough, so that none is split."""
    seqlen, group = 32768, 8
    heads = 5 * group, 5, 5, 5 * group
    q, k, v, dout = (torch.randn(1, seqlen, h, 128, device=DEVICE, dtype=torch.bfloat16) for h in heads)
    dlse = torch.randn(1, 5 * group, seqlen, device=DEVICE)

    def gradients_of(first, last):
        heads = slice(first * group, last * group)
        inputs = [q[:, :, heads], k[:, :, first:last], v[:, :, first:last]]
        leaves = [x.detach().requires_grad_() for x in inputs]
        out, lse = attention(*leaves, is_causal=True, deterministic=True, return_lse=True, impl=IMPL)
        return torch.autograd.grad([out, lse], leaves, [dout[:, :, heads], dlse[:, heads]])

    whole, parts = gradients_of(0, 5), [gradients_of(i, i + 1) for i in range(5)]
    for all_heads, of_heads in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(all_heads, torch.cat(of_heads, 2))


@on_gpu
@pytest.mark.parametrize("deterministic", [False, True])
def test_temporaries_of_a_long_sequence_stay_small(deterministic):
    """The fp32 sums of dQ of all heads at once would take 512 MiB."""
    seqlen, heads = 32768, 32
    case = Case(seqlen_q=seqlen, heads_q=heads, heads_kv=8, head_dim_qk=128, is_causal=True)
    q, k, v, dout = (torch.randn(1, seqlen, h, 128, device=DEVICE, dtype=torch.bfloat16) for h in (heads, 8, 8, heads))
    lse = torch.full((1, heads, seqlen), 10.0, device=DEVICE)
    inputs = replace(Case().inputs(torch.bfloat16, DEVICE), q=q, k=k, v=v, dout=dout, dlse=torch.zeros_like(lse))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = operator(case, inputs, dout, lse, wants=("q", "k", "v"), deterministic=deterministic)
    torch.cuda.synchronize()
    temporaries = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in grads)
    assert temporaries < 300 * 2**20 + 16 * seqlen * heads
    assert temporaries > 2**20, "the measurement sees nothing"
