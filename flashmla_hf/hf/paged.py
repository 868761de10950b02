"""The caches of continuous batching (``generate_batch``), in every supported release of Transformers.

The batch is one row of tokens, and boundaries separate its sequences. Which code writes the new keys to the paged cache and
gathers the keys of all sequences depends on the release:

* 5.17: the attention function, with a cache that takes and returns its own shapes; lengths are named ``max_seqlen_*``.
* 5.23: the attention function, with a cache that also picks this layer's boundaries out of ``cu_seq_lens_k``.
* 5.24: the layer, before it calls the attention function, which gets the gathered keys and their boundaries.

In decoding Transformers may pass a block table in place of the indices that gather keys (:func:`pages`): from 5.23 on, on a
GPU, by the name ``flashmla/flash-attn3``. It does so only if it finds a ``flash_attn_with_kvcache`` under the
model's name (:mod:`transformers_private`). A block table of 5.17 raises an error.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from transformers.generation.continuous_batching import PagedAttentionCache

# The arguments of continuous batching that have no meaning in any other call.
_ARGUMENTS = ("cache", "read_index", "write_index", "block_table", "k_cache", "v_cache")


class Gathered(NamedTuple):
    """All keys and values of a batch [1, heads_kv, total_kv, dim], their boundaries [num_sequences + 1], and the
    longest sequences of queries and keys."""

    key: torch.Tensor
    value: torch.Tensor
    cu_seq_lens_k: torch.Tensor
    max_length_q: int | None
    max_length_k: int | None


class Pages(NamedTuple):
    """Where the keys of a decoding step lie: caches [num_pages, page_size, heads_kv, dim], block_table int32
    [num_sequences, pages of a sequence], and cache_seqlens int32 [num_sequences], without the new token of each sequence
    (-1 for a sequence that only fills the batch)."""

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_table: torch.Tensor
    cache_seqlens: torch.Tensor


def pages(module, key, value, cu_seq_lens_k, max_length_k, kwargs: dict) -> Pages | None:
    """The pages of a decoding step with a block table; ``None`` for every other call.

    Args:
        key, value: [1, heads_kv, num_sequences, dim], a new token of each sequence, which is not in the cache yet.
        kwargs: the other arguments of the attention function; those of continuous batching are taken out.
    """
    cache = kwargs.get("cache")
    if kwargs.get("block_table") is None or (cache is None and kwargs.get("v_cache") is None):
        return None
    if cache is not None and not _updates_arguments(cache):
        return None  # 5.17: gather() refuses it
    given = {name: kwargs.pop(name, None) for name in (*_ARGUMENTS, "max_seqlen_q", "max_seqlen_k")}
    if cache is not None and given["v_cache"] is None:  # 5.23: the layer has not asked the cache
        updated = {**given, "cu_seq_lens_k": cu_seq_lens_k, "max_length_k": max_length_k}
        cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=updated)
        given, cu_seq_lens_k = updated, updated["cu_seq_lens_k"]
    if not isinstance(cu_seq_lens_k, torch.Tensor):
        raise ValueError(
            f"flashmla in {type(module).__name__}: cu_seq_lens_k: expected the boundaries of this layer's keys, got "
            f"{type(cu_seq_lens_k).__name__}. Set max_blocks_per_request=0 in ContinuousBatchingConfig, which switches block "
            "tables off"
        )
    num_sequences = key.shape[2]
    lengths = cu_seq_lens_k[1 : num_sequences + 1] - cu_seq_lens_k[:num_sequences] - 1
    return Pages(given["k_cache"], given["v_cache"], given["block_table"][:num_sequences], lengths.to(torch.int32))


def _updates_arguments(cache) -> bool:
    """Whether the cache's update writes what a layer needs into the arguments that it is given (from 5.23 on)."""
    return "kwargs" in inspect.signature(cache.update).parameters


def gather(module, key, value, cu_seq_lens_k, max_length_q, max_length_k, kwargs: dict) -> Gathered | None:
    """The keys and values of a call of continuous batching; ``None`` for every other call.

    Args:
        key, value: [1, heads_kv, new tokens, dim], or all of them if the layer has updated its cache.
        kwargs: the other arguments of the attention function; those of continuous batching are taken out.
    """
    if not isinstance(kwargs.get("cache"), PagedAttentionCache):
        kwargs.pop("cache", None)  # an ordinary one, which the layer has updated
    if all(kwargs.get(name) is None for name in _ARGUMENTS):
        return None
    given = {name: kwargs.pop(name, None) for name in (*_ARGUMENTS, "max_seqlen_q", "max_seqlen_k")}
    _refuse_block_table(module, given)
    cache, longest_q, longest_k = given["cache"], given["max_seqlen_q"], given["max_seqlen_k"]
    max_length_q = max_length_q if longest_q is None else longest_q
    max_length_k = max_length_k if longest_k is None else longest_k
    if cache is None:
        if not isinstance(cu_seq_lens_k, torch.Tensor):
            raise ValueError(
                f"flashmla in {type(module).__name__}: cu_seq_lens_k: expected the boundaries of this layer's keys, "
                f"got {type(cu_seq_lens_k).__name__}. The layer has not updated the cache of continuous batching. Use "
                "generate() for this model, or another attn_implementation"
            )
        return Gathered(key, value, cu_seq_lens_k, max_length_q, max_length_k)

    indices = {"read_index": given["read_index"], "write_index": given["write_index"]}
    if _updates_arguments(cache):
        updated = {"cu_seq_lens_k": cu_seq_lens_k, "max_length_k": max_length_k, **indices}
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=updated)
        return Gathered(key, value, updated["cu_seq_lens_k"], max_length_q, updated["max_length_k"])

    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, **indices)
    # [total_kv, heads_kv, dim] -> [1, heads_kv, total_kv, dim]
    key, value = (x.transpose(0, 1)[None] for x in (key, value))
    kind = "sliding_attention" if getattr(module, "sliding_window", None) else "full_attention"
    cu_seq_lens_k, max_length_k = (x[kind] if isinstance(x, dict) else x for x in (cu_seq_lens_k, max_length_k))
    return Gathered(key, value, cu_seq_lens_k, max_length_q, max_length_k)


def _refuse_block_table(module, given: dict) -> None:
    for name in ("block_table", "k_cache", "v_cache"):
        if given[name] is not None:
            raise ValueError(
                f"flashmla in {type(module).__name__}: {name}: expected none, got one. This attention reads gathered "
                "keys. Set max_blocks_per_request=0 in ContinuousBatchingConfig, which switches block tables off"
            )
