"""Questions about the state that torch is in: autocast, tracing, capture of CUDA graphs, transforms of ``torch.func``."""

from __future__ import annotations

import contextlib

import torch


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which torch's functions keep the dtypes of their arguments."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def values_are_readable(x: torch.Tensor) -> bool:
    """Whether Python may read the values of ``x`` now: not while compiling, tracing or capturing, nor on meta."""
    if torch.compiler.is_compiling() or x.is_meta or torch.jit.is_tracing():
        return False
    if isinstance(x, torch._subclasses.FakeTensor):
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def is_in_backward() -> bool:
    """Whether this thread runs a backward pass, in which checkpointed layers compute again."""
    return torch._C._current_graph_task_id() != -1


def has_transforms() -> bool:
    """Whether a transform of ``torch.func`` is active.

    A tensor wrapped by a transform reports its own level only: one of ``vmap`` requires no gradient, whatever it holds. The
    dispatcher passes a call to each transform in turn.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_traced_or_transformed() -> bool:
    """Whether a call is inside a compiled graph or a transform of ``torch.func``. Operators are then called by all of torch's
    dispatch, and a module computes by its own operations: neither knows an autograd function that runs a module again, or a
    result that is only promised."""
    return torch.compiler.is_compiling() or has_transforms()


def is_transformed_eagerly() -> bool:
    """Whether a transform is active in a call that torch.compile does not trace: dynamo has an interpreter of its own there."""
    return not torch.compiler.is_compiling() and has_transforms()


def is_functionalizing() -> bool:
    """Whether ``torch.func.functionalize`` is among the active transforms."""
    if not has_transforms():
        return False
    stack = torch._C._functorch.get_interpreter_stack()
    return any(interpreter.key() == torch._C._functorch.TransformType.Functionalize for interpreter in stack)
