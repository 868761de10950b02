"""Linear layers of bitsandbytes with 4-bit weights (QLoRA, arXiv 2305.14314): their weights, dense, while somebody needs them.

A frozen ``bitsandbytes.nn.Linear4bit`` computes ``y = x Wᵀ + b`` with W unpacked from 4 bits for each product, and once more
for the gradient of x. It has no gradient of its own. A patch that computes with W does the same by :func:`dense`.

Inside :func:`kept_dense`, every W is unpacked once. Tiles use it: they run the same few layers over and over.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def is_4bit(module: nn.Module) -> bool:
    """Whether ``module`` is a ``bitsandbytes.nn.Linear4bit``, and no subclass of it but bitsandbytes' own names for it."""
    package = sys.modules.get("bitsandbytes.nn")
    return package is not None and type(module) in (package.Linear4bit, package.LinearFP4, package.LinearNF4)


def unreadable(parameter: torch.Tensor) -> str | None:
    """The reason why :func:`dense` cannot unpack ``parameter``, a weight of :func:`is_4bit`; ``None`` if it can."""
    state = state_of(parameter)
    if state is None:
        return "not quantized yet (move the module to its device)"
    if getattr(state, "packing_format_for_cpu", False):
        return "packed for inference on a CPU"
    if len(state.shape) != 2:
        return f"of shape {[*state.shape]} (expected two dimensions)"
    return None


def state_of(weight: torch.Tensor) -> Any:
    """The ``QuantState`` of a packed 4-bit weight; ``None`` for any other tensor."""
    return getattr(weight, "quant_state", None)


def compute_dtype(module: Any, x: torch.Tensor) -> torch.dtype:
    """The dtype in which ``module``, one of :func:`is_4bit`, multiplies x. One that was given none takes its first input's."""
    return x.dtype if module.compute_dtype is None else module.compute_dtype


def dense(weight: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] in ``dtype`` of a packed one and its :func:`state_of`. Without a state it is ``weight`` itself."""
    if state is None:
        return weight
    kept = _thread.dense
    if kept is None:
        return _unpack(weight, state, dtype)
    # Keyed by the object, which the entry keeps alive: no other one can take its id.
    if id(state) not in kept:
        kept[id(state)] = (state, _unpack(weight, state, dtype))
    return kept[id(state)][1].to(dtype)


def _unpack(weight: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    return sys.modules["bitsandbytes.functional"].dequantize_4bit(weight.detach(), state).to(dtype)


class _Thread(threading.local):
    def __init__(self) -> None:
        self.dense: dict[int, tuple[Any, torch.Tensor]] | None = None


_thread = _Thread()


@contextlib.contextmanager
def kept_dense() -> Iterator[None]:
    """Inside, in this thread, :func:`dense` keeps what it unpacked."""
    before = _thread.dense
    if before is None:
        _thread.dense = {}
    try:
        yield
    finally:
        _thread.dense = before
