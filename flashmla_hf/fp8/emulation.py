"""What the Hopper kernel computes, in plain PyTorch: its tiles, their order, its roundings, and otherwise exact sums.

A kernel agrees with this to the rounding of its fp32 sums: an element of P that falls on the other side of a rounding boundary
moves one weight by 1/16 of itself. For one head and one tile of 128 keys, the last visible tile first (docs/kernels.md):

```
S = Q8 K8ᵀ                                              wgmma, e4m3 x e4m3 -> fp32
t = S * (q_scale[row's block] * k_scale[tile] * scale)  with softcap c: c * tanh(t / c)
t = t * log2(e), -inf where the mask hides the key
m' = max(m, max over keys of t)                         per row; -inf while the row has seen no key
a = exp2(m - m')
P = exp2(t - m' + 8)                                    fp32, in [0, 256]
l = a * l + sum of P                                    fp32, before P is rounded
P8 = e4m3(P)                                            to nearest, saturating
O = a * O + v_scale[tile] * (P8 V8)                     wgmma into an accumulator of the tile, promoted by one fp32 FMA
```

and at the end ``out = O / (l + exp2(sink * log2(e) - m + 8))`` and ``lse = (m - 8) / log2(e) + ln(l + ...)``.

**Why 256.** ``exp2`` takes the factor as an addition of 8, so it costs nothing, rounds nothing and leaves the lse exact. 448
would only move the end of the range, weights of 2**-17 of the largest, by 0.8 binades; 256 leaves that room to an ``exp2`` that
errs upwards.
**Why the running maximum itself**, and not a power of two above it, which would make every ``a`` exact: the largest weight of
a row is then exactly 256 and has no rounding error. Where a few keys dominate, that weight's error would be most of P's.
**Why l sums P before rounding:** the lse stays that of the quantised scores, which backward recomputes P from.
**Why the promotion.** The scale of V differs by tile, so each tile's product needs a factor of its own. The FMA that applies it
also takes the sum out of the tensor core after 128 keys: Hopper aligns the products of an fp8 sum to about 14 bits of the
largest.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch

from flashmla_hf import reference
from flashmla_hf.fp8.quantization import BLOCK_ROWS, Quantized, round_to_e4m3
from flashmla_hf.torch_state import without_autocast
from flashmla_hf.validation import Call

P_FACTOR_LOG2 = 8  # P is held as 2**8 times the weight relative to the largest
_LOG2_E = math.log2(math.e)


def attention(q: Quantized, k: Quantized, v: Quantized, call: Call) -> torch.Tensor:
    """The output of the kernel for q, k and v, float64, shape as :func:`flashmla_hf.attention`'s. No gradient.

    Of ``call`` the mask, scale, softcap, sinks and boundaries count, not its tensors q, k and v.
    """
    tensors = (q.data, q.row_scales(), k.data, k.row_scales(), v.data, v.row_scales())
    with torch.no_grad(), without_autocast(q.data.device):
        if call.cu_seqlens_q is None:
            return _dense(call, *tensors)
        outs = []
        assert call.cu_seqlens_kv is not None
        bounds = zip(pairwise(call.cu_seqlens_q.tolist()), pairwise(call.cu_seqlens_kv.tolist()), strict=True)
        for rows_q, rows_kv in ((slice(*a), slice(*b)) for a, b in bounds):
            rows = (rows_q, rows_q, rows_kv, rows_kv, rows_kv, rows_kv)
            outs.append(_dense(call, *(x[None, part] for x, part in zip(tensors, rows, strict=True)))[0])
        rest = q.data.shape[0] - int(call.cu_seqlens_q[-1])
        outs.append(torch.zeros(rest, q.data.shape[1], v.data.shape[2], dtype=torch.float64, device=q.data.device))
        return torch.cat(outs)


def _dense(call: Call, q8, q_scale, k8, k_scale, v8, v_scale) -> torch.Tensor:
    """One dense batch: q8 [batch, seqlen_q, heads_q, dim], q_scale [batch, seqlen_q, heads_q] -> out like q8, float64."""
    seqlen_q, seqlen_kv, group = q8.shape[1], k8.shape[1], q8.shape[2] // k8.shape[2]
    query = q8.double().transpose(1, 2)
    key, value = (x.double().transpose(1, 2).repeat_interleave(group, dim=1) for x in (k8, v8))
    # [batch, heads_q, rows]
    q_scale = q_scale.double().transpose(1, 2)
    k_scale, v_scale = (x.double().transpose(1, 2).repeat_interleave(group, dim=1) for x in (k_scale, v_scale))
    visible = reference.visible_keys(seqlen_q, seqlen_kv, call.window_left, call.window_right, q8.device)

    row_max = query.new_full((*query.shape[:3], 1), -math.inf)
    row_sum, out = torch.zeros_like(row_max), query.new_zeros(*query.shape[:3], value.shape[3])
    for start in reversed(range(0, seqlen_kv, BLOCK_ROWS)):
        tile = slice(start, start + BLOCK_ROWS)
        seen = None if visible is None else visible[:, tile]
        t = query @ key[:, :, tile].mT * (q_scale[..., None] * k_scale[:, :, None, tile] * call.scale)
        if call.softcap > 0.0:
            t = call.softcap * torch.tanh(t / call.softcap)
        t = t * _LOG2_E
        if seen is not None:
            t = t.masked_fill(~seen, -math.inf)
        new_max = torch.maximum(row_max, t.amax(-1, keepdim=True))
        relative_to = new_max.masked_fill(
            new_max == -math.inf, 0.0
        )  # a row that has seen no key: all exponents are -inf
        correction = torch.exp2(row_max - relative_to)
        p = torch.exp2(t - relative_to + P_FACTOR_LOG2)
        row_sum = correction * row_sum + p.sum(-1, keepdim=True)
        product = reference.sum_over_visible(round_to_e4m3(p).double(), value[:, :, tile], seen)
        out = correction * out + v_scale[:, :, start, None, None] * product
        row_max = new_max
    if call.sinks is not None:
        sink = call.sinks.double()[None, :, None, None] * _LOG2_E
        relative_to = torch.maximum(row_max, sink)
        relative_to = relative_to.masked_fill(relative_to == -math.inf, 0.0)
        correction = torch.exp2(row_max - relative_to)
        out, row_sum = out * correction, row_sum * correction + torch.exp2(sink - relative_to + P_FACTOR_LOG2)
    is_dead = row_sum == 0.0
    return (out / row_sum.masked_fill(is_dead, 1.0)).masked_fill(is_dead, 0.0).transpose(1, 2)
