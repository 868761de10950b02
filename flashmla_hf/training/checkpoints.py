"""The checkpoints of a run, and how it resumes from one.

A run that is killed and resumed gives the losses of one that was not: checkpoints hold the weights (or the adapter), the
optimizer, the schedule, the random states and the place in the data, and get their name only when they are whole. On a GPU
that is up to rounding: the patch mlp chooses its tile by free memory unless mlp_tile=N is given, and some of torch's sums
have no fixed order there.

The number of processes may change, and with it how a step's packs are divided (batch size, accumulation, ``--sp_size``), as
long as a step reads as many packs: the order of packs is a function of the step. :func:`check_same_run` says where it may not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

from accelerate import Accelerator

from flashmla_hf.training import machine, rows
from flashmla_hf.training.arguments import DataArguments, ModelArguments, TrainingArguments, UserError, first_line
from flashmla_hf.training.packing import Pack
from flashmla_hf.training.shape import load_config


@dataclass
class TrainerState:
    """What a checkpoint holds beside tensors: ``trainer_state.json``."""

    step: int = 0
    tokens: int = 0  # read, but the first of each piece
    loss_tokens: int = 0  # of these, those that had a loss
    runtime: float = 0.0  # seconds of training, earlier runs included
    interval_losses: list[float] = field(default_factory=list)  # since the last log entry
    log_history: list[dict] = field(default_factory=list)
    flops: int = 0  # the model's own, of this process (Shape.training_flops), earlier runs included
    fingerprint: str = ""  # of the data and arguments that decide the course of the losses
    frozen_fingerprint: str = ""  # of the weights that are not in the checkpoint
    engine: str = ""  # that wrote the checkpoint's tensors (engines.engine_of)
    stream: dict | None = None  # the StreamPlace of streamed data
    processes: int = 0  # that wrote the checkpoint
    packs_per_step: int = 0  # that all of them read


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: object) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


# Annotation of a field of TrainerState -> what its values are, in words, and whether one is.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a count", _is_count),
    "float": ("a number of at least 0", lambda value: _is_number(value) and value >= 0),
    "str": ("a text", lambda value: isinstance(value, str)),
    "list[float]": ("a list of numbers", lambda value: isinstance(value, list) and all(map(_is_number, value))),
    "list[dict]": ("a list of entries", lambda value: isinstance(value, list) and {type(x) for x in value} <= {dict}),
    "dict | None": (
        "a place in the data",
        lambda value: value is None or (isinstance(value, dict) and all(map(_is_count, value.values()))),
    ),
}


_REPLACED = "replaced"  # before the name of a checkpoint that gives way to one of the same step


def checkpoints(output_dir: Path) -> list[Path]:
    """The finished checkpoints, oldest first."""
    found = [(int(match.group(1)), path) for path in output_dir.glob("checkpoint-*") if (match := _step_of(path))]
    return [path for _, path in sorted(found)]


def _step_of(path: Path) -> re.Match | None:
    return re.fullmatch(r"checkpoint-(\d+)", path.name)


def find_checkpoint(args: TrainingArguments, use_peft: bool, engine: str = "") -> tuple[Path, TrainerState] | None:
    """The checkpoint to resume from and its state; None if there is none to resume from.

    It is whole as far as can be told without loading it. Raises UserError if it is not.
    """
    if args.resume_from_checkpoint is None:
        return None
    if _is_latest(args.resume_from_checkpoint):
        found = checkpoints(Path(args.output_dir))
        if not found:
            return None
        path = found[-1]
    else:
        path = Path(args.resume_from_checkpoint)
    where = f"--resume_from_checkpoint {path}"
    _check_file(path, "trainer_state.json", where)
    try:
        state = TrainerState(**json.loads((path / "trainer_state.json").read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: trainer_state.json is not of flashmla finetune: {first_line(error)}") from None
    for name, kind in TrainerState.__annotations__.items():
        expected, fits = _KINDS[kind]
        if not fits(getattr(state, name)):
            got = shorten(repr(getattr(state, name)), 60)
            raise UserError(f"{where}: trainer_state.json is damaged: {name}: expected {expected}, got {got}")
    if not state.packs_per_step:
        raise UserError(
            f"{where}: an earlier version of flashmla finetune wrote it and did not say how a step was divided: resume with "
            "that version, or begin anew without --resume_from_checkpoint"
        )
    if state.engine != engine:
        expected, got = (name or "an engine that shards nothing" for name in (engine, state.engine))
        raise UserError(f"{where}: expected a checkpoint of {expected}, as this run is launched, got one of {got}")
    if not engine:
        _check_file(path, "optimizer.bin", where)
    if (path / "adapter_config.json").is_file() != use_peft:
        expected, got = ("an adapter", "a whole model") if use_peft else ("a whole model", "an adapter")
        raise UserError(f"{where}: expected {expected} by --use_peft {str(use_peft).lower()}, got {got}")
    return path, state


def _check_file(path: Path, name: str, where: str) -> None:
    if not (path / name).is_file() or not (path / name).stat().st_size:
        raise UserError(f"{where}: no checkpoint there (expected {name} in it)")


def check_random_states(path: Path) -> None:
    """Raises UserError if this process's random states are not there: accelerate goes on without them, to other losses."""
    states = path / f"random_states_{machine.process_index()}.pkl"
    if not zipfile.is_zipfile(states):  # what torch.save writes, whole
        raise UserError(f"{path} is damaged: {states.name}: expected random states; resume from an earlier one")


def draws_random_numbers(model_args: ModelArguments) -> bool:
    """Whether a step of this model draws random numbers: an adapter's dropout, or one (or a router's jitter) that its
    configuration names."""
    if model_args.use_peft and model_args.lora_dropout > 0:
        return True
    try:
        settings = load_config(model_args.model_name_or_path).get_text_config().to_dict()
    except UserError:  # the loader says what is wrong with the model
        return False
    # attention_dropout, resid_pdrop, ...: the names differ.
    return any(
        isinstance(value, float) and value > 0 and ("drop" in name or "jitter" in name)
        for name, value in settings.items()
    )


def check_same_run(path: Path, saved: TrainerState, state: TrainerState, args: TrainingArguments, draws: bool) -> None:
    """Raises UserError if a run of ``state`` would not continue that of the checkpoint ``path`` with the same losses."""
    if saved.processes != state.processes and (state.engine == "deepspeed" or draws):
        why = (
            "the model has dropout, and each process draws its own random numbers"
            if draws
            else "DeepSpeed reads its parts on as many processes as wrote them"
        )
        raise UserError(
            f"{path}: expected {saved.processes} processes, which wrote it, got {state.processes}: {why}. Launch with "
            f"--num_processes {saved.processes}"
        )
    if saved.packs_per_step != state.packs_per_step:
        accumulated, rest = divmod(saved.packs_per_step * args.gradient_accumulation_steps, state.packs_per_step)
        way = f": --gradient_accumulation_steps {accumulated}" if not rest else ", which no accumulation gives"
        raise UserError(
            f"{path}: expected {saved.packs_per_step} packs in a step, as its run read them, got {state.packs_per_step} by "
            f"{state.processes} processes{way}"
        )
    if saved.fingerprint != state.fingerprint:
        raise UserError(
            f"{path} belongs to another run (other data, schedule, seed, adapter, or batch sizes with dropout): resume with "
            "that run's options, or begin anew without --resume_from_checkpoint"
        )


def make_output_dir(model_args: ModelArguments, args: TrainingArguments) -> Path:
    """``output_dir``, made and writable. Raises UserError if it holds results that this run's would be mixed with."""
    output_dir = Path(args.output_dir)
    # Before it is made: an empty folder of the name of a model on the Hub would be taken for that model.
    if (
        not args.find_max_length
        and not model_args.use_peft
        and _is_within(output_dir, Path(model_args.model_name_or_path), False)
    ):
        raise UserError(
            f"--output_dir {output_dir} is the folder of --model_name_or_path, whose weights the result would replace: name "
            "another --output_dir"
        )
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir) as file:
            file.write(b" ")
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be written to: {error.strerror}") from None
    if args.find_max_length:
        return output_dir
    _end_replacing(output_dir)
    found = checkpoints(output_dir)
    if found and not _is_resumed_here(args):
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


def _is_resumed_here(args: TrainingArguments) -> bool:
    """Whether the run continues a checkpoint of its own ``output_dir``, if there is one."""
    named = args.resume_from_checkpoint
    return named is not None and (
        _is_latest(named) or _is_within(Path(named).resolve().parent, Path(args.output_dir), False)
    )


def _is_latest(resume_from_checkpoint: str) -> bool:
    return resume_from_checkpoint.lower() in ("latest", "true")


def _is_within(place: Path, folder: Path, or_below: bool = True) -> bool:
    """Whether ``place`` is ``folder``, or with ``or_below`` in it; links followed."""
    with contextlib.suppress(OSError, ValueError):
        place, folder = place.resolve(), folder.resolve()
        return place == folder or (or_below and folder in place.parents)
    return False


def check_places(data_args: DataArguments, args: TrainingArguments) -> None:
    """Raises UserError if ``output_dir`` lies in a folder of data: each file in it, also one that the run writes, is a document
    of the next reading. Names with a leading dot are not read, and of a saved dataset its own files alone are."""
    output_dir = Path(args.output_dir)
    for name in ("train_file", "validation_file", "dataset_name"):
        folder = getattr(data_args, name)
        if folder is None or not _is_within(output_dir, Path(folder)) or not Path(folder).is_dir():
            continue
        below = output_dir.resolve().relative_to(Path(folder).resolve()).parts
        if not any(part.startswith(".") for part in below) and not rows.is_saved_dataset(Path(folder)):
            raise UserError(
                f"--output_dir {args.output_dir} lies in --{name} {folder}, of which every file is data, so that the run could "
                "not be resumed: name another --output_dir"
            )


def save_checkpoint(
    accelerator: Accelerator,
    args: TrainingArguments,
    state: TrainerState,
    write: Callable[[Path], None] | None = None,
) -> None:
    """Writes ``checkpoint-<step>``; the name appears by a rename, when everything is written and on the disk.

    ``write`` writes the tensors into a folder. Without it, accelerate does, and weights by the hook that prepare_model()
    registers, in Transformers' format.
    """
    final = Path(args.output_dir) / f"checkpoint-{state.step}"
    unfinished, replaced = (final.with_name(f"{prefix}-{final.name}") for prefix in ("unfinished", _REPLACED))
    try:
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
        accelerator.wait_for_everyone()
        unfinished.mkdir(parents=True, exist_ok=True)
        if write is not None:
            write(unfinished)
        else:
            accelerator.save_state(str(unfinished))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (unfinished / "trainer_state.json").write_text(json.dumps(dataclasses.asdict(state), indent=1))
            _flush(unfinished)
            # Of a run that went back to an earlier one. A removal that is interrupted would leave a part under this name.
            shutil.rmtree(replaced, ignore_errors=True)
            if final.exists():
                os.rename(final, replaced)
            os.rename(unfinished, final)
            shutil.rmtree(replaced, ignore_errors=True)
            _flush_entry(final.parent)
    except Exception as error:  # OSError, and the RuntimeError or SafetensorError torch and safetensors make of it
        if accelerator.is_main_process:  # others may fail while it writes
            shutil.rmtree(unfinished, ignore_errors=True)
            _end_replacing(final.parent)
        kept = checkpoints(Path(args.output_dir))
        raise UserError(
            f"checkpoint-{state.step} could not be written ({first_line(error)}); "
            + (f"{kept[-1]} is whole: resume from it" if kept else "there is no earlier checkpoint")
        ) from error
    if accelerator.is_main_process and args.save_total_limit:
        # Those beyond this step are from before the run went back to an earlier one, as are some before it: the new ones must
        # not give way to them.
        found = checkpoints(Path(args.output_dir))
        found = sorted(found[: found.index(final) + 1], key=lambda path: path.stat().st_mtime)
        for old in found[: -args.save_total_limit]:
            shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def _end_replacing(output_dir: Path) -> None:
    """Gives a checkpoint its name back if it was moved aside for one that did not come, and removes one that was replaced.
    Any process may do it, and another one's having done it is no error."""
    for replaced in output_dir.glob(f"{_REPLACED}-checkpoint-*"):
        final = replaced.with_name(replaced.name.removeprefix(f"{_REPLACED}-"))
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                os.rename(replaced, final)


def _flush(folder: Path) -> None:
    """Waits until the content of ``folder`` is on the disk: a machine that stops would leave files of zeros under a name that
    says that they are whole."""
    for place, _, files in os.walk(folder):
        for name in files:
            _flush_entry(Path(place) / name)
        _flush_entry(Path(place))


def _flush_entry(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such thing
            raise
    finally:
        os.close(opened)


def how_to_continue(args: TrainingArguments) -> str:
    """What is left of a run that ended before its result was written, for its message."""
    if kept := checkpoints(Path(args.output_dir)):
        return f"--resume_from_checkpoint latest continues from {kept[-1].name}"
    if args.save_steps:
        return f"it had written no checkpoint (--save_steps {args.save_steps}), and a new run begins anew"
    return "it wrote no checkpoint, and a new run begins anew. --save_steps N writes one every N steps"


def fingerprint(
    model_args: ModelArguments,
    args: TrainingArguments,
    packs: list[Pack],
    streamed: dict[str, object] | None = None,
    draws: bool = False,
) -> str:
    """Differs if a resumed run would not continue the interrupted one: other data, optimizer or adapter.

    ``packs`` hold which of their tokens have a loss. Of streamed data they are the first ones, and ``streamed`` has the options
    that decide the others. ``draws``: the model has dropout, whose random numbers follow from how a step is divided.
    """
    # The number of steps bends every schedule but the constant one: max_steps, or epochs if that does not say it.
    length: tuple[str, ...] = ("max_steps",) if args.max_steps > 0 else ("num_train_epochs",)
    if args.lr_scheduler_type == "constant":
        length = ()
    division = ("per_device_train_batch_size", "gradient_accumulation_steps", "sp_size") if draws else ()
    decisive: dict[str, object] = {
        name: getattr(args, name)
        for name in (
            "seed", "learning_rate", "weight_decay", "max_grad_norm", "lr_scheduler_type", "warmup_steps", "bf16", *length,
            *division,
        )
    }  # fmt: skip
    adapter = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules") if model_args.use_peft else ()
    decisive |= {name: getattr(model_args, name) for name in ("use_peft", "dtype", *adapter)}
    if streamed is not None:
        decisive |= {"streamed": streamed}
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode())
    for one in packs:
        for piece in one:
            digest.update(piece.tobytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def writing_result(output_dir: Path) -> Iterator[None]:
    """Turns a failure to write the result into a UserError that names the checkpoint that is left."""
    try:
        yield
    except Exception as error:  # OSError, and the RuntimeError or SafetensorError torch and safetensors make of it
        kept = checkpoints(output_dir)
        raise UserError(
            f"the result could not be written to {output_dir} ({first_line(error)}); "
            + (f"{kept[-1]} is whole: make room and resume from it" if kept else "there is no checkpoint")
        ) from error
