"""The free memory by which the options "auto" decide."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch

from flashmla_hf.host_memory import GIB

# Decisions on a machine without a GPU are made by this number, so that they are the same everywhere.
CPU_BYTES = 8 * GIB


def device_free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on ``device`` without an error.

    These are the driver's free bytes, within the limit of ``torch.cuda.set_per_process_memory_fraction``, and the bytes that
    torch's allocator holds unused.
    """
    if device.type != "cuda":
        return CPU_BYTES
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(index)) - reserved
    return max(0, min(free, allowed)) + reserved - torch.cuda.memory_allocated(device)


def missing_gradient_bytes(parameters: Iterable[torch.nn.Parameter], device: torch.device) -> int:
    """Bytes that the next backward pass allocates on ``device`` for gradients that trained ``parameters`` do not have yet."""
    return sum(
        p.numel() * p.element_size()
        for p in parameters
        if p.requires_grad and p.grad is None and p.device.type == device.type
    )


def host_sharers() -> int:
    """Processes that share this machine's memory, as torchrun and accelerate state it in ``LOCAL_WORLD_SIZE``."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(text)) if text.isdigit() else 1
