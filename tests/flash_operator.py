"""A stand-in on the CPU for torch's FlashAttention operators, with their traps: what the sources of flash_api.cpp say, in float64.

What the kernels leave uninitialised is NaN here; what they read without a check raises here.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch


@dataclass
class Sequences:
    """The ranges of rows of one call, and the mask's edges as the kernel has them."""

    q: list[tuple[int, slice]]  # (batch entry, rows)
    kv: list[tuple[int, slice]]
    left: int
    right: int


class FlashOperator:
    """Installed by :meth:`install`; ``calls`` counts forwards, ``arguments`` are the last one's."""

    def __init__(self) -> None:
        self.calls, self.arguments = 0, {}

    def install(self) -> torch.library.Library:
        library = torch.library.Library("aten", "IMPL", "CPU")
        library.impl("_flash_attention_forward", self.forward)
        library.impl("_flash_attention_backward", self.backward)
        return library

    def forward(
        self, q, k, v, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
        window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None, block_table=None, num_splits=None,
    ):  # fmt: skip
        self.calls += 1
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        self.arguments = {
            "max_q": max_q, "max_k": max_k, "is_causal": is_causal, "left": window_size_left, "right": window_size_right,
            "dropout_p": dropout_p, "head_dim": q.shape[-1], "scale": scale,
        }  # fmt: skip
        seed = int(torch.randint(2**31, ())) if dropout_p > 0.0 else 0
        parts = self._parts(q, k, v, cum_q, cum_k, max_q, max_k, is_causal, window_size_left, window_size_right)
        q4, k4, v4 = self._dense(q, cum_q), self._dense(k, cum_q), self._dense(v, cum_q)
        out = torch.full_like(q4, math.nan)
        lse = torch.full((q4.shape[0], q.shape[-2], q4.shape[1]), math.nan)
        for n in range(len(parts.q)):
            (b, rows), (_, keys) = parts.q[n], parts.kv[n]
            p, one_lse = _weights(q4[b, rows], k4[b, keys], parts, scale)
            p = p * _kept(p, dropout_p, seed + n)
            group = q.shape[-2] // k.shape[-2]
            value = v4[b, keys].double().transpose(0, 1).repeat_interleave(group, 0)
            out[b, rows] = (p @ value).transpose(0, 1).to(q.dtype)
            lse[b, :, rows] = one_lse.float()
        if cum_q is not None:
            out, lse = out[0], lse[0]
        state = torch.tensor([seed, 0], dtype=torch.uint64)
        return out, lse, state, torch.zeros((), dtype=torch.uint64), q.new_zeros(0)

    def backward(
        self, dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, rng_state, unused, *, scale=None,
        window_size_left=None, window_size_right=None,
    ):  # fmt: skip
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        assert dout.is_contiguous()
        assert dout.storage_offset() % 8 == 0
        parts = self._parts(q, k, v, cum_q, cum_k, max_q, max_k, is_causal, window_size_left, window_size_right)
        q4, k4, v4, out4, dout4 = (self._dense(x, cum_q) for x in (q, k, v, out, dout))
        lse = lse[None] if cum_q is not None else lse
        dq, dk, dv = (torch.full_like(x, math.nan) for x in (q4, k4, v4))
        group = q.shape[-2] // k.shape[-2]
        for n in range(len(parts.q)):
            (b, rows), (_, keys) = parts.q[n], parts.kv[n]
            query, dy, y = (x[b, rows].double().transpose(0, 1) for x in (q4, dout4, out4))
            key, value = (x[b, keys].double().transpose(0, 1).repeat_interleave(group, 0) for x in (k4, v4))
            s = _scores(q4[b, rows], k4[b, keys], parts, scale)
            p = torch.exp(s - lse[b, :, rows].double()[..., None])  # of a row that sees nothing the lse is +inf
            kept = _kept(p, dropout_p, self._seed_of(rng_state) + n)
            ds = p * (kept * (dy @ value.transpose(1, 2)) - (dy * y).sum(-1, keepdim=True)) * scale
            dq[b, rows] = (ds @ key).transpose(0, 1).to(q.dtype)
            for gradient, one in (
                (dk, ds.transpose(1, 2) @ query),
                (dv, (p * kept).transpose(1, 2) @ dy),
            ):
                per_kv_head = one.unflatten(0, (-1, group)).sum(1)
                gradient[b, keys] = per_kv_head.transpose(0, 1).to(q.dtype)
        return tuple(x[0] if cum_q is not None else x for x in (dq, dk, dv))

    @staticmethod
    def _seed_of(rng_state) -> int:
        return int(rng_state[0])

    @staticmethod
    def _dense(x, cum):
        return x if cum is None else x[None]

    @staticmethod
    def _parts(q, k, v, cum_q, cum_k, max_q, max_k, is_causal, left, right) -> Sequences:
        assert q.dtype in (torch.float16, torch.bfloat16)
        assert q.shape[-1] == k.shape[-1] == v.shape[-1], "q, k and v need one head dim"
        assert q.shape[-1] % 8 == 0
        assert q.shape[-1] <= 256
        for x in (q, k, v):
            assert x.numel() > 0
            assert x.stride(-1) == 1
            assert x.storage_offset() % 8 == 0, "reads from an address that is no multiple of 16 bytes"
            assert all(stride % 8 == 0 for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1)
        left, right = (-1 if edge is None else edge for edge in (left, right))
        assert max(left, right) < 2**31, "the operator cuts this to 32 bits"
        if max_q == 1:
            is_causal = False
        if is_causal:
            right = 0
        if cum_q is not None and max_q == 1 and q.shape[1] > k.shape[1]:
            assert q.shape[0] == cum_q.numel() - 1, "it takes the number of sequences for that of the rows"
        left = -1 if left >= max_k else left
        right = -1 if right >= max_k else right
        if left < 0 and right >= 0:
            left = max_k
        if left >= 0 and right < 0:
            right = max_k
        if cum_q is None:
            assert (max_q, max_k) == (q.shape[1], k.shape[1])
            ranges = (
                [(b, slice(0, max_q)) for b in range(q.shape[0])],
                [(b, slice(0, max_k)) for b in range(q.shape[0])],
            )
        else:
            ranges = _ranges(cum_q, max_q), _ranges(cum_k, max_k)
        return Sequences(*ranges, left, right)


def _ranges(cum, longest) -> list[tuple[int, slice]]:
    bounds = cum.tolist()
    assert max(stop - start for start, stop in itertools.pairwise(bounds)) <= longest
    return [(0, slice(start, stop)) for start, stop in itertools.pairwise(bounds)]


def _scores(query, key, parts: Sequences, scale) -> torch.Tensor:
    """[heads, rows, keys] in float64, hidden ones -inf."""
    assert scale > 0, "the maximum of a row is taken before the scale"
    group = query.shape[1] // key.shape[1]
    key = key.double().transpose(0, 1).repeat_interleave(group, 0)
    s = scale * query.double().transpose(0, 1) @ key.transpose(1, 2)
    rows, keys = s.shape[1:]
    position, column = torch.arange(rows)[:, None] + keys - rows, torch.arange(keys)
    if parts.right >= 0:
        s = s.masked_fill(column > position + parts.right, -math.inf)
    if parts.left >= 0:
        s = s.masked_fill(column < position - parts.left, -math.inf)
    return s


def _weights(query, key, parts: Sequences, scale) -> tuple[torch.Tensor, torch.Tensor]:
    s = _scores(query, key, parts, scale)
    lse = torch.logsumexp(s, -1) if s.shape[-1] else s.new_full(s.shape[:-1], -math.inf)
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    return torch.exp(s - lse[..., None]), lse


def _kept(p, dropout_p, seed) -> torch.Tensor:
    """What each weight is multiplied by. 8 random bits decide, and the probability is cut to them; the factor is not."""
    if dropout_p == 0.0:
        return torch.ones_like(p)
    drawn = torch.randint(256, p.shape, generator=torch.Generator().manual_seed(seed))
    return (drawn <= math.floor((1 - dropout_p) * 255)).to(p.dtype) / (1 - dropout_p)
