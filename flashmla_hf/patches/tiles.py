"""Token-wise modules in tiles: the module's own forward over a few rows at a time, and again over the same rows in backward.

``y[i] = f(x[i])`` for every row i. Forward runs without a graph and keeps x alone. Backward runs ``f`` once more per tile,
with a graph that lives as long as the tile: what ``f`` saves (an MLP's three [rows, ff] intermediates, a norm's fp32
copies) exists for one tile at a time. The gradients of the parameters are summed over the tiles in fp32.

Inside a checkpointed layer this costs no second recomputation where nothing after the module saves its result: x is saved
by a node of its own *before* the module runs, so that the checkpoint's recomputation, which ends at the last tensor somebody
saved, ends there. Where the module's result is that of a linear layer in it, the second run leaves that product out
(:mod:`linear`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import nn

from flashmla_hf.patches import gradients, linear
from flashmla_hf.torch_state import without_autocast


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, keeper, run, tile, *parameters):
        if keeper is None:
            ctx.save_for_backward(x)
        ctx.keeper, ctx.run, ctx.tile, ctx.parameters = keeper, run, tile, parameters
        return run_rows(run, x, tile)

    @staticmethod
    @gradients.first_derivatives
    def backward(ctx, grad):
        ctx.run.unchanged.check()
        (x,) = (ctx.keeper or ctx).saved_tensors
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        trained = [p for p, need in zip(ctx.parameters, needs, strict=True) if need]
        grad_x = torch.empty_like(x) if needs_x else None
        sums: list[torch.Tensor | None] = [None] * len(trained)
        with ctx.run.again(), linear.without_result_of(ctx.run.last()):
            for start in range(0, x.shape[0], ctx.tile):
                rows = slice(start, start + ctx.tile)
                piece = x[rows].detach().requires_grad_(needs_x)
                with torch.enable_grad():
                    out = ctx.run(piece)
                if start == 0:
                    gradients.refuse_other_leaves(out, ctx.run.module, [piece, *ctx.parameters])
                wanted = [piece, *trained] if needs_x else trained
                grads = list(torch.autograd.grad(out, wanted, grad[rows], allow_unused=True))
                del out
                if needs_x:
                    grad_x[rows] = grads.pop(0)
                add_to(sums, grads, is_only=x.shape[0] <= ctx.tile)
        found = iter(s if s is None else s.to(p.dtype) for s, p in zip(sums, trained, strict=True))
        return (grad_x, None, None, None, *(next(found) if need else None for need in needs))


def add_to(sums: list, grads: list, is_only: bool = False) -> None:
    """Adds ``grads`` (``None``: none) to the fp32 ``sums``; the only one stays as it is."""
    for i, g in enumerate(grads):
        if g is None:
            continue
        if sums[i] is None:
            sums[i] = g if is_only else g.to(torch.promote_types(g.dtype, torch.float32))
        else:
            sums[i] += g


class Run:
    """``forward``, under the autocast and with the random numbers of the call it was made in. ``last`` gives, once it has run,
    the linear layer whose result is its own, if there is one."""

    def __init__(
        self,
        module: nn.Module,
        forward: Callable,
        device: torch.device,
        last: Callable[[], nn.Module | None] = lambda: None,
    ):
        self.module, self.forward, self.device, self.last = module, forward, device, last
        self.unchanged = gradients.Unchanged(module) if torch.is_grad_enabled() else None
        self.autocast = None
        if device.type != "meta" and torch.is_autocast_enabled(device.type):
            # No cache of casted weights: filled without a graph, it would cut the gradient of whoever hits it later.
            self.autocast = {"dtype": torch.get_autocast_dtype(device.type), "cache_enabled": False}
        self.rng = None
        # In training whatever has_dropout sees: a forward may take its rate from elsewhere.
        if module.training or gradients.has_dropout(module):
            self.rng = (torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def __call__(self, *args) -> torch.Tensor:
        with self._autocast():
            return self.forward(*args)

    def _autocast(self):
        if self.autocast is None:
            return without_autocast(self.device)
        return torch.autocast(self.device.type, **self.autocast)

    @contextlib.contextmanager
    def again(self):
        """Within: the random numbers of the forward pass, from its start."""
        if self.rng is None:
            yield
            return
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.set_rng_state(self.rng[0])
            if self.rng[1] is not None:
                torch.cuda.set_rng_state(self.rng[1], self.device)
            yield


def run_rows(run: Callable, x: torch.Tensor, tile: int) -> torch.Tensor:
    """``run`` over x [rows, width] in tiles, into one result [rows, any width]."""
    out = None
    for start in range(0, x.shape[0], tile):
        piece = run(x[start : start + tile])
        if x.shape[0] <= tile:
            return piece
        if out is None:
            out = piece.new_empty((x.shape[0], *piece.shape[1:]))
        out[start : start + tile] = piece
    return out if out is not None else run(x)


def in_tiles(
    module: nn.Module,
    forward: Callable,
    x: torch.Tensor,
    tile: int,
    last: Callable[[], nn.Module | None] = lambda: None,
) -> torch.Tensor:
    """``module`` on x [rows, width] by its own ``forward`` (same shape of argument), ``tile`` rows at a time.

    The result [rows, any width] is that of ``forward(x)``, up to rounding where a library sums a row in another order for
    another number of rows (matrix products may). ``last``: as of :class:`Run`.
    """
    run = Run(module, forward, x.device, last)
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not torch.is_grad_enabled() or not (x.requires_grad or parameters):
        return run_rows(run, x, tile)
    x, keeper = linear.keep(x)
    return _Tiles.apply(x, keeper, run, tile, *parameters)
