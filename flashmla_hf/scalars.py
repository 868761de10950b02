"""The checks of arguments that are numbers, and the error that every check raises."""

from __future__ import annotations

import numbers
import operator
import sys
from typing import Any, NoReturn

import torch

from flashmla_hf.ops import dtype_name


def fail(kind: type[Exception], argument: str, expected: str, got: object) -> NoReturn:
    raise kind(f"flashmla attention: {argument}: expected {expected}, got {got}")


def number(name: str, value: object) -> float:
    """A number of Python's, numpy's, a symbolic one, or one in a tensor, as a float; a symbolic one stays that."""
    if isinstance(value, torch.Tensor):
        if value.dim() != 0 or value.dtype == torch.bool or value.is_complex():
            fail(TypeError, name, "a number", f"a tensor {[*value.shape]} of {dtype_name(value.dtype)}")
        if value.requires_grad:
            expected = "a number, for which no gradient is computed (multiply q by it)"
            fail(TypeError, name, expected, "a tensor that requires one")
        value = value.item()
    if not isinstance(value, (int, float)):
        if isinstance(value, (torch.SymFloat, torch.SymInt)):
            return torch.sym_float(value)
        if not isinstance(value, numbers.Real):
            fail(TypeError, name, "a number", type(value).__name__)
        value = float(value)
    if isinstance(value, bool):
        fail(TypeError, name, "a number", "bool")
    if not -_LARGEST <= value <= _LARGEST:  # torch.compile traces a comparison, not math.isfinite
        fail(ValueError, name, "a finite number", value)
    return float(value)


def scale_and_softcap(scale: Any, softcap: Any, q: torch.Tensor) -> tuple[float, float]:
    """Both as numbers of the dtype that q's scores are computed in."""
    scale, softcap = number("scale", scale), number("softcap", softcap)
    if softcap < 0.0:
        fail(ValueError, "softcap", "0 (none) or a positive number", softcap)
    if q.dtype != torch.float64:
        # A symbolic scale is a factor on q instead (validate), and to compare it would bound the sizes it came from.
        if not (isinstance(scale, torch.SymFloat) or -_LARGEST_FLOAT32 <= scale <= _LARGEST_FLOAT32):
            expected = f"at most {_LARGEST_FLOAT32:.1e} in magnitude (scores are float32)"
            fail(ValueError, "scale", expected, scale)
        if softcap != 0.0 and not _SMALLEST_FLOAT32 <= softcap <= _LARGEST_FLOAT32:
            expected = f"0 (none) or from {_SMALLEST_FLOAT32:.1e} to {_LARGEST_FLOAT32:.1e} (scores are float32)"
            fail(ValueError, "softcap", expected, softcap)
    return scale, softcap


# Of torch.finfo, which torch.compile does not trace everywhere.
_LARGEST_FLOAT32, _SMALLEST_FLOAT32 = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny


def flag(name: str, value: Any) -> bool:
    """True or False of Python's or numpy's, a symbolic one, one in a tensor, or 1 or 0. Anything else has a truth, too, but not
    the one that was meant: ``"no"`` is true."""
    if isinstance(value, torch.Tensor):
        if value.dim() != 0 or value.dtype != torch.bool:
            fail(TypeError, name, "True or False", f"a tensor {[*value.shape]} of {dtype_name(value.dtype)}")
        return value.item()  # type: ignore[return-value]
    if isinstance(value, torch.SymBool) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    if type(value).__name__ not in ("bool", "bool_"):  # numpy's, by the names of its releases 2 and 1
        fail(TypeError, name, "True or False", repr(value))
    return bool(value)


_LARGEST = sys.float_info.max  # an int may be larger


def integer(name: str, value: Any, expected: str) -> int:
    """An int of Python's, numpy's, a symbolic one, or one in a tensor."""
    if isinstance(value, torch.Tensor):  # some data collators hand a zero-dimensional tensor
        if value.dim() != 0 or value.dtype == torch.bool or value.is_floating_point() or value.is_complex():
            fail(TypeError, name, expected, f"a tensor {[*value.shape]} of {dtype_name(value.dtype)}")
        return value.item()  # type: ignore[return-value]
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        try:
            if isinstance(value, bool):
                raise TypeError
            value = operator.index(value)
        except TypeError:  # some arrays have the method, and refuse
            fail(TypeError, name, expected, repr(value))
    return value


def resolve_window(window: object, is_causal: bool) -> tuple[int, int]:
    if window is None:
        window = (-1, -1)
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        fail(TypeError, "window", "a pair (left, right)", window)
    bounds = []
    for side, bound in zip(("left", "right"), window, strict=True):
        bound = -1 if bound is None else integer(f"window {side}", bound, "an int or None")
        if bound < -1:
            fail(ValueError, f"window {side}", "a bound >= 0, or -1 or None for unbounded", bound)
        bounds.append(min(bound, _FARTHEST))
    return bounds[0], 0 if is_causal else bounds[1]


_FARTHEST = 2**62  # reaches every key, and fits the operators' 64 bits
