"""Patch "mlp": the layer's token-wise block in tiles of tokens, and patch "norm": every norm the same way.

See :mod:`tiles` for the mechanism. Only the choice of the tile and the structure are here.
"""

from __future__ import annotations

from functools import wraps

import torch
from torch import nn

from flashmla_hf.patches import gradients, linear, memory, structure, tiles, weights
from flashmla_hf.patches.replacements import Replacements

# A gated MLP's backward holds, per token, gate, up, activation, product and the gradients of three of them.
INTERMEDIATES = 7
# Below this many tokens a GPU's matrix products lose speed.
SMALLEST_TILE = 2048
# Of free memory: below this share the intermediates of all tokens stay, above it a tile gets as much at most.
SHARE = 1 / 4
LARGEST_TILE_BYTES = 2 * memory.GIB
# Elements of a norm's tile: its fp32 copies are 64 MiB each.
NORM_TILE_ELEMENTS = 2**24


def patch_mlp(model: nn.Module, replacements: Replacements, tile: int | None) -> None:
    """Replaces ``forward`` of every decoder layer's token-wise block. ``tile``: tokens, ``None`` is by free memory."""
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
        replacements.set(layer.mlp, "forward", _tiled(layer.mlp, name, tile))
        for child in layer.mlp.children():
            if linear.is_plain(child):
                replacements.set(child, "forward", _noting(child))
    if _has_router(model):
        hook = structure.decoder(model, "mlp").register_forward_pre_hook(_refuse_router_logits(model), with_kwargs=True)
        replacements.on_undo(hook.remove)


def _tiled(mlp: nn.Module, name: str, tile: int | None):
    forward = mlp.forward
    width = structure.row_width(mlp) * (
        getattr(mlp, "top_k", None) or getattr(getattr(mlp, "gate", None), "top_k", None) or 1
    )
    chosen: dict[tuple, int] = {}

    @wraps(forward)
    def tiled_forward(hidden_states):
        if torch.compiler.is_compiling():
            return forward(hidden_states)
        shape = hidden_states.shape
        tokens = shape[:-1].numel()
        # Decided once per length: a checkpoint's recomputation must save what its forward pass saved.
        key = (tokens, hidden_states.dtype, hidden_states.device)
        if key not in chosen:
            chosen[key] = tile or auto_tile(tokens, INTERMEDIATES * width * hidden_states.element_size(), key[2])
        if tokens <= chosen[key]:
            return forward(hidden_states)

        gradients.refuse_arguments_by_hook(mlp, "mlp")
        last: list[nn.Module | None] = [None]  # of this call: the next may run with other adapters

        def on_rows(rows):
            with linear.noted_results() as results:
                out = forward(rows[None])
            if not torch.is_grad_enabled():
                last[0] = results.source_of(out)
            if not isinstance(out, torch.Tensor) or out.shape != (1, *rows.shape):
                got = [*out.shape] if isinstance(out, torch.Tensor) else type(out).__name__
                raise structure.PatchError(
                    f"flashmla_hf.patch: patch 'mlp': {name} ({type(mlp).__name__}): expected a tensor of its input's shape "
                    f"{[1, *rows.shape]}, got {got}. Leave it out: patches=[...] without 'mlp'"
                )
            return out[0]

        rows = hidden_states.reshape(tokens, shape[-1])
        return tiles.in_tiles(mlp, on_rows, rows, chosen[key], last=lambda: last[0]).view(shape)

    return tiled_forward


def _noting(module: nn.Linear):
    forward = module.forward

    @wraps(forward)
    def noting_forward(x):
        if torch.compiler.is_compiling():
            return forward(x)
        if linear.is_unneeded(module) and weights.unreadable(module, x) is None:
            return linear.apply(module, *linear.in_one_dtype(x, module.weight, module.bias))
        out = forward(x)
        linear.note_result(module, out)
        return out

    return noting_forward


def auto_tile(tokens: int, bytes_per_token: int, device: torch.device) -> int:
    """Tokens per tile: all of them where their intermediates are a small share of free memory, else a power of two."""
    budget = int(memory.device_free_bytes(device) * SHARE)
    if tokens * bytes_per_token <= budget:
        return tokens
    most = max(1, min(budget, LARGEST_TILE_BYTES) // bytes_per_token)
    return max(SMALLEST_TILE, 1 << (most.bit_length() - 1))


def _has_router(model: nn.Module) -> bool:
    return hasattr(model.config, "output_router_logits")


def _refuse_router_logits(model: nn.Module):
    def check(module, args, kwargs):
        wanted = kwargs.get("output_router_logits")
        if model.config.output_router_logits if wanted is None else wanted:
            raise structure.refuse(
                model,
                "mlp",
                "output_router_logits",
                "False (a tile's router logits have no gradient to collect)",
                "True",
            )

    return check


def patch_norm(model: nn.Module, replacements: Replacements) -> None:
    """Replaces ``forward`` of every norm of the decoder: modules of a class named ...Norm with one vector as weight."""
    found = 0
    for name, module in structure.decoder(model, "norm").named_modules():
        if not type(module).__name__.endswith("Norm"):
            continue
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


def _is_row_wise(module: nn.Module, weight: torch.Tensor) -> bool:
    offloaded = weight.is_meta and getattr(module, "_hf_hook", None)
    if weight.is_meta and not offloaded:
        return True
    device = offloaded.execution_device if offloaded else weight.device
    rows = torch.linspace(-1.0, 2.0, 3 * weight.shape[0], device=device).to(weight.dtype).view(3, -1)
    with torch.no_grad():
        together = module.forward(rows)
        # A GPU may sum one row in another order than three.
        return together.shape == rows.shape and all(
            torch.allclose(module.forward(rows[i]), together[i], rtol=2e-2, atol=1e-4) for i in range(3)
        )


def _rms_norm_eps(module: nn.Module) -> float | None:
    """The eps with which ``torch.nn.functional.rms_norm`` is this norm (Llama's kind; Gemma's adds 1 to its weight)."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = module.weight
    # Its one parameter is the weight: a bias would be left out, and is zero at the beginning of training.
    if not isinstance(eps, float) or weight.is_meta or len(list(module.parameters())) != 1:
        return None
    if weights.unreadable(module) is not None:
        return None
    rows = torch.linspace(-1.0, 2.0, 3 * weight.shape[0], device=weight.device).to(weight.dtype).view(3, -1)
    with torch.no_grad():
        expected, got = module.forward(rows), nn.functional.rms_norm(rows, weight.shape, weight, eps)
    # A unit of bfloat16 in each of two roundings; any other formula is off by more.
    return eps if expected.dtype == got.dtype and torch.allclose(expected, got, rtol=1.6e-2, atol=1e-4) else None


def _norm_in_tiles(module: nn.Module):
    forward, eps = module.forward, _rms_norm_eps(module)

    @wraps(forward)
    def norm_forward(hidden_states):
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return forward(hidden_states)
        if (
            eps is not None
            and hidden_states.is_cuda
            and hidden_states.dtype == module.weight.dtype
            and weights.unreadable(module, hidden_states) is None
        ):
            # One kernel each way there, which saves its input and a number a row. It multiplies by the weight before it
            # rounds, not after.
            with torch.autocast("cuda", enabled=False):
                return nn.functional.rms_norm(hidden_states, module.weight.shape, module.weight, eps)
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        tile = max(1, NORM_TILE_ELEMENTS // rows.shape[-1])
        return tiles.in_tiles(module, forward, rows, tile).view(hidden_states.shape)

    return norm_forward
