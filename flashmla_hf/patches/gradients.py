"""Checks for a backward that runs a module again or has no derivative: it raises if a gradient would be wrong or missing.

Such a backward relies on three things: the module is the same as in the forward pass, its graph ends at its own parameters, and
no second derivatives are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import nn

from flashmla_hf.patches import structure


def first_derivatives(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the ``backward`` of a function without a second derivative: it raises PatchError under ``create_graph=True``.

    ``once_differentiable`` does not: if the incoming gradient is a constant, as a loss's is, it returns a constant.
    """

    @wraps(backward)
    def checked(ctx: Any, *grads: torch.Tensor) -> Any:
        if torch.is_grad_enabled():
            raise structure.PatchError(
                "flashmla_hf.patch: expected first derivatives only, got create_graph=True: the backward of a patch has no "
                "derivative. Call flashmla_hf.unpatch(model) before"
            )
        return backward(ctx, *grads)

    return checked


class Unchanged:
    """Records the state of ``module`` on which the result of a second run depends. :meth:`check` raises if it changed.

    ``has_weights=False`` records adapters only, without weights and dropout layers.
    """

    def __init__(self, module: nn.Module, has_weights: bool = True) -> None:
        self.module, self.has_weights = module, has_weights
        self.before = self._state()

    def check(self) -> None:
        """Raises PatchError if the state is not the recorded one."""
        for what, now in self._state().items():
            if self.before[what] != now:
                raise structure.PatchError(
                    f"flashmla_hf.patch: {type(self.module).__name__}: {what} changed between forward and backward, but a "
                    "patch recomputes the module in backward (accelerate's offloading and sharding change weights too). Call "
                    "backward() before the change, or exclude the patch that recomputes: 'mlp', 'norm', 'attention' or "
                    "'checkpointing'"
                )

    def _state(self) -> dict[str, tuple]:
        parts = tuple(self.module.modules())
        adapters = tuple(_adapters(m) for m in parts if hasattr(type(m), "active_adapters"))
        return {"adapters": adapters} | (_weights(self.module, parts) if self.has_weights else {})


def _weights(module: nn.Module, parts: tuple[nn.Module, ...]) -> dict[str, tuple]:
    # peft's target_parameters calls set_() on every parameter that it adapts, in each forward pass.
    wrapper = structure.peft_layer("ParamWrapper")
    has_versions = wrapper is None or not any(isinstance(m, wrapper) for m in parts)
    return {
        "weights": tuple(
            # A parameter on the meta device is offloaded: another tensor after every call, loaded with the same values.
            "meta" if p.is_meta else (id(p), p._version if has_versions and not p.is_inference() else 0)
            for p in module.parameters()
        ),
        "dropout layers": tuple(m.training for m in parts if _drops(m)),
    }


def _adapters(module: Any) -> tuple:
    """The adapters that a layer of peft adds, with their scales, by the attributes of such layers."""
    scaling = getattr(module, "scaling", None)
    return (
        tuple(module.active_adapters),
        getattr(module, "disable_adapters", None),
        tuple(getattr(module, "merged_adapters", ())),
        tuple((k, v) for k, v in scaling.items() if isinstance(v, (int, float))) if isinstance(scaling, dict) else None,
    )


def has_dropout(module: nn.Module) -> bool:
    """Whether ``module`` drops anything now: by a dropout layer, or by the function with a rate of its own (StarCoder2)."""
    return any(m.training and _drops(m) for m in module.modules())


def _drops(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return any("drop" in name and isinstance(value, float) and value > 0 for name, value in vars(module).items())


def refuse_other_leaves(out: torch.Tensor, module: nn.Module, known: Iterable[torch.Tensor]) -> None:
    """Raises PatchError if the graph of ``out``, a result of ``module``, ends at a tensor that is not among ``known``.

    Its gradient would be lost. Examples are a hook that adds a trained vector, and a shard's view of one flat parameter.
    """
    ids = {id(t) for t in known}
    seen: set[Any] = set()
    nodes: list[Any] = [out.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in ids:
            raise structure.PatchError(
                f"flashmla_hf.patch: {type(module).__name__}: expected a result of its input and its own parameters, got one "
                f"that also depends on a trained tensor {[*leaf.shape]} from elsewhere (a hook?): its gradient would be lost. "
                "Exclude the patch that recomputes the module: 'mlp', 'norm' or 'attention'"
            )
        nodes += (following for following, _ in node.next_functions)


def refuse_arguments_by_hook(module: nn.Module, patch: str) -> None:
    """Raises PatchError if a hook passes arguments to a part of ``module``: they describe the whole batch and not a few rows.

    peft has such hooks for aLoRA's offsets and for one adapter per sequence.
    """
    for part in module.modules():
        if part._forward_pre_hooks_with_kwargs:
            raise structure.PatchError(
                f"flashmla_hf.patch: patch {patch!r}: {type(module).__name__}: expected parts that process one token at a "
                f"time, got {type(part).__name__} with a forward pre-hook that passes arguments (aLoRA, adapter_names). "
                f"{structure.exclude(patch)}"
            )
