"""Exact attention beside its peers: TFLOP/s, spread, memory, and ratios to the best peer and the machine's ceiling.

    python benchmarks/bench_attention.py                                   # this machine's suites, all peers it has
    python benchmarks/bench_attention.py --suite anchors --directions fwd --peers flashmla sdpa-cudnn sdpa-flash fa4
    python benchmarks/bench_attention.py --suite varlen window overhead --resume     # into the same file
    python benchmarks/bench_attention.py --shape "d128 B1 H32/8 S4096 causal bf16" --directions fwd bwd
    python benchmarks/bench_attention.py --suite random --seed 7 --shapes 20         # shapes in no list, about 4 minutes
    python benchmarks/compare.py OLD.json NEW.json                         # ratios of two runs
    python benchmarks/bench_attention.py --list                            # the shapes of each suite

How it measures. Random normal inputs. Peers take turns call by call, so that a clock that drifts or a power limit that
bites does so for all. The order changes from round to round such that each comes after every other as often: a peer that
runs right after a low-power one gets higher clocks. A peer takes as many turns as fill --seconds, at least
--repeats, and one that is much slower than the rest is left out of some rounds. On a GPU a turn is one call between two
CUDA events, several if a call is shorter than 0.4 ms, so that the events weigh nothing; the next round is queued
before the last is waited for, so that the GPU never waits for Python unless a call takes longer to launch than to run
(below about 1k tokens, where the caller waits as long). The L2 cache is not flushed: all peers read the same inputs, one
after the other. On a CPU a turn is 0.1 s of the wall clock. Median and interquartile range of the turns.

fwd is without gradients (inference), bwd the gradients of q, k, v from a kept forward, host the time until an
asynchronous call returns: 100 calls back to back, then a wait, so that the queue never fills.

--suite random draws shapes (head dims, GQA, lengths, masks, packed documents) by --seed, and ends with the distribution of
our rate over the best peer's: the worst first, with what a model of the kernel's schedule (schedule_model.py) makes of
each below 0.97. --resume with another seed adds to the same file.

No number without a right answer: output, dQ, dK and dV of every timed implementation are compared on a slice (one kv
head and its query heads; first, middle and last rows; of a packed batch the first, the longest and the last document)
with attention in float64. A wrong one is named and not timed.

FLOPs, full mask: fwd ``2·B·Hq·Sq·Sk·(Dqk+Dv)``, bwd ``2·B·Hq·Sq·Sk·(3·Dqk+2·Dv)`` (scores again); causal is half of
that, a window counts its visible pairs, a packed batch the sum over its documents. The ceiling is a large matrix
product of the same dtype, same run. Memory is a call's peak beyond its inputs; for bwd that of forward and backward.

On a GPU the seconds of each peer's first call are recorded, too (of bwd: forward and backward). --suite other-gpus is about
them: torch's FlashAttention 2 beside FlexAttention, which compiles once for each kind of call, so that only the first shape of
a kind pays. Compilers' caches on the disk shorten it: state it from a fresh machine.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import statistics
from collections.abc import Callable, Iterable

import distribution
import random_shapes
import render_results
import schedule_model
import torch
import torch._functorch.config
import verdicts
from check import Inputs, expected, verdict
from compile_ahead import COMPILED, compile_ahead
from peers import DEFAULT_PEERS, PEERS, Unsupported
from series import Benchmark, Job
from shapes import DEFAULT_SUITES, MODES, SUITES, Shape, Suite
from timing import (
    Timed,
    first_call_seconds,
    free,
    gpu_state,
    interleaved,
    matmul_ceiling,
    peak_memory,
    spread,
    timed_call,
)

from flashmla_hf.training.arguments import first_line

# ---------------------------------------------------------------- one shape


def in_turns(
    calls: dict[str, Timed],
    memory: dict[str, int],
    device: str,
    refuse: Callable[[str, str], None],
    measure: Callable[[], dict[str, list[float]]],
) -> dict[str, list[float]]:
    """``measure()``, without those whose memory does not suffice: each had it to itself before, now all keep what they need."""
    while True:
        with contextlib.suppress(torch.OutOfMemoryError):
            return measure()
        # Of equal ones not ours, which is first.
        largest = max(reversed(list(calls)), key=lambda name: memory.get(name, 0))
        where = " beside the other peers" if len(calls) > 1 else ""
        refuse(largest, f"the GPU's memory does not suffice{where}")
        del calls[largest]
        free(device)


# "bwd" repeats the backward of one kept forward, which compiled graphs that give their buffers away refuse.
@torch._functorch.config.patch(donated_buffer=False)
def measure_shape(job: Job, device: str, repeats: int, seconds: float) -> list[dict]:
    """One record per peer and mode: seconds, spread, FLOP/s, memory and errors, or why there are none."""
    shape = job.shape
    inputs = Inputs.random(shape, device)
    truth = expected(shape, inputs, needs_gradients=any("bwd" in mode for mode in job.peers))
    free(device)  # so that a peer that asks for the free memory gets the truth
    results, runs = [], {}

    def refuse(peer: str, status: str, reason: str) -> None:
        results.append({"shape": str(shape), "peer": peer, "mode": None, "status": status, "reason": reason})

    for name in dict.fromkeys(name for peers in job.peers.values() for name in peers):
        try:
            runs[name] = PEERS[name](shape, device)
        except Unsupported as error:
            refuse(name, "unsupported", str(error))
        except Exception as error:  # a peer's refusal can be any exception; it is recorded, and the others go on
            refuse(name, "unsupported", first_line(error)[:200])

    # What is loaded by now stays: a full collection over it, twice per peer, would take longer than the measuring.
    gc.collect()
    gc.freeze()

    errors_of: dict[tuple[str, bool], dict] = {}
    first: dict[tuple[str, bool], float] = {}
    for mode, peers in job.peers.items():
        calls, memory, state = {}, {}, {}
        training = "bwd" in mode
        for name in [name for name in peers if name in runs]:
            peer = runs[name]
            try:
                if (name, training) not in errors_of:
                    if device == "cuda":  # on a CPU nothing compiles, and calls are long
                        call = timed_call(peer, inputs, "fwd+bwd" if training else "fwd")
                        first[name, training] = first_call_seconds(call, device)
                    problem, errors_of[name, training] = verdict(shape, peer, inputs, truth, training)
                    if problem is not None:
                        refuse(name, "wrong", problem)
                        del runs[name]
                        continue
                if not mode.startswith("host"):
                    step = timed_call(peer, inputs, "fwd+bwd" if training else "fwd")
                    with peer.context():
                        memory[name] = peak_memory(step.call, device)
                calls[name] = timed_call(peer, inputs, mode)
            except torch.OutOfMemoryError:
                refuse(name, "out_of_memory", f"{mode}: the GPU's memory does not suffice")
            except Exception as error:  # as above; a peer without a backward keeps its forward
                refuse(name, "unsupported", f"{mode}: {first_line(error)[:200]}")
            free(device)
        halfway = lambda state=state: state.update(gpu_state(device))  # noqa: E731
        full = lambda name, why, mode=mode: refuse(name, "out_of_memory", f"{mode}: {why}")  # noqa: E731
        turns = functools.partial(interleaved, calls, device, mode, repeats, seconds, halfway)
        for name, times in in_turns(calls, memory, device, full, turns).items():
            record = {
                "shape": str(shape),
                "peer": name,
                "mode": mode,
                "status": "ok",
                "seconds": statistics.median(times),
                "spread": spread(times),
                "turns": len(times),
                "errors": errors_of[name, training],
                **state,
            }
            if (name, training) in first:
                record["first_seconds"] = first[name, training]
            if not mode.startswith("host"):
                record["flops_per_second"] = shape.flops(mode) / record["seconds"]
                record["peak_bytes"] = memory[name]
                record["output_bytes"] = shape.output_bytes(mode)
            if device == "cuda" and name.startswith("flashmla") and (losses := schedule_model.losses(shape, mode)):
                record["schedule"] = losses.record()
            results.append(record)
        calls.clear()
        free(device)
    return results


# ---------------------------------------------------------------- the run


def _window_tile() -> list[int]:
    """Rows of Q and of K/V in a tile of the Hopper kernel at head dim 128, read from its table; (128, 128) without it."""
    tiles = schedule_model.tiles_of_sm90()
    if tiles is None:
        return [128, 128]
    (entry,) = (e for e in tiles.entries("Forward") if e["head_dims"] == (128, 128) and e["mask"] == "kMask")
    return [entry["kBlockQ"], entry["kBlockKV"]]


def _ceilings(device: str, shapes: list[Shape]) -> dict:
    """The machine's ceilings for the dtypes of the shapes, and the tile that windows are rounded to."""
    dtypes = dict.fromkeys(shape.dtype for shape in shapes)
    return {
        "matmul_flops_per_second": {dtype: matmul_ceiling(dtype, device) for dtype in dtypes},
        "window_tile": _window_tile(),
    }


def summary(results: list[dict]) -> list[str]:
    lines = []
    for r in results:
        head = f"{r['shape']:<42} {r['peer']:<14}"
        if r["status"] != "ok":
            lines.append(f"{head} {r['status'].replace('_', ' ')}: {r['reason']}")
        elif r["mode"].startswith("host"):
            lines.append(f"{head} {r['mode']:<10}{r['seconds'] * 1e6:8.1f} µs ±{100 * r['spread']:.0f} %")
        else:
            memory = "" if r["peak_bytes"] is None else f", {r['peak_bytes'] / 2**20:,.0f} MiB"
            lines.append(
                f"{head} {r['mode']:<8}{r['seconds'] * 1e3:10.3f} ms ±{100 * r['spread']:.0f} %, "
                f"{render_results.rate(r['flops_per_second'])}{memory}"
            )
    return lines


def _bars(document: dict) -> Iterable[verdicts.Bar]:
    return distribution.bars(document) if document.get("seeds") else verdicts.bars(document)


def _report(document: dict) -> list[str]:
    return distribution.lines(document) if document.get("seeds") else []


def _prepare(jobs: list[Job], device: str) -> None:
    """Lets peers compile, if there are shapes enough to compile side by side."""
    compiled = [name for name in COMPILED if any(name in peers for job in jobs for peers in job.peers.values())]
    if device != "cuda" or not compiled or len(jobs) < 4 or importlib.util.find_spec("flash_attn") is None:
        return
    for problem in dict.fromkeys(compile_ahead([job.shape for job in jobs], compiled, device)):
        print(problem)


RANDOM = Suite([], ("fwd", "bwd"), ("flashmla", "fa4", "sdpa-cudnn", "sdpa-flash", "cudnn"), draw=random_shapes.draw)

BENCHMARK = Benchmark(
    program="bench_attention",
    kind="attention",
    suites={**SUITES, "random": RANDOM},
    default_suites=DEFAULT_SUITES,
    peers=PEERS,
    default_peers=DEFAULT_PEERS,
    modes=MODES,
    default_modes={"cpu": ("fwd", "fwd+bwd"), "cuda": ("fwd", "bwd")},
    shape=Shape,
    example="d64 B1 H9/3 S2048 causal fp32",
    measure=measure_shape,
    ceilings=_ceilings,
    bars=_bars,
    summary=summary,
    report=_report,
    prepare=_prepare,
)


def main(argv: list[str] | None = None) -> None:
    BENCHMARK.run(BENCHMARK.parser(__doc__).parse_args(argv))


if __name__ == "__main__":
    main()
