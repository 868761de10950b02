"""The mask function registered with Transformers, and the four forms of mask that it hands to the attention layers.

Transformers builds one mask per forward pass and kind of layer, by calling the function registered for the attention
implementation with a *mask function* (who sees whom, as a closure over batch, head, query and key indices) and the
2-D padding mask. Its own function for flash implementations ignores the closure, which is silently wrong for images in
Gemma 3, PaliGemma's prefix, packed rows and static caches. This one answers exactly, with the cheapest form that says
it:

===============================  =======================================================================================
form                             meaning for the attention layer
===============================  =======================================================================================
``None``                         causal, window or everything, as the layer's own arguments say
bool [batch, seqlen]             key padding besides that; ``seqlen`` is the number of keys to read, the last query
                                 standing at the last of them (a static cache holds more rows than that)
int32 [batch, seqlen]            numbers of packed sequences; causal and window count inside each
bool [batch, 1, 1, seqlen_kv]    the keys that every query of the row sees: nothing else counts
bool [batch, 1, seqlen_q, ...]   who sees whom, dense: nothing else counts
===============================  =======================================================================================

The last one costs seqlen_q * seqlen_kv bytes and leaves the fused kernel; it is for patterns that nothing else
expresses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import masking_utils

from flashmla_hf import hf_layout

# The building blocks of transformers.masking_utils by the names of their closures.
_CAUSAL = "causal_mask_function"
_BIDIRECTIONAL = "bidirectional_mask_function"
_CHUNKED = "chunked_overlay.<locals>.inner_mask"
_PACKED = "packed_sequence_mask_function.<locals>.inner_mask"
_REMAP = "remap_positions_for_packed_sequence.<locals>.inner_mask"
_KNOWN = {
    _CAUSAL,
    _BIDIRECTIONAL,
    _CHUNKED,
    _PACKED,
    _REMAP,
    "sliding_window_overlay.<locals>.inner_mask",
    "sliding_window_bidirectional_overlay.<locals>.inner_mask",
}
_AND = "and_masks.<locals>.and_mask"
_AND_CODE = masking_utils.and_masks().__code__

# Their attention classes call Transformers' flash path instead of the interface, which unpads by a 2-D mask itself.
# (The last three are Bark's.)
LEGACY_FLASH_MODEL_TYPES = frozenset({"falcon", "gptj", "semantic", "coarse_acoustics", "fine_acoustics"})


def _names(mask_function: Callable) -> set[str]:
    """The names of the conditions that ``mask_function`` is the conjunction of (a disjunction is one unknown name)."""
    name = getattr(mask_function, "__qualname__", "unknown")
    if getattr(mask_function, "__module__", "") != masking_utils.__name__:
        return {"unknown"}
    if name not in (_AND, _REMAP):
        return {name}
    cells = dict(zip(mask_function.__code__.co_freevars, mask_function.__closure__, strict=True))
    if name == _REMAP:
        return {name} | _names(cells["mask_function"].cell_contents)
    return set().union(*(_names(part) for part in cells["mask_functions"].cell_contents))


def _names_while_compiling(mask_function: Callable, local_size: int | None, config, is_bidirectional: bool) -> set[str]:
    """As :func:`_names`, from what dynamo can see: a closure's cells are not readable under torch.compile, its code is
    (its ``__qualname__`` from torch 2.13 on)."""
    if mask_function is masking_utils.causal_mask_function:
        return {_CAUSAL}
    if mask_function is masking_utils.bidirectional_mask_function:
        return {_BIDIRECTIONAL}
    if mask_function.__code__ is not _AND_CODE:
        return {"unknown"}
    # Conjunctions reach us from the create_* functions alone (custom ones set use_vmap): a window or chunks if
    # local_size is given, packed sequences, or both.
    if is_bidirectional:
        return {_BIDIRECTIONAL} if local_size is not None else {"unknown"}
    if local_size is None:
        return {_CAUSAL, _PACKED}
    is_window = getattr(config, "sliding_window", None) == local_size
    if not is_window and getattr(config, "attention_chunk_size", None) == local_size:
        return {_CAUSAL, _CHUNKED, _PACKED}
    # Whether a windowed or chunked mask is also packed cannot be told; looking for segments is exact either way.
    return {_CAUSAL, _PACKED}


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
    config=None,
    **kwargs,
) -> torch.Tensor | None:
    """A mask in one of the forms of this module's table; the signature is that of ``AttentionMaskInterface``.

    attention_mask: bool [batch, tokens seen so far], true where a token is real, or ``None``. Queries stand at
    positions ``q_offset ...`` (a tensor under a static cache), keys at ``kv_offset ...``.
    """
    if device is None:
        device = attention_mask.device if attention_mask is not None else "cpu"
    is_bidirectional = "allow_is_bidirectional_skip" in kwargs
    dense = {
        "batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset,
        "kv_offset": kv_offset, "mask_function": mask_function, "attention_mask": attention_mask, "use_vmap": use_vmap,
        "device": device,
    }  # fmt: skip
    if getattr(config, "model_type", None) in LEGACY_FLASH_MODEL_TYPES:
        return masking_utils.flash_attention_mask(**dense)
    if use_vmap:
        names = {"unknown"}
    elif torch.compiler.is_compiling():
        names = _names_while_compiling(mask_function, local_size, config, is_bidirectional)
    else:
        names = _names(mask_function)
    may_skip = kwargs.get("allow_is_bidirectional_skip", True) if is_bidirectional else allow_is_causal_skip
    if _PACKED in names:
        may_skip = True  # Transformers forbids the skip for packed rows since its own masks would lose them

    if names <= _KNOWN and may_skip:
        if is_bidirectional and _BIDIRECTIONAL in names:
            return _bidirectional(batch_size, q_length, kv_length, kv_offset, attention_mask, local_size, dense)
        if _CAUSAL in names:
            return _causal(names, attention_mask, local_size, dense)
    return _dense(dense)


def _dense(arguments: dict) -> torch.Tensor:
    """Bool [batch, 1, q_length, kv_length]. With one query this is O(seqlen) and read as a range of keys, not as
    dense."""
    mask = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    return hf_layout.adopt(mask)


def _padding(attention_mask: torch.Tensor, kv_offset: int, kv_length: int) -> torch.Tensor:
    """Bool [batch, kv_length]: the part of the padding mask that the keys of this layer are; beyond its end is
    padding."""
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    return hf_layout.adopt(padding[:, kv_offset : kv_offset + kv_length])


def _bidirectional(
    batch_size, q_length, kv_length, kv_offset, attention_mask, local_size, dense
) -> torch.Tensor | None:
    if attention_mask is None:
        return None
    padding = _padding(attention_mask, kv_offset, kv_length)
    if hf_layout.values_are_readable(padding) and hf_layout.key_ranges(padding).uniform == (0, kv_length):
        return None
    if local_size is None or q_length == 1:
        # Four dimensions say by themselves that no causal mask belongs on top: T5's cross-attention modules, for one,
        # do not say so.
        return hf_layout.view_with_memo(padding, padding[:, None, None, :])
    if hf_layout.values_are_readable(padding) and hf_layout.key_ranges(padding).has_holes:
        return _dense(dense)
    return padding if q_length == kv_length else _dense(dense)


def _causal(names: set[str], attention_mask, local_size, dense) -> torch.Tensor | None:
    batch_size, q_length, kv_length = dense["batch_size"], dense["q_length"], dense["kv_length"]
    q_offset, kv_offset = dense["q_offset"], dense["kv_offset"]
    if isinstance(q_offset, torch.Tensor):
        # Static caches count their tokens in a tensor. The kernel reads keys up to a length known to Python, so either
        # look (one synchronisation per forward), or describe the keys of a single query by values: the compiled decode.
        if not hf_layout.values_are_readable(q_offset):
            return _dense(dense)
        q_offset = int(q_offset)
    # Keys past the last query are seen by nobody: the unused end of a static cache.
    num_keys = q_offset + q_length - kv_offset
    if num_keys > kv_length:
        return _dense(dense)
    padding = None
    if attention_mask is not None:
        padding = _padding(attention_mask, kv_offset, num_keys)
        if hf_layout.values_are_readable(padding):
            ranges = hf_layout.key_ranges(padding)
            if ranges.has_holes:
                return _dense(dense)
            if ranges.uniform == (0, num_keys):
                padding = None
    if _CHUNKED in names and kv_offset + num_keys > (local_size or 0):
        return _segments(dense) if padding is None and q_length == num_keys else _dense(dense)
    if _PACKED in names and attention_mask is None:
        if q_length == num_keys == kv_length:
            return _segments(dense)
        if not torch.compiler.is_compiling():
            return _dense(dense)  # Transformers packs without a cache only; while compiling the name is a guess
    if padding is not None or num_keys == kv_length:
        return padding
    return hf_layout.adopt(torch.ones(batch_size, num_keys, dtype=torch.bool, device=dense["device"]))


def _segments(dense: dict) -> torch.Tensor:
    """Int32 [batch, seqlen]: a new number wherever a query does not see the key before it. O(seqlen), and traceable."""
    batch, head, query, key = (
        torch.arange(dense["batch_size"], device=dense["device"])[:, None],
        torch.zeros(1, 1, dtype=torch.long, device=dense["device"]),
        torch.arange(1, dense["q_length"], device=dense["device"])[None],
        torch.arange(dense["q_length"] - 1, device=dense["device"])[None],
    )
    is_same = dense["mask_function"](batch, head, query, key).expand(dense["batch_size"], -1)
    number = (~is_same).cumsum(-1, dtype=torch.int32) + 1
    return hf_layout.adopt(torch.nn.functional.pad(number, (1, 0), value=1))
