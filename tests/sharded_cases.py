"""What the processes of test_sharded_patches.py do: a small model, patched and sharded, beside the same model whole."""

from __future__ import annotations

import gloo_processes
import torch

ALL = ("loss", "mlp", "norm", "rope", "lora", "checkpointing", "keep_attention", "offload")
NUMBERS = {"mlp": {"mlp_tile": 7}, "attention": {"attention_chunk": 7}, "loss": {"loss_chunk": 9}}


def build(lora: bool = False, tied: bool = False, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="flashmla").to(dtype).train()
    if lora:
        import peft

        settings = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        model = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
    return model


def batch(rank: int) -> dict:
    ids = torch.randint(3, 90, (1, 40), generator=torch.Generator().manual_seed(rank))
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def patched(model: torch.nn.Module, names) -> torch.nn.Module:
    import flashmla_hf

    options = {key: value for name in names for key, value in NUMBERS.get(name, {}).items()}
    return flashmla_hf.patch(model, [n for n in names if n != "lora" or hasattr(model, "peft_config")], **options)


def whole(steps: int = 2, precision: torch.dtype | None = None, **build_options) -> list[float]:
    """The mean losses of both processes' batches, and the norm of the gradient of each step, on one process."""
    model = build(**build_options)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, told = torch.optim.SGD(trained, lr=0.05), []
    for _ in range(steps):
        with torch.autocast("cpu", precision, enabled=precision is not None):
            loss = sum(model(**batch(rank)).loss for rank in range(2)) / 2
        loss.backward()
        told += [loss.item(), _norm([p.grad for p in trained])]
        optimizer.step()
        optimizer.zero_grad()
    return told


def _norm(grads) -> float:
    grads = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads if g is not None]
    return float(sum(g.double().square().sum() for g in grads).sqrt())


def fsdp2(cases: list[dict]) -> list:
    """Each case's losses and gradient norms under fully_shard, or the error that it raised."""
    torch.distributed.init_process_group("gloo")
    return [_attempt(_fsdp2_case, **case) for case in cases]


def _attempt(function, **options):
    try:
        return function(**options)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"


def _fsdp2_case(
    names, units="layers", reshard=True, precision=None, offload=False, steps=2, **build_options
) -> list[float]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    mesh = init_device_mesh("cpu", (2,))
    model = patched(build(**build_options), names)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head, norm, embed = base.lm_head, base.model.norm, base.model.embed_tokens
    policy = MixedPrecisionPolicy(param_dtype=precision)
    place = CPUOffloadPolicy(pin_memory=False) if offload else OffloadPolicy()

    def shard(module, reshard_after_forward=reshard):
        options = {"mp_policy": policy, "offload_policy": place}
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard_after_forward, **options)

    for layer in base.model.layers:
        shard(layer)
    if units == "head":
        shard(head)
    elif units == "accelerate":  # accelerate.utils.fsdp_utils.fsdp2_prepare_model
        tail = [norm, embed, head] if head.weight is embed.weight else [norm, head]
        if head.weight is not embed.weight:
            shard(embed)
        shard(tail, False)
    shard(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, told = torch.optim.SGD(trained, lr=0.05), []
    for _ in range(steps):
        loss = model(**batch(torch.distributed.get_rank())).loss
        loss.backward()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        told += [mean.item() / 2, _norm([p.grad for p in trained])]
        optimizer.step()
        optimizer.zero_grad()
    return told


def zero(cases: list[dict]) -> list:
    """Each case's losses under DeepSpeed, or the error that it raised."""
    gloo_processes.prepare_deepspeed()
    import deepspeed

    deepspeed.init_distributed("gloo")
    return [_attempt(_zero_case, **case) for case in cases]


def _zero_case(names, stage, steps=2, **build_options) -> list[float]:
    import deepspeed

    model = patched(build(**build_options), names)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "steps_per_print": 10**9, "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    told = []
    try:
        for _ in range(steps):
            loss = engine(**batch(torch.distributed.get_rank())).loss
            engine.backward(loss)
            engine.step()
            mean = loss.detach().clone()
            torch.distributed.all_reduce(mean)
            told.append(mean.item() / 2)
    finally:
        engine.destroy()
    return told
