"""Layers of a cache that hold rows of latents, which the patch "mla_decode" wrote and only a patched model can read.

An unpatched model writes the two parts of a row apart. Into a layer of rows that would be torch's error about sizes, so the
layer itself refuses it by name. Its class says that it holds rows: copies and pickles keep it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from flashmla_hf.patches.structure import PatchError


@functools.cache
def of_rows(layer_class: Any) -> Any:
    """The subclass of ``layer_class``, a class of a cache's layers, whose layers refuse what is no row."""

    class OfRows(layer_class):
        _layer_type = None  # Transformers makes caches of any subclass that has its parent's
        holds_rows = True

        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            kept = self.keys
            if kept is not None and kept.numel() > 0 and kept.shape[-1] != key_states.shape[-1]:
                raise PatchError(
                    f"flashmla_hf.unpatch: {layer_class.__name__} of a cache: expected the rows of {kept.shape[-1]} numbers "
                    f"that the patch 'mla_decode' filled it with, got keys of width {key_states.shape[-1]} and values of width "
                    f"{value_states.shape[-1]} of an unpatched model. Begin with a new cache after flashmla_hf.unpatch, or "
                    "patch the model again"
                )
            return super().update(key_states, value_states, *args, **kwargs)

        def __reduce_ex__(self, protocol: Any) -> tuple:
            return _empty, (layer_class,), dict(vars(self))

    OfRows.__name__ = OfRows.__qualname__ = layer_class.__name__
    return OfRows


def _empty(layer_class: type) -> object:
    """A layer for copy and pickle, which restore its attributes."""
    return object.__new__(of_rows(layer_class))


def mark(cache: Any, layer_idx: int) -> None:
    """Marks layer ``layer_idx`` of ``cache`` as one that holds rows. A compiled graph cannot set a class, and leaves it."""
    layers = getattr(cache, "layers", ())
    if torch.compiler.is_compiling() or layer_idx >= len(layers) or hasattr(layers[layer_idx], "holds_rows"):
        return
    layers[layer_idx].__class__ = of_rows(type(layers[layer_idx]))
