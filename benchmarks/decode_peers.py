"""The measured implementations of decoding: each entry of PEERS turns a shape and its inputs into a function of q, k, v.

Ours call the public functions as a user would. The others know neither pages nor lengths and refuse what has them; for a
window they get the keys it leaves, as a sliding cache of Transformers hands them over.
"""

from __future__ import annotations

from collections.abc import Callable

import peers
import torch
from decode_check import Inputs
from decode_shapes import DecodeShape
from peers import Peer, Unsupported

from flashmla_hf import attention, decode_attention
from flashmla_hf.fp8.quantization import quantize_tokens

Builder = Callable[[DecodeShape, Inputs, str], Peer]


def _window(shape: DecodeShape) -> tuple[int, int] | None:
    return None if shape.window is None else (shape.window, 0)


def _decode(num_splits: int) -> Builder:
    def build(shape: DecodeShape, inputs: Inputs, device: str) -> Peer:
        options = {"cache_seqlens": inputs.cache_seqlens, "block_table": inputs.block_table}
        options |= {"window": _window(shape), "num_splits": num_splits}
        if (
            shape.is_latent
        ):  # by name on a GPU: the reference, which automatic choice falls back to, says nothing about one
            options |= {"head_dim_v": shape.head_dim_v, "impl": "sm90" if device == "cuda" else None}
            return Peer(lambda q, k, v: decode_attention(q, k, None, **options))
        return Peer(lambda q, k, v: decode_attention(q, k, v, **options))

    return build


def _fp8(shape: DecodeShape, inputs: Inputs, device: str) -> Peer:
    """Of fp8 caches, whose factors lie side by side for a head, as those of an Fp8Cache."""
    if not shape.is_e4m3:
        raise Unsupported("the cache's numbers are not those of e4m3")
    options = {"cache_seqlens": inputs.cache_seqlens, "block_table": inputs.block_table, "window": _window(shape)}

    def quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        data = torch.empty_like(x, dtype=torch.float8_e4m3fn)  # in the memory layout of x
        scale = torch.empty(x.shape[0], x.shape[2], x.shape[1], device=x.device).transpose(1, 2)
        for i, part in enumerate(x):
            data[i], scale[i] = quantize_tokens(part)
        return data, scale

    caches = {k.data_ptr(): (quantized(k), quantized(v)) for k, v in inputs.caches}

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        (k8, k_descale), (v8, v_descale) = caches[k.data_ptr()]
        return decode_attention(q, k8, v8, k_descale=k_descale, v_descale=v_descale, **options)

    return Peer(run)


def _refuse_caches(shape: DecodeShape) -> None:
    if shape.page_size is not None:
        raise Unsupported("it has no pages")
    if shape.is_ragged:
        raise Unsupported("it has no lengths of sequences")


def _attention(shape: DecodeShape, inputs: Inputs, device: str) -> Peer:
    """The function for training and prefill."""
    _refuse_caches(shape)
    options = {"is_causal": True, "window": _window(shape)}
    return Peer(lambda q, k, v: attention(q, k, v, **options))


def _other(name: str) -> Builder:
    """A peer of bench_attention.py."""

    def build(shape: DecodeShape, inputs: Inputs, device: str) -> Peer:
        _refuse_caches(shape)
        if shape.window is None or shape.seqlen_q > 1:
            return peers.PEERS[name](shape.as_attention(shape.seqlen_kv), device)
        count = min(shape.seqlen_kv, shape.window + 1)
        peer = peers.PEERS[name](shape.as_attention(count), device)
        dim = 2 if peer.is_heads_first else 1

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            first = k.shape[dim] - count
            return peer.run(q, k.narrow(dim, first, count), v.narrow(dim, first, count))

        return Peer(run, peer.is_heads_first, peer.context)

    return build


PEERS: dict[str, Builder] = {
    "flashmla": _decode(num_splits=0),
    "flashmla-invariant": _decode(num_splits=1),
    "flashmla-fp8": _fp8,
    "flashmla-attention": _attention,
    **{name: _other(name) for name in ("sdpa", "sdpa-cudnn", "sdpa-flash", "sdpa-math", "fa4")},
}
DEFAULT_PEERS = {
    "cpu": ("flashmla", "flashmla-invariant", "flashmla-attention", "sdpa"),
    "cuda": ("flashmla", "flashmla-attention", "sdpa-cudnn", "sdpa-flash"),
}
