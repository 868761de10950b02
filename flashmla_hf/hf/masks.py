"""The mask function registered with Transformers, and the masks that it hands to the attention layers.

Transformers builds one mask per forward pass and kind of layer, by calling the function registered for the attention
implementation with a *mask function* (a closure over batch, head, query and key indices that defines the visible keys) and
the 2-D padding mask. Eager attention applies that mask and nothing else: the mask defines whether a layer is causal, has a
window or sees every key. Transformers' own functions for SDPA and flash implementations leave out what the layer's own
attributes define, but not every layer has them: some decoders never set ``is_causal``, some never pass their window on.

So a mask of ours is always complete. It has the shape and dtype of the mask that the model's class is written for,
[batch, 1, seqlen_q, seqlen_kv], and carries a :class:`Pattern`, which the attention function reads instead of the mask:

===================  ===================================================================================================
in eager mode        :class:`LazyMask`: it takes no memory until code computes with it. A model that slices it, adds to it
                     or concatenates it gets the exact dense mask, and its layer then computes with that.
under torch.compile  the dense mask, with the pattern as an attribute. The compiler drops the dense mask unless the model
                     computes with it.
===================  ===================================================================================================

A mask that no pattern describes (images that see themselves, custom overlays, holes in the padding of a causal row) is dense
and carries none: it costs seqlen_q * seqlen_kv bytes, and the fused kernel does not compute it. ``None`` means, as in eager
attention, that every query sees every key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree
from transformers import masking_utils

from flashmla_hf.hf import boundaries, transformers_private
from flashmla_hf.torch_state import values_are_readable

_ATTRIBUTE = "_flashmla_pattern"


class Pattern(NamedTuple):
    """The visible pairs (query, key), in a form that the kernel computes. A pair is visible if all fields allow it.

    is_causal: no key after the query. window: ``(left, right)``, both included, -1 is unbounded; ``None``: no window.
    padding: bool [batch, num_keys], true where a key may be seen; ``num_keys`` is the number of keys that there are,
    the last query standing at the last of them (a static cache holds more rows than that). ``None``: all keys.
    segments: int32 [batch, seqlen], the numbers of packed sequences, which do not see each other, or ``None``.
    end: int32 [], the number of keys that there are if Python does not know it (a compiled step on a static cache), else
    ``None``. The last query stands there, and ``padding`` covers all rows of the cache.
    """

    is_causal: bool
    window: tuple[int, int] | None = None
    padding: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    end: torch.Tensor | None = None

    def hides_nothing(self) -> bool:
        # Not ==: the compiler of torch 2.11 cannot compare a tensor of one tuple with None of the other.
        return not self.is_causal and self.window is None and self.padding is None and self.segments is None

    def dense(self, seqlen_q: int, seqlen_kv: int, device: torch.device) -> torch.Tensor:
        """Bool [batch or 1, 1, seqlen_q, seqlen_kv], true where the query sees the key."""
        num_keys = seqlen_kv if self.padding is None else self.padding.shape[1]
        key = torch.arange(seqlen_kv, device=device)[None]
        query = torch.arange(seqlen_q, device=device)[:, None] + (num_keys - seqlen_q)
        mask = (key < num_keys).expand(seqlen_q, -1)
        if self.is_causal:
            mask = mask & (key <= query)
        left, right = (-1, -1) if self.window is None else self.window
        if left >= 0:
            mask = mask & (key >= query - left)
        if right >= 0:
            mask = mask & (key <= query + right)
        mask = mask[None, None]
        if self.padding is not None:
            mask = mask & torch.nn.functional.pad(self.padding, (0, seqlen_kv - num_keys))[:, None, None, :]
        if self.segments is not None:
            mask = mask & boundaries.is_same_segment(self.segments)
        return mask


def _in_dtype(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The boolean ``mask`` as the mask of eager attention if ``dtype`` is floating: 0 or the lowest number, added."""
    if dtype == torch.bool:
        return mask
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, torch.finfo(dtype).min)


class LazyMask(torch.Tensor):
    """A mask [batch, 1, seqlen_q, seqlen_kv] that is materialised by the first operation on it.

    It holds its pattern and no numbers. Every operation gets the dense mask in its place, which is then kept. A view of the
    dense mask, or a change in place, makes the pattern void: :func:`pattern_of` returns ``None`` from then on.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _state: dict[str, Any]  # "pattern" and "dense", shared by all aliases of the mask

    @staticmethod
    def __new__(cls, pattern: Pattern, size, dtype: torch.dtype, anchor: torch.Tensor, state: dict | None = None):
        return torch.Tensor._make_wrapper_subclass(cls, size, dtype=dtype, device=anchor.device)

    def __init__(self, pattern: Pattern, size, dtype: torch.dtype, anchor: torch.Tensor, state: dict | None = None):
        # torch.compile takes a subclass apart into the tensors that it holds, of which there must be one.
        self._anchor, self._padding, self._segments = anchor, pattern.padding, pattern.segments
        self._state = {"pattern": pattern, "dense": None} if state is None else state

    def dense(self) -> torch.Tensor:
        """The mask itself, bool (true keeps) or floating (added), made once."""
        if self._state["dense"] is None:
            mask = self._state["pattern"].dense(self.shape[2], self.shape[3], self.device)
            self._state["dense"] = _in_dtype(mask.expand(self.shape), self.dtype).contiguous()
        return self._state["dense"]

    def __repr__(self, *, tensor_contents=None) -> str:  # type: ignore[override]
        return f"LazyMask({self._state['pattern']}, size={[*self.shape]}, dtype={self.dtype})"

    def __deepcopy__(self, memo):
        return self.dense().clone()

    def __reduce_ex__(self, protocol):
        return self.dense().__reduce_ex__(protocol)

    def __tensor_flatten__(self):
        pattern = self._state["pattern"]
        if pattern is None:
            self._void = self._state["dense"]
            return ["_anchor", "_void"], (None, self.dtype)
        names = [name for name in ("_anchor", "_padding", "_segments") if getattr(self, name) is not None]
        return names, (Pattern(pattern.is_causal, pattern.window), self.dtype)

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        pattern, dtype = context
        if pattern is None:
            state = {"pattern": None, "dense": inner["_void"]}
            return LazyMask(Pattern(False), size, dtype, inner["_anchor"], state)
        pattern = Pattern(pattern.is_causal, pattern.window, inner.get("_padding"), inner.get("_segments"))
        return LazyMask(pattern, size, dtype, inner["_anchor"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        kwargs = kwargs or {}
        mask = args[0] if args and isinstance(args[0], LazyMask) else None
        if mask is not None and mask._state["pattern"] is not None and _says_the_same(func, mask, args, kwargs):
            return mask._alias(kwargs.get("device"))
        if func._schema.is_mutable or any(r.alias_info is not None for r in func._schema.returns):
            for lazy in (x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, LazyMask)):
                lazy.dense()
                lazy._state["pattern"] = None
        return func(*pytree.tree_map_only(LazyMask, LazyMask.dense, args),
                    **pytree.tree_map_only(LazyMask, LazyMask.dense, kwargs))  # fmt: skip

    def _alias(self, device: torch.device | None) -> LazyMask:
        pattern = self._state["pattern"]
        if device is None or device == self.device:
            return LazyMask(pattern, self.shape, self.dtype, self._anchor, self._state)
        padding, segments = (x if x is None else x.to(device) for x in (pattern.padding, pattern.segments))
        moved = Pattern(pattern.is_causal, pattern.window, padding, segments)
        return LazyMask(moved, self.shape, self.dtype, self._anchor.to(device))


def _says_the_same(func, mask: LazyMask, args: tuple, kwargs: dict) -> bool:
    """Whether ``func`` gives another tensor of the same numbers and shape."""
    aten = torch.ops.aten
    if func in (aten.detach.default, aten.alias.default):
        return True
    if func is aten._to_copy.default:  # to another device
        return all(
            value in (None, mask.dtype) for name, value in kwargs.items() if name not in ("device", "non_blocking")
        )
    if func is aten.slice.Tensor:  # [:, :, :, :seqlen_kv]
        dim, start, end, step = (*args[1:], *(0, None, None, 1)[len(args) - 1 :])  # type: ignore[misc]
        return not start and step == 1 and (end is None or end >= mask.shape[dim])
    return False


def pattern_of(mask: torch.Tensor | None) -> Pattern | None:
    """The pattern of ``mask``; ``None`` for a mask that only its numbers describe."""
    if isinstance(mask, LazyMask):
        return mask._state["pattern"]
    return getattr(mask, _ATTRIBUTE, None)


def flashmla_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    config=None,
    **kwargs,
) -> torch.Tensor | None:
    """A mask as this module's head describes it; the signature is that of ``AttentionMaskInterface``.

    attention_mask: bool [batch, tokens seen so far], true where a token is real, or ``None``. Queries stand at
    positions ``q_offset ...`` (a tensor under a static cache), keys at ``kv_offset ...``.
    """
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"flashmla: attention_mask: expected None or 2 or 4 dimensions, got {attention_mask.dim()}: "
            f"{[*attention_mask.shape]}. Make a mask [batch, seqlen_q, seqlen_kv] one of 4 dimensions: attention_mask[:, None]"
        )
    if device is None:
        device = attention_mask.device if attention_mask is not None else "cpu"
    is_bidirectional = "allow_is_bidirectional_skip" in kwargs
    arguments = {
        "batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset,
        "kv_offset": kv_offset, "mask_function": mask_function, "attention_mask": attention_mask, "use_vmap": use_vmap,
        "device": device,
    }  # fmt: skip
    if transformers_private.attribute(config, "model_type") in transformers_private.LEGACY_FLASH_MODEL_TYPES:
        transformers_private.refuse_packed_rows(config, mask_function, batch_size)
        return _of_flash_path(config, arguments)
    if use_vmap:
        conditions = None
    elif is_tracing():
        conditions = transformers_private.conditions_while_compiling(
            mask_function, local_size, config, is_bidirectional
        )
    else:
        conditions = transformers_private.conditions_of(mask_function)
    if q_length == 1 and not (allow_is_causal_skip or is_bidirectional):
        conditions = None  # for a compiled decoding step: described by values, which change from step to step

    dtype = torch.bool if config is None or transformers_private.takes_boolean_masks(type(config)) else dtype

    def lazy(pattern: Pattern) -> LazyMask:
        return LazyMask(pattern, (batch_size, 1, q_length, kv_length), dtype, torch.empty(0, device=device))

    pattern = None if conditions is None else _pattern(conditions, arguments)
    if pattern is not None and not is_tracing():
        return lazy(pattern)
    mask = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    if pattern is None and q_length == 1 and dtype != torch.bool:
        # The numbers of a boolean mask say which keys its one query sees; those of a floating one may be anything.
        pattern = Pattern(False, None, boundaries.mark_constant(mask[:, 0, 0, :].clone()))
        if not is_tracing():
            return lazy(pattern)
    mask = boundaries.mark_constant(_in_dtype(mask, dtype))
    if pattern is not None:
        setattr(mask, _ATTRIBUTE, pattern)
    return mask


def _of_flash_path(config, arguments: dict) -> torch.Tensor | None:
    """The 2-D mask that Transformers' flash path reads: one column for each token so far, since its width alone says how many
    rows of a static cache hold keys. ``None``: all rows hold keys, and none is padding."""
    attention_mask, q_offset = arguments["attention_mask"], arguments["q_offset"]
    is_counted = isinstance(q_offset, torch.Tensor)  # by a static cache, from its second update on
    if is_counted and not values_are_readable(q_offset):
        if attention_mask is None:
            transformers_private.refuse_width_of_mask(config, "tokens so far", None)
        if not q_offset.is_meta:
            torch._assert_async(
                (q_offset + arguments["q_length"] == attention_mask.shape[1]).all(),
                "flashmla: attention_mask in a compiled model on Transformers' flash path: expected a column for each token so "
                "far. Cut it to [:, :tokens so far], or run without torch.compile",
            )
        return attention_mask
    num_keys, width = int(q_offset) + arguments["q_length"], None
    if attention_mask is not None:
        width = attention_mask.shape[1]
        if width < num_keys:
            transformers_private.refuse_width_of_mask(config, f"{num_keys} tokens", attention_mask)
        attention_mask = attention_mask[:, :num_keys]
    elif is_counted or num_keys < arguments["kv_length"]:
        attention_mask = torch.ones(arguments["batch_size"], num_keys, dtype=torch.bool, device=arguments["device"])
    if is_counted:
        return attention_mask  # generate makes the mask of a compiled step, which knows no number of tokens, before it calls it
    mask = masking_utils.flash_attention_mask(**arguments | {"attention_mask": attention_mask})
    # The first update of a static cache looks like no cache and a mask of more tokens than there are.
    if mask is not None and width is not None and num_keys < width == arguments["kv_length"] and not is_tracing():
        transformers_private.mark_cut(mask, width)
    return mask


def is_tracing() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _pattern(conditions: transformers_private.Conditions, arguments: dict) -> Pattern | None:
    """The pattern of ``conditions``, which stand for the mask function in ``arguments``; ``None`` if there is none."""
    q_length, kv_length, q_offset, kv_offset, attention_mask = (
        arguments[name] for name in ("q_length", "kv_length", "q_offset", "kv_offset", "attention_mask")
    )
    is_positional = conditions.is_causal or conditions.window is not None or conditions.chunk is not None
    if isinstance(q_offset, torch.Tensor) and is_positional:
        # Static caches count their tokens in a tensor, but the kernel reads keys up to a length that Python knows. So either
        # read the tensor (one synchronisation per forward), or leave it where it is (compiled decoding).
        if not values_are_readable(q_offset):
            return _pattern_of_unknown_end(conditions, arguments)
        q_offset = int(q_offset)
    # No query of a causal row sees the keys past the last query, the unused end of a static cache.
    num_keys = q_offset + q_length - kv_offset if conditions.is_causal else kv_length
    if num_keys > kv_length:
        return None
    if is_positional and not conditions.is_causal and (q_length != kv_length or q_offset != kv_offset):
        return None  # the kernel's queries stand at the last keys
    if attention_mask is not None and is_positional and attention_mask.shape[-1] < kv_offset + num_keys:
        return None  # tokens beyond the mask's end are hidden as keys, but they are queries like others: not padding
    padding = None
    if attention_mask is not None:
        padding = _padding(attention_mask, kv_offset, num_keys)
        if values_are_readable(padding) and boundaries.key_ranges(padding).uniform == (0, num_keys):
            padding = None
    segments = None
    if conditions.chunk is not None and kv_offset + num_keys > conditions.chunk:
        if padding is not None or q_length != num_keys:
            return None
        segments = _segments(arguments)
    elif conditions.is_packed and attention_mask is None:
        if q_length == num_keys == kv_length:
            segments = _segments(arguments)
        elif not is_tracing():
            return None  # Transformers packs without a cache only; while compiling the condition is a guess
    if padding is None and num_keys != kv_length:
        padding = boundaries.mark_constant(
            torch.ones(arguments["batch_size"], num_keys, dtype=torch.bool, device=arguments["device"])
        )
    return Pattern(conditions.is_causal, conditions.window, padding, segments)


def _pattern_of_unknown_end(conditions: transformers_private.Conditions, arguments: dict) -> Pattern | None:
    """The pattern of several queries on a static cache in a compiled graph, in which its number of tokens has no value yet."""
    kv_length, kv_offset = arguments["kv_length"], arguments["kv_offset"]
    is_plain = conditions.is_causal and conditions.chunk is None and not isinstance(kv_offset, torch.Tensor)
    if not is_plain or not torch.compiler.is_compiling():
        return None
    end = (arguments["q_offset"] + arguments["q_length"] - kv_offset).to(arguments["device"], torch.int32)
    padding = (torch.arange(kv_length, device=arguments["device"]) < end)[None].expand(arguments["batch_size"], -1)
    if arguments["attention_mask"] is not None:
        padding = padding & _padding(arguments["attention_mask"], kv_offset, kv_length)
    return Pattern(True, conditions.window, padding, None, end)


def _padding(attention_mask: torch.Tensor, kv_offset: int, kv_length: int) -> torch.Tensor:
    """Bool [batch, kv_length]: the part of the padding mask that the keys of this layer are; beyond its end is
    padding."""
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    return boundaries.mark_constant(padding[:, kv_offset : kv_offset + kv_length])


def _segments(arguments: dict) -> torch.Tensor:
    """Int32 [batch, seqlen]: a new number wherever a query does not see the key before it. O(seqlen), and traceable."""
    batch, head, query, key = (
        torch.arange(arguments["batch_size"], device=arguments["device"])[:, None],
        torch.zeros(1, 1, dtype=torch.long, device=arguments["device"]),
        torch.arange(1, arguments["q_length"], device=arguments["device"])[None],
        torch.arange(arguments["q_length"] - 1, device=arguments["device"])[None],
    )
    is_same = arguments["mask_function"](batch, head, query, key).expand(arguments["batch_size"], -1)
    number = (~is_same).cumsum(-1, dtype=torch.int32) + 1
    return boundaries.mark_constant(torch.nn.functional.pad(number, (1, 0), value=1))
