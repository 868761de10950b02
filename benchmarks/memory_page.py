"""The pages of memory_report.py: JSON, Markdown tables and plots of its measurements, beside the ledger's prediction."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import models
import records
from measure_model import Measurement, Point

from flashmla_hf.host_memory import GIB
from flashmla_hf.training import machine
from flashmla_hf.training.ledger import Ledger, build_ledger
from flashmla_hf.training.shape import Shape

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Colours and markers that also differ for colour-blind readers and in print (Okabe and Ito).
STYLES = {"eager": ("#D55E00", "s"), "sdpa": ("#0072B2", "^"), "flashmla": ("#009E73", "o")}
MORE_STYLES = (("#CC79A7", "d"), ("#E69F00", "v"), ("#56B4E9", "P"), ("#000000", "X"), ("#999999", "*"))
TERM_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999", "#000000")


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


def ledger_of(point: Point) -> Ledger:
    return build_ledger(Shape.of(models.config_of(point.model, point.sliding_window)), point.switches())


def details(results: list[Measurement]) -> str:
    """Markdown: a row per measured point, with the ledger's prediction beside it."""
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
            ledger = ledger_of(first.point)
            predicted = (ledger.peak(n2, batch) - ledger.peak(n1, batch)) / (n2 - n1) / batch
            longest = "–"
            # Scores grow as n²: a straight line would promise too much.
            if measured > 0 and first.point.attn_implementation != "eager" and first.point.device == "cuda":
                room = machine.memory_limit("cuda") if second.memory_bytes is None else second.memory_bytes
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
    """Colour and marker per series: the backend's own if it stands alone."""
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
            # The plot names memory alone: a series that stopped for want of time is not limited by itself.
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
    """The ledger's terms as stacked bars, each beside a bar of the measured peak, at every series' longest context."""
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
    """Markdown: the measured settings, the three tables, and the machines."""
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
        pinned = " If one step was run, its time includes that of pinning the host memory." if is_first else ""
        parts += [
            f"Peak of everything, model and {'optimizer' if point.device == 'cuda' else 'process'} included, beside the "
            "ledger's prediction (`flashmla ledger`; patches that fill free memory are counted at their least). MFU: "
            f"(matrix products: {4 if point.use_peft else 6} x parameters x tokens, attention: 3.5 x its forward over the "
            f"pairs of the mask; recomputation not counted) per second, of {source}.{pinned}\n",
            details(results),
        ]
    if rates := slopes(results):
        parts.append(f"Bytes of a further token.\n\n{rates}")
    # One line per device, set of versions and commit, of the last run there.
    runs = {(e["device"], str(e["versions"]), e["commit"]): records.sentence(e) for e in document["environments"]}
    return "\n".join([*parts, *(f"{sentence}\n" for sentence in runs.values())])


def description(point: Point) -> str:
    no_autocast = "" if point.has_autocast else ", no autocast"
    trained = (
        f"{'Q' * point.load_in_4bit}LoRA ({'float32' if point.lora_dtype == 'float32' else point.dtype} adapter{no_autocast})"
        if point.use_peft
        else "full"
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
    path = output_dir / f"{name}.json"
    environments: list[dict] = []
    points = []
    for r in results:
        made_in = r.environment or record
        if made_in not in environments:
            environments.append(made_in)
        points.append(r.as_dict() | {"environment": made_in})
    document = {"kind": "memory", "environment": record, "environments": environments, "points": points}
    records.write_json(document, path)
    return [path, *render(results, document, path)]


def render(results: list[Measurement], document: dict, path: Path) -> list[Path]:
    """Table and plot beside the JSON file ``path``, with the ledger as it is now; returns their paths."""
    page, picture = path.with_suffix(".md"), path.with_suffix(".png")
    page.write_text(section(results, document))
    if not any(r.status == "ok" for r in results):
        return [page]
    plot(results, picture, f"{description(results[0].point)}\n{document['environment']['device']}")
    return [page, picture]
