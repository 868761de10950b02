"""Implementation ``sm90``: the compiled Hopper kernels (csrc/sm90/)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch

from flashmla_hf import libraries, ops
from flashmla_hf.backend import Backend, kernel_refusal
from flashmla_hf.notices import log_choice
from flashmla_hf.ops import dtype_name, dtype_names
from flashmla_hf.validation import Call, DecodeCall

CallT = TypeVar("CallT", bound=Call)


def refusal(call: Call) -> str | None:
    if "sm90" in libraries.unavailable:
        return (
            f"{libraries.unavailable['sm90']}; impl='flex' runs on every GPU (python -m flashmla_hf doctor says more)"
        )
    return device_refusal(call.q, call.v) or kernel_refusal(call) or alignment_refusal(call)


def alignment_refusal(call: Call) -> str | None:
    """Automatic dispatch copies. Who asks for this implementation by name gets no hidden copy."""
    if call.impl != "sm90" or not (names := unaligned(call)):
        return None
    return f"{names[0]}: expected an address and strides in multiples of 16 bytes; pass a contiguous copy (.clone())"


def device_refusal(
    q: torch.Tensor,
    v: torch.Tensor,
    largest: tuple[int, int] | None = None,
    multiple: int | None = None,
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16),
) -> str | None:
    """Why no call with this q and v can be computed here, if the library is loaded; ``None`` if it does not rule that out.

    ``largest``: head dims (qk, v) of a kernel that takes others than most; ``multiple``: what they are multiples of there.
    ``dtypes``: of q there.
    """
    if q.device.type != "cuda":
        return f"the tensors are on {q.device}: expected a Hopper GPU"
    properties = torch.cuda.get_device_properties(q.device)  # a constant to torch.compile
    if (properties.major, properties.minor) != (9, 0):
        return f"{properties.name} is not a Hopper GPU (compute capability 9.0)"
    if q.dtype not in dtypes:
        return f"dtype {dtype_name(q.dtype)}: expected {dtype_names(dtypes)}"
    assert libraries.sm90_limits is not None  # otherwise the library is unavailable
    multiple = multiple or libraries.sm90_limits.multiple
    largest_qk, largest_v = largest or (libraries.sm90_limits.largest,) * 2
    for name, head_dim, most in (("q and k", q.shape[-1], largest_qk), ("v", v.shape[-1], largest_v)):
        if head_dim % multiple != 0 or head_dim > most:
            return f"{name}: head_dim {head_dim}: expected a multiple of {multiple} up to {most}"
    return None


def rows_refusal(q: torch.Tensor, v: torch.Tensor, values_are_columns: Callable[[], bool]) -> str | None:
    """Why no kernel of caches computes calls with this q and v; ``None`` if it does not rule that out.

    ``values_are_columns``: whether v is the first columns of the keys, asked if only the kernel of such rows is wide enough.
    """
    if "sm90" in libraries.unavailable:
        return libraries.unavailable["sm90"]
    limits = libraries.sm90_limits
    assert limits is not None  # otherwise the library is unavailable
    is_wide = max(q.shape[-1], v.shape[-1]) > limits.largest_decode
    largest = limits.largest_latent if is_wide and values_are_columns() else (limits.largest_decode,) * 2
    return device_refusal(q, v, largest)


def unaligned(call: Call | DecodeCall) -> list[str]:
    """The names of q, k and v whose address or strides TMA cannot read.

    A storage begins aligned, so the offset in it tells whether the address is. torch.compile traces neither; in a compiled call
    the operator refuses an unaligned address.
    """
    names = []
    for name, x in (("q", call.q), ("k", call.k), ("v", call.v)):
        sizes_and_strides = zip(x.shape[:-1], x.stride()[:-1], strict=True)
        multiple = 16 // x.element_size()
        is_unaligned = any(size > 1 and (stride % multiple != 0 or stride == 0) for size, stride in sizes_and_strides)
        if not torch.compiler.is_compiling():
            is_unaligned = is_unaligned or x.storage_offset() % multiple != 0
        if is_unaligned and x.numel() > 0:
            names.append(name)
    return names


def cache_alignment_refusal(call: DecodeCall) -> str | None:
    """As :func:`alignment_refusal`, but automatic dispatch refuses a cache that TMA cannot read as well: it is never copied."""
    names = {"k": "k_cache", "v": "v_cache"} | ({"q": "q"} if call.impl == "sm90" else {})
    refused = [names[name] for name in unaligned(call) if name in names]
    return f"{refused[0]}: expected an address and strides in multiples of 16 bytes" if refused else None


def with_readable_query(call: DecodeCall) -> DecodeCall:
    """``call`` with a copy of q if TMA cannot read it."""
    if "q" not in unaligned(call):
        return call
    return replace(call, q=call.q.clone(memory_format=torch.contiguous_format))


def readable(call: CallT) -> CallT:
    """``call`` with copies of what TMA cannot read."""
    names = unaligned(call)
    if not names:
        return call
    log_choice(call, "sm90", "; ".join(f"copies {name}" for name in names))
    copies = {name: getattr(call, name).clone(memory_format=torch.contiguous_format) for name in names}
    return replace(call, **copies)


def run(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.flash_attn(readable(call))


BACKEND = Backend(refusal, run)
