"""Property-based: whatever call the strategy draws, a kernel keeps the error rule, forward and backward.

The CPU kernel on every machine; the Hopper kernel on more than 2,000 calls of its own space where there is one:

    python3 -m pytest tests/test_fuzz.py -k sm90
    FLASHMLA_FUZZ_CASES=20000 FLASHMLA_FUZZ_SEED=1 python3 -m pytest tests/test_fuzz.py -k sm90   # more, and others

A failing call of the sweep prints a command that runs it alone.
"""

import dataclasses
import os
import random
from collections import Counter

import gpu_support
import numerics
import pytest
import torch
from cases import SM90_ROWS, Case, calls, random_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import check

from flashmla_hf.dispatch import attention

# Split by dtype so that two workers share the work.
CASES_PER_DTYPE = {torch.float32: 900, torch.bfloat16: 700, torch.float16: 500}

SWEEP_CASES = int(os.environ.get("FLASHMLA_FUZZ_CASES", "2400"))
SWEEP_SEED = int(os.environ.get("FLASHMLA_FUZZ_SEED", "0"))
MOST_FAILURES = 12  # after so many a sweep ends
LONG = {"max_seqlen": 600, "longest": 2500, "max_scores": 2**24}


@pytest.mark.parametrize("dtype", CASES_PER_DTYPE, ids=str)
def test_random_calls_keep_the_error_rule(dtype):
    @settings(
        max_examples=CASES_PER_DTYPE[dtype], deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(case=calls(), seed=st.integers(0, 2**31))
    def property_(case, seed):
        check("cpu", case, dtype, seed=seed)

    before = dataclasses.replace(numerics.looks)
    property_()
    judged = numerics.looks - before
    assert judged.calls >= CASES_PER_DTYPE[dtype]
    assert judged.second <= numerics.MOST_SECOND_LOOKS * judged.calls, judged


def test_second_looks_are_counted():
    """A call that is right and unlucky, by eager that was lucky; and one that is wrong, which looks do not save."""
    case = Case(seqlen_q=9, head_dim_qk=8)
    before = dataclasses.replace(numerics.looks)
    check("cpu", case, torch.float32)
    assert numerics.looks - before == numerics.Looks(1, 0)
    with pytest.raises(AssertionError):
        check(WRONG["output rows shifted"], case, torch.float32)
    assert numerics.looks - before == numerics.Looks(2, 1)


def test_errors_of_delta_are_those_of_a_backward_that_is_given_a_rounded_output():
    case = Case(seqlen_q=20, seqlen_kv=30, heads_q=2, head_dim_qk=16, is_causal=True, has_sinks=True)
    inputs = case.inputs(torch.bfloat16)
    truth = numerics.reference64(case, inputs)
    out = truth.out.bfloat16()
    errors = numerics.errors_of_delta(case, inputs, out, truth, {})
    q, k, sinks, dout = (getattr(inputs, name).double() for name in ("q", "k", "sinks", "dout"))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * 16**-0.5
    p = torch.exp(scores.tril(10) - truth.lse[..., None]).tril(10)
    delta = ((out.double() - truth.out) * dout).sum(-1)
    delta += delta.sign() * torch.finfo(torch.float32).eps * (truth.out * dout).abs().sum(-1)
    delta = delta.transpose(1, 2)[..., None]
    dscores = -p * delta
    dsinks = -(torch.exp(sinks[None, :, None] - truth.lse) * delta[..., 0]).sum((0, 2))
    expected = {
        "dq": torch.einsum("bhij,bjhd->bihd", dscores, k) * 16**-0.5,
        "dk": torch.einsum("bhij,bihd->bjhd", dscores, q) * 16**-0.5,
        "dv": torch.zeros(1),
        "dsinks": dsinks,
    }
    assert errors.keys() == expected.keys()
    for name, error in errors.items():
        assert error == pytest.approx(expected[name].abs().max().item(), rel=1e-6), name
    assert numerics.errors_of_delta(case, inputs, out, truth, {"has_dout": False}) == {}


def reproducer(impl, case, dtype, device, case_seed) -> str:
    call = f"numerics.check({impl!r}, {case!r}, {dtype}, {device!r}, seed={case_seed})"
    return f'PYTHONPATH=.:tests python3 -c "import torch, numerics; from cases import Case; {call}"'


def sweep(impl, name, dtype, device, cases, most_failures=MOST_FAILURES) -> list[str]:
    """Holds every (case, seed) to the rule; a line for each that breaks it, and how to run it again. ``name`` is that of
    ``impl`` in these lines."""
    failures = []
    for case, case_seed in cases:
        try:
            check(impl, case, dtype, device, seed=case_seed)
        except AssertionError as error:
            failures.append(f"{str(error).splitlines()[0]}\n  {reproducer(name, case, dtype, device, case_seed)}")
        except RuntimeError as error:
            failures.append(f"{str(error).splitlines()[0]}\n  {reproducer(name, case, dtype, device, case_seed)}")
            if "cannot compute this call" not in str(error):
                break  # a CUDA error: nothing after it on this device can be trusted
        if len(failures) == most_failures:
            break
    return failures


def sm90_cases(number, first_seed, **options) -> list[tuple[Case, int]]:
    """(case, seed of its values); the same ones for the same ``first_seed``."""
    source = random.Random(first_seed)
    options = LONG | options
    return [
        (random_case(source.randint, source.choice, rows=SM90_ROWS, **options), source.getrandbits(31))
        for _ in range(number)
    ]


@pytest.mark.skipif(gpu_support.sm90_missing() is not None, reason=f"sm90: {gpu_support.sm90_missing()}")
@pytest.mark.parametrize("dtype", gpu_support.HALF, ids=str)
def test_random_calls_of_sm90_keep_the_error_rule(dtype):
    cases = sm90_cases(SWEEP_CASES // 2, SWEEP_SEED + gpu_support.HALF.index(dtype))
    failures = sweep("sm90", "sm90", dtype, "cuda", cases)
    assert not failures, f"{len(failures)} calls of {len(cases)} break the rule:\n" + "\n".join(failures)


@pytest.mark.parametrize("first_seed", [SWEEP_SEED, SWEEP_SEED + 1])
def test_the_sweep_of_sm90_reaches_every_kernel_and_feature(first_seed):
    cases = [case for case, _ in sm90_cases(1000, first_seed)]
    assert cases == [case for case, _ in sm90_cases(1000, first_seed)]
    kernels = Counter((case.sm90_row, case.mask_kind, case.is_packed) for case in cases)
    assert {key[0] for key in kernels} == set(SM90_ROWS)
    assert len(kernels) == len(SM90_ROWS) * 3 * 2
    assert min(kernels.values()) >= 3
    features = {
        "the exact row": lambda case: (case.head_dim_qk, case.head_dim_v) == case.sm90_row,
        "padded head dims": lambda case: (case.head_dim_qk, case.head_dim_v) != case.sm90_row,
        "v wider than qk": lambda case: case.head_dim_v > case.head_dim_qk,
        **{f"group {n}": lambda case, n=n: case.heads_q == n * case.heads_kv for n in (1, 2, 3, 4, 7, 8)},
        "mqa": lambda case: case.heads_kv == 1 < case.heads_q,
        "sinks": lambda case: case.has_sinks,
        "softcap": lambda case: case.softcap > 0,
        "scale 0": lambda case: case.scale == 0,
        "negative scale": lambda case: case.scale is not None and case.scale < 0,
        **{layout: lambda case, layout=layout: case.layout == layout for layout in ("transposed", "sliced", "mixed")},
        "empty sequences": lambda case: case.is_packed and 0 in case.seqlens_q and 0 in case.seqlens_kv,
        "unused rows": lambda case: case.is_packed and case.rest_q > 0 and case.rest_kv > 0,
        **{f"outliers {n}": lambda case, n=n: case.outliers == n for n in (10, 100)},
        "masked rows": lambda case: not case.is_packed and case.seqlen_q > case.seqlen_kv and case.is_causal,
        "long": lambda case: not case.is_packed and max(case.seqlen_q, case.seqlen_kv) > 600,
    }
    rare = {name: n for name, has in features.items() if (n := sum(map(has, cases))) < 8}
    assert not rare, f"hardly in the sweep: {rare}"


def _wider_window(*, window=None, **arguments):
    left, right = window or (None, None)
    return attention(window=(left if left is None else left + 1, right), **arguments)


def _gradients_of_keys_shifted(*, k, **arguments):
    if k.requires_grad:
        k = k * 1  # what the hook changes is on its way to k, not k's own gradient
        k.register_hook(lambda grad: grad.roll(1, dims=-3))
    return attention(k=k, **arguments)


WRONG = {
    "the window one key too wide": _wider_window,
    "sinks forgotten": lambda *, sinks=None, **arguments: attention(sinks=None, **arguments),
    "softcap forgotten": lambda *, softcap=0.0, **arguments: attention(**arguments),
    "gradients of keys shifted": _gradients_of_keys_shifted,
    "output rows shifted": lambda **arguments: (lambda out, lse: (out.roll(1, dims=-3), lse))(*attention(**arguments)),
}


def test_the_sweep_finds_what_is_wrong_and_prints_a_command_that_shows_it():
    """The sweep of the GPU on the CPU kernel: nothing to complain of there, and something for every wrong attention."""
    cases = sm90_cases(40, 0, max_seqlen=70, longest=None)
    assert sweep("cpu", "cpu", torch.bfloat16, "cpu", cases) == []
    for name, wrong in WRONG.items():
        failures = sweep(wrong, "cpu", torch.bfloat16, "cpu", cases, most_failures=1)
        assert failures, f"{name}: passes"
        assert "numerics.check('cpu', Case(name=''" in failures[0]
        assert "error" in failures[0] or "infinities" in failures[0]


def test_the_reproducer_of_the_sweep_is_the_same_call():
    case, case_seed = Case(seqlen_q=9, head_dim_qk=8, window=(3, None)), 5
    command = reproducer("cpu", case, torch.bfloat16, "cpu", case_seed)
    program = command.split('"')[1]
    called = []
    call = program.rsplit("; ", 1)[1].removeprefix("numerics.check")
    eval(f"record{call}", {"record": lambda *a, **k: called.append((a, k)), "torch": torch, "Case": Case})
    assert called == [(("cpu", case, torch.bfloat16, "cpu"), {"seed": case_seed})]
