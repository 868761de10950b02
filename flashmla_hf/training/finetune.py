"""Fine-tune a causal language model on long documents, with attention by flashmla. One straight accelerate script.

    python scripts/finetune.py --config scripts/configs/lora.yaml --train_file notes/ --output_dir results/notes
    accelerate launch scripts/finetune.py --config scripts/configs/lora.yaml --train_file notes/ --output_dir results/notes
    python scripts/finetune.py --config scripts/configs/lora.yaml ... --resume_from_checkpoint latest
    python scripts/finetune.py --config scripts/configs/lora-long.yaml ... --find_max_length
    tensorboard --logdir results/notes/runs

Options are named as in Transformers' and TRL's scripts; ``--config`` names a YAML file of them, and the command line
wins.

The way of the data: documents -> tokens, an end-of-text token after each -> pieces of at most ``max_length`` -> packs
of pieces, together at most ``max_length`` -> DataCollatorWithFlattening, which lays a batch of packs end to end without
padding and marks where each piece begins (``position_ids``, ``cu_seq_lens_*``): no token attends to another document.

``--patches`` names the memory patches of flashmla_hf (all, or some of its PATCHES); ``--find_max_length`` looks for the
longest ``max_length`` that fits with the other options, by steps on random tokens, each trial in its own process, and
trains nothing. Held-out documents are evaluated by position: what is gained by reading far back shows there.

The loss of a step is the sum over its predicted tokens divided by their number, over all accumulated batches and all
processes: packs of different length, or another ``gradient_accumulation_steps``, do not change what is optimised.

A run that is killed and resumed gives the losses of one that was not: checkpoints hold the weights (or the adapter),
the optimizer, the schedule, the random states and the place in the data, and get their name only when whole. On a GPU
that is up to rounding: the patch mlp takes its tile by free memory unless mlp_tile=N is given, and some of torch's sums
have no fixed order there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import inspect
import json
import math
import os
import pickle
import re
import resource
import shutil
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

# Waiting threads sleep instead of spinning: beside other work on the machine, spinning makes steps on a CPU ten times
# slower. OpenMP reads it when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import child_process
import environment
import ledger
import models
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from options import set_defaults
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch.nn import functional as F
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    get_scheduler,
)

TRIAL_MARK, OUT_OF_MEMORY = "TRIAL ", "out of memory"  # what the processes of --find_max_length say
LOGITS_BYTES = 2**28  # of the logits that evaluation holds at a time, as fp32
Pack = list[np.ndarray]  # pieces of documents, int32 [piece_length] each, together at most max_length tokens


class UserError(Exception):
    """Something the caller can mend; the message is the one sentence that is printed."""


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "a folder with config.json, or a name on the Hub"})
    attn_implementation: str = field(default="flashmla", metadata={"help": "flashmla, sdpa, eager, ..."})
    patches: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={
            "help": "memory patches: all, none, or some of loss, mlp, norm, rope, attention, lora, checkpointing, "
            "keep_attention, offload (flashmla_hf.PATCHES); mlp_tile=N, loss_chunk=N, keep_attention=N, offload=N give one "
            "its number"
        },
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "dtype of the loaded weights: float32, bfloat16 or auto; by default bfloat16 for the frozen "
            "weights under --use_peft --bf16, and float32 otherwise (an adapter is float32 always)",
            "choices": ["auto", "float32", "bfloat16"],
        },
    )
    use_peft: bool = field(default=False, metadata={"help": "train a LoRA adapter instead of all weights"})
    lora_r: int = field(default=16, metadata={"help": "rank"})
    lora_alpha: int = field(default=32, metadata={"help": "scale: the adapter counts lora_alpha / lora_r"})
    lora_dropout: float = field(default=0.0)
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "module names, e.g. q_proj v_proj, or all-linear"}
    )


@dataclass
class DataArguments:
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "a folder (each file a document), a .jsonl or .parquet file (each row a document), or a text file "
            "(one document)"
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "held-out documents, like train_file"})
    validation_split_percentage: float = field(
        default=0.0, metadata={"help": "without validation_file: hold out this share of the documents, whole documents"}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "instead of files: for datasets.load_dataset"})
    dataset_config: str | None = field(default=None)
    dataset_train_split: str = field(default="train")
    dataset_test_split: str | None = field(default=None, metadata={"help": "the split of held-out documents"})
    dataset_text_field: str = field(default="text", metadata={"help": "the column that holds the text"})
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
    seed: int = field(default=42)
    bf16: bool = field(default=False, metadata={"help": "compute in bfloat16 (autocast)"})
    gradient_checkpointing: bool = field(
        default=False,
        metadata={"help": "recompute layers in the backward pass; the patch checkpointing does it where it is on"},
    )
    use_cpu: bool = field(default=False, metadata={"help": "stay on the CPU where there is a GPU"})
    logging_steps: int = field(default=1)
    eval_steps: int = field(default=0, metadata={"help": "evaluate every so many steps; 0: only at the end"})
    eval_on_start: bool = field(default=False)
    save_steps: int = field(default=0, metadata={"help": "checkpoint every so many steps; 0: never"})
    save_total_limit: int | None = field(default=None, metadata={"help": "keep this many checkpoints"})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "a checkpoint folder, or latest: the last one in output_dir, if any"}
    )
    report_to: str = field(default="tensorboard", metadata={"choices": ["tensorboard", "none"]})
    disable_tqdm: bool = field(default=False)
    find_max_length: bool = field(
        default=False, metadata={"help": "look for the longest max_length that fits, write max_length.json, and end"}
    )
    find_max_length_timeout: float = field(default=600.0, metadata={"help": "seconds that one trial may take"})
    trial_length: int | None = field(
        default=None, metadata={"help": "of --find_max_length's own processes: try this length and end"}
    )


@dataclass
class TrainerState:
    """What a checkpoint knows beside tensors; ``trainer_state.json``."""

    step: int = 0
    tokens: int = 0
    runtime: float = 0.0  # seconds of training, earlier runs included
    interval_losses: list[float] = field(default_factory=list)  # since the last log entry
    log_history: list[dict] = field(default_factory=list)
    flops: int = 0  # the model's own, of this process (ledger.Shape.training_flops), earlier runs included
    fingerprint: str = ""  # of what decides the course of the losses: data and arguments
    frozen_fingerprint: str = ""  # of the weights that are not in the checkpoint


def device_type(args: TrainingArguments) -> str:
    return "cpu" if args.use_cpu or not torch.cuda.is_available() else "cuda"


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """The three groups of options: defaults, then ``--config`` YAML, then the command line."""
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, TrainingArguments), description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file of options; the command line wins")
    try:
        set_defaults(parser, argv)
    except ValueError as error:
        raise UserError(str(error)) from None
    model_args, data_args, args, _ = parser.parse_args_into_dataclasses(args=argv)
    _check_numbers(model_args, data_args, args)
    for group, name in (
        (model_args, "model_name_or_path"), (data_args, "train_file"), (data_args, "validation_file"), (args, "output_dir"),
    ):  # fmt: skip
        value = getattr(group, name)
        if value is not None and not value.strip():
            raise UserError(f"--{name}: expected a name, got an empty one")
        if value is not None and value.startswith("~"):  # from YAML, which no shell has read
            setattr(group, name, str(Path(value).expanduser()))
    is_search = args.find_max_length or args.trial_length is not None  # on random tokens
    if not is_search and (data_args.train_file is None) == (data_args.dataset_name is None):
        raise UserError("expected exactly one of --train_file and --dataset_name")
    if data_args.dataset_test_split is not None and data_args.dataset_name is None:
        raise UserError("--dataset_test_split: expected it with --dataset_name; files have --validation_file")
    if data_args.dataset_test_split is not None and data_args.validation_file is not None:
        raise UserError("expected at most one of --dataset_test_split and --validation_file")
    try:
        chosen_patches(model_args, args)
    except ValueError as error:
        raise UserError(f"--patches: {error}") from None
    return model_args, data_args, args


# The least and the most that an option may be.
LIMITS = {
    "lora_r": (1, math.inf),
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
    "seed": (0, 2**32 - 1),
    "logging_steps": (1, math.inf),
    "eval_steps": (0, math.inf),
    "save_steps": (0, math.inf),
    "save_total_limit": (1, math.inf),
    "find_max_length_timeout": (1, math.inf),
    "trial_length": (2, math.inf),
}


def _check_numbers(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> None:
    given = vars(model_args) | vars(data_args) | vars(args)
    for name, (least, most) in LIMITS.items():
        value = given[name]
        if value is not None and not (math.isfinite(value) and least <= value <= most):
            expected = f"at least {least}" if most == math.inf else f"{least} to {most}"
            raise UserError(f"--{name}: expected {expected}, got {value}")
    if args.max_steps < 1 and not (math.isfinite(args.num_train_epochs) and args.num_train_epochs > 0):
        raise UserError(f"--num_train_epochs: expected more than 0, got {args.num_train_epochs}")


def first_line(error: Exception) -> str:
    """Of its message; its kind where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# ---------------------------------------------------------------- data


def read_documents(path: str, text_field: str) -> list[str]:
    """The documents of a folder, a .jsonl/.json/.parquet file or a text file, in a fixed order."""
    root = Path(path)
    if root.is_dir():
        paths = (p for p in root.rglob("*") if not any(part.startswith(".") for part in p.relative_to(root).parts))
        files = sorted(p for p in paths if p.is_file())
        if not files:
            raise UserError(f"the folder {path} holds no files")
    elif root.is_file():
        files = [root]
    else:
        raise UserError(f"{path}: no such file or folder")
    documents = []
    for file in files:
        documents += _read_file(file, text_field)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise UserError(f"{path} holds no text")
    return documents


def _read_file(file: Path, text_field: str) -> list[str]:
    if file.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise UserError(f"{file}: reading parquet needs the package pyarrow: pip install pyarrow") from None
        try:
            table = pyarrow.parquet.read_table(file)
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{file} is not a readable parquet file: {' '.join(str(error).split())}") from None
        if text_field not in table.column_names:
            raise UserError(_no_column(str(file), text_field, table.column_names))
        return [_checked_text(value, file, row) for row, value in enumerate(table[text_field].to_pylist(), start=1)]
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not text: byte {error.start} is not UTF-8") from None
    if file.suffix not in (".jsonl", ".json"):
        return [text]
    rows = []
    # Not splitlines(): JSON allows U+2028 and its like inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}, line {number} is not a JSON object: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{file}, line {number}: expected a JSON object, got {type(row).__name__}")
        if text_field not in row:
            raise UserError(_no_column(f"{file}, line {number}", text_field, list(row)))
        rows.append(_checked_text(row[text_field], file, number))
    return rows


def _no_column(where: str, text_field: str, columns: list[str]) -> str:
    return f"{where} has no column {text_field!r}, only {columns}: name one with --dataset_text_field"


def _checked_text(value: object, where: object, row: int) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}, row {row}: expected text, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}, row {row}: character {error.start} is half of a pair (a lone surrogate)") from None
    return value


def load_documents(data_args: DataArguments, seed: int) -> tuple[list[str], list[str]]:
    """Training and held-out documents; a document is wholly on one side."""
    if data_args.dataset_name is not None:
        train, held_out = _load_dataset(data_args)
    else:
        train = read_documents(data_args.train_file, data_args.dataset_text_field)
        held_out = []
    if data_args.validation_file is not None:
        held_out = read_documents(data_args.validation_file, data_args.dataset_text_field)
    if not held_out and data_args.validation_split_percentage > 0:
        if len(train) < 2:
            raise UserError(
                "the training data is a single document, which cannot be split into training and held-out documents: "
                "give --validation_file, or --validation_split_percentage 0"
            )
        order = np.random.default_rng(seed).permutation(len(train))
        count = min(max(1, round(len(train) * data_args.validation_split_percentage / 100)), len(train) - 1)
        train, held_out = [train[i] for i in sorted(order[count:])], [train[i] for i in sorted(order[:count])]
    return train, held_out


def _load_dataset(data_args: DataArguments) -> tuple[list[str], list[str]]:
    try:
        import datasets
    except ImportError:
        raise UserError("--dataset_name needs the package datasets: pip install datasets") from None

    def split(name: str) -> list[str]:
        try:
            rows = datasets.load_dataset(data_args.dataset_name, data_args.dataset_config, split=name)
        except Exception as error:  # datasets raises many kinds, all about the name, the network or the files
            raise UserError(
                f"dataset {data_args.dataset_name!r}, split {name!r} cannot be loaded: {first_line(error)}"
            ) from None
        if data_args.dataset_text_field not in rows.column_names:
            raise UserError(_no_column(data_args.dataset_name, data_args.dataset_text_field, rows.column_names))
        texts = rows[data_args.dataset_text_field]
        return [_checked_text(value, data_args.dataset_name, row) for row, value in enumerate(texts, start=1)]

    held_out = split(data_args.dataset_test_split) if data_args.dataset_test_split else []
    return split(data_args.dataset_train_split), held_out


def tokenize(documents: list[str], tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """Token ids of each document, int32 [length], ended by the end-of-text token where the tokenizer has one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [np.array(ids + end, dtype=np.int32) for ids in tokenizer(documents, verbose=False)["input_ids"]]


def pack(documents: list[np.ndarray], max_length: int) -> list[Pack]:
    """Cuts documents into pieces of at most ``max_length`` tokens and packs the pieces, best fit decreasing.

    Source: Ding et al. 2024, arXiv 2404.10830 (TRL's packing strategy "bfd"): nothing is cut that fits whole.
    """
    pieces = [ids[start : start + max_length] for ids in documents for start in range(0, len(ids), max_length)]
    pieces = [piece for piece in pieces if len(piece) > 1]  # a single token predicts nothing
    pieces.sort(key=len, reverse=True)  # stable: the order is a function of the data alone
    packs: list[Pack] = []
    with_room: dict[int, list[int]] = {}  # tokens still free -> packs with that much room
    for piece in pieces:
        rooms = [room for room in with_room if room >= len(piece)]
        if rooms:
            room = min(rooms)
            index = with_room[room].pop()
            if not with_room[room]:
                del with_room[room]
            packs[index].append(piece)
        else:
            room, index = max_length, len(packs)
            packs.append([piece])
        if room - len(piece) > 1:
            with_room.setdefault(room - len(piece), []).append(index)
    return packs


def spread(packs: list[Pack], count: int | None) -> list[Pack]:
    """``count`` of the packs (``None``: all), from the whole list: it is sorted by the longest piece."""
    if count is None or count >= len(packs):
        return packs
    return [packs[i] for i in np.linspace(0, len(packs) - 1, count, dtype=int)]


def predicted_tokens(packs: list[Pack]) -> int:
    """How many tokens have a loss: all but the first of each piece."""
    return sum(len(piece) - 1 for one in packs for piece in one)


# ---------------------------------------------------------------- model


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
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"model {name!r} has no loadable tokenizer: {first_line(error)}") from None


def load_model(model_args: ModelArguments, args: TrainingArguments, checkpoint: Path | None) -> torch.nn.Module:
    """The model to train, its weights or adapter those of ``checkpoint`` where one is given."""
    if model_args.attn_implementation == "flashmla":
        import flashmla_hf
    dtype = model_args.dtype or ("bfloat16" if model_args.use_peft and args.bf16 else "float32")
    is_full_resume = checkpoint is not None and not model_args.use_peft
    name = str(checkpoint) if is_full_resume else model_args.model_name_or_path
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, attn_implementation=model_args.attn_implementation
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(f"model {name!r} cannot be loaded: {first_line(error)}") from None
    # Transformers' own test (Trainer): a model says so, or takes any keyword.
    parameters = inspect.signature(model.forward).parameters.values()
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    if not getattr(model, "accepts_loss_kwargs", takes_any):
        raise UserError(
            f"{type(model).__name__} does not take num_items_in_batch, so its loss could not be normalised over tokens"
        )
    # peft and Transformers between themselves; nothing a caller could change.
    warnings.filterwarnings("ignore", message=".*is_activation_checkpointing|.*activation_checkpointing_enable")
    patches, options = chosen_patches(model_args, args)
    if args.gradient_checkpointing and "checkpointing" not in patches:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if model_args.use_peft:
        model = add_adapter(model, model_args, checkpoint)
        if args.bf16:
            models.keep_adapter_inputs(model)
    if patches:
        import flashmla_hf

        try:
            flashmla_hf.patch(model, patches, **options)
        except ValueError as error:
            raise UserError(f"--patches {' '.join(model_args.patches)}: {' '.join(str(error).split())}") from None
    return model


def positions_exceeded(model: torch.nn.Module, length: int) -> int | None:
    """The positions that the model was made for, where ``length`` is beyond them; UserError where it cannot be (GPT-2)."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not longest or length <= longest:
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
    is_fused = device_type(args) == "cuda"
    return torch.optim.AdamW(trainable, lr=args.learning_rate, weight_decay=args.weight_decay, fused=is_fused)


def chosen_patches(model_args: ModelArguments, args: TrainingArguments) -> tuple[list[str], dict[str, int]]:
    """The names and options of flashmla_hf.patch that --patches stands for in this run."""
    return models.parse_patches(model_args.patches, device_type(args), model_args.use_peft)


def ledger_of(model_args: ModelArguments, args: TrainingArguments, config) -> ledger.Ledger | None:
    """What the run's memory will consist of; None for a model that the ledger does not know."""
    patches, options = chosen_patches(model_args, args)
    dtype = model_args.dtype or ("bfloat16" if model_args.use_peft and args.bf16 else "float32")
    weight_bytes = 2 if dtype in ("bfloat16", "auto") else 4
    switches = ledger.Switches(
        attn_implementation=model_args.attn_implementation,
        patches=frozenset(patches),
        gradient_checkpointing=args.gradient_checkpointing,
        use_peft=model_args.use_peft,
        lora_r=model_args.lora_r,
        weight_bytes=weight_bytes,
        casts_adapter_inputs=not args.bf16,
        activation_bytes=2 if args.bf16 else weight_bytes,
        **options,
    )
    try:
        return ledger.ledger(ledger.Shape.of(config), switches)
    except ValueError:
        return None


def out_of_memory_message(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> str:
    """What most of the memory was, and which switch removes it."""
    # A batch of packs is laid end to end: one row of so many tokens.
    tokens = (args.trial_length or data_args.max_length) * args.per_device_train_batch_size
    of = ledger_of(model_args, args, models.config_of(model_args.model_name_or_path))
    advice = (
        of.advice(tokens) if of else "lower --max_length or add --gradient_checkpointing, --patches all, --use_peft"
    )
    return f"{advice}. --find_max_length looks for the longest that fits"


# ---------------------------------------------------------------- checkpoints


def checkpoints(output_dir: Path) -> list[Path]:
    """The finished checkpoints, oldest first."""
    found = [(int(match.group(1)), path) for path in output_dir.glob("checkpoint-*") if (match := _step_of(path))]
    return [path for _, path in sorted(found)]


def _step_of(path: Path) -> re.Match | None:
    return re.fullmatch(r"checkpoint-(\d+)", path.name)


def find_checkpoint(args: TrainingArguments, use_peft: bool) -> tuple[Path, TrainerState] | None:
    """The checkpoint to resume from, whole as far as can be told without loading it, and its state."""
    if args.resume_from_checkpoint is None:
        return None
    if args.resume_from_checkpoint.lower() in ("latest", "true"):
        found = checkpoints(Path(args.output_dir))
        if not found:
            return None
        path = found[-1]
    else:
        path = Path(args.resume_from_checkpoint)
    where = f"--resume_from_checkpoint {path}"
    for name in ("trainer_state.json", "optimizer.bin"):
        if not (path / name).is_file() or not (path / name).stat().st_size:
            raise UserError(f"{where}: no checkpoint there (expected {name} in it)")
    try:
        state = TrainerState(**json.loads((path / "trainer_state.json").read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: trainer_state.json is not of this script: {first_line(error)}") from None
    if (path / "adapter_config.json").is_file() != use_peft:
        expected, got = ("an adapter", "a whole model") if use_peft else ("a whole model", "an adapter")
        raise UserError(f"{where}: expected {expected} by --use_peft {str(use_peft).lower()}, got {got}")
    return path, state


def make_output_dir(model_args: ModelArguments, args: TrainingArguments) -> Path:
    """``output_dir``, there and writable, without results that this run's would be mixed with."""
    output_dir = Path(args.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir) as file:
            file.write(b" ")
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be written to: {error.strerror}") from None
    if args.find_max_length:
        return output_dir
    found = checkpoints(output_dir)
    if found and args.resume_from_checkpoint is None:
        raise UserError(
            f"--output_dir {output_dir} holds {found[-1].name} of an earlier run: continue it with --resume_from_checkpoint "
            "latest, or name another --output_dir"
        )
    other = "config.json" if model_args.use_peft else "adapter_config.json"
    if (output_dir / other).is_file():
        held = "a whole model" if model_args.use_peft else "an adapter"
        raise UserError(
            f"--output_dir {output_dir} holds {held} of an earlier run ({other}), which would be loaded together with this "
            "run's result: name another --output_dir"
        )
    return output_dir


def save_checkpoint(accelerator: Accelerator, args: TrainingArguments, state: TrainerState) -> None:
    """Writes ``checkpoint-<step>``; the name appears by a rename, when everything is written."""
    final = Path(args.output_dir) / f"checkpoint-{state.step}"
    unfinished = final.with_name(f"unfinished-{final.name}")
    try:
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(unfinished))  # weights by the hook that train() registers, in Transformers' format
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (unfinished / "trainer_state.json").write_text(json.dumps(dataclasses.asdict(state), indent=1))
            shutil.rmtree(final, ignore_errors=True)
            os.rename(unfinished, final)
    except Exception as error:  # OSError, and the RuntimeError or SafetensorError torch and safetensors make of it
        shutil.rmtree(unfinished, ignore_errors=True)
        kept = checkpoints(Path(args.output_dir))
        raise UserError(
            f"checkpoint-{state.step} could not be written ({first_line(error)}); "
            + (f"{kept[-1]} is whole: resume from it" if kept else "there is no earlier checkpoint")
        ) from error
    if accelerator.is_main_process and args.save_total_limit:
        for old in checkpoints(Path(args.output_dir))[: -args.save_total_limit]:
            shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def fingerprint(model_args: ModelArguments, args: TrainingArguments, packs: list[Pack], processes: int) -> str:
    """Changes where a resumed run would not continue the interrupted one: other data, batches, optimizer or adapter."""
    # The number of steps bends every schedule but the constant one: max_steps, or epochs if that does not say it.
    length: tuple[str, ...] = ("max_steps",) if args.max_steps > 0 else ("num_train_epochs",)
    if args.lr_scheduler_type == "constant":
        length = ()
    decisive: dict[str, object] = {"processes": processes}
    decisive |= {
        name: getattr(args, name)
        for name in (
            "per_device_train_batch_size", "gradient_accumulation_steps", "seed", "learning_rate", "weight_decay",
            "max_grad_norm", "lr_scheduler_type", "warmup_steps", "bf16", *length,
        )
    }  # fmt: skip
    adapter = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules") if model_args.use_peft else ()
    decisive |= {name: getattr(model_args, name) for name in ("use_peft", "dtype", *adapter)}
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode())
    for one in packs:
        for piece in one:
            digest.update(piece.tobytes())
    return digest.hexdigest()[:16]


def frozen_fingerprint(model: torch.nn.Module) -> str:
    """Changes with the weights that are not trained, which no checkpoint holds: a few numbers of each."""
    parts = [p.detach().flatten()[:16].float().cpu() for p in model.parameters() if not p.requires_grad]
    return hashlib.sha256(torch.cat(parts).numpy().tobytes()).hexdigest()[:16] if parts else ""


# ---------------------------------------------------------------- training


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on the GPU at most, or the largest resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024


class Collator:
    """Packs -> one row [1, tokens] of input_ids, labels, position_ids, and cu_seq_lens_* for flash-style attention."""

    def __init__(self, attn_implementation: str):
        is_flash = "flash" in attn_implementation  # Transformers' own test of who reads cu_seq_lens_*
        self.flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=is_flash)

    def __call__(self, packs: list[Pack], device: torch.device) -> dict:
        batch = self.flatten([{"input_ids": piece} for one in packs for piece in one])
        batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
        # A cache is of no use here, and with one Transformers would not see where packed documents begin.
        return batch | {"use_cache": False}


def step_batches(
    packs: list[Pack], step: int, accelerator: Accelerator, args: TrainingArguments
) -> tuple[list[list[Pack]], int]:
    """The batches this process runs in optimizer step ``step``, and the predicted tokens of all processes in it.

    A function of the step alone, so that resuming needs no replay. Every epoch is one permutation of the packs; what
    does not fill a whole step at its end waits for the next epoch's permutation.
    """
    size = args.per_device_train_batch_size
    per_step = size * args.gradient_accumulation_steps * accelerator.num_processes
    epoch, index = divmod(step, len(packs) // per_step)
    order = np.random.default_rng((args.seed, epoch)).permutation(len(packs))
    chosen = [packs[i] for i in order[index * per_step : (index + 1) * per_step]]
    mine = chosen[accelerator.process_index :: accelerator.num_processes]
    return [mine[i : i + size] for i in range(0, len(mine), size)], predicted_tokens(chosen)


def run_batches(
    model: torch.nn.Module, batches: list[list[Pack]], num_items: int, collate: Collator, accelerator: Accelerator
) -> torch.Tensor:
    """Forward and backward of one step's batches; returns this process's share of the step's loss."""
    step_loss = torch.zeros((), device=accelerator.device)
    for i, batch in enumerate(batches):
        # Gradients cross processes once per step, with its last batch.
        with accelerator.no_sync(model) if i < len(batches) - 1 else contextlib.nullcontext():
            loss = model(**collate(batch, accelerator.device), num_items_in_batch=num_items).loss
            step_loss += loss.detach()
            # Data-parallel training averages gradients over processes; the loss is already a share of the whole.
            accelerator.backward(loss * accelerator.num_processes)
    return step_loss


def token_losses(model: torch.nn.Module, inputs: dict, accelerator: Accelerator) -> torch.Tensor:
    """The loss of every token of ``inputs`` [1, tokens] but the first, fp32 [tokens - 1]; zero where labels say -100.

    The layers run once over the whole row; the rest of the model's own forward, head and whatever it does to logits, runs
    over chunks of the layers' output, so that the logits of a long row never exist at a time.
    """
    model = accelerator.unwrap_model(model)
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    labels = inputs.pop("labels")[0, 1:]
    tokens = len(labels)
    chunk = max(1, min(tokens, LOGITS_BYTES // (4 * model.config.get_text_config().vocab_size)))
    decoder = model.get_decoder()
    losses = torch.empty(tokens, device=labels.device)
    if decoder is model:  # says that it has none (Llama 4's text model): all logits at a time
        with accelerator.autocast():
            logits = model(**inputs).logits[0, :-1]
        return F.cross_entropy(logits.float(), labels, reduction="none")
    with accelerator.autocast():
        output = decoder(**inputs)
        hidden = output.last_hidden_state  # [1, tokens + 1, hidden]
        own_forward = decoder.forward
        try:
            for start in range(0, tokens, chunk):
                rows = slice(start, min(start + chunk, tokens))
                piece = type(output)(last_hidden_state=hidden[:, rows])  # a model reads more of its decoder's kind
                decoder.forward = lambda *args, _piece=piece, **kwargs: _piece
                logits = model(input_ids=inputs["input_ids"][:, rows]).logits[0]  # [chunk, vocabulary]
                losses[rows] = F.cross_entropy(logits.float(), labels[rows], reduction="none")
        finally:
            # It was the class's method, or an instance attribute that a patch had put there.
            del decoder.forward
            if decoder.forward != own_forward:
                decoder.forward = own_forward
    return losses


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, packs: list[Pack], collate: Collator, accelerator: Accelerator, size: int
) -> tuple[float, list[dict]]:
    """Mean loss over all predicted tokens of ``packs``, and by how many tokens of its document a prediction could read.

    The second: a dict per power of two, ``from`` ... ``to`` tokens before the predicted one, with ``tokens`` counted.
    """
    model.eval()
    mine = packs[accelerator.process_index :: accelerator.num_processes]
    # Every process makes the same number of forward passes: sharded models communicate in them.
    rounds = math.ceil(math.ceil(len(packs) / accelerator.num_processes) / size)
    sums = torch.zeros(2, 64, device=accelerator.device, dtype=torch.float64)  # losses and tokens per power of two
    for i in range(rounds):
        batch = mine[i * size : (i + 1) * size]
        inputs = collate(batch or packs[:1], accelerator.device)
        labels, positions = inputs["labels"][0, 1:], inputs["position_ids"][0, 1:]
        losses = token_losses(model, inputs, accelerator)
        if batch:
            is_label = labels != -100
            bucket = positions[is_label].double().log2().long()
            sums[0].index_add_(0, bucket, losses[is_label].double())
            sums[1].index_add_(0, bucket, torch.ones_like(bucket, dtype=torch.float64))
    model.train()
    totals, counts = accelerator.reduce(sums, "sum").tolist()
    by_position = [
        {
            "from": 2**i,
            "to": 2 ** (i + 1) - 1,
            "tokens": int(counts[i]),
            "loss": totals[i] / counts[i],
            "perplexity": perplexity(totals[i] / counts[i]),
        }
        for i in range(64)
        if counts[i]
    ]
    return sum(totals) / sum(counts), by_position


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700))


def mean_loss(log_history: list[dict]) -> float | None:
    """Over steps; an entry's loss is the mean since the entry before."""
    total, counted = 0.0, 0
    for entry in (entry for entry in log_history if "loss" in entry):
        total += entry["loss"] * (entry["step"] - counted)
        counted = entry["step"]
    return total / counted if counted else None


@contextlib.contextmanager
def result_or_way_out(output_dir: Path):
    """Says what is left where the result cannot be written."""
    try:
        yield
    except Exception as error:  # OSError, and the RuntimeError or SafetensorError torch and safetensors make of it
        kept = checkpoints(output_dir)
        raise UserError(
            f"the result could not be written to {output_dir} ({first_line(error)}); "
            + (f"{kept[-1]} is whole: make room and resume from it" if kept else "there is no checkpoint")
        ) from error


def train(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> dict:
    """The whole run; returns what ``all_results.json`` holds."""
    output_dir = make_output_dir(model_args, args)
    accelerator = Accelerator(
        mixed_precision="bf16" if args.bf16 else "no",
        cpu=args.use_cpu,
        log_with="tensorboard" if args.report_to == "tensorboard" else None,
        project_dir=args.output_dir,
    )
    set_seed(args.seed)
    say = accelerator.print
    resumed = find_checkpoint(args, model_args.use_peft)

    # Data first: a mistake there shows before a large model is loaded.
    train_documents, held_out_documents = load_documents(data_args, args.seed)
    tokenizer = load_tokenizer(model_args)
    train_tokens = tokenize(train_documents, tokenizer)
    train_packs = spread(pack(train_tokens, data_args.max_length), data_args.max_train_samples)
    token_count = sum(map(len, train_tokens))
    if token_count < data_args.max_length:
        raise UserError(
            f"the training data is too short: {token_count} tokens, fewer than one sequence of "
            f"max_length={data_args.max_length}; give more text or a smaller --max_length"
        )
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    if len(train_packs) < per_step:
        raise UserError(
            f"the training data is too short: {len(train_packs)} packed sequences of {data_args.max_length} tokens, "
            f"and one optimizer step takes {per_step} (batch size x accumulation x processes)"
        )
    eval_packs = pack(tokenize(held_out_documents, tokenizer), data_args.max_length) if held_out_documents else []
    eval_packs = spread(eval_packs, data_args.max_eval_samples)
    say(
        f"{len(train_documents)} training documents: {token_count:,} tokens in {len(train_packs)} sequences of at most "
        f"{data_args.max_length}; held out: {len(held_out_documents)} documents, {len(eval_packs)} sequences evaluated"
    )

    state = TrainerState(fingerprint=fingerprint(model_args, args, train_packs, accelerator.num_processes))
    if resumed is not None and resumed[1].fingerprint != state.fingerprint:
        raise UserError(
            f"{resumed[0]} belongs to another run (other data, batch sizes, processes, schedule, seed or adapter): resume with "
            "that run's options, or begin anew without --resume_from_checkpoint"
        )

    model = load_model(model_args, args, resumed and resumed[0])
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(int(piece.max()) for one in (*train_packs, *eval_packs) for piece in one)
    if largest >= rows:
        raise UserError(
            f"the tokenizer of {model_args.model_name_or_path} gives token {largest}, and the model embeds {rows}: they do not "
            "belong together"
        )
    state.frozen_fingerprint = frozen_fingerprint(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trained, everything = (sum(p.numel() for p in some) for some in (trainable, model.parameters()))
    say(f"{trained:,} of {everything:,} parameters are trained")
    if longest := positions_exceeded(model, data_args.max_length):
        say(f"max_length={data_args.max_length} is beyond the {longest} positions that the model was made for")
    of = ledger_of(model_args, args, model.config)
    peak_flops, _ = environment.peak_flops(accelerator.device.type, "bfloat16" if args.bf16 else "float32")
    optimizer = make_optimizer(trainable, args)
    steps_per_epoch = len(train_packs) // per_step
    max_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    warmup = int(args.warmup_steps) if args.warmup_steps >= 1 else math.ceil(args.warmup_steps * max_steps)
    try:
        scheduler = get_scheduler(args.lr_scheduler_type, optimizer, warmup, max_steps)
        # One that is told a measure at each step is refused like one that needs more than their number.
        inspect.signature(scheduler.step).bind()
    except (ValueError, TypeError) as error:
        raise UserError(f"--lr_scheduler_type {args.lr_scheduler_type}: {first_line(error)}") from None
    model, optimizer = accelerator.prepare(model, optimizer)
    # The schedule counts optimizer steps, whatever the number of processes: it is registered, not prepared.
    accelerator.register_for_checkpointing(scheduler)

    def save_weights(models: list[torch.nn.Module], weights: list[dict], folder: str) -> None:
        """In Transformers' or peft's own format, adapter alone, instead of accelerate's file of everything."""
        state_dict = weights.pop()
        if accelerator.is_main_process:
            accelerator.unwrap_model(models[0]).save_pretrained(folder, state_dict=state_dict)

    accelerator.register_save_state_pre_hook(save_weights)
    # load_model() has read the weights already.
    accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())

    if resumed is not None:
        checkpoint, saved = resumed
        if saved.frozen_fingerprint != state.frozen_fingerprint:
            raise UserError(
                f"{checkpoint} belongs to another base model than {model_args.model_name_or_path}: resume with that one"
            )
        try:
            accelerator.load_state(str(checkpoint))
        except (OSError, EOFError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
            if environment.is_out_of_memory(error):
                raise
            raise UserError(f"{checkpoint} is damaged: {first_line(error)}; resume from an earlier one") from None
        state = saved
        say(f"resumed from {checkpoint} at step {state.step} of {max_steps}")
    if args.report_to == "tensorboard":
        accelerator.init_trackers("runs")

    collate = Collator(model_args.attn_implementation)
    device = accelerator.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    bar = tqdm(
        total=max_steps,
        initial=state.step,
        unit="step",
        desc="fine-tuning",
        disable=args.disable_tqdm or not accelerator.is_main_process,
    )

    def log(entry: dict) -> None:
        entry = {"step": state.step, "epoch": round(state.step / steps_per_epoch, 4), **entry}
        state.log_history.append(entry)
        accelerator.log({name: value for name, value in entry.items() if name != "step"}, step=state.step)

    def log_evaluation() -> tuple[float, list[dict]]:
        loss, by_position = evaluate(model, eval_packs, collate, accelerator, args.per_device_eval_batch_size)
        each = {f"eval_loss_from_{bucket['from']}": bucket["loss"] for bucket in by_position}
        log({"eval_loss": loss, "eval_perplexity": perplexity(loss), **each})
        if accelerator.is_main_process and not args.disable_tqdm:
            bar.write(f"step {state.step}: held-out loss {loss:.4f}")
        return loss, by_position

    def share_of_peak() -> float | None:
        return state.flops / state.runtime / peak_flops if state.flops else None

    if args.eval_on_start and eval_packs and state.step == 0:
        log_evaluation()
    tokens_before, seconds_before = state.tokens, state.runtime
    training_seconds = 0.0  # of this run, evaluation and checkpoints excluded
    model.train()
    while state.step < max_steps:
        started = time.perf_counter()
        batches, num_items = step_batches(train_packs, state.step, accelerator, args)
        step_loss = run_batches(model, batches, num_items, collate, accelerator)
        if args.max_grad_norm > 0:
            # Not the list from before prepare: sharding replaces parameters.
            accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        learning_rate = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        state.step += 1
        state.tokens += num_items
        state.interval_losses.append(float(accelerator.reduce(step_loss, "sum")))
        training_seconds += time.perf_counter() - started
        state.runtime = seconds_before + training_seconds
        if not math.isfinite(state.interval_losses[-1]):
            raise UserError(
                f"the loss became {state.interval_losses[-1]} at step {state.step}: lower --learning_rate, or resume "
                "from an earlier checkpoint"
            )

        speed = (state.tokens - tokens_before) / training_seconds
        if of is not None:
            lengths = [len(piece) for batch in batches for one in batch for piece in one]
            state.flops += of.shape.training_flops(lengths, model_args.use_peft)
        mfu = share_of_peak()
        shown = f", MFU {mfu:.1%}" if mfu is not None else ""
        bar.update()
        bar.set_postfix_str(
            f"loss {state.interval_losses[-1]:.4f}, {speed:,.0f} tokens/s, peak {peak_memory(device) / 2**30:.2f} GiB{shown}"
        )
        if state.step % args.logging_steps == 0 or state.step == max_steps:
            loss = sum(state.interval_losses) / len(state.interval_losses)
            state.interval_losses.clear()
            entry = {"loss": loss, "learning_rate": learning_rate, "tokens_per_second": speed}
            log(entry if mfu is None else entry | {"mfu": mfu})
        if eval_packs and args.eval_steps and state.step % args.eval_steps == 0 and state.step < max_steps:
            log_evaluation()
        if args.save_steps and state.step % args.save_steps == 0:
            save_checkpoint(accelerator, args, state)
    # The weights first: whatever evaluation meets, they are safe.
    accelerator.wait_for_everyone()
    weights = accelerator.get_state_dict(model)
    with result_or_way_out(output_dir):
        if accelerator.is_main_process:
            accelerator.unwrap_model(model).save_pretrained(output_dir, state_dict=weights)
            tokenizer.save_pretrained(output_dir)
    del weights
    eval_loss, by_position = log_evaluation() if eval_packs else (None, [])
    bar.close()

    results = {
        "train_loss": mean_loss(state.log_history),
        "train_runtime": state.runtime,
        "train_tokens": state.tokens,
        "train_tokens_per_second": state.tokens / state.runtime if state.runtime else None,
        "train_steps": state.step,
        "epoch": state.step / steps_per_epoch,
        "peak_memory_gib": peak_memory(device) / 2**30,
        "mfu": share_of_peak(),
        "trainable_parameters": trained,
        "attn_implementation": model_args.attn_implementation,
        "patches": chosen_patches(model_args, args)[0],
    }
    if eval_loss is not None:
        first = next(entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry)
        results |= {"eval_loss": eval_loss, "eval_perplexity": perplexity(eval_loss), "first_eval_loss": first}
        results["eval_by_position"] = by_position
    with result_or_way_out(output_dir):
        if accelerator.is_main_process:
            (output_dir / "trainer_state.json").write_text(json.dumps(dataclasses.asdict(state), indent=1))
            (output_dir / "all_results.json").write_text(json.dumps(results, indent=1))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    say(f"{'adapter' if model_args.use_peft else 'model'}, trainer_state.json and all_results.json are in {output_dir}")
    return results


# ---------------------------------------------------------------- the longest context that fits


def try_length(model_args: ModelArguments, args: TrainingArguments) -> None:
    """One step on ``trial_length`` random tokens per sequence; prints what it took. A process of --find_max_length."""
    if device_type(args) == "cpu":
        # An allocation beyond it fails, before the machine begins to swap or to kill.
        available = int(0.95 * environment.memory_available("cpu"))
        resource.setrlimit(resource.RLIMIT_DATA, (available, available))
    accelerator = Accelerator(mixed_precision="bf16" if args.bf16 else "no", cpu=args.use_cpu)
    model = load_model(model_args, args, None)
    positions_exceeded(model, args.trial_length)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(trainable, args)
    vocabulary = model.config.get_text_config().vocab_size
    model, optimizer = accelerator.prepare(model, optimizer)
    collate, rng = Collator(model_args.attn_implementation), np.random.default_rng(args.seed)
    model.train()

    def step(length: int) -> None:
        # With accumulation, gradients of an earlier batch are there while another runs.
        count = min(2, args.gradient_accumulation_steps)
        batches = [
            [[rng.integers(vocabulary, size=length)] for _ in range(args.per_device_train_batch_size)]
            for _ in range(count)
        ]
        run_batches(model, batches, length, collate, accelerator)
        if args.max_grad_norm > 0:
            accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    step(min(32, args.trial_length))  # makes the optimizer's states, which the long step then finds there
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    step(args.trial_length)
    peak = peak_memory(accelerator.device)  # on a GPU that waits for the step
    print(TRIAL_MARK + json.dumps({"peak_bytes": peak, "seconds": time.perf_counter() - started}), flush=True)


def run_trial(argv: list[str], length: int, timeout: float) -> dict:
    """``try_length`` in a process of its own, so that nothing it runs into ends the search; its status and numbers."""
    command = [sys.executable, str(Path(__file__).resolve()), *argv, "--trial_length", str(length)]
    answer = child_process.ask(command, TRIAL_MARK, timeout)
    trial = {"length": length, "status": answer.status}
    if answer.result is not None:
        return trial | answer.result
    if OUT_OF_MEMORY in answer.reason or environment.NO_HOST_MEMORY in answer.reason:
        trial["status"] = "out_of_memory"
    return trial | {"reason": answer.reason}


def next_length(trials: list[dict], memory: int) -> int | None:
    """The length to try after ``trials``; None when the longest that fits is known to 2 % or 64 tokens."""
    fits = sorted((trial["length"], trial["peak_bytes"]) for trial in trials if trial["status"] == "ok")
    low = fits[-1][0] if fits else 0
    high = min((trial["length"] for trial in trials if trial["status"] != "ok"), default=None)
    if high is None:
        # Along the line through the last two, a little short of the end; with one, no more than its share of the memory.
        (n1, y1), (n2, y2) = fits[-2] if len(fits) > 1 else (0, 0), fits[-1]
        room = n2 + (0.97 * memory - y2) * (n2 - n1) / max(y2 - y1, 1)
        following = int(min(max(room, 1.1 * n2), 4 * n2))
    elif high - low <= max(64, 0.02 * low):
        return None
    else:
        following = (low + high) // 2
    return max(following - following % 64, low + 1) if following > 64 else max(following, 2)


def find_max_length(
    argv: list[str], model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments
) -> dict:
    """Bisects the longest ``max_length`` of which a training step fits; returns what ``max_length.json`` holds."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--find_max_length runs in one process: start it with python instead of accelerate launch")
    device = device_type(args)
    try:
        config = models.config_of(model_args.model_name_or_path)
    except models.NoModelError as error:
        raise UserError(str(error)) from None
    of = ledger_of(model_args, args, config)
    memory = environment.memory_available(device)
    # A batch of packs is laid end to end: one row of so many tokens.
    predicted = of.longest(memory) // args.per_device_train_batch_size if of else None
    output = make_output_dir(model_args, args) / "max_length.json"
    print(f"{memory / ledger.GIB:.1f} GiB available; the ledger predicts {predicted or 'nothing'} tokens", flush=True)
    trials: list[dict] = []
    result: dict = {}
    length = predicted - predicted % 64 if predicted and predicted >= 128 else data_args.max_length
    with tqdm(desc="trials", unit="trial", disable=args.disable_tqdm) as bar:
        # Bounded: 20 halvings reach any length.
        while length is not None and len(trials) < 20:
            trials.append(run_trial(argv, length, args.find_max_length_timeout))
            trial = trials[-1]
            peak = (
                f"peak {trial['peak_bytes'] / ledger.GIB:.2f} GiB, {trial['seconds']:.1f} s"
                if "seconds" in trial
                else ""
            )
            bar.update()
            bar.write(f"{length:>9,} tokens: {trial['status'].replace('_', ' ')} {peak}")
            if trial["status"] == "error":
                raise UserError(f"the trial of {length} tokens failed: {trial['reason'].removeprefix('finetune: ')}")
            fits = [trial["length"] for trial in trials if trial["status"] == "ok"]
            fails = [trial for trial in trials if trial["status"] != "ok"]
            result = {
                "max_length": max(fits, default=0),
                "first_that_does_not_fit": min((trial["length"] for trial in fails), default=None),
                "is_limited_by_time": bool(fails) and min(fails, key=lambda t: t["length"])["status"] == "timeout",
                "predicted": predicted,
                "available_bytes": memory,
                "device": environment.device_name(device),
                "trials": trials,
            }
            output.write_text(json.dumps(result, indent=1))
            smallest = not fits and length <= 64
            length = None if smallest else next_length(trials, memory)
    if not result["max_length"]:
        raise UserError(
            f"no length fits, not even {min(t['length'] for t in trials)} tokens: {trials[-1].get('reason', '')}"
        )
    limit = "takes too long" if result["is_limited_by_time"] else "does not fit"
    beyond = f"; {result['first_that_does_not_fit']:,} {limit}" if result["first_that_does_not_fit"] else ""
    print(f"max_length: {result['max_length']:,} tokens{beyond}. Trials are in {output}")
    return result


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    try:
        model_args, data_args, args = parse_arguments(argv)
        if args.trial_length is not None:
            try_length(model_args, args)
        elif args.find_max_length:
            find_max_length(argv, model_args, data_args, args)
        else:
            train(model_args, data_args, args)
    except UserError as error:
        sys.exit(f"finetune: {error}")
    except KeyboardInterrupt:
        print(
            "finetune: interrupted; --resume_from_checkpoint latest continues from the last checkpoint", file=sys.stderr
        )
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.exit(f"finetune: {args.output_dir}: {error.strerror}; what is saved there stays: make room and resume")
    except (RuntimeError, MemoryError, ValueError) as error:
        if str(error).startswith("flashmla_hf.patch"):  # no room on the host, a call that a patch cannot follow
            sys.exit(f"finetune: {' '.join(str(error).split())}")
        if not environment.is_out_of_memory(error):
            raise
        sys.exit(f"finetune: {OUT_OF_MEMORY}; {out_of_memory_message(model_args, data_args, args)}")


if __name__ == "__main__":
    main()
