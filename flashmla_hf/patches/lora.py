"""Patch "lora": a linear layer and its low-rank adapter in one result.

peft makes the adapter's part, scales it and adds it: three more tensors as wide as the result, read and written once each, and
the same for the gradient. In :mod:`linear` the second product adds into the first one's result, and into the gradient of x in
backward: the scale is the product's own factor.
"""

from __future__ import annotations

from functools import wraps

import torch
from torch import nn

from flashmla_hf.patches import linear, structure
from flashmla_hf.patches.replacements import Replacements


def adapted_layers(model: nn.Module) -> list[nn.Module]:
    """Every ``peft.tuners.lora.Linear`` over a ``torch.nn.Linear``."""
    adapted = structure.peft_layer("Linear")
    return [m for m in model.modules() if type(m) is adapted and type(m.base_layer) is nn.Linear]


def patch_lora(model: nn.Module, replacements: Replacements) -> None:
    """Replaces ``forward`` of every one of :func:`adapted_layers`, but for those where somebody else has."""
    found = adapted_layers(model)
    if not found:
        raise structure.refuse(
            model,
            "lora",
            "modules",
            "a peft.tuners.lora.Linear over a torch.nn.Linear (get_peft_model comes first)",
            "none",
        )
    for module in (m for m in found if "forward" not in vars(m)):
        replacements.set(module, "forward", _adapted(module))


def _adapted(module: nn.Module):
    forward = module.forward

    @wraps(forward)
    def adapted_forward(x, *args, **kwargs):
        adapter = None if args or kwargs or torch.compiler.is_compiling() else _only_adapter(module)
        if adapter is None:
            return forward(x, *args, **kwargs)
        base, (a, b) = module.base_layer, (part[adapter].weight for part in (module.lora_A, module.lora_B))
        tensors = linear.in_one_dtype(x, base.weight, base.bias, a, b)
        if tensors is None:
            return forward(x)  # adapters in more precision than the model: peft's own casts
        return linear.apply(module, *tensors, module.scaling[adapter])

    return adapted_forward


def _only_adapter(module: nn.Module) -> str | None:
    """The one adapter that ``module`` adds now in the plain way; ``None`` where peft has more to do than that."""
    if module.disable_adapters or module.merged:
        return None
    active = [name for name in module.active_adapters if name in module.lora_A]
    # DoRA and its like; a peft that does not say so yet is left alone.
    if len(active) != 1 or active[0] in getattr(module, "lora_variant", active):
        return None
    name = active[0]
    dropout = module.lora_dropout[name]
    if dropout.training and getattr(dropout, "p", 0.0) > 0.0:
        return None
    parts = module.base_layer, module.lora_A[name], module.lora_B[name]
    if parts[1].bias is not None or parts[2].bias is not None:
        return None
    return name if all(map(linear.is_plain, parts)) else None
