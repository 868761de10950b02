"""What the processes of test_ulysses.py do: packed rows divided among them, beside the same rows on one process."""

from __future__ import annotations

import os

import gloo_processes
import torch

DOCUMENTS = (11, 3, 17, 6)  # 37 tokens: no multiple of the processes
SMALL = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "Llama": {},
    "Llama, one head of keys": {"num_key_value_heads": 1},
    "Mistral": {"sliding_window": 5},
    "Gemma2": {"sliding_window": 5, "attn_logit_softcapping": 20.0, "query_pre_attn_scalar": 16},
    "GptOss": {"sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2},
}


def build(family: str, implementation: str, lora: bool) -> torch.nn.Module:
    import transformers

    name = family.split(",")[0]
    config = getattr(transformers, f"{name}Config")(**SMALL | FAMILIES[family])
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")._from_config(config, attn_implementation=implementation)
    for parameter_name, parameter in model.named_parameters():
        if "sinks" in parameter_name:
            torch.nn.init.normal_(parameter)
    model.train()
    if lora:
        import peft

        settings = peft.LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
        )
        model = peft.get_peft_model(model, settings)
    return model


def packed_row(implementation: str, cut=None) -> dict:
    import numpy as np

    from flashmla_hf.training.packing import Collator

    rng = np.random.default_rng(0)
    pack = [rng.integers(3, 90, size=length).astype(np.int32) for length in DOCUMENTS]
    return Collator(implementation, cut)([pack], torch.device("cpu"))


ITEMS = sum(DOCUMENTS) - len(DOCUMENTS)


def _told(model: torch.nn.Module, losses, share: int = 1) -> dict:
    """The sum of ``losses`` and its gradients, both summed over processes."""
    loss = sum(losses)
    loss.backward()
    told = {"loss": loss.detach().clone()}
    told |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    if share > 1:
        for name, p in model.named_parameters():  # a process may have no gradient of an expert
            if p.requires_grad and name not in told:
                told[name] = torch.zeros_like(p)
        for name in sorted(told):
            torch.distributed.all_reduce(told[name])
    return told


def eager(family: str, lora: bool) -> dict:
    """Each document alone: eager attention of gpt-oss does not see where packed ones end."""
    model, (ids,) = build(family, "eager", lora), packed_row("eager")["input_ids"]
    documents = [
        {"input_ids": piece[None], "labels": piece[None], "use_cache": False} for piece in ids.split(DOCUMENTS)
    ]
    return _told(model, [model(**document, num_items_in_batch=ITEMS).loss for document in documents])


def ulysses(cases: list[tuple[str, bool, bool]], name: str) -> list[dict]:
    """Loss and gradients of each (family, with LoRA, patched)."""
    gloo_processes.prepare_deepspeed()
    import deepspeed
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    import flashmla_hf
    from flashmla_hf.training.sequence_parallel import Share, divide_attention

    deepspeed.init_distributed("gloo")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    share = Share(0, 1, rank, size)
    told = []
    for family, lora, patched in cases:
        original = ALL_ATTENTION_FUNCTIONS[name]
        model = build(family, name, lora)
        if patched:
            # gpt-oss's experts return a tuple, which tiles do not take.
            tiles = {"exclude": ["mlp"]} if family == "GptOss" else {"mlp_tile": 5}
            flashmla_hf.patch(model, loss_chunk=7, **tiles)
        divide_attention(model, type("Args", (), {"sp_size": size}))
        got = _told(model, [model(**packed_row(name, share.cut), num_items_in_batch=ITEMS).loss], size)
        told.append(
            {part: value.numpy() for part, value in got.items()}
        )  # tensors cannot cross once a process has ended
        ALL_ATTENTION_FUNCTIONS[name] = original
        parallel_state_sp._release_sequence_parallel_groups()
    return told


def by_accelerate(name: str) -> list[float]:
    """Losses of two steps by accelerate's ParallelismConfig, as its documentation has it."""
    gloo_processes.engine(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE="2")
    from accelerate import Accelerator, ParallelismConfig
    from accelerate.utils import DeepSpeedSequenceParallelConfig

    import flashmla_hf

    handler = DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=True, sp_attn_implementation=name)
    accelerator = Accelerator(parallelism_config=ParallelismConfig(sp_size=2, sp_handler=handler))
    model = flashmla_hf.patch(build("Llama", name, False), mlp_tile=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row, "position_ids": torch.arange(12)} for row in ids]
    accelerator.state.deepspeed_plugin.deepspeed_config["gradient_clipping"] = 0.0
    model, optimizer, rows = accelerator.prepare(model, optimizer, torch.utils.data.DataLoader(rows, batch_size=1))
    losses = []
    for row in rows:
        loss = model(**row, labels=row["shift_labels"], use_cache=False).loss
        accelerator.backward(loss)
        optimizer.step()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    return losses
