"""The shapes decoding is measured on: one line of text each, the bytes they read, and the named suites."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from shapes import DTYPES, Shape, Suite, log_uniform

# graph: seconds of a call in a CUDA graph. host: until an asynchronous call returns.
MODES = ("graph", "host")
PAGE_SIZES = (16, 64, 256)
RAGGED_FACTOR = 512  # 128 to 64k keys, for example


@dataclass(frozen=True)
class DecodeShape:
    """``seqlen_q`` queries at the end of each of ``batch`` sequences, whose keys lie in a cache."""

    batch: int
    heads_q: int
    heads_kv: int
    seqlen_q: int
    seqlen_kv: int  # keys of a sequence; ragged: their mean
    head_dim_qk: int
    head_dim_v: int
    window: int | None = None  # keys to the left of a query's own that it sees
    # dense: [batch, seqlen, heads, dim] in memory. heads-first: [batch, heads, seqlen, dim], as Transformers' caches.
    # pagedN: pages of N rows, in random order.
    layout: str = "dense"
    is_ragged: bool = False
    dtype: str = "bf16"
    is_latent: bool = False  # values are the first head_dim_v columns of the keys' rows
    # K and V hold numbers that e4m3 and a power of two for each row and head hold: whoever reads fp8 reads the same ones.
    is_e4m3: bool = False

    def __str__(self) -> str:
        dims = str(self.head_dim_qk) if self.head_dim_qk == self.head_dim_v else f"{self.head_dim_qk}/{self.head_dim_v}"
        dims = f"latent{dims}" if self.is_latent else f"d{dims}"
        window = "" if self.window is None else f" window{self.window}"
        ragged = " ragged" if self.is_ragged else ""
        lengths = f"S{self.seqlen_q}/{self.seqlen_kv}"
        return (
            f"{dims} B{self.batch} H{self.heads_q}/{self.heads_kv} {lengths}{window} {self.layout}{ragged} {self.dtype}"
            f"{' e4m3' if self.is_e4m3 else ''}"
        )

    @staticmethod
    def parse(text: str) -> DecodeShape:
        """The inverse of ``str``; raises ValueError with the form that is expected."""
        match = re.fullmatch(
            r"(d|latent)(\d+)(?:/(\d+))? B(\d+) H(\d+)(?:/(\d+))? S(\d+)/(\d+)(?: window(\d+))?"
            r"(?: (dense|heads-first|paged\d+))?( ragged)?(?: (fp32|bf16|fp16))?( e4m3)?",
            " ".join(text.replace(",", " ").split()),
        )
        if match is None:
            raise ValueError(f"expected a shape like 'd128 B8 H32/8 S1/8192 paged64 bf16', got {text!r}")
        kind, d_qk, d_v, batch, heads_q, heads_kv, seqlen_q, seqlen_kv, window, layout, ragged, dtype, e4m3 = (
            match.groups()
        )
        shape = DecodeShape(
            batch=int(batch),
            heads_q=int(heads_q),
            heads_kv=int(heads_kv or heads_q),
            seqlen_q=int(seqlen_q),
            seqlen_kv=int(seqlen_kv),
            head_dim_qk=int(d_qk),
            head_dim_v=int(d_v or d_qk),
            window=int(window) if window else None,
            layout=layout or "dense",
            is_ragged=ragged is not None,
            dtype=dtype or "bf16",
            is_latent=kind == "latent",
            is_e4m3=e4m3 is not None,
        )
        if shape.heads_q % shape.heads_kv:
            raise ValueError(f"{text!r}: {shape.heads_q} query heads are no multiple of {shape.heads_kv} kv heads")
        if shape.page_size is not None and (shape.page_size == 0 or shape.page_size % 16):
            raise ValueError(f"{text!r}: expected pages of a multiple of 16 rows, got {shape.page_size}")
        return shape

    @property
    def page_size(self) -> int | None:
        """Rows of a page; None for a cache without pages."""
        return int(self.layout.removeprefix("paged")) if self.layout.startswith("paged") else None

    def lengths(self) -> list[int]:
        """Keys of each sequence. Ragged: drawn with a fixed seed, log-uniform over a factor of 512, scaled to
        batch * seqlen_kv keys; for 64 x 12,800 from 127 to 57,914."""
        if not self.is_ragged:
            return [self.seqlen_kv] * self.batch
        return log_uniform(self.batch, self.batch * self.seqlen_kv, RAGGED_FACTOR)

    def keys_read(self) -> int:
        """Keys that some query sees, of all sequences."""
        if self.window is None:
            return sum(self.lengths())
        return sum(min(length, self.window + self.seqlen_q) for length in self.lengths())

    def bytes_read(self, in_fp8: bool = False) -> int:
        """Those of K and V that must be read, each once; q and the output are left out. ``in_fp8``: of fp8 caches, with two
        scales a row and head."""
        width = self.head_dim_qk if self.is_latent else self.head_dim_qk + self.head_dim_v
        row = width + 2 * 4 if in_fp8 else width * DTYPES[self.dtype].itemsize
        return self.keys_read() * self.heads_kv * row

    def flops(self) -> int:
        """Of both products with every key that is read; the triangle of a few queries is not taken off."""
        return 2 * self.keys_read() * self.heads_q * self.seqlen_q * (self.head_dim_qk + self.head_dim_v)

    def as_attention(self, seqlen_kv: int) -> Shape:
        """The same call for an implementation that knows no caches, on the last ``seqlen_kv`` keys: of one query all that
        it sees, of more all there are."""
        # One query at the end sees everything: causal or not is the same, and SDPA's causal begins at the top.
        is_causal = self.seqlen_q > 1
        window = self.window if is_causal else None
        return Shape(
            self.batch, self.heads_q, self.heads_kv, self.seqlen_q, seqlen_kv, self.head_dim_qk, self.head_dim_v,
            is_causal, window, self.dtype,
        )  # fmt: skip


def _shape(batch: int, seqlen_kv: int, heads_q: int = 32, heads_kv: int = 8, dim: int = 128, **rest) -> DecodeShape:
    return DecodeShape(batch, heads_q, heads_kv, rest.pop("seqlen_q", 1), seqlen_kv, dim, dim, **rest)


# The nine rows that the bars are about.
TABLE = [
    _shape(1, 4096),
    _shape(1, 32768),
    _shape(1, 131072),
    _shape(8, 8192),
    _shape(32, 8192),
    _shape(64, 2048),
    _shape(1, 16384, 32, 32),
    _shape(4, 8192, 64, 8, 64),
    _shape(1, 32768, 16, 8, 256),
]
ODD = [
    _shape(3, 5000, 28, 4),
    _shape(16, 3000, 12, 2, 64),
    _shape(2, 100000, 8, 1, 256),
    _shape(128, 512),
    _shape(256, 100, 8, 8, 64),
    DecodeShape(4, 32, 32, 1, 4096, 192, 128),
]
# DeepSeek-V2-Lite's heads and V3's. At batch 128, memory limits the first, and arithmetic two queries of the others.
LATENT_MEMORY = DecodeShape(128, 16, 1, 1, 8192, 576, 512, is_latent=True)
LATENT_ARITHMETIC = [DecodeShape(128, 128, 1, 2, n, 576, 512, is_latent=True) for n in (8192, 16384, 32768)]
# Beside each the same heads with expanded keys and values.
LATENT_SMALL = [DecodeShape(batch, 128, 1, 1, 8192, 576, 512, is_latent=True) for batch in (1, 8, 32)]
EXPANDED = [DecodeShape(shape.batch, 128, 128, 1, 8192, 192, 128) for shape in LATENT_SMALL]
FP8_LONG = _shape(8, 131072)
FP8_SHAPES = [
    _shape(1, 4096),
    _shape(1, 131072),
    _shape(32, 8192),
    _shape(32, 8192, 64, 8, 64),
    _shape(32, 8192, seqlen_q=4),
]
LONG, WINDOWED_KEYS = 131072, (1024, 4096, 16384, 65536)
RAGGED = _shape(64, 12800, layout="paged64", is_ragged=True)
ALL_PEERS = ("flashmla", "flashmla-attention", "sdpa-cudnn", "sdpa-flash")


def _with(shapes: list[DecodeShape], **changes) -> list[DecodeShape]:
    return [dataclasses.replace(shape, **changes) for shape in shapes]


SUITES: dict[str, Suite] = {
    "table": Suite(TABLE, peers=ALL_PEERS),
    "odd": Suite(ODD, peers=ALL_PEERS),
    # Beside each page size the same shapes without pages. Whoever has no pages is measured in the table.
    "paged": Suite(
        [s for shape in TABLE for s in (shape, *(_with([shape], layout=f"paged{n}")[0] for n in PAGE_SIZES))],
        peers=("flashmla",),
    ),
    "heads-first": Suite(_with(TABLE, layout="heads-first"), peers=ALL_PEERS),
    "ragged": Suite(
        [
            s
            for whole in (RAGGED, dataclasses.replace(RAGGED, layout="dense"))
            for s in (dataclasses.replace(whole, is_ragged=False), whole)
        ],
        peers=("flashmla", "flashmla-invariant"),
    ),
    # Beside each window a cache that holds no more keys than it.
    "window": Suite(
        [s for n in WINDOWED_KEYS for s in (_shape(1, LONG, window=n - 1), _shape(1, n))],
        peers=("flashmla", "sdpa-cudnn", "sdpa-flash"),
    ),
    "queries": Suite(
        [_shape(1, LONG, seqlen_q=n) for n in (1, 2, 4, 8, 16)] + [_shape(8, 8192, seqlen_q=n) for n in (4, 16)],
        peers=("flashmla", "flashmla-attention", "sdpa-cudnn"),
    ),
    "invariant": Suite(TABLE, peers=("flashmla", "flashmla-invariant")),
    "latent": Suite(
        [
            dataclasses.replace(shape, layout=layout)
            for shape in (LATENT_MEMORY, *LATENT_ARITHMETIC)
            for layout in ("dense", "paged64")
        ]
        + LATENT_SMALL
        + EXPANDED,
        peers=("flashmla",),
    ),
    # Fp8 caches beside the same numbers in 16 bits.
    "fp8": Suite(
        _with(
            [s for n in ("dense", "heads-first", "paged64") for s in _with([FP8_LONG, *FP8_SHAPES], layout=n)],
            is_e4m3=True,
        ),
        peers=("flashmla", "flashmla-fp8"),
    ),
    "overhead": Suite(
        [_shape(1, 4096), _shape(8, 4096, layout="heads-first")],
        modes=("host",),
        peers=("flashmla", "flashmla-attention", "sdpa", "sdpa-cudnn", "sdpa-flash"),
    ),
    "overhead-paged": Suite([_shape(8, 4096, layout="paged64")], modes=("host",), peers=("flashmla",)),
    "tiny": Suite(
        [
            _shape(2, 96, 4, 2, 64, dtype="fp32"),
            _shape(2, 96, 4, 2, 64, layout="paged16", dtype="fp32"),
            _shape(2, 96, 4, 2, 64, layout="heads-first", window=31, dtype="fp32"),
            _shape(3, 80, 4, 2, 64, layout="paged16", is_ragged=True, seqlen_q=2, dtype="fp32"),
            _shape(2, 96, 4, 2, 64, layout="paged16", dtype="fp32", is_e4m3=True),
            DecodeShape(2, 8, 1, 2, 96, 96, 64, dtype="fp32", is_latent=True),
            DecodeShape(3, 8, 1, 1, 80, 96, 64, layout="paged16", is_ragged=True, dtype="fp32", is_latent=True),
        ],
        modes=MODES,
    ),
}
DEFAULT_SUITES = {"cpu": ("tiny",), "cuda": tuple(name for name in SUITES if name != "tiny")}
