"""Patch "attention": the attention block over chunks of the sequence, for plain causal batches.

The block's own forward runs on one chunk of tokens after the other, with a cache that gives it the keys and values of all
tokens so far: a causal mask aligned at the end makes that exact, with sliding windows too. Queries, outputs and their gradients
exist for a chunk at a time; the keys and values of all tokens are kept once.

Backward goes through the chunks from the last to the first and runs each again. A chunk gives gradients to the keys of its
prefix, summed in fp32; when a chunk's turn comes, every later one has added its share, and the sum goes on into the chunk's key
and value projections.

It costs one more attention forward per layer (in a checkpointed layer the third) and is not on by default.
"""

from __future__ import annotations

from functools import wraps

import torch
from torch import nn

from flashmla_hf.hf import boundaries, check, masks
from flashmla_hf.patches import gradients, structure, tiles
from flashmla_hf.patches.replacements import Replacements

CHUNK = 16384
# What a decoder layer passes on and chunks do not change.
PASSED_ON = {"use_cache", "output_attentions", "is_causal", "output_router_logits", "num_items_in_batch"}


class _Prefix:
    """In place of a cache: keys and values [batch, heads_kv, seqlen, dim] of all tokens, written as the chunks come."""

    def __init__(self, seqlen: int):
        self.seqlen, self.start = seqlen, 0
        self.keys = self.values = None
        self.given = self.leaves = None
        self.is_again = False

    def update(self, key_states, value_states, *args, **kwargs):
        end = self.start + key_states.shape[2]
        if self.keys is None:
            self.keys, self.values = (
                x.new_empty((*x.shape[:2], self.seqlen, x.shape[3])) for x in (key_states, value_states)
            )
        prefix = [x[:, :, :end] for x in (self.keys, self.values)]
        if self.is_again:  # everything is there already
            self.given = (key_states, value_states)
            self.leaves = tuple(x.detach().requires_grad_() for x in prefix)
            return self.leaves
        for buffer, x in zip(prefix, (key_states, value_states), strict=True):
            buffer[:, :, self.start :] = x
        return tuple(prefix)


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, run, chunk, *parameters):
        prefix = _Prefix(x.shape[1])
        out = None
        for start in range(0, x.shape[1], chunk):
            prefix.start = start
            piece = run(x[:, start : start + chunk], start, prefix)
            if out is None:
                out = piece.new_empty((*x.shape[:2], piece.shape[-1]))
            out[:, start : start + chunk] = piece
        ctx.save_for_backward(x, prefix.keys, prefix.values)
        ctx.run, ctx.chunk, ctx.parameters = run, chunk, parameters
        return out

    @staticmethod
    @gradients.first_derivatives
    def backward(ctx, grad):
        ctx.run.unchanged.check()
        x, keys, values = ctx.saved_tensors
        prefix = _Prefix(x.shape[1])
        prefix.keys, prefix.values, prefix.is_again = keys, values, True
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        trained = [p for p, need in zip(ctx.parameters, needs, strict=True) if need]
        grad_x = torch.empty_like(x) if needs_x else None
        sums: list[torch.Tensor | None] = [None] * len(trained)
        wide = torch.promote_types(keys.dtype, torch.float32)
        grad_prefix = [torch.zeros_like(b, dtype=wide) for b in (keys, values)]
        for start in reversed(range(0, x.shape[1], ctx.chunk)):
            tokens = slice(start, start + ctx.chunk)
            prefix.start = start
            piece = x[:, tokens].detach().requires_grad_(needs_x)
            with torch.enable_grad():
                out = ctx.run(piece, start, prefix)
            if start == 0:
                gradients.refuse_other_leaves(out, ctx.run.module, [piece, *prefix.leaves, *ctx.parameters])
            inputs = [piece, *trained] if needs_x else trained
            given = [i for i in (0, 1) if prefix.given[i].requires_grad]
            # Through the queries, and to the keys and values of the prefix. A fused projection's graph is needed once more.
            grads = torch.autograd.grad(
                out, [*prefix.leaves, *inputs], grad[:, tokens], retain_graph=bool(given), allow_unused=True
            )
            del out
            for total, g in zip(grad_prefix, grads[:2], strict=True):
                total[:, :, : g.shape[2]] += g
            shares = [list(grads[2:])]
            del grads
            if given:
                shares.append(
                    list(
                        torch.autograd.grad(
                            [prefix.given[i] for i in given],
                            inputs,
                            [grad_prefix[i][:, :, tokens].to(keys.dtype) for i in given],
                            allow_unused=True,
                        )
                    )
                )
            prefix.given = prefix.leaves = None
            if needs_x:
                parts = [g for g in (share.pop(0) for share in shares) if g is not None]
                grad_x[:, tokens] = sum(parts[1:], parts[0])
            for share in shares:
                tiles.add_to(sums, share)
        found = iter(s if s is None else s.to(p.dtype) for s, p in zip(sums, trained, strict=True))
        return (grad_x, None, None, *(next(found) if need else None for need in needs))


def patch_attention(model: nn.Module, replacements: Replacements, chunk: int | None) -> None:
    """Replaces ``forward`` of every attention block. ``chunk``: tokens, ``None`` is :data:`CHUNK`."""
    implementation = structure.decoder(model, "attention").config._attn_implementation
    if implementation not in structure.OURS:
        raise structure.refuse(
            model,
            "attention",
            "attn_implementation",
            "'flashmla' (its causal mask is aligned at the end)",
            repr(implementation),
        )
    for layer in structure.decoder_layers(model, "attention"):
        attention = structure.attention_of(model, layer, "attention")
        name = f"{layer.name}.{layer.attention_name}"
        if not getattr(attention, "is_causal", False):
            raise structure.refuse(
                model, "attention", f"{name} ({type(attention).__name__})", "is_causal", "another attention"
            )
        replacements.set(attention, "forward", _chunked(attention, name, chunk or CHUNK))


def _chunked(attention: nn.Module, name: str, chunk: int):
    forward, cache_name = attention.forward, structure.cache_name(attention)

    @wraps(forward)
    def chunked_forward(hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        is_whole = hidden_states.shape[1] <= chunk or not torch.is_grad_enabled() or torch.compiler.is_compiling()
        if is_whole:
            return forward(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                **kwargs,
            )
        gradients.refuse_arguments_by_hook(attention, "attention")
        position_ids, cache = kwargs.pop("position_ids", None), structure.cache_of(kwargs)
        for either in structure.CACHE_NAMES:
            kwargs.pop(either, None)
        _refuse_what_chunks_cannot(attention, name, hidden_states, attention_mask, cache, position_ids, kwargs)
        cos, sin = position_embeddings

        def on_chunk(piece, start, prefix):
            tokens = slice(start, start + piece.shape[1])
            return forward(
                piece,
                position_embeddings=(cos[:, tokens], sin[:, tokens]),
                attention_mask=None,
                **{cache_name: prefix},
                **kwargs,
            )[0]

        parameters = [p for p in attention.parameters() if p.requires_grad]
        run = tiles.Run(attention, on_chunk, hidden_states.device)
        return _Chunks.apply(hidden_states, run, chunk, *parameters), None

    return chunked_forward


def _refuse_what_chunks_cannot(attention, name, hidden_states, mask, cache, position_ids, kwargs) -> None:
    batch, seqlen = hidden_states.shape[:2]
    reason = None
    implementation = getattr(getattr(attention, "config", None), "_attn_implementation", None)
    if implementation not in structure.OURS:  # set after patch
        reason = f"attn_implementation={implementation!r} (its causal mask is aligned at the beginning)"
    elif cache is not None:
        reason = "a cache (use_cache=False in training)"
    elif mask is not None and not _hides_nothing(attention, mask, seqlen):
        reason = "an attention mask (padding or packed documents)"
    elif position_ids is not None and boundaries.segments_from_positions(position_ids, batch, seqlen, True) is not None:
        reason = "packed documents (position_ids that restart)"
    elif getattr(attention, "attention_dropout", 0.0) > 0.0 and attention.training:
        reason = "attention_dropout"
    elif gradients.has_dropout(attention):
        reason = "a dropout layer"
    else:
        unknown = [k for k, v in kwargs.items() if v is not None and k not in PASSED_ON]
        reason = f"the arguments {', '.join(unknown)}" if unknown else None
    if reason is not None:
        raise structure.PatchError(
            f"flashmla_hf.patch: patch 'attention': {name} ({type(attention).__name__}): expected a plain causal "
            f"batch, got {reason}. Leave it out: patches=[...] without 'attention'"
        )


def _hides_nothing(attention: nn.Module, mask: torch.Tensor, seqlen: int) -> bool:
    """Whether ``mask`` says only what ``attention`` says by itself in a call without one: causal, and its window."""
    pattern = masks.pattern_of(mask)
    if pattern is None or mask.shape[2:] != (seqlen, seqlen):
        return False
    says_window = pattern.window is None or check.passes(type(attention), "sliding_window")
    return pattern.is_causal and says_window and pattern.padding is None and pattern.segments is None
