"""Exact attention beside its peers: TFLOP/s, spread, memory, and ratios to the best peer and the machine's ceiling.

    python benchmarks/bench_attention.py                                   # this machine's suites, all peers it has
    python benchmarks/bench_attention.py --suite anchors --directions fwd --peers flashmla sdpa-cudnn sdpa-flash fa4
    python benchmarks/bench_attention.py --suite varlen window overhead --resume     # into the same file
    python benchmarks/bench_attention.py --shape "d128 B1 H32/8 S4096 causal bf16" --directions fwd bwd
    python benchmarks/bench_attention.py --list                            # the shapes of each suite

How it measures. Random normal inputs. Peers take turns call by call, so that a clock that drifts or a power limit that
bites does so for all, and the order changes from round to round such that each comes after every other as often: who
follows a peer that draws little power finds higher clocks. A peer takes as many turns as fill --seconds, at least
--repeats, and one that is much slower than the rest is left out of some rounds. On a GPU a turn is one call between two
CUDA events, several where a call is shorter than 0.4 ms, so that the events weigh nothing; the next round is queued
before the last is waited for, so that the GPU never waits for Python unless a call takes longer to launch than to run
(below about 1k tokens: that is what a caller gets). The L2 cache is not flushed: all peers read the same inputs, one
after the other. On a CPU a turn is 0.1 s of the wall clock. Median and interquartile range of the turns.

fwd is without gradients (inference), bwd the gradients of q, k, v from a kept forward, host the time until an
asynchronous call returns: 100 calls back to back, then a wait, so that the queue never fills.

No number without a right answer: output, dQ, dK and dV of every timed implementation are compared on a slice (one kv
head and its query heads; first, middle and last rows; of a packed batch the first, the longest and the last document)
with attention in float64. A wrong one is named and not timed.

FLOPs, full mask: fwd ``2·B·Hq·Sq·Sk·(Dqk+Dv)``, bwd ``2·B·Hq·Sq·Sk·(3·Dqk+2·Dv)`` (scores again); causal is half of
that, a window counts its visible pairs, a packed batch the sum over its documents. The ceiling is a large matrix
product of the same dtype, same run. Memory is a call's peak beyond its inputs; for bwd that of forward and backward.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import importlib.util
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._functorch.config
from peers import DEFAULT_PEERS, PEERS, Peer, Unsupported
from shapes import DEFAULT_SUITES, DTYPES, MODES, SUITES, Shape
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import environment
import render_results

RESULTS = Path(__file__).resolve().parent / "results"
# Largest relative error (Frobenius norm over 64 rows) of a right implementation: rounding of the inputs' dtype with
# some room. One key too many or too few in a window of 512 is an error of 4e-2, in a causal mask more.
TOLERANCES = {"fp32": (3e-5, 1e-4), "fp16": (2e-3, 6e-3), "bf16": (1e-2, 3e-2)}  # of the output, of the gradients
CHECKED_ROWS = 64
TURN_SECONDS = {"cpu": 0.1, "cuda": 0.0004}
HOST_CALLS = 100  # in a row before the GPU is waited for; its queue holds about a thousand launches

# ---------------------------------------------------------------- correctness


@dataclass
class Inputs:
    """Dense [batch, seqlen, heads, dim] or packed [batch * seqlen, heads, dim]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor

    @staticmethod
    def random(shape: Shape, device: str) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)

        def normal(seqlen: int, heads: int, dim: int) -> torch.Tensor:
            rows = (shape.batch * seqlen,) if shape.is_packed else (shape.batch, seqlen)
            return torch.randn(*rows, heads, dim, generator=generator, device=device).to(DTYPES[shape.dtype])

        return Inputs(
            normal(shape.seqlen_q, shape.heads_q, shape.head_dim_qk).requires_grad_(),
            normal(shape.seqlen_kv, shape.heads_kv, shape.head_dim_qk).requires_grad_(),
            normal(shape.seqlen_kv, shape.heads_kv, shape.head_dim_v).requires_grad_(),
            normal(shape.seqlen_q, shape.heads_q, shape.head_dim_v),
        )

    def arranged(self, peer: Peer) -> Inputs:
        """The same memory as the peer wants to see it."""
        if not peer.is_heads_first:
            return self
        return Inputs(
            *(x.detach().transpose(1, 2).requires_grad_() for x in (self.q, self.k, self.v)), self.dout.transpose(1, 2)
        )


def _blocks(seqlen: int) -> list[slice]:
    """The first, a middle and the last CHECKED_ROWS rows."""
    starts = {0, max(0, seqlen // 2 - CHECKED_ROWS // 2), max(0, seqlen - CHECKED_ROWS)}
    return [slice(start, min(start + CHECKED_ROWS, seqlen)) for start in sorted(starts)]


def _checked_documents(shape: Shape) -> list[int | slice]:
    """Indices into the first dimension of a tensor: the last batch entry; of a pack the first, longest and last."""
    if not shape.is_packed:
        return [-1]
    documents = shape.documents()
    longest = max(range(len(documents)), key=lambda i: documents[i].stop - documents[i].start)
    return [documents[i] for i in sorted({0, longest, len(documents) - 1})]


@dataclass
class Expected:
    """float64 results of one document and the last kv head: blocks of rows of O and dQ (of each query head in the
    group), and blocks of rows of dK and dV."""

    out: list[torch.Tensor]  # of [group, rows, head_dim_v]
    dq: list[torch.Tensor] | None
    dk: list[torch.Tensor] | None  # of [rows, head_dim_qk]
    dv: list[torch.Tensor] | None


@torch.no_grad()
def expected(shape: Shape, inputs: Inputs, needs_gradients: bool) -> list[Expected]:
    """Attention and its gradients on the slice of each checked document."""
    return [_expected(shape, inputs, index, needs_gradients) for index in _checked_documents(shape)]


def _expected(shape: Shape, inputs: Inputs, index: int | slice, needs_gradients: bool) -> Expected:
    """By the textbook formulas, a chunk of query rows at a time."""
    group = shape.heads_q // shape.heads_kv
    q = inputs.q[index][:, -group:].transpose(0, 1).double()  # [group, seqlen_q, head_dim_qk]
    dout = inputs.dout[index][:, -group:].transpose(0, 1).double()
    k, v = inputs.k[index][:, -1].double(), inputs.v[index][:, -1].double()  # [seqlen_kv, head_dim]
    seqlen_q, seqlen_kv = q.shape[1], k.shape[0]
    scale = shape.head_dim_qk**-0.5
    key = torch.arange(seqlen_kv, device=q.device)

    def rows(block: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """P, O and dS of some query rows: [group, rows, seqlen_kv], [group, rows, head_dim_v], as P."""
        s = scale * q[:, block] @ k.T
        if shape.is_causal:
            position = torch.arange(block.start, block.stop, device=q.device)[:, None] + seqlen_kv - seqlen_q
            visible = key <= position
            if shape.window is not None:
                visible &= key >= position - shape.window
            s.masked_fill_(~visible, -math.inf)
        p = torch.softmax(s, dim=-1).nan_to_num(0.0)  # a row that sees nothing is zero
        out = p @ v
        delta = (dout[:, block] * out).sum(-1, keepdim=True)
        ds = p * (dout[:, block] @ v.T - delta)  # FlashAttention-2 (arXiv 2307.08691), algorithm 2
        return p, out, ds

    some = [rows(block) for block in _blocks(seqlen_q)]
    result = Expected([out for _, out, _ in some], None, None, None)
    if not needs_gradients:
        return result
    result.dq = [scale * ds @ k for _, _, ds in some]
    kv_blocks = _blocks(seqlen_kv)
    result.dk = [torch.zeros_like(k[block]) for block in kv_blocks]
    result.dv = [torch.zeros_like(v[block]) for block in kv_blocks]
    chunk = max(16, 2**25 // (group * seqlen_kv))  # 256 MiB of float64 scores
    for start in range(0, seqlen_q, chunk):
        block = slice(start, min(start + chunk, seqlen_q))
        p, _, ds = rows(block)
        for i, kv_block in enumerate(kv_blocks):
            result.dk[i] += scale * torch.einsum("grk,grd->kd", ds[..., kv_block], q[:, block])
            result.dv[i] += torch.einsum("grk,grd->kd", p[..., kv_block], dout[:, block])
    return result


def verdict(
    shape: Shape, peer: Peer, inputs: Inputs, truth: list[Expected], training: bool
) -> tuple[str | None, dict[str, float]]:
    """What is wrong with ``peer`` on these inputs, or None; and the relative errors found. With ``training`` the gradients
    and the output they came with are compared, without it the output of a call that needs none."""
    group = shape.heads_q // shape.heads_kv
    tolerance_out, tolerance_grad = TOLERANCES[shape.dtype]
    mine = inputs.arranged(peer)
    q, k, v = (x if training else x.detach() for x in (mine.q, mine.k, mine.v))
    with peer.context():
        out = peer.run(q, k, v)
        if out.shape != mine.dout.shape:
            return f"the output has shape {tuple(out.shape)}, expected {tuple(mine.dout.shape)}", {}
        found = {"O": out.detach()}
        if training:
            gradients = torch.autograd.grad(out, (q, k, v), mine.dout)
            found |= dict(zip(("dQ", "dK", "dV"), gradients, strict=True))
    errors, problem = {}, None
    for name, tensor in found.items():
        if peer.is_heads_first:
            tensor = tensor.transpose(1, 2)
        tolerance, worst = tolerance_out if name == "O" else tolerance_grad, 0.0
        for index, right in zip(_checked_documents(shape), truth, strict=True):
            part = tensor[index]
            rows = part[:, -group:].transpose(0, 1) if name in ("O", "dQ") else part[:, -1]
            want = {"O": right.out, "dQ": right.dq, "dK": right.dk, "dV": right.dv}[name]
            for block, reference in zip(_blocks(part.shape[0]), want, strict=True):
                error = (rows[..., block, :].double() - reference).norm() / reference.norm().clamp(min=1e-30)
                worst = max(worst, float(error)) if torch.isfinite(error) else math.inf
        errors[name] = worst
        if problem is None and worst > tolerance:
            problem = f"{name} is off by {worst:.1e} (relative; allowed {tolerance:.0e})"
        # The slice cannot see everything; NaN and infinity elsewhere it need not miss.
        if problem is None and not torch.isfinite(tensor).all():
            problem = f"{name} is not finite everywhere"
    return problem, errors


# ---------------------------------------------------------------- timing


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
        return Timed(peer, lambda: torch.autograd.grad(peer.run(q, k, v), (q, k, v), mine.dout))
    with peer.context():
        out = peer.run(q, k, v)
    return Timed(peer, lambda: torch.autograd.grad(out, (q, k, v), mine.dout, retain_graph=True))


def start_turn(timed: Timed, count: int, device: str, mode: str) -> Callable[[], float]:
    """``count`` calls in a row; the result gives seconds per call, and on a GPU waits for them."""
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
        # Several in a row, where they are short, hide the launch of the first.
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


def peak_memory(call: Callable[[], object], device: str) -> int | None:
    """Bytes one call needs at most beyond what was there before it; None where the system does not say."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        libc = ctypes.CDLL(None)
        # Blocks of a megabyte and more straight from and back to the system: resident size is then live memory.
        libc.mallopt(-3, 2**20)  # M_MMAP_THRESHOLD
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # begins a new VmHWM
    except (OSError, AttributeError):
        return None
    before = _status_bytes("VmRSS")
    kept = call()
    peak = _status_bytes("VmHWM") - before
    del kept
    libc.mallopt(-3, 32 * 2**20)
    return max(peak, 0)


def _status_bytes(name: str) -> int:
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024


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
    """SM clock and power draw now; empty where the driver's library does not say."""
    if device != "cuda":
        return {}
    try:
        return {"sm_mhz": torch.cuda.clock_rate(), "watts": torch.cuda.power_draw() / 1e3}
    except Exception:  # no pynvml, or a driver that refuses it: the numbers stand without
        return {}


# ---------------------------------------------------------------- one shape


@dataclass(frozen=True)
class Job:
    shape: Shape
    peers: dict[str, list[str]]  # of each mode


# "bwd" repeats the backward of one kept forward, which compiled graphs that give their buffers away refuse.
@torch._functorch.config.patch(donated_buffer=False)
def measure_shape(job: Job, device: str, repeats: int, seconds: float) -> list[dict]:
    """One record per peer and mode: seconds, spread, FLOP/s, memory and errors, or why there are none."""
    shape = job.shape
    inputs = Inputs.random(shape, device)
    truth = expected(shape, inputs, needs_gradients=any("bwd" in mode for mode in job.peers))
    _free(device)  # so that a peer that asks what memory is left hears the truth
    records, runs = [], {}

    def refuse(peer: str, status: str, reason: str) -> None:
        records.append({"shape": str(shape), "peer": peer, "mode": None, "status": status, "reason": reason})

    for name in dict.fromkeys(name for peers in job.peers.values() for name in peers):
        try:
            runs[name] = PEERS[name](shape, device)
        except Unsupported as error:
            refuse(name, "unsupported", str(error))
        except Exception as error:  # a peer's refusal can be any exception; it is recorded, and the others go on
            refuse(name, "unsupported", _first_line(error))

    # What is loaded by now stays: a full collection over it, twice per peer, would take longer than the measuring.
    gc.collect()
    gc.freeze()

    errors_of: dict[tuple[str, bool], dict] = {}
    for mode, peers in job.peers.items():
        calls, memory, state = {}, {}, {}
        training = "bwd" in mode
        for name in [name for name in peers if name in runs]:
            peer = runs[name]
            try:
                if (name, training) not in errors_of:
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
                refuse(name, "unsupported", f"{mode}: {_first_line(error)}")
            _free(device)
        halfway = lambda state=state: state.update(gpu_state(device))  # noqa: E731
        for name, times in interleaved(calls, device, mode, repeats, seconds, halfway).items():
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
            if not mode.startswith("host"):
                record["flops_per_second"] = shape.flops(mode) / record["seconds"]
                record["peak_bytes"] = memory[name]
                record["output_bytes"] = shape.output_bytes(mode)
            records.append(record)
        calls.clear()
        _free(device)
    return records


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


# ---------------------------------------------------------------- the run


def jobs(args: argparse.Namespace, earlier: list[dict]) -> list[Job]:
    """What the arguments ask for and ``earlier`` records do not answer; suites may share shapes, each is measured once."""
    chosen = [(suite.shapes, suite) for suite in map(SUITES.get, args.suite or ())]
    if args.shape:
        chosen.append(([Shape.parse(text) for text in args.shape], None))
    elif not args.suite:
        chosen = [(suite.shapes, suite) for suite in map(SUITES.get, DEFAULT_SUITES[args.device])]
    default_modes = ("fwd", "bwd") if args.device == "cuda" else ("fwd", "fwd+bwd")
    asked: dict[Shape, dict[str, list[str]]] = {}
    for shapes, suite in chosen:
        peers = args.peers or (suite and suite.peers) or DEFAULT_PEERS[args.device]
        for shape in shapes:
            if args.dtype:
                shape = dataclasses.replace(shape, dtype=args.dtype)
            for mode in args.directions or (suite and suite.modes) or default_modes:
                mine = asked.setdefault(shape, {}).setdefault(mode, [])
                mine += [peer for peer in peers if peer not in mine]
    result = []
    for shape, modes in asked.items():
        mine = [r for r in earlier if r["shape"] == str(shape)]
        have = {(r["peer"], r["mode"]) for r in mine}
        missing = {}
        for mode, peers in modes.items():
            if not all((peer, mode) in have or (peer, None) in have for peer in peers):
                # Peers are compared within one series of turns only: those that were there before run again.
                missing[mode] = list(dict.fromkeys([r["peer"] for r in mine if r["mode"] == mode] + peers))
        if missing:
            result.append(Job(shape, missing))
    return result


def merge(earlier: list[dict], new: list[dict]) -> list[dict]:
    """The new records, and those earlier ones they do not replace."""
    replaced = {(r["shape"], r["mode"]) for r in new}
    refused = {(r["shape"], r["peer"]) for r in new}
    return [
        r
        for r in earlier
        if (r["shape"], r["mode"]) not in replaced and not (r["mode"] is None and (r["shape"], r["peer"]) in refused)
    ] + new


def write_json(document: dict, path: Path) -> None:
    """Whole or not at all: a run that is killed leaves the points it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(unfinished, path)


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def _window_tile() -> list[int]:
    """Rows of Q and of K/V in a tile of the Hopper kernel at head dim 128, read from its table; (128, 128) without it."""
    path = Path(__file__).resolve().parent.parent / "csrc" / "sm90" / "tiles.py"
    if not path.exists():
        return [128, 128]
    spec = importlib.util.spec_from_file_location("sm90_tiles", path)
    tiles = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiles)
    (entry,) = (e for e in tiles.entries("Forward") if e["head_dims"] == (128, 128) and e["mask"] == "kMask")
    return [entry["kBlockQ"], entry["kBlockKV"]]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=environment.default_device())
    parser.add_argument("--suite", nargs="+", choices=list(SUITES), help="named shapes; default: the device's")
    parser.add_argument("--shape", nargs="+", metavar="SHAPE", help="own shapes, e.g. 'd64 B1 H9/3 S2048 causal fp32'")
    parser.add_argument("--dtype", choices=list(DTYPES), help="instead of each shape's own")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), metavar="PEER", help=f"of {', '.join(PEERS)}")
    parser.add_argument(
        "--directions",
        nargs="+",
        choices=MODES,
        metavar="MODE",
        help=f"of {', '.join(MODES)}; default: what the suite is about, else fwd bwd on a GPU, fwd fwd+bwd on a CPU",
    )
    parser.add_argument("--repeats", type=int, default=10, help="turns per peer at least (default: 10)")
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="per peer, shape and mode, about (default: 0.2 on a GPU, 1 on a CPU)",
    )
    parser.add_argument("--time_budget", type=float, metavar="S", help="begin no shape after this many seconds")
    parser.add_argument("--name", help="name of the JSON file; default: attention-DEVICE")
    parser.add_argument("--resume", action="store_true", help="keep the file's records, measure only what it lacks")
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help="default: benchmarks/results")
    parser.add_argument("--list", action="store_true", help="print the shapes of every suite and end")
    args = parser.parse_args(argv)
    if args.list:
        for name, suite in SUITES.items():
            print(name, *(f"  {shape}" for shape in suite.shapes), sep="\n")
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_attention: --device cuda: torch sees no GPU here")
    name = args.name or f"attention-{_slug(environment.device_name(args.device))}"
    path = args.output_dir / f"{name}.json"
    resumed = json.loads(path.read_text()) if args.resume and path.exists() else {"records": [], "orders": "balanced"}
    earlier = resumed["records"]
    try:
        todo = jobs(args, earlier)
    except ValueError as error:
        sys.exit(f"bench_attention: --shape: {error}")
    seconds = args.seconds or (0.2 if args.device == "cuda" else 1.0)

    started = time.monotonic()
    record = environment.describe(args.device)
    document = {
        "kind": "attention",
        "environment": record,
        "driver": _driver() if args.device == "cuda" else None,
        "matmul_flops_per_second": {
            dtype: matmul_ceiling(dtype, args.device)
            for dtype in dict.fromkeys([j.shape.dtype for j in todo] + [Shape.parse(r["shape"]).dtype for r in earlier])
        },
        "copy_bytes_per_second": copy_bandwidth(args.device),
        "window_tile": _window_tile(),
        "orders": resumed.get("orders"),  # of the peers' turns; files of before there was a choice say nothing
        "records": earlier,
        "skipped": [],
    }
    _free(args.device)
    wrong = []
    bar = tqdm(todo, unit="shape", desc="measuring")
    for job in bar:
        bar.set_postfix_str(str(job.shape))
        left = None if args.time_budget is None else args.time_budget - (time.monotonic() - started)
        if left is not None and left <= 0:
            document["skipped"].append(str(job.shape))
        else:
            records = measure_shape(job, args.device, args.repeats, seconds)
            document["records"] = merge(document["records"], records)
            wrong += [r for r in records if r["status"] == "wrong"]
            for line in summary(records):
                bar.write(line)
        write_json(document, path)
    record["clocks_at_end"] = environment.clocks(args.device)
    write_json(document, path)
    if document["skipped"]:
        print(f"not measured, --time_budget {args.time_budget:.0f} s was used up: {'; '.join(document['skipped'])}")
    for line in render_results.verdict_lines(document):
        print(line)
    table = render_results.write(args.output_dir)
    print(f"written in {time.monotonic() - started:.0f} s: {path} and {table}")
    if wrong:
        first = wrong[0]
        sys.exit(f"bench_attention: WRONG RESULTS, not timed: {first['peer']} at {first['shape']}: {first['reason']}")


def summary(records: list[dict]) -> list[str]:
    lines = []
    for r in records:
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


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(.*", "", text).lower()).strip("-")


if __name__ == "__main__":
    main()
