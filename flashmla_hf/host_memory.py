"""The host's memory: how much of it this process can take, and how much it has taken.

The limits are those of Linux and of the control group (version 1 or 2) that a container runs in. Everything that plans by
the host's memory asks here, so that a search and a plan cannot disagree.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from pathlib import Path

GIB = 2**30

_CGROUP = Path("/sys/fs/cgroup")
# Names of a control group's limit, usage and statistics: version 2, then version 1.
_FILES = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)
# glibc's parameters of mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def available_bytes() -> int:
    """Bytes that this process can take from the host now: the least of what Linux and the control group allow."""
    available = [_meminfo_available()]
    for limit_name, usage_name, statistics_name in _FILES:
        limit, usage = _number(limit_name), _number(usage_name)
        if limit is not None and usage is not None:
            available.append(limit - usage + _reclaimable(statistics_name))
    return max(0, min(available))


def total_bytes() -> int:
    """Bytes of an idle host: the machine's memory, or the control group's limit if that is lower."""
    limits = [_number(limit_name) for limit_name, _, _ in _FILES]
    return min([_machine_bytes(), *(limit for limit in limits if limit is not None)])


def resident_bytes() -> int:
    """Bytes of this process that are in memory now."""
    return _status_bytes("VmRSS")


def peak_resident_bytes() -> int:
    """The largest :func:`resident_bytes` of this process since its start, or since :func:`reset_peak`."""
    return _status_bytes("VmHWM")


def reset_peak() -> bool:
    """Starts a new :func:`peak_resident_bytes`. False if the system does not permit it: the old peak then stays."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def return_freed_blocks(at_once: bool) -> bool:
    """Whether freed memory leaves the process at once, so that its resident size is live memory. False without glibc.

    It takes time, because every new block is faulted in again: switch it on for a call whose memory is measured, and off
    for calls that are timed.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 2**20 if at_once else 2**25)  # 2**25 is the most that glibc takes
        libc.mallopt(_M_TRIM_THRESHOLD, 2**20 if at_once else 2**30)
        libc.malloc_trim(0)
        return True
    return False


def _machine_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _meminfo_available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo: expected a line MemAvailable")


def _number(name: str) -> int | None:
    """A control group's number. ``None`` if there is no such file or no limit ("max")."""
    try:
        text = (_CGROUP / name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _reclaimable(name: str) -> int:
    """Bytes of file cache that count as used and that the system takes back before it refuses memory."""
    try:
        lines = (_CGROUP / name).read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.split()[0] == "inactive_file")


def _status_bytes(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError(f"/proc/self/status: expected a line {name}, got none")
    return int(found.group(1)) * 1024
