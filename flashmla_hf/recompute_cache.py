"""A per-thread cache that hands (out, lse) from a layer's forward to its recomputation under checkpointing.

Gradient checkpointing runs a layer twice: in forward, and again in backward. While :data:`active` holds a cache, the first run
saves the attention's outputs in it and the second run loads them, so that the kernel runs once. ``patches/checkpointing.py``
provides the cache; :mod:`flashmla_hf.ops` reads and writes it.
"""

from __future__ import annotations

import threading
from typing import Protocol

import torch


class RecomputeCache(Protocol):
    """The outputs of the attention calls of one layer, in the order of the calls."""

    def load(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(out, lse) of the next call, or ``None`` if it must be computed.

        The tensors must be new objects: autograd writes its history into them.
        """

    def save(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Receives the outputs of a call for which :meth:`load` gave ``None``."""


class _Active(threading.local):
    """This thread's cache; ``None`` outside of checkpointed layers."""

    cache: RecomputeCache | None = None


active = _Active()
