"""What the tests call attention with: one dataclass for a call, named calls, and a hypothesis strategy for random ones.

A ``Case`` is plain numbers, so it prints as its own reproduction; ``Case.inputs`` makes its tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

LAYOUTS = ("contiguous", "transposed", "sliced")


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call: q, k, v, sinks, cu_seqlens as in :func:`flashmla_hf.attention`; and what flows
    back: dout like out (dtype of q), dlse like lse (fp32; float64 for float64 inputs)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
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
            **{name: getattr(self, name).to(dtype) for name in ("q", "k", "v", "dout")},
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
    magnitude: float = 1.0  # standard deviation of q and k; large values make the softmax peak

    def __post_init__(self) -> None:
        for mine, like in (("seqlen_kv", "seqlen_q"), ("heads_kv", "heads_q"), ("head_dim_v", "head_dim_qk"),
                           ("seqlens_kv", "seqlens_q")):  # fmt: skip
            if getattr(self, mine) is None:
                object.__setattr__(self, mine, getattr(self, like))

    @property
    def is_packed(self) -> bool:
        return self.seqlens_q is not None

    @property
    def options(self) -> dict:
        """The keyword arguments of :func:`flashmla_hf.attention` that are not tensors."""
        return {"scale": self.scale, "is_causal": self.is_causal, "window": self.window, "softcap": self.softcap}

    def inputs(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
        """Random normal tensors, the same values (up to rounding) in every dtype and on every device."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, is_sequence: bool = True, to: torch.dtype = dtype, std: float = 1.0) -> torch.Tensor:
            x = (torch.randn(shape, generator=generator, dtype=torch.float64) * std).to(device, to)
            return _lay_out(x, self.layout) if is_sequence else x

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
            q=normal(*rows_q, self.heads_q, self.head_dim_qk, std=self.magnitude),
            k=normal(*rows_kv, self.heads_kv, self.head_dim_qk, std=self.magnitude),
            v=normal(*rows_kv, self.heads_kv, self.head_dim_v),
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


def named(*names: str) -> list[Case]:
    """The cases of these names, in order."""
    by_name = {case.name: case for case in CASES}
    return [by_name[name] for name in names]


def calls(max_seqlen: int = 80, max_head_dim: int = 40, is_packed: bool | None = None):
    """Hypothesis strategy for a ``Case``: small, and dense in corners (empty, one row, masked rows, odd dims)."""
    from hypothesis import strategies as st

    window_bound = st.one_of(st.none(), st.just(0), st.integers(0, 2 * max_seqlen))
    seqlen = st.one_of(st.integers(0, 3), st.integers(0, max_seqlen))

    @st.composite
    def call(draw: st.DrawFn) -> Case:
        heads_kv = draw(st.integers(1, 3))
        shape = {}
        if draw(st.booleans()) if is_packed is None else is_packed:
            sequences = draw(st.integers(0, 4))
            # One draw for both sides half of the time: equal lengths are the common call.
            shape["seqlens_q"] = tuple(draw(seqlen) for _ in range(sequences))
            shape["seqlens_kv"] = draw(st.sampled_from([None, tuple(draw(seqlen) for _ in range(sequences))]))
            shape["rest_q"], shape["rest_kv"] = draw(st.integers(0, 5)), draw(st.integers(0, 5))
        else:
            shape["batch"] = draw(st.integers(1, 3))
            shape["seqlen_q"], shape["seqlen_kv"] = draw(seqlen), draw(st.one_of(st.none(), seqlen))
        return Case(
            heads_q=heads_kv * draw(st.sampled_from([1, 2, 4, 7])),
            heads_kv=heads_kv,
            head_dim_qk=draw(st.integers(1, max_head_dim)),
            head_dim_v=draw(st.one_of(st.none(), st.integers(1, max_head_dim))),
            scale=draw(st.one_of(st.none(), st.floats(-1.0, 1.0, width=16))),
            is_causal=draw(st.booleans()),
            window=draw(st.one_of(st.none(), st.tuples(window_bound, window_bound))),
            softcap=draw(st.sampled_from([0.0, 0.0, 1.5, 30.0])),
            has_sinks=draw(st.booleans()),
            layout=draw(st.sampled_from(LAYOUTS)),
            magnitude=draw(st.sampled_from([1.0, 1.0, 4.0])),
            **shape,
        )

    return call()
