"""Products of bfloat16 with float32, by the tensor cores' bfloat16 products and float32 sums.

peft keeps adapters in float32 beside a bfloat16 model. It copies every input of an adapter to float32 and multiplies in
float32, without tensor cores. A float32 number is the sum of three bfloat16 numbers of 8 bits each, exactly:

    w = w₁ + w₂ + w₃,   w₁ = bf16(w),   w₂ = bf16(w - w₁),   w₃ = bf16(w - w₁ - w₂)

so ``x w`` with x in bfloat16 is one bfloat16 product with [w₁ w₂ w₃], summed in float32: what a float32 product gives, up to
the sum. Adapters are narrow, so three times as many columns cost next to nothing; the wide tensors are read once. Below 2⁻¹¹⁰
the pieces underflow.

Tensor cores cut off what an addition leaves instead of rounding it, so the error of a sum grows with its terms: 2e-6 of the
result at 4,096 terms on an H100. Longer sums, the gradients of adapters, are added up from parts of that length.
"""

from __future__ import annotations

import torch

_TERMS = 4096  # of a sum that tensor cores make
_ELEMENTS = 1 << 23  # of a product in float32: 32 MB


def is_mixed(dtype: torch.dtype, *adapter: torch.Tensor) -> bool:
    """Whether this module multiplies a layer's ``dtype`` with these weights."""
    return dtype is torch.bfloat16 and all(t.dtype is torch.float32 for t in adapter)


def matmul(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x [n, k] @ w [k, m]. If one is in bfloat16 and the other in float32, the result is that of their product in float32."""
    if x.dtype == w.dtype:
        return x @ w
    if w.dtype is torch.float32:
        return _product(x, torch.cat(_pieces(w, 3), dim=1)).view(x.shape[0], 3, w.shape[1]).sum(1)
    return _product(torch.cat(_pieces(x, 3), dim=0), w).view(3, x.shape[0], w.shape[1]).sum(0)


def add_matmul(out: torch.Tensor, x: torch.Tensor, w: torch.Tensor, alpha: float = 1.0) -> None:
    """Adds ``alpha`` x [n, k] @ w [k, m] to out [n, m] in place.

    If x and w are in float32 beside an ``out`` in bfloat16, the sum is rounded once; they enter with 16 bits each, and what is
    left out is 2⁻⁸ of the rounding. If all are in one dtype, cuBLAS rounds the product, and then the sum.
    """
    has_pieces = out.dtype != x.dtype
    if has_pieces:
        (x1, x2), (w1, w2) = _pieces(x, 2), _pieces(w, 2)
        x, w = torch.cat([x1, x1, x2], dim=1), torch.cat([w1, w2, w1], dim=0)
    if not (has_pieces and out.is_cuda):
        out.addmm_(x, w, alpha=alpha)
        return
    # In parts whose product the L2 cache holds: it is written and read once more than in one kernel.
    rows = max(1, _ELEMENTS // out.shape[1])
    for part, part_x in zip(out.split(rows), x.split(rows), strict=True):
        part.add_(torch.mm(part_x, w, out_dtype=torch.float32), alpha=alpha)


def _pieces(x: torch.Tensor, number: int) -> list[torch.Tensor]:
    """``number`` tensors in bfloat16 whose sum is x, up to what a further one would hold."""
    pieces = []
    for _ in range(number):
        pieces.append(x.to(torch.bfloat16))
        x = x - pieces[-1]
    return pieces


def _product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x @ w of bfloat16 tensors, in float32."""
    if not x.is_cuda:
        return x.float() @ w.float()
    parts = zip(x.split(_TERMS, dim=1), w.split(_TERMS, dim=0), strict=True)
    out = torch.mm(*next(parts), out_dtype=torch.float32)
    for part in parts:
        out += torch.mm(*part, out_dtype=torch.float32)
    return out
