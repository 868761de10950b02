"""Peak memory and time of a training step against context length, one process per point: JSON, plot and Markdown table.

    python scripts/memory_report.py                                  # SmolLM2-135M; eager, sdpa, flashmla
    python scripts/memory_report.py --model llama-8b --backends sdpa flashmla --gradient_checkpointing
    python scripts/memory_report.py --model FOLDER --contexts 1024 2048 4096 --output_dir results/mine

A point that would not fit in the machine's memory, or take longer than --time_limit, is not begun; the table says so.
What it would need is extrapolated from the shorter contexts of the same backend, as a*n + b*n².
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import environment
import matplotlib
import measure_model
import models
from measure_model import GIB, Measurement, Point
from tqdm import tqdm

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BACKENDS = ("flashmla", "sdpa", "eager")  # where time is short, the last is left out
CONTEXTS = {"cpu": (512, 1024, 2048, 4096), "cuda": (2048, 4096, 8192, 16384, 32768, 65536)}
# Colours and markers that also differ for colour-blind readers and in print.
STYLES = {"eager": ("#D55E00", "s"), "sdpa": ("#0072B2", "^"), "flashmla": ("#009E73", "o")}


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
    points: list[Point], time_limit: float, time_budget: float | None, on_result: Callable[[Measurement], None]
) -> list[Measurement]:
    """Measures ``points`` (contexts ascending within a backend), skipping what cannot fit or comes too late."""
    results: list[Measurement] = []
    started = time.monotonic()
    for point in points:
        result = _skip(point, results, time_limit, time_budget and time_budget - (time.monotonic() - started))
        if result is None:
            result = measure_model.in_subprocess(point, _timeout(point, time_limit))
        results.append(result)
        on_result(result)
    return results


def _timeout(point: Point, time_limit: float) -> float:
    # Starting Python and building the model are not the step's; billions of random weights take their time.
    return 90 + (2 + point.repeats) * time_limit


def _skip(point: Point, results: list[Measurement], time_limit: float, time_left: float | None) -> Measurement | None:
    def skip(reason: str) -> Measurement:
        return Measurement(point, "skipped", reason)

    mine = [r for r in results if r.point.attn_implementation == point.attn_implementation]
    failed = next((r for r in mine if r.status != "ok" and r.point.context < point.context), None)
    if failed is not None:
        return skip(f"{failed.point.context} tokens: {failed.status.replace('_', ' ')}")
    ok = [r for r in mine if r.status == "ok"]
    peak = extrapolated([(r.point.context, r.peak_bytes) for r in ok], point.context)
    seconds = extrapolated([(r.point.context, r.seconds) for r in ok], point.context)
    if peak is not None:
        needed = peak + ok[-1].model_bytes
        # On a GPU another process's memory counts too; on a CPU the rest of the machine needs some.
        available = 0.92 * environment.memory_available(point.device)
        if needed > available:
            return skip(f"would take about {needed / GIB:.0f} GiB of {available / GIB:.0f} available")
        if seconds > time_limit:
            return skip(f"would take about {seconds:.0f} s per step")
        if time_left is not None and seconds * (1 + point.repeats) > time_left:
            return skip(f"would take about {seconds * (1 + point.repeats):.0f} s of {max(time_left, 0):.0f} left")
    if time_left is not None and time_left < 5:
        return skip("the time budget is used up")
    return None


# ---------------------------------------------------------------- what is written


def table(results: list[Measurement]) -> str:
    """Markdown: a row per context, peak memory and step time per backend."""
    backends = list(dict.fromkeys(r.point.attn_implementation for r in results))
    cells = {(r.point.context, r.point.attn_implementation): r for r in results}
    lines = ["| tokens | " + " | ".join(f"{b}: GiB | {b}: s/step" for b in backends) + " |"]
    lines.append("|---" * (1 + 2 * len(backends)) + "|")
    notes = []
    for context in sorted({r.point.context for r in results}):
        row = [f"{context:,}"]
        for backend in backends:
            result = cells.get((context, backend))
            if result is not None and result.status == "ok":
                row += [f"{result.peak_bytes / GIB:.2f}", f"{result.seconds:.2f}"]
            else:
                row += ["–", "–"]
                if result is not None:
                    notes.append(f"{backend} at {context:,}: {result.status.replace('_', ' ')}: {result.reason}")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n" + "".join(f"\n- {note}" for note in notes) + ("\n" if notes else "")


def draw(axes: Sequence[plt.Axes], results: list[Measurement]) -> None:
    """Two panels over the context length: peak memory above the loaded model, and seconds per step."""
    panels = (
        (axes[0], "peak memory above the loaded model, GiB", lambda r: r.peak_bytes / GIB),
        (axes[1], "forward and backward, seconds", lambda r: r.seconds),
    )
    contexts = sorted({r.point.context for r in results})
    for axis, label, value in panels:
        for backend in dict.fromkeys(r.point.attn_implementation for r in results):
            color, marker = STYLES.get(backend, (None, "d"))
            ok = [r for r in results if r.point.attn_implementation == backend and r.status == "ok"]
            if not ok:
                continue
            x, y = [r.point.context for r in ok], [value(r) for r in ok]
            axis.plot(x, y, color=color, marker=marker, label=backend, linewidth=2)
            # Only memory is named in the plot: what stopped for want of time says nothing about the backend.
            others = [r for r in results if r.point.attn_implementation == backend and r.status != "ok"]
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
    axes[0].legend()


def plot(results: list[Measurement], path: Path, title: str) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    draw(axes, results)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write(results: list[Measurement], record: dict, output_dir: Path) -> list[Path]:
    """``memory_report.json``, ``.md`` and ``.png`` in ``output_dir``; returns their paths."""
    output_dir.mkdir(parents=True, exist_ok=True)
    paths = [output_dir / f"memory_report.{suffix}" for suffix in ("json", "md", "png")]
    document = {"environment": record, "points": [r.as_dict() for r in results]}
    paths[0].write_text(json.dumps(document, indent=1) + "\n")
    point = results[0].point
    what = (
        f"{point.model}, batch {point.batch_size}, {point.dtype}, {'LoRA' if point.use_peft else 'full'}"
        f"{', activation checkpointing' if point.gradient_checkpointing else ''}: forward and backward"
    )
    paths[1].write_text(
        f"{what}. Peak memory above the loaded model in GiB, time of a step in seconds; each point in its own "
        "process.\n\n"
        f"{table(results)}\n{environment.sentence(record)}\n"
    )
    if any(r.status == "ok" for r in results):
        plot(results, paths[2], f"{what}\n{record['device']}")
    return [path for path in paths if path.exists()]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = f"smollm2 (real weights), {', '.join(models.SHAPES)} (random weights), or a folder"
    parser.add_argument("--model", default="smollm2", help=names)
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), metavar="NAME", help="attn_implementation")
    parser.add_argument("--contexts", nargs="+", type=int, metavar="TOKENS", help="default: by device")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=environment.default_device())
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the faster one here")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--full", action="store_true", help="gradients of all weights instead of LoRA")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--repeats", type=int, default=2, help="timed steps per point, after a first one")
    parser.add_argument(
        "--time_limit", type=float, default=120, metavar="S", help="longest step to attempt, in seconds"
    )
    parser.add_argument("--time_budget", type=float, metavar="S", help="begin no point after this many seconds")
    parser.add_argument("--output_dir", type=Path, default=environment.REPOSITORY / "results" / "memory_report")
    args = parser.parse_args(argv)

    if args.model == "smollm2":
        try:
            models.smollm2_folder()  # converted once here, not in the first measured process
        except models.NoModelError as error:
            sys.exit(f"memory_report: {error}")
    points = points_for(
        args.model,
        args.backends,
        sorted(args.contexts or CONTEXTS[args.device]),
        device=args.device,
        dtype=args.dtype or environment.fastest_dtype(args.device),
        batch_size=args.batch_size,
        use_peft=not args.full,
        gradient_checkpointing=args.gradient_checkpointing,
        repeats=args.repeats,
    )
    bar = tqdm(total=len(points), unit="point", desc="measuring")

    def show(result: Measurement) -> None:
        bar.update()
        bar.write(describe(result))

    results = measure_all(points, args.time_limit, args.time_budget, show)
    bar.close()
    paths = write(results, environment.describe(args.device), args.output_dir)
    print(f"\n{table(results)}\nwritten: {', '.join(map(str, paths))}")
    failed = [r for r in results if r.status == "error"]
    if failed:
        sys.exit(f"memory_report: {len(failed)} points failed; first: {failed[0].point.label}: {failed[0].reason}")


def points_for(model: str, backends: list[str], contexts: list[int], **settings) -> list[Point]:
    """Contexts ascending, backends side by side within each: a machine that slows down slows all of them."""
    if settings["device"] == "cpu":
        # The margin is for the system; past it an allocation fails in the child alone.
        settings["memory_limit"] = int(0.95 * environment.memory_available("cpu"))
    return [Point(model, backend, context, **settings) for context in contexts for backend in backends]


def describe(result: Measurement) -> str:
    label = f"{result.point.attn_implementation:>9} {result.point.context:>7,} tokens: "
    if result.status != "ok":
        return f"{label}{result.status.replace('_', ' ')}: {result.reason}"
    return f"{label}{result.peak_bytes / GIB:6.2f} GiB, {result.seconds:7.2f} s"


if __name__ == "__main__":
    main()
