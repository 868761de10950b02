"""The oracle: exact attention in plain PyTorch, and the streaming algorithm in a page.

:func:`attention` materialises the scores, so it needs O(seqlen²) memory; tests decide by it (in float64), and the few cases
no fused kernel covers (dropout, dense masks together with sinks or softcap) are computed by it. It is never chosen
silently. :func:`streaming_attention` is the teaching version of what the compiled kernels do.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch


def visible_keys(
    seqlen_q: int, seqlen_kv: int, window_left: int, window_right: int, device: torch.device | None = None
) -> torch.Tensor | None:
    """Boolean [seqlen_q, seqlen_kv], true where a key is visible; ``None`` where every key is.

    Bottom-right aligned: query ``i`` stands at key position ``p = i + seqlen_kv - seqlen_q`` and sees keys
    ``p - window_left ... p + window_right``, both included; a negative bound is unbounded; causal is ``window_right=0``.
    """
    if window_left < 0 and window_right < 0:
        return None
    position = torch.arange(seqlen_q, device=device)[:, None] + (seqlen_kv - seqlen_q)
    key = torch.arange(seqlen_kv, device=device)[None, :]
    visible = torch.ones(seqlen_q, seqlen_kv, dtype=torch.bool, device=device)
    if window_left >= 0:
        visible &= key >= position - window_left
    if window_right >= 0:
        visible &= key <= position + window_right
    return visible


def _sequence_attention(q, k, v, sinks, attn_mask, scale, window_left, window_right, softcap, dropout_p):
    """One dense batch: q [batch, seqlen_q, heads_q, head_dim_qk] -> out, lse [batch, heads_q, seqlen_q], weights."""
    compute_dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[2] // k.shape[2]
    query = q.transpose(1, 2).to(compute_dtype)  # [batch, heads_q, seqlen_q, head_dim_qk]
    key = k.transpose(1, 2).to(compute_dtype).repeat_interleave(group, dim=1)
    value = v.transpose(1, 2).to(compute_dtype).repeat_interleave(group, dim=1)

    scores = query @ key.transpose(-1, -2) * scale  # [batch, heads_q, seqlen_q, seqlen_kv]
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    visible = visible_keys(q.shape[1], k.shape[1], window_left, window_right, q.device)
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        else:
            scores = scores + attn_mask.to(compute_dtype)
    if sinks is not None:
        # A sink is one more key of logit sinks[h] whose value is zero.
        column = sinks.to(compute_dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)

    # A row that sees nothing would give NaN, in the value (-inf - -inf) and in the gradient: it is computed on zeros and
    # cleared, which also cuts its gradient.
    is_dead = (scores == -math.inf).all(dim=-1)
    scores = scores.masked_fill(is_dead[..., None], 0.0)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse[..., None]).masked_fill(is_dead[..., None], 0.0)
    lse = lse.masked_fill(is_dead, -math.inf)
    if sinks is not None:
        weights = weights[..., :-1]
    dropped = torch.nn.functional.dropout(weights, dropout_p) if dropout_p > 0.0 else weights
    out = (dropped @ value).transpose(1, 2)  # [batch, seqlen_q, heads_q, head_dim_v]
    return out.to(q.dtype), lse, weights


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    sinks: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_kv: torch.Tensor | None = None,
    scale: float,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    return_weights: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Exact attention by materialised scores, in at least float32 (float64 inputs compute in float64).

    Shapes as in :func:`flashmla_hf.attention`; ``attn_mask`` (dense layout only) broadcasts to
    [batch, heads_q, seqlen_q, seqlen_kv]: boolean, true keeps, or floating, added after the softcap. Returns
    ``(out, lse)``, and the weights [batch, heads_q, seqlen_q, seqlen_kv] with ``return_weights`` (dense layout only).

    Source: Vaswani et al. 2017, equation 1; attention sinks as in GPT-OSS; softcap as in Gemma 2.
    """
    options = (scale, window_left, window_right, softcap, dropout_p)
    if cu_seqlens_q is None:
        out, lse, weights = _sequence_attention(q, k, v, sinks, attn_mask, *options)
        return (out, lse, weights) if return_weights else (out, lse)

    bounds_q, bounds_kv = _sequence_bounds(cu_seqlens_q, q, "q"), _sequence_bounds(cu_seqlens_kv, k, "kv")
    outs, lses = [], []
    for (q0, q1), (k0, k1) in zip(bounds_q, bounds_kv, strict=True):
        out, lse, _ = _sequence_attention(q[None, q0:q1], k[None, k0:k1], v[None, k0:k1], sinks, None, *options)
        outs.append(out[0])
        lses.append(lse[0])
    # Rows past the last boundary belong to no sequence.
    rest = q.shape[0] - int(cu_seqlens_q[-1])
    lse_dtype = torch.promote_types(torch.float32, q.dtype)
    outs.append(q.new_zeros(rest, q.shape[1], v.shape[2]))
    lses.append(q.new_full((q.shape[1], rest), -math.inf, dtype=lse_dtype))
    return torch.cat(outs), torch.cat(lses, dim=1)


def _sequence_bounds(cu_seqlens: torch.Tensor, packed: torch.Tensor, name: str) -> list[tuple[int, int]]:
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] > packed.shape[0] or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(
            f"flashmla attention: cu_seqlens_{name}: expected boundaries that begin at 0, never fall and end at most at "
            f"{packed.shape[0]} (the packed length), got {bounds[:8]}{'...' if len(bounds) > 8 else ''}"
        )
    return list(pairwise(bounds))


def streaming_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one head in a single pass over blocks of keys: the algorithm of every fused kernel, to be read.

    q [seqlen_q, head_dim_qk], k [seqlen_kv, head_dim_qk], v [seqlen_kv, head_dim_v] -> out [seqlen_q, head_dim_v],
    lse [seqlen_q]. The result is the same to rounding for every ``block_size``.

    Softmax needs the maximum and the sum of a whole row, but both can be kept *running*. After some blocks we hold

        row_max[i] = max_j S[i,j],   row_sum[i] = sum_j exp(S[i,j] - row_max[i]),   O[i] = sum_j exp(S[i,j] - row_max[i]) V[j]

    over the keys seen so far. A new block may raise the maximum; everything summed before was relative to the old one and is
    corrected by the factor exp(old_max - new_max). O stays *un-normalised* until the end. Dividing each block by its own sum
    instead and adding the blocks up, as a popular sketch does, is wrong: each block would then weigh the same, whatever
    its scores (tests/test_reference.py shows it).

    Source: Milakov and Gimelshein, arXiv 1805.02867, algorithm 3; Dao, arXiv 2307.08691, algorithm 1.
    """
    row_max = q.new_full((q.shape[0],), -math.inf)
    row_sum = q.new_zeros(q.shape[0])
    out = q.new_zeros(q.shape[0], v.shape[1])
    for start in range(0, k.shape[0], block_size):
        block = slice(start, start + block_size)
        scores = scale * q @ k[block].T  # [seqlen_q, block_size]: all that is ever held of S
        new_max = torch.maximum(row_max, scores.max(dim=1).values)
        correction = torch.exp(row_max - new_max)  # 0 at the first block, where row_max is -inf
        p = torch.exp(scores - new_max[:, None])
        row_sum = correction * row_sum + p.sum(dim=1)
        out = correction[:, None] * out + p @ v[block]
        row_max = new_max
    return out / row_sum[:, None], row_max + torch.log(row_sum)
