"""Patch "lora": a linear layer and its low-rank adapter share one result.

peft computes the adapter's part, scales it and adds it. That is three more tensors as wide as the result, each read and written
once, and the same for the gradient. In :mod:`linear` the product with B adds into the layer's result, and in backward into the
gradient of x, with the scale as the product's own factor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn

from flashmla_hf.patches import linear, structure
from flashmla_hf.patches.replacements import Replacements


def adapted_layers(model: nn.Module) -> list[nn.Module]:
    """Every ``peft.tuners.lora.Linear`` over a ``torch.nn.Linear``."""
    adapted = structure.peft_layer("Linear")
    return [m for m in model.modules() if type(m) is adapted and type(m.base_layer) is nn.Linear]


def patch_lora(model: nn.Module, replacements: Replacements) -> None:
    """Replaces ``forward`` of every one of :func:`adapted_layers` that has no forward of its own instance."""
    found = adapted_layers(model)
    if not found:
        raise structure.refuse(
            model,
            "lora",
            "modules",
            "a peft.tuners.lora.Linear over a torch.nn.Linear (call get_peft_model before patch)",
            "none",
        )
    for module in (m for m in found if "forward" not in vars(m)):
        replacements.set(module, "forward", _adapted(module))


def _adapted(module: Any) -> Callable[..., torch.Tensor]:
    """A forward for ``module``, a ``peft.tuners.lora.Linear``."""
    forward = module.forward

    @wraps(forward)
    def adapted_forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter = None if args or kwargs or torch.compiler.is_compiling() else _only_adapter(module)
        if adapter is None:
            return forward(x, *args, **kwargs)
        base, (a, b) = module.base_layer, (part[adapter].weight for part in (module.lora_A, module.lora_B))
        dtype = linear.product_dtype(x, base.weight, base.bias, a, b)
        if dtype is None:
            return forward(x)  # the adapter has more precision than the model: peft casts
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
