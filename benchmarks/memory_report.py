"""Peak memory and speed of a training step against context length, one process per point, beside the ledger's prediction.

    python benchmarks/memory_report.py                                  # SmolLM2-135M; flashmla, sdpa, eager
    python benchmarks/memory_report.py --model llama-8b --series flashmla+all sdpa+liger+gradient_checkpointing \\
        --contexts 32768 98304 --time_budget 540 --name memory-llama-8b --output_dir benchmarks/results
    python benchmarks/memory_report.py --config benchmarks/configs/llama-8b.yaml      # the same from a file
    python benchmarks/memory_report.py --model FOLDER --contexts 1024 2048 4096 --output_dir results/mine

A series is an attn_implementation with additions after "+": liger (the package's kernels), gradient_checkpointing
(Transformers' own), names in flashmla_hf.PATCHES, or all of them with "all"; "offload=31" gives a patch its number.

A step is forward, backward and AdamW on random tokens: the work does not depend on the tokens. JSON, plot and Markdown
table are rewritten after every point; the same command run again measures only what has no number yet.

A point that would not fit in the machine's memory, or take longer than --time_limit, is not begun; the table says so.
Its need is extrapolated from the shorter contexts of the same series, as a*n + b*n²; the memory of a series
whose patches use all free memory (keep_attention and offload without a number, on a GPU) is the ledger's instead.

What is the longest context? A step of full attention takes minutes there. With --sliding_window 4096 flashmla needs the
same memory (its kernels hold no scores either way) and seconds; SDPA does not: it takes a window as a mask of n² elements.

    python benchmarks/memory_report.py --model llama-1b --full --series flashmla+all --sliding_window 4096 \\
        --contexts 1048576 1310720 1572864 --repeats 0
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import measure_model
import models
import records
from measure_model import Measurement, Point
from memory_page import description, details, ledger_of, read, slopes, table, write
from tqdm import tqdm

from flashmla_hf.host_memory import GIB
from flashmla_hf.training import machine
from flashmla_hf.training.arguments import parse_patches
from flashmla_hf.training.options import at_least, set_defaults

BACKENDS = ("flashmla", "sdpa", "eager")  # if time is short, the last is left out
CONTEXTS = {"cpu": (512, 1024, 2048, 4096), "cuda": (2048, 4096, 8192, 16384, 32768, 65536)}
STARTUP = 15  # seconds of a process before its first step, at least


def extrapolated(measured: list[tuple[int, float]], context: int) -> float | None:
    """The value at ``context`` of a*n + b*n² through the last two of ``measured`` (context, value); None without any.

    Neither coefficient is let below zero. With a single point growth is taken as linear, the least it can be.
    """
    if not measured:
        return None
    n2, y2 = measured[-1]
    linear = y2 * context / n2
    if len(measured) == 1:
        return linear
    n1, y1 = measured[-2]
    b = max((y2 / n2 - y1 / n1) / (n2 - n1), 0.0)
    a = y2 / n2 - b * n2
    return (a * context + b * context**2) if a >= 0 else y2 * (context / n2) ** 2


def measure_all(
    points: list[Point],
    time_limit: float,
    time_budget: float | None,
    on_result: Callable[[Measurement], None],
    known: Sequence[Measurement] = (),
) -> list[Measurement]:
    """Measures ``points`` (contexts ascending within a series), skipping points that cannot fit or come too late.

    Points among ``known`` are not measured again, and the others are extrapolated from them too.
    """
    finished = {_key(r.point): r for r in known if r.status in ("ok", "out_of_memory")}
    results: list[Measurement] = []
    started = time.monotonic()
    for point in points:
        time_left = time_budget and time_budget - (time.monotonic() - started)
        result = finished.get(_key(point)) or _skip(point, results, time_limit, time_left)
        if result is None:
            timeout = _timeout(point, time_limit)
            result = measure_model.in_subprocess(point, min(timeout, time_left) if time_left else timeout)
        results.append(result)
        on_result(result)
    return results


def _key(point: Point) -> Point:
    """Equal for two points that are the same measurement: the name of the series does not matter, nor, on a CPU, the memory
    that was free."""
    return dataclasses.replace(point, memory_limit=point.memory_limit if point.device == "cuda" else None, series="")


def _timeout(point: Point, time_limit: float) -> float:
    # Starting Python and building the model are not the step's; billions of random weights take their time.
    return 90 + (2 + point.repeats) * time_limit


def _skip(point: Point, results: list[Measurement], time_limit: float, time_left: float | None) -> Measurement | None:
    def skip(reason: str) -> Measurement:
        return Measurement(point, "skipped", reason)

    mine = [r for r in results if r.point.series == point.series]
    failed = next((r for r in mine if r.status != "ok" and r.point.context < point.context), None)
    if failed is not None:
        return skip(f"{failed.point.context} tokens: {failed.status.replace('_', ' ')}")
    ok = [r for r in mine if r.status == "ok"]
    peak = extrapolated([(r.point.context, r.peak_bytes) for r in ok], point.context)
    seconds = extrapolated([(r.point.context, r.seconds) for r in ok], point.context)
    if peak is not None:
        # Such patches put a longer context's tensors elsewhere: there the ledger's least decides.
        least = ledger_of(point).peak(point.context, point.batch_size) if point.fills_memory else None
        needed = peak + ok[-1].model_bytes if least is None else least
        # On a GPU another process's memory counts too, and a point that fails costs a minute and nothing else; on a CPU
        # the rest of the machine needs some.
        available = (1.0 if point.device == "cuda" else 0.92) * machine.memory_available(point.device)
        available = min(available, point.memory_limit or available)
        if needed > available:
            return skip(f"would take about {needed / GIB:.0f} GiB of {available / GIB:.0f} available")
        if seconds > time_limit:
            return skip(f"would take about {seconds:.0f} s per step")
        in_all = STARTUP + seconds * (1 + point.repeats)
        if time_left is not None and in_all > time_left:
            return skip(f"would take about {in_all:.0f} s of {max(time_left, 0):.0f} left")
    if time_left is not None and time_left < STARTUP:
        return skip("the time budget is used up")
    return None


def parse_series(name: str, device: str, use_peft: bool) -> dict:
    """The fields of a Point that "flashmla+loss+checkpointing" or "sdpa+liger+gradient_checkpointing" stand for.

    Raises ValueError for a part of no known kind.
    """
    backend, *parts = name.split("+")
    own = ("liger", "gradient_checkpointing")
    patches, options = parse_patches([p for p in parts if p not in own], device, use_peft)
    return {
        "series": name,
        "attn_implementation": backend,
        "liger": "liger" in parts,
        "gradient_checkpointing": "gradient_checkpointing" in parts,
        "patches": tuple(patches),
        "patch_options": tuple(options.items()),
    }


def points_for(model: str, series: list[str], contexts: list[int], **settings) -> list[Point]:
    """Contexts ascending, series side by side within each: a machine that slows down slows all of them."""
    device, gpu_memory = settings["device"], settings.pop("gpu_memory", None)
    if gpu_memory is not None:
        if device != "cuda" or gpu_memory <= 0:
            raise ValueError(f"--gpu_memory: expected GiB above 0 and --device cuda, got {gpu_memory:g} and {device}")
        settings["memory_limit"] = int(gpu_memory * GIB)
    elif device == "cpu":
        # The margin is for the system; past it an allocation fails in the child alone.
        settings["memory_limit"] = int(0.95 * machine.memory_available("cpu"))
    everywhere = settings.pop("gradient_checkpointing", False)
    kinds = [parse_series(name, device, settings.get("use_peft", Point.use_peft)) for name in series]
    for kind in kinds:
        if everywhere and not kind["gradient_checkpointing"] and "checkpointing" not in kind["patches"]:
            kind |= {"gradient_checkpointing": True, "series": f"{kind['series']}+gradient_checkpointing"}
    return [Point(model, context=context, **kind, **settings) for context in contexts for kind in kinds]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    names = f"smollm2 (real weights), {', '.join(models.SHAPES)} (random weights), or a folder"
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file of these options; the command line wins")
    parser.add_argument("--model", default="smollm2", help=names)
    parser.add_argument(
        "--series", "--backends", nargs="+", default=list(BACKENDS), metavar="NAME[+ADDED...]",
        help="attn_implementation, and liger, gradient_checkpointing, patches or all added to it",
    )  # fmt: skip
    parser.add_argument("--contexts", nargs="+", type=at_least(2), metavar="TOKENS", help="default: by device")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=machine.default_device())
    parser.add_argument(
        "--gpu_memory", type=float, metavar="GIB",
        help="the most that torch may take of the GPU, to measure as if on a smaller one (79 GiB of an 80-GB card are usable)",
    )  # fmt: skip
    parser.add_argument(
        "--sliding_window", type=int, metavar="TOKENS",
        help="keys that a query of a random-weight model sees: flashmla needs full attention's memory, and less time",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the faster one here")
    parser.add_argument("--batch_size", type=at_least(1), default=1)
    parser.add_argument(
        "--load_in_4bit", action="store_true", help="QLoRA: frozen linear layers in 4 bits (needs bitsandbytes)"
    )
    parser.add_argument("--full", action="store_true", help="all weights are trained instead of LoRA")
    parser.add_argument(
        "--lora_dtype", choices=("float32", "auto"), default="float32", help="of the adapter; auto: the weights'"
    )
    parser.add_argument(
        "--no_autocast",
        action="store_true",
        help="a float32 adapter without autocast: peft casts its inputs to float32",
    )
    parser.add_argument("--optim", choices=("adamw_torch", "none"), default="adamw_torch", help="ends every step")
    parser.add_argument(
        "--gradient_checkpointing", action="store_true", help="in every series that has no checkpointing"
    )
    parser.add_argument("--warmup", type=int, default=32, metavar="TOKENS", help="length of the step before the first")
    parser.add_argument(
        "--repeats", type=at_least(0), default=2, help="timed steps after a first one; 0: the first is timed"
    )
    parser.add_argument(
        "--time_limit", type=float, default=120, metavar="S", help="longest step to attempt, in seconds"
    )
    parser.add_argument("--time_budget", type=float, metavar="S", help="begin no point after this many seconds")
    parser.add_argument("--output_dir", type=Path, default=records.REPOSITORY / "results" / "memory_report")
    parser.add_argument("--name", default="memory_report", help="of the files; points in NAME.json are not repeated")
    parser.add_argument("--overwrite", action="store_true", help="measure again the points that NAME.json has")
    records.add_dirty_option(parser)
    return parser


def _wanted_points(args: argparse.Namespace) -> list[Point]:
    """The points that the arguments name. Raises NoModelError or ValueError for a model or a series that cannot be measured."""
    if args.load_in_4bit and args.full:
        raise ValueError("--load_in_4bit: expected no --full, because 4-bit weights are not trained")
    if args.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("--load_in_4bit: expected the package bitsandbytes, got none; run: pip install bitsandbytes")
    # Converts smollm2 once here, not in the first measured process.
    models.config_of(args.model, args.sliding_window)
    points = points_for(
        args.model,
        list(dict.fromkeys(args.series)),
        sorted(set(args.contexts or CONTEXTS[args.device])),
        device=args.device,
        dtype=args.dtype or machine.fastest_dtype(args.device),
        batch_size=args.batch_size,
        sliding_window=args.sliding_window,
        use_peft=not args.full,
        load_in_4bit=args.load_in_4bit,
        lora_dtype=args.lora_dtype,
        has_autocast=not args.no_autocast,
        optim=args.optim,
        gradient_checkpointing=args.gradient_checkpointing,
        warmup=args.warmup,
        repeats=args.repeats,
        gpu_memory=args.gpu_memory,
    )
    ledger_of(points[0])
    return points


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    try:
        set_defaults(parser, sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        sys.exit(f"memory_report: {error}")
    args = parser.parse_args(argv)
    try:
        points = _wanted_points(args)
    except (models.NoModelError, ValueError) as error:
        sys.exit(f"memory_report: {error}")
    records.refuse_dirty_tree("memory_report", args.output_dir, args.allow_dirty)
    record = records.describe(args.device)
    known = [] if args.overwrite else _known(args.output_dir / f"{args.name}.json", points[0], record)
    bar = tqdm(total=len(points), unit="point", desc="measuring")
    results: list[Measurement] = []
    wanted = {_key(point) for point in points}
    # Points of the file that this command does not name stay in it.
    others = [r for r in known if _key(r.point) not in wanted]
    series = dict.fromkeys([*(r.point.series for r in known), *(point.series for point in points)])
    order = {name: i for i, name in enumerate(series)}
    paths: list[Path] = []

    def keep(result: Measurement) -> None:
        if result.environment is None:
            result.environment = record
        results.append(result)
        bar.update()
        bar.write(describe(result))
        everything = sorted([*others, *results], key=lambda r: (r.point.context, order[r.point.series]))
        paths[:] = write(everything, record, args.output_dir, args.name)

    measure_all(points, args.time_limit, args.time_budget, keep, known)
    bar.close()
    print(f"\n{table(results)}\n{details(results)}\n{slopes(results)}\nwritten: {', '.join(map(str, paths))}")
    failed = [r for r in results if r.status == "error"]
    if failed:
        sys.exit(f"memory_report: {len(failed)} points failed; first: {failed[0].point.label}: {failed[0].reason}")


def _known(path: Path, point: Point, record: dict) -> list[Measurement]:
    """The measurements that ``path`` already holds. Ends the program if they are of another model or device."""
    if not path.exists():
        return []
    try:
        known, document = read(path)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        sys.exit(f"memory_report: {path} is no file of this script ({error!r}): name another --name, or --overwrite it")
    if not known:
        return []
    same = document["environment"]["device"] == record["device"]
    if not same or any(description(r.point) != description(point) for r in known):
        sys.exit(
            f"memory_report: {path} holds other measurements ({description(known[0].point)} on "
            f"{document['environment']['device']}): name another --name, or --overwrite it"
        )
    return known


def describe(result: Measurement) -> str:
    label = f"{result.point.series:>9} {result.point.context:>7,} tokens: "
    if result.status != "ok":
        return f"{label}{result.status.replace('_', ' ')}: {result.reason}"
    return (
        f"{label}{result.peak_bytes / GIB:6.2f} GiB, {result.seconds:7.2f} s, {result.tokens_per_second:,.0f} tokens/s"
    )


if __name__ == "__main__":
    main()
