"""Token-wise modules in tiles: the module's own forward runs over a few rows at a time, and again over them in backward.

``y[i] = f(x[i])`` for every row i. The forward pass builds no graph and saves only x. Backward runs ``f`` once more per tile,
with a graph that lives as long as the tile: what ``f`` saves (an MLP's three [rows, ff] intermediates, a norm's fp32 copies)
exists for one tile at a time. The gradients of the parameters are summed over the tiles in fp32.

Inside a checkpointed layer this costs no second recomputation if nothing after the module saves its result: a node of its own
saves x *before* the module runs, and the checkpoint's recomputation ends at the last saved tensor. If the module's result is
the result of a linear layer in it, the second run skips that product (:class:`linear.LastLinear`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from flashmla_hf.patches import gradients, linear, quantized
from flashmla_hf.torch_state import without_autocast


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, saved: Any, run: Run, tile: int, *parameters: nn.Parameter) -> torch.Tensor:
        if saved is None:
            ctx.save_for_backward(x)
        ctx.saved, ctx.run, ctx.tile, ctx.parameters = saved, run, tile, parameters
        return run_rows(run, x, tile)

    @staticmethod
    @gradients.first_derivatives
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.run.unchanged.check()
        (x,) = (ctx.saved or ctx).saved_tensors
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        trained = [p for p, need in zip(ctx.parameters, needs, strict=True) if need]
        grad_x = torch.empty_like(x) if needs_x else None
        sums: list[torch.Tensor | None] = [None] * len(trained)
        with ctx.run.replay(), quantized.kept_dense():
            for start in range(0, x.shape[0], ctx.tile):
                rows = slice(start, start + ctx.tile)
                piece = x[rows].detach().requires_grad_(needs_x)
                with torch.enable_grad():
                    out = ctx.run(piece)
                if start == 0:
                    gradients.refuse_other_leaves(out, ctx.run.module, [piece, *ctx.parameters])
                wanted = [piece, *trained] if needs_x else trained
                # Trained weights may have no part in the result (a merged adapter): they get none.
                grads: list[torch.Tensor | None] = [None] * len(wanted)
                if out.requires_grad:
                    grads = [*torch.autograd.grad(out, wanted, grad[rows], allow_unused=True)]
                del out
                if grad_x is not None:
                    grad_piece = grads.pop(0)
                    grad_x[rows] = 0.0 if grad_piece is None else grad_piece
                add_to(sums, grads, is_only=x.shape[0] <= ctx.tile)
        return (grad_x, None, None, None, *cast_sums(sums, ctx.parameters, needs))


def add_to(sums: list[torch.Tensor | None], grads: Sequence[torch.Tensor | None], is_only: bool = False) -> None:
    """Adds ``grads`` (``None`` adds nothing) to the fp32 ``sums``. With ``is_only`` a single summand keeps its dtype."""
    for i, g in enumerate(grads):
        if g is None:
            continue
        total = sums[i]
        if total is None:
            sums[i] = g if is_only else g.to(torch.promote_types(g.dtype, torch.float32))
        else:
            total += g


def cast_sums(
    sums: list[torch.Tensor | None], parameters: tuple[nn.Parameter, ...], needs: tuple[bool, ...]
) -> Iterator[torch.Tensor | None]:
    """One gradient per parameter, in its dtype: the next of ``sums`` for each parameter that needs one, else ``None``."""
    remaining = iter(sums)
    for parameter, need in zip(parameters, needs, strict=True):
        total = next(remaining) if need else None
        yield total if total is None else total.to(parameter.dtype)


class Run:
    """``forward`` of ``module``, with the autocast and the random numbers of the call that made this object.

    ``last`` observes ``forward``; :meth:`replay` skips the product of the linear layer that it found.
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[..., torch.Tensor],
        device: torch.device,
        last: linear.LastLinear | None = None,
    ) -> None:
        self.module, self.forward, self.device, self.last = module, forward, device, last
        self.unchanged = gradients.Unchanged(module) if torch.is_grad_enabled() else None
        self.autocast_dtype: torch.dtype | None = None
        if device.type != "meta" and torch.is_autocast_enabled(device.type):
            self.autocast_dtype = torch.get_autocast_dtype(device.type)
        self.rng: tuple[torch.Tensor, torch.Tensor | None] | None = None
        # In training mode always, whatever has_dropout finds: a forward may take its rate from elsewhere.
        if module.training or gradients.has_dropout(module):
            self.rng = (torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def __call__(self, *args: Any) -> torch.Tensor:
        with self._autocast():
            return self.forward(*args)

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.autocast_dtype is None:
            return without_autocast(self.device)
        # A cache of cast weights that is filled without a graph would cut the gradient of a later user of the cache.
        return torch.autocast(self.device.type, dtype=self.autocast_dtype, cache_enabled=False)

    @contextlib.contextmanager
    def replay(self) -> Iterator[None]:
        """Inside: the random numbers of the forward pass, from its start, and no product of the last linear layer."""
        with contextlib.ExitStack() as stack:
            if self.last is not None:
                stack.enter_context(self.last.skip())
            if self.rng is not None:
                state, device_state = self.rng
                stack.enter_context(torch.random.fork_rng([self.device] if self.device.type == "cuda" else []))
                torch.set_rng_state(state)
                if device_state is not None:
                    torch.cuda.set_rng_state(device_state, self.device)
            yield


def run_rows(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, tile: int) -> torch.Tensor:
    """``run`` over x [rows, width], ``tile`` rows at a time, into one result [rows, any width]."""
    if x.shape[0] <= tile:
        return run(x)
    out = None
    with quantized.kept_dense():
        for start in range(0, x.shape[0], tile):
            piece = run(x[start : start + tile])
            if out is None:
                out = piece.new_empty((x.shape[0], *piece.shape[1:]))
            out[start : start + tile] = piece
    assert out is not None
    return out


def in_tiles(
    module: nn.Module,
    forward: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    tile: int,
    last: linear.LastLinear | None = None,
) -> torch.Tensor:
    """``forward``, which computes ``module``, over x [rows, width], ``tile`` rows at a time.

    The result [rows, any width] equals ``forward(x)`` up to rounding: a matrix product may sum a row in another order for
    another number of rows. ``last`` is explained at :class:`Run`.
    """
    run = Run(module, forward, x.device, last)
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not torch.is_grad_enabled() or not (x.requires_grad or parameters):
        return run_rows(run, x, tile)
    x, saved = linear.save_early(x)
    return _Tiles.apply(x, saved, run, tile, *parameters)
