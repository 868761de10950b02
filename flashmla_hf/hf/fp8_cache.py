"""A Transformers cache of e4m3 keys and values: half the memory of a 16-bit cache."""

from __future__ import annotations

import operator
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    LinearAttentionCacheLayerMixin,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from flashmla_hf.hf.fp8_layers import CROSS_ATTENTION, Fp8Layer, StaticFp8Layer
from flashmla_hf.hf.fp8_rows import Fp8Rows


class Fp8Cache(Cache):
    """Keys and values of ``generate`` in fp8 (e4m3), with a scale per token and head: about half the bytes of a 16-bit cache.

        model.generate(**inputs, past_key_values=flashmla_hf.Fp8Cache())
        model.generate(**inputs, past_key_values=flashmla_hf.Fp8Cache(model.config, max_cache_len=4096))

    The first grows as DynamicCache does. The second is static: all of it is allocated at once, and on a GPU ``generate``
    compiles the decoding step into one CUDA graph, as with StaticCache. ``cache.reset()`` empties it for another prompt of as
    many rows, without compiling again.

    The model needs ``attn_implementation="flashmla"`` (attention exact but for the rounding of the cache) or
    ``"flashmla_fp8"``; others raise at the first token that they read from it. It is not exact: docs/fp8.md says what it costs.
    Beams, assisted decoding (``crop``), left padding and sliding windows work; a sliding layer keeps all its rows, which
    Transformers' caches drop. An encoder-decoder model takes ``EncoderDecoderCache(Fp8Cache(), DynamicCache())``. After a
    forward pass that raised, layers hold different numbers of tokens, and the next pass raises until ``cache.reset()``.

    On a GPU a Hopper's kernel reads it, of models in fp16 and bf16 with head dims of multiples of 16 up to 256; others raise. A
    padding mask with holes, ``output_attentions``, gradients, and models with other states than keys and values (Mamba), raise.

    Args:
        config: the configuration of the model, which says how many layers a static cache has.
        max_cache_len: the tokens that a static cache holds for each sequence, padding included: those of the prompt and all
            new ones but the last. More raise. Both or neither: without them the cache grows.
    """

    def __init__(self, config: Any = None, max_cache_len: int | None = None, **others: Any) -> None:
        if others:  # T5Gemma makes another cache of the class that it is given
            raise TypeError(
                f"Fp8Cache: expected config and max_cache_len, or nothing, got {', '.join(others)}. A model that makes the "
                "cache of its cross-attention itself takes transformers.EncoderDecoderCache(Fp8Cache(), DynamicCache())"
            )
        if config is None and max_cache_len is None:
            super().__init__(layer_class_to_replicate=Fp8Layer)
        else:
            super().__init__(layers=_static_layers(config, max_cache_len))
        self._last: Fp8Layer | StaticFp8Layer | None = None  # the layer that was updated last
        self._index = -1  # the layer, of any kind, that was updated last
        # Whether it was asked for its length since: models ask at the beginning of a pass.
        self._was_asked = False
        self._new: int | None = 0  # the tokens of the pass; None: unknown

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Quantises and appends key_states and value_states [batch, heads_kv, new, head_dim] to layer ``layer_idx``.

        Returns what its attention reads. Raises RuntimeError if the layers hold different numbers of tokens.
        """
        is_compiling = torch.compiler.is_compiling()
        if is_compiling and layer_idx < len(self.layers) and isinstance(self.layers[layer_idx], StaticFp8Layer):
            return self._update_in_a_graph(key_states, value_states, self.layers[layer_idx], *args, **kwargs)
        new = key_states.shape[-2]
        if self._was_asked or self._index < 0 or layer_idx < self._index:
            self._new = new
        elif layer_idx == self._index:
            # Another pass of the only layer, or after one that raised; or the cross-attention of the layer.
            self._new = None
        # A layer of cross-attention (Mllama's) is given others. A static cache has room for the same tokens in each layer.
        is_of_pass = self._new in (None, new) or self.layer_class_to_replicate is None
        if is_of_pass:
            self._check_length(layer_idx, new)
        result = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if isinstance(layer := self.layers[layer_idx], (Fp8Layer, StaticFp8Layer)):
            if isinstance(rows := result[0], Fp8Rows) and not is_compiling:
                rows.is_second = layer is self._last and not self._was_asked
            self._last, self._was_asked = (layer if is_of_pass else self._last), False
        self._index = layer_idx
        return result

    def _update_in_a_graph(self, key_states, value_states, layer: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """As :meth:`update`; Python knows no lengths, so the graph compares them."""
        last, self._last = self._last, layer
        is_other = isinstance(last, StaticFp8Layer) and last is not layer and last.is_initialized
        beside: Any = last if is_other else None
        if beside is not None and beside.device != key_states.device:
            beside = None
        return layer.update(key_states, value_states, *args, beside=beside, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        self._ask(layer_idx)
        return super().get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[int, int]:
        self._ask(layer_idx)
        return super().get_mask_sizes(query_length, layer_idx)

    def _ask(self, layer_idx: int) -> None:
        # Mllama asks in Transformers 5.17 within a pass, for the layer that comes.
        if not torch.compiler.is_compiling() and layer_idx <= self._index:
            self._was_asked = True

    def reset(self) -> None:
        """Empties all layers. A static cache keeps its buffers."""
        self._last, self._index = None, -1  # so that the graph of another prompt is that of the first
        super().reset()

    def _check_length(self, layer_idx: int, new: int) -> None:
        """Raises if the layers of a model do not cache the same tokens: keys would meet the mask and positions of others.

        A layer either has what the one before it had at its turn, or begins another pass.
        """
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else Fp8Layer()
        if self._last is None or not isinstance(layer, (Fp8Layer, StaticFp8Layer)):
            return
        length, others = layer.known_length(), self._last.known_length()
        if length is not None and others is not None and others not in (length, length + new):
            raise RuntimeError(
                f"Fp8Cache: layer {layer_idx}: expected {others} tokens with the {new} that come, as the layer before it has, "
                f"got {length + new}. After a forward pass that raised or was interrupted reset() empties it. "
                f"{CROSS_ATTENTION}. Other models whose layers cache different tokens (of images) take Fp8Cache(), which "
                "grows, or DynamicCache"
            )

    def update_conv_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise _no_states("convolutional")

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise _no_states("recurrent")

    def update_indexer(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise _no_states("indexer's")

    # Some models ask for states before they write any.
    def get_conv_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise _no_states("convolutional")

    def get_recurrent_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise _no_states("recurrent")

    @property
    def self_attention_cache(self) -> Any:
        raise AttributeError(f"Fp8Cache: expected a cache of two parts, got one. {CROSS_ATTENTION}")

    # What else models ask an EncoderDecoderCache for.
    cross_attention_cache = is_updated = self_attention_cache


def _no_states(kind: str) -> NotImplementedError:
    return NotImplementedError(
        f"Fp8Cache: expected a model whose layers cache keys and values alone, got one with {kind} states. Use DynamicCache"
    )


def _static_layers(config: Any, max_cache_len: Any) -> list[Any]:
    """The layers of a static cache: where StaticCache holds keys and values, in fp8."""
    if config is None or max_cache_len is None:
        given, missing = ("config", "max_cache_len") if max_cache_len is None else ("max_cache_len", "config")
        way_out = "Fp8Cache(model.config, max_cache_len=4096) is static, Fp8Cache() grows"
        raise ValueError(f"Fp8Cache: {missing}: expected one, since {given} is given, got None. {way_out}")
    try:
        length = 0 if isinstance(max_cache_len, bool) else operator.index(max_cache_len)
    except TypeError:
        length = 0
    if length < 1:
        raise ValueError(f"Fp8Cache: max_cache_len: expected a positive int (of tokens), got {max_cache_len!r}")
    if not hasattr(config, "get_text_config"):
        expected = "the configuration of a model (model.config)"
        raise TypeError(f"Fp8Cache: config: expected {expected}, got {type(config).__name__}")
    try:
        like = StaticCache(config=config, max_cache_len=length).layers
    except KeyError as unknown:
        raise NotImplementedError(
            f"Fp8Cache: config: expected layers that StaticCache has, got one of type {unknown}. Use DynamicCache"
        ) from unknown
    layers: list[Any] = []
    for layer in like:
        if type(layer) in (StaticLayer, StaticSlidingWindowLayer):
            layers.append(StaticFp8Layer(length))
        elif isinstance(layer, (CacheLayerMixin, LinearAttentionCacheLayerMixin)):
            raise NotImplementedError(
                f"Fp8Cache: config: expected a model whose layers cache keys and values alone, got one with a "
                f"{type(layer).__name__}. Use StaticCache"
            )
        else:
            layers.append(layer)  # a layer that shares the keys and values of another one, or has none
    return layers
