"""What the tests of attention to latents share: the call with the arguments of ``attention``, and its check."""

import gpu_support
import numerics
import torch

from flashmla_hf import latent_attention

DTYPES = {"sm90": gpu_support.HALF, "cpu": (torch.float32, *gpu_support.HALF)}
DEVICES = {"sm90": "cuda", "cpu": "cpu"}
DIMS = {"head_dim_qk": 576, "head_dim_v": 512, "heads_kv": 1, "is_latent": True}


def ours(impl):
    """``latent_attention`` with the arguments of ``attention``, whose v says how wide the values are."""

    def function(*, v, cu_seqlens_q, cu_seqlens_kv, **arguments):
        assert cu_seqlens_q is None
        assert cu_seqlens_kv is None
        return latent_attention(head_dim_v=v.shape[-1], impl=impl, **arguments)

    return function


def check(impl, case, dtype, seed=0, **options):
    return numerics.check(ours(impl), case, dtype, DEVICES[impl], seed, **options)
