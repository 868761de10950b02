"""The oracle: exact attention in plain PyTorch, and the streaming algorithm in a page.

:func:`attention` materialises the scores, so it needs O(seqlen²) memory; tests decide by it (in float64), and the few cases
no fused kernel covers (dropout, dense masks together with sinks or softcap) are computed by it. It is never chosen
silently. :func:`streaming_attention` is the teaching version of what the compiled kernels do.

What is hidden from a row never reaches it, whatever it holds, forward and backward: every product of matrices here sums over
visible pairs alone, where ``0 * NaN`` would be NaN (:func:`_product`). Autocast changes nothing, in backward either.
"""

from __future__ import annotations

import math

import torch

from flashmla_hf.torch_state import has_transforms, is_functionalizing, values_are_readable, without_autocast
from flashmla_hf.validation import sequence_bounds


def visible_keys(
    seqlen_q: int, seqlen_kv: int, window_left: int, window_right: int, device: torch.device | None = None
) -> torch.Tensor | None:
    """Boolean [seqlen_q, seqlen_kv], true where a key is visible; ``None`` if every key is.

    Bottom-right aligned: query ``i`` stands at key position ``p = i + seqlen_kv - seqlen_q`` and sees keys
    ``p - window_left ... p + window_right``, both included; a negative bound is unbounded; causal is ``window_right=0``.
    """
    if window_left < 0 and window_right < 0:
        return None
    position = torch.arange(seqlen_q, device=device)[:, None] + (seqlen_kv - seqlen_q)
    key = torch.arange(seqlen_kv, device=device)[None, :]
    # No length comes near this, and int64 holds the sum with one.
    window_left, window_right = min(window_left, _FAR), min(window_right, _FAR)
    if window_left < 0:
        return key <= position + window_right
    if window_right < 0:
        return key >= position - window_left
    return (key >= position - window_left) & (key <= position + window_right)


_FAR = 2**40


# ---- Products over visible pairs -------------------------------------------------------------------------------------


def sum_over_visible(a: torch.Tensor, b: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """``a @ b`` over the visible pairs. a [..., m, n] is exactly 0 (not NaN) at hidden pairs, b [..., n, d] may hold any
    values; ``visible`` [..., m, n] broadcasts to a; ``None`` hides nothing.

    The finite part of b is multiplied as it is. For each element of the result, the visible values of b that are not finite are
    counted by sign; the counts determine the result of a sum in IEEE arithmetic.
    """
    if visible is None:
        return a @ b
    if can_read(b) and (b.numel() == 0 or bool(b.abs().amax() < math.inf)):  # much faster than b.isfinite().all()
        return a @ b
    sum_of_finite = a @ torch.where(b.isfinite(), b, 0.0)
    dtype = b.dtype
    direction = (b == math.inf).to(dtype) - (b == -math.inf).to(dtype)
    sign = a.detach().sign()
    net, count = sign @ direction, sign.abs() @ direction.abs()
    no_number = visible.to(dtype) @ b.isnan().to(dtype) + (visible & (a == 0)).to(dtype) @ direction.abs()
    is_nan = (no_number > 0) | (net.abs() != count)
    return torch.where(is_nan, math.nan, torch.where(count > 0, net * math.inf, sum_of_finite))


def can_read(x: torch.Tensor) -> bool:
    """Whether a decision may depend on values of x: not while something traces, transforms, fakes, watches or captures."""
    return (
        values_are_readable(x)
        and type(x) in (torch.Tensor, torch.nn.Parameter)
        and not has_transforms()
        and torch._C._len_torch_dispatch_stack() == 0
    )


class _OverVisible(torch.autograd.Function):
    """A function of (a, b, visible) whose derivatives, backward and forward, need all three."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)


class _Product(_OverVisible):
    """:func:`sum_over_visible`. With :class:`_Scores`, each the derivative of the other, to any order."""

    @staticmethod
    def forward(a, b, visible):
        with without_autocast(a.device):
            return sum_over_visible(a, b, visible)

    @staticmethod
    def backward(ctx, grad):
        a, b, visible = ctx.saved_tensors
        need_a, need_b, _ = ctx.needs_input_grad
        return (
            _Scores.apply(grad, b, visible) if need_a else None,
            _Product.apply(a.mT, grad, None if visible is None else visible.mT) if need_b else None,
            None,
        )

    @staticmethod
    def jvp(ctx, a_tangent, b_tangent, _):
        a, b, visible = ctx.saved_tensors
        parts = []
        if a_tangent is not None:
            a_tangent = a_tangent if visible is None else a_tangent.masked_fill(~visible, 0.0)
            parts.append(_Product.apply(a_tangent, b, visible))
        if b_tangent is not None:
            parts.append(_Product.apply(a, b_tangent, visible))
        return sum(parts)


class _Scores(_OverVisible):
    """``a @ b.mT`` where visible, 0 where hidden."""

    @staticmethod
    def forward(a, b, visible):
        with without_autocast(a.device):
            scores = a @ b.mT
        return scores if visible is None else scores.masked_fill(~visible, 0.0)

    @staticmethod
    def backward(ctx, grad):
        a, b, visible = ctx.saved_tensors
        need_a, need_b, _ = ctx.needs_input_grad
        if visible is not None:
            grad = grad.masked_fill(~visible, 0.0)
        return (
            _Product.apply(grad, b, visible) if need_a else None,
            _Product.apply(grad.mT, a, None if visible is None else visible.mT) if need_b else None,
            None,
        )

    @staticmethod
    def jvp(ctx, a_tangent, b_tangent, _):
        a, b, visible = ctx.saved_tensors
        parts = []
        if a_tangent is not None:
            parts.append(_Scores.apply(a_tangent, b, visible))
        if b_tangent is not None:
            parts.append(_Scores.apply(a, b_tangent, visible))
        return sum(parts)


def _applied(function: type[torch.autograd.Function], a, b, visible) -> torch.Tensor:
    """``function.apply``, or its forward under dynamo and functionalize, which do not support such functions.

    Autograd then differentiates the forward pass. The values are the same, but a gradient that is not finite may reach values
    that are hidden from its row.
    """
    if torch.compiler.is_compiling() or is_functionalizing():
        return function.forward(a, b, visible)
    return function.apply(a, b, visible)


def repeated(x: torch.Tensor, group: int) -> torch.Tensor:
    """x [batch, heads_kv, seqlen_kv, dim] with each head ``group`` times, for as many query heads; in itself if that is once.

    As ``repeat_interleave``, which looks every row up by an index.
    """
    return x if group == 1 else x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2)


# ---- Attention -------------------------------------------------------------------------------------------------------


def _sequence_attention(q, k, v, sinks, attn_mask, scale, window_left, window_right, softcap, dropout_p):
    """One dense batch: q [batch, seqlen_q, heads_q, head_dim_qk] -> out, lse [batch, heads_q, seqlen_q], weights."""
    seqlen_q, seqlen_kv = q.shape[1], k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    lse_dtype = dtype
    visible = visible_keys(seqlen_q, seqlen_kv, window_left, window_right, q.device)
    bias = None
    if attn_mask is not None:
        is_kept = attn_mask
        if attn_mask.dtype != torch.bool:
            dtype = torch.promote_types(dtype, attn_mask.dtype)
            bias = attn_mask.to(dtype)
            is_kept = bias != -math.inf
        visible = is_kept if visible is None else is_kept & visible
        visible = visible.expand(*visible.shape[:-2], seqlen_q, seqlen_kv)
    group = q.shape[2] // k.shape[2]
    query = q.transpose(1, 2).to(dtype)  # [batch, heads_q, seqlen_q, head_dim_qk]
    key, value = (repeated(x.transpose(1, 2).to(dtype), group) for x in (k, v))

    scores = _applied(_Scores, query, key, visible) * scale  # [batch, heads_q, seqlen_q, seqlen_kv]
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    # A sink is one more key of logit sinks[h] whose value is zero; one of -inf is none, and stands here if there is none, since
    # a row needs a column. After softmax a sink of NaN or +inf leaves NaN in all of a row, hidden keys included.
    is_hidden = None if visible is None else ~visible
    if sinks is None:
        column = scores.new_full((1, 1, 1, 1), -math.inf)
    else:
        column = sinks.to(dtype)[None, :, None, None]
        is_hidden = None if visible is None else is_hidden & (column < math.inf)
    scores = torch.cat([scores, column.expand(*scores.shape[:3], 1)], dim=-1)

    # A row that sees nothing would give NaN, in the value (-inf - -inf) and in the gradient: it is computed on zeros and
    # cleared, which also cuts its gradient.
    is_dead = (scores == -math.inf).all(dim=-1, keepdim=True)
    scores = scores.masked_fill(is_dead, 0.0)
    # Relative to the largest: exp(scores - lse) would not do, lse being rounded as coarsely as scores of finfo.min are.
    largest = scores.detach().amax(dim=-1, keepdim=True)
    lse = (largest + (scores - largest).exp().sum(dim=-1, keepdim=True).log()).masked_fill(is_dead, -math.inf)
    lse = torch.where(largest == math.inf, math.inf, lse)
    weights = torch.softmax(scores, dim=-1)[..., :-1].masked_fill(is_dead, 0.0)
    if is_hidden is not None:
        weights = weights.masked_fill(is_hidden, 0.0)
    dropped = torch.nn.functional.dropout(weights, dropout_p) if dropout_p > 0.0 else weights
    out = _applied(_Product, dropped, value, visible).transpose(1, 2)  # [batch, seqlen_q, heads_q, head_dim_v]
    return out.to(q.dtype), lse[..., 0].to(lse_dtype), weights


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
    with without_autocast(q.device):
        if cu_seqlens_q is not None:
            return _packed_attention(q, k, v, sinks, cu_seqlens_q, cu_seqlens_kv, options)
        out, lse, weights = _sequence_attention(q, k, v, sinks, attn_mask, *options)
    return (out, lse, weights) if return_weights else (out, lse)


def _packed_attention(q, k, v, sinks, cu_seqlens_q, cu_seqlens_kv, options) -> tuple[torch.Tensor, torch.Tensor]:
    bounds_q = sequence_bounds("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    bounds_kv = sequence_bounds("cu_seqlens_kv", cu_seqlens_kv, k.shape[0])
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


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    sinks: torch.Tensor | None = None,
    cache_seqlens: torch.Tensor | None = None,
    kv_start: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    scale: float,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact attention to caches, a sequence at a time, in at least float32 (float64 inputs compute in float64).

    Shapes and meaning as in :mod:`flashmla_hf.decode_ops`. Returns (out, lse). Rows and pages that no query sees are not read.
    """
    batch, seqlen_q, heads_q, _ = q.shape
    capacity = k.shape[1] if block_table is None else block_table.shape[1] * k.shape[1]
    lengths = _lengths("cache_seqlens", cache_seqlens, batch, capacity, capacity)
    starts = _lengths("kv_start", kv_start, batch, 0, capacity)
    out = q.new_empty(batch, seqlen_q, heads_q, v.shape[-1])
    lse = q.new_empty(batch, heads_q, seqlen_q, dtype=torch.promote_types(torch.float32, q.dtype))
    options = (scale, window_left, window_right, softcap, 0.0)
    with without_autocast(q.device):
        for b, (begin, end) in enumerate(zip(starts, lengths, strict=True)):
            if window_left >= 0:
                begin = max(begin, end - seqlen_q - window_left)
            # Queries are aligned to the last key: without the keys before the first visible one they stand where they did.
            begin = min(begin, end) if seqlen_q > 0 else end
            key, value = (_cached_rows(cache, b, begin, end, block_table) for cache in (k, v))
            out[b : b + 1], lse[b : b + 1], _ = _sequence_attention(q[b : b + 1], key, value, sinks, None, *options)
    return out, lse


def _lengths(name: str, values: torch.Tensor | None, batch: int, default: int, capacity: int) -> list[int]:
    lengths = [default] * batch if values is None else values.tolist()
    for b, length in enumerate(lengths):
        if not 0 <= length <= capacity:
            raise ValueError(
                f"flashmla attention: {name}: expected numbers from 0 to {capacity} (the rows a sequence may have), got "
                f"{length} for sequence {b}"
            )
    return lengths


def _cached_rows(cache: torch.Tensor, b: int, begin: int, end: int, block_table: torch.Tensor | None) -> torch.Tensor:
    """Rows [begin, end) of sequence b: [1, end - begin, heads_kv, head_dim]."""
    if block_table is None:
        return cache[b : b + 1, begin:end]
    page_size = cache.shape[1]
    first, last = begin // page_size, -(-end // page_size) if begin < end else begin // page_size
    pages = block_table[b, first:last].tolist()
    for n, page in enumerate(pages, first):
        if not 0 <= page < cache.shape[0]:
            raise ValueError(
                f"flashmla attention: block_table: expected pages from 0 to {cache.shape[0] - 1} where keys are read, got "
                f"{page} at [{b}, {n}]"
            )
    rows = cache[torch.tensor(pages, dtype=torch.int64, device=cache.device)].flatten(0, 1)
    return rows[None, begin - first * page_size : end - first * page_size]


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
