"""The longest context that fits: steps on random tokens, each in a process of its own, until the length is known to 2 %.

The search begins at the ledger's prediction and does not go beyond the positions that the model was made for
(max_position_embeddings) or, if it is larger, --max_length. A trial that runs out of memory or takes too long ends with
its process and not with the search. Nothing is trained.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from flashmla_hf.host_memory import GIB
from flashmla_hf.training import child_process, engines, machine, sequence_parallel
from flashmla_hf.training.arguments import DataArguments, ModelArguments, TrainingArguments, UserError
from flashmla_hf.training.checkpoints import make_output_dir
from flashmla_hf.training.model import ledger_of, load_model, make_optimizer, positions_exceeded
from flashmla_hf.training.packing import Collator
from flashmla_hf.training.shape import load_config, positions_of
from flashmla_hf.training.step import run_batches

TRIAL_MARK = "TRIAL "  # begins the line in which a trial reports
OUT_OF_MEMORY = "out of memory"  # is in the message of a process that ran out of it
PROGRAM = ("-m", "flashmla_hf.training.finetune")  # what Python runs in a trial's process
MAX_TRIALS = 20  # 20 halvings reach any length


def try_length(model_args: ModelArguments, args: TrainingArguments) -> None:
    """One step on ``trial_length`` random tokens per sequence; prints its peak memory and time. Runs in a trial's process."""
    if args.device_type == "cpu":
        # An allocation beyond it fails, before the machine begins to swap or to kill.
        available = int(0.95 * machine.memory_available("cpu")) // machine.processes()
        resource.setrlimit(resource.RLIMIT_DATA, (available, available))
    accelerator = engines.make_accelerator(model_args, args)
    model = load_model(model_args, args, None)
    positions_exceeded(model, args.trial_length)
    sequence_parallel.divide_attention(model, args)
    engines.settle_dtypes(model, accelerator, args.bf16)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(trainable, args)
    vocabulary = model.config.get_text_config().vocab_size
    model, optimizer = accelerator.prepare(model, optimizer)
    share = sequence_parallel.Share.of(accelerator, args)
    collate = Collator(model_args.attn_implementation, share.cut)
    rng = np.random.default_rng((args.seed, share.rank))  # the processes of a sequence draw the same one
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
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = machine.peak_memory(accelerator.device)
    if accelerator.num_processes > 1:  # of the fullest and the slowest
        most = torch.tensor([peak, seconds], dtype=torch.float64, device=accelerator.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        peak, seconds = int(most[0]), float(most[1])
    if accelerator.is_main_process:
        print(TRIAL_MARK + json.dumps({"peak_bytes": peak, "seconds": seconds}), flush=True)
    if accelerator.num_processes > 1:
        accelerator.wait_for_everyone()
        # A process group that is left to the interpreter's end may wait for the others.
        engines.end_training(accelerator)


def run_trial(argv: list[str], length: int, timeout: float, gpus: int = 1, fsdp: bool = False) -> dict:
    """``try_length`` in processes of its own, so that no failure in them ends the search; its status and numbers."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)] if gpus > 1 else []
    command = [sys.executable, *launcher, *PROGRAM, *argv, "--trial_length", str(length)]
    variables = engines.FSDP2_VARIABLES if fsdp and gpus > 1 else {}
    outcome = child_process.run(command, TRIAL_MARK, timeout, variables, "finetune: ")
    trial = {"length": length, "status": outcome.status}
    if outcome.result is not None:
        return trial | outcome.result
    if OUT_OF_MEMORY in outcome.reason or machine.NO_HOST_MEMORY in outcome.reason:
        trial["status"] = "out_of_memory"
    return trial | {"reason": outcome.reason}


def next_length(trials: list[dict], memory: int, bound: int | None = None) -> int | None:
    """The length to try after ``trials``, at most ``bound``; None when the longest that fits is known to 2 % or 64 tokens."""
    fits = sorted((trial["length"], trial["peak_bytes"]) for trial in trials if trial["status"] == "ok")
    low = fits[-1][0] if fits else 0
    high = min((trial["length"] for trial in trials if trial["status"] != "ok"), default=None)
    if high is None and bound is not None and low >= bound:
        return None
    if high is None:
        # Along the line through the last two, a little short of the end; with one, no more than its share of the memory.
        (n1, y1), (n2, y2) = fits[-2] if len(fits) > 1 else (0, 0), fits[-1]
        room = n2 + (0.97 * memory - y2) * (n2 - n1) / max(y2 - y1, 1)
        following = int(min(max(room, 1.1 * n2), 4 * n2))
        if bound is not None and following >= bound:
            return bound
    elif high - low <= max(64, 0.02 * low):
        return None
    else:
        following = (low + high) // 2
    return max(following - following % 64, low + 1) if following > 64 else max(following, 2)


def find_max_length(
    argv: list[str], model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments
) -> dict:
    """Bisects the longest ``max_length`` whose training step fits; returns the content of ``max_length.json``.

    ``argv`` are the options of the trials' processes. Raises UserError if no length fits or a trial fails otherwise.
    """
    if machine.processes() > 1:
        raise UserError(
            "--find_max_length runs in one process, and starts those of its trials: start it with python instead of accelerate "
            "launch, with --gpus N"
        )
    device = args.device_type
    config = load_config(model_args.model_name_or_path)
    ledger = ledger_of(model_args, args, config)
    memory = machine.memory_available(device) // (args.gpus if device == "cpu" else 1)
    # A batch of packs is laid end to end, as one row of all its tokens.
    predicted = ledger.longest(memory) // args.per_device_train_batch_size if ledger else None
    output = make_output_dir(model_args, args) / "max_length.json"
    print(
        f"{memory / GIB:.1f} GiB available; the ledger predicts {format(predicted, ',') if predicted else 'nothing'} tokens",
        flush=True,
    )
    bound, why = search_bound(positions_of(config), data_args.max_length)
    if bound is not None:
        print(why, flush=True)
    trials: list[dict] = []
    result: dict = {}
    length = predicted - predicted % 64 if predicted and predicted >= 128 else data_args.max_length
    length = min(length, bound or length)
    with tqdm(desc="trials", unit="trial", disable=args.disable_tqdm) as bar:
        while length is not None and len(trials) < MAX_TRIALS:
            bar.write(f"trying {length:,} tokens, for at most {args.find_max_length_timeout:g} s")
            sys.stdout.flush()
            try:
                trial = run_trial(argv, length, args.find_max_length_timeout, args.gpus, args.fsdp)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(_so_far(result, output)) from None
            trials.append(trial)
            bar.update()
            bar.write(_describe(trial))
            if trial["status"] == "error":
                raise UserError(f"the trial of {length} tokens failed: {trial['reason'].removeprefix('finetune: ')}")
            result = {
                **_bounds(trials),
                "predicted": predicted,
                "available_bytes": memory,
                "device": machine.device_name(device),
                "trials": trials,
            }
            output.write_text(json.dumps(result, indent=1))
            nothing_fits = not result["max_length"] and length <= 64
            length = None if nothing_fits else next_length(trials, memory, bound)
    if not result["max_length"]:
        raise UserError(
            f"no length fits, not even {min(t['length'] for t in trials)} tokens: {trials[-1].get('reason', '')}"
        )
    limit = "takes too long" if result["is_limited_by_time"] else "does not fit"
    beyond = f"; {result['first_that_does_not_fit']:,} {limit}" if result["first_that_does_not_fit"] else ""
    if result["max_length"] == bound:
        beyond = f"; {why}"
    print(f"max_length: {result['max_length']:,} tokens{beyond}. Trials are in {output}")
    return result


def search_bound(positions: int | None, max_length: int) -> tuple[int | None, str]:
    """The longest length to try, and the sentence that says why: the model's positions, or ``max_length`` beyond them.

    None for a model whose configuration names no positions.
    """
    if positions is None:
        return None, ""
    default = DataArguments.__dataclass_fields__["max_length"].default
    if max_length > positions and max_length != default:
        return max_length, f"bounded by max_length {max_length:,}, beyond the model's {positions:,} positions"
    return positions, (
        f"bounded by the model's {positions:,} positions (max_position_embeddings); a larger --max_length N tries up to N"
    )


def _so_far(result: dict, output: Path) -> str:
    """What an interrupted search leaves, for its message."""
    if not result:
        return "no trial has ended; a new search begins anew"
    if not result["max_length"]:
        return f"no length fits so far; the trials that ended are in {output}. A new search begins anew"
    return f"up to {result['max_length']:,} tokens fit so far; the trials that ended are in {output}. A new search begins anew"


def _bounds(trials: list[dict]) -> dict:
    """The longest length that fits, the shortest that does not, and whether time is what ended it."""
    fits = [trial["length"] for trial in trials if trial["status"] == "ok"]
    fails = [trial for trial in trials if trial["status"] != "ok"]
    shortest = min(fails, key=lambda trial: trial["length"], default=None)
    return {
        "max_length": max(fits, default=0),
        "first_that_does_not_fit": shortest and shortest["length"],
        "is_limited_by_time": shortest is not None and shortest["status"] == "timeout",
    }


def _describe(trial: dict) -> str:
    peak = f"peak {trial['peak_bytes'] / GIB:.2f} GiB, {trial['seconds']:.1f} s" if "seconds" in trial else ""
    return f"{trial['length']:>9,} tokens: {trial['status'].replace('_', ' ')} {peak}"
