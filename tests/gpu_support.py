"""What the GPU tests share: why ``sm90`` is not there, whether it has a backward, what it computes."""

from __future__ import annotations

import torch
from cases import Case

from flashmla_hf import ops

HALF = (torch.bfloat16, torch.float16)


def sm90_missing() -> str | None:
    """Why sm90 cannot run here at all; ``None`` where it can."""
    if not torch.cuda.is_available():
        return "no GPU"
    if torch.cuda.get_device_capability() != (9, 0):
        return "not a Hopper GPU"
    return ops.unavailable.get("sm90")


def has_backward(impl: str = "sm90") -> bool:
    """Whether ``impl`` computes gradients on the GPU; flex always does."""
    operator = "flashmla::flash_attn_backward"
    return impl != "sm90" or torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CUDA")


def gradients(impl: str = "sm90") -> tuple[str, ...]:
    """``wants`` of numerics.run: every gradient that ``impl`` computes on the GPU."""
    return ("q", "k", "v", "sinks") if has_backward(impl) else ()


def is_for_sm90(case: Case, dtype: torch.dtype) -> bool:
    """Whether sm90 promises to compute this call."""
    return dtype in HALF and case.sm90_row is not None
