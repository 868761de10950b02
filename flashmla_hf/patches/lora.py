"""Patch "lora": a linear layer and its low-rank adapter in one result.

``y = x Wᵀ + b + s (x Aᵀ) Bᵀ`` (LoRA, arXiv 2106.09685, equation 3). peft makes the adapter's part, scales it and adds it: three
more tensors as wide as ``y``, read and written once each, and the same for the gradient. Here the second product adds into
the first one's result, and into the gradient of ``x`` in backward: the scale is the product's own factor.
"""

from __future__ import annotations

import sys
from functools import wraps

import torch
from torch import nn

from flashmla_hf.patches import structure
from flashmla_hf.patches.replacements import Replacements


class _Adapted(torch.autograd.Function):
    """x [..., in], weight [out, in], bias [out] or ``None``, a [rank, in], b [out, rank], all of one dtype."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scaling):
        out = nn.functional.linear(x, weight, bias)
        low = x.reshape(-1, x.shape[-1]) @ a.t()
        out.view(-1, out.shape[-1]).addmm_(low, b.t(), alpha=scaling)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scaling = scaling
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, a, b, low = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_a, needs_b, _ = ctx.needs_input_grad
        rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_low = (grads @ b).mul_(ctx.scaling) if needs_x or needs_a else None
        grad_x = None
        if needs_x:
            grad_x = (grads @ weight).addmm_(grad_low, a).view(x.shape)
        return (
            grad_x,
            grads.t() @ rows if needs_weight else None,
            grads.sum(0) if needs_bias else None,
            grad_low.t() @ rows if needs_a else None,
            (grads.t() @ low).mul_(ctx.scaling) if needs_b else None,
            None,
        )


def patch_lora(model: nn.Module, replacements: Replacements) -> None:
    """Replaces ``forward`` of every ``peft.tuners.lora.Linear`` over a ``torch.nn.Linear``."""
    linear = getattr(sys.modules.get("peft.tuners.lora.layer"), "Linear", None)  # who has adapters has imported it
    found = [m for m in model.modules() if type(m) is linear and type(m.base_layer) is nn.Linear]
    if not found:
        raise structure.refuse(
            model,
            "lora",
            "modules",
            "a peft.tuners.lora.Linear over a torch.nn.Linear (get_peft_model comes first)",
            "none",
        )
    for module in found:
        replacements.set(module, "forward", _adapted(module))


def _adapted(module: nn.Module):
    forward = module.forward

    @wraps(forward)
    def adapted_forward(x, *args, **kwargs):
        adapter = None if args or kwargs or torch.compiler.is_compiling() else _only_adapter(module)
        if adapter is None:
            return forward(x, *args, **kwargs)
        base, (a, b) = module.base_layer, (part[adapter].weight for part in (module.lora_A, module.lora_B))
        tensors = [x, base.weight, base.bias, a, b]
        if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            tensors = [t if t is None else t.to(dtype) for t in tensors]
        elif any(t is not None and t.dtype != x.dtype for t in tensors):
            return forward(x)  # adapters in more precision than the model: peft's own casts
        return _Adapted.apply(*tensors, module.scaling[adapter])

    return adapted_forward


def _only_adapter(module: nn.Module) -> str | None:
    """The one adapter that ``module`` adds now in the plain way; ``None`` where peft has more to do than that."""
    if module.disable_adapters or module.merged:
        return None
    active = [name for name in module.active_adapters if name in module.lora_A]
    if len(active) != 1 or active[0] in module.lora_variant:  # DoRA and its like
        return None
    name = active[0]
    dropout = module.lora_dropout[name]
    if dropout.training and getattr(dropout, "p", 0.0) > 0.0:
        return None
    parts = module.base_layer, module.lora_A[name], module.lora_B[name]
    if parts[1].bias is not None or parts[2].bias is not None:
        return None
    # Somebody else's hook or forward would not be called.
    is_plain = all(
        type(part) is nn.Linear
        and "forward" not in vars(part)
        and not (part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks)
        for part in parts
    )
    return name if is_plain else None
