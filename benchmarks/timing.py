"""Time and memory of calls: peers in turn, each after every other equally often, and the machine's ceilings."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from check import Inputs
from peers import Peer
from shapes import DTYPES

from flashmla_hf import host_memory

TURN_SECONDS = {"cpu": 0.1, "cuda": 0.0004}
HOST_CALLS = 100  # in a row before the GPU is waited for; its queue holds about a thousand launches


@dataclass
class Timed:
    """One call of one peer in one mode, ready to be repeated."""

    peer: Peer
    call: Callable[[], object]


def timed_call(peer: Peer, inputs: Inputs, mode: str) -> Timed:
    mine = inputs.arranged(peer)
    q, k, v = mine.q, mine.k, mine.v
    if mode in ("fwd", "host"):
        q, k, v = q.detach(), k.detach(), v.detach()
    if mode in ("fwd", "host", "host+grad"):
        return Timed(peer, lambda: peer.run(q, k, v))
    if mode == "fwd+bwd":
        return Timed(peer, lambda: torch.autograd.grad(peer.run(q, k, v), mine.leaves, mine.dout))
    with peer.context():
        out = peer.run(q, k, v)
    return Timed(peer, lambda: torch.autograd.grad(out, mine.leaves, mine.dout, retain_graph=True))


def rotation(peer: Peer, calls: list[Callable[[], object]], count: int, device: str) -> Timed:
    """``count`` calls as one, each the next of ``calls``: on a GPU a CUDA graph, in which the host has no part."""

    def series() -> None:
        for i in range(count):
            calls[i % len(calls)]()

    if device != "cuda":
        return Timed(peer, series)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with peer.context(), torch.cuda.stream(stream):
        for call in calls:
            call()  # loads, chooses, allocates
        with torch.cuda.graph(graph, stream=stream):
            series()
    torch.cuda.current_stream().wait_stream(stream)
    return Timed(peer, graph.replay)


def start_turn(timed: Timed, count: int, device: str, mode: str) -> Callable[[], float]:
    """Starts ``count`` calls in a row. The result waits for them on a GPU, and gives seconds per call."""
    if device == "cuda" and not mode.startswith("host"):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with timed.peer.context():
            start.record()
            for _ in range(count):
                timed.call()
            stop.record()

        def seconds() -> float:
            stop.synchronize()
            return start.elapsed_time(stop) / 1e3 / count

        return seconds
    if device == "cuda":
        torch.cuda.synchronize()
    with timed.peer.context():
        started = time.perf_counter()
        for _ in range(count):
            timed.call()
        elapsed = (time.perf_counter() - started) / count
    return lambda: elapsed


def balanced_orders(names: list[str]) -> list[list[str]]:
    """Orders in which, taken together, each of ``names`` directly follows every other equally often (Williams 1949)."""
    n = len(names)
    zigzag = [0, *(x for i in range(1, n // 2 + 1) for x in (i, n - i))][:n]
    orders = [[names[(x + shift) % n] for x in zigzag] for shift in range(n)]
    return orders if n % 2 == 0 else orders + [order[::-1] for order in orders]


def interleaved(
    calls: dict[str, Timed], device: str, mode: str, repeats: int, seconds: float, halfway: Callable[[], None]
) -> dict[str, list[float]]:
    """Seconds per call of each, turn by turn."""
    counts, turns = {}, {}
    orders = balanced_orders(list(calls))
    turn_seconds = min(TURN_SECONDS[device], seconds / repeats)
    for name, timed in calls.items():
        start_turn(timed, 1, device, mode)()  # compiles, allocates, chooses
        once = start_turn(timed, 1, device, mode)()
        # Several short calls in a row hide the launch of the first.
        once = max(1e-6, start_turn(timed, max(1, min(5, int(0.01 / max(once, 1e-6)))), device, mode)())
        counts[name] = max(1, min(200, math.ceil(turn_seconds / once)))
        if device == "cuda" and mode.startswith("host"):
            counts[name] = HOST_CALLS
        turns[name] = max(repeats, min(1000, math.ceil(seconds / (counts[name] * once))))
    rounds = max(turns.values(), default=0)
    started: dict[str, list[Callable[[], float]]] = {name: [] for name in calls}
    last: list[Callable[[], float]] = []
    for i in range(rounds):
        queued = []
        for name in orders[i % len(orders)]:
            # A peer with fewer turns takes them evenly spread over the rounds.
            if i * turns[name] // rounds != (i + 1) * turns[name] // rounds:
                queued.append(start_turn(calls[name], counts[name], device, mode))
                started[name].append(queued[-1])
        for wait in last:  # the round before: this one is already queued behind it
            wait()
        last = queued
        if i == rounds // 2:
            halfway()
    return {name: [turn() for turn in mine] for name, mine in started.items()}


def first_call_seconds(timed: Timed, device: str) -> float:
    """Seconds until the result of a first call is there: loading and compiling, if the process has not done it before."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    with timed.peer.context():
        timed.call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_memory(call: Callable[[], object], device: str) -> int | None:
    """The most bytes that one call needs beyond those in use before it; None if the system does not say."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not host_memory.return_freed_blocks(True) or not host_memory.reset_peak():
        return None
    before = host_memory.resident_bytes()
    result = call()
    peak = host_memory.peak_resident_bytes() - before
    del result
    host_memory.return_freed_blocks(False)
    return max(peak, 0)


def matmul_ceiling(dtype: str, device: str) -> float:
    """FLOP/s of a large square matrix product: the median of several."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(DTYPES[dtype]) for _ in range(2))
    return 2 * n**3 / _median_seconds(lambda: a @ b, device)


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by a copy within the device."""
    source = torch.ones(2**30 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _median_seconds(lambda: target.copy_(source), device)


def short_copy_seconds(device: str, num_bytes: int, rotated_bytes: float, calls: int) -> float:
    """Seconds of a copy of half as many bytes, which reads and writes ``num_bytes``, in series of ``calls`` behind each other
    as :func:`rotation` makes them. Each has the next of as many buffers as hold ``rotated_bytes``."""
    peer = Peer(torch.Tensor.copy_)
    buffers = [
        torch.ones(2, num_bytes // 2, dtype=torch.uint8, device=device)
        for _ in range(max(2, math.ceil(rotated_bytes / num_bytes)))
    ]
    count = len(buffers) * math.ceil(calls / len(buffers))
    timed = rotation(peer, [lambda pair=pair: peer.run(*pair) for pair in buffers], count, device)
    return (
        statistics.median([start_turn(timed, 3 if device == "cuda" else 1, device, "fwd")() for _ in range(9)][2:])
        / count
    )


def read_bandwidth(device: str) -> float:
    """Bytes read per second by the faster of two reductions, which write next to nothing."""
    source = torch.ones(2**28 if device == "cuda" else 2**24, dtype=torch.float32, device=device)
    half = source.view(torch.bfloat16)
    seconds = min(_median_seconds(call, device) for call in (source.sum, source.amax, half.amax))
    return 4 * source.numel() / seconds


def _median_seconds(call: Callable[[], object], device: str) -> float:
    timed = Timed(Peer(call), call)
    return statistics.median([start_turn(timed, 10 if device == "cuda" else 1, device, "fwd")() for _ in range(7)][2:])


def spread(times: list[float]) -> float:
    """Interquartile range over the median."""
    if len(times) < 3:
        return 0.0
    low, _, high = statistics.quantiles(times, n=4)
    return (high - low) / statistics.median(times)


def gpu_state(device: str) -> dict[str, float]:
    """SM clock and power draw now; empty if the driver's library does not say."""
    if device != "cuda":
        return {}
    try:
        return {"sm_mhz": torch.cuda.clock_rate(), "watts": torch.cuda.power_draw() / 1e3}
    except Exception:  # no pynvml, or a driver that refuses it: the numbers stand without
        return {}


def free(device: str) -> None:
    """Gives unused memory back, so that a peer that asks for the free memory gets the truth."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
