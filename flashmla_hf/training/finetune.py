"""Fine-tune a causal language model on long documents, with attention by flashmla. One straight accelerate script.

    flashmla finetune --config FILE.yaml --train_file notes/ --output_dir results/notes
    accelerate launch -m flashmla_hf.training.finetune --config FILE.yaml --train_file notes/ --output_dir results/notes
    flashmla finetune --config FILE.yaml ... --resume_from_checkpoint latest
    flashmla max-length --config FILE.yaml ...
    tensorboard --logdir results/notes/runs

Options are named as in Transformers' and TRL's scripts. ``--config`` names a YAML file of them, and the command line wins.

A run is five stages, each a function: prepare_data, prepare_model, resume, train_steps (the loop) and finish. ``--patches``
names the memory patches of flashmla_hf (all, or some of its PATCHES). ``flashmla max-length`` looks for the longest
``max_length`` that fits with the other options and trains nothing. Held-out documents are evaluated by position.
"""

from __future__ import annotations

import dataclasses
import errno
import inspect
import json
import math
import os
import pickle
import sys
import time
from dataclasses import dataclass
from pathlib import Path

# Waiting threads sleep instead of spinning: beside other work on the machine, spinning makes steps on a CPU ten times
# slower. OpenMP reads it when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm
from transformers import get_scheduler

import flashmla_hf
from flashmla_hf.host_memory import GIB
from flashmla_hf.training import engines, machine, max_length, quantization, sequence_parallel
from flashmla_hf.training.arguments import (
    DataArguments,
    ModelArguments,
    TrainingArguments,
    UserError,
    end,
    first_line,
    parse_arguments,
)
from flashmla_hf.training.checkpoints import (
    TrainerState,
    check_places,
    check_random_states,
    check_same_run,
    draws_random_numbers,
    find_checkpoint,
    fingerprint,
    how_to_continue,
    make_output_dir,
    save_checkpoint,
    writing_result,
)
from flashmla_hf.training.data import Data, prepare_data, streamed_options
from flashmla_hf.training.evaluation import evaluate, mean_loss, perplexity
from flashmla_hf.training.ledger import Ledger
from flashmla_hf.training.model import (
    check_weights,
    ledger_of,
    load_model,
    make_optimizer,
    out_of_memory_message,
    plan_patches,
    positions_exceeded,
)
from flashmla_hf.training.packing import Collator, largest_id
from flashmla_hf.training.sequence_parallel import Share
from flashmla_hf.training.step import run_batches, step_batches
from flashmla_hf.training.stream import PackStream, StreamPlace


@dataclass
class Run:
    """A training run, prepared: its options and data, the model and optimizer as accelerate wrapped them, and its state."""

    model_args: ModelArguments
    data_args: DataArguments
    args: TrainingArguments
    accelerator: Accelerator
    output_dir: Path
    data: Data
    state: TrainerState
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    max_steps: int
    trained_parameters: int
    ledger: Ledger | None
    peak_flops: float | None  # of the device, per second; of the main process, which alone tells an MFU

    def __post_init__(self):
        self.share = Share.of(self.accelerator, self.args)
        self.collate = Collator(self.model_args.attn_implementation, self.share.cut)

    def log(self, entry: dict) -> None:
        state = self.state
        entry = {"step": state.step, "epoch": round(self.data.epochs(state.step), 4), **entry}
        state.log_history.append(entry)
        self.accelerator.log({name: value for name, value in entry.items() if name != "step"}, step=state.step)

    def save(self) -> None:
        """Writes a checkpoint, with the place in streamed data."""
        if isinstance(self.data.train_packs, PackStream):
            self.state.stream = dataclasses.asdict(self.data.train_packs.place)
        save_checkpoint(self.accelerator, self.args, self.state, self._write_state if self.state.engine else None)

    def _write_state(self, folder: Path) -> None:
        engines.save_state(self.accelerator, folder, *self._stateful, self.model_args.use_peft)

    def load(self, checkpoint: Path) -> None:
        """Reads what a checkpoint holds beside ``trainer_state.json``."""
        if self.state.engine:
            engines.load_state(self.accelerator, checkpoint, *self._stateful, self.model_args.use_peft)
        else:
            self.accelerator.load_state(str(checkpoint))

    @property
    def _stateful(self) -> tuple:
        return self.model, self.optimizer, self.scheduler

    def evaluate(self) -> tuple[float, list[dict]]:
        """The mean loss of the held-out sequences, and the loss by position. Both are logged."""
        size = self.args.per_device_eval_batch_size
        loss, by_position = evaluate(self.model, self.data.eval_packs, self.collate, self.accelerator, size, self.share)
        each = {f"eval_loss_from_{bucket['from']}": bucket["loss"] for bucket in by_position}
        self.log({"eval_loss": loss, "eval_perplexity": perplexity(loss), **each})
        if self.accelerator.is_main_process and not self.args.disable_tqdm:
            tqdm.write(f"step {self.state.step}: held-out loss {loss:.4f}")
        return loss, by_position

    @property
    def mfu(self) -> float | None:
        """The model's own operations per second, as a share of the device's; None for a model that the ledger does not know,
        and in other processes than the main one."""
        return self.state.flops / self.state.runtime / self.peak_flops if self.state.flops and self.peak_flops else None


def train(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments) -> dict:
    """The whole run; returns the content of ``all_results.json``. Raises UserError for a mistake that the caller can mend."""
    output_dir = Path(args.output_dir)
    if not data_args.preview:  # which writes nothing
        check_places(data_args, args)
        make_output_dir(model_args, args)
    accelerator = engines.make_accelerator(model_args, args)
    set_seed(args.seed)
    engine = engines.engine_of(accelerator)
    resumed = None if data_args.preview else find_checkpoint(args, model_args.use_peft, engine)
    # Data first: a mistake there shows before a large model is loaded.
    data = prepare_data(model_args, data_args, args, accelerator)
    if data_args.preview:
        return {}
    streamed = streamed_options(data_args) if data_args.streaming else None
    draws = draws_random_numbers(model_args)
    identity = fingerprint(model_args, args, data.known_packs(), streamed, draws)
    state = TrainerState(
        fingerprint=identity,
        engine=engine,
        processes=accelerator.num_processes,
        packs_per_step=data.packs_per_step,
    )
    if resumed is not None:
        check_same_run(*resumed, state, args, draws)
        if draws and not engine:
            check_random_states(resumed[0])
    run = prepare_model(model_args, data_args, args, accelerator, output_dir, data, state, resumed and resumed[0])
    if resumed is not None:
        resume(run, *resumed)
    train_steps(run)
    return finish(run)


def prepare_model(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainingArguments,
    accelerator: Accelerator,
    output_dir: Path,
    data: Data,
    state: TrainerState,
    checkpoint: Path | None,
) -> Run:
    """Loads the model (its trained weights from ``checkpoint``), and makes the optimizer and its schedule."""
    # An engine reads its own checkpoint into the prepared model.
    model = load_model(model_args, args, None if state.engine else checkpoint)
    _check_vocabulary(model, model_args, data)
    state.frozen_fingerprint = engines.first_values(model, accelerator)
    sequence_parallel.divide_attention(model, args)
    engines.settle_dtypes(model, accelerator, args.bf16)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trained, everything = sum(engines.size_of(p).numel() for p in trainable), quantization.parameter_count(model)
    accelerator.print(f"{trained:,} of {everything:,} parameters are trained")
    if longest := positions_exceeded(model, data_args.max_length):
        accelerator.print(f"max_length={data_args.max_length} is beyond the {longest} positions of the model")
    ledger = ledger_of(model_args, args, model.config)
    dtype = "bfloat16" if args.bf16 else "float32"
    peak_flops = machine.peak_flops(accelerator.device.type, dtype)[0] if accelerator.is_main_process else None
    optimizer = make_optimizer(trainable, args)
    max_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * data.steps_per_epoch)
    scheduler = _make_schedule(optimizer, args, max_steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    # The schedule counts optimizer steps, whatever the number of processes: it is registered, not prepared.
    accelerator.register_for_checkpointing(scheduler)
    if not state.engine:
        _write_weights_as_transformers_does(accelerator)
    # load_model() has read the weights already.
    accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())
    return Run(
        model_args, data_args, args, accelerator, output_dir, data, state, model, optimizer, scheduler, max_steps, trained,
        ledger, peak_flops,
    )  # fmt: skip


def _write_weights_as_transformers_does(accelerator: Accelerator) -> None:
    """Checkpoints hold weights in Transformers' or peft's own format, an adapter alone, not accelerate's file of everything."""

    def save_weights(models: list[torch.nn.Module], weights: list[dict], folder: str) -> None:
        state_dict = weights.pop()
        if accelerator.is_main_process:
            accelerator.unwrap_model(models[0]).save_pretrained(folder, state_dict=state_dict)

    accelerator.register_save_state_pre_hook(save_weights)


def _check_vocabulary(model: torch.nn.Module, model_args: ModelArguments, data: Data) -> None:
    rows = engines.size_of(model.get_input_embeddings().weight)[0]
    largest = largest_id([*data.known_packs(), *data.eval_packs])
    if isinstance(data.train_packs, PackStream):
        data.train_packs.embedded = rows
    if largest >= rows:
        raise UserError(
            f"the tokenizer of {model_args.model_name_or_path} gives token {largest}, and the model embeds {rows}: they do not "
            "belong together"
        )


def _make_schedule(optimizer: torch.optim.Optimizer, args: TrainingArguments, max_steps: int):
    warmup = int(args.warmup_steps) if args.warmup_steps >= 1 else math.ceil(args.warmup_steps * max_steps)
    try:
        scheduler = get_scheduler(args.lr_scheduler_type, optimizer, warmup, max_steps)
        # A schedule that needs a measure at each step is refused like one that needs more than the number of steps.
        inspect.signature(scheduler.step).bind()
    except (ValueError, TypeError) as error:
        raise UserError(f"--lr_scheduler_type {args.lr_scheduler_type}: {first_line(error)}") from None
    return scheduler


def resume(run: Run, checkpoint: Path, saved: TrainerState) -> None:
    """Continues ``run`` from ``checkpoint``. Raises UserError if it is damaged or of another base model."""
    if saved.frozen_fingerprint != run.state.frozen_fingerprint:
        raise UserError(
            f"{checkpoint} belongs to another base model than {run.model_args.model_name_or_path}: resume with that one"
        )
    try:
        run.load(checkpoint)
        place = StreamPlace(**(saved.stream or {}))
    except (OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
        if machine.is_out_of_memory(error):
            raise
        raise UserError(f"{checkpoint} is damaged: {first_line(error)}; resume from an earlier one") from None
    run.state = dataclasses.replace(saved, processes=run.state.processes)
    if isinstance(run.data.train_packs, PackStream):
        run.data.train_packs.seek(place)
    run.accelerator.print(f"resumed from {checkpoint} at step {saved.step} of {run.max_steps}")


def train_steps(run: Run) -> None:
    """The loop: steps until ``max_steps``, with logs, evaluations and checkpoints between them."""
    args, accelerator, state, model = run.args, run.accelerator, run.state, run.model
    device, eval_packs = accelerator.device, run.data.eval_packs
    if args.logs_to_tensorboard:
        accelerator.init_trackers("runs")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    is_silent = args.disable_tqdm or not accelerator.is_main_process
    bar = tqdm(total=run.max_steps, initial=state.step, unit="step", desc="fine-tuning", disable=is_silent)
    if args.eval_on_start and eval_packs and state.step == 0:
        run.evaluate()
    tokens_before, seconds_before = state.tokens, state.runtime
    training_seconds = 0.0  # of this run, evaluation and checkpoints excluded
    model.train()
    while state.step < run.max_steps:
        started = time.perf_counter()
        batches, loss_tokens, tokens = step_batches(run.data.train_packs, state.step, accelerator, args)
        step_loss = run_batches(model, batches, loss_tokens, run.collate, accelerator)
        if args.max_grad_norm > 0:
            # Not the list from before prepare: sharding replaces parameters.
            accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        learning_rate = run.scheduler.get_last_lr()[0]
        run.optimizer.step()
        run.scheduler.step()
        run.optimizer.zero_grad()
        state.step += 1
        state.tokens, state.loss_tokens = state.tokens + tokens, state.loss_tokens + loss_tokens
        state.interval_losses.append(float(accelerator.reduce(step_loss, "sum")))
        training_seconds += time.perf_counter() - started
        state.runtime = seconds_before + training_seconds
        if not math.isfinite(state.interval_losses[-1]):
            raise UserError(
                f"the loss became {state.interval_losses[-1]} at step {state.step}: begin anew with a lower --learning_rate"
            )

        speed = (state.tokens - tokens_before) / training_seconds
        if run.ledger is not None:
            lengths = [len(piece) for batch in batches for one in batch for piece in one]
            state.flops += run.ledger.shape.training_flops(lengths, run.model_args.use_peft) // args.sp_size
        mfu = run.mfu
        shown = f", MFU {mfu:.1%}" if mfu is not None else ""
        peak = machine.peak_memory(device) / GIB
        bar.update()
        bar.set_postfix_str(f"loss {state.interval_losses[-1]:.4f}, {speed:,.0f} tokens/s, peak {peak:.2f} GiB{shown}")
        if state.step % args.logging_steps == 0 or state.step == run.max_steps:
            loss = sum(state.interval_losses) / len(state.interval_losses)
            state.interval_losses.clear()
            entry = {"loss": loss, "learning_rate": learning_rate, "tokens_per_second": speed}
            run.log(entry if mfu is None else entry | {"mfu": mfu})
        if eval_packs and args.eval_steps and state.step % args.eval_steps == 0 and state.step < run.max_steps:
            run.evaluate()
        if args.save_steps and state.step % args.save_steps == 0:
            run.save()
    bar.close()


def finish(run: Run) -> dict:
    """Saves the model or adapter, evaluates it, and writes and returns the results."""
    accelerator, state, output_dir = run.accelerator, run.state, run.output_dir
    # The weights first: a failure in the evaluation does not lose them.
    accelerator.wait_for_everyone()
    weights = accelerator.get_state_dict(run.model)
    with writing_result(output_dir):
        if accelerator.is_main_process:
            accelerator.unwrap_model(run.model).save_pretrained(output_dir, state_dict=weights)
            run.data.tokenizer.save_pretrained(output_dir)
    del weights
    saved = "adapter" if run.model_args.use_peft else "model"
    try:
        eval_loss, by_position = run.evaluate() if run.data.eval_packs else (None, [])
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the trained {saved} is in {output_dir}, without an evaluation") from None

    results = {
        "train_loss": mean_loss(state.log_history),
        "train_runtime": state.runtime,
        "train_tokens": state.tokens,
        "train_loss_tokens": state.loss_tokens,
        "bad_rows": run.data.bad_row_count,
        "train_tokens_per_second": state.tokens / state.runtime if state.runtime else None,
        "train_steps": state.step,
        "epoch": run.data.epochs(state.step),
        "peak_memory_gib": machine.peak_memory(accelerator.device) / GIB,
        "mfu": run.mfu,
        "trainable_parameters": run.trained_parameters,
        "attn_implementation": run.model_args.attn_implementation,
        "patches": list(flashmla_hf.patch_report(accelerator.unwrap_model(run.model)).applied),
    }
    if eval_loss is not None:
        first = next(entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry)
        results |= {"eval_loss": eval_loss, "eval_perplexity": perplexity(eval_loss), "first_eval_loss": first}
        results["eval_by_position"] = by_position
    with writing_result(output_dir):
        if accelerator.is_main_process:
            (output_dir / "trainer_state.json").write_text(json.dumps(dataclasses.asdict(state), indent=1))
            (output_dir / "all_results.json").write_text(json.dumps(results, indent=1))
    accelerator.wait_for_everyone()
    engines.end_training(accelerator)
    accelerator.print(f"{saved}, trainer_state.json and all_results.json are in {output_dir}")
    return results


def main(argv: list[str] | None = None, command: str = "finetune") -> None:
    """The commands ``flashmla finetune`` and ``flashmla max-length``. Ends the process with one sentence for a mistake."""
    argv = sys.argv[1:] if argv is None else argv
    searches = command == "max-length"
    if searches:
        argv = [*argv, "--find_max_length"]
    description = (max_length.__doc__ if searches else __doc__).split("\n\n")[0]
    try:
        model_args, data_args, args = parse_arguments(argv, f"flashmla {command}", description)
    except UserError as error:
        end(command, error)
    try:
        quantization.check(model_args)
        if not data_args.preview:
            check_weights(model_args.model_name_or_path)  # before data that takes long to prepare
        model_args.patches = plan_patches(model_args, args, args.trial_length or data_args.max_length)
        if args.trial_length is not None:
            max_length.try_length(model_args, args)
        elif args.find_max_length:
            max_length.find_max_length(argv, model_args, data_args, args)
        else:
            train(model_args, data_args, args)
    except UserError as error:
        end(command, error, engines.let_others_speak(error.__cause__ or error))
    except KeyboardInterrupt as interrupt:
        advice = "a new search begins anew" if searches else how_to_continue(args)
        print(f"{command}: interrupted; {str(interrupt) or advice}", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            if error.filename is None or error.strerror is None:
                raise
            sys.exit(f"{command}: {error.filename}: {error.strerror}")
        sys.exit(f"{command}: {args.output_dir}: {error.strerror}; make room; {how_to_continue(args)}")
    except (RuntimeError, MemoryError, ValueError) as error:
        who = engines.let_others_speak(error)
        if engines.is_lost_process(error):
            sys.exit(f"{command}: {who}another process has ended ({first_line(error)}); {how_to_continue(args)}")
        if str(error).startswith("flashmla_hf.patch"):  # no room on the host, a call that a patch cannot follow
            sys.exit(f"{command}: {who}{' '.join(str(error).split())}")
        if not machine.is_out_of_memory(error):
            raise
        sys.exit(f"{command}: {who}{max_length.OUT_OF_MEMORY}; {out_of_memory_message(model_args, data_args, args)}")


if __name__ == "__main__":
    main()
