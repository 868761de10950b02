"""Exact attention beside its peers: TFLOP/s, spread, memory, and ratios to the best peer and the machine's ceiling.

    python benchmarks/bench_attention.py                                   # this machine's suite, all peers it has
    python benchmarks/bench_attention.py --device cuda --suite anchors --peers flashmla sdpa-cudnn sdpa-flash fa4
    python benchmarks/bench_attention.py --shape "d128 B1 H32/8 S4096 causal bf16" --modes fwd bwd
    python benchmarks/bench_attention.py --list                            # the shapes of each suite

How it measures: random normal inputs in [batch, seqlen, heads, head_dim] memory, the layout Transformers has; peers
take turns (A B C A B C ...), so that a clock that drifts drifts for all; CUDA events on a GPU, the wall clock on a CPU;
median and interquartile range. fwd is without gradients (inference), bwd the gradients of q, k, v from a kept forward.

No number without a right answer: output, dQ, dK and dV of every timed implementation are compared on a slice (one kv
head and its query heads; first, middle and last rows) with attention in float64. A wrong one is named and not timed.

FLOPs, full mask: fwd ``2·B·Hq·Sq·Sk·(Dqk+Dv)``, bwd ``2·B·Hq·Sq·Sk·(3·Dqk+2·Dv)`` (scores again); causal is half of
that, and a window counts its visible pairs. The ceiling is a large matrix product of the same dtype, same run.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._functorch.config
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import environment
import render_results

RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = ("fwd", "bwd", "fwd+bwd")
# Largest relative error (Frobenius norm over 64 rows) of a right implementation: rounding of the inputs' dtype with
# some room. One key too many or too few in a window of 512 is an error of 4e-2, in a causal mask more.
TOLERANCES = {"fp32": (3e-5, 1e-4), "fp16": (2e-3, 6e-3), "bf16": (1e-2, 3e-2)}  # of the output, of the gradients
CHECKED_ROWS = 64


@dataclass(frozen=True)
class Shape:
    batch: int
    heads_q: int
    heads_kv: int
    seqlen_q: int
    seqlen_kv: int
    head_dim_qk: int
    head_dim_v: int
    is_causal: bool = False
    window: int | None = None  # causal, and this many keys to the left, the query's own not counted
    dtype: str = "bf16"

    def __str__(self) -> str:
        dims = str(self.head_dim_qk) if self.head_dim_qk == self.head_dim_v else f"{self.head_dim_qk}/{self.head_dim_v}"
        seqlen = str(self.seqlen_q) if self.seqlen_q == self.seqlen_kv else f"{self.seqlen_q}/{self.seqlen_kv}"
        mask = f"window{self.window}" if self.window is not None else "causal" if self.is_causal else "full"
        return f"d{dims} B{self.batch} H{self.heads_q}/{self.heads_kv} S{seqlen} {mask} {self.dtype}"

    @staticmethod
    def parse(text: str) -> Shape:
        """The inverse of ``str``; raises ValueError with the form that is expected."""
        match = re.fullmatch(
            r"d(\d+)(?:/(\d+))? B(\d+) H(\d+)(?:/(\d+))? S(\d+)(?:/(\d+))? (full|causal|window(\d+))"
            r"(?: (fp32|bf16|fp16))?",
            " ".join(text.replace(",", " ").split()),
        )
        if match is None:
            raise ValueError(f"expected a shape like 'd128 B1 H32/8 S4096 causal bf16', got {text!r}")
        d_qk, d_v, batch, heads_q, heads_kv, seqlen_q, seqlen_kv, mask, window, dtype = match.groups()
        shape = Shape(
            batch=int(batch),
            heads_q=int(heads_q),
            heads_kv=int(heads_kv or heads_q),
            seqlen_q=int(seqlen_q),
            seqlen_kv=int(seqlen_kv or seqlen_q),
            head_dim_qk=int(d_qk),
            head_dim_v=int(d_v or d_qk),
            is_causal=mask != "full",
            window=int(window) if window else None,
            dtype=dtype or "bf16",
        )
        if shape.heads_q % shape.heads_kv:
            raise ValueError(f"{text!r}: {shape.heads_q} query heads are no multiple of {shape.heads_kv} kv heads")
        return shape

    def visible_pairs(self) -> int:
        """(query, key) pairs per head and batch entry; bottom-right aligned, as everywhere in this package."""
        if not self.is_causal:
            return self.seqlen_q * self.seqlen_kv
        shift = self.seqlen_kv - self.seqlen_q
        # Row i sees keys max(0, p - window) ... p of position p = i + shift.
        last = torch.arange(self.seqlen_q, dtype=torch.int64) + shift
        first = (last - self.window).clamp(min=0) if self.window is not None else torch.zeros_like(last)
        return int((last - first + 1).clamp(min=0).sum())

    def flops(self, mode: str) -> int:
        pairs = self.visible_pairs()
        if self.is_causal and self.window is None and self.seqlen_q == self.seqlen_kv:
            # The convention of every paper: half of the square, its diagonal not counted in full.
            pairs = self.seqlen_q * self.seqlen_kv // 2
        forward = 2 * self.batch * self.heads_q * pairs * (self.head_dim_qk + self.head_dim_v)
        backward = 2 * self.batch * self.heads_q * pairs * (3 * self.head_dim_qk + 2 * self.head_dim_v)
        return {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[mode]

    @property
    def mask_bytes(self) -> int:
        return self.seqlen_q * self.seqlen_kv

    @property
    def scores_bytes(self) -> int:
        """One copy of the scores: what eager attention holds several times."""
        return self.batch * self.heads_q * self.seqlen_q * self.seqlen_kv * DTYPES[self.dtype].itemsize


def _anchors() -> list[Shape]:
    """The table of peers every Hopper result is held against."""
    shapes = []
    for head_dim, heads in ((64, 32), (128, 16), (256, 8)):
        for is_causal in (False, True):
            for batch, seqlen in ((16, 1024), (4, 4096), (1, 16384)):
                shapes.append(Shape(batch, heads, heads, seqlen, seqlen, head_dim, head_dim, is_causal))
    shapes += [Shape(1, 32, 8, s, s, 128, 128, True) for s in (4096, 16384, 65536)]
    shapes += [Shape(1, 32, 32, s, s, 192, 128, True) for s in (4096, 16384)]
    return shapes


SUITES: dict[str, list[Shape]] = {
    "anchors": _anchors(),
    "short": [Shape(1, 32, 8, s, s, 128, 128, True) for s in (128, 512, 1024, 2048)],
    "window": [Shape(1, 32, 8, 16384, 16384, 128, 128, True, window) for window in (None, 4096, 1024)],
    "cpu": [
        *(
            Shape(1, 512 // d, 512 // d, s, s, d, d, is_causal, dtype=dtype)
            for dtype in ("fp32", "bf16")
            for d in (64, 128)
            for s in (1024, 4096, 8192)
            for is_causal in (True, False)
        ),
        *(Shape(1, 8, 2, 2048, 2048, 64, 64, True, dtype=dtype) for dtype in ("fp32", "bf16")),
        *(Shape(1, 4, 4, 8192, 8192, 64, 64, True, 512, dtype=dtype) for dtype in ("fp32", "bf16")),
    ],
    "tiny": [Shape(1, 4, 2, 256, 256, 64, 64, is_causal, dtype="fp32") for is_causal in (True, False)],
}
DEFAULT_SUITES = {"cpu": ("cpu",), "cuda": ("anchors", "short", "window")}

# ---------------------------------------------------------------- peers: (shape, device) -> function of q, k, v -> out

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # all [batch, seqlen, heads, head_dim]


class Unsupported(Exception):
    """A peer does not compute this shape; the message says why."""


def _flashmla(impl: str | None) -> Callable[[Shape, str], Attention]:
    def build(shape: Shape, device: str) -> Attention:
        from flashmla_hf import attention

        window = None if shape.window is None else (shape.window, 0)
        return lambda q, k, v: attention(q, k, v, is_causal=shape.is_causal, window=window, impl=impl)

    return build


def _visible(shape: Shape, device: str) -> torch.Tensor | None:
    """Boolean [seqlen_q, seqlen_kv] where causal alone does not say it."""
    if shape.window is None and (not shape.is_causal or shape.seqlen_q == shape.seqlen_kv):
        return None
    position = torch.arange(shape.seqlen_q, device=device)[:, None] + shape.seqlen_kv - shape.seqlen_q
    key = torch.arange(shape.seqlen_kv, device=device)[None]
    visible = key <= position
    return visible if shape.window is None else visible & (key >= position - shape.window)


def _sdpa(backend: str | None) -> Callable[[Shape, str], Attention]:
    def build(shape: Shape, device: str) -> Attention:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if backend == "math" and shape.scores_bytes * 6 > 0.8 * environment.memory_available(device):
            raise Unsupported("the scores do not fit in memory")
        mask = _visible(shape, device)
        names = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "math": "MATH"}
        chosen = None if backend is None else getattr(SDPBackend, names[backend])

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with contextlib.nullcontext() if chosen is None else sdpa_kernel(chosen):
                out = torch.nn.functional.scaled_dot_product_attention(
                    q.transpose(1, 2),
                    k.transpose(1, 2),
                    v.transpose(1, 2),
                    attn_mask=mask,
                    is_causal=shape.is_causal and mask is None,
                    enable_gqa=shape.heads_q != shape.heads_kv,
                )
            return out.transpose(1, 2)

        return run

    return build


def _eager(shape: Shape, device: str) -> Attention:
    """Transformers' own eager attention, as every Llama runs it by default where nothing better is chosen."""
    from transformers.models.llama.modeling_llama import eager_attention_forward

    if shape.scores_bytes * 6 > 0.8 * environment.memory_available(device):
        raise Unsupported("the scores do not fit in memory")
    module = torch.nn.Module().eval()
    module.num_key_value_groups = shape.heads_q // shape.heads_kv
    visible = _visible(dataclasses.replace(shape, window=shape.window or shape.seqlen_kv), device)
    mask = None
    if shape.is_causal:
        mask = torch.zeros(1, 1, shape.seqlen_q, shape.seqlen_kv, dtype=DTYPES[shape.dtype], device=device)
        mask.masked_fill_(~visible, torch.finfo(mask.dtype).min)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return eager_attention_forward(module, q, k, v, mask, scaling=shape.head_dim_qk**-0.5)[0]

    return run


def _flex(shape: Shape, device: str) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if device != "cuda":
        raise Unsupported("compiled FlexAttention is measured on GPUs")
    # Every shape compiles anew, and past dynamo's limit of recompilations FlexAttention would run unfused in silence.
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    block_mask = None
    if shape.is_causal:
        shift, window = shape.seqlen_kv - shape.seqlen_q, shape.window or shape.seqlen_kv

        def mask_mod(batch, head, q_index, kv_index):
            position = q_index + shift
            return (kv_index <= position) & (kv_index >= position - window)

        block_mask = create_block_mask(mask_mod, None, None, shape.seqlen_q, shape.seqlen_kv, device=device)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=block_mask, enable_gqa=shape.heads_q != shape.heads_kv).transpose(1, 2)

    return run


def _fa4(shape: Shape, device: str) -> Attention:
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError as error:
        raise Unsupported(f"flash_attn.cute: {error}") from None
    window = (None, None) if shape.window is None else (shape.window, 0)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = flash_attn_func(q, k, v, causal=shape.is_causal and shape.window is None, window_size=window)
        return out[0] if isinstance(out, tuple) else out

    return run


PEERS: dict[str, Callable[[Shape, str], Attention]] = {
    "flashmla": _flashmla(None),
    "flashmla-sm90": _flashmla("sm90"),
    "flashmla-cpu": _flashmla("cpu"),
    "flashmla-flex": _flashmla("flex"),
    "sdpa": _sdpa(None),
    "sdpa-flash": _sdpa("flash"),
    "sdpa-cudnn": _sdpa("cudnn"),
    "sdpa-math": _sdpa("math"),
    "eager": _eager,
    "flex": _flex,
    "fa4": _fa4,
}
DEFAULT_PEERS = {
    "cpu": ("flashmla", "sdpa", "eager"),
    "cuda": ("flashmla", "sdpa-cudnn", "sdpa-flash", "fa4", "flex", "eager"),
}


def is_ours(peer: str) -> bool:
    return peer.startswith("flashmla")


# ---------------------------------------------------------------- correctness


@dataclass
class Inputs:
    q: torch.Tensor  # [batch, seqlen_q, heads_q, head_dim_qk]
    k: torch.Tensor  # [batch, seqlen_kv, heads_kv, head_dim_qk]
    v: torch.Tensor  # [batch, seqlen_kv, heads_kv, head_dim_v]
    dout: torch.Tensor  # [batch, seqlen_q, heads_q, head_dim_v]

    @staticmethod
    def random(shape: Shape, device: str) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, device=device).to(DTYPES[shape.dtype])

        return Inputs(
            normal(shape.batch, shape.seqlen_q, shape.heads_q, shape.head_dim_qk).requires_grad_(),
            normal(shape.batch, shape.seqlen_kv, shape.heads_kv, shape.head_dim_qk).requires_grad_(),
            normal(shape.batch, shape.seqlen_kv, shape.heads_kv, shape.head_dim_v).requires_grad_(),
            normal(shape.batch, shape.seqlen_q, shape.heads_q, shape.head_dim_v),
        )


def _blocks(seqlen: int) -> list[slice]:
    """The first, a middle and the last CHECKED_ROWS rows."""
    starts = {0, max(0, seqlen // 2 - CHECKED_ROWS // 2), max(0, seqlen - CHECKED_ROWS)}
    return [slice(start, min(start + CHECKED_ROWS, seqlen)) for start in sorted(starts)]


@dataclass
class Expected:
    """float64 results of the last batch entry and last kv head: blocks of rows of O and dQ (of each query head in the
    group), and blocks of rows of dK and dV."""

    out: list[torch.Tensor]  # of [group, rows, head_dim_v]
    dq: list[torch.Tensor] | None
    dk: list[torch.Tensor] | None  # of [rows, head_dim_qk]
    dv: list[torch.Tensor] | None


@torch.no_grad()
def expected(shape: Shape, inputs: Inputs, needs_gradients: bool) -> Expected:
    """Attention and its gradients on the slice, by the textbook formulas, a chunk of query rows at a time."""
    group = shape.heads_q // shape.heads_kv
    q = inputs.q[-1, :, -group:].transpose(0, 1).double()  # [group, seqlen_q, head_dim_qk]
    dout = inputs.dout[-1, :, -group:].transpose(0, 1).double()
    k, v = inputs.k[-1, :, -1].double(), inputs.v[-1, :, -1].double()  # [seqlen_kv, head_dim]
    scale = shape.head_dim_qk**-0.5
    key = torch.arange(shape.seqlen_kv, device=q.device)

    def rows(block: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """P, O and dS of some query rows: [group, rows, seqlen_kv], [group, rows, head_dim_v], as P."""
        s = scale * q[:, block] @ k.T
        if shape.is_causal:
            position = (
                torch.arange(block.start, block.stop, device=q.device)[:, None] + shape.seqlen_kv - shape.seqlen_q
            )
            visible = key <= position
            if shape.window is not None:
                visible &= key >= position - shape.window
            s.masked_fill_(~visible, -math.inf)
        p = torch.softmax(s, dim=-1).nan_to_num(0.0)  # a row that sees nothing is zero
        out = p @ v
        delta = (dout[:, block] * out).sum(-1, keepdim=True)
        ds = p * (dout[:, block] @ v.T - delta)  # FlashAttention-2 (arXiv 2307.08691), algorithm 2
        return p, out, ds

    blocks = _blocks(shape.seqlen_q)
    some = [rows(block) for block in blocks]
    result = Expected([out for _, out, _ in some], None, None, None)
    if not needs_gradients:
        return result
    result.dq = [scale * ds @ k for _, _, ds in some]
    kv_blocks = _blocks(shape.seqlen_kv)
    result.dk = [torch.zeros_like(k[block]) for block in kv_blocks]
    result.dv = [torch.zeros_like(v[block]) for block in kv_blocks]
    chunk = max(16, 2**25 // (group * shape.seqlen_kv))  # 256 MiB of float64 scores
    for start in range(0, shape.seqlen_q, chunk):
        block = slice(start, min(start + chunk, shape.seqlen_q))
        p, _, ds = rows(block)
        for i, kv_block in enumerate(kv_blocks):
            result.dk[i] += scale * torch.einsum("grk,grd->kd", ds[..., kv_block], q[:, block])
            result.dv[i] += torch.einsum("grk,grd->kd", p[..., kv_block], dout[:, block])
    return result


def verdict(shape: Shape, run: Attention, inputs: Inputs, truth: Expected) -> tuple[str | None, dict[str, float]]:
    """What is wrong with ``run`` on these inputs, or None; and the relative errors found."""
    group = shape.heads_q // shape.heads_kv
    tolerance_out, tolerance_grad = TOLERANCES[shape.dtype]
    with torch.no_grad():  # what "fwd" times
        out, gradients = run(inputs.q, inputs.k, inputs.v), None
    if out.shape != inputs.dout.shape:
        return f"the output has shape {tuple(out.shape)}, expected {tuple(inputs.dout.shape)}", {}
    if truth.dq is not None:
        training_out = run(inputs.q, inputs.k, inputs.v)
        gradients = torch.autograd.grad(training_out, (inputs.q, inputs.k, inputs.v), inputs.dout)
        training_out = training_out.detach()
    errors, problem = {}, None

    def compare(name: str, got: torch.Tensor, want: list[torch.Tensor], blocks: list[slice], tolerance: float) -> None:
        nonlocal problem
        worst = 0.0
        for block, reference in zip(blocks, want, strict=True):
            difference = (got[..., block, :].double() - reference).norm() / reference.norm().clamp(min=1e-30)
            worst = max(worst, float(difference)) if torch.isfinite(difference) else math.inf
        errors[name] = max(worst, errors.get(name, 0.0))
        if problem is None and worst > tolerance:
            problem = f"{name} is off by {worst:.1e} (relative; allowed {tolerance:.0e})"

    compare("O", out[-1, :, -group:].transpose(0, 1), truth.out, _blocks(shape.seqlen_q), tolerance_out)
    if gradients is not None:
        dq, dk, dv = gradients
        compare("O", training_out[-1, :, -group:].transpose(0, 1), truth.out, _blocks(shape.seqlen_q), tolerance_out)
        compare("dQ", dq[-1, :, -group:].transpose(0, 1), truth.dq, _blocks(shape.seqlen_q), tolerance_grad)
        compare("dK", dk[-1, :, -1], truth.dk, _blocks(shape.seqlen_kv), tolerance_grad)
        compare("dV", dv[-1, :, -1], truth.dv, _blocks(shape.seqlen_kv), tolerance_grad)
    # The slice cannot see everything; NaN and infinity elsewhere it need not miss.
    for name, tensor in (("O", out), *zip(("dQ", "dK", "dV"), gradients or (), strict=False)):
        if problem is None and not torch.isfinite(tensor).all():
            problem = f"{name} is not finite everywhere"
    return problem, errors


# ---------------------------------------------------------------- timing


def timed_call(run: Attention, inputs: Inputs, mode: str) -> Callable[[], object]:
    """A function without arguments that does what ``mode`` times, once."""
    q, k, v = inputs.q, inputs.k, inputs.v
    if mode == "fwd":
        q, k, v = q.detach(), k.detach(), v.detach()
        return lambda: run(q, k, v)
    if mode == "fwd+bwd":
        return lambda: torch.autograd.grad(run(q, k, v), (q, k, v), inputs.dout)
    out = run(q, k, v)
    return lambda: torch.autograd.grad(out, (q, k, v), inputs.dout, retain_graph=True)


def seconds_of(call: Callable[[], object], count: int, device: str) -> float:
    """Seconds per call of ``count`` calls in a row."""
    if device == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(count):
            call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / count
    started = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - started) / count


def interleaved(calls: dict[str, Callable[[], object]], device: str, repeats: int, slice_seconds: float) -> dict:
    """Seconds per call of each, ``repeats`` times in turn; a turn lasts about ``slice_seconds``."""
    counts = {}
    for name, call in calls.items():
        seconds_of(call, 1, device)  # compiles, allocates, chooses
        once = seconds_of(call, 1, device)
        counts[name] = max(1, min(200, round(slice_seconds / max(once, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(seconds_of(call, counts[name], device))
    return times


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
    times = [seconds_of(lambda: a @ b, 10 if device == "cuda" else 1, device) for _ in range(7)][2:]
    return 2 * n**3 / statistics.median(times)


def spread(times: list[float]) -> float:
    """Interquartile range over the median."""
    if len(times) < 3:
        return 0.0
    low, _, high = statistics.quantiles(times, n=4)
    return (high - low) / statistics.median(times)


# ---------------------------------------------------------------- one shape


def measure_shape(
    shape: Shape, peers: list[str], modes: list[str], device: str, repeats: int, slice_seconds: float
) -> list[dict]:
    """One record per peer and mode: seconds, spread, FLOP/s, memory and errors, or why there are none."""
    inputs = Inputs.random(shape, device)
    truth = expected(shape, inputs, needs_gradients=modes != ["fwd"])
    records, runs = [], {}

    def refuse(peer: str, status: str, reason: str) -> None:
        records.append({"shape": str(shape), "peer": peer, "mode": None, "status": status, "reason": reason})

    errors_of: dict[str, dict] = {}
    for peer in peers:
        try:
            run = PEERS[peer](shape, device)
            problem, errors_of[peer] = verdict(shape, run, inputs, truth)
        except Unsupported as error:
            refuse(peer, "unsupported", str(error))
        except torch.OutOfMemoryError:
            refuse(peer, "out_of_memory", "the GPU's memory does not suffice")
        except Exception as error:  # a peer's refusal can be any exception; it is recorded, and the others go on
            refuse(peer, "unsupported", _first_line(error))
        else:
            if problem is not None:
                refuse(peer, "wrong", problem)
            else:
                runs[peer] = run
        _free(device)
    del truth

    for mode in modes:
        calls, memory = {}, {}
        for peer in list(runs):
            try:
                calls[peer] = timed_call(runs[peer], inputs, mode)
                memory[peer] = peak_memory(calls[peer], device)
            except torch.OutOfMemoryError:
                refuse(peer, "out_of_memory", f"{mode}: the GPU's memory does not suffice")
                calls.pop(peer, None)
                del runs[peer]
            except Exception as error:  # as above: the others go on
                refuse(peer, "unsupported", f"{mode}: {_first_line(error)}")
                calls.pop(peer, None)
            _free(device)
        for peer, times in interleaved(calls, device, repeats, slice_seconds).items():
            seconds = statistics.median(times)
            records.append(
                {
                    "shape": str(shape),
                    "peer": peer,
                    "mode": mode,
                    "status": "ok",
                    "seconds": seconds,
                    "spread": spread(times),
                    "flops_per_second": shape.flops(mode) / seconds,
                    "peak_bytes": memory[peer],
                    "errors": errors_of[peer],
                }
            )
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


def write_json(document: dict, path: Path) -> None:
    """Whole or not at all: a run that is killed leaves the points it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(unfinished, path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=environment.default_device())
    parser.add_argument("--suite", nargs="+", choices=list(SUITES), help="named shapes; default: the device's")
    parser.add_argument("--shape", nargs="+", metavar="SHAPE", help="own shapes, e.g. 'd64 B1 H9/3 S2048 causal fp32'")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), metavar="PEER", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--modes", nargs="+", choices=MODES, help="default: fwd bwd on a GPU, fwd fwd+bwd on a CPU")
    parser.add_argument("--repeats", type=int, default=7, help="turns per peer")
    parser.add_argument(
        "--slice", type=float, metavar="S", help="seconds per turn (default: 0.02 on a GPU, 0.1 on a CPU)"
    )
    parser.add_argument("--time_budget", type=float, metavar="S", help="begin no shape after this many seconds")
    parser.add_argument("--name", help="name of the JSON file; default: attention-DEVICE")
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help="default: benchmarks/results")
    parser.add_argument("--list", action="store_true", help="print the shapes of every suite and end")
    args = parser.parse_args(argv)
    if args.list:
        for suite, shapes in SUITES.items():
            print(suite, *(f"  {shape}" for shape in shapes), sep="\n")
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_attention: --device cuda: torch sees no GPU here")
    try:
        shapes = [Shape.parse(text) for text in args.shape or []]
    except ValueError as error:
        sys.exit(f"bench_attention: --shape: {error}")
    for suite in args.suite or (() if shapes else DEFAULT_SUITES[args.device]):
        shapes += SUITES[suite]
    peers = args.peers or list(DEFAULT_PEERS[args.device])
    modes = args.modes or (["fwd", "bwd"] if args.device == "cuda" else ["fwd", "fwd+bwd"])
    # "bwd" repeats the backward of one kept forward, which compiled graphs that give their buffers away refuse.
    torch._functorch.config.donated_buffer = False
    slice_seconds = args.slice or (0.02 if args.device == "cuda" else 0.1)

    started = time.monotonic()
    record = environment.describe(args.device)
    ceilings = {dtype: matmul_ceiling(dtype, args.device) for dtype in dict.fromkeys(s.dtype for s in shapes)}
    document = {
        "kind": "attention",
        "environment": record,
        "matmul_flops_per_second": ceilings,
        "records": [],
        "skipped": [],
    }
    path = args.output_dir / f"{args.name or 'attention-' + _slug(record['device'])}.json"
    wrong = []
    bar = tqdm(shapes, unit="shape", desc="measuring")
    for shape in bar:
        bar.set_postfix_str(str(shape))
        left = None if args.time_budget is None else args.time_budget - (time.monotonic() - started)
        if left is not None and left <= 0:
            document["skipped"].append(str(shape))
        else:
            records = measure_shape(shape, peers, modes, args.device, args.repeats, slice_seconds)
            document["records"] += records
            wrong += [r for r in records if r["status"] == "wrong"]
            for line in summary(records):
                bar.write(line)
        record["clocks_at_end"] = environment.clocks(args.device)
        write_json(document, path)
    if document["skipped"]:
        print(f"not measured, --time_budget {args.time_budget:.0f} s was used up: {'; '.join(document['skipped'])}")
    table = render_results.write(args.output_dir)
    print(f"written: {path} and {table}")
    if wrong:
        first = wrong[0]
        sys.exit(f"bench_attention: WRONG RESULTS, not timed: {first['peer']} at {first['shape']}: {first['reason']}")


def summary(records: list[dict]) -> list[str]:
    lines = []
    for r in records:
        head = f"{r['shape']:<42} {r['peer']:<14}"
        if r["status"] != "ok":
            lines.append(f"{head} {r['status'].replace('_', ' ')}: {r['reason']}")
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
