"""Decides whether a patch may read a module's weights itself instead of calling the module.

Some weights are present only inside the module's own call: those that accelerate offloads, those of a unit of ``fully_shard``,
DeepSpeed's ZeRO-3. A patch that computes with ``module.weight`` calls :func:`unreadable` when it is applied and again in every
call, because hooks may be added later. The patch of the loss needs the weights of shards after the module's call, too:
:func:`gathered` and :func:`is_partitioned`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from flashmla_hf.patches import quantized
from flashmla_hf.patches.structure import PatchError, refuse


def unreadable(module: nn.Module, x: torch.Tensor | None = None, is_gathered: bool = False) -> str | None:
    """The reason why a patch may not read the parameters of ``module`` itself; ``None`` if it may.

    ``x`` is the input of the computation. Without it, weights on the meta device are accepted: the model is loaded later.
    ``is_gathered``: the question is asked inside the module's own call, or inside :func:`gathered`, where shards are whole.
    """
    if not is_gathered and is_unit(module):
        return "a unit of fully_shard of its own (its weights are gathered only for its own call)"
    hook = getattr(module, "_hf_hook", None)
    if hook is not None and not _places_only(hook):
        return f"accelerate's {type(hook).__name__} (offloading: the weights are loaded for each call)"
    if "weight" not in module._parameters:
        return "a weight that is computed for each call (parametrization, pruning)"
    is_4bit = quantized.is_4bit(module)
    for name, parameter in module._parameters.items():
        if is_4bit and name == "weight" and type(parameter).__name__ == "Params4bit":
            reason = quantized.unreadable(parameter)
        else:
            reason = None if parameter is None else _unreadable_parameter(parameter, x, is_gathered)
        if reason is not None:
            return f"{name} {reason}"
    return None


def is_unit(module: nn.Module) -> bool:
    """Whether ``module`` is a unit of ``fully_shard`` of its own, or one of the modules of such a unit."""
    return _is_a(module, "torch.distributed.fsdp", "FSDPModule")


def own_class(module: nn.Module) -> type:
    """The class of ``module``; ``fully_shard`` puts a subclass of it in its place."""
    return type(module).__bases__[-1] if is_unit(module) else type(module)


def is_partitioned(module: nn.Module) -> bool:
    """Whether DeepSpeed's ZeRO-3 holds the parameters of ``module``."""
    return any(hasattr(parameter, "ds_id") for parameter in module._parameters.values())


def refuse_trained_partition(model: nn.Module, patch: str, name: str, module: nn.Module) -> None:
    """Raises UnsupportedPatch if ZeRO-3 partitions a trained parameter of ``module``, which ``name`` names in the message.

    Its gradient exists in the hooks of DeepSpeed's own backward pass alone: a patch that runs ``module`` again in a backward
    pass of its own cannot ask for it.
    """
    named = module.named_parameters()
    partition = next((name for name, p in named if p.requires_grad and hasattr(p, "ds_id")), None)
    if partition is not None:
        expected = "a trained parameter that is whole, or of fully_shard (FSDP2), or of ZeRO stages 1 and 2"
        got = "a partition of DeepSpeed's ZeRO-3, whose hooks follow DeepSpeed's own backward pass alone"
        raise refuse(model, patch, f"{name}.{partition}", expected, got)


@contextlib.contextmanager
def gathered_by_zero(parameters: Iterable[Any]) -> Iterator[None]:
    """Inside it, those of ``parameters`` that ZeRO-3 partitions are whole. A collective call of all processes."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


@contextlib.contextmanager
def gathered(module: Any) -> Iterator[None]:
    """Inside it, the weights of a unit of ``fully_shard`` are whole, as in the unit's own call. Other modules stay as they are.

    The gradient of such a weight is reduced with those of the unit's own call: its input passes the unit's hooks.
    """
    if not is_unit(module):
        yield
        return
    was_sharded = any(type(parameter).__name__ == "DTensor" for parameter in module._parameters.values())
    module.unshard()
    try:
        yield
    finally:
        if was_sharded:
            module.reshard()


def _unreadable_parameter(parameter: Any, x: torch.Tensor | None, is_gathered: bool) -> str | None:
    if hasattr(parameter, "ds_id") and not (is_gathered and (x is None or parameter.numel() == parameter.ds_numel)):
        return "partitioned by DeepSpeed (ZeRO-3)"
    if type(parameter) is not nn.Parameter:
        sharded = " (sharded)" if type(parameter).__name__ == "DTensor" else ""
        return f"of class {type(parameter).__name__}{sharded}"
    if parameter.is_meta:
        return "on the meta device" if x is not None and not x.is_meta else None
    if parameter.numel() > 0 and parameter.untyped_storage().nbytes() == 0:
        return "without memory (a shard frees it after its own call)"
    return None


def _places_only(hook: Any) -> bool:
    """Whether accelerate's ``hook`` only moves inputs to the device of weights that stay there."""
    if type(hook).__name__ == "SequentialHook":
        return all(map(_places_only, hook.hooks))
    return type(hook).__name__ == "AlignDevicesHook" and not hook.offload


def refuse_sharded(model: nn.Module) -> None:
    """Raises PatchError if ``model`` is sharded already: the patches would inspect and call shards."""
    reason = next(
        (
            f"{name or 'the model'}: {type(module).__name__}"
            for name, module in model.named_modules()
            if is_unit(module) or _is_a(module, "torch.distributed.fsdp", "FullyShardedDataParallel")
        ),
        None,
    ) or next((f"{n}: a DTensor" for n, p in model.named_parameters() if type(p).__name__ == "DTensor"), None)
    if reason is not None:
        raise PatchError(
            f"flashmla_hf.patch({type(model).__name__}): expected a model that is not sharded, got {reason}. Call "
            "flashmla_hf.patch before fully_shard, accelerator.prepare or any other sharding"
        )


def _is_a(module: nn.Module, package: str, name: str) -> bool:
    """Whether ``module`` is a ``package.name``. False if nobody imported the package."""
    found = getattr(sys.modules.get(package), name, None)
    return isinstance(found, type) and isinstance(module, found)
