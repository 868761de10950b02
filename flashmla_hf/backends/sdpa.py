"""Implementation ``sdpa``: torch's scaled_dot_product_attention, for dense masks and dropout."""

from __future__ import annotations

import math

import torch

from flashmla_hf import reference
from flashmla_hf.backend import Backend
from flashmla_hf.ops import dtype_name
from flashmla_hf.torch_state import has_transforms, without_autocast
from flashmla_hf.validation import Call


def refusal(call: Call) -> str | None:
    if call.is_packed:
        return "cu_seqlens are given: expected the dense layout"
    if call.softcap > 0.0 or call.sinks is not None:
        return f"{'softcap' if call.softcap > 0.0 else 'sinks'} is given: torch's SDPA has none (impl='reference' computes it)"
    if call.return_lse:
        return "return_lse=True: torch's SDPA returns none (impl='reference' does)"
    if _autocast_rounds_backward(call):
        rounded, kept = dtype_name(torch.get_autocast_dtype(call.q.device.type)), dtype_name(call.q.dtype)
        return (
            f"autocast to {rounded} is on and torch's SDPA has no fused kernel for this call: its backward would compute in "
            f"{rounded}, not in {kept} (impl='reference' computes in {kept})"
        )
    return None


def _autocast_rounds_backward(call: Call) -> bool:
    """Whether SDPA's backward would consist of matrix products, which autocast rewrites; a fused kernel's does not."""
    device = call.q.device
    if device.type == "meta" or torch.compiler.is_compiling() or not torch.is_autocast_enabled(device.type):
        return False
    tensors = [x for x in (call.q, call.k, call.v, call.attn_mask) if x is not None]
    if torch.get_autocast_dtype(device.type) == _sdpa_dtype(call) or not torch.is_grad_enabled():
        return False
    if has_transforms():  # requires_grad is not known, and _fused_sdp_choice takes no wrapped tensors
        return True
    if not any(x.requires_grad for x in tensors):
        return False
    q, k, v, mask, _ = _sdpa_inputs(call)
    choice = torch._fused_sdp_choice(
        q, k, v, mask, call.dropout_p, False, scale=call.scale, enable_gqa=_has_groups(call)
    )
    return choice == int(torch.nn.attention.SDPBackend.MATH)  # type: ignore[call-overload]


def _has_groups(call: Call) -> bool:
    # A branch, since SDPA takes no SymBool, and dynamo's bool() leaves one.
    return True if call.q.shape[2] != call.k.shape[2] else False  # noqa: SIM210


def _sdpa_dtype(call: Call) -> torch.dtype:
    """The dtype of q, or that of a bias with more precision, which must not be rounded."""
    if call.attn_mask is None or call.attn_mask.dtype == torch.bool:
        return call.q.dtype
    return torch.promote_types(call.q.dtype, call.attn_mask.dtype)


def _sdpa_inputs(
    call: Call,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """q, k, v and the mask as SDPA takes them, and which rows see no key. SDPA does not define its result for those."""
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
    if mask is not None and is_dead is not None:
        # Let a dead row see everything, so that no backend computes NaN for it; it is cleared afterwards, gradients included.
        mask = mask | is_dead if mask.dtype == torch.bool else mask.masked_fill(is_dead, 0.0)
    q, k, v = (x.transpose(1, 2).to(dtype) for x in (call.q, call.k, call.v))
    return q, k, v, mask, is_dead


def run(call: Call) -> tuple[torch.Tensor, None]:
    with without_autocast(call.q.device):
        q, k, v, mask, is_dead = _sdpa_inputs(call)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=call.dropout_p, scale=call.scale, enable_gqa=_has_groups(call)
        )
        if is_dead is not None:
            out = out.masked_fill(is_dead, 0.0)
    return out.transpose(1, 2).to(call.q.dtype), None


def hides_values_that_are_not_finite(call: Call) -> bool:
    """Whether SDPA could carry a NaN to rows that do not see it: its products ignore the mask, and 0 * NaN is NaN.

    Reads values, for which it waits on a GPU; ``False`` if the call is traced, transformed or captured and has no values.
    """
    if call.attn_mask is None and call.window_left < 0 and call.window_right < 0:
        return False
    tensors = (call.q, call.k, call.v)
    return all(map(reference.can_read, tensors)) and not bool(torch.stack([x.isfinite().all() for x in tensors]).all())


BACKEND = Backend(refusal, run)
