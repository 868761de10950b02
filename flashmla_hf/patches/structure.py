"""Finds what the patches replace, by structure and not by model class, and refuses by name what is not there.

Nothing here knows a model. A causal language model has output embeddings and a decoder; a decoder has ``layers``; a layer
has an attention block (a child with query, key and value projections) and a token-wise block (``mlp`` and its synonyms).
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass

import torch
from torch import nn

from flashmla_hf.hf.names import NAMES

ATTENTION_PROJECTIONS = ({"q_proj", "k_proj", "v_proj"}, {"qkv_proj"}, {"query_key_value"}, {"W_pack"})
OURS = NAMES  # as attn_implementation
CACHE_NAMES = ("cache", "past_key_values")  # of the argument: since Transformers 5.24, and before
MLP_NAMES = ("mlp", "block_sparse_moe", "feed_forward")


class PatchError(ValueError):
    """A model, or a combination of patches, that cannot be patched: names what was expected, where, and the way out."""


def refuse(model: nn.Module, patch: str, module: str, expected: str, got: str) -> PatchError:
    """The one form of a refusal; the caller raises it."""
    return PatchError(
        f"flashmla_hf.patch({type(model).__name__}): patch {patch!r} cannot be applied: {module}: expected {expected}, "
        f"got {got}. Leave it out: patches=[...] without {patch!r}"
    )


@dataclass(frozen=True)
class Layer:
    """One decoder layer and its two blocks, by name. ``mlp`` is ``None`` where no child has one of its names."""

    name: str
    module: nn.Module
    attention_name: str | None
    attention: nn.Module | None
    mlp_name: str | None
    mlp: nn.Module | None


def peft_layer(name: str) -> type | None:
    """The class ``peft.tuners.lora.<name>``; ``None`` where peft has none or was not imported: who has adapters has."""
    return getattr(sys.modules.get("peft.tuners.lora.layer"), name, None)


def base_model(model: nn.Module) -> nn.Module:
    """The ``PreTrainedModel`` itself: a ``PeftModel`` is opened, any other wrapper refused."""
    from transformers import PreTrainedModel

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, PreTrainedModel):
        raise PatchError(
            f"flashmla_hf.patch({type(model).__name__}): expected a transformers.PreTrainedModel or a peft.PeftModel, got "
            f"{type(inner).__module__}.{type(inner).__name__}. Patch the model before it is wrapped (compile, DDP, FSDP)"
        )
    return inner


def decoder(model: nn.Module, patch: str) -> nn.Module:
    """The module of ``model`` whose ``layers`` are decoder layers."""
    found = model.get_decoder()
    layers = getattr(found, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise refuse(
            model,
            patch,
            f"decoder {type(found).__name__}",
            "a ModuleList 'layers' of decoder layers",
            type(layers).__name__,
        )
    return found


def decoder_layers(model: nn.Module, patch: str) -> list[Layer]:
    """All decoder layers in order, with the attention block and the token-wise block of each."""
    names = {module: name for name, module in model.named_modules()}
    found = []
    for module in decoder(model, patch).layers:
        attention_name, attention = _attention(module)
        mlp_name = next((n for n in MLP_NAMES if isinstance(getattr(module, n, None), nn.Module)), None)
        mlp = getattr(module, mlp_name) if mlp_name else None
        found.append(Layer(names[module], module, attention_name, attention, mlp_name, mlp))
    return found


def _attention(layer: nn.Module) -> tuple[str | None, nn.Module | None]:
    for name, child in layer.named_children():
        children = {n for n, _ in child.named_children()}
        if any(projections <= children for projections in ATTENTION_PROJECTIONS):
            return name, child
    return None, None


def attention_of(model: nn.Module, layer: Layer, patch: str) -> nn.Module:
    """The attention block of ``layer``, or the refusal that names the layer's children."""
    if layer.attention is None:
        raise refuse(
            model, patch, f"{layer.name} ({type(layer.module).__name__})",
            "a child with q_proj, k_proj and v_proj, or with one fused projection",
            ", ".join(f"{name}: {type(child).__name__}" for name, child in layer.module.named_children()),
        )  # fmt: skip
    return layer.attention


def output_embeddings(model: nn.Module, patch: str) -> nn.Module:
    """The linear layer that makes logits; the trained copy in it where peft keeps one (``modules_to_save``)."""
    head = model.get_output_embeddings()
    copies = getattr(head, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):
        head = copies[head.active_adapter if isinstance(head.active_adapter, str) else head.active_adapters[0]]
    if type(head) is not nn.Linear:
        raise refuse(model, patch, "get_output_embeddings()", "a torch.nn.Linear", type(head).__name__)
    return head


def cache_name(module: nn.Module) -> str:
    """The argument of ``module``'s forward that takes a cache: one of :data:`CACHE_NAMES`."""
    parameters = inspect.signature(inspect.unwrap(type(module).forward)).parameters
    return next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[-1])


def cache_of(arguments: dict):
    """The cache among keyword arguments, under either of its names."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def row_width(module: nn.Module) -> int:
    """Numbers per token in the widest intermediate of ``module`` (per expert): the widest side of a linear layer or expert.

    Quantized linear layers keep their sizes as attributes; their weights are packed.
    """
    linear = [m for m in module.modules() if hasattr(m, "in_features") and hasattr(m, "out_features")]
    widths = [max(m.in_features, m.out_features) for m in linear]
    widths += [max(p.shape[-2:]) for p in module.parameters() if p.dim() == 3]
    return max(widths, default=1)


def attention_width(attention: nn.Module) -> int:
    """Numbers per token in the attention's output before its output projection."""
    heads = getattr(getattr(attention, "config", None), "num_attention_heads", None)
    dim = getattr(attention, "head_dim", None)
    return heads * dim if heads and dim else row_width(attention)


def bytes_of(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()
