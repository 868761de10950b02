"""The engines that accelerate starts a run on: plain DDP, FSDP2, DeepSpeed's ZeRO. What each needs beside the loop's calls.

``accelerate launch`` names the engine by environment variables. :func:`make_accelerator` refuses settings that a run cannot
honour and fills in those that DeepSpeed asks for, before data or weights are read. FSDP2 and DeepSpeed write checkpoints of
their own format, a part by each process: :func:`save_state` and :func:`load_state`. What a run asks of weights that a process
holds in part (their number, rows, first values) is here, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from flashmla_hf.patches import weights
from flashmla_hf.training import machine, sequence_parallel
from flashmla_hf.training.arguments import (
    ModelArguments,
    TrainingArguments,
    UserError,
    chosen_patches,
    first_line,
)

FSDP2, DEEPSPEED = "fsdp2", "deepspeed"
# What accelerate launch sets for the FSDP2 of scripts/accelerate, for the trials of max-length.
FSDP2_VARIABLES = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


def make_accelerator(model_args: ModelArguments, args: TrainingArguments) -> Accelerator:
    """accelerate's object for the engine that ``accelerate launch`` names. Raises UserError for what a run cannot honour."""
    try:
        accelerator = Accelerator(
            mixed_precision="bf16" if args.bf16 else "no",
            cpu=args.use_cpu,
            log_with="tensorboard" if args.logs_to_tensorboard else None,
            project_dir=args.output_dir,
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"accelerate: {first_line(error)}") from None
    _check_launch()
    for wanted, variable in ((DistributedType.FSDP, "FSDP"), (DistributedType.DEEPSPEED, "DEEPSPEED")):
        asked = os.environ.get(f"ACCELERATE_USE_{variable}", "").lower() == "true"
        if asked and accelerator.distributed_type != wanted:
            raise UserError(
                f"accelerate launch asks for {variable}, and accelerate runs {accelerator.distributed_type.value} here: it "
                "needs GPUs, and a process for each; leave --use_cpu out, or launch without it"
            )
    launched = machine.processes()
    if launched != accelerator.num_processes:
        raise UserError(
            f"{launched} processes were launched, and accelerate joins {accelerator.num_processes} of them: each would train "
            "by itself. Without GPUs, add --use_cpu"
        )
    sequence_parallel.check(accelerator, model_args, args)
    name = engine_of(accelerator)
    if name == DEEPSPEED:
        _complete_deepspeed(accelerator, args)
    elif accelerator.distributed_type == DistributedType.FSDP:
        _check_fsdp(accelerator, model_args, args)
    return accelerator


def _check_launch() -> None:
    """Raises UserError if ``accelerate launch --cpu --num_processes N`` has started one process alone, which is all it does."""
    is_one = not any(name in os.environ for name in ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"))
    # It names the main process to the others, and leaves their start to mpirun.
    if is_one and os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in os.environ:
        raise UserError(
            "accelerate launch --cpu: expected the processes of --num_processes, got one: on a CPU it starts no more without "
            "mpirun. Launch with: torchrun --nproc_per_node N -m flashmla_hf.training.finetune ... --use_cpu true"
        )


def engine_of(accelerator: Accelerator) -> str:
    """``FSDP2``, ``DEEPSPEED``, or an empty string if every process holds all weights."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return DEEPSPEED
    return FSDP2 if accelerator.distributed_type == DistributedType.FSDP else ""


def _check_fsdp(accelerator: Accelerator, model_args: ModelArguments, args: TrainingArguments) -> None:
    plugin = accelerator.state.fsdp_plugin
    if not accelerator.is_fsdp2:
        raise UserError(
            f"FSDP: expected fsdp_version: 2 in the file of accelerate launch, got {plugin.fsdp_version}: its units keep the "
            "module's own parameters, which the patches read"
        )
    if plugin.activation_checkpointing and (
        args.gradient_checkpointing or "checkpointing" in chosen_patches(model_args, args)[0]
    ):
        raise UserError(
            "FSDP: expected fsdp_activation_checkpointing: false, because --patches or --gradient_checkpointing run the layers "
            "again already, got true"
        )
    if model_args.load_in_4bit and "FULL" in plugin.state_dict_type.name:
        raise UserError(
            "FSDP: expected fsdp_state_dict_type: SHARDED_STATE_DICT with --load_in_4bit, got FULL_STATE_DICT: accelerate "
            "cannot read a whole checkpoint back beside 4-bit weights"
        )
    policy = plugin.mixed_precision_policy
    if policy is not None:
        # accelerate casts every unit's result, the loss with it, and sums gradients in bfloat16.
        plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=None, reduce_dtype=torch.float32)


def _complete_deepspeed(accelerator: Accelerator, args: TrainingArguments) -> None:
    """Sets what DeepSpeed's configuration leaves to the run. Raises UserError if it says something else than the options."""
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    for part in ("optimizer", "scheduler"):
        if part in config:
            raise UserError(
                f"DeepSpeed's configuration: expected no {part!r}, because --learning_rate and --lr_scheduler_type make AdamW "
                "and its schedule, got one: remove it"
            )
    if _is_on(config, "fp16"):
        raise UserError("DeepSpeed's configuration: expected fp16 off, got it on; use --bf16")
    if _is_on(config, "bf16") != args.bf16:
        raise UserError(
            f"DeepSpeed's configuration: expected bf16.enabled {str(args.bf16).lower()} as --bf16 says, got "
            f"{str(not args.bf16).lower()}: {'remove it' if args.bf16 else 'add --bf16'}"
        )
    size, accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
    options = {
        "train_micro_batch_size_per_gpu": (size, "--per_device_train_batch_size"),
        "gradient_accumulation_steps": (accumulated, "--gradient_accumulation_steps"),
        # Of processes, not of sequences: DeepSpeed does not know that some of them share one.
        "train_batch_size": (
            size * accumulated * accelerator.num_processes,
            "batch size x accumulation x processes",
        ),
        "gradient_clipping": (args.max_grad_norm, "--max_grad_norm"),
    }
    for name, (value, option) in options.items():
        got = config.get(name, "auto")
        # accelerate's own default, which says nothing.
        is_default = name == "gradient_accumulation_steps" and got == 1
        if got not in ("auto", None, value) and not is_default:
            raise UserError(
                f'DeepSpeed\'s configuration: {name}: expected {value} by {option}, or "auto", got {got}: they would train '
                "differently"
            )
        config[name] = value
    accelerator.gradient_accumulation_steps = 1  # the loop says which batch is a step's last
    accelerator.state.deepspeed_plugin.gradient_accumulation_steps = accumulated
    if config["zero_optimization"].get("stage") == 3:  # for the result, which is one file
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True


def _is_on(config: dict, dtype: str) -> bool:
    return str(config.get(dtype, {}).get("enabled", False)).lower() == "true"


# ---- a step ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def accumulating(accelerator: Accelerator, model: torch.nn.Module, is_last: bool) -> Iterator[None]:
    """Around forward and backward of one of a step's batches: gradients cross processes with the last one, as far as the engine
    can wait for it, and DeepSpeed's optimizer steps with it."""
    if engine_of(accelerator) == DEEPSPEED:
        accelerator.sync_gradients = is_last
        yield
    else:
        with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
            yield


def backward(accelerator: Accelerator, loss: torch.Tensor) -> None:
    """Backward of ``loss``, this process's share of a step's loss: the sum over all processes is what is minimised."""
    # Every engine averages gradients over processes.
    loss = loss * accelerator.num_processes
    if engine_of(accelerator) == DEEPSPEED:
        accelerator.backward(loss, scale_wrt_gas=False)
    else:
        accelerator.backward(loss)


# ---- processes that end -----------------------------------------------------------------------------------------------

# Seconds. The launcher ends all processes as soon as one has failed: who waits before it speaks leaves the word to the first.
SAME_MISTAKE_WAIT, LOST_PROCESS_WAIT = 15.0, 10.0


def end_training(accelerator: Accelerator) -> None:
    """Ends the run's trackers and process groups.

    DDP may hold the last reference to its group. It would free it holding the interpreter's lock, and a group of gloo waits
    for its threads, of which one may wait for that lock to free a tensor: so groups stay until the interpreter ends.
    """
    if torch.distributed.is_initialized():
        _ended_groups.append(torch.distributed.group.WORLD)
        if (mesh := accelerator.torch_device_mesh) is not None:
            _ended_groups.extend(mesh.get_all_groups())
    accelerator.end_training()


_ended_groups: list[torch.distributed.ProcessGroup | None] = []  # of end_training


def let_others_speak(error: BaseException) -> str:
    """Waits so that the launcher can end this process in silence, and returns what its message begins with.

    Every process makes the same mistake in its options: the main process says it. A process whose partner is gone only reports
    that, and the launcher knows which one it was.
    """
    rank = machine.process_index()
    if machine.processes() == 1:
        return ""
    if is_lost_process(error):
        time.sleep(LOST_PROCESS_WAIT)
    elif rank:
        time.sleep(SAME_MISTAKE_WAIT)
    return f"process {rank}: "


def is_lost_process(error: BaseException) -> bool:
    """Whether ``error`` is of a message to or from a process that is gone."""
    gone = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "Timed out")
    is_gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
    return isinstance(error, torch.distributed.DistError) or (is_gloo and any(word in str(error) for word in gone))


# ---- weights that a process holds in part ----------------------------------------------------------------------------


def size_of(parameter: Any) -> torch.Size:
    """The shape of ``parameter``, whole."""
    return parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape


def settle_dtypes(model: torch.nn.Module, accelerator: Accelerator, bf16: bool) -> None:
    """Under DeepSpeed's bf16 every weight is in bfloat16, its copy in the optimizer in float32: an adapter's, too.

    DeepSpeed casts a whole model. A model that was partitioned as it was loaded keeps an adapter in float32 otherwise.
    """
    if engine_of(accelerator) == DEEPSPEED and bf16:
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype == torch.float32 and not hasattr(parameter, "ds_id"):
                parameter.data = parameter.data.to(torch.bfloat16)


def first_values(model: torch.nn.Module, accelerator: Accelerator) -> str:
    """Differs with the weights that are not trained, which no checkpoint holds: a few numbers of each. The main process's."""
    parts = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            with weights.gathered_by_zero([parameter]):
                parts.append(parameter.detach().flatten()[:16].float().cpu())
    found = [hashlib.sha256(torch.cat(parts).numpy().tobytes()).hexdigest()[:16] if parts else ""]
    if accelerator.num_processes > 1:
        # With fsdp_cpu_ram_efficient_loading the others have no weights yet.
        torch.distributed.broadcast_object_list(found, src=0)
    return found[0]


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def save_state(
    accelerator: Accelerator, folder: Path, model: Any, optimizer: Any, scheduler: Any, use_peft: bool
) -> None:
    """Writes weights (an adapter's alone), optimizer, schedule and random states, a part by each process: FSDP2, DeepSpeed."""
    if engine_of(accelerator) == DEEPSPEED:
        accelerator.save_state(str(folder), exclude_frozen_parameters=use_peft)
    else:
        from accelerate.checkpointing import save_accelerator_state, save_custom_state
        from accelerate.utils import save_fsdp_model, save_fsdp_optimizer

        plugin = accelerator.state.fsdp_plugin
        save_fsdp_model(plugin, accelerator, model, folder, adapter_only=use_peft)
        save_fsdp_optimizer(plugin, accelerator, optimizer, model, folder)
        save_accelerator_state(str(folder), [], [], [], [], accelerator.process_index, accelerator.step, None)
        if accelerator.is_main_process:
            save_custom_state(scheduler, str(folder))
    if accelerator.is_main_process:  # beside the engine's files: what they are of
        inner = accelerator.unwrap_model(model)
        settings = inner.peft_config[inner.active_adapter] if use_peft else inner.config
        settings.save_pretrained(folder)


def load_state(
    accelerator: Accelerator, folder: Path, model: Any, optimizer: Any, scheduler: Any, use_peft: bool
) -> None:
    """What :func:`save_state` wrote; FSDP2 divides it among as many processes as there are now."""
    if engine_of(accelerator) == DEEPSPEED:
        accelerator.load_state(str(folder), load_module_strict=not use_peft)
        return
    from accelerate.checkpointing import load_accelerator_state, load_custom_state
    from accelerate.utils import load_fsdp_model, load_fsdp_optimizer

    plugin = accelerator.state.fsdp_plugin
    load_fsdp_model(plugin, accelerator, model, folder, adapter_only=use_peft)
    load_fsdp_optimizer(plugin, accelerator, optimizer, model, folder, adapter_only=use_peft)
    load_accelerator_state(str(folder), [], [], [], [], accelerator.process_index, None, "cpu")
    load_custom_state(scheduler, str(folder))
