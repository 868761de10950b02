"""Does a longer context lower the loss of held-out documents? Fine-tunes one model per context, the rest alike.

    python scripts/context_quality.py                                       # SmolLM2-135M, real weights, LoRA
    python scripts/context_quality.py --model small --max_steps 400 --contexts 512 2048 8192 --name quality-small
    python scripts/context_quality.py --model FOLDER --output_dir results/mine

The documents are modules of Python's standard library, whole ones held out. Every context trains on as many tokens per
step, for as many steps, from the same weights and seed, with attention by flashmla and the memory patches
(scripts/finetune.py does the work). It is evaluated on the same held-out documents, cut into pieces of that context: before
training, which shows what the model makes of more context as it comes, and after.

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

import demo
import environment
import matplotlib
import models
from tqdm import tqdm

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CONTEXTS = {"cpu": (512, 2048, 8192), "cuda": (512, 1024, 2048, 4096, 8192)}
CHARACTERS_PER_TOKEN = 4  # of source code, about: how long a document must be to fill the longest context


def write_documents(folder: Path, longest: int, held_out_count: int) -> tuple[Path, Path]:
    """train.jsonl and held_out.jsonl: the held-out modules fill the longest context, and are cut after it."""
    documents = demo.standard_library()
    characters = longest * CHARACTERS_PER_TOKEN
    long = [name for name, text in documents.items() if len(text) >= characters]
    if len(long) < 2:
        raise SystemExit(f"context_quality: no two modules of {characters} characters: lower --contexts")
    held_out = set(long[:: max(1, len(long) // held_out_count)][:held_out_count])
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    rows = [{"text": text} for name, text in documents.items() if name not in held_out]
    paths[0].write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths[1].write_text("".join(json.dumps({"text": documents[name][:characters]}) + "\n" for name in sorted(held_out)))
    return paths


def train_one(folder: Path, context: int, files: tuple[Path, Path], output_dir: Path, args: argparse.Namespace) -> dict:
    """One run of scripts/finetune.py; what it found."""
    options = {
        "model_name_or_path": folder,
        "train_file": files[0],
        "validation_file": files[1],
        "output_dir": output_dir,
        "attn_implementation": "flashmla",
        "patches": "all",
        "use_peft": args.model != "small",
        "max_length": context,
        "per_device_train_batch_size": args.tokens_per_step // context,
        "max_steps": args.max_steps,
        "learning_rate": args.learning_rate or (1e-3 if args.model == "small" else 5e-4),
        "warmup_steps": 0.1,
        "eval_on_start": True,
        "bf16": environment.fastest_dtype(args.device) == "bfloat16",
        "use_cpu": args.device == "cpu",
        "seed": args.seed,
        "report_to": "none",
    }
    command = [sys.executable, str(Path(__file__).with_name("finetune.py"))]
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
    return {"context": context, **{name: results[name] for name in kept}}


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
    return "\n".join(lines) + "\n"


def plot(document: dict, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
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
    for axis in axes:
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(f"{document['model']}, {document['environment']['device']}", fontsize=9)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2 (real weights), small (random ones), or a folder")
    parser.add_argument("--contexts", nargs="+", type=int, metavar="TOKENS", help="default: by device")
    parser.add_argument("--tokens_per_step", type=int, default=8192, help="at least the longest context")
    parser.add_argument("--max_steps", type=int, default=8)
    parser.add_argument("--held_out", type=int, default=4, help="documents")
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=environment.default_device())
    parser.add_argument("--output_dir", type=Path, default=environment.REPOSITORY / "results" / "context_quality")
    parser.add_argument("--name", default="context_quality", help="of the JSON, Markdown and PNG files")
    args = parser.parse_args(argv)
    contexts = sorted(args.contexts or CONTEXTS[args.device])
    if any(args.tokens_per_step % context for context in contexts):
        sys.exit(f"context_quality: --tokens_per_step {args.tokens_per_step}: expected a multiple of every context")
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
        "environment": environment.describe(args.device),
        "model": name,
        "tokens_per_step": args.tokens_per_step,
        "seed": args.seed,
        "points": [],
    }
    path = args.output_dir / f"{args.name}.json"
    for context in tqdm(contexts, desc="contexts", unit="context"):
        document["points"].append(train_one(folder, context, files, args.output_dir / f"run-{context}", args))
        path.write_text(json.dumps(document, indent=1) + "\n")
        path.with_suffix(".md").write_text(f"{section(document)}\n{environment.sentence(document['environment'])}\n")
        plot(document, path.with_suffix(".png"))
    print(f"\n{section(document)}\nwritten: {path}, .md, .png")


if __name__ == "__main__":
    main()
