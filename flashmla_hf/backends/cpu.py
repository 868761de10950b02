"""Implementation ``cpu``: the compiled C++ kernels (csrc/cpu/)."""

from __future__ import annotations

import torch

from flashmla_hf import libraries, ops
from flashmla_hf.backend import Backend, kernel_refusal
from flashmla_hf.validation import Call


def refusal(call: Call) -> str | None:
    return device_refusal(call.q) or kernel_refusal(call)


def device_refusal(q: torch.Tensor) -> str | None:
    """Why no call with this q can be computed here; ``None`` if it does not rule that out."""
    if "cpu" in libraries.unavailable:
        return f"{libraries.unavailable['cpu']}; reinstall flashmla_hf on a machine with a C++17 compiler"
    if q.device.type not in ("cpu", "meta"):
        return f"the tensors are on {q.device}: expected cpu"
    return None


def run(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.flash_attn(call)


BACKEND = Backend(refusal, run)
