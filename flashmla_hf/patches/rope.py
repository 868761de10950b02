"""Patch "rope" rotates queries and keys in place, without the copies of ``rotate_half``.

``y = x ∘ cos + (-x₂, x₁) ∘ sin`` over the halves of the first ``cos.shape[-1]`` elements of a head; the others are unchanged
(partial rotary). It rounds as Transformers' ``apply_rotary_pos_emb`` does: two products, then their sum.

The models call a function of their modeling module. The patch replaces it by a dispatcher, which rotates in place for patched
attention blocks and calls the original for all others. A layout that rotates another way (pairs side by side: Cohere, GLM)
fails a trial in ``patch`` and is refused.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from types import ModuleType
from typing import Any

import torch
from torch import nn

from flashmla_hf.patches import forwards, gradients, linear, structure
from flashmla_hf.patches.replacements import Replacements
from flashmla_hf.torch_state import is_traced_or_transformed

FUNCTION = "apply_rotary_pos_emb"
# Tokens per chunk. The temporaries of a chunk are four halves of it.
CHUNK = 4096


class _Rotate(torch.autograd.Function):
    """x [batch, heads, seqlen, head_dim] is overwritten; cos, sin [batch or 1, seqlen, rotary_dim].

    x is not marked dirty: queries are a view, and for a dirty view autograd would copy the whole gradient. The version counter
    of x rises all the same, so a node that saved x before raises an error instead of reading the rotated values.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        rotate(x, cos, sin, out=x)
        return x.detach()

    @staticmethod
    @gradients.first_derivatives
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        # Not in place: another node may hold the gradient.
        return rotate(grad, cos, sin, out=torch.empty_like(grad), is_inverse=True), None, None


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor, is_inverse: bool = False
) -> torch.Tensor:
    """Writes the rotated x to ``out`` (which may be x), chunk by chunk. The shapes are those of :class:`_Rotate`."""
    dim, half = cos.shape[-1], cos.shape[-1] // 2
    if out is not x and dim < x.shape[-1]:
        out[..., dim:] = x[..., dim:]
    for start in range(0, x.shape[2], CHUNK):
        tokens = slice(start, start + CHUNK)
        x1, x2 = x[:, :, tokens, :half], x[:, :, tokens, half:dim]
        cos1, cos2 = cos[:, None, tokens, :half], cos[:, None, tokens, half:]
        sin1, sin2 = sin[:, None, tokens, :half], sin[:, None, tokens, half:]
        if is_inverse:
            y1, y2 = x1 * cos1 + x2 * sin2, x2 * cos2 - x1 * sin1
        else:
            y1, y2 = x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2
        out[:, :, tokens, :half], out[:, :, tokens, half:dim] = y1, y2
    return out


def rotate_in_place(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``apply_rotary_pos_emb`` for q [batch, heads_q, seqlen, head_dim] and k [batch, heads_kv, seqlen, head_dim]."""
    for x in (q, k):
        # Autograd forbids to overwrite one of several views that one operation made, and reports it only later.
        if type(x.grad_fn).__name__.startswith(("Split", "Unbind", "Chunk")):
            raise structure.PatchError(
                "flashmla_hf.patch: patch 'rope': expected queries and keys of separate projections or as slices, got parts of "
                f"one split projection, which autograd does not allow to be overwritten. {structure.exclude('rope')}"
            )
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return _Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin)
    return rotate(q, cos, sin, out=q), rotate(k, cos, sin, out=k)


class _State(threading.local):
    # Not an attribute of the class: torch.compile guards the instance's dictionary, which a first assignment would change.
    def __init__(self) -> None:
        self.is_patched_block = False


_state = _State()


@contextlib.contextmanager
def _inside_patched_block() -> Iterator[None]:
    before, _state.is_patched_block = _state.is_patched_block, True
    try:
        yield
    finally:
        _state.is_patched_block = before


@dataclass
class _Dispatcher:
    """``function`` replaces ``original`` in a modeling module as long as it has ``users``, a number of patched models."""

    original: Callable[..., Any]
    function: Callable[..., Any]
    users: int = 0


# The dispatchers that are in a module now, by their function.
_dispatchers: dict[Callable[..., Any], _Dispatcher] = {}


def num_users(module: ModuleType) -> int:
    """The number of patched models for which ``module`` has a dispatcher."""
    found = _dispatchers.get(getattr(module, FUNCTION))
    return found.users if found else 0


def _dispatching(original: Callable[..., Any]) -> Callable[..., Any]:
    """A function that rotates in place inside patched blocks and calls ``original`` everywhere else."""

    @wraps(original)
    def apply_rotary_pos_emb(*args: Any, **kwargs: Any) -> Any:
        if is_traced_or_transformed() or not _state.is_patched_block:
            return original(*args, **kwargs)
        given = inspect.signature(original).bind(*args, **kwargs).arguments
        if given.get("unsqueeze_dim", 1) != 1 or given.get("position_ids") is not None:
            raise structure.PatchError(
                f"flashmla_hf.patch: patch 'rope': {original.__module__}.{FUNCTION}: expected unsqueeze_dim=1 and no "
                f"position_ids, got the arguments {sorted(given)}. {structure.exclude('rope')}"
            )
        return rotate_in_place(given["q"], given["k"], given["cos"], given["sin"])

    return apply_rotary_pos_emb


def patch_rope(model: nn.Module, replacements: Replacements) -> None:
    """Makes the attention blocks of ``model`` rotate in place."""
    modules: dict[ModuleType, str] = {}
    blocks = []
    for layer in structure.decoder_layers(model, "rope"):
        attention = structure.attention_of(model, layer, "rope")
        module = sys.modules[type(attention).__module__]
        function = getattr(module, FUNCTION, None)
        name = f"{layer.name}.{layer.attention_name} ({type(attention).__name__})"
        if function is None:
            raise structure.refuse(model, "rope", name, f"{module.__name__}.{FUNCTION}", "none")
        if FUNCTION not in forwards.names_in(type(attention).forward):
            raise structure.refuse(model, "rope", name, f"a forward that calls {FUNCTION}", "one that does not")
        if splits := _splits(attention):
            raise structure.refuse(model, "rope", name, "queries and keys of separate projections or as slices", splits)
        modules.setdefault(module, name)
        blocks.append(attention)
    for module, name in modules.items():
        function = getattr(module, FUNCTION)
        original = _dispatchers[function].original if function in _dispatchers else function
        if not _is_rotation(original, blocks[0]):
            raise structure.refuse(
                model,
                "rope",
                name,
                "the rotation of halves: x cos + (-x2, x1) sin",
                f"another {module.__name__}.{FUNCTION}",
            )
    for module in modules:
        replacements.on_undo(_install(module))
    for attention in blocks:
        replacements.set(attention, "forward", _marked(attention))


def _splits(attention: nn.Module) -> str | None:
    """How ``attention`` splits a fused projection into views, which autograd does not let be overwritten, or ``None``."""
    if hasattr(attention, "q_proj"):
        return None
    used = [name for name in forwards.names_in(type(attention).forward) if name in ("chunk", "split", "unbind")]
    return f"parts of one projection by {used[0]}()" if used else None


def _marked(attention: nn.Module) -> Callable[..., Any]:
    """A forward for the block ``attention`` inside which the dispatcher rotates in place."""
    forward = attention.forward

    @wraps(forward)
    def marked_forward(*args: Any, **kwargs: Any) -> Any:
        # A compiled graph uses the original. So does a block with a hook: it may hold a projection's result, which must not be
        # overwritten then.
        if is_traced_or_transformed() or any(map(linear.has_hooks, attention.children())):
            return forward(*args, **kwargs)
        with _inside_patched_block():
            return forward(*args, **kwargs)

    return marked_forward


def _install(module: ModuleType) -> Callable[[], None]:
    """Puts a dispatcher into ``module``, or counts one more user of the one in it. Returns the function that undoes this."""
    function = getattr(module, FUNCTION)
    dispatcher = _dispatchers.get(function)
    if dispatcher is None:
        dispatcher = _Dispatcher(function, _dispatching(function))
        _dispatchers[dispatcher.function] = dispatcher
        setattr(module, FUNCTION, dispatcher.function)
    dispatcher.users += 1

    def uninstall() -> None:
        dispatcher.users -= 1
        if dispatcher.users == 0:
            setattr(module, FUNCTION, dispatcher.original)
            del _dispatchers[dispatcher.function]

    return uninstall


def _is_rotation(original: Callable[..., Any], attention: nn.Module) -> bool:
    """Whether ``original`` gives the same bits as :func:`rotate_in_place`, for random queries and keys of the model's size."""
    head_dim = getattr(attention, "head_dim", None) or 8
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 3, head_dim, generator=generator) for heads in (4, 2))
    cos, sin = (torch.randn(1, 3, head_dim, generator=generator) for _ in range(2))
    try:
        expected = original(q.clone(), k.clone(), cos, sin)
    except Exception:  # another signature or other shapes: another function than this patch knows
        return False
    got = rotate_in_place(q, k, cos, sin)
    return isinstance(expected, tuple) and all(
        x.shape == y.shape and torch.equal(x, y) for x, y in zip(expected, got, strict=True)
    )
