"""Builds a tiny model of a class, draws its weights, and runs it on a batch.

Every weight is drawn anew, large enough that attention decides the outputs: with Transformers' own initialisation an
attention that returns zeros passes most comparisons.
"""

from __future__ import annotations

import copy
import functools
import time
import warnings
from collections.abc import Iterator

import torch

from model_sweep import batches
from model_sweep.tiny_configs import PLANS, tiny
from model_sweep.verdicts import Result, first_line

FORWARD_SECONDS = 3
MAX_PARAMETERS = 40_000_000
BUILD_SECONDS = 40  # after these no further plan is tried
_NO_OUTPUT = ("cache", "past_key_values", "attentions", "memory", "mems")


def build_eager(model_class, config_class, result: Result):
    """(model, its configuration, a batch that it answers) by the first plan that leads to all three."""
    first = None
    tried, began = set(), time.monotonic()
    for plan in PLANS:
        if time.monotonic() - began > BUILD_SECONDS:
            break
        try:
            config = tiny(config_class, plan)
            text = repr(config)
            if text in tried:
                continue
            tried.add(text)
            if _num_parameters(model_class, config) > MAX_PARAMETERS:
                raise MemoryError("the model is not tiny")
            model = build(model_class, config, "eager")
            draw_weights(model)
            batch = batches.runnable(model, functools.partial(_is_finite, model))
        except Exception as error:
            first = first or f"{first_line(error)} [{plan}]"
            continue
        result.plan = str(plan)
        return model, config, batch
    result.reason = first or "no plan"
    return None


def _num_parameters(model_class, config) -> int:
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
    except Exception:
        return 0  # some models compute with numbers while they are built


def build(model_class, config, implementation: str | None) -> torch.nn.Module:
    torch.manual_seed(0)
    model = model_class._from_config(copy.deepcopy(config), attn_implementation=implementation)
    return model.float().eval()


@torch.no_grad()
def draw_weights(model: torch.nn.Module, seed: int = 0) -> None:
    """Draws every parameter anew: matrices so that they keep the size of what they multiply and a bit more, norms and
    gates around what they are, those that would hide a branch (layer scales, gates of 0) around 1."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for parameter in model.parameters():
        if not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if parameter.dim() >= 2:
            fan_in = 1 if id(parameter) in embeddings else max(1, parameter[0].numel())
            parameter.copy_(noise * (1.5 / fan_in**0.5 if fan_in > 1 else 1.0))
        elif not torch.isfinite(parameter).all() or float(parameter.abs().max()) < 0.05:
            is_bias = bool((parameter == 0).all()) and parameter.numel() > 1
            parameter.copy_(0.1 * noise if is_bias else 1.0 + 0.1 * noise)
        else:
            parameter.add_(0.1 * noise)


def outputs(value, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in what a model returned, by name; caches and attention weights left out."""
    if isinstance(value, torch.Tensor):
        yield name or "output", value
    elif isinstance(value, dict):
        for key, item in value.items():
            if not any(word in str(key) for word in _NO_OUTPUT):
                yield from outputs(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from outputs(item, f"{name}[{index}]")


def run(model, batch: dict, **options) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    batch = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(outputs(model(**batch, **options)))


def _is_finite(model, batch: dict) -> bool:
    began = time.monotonic()
    got = run(model, batch)
    if time.monotonic() - began > FORWARD_SECONDS:
        raise TimeoutError("the forward pass is slow: the model or its inputs are not tiny")
    floats = [value for value in got.values() if value.is_floating_point() and value.numel()]
    if not floats:
        raise ValueError(f"no floating output: {sorted(got)}")
    if not all(bool((~torch.isnan(value)).all()) for value in floats):
        raise ValueError("outputs are not finite")
    return True


def copy_state(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Parameters and every buffer, the ones that are not saved as well."""
    with torch.no_grad():
        for kind in ("named_parameters", "named_buffers"):
            theirs = dict(getattr(source, kind)())
            ours = dict(getattr(target, kind)())
            if theirs.keys() != ours.keys():
                raise ValueError(f"{kind} differ: {sorted(theirs.keys() ^ ours.keys())[:4]}")
            for name, value in ours.items():
                if value.shape != theirs[name].shape:  # a table that grew as the model ran
                    owner, _, name_there = name.rpartition(".")
                    setattr(target.get_submodule(owner), name_there, theirs[name].clone())
                else:
                    value.copy_(theirs[name])
