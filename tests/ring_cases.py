"""What the processes of test_torch_flash.py do: torch's ring over our kernels, on a CPU."""

from __future__ import annotations

import torch


def tensors(seqlen: int = 32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 4, seqlen, 16, generator=generator) for _ in range(4)]  # q, k, v and the result's gradient


def parts_of(rank: int, is_balanced: bool) -> list[int]:
    """The quarters of the sequence that this of two processes holds; balanced, each has an early one and a late one."""
    return [[0, 3], [1, 2]][rank] if is_balanced else [[0, 1], [2, 3]][rank]


def ring(is_causal: bool, is_balanced: bool) -> list:
    """This process's part of the output and of the gradients, as numpy."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental._context_parallel import _attention

    import flashmla_hf.torch_flash

    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    _attention._cp_options.enable_load_balance = is_balanced
    handle = flashmla_hf.torch_flash.install("CPU")
    rank = torch.distributed.get_rank()
    mine = parts_of(rank, is_balanced)
    q, k, v, dout = (torch.cat([x.chunk(4, dim=2)[i] for i in mine], dim=2) for x in tensors())
    forward = _attention._scaled_dot_product_ring_flash_attention(mesh, q, k, v, is_causal=is_causal)
    out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = forward
    grads = _attention._scaled_dot_product_ring_flash_attention_backward(
        mesh, dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, 0.0, is_causal, seed, offset
    )
    handle.remove()
    return [x.numpy() for x in (out, *grads)]
