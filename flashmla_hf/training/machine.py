"""The device that a run uses: its name, clocks, memory and speed."""

from __future__ import annotations

import functools
import os
import platform
import re
import time
from pathlib import Path

import torch

from flashmla_hf import host_memory, nvidia_smi

OUT_OF_MEMORY_MESSAGE = re.compile(
    r"DefaultCPUAllocator: (?:not enough memory|can't allocate memory)|CUDA (?:driver )?error: out of memory|"
    r"CUDA out of memory\. Tried to allocate|patch 'offload': host memory|Triton Error \[CUDA\]: out of memory|"
    r"Cuda failure (?:\d+ )?'out of memory'|Failed to CUDA (?:calloc|malloc)|CUBLAS_STATUS_ALLOC_FAILED"  # NCCL, cuBLAS
)
NO_HOST_MEMORY = "patch 'offload': host memory"  # flashmla_hf's error before it would take the host's reserve
# Part of torch.cuda.get_device_name() -> dense 16-bit tensor-core FLOP/s by the vendor's data sheet. The first match counts.
DATA_SHEET_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
}


def processes() -> int:
    """The processes of this run on all hosts, as torchrun and accelerate launch state it in ``WORLD_SIZE``; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_index() -> int:
    """This process's number among them, ``RANK``, from 0."""
    return int(os.environ.get("RANK", "0"))


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo)
    # The instruction set decides the speed of matrix products more than the marketing name.
    features = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if re.search(rf"\b{flag}\b", cpuinfo)]
    return f"{model.group(1).strip() if model else platform.machine()} ({', '.join(features) or 'no AVX2'})"


def clocks(device: str) -> str:
    """The clocks now, as the driver or Linux states them; empty if neither does."""
    if device == "cuda":
        values = nvidia_smi.query("clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
        if values is None:
            return ""
        sm, sm_max, memory, power = values
        return f"SM {sm} of {sm_max} MHz, memory {memory} MHz, power limit {power} W"
    try:
        rates = re.findall(r"cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        return ""
    return f"{max(map(float, rates)):.0f} MHz" if rates else ""


def memory_limit(device: str) -> int:
    """Bytes usable on an idle device: the GPU's memory, or the host's."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return host_memory.total_bytes()


def memory_available(device: str) -> int:
    """Bytes free now, on the GPU or on the host."""
    if device == "cpu":
        return host_memory.available_bytes()
    # torch would make a CUDA context of half a GiB in this process, beside the process that is about to be measured.
    if not os.environ.get("CUDA_VISIBLE_DEVICES") and (values := nvidia_smi.query("memory.free")):
        mebibytes = values[0]
        if mebibytes.isdigit():
            return int(mebibytes) * 2**20
    return torch.cuda.mem_get_info()[0]


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch has allocated on a GPU, or the largest resident size of this process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else host_memory.peak_resident_bytes()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed. torch has a class for the GPU's alone: failures of the CPU's allocator and of the
    driver's pinned memory are known by their messages."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and OUT_OF_MEMORY_MESSAGE.search(str(error)) is not None


@functools.cache
def peak_flops(device: str, dtype: str) -> tuple[float, str]:
    """Floating-point operations per second of the device in ``dtype``, and the source of the number.

    The data sheet's dense rate if the GPU is known, otherwise the rate of a square matrix product, measured once in a process.
    """
    if device == "cuda" and dtype != "float32":
        name = torch.cuda.get_device_name()
        for part, rate in DATA_SHEET_FLOPS.items():
            if part in name:
                return rate, "data sheet"
    if device == "cuda":
        n, seconds = 8192, _fastest_product(8192, getattr(torch, dtype), device)
    else:
        # A CPU without instructions for bfloat16 is as fast as its float32.
        measured = torch.bfloat16 if dtype == "bfloat16" == fastest_dtype(device) else torch.float32
        n, seconds = 1024, _fastest_product(1024, measured, device)
    return 2 * n**3 / seconds, f"measured, a matrix product of {n}"


def _fastest_product(n: int, dtype: torch.dtype, device: str, least: int = 6, limit: float = 0.5) -> float:
    """Seconds of the fastest [n, n] x [n, n] product within ``limit`` seconds, at least ``least`` of them.

    The first calls choose a routine, and a CPU has other work too.
    """
    # Not of the run's random numbers: what a seed draws must not depend on whether this was measured.
    a = torch.randn(n, n, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
    seconds: list[float] = []
    begun = time.perf_counter()
    while len(seconds) < least or time.perf_counter() - begun < limit:
        started = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


@functools.cache
def fastest_dtype(device: str) -> str:
    """bfloat16 if matrix products in it are faster than in float32 (GPUs, CPUs with AMX), else float32."""
    if device == "cuda":
        return "bfloat16"
    # Small and few: without its instructions a product in bfloat16 takes a hundred times as long.
    in_float32, in_bfloat16 = (_fastest_product(512, t, device, 3, 0.0) for t in (torch.float32, torch.bfloat16))
    return "bfloat16" if in_bfloat16 < in_float32 else "float32"
