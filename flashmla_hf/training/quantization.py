"""Base weights in 4 bits by bitsandbytes (QLoRA): how a model is loaded with them, and what a run needs for it."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from flashmla_hf.training import engines
from flashmla_hf.training.arguments import ModelArguments, TrainingArguments, UserError


def check(model_args: ModelArguments) -> None:
    """Raises UserError if ``--load_in_4bit`` cannot be honoured here."""
    if not model_args.load_in_4bit:
        return
    if not model_args.use_peft:
        raise UserError(
            "--load_in_4bit: expected --use_peft, because 4-bit weights are not trained; add it, or leave out --load_in_4bit"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--load_in_4bit: expected the package bitsandbytes, got none; run: pip install bitsandbytes")


def settings(quant_type: str, compute_dtype: torch.dtype) -> Any:
    """Transformers' configuration of 4-bit weights with double quantization."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def loading_options(model_args: ModelArguments, args: TrainingArguments) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` that load 4-bit weights on this process's device; empty without the switch."""
    if not model_args.load_in_4bit:
        return {}
    name = "bfloat16" if args.bf16 else model_args.weight_dtype(args.bf16)
    dtype = torch.bfloat16 if name == "auto" else getattr(torch, name)
    # The whole model on one device, so that Accelerate does not move packed weights.
    device = torch.cuda.current_device() if args.device_type == "cuda" else "cpu"
    return {"quantization_config": settings(model_args.bnb_4bit_quant_type, dtype), "device_map": {"": device}}


def keep_trainable_on_cpu(model: torch.nn.Module) -> None:
    """Stops bitsandbytes from packing weights anew in the first evaluation on a CPU.

    The other layout has a product without a gradient, and training that goes on after the evaluation would miss it in silence.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def parameter_count(model: torch.nn.Module) -> int:
    """The parameters of ``model``; a packed one counts as what it stands for."""
    shapes = (getattr(getattr(p, "quant_state", None), "shape", engines.size_of(p)) for p in model.parameters())
    return sum(torch.Size(shape).numel() for shape in shapes)
