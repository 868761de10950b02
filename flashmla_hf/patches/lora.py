"""Patch "lora": a linear layer and its low-rank adapter share one result.

peft computes the adapter's part, scales it and adds it. That is three more tensors as wide as the result, each read and written
once, and the same for the gradient. In :mod:`linear` the product with B adds into the layer's result, and in backward into the
gradient of x, with the scale as the product's own factor. Base weights of bitsandbytes in 4 bits are unpacked for each product
(:mod:`quantized`); adapters in float32 beside a bfloat16 model keep their precision without float32 copies (:mod:`precision`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn

from flashmla_hf.patches import linear, quantized, structure
from flashmla_hf.patches.replacements import Replacements
from flashmla_hf.torch_state import is_traced_or_transformed


def adapted_layers(model: nn.Module) -> list[Any]:
    """Every ``peft.tuners.lora.Linear`` over a ``torch.nn.Linear``, and every one over a ``bitsandbytes.nn.Linear4bit``."""
    plain, packed = structure.peft_layer("Linear"), structure.peft_layer("Linear4bit", "bnb")
    return [
        m
        for m in model.modules()
        if (type(m) is plain and type(m.base_layer) is nn.Linear)
        or (type(m) is packed and quantized.is_4bit(m.base_layer))
    ]


def left_to_peft(model: Any) -> str | None:
    """The layers with adapters that the patch leaves to peft, for the report; ``None`` if there are none."""
    layer = structure.peft_layer("LoraLayer")
    if layer is None:
        return None
    ours = adapted_layers(model)
    ids = {id(m) for m in ours}
    others = [m for m in model.modules() if isinstance(m, layer) and id(m) not in ids]
    dtype = model.get_input_embeddings().weight.dtype
    slow = [m for m in ours if _computes_in_another(m.base_layer, dtype)]
    total, parts = len(ours) + len(others), []
    if others:
        bases = sorted({type(getattr(m, "base_layer", m)).__name__ for m in others})
        parts.append(f"{len(others)} of {total} layers with adapters stay peft's own: those over {', '.join(bases)}")
    if slow:
        parts.append(
            f"{len(slow)} of {total} layers with adapters stay peft's own: they compute in {slow[0].base_layer.compute_dtype} "
            f"beside a model in {dtype}. Load it with BitsAndBytesConfig(bnb_4bit_compute_dtype={dtype})"
        )
    return "; ".join(parts) or None


def _computes_in_another(base: Any, dtype: torch.dtype) -> bool:
    return quantized.is_4bit(base) and base.compute_dtype not in (None, dtype)


def patch_lora(model: nn.Module, replacements: Replacements) -> None:
    """Replaces ``forward`` of every one of :func:`adapted_layers` that has no forward of its own instance."""
    found = adapted_layers(model)
    if not found:
        others = left_to_peft(model)
        error = structure.refuse(
            model,
            "lora",
            "modules",
            "a peft.tuners.lora.Linear over a torch.nn.Linear or a bitsandbytes.nn.Linear4bit (call get_peft_model before "
            "patch)",
            others or "none",
        )
        if others is None:
            error.reason = "the model has no LoRA adapters"  # what a report says: most models have none, and need none
        raise error
    for module in (m for m in found if "forward" not in vars(m)):
        replacements.set(module, "forward", _adapted(module))


def _adapted(module: Any) -> Callable[..., torch.Tensor]:
    """A forward for ``module``, one of :func:`adapted_layers`."""
    forward = module.forward

    @wraps(forward)
    def adapted_forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter = None if args or kwargs or is_traced_or_transformed() else _only_adapter(module)
        if adapter is None:
            return forward(x, *args, **kwargs)
        base, (a, b) = module.base_layer, (part[adapter].weight for part in (module.lora_A, module.lora_B))
        dtype = linear.product_dtype(x, base)
        is_cast = linear.is_autocast(x) or a.dtype == b.dtype == dtype
        if dtype is None or not (is_cast or linear.adds_mixed(x, a, b)):
            return forward(x)  # several dtypes: peft casts
        return linear.apply(module, dtype, x, base.weight, base.bias, a, b, module.scaling[adapter])

    return adapted_forward


def _only_adapter(module: Any) -> str | None:
    """The one adapter that ``module`` adds now as a plain sum. ``None`` if peft does anything else."""
    if module.disable_adapters or module.merged:
        return None
    active = [name for name in module.active_adapters if name in module.lora_A]
    if len(active) != 1:
        return None
    name = active[0]
    # DoRA and its like are variants. A peft too old to have the attribute may still apply one, so it is left alone.
    if not hasattr(module, "lora_variant") or name in module.lora_variant:
        return None
    dropout = module.lora_dropout[name]
    if dropout.training and getattr(dropout, "p", 0.0) > 0.0:
        return None
    parts = module.base_layer, module.lora_A[name], module.lora_B[name]
    if parts[1].bias is not None or parts[2].bias is not None:
        return None
    return name if all(map(linear.is_plain, parts)) else None
