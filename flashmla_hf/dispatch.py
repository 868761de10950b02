"""The dispatch layer: :func:`attention`, its checks, and the choice of an implementation.

Which implementation runs when ``impl`` is ``None``:

=====================================================  ===========================================================
the call has                                           implementation
=====================================================  ===========================================================
``attn_mask`` or ``dropout_p > 0``                     ``sdpa`` if torch's SDPA computes the case exactly, else
                                                       ``reference``; one warning, since memory grows as seqlen²
fp16 or bf16 tensors on a Hopper GPU, head dims of     ``sm90``, where its library is built; q, k or v whose strides
multiples of 8 up to 256                               or address TMA cannot read (not multiples of 16 bytes) is copied
tensors on a GPU, anything else                        ``flex``
tensors on the CPU                                     ``cpu``
=====================================================  ===========================================================

Nothing else is ever chosen silently: where the table's choice cannot compute the call, the call raises and names the
reason and the way out. An explicit ``impl`` never falls back.
"""

from __future__ import annotations

import logging
import math
import numbers
import operator
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from flashmla_hf import ops, reference
from flashmla_hf.backends import flex
from flashmla_hf.ops import dtype_name

logger = logging.getLogger("flashmla_hf")

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Read once: environment variables are not looked at in the forward pass.
_LOG_CHOICES = os.environ.get("FLASHMLA_LOG", "0") == "1"
_DETERMINISTIC = os.environ.get("FLASH_ATTENTION_DETERMINISTIC", "0") == "1"
_logged: set[tuple] = set()
_warned: set[str] = set()


@dataclass(slots=True)  # not frozen: that makes it three times as slow to build, and it is built in every call
class Call:
    """One validated call, defaults resolved; nobody changes it. Field names and shapes are the operators' (:mod:`ops`)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    sinks: torch.Tensor | None
    attn_mask: torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_kv: torch.Tensor | None
    max_seqlen_q: int
    max_seqlen_kv: int
    scale: float
    window_left: int
    window_right: int
    softcap: float
    dropout_p: float
    deterministic: bool
    return_lse: bool

    @property
    def is_packed(self) -> bool:
        return self.cu_seqlens_q is not None


@dataclass(frozen=True)
class Implementation:
    """``refusal(call)`` says why it cannot compute the call (``None``: it can); ``run(call)`` gives ``(out, lse)``.

    ``unaligned(call)`` names the tensors it cannot read where they lie: automatic dispatch copies them, an explicit ``impl``
    refuses.
    """

    refusal: Callable[[Call], str | None]
    run: Callable[[Call], tuple[torch.Tensor, torch.Tensor | None]]
    unaligned: Callable[[Call], list[str]] = lambda call: []


def _kernel_refusal(call: Call) -> str | None:
    """What no fused kernel of this package computes."""
    if call.attn_mask is not None:
        return "attn_mask is given: expected none (impl='sdpa' and impl='reference' take one)"
    if call.dropout_p > 0.0:
        return f"dropout_p={call.dropout_p}: expected 0 (impl='sdpa' and impl='reference' compute dropout)"
    if call.q.dtype not in KERNEL_DTYPES:
        return f"dtype {dtype_name(call.q.dtype)}: expected float32, float16 or bfloat16 (impl='reference' computes float64)"
    return None


def _cpu_refusal(call: Call) -> str | None:
    if "cpu" in ops.unavailable:
        return f"{ops.unavailable['cpu']}; reinstall flashmla_hf where a C++17 compiler is present"
    if call.q.device.type not in ("cpu", "meta"):
        return f"the tensors are on {call.q.device}: expected cpu"
    return _kernel_refusal(call)


def _sm90_refusal(call: Call) -> str | None:
    if "sm90" in ops.unavailable:
        return f"{ops.unavailable['sm90']}; impl='flex' serves every GPU (python -m flashmla_hf doctor says more)"
    if call.q.device.type != "cuda":
        return f"the tensors are on {call.q.device}: expected a Hopper GPU"
    properties = torch.cuda.get_device_properties(call.q.device)  # a constant to torch.compile
    if (properties.major, properties.minor) != (9, 0):
        return f"{properties.name} is not a Hopper GPU (compute capability 9.0)"
    if call.q.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {dtype_name(call.q.dtype)}: expected float16 or bfloat16"
    for name, head_dim in (("q and k", call.q.shape[-1]), ("v", call.v.shape[-1])):
        if head_dim % 8 != 0 or head_dim > 256:
            return f"{name}: head_dim {head_dim}: expected a multiple of 8 up to 256"
    return _kernel_refusal(call)


def _unaligned(call: Call) -> list[str]:
    """Which of q, k and v TMA cannot read where they lie.

    Storages begin aligned, so an offset stands for an address. torch.compile traces neither; there the operator refuses an
    address that does not fit.
    """
    names = []
    for name, x in (("q", call.q), ("k", call.k), ("v", call.v)):
        sizes_and_strides = zip(x.shape[:-1], x.stride()[:-1], strict=True)
        is_unaligned = any(size > 1 and (stride % 8 != 0 or stride == 0) for size, stride in sizes_and_strides)
        if not torch.compiler.is_compiling():
            is_unaligned = is_unaligned or x.storage_offset() % 8 != 0
        if is_unaligned and x.numel() > 0:
            names.append(name)
    return names


def _flex_refusal(call: Call) -> str | None:
    if call.q.device.type != "cuda":
        return f"the tensors are on {call.q.device}: expected a GPU"
    return _kernel_refusal(call) or flex.refusal(call.q, call.k, call.v)


def _sdpa_refusal(call: Call) -> str | None:
    if call.is_packed:
        return "cu_seqlens are given: expected the dense layout"
    if call.softcap > 0.0 or call.sinks is not None:
        return f"{'softcap' if call.softcap > 0.0 else 'sinks'} is given: torch's SDPA has none (impl='reference' computes it)"
    if call.return_lse:
        return "return_lse=True: torch's SDPA returns none (impl='reference' does)"
    if _autocast_rounds_backward(call):
        rounded, kept = dtype_name(torch.get_autocast_dtype(call.q.device.type)), dtype_name(call.q.dtype)
        return (
            f"autocast to {rounded} is on and torch's SDPA has no fused kernel for this call: its backward would not be in "
            f"{kept} (impl='reference' keeps it)"
        )
    return None


def _autocast_rounds_backward(call: Call) -> bool:
    """Whether the backward of SDPA would be products of matrices, which autocast rewrites; a fused kernel's is not."""
    device = call.q.device
    if device.type == "meta" or torch.compiler.is_compiling() or not torch.is_autocast_enabled(device.type):
        return False
    tensors = [x for x in (call.q, call.k, call.v, call.attn_mask) if x is not None]
    if torch.get_autocast_dtype(device.type) == _sdpa_dtype(call) or not torch.is_grad_enabled():
        return False
    if ops.has_transforms():  # which say nothing true of requires_grad, and are no tensors to ask a kernel about
        return True
    if not any(x.requires_grad for x in tensors):
        return False
    q, k, v, mask, _ = _sdpa_inputs(call)
    choice = torch._fused_sdp_choice(
        q, k, v, mask, call.dropout_p, False, scale=call.scale, enable_gqa=_has_groups(call)
    )
    return choice == int(torch.nn.attention.SDPBackend.MATH)


def _run_operator(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.flash_attn(
        call.q,
        call.k,
        call.v,
        call.sinks,
        call.cu_seqlens_q,
        call.cu_seqlens_kv,
        call.max_seqlen_q,
        call.max_seqlen_kv,
        call.scale,
        call.window_left,
        call.window_right,
        call.softcap,
        call.deterministic,
    )


def _semantics(call: Call) -> dict[str, object]:
    """What flex and the reference both take by keyword."""
    return {
        "sinks": call.sinks,
        "cu_seqlens_q": call.cu_seqlens_q,
        "cu_seqlens_kv": call.cu_seqlens_kv,
        "scale": call.scale,
        "window_left": call.window_left,
        "window_right": call.window_right,
        "softcap": call.softcap,
    }


def _run_flex(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    return flex.attention(call.q, call.k, call.v, **_semantics(call))


def _run_reference(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.attention(
        call.q, call.k, call.v, attn_mask=call.attn_mask, dropout_p=call.dropout_p, **_semantics(call)
    )


def _has_groups(call: Call) -> bool:
    return call.q.shape[2] != call.k.shape[2]


def _sdpa_dtype(call: Call) -> torch.dtype:
    """Of q, but that a bias of more precision is not rounded."""
    if call.attn_mask is None or call.attn_mask.dtype == torch.bool:
        return call.q.dtype
    return torch.promote_types(call.q.dtype, call.attn_mask.dtype)


def _sdpa_inputs(call: Call) -> tuple[torch.Tensor | None, ...]:
    """q, k, v and the mask as SDPA takes them, and which rows see no key; there it answers what its kernels like."""
    seqlen_q, seqlen_kv, dtype = call.q.shape[1], call.k.shape[1], _sdpa_dtype(call)
    mask = reference.visible_keys(seqlen_q, seqlen_kv, call.window_left, call.window_right, call.q.device)
    is_dead = None if mask is None else ~mask.any(dim=-1)[None, None, :, None]
    if call.attn_mask is not None:
        attn_mask = call.attn_mask[(None,) * (4 - call.attn_mask.dim())]
        if attn_mask.shape[-1] != seqlen_kv:
            attn_mask = attn_mask.expand(*attn_mask.shape[:-1], seqlen_kv).contiguous()
        if attn_mask.dtype == torch.bool:
            mask = attn_mask if mask is None else attn_mask & mask
            is_dead = ~mask.any(dim=-1, keepdim=True)
        else:
            bias = attn_mask.to(dtype)
            mask = bias if mask is None else bias.masked_fill(~mask, -math.inf)
            is_dead = (mask == -math.inf).all(dim=-1, keepdim=True)
    if mask is not None:
        # Let a dead row see everything, so that no backend makes a NaN of it; it is cleared afterwards (gradients included).
        mask = mask | is_dead if mask.dtype == torch.bool else mask.masked_fill(is_dead, 0.0)
    return *(x.transpose(1, 2).to(dtype) for x in (call.q, call.k, call.v)), mask, is_dead


def _run_sdpa(call: Call) -> tuple[torch.Tensor, None]:
    with ops.without_autocast(call.q.device):
        q, k, v, mask, is_dead = _sdpa_inputs(call)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=call.dropout_p, scale=call.scale, enable_gqa=_has_groups(call)
        )
        if is_dead is not None:
            out = out.masked_fill(is_dead, 0.0)
    return out.transpose(1, 2).to(call.q.dtype), None


def _hides_what_is_not_finite(call: Call) -> bool:
    """Whether SDPA might carry a NaN to rows that do not see it: its products know no mask, and 0 * NaN is NaN. Reads values,
    which on a GPU waits for them; ``False`` while something traces, transforms or captures the call, which has no values."""
    if call.attn_mask is None and call.window_left < 0 and call.window_right < 0:
        return False
    tensors = (call.q, call.k, call.v)
    return all(map(reference.can_read, tensors)) and not bool(torch.stack([x.isfinite().all() for x in tensors]).all())


_SM90 = Implementation(_sm90_refusal, _run_operator, _unaligned)
_CPU = Implementation(_cpu_refusal, _run_operator)
IMPLEMENTATIONS = {
    "sm90": _SM90,
    "cpu": _CPU,
    "flex": Implementation(_flex_refusal, _run_flex),
    "sdpa": Implementation(_sdpa_refusal, _run_sdpa),
    "reference": Implementation(lambda call: None, _run_reference),
}


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_kv: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_kv: int | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    impl: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact multi-head attention, differentiable in q, k, v, sinks and through the returned lse, in O(seqlen) memory.

    ``O = softmax(mask(softcap(scale * Q Kᵀ))) V`` per head, computed in a stream with online softmax
    (FlashAttention-2, arXiv 2307.08691).

    Args:
        q: [batch, seqlen_q, heads_q, head_dim_qk], or packed [total_q, heads_q, head_dim_qk] with ``cu_seqlens_*``.
        k: [batch, seqlen_kv, heads_kv, head_dim_qk], or packed. ``heads_q`` is a multiple of ``heads_kv`` (GQA, MQA):
            query head h reads kv head ``h // (heads_q // heads_kv)``; nothing is repeated in memory.
        v: [batch, seqlen_kv, heads_kv, head_dim_v], or packed. q, k, v share one dtype and device; any strides, the
            last dimension contiguous.
        scale: factor on Q Kᵀ; ``None`` is ``head_dim_qk ** -0.5``.
        is_causal: key j is visible to query i where ``j <= i + seqlen_kv - seqlen_q`` (bottom-right aligned).
        window: ``(left, right)``: query i, at key position ``p = i + seqlen_kv - seqlen_q``, sees keys
            ``p - left ... p + right``, both included; -1 or ``None`` is unbounded. ``is_causal`` makes right 0.
        softcap: if positive, scores become ``softcap * tanh(scores / softcap)`` before masking.
        sinks: [heads_q] logits, each one more key without a value in its head's softmax.
        attn_mask: broadcasts to [batch, heads_q, seqlen_q, seqlen_kv]; boolean (true keeps) or floating (added to the
            scores after softcap, in the wider of its dtype and q's; -inf hides); joins ``is_causal`` and ``window``. No
            fused kernel takes one: see the table above.
        dropout_p: probability of dropping a weight. No fused kernel drops: see the table above.
        cu_seqlens_q, cu_seqlens_kv: int32 [num_sequences + 1] boundaries of packed sequences, from 0, never falling;
            both or neither. Sequences may be empty; rows past the last boundary belong to none. On a GPU the values
            are not read back to be checked.
        max_seqlen_q, max_seqlen_kv: the longest sequence of the pack, or any bound on it; ``None`` is the packed length.
        return_lse: also return the natural logarithm of each softmax denominator, sink included.
        deterministic: bitwise equal gradients on repeat; ``None`` follows ``torch.use_deterministic_algorithms`` and the
            environment variable FLASH_ATTENTION_DETERMINISTIC (read at import).
        impl: ``None`` follows the table above; ``"sm90"``, ``"cpu"``, ``"flex"``, ``"sdpa"`` or ``"reference"``
            is used or refused.

    Returns:
        out [batch, seqlen_q, heads_q, head_dim_v] (packed: [total_q, heads_q, head_dim_v]) in q's dtype; with
        ``return_lse`` also lse fp32 [batch, heads_q, seqlen_q] (packed: [heads_q, total_q]). A query that sees no key has
        out 0 and lse -inf (the sink's logit where there is a sink).

    What is hidden from a query never reaches it, whatever it holds (NaN, infinity), by ``"cpu"`` and ``"reference"``.
    ``"sm90"`` promises that of everything outside the query's sequence. Inside it, and by ``"flex"`` and ``"sdpa"``, a hidden
    value that is not finite can make 0·NaN of a weight of 0, as in eager attention. Automatic dispatch looks at the values of
    q, k and v before it takes ``"sdpa"`` for a call that hides something, and takes ``"reference"`` if one is not finite;
    torch.compile, torch.func and CUDA graphs allow no look.
    Autocast changes nothing: the result has q's dtype.

    ``torch.func`` and ``torch.vmap`` work, first derivatives included; forward mode and second derivatives raise by the fused
    kernels (``impl="reference"`` has both). Boundaries of packed sequences cannot be vmapped.

    Raises:
        TypeError: an argument of the wrong type or dtype. ValueError: a wrong shape or value. RuntimeError: the
        implementation cannot compute this call, with the reason and the way out.
    """
    # The checks of a call in Python, and the operator's in torch, take longer than a short kernel, and the host's in C++ see
    # the same things. torch.compile traces nothing of this.
    if not torch.compiler.is_compiling() and attn_mask is None and not _LOG_CHOICES and _are_operators():
        output = ops.attend_directly(
            q, k, v, scale, is_causal, window, softcap, sinks, dropout_p, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q,
            max_seqlen_kv, _is_deterministic(deterministic), impl, return_lse,
        )  # fmt: skip
        if output is not None:
            return output
    call = _validate(
        q, k, v, scale, is_causal, window, softcap, sinks, attn_mask, dropout_p, cu_seqlens_q, cu_seqlens_kv,
        max_seqlen_q, max_seqlen_kv, return_lse, deterministic,
    )  # fmt: skip
    name, call = _choose(call, impl)
    out, lse = IMPLEMENTATIONS[name].run(call)
    return (out, lse) if return_lse else out


def _are_operators() -> bool:
    """Whether nobody has put something else in the compiled kernels' place, as tests do."""
    return IMPLEMENTATIONS["sm90"] is _SM90 and IMPLEMENTATIONS["cpu"] is _CPU


def _is_deterministic(wanted: bool | None) -> bool:
    if wanted is None:
        return _DETERMINISTIC or torch.are_deterministic_algorithms_enabled()
    return bool(wanted)


def _choose(call: Call, impl: str | None) -> tuple[str, Call]:
    """The implementation for this call by the module's table, and the call as it takes it; raises where none can."""
    if impl is not None:
        if impl not in IMPLEMENTATIONS:
            raise ValueError(f"flashmla attention: impl: expected one of {list(IMPLEMENTATIONS)} or None, got {impl!r}")
        reason = IMPLEMENTATIONS[impl].refusal(call)
        if reason is None and (names := IMPLEMENTATIONS[impl].unaligned(call)):
            reason = f"{names[0]}: expected an address and strides in multiples of 16 bytes; pass a contiguous copy (.clone())"
        if reason is not None:
            raise RuntimeError(f"flashmla attention: impl={impl!r} cannot compute this call: {reason}")
        _log(call, impl, "explicit")
        return impl, call

    if call.attn_mask is not None or call.dropout_p > 0.0:
        argument = "attn_mask" if call.attn_mask is not None else "dropout_p"
        choice = "reference" if _sdpa_refusal(call) is not None or _hides_what_is_not_finite(call) else "sdpa"
        _warn_once(
            f"flashmla attention: {argument} is computed by impl={choice!r}, exactly but not by the fused kernel: memory "
            f"grows with seqlen_q * seqlen_kv and speed falls. Without {argument} the fused kernel runs."
        )
        _log(call, choice, argument)
        return choice, call

    device = call.q.device.type
    candidates = {"cuda": ("sm90", "flex"), "cpu": ("cpu",), "meta": ("cpu",)}.get(device)
    if candidates is None:
        raise RuntimeError(
            f"flashmla attention: no implementation for tensors on {call.q.device}: expected cpu or cuda; move them, or "
            "pass impl='reference' (exact, memory grows as seqlen²)"
        )
    reasons = []
    for name in candidates:
        reason = IMPLEMENTATIONS[name].refusal(call)
        if reason is None:
            names = IMPLEMENTATIONS[name].unaligned(call)
            _log(call, name, "; ".join((*reasons, *(f"copies {n}" for n in names))) or f"first choice on {device}")
            copies = {n: getattr(call, n).clone(memory_format=torch.contiguous_format) for n in names}
            return name, replace(call, **copies) if copies else call
        reasons.append(f"{name}: {reason}")
    raise RuntimeError("flashmla attention: no implementation computes this call. " + "; ".join(reasons))


def _log(call: Call, choice: str, reason: str) -> None:
    if not _LOG_CHOICES or torch.compiler.is_compiling():
        return
    key = (tuple(call.q.shape), tuple(call.k.shape), call.v.shape[-1], call.q.dtype, choice, reason)
    if key not in _logged:
        _logged.add(key)
        logger.warning(
            "q%s k%s head_dim_v=%d %s -> %s (%s)", [*key[0]], [*key[1]], key[2], dtype_name(key[3]), choice, reason
        )


def _warn_once(message: str) -> None:
    if message not in _warned and not torch.compiler.is_compiling():
        _warned.add(message)
        warnings.warn(message, stacklevel=4)


def _fail(kind: type[Exception], argument: str, expected: str, got: object) -> None:
    raise kind(f"flashmla attention: {argument}: expected {expected}, got {got}")


def _validate(
    q, k, v, scale, is_causal, window, softcap, sinks, attn_mask, dropout_p, cu_seqlens_q, cu_seqlens_kv,
    max_seqlen_q, max_seqlen_kv, return_lse, deterministic,
) -> Call:  # fmt: skip
    """Every argument checked and every default resolved; the values of cu_seqlens are the implementations' to check."""
    is_packed = cu_seqlens_q is not None or cu_seqlens_kv is not None
    # Strides inside a transform of torch.func are not those of memory: the operators' rules see to these.
    looks_at_strides = not ops.has_transforms()
    has_empty_strides = False
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, x)
        if x.dim() != (3 if is_packed else 4):
            layout = (
                "[total, heads, dim] with cu_seqlens" if is_packed else "[batch, seqlen, heads, dim] without cu_seqlens"
            )
            _fail(ValueError, name, layout, f"{x.dim()} dimensions {[*x.shape]}")
        if x.dtype != q.dtype:
            _fail(TypeError, name, f"dtype {dtype_name(q.dtype)} (that of q)", dtype_name(x.dtype))
        if x.device != q.device:
            _fail(ValueError, name, f"device {q.device} (that of q)", x.device)
        if x.shape[-1] == 0 or x.shape[-2] == 0:
            _fail(ValueError, name, "at least one head and one dimension", f"shape {[*x.shape]}")
        if looks_at_strides and x.stride(-1) != 1 and x.shape[-1] != 1:
            if x.numel() != 0:
                _fail(ValueError, name, "a contiguous last dimension (call .contiguous())", f"stride {x.stride(-1)}")
            has_empty_strides = True
    if has_empty_strides:
        # Without elements no stride means anything, and contiguous() changes none.
        q, k, v = (x.clone(memory_format=torch.contiguous_format) if x.numel() == 0 else x for x in (q, k, v))
    if not q.dtype.is_floating_point:
        _fail(TypeError, "q", "a floating dtype", dtype_name(q.dtype))
    if k.shape[-1] != q.shape[-1]:
        _fail(ValueError, "k", f"head_dim {q.shape[-1]} (that of q)", k.shape[-1])
    if k.shape[:-1] != v.shape[:-1]:
        _fail(ValueError, "v", f"shape {[*k.shape[:-1]]} before the last dimension (that of k)", [*v.shape[:-1]])
    if not is_packed and k.shape[0] != q.shape[0]:
        _fail(ValueError, "k", f"batch {q.shape[0]} (that of q)", k.shape[0])
    heads_q, heads_kv = q.shape[-2], k.shape[-2]
    if heads_q % heads_kv != 0:
        _fail(ValueError, "k", f"a number of heads that divides q's {heads_q}", heads_kv)

    if not is_packed and (max_seqlen_q is not None or max_seqlen_kv is not None):
        name, value = ("max_seqlen_kv", max_seqlen_kv) if max_seqlen_q is None else ("max_seqlen_q", max_seqlen_q)
        _fail(ValueError, name, "none without cu_seqlens", value)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    softcap, dropout_p, scale = _number("softcap", softcap), _number("dropout_p", dropout_p), _number("scale", scale)
    if softcap < 0.0:
        _fail(ValueError, "softcap", "0 (none) or a positive number", softcap)
    if not 0.0 <= dropout_p < 1.0:
        _fail(ValueError, "dropout_p", "a number in [0, 1)", dropout_p)
    if isinstance(scale, torch.SymFloat):
        # Of a symbolic head dim: an operator's number would make it a constant.
        q, scale = (q * scale).to(q.dtype), 1.0
    window_left, window_right = _resolve_window(window, is_causal)

    if sinks is not None:
        _check_tensor("sinks", sinks)
        if tuple(sinks.shape) != (heads_q,):
            _fail(ValueError, "sinks", f"shape [{heads_q}] (one logit per query head)", [*sinks.shape])
        if not sinks.dtype.is_floating_point:
            _fail(TypeError, "sinks", "a floating dtype", dtype_name(sinks.dtype))
        if sinks.device != q.device:
            _fail(ValueError, "sinks", f"device {q.device} (that of q)", sinks.device)
        # fp32 statistics, except for float64 inputs, which only the reference takes.
        sinks = sinks.to(torch.promote_types(torch.float32, q.dtype)).contiguous()

    if is_packed:
        _check_cu_seqlens(cu_seqlens_q, cu_seqlens_kv, q)
        if attn_mask is not None:
            _fail(ValueError, "attn_mask", "none with packed sequences (cu_seqlens already separate them)", "a mask")
        max_seqlen_q = _max_seqlen("max_seqlen_q", max_seqlen_q, q.shape[0])
        max_seqlen_kv = _max_seqlen("max_seqlen_kv", max_seqlen_kv, k.shape[0])
    else:
        max_seqlen_q, max_seqlen_kv = q.shape[1], k.shape[1]
    if attn_mask is not None:
        _check_attn_mask(attn_mask, (q.shape[0], heads_q, q.shape[1], k.shape[1]), q.device)

    return Call(
        q, k, v, sinks, attn_mask, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, scale,
        window_left, window_right, softcap, dropout_p, _is_deterministic(deterministic), bool(return_lse),
    )  # fmt: skip


def _check_tensor(name: str, x: object) -> None:
    if not isinstance(x, torch.Tensor):
        _fail(TypeError, name, "a torch.Tensor", type(x).__name__)
    if x.layout != torch.strided or x.is_nested:
        _fail(
            TypeError, name, "a dense strided tensor (pack ragged batches with cu_seqlens)", "a sparse or nested tensor"
        )


def _number(name: str, value: object) -> float:
    """A number of Python's, numpy's, a symbolic one, or one in a tensor, as a float; a symbolic one stays that."""
    if isinstance(value, torch.Tensor):
        if value.dim() != 0 or value.dtype == torch.bool or value.is_complex():
            _fail(TypeError, name, "a number", f"a tensor {[*value.shape]} of {dtype_name(value.dtype)}")
        if value.requires_grad:
            expected = "a number, for which no gradient is computed (multiply q by it)"
            _fail(TypeError, name, expected, "a tensor that requires one")
        value = value.item()
    if not isinstance(value, (int, float)):
        if isinstance(value, (torch.SymFloat, torch.SymInt)):
            return torch.sym_float(value)
        if not isinstance(value, numbers.Real):
            _fail(TypeError, name, "a number", type(value).__name__)
        value = float(value)
    if isinstance(value, bool):
        _fail(TypeError, name, "a number", "bool")
    if not -_LARGEST <= value <= _LARGEST:  # torch.compile traces a comparison, not math.isfinite
        _fail(ValueError, name, "a finite number", value)
    return float(value)


_LARGEST = sys.float_info.max  # an int may be larger


def _integer(name: str, value: object, expected: str) -> int:
    """An int of Python's, numpy's, a symbolic one, or one in a tensor."""
    if isinstance(value, torch.Tensor):  # some data collators hand a zero-dimensional tensor
        if value.dim() != 0 or value.dtype == torch.bool or value.is_floating_point() or value.is_complex():
            _fail(TypeError, name, expected, f"a tensor {[*value.shape]} of {dtype_name(value.dtype)}")
        return value.item()
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        if isinstance(value, bool) or not hasattr(type(value), "__index__"):
            _fail(TypeError, name, expected, repr(value))
        value = operator.index(value)
    return value


def _resolve_window(window: object, is_causal: bool) -> tuple[int, int]:
    if window is None:
        window = (-1, -1)
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        _fail(TypeError, "window", "a pair (left, right)", window)
    bounds = []
    for side, bound in zip(("left", "right"), window, strict=True):
        bound = -1 if bound is None else _integer(f"window {side}", bound, "an int or None")
        if bound < -1:
            _fail(ValueError, f"window {side}", "a bound >= 0, or -1 or None for unbounded", bound)
        bounds.append(min(bound, _FARTHEST))
    return bounds[0], 0 if is_causal else bounds[1]


_FARTHEST = 2**62  # reaches every key, and fits the operators' 64 bits


def _check_cu_seqlens(cu_seqlens_q: object, cu_seqlens_kv: object, q: torch.Tensor) -> None:
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_kv", cu_seqlens_kv)):
        if x is None:
            _fail(ValueError, name, "a tensor, since the other cu_seqlens is given (pass both or neither)", None)
        _check_tensor(name, x)
        if x.dtype != torch.int32:
            _fail(TypeError, name, "dtype int32", dtype_name(x.dtype))
        if x.dim() != 1 or x.shape[0] < 1 or not x.is_contiguous():
            _fail(
                ValueError, name, "a contiguous tensor [num_sequences + 1]", f"shape {[*x.shape]}, stride {x.stride()}"
            )
        if x.device != q.device:
            _fail(ValueError, name, f"device {q.device} (that of q)", x.device)
    if cu_seqlens_q.shape != cu_seqlens_kv.shape:
        _fail(
            ValueError, "cu_seqlens_kv", f"{cu_seqlens_q.shape[0]} boundaries (as cu_seqlens_q)", cu_seqlens_kv.shape[0]
        )


def _max_seqlen(name: str, value: object, bound: int) -> int:
    if value is None:
        return bound
    value = _integer(name, value, "an int")
    if torch.compiler.is_compiling():
        # A length that comes from the data has no value yet; the host compares it with the boundaries.
        from torch.fx.experimental.symbolic_shapes import guard_or_false

        is_negative = guard_or_false(value < 0)
    else:
        is_negative = value < 0
    if is_negative:
        _fail(ValueError, name, "a length >= 0", value)
    return value


def _check_attn_mask(attn_mask: object, shape: tuple[int, ...], device: torch.device) -> None:
    _check_tensor("attn_mask", attn_mask)
    if attn_mask.dtype != torch.bool and not attn_mask.dtype.is_floating_point:
        _fail(
            TypeError,
            "attn_mask",
            "dtype bool (true keeps) or a floating dtype (added)",
            dtype_name(attn_mask.dtype),
        )
    if attn_mask.dim() > 4 or any(
        mine not in (1, full) for mine, full in zip(reversed(attn_mask.shape), reversed(shape), strict=False)
    ):
        _fail(ValueError, "attn_mask", f"a shape that broadcasts to {[*shape]}", [*attn_mask.shape])
    if attn_mask.device != device:
        _fail(ValueError, "attn_mask", f"device {device} (that of q)", attn_mask.device)


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, None]:
    """:func:`attention` under flash-attn 2's name and argument order, for code written against that package.

    q, k, v [batch, seqlen, heads, dim]; ``s_aux`` [heads_q] are the sinks. With ``return_attn_probs`` returns
    ``(out, lse, None)``: the weights themselves are never materialised. ``alibi_slopes`` raises.
    """
    return _flash_attn(
        q, k, v, alibi_slopes, return_attn_probs, dropout_p=dropout_p, scale=softmax_scale, is_causal=causal,
        window=window_size, softcap=softcap, deterministic=deterministic, sinks=s_aux,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, None]:
    """:func:`attention` on packed [total, heads, dim] tensors under flash-attn 2's name and argument order.

    As :func:`flash_attn_func`; ``block_table`` (a paged cache) raises.
    """
    if block_table is not None:
        _fail(ValueError, "block_table", "none (gather the pages into packed k and v first)", "a tensor")
    return _flash_attn(
        q, k, v, alibi_slopes, return_attn_probs, cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_kv=max_seqlen_k, dropout_p=dropout_p, scale=softmax_scale,
        is_causal=causal, window=window_size, softcap=softcap, deterministic=deterministic, sinks=s_aux,
    )  # fmt: skip


def _flash_attn(q, k, v, alibi_slopes, return_attn_probs, **options):
    if alibi_slopes is not None:
        _fail(ValueError, "alibi_slopes", "none (pass the bias to flashmla_hf.attention as attn_mask)", "a tensor")
    # flash-attn's deterministic=False is a default, not a wish: the global switches still count.
    options["deterministic"] = options["deterministic"] or None
    out = attention(q, k, v, return_lse=return_attn_probs, **options)
    return (*out, None) if return_attn_probs else out
