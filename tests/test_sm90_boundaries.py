"""Wrong boundaries of packed sequences neither end the process nor change a tensor beside them.

A call may end its process, so ``survive`` is run by ``in_subprocess``.
"""

from __future__ import annotations

import pytest
import sanitize_gpu
import torch
from cases import Case
from fresh_python import in_subprocess
from gpu_support import DEVICE, IMPL, cu, needs_sm90

from flashmla_hf import attention


def survive(values):
    """Calls with these boundaries, which promise nothing but that they end, and that the process and the tensors beside
    survive."""
    rows_q, wrong = 100, cu(*values)
    right = cu(0, 40, rows_q)
    for dims in ((64, 64), (128, 128), (192, 128), (256, 256)):
        case = Case(heads_q=2, heads_kv=1, head_dim_qk=dims[0], head_dim_v=dims[1], seqlens_q=(40, 60))
        inputs = case.inputs(torch.bfloat16, DEVICE)
        before = attention(inputs.q, inputs.k, inputs.v, cu_seqlens_q=right, cu_seqlens_kv=right, impl=IMPL)
        kept = [x.clone() for x in (inputs.q, inputs.k, inputs.v, before)]
        leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        for boundaries in ((wrong, right), (right, wrong), (wrong, wrong)):
            for mask in ({}, {"is_causal": True}, {"window": (9, 9)}):
                for bound in (None, 7, 10**6):
                    try:
                        out = attention(
                            *leaves, cu_seqlens_q=boundaries[0], cu_seqlens_kv=boundaries[1], max_seqlen_q=bound,
                            max_seqlen_kv=bound, impl=IMPL, deterministic=bound is None, **mask,
                        )  # fmt: skip
                        torch.autograd.grad(out, leaves, inputs.dout)
                    except RuntimeError as error:  # the CPU kernel reads them
                        if "seqlen" not in str(error):
                            raise
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        assert all(torch.equal(x, y) for x, y in zip((inputs.q, inputs.k, inputs.v, before), kept, strict=True))
        after = attention(inputs.q, inputs.k, inputs.v, cu_seqlens_q=right, cu_seqlens_kv=right, impl=IMPL)
        assert torch.equal(after, before)
    print("survived")


@needs_sm90
@pytest.mark.parametrize("values", sanitize_gpu.CORRUPT.values(), ids=sanitize_gpu.CORRUPT.keys())
def test_wrong_boundaries_do_not_crash_the_process(values):
    assert in_subprocess("test_sm90_boundaries", f"survive({values!r})") == "survived"


@needs_sm90
def test_a_crash_in_the_subprocess_is_noticed():
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        in_subprocess("test_sm90_boundaries", "attention(1 / 0)")
