"""Finds the modules that the patches replace, by structure and not by model class, and refuses by name what it cannot find.

Nothing here knows a model. A causal language model has output embeddings and a decoder. A decoder has ``layers``. A layer has
an attention block (a child with query, key and value projections) and a token-wise block (``mlp`` and its synonyms).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flashmla_hf.hf.names import NAMES
from flashmla_hf.patches import forwards

ATTENTION_PROJECTIONS = ({"q_proj", "k_proj", "v_proj"}, {"qkv_proj"}, {"query_key_value"}, {"W_pack"})
# Children and sizes of multi-head latent attention (DeepSeek-V2 and its kin).
LATENT_PROJECTIONS = ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj")
LATENT_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
CACHE_NAMES = ("cache", "past_key_values")  # the argument's name since Transformers 5.24, and before
MLP_NAMES = ("mlp", "block_sparse_moe", "feed_forward")
NEEDS_CHECKPOINTING = ("keep_attention", "offload")  # patches that change what checkpointed layers do


class PatchError(ValueError):
    """A model or a combination of patches cannot be patched. The message names the place, what was expected, and a remedy."""


class UnsupportedPatch(PatchError):
    """One patch does not support one model: ``patch`` is its name, ``reason`` says what was expected and what was found."""

    def __init__(self, message: str, patch: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.patch, self.reason = patch, reason


def refuse(model: nn.Module, patch: str, module: str, expected: str, got: str) -> UnsupportedPatch:
    """The error that ``module`` of ``model`` is not what ``patch`` needs. The caller raises it."""
    reason = f"{module}: expected {expected}, got {got}"
    where = f"flashmla_hf.patch({type(model).__name__})"
    return UnsupportedPatch(
        f"{where}: patch {patch!r} does not support this model: {reason}. {exclude(patch)}", patch, reason
    )


def exclude(patch: str) -> str:
    """The sentence that tells how to do without ``patch``, and without the patches that need it."""
    names = [patch, *(NEEDS_CHECKPOINTING if patch == "checkpointing" else ())]
    return f"Exclude it: flashmla_hf.patch(model, exclude={names})"


@dataclass(frozen=True)
class Layer:
    """One decoder layer with its two blocks and their names. A block is ``None`` if no child looks like it."""

    name: str
    module: nn.Module
    attention_name: str | None
    attention: nn.Module | None
    mlp_name: str | None
    mlp: nn.Module | None


def peft_layer(name: str, module: str = "layer") -> type | None:
    """The class ``peft.tuners.lora.<module>.<name>``. ``None`` if nobody imported peft: then the model has no adapters."""
    return getattr(sys.modules.get(f"peft.tuners.lora.{module}"), name, None)


def base_model(model: nn.Module) -> nn.Module:
    """The ``PreTrainedModel`` itself: the one inside a ``PeftModel``. Any other wrapper is refused."""
    from transformers import PreTrainedModel

    get_base_model: Callable[[], nn.Module] | None = getattr(model, "get_base_model", None)
    inner = model if get_base_model is None else get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise PatchError(
            f"flashmla_hf.patch({type(model).__name__}): expected a transformers.PreTrainedModel or a peft.PeftModel, got "
            f"{type(inner).__module__}.{type(inner).__name__}. Call patch before the model is wrapped (compile, DDP, FSDP)"
        )
    return inner


def uses_flashmla(module: object) -> bool:
    """Whether the configuration of ``module`` selects this package's attention."""
    return implementation_of(module) in NAMES


def implementation_of(module: object) -> str | None:
    """``attn_implementation`` of ``module``, as its configuration holds it."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def decoder(model: Any, patch: str) -> Any:
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
    """The attention block of ``layer``. If there is none, the error names the layer's children."""
    if layer.attention is None:
        raise refuse(
            model, patch, f"{layer.name} ({type(layer.module).__name__})",
            "a child with q_proj, k_proj and v_proj, or with one fused projection",
            ", ".join(f"{name}: {type(child).__name__}" for name, child in layer.module.named_children()),
        )  # fmt: skip
    return layer.attention


def latent_attentions(model: nn.Module, patch: str) -> dict[str, Any]:
    """Every block of multi-head latent attention by its name in ``model``; refused if there is none."""
    found = {
        name: module
        for name, module in model.named_modules()
        if all(isinstance(getattr(module, part, None), nn.Module) for part in LATENT_PROJECTIONS)
        and all(isinstance(getattr(module, size, None), int) for size in LATENT_SIZES)
    }
    if not found:
        expected = f"attention blocks with {', '.join(LATENT_PROJECTIONS)} (multi-head latent attention)"
        raise refuse(model, patch, "modules", expected, "none")
    return found


def output_embeddings(model: Any, patch: str) -> nn.Linear:
    """The linear layer that computes the logits. If peft keeps a trained copy of it (``modules_to_save``), that copy."""
    head = model.get_output_embeddings()
    if head is None:
        raise refuse(model, patch, "get_output_embeddings()", "the linear layer of a causal language model", "none")
    copies = getattr(head, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):
        head = copies[head.active_adapter if isinstance(head.active_adapter, str) else head.active_adapters[0]]
    if type(head) is not nn.Linear:
        raise refuse(model, patch, "get_output_embeddings()", "a torch.nn.Linear", type(head).__name__)
    return head


def hidden_width(model: nn.Module, patch: str) -> int | None:
    """Elements of a hidden state between the decoder layers, as the decoder's configuration states it, or ``None``."""
    config = getattr(decoder(model, patch), "config", None)
    width = getattr(config, "hidden_size", None)
    return width if isinstance(width, int) else None


def cache_name(module: nn.Module) -> str:
    """The name of the argument of ``module``'s forward that takes a cache: one of :data:`CACHE_NAMES`."""
    parameters = forwards.parameters_of(module)
    return next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[-1])


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The cache among keyword arguments, under either name. ``None`` if there is none."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def row_width(module: nn.Module) -> int:
    """Elements per token of the widest intermediate of ``module`` (per expert): the widest side of a linear layer or expert.

    A quantized linear layer has packed weights and keeps its sizes as attributes.
    """
    linear: list[Any] = [m for m in module.modules() if hasattr(m, "in_features") and hasattr(m, "out_features")]
    widths = [max(m.in_features, m.out_features) for m in linear]
    widths += [max(p.shape[-2:]) for p in module.parameters() if p.dim() == 3]
    return max(widths, default=1)


def saved_elements(layer: Layer) -> int | None:
    """At most so many elements per token are saved for backward by a decoder layer without a checkpoint.

    They are estimated by the sides of its linear layers, once for the input and once for the result. The norms' results, the
    residuals and fp32 copies of them are eight hidden vectors more, the activation in the MLP is one more of its width, and
    adapters save their input and a copy in fp32. ``None`` for a layer with experts or without linear layers in its MLP.
    """
    linear: list[Any] = [m for m in layer.module.modules() if hasattr(m, "in_features") and hasattr(m, "out_features")]
    adapted = [m for m in linear if hasattr(m, "lora_A")]
    inside = {id(part) for m in adapted for part in m.modules() if part is not m}
    if layer.mlp is None or layer.attention is None or any(p.dim() == 3 for p in layer.module.parameters()):
        return None
    mlp = [m for m in linear if id(m) not in inside and id(m) in {id(part) for part in layer.mlp.modules()}]
    if not mlp:
        return None
    widths = [m.in_features + m.out_features for m in linear if id(m) not in inside]
    adapters = sum(3 * m.in_features + m.out_features for m in adapted)
    hidden = max(min(m.in_features, m.out_features) for m in mlp)
    return sum(widths) + 8 * hidden + 2 * row_width(layer.mlp) + adapters


def attention_width(attention: nn.Module) -> int:
    """Elements per token of the attention's output before its output projection."""
    heads = getattr(getattr(attention, "config", None), "num_attention_heads", None)
    dim = getattr(attention, "head_dim", None)
    return heads * dim if heads and dim else row_width(attention)


def bytes_of(x: torch.Tensor) -> int:
    """Bytes of the elements of ``x``."""
    return x.numel() * x.element_size()
