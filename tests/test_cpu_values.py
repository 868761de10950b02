"""What the CPU kernel does with values: hidden ones that are not finite, scores beyond any precision, sinks of NaN and
infinity. Everything runs on every instruction set of this machine."""

from __future__ import annotations

import math
import os
import random

import pytest
import torch
from cpu_support import DTYPES, ISAS, kernel, make_inputs, needs_cpu_library
from fresh_python import answers_of

pytestmark = needs_cpu_library

# Of module scope, which groups the tests of an instruction set: one process makes the checks of all.
on_every_isa = pytest.mark.parametrize("isa", ISAS, scope="module")
CHECKS = ("check_hidden_values(120)", "check_one_dimension()", "check_a_lone_key()", "check_many_keys()")


def run_on(isa, check):
    """What ``check``, one of CHECKS, returns in a process that uses ``isa``."""
    best = torch.ops.flashmla.cpu_isa()
    if "FLASHMLA_CPU_ISA" not in os.environ and ISAS.index(isa) > ISAS.index(best):
        pytest.skip(f"this machine offers {best}")
    answer, error = answers_of("test_cpu_values", CHECKS, FLASHMLA_CPU_ISA=isa)[check]
    assert error is None, error
    return answer


def visible_pairs(lengths_q, lengths_kv, total_q, total_kv, window):
    """Boolean [total_q, total_kv], straight from csrc/params.h."""
    visible = torch.zeros(total_q, total_kv, dtype=torch.bool)
    q0 = k0 = 0
    for nq, nk in zip(lengths_q, lengths_kv, strict=True):
        position, key = torch.arange(nq)[:, None] + nk - nq, torch.arange(nk)[None, :]
        part = torch.ones(nq, nk, dtype=torch.bool)
        if window[0] >= 0:
            part &= key >= position - window[0]
        if window[1] >= 0:
            part &= key <= position + window[1]
        visible[q0 : q0 + nq, k0 : k0 + nk] = part
        q0, k0 = q0 + nq, k0 + nk
    return visible


def hide(x, rows, generator):
    """A copy of x [rows, heads, dim] where some numbers of the chosen rows are NaN or infinite; of the others none."""
    x = x.clone()
    for row in rows:
        poison = generator.choice((math.nan, math.inf, -math.inf))
        if generator.random() < 0.5:
            x[row] = poison
        else:
            x[row, :, generator.randrange(x.shape[-1])] = poison
    return x


def check_hidden_values(num_trials):
    """Rows that see nothing of what is not finite are what they are without it, bit for bit; so are gradients of keys.
    Returns how many rows see what is finite alone."""
    generator = random.Random(0)
    spared = 0
    for trial in range(num_trials):
        dtype = DTYPES[trial % 3]
        is_packed = generator.random() < 0.5
        is_decoding = generator.random() < 0.25  # up to four rows: K and V are not packed
        lengths_q = [generator.choice((0, 1, 2) if is_decoding else (0, 1, 5, 33, 70, 130)) for _ in range(3)]
        lengths_kv = [generator.choice((0, 1, 7, 64, 130, 270)) for _ in range(3)]
        if not is_packed:
            lengths_q, lengths_kv = [max(1, lengths_q[0])], [max(1, lengths_kv[0])]
        rest_q, rest_kv = (3, 2) if is_packed else (0, 0)  # past the last boundary
        total_q, total_kv = sum(lengths_q) + rest_q, sum(lengths_kv) + rest_kv
        window = generator.choice(((-1, 0), (-1, 0), (20, 0), (5, 9), (-1, -1), (0, 0), (40, -1)))
        heads_kv, group = generator.choice(((1, 1), (2, 1), (1, 2), (2, 3)))
        softcap = generator.choice((0.0, 0.0, 2.0))
        d, dv = generator.choice(((64, 64), (40, 24), (16, 80), (8, 8)))
        *dense, dlse, sinks = make_inputs(1, total_q, total_kv, heads_kv * group, heads_kv, d, dv, dtype, seed=trial)
        q, k, v, dout = (x[0] for x in dense)
        dlse, sinks = dlse[0], sinks if generator.random() < 0.3 else None
        visible = visible_pairs(lengths_q, lengths_kv, total_q, total_kv, window)
        options = {"window": window, "softcap": softcap}
        if is_packed:
            options["cu"] = [torch.tensor([0, *x]).cumsum(0).int() for x in (lengths_q, lengths_kv)]

        def call(q, k, v, dout, dlse, sinks=sinks, options=options, is_packed=is_packed):
            tensors = (q, k, v, dout, dlse) if is_packed else (x[None] for x in (q, k, v, dout, dlse))
            out, lse, dq, dk, dv_, *_ = kernel(*tensors, sinks, **options)
            return (out, lse, dq, dk, dv_) if is_packed else tuple(x[0] for x in (out, lse, dq, dk, dv_))

        def some(candidates, most):
            candidates = candidates.nonzero().flatten().tolist()
            return generator.sample(candidates, min(len(candidates), generator.randint(0, most)))

        everything = torch.ones(total_kv, dtype=torch.bool)
        bad_k, bad_v = some(everything, 2), some(everything, 2)
        # Rows of q and dout, of those that see something and of those that do not.
        sees_any = visible.any(1)
        bad_q, bad_dout = ([*some(sees_any, 1), *some(~sees_any, 3)] for _ in range(2))
        bad_dlse = some(~sees_any, 3) if sinks is None else []
        clean = call(q, k, v, dout, dlse)
        poisoned_dlse = dlse.clone()
        poisoned_dlse[:, bad_dlse] = math.nan
        found = call(
            hide(q, bad_q, generator), hide(k, bad_k, generator), hide(v, bad_v, generator),
            hide(dout, bad_dout, generator), poisoned_dlse,
        )  # fmt: skip

        is_bad_key = torch.zeros(total_kv, dtype=torch.bool)
        is_bad_key[bad_k + bad_v] = True
        row_is_spared = ~(visible & is_bad_key).any(1)
        row_is_spared[[row for row in bad_q if sees_any[row]]] = False
        spared_dq = row_is_spared.clone()
        spared_dq[[row for row in bad_dout if sees_any[row]]] = False
        spared_keys = ~is_bad_key & ~(visible & ~spared_dq[:, None]).any(0)
        what = (
            f"trial {trial}: {dtype} q {lengths_q} kv {lengths_kv} window {window} heads {heads_kv}x{group} d {d} {dv} "
        )
        what += f"softcap {softcap} bad q {bad_q} k {bad_k} v {bad_v} dout {bad_dout} dlse {bad_dlse}"
        assert torch.equal(found[0][row_is_spared], clean[0][row_is_spared]), f"out, {what}"
        assert torch.equal(found[1][:, row_is_spared], clean[1][:, row_is_spared]), f"lse, {what}"
        for name, index, rows in (("dq", 2, spared_dq), ("dk", 3, spared_keys), ("dv", 4, spared_keys)):
            assert torch.equal(found[index][rows], clean[index][rows]), f"{name}, {what}"
        # Who sees NaN in a value has it: nothing is cleared away.
        touched = (visible & is_bad_key).any(1)
        spared += int((row_is_spared & sees_any).sum())
        if bad_v and not bad_k and sinks is None:
            assert not found[0][touched].isfinite().all(-1).any(), f"out of rows that see it, {what}"
    return spared


@on_every_isa
def test_values_hidden_from_a_row_never_reach_it(isa):
    assert run_on(isa, "check_hidden_values(120)") > 1000  # rows beside rows that see what is not finite


def check_one_dimension():
    for dtype in DTYPES:
        for seqlen_q in (2, 60):  # of few rows K and V are not packed
            q, k, v, dout, *_ = make_inputs(1, seqlen_q, 60, 1, 1, 64, 64, dtype)
            clean = kernel(q, k, v, dout, window=(-1, 0))
            bad_v, bad_k, bad_q, bad_dout = v.clone(), k.clone(), q.clone(), dout.clone()
            row = seqlen_q - 1  # the only one that sees the last key
            bad_v[0, 59, 0, 3] = math.inf
            out = kernel(q, k, bad_v, window=(-1, 0))[0]
            others = torch.arange(64) != 3
            torch.testing.assert_close(out[0, row, 0, others], clean[0][0, row, 0, others])
            assert out[0, row, 0, 3] == math.inf
            bad_k[0, 59, 0, 3] = math.nan
            out, lse, dq, dk, dv, _ = kernel(q, bad_k, v, dout, window=(-1, 0))
            assert out[0, row].isnan().all()
            assert lse[0, 0, row].isnan()
            assert dq[0, row].isnan().all()
            assert dk[0, 59].isnan().all()
            assert dv[0, 59].isnan().all()
            bad_q[0, row, 0, 3] = math.nan
            dq, dk, dv = kernel(bad_q, k, v, dout, window=(-1, 0))[2:5]
            assert dq[0, row].isnan().all()
            assert dk[0, 59].isnan().all()
            assert dv[0, 59].isnan().all()
            bad_dout[0, row, 0, 3] = math.inf
            dv = kernel(q, k, v, bad_dout, window=(-1, 0))[4]
            assert dv[0, 59, 0, 3] == math.inf
            torch.testing.assert_close(dv[0, 59, 0, others], clean[4][0, 59, 0, others])


@on_every_isa
def test_values_that_a_row_sees_reach_it_in_their_own_dimension(isa):
    run_on(isa, "check_one_dimension()")


# ---- Huge scores -----------------------------------------------------------------------------------------------------


def check_a_lone_key():
    """One visible key: out is its value, lse its score, dv is dout, whatever the score."""
    for dtype in DTYPES:
        for x in (1e4, 2e4, 40064.0, 6e4, 1e12, 1e17):
            if x > torch.finfo(dtype).max:
                continue
            for d in (64, 80, 128):
                for seqlen, heads in ((1, 1), (70, 2)):  # without packing K and V, and with
                    sign = torch.where(torch.arange(seqlen) % 3 == 0, -1.0, 1.0)[None, :, None, None]
                    q = (torch.full((1, seqlen, heads, d), x) * sign).to(dtype)
                    k = torch.full((1, seqlen, heads, d), x).to(dtype)
                    v, dout = (torch.randn(1, seqlen, heads, d).to(dtype) for _ in range(2))
                    # A window of 0 keys to either side: each row sees its own key.
                    out, lse, dq, dk, dv, _ = kernel(q, k, v, dout, window=(0, 0))
                    assert torch.equal(out, v), (dtype, x, d)
                    score = (q.double() * k.double()).sum(-1).transpose(1, 2) * d**-0.5
                    torch.testing.assert_close(lse.double(), score, rtol=1e-5, atol=0)
                    assert torch.equal(dv, dout), (dtype, x, d)
                    # dP - delta, which is 0 but for the order of summation, and rounding of P where scores are so large.
                    assert dq.isfinite().all()
                    assert dk.isfinite().all()


def check_many_keys():
    """The key of the largest score wins where float64 says that nothing is near it."""
    for dtype in DTYPES:
        for gain in (1e3, 2e4):
            for softcap, has_sinks in ((0.0, False), (0.0, True), (1e12, False)):
                q, k, v, dout, _, sinks = make_inputs(2, 64, 300, 4, 2, 128, 64, dtype, seed=1)
                q, k = ((x.float() * gain).clamp(-6e4, 6e4).to(dtype) for x in (q, k))
                out, lse, dq, dk, dv, *_ = kernel(q, k, v, dout, None, sinks if has_sinks else None, softcap=softcap)
                keys, values = (x.double().transpose(1, 2).repeat_interleave(2, 1) for x in (k, v))
                scores = q.double().transpose(1, 2) @ keys.transpose(-1, -2) * 128**-0.5
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                top = scores.topk(2, -1)
                size = (q.double().abs().transpose(1, 2) @ keys.abs().transpose(-1, -2) * 128**-0.5).amax(-1)
                is_clear = top.values[..., 0] - top.values[..., 1] > 1e-5 * size + 100
                assert is_clear.float().mean() > 0.9, (dtype, gain, softcap)
                expected = values.gather(2, top.indices[..., :1].expand(-1, -1, -1, 64))
                torch.testing.assert_close(
                    out.transpose(1, 2)[is_clear].double(), expected[is_clear], rtol=1e-2, atol=1e-2
                )
                torch.testing.assert_close(lse.double(), top.values[..., 0], rtol=1e-5, atol=0)
                assert all(x.isfinite().all() for x in (out, lse, dq, dk, dv))
                # Each row adds its dout to the dv of the key that won.
                dv64 = torch.zeros(2, 4, 300, 64, dtype=torch.float64)
                dv64.scatter_add_(2, top.indices[..., :1].expand(-1, -1, -1, 64), dout.double().transpose(1, 2))
                dv64 = dv64.view(2, 2, 2, 300, 64).sum(2).transpose(1, 2)
                winners = torch.zeros(2, 4, 300).scatter_(2, top.indices[..., 0], (~is_clear).float())
                is_clear_key = (winners.view(2, 2, 2, 300).sum(2) == 0).transpose(1, 2)
                error = (dv.double() - dv64).abs().amax(-1)[is_clear_key]
                assert (error < 0.1).float().mean() > 0.99, error.max()


@on_every_isa
def test_a_row_of_one_key_gives_its_value_however_large_the_score(isa):
    run_on(isa, "check_a_lone_key()")


@on_every_isa
def test_the_largest_of_huge_scores_wins(isa):
    run_on(isa, "check_many_keys()")


def test_negative_huge_scores_are_no_dead_rows():
    q, k, v, *_ = make_inputs(1, 40, 40, 1, 1, 64, 64, torch.float32)
    q, k = q.abs() * -1e7, k.abs() * 1e7
    out, lse = kernel(q, k, v)
    assert out.isfinite().all()
    assert (lse < -1e12).all()
    assert (out.abs().amax(-1) > 0).all()


# ---- Sinks of NaN and infinity ---------------------------------------------------------------------------------------


def softmax_with_sinks(q, k, v, sinks, visible):
    """float64: out as softmax has it, NaN of NaN and of infinity; lse as logsumexp has it."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~visible, -math.inf)
    logits = torch.cat([scores, sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    dead = (logits == -math.inf).all(-1)
    weights = torch.softmax(logits, -1).masked_fill(dead[..., None], 0.0)
    return (weights[..., :-1] @ v).transpose(1, 2), torch.logsumexp(logits, -1)


@pytest.mark.parametrize("seqlen_q", [3, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_and_nan_sinks_give_what_softmax_gives_in_their_head_alone(seqlen_q, dtype):
    sinks = torch.tensor([0.5, math.nan, math.inf, -math.inf])
    for seqlen_kv in (0, 2, 40, 90):
        q, k, v, dout, dlse, _ = make_inputs(1, seqlen_q, seqlen_kv, 4, 4, 32, 32, dtype)
        out, lse, dq, dk, dv, dsinks = kernel(q, k, v, dout, dlse, sinks, window=(-1, 0))
        visible = visible_pairs([seqlen_q], [seqlen_kv], seqlen_q, seqlen_kv, (-1, 0))
        expected, expected_lse = softmax_with_sinks(q, k, v, sinks, visible)
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5, equal_nan=True)
        for head in (0, 3):
            assert all(x[:, :, head].isfinite().all() for x in (dq, dk, dv))
        sees_any = visible.any(1)
        for head in (1, 2):  # as the gradient of a softmax that is NaN
            assert dq[:, sees_any, head].isnan().all()
            assert dv[:, visible.any(0), head].isnan().all()
            assert dk[:, visible.any(0), head].isnan().all()
        assert dsinks[[0, 3]].isfinite().all()
        assert dsinks[1:3].isnan().all()
