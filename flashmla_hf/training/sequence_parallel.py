"""``--sp_size N``: N processes share each row of tokens, by DeepSpeed's Ulysses attention, on any engine.

Each process holds a part of the row, and all heads of its tokens. In a layer, processes exchange tokens for heads, attend to
the whole row with their own heads, and exchange back (arXiv 2309.14509). All else in a model works on tokens alone. The loss is
a sum over tokens: a part's share of a step's loss is what its labels add, so that engines sum gradients as they do over rows.

DeepSpeed drops every mask, because it is of a part. What remains is what a layer passes by itself: causality, windows,
boundaries of packed documents. :func:`check_model` refuses models that need more.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.functional import pad

from flashmla_hf.hf import names
from flashmla_hf.training.arguments import ModelArguments, TrainingArguments, UserError
from flashmla_hf.training.packing import NO_LOSS

# Attention that reads the boundaries of packed documents, which SDPA does not.
_READS_BOUNDARIES = ("flashmla", "fmla", "flashmla/flash-attn3", "flash_attention_2", "flash_attention_3")
_LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Share:
    """What this process computes of a step: the packs of group ``rank`` of ``size``, and of each row ``part`` of ``parts``."""

    rank: int = 0
    size: int = 1
    part: int = 0
    parts: int = 1

    @staticmethod
    def of(accelerator: Accelerator, args: TrainingArguments) -> Share:
        rank, part = divmod(accelerator.process_index, args.sp_size)
        return Share(rank, accelerator.num_processes // args.sp_size, part, args.sp_size)

    def cut(self, row: dict[str, Any]) -> dict[str, Any]:
        """This process's part of ``row``, tensors [1, tokens]; the boundaries of documents stay those of the whole row.

        ``shift_labels`` has the label of each token's successor, which may be in the next part. A row that cannot be divided
        gets a last document of tokens without a loss.
        """
        if self.parts == 1:
            return row
        tokens = row["input_ids"].shape[1]
        row = row | {"shift_labels": pad(row["labels"][:, 1:], (0, 1), value=NO_LOSS)}
        more = -tokens % self.parts
        if more:
            row = row | {name: pad(row[name], (0, more)) for name in ("input_ids", "position_ids")}
            row["position_ids"][:, tokens:] = torch.arange(more, device=row["position_ids"].device)
            row |= {name: pad(row[name], (0, more), value=NO_LOSS) for name in ("labels", "shift_labels")}
            for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
                row[name] = pad(row[name], (0, 1), value=tokens + more)
            for name in ("max_length_q", "max_length_k"):
                row[name] = max(row[name], more)
        length = (tokens + more) // self.parts
        mine = slice(self.part * length, (self.part + 1) * length)
        names = ("input_ids", "position_ids", "labels", "shift_labels")
        return row | {name: row[name][:, mine].contiguous() for name in names}


WHOLE = Share()


def packs_per_step(accelerator: Accelerator, args: TrainingArguments) -> int:
    """The packs that all processes read in an optimizer step."""
    groups = accelerator.num_processes // args.sp_size
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * groups


def check(accelerator: Accelerator, model_args: ModelArguments, args: TrainingArguments) -> None:
    """Raises UserError if ``--sp_size`` cannot be honoured with these processes and options."""
    implementation = model_args.attn_implementation
    for name in ("sp", "cp", "tp"):
        size = int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", "1"))
        if size > 1:
            raise UserError(
                f"accelerate launch: parallelism_config_{name}_size: expected 1, got {size}: flashmla finetune divides a "
                f"sequence by --sp_size alone, on any engine{' and not in fp8' if names.is_fp8(implementation) else ''}"
            )
    if args.sp_size == 1:
        return
    if accelerator.num_processes % args.sp_size:
        raise UserError(
            f"--sp_size: expected a divisor of the number of processes, {accelerator.num_processes}, got {args.sp_size}; "
            f"launch with: accelerate launch --num_processes {args.sp_size} -m flashmla_hf.training.finetune ..."
        )
    if implementation not in _READS_BOUNDARIES:
        if names.is_fp8(implementation):
            why = "which has no kernel for the GPUs that would share a sequence. Leave out --sp_size, or give flashmla"
        elif "flash" in implementation:
            why = "which has not been tried with divided sequences"
        else:
            why = "which would attend across documents"
        raise UserError(
            f"--sp_size {args.sp_size}: expected --attn_implementation {', '.join(_READS_BOUNDARIES)}, got "
            f"{implementation}, {why}"
        )
    missing = [name for name in ("deepspeed", "einops") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--sp_size {args.sp_size}: its attention is DeepSpeed's, on every engine; not installed: {', '.join(missing)}. "
            "Run: pip install deepspeed einops"
        )


def check_model(config: Any, sp_size: int) -> None:
    """Raises UserError if the layers of a model of this configuration cannot be divided among ``sp_size`` processes."""
    text = config.get_text_config()
    where = f"--sp_size {sp_size}: {text.model_type}"
    heads, heads_kv = text.num_attention_heads, getattr(text, "num_key_value_heads", None)
    if heads % sp_size:
        raise UserError(f"{where}: expected a divisor of its {heads} heads")
    if not heads_kv or (heads_kv % sp_size and sp_size % heads_kv):
        raise UserError(f"{where}: expected a divisor or a multiple of its {heads_kv or 'unknown'} heads of keys")
    if getattr(text, "v_head_dim", None) or getattr(text, "global_head_dim", None):
        raise UserError(f"{where}: expected heads of one size for queries, keys and values, and in all layers")
    other = set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES
    if other or getattr(text, "attention_chunk_size", None):
        raise UserError(
            f"{where}: expected layers of {' and '.join(sorted(_LAYER_TYPES))}, got "
            f"{', '.join(sorted(other)) or 'chunked attention'}: Ulysses passes no mask on, and divides attention alone"
        )


def divide_attention(model: torch.nn.Module, args: TrainingArguments) -> None:
    """Puts DeepSpeed's Ulysses attention around that of ``model``, for every call from now on in this process."""
    if args.sp_size == 1:
        return
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    check_model(model.config, args.sp_size)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed()
    UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=model,
        core_attn_implementation=model.config.get_text_config()._attn_implementation,
        sequence_parallel_size=args.sp_size,
        micro_batch_size=1,  # a batch of packs is one row
        seq_length_is_variable=True,
    )
