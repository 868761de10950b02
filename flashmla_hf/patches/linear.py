"""A linear layer, optionally with a low-rank adapter, whose backward does not use its result: a second run can skip it.

``y = x Wᵀ + b + s (x Aᵀ) Bᵀ`` (LoRA, arXiv 2106.09685, equation 3). The gradients are computed from x, the weights and x Aᵀ.
Recomputation skips the product that makes y in two ways:

- :func:`save_early` saves these tensors in a graph node *before* the product. A checkpoint's recomputation ends at the last
  tensor that the forward pass saved. If nothing after the layer saves one (the last layer of an MLP), it ends before the
  product.
- :class:`LastLinear` skips the product if the result of the layer is the result of the whole recomputed block. That is a
  third of an MLP's matrix products.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import nn

from flashmla_hf.patches import gradients, precision, quantized, weights
from flashmla_hf.torch_state import is_traced_or_transformed, without_autocast


class _SaveEarly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *others: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, *others)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grads[0], *[None] * (len(ctx.needs_input_grad) - 1)


def save_early(x: torch.Tensor, *others: torch.Tensor | None) -> tuple[torch.Tensor, Any]:
    """Saves x and ``others`` in a graph node now. Returns (x, node); ``node.saved_tensors`` are x and ``others``.

    The next function must be called with the returned x. The node is ``None`` if x needs no gradient: that function must
    then save the tensors itself.
    """
    if not x.requires_grad:
        return x, None
    x = _SaveEarly.apply(x, *others)
    return x, x.grad_fn


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        saved: Any,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor | None,
        b: torch.Tensor | None,
        low: torch.Tensor | None,
        settings: tuple[Any, float, bool],
    ) -> torch.Tensor:
        state, scaling, is_skipped = settings
        if saved is None:
            ctx.save_for_backward(x, weight, a, b, low)
        ctx.saved, ctx.state, ctx.scaling = saved, state, scaling
        if is_skipped:  # the right shape and dtype over one element of memory
            return x.new_zeros(()).expand(*x.shape[:-1], weight.shape[0] if state is None else state.shape[0])
        out = _product(x, quantized.dense(weight, state, x.dtype), bias, b, low, scaling)
        # With a bias torch's linear returns a view, and autograd lets nobody write to a view that a function returns: rotation
        # in place would fail.
        return torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out

    @staticmethod
    @gradients.first_derivatives
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Backward may run under an autocast that the forward pass did not have: the dtypes are those of the forward pass.
        with without_autocast(grad.device):
            return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, a, b, low = (ctx.saved or ctx).saved_tensors
    needs_x, _, needs_weight, needs_bias, needs_a, needs_b, *_ = ctx.needs_input_grad
    rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    grad_low = grad_x = None
    if a is not None and (needs_x or needs_a):
        grad_low = precision.matmul(grads, b).mul_(ctx.scaling)
    if needs_x:
        grad_x = grads @ quantized.dense(weight, ctx.state, grads.dtype)
        if grad_low is not None:
            precision.add_matmul(grad_x, grad_low, a)
        grad_x = grad_x.view(x.shape)
    return (
        grad_x,
        None,
        grads.t() @ rows if needs_weight else None,
        grads.sum(0) if needs_bias else None,
        precision.matmul(grad_low.t(), rows) if needs_a and grad_low is not None else None,
        precision.matmul(grads.t(), low).mul_(ctx.scaling) if needs_b else None,
        None,
        None,
    )


def _product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    b: torch.Tensor | None,
    low: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    out = nn.functional.linear(x, weight, bias)
    if low is not None and b is not None:
        precision.add_matmul(out.view(-1, out.shape[-1]), low, b.t(), scaling)
    return out


def apply(
    module: nn.Module,
    dtype: torch.dtype,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    scaling: float = 1.0,
) -> torch.Tensor:
    """y [..., out] of x [..., in], weight [out, in], bias [out] or ``None``, a [rank, in] and b [out, rank] or ``None``.

    A weight of a ``Linear4bit`` is packed. All others are cast to ``dtype``, which :func:`product_dtype` gives, but an adapter
    stays in float32 if :func:`adds_mixed` says so. y counts as the result of ``module``: a :class:`LastLinear` observes it, and
    inside :meth:`LastLinear.skip` of that module its values are undefined.
    """
    state = quantized.state_of(weight)
    x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    weight = weight.to(dtype) if state is None else weight
    if a is not None and b is not None and not adds_mixed(x, a, b):
        a, b = a.to(dtype), b.to(dtype)
    with torch.no_grad():
        low = None if a is None else precision.matmul(x.reshape(-1, x.shape[-1]), a.t())
    if not torch.is_grad_enabled():
        out = _product(x, quantized.dense(weight, state, dtype), bias, b, low, scaling)
    else:
        x, saved = save_early(x, weight, a, b, low)
        out = _Linear.apply(x, saved, weight, bias, a, b, low, (state, scaling, _thread.skipped is module))
    _record(module, out)
    return out


class _Thread(threading.local):
    # Not attributes of the class: torch.compile guards the instance's dictionary, which a first assignment would change.
    def __init__(self) -> None:
        # (module, its result, the version of that) per call, while a LastLinear observes
        self.calls: list[tuple[nn.Module, weakref.ref[torch.Tensor], int]] | None = None
        self.skipped: nn.Module | None = None  # the module whose product is skipped now


_thread = _Thread()


class LastLinear:
    """The linear layer whose result is the result of a block, and whose product a second run of the block skips.

    ::

        forward, no graph:   x ─ up ─ act ─ down ─ y      observe() records (up, ·), (down, y)
                                             └───────     y is the untouched result of `down`: module = down
        backward, graph:     x ─ up ─ act ─ down ─ ?      skip(): `down` saves its input and returns zeros
                             dx, dW  ← dy, saved inputs   no gradient is computed from y

    :meth:`skip` has no effect if the block's result is another tensor, if the block changed y in place, if it called the layer
    twice, or if a hook would see y: the hook gets the real result. All of this is checked at run time.
    """

    def __init__(self) -> None:
        self.module: nn.Module | None = None

    def observe(self, block: Callable[..., torch.Tensor], *args: torch.Tensor) -> torch.Tensor:
        """Calls ``block(*args)``. A call without a graph, which is the forward pass, sets :attr:`module`."""
        before, _thread.calls = _thread.calls, []
        try:
            out = block(*args)
            calls = _thread.calls
        finally:
            _thread.calls = before
        if not torch.is_grad_enabled():
            self.module = None
            if calls:
                module, result, version = calls[-1]
                is_last = result() is out and out._version == version
                self.module = module if is_last and sum(m is module for m, *_ in calls) == 1 else None
        return out

    @contextlib.contextmanager
    def skip(self) -> Iterator[None]:
        """Inside, in this thread, :attr:`module` does not compute its result, unless a hook would see it."""
        module = None if self.module is None or has_hooks(self.module) else self.module
        before, _thread.skipped = _thread.skipped, module
        try:
            yield
        finally:
            _thread.skipped = before


def _record(module: nn.Module, out: torch.Tensor) -> None:
    # An inference tensor has no version and never gets a backward.
    if _thread.calls is not None and not out.is_inference():
        _thread.calls.append((module, weakref.ref(out), out._version))


def skippable(module: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward for ``module``, one of :func:`is_plain`, that a :class:`LastLinear` can observe and skip."""
    forward = module.forward

    @wraps(forward)
    def skippable_forward(x: torch.Tensor) -> torch.Tensor:
        if is_traced_or_transformed():
            return forward(x)
        if _thread.skipped is module and weights.unreadable(module, x) is None:
            dtype = product_dtype(x, module)
            if dtype is not None:
                return apply(module, dtype, x, module.weight, module.bias)
        out = forward(x)
        _record(module, out)
        return out

    return skippable_forward


def product_dtype(x: torch.Tensor, module: nn.Linear) -> torch.dtype | None:
    """The dtype in which ``module``, one of :func:`is_plain`, multiplies ``x``: autocast's, or the one that all tensors have.

    ``None`` if they have several dtypes and there is no autocast, or if a ``Linear4bit`` computes in another one.
    """
    is_cast = is_autocast(x)
    dtype = torch.get_autocast_dtype(x.device.type) if is_cast else x.dtype
    if quantized.is_4bit(module):  # it gives its input's dtype, whatever autocast says
        return dtype if x.dtype == dtype == quantized.compute_dtype(module, x) else None
    others = (module.weight, module.bias)
    return dtype if is_cast or all(t is None or t.dtype == dtype for t in others) else None


def adds_mixed(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether an adapter in float32 is added to a layer over ``x`` in bfloat16 with the adapter's precision."""
    return not is_autocast(x) and precision.is_mixed(x.dtype, a, b)


def is_autocast(x: torch.Tensor) -> bool:
    """Whether products with ``x`` are cast to another dtype now."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def is_plain(module: nn.Module) -> bool:
    """Whether a call of ``module`` is the forward of ``torch.nn.Linear``, or of a ``Linear4bit``, and nothing else.

    A hook or another forward would not be called, and weights that are brought for each call would be missing.
    """
    return (
        (type(module) is nn.Linear or quantized.is_4bit(module))
        and "forward" not in vars(module)
        and not has_hooks(module)
        and weights.unreadable(module) is None
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of ``module`` calls a hook, of its own or a global one."""
    own = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(own) or torch.nn.modules.module._has_any_global_hook()
