"""Bytes alive at a time, counted operation by operation: what a caching allocator would peak at, on any device."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class PeakBytes(TorchDispatchMode):
    """``with PeakBytes() as memory: ...``: ``memory.peak`` bytes beyond what was there before, ``memory.now`` at present.

    Counts the storages (but those of tensors of the dtype ``ignored``) that operations inside give rise to, from their first result to their last reference. What a kernel
    allocates and frees within itself is not seen.
    """

    def __init__(self, ignored: torch.dtype | None = None):
        super().__init__()
        self.ignored = ignored
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {id(s) for s in self._storages((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for storage in self._storages(result):
            if id(storage) not in before and id(storage) not in self._alive and storage.nbytes() > 0:
                self._alive[id(storage)] = storage.nbytes()
                weakref.finalize(storage, self._gone, id(storage))
                self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return result

    def _gone(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)

    def _storages(self, tree):
        return [x.untyped_storage() for x in tree_iter(tree) if isinstance(x, torch.Tensor) and x.dtype != self.ignored]
