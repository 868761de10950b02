"""What the tests call attention with: one dataclass for a call, named calls, and a hypothesis strategy for random ones.

A ``Case`` is plain numbers, so it prints as its own reproduction; ``Case.inputs`` makes its tensors.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

LAYOUTS = ("contiguous", "transposed", "sliced", "mixed")

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("sm90_tiles", ROOT / "csrc" / "sm90" / "tiles.py")
sm90_tiles = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sm90_tiles)
# The head dims (qk, v) the Hopper kernels are instantiated for; a call runs in the first pair that is wide enough for both.
SM90_ROWS = tuple(sm90_tiles.head_dims())


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call: q, k, v, sinks, cu_seqlens as in :func:`flashmla_hf.attention`; and what flows
    back: dout like out (dtype of q), dlse like lse (fp32; float64 for float64 inputs). v is ``None`` if the values are columns
    of k."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor | None
    sinks: torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_kv: torch.Tensor | None
    dout: torch.Tensor
    dlse: torch.Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values in another dtype (the float64 twin of bf16 inputs holds exactly the rounded values)."""
        statistics = torch.promote_types(torch.float32, dtype)
        return replace(
            self,
            **{name: x.to(dtype) for name in ("q", "k", "v", "dout") if (x := getattr(self, name)) is not None},
            sinks=None if self.sinks is None else self.sinks.to(statistics),
            dlse=self.dlse.to(statistics),
        )


@dataclass(frozen=True)
class Case:
    """One call. Dense: batch, seqlen_q, seqlen_kv. Packed: ``seqlens_q`` and ``seqlens_kv`` hold the sequence lengths,
    ``rest_q`` and ``rest_kv`` count rows past the last boundary. ``None`` means: like its q (or qk) counterpart."""

    name: str = field(default="", compare=False)
    batch: int = 1
    seqlen_q: int = 64
    seqlen_kv: int | None = None
    heads_q: int = 2
    heads_kv: int | None = None
    head_dim_qk: int = 64
    head_dim_v: int | None = None
    scale: float | None = None
    is_causal: bool = False
    window: tuple[int | None, int | None] | None = None
    softcap: float = 0.0
    has_sinks: bool = False
    seqlens_q: tuple[int, ...] | None = None
    seqlens_kv: tuple[int, ...] | None = None
    rest_q: int = 0
    rest_kv: int = 0
    layout: str = "contiguous"
    is_latent: bool = False  # the values are the first columns of k
    magnitude: float = 1.0  # standard deviation of q and k; large values make the softmax peak
    outliers: float = 1.0  # every seventh query is this many times larger: peaked rows beside flat ones in one tile

    def __post_init__(self) -> None:
        for mine, like in (("seqlen_kv", "seqlen_q"), ("heads_kv", "heads_q"), ("head_dim_v", "head_dim_qk"),
                           ("seqlens_kv", "seqlens_q")):  # fmt: skip
            if getattr(self, mine) is None:
                object.__setattr__(self, mine, getattr(self, like))

    @property
    def is_packed(self) -> bool:
        return self.seqlens_q is not None

    @property
    def sm90_row(self) -> tuple[int, int] | None:
        """The row of :data:`SM90_ROWS` this call runs in; ``None`` where its head dims are not those of the kernels."""
        dims = self.head_dim_qk, self.head_dim_v
        if any(dim % 8 for dim in dims):
            return None
        return next((row for row in SM90_ROWS if dims[0] <= row[0] and dims[1] <= row[1]), None)

    @property
    def mask_kind(self) -> str:
        """none, causal (a right edge alone) or window (a left edge): what the kernels are specialised by."""
        left, right = (-1 if bound is None else bound for bound in self.window or (None, None))
        return "window" if left >= 0 else "causal" if self.is_causal or right >= 0 else "none"

    @property
    def num_scores(self) -> int:
        """Elements of the score matrices of all heads and sequences: what eager attention stores."""
        pairs = (
            zip(self.seqlens_q, self.seqlens_kv, strict=True) if self.is_packed else [(self.seqlen_q, self.seqlen_kv)]
        )
        return self.heads_q * (1 if self.is_packed else self.batch) * sum(q * kv for q, kv in pairs)

    @property
    def options(self) -> dict:
        """The keyword arguments of :func:`flashmla_hf.attention` that are not tensors."""
        return {"scale": self.scale, "is_causal": self.is_causal, "window": self.window, "softcap": self.softcap}

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
        """Random normal tensors, the same values (up to rounding) in every dtype; they are drawn where they live, so a
        GPU has other values than the CPU."""
        generator = torch.Generator(device).manual_seed(seed)
        layouts = iter(
            ("contiguous", "transposed", "sliced", "transposed") if self.layout == "mixed" else [self.layout] * 4
        )

        def normal(
            *shape: int, is_sequence: bool = True, to: torch.dtype = dtype, std: float = 1.0, outliers: float = 1.0
        ) -> torch.Tensor:
            x = torch.randn(shape, generator=generator, dtype=torch.float64, device=device) * std
            if outliers != 1.0:
                x[..., ::7, :, :] *= outliers
            return _lay_out(x.to(to), next(layouts)) if is_sequence else x.to(to)

        if self.is_packed:
            rows_q, rows_kv = (sum(self.seqlens_q) + self.rest_q,), (sum(self.seqlens_kv) + self.rest_kv,)
            lse_shape = (self.heads_q, *rows_q)
            cu_seqlens_q, cu_seqlens_kv = (_boundaries(x, device) for x in (self.seqlens_q, self.seqlens_kv))
        else:
            rows_q, rows_kv = (self.batch, self.seqlen_q), (self.batch, self.seqlen_kv)
            lse_shape = (self.batch, self.heads_q, self.seqlen_q)
            cu_seqlens_q = cu_seqlens_kv = None
        statistics = torch.promote_types(torch.float32, dtype)
        return Inputs(
            q=normal(*rows_q, self.heads_q, self.head_dim_qk, std=self.magnitude, outliers=self.outliers),
            k=normal(*rows_kv, self.heads_kv, self.head_dim_qk, std=self.magnitude),
            v=None if self.is_latent else normal(*rows_kv, self.heads_kv, self.head_dim_v),
            sinks=normal(self.heads_q, is_sequence=False, to=statistics) if self.has_sinks else None,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_kv=cu_seqlens_kv,
            dout=normal(*rows_q, self.heads_q, self.head_dim_v),
            dlse=normal(*lse_shape, is_sequence=False, to=statistics),
        )


def _boundaries(lengths: tuple[int, ...], device: torch.device | str) -> torch.Tensor:
    return torch.tensor([sum(lengths[:n]) for n in range(len(lengths) + 1)], dtype=torch.int32, device=device)


def _lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of x [..., seqlen, heads, dim] in another memory layout; the last dimension stays contiguous."""
    if layout == "transposed":  # [..., heads, seqlen, dim] in memory, as Transformers' modules hand it
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "sliced":  # a part of a fused qkv projection
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 8), float("nan"), dtype=x.dtype, device=x.device)
        wide[..., 8 : 8 + x.shape[-1]] = x
        return wide[..., 8 : 8 + x.shape[-1]]
    return x


_LLAMA = Case(batch=2, seqlen_q=150, heads_q=8, heads_kv=2, is_causal=True)

# Every feature by itself, and the combinations that have their own code path somewhere.
CASES = [
    Case("full", seqlen_q=150),
    replace(_LLAMA, name="causal gqa"),
    Case("mqa", seqlen_q=65, heads_q=7, heads_kv=1, is_causal=True),
    Case("head dim 192/128", seqlen_q=130, head_dim_qk=192, head_dim_v=128, is_causal=True),
    Case("head dim 256", seqlen_q=70, head_dim_qk=256, is_causal=True),
    Case("odd head dims", seqlen_q=33, head_dim_qk=40, head_dim_v=24),
    Case("tiny head dims", seqlen_q=33, head_dim_qk=3, head_dim_v=5, is_causal=True),
    Case("one query", batch=3, seqlen_q=1, seqlen_kv=200, heads_q=8, heads_kv=2, is_causal=True),
    Case("one key", seqlen_q=5, seqlen_kv=1),
    Case("chunked prefill", seqlen_q=60, seqlen_kv=190, is_causal=True),
    Case("cross attention", seqlen_q=90, seqlen_kv=37),
    Case("masked rows: causal, more queries than keys", seqlen_q=90, seqlen_kv=37, is_causal=True),
    Case("masked rows with sinks", seqlen_q=90, seqlen_kv=37, is_causal=True, has_sinks=True),
    Case("no keys", seqlen_q=9, seqlen_kv=0),
    Case("no keys, sinks", seqlen_q=9, seqlen_kv=0, has_sinks=True),
    Case("no queries", seqlen_q=0, seqlen_kv=9),
    replace(_LLAMA, name="sliding window", window=(31, 0)),
    Case("window both sides", seqlen_q=140, seqlen_kv=150, window=(17, 40)),
    Case("window right only", seqlen_q=140, window=(None, 3)),
    Case("window zero", seqlen_q=40, window=(0, 0)),
    replace(_LLAMA, name="softcap", softcap=2.0, magnitude=2.0),
    replace(_LLAMA, name="sinks", has_sinks=True),
    replace(_LLAMA, name="sinks, softcap, window", has_sinks=True, softcap=3.0, window=(20, 0)),
    replace(_LLAMA, name="scale", scale=0.5),
    replace(_LLAMA, name="negative scale", scale=-0.2),
    replace(_LLAMA, name="peaked", magnitude=8.0),
    replace(_LLAMA, name="transposed", layout="transposed"),
    replace(_LLAMA, name="sliced", layout="sliced"),
    Case("packed", seqlens_q=(70, 1, 45), heads_q=4, heads_kv=2, is_causal=True),
    Case("packed, ragged, empty, rest", seqlens_q=(33, 0, 5, 64, 7), seqlens_kv=(20, 9, 0, 80, 7), rest_q=6, rest_kv=3,
         is_causal=True, has_sinks=True),
    Case("packed, window, softcap", seqlens_q=(50, 90), seqlens_kv=(60, 90), window=(12, 5), softcap=4.0,
         layout="sliced"),
    Case("packed, only empty sequences", seqlens_q=(0, 0), rest_q=4, rest_kv=4),
    Case("packed, no sequence", seqlens_q=(), rest_q=4, rest_kv=4),
]  # fmt: skip


def without_pairs(**shape) -> list[Case]:
    """Calls in which no query sees a key: no batch, no rows, no sequences, or no keys."""
    return [
        Case(batch=0, seqlen_q=9, **shape),
        Case(batch=2, seqlen_q=0, **shape),
        Case(batch=2, seqlen_q=0, seqlen_kv=7, **shape),
        Case(batch=2, seqlen_q=130, seqlen_kv=0, **shape),
        Case(batch=0, seqlen_q=0, seqlen_kv=0, **shape),
        Case(seqlens_q=(), **shape),
        Case(seqlens_q=(), rest_q=5, rest_kv=9, **shape),
        Case(seqlens_q=(0, 0, 0), **shape),
        Case(seqlens_q=(0,) * 300, rest_q=200, **shape),
        Case(seqlens_q=(130, 5), seqlens_kv=(0, 0), rest_q=3, **shape),
    ]


def named(*names: str) -> list[Case]:
    """The cases of these names, in order."""
    by_name = {case.name: case for case in CASES}
    return [by_name[name] for name in names]


def random_case(
    integer: Callable[[int, int], int],
    choice: Callable[[Sequence], object],
    *,
    max_seqlen: int = 80,
    max_head_dim: int = 40,
    is_packed: bool | None = None,
    rows: Sequence[tuple[int, int]] | None = None,
    longest: int | None = None,
    max_scores: int | None = None,
) -> Case:
    """A random case, small, and dense in corners (empty, one row, masked rows, odd dims), from a source of randomness:
    ``integer(least, most)``, both included, and ``choice(options)``.

    ``rows`` asks for what a kernel instantiated for these head dims computes: each row as often, half of the calls
    narrower by multiples of 8; lengths beside the edges of tiles; outliers. One dense call in 25 reaches ``longest``. Cases
    beyond ``max_scores`` lose batch and kv heads, then length.
    """

    def seqlen() -> int:
        kind = choice(["corner", "any"] if rows is None else ["corner", "edge", "any", "any", "any", "any"])
        if kind == "corner":
            return integer(0, 3)
        if kind == "edge":
            return min(max_seqlen, choice([64, 128, 192, 256, 384, 512]) + integer(-1, 1))
        return integer(0, max_seqlen)

    def window_bound() -> int | None:
        return choice([None, 0, integer(0, max_seqlen if rows else 2 * max_seqlen)])

    shape = {}
    if choice([False, True]) if is_packed is None else is_packed:
        sequences = integer(0, 4)
        # The same lengths on both sides half of the time: the common call.
        shape["seqlens_q"] = tuple(seqlen() for _ in range(sequences))
        shape["seqlens_kv"] = choice([None, tuple(seqlen() for _ in range(sequences))])
        shape["rest_q"], shape["rest_kv"] = integer(0, 5), integer(0, 5)
    else:
        shape["batch"], shape["seqlen_q"], shape["seqlen_kv"] = integer(1, 3), seqlen(), choice([None, seqlen()])
        if longest is not None and integer(1, 25) == 1:
            shape[choice(["seqlen_q", "seqlen_kv"])] = integer(max_seqlen, longest)
    if rows is None:
        head_dims = integer(1, max_head_dim), choice([None, integer(1, max_head_dim)])
    else:
        head_dims = choice(rows)
        if choice([False, True]):  # narrower; sometimes by so much that another row computes it
            head_dims = tuple(dim - 8 * choice([integer(0, 3), integer(0, dim // 8 - 1)]) for dim in head_dims)
    heads_kv = integer(1, 3)
    case = Case(
        heads_q=heads_kv * choice([1, 2, 4, 7] if rows is None else [1, 2, 3, 4, 7, 8]),
        heads_kv=heads_kv,
        head_dim_qk=head_dims[0],
        head_dim_v=head_dims[1],
        scale=choice([None, None, 0.0 if rows else None, integer(-256, 256) / 256]),
        is_causal=choice([False, True]),
        window=choice([None, (window_bound(), window_bound())]),
        softcap=choice([0.0, 0.0, 1.5, 30.0]),
        has_sinks=choice([False, True]),
        layout=choice(LAYOUTS),
        magnitude=choice([1.0, 1.0, 4.0]),
        outliers=1.0 if rows is None else choice([1.0, 1.0, 1.0, 10.0, 100.0]),
        **shape,
    )
    if max_scores is not None and case.num_scores > max_scores:
        case = replace(case, batch=1, heads_q=case.heads_q // case.heads_kv, heads_kv=1)
        if case.num_scores > max_scores and not case.is_packed:
            limit = int((max_scores / case.heads_q) ** 0.5)
            case = replace(case, seqlen_q=min(case.seqlen_q, limit), seqlen_kv=min(case.seqlen_kv, limit))
    return case


def calls(**options):
    """Hypothesis strategy for a ``Case``: :func:`random_case` with ``options``, drawn (and shrunk) by hypothesis."""
    from hypothesis import strategies as st

    @st.composite
    def call(draw: st.DrawFn) -> Case:
        return random_case(
            lambda least, most: draw(st.integers(least, most)), lambda of: draw(st.sampled_from(of)), **options
        )

    return call()
