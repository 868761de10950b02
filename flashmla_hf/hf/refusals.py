"""What a layer's call of our attention may not ask for, and the errors that say so."""

from __future__ import annotations

from typing import NoReturn

import torch

from flashmla_hf.hf import check, transformers_private
from flashmla_hf.hf.fp8_layers import CROSS_ATTENTION


def refuse_unknown(module: torch.nn.Module, kwargs: dict) -> None:
    """Raises for an argument that eager attention would honour, or that the layer passes in eager's place.

    Every other argument was given to the model for another part of it: Transformers passes it down to all layers, and eager's
    attention function ignores it.
    """
    for name, given in kwargs.items():
        if given is not None and check.is_about_attention(type(module), name):
            model = transformers_private.attribute(getattr(module, "config", None), "model_type") or "unknown"
            raise ValueError(
                f"flashmla: {type(module).__name__} of model type {model!r} passed an unsupported argument {name!r}. It may "
                "change the result (sparse models pass their selected keys this way), so it is not ignored. Use "
                'attn_implementation="eager" or "sdpa" for this model, or leave the argument out of the call'
            )


def refuse_half_of_boundaries(module: torch.nn.Module, missing: str) -> NoReturn:
    given = "cu_seq_lens_q" if missing == "cu_seq_lens_k" else "cu_seq_lens_k"
    raise ValueError(
        f"flashmla in {type(module).__name__}: {missing}: expected a tensor, since {given} is given (pass both or neither; "
        "DataCollatorWithFlattening(return_flash_attn_kwargs=True) makes them), got None"
    )


def refuse_mask_of_other_keys(module: torch.nn.Module, masked: int, num_keys: int) -> NoReturn:
    """Raises for a 4-D mask of more or fewer keys than the layer has, as eager attention and SDPA do: it does not say which of
    them those are. The first, if a mask is too long; the last, if a layer has left its cache out."""
    raise ValueError(
        f"flashmla in {type(module).__name__}: attention_mask: expected a mask of the layer's {num_keys} keys, got one of "
        f"{masked}. Under gradient checkpointing a layer ignores past_key_values, which peft's prefix tuning passes: train "
        "without it. A mask of your own must be as long as keys and cache. A forward pass that raised leaves a cache of uneven "
        "layers: begin with an empty one"
    )


def refuse_parallel(module: torch.nn.Module, query: torch.Tensor, precision: str | None = None) -> None:
    subject = f"{'flashmla' if precision is None else 'flashmla_fp8'} in {type(module).__name__}"
    if type(query).__name__ == "DTensor":
        raise NotImplementedError(
            f"{subject}: query: expected a local tensor, got a DTensor. Use "
            'tp_plan="auto" or FSDP, which pass local tensors, or attn_implementation="sdpa"'
        )
    if transformers_private.context_parallel_is_active():
        raise NotImplementedError(
            f"{subject}: torch's context parallelism is active. It shards the sequence and "
            "replaces torch's SDPA only, so this attention would see one shard of the keys. Use "
            'attn_implementation="sdpa" inside context_parallel, or divide the sequence by Ulysses (accelerate: sp_size), with '
            'attn_implementation="flashmla/flash-attn3"'
        )


# The subject of a refusal and the way out.
FP8 = ("flashmla_fp8", 'attn_implementation="flashmla"')
FP8_CACHE = ("Fp8Cache", "DynamicCache")


def refuse_dense(
    module: torch.nn.Module, subject: str, way_out: str, dropout, position_bias, wants_weights, is_packed: bool = False
) -> NoReturn:
    """Raises for a call in fp8 that only a dense mask, or the weights themselves, would answer."""
    if wants_weights:
        got = "output_attentions=True"
    elif position_bias is not None:
        got = "a position_bias"
    elif dropout > 0.0:
        got = f"a dropout of {dropout}"
    elif is_packed:
        got = "cu_seq_lens_q and cu_seq_lens_k of a pass that reads the cache"
    else:
        got = "a mask that is not one of padding, packing, causality and windows (a padded row with holes, a custom 4-D mask)"
    raise NotImplementedError(
        f"{subject} in {type(module).__name__}: expected a call that fp8 covers, got {got}. Use {way_out}, which computes "
        "it exactly"
    )


def refuse_beyond_fp8_cache(module: torch.nn.Module, dropout, position_bias, wants_weights, cu_seq_lens) -> None:
    """Raises for a pass that reads an Fp8Cache and asks for more than its attention. ``cu_seq_lens``: the boundaries of queries
    and keys, or ``None``."""
    is_packed = any(x is not None for x in cu_seq_lens)
    if wants_weights or position_bias is not None or dropout > 0.0 or is_packed:
        refuse_dense(module, *FP8_CACHE, dropout, position_bias, wants_weights, is_packed)


def refuse_cache_of_both_attentions(module: torch.nn.Module) -> None:
    """Raises for cross-attention that reads its keys behind those of self-attention."""
    config = getattr(module, "config", None)
    if any(transformers_private.attribute(config, name) for name in ("is_encoder_decoder", "add_cross_attention")):
        raise RuntimeError(
            f"Fp8Cache in {type(module).__name__}: expected a cache of its own for cross-attention, got the keys of "
            f"self-attention in it. {CROSS_ATTENTION}"
        )


def refuse_window_of_cache(module: torch.nn.Module, num_keys: int) -> None:
    """Raises if rows are to be hidden by a cache that drops them, and by no mask: the layers of such a configuration slide in
    Transformers' caches, and an Fp8Cache keeps all rows."""
    config = getattr(module, "config", None)
    window, kinds = (transformers_private.attribute(config, name) for name in ("sliding_window", "layer_types"))
    if kinds is None and isinstance(window, int) and num_keys > window:
        raise NotImplementedError(
            f"Fp8Cache in {type(module).__name__}: expected masks with the configuration's sliding window of {window} tokens, "
            f"got {num_keys} keys without one: this model leaves it to a cache that drops rows. Use "
            "DynamicCache(config=model.config)"
        )


def refuse_latents_in_fp8(module: torch.nn.Module, precision: str | None) -> None:
    if precision is not None:
        raise NotImplementedError(
            f"flashmla_fp8 in {type(module).__name__}: expected keys and values, got latents, to which fp8 has no way. Use "
            'attn_implementation="flashmla", or flashmla_hf.unpatch(model)'
        )


def refuse_pages_in_fp8(module: torch.nn.Module, precision: str | None) -> None:
    if precision is not None:
        raise NotImplementedError(
            f"flashmla_fp8 in {type(module).__name__}: expected gathered keys, got a block table: fp8 reads no pages. Set "
            'max_blocks_per_request=0 in ContinuousBatchingConfig, or use attn_implementation="flashmla"'
        )
