"""Attention to latents with gradients on a Hopper GPU: long calls, memory, and nothing that is waited for.

    python3 -m pytest tests/test_sm90_latent.py                          # some 20 s on an H200

tests/test_latent.py has the error rule, for every implementation.
"""

import dataclasses
import functools

import gpu_support
import numerics
import pytest
import torch
from cases import Case
from latent_support import DIMS, check, ours

from flashmla_hf import latent_attention

pytestmark = [gpu_support.needs_sm90, gpu_support.on_gpu]


@gpu_support.half
@pytest.mark.parametrize(("heads", "seqlen"), [(16, 1001), (128, 333), (1, 2049), (20, 4097)])
def test_long_calls_on_a_gpu(heads, seqlen, dtype):
    for options in ({"is_causal": True}, {"window": (200, 0)}, {"softcap": 20.0, "is_causal": True, "has_sinks": True}):
        check("sm90", Case(seqlen_q=seqlen, heads_q=heads, **options, **DIMS), dtype)


@pytest.mark.parametrize("softcap", [0.0, 20.0])
def test_memory_on_a_gpu_does_not_grow_with_the_scores(softcap):
    """Beyond inputs and results: the sum of dK, the lse, and a workspace of a constant size."""
    mib = 2**20
    for seqlen in (4096, 16384):
        case = Case(seqlen_q=seqlen, heads_q=16, is_causal=True, softcap=softcap, **DIMS)
        inputs = case.inputs(torch.bfloat16, "cuda")
        leaves = [x.requires_grad_() for x in (inputs.q, inputs.k)]
        out = latent_attention(*leaves, head_dim_v=512, is_causal=True, softcap=softcap)
        run = functools.partial(torch.autograd.grad, out, leaves, inputs.dout, retain_graph=True)
        run()  # the workspace of cuBLAS
        results = sum(x.numel() * 2 for x in leaves)
        needed = gpu_support.peak_bytes(run) - results - 4 * seqlen * 576
        assert needed <= (384 + 128 * (softcap > 0.0)) * mib, f"{seqlen} keys: {needed / mib:.0f} MiB"


def test_nothing_is_waited_for_on_a_gpu():
    case = Case(seqlen_q=700, heads_q=16, is_causal=True, has_sinks=True, **DIMS)
    inputs = case.inputs(torch.bfloat16, "cuda")
    expected = numerics.run(ours("sm90"), case, inputs)
    later = torch.zeros_like(inputs.q)
    changed = dataclasses.replace(inputs, q=later)

    def call():
        leaves = [x.detach().requires_grad_() for x in (changed.q, changed.k, changed.sinks)]
        out, _ = latent_attention(
            *leaves[:2], head_dim_v=512, sinks=leaves[2], is_causal=True, return_lse=True, impl="sm90"
        )
        return out, *torch.autograd.grad(out, leaves, changed.dout)

    got = gpu_support.run_behind_other_work(lambda: later.copy_(inputs.q), call)
    assert torch.equal(got[0], expected.out)
    assert all(x.isfinite().all() for x in got)
