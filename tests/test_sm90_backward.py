"""What only the Hopper backward can get wrong: splits of a group, the order of sums, gradients nobody wants, addresses.

    python3 -m pytest tests/test_sm90_backward.py                      # about a minute on an H100
    python3 -m pytest tests/test_sm90_backward.py -k "not elements"    # without the tests that want 45 GB

That every head dim keeps the error rule under every mask, gradients included, is in tests/test_sm90.py; what every GPU
implementation promises is in tests/test_gpu.py; random calls by the thousand are in tests/test_fuzz.py.
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
from gpu_support import DEVICE, HALF, IMPL, WIDTHS, exact, half, needs_memory, needs_sm90, offset_by, rows
from torch.utils._python_dispatch import TorchDispatchMode

from flashmla_hf import attention

pytestmark = needs_sm90
on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="is about a GPU")
NAMES = ("q", "k", "v", "sinks")
MASKS = {"none": {}, "causal": {"is_causal": True}, "window": {"window": (70, 5)}}
BACKWARD = torch.ops.flashmla.flash_attn_backward.default


def check(case, dtype=torch.bfloat16, **options):
    return numerics.check(IMPL, case, dtype, DEVICE, **options)


def gradients(case, inputs, wants=NAMES, flows=("dout", "dlse"), **changes):
    """The gradients of ``wants`` by name; ``flows`` names what flows back, ``changes`` are arguments of attention."""
    leaves = {name: getattr(inputs, name) for name in NAMES if getattr(inputs, name) is not None}
    leaves = {name: x.detach().requires_grad_(name in wants) for name, x in leaves.items()}
    out, lse = attention(
        **leaves, cu_seqlens_q=inputs.cu_seqlens_q, cu_seqlens_kv=inputs.cu_seqlens_kv, return_lse=True,
        **{"impl": IMPL, **case.options, **changes},
    )  # fmt: skip
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    results, back = zip(
        *((result, getattr(inputs, name)) for name, result in (("dout", out), ("dlse", lse)) if name in flows),
        strict=True,
    )
    return dict(zip(wanted, torch.autograd.grad(results, list(wanted.values()), back), strict=True))


def saved(case, inputs):
    """out, lse of the forward, as the operator of the backward wants them."""
    return attention(
        inputs.q, inputs.k, inputs.v, sinks=inputs.sinks, cu_seqlens_q=inputs.cu_seqlens_q,
        cu_seqlens_kv=inputs.cu_seqlens_kv, return_lse=True, impl=IMPL, **case.options,
    )  # fmt: skip


def operator(case, inputs, out, lse, wants=NAMES, deterministic=False):
    """The operator of the backward itself: dq, dk, dv, dsinks."""
    left, right = (-1 if bound is None else bound for bound in case.window or (None, None))
    scale = case.head_dim_qk**-0.5 if case.scale is None else case.scale
    return torch.ops.flashmla.flash_attn_backward(
        inputs.dout, inputs.dlse, inputs.q, inputs.k, inputs.v, out, lse, inputs.sinks, inputs.cu_seqlens_q,
        inputs.cu_seqlens_kv, inputs.q.shape[-3], inputs.k.shape[-3], scale, left, 0 if case.is_causal else right,
        case.softcap, deterministic, *(name in wants for name in NAMES),
    )  # fmt: skip


def assert_same_bits(got, expected):
    assert got.keys() == expected.keys()
    for name in got:
        assert torch.equal(got[name], expected[name]), f"d{name} differs"


def assert_same_up_to_rounding(got, expected):
    """The same sums in another order: a rounding of the result apart, and one of the fp32 sums."""
    assert got.keys() == expected.keys()
    for name, grad in got.items():
        eps, largest = torch.finfo(grad.dtype).eps, float(expected[name].abs().max())
        allowed = (2 * eps if grad.dtype in HALF else 1e-5) * largest
        torch.testing.assert_close(
            grad, expected[name], rtol=0, atol=allowed, msg=lambda text, name=name: f"d{name}: {text}"
        )


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
@pytest.mark.parametrize("group", [1, 2, 4, 7, 8])
def test_the_heads_of_a_group_are_summed_with_few_keys_and_with_many(row, group):
    """Few tiles of keys for a GPU: its blocks share out the heads of a group, as far as powers of 2 divide them, and their
    sums are merged. 2 heads and up to 6 tiles are few, 16 and 8 some (two blocks a group), 50 sequences many."""
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


@on_a_gpu
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
def test_dout_may_lie_in_memory_as_it_likes(lay_out):
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
def test_what_lies_beside_the_tensors_has_no_say(row):
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
def test_nothing_to_attend_to_gives_zeros_and_the_sink_what_flows_through_lse(has_sinks):
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


@on_a_gpu
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


def exact_gradients(q, k, v, dout, scale, chunk=2**15):
    """dq, dk, dv in float64 of an unmasked call of one sequence, a chunk of its queries at a time."""
    group = q.shape[2] // k.shape[2]
    key, value = (x.transpose(1, 2).double().repeat_interleave(group, 1) for x in (k, v))
    dk, dv, dq = (
        torch.zeros_like(key),
        torch.zeros_like(value),
        torch.empty(q.shape, dtype=torch.float32, device=q.device),
    )
    for begin in range(0, q.shape[1], chunk):
        query, back = (x[:, begin : begin + chunk].transpose(1, 2).double() for x in (q, dout))
        weights = (query @ key.transpose(-1, -2) * scale).softmax(-1)
        dv += weights.transpose(-1, -2) @ back
        dweights = back @ value.transpose(-1, -2)
        dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True)) * scale
        dk += dscores.transpose(-1, -2) @ query
        dq[:, begin : begin + chunk] = (dscores @ key).transpose(1, 2)
    return dq, *(x.transpose(1, 2).unflatten(2, (-1, group)).sum(3) for x in (dk, dv))


def assert_near(name, got, expected):
    """What is read or written at a wrong place is off by about its own size. Rounding puts up to 2.6 % (seen) into dk of a
    key with half of a query's weight: delta is made from an out in bf16."""
    largest = float(expected.abs().max())
    error = float((got.double() - expected).abs().max())
    assert error <= 0.05 * largest, f"{name}: error {error:.2e}, largest value {largest:.2e}"


ROWS_OF_2_31 = 2**31 // (8 * 128)  # of [rows, 8 heads, 128]


def normal(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_()


def test_the_yardstick_of_large_calls_agrees_with_the_reference():
    case = Case(seqlen_q=90, seqlen_kv=65, heads_q=4, heads_kv=2)
    inputs = case.inputs(torch.bfloat16, DEVICE)
    got = exact_gradients(inputs.q, inputs.k, inputs.v, inputs.dout, case.head_dim_qk**-0.5, chunk=40)
    truth = numerics.reference64(case, inputs, wants=("q", "k", "v"), has_dlse=False)
    for name, grad in zip("qkv", got, strict=True):
        torch.testing.assert_close(grad.double(), truth.grads[name], rtol=1e-5, atol=1e-6)


@on_a_gpu
def test_queries_and_sums_beyond_2_31_elements_get_their_gradients():
    """q, out, dout and dq, and the fp32 sums of dQ if they were held at once."""
    needs_memory(45)
    rows_q = ROWS_OF_2_31 + 1001
    q, dout = normal(1, rows_q, 8, 128), normal(1, rows_q, 8, 128)
    k, v = normal(1, 65, 2, 128), normal(1, 65, 2, 128)
    assert q.numel() > 2**31
    leaves = [x.requires_grad_() for x in (q, k, v)]
    dq, dk, dv = torch.autograd.grad(attention(*leaves, impl=IMPL), leaves, dout)
    expected = exact_gradients(q.detach(), k.detach(), v.detach(), dout, 128**-0.5)
    for begin in (0, ROWS_OF_2_31 // 2 - 500, ROWS_OF_2_31 - 500, rows_q - 1000):
        part = slice(begin, begin + 1000)
        assert_near(f"dq from row {begin}", dq[:, part], expected[0][:, part])
    assert_near("dk", dk, expected[1])
    assert_near("dv", dv, expected[2])


@on_a_gpu
def test_keys_beyond_2_31_elements_get_their_gradients():
    needs_memory(45)
    rows_kv, scale = ROWS_OF_2_31 + 3001, 128**-0.5
    q, dout = normal(1, 70, 16, 128), normal(1, 70, 16, 128)
    k, v = normal(1, rows_kv, 8, 128), normal(1, rows_kv, 8, 128)
    assert k.numel() > 2**31
    # One key of each kv head, past the edge, has about half of the weight of one query. (With all of it, dP - delta would
    # be the rounding error of out.)
    k[0, rows_kv - 9] = q[0, 3, ::2] * 1.3
    leaves = [x.requires_grad_() for x in (q, k, v)]
    dq, dk, dv = torch.autograd.grad(attention(*leaves, impl=IMPL), leaves, dout)
    q, k, v = (x.detach() for x in leaves)
    out, lse = exact(q, k, v, scale)
    delta = (out * dout.double()).sum(-1).transpose(1, 2)[..., None]
    query, back = (x.transpose(1, 2).double() for x in (q, dout))
    expected_dq = torch.zeros_like(query)
    edges = (0, ROWS_OF_2_31 // 2 - 500, ROWS_OF_2_31 - 500, rows_kv - 1000)
    for begin in sorted({*range(0, rows_kv, 2**15), *edges}):
        rows_of_dq = begin % 2**15 == 0
        part = slice(begin, begin + (2**15 if rows_of_dq else 1000))
        key, value = (x[:, part].transpose(1, 2).double().repeat_interleave(2, 1) for x in (k, v))
        weights = (query @ key.transpose(-1, -2) * scale - lse[..., None]).exp()
        dscores = weights * (back @ value.transpose(-1, -2) - delta) * scale
        if rows_of_dq:
            expected_dq += dscores @ key
        if begin in edges:
            for name, grad, sums in (
                ("dk", dk, dscores.transpose(-1, -2) @ query),
                ("dv", dv, weights.transpose(-1, -2) @ back),
            ):
                expected = sums.transpose(1, 2).unflatten(2, (-1, 2)).sum(3)[:, :1000]
                assert_near(f"{name} from row {begin}", grad[:, begin : begin + 1000], expected)
    expected_dq = expected_dq.transpose(1, 2)
    for part in (slice(0, 3), slice(3, 4), slice(4, 70)):  # each beside its own largest value
        assert_near(f"dq of rows {part}", dq[:, part], expected_dq[:, part])


@on_a_gpu
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "rows", "heads"])
def test_strides_beyond_2_31_elements_reach_the_right_place(dim):
    needs_memory(12)
    base = torch.zeros(2**31 + 2**20, dtype=torch.bfloat16, device=DEVICE)
    strides, shape = [64 * 9, 64 * 3, 64, 1], [2, 3, 2, 64]
    shape[dim], strides[dim] = 2, 2**31
    case = Case(batch=shape[0], seqlen_q=shape[1], heads_q=shape[2])
    inputs = case.inputs(torch.bfloat16, DEVICE)
    expected = gradients(case, inputs, deterministic=True)
    for name in ("q", "k", "v", "dout"):
        far = base.as_strided(shape, strides)
        far.copy_(getattr(inputs, name))
        assert torch.equal(far, getattr(inputs, name)), "the view overlaps itself"
        assert_same_bits(gradients(case, replace(inputs, **{name: far}), deterministic=True), expected)


# ---- Streams, graphs, torch.library ----------------------------------------------------------------------------------


@on_a_gpu
@rows
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_backward_runs_on_the_current_stream_and_waits_for_nothing(row, deterministic):
    """Behind work that takes longer than the call: the call must come back before, and see what that work wrote."""
    case = Case(seqlens_q=(300, 41, 100), heads_q=4, heads_kv=2, head_dim_qk=row[0], head_dim_v=row[1], has_sinks=True)
    inputs = case.inputs(torch.bfloat16, DEVICE)
    late = replace(inputs, q=torch.zeros_like(inputs.q), dout=torch.zeros_like(inputs.dout))
    out, lse = saved(case, inputs)
    expected = operator(case, inputs, out, lse, deterministic=deterministic)
    torch.cuda.synchronize()
    stream, done = torch.cuda.Stream(), torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # a tenth of a second
            late.q.copy_(inputs.q)
            late.dout.copy_(inputs.dout)
            got = operator(case, late, out, lse, deterministic=deterministic)
            done.record()
            was_running = not done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert was_running, "the call waited for the stream"
    assert_same_up_to_rounding(*(dict(zip(NAMES, grads, strict=True)) for grads in (got, expected)))


@on_a_gpu
@pytest.mark.parametrize("is_packed", [False, True], ids=["dense", "packed"])
@rows
def test_a_cuda_graph_of_forward_and_backward_replays_with_changed_inputs(row, is_packed):
    shape = {"seqlens_q": (150, 50), "seqlens_kv": (90, 110)} if is_packed else {"batch": 2, "seqlen_q": 100}
    case = Case(heads_q=4, heads_kv=2, head_dim_qk=row[0], head_dim_v=row[1], is_causal=True, has_sinks=True, **shape)
    inputs = case.inputs(torch.bfloat16, DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(case, inputs, deterministic=True)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(case, inputs, deterministic=True)
    other = replace(case, seqlens_q=(20, 180), seqlens_kv=(199, 1)) if is_packed else case
    other_inputs = other.inputs(torch.bfloat16, DEVICE, seed=1)
    for name in ("q", "k", "v", "sinks", "cu_seqlens_q", "cu_seqlens_kv", "dout", "dlse"):
        if getattr(inputs, name) is not None:
            getattr(inputs, name).copy_(getattr(other_inputs, name))
    expected = gradients(other, other_inputs, deterministic=True)
    for _ in range(3):  # what orders the sums must be as new each time
        for x in captured.values():
            x.fill_(math.nan)
        graph.replay()
        assert_same_bits(captured, expected)


@on_a_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_second_gpu_computes_gradients_and_the_current_one_stays():
    case = Case(batch=2, seqlen_q=300, heads_q=4, heads_kv=2, is_causal=True)
    inputs = case.inputs(torch.bfloat16, DEVICE)
    there = replace(inputs, **{name: getattr(inputs, name).to("cuda:1") for name in ("q", "k", "v", "dout", "dlse")})
    got, expected = (gradients(case, x, deterministic=True) for x in (there, inputs))
    assert torch.cuda.current_device() == 0
    assert_same_bits({name: x.to("cuda:0") for name, x in got.items()}, expected)


@pytest.mark.parametrize("is_packed", [False, True], ids=["dense", "packed"])
def test_opcheck(is_packed):
    lengths = {"seqlens_q": (40, 30)} if is_packed else {"batch": 2, "seqlen_q": 70}
    case = Case(heads_q=4, heads_kv=2, is_causal=True, has_sinks=True, **lengths)
    inputs = case.inputs(torch.bfloat16, DEVICE)
    out, lse = saved(case, inputs)
    for wants in (NAMES, ("q",), ("k", "v")):
        torch.library.opcheck(
            BACKWARD,
            (
                inputs.dout, inputs.dlse, inputs.q, inputs.k, inputs.v, out, lse, inputs.sinks, inputs.cu_seqlens_q,
                inputs.cu_seqlens_kv, 70, 70, 0.125, -1, 0, 0.0, False, *(name in wants for name in NAMES),
            ),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


def test_an_argument_that_does_not_fit_is_named():
    case = Case(batch=2, seqlen_q=70, heads_q=4, heads_kv=2)
    inputs = case.inputs(torch.bfloat16, DEVICE)
    out, lse = saved(case, inputs)
    wrong = {
        "dout": replace(inputs, dout=inputs.dout[:, :50]),
        "dlse": replace(inputs, dlse=inputs.dlse.double()),
        "k": replace(inputs, k=inputs.k.half()),
        "needs_dsinks": inputs,
    }
    for name, x in wrong.items():
        wants = NAMES if name == "needs_dsinks" else ("q", "k", "v")
        with pytest.raises(RuntimeError, match=rf"flash_attn_backward: {name}: expected .*, got "):
            operator(case, x, out, lse, wants=wants)
    for name, x in {"out": (out[:, :50], lse), "lse": (out, lse.double())}.items():
        with pytest.raises(RuntimeError, match=rf"flash_attn_backward: {name}: expected .*, got "):
            operator(case, inputs, *x, wants=("q", "k", "v"))
