"""A Transformers cache of e4m3 keys and values: half the memory of a 16-bit cache.

A layer of the cache holds data e4m3 [batch, heads_kv, capacity, head_dim] and a scale for each token and head, fp32 [batch,
heads_kv, capacity]. It hands an attention layer :class:`Fp8Rows` in place of keys and values, which only our attention reads
(``flashmla_hf.decode_attention`` with descales). The keys and values of the first forward pass are handed on as they came: the
prompt attends to itself in the precision of the model, and to a cache in fp8 from then on.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from flashmla_hf.fp8 import cached
from flashmla_hf.fp8.quantization import DTYPE

# Rows by which a full cache grows: one copy of it in so many steps, where DynamicCache makes one in each.
GROWTH = 128


class Fp8Rows(torch.Tensor):
    """Keys or values [batch, heads_kv, rows, head_dim] that only our attention can read: every operation raises.

    It has the dtype of the model, and no numbers in it: ``e4m3`` [batch, heads_kv, rows, head_dim] and ``scale`` fp32
    [batch, heads_kv, rows] are views of the cache.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    e4m3: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, e4m3: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype):
        return torch.Tensor._make_wrapper_subclass(cls, e4m3.shape, dtype=dtype, device=e4m3.device)

    def __init__(self, e4m3: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype):
        self.e4m3, self.scale = e4m3, scale

    def __repr__(self, *, tensor_contents=None) -> str:  # type: ignore[override]
        return f"Fp8Rows({[*self.shape]}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        raise RuntimeError(
            f"Fp8Cache: its keys and values are in fp8, and {func} was called on them: expected the attention of flashmla_hf "
            'alone to read them. Load the model with attn_implementation="flashmla" (or "flashmla_fp8"). If it is, the model '
            "computes with its cache itself (latent attention, encoder-decoder): use DynamicCache. flashmla_hf.check(model) "
            "lists the layers that call our attention"
        )


class Fp8Layer(CacheLayerMixin):
    """One layer of :class:`Fp8Cache`; grows by :data:`GROWTH` rows. ``keys`` and ``values`` are e4m3, unused rows included."""

    is_sliding = False
    is_croppable = True
    # e4m3 [batch, heads_kv, capacity, head_dim] and fp32 [batch, heads_kv, capacity]; None in an empty cache.
    keys: Any
    values: Any
    key_scales: Any
    value_scales: Any

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self._clear()

    def _clear(self) -> None:
        self.keys = self.values = self.key_scales = self.value_scales = None
        self.is_initialized, self._length, self._had_gradients = False, 0, False
        self._begins: torch.Tensor | None = None

    # pickle has no fp8 in torch 2.13.
    def __getstate__(self) -> dict[str, Any]:
        bits = {name: getattr(self, name).view(torch.uint8) for name in self._buffers() if name in ("keys", "values")}
        return self.__dict__ | bits

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for name in self._buffers():
            if name in ("keys", "values"):
                setattr(self, name, getattr(self, name).view(DTYPE))

    def _buffers(self) -> tuple[str, ...]:
        return ("keys", "values", "key_scales", "value_scales") if self.is_initialized else ()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Buffers without rows. key_states and value_states [batch, heads_kv, any, head_dim]."""
        self.device = key_states.device
        for name, x in (("key", key_states), ("value", value_states)):
            batch, heads, _, dim = x.shape
            setattr(self, f"{name}s", torch.empty(batch, heads, 0, dim, dtype=DTYPE, device=x.device))
            setattr(self, f"{name}_scales", torch.empty(batch, heads, 0, dtype=torch.float32, device=x.device))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantises and appends key_states and value_states [batch, heads_kv, new, head_dim].

        Returns them as they are if the cache was empty, else all rows as :class:`Fp8Rows`, through which no gradient goes.
        """
        has_gradients = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        if self._length and torch.is_grad_enabled() and (has_gradients or self._had_gradients):
            raise RuntimeError(
                "Fp8Cache: expected keys and values that require no gradient in a step that reads the cache, got some that do: "
                "cached ones are rounded, and have none. Use torch.no_grad(), or DynamicCache to train through a cache"
            )
        self._had_gradients |= has_gradients
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for name, x in (("keys", key_states), ("values", value_states)):
            batch, heads, _, dim = getattr(self, name).shape
            expected = [batch, heads, key_states.shape[-2], dim]
            if [*x.shape] != expected:  # an assignment to a slice would broadcast a row
                raise ValueError(
                    f"Fp8Cache: {name}: expected shape {expected} [batch, heads_kv, new, head_dim], as the cache has it, got "
                    f"{[*x.shape]}. batch_select_indices and batch_repeat_interleave change the cache's batch, reset empties it"
                )
        begin = self._length
        end = begin + key_states.shape[-2]
        self._reserve(end)
        rows = (self.keys, self.values, self.key_scales, self.value_scales)
        k, v, k_scale, v_scale = (x[:, :, begin:end].transpose(1, 2) for x in rows)
        new_k, new_v = key_states.transpose(1, 2), value_states.transpose(1, 2)
        cached.write_rows(new_k, new_v, k, v, k_scale, v_scale, self._zeros())
        self._length = end
        if begin == 0:
            return key_states, value_states
        return (
            Fp8Rows(self.keys[:, :, :end], self.key_scales[:, :, :end], key_states.dtype),
            Fp8Rows(self.values[:, :, :end], self.value_scales[:, :, :end], value_states.dtype),
        )

    def _zeros(self) -> torch.Tensor:
        """int32 [batch], made once."""
        batch = self.keys.shape[0]
        if self._begins is None or self._begins.shape[0] != batch or self._begins.device != self.keys.device:
            self._begins = torch.zeros(batch, dtype=torch.int32, device=self.keys.device)
        return self._begins

    def _reserve(self, rows: int) -> None:
        capacity = self.keys.shape[2]
        if rows <= capacity:
            return
        wanted = -(-rows // GROWTH) * GROWTH
        for name in self._buffers():
            old = getattr(self, name)
            new = old.new_empty(*old.shape[:2], wanted, *old.shape[3:])
            new[:, :, : self._length] = old[:, :, : self._length]
            setattr(self, name, new)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def get_seq_length(self) -> int:
        return self._length

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def reset(self) -> None:
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last ``-tokens_to_remove`` tokens, as Transformers' caches take the number: negative, or 0."""
        if tokens_to_remove > 0:
            expected = "a negative number (of tokens to forget) or 0"
            raise ValueError(f"Fp8Cache.crop: tokens_to_remove: expected {expected}, got {tokens_to_remove}")
        self._length = max(0, self._length + tokens_to_remove)

    def _apply(self, function) -> None:
        for name in self._buffers():
            setattr(self, name, function(getattr(self, name)))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._apply(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._apply(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._apply(lambda x: x[indices])

    def offload(self) -> None:
        self._apply(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._apply(lambda x: x.to(self.device, non_blocking=True))


class Fp8Cache(Cache):
    """Keys and values of ``generate`` in fp8 (e4m3), with a scale per token and head: about half the bytes of a 16-bit cache.

        model.generate(**inputs, past_key_values=flashmla_hf.Fp8Cache())

    The model needs ``attn_implementation="flashmla"`` (attention exact but for the rounding of the cache) or
    ``"flashmla_fp8"``; others raise at the first token that they read from it. It is not exact: docs/fp8.md says what it costs.
    Beams, assisted decoding (``crop``), left padding and sliding windows work; a sliding layer keeps all its rows, which
    DynamicCache drops. On a GPU a Hopper's kernel reads it, of models in fp16 and bf16 with head dims of multiples of 16 up to
    256; others raise. A padding mask with holes,
    ``output_attentions``, gradients, static caches and compilation, and models with other states than keys and values (Mamba),
    raise.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=Fp8Layer)

    def update_conv_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise _no_states("convolutional")

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise _no_states("recurrent")

    # Some models ask for states before they write any.
    def get_conv_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise _no_states("convolutional")

    def get_recurrent_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise _no_states("recurrent")


def _no_states(kind: str) -> NotImplementedError:
    return NotImplementedError(
        f"Fp8Cache: expected a model whose layers cache keys and values alone, got one with {kind} states. Use DynamicCache"
    )
