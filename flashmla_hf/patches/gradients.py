"""What a backward that runs something again, or has no derivative of its own, relies on; where it is not so, it raises.

The module is as it was in the forward pass, its graph ends at its own parameters, and nobody asks for second derivatives.
Otherwise gradients would be wrong or missing without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps

import torch
from torch import nn

from flashmla_hf.patches import structure


def first_derivatives(backward: Callable) -> Callable:
    """Decorates the ``backward`` of a function that has no second derivative. ``once_differentiable`` would not do: where the
    gradient that comes in is a constant (a loss's is), it lets the one that goes out pass for a constant too."""

    @wraps(backward)
    def checked(ctx, *grads):
        if torch.is_grad_enabled():
            raise structure.PatchError(
                "flashmla_hf.patch: expected first derivatives alone, got create_graph=True: the backward of a patch has no "
                "derivative. Call flashmla_hf.unpatch(model) first"
            )
        return backward(ctx, *grads)

    return checked


class Unchanged:
    """What would make a second run of ``module`` another than the first; ``check`` raises where it is not what it was.

    ``has_weights=False`` leaves out its weights and dropout layers.
    """

    def __init__(self, module: nn.Module, has_weights: bool = True):
        self.module, self.has_weights = module, has_weights
        self.before = self._state()

    def check(self) -> None:
        for what, now in self._state().items():
            if self.before[what] != now:
                raise structure.PatchError(
                    f"flashmla_hf.patch: {type(self.module).__name__}: expected it in backward as it was in the forward pass, "
                    f"because it runs again: {what} were changed in between (or taken away, by accelerate's offloading or a "
                    "shard). Call backward before that, or leave the patch out that runs it again ('mlp', 'norm', "
                    "'attention' or 'checkpointing')"
                )

    def _state(self) -> dict[str, tuple]:
        parts = tuple(self.module.modules())
        adapters = tuple(_adapters(m) for m in parts if hasattr(type(m), "active_adapters"))
        return {"adapters": adapters} | (_weights(self.module, parts) if self.has_weights else {})


def _weights(module: nn.Module, parts: tuple[nn.Module, ...]) -> dict[str, tuple]:
    # peft's target_parameters puts every parameter that it adapts through set_() in each forward pass.
    wrapper = structure.peft_layer("ParamWrapper")
    has_versions = wrapper is None or not any(isinstance(m, wrapper) for m in parts)
    return {
        "weights": tuple(
            # On the meta device: offloaded, and another tensor after every call, which brings the same values again.
            "meta" if p.is_meta else (id(p), p._version if has_versions and not p.is_inference() else 0)
            for p in module.parameters()
        ),
        "dropout layers": tuple(m.training for m in parts if _drops(m)),
    }


def _adapters(module: nn.Module) -> tuple:
    """What a layer of peft adds, as such layers name it."""
    scaling = getattr(module, "scaling", None)
    return (
        tuple(module.active_adapters),
        getattr(module, "disable_adapters", None),
        tuple(getattr(module, "merged_adapters", ())),
        tuple((k, v) for k, v in scaling.items() if isinstance(v, (int, float))) if isinstance(scaling, dict) else None,
    )


def has_dropout(module: nn.Module) -> bool:
    """Whether ``module`` drops anything now: by a dropout layer, or by the function and a rate of its own (StarCoder2)."""
    return any(m.training and _drops(m) for m in module.modules())


def _drops(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return any("drop" in name and isinstance(value, float) and value > 0 for name, value in vars(module).items())


def refuse_other_leaves(out: torch.Tensor, module: nn.Module, known: Iterable[torch.Tensor]) -> None:
    """Raises where the graph of ``out``, a result of ``module``, ends at a tensor that is not among ``known``: its gradient is
    not asked for and would be lost (a hook that adds a trained vector; a shard's view of one flat parameter)."""
    ids, seen, nodes = {id(t) for t in known}, set(), [out.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in ids:
            raise structure.PatchError(
                f"flashmla_hf.patch: {type(module).__name__}: expected gradients for its input and its own parameters, got a "
                f"trained tensor {[*leaf.shape]} from elsewhere (a hook?), whose gradient would be lost. Leave the patch out "
                "that runs the module again ('mlp', 'norm' or 'attention')"
            )
        nodes += (following for following, _ in node.next_functions)


def refuse_arguments_by_hook(module: nn.Module, patch: str) -> None:
    """Raises where a part of ``module`` gets arguments from a hook that sees the whole batch (peft: aLoRA's offsets, an adapter
    per sequence): a few rows are not what they speak of."""
    for part in module.modules():
        if part._forward_pre_hooks_with_kwargs:
            raise structure.PatchError(
                f"flashmla_hf.patch: patch {patch!r}: {type(module).__name__}: expected parts that look at one token at a "
                f"time, got {type(part).__name__} with a forward pre-hook that gives it arguments (aLoRA, adapter_names). "
                f"Leave it out: patches=[...] without {patch!r}"
            )
