"""Patch "rope": queries and keys rotated where they lie, without the copies of ``rotate_half``.

``y = x ∘ cos + (-x₂, x₁) ∘ sin`` over the halves of the first ``cos.shape[-1]`` numbers of a head, the rest untouched (partial
rotary). Rounded as Transformers' ``apply_rotary_pos_emb`` does: two products, then their sum.

The models call a function of their module. It gets a dispatcher in its place, which rotates for patched attention blocks and
calls the original for everybody else. Layouts that rotate another way (pairs side by side: Cohere, GLM) fail a trial at patch
time and are refused.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
from functools import wraps

import torch
from torch import nn

from flashmla_hf.patches import gradients, linear, structure
from flashmla_hf.patches.replacements import Replacements

FUNCTION = "apply_rotary_pos_emb"
# Tokens per chunk: a chunk's temporaries are four halves of it.
CHUNK = 4096


class _Rotate(torch.autograd.Function):
    """x [batch, heads, seqlen, head_dim] is overwritten; cos, sin [batch or 1, seqlen, rotary_dim].

    x is not marked dirty: on a view (queries are one) autograd would copy the whole gradient for it. Its version counter
    rises all the same, so a node that saved x before raises instead of reading the rotated values.
    """

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        rotate(x, cos, sin, out=x)
        return x.detach()

    @staticmethod
    @gradients.first_derivatives
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        # Not in place: somebody else may hold the gradient.
        return rotate(grad, cos, sin, out=torch.empty_like(grad), is_inverse=True), None, None


def rotate(x, cos, sin, out, is_inverse=False):
    """Writes x rotated to ``out`` (which may be x), chunk by chunk. Shapes as in :class:`_Rotate`."""
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


def rotate_in_place(q, k, cos, sin):
    """``apply_rotary_pos_emb`` for q [batch, heads_q, seqlen, head_dim] and k [batch, heads_kv, seqlen, head_dim]."""
    for x in (q, k):
        # Autograd forbids what follows on one of several views that one operation made; it would say so later, elsewhere.
        if type(x.grad_fn).__name__.startswith(("Split", "Unbind", "Chunk")):
            raise structure.PatchError(
                "flashmla_hf.patch: patch 'rope': expected queries and keys of their own or as slices, got parts of one split "
                "projection, which autograd does not let be overwritten. Leave it out: patches=[...] without 'rope'"
            )
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return _Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin)
    return rotate(q, cos, sin, out=q), rotate(k, cos, sin, out=k)


class _State(threading.local):
    # Not as an attribute of the class: torch.compile guards the instance's dictionary, which the first assignment would change.
    def __init__(self):
        self.is_patched_block = False


_state = _State()


@contextlib.contextmanager
def _inside_patched_block():
    before, _state.is_patched_block = _state.is_patched_block, True
    try:
        yield
    finally:
        _state.is_patched_block = before


def _dispatcher(original):
    @wraps(original)
    def apply_rotary_pos_emb(*args, **kwargs):
        if torch.compiler.is_compiling() or not _state.is_patched_block:
            return original(*args, **kwargs)
        given = inspect.signature(original).bind(*args, **kwargs).arguments
        if given.get("unsqueeze_dim", 1) != 1 or given.get("position_ids") is not None:
            raise structure.PatchError(
                f"flashmla_hf.patch: patch 'rope': {original.__module__}.{FUNCTION}: expected heads in dimension 1 and cos of "
                f"the tokens, got {sorted(given)}. Leave it out: patches=[...] without 'rope'"
            )
        return rotate_in_place(given["q"], given["k"], given["cos"], given["sin"])

    apply_rotary_pos_emb._flashmla_original = original
    apply_rotary_pos_emb._flashmla_users = 0
    return apply_rotary_pos_emb


def patch_rope(model: nn.Module, replacements: Replacements) -> None:
    """Makes the attention blocks of ``model`` rotate in place."""
    modules = {}
    blocks = []
    for layer in structure.decoder_layers(model, "rope"):
        attention = structure.attention_of(model, layer, "rope")
        module = sys.modules[type(attention).__module__]
        function = getattr(module, FUNCTION, None)
        name = f"{layer.name}.{layer.attention_name} ({type(attention).__name__})"
        if function is None:
            raise structure.refuse(model, "rope", name, f"{module.__name__}.{FUNCTION}", "none")
        if FUNCTION not in type(attention).forward.__code__.co_names and FUNCTION not in _unwrapped_names(attention):
            raise structure.refuse(model, "rope", name, f"a forward that calls {FUNCTION}", "one that does not")
        modules.setdefault(module, name)
        blocks.append(attention)
    for module, name in modules.items():
        function = getattr(module, FUNCTION)
        if not _is_rotation(getattr(function, "_flashmla_original", function), blocks[0]):
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
        replacements.set(attention, "forward", _marked(attention, attention.forward))


def _unwrapped_names(attention: nn.Module) -> tuple[str, ...]:
    return inspect.unwrap(type(attention).forward).__code__.co_names


def _marked(attention: nn.Module, forward):
    @wraps(forward)
    def marked_forward(*args, **kwargs):
        # Compiled, the original rotates. Who looks at a projection's result may hold it: it must not be overwritten.
        if torch.compiler.is_compiling() or any(map(linear.has_hooks, attention.children())):
            return forward(*args, **kwargs)
        with _inside_patched_block():
            return forward(*args, **kwargs)

    return marked_forward


def _install(module):
    """Puts the dispatcher into ``module``, or counts one more user of it. Returns what takes it out again."""
    function = getattr(module, FUNCTION)
    if not hasattr(function, "_flashmla_original"):
        function = _dispatcher(function)
        setattr(module, FUNCTION, function)
    function._flashmla_users += 1

    def uninstall():
        function._flashmla_users -= 1
        if function._flashmla_users == 0:
            setattr(module, FUNCTION, function._flashmla_original)

    return uninstall


def _is_rotation(original, attention: nn.Module) -> bool:
    """Tries ``original`` on random queries and keys of the model's head dim: ours must give the same bits."""
    head_dim = getattr(attention, "head_dim", None) or 8
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 3, head_dim, generator=generator) for heads in (4, 2))
    cos, sin = (torch.randn(1, 3, head_dim, generator=generator) for _ in range(2))
    try:
        expected = original(q.clone(), k.clone(), cos, sin)
    except Exception:  # another signature, or other shapes: not the function this patch knows
        return False
    got = rotate_in_place(q, k, cos, sin)
    return isinstance(expected, tuple) and all(
        x.shape == y.shape and torch.equal(x, y) for x, y in zip(expected, got, strict=True)
    )
