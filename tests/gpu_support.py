"""The device of the GPU tests, why ``sm90`` is missing, a few inputs, memory, graphs and streams, and a float64 truth."""

from __future__ import annotations

import math
import os

import pytest
import torch
from cases import SM90_ROWS, Case

from flashmla_hf import libraries

HALF = (torch.bfloat16, torch.float16)
DEVICE = os.environ.get("FLASHMLA_SM90_TESTS_ON", "cuda")  # "cpu": the code of the tests of sm90, without the kernel
IMPL = "sm90" if DEVICE == "cuda" else "cpu"


def sm90_missing() -> str | None:
    """Why sm90 cannot run here at all; ``None`` where it can."""
    if not torch.cuda.is_available():
        return "no GPU"
    if torch.cuda.get_device_capability() != (9, 0):
        return "not a Hopper GPU"
    return libraries.unavailable.get("sm90")


needs_sm90 = pytest.mark.skipif(DEVICE == "cuda" and sm90_missing() is not None, reason=f"sm90: {sm90_missing()}")
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
half = pytest.mark.parametrize("dtype", HALF, ids=str)
rows = pytest.mark.parametrize("row", SM90_ROWS, ids=lambda row: f"{row[0]}/{row[1]}")
# Head dims (qk, v): every row, and what a row pads.
WIDTHS = [(row[0] - less, row[1] - less) for row in SM90_ROWS for less in (0, 8, 24)]
WIDTHS += [(8, 8), (8, 256), (256, 8), (72, 40), (40, 72), (192, 136), (200, 8)]


def is_for_sm90(case: Case, dtype: torch.dtype) -> bool:
    """Whether sm90 promises to compute this call."""
    return dtype in HALF and case.sm90_row is not None


def needs_memory(gigabytes: int) -> None:
    free = torch.cuda.mem_get_info()[0]
    if free < gigabytes * 2**30:
        pytest.skip(f"{free / 2**30:.0f} GiB of GPU memory are free, {gigabytes} are needed")


def offset_by(x: torch.Tensor, elements: int) -> torch.Tensor:
    """x with its data ``elements`` further in memory than an allocation begins."""
    base = x.new_zeros(x.numel() + elements)
    return base[elements:].view(x.shape).copy_(x)


def cu(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def peak_bytes(run):
    """Bytes of GPU memory that ``run()`` needed beyond those allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def captured(run):
    """Captures ``run()`` in a CUDA graph, after two runs on a stream of its own, as capturing wants it. Returns the graph and
    the tensors that a replay writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


def run_behind_other_work(write, call):
    """Queues half a second of work on a new stream, then ``write()`` and ``call()``. Returns the results of ``call()``.
    Fails if ``call()`` returns after that work is done: it must wait for nothing. Its results show whether it ran on that
    stream, because only there it sees what ``write()`` wrote."""
    torch.cuda.synchronize()
    stream, done = torch.cuda.Stream(), torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000_000)  # half a second: other processes may share the CPU
            write()
            results = call()
            done.record()
            was_running = not done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert was_running, "the call waited for the stream"
    return results


def exact(q, k, v, scale: float, first_key: int = 0, chunk: int = 2**15) -> tuple[torch.Tensor, torch.Tensor]:
    """out, lse in float64 of q [1, rows, heads, dim] on every key from ``first_key`` on, a chunk at a time."""
    group = q.shape[2] // k.shape[2]
    query = q.transpose(1, 2).double()
    lse = torch.full(query.shape[:3], -math.inf, dtype=torch.float64, device=q.device)
    out = torch.zeros(*query.shape[:3], v.shape[-1], dtype=torch.float64, device=q.device)
    for begin in range(first_key, k.shape[1], chunk):
        key, value = (x[:, begin : begin + chunk].transpose(1, 2).double().repeat_interleave(group, 1) for x in (k, v))
        scores = query @ key.transpose(-1, -2) * scale
        part = scores.logsumexp(-1)
        total = torch.logaddexp(lse, part)
        out = out * (lse - total).exp()[..., None] + (scores - total[..., None]).exp() @ value
        lse = total
    return out.transpose(1, 2), lse
