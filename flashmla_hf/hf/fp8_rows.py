"""What the layers of an Fp8Cache hand to attention, in place of keys and values."""

from __future__ import annotations

from typing import Any, NoReturn

import torch


class Fp8Rows:
    """Keys or values [batch, heads_kv, rows, head_dim] that only our attention can read: every operation raises.

    It has the dtype of the model, and no numbers in it: ``e4m3`` [batch, heads_kv, rows, head_dim] and ``scale`` fp32
    [batch, heads_kv, rows] are views of the cache. ``lengths``: int32 [batch], how many of the rows are in use; ``None``: all.

    ``is_second``: whether the layer was given keys before in the same forward pass, which these are read with.

    No subclass of torch.Tensor, which a compiled graph cannot make.
    """

    requires_grad = False
    is_second = False

    def __init__(
        self, e4m3: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, lengths: torch.Tensor | None = None
    ) -> None:
        self.e4m3, self.scale, self.dtype, self.lengths = e4m3, scale, dtype, lengths

    @property
    def shape(self) -> torch.Size:
        return self.e4m3.shape

    @property
    def device(self) -> torch.device:
        return self.e4m3.device

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.e4m3.numel()

    def to(self, device: Any = None, *others: Any, non_blocking: bool = False, **options: Any) -> Fp8Rows:
        """On another device, where models that share keys and values among layers move them. Another dtype raises."""
        if others or options or not isinstance(device, (torch.device, str, int)):
            _refuse_operation("to")
        e4m3, scale = (x.to(device, non_blocking=non_blocking) for x in (self.e4m3, self.scale))
        lengths = self.lengths if self.lengths is None else self.lengths.to(device, non_blocking=non_blocking)
        moved = Fp8Rows(e4m3, scale, self.dtype, lengths)
        moved.is_second = self.is_second
        return moved

    def __repr__(self) -> str:
        return f"Fp8Rows({[*self.shape]}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None) -> NoReturn:
        _refuse_operation(getattr(func, "__name__", func))

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)  # a protocol that Python asks for: copies, pickles
        _refuse_operation(name)

    def __getitem__(self, index: Any) -> NoReturn:
        _refuse_operation("indexing")


def _refuse_operation(name: Any) -> NoReturn:
    raise RuntimeError(
        f"Fp8Cache: its keys and values are in fp8, and {name} was called on them: expected the attention of flashmla_hf "
        'alone to read them. Load the model with attn_implementation="flashmla" (or "flashmla_fp8"). If it is, the model '
        "computes with its cache itself (latent attention, loops over layers): use DynamicCache. flashmla_hf.check(model) "
        "lists the layers that call our attention"
    )
