"""Implementation ``reference``: the oracle of :mod:`flashmla_hf.reference`, which computes every valid call."""

from __future__ import annotations

import torch

from flashmla_hf import reference
from flashmla_hf.backend import Backend
from flashmla_hf.validation import Call


def refusal(call: Call) -> None:
    return None


def run(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = reference.attention(
        call.q,
        call.k,
        call.v,
        sinks=call.sinks,
        attn_mask=call.attn_mask,
        cu_seqlens_q=call.cu_seqlens_q,
        cu_seqlens_kv=call.cu_seqlens_kv,
        scale=call.scale,
        window_left=call.window_left,
        window_right=call.window_right,
        softcap=call.softcap,
        dropout_p=call.dropout_p,
    )
    return out, lse


BACKEND = Backend(refusal, run)
