"""The free memory by which the options "auto" decide."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch

GIB = 2**30
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


def host_available_bytes() -> int:
    """Bytes that this process can take from the host: the least of what Linux and the control group say."""
    available = [_meminfo_available()]
    for limit, usage, statistics in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        most, used = _number(limit), _number(usage)
        if most is not None and used is not None:
            available.append(most - used + _reclaimable(statistics))
    return max(0, min(available))


_CGROUP = Path("/sys/fs/cgroup")


def _meminfo_available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo: expected a line MemAvailable")


def _number(name: str) -> int | None:
    """A control group's number, ``None`` where there is no such file or no limit ("max")."""
    try:
        text = (_CGROUP / name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _reclaimable(name: str) -> int:
    """The file cache that counts as used and goes when asked."""
    try:
        lines = (_CGROUP / name).read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.split()[0] == "inactive_file")
