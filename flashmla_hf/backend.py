"""The interface of the implementations behind :func:`flashmla_hf.attention`.

Each module of :mod:`flashmla_hf.backends` defines two functions of a validated :class:`Call` and one :class:`Backend` of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from flashmla_hf.ops import dtype_name
from flashmla_hf.validation import Call

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Backend:
    """One implementation of attention.

    refusal: gives the reason why it cannot compute the call, with the expected and the actual value; ``None`` if it can.
    run: computes the call. It gives out in q's dtype, [batch, seqlen_q, heads_q, head_dim_v] or packed
        [total_q, heads_q, head_dim_v], and lse in fp32, [batch, heads_q, seqlen_q] or packed [heads_q, total_q]; ``None``
        instead of lse if ``refusal`` refuses ``return_lse``.
    """

    refusal: Callable[[Call], str | None]
    run: Callable[[Call], tuple[torch.Tensor, torch.Tensor | None]]


def kernel_refusal(call: Call) -> str | None:
    """The reason why no fused kernel of this package computes the call; ``None`` if it does not rule them out."""
    if call.attn_mask is not None:
        return "attn_mask is given: expected none (impl='sdpa' and impl='reference' take one)"
    if call.dropout_p > 0.0:
        return f"dropout_p={call.dropout_p}: expected 0 (impl='torch_flash', 'sdpa' and 'reference' compute dropout)"
    return dtype_refusal(call.q.dtype)


def dtype_refusal(dtype: torch.dtype) -> str | None:
    if dtype not in KERNEL_DTYPES:
        return (
            f"dtype {dtype_name(dtype)}: expected float32, float16 or bfloat16 (impl='reference' computes float64; in a model "
            "attn_implementation='eager')"
        )
    return None
