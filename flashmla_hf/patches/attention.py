"""Patch "attention" runs the attention block over chunks of the sequence, for plain causal batches.

The block's own forward runs on one chunk of tokens after the other. A cache gives it the keys and values of all tokens so far.
That is exact because the causal mask is aligned at the end, with sliding windows too. Queries, outputs and their gradients
exist for one chunk at a time; the keys and values of all tokens are kept once.

Backward visits the chunks from the last to the first and runs each again. A chunk gives gradients to the keys and values of its
prefix, which are summed in fp32. When backward reaches a chunk, every later one has added its share, and the sum flows on into
the chunk's key and value projections.

The cost is one more attention forward per layer (in a checkpointed layer the third), so the patch is not a default.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn

from flashmla_hf.hf import boundaries, check, masks
from flashmla_hf.patches import forwards, gradients, structure, tiles, weights
from flashmla_hf.patches.replacements import Replacements
from flashmla_hf.torch_state import is_traced_or_transformed

CHUNK = 16384
# Arguments of a block that a chunk gets its part of, or does without; and those that mean the same for a chunk.
TENSORS = ("position_embeddings", "attention_mask", "position_ids")
CHUNK_ARGUMENTS = {"use_cache", "output_attentions", "is_causal", "output_router_logits", "num_items_in_batch"}


class _Prefix:
    """Takes the place of a cache: keys and values [batch, heads_kv, seqlen, dim] of all tokens, written chunk by chunk.

    With ``keys`` and ``values`` it is the prefix of the second run: :meth:`update` then returns leaves of the chunk's graph.
    """

    def __init__(self, seqlen: int, keys: torch.Tensor | None = None, values: torch.Tensor | None = None) -> None:
        self.seqlen, self.start = seqlen, 0
        self.keys, self.values = keys, values
        self.is_complete = keys is not None
        # Of the second run: the chunk's own keys and values, and those of its whole prefix.
        self.chunk: tuple[torch.Tensor, ...] = ()
        self.leaves: tuple[torch.Tensor, ...] = ()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, ...]:
        """Keys and values of the prefix that ends with this chunk, as Transformers' caches return them."""
        end = self.start + key_states.shape[2]
        if self.keys is None or self.values is None:
            self.keys, self.values = (
                x.new_empty((*x.shape[:2], self.seqlen, x.shape[3])) for x in (key_states, value_states)
            )
        prefix = [x[:, :, :end] for x in (self.keys, self.values)]
        if self.is_complete:
            self.chunk = (key_states, value_states)
            self.leaves = tuple(x.detach().requires_grad_() for x in prefix)
            return self.leaves
        for buffer, x in zip(prefix, (key_states, value_states), strict=True):
            buffer[:, :, self.start :] = x
        return tuple(prefix)


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, run: tiles.Run, chunk: int, *parameters: nn.Parameter
    ) -> torch.Tensor | None:
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
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.run.unchanged.check()
        x, keys, values = ctx.saved_tensors
        prefix = _Prefix(x.shape[1], keys, values)
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
            trained_kv = [i for i in (0, 1) if prefix.chunk[i].requires_grad]
            # First through the queries, and to the keys and values of the prefix. Then through the chunk's own keys and values:
            # with a fused projection both use one graph.
            grads = torch.autograd.grad(
                out, [*prefix.leaves, *inputs], grad[:, tokens], retain_graph=bool(trained_kv), allow_unused=True
            )
            del out
            for total, g in zip(grad_prefix, grads[:2], strict=True):
                total[:, :, : g.shape[2]] += g
            shares = [list(grads[2:])]
            del grads
            if trained_kv:
                shares.append(
                    list(
                        torch.autograd.grad(
                            [prefix.chunk[i] for i in trained_kv],
                            inputs,
                            [grad_prefix[i][:, :, tokens].to(keys.dtype) for i in trained_kv],
                            allow_unused=True,
                        )
                    )
                )
            prefix.chunk = prefix.leaves = ()
            if grad_x is not None:
                parts = [g for g in (share.pop(0) for share in shares) if g is not None]
                grad_x[:, tokens] = sum(parts[1:], parts[0])
            for share in shares:
                tiles.add_to(sums, share)
        return (grad_x, None, None, *tiles.cast_sums(sums, ctx.parameters, needs))


def patch_attention(model: nn.Module, replacements: Replacements, chunk: int | None) -> None:
    """Replaces ``forward`` of every attention block. ``chunk`` is in tokens; ``None`` is :data:`CHUNK`."""
    decoder = structure.decoder(model, "attention")
    if not structure.uses_flashmla(decoder):
        raise structure.refuse(
            model,
            "attention",
            "attn_implementation",
            "'flashmla' (its causal mask is aligned at the end)",
            repr(structure.implementation_of(decoder)),
        )
    for layer in structure.decoder_layers(model, "attention"):
        attention = structure.attention_of(model, layer, "attention")
        name = f"{layer.name}.{layer.attention_name}"
        if not getattr(attention, "is_causal", False):
            raise structure.refuse(
                model,
                "attention",
                f"{name} ({type(attention).__name__})",
                "causal attention",
                "bidirectional attention",
            )
        if (reason := _no_chunks(attention)) is not None:
            raise structure.refuse(model, "attention", f"{name} ({type(attention).__name__})", *reason)
        weights.refuse_trained_partition(model, "attention", name, attention)
        replacements.set(attention, "forward", _chunked(attention, name, chunk or CHUNK))


def _no_chunks(attention: nn.Module) -> tuple[str, str] | None:
    """(expected, got) if the forward of ``attention`` does not take what a chunk needs, by its parameters; else ``None``."""
    parameters = forwards.parameters_of(attention)
    caches = " or ".join(map(repr, structure.CACHE_NAMES))
    if not any(name in parameters for name in structure.CACHE_NAMES):
        return f"a forward that takes a cache as {caches}", ", ".join(parameters)
    if "position_embeddings" not in parameters:
        return "a forward that takes position_embeddings", ", ".join(parameters)
    named = [name for name, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    # The first one is the hidden states, whatever its name.
    if others := [name for name in named[1:] if name not in {*TENSORS, *structure.CACHE_NAMES, *CHUNK_ARGUMENTS}]:
        return "a forward without arguments of its own, which may differ from chunk to chunk", ", ".join(others)
    return None


def _chunked(attention: nn.Module, name: str, chunk: int) -> Callable[..., tuple]:
    """A forward for the block ``attention`` over hidden states [batch, seqlen, hidden], ``chunk`` tokens at a time."""
    forward, cache_name = attention.forward, structure.cache_name(attention)
    hidden_name, *names = forwards.parameters_of(attention)
    takes_positions = "position_ids" in names

    @wraps(forward)
    def chunked_forward(*args: Any, **kwargs: Any) -> tuple:
        kwargs = dict(zip((hidden_name, *names), args, strict=False)) | kwargs
        hidden_states = kwargs.pop(hidden_name)
        position_embeddings, attention_mask = (kwargs.pop(name, None) for name in TENSORS[:2])
        is_whole = hidden_states.shape[1] <= chunk or not torch.is_grad_enabled() or is_traced_or_transformed()
        if is_whole:
            return forward(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                **kwargs,
            )
        gradients.refuse_arguments_by_hook(attention, "attention")
        weights.refuse_trained_partition(attention, "attention", name, attention)
        position_ids, cache = kwargs.pop("position_ids", None), structure.cache_of(kwargs)
        for either in structure.CACHE_NAMES:
            kwargs.pop(either, None)
        _refuse_unless_plain_causal(attention, name, hidden_states, attention_mask, cache, position_ids, kwargs)

        def on_chunk(piece: torch.Tensor, start: int, prefix: _Prefix) -> torch.Tensor:
            tokens = slice(start, start + piece.shape[1])
            positions = {} if position_ids is None or not takes_positions else {"position_ids": position_ids[:, tokens]}
            return forward(
                piece,
                # A layer that rotates nothing gets none.
                position_embeddings=position_embeddings and tuple(x[:, tokens] for x in position_embeddings),
                attention_mask=None,
                **{cache_name: prefix},
                **positions,
                **kwargs,
            )[0]

        parameters = [p for p in attention.parameters() if p.requires_grad]
        run = tiles.Run(attention, on_chunk, hidden_states.device)
        return _Chunks.apply(hidden_states, run, chunk, *parameters), None

    return chunked_forward


def _refuse_unless_plain_causal(
    attention: nn.Module,
    name: str,
    hidden_states: torch.Tensor,
    mask: torch.Tensor | None,
    cache: Any,
    position_ids: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> None:
    batch, seqlen = hidden_states.shape[:2]
    reason = None
    if not structure.uses_flashmla(attention):  # it was set after patch
        implementation = structure.implementation_of(attention)
        reason = f"attn_implementation={implementation!r} (its causal mask is aligned at the beginning)"
    elif cache is not None:
        reason = "a cache (use_cache=False in training)"
    elif mask is not None and not _hides_nothing(attention, mask, seqlen):
        reason = "an attention mask (padding or packed documents)"
    elif position_ids is not None and boundaries.segments_from_positions(position_ids, batch, seqlen, True) is not None:
        reason = "packed documents (position_ids that restart)"
    elif attention.training and _rate(attention) > 0.0:
        reason = "attention_dropout"
    elif gradients.has_dropout(attention):
        reason = "a dropout layer"
    else:
        unknown = [k for k, v in kwargs.items() if v is not None and k not in CHUNK_ARGUMENTS]
        reason = f"the arguments {', '.join(unknown)}" if unknown else None
    if reason is not None:
        raise structure.PatchError(
            f"flashmla_hf.patch: patch 'attention': {name} ({type(attention).__name__}): expected a plain causal "
            f"batch, got {reason}. {structure.exclude('attention')}"
        )


def _rate(attention: nn.Module) -> float:
    """The probability by which ``attention`` drops scores; 0 if it is that of a dropout layer, which ``has_dropout`` sees."""
    rate = getattr(attention, "attention_dropout", 0.0)
    return float(rate) if isinstance(rate, (int, float)) else 0.0


def _hides_nothing(attention: nn.Module, mask: torch.Tensor, seqlen: int) -> bool:
    """Whether ``mask`` equals the one that ``attention`` applies in a call without a mask: causal, with its window."""
    pattern = masks.pattern_of(mask)
    if pattern is None or mask.shape[2:] != (seqlen, seqlen):
        return False
    applies_window = pattern.window is None or check.passes(type(attention), "sliding_window")
    return pattern.is_causal and applies_window and pattern.padding is None and pattern.segments is None
