"""The Hopper forward on streams, in CUDA graphs, on a second GPU, under torch.compile and opcheck."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cases import Case
from counting import counted_calls
from gpu_support import DEVICE, IMPL, captured, needs_sm90, on_gpu, rows, run_behind_other_work
from sm90_support import copy_inputs, run, tensors

from flashmla_hf import attention


@needs_sm90
@on_gpu
@rows
def test_a_call_runs_on_the_current_stream_and_waits_for_nothing(row):
    case = Case(seqlens_q=(300, 41, 100), heads_q=4, heads_kv=2, head_dim_qk=row[0], head_dim_v=row[1], has_sinks=True)
    inputs = case.inputs(torch.bfloat16, DEVICE)
    q = torch.zeros_like(inputs.q)
    expected = run(inputs, case)
    got = run_behind_other_work(lambda: q.copy_(inputs.q), lambda: run(inputs, case, q=q))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@needs_sm90
@on_gpu
@pytest.mark.parametrize("is_packed", [False, True])
@rows
def test_a_cuda_graph_of_every_kernel_replays_with_changed_inputs(row, is_packed):
    shape = {"seqlens_q": (150, 50), "seqlens_kv": (90, 110)} if is_packed else {"batch": 2, "seqlen_q": 100}
    case = Case(heads_q=4, heads_kv=2, head_dim_qk=row[0], head_dim_v=row[1], is_causal=True, has_sinks=True, **shape)
    inputs = case.inputs(torch.bfloat16, DEVICE)
    graph, results = captured(lambda: run(inputs, case))
    other = (replace(case, seqlens_q=(20, 180), seqlens_kv=(199, 1)) if is_packed else case).inputs(
        torch.bfloat16, DEVICE, seed=1
    )
    copy_inputs(inputs, other)
    for x in results:
        x.fill_(math.nan)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, run(other, case), strict=True))


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
def test_opcheck_accepts_the_operator():
    q, k, v = tensors(seqlen_q=70).values()
    numbers = (70, 70, 0.125, 20, 0, 0.0, False)
    torch.library.opcheck(
        torch.ops.flashmla.flash_attn_forward.default,
        (q, k, v, None, None, None, *numbers),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
