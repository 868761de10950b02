"""Does a longer context lower the loss of held-out documents? Fine-tunes one model per context, the rest alike.

    python benchmarks/context_quality.py                                       # SmolLM2-135M, real weights, LoRA
    python benchmarks/context_quality.py --model small --max_steps 400 --contexts 512 2048 8192 --name quality-small
    python benchmarks/context_quality.py --model FOLDER --output_dir results/mine
    python benchmarks/context_quality.py --contexts 512 1024 --eager_context 1024       # and: is it what eager attention does?

The documents are modules of Python's standard library, whole ones held out. Every context trains on as many tokens per
step, for as many steps, from the same weights and seed, with attention by flashmla and the memory patches
(flashmla finetune does the work). It is evaluated on the same held-out documents, cut into pieces of that context: before
training, which shows how the untrained model uses more context, and after.

``--eager_context`` trains once more at one of the contexts, by eager attention and without a patch, on the same data with the
same seed, and compares the losses of all steps: the patches and the kernel are to change nothing but rounding.

``--model small`` is a Llama of 19M parameters with random weights and a tokenizer of its own, all weights trained: for
machines that have no real weights, and long enough steps to learn something.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import documents
import matplotlib
import models
import records
from tqdm import tqdm

from flashmla_hf.training import machine
from flashmla_hf.training.options import at_least

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CONTEXTS = {"cpu": (512, 2048, 8192), "cuda": (512, 1024, 2048, 4096, 8192)}
CHARACTERS_PER_TOKEN = 4  # of source code, about: how long a document must be to fill the longest context
# By how much two trainings on the same data may differ in the loss of a step, in nats: an order of sums in float32 moves the
# weights by as little as Adam lets it; in bfloat16 both round every activation to 8 bits.
TOLERANCES = {"float32": 1e-3, "bfloat16": 2e-2}


def write_documents(folder: Path, longest: int, held_out_count: int) -> tuple[Path, Path]:
    """train.jsonl and held_out.jsonl: the held-out modules fill the longest context, and are cut after it."""
    modules = documents.standard_library()
    characters = longest * CHARACTERS_PER_TOKEN
    long = [name for name, text in modules.items() if len(text) >= characters]
    if len(long) < 2:
        raise SystemExit(f"context_quality: no two modules of {characters} characters: lower --contexts")
    held_out = set(long[:: max(1, len(long) // held_out_count)][:held_out_count])
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    rows = [{"text": text} for name, text in modules.items() if name not in held_out]
    paths[0].write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths[1].write_text("".join(json.dumps({"text": modules[name][:characters]}) + "\n" for name in sorted(held_out)))
    return paths


def train_one(
    folder: Path,
    context: int,
    files: tuple[Path, Path],
    output_dir: Path,
    args: argparse.Namespace,
    attn_implementation: str = "flashmla",
) -> dict:
    """The results of one run of flashmla finetune, with all memory patches if attention is flashmla's."""
    options = {
        "model_name_or_path": folder,
        "train_file": files[0],
        "validation_file": files[1],
        "output_dir": output_dir,
        "attn_implementation": attn_implementation,
        "patches": "all" if attn_implementation == "flashmla" else "none",
        "use_peft": args.model != "small",
        "max_length": context,
        "per_device_train_batch_size": args.tokens_per_step // context,
        "max_steps": args.max_steps,
        "learning_rate": args.learning_rate or (1e-3 if args.model == "small" else 5e-4),
        "warmup_steps": 0.1,
        "eval_on_start": True,
        "bf16": args.dtype == "bfloat16",
        "use_cpu": args.device == "cpu",
        "seed": args.seed,
        "report_to": "none",
    }
    command = [sys.executable, "-m", "flashmla_hf.training.finetune"]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    if subprocess.run(command).returncode != 0:
        sys.exit(f"context_quality: training at {context} tokens failed; its message stands above")
    results = json.loads((output_dir / "all_results.json").read_text())
    kept = (
        "first_eval_loss",
        "eval_loss",
        "eval_by_position",
        "train_steps",
        "train_tokens",
        "train_tokens_per_second",
    )
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return {"context": context, "losses": losses, **{name: results[name] for name in kept}}


def beside_eager(document: dict) -> dict | None:
    """The two curves of --eager_context and how far they are apart; None if there is only one."""
    eager = document.get("eager")
    if eager is None:
        return None
    mine = next(p["losses"] for p in document["points"] if p["context"] == eager["context"])
    apart = max(abs(a - b) for a, b in zip(mine, eager["losses"], strict=True))
    allowed = TOLERANCES[document["dtype"]]
    return {"context": eager["context"], "mine": mine, "eager": eager["losses"], "apart": apart, "allowed": allowed}


def section(document: dict) -> str:
    """The Markdown of a JSON file of this script."""
    lines = [
        f"{document['model']}, {document['tokens_per_step']:,} tokens per step: loss of the same held-out documents (nats per "
        "token), cut into pieces of the context, before and after training at that context.\n",
        "| context | before | after | steps | trained tokens | tokens/s |",
        "|---|---|---|---|---|---|",
    ]
    for p in document["points"]:
        lines.append(
            f"| {p['context']:,} | {p['first_eval_loss']:.4f} | {p['eval_loss']:.4f} | {p['train_steps']} | "
            f"{p['train_tokens']:,} | {p['train_tokens_per_second']:,.0f} |"
        )
    if curves := beside_eager(document):
        verdict = "pass" if curves["apart"] <= curves["allowed"] else "**fail**"
        lines.append(
            f"\nAt {curves['context']:,} tokens also by eager attention without patches, same data and seed, "
            f"{document['dtype']}: over {len(curves['mine'])} steps the losses (from {curves['eager'][0]:.4f} to "
            f"{curves['eager'][-1]:.4f} nats) are {curves['apart']:.1e} nats apart at the most, allowed "
            f"{curves['allowed']:.0e}: {verdict}. Eager trains at {document['eager']['train_tokens_per_second']:,.0f} tokens/s."
        )
    return "\n".join(lines) + "\n"


def plot(document: dict, path: Path) -> None:
    curves = beside_eager(document)
    number = 2 if curves is None else 3
    figure, axes = plt.subplots(1, number, figsize=(5.5 * number, 4.4), layout="constrained")
    points = document["points"]
    contexts = [p["context"] for p in points]
    for name, label, color in (("first_eval_loss", "before", "#0072B2"), ("eval_loss", "after", "#009E73")):
        axes[0].plot(contexts, [p[name] for p in points], marker="o", color=color, label=f"{label} training")
    axes[0].set(xscale="log", xlabel="context, tokens", ylabel="loss of held-out documents, nats per token")
    axes[0].set_xticks(contexts, [f"{c:,}" for c in contexts])
    for p in points:
        # The first tokens of a piece have too few samples to show anything.
        buckets = [b for b in p["eval_by_position"] if b["from"] >= 64]
        axes[1].plot(
            [b["from"] for b in buckets], [b["loss"] for b in buckets], marker=".", label=f"{p['context']:,} tokens"
        )
    axes[1].set(xscale="log", xlabel="tokens that a prediction could read, from", ylabel="loss after training")
    if curves is not None:
        steps = range(1, len(curves["mine"]) + 1)
        axes[2].plot(steps, curves["eager"], color="#D55E00", linewidth=4, alpha=0.5, label="eager, no patches")
        axes[2].plot(steps, curves["mine"], color="#009E73", marker=".", label="flashmla, all patches")
        axes[2].set(xlabel=f"step, at {curves['context']:,} tokens", ylabel="loss of the step, nats per token")
        axes[2].xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    for axis in axes:
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(f"{document['model']}, {document['environment']['device']}", fontsize=9)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2 (real weights), small (random ones), or a folder")
    parser.add_argument("--contexts", nargs="+", type=at_least(2), metavar="TOKENS", help="default: by device")
    parser.add_argument("--tokens_per_step", type=at_least(2), default=8192, help="at least the longest context")
    parser.add_argument("--max_steps", type=at_least(1), default=8)
    parser.add_argument("--held_out", type=at_least(1), default=4, help="documents")
    parser.add_argument(
        "--eager_context", type=int, metavar="TOKENS", help="the context that eager attention trains at, too"
    )
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=machine.default_device())
    parser.add_argument("--output_dir", type=Path, default=records.REPOSITORY / "results" / "context_quality")
    parser.add_argument("--name", default="context_quality", help="of the JSON, Markdown and PNG files")
    records.add_dirty_option(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    records.refuse_dirty_tree("context_quality", args.output_dir, args.allow_dirty)
    contexts = sorted(args.contexts or CONTEXTS[args.device])
    if any(args.tokens_per_step % context for context in contexts):
        sys.exit(f"context_quality: --tokens_per_step {args.tokens_per_step}: expected a multiple of every context")
    if args.eager_context is not None and args.eager_context not in contexts:
        sys.exit(f"context_quality: --eager_context {args.eager_context}: expected one of --contexts {contexts}")
    args.dtype = machine.fastest_dtype(args.device)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    files = write_documents(args.output_dir, contexts[-1], args.held_out)
    try:
        if args.model == "small":
            texts = [json.loads(line)["text"] for line in files[0].read_text().splitlines()]
            folder, name = (
                models.small_folder(texts),
                "Llama of 19M parameters from random weights, all weights trained",
            )
        else:
            folder = models.smollm2_folder() if args.model == "smollm2" else Path(args.model)
            name = f"{'SmolLM2-135M-Instruct' if args.model == 'smollm2' else folder.name}, LoRA"
    except models.NoModelError as error:
        sys.exit(f"context_quality: {error}")
    document = {
        "kind": "context_quality",
        "environment": records.describe(args.device),
        "model": name,
        "tokens_per_step": args.tokens_per_step,
        "seed": args.seed,
        "dtype": args.dtype,
        "points": [],
    }
    path = args.output_dir / f"{args.name}.json"

    def write() -> None:
        records.write_json(document, path)
        path.with_suffix(".md").write_text(f"{section(document)}\n{records.sentence(document['environment'])}\n")
        plot(document, path.with_suffix(".png"))

    for context in tqdm(contexts, desc="contexts", unit="context"):
        document["points"].append(train_one(folder, context, files, args.output_dir / f"run-{context}", args))
        write()
    if args.eager_context is not None:
        output_dir = args.output_dir / f"run-{args.eager_context}-eager"
        document["eager"] = train_one(folder, args.eager_context, files, output_dir, args, "eager")
        write()
    print(f"\n{section(document)}\nwritten: {path}, .md, .png")
    curves = beside_eager(document)
    if curves is not None and curves["apart"] > curves["allowed"]:
        sys.exit(f"context_quality: the losses differ by {curves['apart']:.1e} nats, allowed {curves['allowed']:.0e}")


if __name__ == "__main__":
    main()
