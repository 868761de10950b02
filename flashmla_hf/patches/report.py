"""The report of ``patch``: which patches a model has, which defaults were left out, and which patches have no effect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from flashmla_hf.patches import lora

# Libraries whose forward of a causal language model computes the loss itself, without the model's loss function.
FUSED_LOSSES = ("trl", "liger_kernel")


@dataclass(frozen=True)
class PatchReport:
    """What :func:`flashmla_hf.patch` did to a model.

    Attributes:
        applied: names of the patches that the model has.
        left_out: default patches that do not support the model, each with the reason.
        idle: applied patches that have no effect now, each with the reason.
        partial: applied patches that leave some of the model's layers as they are, each with the reason.
    """

    applied: tuple[str, ...]
    left_out: dict[str, str]
    idle: dict[str, str]
    partial: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"applied: {', '.join(self.applied) or 'none'}"]
        lines += [f"left out: {name}: {reason}" for name, reason in self.left_out.items()]
        lines += [f"idle: {name}: {reason}" for name, reason in self.idle.items()]
        lines += [f"partial: {name}: {reason}" for name, reason in self.partial.items()]
        return "\n".join(lines)


def of_model(model: nn.Module, applied: tuple[str, ...], left_out: dict[str, str]) -> PatchReport:
    """The report of ``model``, a ``PreTrainedModel``. It looks at the model's forward as it is now."""
    reason = _other_fused_loss(model) if "loss" in applied else None
    others = lora.left_to_peft(model) if "lora" in applied else None
    return PatchReport(
        applied,
        dict(left_out),
        {} if reason is None else {"loss": reason},
        {} if others is None else {"lora": others},
    )


def _other_fused_loss(model: nn.Module) -> str | None:
    for function in _wrapped_functions(model.forward):
        module = getattr(function, "__globals__", {}).get("__name__") or ""
        if module.partition(".")[0] in FUSED_LOSSES:
            return f"{module} has replaced the model's forward and computes the loss itself"
    return None


def _wrapped_functions(function: Callable[..., Any] | None) -> Iterator[Any]:
    """``function`` and the functions that it wraps, from the outermost to the innermost."""
    while function is not None:
        function = function.func if isinstance(function, partial) else getattr(function, "__func__", function)
        yield function
        function = getattr(function, "__wrapped__", None)
