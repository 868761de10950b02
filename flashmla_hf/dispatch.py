"""The public function :func:`attention`, and its choice of an implementation.

:mod:`flashmla_hf.validation` checks a call, :mod:`flashmla_hf.backends` holds the implementations. The module is not called
``attention``: importing it would replace the function ``flashmla_hf.attention`` by a module.

Which implementation runs when ``impl`` is ``None``:

=====================================================  ===========================================================
the call has                                           implementation
=====================================================  ===========================================================
``attn_mask``                                          ``sdpa`` if torch's SDPA computes the case exactly, else
                                                       ``reference``; one warning, since memory grows as seqlen²
``dropout_p > 0``                                      ``torch_flash`` on a GPU, if it computes the call; else as with
                                                       ``attn_mask``
fp16 or bf16 tensors on a Hopper GPU, head dims of     ``sm90``, if its library is built; it copies q, k or v whose
multiples of 8 up to 512                               strides or address TMA cannot read (not multiples of 16 bytes)
fp16 or bf16 tensors on a GPU of compute capability    ``torch_flash``, torch's FlashAttention 2: no softcap, no sinks,
8.0 or more, head dims up to 256                       no gradient through the lse (:mod:`backends.aten_flash` says all)
tensors on a GPU, anything else                        ``flex``
tensors on the CPU                                     ``cpu``
``precision="fp8"``, or fp8 tensors, on the CPU        ``cpu``: quantised q, k and v, exact probabilities
``precision="fp8"`` on a Hopper GPU, fp16 or bf16      ``sm90``, head dims of multiples of 8 up to 256
fp8 on a GPU, anything else                            none: it raises (:mod:`flashmla_hf.fp8`)
=====================================================  ===========================================================

Nothing else is chosen silently: if the table's choice cannot compute the call, the call raises an error that names the reason
and a fix. An explicit ``impl`` never falls back.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from flashmla_hf import direct, notices
from flashmla_hf.backend import Backend
from flashmla_hf.backends import aten_flash, cpu, flex, reference, sdpa, sm90
from flashmla_hf.fp8 import calls as fp8_calls
from flashmla_hf.notices import log_choice, warn_once
from flashmla_hf.scalars import fail, flag
from flashmla_hf.validation import Call, validate

# Read once: the forward pass reads no environment variable.
_DETERMINISTIC = os.environ.get("FLASH_ATTENTION_DETERMINISTIC", "0") == "1"

IMPLEMENTATIONS: dict[str, Backend] = {
    "sm90": sm90.BACKEND,
    "cpu": cpu.BACKEND,
    "torch_flash": aten_flash.BACKEND,
    "flex": flex.BACKEND,
    "sdpa": sdpa.BACKEND,
    "reference": reference.BACKEND,
}

FP8_IMPLEMENTATIONS = fp8_calls.IMPLEMENTATIONS

# Device type -> the implementations of the fused kernel, the preferred one first.
_CANDIDATES = {"cuda": ("sm90", "torch_flash", "flex"), "cpu": ("cpu",), "meta": ("cpu",)}


# Longer than 80 lines: the docstring is the contract of this package.
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
    precision: str | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
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
        scale: factor on Q Kᵀ; ``None`` means ``head_dim_qk ** -0.5``.
        is_causal: key j is visible to query i if ``j <= i + seqlen_kv - seqlen_q`` (bottom-right aligned).
        window: ``(left, right)``: query i, at key position ``p = i + seqlen_kv - seqlen_q``, sees keys
            ``p - left ... p + right``, both included; -1 or ``None`` is unbounded. ``is_causal`` makes right 0.
        softcap: if positive, scores become ``softcap * tanh(scores / softcap)`` before masking.
        sinks: [heads_q] logits, each one more key without a value in its head's softmax.
        attn_mask: broadcasts to [batch, heads_q, seqlen_q, seqlen_kv]; boolean (true keeps) or floating (added to the
            scores after softcap, in the wider of its dtype and q's; -inf hides). A key must also be visible by
            ``is_causal`` and ``window``. No fused kernel takes a mask: see the table above.
        dropout_p: probability of dropping a weight; the others are scaled by 1 / (1 - dropout_p), the lse is that of all.
            Of the fused kernels ``torch_flash`` alone computes dropout: see above. It draws from torch's generator of the
            GPU, and rounds the probability to a multiple of 1/256 (by 5 % at most, or it refuses).
        cu_seqlens_q, cu_seqlens_kv: int32 [num_sequences + 1] boundaries of packed sequences, from 0, never falling;
            both or neither. Sequences may be empty; rows past the last boundary belong to none. On a GPU the values
            are not read back, so they are not checked; where a CPU's call is traced or transformed, the operator checks them
            and raises RuntimeError.
        max_seqlen_q, max_seqlen_kv: the length of the longest packed sequence, or any upper bound on it; ``None`` means the
            packed length.
        return_lse: also return the natural logarithm of each softmax denominator, sink included.
        deterministic: gradients are bitwise equal if the call is repeated; ``None`` follows
            ``torch.use_deterministic_algorithms`` and the environment variable FLASH_ATTENTION_DETERMINISTIC (read at import).
        precision: ``"fp8"`` rotates q and k, and quantises q, k and v to e4m3 in blocks of 128 rows: for speed on a Hopper GPU,
            never exact. ``None``: the precision of the tensors. See below.
        q_descale, k_descale, v_descale: fp32 [batch, heads_kv], or packed [num_sequences, heads_kv]: the factors of q, k and v
            of float8_e4m3fn, as FlashAttention 3 takes them; all three with such tensors, none with others.
        impl: the implementation, ``"sm90"``, ``"cpu"``, ``"torch_flash"``, ``"flex"``, ``"sdpa"`` or ``"reference"``;
            ``None`` follows the table above. In fp8 ``"sm90"``, ``"cpu"`` or ``"reference"``.

    Returns:
        out [batch, seqlen_q, heads_q, head_dim_v] (packed: [total_q, heads_q, head_dim_v]) in q's dtype (bf16 for fp8 tensors);
        with ``return_lse`` also lse fp32 [batch, heads_q, seqlen_q] (packed: [heads_q, total_q]). A query that sees no key has
        out 0 and lse -inf (with sinks: the sink's logit).

    With ``"cpu"`` and ``"reference"`` a hidden value never reaches the query, even if it is NaN or infinite. ``"sm90"``
    guarantees this for values outside the query's sequence. Inside the sequence, and with ``"torch_flash"``, ``"flex"`` and
    ``"sdpa"``, a hidden value that is not finite can turn a weight of 0 into 0·NaN, as in eager attention. Automatic dispatch
    reads the values of q, k and v before it chooses ``"sdpa"`` for a call that hides something, and chooses ``"reference"`` if
    one is not finite. It cannot read them under torch.compile, torch.func and CUDA graphs. Autocast changes nothing: the
    result has q's dtype.

    ``torch.func`` and ``torch.vmap`` work, first derivatives included. Forward mode and second derivatives raise with the
    fused kernels (``impl="reference"`` computes both). Boundaries of packed sequences cannot be vmapped.

    fp8: ``"cpu"`` computes exact probabilities from the quantised q, k and v; ``"sm90"`` rounds the probabilities to e4m3, too,
    and ``"reference"`` emulates that. Gradients are those of attention at the quantised values, straight through the
    rounding (:mod:`flashmla_hf.fp8.calls` says of what function). A block has one scale, so a row's rounding depends on the
    largest value of its block, later rows included: fp8 is causal up to rounding only. It takes no ``attn_mask``, ``dropout_p``
    or ``torch.func``. What a GPU has no kernel for raises; nothing is computed in another precision.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has a wrong shape or value.
        RuntimeError: the implementation cannot compute this call; the message names the reason and a remedy.
    """
    if is_causal is not False and is_causal is not True:
        is_causal = flag("is_causal", is_causal)
    if return_lse is not False and return_lse is not True:
        return_lse = flag("return_lse", return_lse)
    # In the order of csrc/direct/direct.cpp, which validate() follows.
    request = (
        q, k, v, scale, is_causal, window, softcap, sinks, dropout_p, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q,
        max_seqlen_kv, _is_deterministic(deterministic), impl, return_lse,
    )  # fmt: skip
    has_descale = q_descale is not None or k_descale is not None or v_descale is not None
    if precision is not None or has_descale or getattr(q, "dtype", None) == fp8_calls.DTYPE:
        descales = (q_descale, k_descale, v_descale)
        fp8_call = fp8_calls.checked(validate(*request, attn_mask), precision, descales)
        out, lse = fp8_calls.choose(fp8_call, FP8_IMPLEMENTATIONS, IMPLEMENTATIONS).run(fp8_call)
        return (out, lse) if return_lse else out  # type: ignore[return-value]
    # The checks in Python and torch's dispatcher take longer than a short kernel, and the checks in C++ find the same errors.
    # torch.compile traces nothing of the fast path.
    if not torch.compiler.is_compiling() and attn_mask is None and not notices.LOG_CHOICES:
        try:
            output = direct.attend(request)
        except RuntimeError:
            validate(*request, attn_mask)  # a value that the host refuses is the ValueError of this function
            raise
        if output is not None:
            return output
    call = validate(*request, attn_mask)
    out, lse = IMPLEMENTATIONS[_choose(call)].run(call)
    return (out, lse) if return_lse else out  # type: ignore[return-value]


def _is_deterministic(wanted: bool | None) -> bool:
    if wanted is None:
        return _DETERMINISTIC or torch.are_deterministic_algorithms_enabled()
    return flag("deterministic", wanted)


def _choose(call: Call) -> str:
    """The name of the implementation for this call, by the module's table; raises if none computes it."""
    impl = call.impl
    if impl is not None:
        if impl not in IMPLEMENTATIONS:
            fail(ValueError, "impl", f"one of {list(IMPLEMENTATIONS)} or None", repr(impl))
        reason = IMPLEMENTATIONS[impl].refusal(call)
        if reason is not None:
            raise RuntimeError(f"flashmla attention: impl={impl!r} cannot compute this call: {reason}")
        log_choice(call, impl, "explicit")
        return impl

    if call.attn_mask is not None:
        return _choose_unfused(call, "attn_mask")
    if call.dropout_p > 0.0:
        reason = aten_flash.refusal(call)
        if reason is not None:
            return _choose_unfused(
                call, "dropout_p", f"; torch_flash: {reason}" if call.q.device.type == "cuda" else ""
            )
        log_choice(call, "torch_flash", "dropout_p")
        return "torch_flash"

    device = call.q.device.type
    if device not in _CANDIDATES:
        raise RuntimeError(
            f"flashmla attention: no implementation for tensors on {call.q.device}: expected cpu or cuda; move them, or "
            "pass impl='reference' (exact, memory grows with seqlen_q * seqlen_kv)"
        )
    reasons: list[str] = []
    for name in _CANDIDATES[device]:
        reason = IMPLEMENTATIONS[name].refusal(call)
        if reason is None:
            log_choice(call, name, "; ".join(reasons) or f"first choice on {device}")
            return name
        reasons.append(f"{name}: {reason}")
    raise RuntimeError("flashmla attention: no implementation computes this call. " + "; ".join(reasons))


def _choose_unfused(call: Call, argument: str, reason: str = "") -> str:
    """The name of the implementation, for a call that no fused kernel computes because of ``argument``. It warns once."""
    is_for_sdpa = sdpa.refusal(call) is None and not sdpa.hides_values_that_are_not_finite(call)
    impl = "sdpa" if is_for_sdpa else "reference"
    warn_once(
        f"flashmla attention: {argument} is computed by impl={impl!r}, exactly but not by the fused kernel: memory "
        f"grows with seqlen_q * seqlen_kv and speed falls. Without {argument} the fused kernel runs{reason}.",
        stacklevel=5,
    )
    log_choice(call, impl, argument + reason)
    return impl


def drops_in_a_fused_kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> bool:
    """Whether automatic dispatch gives q, k and v to a fused kernel with the given ``dropout_p`` (``scale``, ``softcap``,
    ``sinks`` and ``deterministic`` as for :func:`attention`), whatever their boundaries. Windows are not looked at."""
    if aten_flash.device_refusal(q.device) is not None:
        return False
    deterministic = _is_deterministic(options.get("deterministic"))
    call = validate(
        q, k, v, options.get("scale"), False, None, options.get("softcap", 0.0), options.get("sinks"), options["dropout_p"],
        None, None, None, None, deterministic, None, False, None,
    )  # fmt: skip
    return aten_flash.refusal(call) is None
