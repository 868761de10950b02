"""Patch "mlp" runs each layer's token-wise block over tiles of tokens; patch "norm" does the same with every norm.

:mod:`tiles` has the mechanism. This module finds the blocks and chooses the tile.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import nn

from flashmla_hf.patches import forwards, gradients, linear, memory, structure, tiles, weights
from flashmla_hf.patches.replacements import Replacements
from flashmla_hf.torch_state import is_traced_or_transformed

# A gated MLP's backward holds seven tensors per token: gate, up, activation, product and the gradients of three of them.
INTERMEDIATES = 7
# A GPU's matrix products lose speed below this number of tokens.
SMALLEST_TILE = 2048
# Share of free memory for intermediates: if those of all tokens need less, there are no tiles.
SHARE = 1 / 4
LARGEST_TILE_BYTES = 2 * memory.GIB
A_TENSOR = "a tensor of its input's shape, computed from that input alone"
# Elements of a norm's tile: each of its fp32 copies has 64 MiB.
NORM_TILE_ELEMENTS = 2**24
_Found = TypeVar("_Found")


def patch_mlp(model: nn.Module, replacements: Replacements, tile: int | None) -> None:
    """Replaces ``forward`` of every decoder layer's token-wise block. ``tile``: tokens, or ``None`` for :func:`auto_tile`."""
    width, config = structure.hidden_width(model, "mlp"), _config_of_router(model)
    if _returns_router_logits(config):
        raise _router_logits(model)
    tried: set[type] = set()
    for layer in structure.decoder_layers(model, "mlp"):
        if layer.mlp is None:
            raise structure.refuse(
                model, "mlp", f"{layer.name} ({type(layer.module).__name__})",
                f"a child named one of {', '.join(structure.MLP_NAMES)}",
                ", ".join(name for name, _ in layer.module.named_children()),
            )  # fmt: skip
        name = f"{layer.name}.{layer.mlp_name}"
        if getattr(layer.mlp, "jitter_noise", None):
            raise structure.refuse(
                model, "mlp", name, "no jitter noise (it is written into the input)", "router_jitter_noise"
            )
        weights.refuse_trained_partition(model, "mlp", name, layer.mlp)
        # One trial for each class: it may load the weights of its block from the host or from disk.
        if type(layer.mlp) not in tried:
            tried.add(type(layer.mlp))
            if (got := _more_arguments(layer, width) or _no_rows(layer.mlp, width)) is not None:
                raise structure.refuse(model, "mlp", f"{name} ({type(layer.mlp).__name__})", A_TENSOR, got)
        replacements.set(layer.mlp, "forward", _tiled(layer.mlp, name, tile))
        for child in layer.mlp.children():
            if isinstance(child, nn.Linear) and linear.is_plain(child):
                replacements.set(child, "forward", linear.skippable(child))
    replacements.hook(structure.decoder(model, "mlp"), _refuse_router_logits(model, config))


def _more_arguments(layer: structure.Layer, width: int | None) -> str | None:
    """The parameters of the block's forward if ``layer`` passes it more than hidden states, as far as its source tells.

    A layer that passes more in one of several calls (Moshi's, for the depth decoder alone) has a block that the hidden states
    alone suffice for, if a trial finds that each row has its own result.
    """
    assert layer.mlp is not None
    assert layer.mlp_name is not None
    taken = forwards.parameters_of(layer.mlp).values()
    named = [p.name for p in taken if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if len(named) < 2:
        return None
    needed = [p.name for p in taken if p.name in named and p.default is p.empty]
    passed = forwards.numbers_passed(inspect.unwrap(type(layer.module).forward), layer.mlp_name)
    if len(needed) < 2 and (passed == {1} or (1 in passed and _tried(layer.mlp, width, _are_rows_alone))):
        return None
    return f"a forward of {', '.join(named)}"


def _no_rows(mlp: Any, width: int | None) -> str | None:
    """What ``mlp`` returns instead of a tensor of its input's shape, tried on three tokens [1, 3, width].

    ``None`` if it returns such a tensor, or if it cannot run before training (weights that are loaded or gathered later).
    """
    return _tried(mlp, width, lambda mlp, rows: _not_rows(mlp.forward(rows), rows))


def _are_rows_alone(mlp: Any, rows: torch.Tensor) -> bool:
    """Whether each of ``rows`` [1, tokens, width] has the same result alone."""
    together = mlp.forward(rows)
    alone = torch.cat([mlp.forward(rows[:, i : i + 1]) for i in range(rows.shape[1])], dim=1)
    return together.shape == rows.shape and torch.allclose(alone, together, rtol=2e-2, atol=1e-4)


def _tried(mlp: Any, width: int | None, trial: Callable[[Any, torch.Tensor], _Found]) -> _Found | None:
    """``trial(mlp, rows)`` of three tokens [1, 3, width], in evaluation mode; ``None`` if ``mlp`` cannot run now."""
    parameters = [*mlp.parameters()]
    if width is None or not parameters or any(hasattr(p, "ds_id") for p in parameters):
        return None
    hooks = [h for h in (getattr(m, "_hf_hook", None) for m in mlp.modules()) if getattr(h, "offload", False)]
    device = torch.device(hooks[0].execution_device if hooks else parameters[0].device)
    dtype = next((p.dtype for p in parameters if p.is_floating_point()), torch.get_default_dtype())
    rows = torch.linspace(-1.0, 1.0, 3 * width, device=device).to(dtype).view(1, 3, width)
    devices = [device] if device.type == "cuda" else []
    was_training = [m for m in mlp.modules() if m.training]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices), contextlib.suppress(Exception):
            # Dropout and counters of a training step have no part in the shape.
            for module in was_training:
                module.training = False
            return trial(mlp, rows)
    finally:
        for module in was_training:
            module.training = True
    return None


def _not_rows(out: Any, rows: torch.Tensor) -> str | None:
    """What ``out`` is if it is no tensor of the shape of ``rows``, for a message."""
    if isinstance(out, torch.Tensor):
        return None if out.shape == rows.shape else f"shape {[*out.shape]} for the input's {[*rows.shape]}"
    return type(out).__name__


def _tiled(mlp: Any, name: str, tile: int | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward for ``mlp`` over [..., hidden], ``tile`` tokens at a time."""
    forward = mlp.forward
    width = structure.row_width(mlp) * (
        getattr(mlp, "top_k", None) or getattr(getattr(mlp, "gate", None), "top_k", None) or 1
    )
    chosen: dict[tuple[int, torch.dtype, torch.device], int] = {}

    def block(rows: torch.Tensor) -> torch.Tensor:
        out = forward(rows)
        if (got := _not_rows(out, rows)) is not None:
            raise structure.PatchError(
                f"flashmla_hf.patch: patch 'mlp': {name} ({type(mlp).__name__}): expected {A_TENSOR}, got {got}. "
                f"{structure.exclude('mlp')}"
            )
        return out

    @wraps(forward)
    def tiled_forward(hidden_states: torch.Tensor, *others: Any, **more: Any) -> torch.Tensor:
        if any(x is not None for x in (*others, *more.values())):
            raise structure.PatchError(
                f"flashmla_hf.patch: patch 'mlp': {name} ({type(mlp).__name__}): expected a call with hidden states alone, got "
                f"further arguments. {structure.exclude('mlp')}"
            )
        if is_traced_or_transformed():
            return forward(hidden_states)
        shape = hidden_states.shape
        tokens = shape[:-1].numel()
        # The tile is chosen once per length: a checkpoint's recomputation must save what its forward pass saved.
        key = (tokens, hidden_states.dtype, hidden_states.device)
        if key not in chosen:
            chosen[key] = tile or auto_tile(tokens, INTERMEDIATES * width * hidden_states.element_size(), key[2])
        if tokens <= chosen[key]:
            return forward(hidden_states)

        gradients.refuse_arguments_by_hook(mlp, "mlp")
        if torch.is_grad_enabled():
            weights.refuse_trained_partition(mlp, "mlp", name, mlp)
        last = linear.LastLinear()  # for this call: the next one may run with other adapters

        def on_rows(rows: torch.Tensor) -> torch.Tensor:
            return last.observe(block, rows[None])[0]

        rows = hidden_states.reshape(tokens, shape[-1])
        return tiles.in_tiles(mlp, on_rows, rows, chosen[key], last).view(shape)

    return tiled_forward


def auto_tile(tokens: int, bytes_per_token: int, device: torch.device) -> int:
    """Tokens per tile: all if their intermediates are a small share of free memory, else a power of two."""
    budget = int(memory.device_free_bytes(device) * SHARE)
    if tokens * bytes_per_token <= budget:
        return tokens
    most = max(1, min(budget, LARGEST_TILE_BYTES) // bytes_per_token)
    return max(SMALLEST_TILE, 1 << (most.bit_length() - 1))


def _config_of_router(model: Any) -> Any:
    """The configuration that says whether a call returns router logits by default: the model's, or that of its text (Qwen3-VL).
    Without routers it is any."""
    configs = (model.config, model.config.get_text_config())
    return next((config for config in configs if hasattr(config, "output_router_logits")), model.config)


def _returns_router_logits(config: Any) -> bool:
    return bool(getattr(config, "output_router_logits", False))


def _refuse_router_logits(model: Any, config: Any) -> Callable[[nn.Module, tuple, dict[str, Any]], None]:
    """A forward pre-hook of the decoder that raises if router logits are requested."""

    def check(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        wanted = kwargs.get("output_router_logits")
        if _returns_router_logits(config) if wanted is None else wanted:
            raise _router_logits(model)

    return check


def _router_logits(model: Any) -> structure.UnsupportedPatch:
    expected = "False (tiles collect no gradients of router logits)"
    return structure.refuse(model, "mlp", "output_router_logits", expected, "True")


def patch_norm(model: nn.Module, replacements: Replacements) -> None:
    """Replaces ``forward`` of every norm of the decoder: a module whose class is named ...Norm and whose weight is a vector."""
    found = 0
    for name, module in structure.decoder(model, "norm").named_modules():
        if not type(module).__name__.endswith("Norm"):
            continue
        with weights.gathered_by_zero(module._parameters.values()):
            weight = getattr(module, "weight", None)
            if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or not _is_row_wise(module, weight):
                raise structure.refuse(
                    model, "norm", f"{name} ({type(module).__name__})",
                    "a norm over the last dimension with a weight [hidden]", "another module",
                )  # fmt: skip
        replacements.set(module, "forward", _norm_in_tiles(module))
        found += 1
    if not found:
        raise structure.refuse(model, "norm", "decoder", "modules of a class named ...Norm", "none")


def _is_row_wise(module: Any, weight: torch.Tensor) -> bool:
    """Whether ``module`` computes every row [hidden] by itself, tried on three rows."""
    offloaded = weight.is_meta and getattr(module, "_hf_hook", None)
    if weight.is_meta and not offloaded:
        return True
    device = offloaded.execution_device if offloaded else weight.device
    rows = torch.linspace(-1.0, 2.0, 3 * weight.shape[0], device=device).to(weight.dtype).view(3, -1)
    with torch.no_grad():
        together = module.forward(rows)
        # The tolerance is for a GPU that sums one row in another order than three.
        return together.shape == rows.shape and all(
            torch.allclose(module.forward(rows[i]), together[i], rtol=2e-2, atol=1e-4) for i in range(3)
        )


def _rms_norm_eps(module: Any) -> float | None:
    """The eps with which ``torch.nn.functional.rms_norm`` equals this norm. ``None`` if it does not.

    It equals Llama's kind; Gemma's adds 1 to its weight.
    """
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = module.weight
    # The weight must be the only parameter: a bias would be ignored, and the trial below cannot see one that is still zero.
    if not isinstance(eps, float) or weight.is_meta or len(list(module.parameters())) != 1:
        return None
    if weights.unreadable(module) is not None:
        return None
    rows = torch.linspace(-1.0, 2.0, 3 * weight.shape[0], device=weight.device).to(weight.dtype).view(3, -1)
    with torch.no_grad():
        expected, got = module.forward(rows), nn.functional.rms_norm(rows, weight.shape, weight, eps)
    # The tolerance is one unit of bfloat16 for each of two roundings. Any other formula differs by more.
    return eps if expected.dtype == got.dtype and torch.allclose(expected, got, rtol=1.6e-2, atol=1e-4) else None


def _norm_in_tiles(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward for the norm ``module`` over [..., hidden] that saves its input only."""
    forward, eps = module.forward, _rms_norm_eps(module)

    @wraps(forward)
    def norm_forward(hidden_states: torch.Tensor) -> torch.Tensor:
        if is_traced_or_transformed() or not torch.is_grad_enabled():
            return forward(hidden_states)
        if (
            eps is not None
            and hidden_states.is_cuda
            and hidden_states.dtype == module.weight.dtype
            and weights.unreadable(module, hidden_states) is None
        ):
            # It is one kernel each way, which saves its input and one number per row. It multiplies by the weight before it
            # rounds; the module multiplies after.
            with torch.autocast("cuda", enabled=False):
                return nn.functional.rms_norm(hidden_states, module.weight.shape, module.weight, eps)
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        tile = max(1, NORM_TILE_ELEMENTS // rows.shape[-1])
        return tiles.in_tiles(module, forward, rows, tile).view(hidden_states.shape)

    return norm_forward
