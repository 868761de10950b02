"""The measured implementations: each entry of PEERS turns a shape into a function of q, k, v, or says why it cannot.

Ours call the public function as a user would. The others get q, k and v in the memory layout Transformers has,
[batch, seqlen, heads, head_dim]; those that want heads first get a view of it, made outside the timed call.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import cudnn_frontend
import torch
from shapes import DTYPES, Shape

from flashmla_hf.training import machine

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Unsupported(Exception):
    """A peer does not compute this shape; the message says why."""


@dataclass(frozen=True)
class Peer:
    """``run(q, k, v) -> out`` on [batch, seqlen, heads, dim] tensors (heads second if ``is_heads_first``), or on packed
    [total, heads, dim] ones."""

    run: Attention
    is_heads_first: bool = False
    # Of the output and the gradients, where the peer's own precision is not that of the inputs.
    tolerances: tuple[float, float] | None = None
    # Entered around a series of calls, not around each: the choice of torch's backend takes longer than a short launch.
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


Builder = Callable[[Shape, str], Peer]  # of a shape and a device


def _boundaries(shape: Shape, device: str) -> torch.Tensor:
    """cu_seqlens of a packed shape."""
    return torch.tensor([0, *(d.stop for d in shape.documents())], dtype=torch.int32, device=device)


FP8_TOLERANCES = (0.1, 0.2)  # e4m3 errs by 2.6 %, root mean square; a key too many or too few is found all the same


def _flashmla(impl: str | None, deterministic: bool | None = None, precision: str | None = None) -> Builder:
    def build(shape: Shape, device: str) -> Peer:
        from flashmla_hf import attention

        options = {"is_causal": shape.is_causal, "impl": impl, "deterministic": deterministic, "precision": precision}
        if shape.window is not None:
            options["window"] = (shape.window, 0)
        if shape.is_packed:
            boundaries, longest = _boundaries(shape, device), max(shape.lengths())
            options |= {"cu_seqlens_q": boundaries, "cu_seqlens_kv": boundaries}
            options |= {"max_seqlen_q": longest, "max_seqlen_kv": longest}
        tolerances = FP8_TOLERANCES if precision is not None else None
        return Peer(lambda q, k, v: attention(q, k, v, **options), tolerances=tolerances)

    return build


def _flashmla_latent(shape: Shape, device: str) -> Peer:
    from flashmla_hf import latent_attention

    if not shape.is_latent:
        raise Unsupported("latent_attention takes values that are columns of the keys: a shape with the word latent")
    options = {"head_dim_v": shape.head_dim_v, "is_causal": shape.is_causal}
    if shape.window is not None:
        options["window"] = (shape.window, 0)
    return Peer(lambda q, k, v: latent_attention(q, k, **options))


def _flashmla_operator(shape: Shape, device: str) -> Peer:
    """The operator without the public function above it: the difference is the cost of checks and dispatch in Python."""
    import flashmla_hf  # noqa: F401  (defines the operator)

    if shape.is_packed:
        raise Unsupported("measured on dense shapes")
    forward = torch.ops.flashmla.flash_attn_forward
    left, right = -1 if shape.window is None else shape.window, 0 if shape.is_causal else -1
    rest = (None, None, None, shape.seqlen_q, shape.seqlen_kv, shape.head_dim_qk**-0.5, left, right, 0.0, False)
    return Peer(lambda q, k, v: forward(q, k, v, *rest)[0])


def _visible(shape: Shape, device: str) -> torch.Tensor | None:
    """Boolean [seqlen_q, seqlen_kv] if causal alone does not describe the mask."""
    if shape.window is None and (not shape.is_causal or shape.seqlen_q == shape.seqlen_kv):
        return None
    position = torch.arange(shape.seqlen_q, device=device)[:, None] + shape.seqlen_kv - shape.seqlen_q
    key = torch.arange(shape.seqlen_kv, device=device)[None]
    visible = key <= position
    return visible if shape.window is None else visible & (key >= position - shape.window)


def _sdpa(backend: str | None) -> Builder:
    def build(shape: Shape, device: str) -> Peer:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if backend == "flash" and device == "cuda" and (shape.is_packed or shape.window is not None):
            return _flash_operator(shape, device)
        if shape.is_packed:
            raise Unsupported("scaled_dot_product_attention has no packed layout")
        if backend == "math" and shape.scores_bytes * 6 > 0.8 * machine.memory_available(device):
            raise Unsupported("the scores do not fit in memory")
        if shape.window is not None and shape.seqlen_q * shape.seqlen_kv > 2**30:
            raise Unsupported("scaled_dot_product_attention has no window, and a mask of this size takes gigabytes")
        # The memory-efficient kernel takes no groups: Transformers repeats the keys for it, and so does this.
        group = shape.heads_q // shape.heads_kv if backend == "efficient" else 1
        options = {"enable_gqa": shape.heads_q != shape.heads_kv and backend != "efficient"}
        mask = _visible(shape, device)
        options |= {"is_causal": shape.is_causal} if mask is None else {"attn_mask": mask}
        attend = torch.nn.functional.scaled_dot_product_attention
        names = {
            "flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH",
        }  # fmt: skip
        context = contextlib.nullcontext
        if backend is not None:
            chosen = getattr(SDPBackend, names[backend])
            context = lambda: sdpa_kernel(chosen)  # noqa: E731
        repeat = (lambda x: x.repeat_interleave(group, 1)) if group > 1 else (lambda x: x)
        return Peer(lambda q, k, v: attend(q, repeat(k), repeat(v), **options), is_heads_first=True, context=context)

    return build


def _flash_operator(shape: Shape, device: str) -> Peer:
    """torch's own build of FlashAttention-2 takes cu_seqlens and windows below the public function."""
    if shape.head_dim_qk != shape.head_dim_v:
        raise Unsupported("torch's FlashAttention takes one head dim for q, k and v")
    forward = torch.ops.aten._flash_attention_forward
    window = {} if shape.window is None else {"window_size_left": shape.window, "window_size_right": 0}
    is_causal = shape.is_causal and shape.window is None
    rest = (None, None, shape.seqlen_q, shape.seqlen_kv, 0.0, is_causal, False)
    if shape.is_packed:
        boundaries, longest = _boundaries(shape, device), max(shape.lengths())
        rest = (boundaries, boundaries, longest, longest, 0.0, is_causal, False)
    return Peer(lambda q, k, v: forward(q, k, v, *rest, **window)[0])


def _eager(shape: Shape, device: str) -> Peer:
    """Transformers' own eager attention, as every Llama runs it if nothing better is chosen."""
    from transformers.models.llama.modeling_llama import eager_attention_forward

    if shape.is_packed:
        raise Unsupported("eager attention has no packed layout")
    if shape.scores_bytes * 6 > 0.8 * machine.memory_available(device):
        raise Unsupported(f"{shape.scores_bytes / 2**30:.0f} GiB of scores, several times over, do not fit in memory")
    module = torch.nn.Module().eval()
    module.num_key_value_groups = shape.heads_q // shape.heads_kv
    mask = None
    if shape.is_causal:
        visible = _visible(dataclasses.replace(shape, window=shape.window or shape.seqlen_kv), device)
        mask = torch.zeros(1, 1, shape.seqlen_q, shape.seqlen_kv, dtype=DTYPES[shape.dtype], device=device)
        mask.masked_fill_(~visible, torch.finfo(mask.dtype).min)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return eager_attention_forward(module, q, k, v, mask, scaling=shape.head_dim_qk**-0.5)[0].transpose(1, 2)

    return Peer(run, is_heads_first=True)


def _flex(shape: Shape, device: str) -> Peer:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if device != "cuda":
        raise Unsupported("compiled FlexAttention is measured on GPUs")
    if shape.is_packed:
        raise Unsupported("measured on dense shapes")
    # Every shape compiles anew, and past dynamo's limit of recompilations FlexAttention would run unfused in silence.
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    block_mask = None
    if shape.is_causal:
        shift, window = shape.seqlen_kv - shape.seqlen_q, shape.window or shape.seqlen_kv

        def mask_mod(batch, head, q_index, kv_index):
            position = q_index + shift
            return (kv_index <= position) & (kv_index >= position - window)

        block_mask = create_block_mask(mask_mod, None, None, shape.seqlen_q, shape.seqlen_kv, device=device)
    enable_gqa = shape.heads_q != shape.heads_kv
    return Peer(lambda q, k, v: compiled(q, k, v, block_mask=block_mask, enable_gqa=enable_gqa), is_heads_first=True)


def _fa4(deterministic: bool = False) -> Builder:
    def build(shape: Shape, device: str) -> Peer:
        try:
            from flash_attn.cute import flash_attn_func, flash_attn_varlen_func
        except ImportError as error:
            raise Unsupported(f"flash_attn.cute: {error}") from None
        options = {"causal": shape.is_causal, "deterministic": deterministic}
        if shape.window is not None:
            options |= {"causal": False, "window_size": (shape.window, 0)}
        if not shape.is_packed:
            return Peer(lambda q, k, v: flash_attn_func(q, k, v, **options)[0])  # (out, lse)
        boundaries, longest = _boundaries(shape, device), max(shape.lengths())
        options |= {"cu_seqlens_q": boundaries, "cu_seqlens_k": boundaries}
        options |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
        return Peer(lambda q, k, v: flash_attn_varlen_func(q, k, v, **options)[0])

    return build


def _cudnn(shape: Shape, device: str) -> Peer:
    try:
        return Peer(cudnn_frontend.Attention(cudnn_frontend.load(device), shape, device))
    except cudnn_frontend.Missing as error:
        raise Unsupported(str(error)) from None


def _cudnn_fp8(shape: Shape, device: str) -> Peer:
    """The kernel alone: q, k and v are in fp8 before the first timed call."""
    if shape.is_packed or shape.window is not None:
        raise Unsupported("measured on dense shapes without a window")
    try:
        attention = cudnn_frontend.Fp8Attention(cudnn_frontend.load(device), shape, device)
    except cudnn_frontend.Missing as error:
        raise Unsupported(str(error)) from None
    return Peer(attention, tolerances=FP8_TOLERANCES)


PEERS: dict[str, Builder] = {
    "flashmla": _flashmla(None),
    "flashmla-sm90": _flashmla("sm90"),
    "flashmla-cpu": _flashmla("cpu"),
    "flashmla-flex": _flashmla("flex"),
    "flashmla-torch-flash": _flashmla("torch_flash"),
    "flashmla-deterministic": _flashmla(None, deterministic=True),
    "flashmla-fp8": _flashmla(None, precision="fp8"),
    "flashmla-latent": _flashmla_latent,
    "flashmla-operator": _flashmla_operator,
    "sdpa": _sdpa(None),
    "sdpa-flash": _sdpa("flash"),
    "sdpa-cudnn": _sdpa("cudnn"),
    "sdpa-efficient": _sdpa("efficient"),
    "sdpa-math": _sdpa("math"),
    "eager": _eager,
    "flex": _flex,
    "cudnn": _cudnn,
    "cudnn-fp8": _cudnn_fp8,
    "fa4": _fa4(),
    "fa4-deterministic": _fa4(deterministic=True),
}
DEFAULT_PEERS = {
    "cpu": ("flashmla", "sdpa", "eager"),
    "cuda": ("flashmla", "sdpa-cudnn", "sdpa-flash", "fa4", "eager"),
}
