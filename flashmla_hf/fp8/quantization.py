"""fp8 numbers: rotation, quantisation to e4m3 with a scale per block of rows, and the way back.

**e4m3** (``torch.float8_e4m3fn``) has 4 exponent and 3 mantissa bits: values up to 448, no infinities, one NaN. A value keeps a
relative error of at most 1/16, 2.6 % root mean square, over 15 binades below the largest; smaller ones lose bits, then vanish.

**Scales.** A block is :data:`BLOCK_ROWS` rows of one head of one sequence, counted from the sequence's first row; the last one
may be shorter. Its scale is the smallest power of two that is at least ``amax / 448``, amax being the largest finite magnitude
in the block, and at least 2**-126. A power of two costs nothing against ``amax / 448`` itself (docs/fp8.md measures both), and
buys three things: ``data * scale`` is exact in bf16 and fp32, so a kernel of those dtypes sees the very values that the fp8
kernel multiplied; products of scales are exact; quantising twice gives the same bits.

**What is not finite stays visible.** An element that is NaN or infinite becomes NaN, and it does not enter amax, so the rest
of its block is as without it. A finite element never becomes NaN: after scaling it is clamped to ±448 before rounding (to the
nearest, ties to even).

**Rotation.** Scores do not change if q and k are multiplied by matrices ``A`` and ``B`` with ``A Bᵀ = 1``. An entry that is far
larger than the rest of its row dominates the error of every score that it enters; a Hadamard transform behind random signs
spreads it over the row. ``H D`` (:func:`rotation`) with Sylvester's H of ±1 needs a factor 1/n over q and k together; n is a
power of two, and q takes ``2**-ceil(log2(n)/2)`` of it, k the rest, so that no factor is rounded. A head dim that is no power
of two is cut into powers of two, the largest first (80 = 64 + 16), each rotated by itself; nothing is padded. The signs are the
bits of π.

Source: Shah et al., arXiv 2407.08608, section 3.3 (block quantisation and incoherent processing); Tseng et al., arXiv
2402.04396 (random signs and Hadamard matrices).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from flashmla_hf.torch_state import without_autocast

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
# Rows of a block of q, k and v, and keys of a tile of the kernel: the scales of K and V are constants of a tile.
BLOCK_ROWS = 128
_SMALLEST_EXPONENT = -126
# The first 256 bits behind the point of π: the sign of entry i of a row is that of bit i % 256, the highest first.
_PI = 0x243F6A8885A308D313198A2E03707344A4093822299F31D0082EFA98EC4E6C89


@dataclass(frozen=True)
class Quantized:
    """A tensor x in fp8: ``x ≈ data * scale`` of its block.

    data: e4m3 [batch, seqlen, heads, dim], or packed [total, heads, dim].
    scales: fp32 [batch, heads, blocks], or packed [heads, blocks].
    block: int64 [seqlen] or packed [total], the block of each row.
    """

    data: torch.Tensor
    scales: torch.Tensor
    block: torch.Tensor

    def row_scales(self) -> torch.Tensor:
        """fp32 [batch, seqlen, heads], or packed [total, heads]: the scale of each row."""
        return self.scales.index_select(-1, self.block).transpose(-1, -2)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """``data * scale`` in ``dtype``, the shape of data. Exact in fp32 and bf16 if the scales are powers of two."""
        return self.data.to(dtype) * self.row_scales().to(dtype)[..., None]


def block_of_rows(
    rows: int, cu_seqlens: torch.Tensor | None, block_rows: int | None, device: torch.device
) -> tuple[torch.Tensor, int]:
    """The block of each row, int64 [rows], and the number of blocks. ``block_rows=None``: a block for each sequence.

    In the packed layout block n of sequence b has the number ``cu_seqlens[b] // block_rows + b + n``: the number depends on
    nothing that a GPU would have to read first, and no two blocks share one. Rows past the last boundary are one more sequence.
    """
    row = torch.arange(rows, device=device)
    if cu_seqlens is None:
        size = max(rows, 1) if block_rows is None else block_rows
        return row // size, -(-rows // size)
    bounds = cu_seqlens.long()
    sequence = torch.searchsorted(bounds[1:], row, right=True)
    if block_rows is None:
        return sequence, bounds.shape[0]
    start = bounds[sequence]
    count = rows // block_rows + bounds.shape[0]
    block = start // block_rows + sequence + (row - start) // block_rows
    return block.clamp(0, count - 1), count  # clamped: boundaries that are wrong are refused by whoever computes


def quantize(
    x: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    *,
    block_rows: int | None = BLOCK_ROWS,
    power_of_two: bool = True,
) -> Quantized:
    """x [batch, seqlen, heads, dim], or packed [total, heads, dim] with ``cu_seqlens``, in fp8; any floating dtype.

    ``block_rows=None`` gives a sequence and head one scale, the ``descale`` of FlashAttention 3. ``power_of_two=False`` gives
    ``amax / 448`` itself; only measurements use it.
    """
    x = x.detach()
    wide = torch.promote_types(x.dtype, torch.float32)
    block, count = block_of_rows(x.shape[-3], cu_seqlens, block_rows, x.device)
    is_finite = x.isfinite()
    magnitude = torch.where(is_finite, x, 0).to(wide).abs().amax(-1).transpose(-1, -2)  # [..., heads, rows]
    amax = magnitude.new_zeros(*magnitude.shape[:-1], count)
    amax = amax.scatter_reduce(-1, block.expand_as(magnitude), magnitude, "amax")
    scales = scale_of(amax) if power_of_two else (amax / LARGEST).clamp(min=2.0**_SMALLEST_EXPONENT)
    row_scale = scales.index_select(-1, block).transpose(-1, -2)[..., None]
    return Quantized(round_to_e4m3(x, row_scale), scales.float(), block)


def quantize_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., dim] with a scale for each of its vectors, as caches hold it: e4m3 [..., dim] and fp32 [...]."""
    x = x.detach()
    magnitude = torch.where(x.isfinite(), x, 0).to(torch.promote_types(x.dtype, torch.float32)).abs()
    scale = scale_of(magnitude.amax(-1))
    return round_to_e4m3(x, scale[..., None]), scale.float()


def scale_of(amax: torch.Tensor) -> torch.Tensor:
    """The smallest power of two, at least 2**-126, that is at least ``amax / 448``; in amax's dtype."""
    # 448 = 0.875 * 2**9, and amax = mantissa * 2**exponent with a mantissa in [0.5, 1): nothing is divided or rounded.
    mantissa, exponent = torch.frexp(amax)
    exponent = exponent - torch.where(mantissa <= 0.875, 9, 8)
    exponent = exponent.masked_fill(amax == 0.0, _SMALLEST_EXPONENT)
    return torch.ldexp(torch.ones_like(amax), exponent.clamp(min=_SMALLEST_EXPONENT))


def round_to_e4m3(x: torch.Tensor, scale: torch.Tensor | float = 1.0) -> torch.Tensor:
    """``x / scale``, saturated and rounded to the nearest e4m3, ties to even; NaN if x is not finite."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scaled = (wide / scale).clamp(-LARGEST, LARGEST)
    return torch.where(x.isfinite(), scaled, math.nan).float().to(DTYPE)


# ---- Rotation --------------------------------------------------------------------------------------------------------


def rotate(x: torch.Tensor, is_key: bool) -> torch.Tensor:
    """x [..., dim] of q or k, rotated, in fp32 (float64 for float64). Differentiable. ``rotate(q) rotate(k)ᵀ = q kᵀ``."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    with without_autocast(x.device):
        return wide @ rotation(x.shape[-1], is_key).to(wide.device, wide.dtype)


def rotation(dim: int, is_key: bool) -> torch.Tensor:
    """The matrix [dim, dim], float64, by which rows of q (or k) are multiplied: signs, then Hadamard transforms of powers of
    two.

    Every entry is 0 or plus or minus a power of two, and ``rotation(dim, False) @ rotation(dim, True).T`` is the identity,
    exactly.
    """
    # A mode (of fake tensors, of tracing) takes no matrix from outside, and what is made in it is of no use outside.
    is_traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return _rotation(dim, is_key) if is_traced else _kept_rotation(dim, is_key)


@functools.lru_cache(maxsize=64)
def _kept_rotation(dim: int, is_key: bool) -> torch.Tensor:
    with torch.inference_mode(False):
        return _rotation(dim, is_key)


def _rotation(dim: int, is_key: bool) -> torch.Tensor:
    # By its name, since a default device may be set.
    matrix, start = torch.zeros(dim, dim, dtype=torch.float64, device="cpu"), 0
    for bit in reversed(range(dim.bit_length())):
        if dim >> bit & 1:
            end = start + (1 << bit)
            matrix[start:end, start:end] = _hadamard(bit) * 2.0 ** -(bit // 2 if is_key else bit - bit // 2)
            start = end
    signs = [1.0 if _PI >> (255 - i % 256) & 1 else -1.0 for i in range(dim)]
    return torch.tensor(signs, dtype=torch.float64, device="cpu")[:, None] * matrix


def _hadamard(log2: int) -> torch.Tensor:
    """Sylvester's matrix of ±1, [2**log2, 2**log2]: symmetric, and its square is 2**log2 times the identity."""
    matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    for _ in range(log2):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix
