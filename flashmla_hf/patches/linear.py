"""A linear layer, with a low-rank adapter or without, whose backward does not need its result; nor does a second run for it.

``y = x Wᵀ + b + s (x Aᵀ) Bᵀ`` (LoRA, arXiv 2106.09685, equation 3). The gradients are made of x, the weights and x Aᵀ alone:

- They are saved by a node of their own *before* the product: a checkpoint's second run, which ends at the last tensor that
  somebody saved, ends there where nothing after the layer saves one (the last layer of an MLP).
- Where the result of a whole block run again is the result of this layer, :func:`without_result_of` leaves the product out:
  a third of an MLP's matrix products.
"""

from __future__ import annotations

import contextlib
import threading
import weakref

import torch
from torch import nn

from flashmla_hf.patches import gradients, weights
from flashmla_hf.torch_state import without_autocast


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *others):
        ctx.save_for_backward(x, *others)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, *[None] * (len(ctx.needs_input_grad) - 1)


def keep(x: torch.Tensor, *others: torch.Tensor | None):
    """x, and a node that has saved it and ``others``: where the next function, called with this x, finds them again
    (``saved_tensors``). ``None`` for a node where x needs no gradient: that function saves them itself."""
    if not x.requires_grad:
        return x, None
    x = _Keep.apply(x, *others)
    return x, x.grad_fn


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, keeper, weight, bias, a, b, low, scaling, has_result):
        if keeper is None:
            ctx.save_for_backward(x, weight, a, b, low)
        ctx.keeper, ctx.scaling = keeper, scaling
        if not has_result:  # of the right shape and dtype, and one element of memory
            return x.new_zeros(()).expand(*x.shape[:-1], weight.shape[0])
        return _product(x, weight, bias, b, low, scaling)

    @staticmethod
    @gradients.first_derivatives
    def backward(ctx, grad):
        # The backward may run under autocast though the forward pass did not: dtypes are those of the forward pass.
        with without_autocast(grad.device):
            return _gradients(ctx, grad)


def _gradients(ctx, grad):
    x, weight, a, b, low = (ctx.keeper or ctx).saved_tensors
    needs_x, _, needs_weight, needs_bias, needs_a, needs_b, *_ = ctx.needs_input_grad
    rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    grad_low = grad_x = None
    if a is not None and (needs_x or needs_a):
        grad_low = (grads @ b).mul_(ctx.scaling)
    if needs_x:
        grad_x = grads @ weight
        if grad_low is not None:
            grad_x.addmm_(grad_low, a)
        grad_x = grad_x.view(x.shape)
    return (
        grad_x,
        None,
        grads.t() @ rows if needs_weight else None,
        grads.sum(0) if needs_bias else None,
        grad_low.t() @ rows if needs_a else None,
        (grads.t() @ low).mul_(ctx.scaling) if needs_b else None,
        None,
        None,
        None,
    )


def _product(x, weight, bias, b, low, scaling):
    out = nn.functional.linear(x, weight, bias)
    if low is not None:
        out.view(-1, out.shape[-1]).addmm_(low, b.t(), alpha=scaling)
    return out


class _Thread(threading.local):
    def __init__(self):
        self.without = None  # the module whose result nobody needs now
        self.results = None  # of :func:`noted_results`


_thread = _Thread()


def apply(module: nn.Module, x, weight, bias, a=None, b=None, scaling=1.0) -> torch.Tensor:
    """y [..., out] of x [..., in], weight [out, in], bias [out] or ``None``, a [rank, in] and b [out, rank] or ``None``, all of
    one dtype, as the result of ``module``; undefined inside :func:`without_result_of` that module."""
    with torch.no_grad():
        low = None if a is None else x.reshape(-1, x.shape[-1]) @ a.t()
    if not torch.is_grad_enabled():
        out = _product(x, weight, bias, b, low, scaling)
    else:
        x, keeper = keep(x, weight, a, b, low)
        out = _Linear.apply(x, keeper, weight, bias, a, b, low, scaling, not is_unneeded(module))
    note_result(module, out)
    return out


class Results:
    """Of linear layers: (module, its result, that one's version) per call."""

    def __init__(self):
        self.calls: list[tuple] = []

    def source_of(self, out: torch.Tensor) -> nn.Module | None:
        """The module whose result, as it was returned, ``out`` is; ``None`` where there is none, or where it ran more than
        once."""
        if not self.calls:
            return None
        module, result, version = self.calls[-1]
        is_source = result() is out and out._version == version
        return module if is_source and sum(m is module for m, *_ in self.calls) == 1 else None


@contextlib.contextmanager
def noted_results():
    """Within, in this thread: every :func:`note_result` is put into the :class:`Results` that this gives."""
    before, _thread.results = _thread.results, Results()
    try:
        yield _thread.results
    finally:
        _thread.results = before


def note_result(module: nn.Module, out: torch.Tensor) -> None:
    # An inference tensor has no version; no backward comes for it.
    if _thread.results is not None and not out.is_inference():
        _thread.results.calls.append((module, weakref.ref(out), out._version))


@contextlib.contextmanager
def without_result_of(module: nn.Module | None):
    """Within, in this thread: ``module`` (``None``: none) need not compute its result; it does where a hook would see it."""
    before, _thread.without = _thread.without, None if module is None or has_hooks(module) else module
    try:
        yield
    finally:
        _thread.without = before


def is_unneeded(module: nn.Module) -> bool:
    return _thread.without is module


def in_one_dtype(*tensors: torch.Tensor | None) -> list[torch.Tensor | None] | None:
    """x and the others of a linear layer in what it computes in here: autocast's dtype, or the one that all have; ``None``
    where they have several."""
    device, dtype = tensors[0].device.type, tensors[0].dtype
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    elif any(t is not None and t.dtype != dtype for t in tensors):
        return None
    return [t if t is None else t.to(dtype) for t in tensors]


def is_plain(module: nn.Module) -> bool:
    """Whether calling ``module`` is ``torch.nn.Linear.forward`` alone: somebody's hook or forward would not be called, and
    weights that come for the call would be missing."""
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)
        and not has_hooks(module)
        and weights.unreadable(module) is None
    )


def has_hooks(module: nn.Module) -> bool:
    own = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(own) or torch.nn.modules.module._has_any_global_hook()
