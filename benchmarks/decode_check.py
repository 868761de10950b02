"""Inputs of a decode shape, and whether an implementation's result is right: float64 on a slice decides.

The slice is the last kv head and its query heads, in the first, the longest and the last sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from check import TOLERANCES
from decode_shapes import DecodeShape
from peers import Peer
from shapes import DTYPES

from flashmla_hf.fp8.quantization import quantize_tokens

# Of K and V together: the calls of a series walk through so many bytes before they come back, and no L2 holds them.
ROTATED_BYTES = {"cuda": 400e6, "cpu": 0}
MOST_COPIES, MOST_BYTES = 64, 16e9  # windows are small parts of large caches


@dataclass
class Inputs:
    """q [batch, seqlen_q, heads_q, head_dim]; caches dense [batch, longest, heads_kv, head_dim] or paged
    [pages, page_size, heads_kv, head_dim], in the shape's memory layout."""

    q: torch.Tensor
    caches: list[tuple[torch.Tensor, torch.Tensor]]  # K and V, copies of the same numbers
    cache_seqlens: torch.Tensor | None
    block_table: torch.Tensor | None

    @staticmethod
    def random(shape: DecodeShape, device: str) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> torch.Tensor:
            # In the dtype itself: a large cache in fp32 beside it would not fit.
            return torch.randn(size, generator=generator, device=device, dtype=DTYPES[shape.dtype])

        lengths, page_size, table = shape.lengths(), shape.page_size, None
        longest = max(lengths)
        if page_size is None:
            rows, heads = (shape.batch, longest), (shape.heads_kv,)
        else:
            counts = [-(-length // page_size) for length in lengths]
            rows, heads = (sum(counts), page_size), (shape.heads_kv,)
            places = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)).int().split(counts)
            table = torch.full((shape.batch, max(counts)), -1, dtype=torch.int32)  # -1: no page
            for b, mine in enumerate(places):
                table[b, : len(mine)] = mine
            table = table.to(device)

        def cache(dim: int) -> torch.Tensor:
            if shape.layout == "heads-first":
                return normal(rows[0], *heads, rows[1], dim).transpose(1, 2)
            return normal(*rows, *heads, dim)

        def rounded(x: torch.Tensor) -> torch.Tensor:
            for part in x:  # a part at a time: what rounding needs beside a large cache would not fit
                data, scale = quantize_tokens(part)
                part.copy_(data.float() * scale[..., None])
            return x

        q = normal(shape.batch, shape.seqlen_q, shape.heads_q, shape.head_dim_qk)

        k = cache(shape.head_dim_qk)
        v = k[..., : shape.head_dim_v] if shape.is_latent else cache(shape.head_dim_v)
        if shape.is_e4m3:
            k, v = rounded(k), rounded(v)
        wanted = math.ceil(ROTATED_BYTES[device] / shape.bytes_read())
        copies = max(1, min(wanted, MOST_COPIES, int(MOST_BYTES / (k.nbytes + v.nbytes))))
        # clone keeps the order of dimensions in memory.
        caches = [(k, v)]
        for _ in range(copies - 1):
            copy = k.clone()
            caches.append((copy, copy[..., : shape.head_dim_v] if shape.is_latent else v.clone()))
        seqlens = None
        if page_size is not None or shape.is_ragged:
            seqlens = torch.tensor(lengths, dtype=torch.int32, device=device)
        return Inputs(q, caches, seqlens, table)

    def calls(self, peer: Peer) -> list:
        """A call on each copy, its tensors in the order of dimensions that the peer takes."""

        def arranged(x: torch.Tensor) -> torch.Tensor:
            return x.transpose(1, 2) if peer.is_heads_first else x

        def call_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
            return lambda: peer.run(q, k, v)

        return [call_of(arranged(self.q), arranged(k), arranged(v)) for k, v in self.caches]

    def sequence(self, b: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [length, head_dim] of sequence b's last kv head, in float64."""
        if self.block_table is None:
            return tuple(x[b, :length, -1].double() for x in self.caches[0])
        page_size = self.caches[0][0].shape[1]
        pages = self.block_table[b, : -(-length // page_size)].long()
        return tuple(x[pages, :, -1].flatten(0, 1)[:length].double() for x in self.caches[0])


def _checked_sequences(lengths: list[int]) -> list[int]:
    return sorted({0, max(range(len(lengths)), key=lengths.__getitem__), len(lengths) - 1})


@torch.no_grad()
def expected(shape: DecodeShape, inputs: Inputs) -> dict[int, torch.Tensor]:
    """float64 [seqlen_q, group, head_dim_v] of the checked sequences, by the textbook formula."""
    group, found, lengths = shape.heads_q // shape.heads_kv, {}, shape.lengths()
    for b in _checked_sequences(lengths):
        k, v = inputs.sequence(b, lengths[b])
        q = inputs.q[b, :, -group:].double()
        scores = shape.head_dim_qk**-0.5 * q @ k.T  # [seqlen_q, group, keys]
        key = torch.arange(lengths[b], device=k.device)
        position = lengths[b] - shape.seqlen_q + torch.arange(shape.seqlen_q, device=k.device)[:, None, None]
        visible = key <= position
        if shape.window is not None:
            visible &= key >= position - shape.window
        # A query that sees no key is zero.
        found[b] = torch.softmax(scores.masked_fill(~visible, -math.inf), dim=-1).nan_to_num(0.0) @ v
    return found


@torch.no_grad()
def verdict(
    shape: DecodeShape, peer: Peer, inputs: Inputs, truth: dict[int, torch.Tensor]
) -> tuple[str | None, dict[str, float]]:
    """The mistake of ``peer`` on these inputs, or None, and the relative error found."""
    group, tolerance = shape.heads_q // shape.heads_kv, TOLERANCES[shape.dtype][0]
    wanted = (shape.batch, shape.seqlen_q, shape.heads_q, shape.head_dim_v)
    worst = 0.0
    with peer.context():
        # Every copy: a rotation that reads beyond one would be found here.
        for call in inputs.calls(peer):
            out = call()
            out = out.transpose(1, 2) if peer.is_heads_first else out
            if out.shape != wanted:
                return f"the output has shape {tuple(out.shape)}, expected {wanted}", {}
            for b, reference in truth.items():
                error = (out[b, :, -group:].double() - reference).norm() / reference.norm().clamp(min=1e-30)
                worst = max(worst, float(error)) if torch.isfinite(error) else math.inf
            if not torch.isfinite(out).all():
                return "O is not finite everywhere", {"O": worst}
    if worst > tolerance:
        return f"O is off by {worst:.1e} (relative; allowed {tolerance:.0e})", {"O": worst}
    return None, {"O": worst}
