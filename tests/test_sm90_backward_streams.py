"""The Hopper backward on streams, in CUDA graphs, on a second GPU and under opcheck; its operator names a wrong argument."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cases import Case
from gpu_support import DEVICE, captured, needs_sm90, on_gpu, rows, run_behind_other_work
from sm90_support import (
    BACKWARD,
    NAMES,
    assert_same_bits,
    assert_same_up_to_rounding,
    copy_inputs,
    gradients,
    operator,
    saved,
)

pytestmark = needs_sm90


@on_gpu
@rows
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_backward_runs_on_the_current_stream_and_waits_for_nothing(row, deterministic):
    case = Case(seqlens_q=(300, 41, 100), heads_q=4, heads_kv=2, head_dim_qk=row[0], head_dim_v=row[1], has_sinks=True)
    inputs = case.inputs(torch.bfloat16, DEVICE)
    late = replace(inputs, q=torch.zeros_like(inputs.q), dout=torch.zeros_like(inputs.dout))
    out, lse = saved(case, inputs)
    expected = operator(case, inputs, out, lse, deterministic=deterministic)
    got = run_behind_other_work(
        lambda: (late.q.copy_(inputs.q), late.dout.copy_(inputs.dout)),
        lambda: operator(case, late, out, lse, deterministic=deterministic),
    )
    assert_same_up_to_rounding(*(dict(zip(NAMES, grads, strict=True)) for grads in (got, expected)))


@on_gpu
@pytest.mark.parametrize("is_packed", [False, True], ids=["dense", "packed"])
@rows
def test_a_cuda_graph_of_forward_and_backward_replays_with_changed_inputs(row, is_packed):
    shape = {"seqlens_q": (150, 50), "seqlens_kv": (90, 110)} if is_packed else {"batch": 2, "seqlen_q": 100}
    case = Case(heads_q=4, heads_kv=2, head_dim_qk=row[0], head_dim_v=row[1], is_causal=True, has_sinks=True, **shape)
    inputs = case.inputs(torch.bfloat16, DEVICE)
    graph, results = captured(lambda: gradients(case, inputs, deterministic=True))
    other = replace(case, seqlens_q=(20, 180), seqlens_kv=(199, 1)) if is_packed else case
    other_inputs = other.inputs(torch.bfloat16, DEVICE, seed=1)
    copy_inputs(inputs, other_inputs)
    expected = gradients(other, other_inputs, deterministic=True)
    for _ in range(3):  # what orders the sums must be as new each time
        for x in results.values():
            x.fill_(math.nan)
        graph.replay()
        assert_same_bits(results, expected)


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_second_gpu_computes_gradients_and_the_current_one_stays():
    case = Case(batch=2, seqlen_q=300, heads_q=4, heads_kv=2, is_causal=True)
    inputs = case.inputs(torch.bfloat16, DEVICE)
    there = replace(inputs, **{name: getattr(inputs, name).to("cuda:1") for name in ("q", "k", "v", "dout", "dlse")})
    got, expected = (gradients(case, x, deterministic=True) for x in (there, inputs))
    assert torch.cuda.current_device() == 0
    assert_same_bits({name: x.to("cuda:0") for name, x in got.items()}, expected)


@pytest.mark.parametrize("is_packed", [False, True], ids=["dense", "packed"])
def test_opcheck_accepts_the_operator(is_packed):
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
