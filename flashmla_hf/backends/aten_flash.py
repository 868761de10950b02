"""Implementation ``torch_flash``: the FlashAttention 2 that torch brings, for GPUs from compute capability 8.0 on.

It calls torch's operators ``aten::_flash_attention_forward`` and ``_backward``, compiled ahead of time, whose arguments are the
same from torch 2.10 on (:data:`_HAS_SIGNATURES` looks). (:mod:`flashmla_hf.torch_flash` is the opposite: our kernels under
torch's names.) What they compute exactly they compute here; :func:`refusal` names the rest. Their contract, by torch's source
(ATen/native/transformers/cuda/flash_attn/flash_api.cpp), holds traps, each of them silent:

* Masks are bottom-right aligned, as ours. But a window's right edge of ``max_seqlen_kv`` or more counts as none, and an open
  right edge beside a closed left one as ``max_seqlen_kv``: both are wrong if a sequence has more queries than keys.
* Window edges are cut to 32 bits.
* A row that sees no key has lse +inf, ours has -inf. The backward needs +inf.
* Packed rows past the last boundary are left uninitialised, in the output and in the gradients.
* With ``max_seqlen_q`` 1 and grouped heads it takes the number of sequences for that of the rows.
* Head dims are not padded: q, k and v need the same one, a multiple of 8. Rows are read 16 bytes at a time, without a check.
* The maximum of a row is taken before the scale, which so must be positive.
* Its gradient ignores that of the lse. It is bitwise reproducible by torch's own setting only, read in forward and in backward.
* A weight is kept by 8 random bits, that is with a probability of n/256, and scaled by 1/(1 - dropout_p) of the one given: the
  two agree, and the mean is right, for multiples of 1/256 alone (:func:`_rounded_dropout`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from flashmla_hf import tested_releases
from flashmla_hf.backend import Backend
from flashmla_hf.backends import sm90
from flashmla_hf.notices import log_choice
from flashmla_hf.ops import dtype_name
from flashmla_hf.torch_state import is_transformed_eagerly
from flashmla_hf.validation import Call

_HEAD_DIM_MULTIPLE, MAX_HEAD_DIM = 8, 256
_FIRST_CAPABILITY, _LAST_CAPABILITY = (8, 0), (12, 1)  # what torch's SDPA gives to these kernels
# Their shared memory does not hold every backward of head dims above 192.
_SMALL_CAPABILITIES = ((8, 6), (8, 9), (12, 0), (12, 1))
_MAX_GRID = 65535  # batch and heads are the second and third dimension of a CUDA grid
_MAX_INDEX = 2**31  # the lse of a pack is indexed by 32 bits
_DROPOUT_STEPS = 256
_MOST_ROUNDING = 0.05  # of the share of weights that dropout drops, or of that it keeps

_FORWARD, _BACKWARD = torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward
_IS_BUILT = torch.backends.cuda.is_flash_attention_available()  # of torch's build: torch.compile need not trace it


def _has_signatures() -> bool:
    """Whether the operators take and return what this module passes and reads, and torch.compile knows that they are random."""

    def agrees(schema: Any, positional: str, returned: int) -> bool:
        names = [argument.name for argument in schema.arguments]
        keywords = {"scale", "window_size_left", "window_size_right"}
        expected = positional.split()
        optional = [argument for argument in schema.arguments[len(expected) :] if argument.name not in keywords]
        return (
            names[: len(expected)] == expected
            and keywords <= set(names[len(expected) :])
            and all(argument.has_default_value() for argument in optional)
            and len(schema.returns) == returned
        )

    shared = "cum_seq_q cum_seq_k max_q max_k dropout_p is_causal"
    try:
        forward, backward = _FORWARD.default, _BACKWARD.default
    except AttributeError:
        return False
    return (
        agrees(forward._schema, f"query key value {shared} return_debug_mask", 5)
        and agrees(backward._schema, f"grad_out query key value out logsumexp {shared} rng_state unused", 3)
        and torch.Tag.nondeterministic_seeded in forward.tags
    )


_HAS_SIGNATURES = _has_signatures()


def refusal(call: Call) -> str | None:
    return device_refusal(call.q.device) or call_refusal(call)


def device_refusal(device: torch.device) -> str | None:
    """Why torch's operators compute nothing on this device; ``None`` if the device does not rule them out."""
    if device.type != "cuda":
        return f"the tensors are on {device}: expected a GPU"
    if torch.version.hip is not None:
        return "torch is built for ROCm, whose operator has another contract: expected a torch for CUDA"
    properties = torch.cuda.get_device_properties(device)  # a constant to torch.compile
    if not _FIRST_CAPABILITY <= (properties.major, properties.minor) <= _LAST_CAPABILITY:
        first, last = (f"{major}.{minor}" for major, minor in (_FIRST_CAPABILITY, _LAST_CAPABILITY))
        got = f"{properties.name} has {properties.major}.{properties.minor}"
        return f"{got}: expected a compute capability from {first} to {last}"
    if not _IS_BUILT:
        return "this torch was built without FlashAttention"
    if not _HAS_SIGNATURES:
        releases = tested_releases.TESTED["torch"]
        return (
            f"torch {torch.__version__} has other FlashAttention operators than torch {releases[0]} to {releases[-1]}"
        )
    active = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    if active is not None:
        return (
            f"torch.nn.attention.activate_flash_attention_impl({active!r}) has replaced torch's operators: expected its "
            "own (torch.nn.attention.restore_flash_attention_impl())"
        )
    return None


def call_refusal(call: Call) -> str | None:
    """Why torch's operators do not compute exactly this call, whatever the device; ``None`` if they do."""
    if call.attn_mask is not None:
        return "attn_mask is given: expected none (impl='sdpa' and impl='reference' take one)"
    if call.softcap > 0.0 or call.sinks is not None:
        return f"{'softcap' if call.softcap > 0.0 else 'sinks'} is given: torch's FlashAttention has none"
    if call.q.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {dtype_name(call.q.dtype)}: expected float16 or bfloat16"
    if call.scale <= 0.0:
        return f"scale {call.scale}: expected a positive one"
    return dropout_refusal(call.dropout_p) or _size_refusal(call) or _window_refusal(call) or _gradient_refusal(call)


def dropout_refusal(p: float) -> str | None:
    """Why torch's operators do not drop weights with this probability; ``None`` if they do."""
    rounded = _rounded_dropout(p)
    if p == 0.0 or abs(rounded - p) <= _MOST_ROUNDING * min(p, 1.0 - p):
        return None
    return (
        f"dropout_p={p}: torch's FlashAttention drops a multiple of 1/{_DROPOUT_STEPS} of the weights, here {rounded}: "
        f"expected a probability that is within {_MOST_ROUNDING:.0%} of one (impl='sdpa' and impl='reference' take any)"
    )


def _rounded_dropout(dropout_p: float) -> float:
    """The nearest probability that the kernel draws and scales by alike."""
    return round(dropout_p * _DROPOUT_STEPS) / _DROPOUT_STEPS


def _size_refusal(call: Call) -> str | None:
    largest = max(call.q.shape[-1], call.v.shape[-1])
    if largest > MAX_HEAD_DIM:
        return f"head_dim {largest}: expected at most {MAX_HEAD_DIM}"
    if call.q.numel() == 0 or call.k.numel() == 0:
        return "there are no queries or no keys: expected at least one of both"
    if call.cu_seqlens_q is None:
        batch = call.q.shape[0]
    else:
        batch = call.cu_seqlens_q.shape[0] - 1
        if batch < 1:
            return "cu_seqlens hold no sequence: expected at least one"
        if call.q.shape[0] * call.q.shape[1] >= _MAX_INDEX:
            return f"{call.q.shape[0] * call.q.shape[1]} rows of heads in the pack: expected fewer than {_MAX_INDEX}"
    for name, size in (("sequences", batch), ("query heads", call.q.shape[-2])):
        if size > _MAX_GRID:
            return f"{size} {name}: expected at most {_MAX_GRID}"
    return None


def _window_refusal(call: Call) -> str | None:
    arguments = _arguments(call)
    # The same boundaries twice: no sequence has more queries than keys.
    if call.cu_seqlens_q is not None and call.cu_seqlens_q is call.cu_seqlens_kv:
        return None
    if arguments.right is not None and arguments.right > 0 and arguments.right >= arguments.longest_kv:
        return (
            f"window ({call.window_left}, {call.window_right}) with up to {arguments.longest_q} queries and "
            f"{arguments.longest_kv} keys in a sequence: torch's FlashAttention would move its right edge"
        )
    return None


def _gradient_refusal(call: Call) -> str | None:
    if is_transformed_eagerly():
        return "a transform of torch.func is active: expected none"
    if not torch.is_grad_enabled() or not any(x.requires_grad for x in (call.q, call.k, call.v)):
        return None
    if call.return_lse:
        return "return_lse=True with gradients: torch's FlashAttention computes none through the lse"
    if call.deterministic and not _is_deterministic():
        return (
            "deterministic=True: torch's FlashAttention follows torch.use_deterministic_algorithms(True) alone, without "
            "warn_only"
        )
    head_dim = _padded_head_dim(call)
    if head_dim > 192 and (head_dim <= 224 or call.dropout_p > 0.0) and _is_small_gpu(call.q.device):
        return f"head_dim {head_dim} with gradients: expected at most 192 on this GPU, or more than 224 without dropout"
    return None


def _is_deterministic() -> bool:
    """Whether torch's backward is bitwise reproducible by torch's setting as it is now."""
    return torch.are_deterministic_algorithms_enabled() and not _warns_only()


def _warns_only() -> bool:
    return torch.is_deterministic_algorithms_warn_only_enabled()


# A constant to torch.compile, guarded with the setting itself: a graph is compiled anew if either changes. It is what
# torch.compiler.assume_constant_result sets, which would import torch._dynamo, half of what importing this package took.
_warns_only._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _is_small_gpu(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor) in _SMALL_CAPABILITIES


def _padded_head_dim(call: Call) -> int:
    largest = max(call.q.shape[-1], call.v.shape[-1])
    return -(-largest // _HEAD_DIM_MULTIPLE) * _HEAD_DIM_MULTIPLE


@dataclass(frozen=True)
class _Arguments:
    """The operators' arguments that are no tensors; ``left`` and ``right`` are ``None`` if that edge is open. And
    ``is_deterministic``, which they read from torch's setting."""

    longest_q: int
    longest_kv: int
    dropout_p: float
    is_causal: bool
    scale: float
    left: int | None
    right: int | None
    is_deterministic: bool = False


def _arguments(call: Call) -> _Arguments:
    longest_q, longest_kv = call.max_seqlen_q, call.max_seqlen_kv
    if call.is_packed:
        # Any bound will do, and smaller ones are read as something else.
        longest_q, longest_kv = max(longest_q, 2), max(longest_kv, 1)
    left, right = call.window_left, call.window_right
    # Query i is at key position p, seqlen_kv - seqlen_q <= p < seqlen_kv: from these sizes on an edge hides nothing.
    has_left = 0 <= left < longest_kv - 1
    has_right = 0 <= right < longest_q - 1
    is_causal = right == 0 and not has_left
    if is_causal:
        has_right = False
    elif has_left and not has_right:
        has_right, right = True, longest_q - 1  # said openly, since open it would be longest_kv
    return _Arguments(
        longest_q,
        longest_kv,
        _rounded_dropout(call.dropout_p),
        is_causal,
        call.scale,
        left if has_left else None,
        right if has_right else None,
        call.deterministic,
    )


class _Flash(torch.autograd.Function):
    """q, k and v of one head dim, a multiple of 8, aligned to 16 bytes -> out and lse, in our conventions."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,  # [batch, seqlen_q, heads_q, head_dim] or packed [total_q, heads_q, head_dim]; k, v alike
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor | None,
        cu_seqlens_kv: torch.Tensor | None,
        arguments: _Arguments,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        a = arguments
        out, lse, random_state, unused, _ = _FORWARD(
            q, k, v, cu_seqlens_q, cu_seqlens_kv, a.longest_q, a.longest_kv, a.dropout_p, a.is_causal, False, scale=a.scale,
            window_size_left=a.left, window_size_right=a.right,
        )  # fmt: skip
        if cu_seqlens_q is not None:
            rest = _rest(q, cu_seqlens_q)
            out = _filled(out, rest[:, None, None], 0.0)
            lse = _filled(lse, rest, torch.inf)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_kv, random_state, unused)
        ctx.arguments = arguments
        ours = lse.masked_fill(lse == torch.inf, -torch.inf)
        ctx.mark_non_differentiable(ours)
        return out, ours

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Not once_differentiable, which lets a second derivative pass as 0: torch's operator raises for one.
        q, k, v, out, lse, cu_seqlens_q, cu_seqlens_kv, random_state, unused = ctx.saved_tensors
        a = ctx.arguments
        is_aligned = torch.compiler.is_compiling() or dout.storage_offset() % 8 == 0  # torch.compile traces no offset
        if not (is_aligned and dout.is_contiguous()):
            dout = dout.clone(memory_format=torch.contiguous_format)
        if a.is_deterministic and not _is_deterministic():
            raise RuntimeError(
                "flashmla attention: impl='torch_flash': deterministic gradients were asked for, and "
                "torch.use_deterministic_algorithms has changed between forward and backward: expected True in both"
            )
        dq, dk, dv = _BACKWARD(
            dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_kv, a.longest_q, a.longest_kv, a.dropout_p, a.is_causal,
            random_state, unused, scale=a.scale, window_size_left=a.left, window_size_right=a.right,
        )  # fmt: skip
        if cu_seqlens_q is not None:
            dq = _filled(dq, _rest(q, cu_seqlens_q)[:, None, None], 0.0)
            rest = _rest(k, cu_seqlens_kv)[:, None, None]
            dk, dv = _filled(dk, rest, 0.0), _filled(dv, rest, 0.0)
        return dq, dk, dv, None, None, None


def _rest(x: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Which rows of the pack lie past the last boundary: bool [total]. The boundary is not read back."""
    return torch.arange(x.shape[0], device=x.device) >= cu_seqlens[-1]


def _filled(x: torch.Tensor, places: torch.Tensor, value: float) -> torch.Tensor:
    # In place, but for torch.compile: that of torch 2.11 loses the gradients of an output that its Function changes in place.
    return x.masked_fill(places, value) if torch.compiler.is_compiling() else x.masked_fill_(places, value)


def run(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads head dims with zeros, which change no product, and copies what is not aligned to 16 bytes. The operator's output has
    q's strides; that of every implementation of a kernel is contiguous."""
    head_dim_v, head_dim = call.v.shape[-1], _padded_head_dim(call)
    unaligned = sm90.unaligned(call)
    tensors = []
    for name, x in (("q", call.q), ("k", call.k), ("v", call.v)):
        if x.shape[-1] != head_dim:
            x = functional.pad(x, (0, head_dim - x.shape[-1]))
        elif name in unaligned:
            log_choice(call, "torch_flash", f"copies {name}")
            x = x.clone(memory_format=torch.contiguous_format)
        tensors.append(x)
    inputs = [*tensors, call.cu_seqlens_q, call.cu_seqlens_kv]
    if torch.compiler.is_compiling():  # which takes no tensor twice
        inputs = [
            x.view_as(x) if x is not None and any(x is y for y in inputs[:i]) else x for i, x in enumerate(inputs)
        ]
    out, lse = _Flash.apply(*inputs, _arguments(call))
    return out[..., :head_dim_v].contiguous(), lse


BACKEND = Backend(refusal, run)
