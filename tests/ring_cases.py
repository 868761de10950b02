"""What the processes of test_torch_flash.py do: torch's ring over our kernels, on a CPU."""

from __future__ import annotations

import contextlib

import gloo_processes
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


def by_accelerate(implementation: str, processes: int) -> list[float]:
    """Losses of three steps by accelerate's ``cp_size`` and FSDP2, as its documentation has it, or of one whole process."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation=implementation).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ids = torch.randint(3, 90, (3, 1, 40), generator=torch.Generator().manual_seed(0))
    if processes == 1:
        return [_step(model, optimizer, row, torch.nn.functional.pad(row[:, 1:], (0, 1), value=-100)) for row in ids]
    gloo_processes.engine(
        ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
        FSDP_RESHARD_AFTER_FORWARD="true",
    )  # fmt: skip
    from accelerate import Accelerator, ParallelismConfig
    from accelerate.utils import TorchContextParallelConfig

    import flashmla_hf.torch_flash

    handler = TorchContextParallelConfig(cp_comm_strategy="alltoall")
    accelerator = Accelerator(parallelism_config=ParallelismConfig(cp_size=processes, cp_handler=handler))
    handle = flashmla_hf.torch_flash.install("CPU")
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for row in ids:
        labels = torch.nn.functional.pad(row[:, 1:], (0, 1), value=-100)
        row, positions = row.clone(), torch.arange(row.shape[1])[None]
        buffers = [row, labels, positions]
        with (
            accelerator.maybe_context_parallel(buffers, buffer_seq_dims=[1] * 3, no_restore_buffers=set(buffers)),
            sdpa_chooses_flash(),
        ):
            losses.append(_step(model, optimizer, row, labels, positions, accelerator))
    handle.remove()
    return losses


def _step(model, optimizer, ids, labels, positions=None, accelerator=None) -> float:
    """One step whose loss is the mean over all tokens of the sequence, of all processes."""
    out = model(input_ids=ids, position_ids=positions, use_cache=False)
    loss = torch.nn.functional.cross_entropy(out.logits[0], labels[0], reduction="sum") / 39
    if accelerator is None:
        loss.backward()
    else:
        accelerator.backward(loss * accelerator.num_processes)  # FSDP2 averages gradients
        loss = accelerator.reduce(loss.detach(), "sum")
    optimizer.step()
    optimizer.zero_grad()
    return float(loss)


@contextlib.contextmanager
def sdpa_chooses_flash():
    """On a CPU SDPA chooses an operator that torch's ring does not know. Here it calls the one that it chooses on a GPU."""
    functional = torch.nn.functional
    known = functional.scaled_dot_product_attention  # in a ring, torch's wrapper, which calls the original
    original = known.__closure__[[*known.__code__.co_freevars].index("target_fn")].cell_contents
    calls = []

    def flash(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        assert attn_mask is None
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        calls.append(None)
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[
            0
        ]

    known.__closure__[[*known.__code__.co_freevars].index("target_fn")].cell_contents = flash
    try:
        yield
    finally:
        known.__closure__[[*known.__code__.co_freevars].index("target_fn")].cell_contents = original
    assert calls
