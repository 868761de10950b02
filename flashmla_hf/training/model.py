"""The model that is trained, its adapter, patches and optimizer, and the ledger of its memory."""

from __future__ import annotations

import dataclasses
import inspect
import os
import pickle
import warnings
from collections.abc import Collection
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import flashmla_hf
from flashmla_hf import weight_files
from flashmla_hf.training import machine, quantization
from flashmla_hf.training.arguments import (
    DataArguments,
    ModelArguments,
    TrainingArguments,
    UserError,
    chosen_patches,
    first_line,
    required_patches,
)
from flashmla_hf.training.ledger import Ledger, build_ledger
from flashmla_hf.training.shape import Shape, is_encoder, load_config, positions_of
from flashmla_hf.training.terms import Switches

_OF_PICKLES = (pickle.UnpicklingError, EOFError)  # of pytorch_model.bin


def check_weights(name: str | Path) -> None:
    """Raises UserError if a file of the weights of ``name`` is damaged."""
    if (damage := weight_files.damage(name)) is not None:
        raise UserError(f"model {str(name)!r} cannot be loaded: {damage}")


def load_tokenizer(model_args: ModelArguments) -> PreTrainedTokenizerBase:
    name = model_args.model_name_or_path
    # A path that is not there must not be looked for on the Hub.
    if name.startswith((".", "/")) and not Path(name).is_dir():
        raise UserError(f"model {name}: no such folder")
    if (Path(name) / "adapter_config.json").is_file():
        raise UserError(
            f"model {name} is an adapter, and would be trained as if it were none: expected a whole model. Merge it "
            "(peft: merge_and_unload, save_pretrained), or resume its run with --resume_from_checkpoint"
        )
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise UserError(f"model {name}: expected a folder that save_pretrained wrote, got one without config.json")
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"model {name!r} has no loadable tokenizer: {first_line(error)}") from None


def load_model(model_args: ModelArguments, args: TrainingArguments, checkpoint: Path | None) -> torch.nn.Module:
    """The model to train, with the weights or the adapter of ``checkpoint`` if one is given."""
    is_full_resume = checkpoint is not None and not model_args.use_peft
    name = str(checkpoint) if is_full_resume else model_args.model_name_or_path
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=model_args.weight_dtype(args.bf16),
            attn_implementation=model_args.attn_implementation,
            output_loading_info=True,
            **quantization.loading_options(model_args, args),
        )
    except (OSError, ValueError, ImportError, SafetensorError, *_OF_PICKLES) as error:
        check_weights(name)
        raise UserError(f"model {name!r} cannot be loaded: {first_line(error)}") from None
    _check_kind(model, name, info["missing_keys"])
    if args.device_type == "cpu":
        quantization.keep_trainable_on_cpu(model)
    _check_loss_arguments(model)
    # These warnings are between peft and Transformers: a caller could change nothing.
    warnings.filterwarnings("ignore", message=".*is_activation_checkpointing|.*activation_checkpointing_enable")
    patches, options = chosen_patches(model_args, args)
    if args.gradient_checkpointing and "checkpointing" not in patches:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if model_args.use_peft:
        model = add_adapter(model, model_args, checkpoint)
        if args.bf16:
            keep_adapter_inputs(model)
    if patches:
        try:
            _patch(model, model_args.patches, patches, options)
        except ValueError as error:
            raise UserError(f"--patches {' '.join(model_args.patches)}: {' '.join(str(error).split())}") from None
    return model


def _patch(model: torch.nn.Module, wanted: list[str], names: list[str], options: dict[str, int]) -> None:
    """Applies ``names``, which ``wanted`` stands for. A model may lack what a group of them brings, but none that is named."""
    required = required_patches(wanted)
    if required is None or not set(names) <= set(flashmla_hf.DEFAULT_PATCHES):
        flashmla_hf.patch(model, names, **options)
        return
    others = [name for name in flashmla_hf.DEFAULT_PATCHES if name not in names]
    flashmla_hf.patch(model, exclude=others, **options)
    for name, reason in flashmla_hf.patch_report(model).left_out.items():
        if name in required:
            raise ValueError(f"patch {name!r} does not support this model: {reason}. Leave it out")


def plan_patches(model_args: ModelArguments, args: TrainingArguments, tokens: int) -> list[str]:
    """What ``--patches`` stands for in a run on sequences of ``tokens``: with "auto", a group that costs no time for nothing.

    On a GPU that is all of them: they divide the free memory at every length, and layers that fit keep everything. On a CPU
    the patches that run something again are left out if the ledger's peak without them is at most half the free memory.
    """
    if model_args.patches != ["auto"]:
        return model_args.patches
    if args.device_type != "cpu":
        return ["all"]
    light = dataclasses.replace(model_args, patches=["light"])
    try:
        ledger = ledger_of(light, args, load_config(model_args.model_name_or_path))
    except UserError:  # the loader says what is wrong with the model
        ledger = None
    fits = ledger is not None and ledger.peak(tokens * args.per_device_train_batch_size) <= (
        machine.memory_available("cpu") / 2
    )
    return ["light"] if fits else ["all"]


def _check_kind(model: torch.nn.Module, name: str, missing: Collection[str]) -> None:
    """Refuses what Transformers loads and training would spoil: an encoder, weights drawn at random, float16."""
    if is_encoder(model.config):
        raise UserError(
            f"model {name!r} ({type(model).__name__}) is an encoder, whose tokens see the ones after them: expected a causal "
            "language model (or config.json with is_decoder: true)"
        )
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        was = next(iter(model.config.architectures or []), "other")
        raise UserError(
            f"model {name!r} has no weights for {min(missing)}{more}, and would begin with random ones: expected a causal "
            f"language model, got the weights of {was}"
        )
    if model.dtype == torch.float16:
        raise UserError(
            f"model {name!r} is saved in float16, whose small gradients vanish: give --dtype bfloat16 or float32"
        )


def _check_loss_arguments(model: torch.nn.Module) -> None:
    """Transformers' own test (Trainer): a model says that it takes num_items_in_batch, or takes any keyword."""
    parameters = inspect.signature(model.forward).parameters.values()
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    if not getattr(model, "accepts_loss_kwargs", takes_any):
        raise UserError(
            f"{type(model).__name__} does not take num_items_in_batch, so its loss could not be normalised over tokens"
        )


def keep_adapter_inputs(model: torch.nn.Module) -> None:
    """Stops peft from copying every adapter's input to the adapter's float32.

    Under autocast the product is in bfloat16 in any case: the copy is cast back, so the numbers are the same, bit for bit,
    and two float32 copies of an activation per projection are saved.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False


def positions_exceeded(model: torch.nn.Module, length: int) -> int | None:
    """The positions that the model was made for, if ``length`` is beyond them, else None.

    Raises UserError if the model has learned a vector for each position (GPT-2): it cannot go beyond them.
    """
    longest = positions_of(model.config)
    if longest is None or length <= longest:
        return None
    tokens = model.get_input_embeddings()
    tables = (m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not tokens)
    if any(table.num_embeddings - longest in (0, 2) for table in tables):  # OPT's begins at 2
        raise UserError(
            f"--max_length: expected at most the {longest} positions that the model has learned, got {length}"
        )
    return longest


def add_adapter(model: torch.nn.Module, model_args: ModelArguments, checkpoint: Path | None) -> PeftModel:
    if checkpoint is not None:
        try:
            return PeftModel.from_pretrained(model, checkpoint, is_trainable=True)
        except (OSError, ValueError, SafetensorError) as error:
            check_weights(checkpoint)
            raise UserError(f"{checkpoint} holds no adapter of this model: {first_line(error)}") from None
    targets = model_args.lora_target_modules
    lora = LoraConfig(
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise UserError(f"--lora_target_modules {' '.join(targets)}: {first_line(error)}") from None


def make_optimizer(trainable: list[torch.nn.Parameter], args: TrainingArguments) -> torch.optim.Optimizer:
    # Fused on a GPU: the loop over tensors makes temporaries of the weights' size.
    is_fused = args.device_type == "cuda"
    return torch.optim.AdamW(trainable, lr=args.learning_rate, weight_decay=args.weight_decay, fused=is_fused)


def ledger_of(model_args: ModelArguments, args: TrainingArguments, config) -> Ledger | None:
    """The ledger of a step of this run; None for a model that the ledger does not know."""
    patches, options = chosen_patches(model_args, args)
    weight_bytes = 2 if model_args.weight_dtype(args.bf16) in ("bfloat16", "auto") else 4
    switches = Switches(
        attn_implementation=model_args.attn_implementation,
        patches=frozenset(patches),
        gradient_checkpointing=args.gradient_checkpointing,
        use_peft=model_args.use_peft,
        lora_r=model_args.lora_r,
        weight_bytes=weight_bytes,
        load_in_4bit=model_args.load_in_4bit,
        casts_adapter_inputs=not args.bf16,
        activation_bytes=2 if args.bf16 else weight_bytes,
        gpus=max(args.gpus, machine.processes()),
        sp=args.sp_size,
        fsdp=args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true",
        **options,
    )
    try:
        return build_ledger(Shape.of(config), switches)
    except ValueError:
        return None


def out_of_memory_message(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> str:
    """The largest part of the memory, and the switch that removes it."""
    # A batch of packs is laid end to end, as one row of all its tokens.
    tokens = (args.trial_length or data_args.max_length) * args.per_device_train_batch_size
    ledger = ledger_of(model_args, args, load_config(model_args.model_name_or_path))
    advice = "lower --max_length or add --gradient_checkpointing, --patches all, --use_peft"
    if ledger is not None:
        advice = ledger.advice(tokens)
    return f"{advice}. flashmla max-length finds the longest that fits"
