"""What the GPU tests share: why ``sm90`` is not there, whether it has a backward, and a record of what was chosen."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import replace

import torch
from cases import Case

from flashmla_hf import dispatch, ops

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


@contextlib.contextmanager
def recorded_choices(stub: tuple[str, ...] = ()):
    """Counts, by implementation, the calls inside the block. Those of ``stub`` are not computed: zeros come back."""
    calls: Counter[str] = Counter()
    saved = dict(dispatch.IMPLEMENTATIONS)

    def recording(name, implementation):
        def run(call):
            calls[name] += 1
            if name in stub:
                return call.q.new_zeros((*call.q.shape[:-1], call.v.shape[-1])), None
            return implementation.run(call)

        return replace(implementation, run=run)

    dispatch.IMPLEMENTATIONS.update({name: recording(name, item) for name, item in saved.items()})
    try:
        yield calls
    finally:
        dispatch.IMPLEMENTATIONS.update(saved)
