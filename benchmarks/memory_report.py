"""Peak memory and speed of a training step against context length, one process per point, beside the ledger's prediction.

    python scripts/memory_report.py                                  # SmolLM2-135M; flashmla, sdpa, eager
    python scripts/memory_report.py --model llama-8b --series flashmla+all sdpa+liger+gradient_checkpointing \\
        --contexts 32768 98304 --time_budget 540 --name memory-llama-8b --output_dir benchmarks/results
    python scripts/memory_report.py --config scripts/configs/memory/llama-8b.yaml      # the same from a file
    python scripts/memory_report.py --model FOLDER --contexts 1024 2048 4096 --output_dir results/mine

A series is an attn_implementation and what is added to it with "+": liger (the package's kernels), gradient_checkpointing
(Transformers' own), names in flashmla_hf.PATCHES, or all of them with "all"; "offload=31" gives a patch its number.

A step is forward, backward and AdamW on random tokens: the real work, whatever the tokens are. JSON, plot and Markdown
table are rewritten after every point; the same command run again measures only what has no number yet.

A point that would not fit in the machine's memory, or take longer than --time_limit, is not begun; the table says so.
What it would need is extrapolated from the shorter contexts of the same series, as a*n + b*n²; the memory of a series
whose patches fill what is free (keep_attention and offload without a number, on a GPU) is the ledger's instead.

What is the longest context? A step of full attention takes minutes there. With --sliding_window 4096 flashmla needs the
same memory (its kernels hold no scores either way) and seconds; SDPA does not: it takes a window as a mask of n² elements.

    python scripts/memory_report.py --model llama-1b --full --series flashmla+all --sliding_window 4096 \\
        --contexts 1048576 1310720 1572864 --repeats 0
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import environment
import ledger
import matplotlib
import measure_model
import models
from measure_model import GIB, Measurement, Point
from options import at_least, set_defaults
from tqdm import tqdm

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BACKENDS = ("flashmla", "sdpa", "eager")  # where time is short, the last is left out
CONTEXTS = {"cpu": (512, 1024, 2048, 4096), "cuda": (2048, 4096, 8192, 16384, 32768, 65536)}
# Colours and markers that also differ for colour-blind readers and in print (Okabe and Ito).
STYLES = {"eager": ("#D55E00", "s"), "sdpa": ("#0072B2", "^"), "flashmla": ("#009E73", "o")}
MORE_STYLES = (("#CC79A7", "d"), ("#E69F00", "v"), ("#56B4E9", "P"), ("#000000", "X"), ("#999999", "*"))
TERM_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999", "#000000")
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
    """Measures ``points`` (contexts ascending within a series), skipping what cannot fit or comes too late.

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
    """What makes two points the same measurement: not how it was asked for, nor, on a CPU, the memory that was free."""
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
        # What patches fill goes elsewhere in a longer context: there the ledger's least decides.
        least = ledger_of(point).peak(point.context, point.batch_size) if point.fills_memory else None
        needed = peak + ok[-1].model_bytes if least is None else least
        # On a GPU another process's memory counts too, and a point that fails costs a minute and nothing else; on a CPU
        # the rest of the machine needs some.
        available = (1.0 if point.device == "cuda" else 0.92) * environment.memory_available(point.device)
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


# ---------------------------------------------------------------- what is written


def series_of(results: list[Measurement]) -> list[str]:
    return list(dict.fromkeys(r.point.series for r in results))


def table(results: list[Measurement]) -> str:
    """Markdown: a row per context, peak memory and step time per series."""
    series = series_of(results)
    cells = {(r.point.context, r.point.series): r for r in results}
    lines = ["| tokens | " + " | ".join(f"{b}: GiB | {b}: s/step" for b in series) + " |"]
    lines.append("|---" * (1 + 2 * len(series)) + "|")
    notes = []
    for context in sorted({r.point.context for r in results}):
        row = [f"{context:,}"]
        for name in series:
            result = cells.get((context, name))
            if result is not None and result.status == "ok":
                row += [f"{result.peak_bytes / GIB:.2f}", f"{result.seconds:.2f}"]
            else:
                row += ["–", "–"]
                if result is not None:
                    notes.append(f"{name} at {context:,}: {result.status.replace('_', ' ')}: {result.reason}")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n" + "".join(f"\n- {note}" for note in notes) + ("\n" if notes else "")


def ledger_of(point: Point) -> ledger.Ledger:
    return ledger.ledger(ledger.Shape.of(models.config_of(point.model, point.sliding_window)), point.switches())


def details(results: list[Measurement]) -> str:
    """Markdown: a row per measured point, with what the ledger predicts beside what was found."""
    lines = [
        "| series | tokens | peak, GiB | ledger, GiB | reserved, GiB | pinned on the host, GiB | s/step | tokens/s | MFU |",
        "|---" * 9 + "|",
    ]
    for r in (r for name in series_of(results) for r in results if r.point.series == name and r.status == "ok"):
        if r.point.mode != "train" or r.peak_allocated_bytes is None:
            continue
        optional = [f"{b / GIB:.1f}" if b is not None else "–" for b in (r.peak_reserved_bytes, r.host_pinned_bytes)]
        predicted = ledger_of(r.point).peak(r.point.context, r.point.batch_size)
        cells = [
            r.point.series,
            f"{r.point.context:,}",
            f"{r.peak_allocated_bytes / GIB:.2f}",
            f"{predicted / GIB:.2f}",
        ]
        cells += [*optional, f"{r.seconds:.2f}", f"{r.tokens_per_second:,.0f}", f"{r.mfu:.1%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def slopes(results: list[Measurement]) -> str:
    """Markdown: bytes per token between neighbouring contexts of a series, and how far that goes in the device's memory.

    Series that fill free memory are named and left out.
    """
    lines = [
        "| series | between | measured, KiB/token | ledger, KiB/token | measured / ledger | longest, by this slope |",
        "|---" * 6 + "|",
    ]
    filling = []
    for name in series_of(results):
        ok = sorted((r for r in results if r.point.series == name and r.status == "ok"), key=lambda r: r.point.context)
        if len(ok) > 1 and ok[0].point.fills_memory:
            filling.append(name)
            continue
        for first, second in itertools.pairwise(ok):
            n1, n2 = first.point.context, second.point.context
            batch = first.point.batch_size
            measured = (second.peak_bytes - first.peak_bytes) / (n2 - n1) / batch
            of = ledger_of(first.point)
            predicted = (of.peak(n2, batch) - of.peak(n1, batch)) / (n2 - n1) / batch
            longest = "–"
            # Scores grow as n²: a straight line would promise too much.
            if measured > 0 and first.point.attn_implementation != "eager" and first.point.device == "cuda":
                room = environment.memory_limit("cuda") if second.memory_bytes is None else second.memory_bytes
                longest = f"{n2 + (room - second.peak_bytes - second.model_bytes) / measured / batch:,.0f}"
            ratio = f"{measured / predicted:.2f}" if predicted else "–"
            cells = [name, f"{n1:,} – {n2:,}", f"{measured / 2**10:,.0f}", f"{predicted / 2**10:,.0f}", ratio, longest]
            lines.append("| " + " | ".join(cells) + " |")
    parts = ["\n".join(lines) + "\n"] if len(lines) > 2 else []
    if filling:
        names = ", ".join(filling)
        parts.append(
            f"Left out: {names}. The patches fill free memory: a peak says how much there was, not what a token needs.\n"
        )
    return "\n".join(parts)


def styles(names: list[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker per series: the backend's own where it stands alone."""
    more = iter(MORE_STYLES * len(names))
    return {name: STYLES.get(name) or next(more) for name in names}


def draw(axes: Sequence[plt.Axes], results: list[Measurement]) -> None:
    """Two panels over the context length: peak memory above the loaded model, and tokens per second."""
    panels = (
        (axes[0], "peak memory above the loaded model, GiB", lambda r: r.peak_bytes / GIB),
        (axes[1], "training step, tokens per second", lambda r: r.tokens_per_second),
    )
    contexts = sorted({r.point.context for r in results})
    for axis, label, value in panels:
        for name, (color, marker) in styles(series_of(results)).items():
            ok = [r for r in results if r.point.series == name and r.status == "ok"]
            if not ok:
                continue
            x, y = [r.point.context for r in ok], [value(r) for r in ok]
            axis.plot(x, y, color=color, marker=marker, label=name, linewidth=2)
            # Only memory is named in the plot: what stopped for want of time says nothing about the series.
            others = [r for r in results if r.point.series == name and r.status != "ok"]
            if any(r.status == "out_of_memory" or "GiB" in r.reason for r in others):
                place = {"xytext": (8, -3), "textcoords": "offset points"}
                axis.annotate("then out of memory", (x[-1], y[-1]), color=color, size=8, **place)
        axis.margins(y=0.1)
        axis.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel=label)
        axis.set_xticks(contexts, [f"{c:,}" for c in contexts])
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda y, _: f"{y:g}"))
        axis.yaxis.set_minor_locator(matplotlib.ticker.LogLocator(subs=(2, 5)))
        axis.yaxis.set_minor_formatter(matplotlib.ticker.FuncFormatter(lambda y, _: f"{y:g}"))
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=8)


def draw_ledger(axis: plt.Axes, results: list[Measurement]) -> None:
    """The ledger's terms as stacked bars, each beside a bar of what was measured, at every series' longest context."""
    longest = {r.point.series: r for r in sorted(results, key=lambda r: r.point.context) if r.status == "ok"}
    colours: dict[str, str] = {}
    for i, r in enumerate(longest.values()):
        bottom = 0.0
        for term in ledger_of(r.point).live(r.point.context, r.point.batch_size):
            size = term.at(r.point.context, r.point.batch_size) / GIB
            if size < 0.005:
                continue
            is_new = term.name not in colours
            color = colours.setdefault(term.name, TERM_COLOURS[len(colours) % len(TERM_COLOURS)])
            hatch = "//" if list(colours).index(term.name) >= len(TERM_COLOURS) else None
            label = term.name if is_new else None
            axis.bar(i - 0.2, size, 0.38, bottom=bottom, color=color, hatch=hatch, label=label)
            bottom += size
        axis.bar(i + 0.2, r.peak_allocated_bytes / GIB, 0.38, color="white", edgecolor="black")
        axis.annotate("measured", (i + 0.2, 0), rotation=90, ha="center", va="bottom", size=8)
    labels = [f"{name}\n{r.point.context:,} tokens".replace("+", "+\n") for name, r in longest.items()]
    axis.set_xticks(range(len(labels)), labels, fontsize=7)
    axis.set(ylabel="peak memory, GiB: the ledger's terms, and measured")
    axis.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axis.grid(alpha=0.3, axis="y")


def plot(results: list[Measurement], path: Path, title: str) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(17, 5), layout="constrained")
    draw(axes[:2], results)
    draw_ledger(axes[2], results)
    figure.suptitle(title)
    # Without the library's version in the file, the same numbers give the same bytes.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def read(path: Path) -> tuple[list[Measurement], dict]:
    """The points and the document of a JSON file that ``write`` wrote."""
    document = json.loads(path.read_text())
    known = {f.name for f in dataclasses.fields(Measurement)}
    return [
        Measurement(**{k: v for k, v in p.items() if k in known} | {"point": Point(**p["point"])})
        for p in document["points"]
    ], document


def section(results: list[Measurement], document: dict) -> str:
    """Markdown: what was measured, the three tables, and where."""
    point = results[0].point
    what = description(point)
    parts = [
        f"{what}. Peak memory above the loaded model in GiB, time of a step in seconds; each point in its own process.\n",
        table(results),
    ]
    if point.sliding_window:
        parts.append(
            "flashmla's memory is that of full attention, its time is not: the window is there to save time.\n"
        )
    if any(r.status == "ok" and r.peak_allocated_bytes for r in results):
        source = next(r.peak_flops for r in results if r.status == "ok")
        is_first = any(r.status == "ok" and r.point.repeats == 0 and r.host_pinned_bytes for r in results)
        pinned = " Where one step was run, its time includes that of pinning the host memory." if is_first else ""
        parts += [
            f"Peak of everything, model and {'optimizer' if point.device == 'cuda' else 'process'} included, beside the "
            "ledger's prediction (`scripts/ledger.py`; patches that fill free memory are counted at their least). MFU: "
            f"(matrix products: {4 if point.use_peft else 6} x parameters x tokens, attention: 3.5 x its forward over the "
            f"pairs of the mask; recomputation not counted) per second, of {source}.{pinned}\n",
            details(results),
        ]
    if rates := slopes(results):
        parts.append(f"Bytes of a further token.\n\n{rates}")
    # One line per device, set of versions and commit, of the last run there.
    runs = {(e["device"], str(e["versions"]), e["commit"]): environment.sentence(e) for e in document["environments"]}
    return "\n".join([*parts, *(f"{sentence}\n" for sentence in runs.values())])


def description(point: Point) -> str:
    trained = (
        f"LoRA ({'float32' if point.lora_dtype == 'float32' else point.dtype} adapter)" if point.use_peft else "full"
    )
    step = "forward, backward and AdamW" if point.optim != "none" else "forward and backward"
    is_limited = point.device == "cuda" and point.memory_limit
    limit = f", at most {point.memory_limit / GIB:.4g} GiB of the GPU" if is_limited else ""
    window = f", window of {point.sliding_window:,}" if point.sliding_window else ""
    return f"{point.model}{window}, batch {point.batch_size}, {point.dtype}, {trained}: {step}{limit}"


def write(results: list[Measurement], record: dict, output_dir: Path, name: str = "memory_report") -> list[Path]:
    """``NAME.json``, ``.md`` and ``.png`` in ``output_dir``; returns their paths.

    A measurement keeps the environment it was made in: one of an earlier run is not relabelled.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / f"{name}.json"
    environments: list[dict] = []
    points = []
    for r in results:
        made_in = r.environment or record
        if made_in not in environments:
            environments.append(made_in)
        points.append(r.as_dict() | {"environment": made_in})
    document = {"kind": "memory", "environment": record, "environments": environments, "points": points}
    # Written beside and renamed: a run that is killed here keeps the points of before.
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(unfinished, path)
    return [path, *render(results, document, path)]


def render(results: list[Measurement], document: dict, path: Path) -> list[Path]:
    """Table and plot beside the JSON file ``path``, with the ledger as it is now; returns their paths."""
    page, picture = path.with_suffix(".md"), path.with_suffix(".png")
    page.write_text(section(results, document))
    if not any(r.status == "ok" for r in results):
        return [page]
    plot(results, picture, f"{description(results[0].point)}\n{document['environment']['device']}")
    return [page, picture]


def parse_series(name: str, device: str, use_peft: bool) -> dict:
    """The fields of a Point that "flashmla+loss+checkpointing" or "sdpa+liger+gradient_checkpointing" stand for.

    Raises ValueError where a part is none of its kinds.
    """
    backend, *parts = name.split("+")
    own = ("liger", "gradient_checkpointing")
    patches, options = models.parse_patches([p for p in parts if p not in own], device, use_peft)
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
        settings["memory_limit"] = int(0.95 * environment.memory_available("cpu"))
    everywhere = settings.pop("gradient_checkpointing", False)
    kinds = [parse_series(name, device, settings.get("use_peft", Point.use_peft)) for name in series]
    for kind in kinds:
        if everywhere and not kind["gradient_checkpointing"] and "checkpointing" not in kind["patches"]:
            kind |= {"gradient_checkpointing": True, "series": f"{kind['series']}+gradient_checkpointing"}
    return [Point(model, context=context, **kind, **settings) for context in contexts for kind in kinds]


def main(argv: list[str] | None = None) -> None:
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
    parser.add_argument("--device", choices=("cpu", "cuda"), default=environment.default_device())
    parser.add_argument(
        "--gpu_memory", type=float, metavar="GIB",
        help="what torch may take of the GPU, to measure as if on a smaller one (79 GiB of an 80-GB card are usable)",
    )  # fmt: skip
    parser.add_argument(
        "--sliding_window", type=int, metavar="TOKENS",
        help="what a query of a random-weight model sees: flashmla needs full attention's memory and a fraction of its time",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the faster one here")
    parser.add_argument("--batch_size", type=at_least(1), default=1)
    parser.add_argument("--full", action="store_true", help="all weights are trained instead of LoRA")
    parser.add_argument(
        "--lora_dtype", choices=("float32", "auto"), default="float32", help="of the adapter; auto: the weights'"
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
    parser.add_argument("--output_dir", type=Path, default=environment.REPOSITORY / "results" / "memory_report")
    parser.add_argument("--name", default="memory_report", help="of the files; points in NAME.json are not repeated")
    parser.add_argument("--overwrite", action="store_true", help="measure again what NAME.json has")
    try:
        set_defaults(parser, sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        sys.exit(f"memory_report: {error}")
    args = parser.parse_args(argv)

    try:
        # Converts smollm2 once here, not in the first measured process.
        models.config_of(args.model, args.sliding_window)
        points = points_for(
            args.model,
            list(dict.fromkeys(args.series)),
            sorted(set(args.contexts or CONTEXTS[args.device])),
            device=args.device,
            dtype=args.dtype or environment.fastest_dtype(args.device),
            batch_size=args.batch_size,
            sliding_window=args.sliding_window,
            use_peft=not args.full,
            lora_dtype=args.lora_dtype,
            optim=args.optim,
            gradient_checkpointing=args.gradient_checkpointing,
            warmup=args.warmup,
            repeats=args.repeats,
            gpu_memory=args.gpu_memory,
        )
        ledger_of(points[0])
    except (models.NoModelError, ValueError) as error:
        sys.exit(f"memory_report: {error}")
    record = environment.describe(args.device)
    known = [] if args.overwrite else _known(args.output_dir / f"{args.name}.json", points[0], record)
    bar = tqdm(total=len(points), unit="point", desc="measuring")
    results: list[Measurement] = []
    wanted = {_key(point) for point in points}
    # Points of the file that this command does not name stay in it.
    others = [r for r in known if _key(r.point) not in wanted]
    order = {name: i for i, name in enumerate(dict.fromkeys(r.point.series for r in [*known, *map(_blank, points)]))}

    def keep(result: Measurement) -> None:
        if result.environment is None:
            result.environment = record
        results.append(result)
        bar.update()
        bar.write(describe(result))
        everything = sorted([*others, *results], key=lambda r: (r.point.context, order[r.point.series]))
        keep.paths = write(everything, record, args.output_dir, args.name)

    measure_all(points, args.time_limit, args.time_budget, keep, known)
    bar.close()
    print(f"\n{table(results)}\n{details(results)}\n{slopes(results)}\nwritten: {', '.join(map(str, keep.paths))}")
    failed = [r for r in results if r.status == "error"]
    if failed:
        sys.exit(f"memory_report: {len(failed)} points failed; first: {failed[0].point.label}: {failed[0].reason}")


def _blank(point: Point) -> Measurement:
    return Measurement(point, "skipped")


def _known(path: Path, point: Point, record: dict) -> list[Measurement]:
    """What ``path`` already holds, where it was measured on the same model and device; an error that says so otherwise."""
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
