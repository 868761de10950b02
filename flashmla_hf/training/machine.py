"""Where a number was measured: device, clocks, versions, commit. Every JSON file of scripts and benchmarks has it."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
SAYS_OUT_OF_MEMORY = re.compile(
    r"DefaultCPUAllocator: (?:not enough memory|can't allocate memory)|CUDA error: out of memory|"
    r"CUDA out of memory\. Tried to allocate|patch 'offload': host memory"
)
NO_HOST_MEMORY = "patch 'offload': host memory"  # flashmla_hf's error before it would take the host's reserve
PACKAGES = ("torch", "transformers", "accelerate", "peft", "flashmla_hf", "flash-attn-4", "liger-kernel")
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


def describe(device: str) -> dict:
    """The record for results measured on ``device`` ("cpu" or "cuda"): plain strings and numbers, ready for JSON."""
    record = {
        "device": device_name(device),
        "device_type": device,
        "clocks": clocks(device),
        "memory_gib": round(memory_limit(device) / 2**30, 1),
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device == "cuda":
        record["cuda"] = torch.version.cuda
        record["cudnn"] = torch.backends.cudnn.version()
    return record


def sentence(record: dict) -> str:
    """One line of Markdown for a table's caption."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    threads = f", {record['threads']} threads" if record.get("threads") else ""
    cuda = f", CUDA {record['cuda']}, cuDNN {record['cudnn']}" if record.get("cuda") else ""
    clock = f", {record['clocks']}" if record["clocks"] else ""
    return (
        f"{record['device']}{threads}, {record['memory_gib']} GiB{clock}; Python {record['python']}, {versions}{cuda}; "
        f"commit {record['commit']}; {record['date']}"
    )


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
    # What decides the speed of matrix products is the instruction set more than the marketing name.
    features = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if re.search(rf"\b{flag}\b", cpuinfo)]
    return f"{model.group(1).strip() if model else platform.machine()} ({', '.join(features) or 'no AVX2'})"


def clocks(device: str) -> str:
    """Clocks now, as the driver states them; empty where nothing states them."""
    if device == "cuda":
        query = "clocks.sm,clocks.max.sm,clocks.mem,power.limit"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "-i", "0"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
            sm, sm_max, memory, power = (field.strip() for field in answer.splitlines()[0].split(","))
        except (OSError, subprocess.SubprocessError, ValueError, IndexError):
            return ""
        return f"SM {sm} of {sm_max} MHz, memory {memory} MHz, power limit {power} W"
    try:
        rates = re.findall(r"cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        return ""
    return f"{max(map(float, rates)):.0f} MHz" if rates else ""


def memory_limit(device: str) -> int:
    """Bytes usable on an idle device: the GPU's memory, or the machine's, cut by the container's limit."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return total


def memory_available(device: str) -> int:
    """Bytes free right now."""
    if device == "cuda":
        return _free_on_gpu()
    available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    free = int(available.group(1)) * 1024 if available else memory_limit(device)
    try:
        group = Path("/sys/fs/cgroup")
        # The group's page cache can be given back, so it counts as free.
        cache = int(re.search(r"^file (\d+)", (group / "memory.stat").read_text(), re.M).group(1))
        used = int((group / "memory.current").read_text()) - cache
        return min(free, int((group / "memory.max").read_text()) - used)
    except (OSError, ValueError, AttributeError):
        return free


def _free_on_gpu() -> int:
    # Asking torch would make a CUDA context of half a GiB in this process, beside the one that is about to be measured.
    if not os.environ.get("CUDA_VISIBLE_DEVICES"):
        command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits", "-i", "0"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
            return int(answer.split()[0]) * 2**20
        except (OSError, subprocess.SubprocessError, ValueError, IndexError):
            pass
    return torch.cuda.mem_get_info()[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed. torch has a class for the GPU's alone: the CPU's allocator and the driver's pinned memory
    are known by their words."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and SAYS_OUT_OF_MEMORY.search(str(error)) is not None


def commit() -> str:
    """Short hash of the checked-out commit, with "+" where files differ from it; outside a repository (a tree carried to
    a GPU host) what FLASHMLA_COMMIT says, or "unknown"."""
    outside = os.environ.get("FLASHMLA_COMMIT", "unknown")
    git = ["git", "-C", str(REPOSITORY)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, timeout=20)
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return outside
    if head.returncode != 0:
        return outside
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def peak_flops(device: str, dtype: str) -> tuple[float, str]:
    """Floating-point operations per second of the device in ``dtype``, and who says so.

    The data sheet's dense rate where the GPU is known; otherwise that of a square matrix product, measured now.
    """
    if device == "cuda" and dtype != "float32":
        name = torch.cuda.get_device_name()
        for part, rate in DATA_SHEET_FLOPS.items():
            if part in name:
                return rate, "data sheet"
    n = 8192 if device == "cuda" else 1024
    # A CPU without instructions for bfloat16 is as fast as its float32.
    dtypes = {dtype} if device == "cuda" else {dtype, "float32"}
    seconds = []
    for a in (torch.randn(n, n, device=device).to(getattr(torch, name)) for name in dtypes):
        begun = time.perf_counter()
        # For half a second, and six times at least: the first calls choose a routine, and a CPU has other work, too.
        while len(seconds) < 6 or time.perf_counter() - begun < 0.5:
            started = time.perf_counter()
            a @ a
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    return 2 * n**3 / min(seconds), f"measured, a matrix product of {n}"


def fastest_dtype(device: str) -> str:
    """bfloat16 where matrix products in it are faster than in float32 (GPUs, CPUs with AMX), else float32."""
    if device == "cuda":
        return "bfloat16"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(768, 768).to(dtype)
        for _ in range(3):  # the first calls choose and build a routine; the best of the rest is the routine's
            started = time.perf_counter()
            a @ a
            seconds[dtype] = min(seconds.get(dtype, 1e9), time.perf_counter() - started)
    return "bfloat16" if seconds[torch.bfloat16] < seconds[torch.float32] else "float32"
