"""The options of a fine-tuning run: three groups, a YAML file of them, and the limits of their numbers."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
from transformers import HfArgumentParser

from flashmla_hf.training.options import LARGEST_COUNT, check_names, set_defaults


class UserError(ValueError):
    """A mistake that the caller can mend. The message is the one sentence that is printed."""


class UnknownOptionError(UserError):
    """A word of the command line that is no option."""


def end(command: str, error: UserError, who: str = "") -> NoReturn:
    """Ends the process with the error's sentence; with argparse's exit code, 2, if a word is no option.

    ``who`` names the process if there are several.
    """
    if isinstance(error, UnknownOptionError):
        print(f"{command}: {who}{error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(f"{command}: {who}{error}")


def has_tensorboard() -> bool:
    """Whether a package that accelerate writes TensorBoard's files with is installed."""
    return any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX"))


def first_line(error: BaseException) -> str:
    """The first line of the error's message (all of it, if that ends with a colon), or its kind if it has none."""
    text = str(error).strip()
    line = next(iter(text.splitlines()), type(error).__name__).rstrip()
    return " ".join(text.split()) if line.endswith(":") else line


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "a folder with config.json, or a name on the Hub"})
    attn_implementation: str = field(default="flashmla", metadata={"help": "flashmla, flashmla_fp8, sdpa, eager, ..."})
    patches: list[str] = field(
        default_factory=lambda: ["auto"],
        metadata={
            "help": "memory patches: auto (the default: all, or on a CPU light if the step fits without the others), all "
            "(that the model supports), light (those that cost no time: loss, rope, lora), none, or some of loss, mlp, "
            "norm, rope, attention, lora, checkpointing, keep_attention, offload (flashmla_hf.PATCHES); mlp_tile=N, "
            "loss_chunk=N, keep_attention=N, offload=N give one its number"
        },
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "dtype of the loaded weights: float32, bfloat16 or auto; by default bfloat16 for the frozen "
            "weights under --use_peft --bf16, and float32 otherwise (an adapter is always float32)",
            "choices": ["auto", "float32", "bfloat16"],
        },
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "QLoRA: load the frozen weights of the linear layers in 4 bits, with double quantization (needs --use_peft "
            "and the package bitsandbytes)"
        },
    )
    bnb_4bit_quant_type: str = field(
        default="nf4", metadata={"help": "the numbers that 4 bits stand for", "choices": ["nf4", "fp4"]}
    )
    use_peft: bool = field(default=False, metadata={"help": "train a LoRA adapter instead of all weights"})
    lora_r: int = field(default=16, metadata={"help": "rank"})
    lora_alpha: int = field(default=32, metadata={"help": "scale: the adapter counts lora_alpha / lora_r"})
    lora_dropout: float = field(default=0.0)
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "module names, e.g. q_proj v_proj, or all-linear"}
    )

    def weight_dtype(self, bf16: bool) -> str:
        """The dtype of the loaded weights."""
        return self.dtype or ("bfloat16" if self.use_peft and bf16 else "float32")


@dataclass
class DataArguments:
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "a folder (each file a document), a .jsonl, .json or .parquet file (each row a document), a text file "
            "(one document), or a folder that save_to_disk wrote; docs/data.md tells what a row may hold"
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "held-out documents, like train_file"})
    validation_split_percentage: float = field(
        default=0.0, metadata={"help": "without validation_file: hold out this share of the documents, whole documents"}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "instead of files: for datasets.load_dataset, or a folder of save_to_disk"},
    )
    dataset_config: str | None = field(default=None)
    dataset_train_split: str = field(default="train")
    dataset_test_split: str | None = field(default=None, metadata={"help": "the split of held-out documents"})
    dataset_text_field: str = field(
        default="text", metadata={"help": "the column that holds the text; another one than text may hold messages"}
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "read the training data as training goes on, a window at a time; needs max_steps"},
    )
    assistant_only_loss: bool = field(
        default=False, metadata={"help": "of messages, train on the assistant's tokens alone"}
    )
    completion_only_loss: bool | None = field(
        default=None,
        metadata={
            "help": "of prompt and completion, train on the completion alone (the default); false: on both; true: refuse "
            "rows of other formats"
        },
    )
    chat_template_path: str | None = field(
        default=None,
        metadata={"help": "a Jinja file, or the tokenizer whose chat template is used instead of the model's"},
    )
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "leave out rows that cannot be used, and count them, instead of ending"}
    )
    preview: bool = field(
        default=False, metadata={"help": "print the first packed sequence, with what is trained on marked, and end"}
    )
    max_length: int = field(default=1024, metadata={"help": "tokens of one packed sequence"})
    max_train_samples: int | None = field(default=None, metadata={"help": "use this many packed sequences"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "evaluate on this many packed sequences"})


@dataclass
class TrainingArguments:
    output_dir: str = field(metadata={"help": "checkpoints, the final adapter or model, logs and all_results.json"})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "packed sequences per forward pass"})
    per_device_eval_batch_size: int = field(default=1)
    gradient_accumulation_steps: int = field(default=1)
    learning_rate: float = field(default=2e-4)
    weight_decay: float = field(default=0.0)
    max_grad_norm: float = field(default=1.0)
    num_train_epochs: float = field(default=1.0)
    max_steps: int = field(default=-1, metadata={"help": "optimizer steps; overrides num_train_epochs when positive"})
    lr_scheduler_type: str = field(default="cosine")
    warmup_steps: float = field(default=0.0, metadata={"help": "steps, or below 1 a share of all steps"})
    sp_size: int = field(
        default=1,
        metadata={"help": "processes that share each sequence (DeepSpeed's Ulysses attention, on any engine)"},
    )
    seed: int = field(default=42)
    bf16: bool = field(default=False, metadata={"help": "compute in bfloat16 (autocast)"})
    gradient_checkpointing: bool = field(
        default=False,
        metadata={"help": "recompute layers in the backward pass; the patch checkpointing does the same"},
    )
    use_cpu: bool = field(default=False, metadata={"help": "use the CPU even if there is a GPU"})
    logging_steps: int = field(default=1)
    eval_steps: int = field(default=0, metadata={"help": "steps between evaluations; 0: evaluate only at the end"})
    eval_on_start: bool = field(default=False)
    save_steps: int = field(default=0, metadata={"help": "steps between checkpoints; 0: none"})
    save_total_limit: int | None = field(default=None, metadata={"help": "keep this many checkpoints"})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "a checkpoint folder, or latest: the last one in output_dir, if any"}
    )
    report_to: str = field(
        default="auto",
        metadata={
            "help": "logs beside trainer_state.json: auto (the default: tensorboard if it is installed), tensorboard, none",
            "choices": ["auto", "tensorboard", "none"],
        },
    )
    disable_tqdm: bool = field(default=False)
    find_max_length: bool = field(
        default=False, metadata={"help": "look for the longest max_length that fits, write max_length.json, and end"}
    )
    gpus: int = field(
        default=1,
        metadata={"help": "for max-length: processes of each trial, one for each GPU (sp_size may divide them)"},
    )
    fsdp: bool = field(
        default=False,
        metadata={"help": "for max-length: the trials' weights and states are in parts on all GPUs (FSDP2)"},
    )
    find_max_length_timeout: float = field(default=600.0, metadata={"help": "seconds that one trial may take"})
    trial_length: int | None = field(
        default=None, metadata={"help": "for the processes of --find_max_length: try this length and end"}
    )

    @property
    def logs_to_tensorboard(self) -> bool:
        return self.report_to == "tensorboard" or (self.report_to == "auto" and has_tensorboard())

    @property
    def device_type(self) -> str:
        return "cpu" if self.use_cpu or not torch.cuda.is_available() else "cuda"


# The least and the most that an option may be.
LIMITS = {
    "lora_r": (1, math.inf),
    "lora_alpha": (1, 2**31 - 1),  # 0 trains nothing
    "lora_dropout": (0, 0.99),
    "max_length": (2, math.inf),
    "max_train_samples": (1, math.inf),
    "max_eval_samples": (1, math.inf),
    "validation_split_percentage": (0, 99.99),
    "per_device_train_batch_size": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "learning_rate": (0, math.inf),
    "weight_decay": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "warmup_steps": (0, math.inf),
    "sp_size": (1, math.inf),
    "gpus": (1, math.inf),
    "seed": (0, 2**32 - 1),
    "logging_steps": (1, math.inf),
    "eval_steps": (0, math.inf),
    "save_steps": (0, math.inf),
    "save_total_limit": (1, math.inf),
    "find_max_length_timeout": (1, math.inf),
    "trial_length": (2, math.inf),
}


def parse_arguments(
    argv: list[str], prog: str = "flashmla finetune", description: str | None = None
) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """The three groups of options: defaults, then the YAML file of ``--config``, then the command line.

    Raises UserError for a value that is wrong by itself or beside another.
    """
    data = "" if prog.endswith("max-length") else "--train_file DATA "
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, TrainingArguments), prog=prog, description=description, allow_abbrev=False,
        usage=f"%(prog)s --model_name_or_path MODEL {data}--output_dir FOLDER [OPTION ...]",
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file of options; the command line wins")
    try:
        check_names(parser, argv)
    except ValueError as error:
        raise UnknownOptionError(str(error)) from None
    try:
        set_defaults(parser, argv)
    except ValueError as error:
        raise UserError(str(error)) from None
    for action in parser._actions:
        if action.dest == "completion_only_loss":
            action.nargs, action.const = (
                "?",
                True,
            )  # a switch like the others, which HfArgumentParser makes of a bool alone
    model_args, data_args, args, _, rest = parser.parse_args_into_dataclasses(
        args=argv, return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        raise UnknownOptionError(f"unexpected argument {rest[0]!r}; --help lists the options")
    _check_numbers(model_args, data_args, args)
    _check_names(model_args, data_args, args)
    is_search = args.find_max_length or args.trial_length is not None  # on random tokens
    if not is_search and (args.gpus > 1 or args.fsdp):
        raise UserError(
            "--gpus and --fsdp are options of max-length; several GPUs train by accelerate launch -m "
            "flashmla_hf.training.finetune, with a file of scripts/accelerate"
        )
    if args.find_max_length and args.gpus % args.sp_size:
        raise UserError(f"--sp_size: expected a divisor of --gpus {args.gpus}, got {args.sp_size}")
    if not is_search and (data_args.train_file is None) == (data_args.dataset_name is None):
        raise UserError("expected exactly one of --train_file and --dataset_name")
    if args.report_to == "tensorboard" and not has_tensorboard():
        raise UserError("--report_to tensorboard: not installed: tensorboard. Run: pip install tensorboard")
    if data_args.dataset_test_split is not None and data_args.dataset_name is None:
        raise UserError("--dataset_test_split: expected it with --dataset_name; files have --validation_file")
    if data_args.dataset_test_split is not None and data_args.validation_file is not None:
        raise UserError("expected at most one of --dataset_test_split and --validation_file")
    if data_args.streaming and not is_search:
        _check_streaming(data_args, args)
    try:
        chosen_patches(model_args, args)
    except ValueError as error:
        raise UserError(f"--patches: {error}") from None
    return model_args, data_args, args


def _check_streaming(data_args: DataArguments, args: TrainingArguments) -> None:
    if args.max_steps < 1:
        raise UserError("--streaming: expected --max_steps, because the length of streamed data is not known")
    if data_args.validation_split_percentage > 0:
        raise UserError(
            "--streaming: expected --validation_split_percentage 0, because streamed data cannot be split; held-out documents "
            "come from --validation_file or --dataset_test_split"
        )
    if data_args.max_train_samples is not None:
        raise UserError("--streaming: expected no --max_train_samples; --max_steps says how much is used")


def _check_numbers(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> None:
    given = vars(model_args) | vars(data_args) | vars(args)
    for name, (least, most) in LIMITS.items():
        value = given[name]
        if value is None:
            continue
        is_finite = abs(value) <= LARGEST_COUNT if isinstance(value, int) else math.isfinite(value)
        if not (is_finite and least <= value <= most):
            expected = f"at least {least}" if most == math.inf else f"{least} to {most}"
            expected += "" if is_finite or most != math.inf else ", and finite"
            raise UserError(f"--{name}: expected {expected}, got {value}")
    if args.max_steps < 1 and not (math.isfinite(args.num_train_epochs) and args.num_train_epochs > 0):
        raise UserError(f"--num_train_epochs: expected more than 0, got {args.num_train_epochs}")


def _check_names(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> None:
    for group, name in (
        (model_args, "model_name_or_path"), (data_args, "train_file"), (data_args, "validation_file"), (args, "output_dir"),
        (data_args, "chat_template_path"),
    ):  # fmt: skip
        value = getattr(group, name)
        if value is not None and not value.strip():
            raise UserError(f"--{name}: expected a name, got an empty one")
        if value is not None and value.startswith("~"):  # from YAML, which no shell has read
            setattr(group, name, str(Path(value).expanduser()))


def chosen_patches(model_args: ModelArguments, args: TrainingArguments) -> tuple[list[str], dict[str, int]]:
    """The names and options of flashmla_hf.patch that ``--patches`` stands for in this run."""
    return parse_patches(model_args.patches, args.device_type, model_args.use_peft)


# --patches light: they cost no time, on a GPU or a CPU.
LIGHT = ("loss", "rope", "lora")
GROUPS = ("auto", "all", "light")


def parse_patches(wanted: list[str], device: str, use_peft: bool) -> tuple[list[str], dict[str, int]]:
    """The names and the options of flashmla_hf.patch that ``--patches`` stands for.

    "all" is the default of flashmla_hf.patch, without patches that have no effect on ``device`` or without an adapter. "light"
    is those of them that cost no time. "auto" is "all" here: model.plan_patches() decides before.
    "none" is none, and "offload=31" is the patch offload with that option. Raises ValueError for an unknown name, and for a
    patch that is of no use in training.
    """
    if "auto" in wanted and len(wanted) > 1:
        raise ValueError(f"auto: expected it alone, got {' '.join(wanted)}; all takes further names and numbers")
    wanted = [name for name in wanted if name != "none"]
    if not wanted:
        return [], {}
    from flashmla_hf import DEFAULT_PATCHES, PATCH_OPTIONS
    from flashmla_hf.patches import INFERENCE_PATCHES, PATCHES

    of_training = [name for name in PATCHES if name not in INFERENCE_PATCHES]
    names: list[str] = []
    options: dict[str, int] = {}
    for part in wanted:
        name, _, value = part.partition("=")
        if value and name in PATCH_OPTIONS:
            if not value.isdecimal():
                raise ValueError(f"--patches {part}: expected a number after {name}=")
            options[name] = int(value)
            name = PATCH_OPTIONS[name]
        elif part in INFERENCE_PATCHES:
            raise ValueError(
                f"{part}: expected a patch for training, got one for decoding, which changes no step of it. Leave it out here, "
                f"and call flashmla_hf.patch(model, [{part!r}]) on the trained model"
            )
        elif name not in (*GROUPS, *of_training) or value:
            groups = f"{', '.join(GROUPS)}, none"
            expected = (
                f"{groups}, some of {', '.join(of_training)}, or {', '.join(f'{o}=NUMBER' for o in PATCH_OPTIONS)}"
            )
            raise ValueError(f"unknown patch {part!r}: expected {expected}")
        names.append(name)
    # On a CPU there is no other memory to offload to. The name alone still selects it there.
    has_effect = {"offload": device != "cpu", "lora": use_peft}
    if "all" in names or "auto" in names:
        names += [name for name in DEFAULT_PATCHES if has_effect.get(name, True)]
    elif "light" in names:
        names += [name for name in LIGHT if has_effect.get(name, True)]
    return [name for name in PATCHES if name in names], options


def required_patches(wanted: list[str]) -> set[str] | None:
    """The patches that ``--patches`` names itself, and which the model must support; ``None`` if that is all of them.

    Those that a group brings are left out if the model does not support them.
    """
    from flashmla_hf import PATCH_OPTIONS, PATCHES

    if not set(wanted) & set(GROUPS):
        return None
    named = {PATCH_OPTIONS.get(part.partition("=")[0], part) for part in wanted}
    return named & set(PATCHES)
