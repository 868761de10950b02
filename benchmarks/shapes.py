"""The shapes attention is measured on: one line of text each, their operation counts, and the named suites."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# fwd: inference. bwd: the gradients of q, k, v from a kept forward. host: microseconds the caller waits for an
# asynchronous call to return, without and with inputs that require gradients.
MODES = ("fwd", "bwd", "fwd+bwd", "host", "host+grad")
LAYOUTS = ("dense", "packed", "ragged")


def log_uniform(count: int, total: int, factor: int) -> list[int]:
    """``count`` lengths that are ``total`` together, drawn with a fixed seed, log-uniform over ``factor``."""
    generator = random.Random(0)
    weights = [factor ** generator.random() for _ in range(count)]
    bounds = [round(total * sum(weights[:i]) / sum(weights)) for i in range(count + 1)]
    return [stop - start for start, stop in itertools.pairwise(bounds)]


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
    # dense: [batch, seqlen, heads, dim]. packed: the same documents behind each other with cu_seqlens. ragged: packed,
    # batch * seqlen tokens in batch documents of unequal lengths. latent: dense, the values are the first columns of the keys.
    layout: str = "dense"

    def __str__(self) -> str:
        dims = str(self.head_dim_qk) if self.head_dim_qk == self.head_dim_v else f"{self.head_dim_qk}/{self.head_dim_v}"
        seqlen = str(self.seqlen_q) if self.seqlen_q == self.seqlen_kv else f"{self.seqlen_q}/{self.seqlen_kv}"
        mask = f"window{self.window}" if self.window is not None else "causal" if self.is_causal else "full"
        layout = "" if self.layout == "dense" else f" {self.layout}"
        return f"d{dims} B{self.batch} H{self.heads_q}/{self.heads_kv} S{seqlen} {mask}{layout} {self.dtype}"

    @staticmethod
    def parse(text: str) -> Shape:
        """The inverse of ``str``; raises ValueError with the form that is expected."""
        match = re.fullmatch(
            r"d(\d+)(?:/(\d+))? B(\d+) H(\d+)(?:/(\d+))? S(\d+)(?:/(\d+))? (full|causal|window(\d+))"
            r"(?: (packed|ragged|latent))?(?: (fp32|bf16|fp16))?",
            " ".join(text.replace(",", " ").split()),
        )
        if match is None:
            raise ValueError(f"expected a shape like 'd128 B1 H32/8 S4096 causal bf16', got {text!r}")
        d_qk, d_v, batch, heads_q, heads_kv, seqlen_q, seqlen_kv, mask, window, layout, dtype = match.groups()
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
            layout=layout or "dense",
        )
        if shape.heads_q % shape.heads_kv:
            raise ValueError(f"{text!r}: {shape.heads_q} query heads are no multiple of {shape.heads_kv} kv heads")
        if shape.is_latent and shape.head_dim_v > shape.head_dim_qk:
            raise ValueError(f"{text!r}: {shape.head_dim_v} columns of {shape.head_dim_qk} are no values")
        if shape.is_packed and shape.seqlen_q != shape.seqlen_kv:
            raise ValueError(f"{text!r}: a {shape.layout} shape has one length for queries and keys")
        return shape

    @property
    def is_packed(self) -> bool:
        return self.layout in ("packed", "ragged")

    @property
    def is_latent(self) -> bool:
        return self.layout == "latent"

    def lengths(self) -> list[int]:
        """Query tokens of each document (batch entry). Ragged: drawn with a fixed seed, log-uniform over a factor of 64,
        scaled to batch * seqlen tokens; for 16 x 1024 from 209 to 3,228."""
        if self.layout != "ragged":
            return [self.seqlen_q] * self.batch
        return log_uniform(self.batch, self.batch * self.seqlen_q, 64)

    def documents(self) -> list[slice]:
        """Where each document lies in a packed tensor."""
        bounds = [0]
        for length in self.lengths():
            bounds.append(bounds[-1] + length)
        return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]

    def visible_pairs(self) -> int:
        """(query, key) pairs per head, of all documents; bottom-right aligned, as everywhere in this package."""
        if not self.is_causal:
            return sum(length * (self.seqlen_kv if self.layout != "ragged" else length) for length in self.lengths())
        return sum(self._causal_pairs(length) for length in self.lengths())

    def _causal_pairs(self, seqlen_q: int) -> int:
        shift = 0 if self.is_packed else self.seqlen_kv - seqlen_q
        # Row i sees keys max(0, p - window) ... p of position p = i + shift.
        last = torch.arange(seqlen_q, dtype=torch.int64) + shift
        first = (last - self.window).clamp(min=0) if self.window is not None else torch.zeros_like(last)
        return int((last - first + 1).clamp(min=0).sum())

    def flops(self, mode: str) -> int:
        """Operations of "fwd", "bwd" or "fwd+bwd"."""
        pairs = self.visible_pairs()
        if self.is_causal and self.window is None and self.seqlen_q == self.seqlen_kv:
            # The convention of every paper: half of the square, its diagonal not counted in full.
            pairs = sum(length**2 for length in self.lengths()) // 2
        forward = 2 * self.heads_q * pairs * (self.head_dim_qk + self.head_dim_v)
        backward = 2 * self.heads_q * pairs * (3 * self.head_dim_qk + 2 * self.head_dim_v)
        return {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[mode]

    def tiles_visited(self, block_q: int, block_kv: int) -> int:
        """Tiles of one head's score matrix that hold a visible pair, per document and in all."""
        tiles = 0
        for length in self.lengths():
            seqlen_kv = length if self.is_packed else self.seqlen_kv
            for start in range(0, length, block_q):
                last = seqlen_kv - 1
                if self.is_causal:
                    last = min(last, min(start + block_q, length) - 1 + seqlen_kv - length)
                first = 0 if self.window is None else max(0, start + seqlen_kv - length - self.window)
                tiles += max(0, last // block_kv - first // block_kv + 1) if last >= 0 else 0
        return tiles

    @property
    def scores_bytes(self) -> int:
        """One copy of the scores; eager attention holds several."""
        return self.batch * self.heads_q * self.seqlen_q * self.seqlen_kv * DTYPES[self.dtype].itemsize

    def output_bytes(self, mode: str) -> int:
        """The output, and with a backward the gradients of q, k and v (latents: q and k): every implementation needs them."""
        queries, keys = self.batch * self.seqlen_q * self.heads_q, self.batch * self.seqlen_kv * self.heads_kv
        gradients = (queries + keys) * self.head_dim_qk + keys * self.head_dim_v * (not self.is_latent)
        return (queries * self.head_dim_v + gradients * (mode != "fwd")) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Suite:
    """What ``--suite`` names. Modes and peers are those a suite is about; None leaves them to the device's defaults."""

    shapes: list  # of Shape, or of DecodeShape
    modes: tuple[str, ...] | None = None
    peers: tuple[str, ...] | None = None
    draw: Callable[[int, int, str], list] | None = None  # of a seed, a number and a device, instead of ``shapes``


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


SUITES: dict[str, Suite] = {
    "anchors": Suite(_anchors()),
    "short": Suite([Shape(1, 32, 8, s, s, 128, 128, True) for s in (128, 512, 1024, 2048)]),
    # 16,384 tokens in 16 documents: a dense batch, the same packed, and documents of unequal lengths.
    "varlen": Suite(
        [
            Shape(16, heads_q, heads_kv, 1024, 1024, 128, 128, True, layout=layout)
            for heads_q, heads_kv in ((16, 16), (32, 8))
            for layout in LAYOUTS
        ]
    ),
    "window": Suite([Shape(1, 32, 8, 16384, 16384, 128, 128, True, window) for window in (None, 4096, 1024)]),
    "overhead": Suite(
        [Shape(1, 32, 8, s, s, 128, 128, True) for s in (128, 512, 1024)],
        modes=("host", "host+grad"),
        peers=("flashmla", "flashmla-operator", "sdpa", "sdpa-cudnn", "sdpa-flash"),
    ),
    "deterministic": Suite(
        [
            Shape(4, 16, 16, 4096, 4096, 128, 128, False),
            Shape(4, 32, 32, 4096, 4096, 64, 64, True),
            Shape(1, 32, 8, 4096, 4096, 128, 128, True),
            Shape(1, 32, 8, 16384, 16384, 128, 128, True),
            Shape(8, 16, 16, 2048, 2048, 128, 128, True),
            Shape(3, 28, 4, 5000, 5000, 128, 128, True),
            Shape(1, 16, 16, 4096, 4096, 128, 128, False),
            Shape(2, 16, 16, 8192, 8192, 96, 96, True),
            Shape(1, 32, 32, 4096, 4096, 192, 128, True),
            Shape(1, 32, 8, 16384, 16384, 128, 128, True, 4096),
            Shape(16, 32, 8, 2048, 2048, 128, 128, True, layout="ragged"),
        ],
        modes=("bwd",),
        peers=("flashmla", "flashmla-deterministic", "fa4", "fa4-deterministic"),
    ),
    # Of Gemma 4's global layers. SDPA's cuDNN and FlashAttention 2 end at 256.
    "wide": Suite(
        [
            *(Shape(1, 16, 2, 8192, 8192, 512, 512, is_causal) for is_causal in (True, False)),
            Shape(4, 16, 2, 2048, 2048, 512, 512, True),
            Shape(1, 16, 2, 32768, 32768, 512, 512, True),
        ],
        modes=("fwd", "bwd"),
        peers=("flashmla", "flex", "sdpa-efficient"),
    ),
    # DeepSeek-V3's heads, and DeepSeek-V2-Lite's, in training on latents.
    "latent-training": Suite(
        [
            *(Shape(1, 128, 1, s, s, 576, 512, True, layout="latent") for s in (4096, 8192)),
            Shape(1, 16, 1, 16384, 16384, 576, 512, True, layout="latent"),
        ],
        modes=("fwd", "bwd"),
        peers=("flashmla-latent", "sdpa-efficient", "eager"),
    ),
    # What answers on GPUs that are not Hopper's: torch's FlashAttention 2, built ahead of time, and compiled FlexAttention. On
    # a Hopper they run by these names alone.
    "other-gpus": Suite(
        [
            Shape(4, 32, 8, 4096, 4096, 64, 64, True),
            Shape(1, 32, 8, 8192, 8192, 128, 128, True),
            Shape(16, 32, 8, 1024, 1024, 128, 128, True, layout="ragged"),
            Shape(1, 32, 8, 16384, 16384, 128, 128, True, 4096),
            Shape(1, 8, 4, 8192, 8192, 256, 256, True),
        ],
        modes=("fwd", "bwd"),
        peers=("flashmla-torch-flash", "flashmla-flex"),
    ),
    # Quantisation is in the time of flashmla-fp8 and in none of cudnn-fp8's.
    "fp8": Suite(
        [
            Shape(batch, 2048 // d, 2048 // d, s, s, d, d, is_causal)
            for d in (128, 64, 256)
            for batch, s in ((4, 4096), (1, 16384), (1, 32768))
            for is_causal in (False, True)
        ],
        modes=("fwd",),
        peers=("flashmla-fp8", "flashmla", "cudnn-fp8", "sdpa-cudnn"),
    ),
    "cpu": Suite(
        [
            *(
                Shape(1, 512 // d, 512 // d, s, s, d, d, is_causal, dtype=dtype)
                for dtype in ("fp32", "bf16")
                for d in (64, 128)
                for s in (1024, 4096, 8192)
                for is_causal in (True, False)
            ),
            *(Shape(1, 8, 2, 2048, 2048, 64, 64, True, dtype=dtype) for dtype in ("fp32", "bf16")),
            *(Shape(1, 4, 4, 8192, 8192, 64, 64, True, 512, dtype=dtype) for dtype in ("fp32", "bf16")),
        ]
    ),
    "tiny": Suite([Shape(1, 4, 2, 256, 256, 64, 64, is_causal, dtype="fp32") for is_causal in (True, False)]),
}
DEFAULT_SUITES = {"cpu": ("cpu",), "cuda": ("anchors", "short", "varlen", "window", "overhead", "deterministic")}
