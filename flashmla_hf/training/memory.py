"""The measured memory and time of a training step beside the ledger's prediction, at the lengths that ``--tokens`` names.

    flashmla memory --model_name_or_path MODEL --use_peft --bf16 --patches all --tokens 8192 32768

Each length is one step on random tokens in a process of its own: a length that does not fit is named and ends nothing. All
other options are those of flashmla finetune (flashmla finetune --help); no data is needed.
"""

from __future__ import annotations

import argparse
import os
import sys

from tqdm import tqdm

from flashmla_hf.host_memory import GIB
from flashmla_hf.training import machine, quantization
from flashmla_hf.training.arguments import UserError, end, parse_arguments
from flashmla_hf.training.max_length import run_trial
from flashmla_hf.training.model import check_weights, ledger_of, plan_patches
from flashmla_hf.training.options import at_least
from flashmla_hf.training.shape import load_config


def table(trials: list[dict], predicted: list[float | None], batch_size: int) -> str:
    """Markdown: a row per trial. ``predicted`` is the ledger's peak in bytes, or None."""
    lines = ["| tokens | peak, GiB | ledger, GiB | s/step | tokens/s |", "|---" * 5 + "|"]
    for trial, ledger_bytes in zip(trials, predicted, strict=True):
        cells = [f"{trial['length']:,}", trial["status"].replace("_", " "), "–", "–", "–"]
        if trial["status"] == "ok":
            speed = trial["length"] * batch_size / trial["seconds"]
            cells[1], cells[3], cells[4] = (
                f"{trial['peak_bytes'] / GIB:.2f}",
                f"{trial['seconds']:.2f}",
                f"{speed:,.0f}",
            )
        if ledger_bytes is not None:
            cells[2] = f"{ledger_bytes / GIB:.2f}"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="flashmla memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, usage="%(prog)s --model_name_or_path MODEL --tokens N [N ...] [OPTION OF finetune ...]",
    )  # fmt: skip
    parser.add_argument("--tokens", type=at_least(2), nargs="+", default=[2048], help="lengths (default: 2048)")
    own, options = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    # A trial writes no files, so the option that finetune cannot do without names none.
    options = [*options, "--output_dir", os.devnull]
    try:
        model_args, _, args = parse_arguments([*options, "--trial_length", str(own.tokens[0])], "flashmla memory")
        quantization.check(model_args)
        check_weights(model_args.model_name_or_path)
        model_args.patches = plan_patches(model_args, args, max(own.tokens))
        ledger = ledger_of(model_args, args, load_config(model_args.model_name_or_path))
    except UserError as error:
        end("flashmla memory", error)
    trials = [
        run_trial(options, tokens, args.find_max_length_timeout, args.gpus, args.fsdp)
        for tokens in tqdm(own.tokens, unit="length", desc="measuring", disable=args.disable_tqdm)
    ]
    batch = args.per_device_train_batch_size
    # A batch of sequences is laid end to end, as one row of all its tokens.
    predicted = [ledger.peak(tokens * batch) if ledger else None for tokens in own.tokens]
    if args.device_type == "cpu":
        print("peak: the largest resident size of the process, with Python and torch in it")
    print(f"{machine.device_name(args.device_type)}\n\n{table(trials, predicted, batch)}")
    for trial in trials:
        if trial["status"] != "ok":
            print(f"{trial['length']:,} tokens: {trial['reason']}")
    if any(trial["status"] == "error" for trial in trials):
        sys.exit("flashmla memory: a length failed for another reason than memory or time")


if __name__ == "__main__":
    main()
