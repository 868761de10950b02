"""Our kernels as torch's own flash attention: for unmodified SDPA models, ``varlen_attn``, and torch's ring.

    import flashmla_hf.torch_flash, torch
    torch.nn.attention.activate_flash_attention_impl("flashmla")  # from now on, in this process
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        ...
    torch.nn.attention.restore_flash_attention_impl()

Importing this module registers the name, if this torch has the registry. Activating it puts our kernels in the place of
torch's operators ``aten::_scaled_dot_product_flash_attention``, ``aten::_flash_attention_forward`` and their backward.
Torch's ring (context parallelism) calls the first: parts of the keys, causal halves and the sums of parts are torch's. What
torch's operators could ask for and our kernels do not compute raises: dropout, ALiBi, paged and partly used keys.

On Hopper GPUs SDPA prefers cuDNN, hence ``sdpa_kernel``. A ring carries no window and no boundaries of packed documents: such a
model is divided by Ulysses (docs/distributed.md).
"""

from __future__ import annotations

from typing import Any

import torch

from flashmla_hf import libraries, ops
from flashmla_hf.backends import sm90
from flashmla_hf.dispatch import attention

NAME = "flashmla"


class _Handle:
    """What keeps the operators replaced; torch's registry calls :meth:`remove`."""

    def __init__(self, library: torch.library.Library) -> None:
        self.library: torch.library.Library | None = library

    def remove(self) -> None:
        if self.library is not None:
            self.library._destroy()
        self.library = None


def install(dispatch_key: str = "CUDA") -> _Handle:
    """Replaces torch's operators on ``dispatch_key`` ("CPU" has none of its own, which tests use) while the result is kept.

    Its ``remove()`` restores them, and so does its end. Torch's registry keeps it.

    Raises:
        RuntimeError: no Hopper GPU, or the Hopper library cannot be loaded.
    """
    if dispatch_key == "CUDA":
        reason = libraries.unavailable.get("sm90")
        if reason is None and (not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9):
            reason = "no Hopper GPU"
        if reason is not None:
            raise RuntimeError(
                f"flashmla as torch's flash attention: {reason}: expected a Hopper GPU and the library for it; "
                "torch.nn.attention.restore_flash_attention_impl() keeps torch's own"
            )
    library = torch.library.Library("aten", "IMPL", dispatch_key)
    library.impl("_scaled_dot_product_flash_attention", _sdpa_forward)
    library.impl("_scaled_dot_product_flash_attention_backward", _sdpa_backward)
    library.impl("_flash_attention_forward", _flash_forward)
    library.impl("_flash_attention_backward", _flash_backward)
    return _Handle(library)


def _refuse(**given: object) -> None:
    """Raises for an argument that is set to something else than nothing."""
    for name, value in given.items():
        if isinstance(value, torch.Tensor) or value not in (None, False, 0.0):
            raise NotImplementedError(
                f"flashmla as torch's flash attention: {name}: expected none, got {value if name == 'dropout_p' else 'one'}. "
                "torch.nn.attention.restore_flash_attention_impl() goes back to torch's own kernel"
            )


def _window(is_causal: bool, left: int | None, right: int | None) -> tuple[int | None, int | None]:
    """Torch's window sizes, of which -1 and None are no limit, as ours."""
    left = None if left is None or left < 0 else left
    right = None if right is None or right < 0 else right
    return left, 0 if is_causal else right


# The signatures are torch's.
# ruff: noqa: PLR0913


def _forward(q, k, v, cu_seqlens_q, cu_seqlens_kv, longest, window, scale) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) for [batch, seqlen, heads, dim], or packed [total, heads, dim]."""
    if q.is_cuda and (reason := sm90.device_refusal(q, v)) is not None:
        raise NotImplementedError(f"flashmla as torch's flash attention: {reason}")
    q, k, v = (x.detach() if x.stride(-1) == 1 else x.detach().contiguous() for x in (q, k, v))
    packed: dict[str, Any] = {}
    if cu_seqlens_q is not None:
        packed = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_kv": cu_seqlens_kv}
        packed |= {"max_seqlen_q": longest[0], "max_seqlen_kv": longest[1]}
    with torch.no_grad():
        out, lse = attention(q, k, v, scale=scale, window=window, return_lse=True, **packed)
    return out, lse


def _backward(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_kv, longest, window, scale) -> tuple:
    dout, q, k, v, out = (_readable(x) for x in (dout, q, k, v, out))
    left, right = (-1 if side is None else side for side in window)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    others = (None, cu_seqlens_q, cu_seqlens_kv, *longest, scale, left, right, 0.0)
    deterministic = torch.are_deterministic_algorithms_enabled()
    dq, dk, dv, _ = torch.ops.flashmla.flash_attn_backward(
        dout, None, q, k, v, out, lse.contiguous(), *others, deterministic, True, True, True, False
    )
    return dq, dk, dv


def _readable(x: torch.Tensor) -> torch.Tensor:
    """``x``, or a copy of it if TMA cannot read its address or strides."""
    is_aligned = x.data_ptr() % 16 == 0 and all(
        stride % 8 == 0 and stride > 0 for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1
    )
    return x if is_aligned and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def _nothing(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The random state and the debug mask of torch's operators, which no dropout needs."""
    return q.new_zeros(2, dtype=torch.uint64), q.new_zeros((), dtype=torch.uint64), q.new_zeros(0)


def _sdpa_forward(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    _refuse(dropout_p=dropout_p, return_debug_mask=return_debug_mask)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out, lse = _forward(q, k, v, None, None, None, _window(is_causal, None, None), scale)
    return out.transpose(1, 2), lse, None, None, query.shape[2], key.shape[2], *_nothing(query)


def _sdpa_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, philox_seed,
    philox_offset, *, scale=None,
):  # fmt: skip
    dout, q, k, v, out = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
    longest, window = (q.shape[1], k.shape[1]), _window(is_causal, None, None)
    grads = _backward(dout, q, k, v, out, logsumexp, None, None, longest, window, scale)
    return tuple(x.transpose(1, 2) for x in grads)


def _flash_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
    window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None, block_table=None, num_splits=None,
):  # fmt: skip
    # num_splits: our forward never splits the keys, which is what 1 asks for.
    _refuse(
        dropout_p=dropout_p, return_debug_mask=return_debug_mask, seqused_k=seqused_k, alibi_slopes=alibi_slopes,
        block_table=block_table,
    )  # fmt: skip
    window = _window(is_causal, window_size_left, window_size_right)
    out, lse = _forward(query, key, value, cum_seq_q, cum_seq_k, (max_q, max_k), window, scale)
    return out, lse, *_nothing(query)


def _flash_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state,
    unused, *, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    window = _window(is_causal, window_size_left, window_size_right)
    longest = (max_q, max_k)
    return _backward(grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, longest, window, scale)


def register() -> bool:
    """Makes the name known to ``torch.nn.attention.activate_flash_attention_impl``. False if this torch has no registry."""
    known = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if known is not None:
        known(NAME, register_fn=install)
    return known is not None


assert ops is not None  # its import defines our operators
register()
