"""The layers of an Fp8Cache, and what they hand to attention.

A layer holds data e4m3 [batch, heads_kv, capacity, head_dim] and a scale for each token and head, fp32 [batch,
heads_kv, capacity]. It hands an attention layer :class:`fp8_rows.Fp8Rows` in place of keys and values, which only our
attention reads (``flashmla_hf.decode_attention`` with descales). The keys and values of the first forward pass are handed on as
they came: the prompt attends to itself in the precision of the model, and to a cache in fp8 from then on. ``keys`` and
``values`` of a layer, which some models read themselves (cross-attention, loops over layers), are Fp8Rows too: bits without
their scales mean nothing.

:class:`Fp8Layer` grows, and Python knows how many rows it has. :class:`StaticFp8Layer` is allocated once and counts its rows on
the device, so that one compiled graph, at the same addresses, is every decoding step.
"""

from __future__ import annotations

import contextlib
import operator
from typing import Any, NoReturn

import torch
from transformers.cache_utils import CacheLayerMixin

from flashmla_hf.fp8 import cached
from flashmla_hf.fp8.quantization import DTYPE
from flashmla_hf.hf.fp8_rows import Fp8Rows
from flashmla_hf.torch_state import values_are_readable

# Rows by which a full cache grows: one copy of it in so many steps, where DynamicCache makes one in each.
GROWTH = 128


CROSS_ATTENTION = (
    "An encoder-decoder model takes transformers.EncoderDecoderCache(Fp8Cache(), DynamicCache()), which holds the "
    "encoder's keys and values apart"
)


class _Layer(CacheLayerMixin):
    """What both kinds of layers have: buffers in fp8, and which keys and values they take."""

    is_sliding = False
    is_croppable = True
    # e4m3 [batch, heads_kv, capacity, head_dim] and fp32 [batch, heads_kv, capacity]; None in an empty cache.
    key_data: Any
    value_data: Any
    key_scales: Any
    value_scales: Any
    dtype: torch.dtype  # of the keys that came first

    def __init__(self) -> None:  # not the parent's, which sets keys and values
        self._clear()

    def _clear(self) -> None:
        self.key_data = self.value_data = self.key_scales = self.value_scales = None
        self.is_initialized, self._had_gradients = False, False

    def __getattr__(self, name: str) -> NoReturn:
        # An AttributeError: whoever asks whether there is such an attribute learns that there is none.
        raise AttributeError(
            f"Fp8Cache: its layers hold keys and values alone, and {name} was asked of one: expected a model that caches "
            "nothing else, and reads its cache by the attention of flashmla_hf. Use DynamicCache(config=model.config)"
        )

    @property
    def keys(self) -> Fp8Rows | None:
        return self._read("key", self.dtype) if self.is_initialized else None

    @property
    def values(self) -> Fp8Rows | None:
        return self._read("value", self.dtype) if self.is_initialized else None

    def _read(self, name: str, dtype: torch.dtype) -> Fp8Rows:
        """What is read of the buffers of ``name``, "key" or "value", by a model of ``dtype``."""
        raise NotImplementedError

    # pickle has no fp8 in torch 2.13.
    def __getstate__(self) -> dict[str, Any]:
        bits = {name: getattr(self, name).view(torch.uint8) for name in self._buffers() if name.endswith("_data")}
        return self.__dict__ | bits

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for name in self._buffers():
            if name.endswith("_data"):
                setattr(self, name, getattr(self, name).view(DTYPE))
        self._apply(lambda x: x.clone() if x.is_inference() else x)

    def _buffers(self) -> tuple[str, ...]:
        return ("key_data", "value_data", "key_scales", "value_scales") if self.is_initialized else ()

    def _allocate(self, key_states: torch.Tensor, value_states: torch.Tensor, rows: int) -> None:
        """Buffers of ``rows`` rows. key_states and value_states [batch, heads_kv, any, head_dim]."""
        self.device, self.dtype = key_states.device, key_states.dtype
        for name, x in (("key", key_states), ("value", value_states)):
            batch, heads, _, dim = x.shape
            setattr(self, f"{name}_data", torch.empty(batch, heads, rows, dim, dtype=DTYPE, device=x.device))
            setattr(self, f"{name}_scales", torch.empty(batch, heads, rows, dtype=torch.float32, device=x.device))
        self.is_initialized = True

    def _check(self, key_states: torch.Tensor, value_states: torch.Tensor, is_read: bool) -> None:
        """Raises for new keys and values that do not fit those in the cache, or that have a gradient in a step which reads
        the cache. Makes the buffers if there are none."""
        has_gradients = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        if is_read and torch.is_grad_enabled() and (has_gradients or self._had_gradients):
            raise RuntimeError(
                "Fp8Cache: expected keys and values that require no gradient in a step that reads the cache, got some that do: "
                "cached ones are rounded, and have none. Use torch.no_grad(), or DynamicCache to train through a cache"
            )
        if has_gradients:
            self._had_gradients = True
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for name, x in (("key", key_states), ("value", value_states)):
            batch, heads, _, dim = getattr(self, f"{name}_data").shape
            expected = [batch, heads, key_states.shape[-2], dim]
            if [*x.shape] != expected:  # an assignment to a slice would broadcast a row
                raise ValueError(
                    f"Fp8Cache: {name}s: expected shape {expected} [batch, heads_kv, new, head_dim], as the cache has it, got "
                    f"{[*x.shape]}. batch_select_indices and batch_repeat_interleave change the cache's batch, {self._another}"
                )

    _another: str  # how to take other shapes

    def _rows(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """keys, values [batch, capacity, heads_kv, head_dim] and their scales [batch, capacity, heads_kv]."""
        k, v, k_scale, v_scale = (
            x.transpose(1, 2) for x in (self.key_data, self.value_data, self.key_scales, self.value_scales)
        )
        return k, v, k_scale, v_scale

    def get_max_cache_shape(self) -> int:
        return self.get_max_length()

    def known_length(self) -> int | None:
        """The number of rows in use, the same for every sequence; ``None`` if Python may not read it now."""
        raise NotImplementedError

    def _apply(self, function) -> None:
        with _outside_inference_mode():
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


def _outside_inference_mode() -> contextlib.AbstractContextManager:
    """A context in which buffers are made. Those that inference mode makes could not be written to outside of it, and the next
    prompt may come under ``torch.no_grad()``, as generate() computes."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return contextlib.nullcontext()
    return torch.inference_mode(False)


def _removed(tokens_to_remove: int) -> int:
    """How many tokens ``crop`` forgets, which Transformers' caches take as a negative number, or 0."""
    expected = "a negative number (of tokens to forget) or 0"
    try:
        count = operator.index(tokens_to_remove)
    except TypeError:
        raise TypeError(
            f"Fp8Cache.crop: tokens_to_remove: expected {expected}, an int, got {tokens_to_remove!r}"
        ) from None
    if count > 0:
        raise ValueError(f"Fp8Cache.crop: tokens_to_remove: expected {expected}, got {count}")
    return -count


class Fp8Layer(_Layer):
    """One layer of an Fp8Cache that grows, by :data:`GROWTH` rows. Its buffers have unused rows, ``keys`` has none."""

    _another = "reset empties it"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()

    def _clear(self) -> None:
        super()._clear()
        self._length = 0
        self._begins: torch.Tensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Buffers without rows. key_states and value_states [batch, heads_kv, any, head_dim]."""
        with _outside_inference_mode():
            self._allocate(key_states, value_states, 0)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Quantises and appends key_states and value_states [batch, heads_kv, new, head_dim].

        Returns them as they are if the cache was empty, else all rows as :class:`Fp8Rows`, through which no gradient goes.
        """
        begin = self._length
        self._check(key_states, value_states, is_read=begin > 0)
        end = begin + key_states.shape[-2]
        self._reserve(end)
        k, v, k_scale, v_scale = (x[:, begin:end] for x in self._rows())
        new_k, new_v = key_states.transpose(1, 2), value_states.transpose(1, 2)
        cached.write_rows(new_k, new_v, k, v, k_scale, v_scale, self._zeros())
        self._length = end
        if begin == 0:
            return key_states, value_states
        return self._read("key", key_states.dtype), self._read("value", value_states.dtype)

    def _read(self, name: str, dtype: torch.dtype) -> Fp8Rows:
        data, scales = (getattr(self, f"{name}_{part}")[:, :, : self._length] for part in ("data", "scales"))
        return Fp8Rows(data, scales, dtype)

    def _zeros(self) -> torch.Tensor:
        """int32 [batch], made once."""
        batch = self.key_data.shape[0]
        if self._begins is None or self._begins.shape[0] != batch or self._begins.device != self.key_data.device:
            self._begins = torch.zeros(batch, dtype=torch.int32, device=self.key_data.device)
        return self._begins

    def _reserve(self, rows: int) -> None:
        capacity = self.key_data.shape[2]
        if rows <= capacity:
            return
        wanted = -(-rows // GROWTH) * GROWTH
        self._apply(lambda old: self._longer(old, wanted))

    def _longer(self, old: torch.Tensor, rows: int) -> torch.Tensor:
        """A copy of the buffer ``old`` with room for so many ``rows``."""
        new = old.new_empty(*old.shape[:2], rows, *old.shape[3:])
        new[:, :, : self._length] = old[:, :, : self._length]
        return new

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def get_seq_length(self) -> int:
        return self._length

    def known_length(self) -> int:
        return self._length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last ``-tokens_to_remove`` tokens."""
        self._length = max(0, self._length - _removed(tokens_to_remove))


_OF_COMPILED_STEPS = (
    "Fp8Cache: max_cache_len: expected room for the tokens of a compiled step, in layers that hold the same tokens, got a "
    "cache that is full (make it with more, or generate fewer tokens) or one that a pass left uneven which raised (reset() "
    "empties it)"
)


class StaticFp8Layer(_Layer):
    """One layer of a static Fp8Cache: ``max_cache_len`` rows at addresses that do not change.

    ``lengths``, int32 [batch] on the device, is how many of them are in use, the same for every sequence. Python knows the
    number only as long as no compiled step or captured graph has changed it.
    """

    is_compileable = True
    _another = "a cache of other shapes is a new Fp8Cache"
    lengths: Any  # None in a layer without buffers

    def __init__(self, max_cache_len: int) -> None:
        self.max_cache_len = max_cache_len
        super().__init__()

    def _clear(self) -> None:
        super()._clear()
        self.lengths = None
        self._known: int | None = 0  # the number in lengths, if Python knows it
        # Compiled code may read it, as it does not change from step to step.
        self._is_empty = True
        self._is_captured = False

    def _buffers(self) -> tuple[str, ...]:
        return (*super()._buffers(), "lengths") if self.is_initialized else ()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """All buffers, without a number in them. key_states and value_states [batch, heads_kv, any, head_dim]."""
        with _outside_inference_mode():
            self._allocate(key_states, value_states, self.max_cache_len)
            self.lengths = torch.zeros(key_states.shape[0], dtype=torch.int32, device=key_states.device)
        self._mark_static()

    def _mark_static(self) -> None:
        """CUDA graphs of torch.compile skip graphs that write to an input, unless its address is said to stay."""
        if not torch.compiler.is_compiling():
            for name in self._buffers():
                torch._dynamo.mark_static_address(getattr(self, name))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, beside: Any = None, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Quantises and appends key_states and value_states [batch, heads_kv, new, head_dim].

        Returns them as they are if the cache was empty, else all ``max_cache_len`` rows as :class:`Fp8Rows`, through which no
        gradient goes. Raises ValueError for more rows than there are. A compiled step raises RuntimeError from the running
        graph (on a GPU a device assertion), also if ``beside``, the layer before this one, caches other tokens.
        """
        was_empty, new = self._is_empty, key_states.shape[-2]
        self._check(key_states, value_states, is_read=not was_empty)
        self._count(new, beside)
        cached.write_rows(key_states.transpose(1, 2), value_states.transpose(1, 2), *self._rows(), self.lengths)
        self.lengths.add_(new)
        if was_empty:
            self._is_empty = new == 0
            return key_states, value_states
        return self._read("key", key_states.dtype), self._read("value", value_states.dtype)

    def _read(self, name: str, dtype: torch.dtype) -> Fp8Rows:
        return Fp8Rows(getattr(self, f"{name}_data"), getattr(self, f"{name}_scales"), dtype, self.lengths)

    def _count(self, new: int, beside: StaticFp8Layer | None) -> None:
        """Raises if ``new`` rows more do not fit, and in a compiled step if the layer ``beside`` this one has not as many."""
        if values_are_readable(self.lengths):
            self._known = self._length_with(new)
            return
        # Not read before it is written: a graph would hold for one number alone.
        self._known = None
        if not torch.compiler.is_compiling():
            self._is_captured = True  # and may be replayed, of which Python learns nothing
        is_right = self.lengths <= self.max_cache_len - new
        if beside is not None:
            # It is a step ahead, or this layer begins the next one.
            is_right = is_right & ((beside.lengths == self.lengths + new) | (beside.lengths == self.lengths))
        # One assertion, since each is a launch; constants alone, since a graph of dynamic shapes formats no length.
        torch._assert_async(is_right.all(), _OF_COMPILED_STEPS)

    def _length_with(self, new: int) -> int:
        """The rows in use after ``new`` ones more; raises ValueError if they do not fit."""
        length = self._length()
        if length + new > self.max_cache_len:
            raise ValueError(
                f"Fp8Cache: max_cache_len: expected at least {length + new} (it holds {length} tokens, and {new} come), got "
                f"{self.max_cache_len}. Make the cache with more, or generate fewer tokens; reset() empties it"
            )
        return length + new

    def _length(self) -> int:
        """The number in ``lengths``, which is read from the device if Python does not know it."""
        if self._known is None or self._is_captured:
            self._known = int(self.lengths[0])
        return self._known

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The rows that ``update`` hands on, and 0. Raises ValueError if the new ones do not fit: generate() asks before a
        compiled step, when it has waited for the step before, so that to read a number costs little."""
        if self.is_initialized and values_are_readable(self.lengths):
            self._length_with(query_length)
        # An empty layer hands the new keys on, and nothing else.
        return (query_length if self._is_empty else self.max_cache_len), 0

    def get_seq_length(self) -> int | torch.Tensor:
        """int32 [] in a graph, where it changes from step to step."""
        if not self.is_initialized:
            return 0
        return self._length() if values_are_readable(self.lengths) else self.lengths[0]

    def known_length(self) -> int | None:
        if not self.is_initialized:
            return 0
        return self._length() if values_are_readable(self.lengths) else None

    def get_max_length(self) -> int:
        return self.max_cache_len

    def _set_length(self, length: int) -> None:
        self._known, self._is_empty = length, length == 0
        if self.is_initialized:
            self.lengths.fill_(length)

    def reset(self) -> None:
        """Empties the layer, whose buffers stay."""
        self._set_length(0)
        self._had_gradients = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last ``-tokens_to_remove`` tokens."""
        removed = _removed(tokens_to_remove)
        if removed and self.is_initialized:
            self._set_length(max(0, self._length() - removed))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        for name in self._buffers():
            x = getattr(self, name)
            x.copy_(x.index_select(0, beam_idx.to(x.device)))

    def _apply(self, function) -> None:
        super()._apply(function)
        self._mark_static()
