"""Attention to latents and its gradients, streamed over blocks of queries and keys: O(seqlen) memory.

**Forward.** The operator ``flash_attn_decode``, a chunk of queries at a time where keys are hidden: it is made for few queries
and reads for each of them the keys that any of them sees.

**Backward.** For a block of queries (rows: a query of a head) and a block of keys, P is computed again from the lse::

    S = scale Q K^T - lse    P = exp(S)    dS = P (dO V^T - delta)        delta = rowsum(dO O) - dlse
    dQ += scale dS K         dK += scale dS^T Q,  and in the columns of V  += P^T dO

Each product is one of torch's, of operands in the dtype of q, with sums in fp32; P and dS are rounded to that dtype, as the
compiled kernels do. A row's gradient, as a key and as a value, is one sum in fp32, rounded once. The blocks that a mask hides
are skipped, and only the columns that some queries of a block see are masked. Sizes decide everything: nothing waits for the
device. Each sum has a fixed order, so a repeated call gives the same bits if torch's products do.

**Memory** beyond inputs and outputs: the sum of dK, fp32 [seqlen_kv, head_dim_qk] of one kv head of one sequence, and a
workspace of 8 bytes a score of a block (12 with softcap), whatever the length: :data:`BLOCKS`.

Source: Dao, arXiv 2307.08691, algorithm 2; DeepSeek-AI, arXiv 2405.04434, section 2.1 (latents).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from flashmla_hf.torch_state import without_autocast

# Rows (queries times heads) and keys of a block of the backward, by device. A GPU's block is 256 MiB of workspace: it takes
# longer to compute than Python takes to launch its kernels, and its products have tiles for all multiprocessors. Of 128 heads
# and 4,096 tokens 190 TFLOP/s, where (8192, 4096) has 136 (docs/log.md, 2026-11-28, sixth session).
BLOCKS = {"cuda": (16384, 2048), "cpu": (1024, 512)}

# Rows of a chunk of the forward: 256 tiles of 64 rows, two for nearly each of a Hopper GPU's multiprocessors.
CHUNK_ROWS = 16384


@dataclass(frozen=True)
class Options:
    """The arguments of the operators that are no tensors, in their order."""

    head_dim_v: int
    scale: float
    window_left: int
    window_right: int
    softcap: float


@dataclass(frozen=True)
class _Visibility:
    """Which keys queries see: query i, at key position ``i + shift``, those from ``window_left`` before it to ``window_right``
    behind it; a negative bound is unbounded."""

    seqlen_q: int
    seqlen_kv: int
    window_left: int
    window_right: int

    @property
    def shift(self) -> int:
        return self.seqlen_kv - self.seqlen_q

    @property
    def first_query(self) -> int:
        """The first query that sees a key; those after it do, too."""
        if self.seqlen_kv == 0:
            return self.seqlen_q
        return 0 if self.window_right < 0 else min(max(0, -self.shift - self.window_right), self.seqlen_q)

    def keys(self, queries: range) -> range:
        """The keys that some of the queries see."""
        first, last = queries.start + self.shift, queries.stop - 1 + self.shift
        begin = 0 if self.window_left < 0 else max(0, first - self.window_left)
        end = self.seqlen_kv if self.window_right < 0 else min(self.seqlen_kv, last + self.window_right + 1)
        return range(begin, max(begin, end))

    def mask_(self, scores: torch.Tensor, queries: range, keys: range) -> None:
        """Writes -inf to the scores [queries, heads, keys] of keys that are hidden."""
        if self.window_right >= 0:
            edge = queries.start + self.shift + self.window_right + 1  # the first key that the first query does not see
            begin = max(keys.start, edge)
            _hide(scores[:, :, begin - keys.start :], edge - begin, is_above=True)
        if self.window_left >= 0:
            edge = queries.start + self.shift - self.window_left  # the first key that the first query sees
            end = min(keys.stop, edge + len(queries) - 1)
            _hide(scores[:, :, : max(0, end - keys.start)], edge - keys.start - 1, is_above=False)


def _hide(scores: torch.Tensor, diagonal: int, is_above: bool) -> None:
    """Writes -inf to scores [queries, heads, keys] on the diagonal of that number and above it, or below it."""
    if scores.shape[2] > 0:
        hidden = torch.ones(scores.shape[0], scores.shape[2], dtype=torch.bool, device=scores.device)
        hidden = hidden.triu_(diagonal) if is_above else hidden.tril_(diagonal)
        scores.masked_fill_(hidden[:, None, :], -math.inf)


def _blocks(whole: range, size: int) -> Iterator[range]:
    for begin in range(whole.start, whole.stop, size):
        yield range(begin, min(begin + size, whole.stop))


# ---- Forward ---------------------------------------------------------------------------------------------------------


def forward(
    q: torch.Tensor, k: torch.Tensor, sinks: torch.Tensor | None, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse), as ``torch.ops.flashmla.flash_attn_latent`` (:mod:`latent_ops`)."""
    batch, seqlen_q, heads_q, _ = q.shape
    window_left, window_right = options.window_left, options.window_right
    visibility = _Visibility(seqlen_q, k.shape[1], window_left, window_right)

    def attend(q: torch.Tensor, num_keys: int, shift: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of queries to the first keys. The operator sees them ``shift`` positions further on than they are."""
        left = window_left if window_left < 0 else window_left + shift
        right = window_right if window_right < 0 else window_right - shift
        rows = k[:, :num_keys]
        numbers = (options.scale, left, right, options.softcap, True)
        return torch.ops.flashmla.flash_attn_decode(
            q, rows, rows[..., : options.head_dim_v], sinks, None, None, None, *numbers
        )

    first, size = visibility.first_query, max(1, CHUNK_ROWS // max(1, heads_q))
    if first < seqlen_q and (seqlen_q <= size or (window_left < 0 and window_right < 0)):
        return attend(q, k.shape[1], 0)
    out = q.new_empty(batch, seqlen_q, heads_q, options.head_dim_v)
    lse = q.new_empty(batch, heads_q, seqlen_q, dtype=torch.float32)
    out[:, :first] = 0.0
    lse[:, :, :first] = -math.inf if sinks is None else sinks[:, None]
    for queries in _blocks(range(first, seqlen_q), size):
        rows = slice(queries.start, queries.stop)
        num_keys = visibility.keys(queries).stop
        shift = num_keys - (queries.stop + visibility.shift)
        out[:, rows], lse[:, :, rows] = attend(q[:, rows], num_keys, shift)
    return out, lse


# ---- Backward --------------------------------------------------------------------------------------------------------


def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    sinks: torch.Tensor | None,
    options: Options,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dsinks), as ``torch.ops.flashmla.flash_attn_latent_backward``: of the shapes of q, k and sinks, or without
    elements if ``needs`` says so."""
    needs_dq, needs_dk, needs_dsinks = needs
    visibility = _Visibility(q.shape[1], k.shape[1], options.window_left, options.window_right)
    group = q.shape[2] // k.shape[2]
    dq = torch.empty(q.shape if needs_dq else 0, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape if needs_dk else 0, dtype=k.dtype, device=k.device)
    dsinks = torch.zeros(q.shape[2] if needs_dsinks else 0, dtype=torch.float32, device=q.device)
    first = visibility.first_query
    if needs_dq:
        dq[:, :first] = 0.0  # these queries see nothing
    if needs_dsinks and dlse is not None and sinks is not None:
        # Their lse is the sink itself; one of -inf is none.
        dsinks += dlse[:, :, :first].sum((0, 2)).masked_fill_(sinks.isneginf(), 0.0)
    with without_autocast(q.device):
        stream = _Backward(visibility, group, options, q, needs)
        for b in range(q.shape[0]):
            for head in range(k.shape[2]):
                heads = slice(head * group, (head + 1) * group)
                stream.run(
                    _Queries(dout[b, :, heads], None if dlse is None else dlse[b, heads], q[b, :, heads], out[b, :, heads],
                             lse[b, heads], None if sinks is None else sinks[heads]),
                    k[b, :, head],
                    dq[b, :, heads] if needs_dq else None,
                    dk[b, :, head] if needs_dk else None,
                    dsinks[heads] if needs_dsinks else None,
                )  # fmt: skip
    return dq, dk, dsinks


@dataclass(frozen=True)
class _Queries:
    """The queries of a kv head of a sequence: dout, q, out [seqlen_q, group, dim], dlse, lse [group, seqlen_q], sinks
    [group]."""

    dout: torch.Tensor
    dlse: torch.Tensor | None
    q: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    sinks: torch.Tensor | None


class _Backward:
    """The stream of one kv head of one sequence after the other, through one workspace."""

    def __init__(
        self, visibility: _Visibility, group: int, options: Options, q: torch.Tensor, needs: tuple[bool, bool, bool]
    ):
        self.visibility, self.group, self.options, self.needs = visibility, group, options, needs
        rows, keys = BLOCKS[q.device.type]
        self.num_queries = max(1, min(rows // group, visibility.seqlen_q))
        self.num_keys = max(1, min(keys, visibility.seqlen_kv))
        rows, columns = self.num_queries * group, _aligned(self.num_keys)

        def empty(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=q.device)

        self.scores = empty(rows * columns)
        self.capped = empty(rows * columns) if options.softcap > 0.0 else None  # tanh(S / softcap)
        self.p, self.ds = (empty(rows * columns, q.dtype) for _ in range(2))
        self.dq = empty(rows * q.shape[-1] if needs[0] else 0)
        self.dk = empty(visibility.seqlen_kv * q.shape[-1] if needs[1] else 0).view(-1, q.shape[-1])

    def run(
        self,
        of: _Queries,
        k: torch.Tensor,  # [seqlen_kv, head_dim_qk]
        dq: torch.Tensor | None,  # like q, written
        dk: torch.Tensor | None,  # like k, written
        dsinks: torch.Tensor | None,  # fp32 [group], added to
    ) -> None:
        self.dk.zero_()
        whole = range(self.visibility.first_query, self.visibility.seqlen_q)
        # The last first: under a causal mask they see the most keys, and a GPU has work while short blocks are launched.
        for queries in reversed([*_blocks(whole, self.num_queries)]):
            rows = slice(queries.start, queries.stop)
            dout, out, q = (_as_rows(x[rows]) for x in (of.dout, of.out, of.q))
            delta = _row_products(dout, out)
            if of.dlse is not None:
                delta -= of.dlse[:, rows].t().reshape(-1)
            lse = of.lse[:, rows].t().reshape(-1)
            minus_lse, minus_delta = -_lowered(lse)[:, None], -delta[:, None]
            if dsinks is not None and of.sinks is not None:
                weights = torch.exp(of.sinks - lse.view(-1, self.group))
                dsinks -= (weights * delta.view(-1, self.group)).sum(0)
            if dq is None and dk is None:
                continue
            sum_dq = self.dq[: q.numel()].view(q.shape) if dq is not None else None
            if sum_dq is not None:
                sum_dq.zero_()
            for keys in _blocks(self.visibility.keys(queries), self.num_keys):
                self._add_block(queries, keys, q, k[keys.start : keys.stop], dout, minus_lse, minus_delta, sum_dq)
            if dq is not None:
                dq[rows] = sum_dq.view(dq[rows].shape)  # type: ignore[union-attr]
        if dk is not None:
            dk.copy_(self.dk)

    def _add_block(
        self,
        queries: range,
        keys: range,
        q: torch.Tensor,  # [rows, head_dim_qk]
        k: torch.Tensor,  # [keys, head_dim_qk]
        dout: torch.Tensor,  # [rows, head_dim_v]
        minus_lse: torch.Tensor,  # fp32 [rows, 1], as the next
        minus_delta: torch.Tensor,
        sum_dq: torch.Tensor | None,  # fp32 [rows, head_dim_qk]
    ) -> None:
        """Adds to dQ and dK what a block of queries has of a block of keys."""
        scale, softcap = self.options.scale, self.options.softcap
        shape = (q.shape[0], k.shape[0])
        scores, p, ds = (_matrix(x, *shape) for x in (self.scores, self.p, self.ds))
        if self.capped is None:
            _add_product(scores.copy_(minus_lse.expand(shape)), q, k.t(), scale)
        else:
            capped = _matrix(self.capped, *shape).zero_()
            _add_product(capped, q, k.t(), scale / softcap).tanh_()
            torch.add(minus_lse, capped, alpha=softcap, out=scores)
        self.visibility.mask_(scores.unflatten(0, (len(queries), self.group)), queries, keys)
        torch.exp(scores, out=p).clamp_(max=1.0)  # a large score is rounded by more than P bears
        v = k[:, : self.options.head_dim_v]
        _add_product(scores.copy_(minus_delta.expand(shape)), dout, v.t())  # dP - delta
        if self.capped is not None:
            scores.addcmul_(scores, capped.square_(), value=-1.0)
        torch.mul(p, scores, out=ds)
        if sum_dq is not None:
            _add_product(sum_dq, ds, k, scale)
        if self.needs[1]:
            sum_dk = self.dk[keys.start : keys.stop]
            _add_product(sum_dk, ds.t(), q, scale)
            _add_product(sum_dk[:, : self.options.head_dim_v], p.t(), dout)


def _row_products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The sum of a * b in each row, fp32 [rows]; some rows at a time, since the products take twice the operands' memory."""
    sums = torch.empty(a.shape[0], dtype=torch.float32, device=a.device)
    for rows in _blocks(range(a.shape[0]), 4096):
        part = slice(rows.start, rows.stop)
        torch.sum(a[part].float() * b[part], -1, out=sums[part])
    return sums


def _lowered(lse: torch.Tensor) -> torch.Tensor:
    """The lse, where it is so large that its rounding moves P, a little less than it is: then the largest P of a row, cut to 1,
    is right, and not 0. As csrc/sm90/backward/backward_rows.cuh, with its bounds."""
    is_large = (lse.abs() >= 2.0**24 / math.log2(math.e)) & lse.isfinite()
    return torch.where(is_large, lse - lse.abs() * 2.0**-21, lse)


def _aligned(columns: int) -> int:
    """Elements from one row to the next: a multiple of 16 bytes, which the fast products of cuBLAS want."""
    return -(-columns // 8) * 8


def _matrix(buffer: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """A matrix in the memory of a buffer."""
    stride = _aligned(columns)
    return buffer[: rows * stride].view(rows, stride)[:, :columns]


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """x [queries, group, dim] as [rows, dim], whose last dimension is contiguous; a copy if it lies otherwise."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    """``total += alpha * a @ b``, in place: total fp32 [rows, columns], a and b of one dtype; products are summed in fp32."""
    if a.device.type == "cuda" and a.dtype != torch.float32:
        # Of the matrix products whose result is wider than their operands, the batched one adds in place in every torch; addmm
        # gives one row to cuBLASLt as a bias.
        batch = total.unsqueeze(0)
        product = (a.unsqueeze(0), b.unsqueeze(0))
        torch.ops.aten.baddbmm.dtype_out(batch, *product, torch.float32, beta=1.0, alpha=alpha, out=batch)
        return total
    return total.addmm_(a.float(), b.float(), alpha=alpha)
