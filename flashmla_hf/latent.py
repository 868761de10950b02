"""The public function :func:`latent_attention`: attention to rows that are keys and values, for training.

Which implementation runs when ``impl`` is ``None``:

=====================================================  ===========================================================
the call has                                           implementation
=====================================================  ===========================================================
fp16 or bf16 tensors on a Hopper GPU, head dims of     ``sm90``, if its library is built; it copies q or k whose
multiples of 8 up to 576 and 512                       strides or address TMA cannot read (not multiples of 16 bytes)
fp32, fp16 or bf16 tensors on the CPU                  ``cpu``
anything else                                          none: it raises, and names ``reference``
=====================================================  ===========================================================

An explicit ``impl`` never falls back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from flashmla_hf import reference
from flashmla_hf.backend import dtype_refusal
from flashmla_hf.backends import cpu, sm90
from flashmla_hf.latent_ops import flash_attn_latent
from flashmla_hf.latent_stream import Options
from flashmla_hf.notices import log_choice
from flashmla_hf.scalars import fail, flag
from flashmla_hf.validation import Call, first_columns, validate


def latent_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    head_dim_v: int,
    scale: float | None = None,
    is_causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact attention to rows that are keys and, in their first columns, values; differentiable, in O(seqlen) memory.

    The absorbed form of multi-head latent attention, for training: one row a token for all heads. The gradient of a row is
    the sum of both its uses, added up in fp32 and rounded once. :func:`flashmla_hf.decode_attention` with ``head_dim_v``
    is the same attention to a cache, without gradients.

    Args:
        q: [batch, seqlen_q, heads_q, head_dim_qk].
        k: [batch, seqlen_kv, heads_kv, head_dim_qk], in q's dtype; in DeepSeek-V2 one kv head of 512 + 64 columns. ``heads_q``
            is a multiple of ``heads_kv``: query head h reads kv head ``h // (heads_q // heads_kv)``. Any strides, the last
            dimension contiguous.
        head_dim_v: the values are the first ``head_dim_v`` columns of k, from 1 to head_dim_qk.
        scale: factor on Q Kᵀ; ``None`` means ``head_dim_qk ** -0.5``.
        is_causal, window, softcap: as of :func:`flashmla_hf.attention`, bottom-right aligned.
        sinks: [heads_q] logits, each one more key without a value in its head's softmax; differentiable.
        return_lse: also return the natural logarithm of each softmax denominator, sink included; differentiable.
        impl: ``"sm90"``, ``"cpu"`` or ``"reference"``; ``None`` follows the module's table.

    Returns:
        out [batch, seqlen_q, heads_q, head_dim_v] in q's dtype; with ``return_lse`` also lse fp32 [batch, heads_q, seqlen_q].
        A query that sees no key has out 0, lse -inf (with sinks: the sink's logit) and gradients 0.

    Gradients are bitwise equal if the call is repeated and cuBLAS repeats itself (it promises that on one stream). Beyond its
    results the backward needs ``4 * seqlen_kv * head_dim_qk`` bytes and up to 384 MiB on a GPU, 512 with softcap. Nothing waits
    for the device. A row that no query sees does not matter, even NaN. A row that is hidden from some queries and not from
    others must be finite: NaN in it may reach those too, except with ``"reference"``. Scores beyond some thousands cost digits
    of gradients, which stay finite (docs/kernels.md, Training on latents). First derivatives work, ``torch.func``'s included;
    second and forward-mode ones raise (``"reference"`` computes them). Autocast changes nothing: the result has q's dtype.
    Packed sequences, masks and dropout are :func:`flashmla_hf.attention`'s, which on CPUs takes ``attention(q, k,
    k[..., :head_dim_v])``.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has a wrong shape or value.
        RuntimeError: the implementation cannot compute this call; the message names the reason and a remedy.

    Source: DeepSeek-AI, arXiv 2405.04434, section 2.1; Dao, arXiv 2307.08691, algorithm 2.
    """
    is_causal, return_lse = flag("is_causal", is_causal), flag("return_lse", return_lse)
    values = first_columns("k", k, head_dim_v)
    call = validate(
        q, k, values, scale, is_causal, window, softcap, sinks, 0.0, None, None, None, None, True, impl, return_lse, None,
    )  # fmt: skip
    out, lse = _choose(call)(call)
    return (out, lse) if return_lse else out


def _sm90_refusal(call: Call) -> str | None:
    return sm90.rows_refusal(call.q, call.v, lambda: True) or sm90.alignment_refusal(call)


def _cpu_refusal(call: Call) -> str | None:
    return cpu.device_refusal(call.q) or dtype_refusal(call.q.dtype)


def _run(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    options = Options(call.v.shape[-1], call.scale, call.window_left, call.window_right, call.softcap)
    return flash_attn_latent(call.q, call.k, call.sinks, options)


def _run_sm90(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    # v is a view of k: it lies as k does, and is not copied.
    return _run(replace(sm90.readable(replace(call, v=call.k)), v=call.v))


def _run_reference(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = reference.attention(
        call.q, call.k, call.v, sinks=call.sinks, scale=call.scale, window_left=call.window_left,
        window_right=call.window_right, softcap=call.softcap,
    )  # fmt: skip
    return out, lse


_Run = Callable[[Call], tuple[torch.Tensor, torch.Tensor]]
IMPLEMENTATIONS: dict[str, tuple[Callable[[Call], str | None], _Run]] = {
    "sm90": (_sm90_refusal, _run_sm90),
    "cpu": (_cpu_refusal, _run),
    "reference": (lambda call: None, _run_reference),
}
_CANDIDATES = {"cuda": "sm90", "cpu": "cpu", "meta": "cpu"}


def _choose(call: Call) -> _Run:
    """The implementation for this call, by the module's table; raises if the one that was asked for cannot compute it."""
    impl, device = call.impl, call.q.device.type
    if impl is not None and impl not in IMPLEMENTATIONS:
        fail(ValueError, "impl", f"one of {list(IMPLEMENTATIONS)} or None", repr(impl))
    name = impl or _CANDIDATES.get(device, "sm90")
    refusal, run = IMPLEMENTATIONS[name]
    if (reason := refusal(call)) is not None:
        if impl is not None:
            raise RuntimeError(f"flashmla attention: impl={impl!r} cannot compute this call: {reason}")
        raise RuntimeError(
            f"flashmla attention: no kernel computes latent_attention of this call: {name}: {reason}; pass impl='reference' "
            "(exact, memory grows with seqlen_q * seqlen_kv)"
        )
    log_choice(call, name, "explicit" if impl is not None else f"first choice on {device}")
    return run
