"""The caches of continuous batching (``generate_batch``), in every supported release of Transformers."""

from __future__ import annotations

import inspect


def update(module, key, value, cache, cu_seq_lens_k, max_length_k, kwargs):
    """Continuous batching: writes key and value [1, heads_kv, new tokens, dim] to the cache and returns all the keys
    of the batch [1, heads_kv, total_kv, dim], their boundaries and longest sequences."""
    if kwargs.get("block_table") is not None:
        raise ValueError(
            f"flashmla in {type(module).__name__}: block_table: expected none; this attention reads gathered keys. "
            "Leave use_cuda_graph and the block-table decode path of continuous batching off"
        )
    read_index, write_index = kwargs.pop("read_index", None), kwargs.pop("write_index", None)
    kwargs.pop("block_table", None)
    longest_q, longest_k = kwargs.pop("max_seqlen_q", None), kwargs.pop("max_seqlen_k", None)  # names of 5.17
    if "kwargs" in inspect.signature(cache.update).parameters:
        updated = {
            "cu_seq_lens_k": cu_seq_lens_k, "max_length_k": max_length_k, "read_index": read_index,
            "write_index": write_index,
        }  # fmt: skip
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=updated)
        return key, value, updated["cu_seq_lens_k"], updated["max_length_k"], longest_q
    key, value = cache.update(
        key_states=key, value_states=value, layer_idx=module.layer_idx, read_index=read_index, write_index=write_index
    )
    kind = "sliding_attention" if getattr(module, "sliding_window", None) else "full_attention"
    if isinstance(cu_seq_lens_k, dict):
        cu_seq_lens_k = cu_seq_lens_k[kind]
    longest_k = max_length_k if longest_k is None else longest_k
    if isinstance(longest_k, dict):
        longest_k = longest_k[kind]
    # [total_kv, heads_kv, dim] -> [1, heads_kv, total_kv, dim]
    key, value = (x.transpose(0, 1)[None] for x in (key, value))
    return key, value, cu_seq_lens_k, longest_k, longest_q
