"""Inputs of the CPU kernel, and its operators called past dispatch."""

from __future__ import annotations

import pytest
import torch

from flashmla_hf import libraries, ops  # noqa: F401  ops registers the operators

needs_cpu_library = pytest.mark.skipif(
    "cpu" in libraries.unavailable, reason=f"cpu: {libraries.unavailable.get('cpu')}"
)
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def make_inputs(batch, seqlen_q, seqlen_kv, heads_q, heads_kv, head_dim_qk, head_dim_v, dtype, gain=1.0, seed=0):
    """q, k, v, dout, dlse, sinks; ``gain`` scales q, and so the scores."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    q = (normal(batch, seqlen_q, heads_q, head_dim_qk) * gain).to(dtype)
    k = normal(batch, seqlen_kv, heads_kv, head_dim_qk).to(dtype)
    v = normal(batch, seqlen_kv, heads_kv, head_dim_v).to(dtype)
    dout = normal(batch, seqlen_q, heads_q, head_dim_v).to(dtype)
    return q, k, v, dout, normal(batch, heads_q, seqlen_q), normal(heads_q)


def kernel(q, k, v, dout=None, dlse=None, sinks=None, *, window=(-1, -1), softcap=0.0, scale=None, cu=None, needs=None):
    """out, lse and, where dout is given, dq, dk, dv, dsinks."""
    cu_q, cu_kv = cu or (None, None)
    longest = [0, 0] if cu is None else [int(x.diff().max()) for x in cu]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options = (cu_q, cu_kv, *longest, scale, *window, softcap, False)
    out, lse = torch.ops.flashmla.flash_attn_forward(q, k, v, sinks, *options)
    if dout is None:
        return out, lse
    needs = needs or (True, True, True, sinks is not None)
    return out, lse, *torch.ops.flashmla.flash_attn_backward(dout, dlse, q, k, v, out, lse, sinks, *options, *needs)
