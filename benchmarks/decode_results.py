"""What a run of bench_decode.py is held against, and its part of RESULTS.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import render_results
from decode_shapes import (
    EXPANDED,
    FP8_LONG,
    LATENT_ARITHMETIC,
    LATENT_MEMORY,
    LATENT_SMALL,
    PAGE_SIZES,
    TABLE,
    DecodeShape,
)  # fmt: skip
from verdicts import Bar, Row, geometric_mean, rows

BEST_AT_LEAST = 0.97  # times the best peer's rate, on each row of the table
# Of the machine's own rates, of caches of LARGE bytes and more.
MEMORY_AT_LEAST, MEMORY_AIM, LARGE = 0.92, 0.95, 64 * 10**6
PAGED_AT_LEAST = 0.95  # times our rate without pages
RAGGED_AT_LEAST = 0.90  # times our rate with equal lengths
WINDOW_AT_LEAST = 0.90  # times our rate of a cache that holds no more than the window
# Latents: bytes and FLOPs per second, at least and the aim (FlashMLA publishes the aims for an H800); times the expanded way.
LATENT_BYTES, LATENT_FLOPS, LATENT_GAIN = (2700e9, 3000e9), (550e12, 660e12), 1.3
FP8_GAIN = 1.7  # of fp8 caches over those of 16 bits
OURS = "flashmla"


def rates(document: dict, peer: str = OURS) -> dict[DecodeShape, float]:
    """Bytes per second of a peer's shapes in graphs."""
    return {row.shape: row.records[peer]["bytes_per_second"] for row in rows(document, "graph") if peer in row.records}


def paged_ratios(document: dict) -> dict[DecodeShape, float]:
    """Of each shape with pages: our rate over that without."""
    mine = rates(document)
    pairs = [
        (shape, dataclasses.replace(shape, layout="dense"))
        for shape in mine
        if shape.page_size and not (shape.is_ragged or shape.is_latent or shape.is_e4m3)
    ]
    return {shape: mine[shape] / mine[dense] for shape, dense in pairs if dense in mine}


def ragged_ratios(document: dict) -> dict[DecodeShape, float]:
    """Of each ragged shape: our rate over that of as many sequences of equal lengths."""
    mine = rates(document)
    pairs = [(shape, dataclasses.replace(shape, is_ragged=False)) for shape in mine if shape.is_ragged]
    return {shape: mine[shape] / mine[equal] for shape, equal in pairs if equal in mine}


def window_ratios(document: dict) -> dict[DecodeShape, float]:
    """Of each shape with a window: our rate over that of a cache that ends where the window does."""
    mine = rates(document)
    pairs = [
        (shape, dataclasses.replace(shape, window=None, seqlen_kv=shape.window + shape.seqlen_q))
        for shape in mine
        if shape.window is not None
    ]
    return {shape: mine[shape] / mine[short] for shape, short in pairs if short in mine}


def table_rows(document: dict) -> list[Row]:
    """Those of the nine rows that have a number of ours and of a peer."""
    return [row for row in rows(document, "graph") if row.shape in TABLE and row.ours and row.best_other]


def bars(document: dict) -> Iterator[Bar]:
    """The bars of a GPU run, as far as it measured them."""
    if document["environment"]["device_type"] != "cuda":
        return
    judged = {row.shape: row.ratio(row.best_other) for row in table_rows(document)}
    if judged:
        below = [f"{shape} {ratio:.3f}×" for shape, ratio in judged.items() if ratio < BEST_AT_LEAST]
        yield Bar(
            f"the table: at least {BEST_AT_LEAST}× the best peer's rate on each of {len(TABLE)} rows",
            f"{len(judged)} rows, {len(below)} below, lowest {min(judged.values()):.3f}×, geometric mean "
            f"{geometric_mean([*judged.values()]):.3f}×" + (f"; {'; '.join(below)}" if below else ""),
            not below and len(judged) == len(TABLE),
        )
    others = [
        row.ratio(row.best_other)
        for row in rows(document, "graph")
        if row.shape not in TABLE
        and row.shape.window is None
        and row.shape.seqlen_q == 1
        and row.ours
        and row.best_other
    ]
    if others:
        yield Bar(
            f"one query, other shapes and layouts: at least {BEST_AT_LEAST}× the best peer's rate",
            f"{sum(ratio < BEST_AT_LEAST for ratio in others)} of {len(others)} below, lowest {min(others):.3f}×, geometric "
            f"mean {geometric_mean(others):.3f}×",
            min(others) >= BEST_AT_LEAST,
        )
    yield from _memory_bars(document)
    yield from _layout_bars(document)
    yield from _latent_bars(document)
    yield from _fp8_bars(document)
    yield from _host_bars(document)
    yield from _stated(document)


def _memory_bars(document: dict) -> Iterator[Bar]:
    large = {shape: rate for shape, rate in rates(document).items() if shape.bytes_read() >= LARGE and shape in TABLE}
    for name, key in (("a copy's", "copy_bytes_per_second"), ("a pure read's", "read_bytes_per_second")):
        if large:
            shares = {shape: rate / document[key] for shape, rate in large.items()}
            least = min(shares, key=shares.__getitem__)
            yield Bar(
                f"the table, {LARGE // 10**6} MB of K and V and more: {MEMORY_AT_LEAST:.0%} of {name} bandwidth "
                f"({document[key] / 1e9:,.0f} GB/s), aim {MEMORY_AIM:.0%}",
                f"{sum(share >= MEMORY_AIM for share in shares.values())} of {len(shares)} rows reach the aim, "
                f"{sum(share < MEMORY_AT_LEAST for share in shares.values())} miss the bar, lowest {shares[least]:.1%} "
                f"({least})",
                shares[least] >= MEMORY_AT_LEAST,
            )
    copies = {int(size): seconds for size, seconds in document.get("copy_seconds_of_bytes", {}).items()}
    # Of rows that miss the bar: what a copy of their size gets. (A longer one in a graph is slower than by itself.)
    missing = [shape for shape in large if large[shape] < MEMORY_AT_LEAST * document["copy_bytes_per_second"]]
    sizes = {shape: shape.bytes_read() for shape in missing if shape.bytes_read() in copies}
    if short := {shape: large[shape] / size * copies[size] for shape, size in sizes.items()}:
        yield Bar(
            "those that miss it: rate over that of a copy of as many bytes, in a graph as ours",
            ", ".join(
                f"{shape.batch} × {shape.seqlen_kv:,} d{shape.head_dim_qk} {ratio:.2f}×"
                for shape, ratio in short.items()
            ),
            None,
        )


def _layout_bars(document: dict) -> Iterator[Bar]:
    paged = paged_ratios(document)
    for size in PAGE_SIZES:
        mine = {shape: ratio for shape, ratio in paged.items() if shape.page_size == size}
        if mine:
            least = min(mine, key=mine.__getitem__)
            yield Bar(
                f"pages of {size} in random order: at least {PAGED_AT_LEAST}× the rate without pages",
                f"lowest {mine[least]:.3f}× ({least}), geometric mean {geometric_mean([*mine.values()]):.3f}× over {len(mine)}",
                mine[least] >= PAGED_AT_LEAST,
            )
    for shape, ratio in ragged_ratios(document).items():
        yield Bar(
            f"{shape}, {min(shape.lengths()):,} to {max(shape.lengths()):,} keys: at least {RAGGED_AT_LEAST}× the rate of "
            "equal lengths",
            f"{ratio:.3f}×",
            ratio >= RAGGED_AT_LEAST,
        )
    for shape, ratio in window_ratios(document).items():
        yield Bar(
            f"a window of {shape.keys_read():,} of {shape.seqlen_kv:,} keys: at least {WINDOW_AT_LEAST}× the rate of a cache "
            "of as many",
            f"{ratio:.3f}×",
            ratio >= WINDOW_AT_LEAST,
        )


def _latent_bars(document: dict) -> Iterator[Bar]:
    records = {row.shape: row.ours for row in rows(document, "graph") if row.ours}
    groups = (
        ([LATENT_MEMORY], "bytes_per_second", 1e9, "GB/s", LATENT_BYTES),
        (LATENT_ARITHMETIC, "flops_per_second", 1e12, "TFLOP/s", LATENT_FLOPS),
    )
    for shapes, quantity, factor, unit, (least, aim) in groups:
        for layout in ("dense", "paged64"):
            for shape in (dataclasses.replace(shape, layout=layout) for shape in shapes):
                if shape in records:
                    value = records[shape][quantity]
                    yield Bar(
                        f"{shape}: at least {least / factor:,.0f} {unit}, aim {aim / factor:,.0f}",
                        f"{value / factor:,.0f} {unit}",
                        value >= least,
                    )
    for shape, expanded in zip(LATENT_SMALL, EXPANDED, strict=True):
        if shape in records and expanded in records:
            gain = records[expanded]["seconds"] / records[shape]["seconds"]
            yield Bar(
                f"{shape}: at least {LATENT_GAIN}× the speed of our kernel on expanded keys ({expanded})",
                f"{gain:.2f}×",
                gain >= LATENT_GAIN,
            )


def _fp8_bars(document: dict) -> Iterator[Bar]:
    for row in rows(document, "graph"):
        if row.shape.is_e4m3 and row.ours and "flashmla-fp8" in row.records:
            gain = row.ours["seconds"] / row.records["flashmla-fp8"]["seconds"]
            is_judged = dataclasses.replace(row.shape, layout="dense", is_e4m3=False) == FP8_LONG
            least = f"at least {FP8_GAIN}× " if is_judged else ""
            yield Bar(
                f"{row.shape}: {least}the speed of our kernel on the same numbers in 16 bits",
                f"{gain:.2f}×",
                gain >= FP8_GAIN if is_judged else None,
            )


def _host_bars(document: dict) -> Iterator[Bar]:
    for row in rows(document, "host"):
        if row.ours and "sdpa" in row.records:
            ratio = row.ratio(row.records["sdpa"])
            yield Bar(
                f"{row.shape}: a call takes the host no longer than scaled_dot_product_attention's",
                f"{row.ours['seconds'] * 1e6:.1f} µs, {1 / ratio:.2f}× its time",
                ratio >= 1.0,
            )


def _stated(document: dict) -> Iterator[Bar]:
    mine, invariant = rates(document), rates(document, "flashmla-invariant")
    both = {shape: invariant[shape] / mine[shape] for shape in mine if shape in invariant}
    if both:
        yield Bar(
            "num_splits=1 (the same bits whatever else is in the batch): its rate over the default's",
            ", ".join(f"{shape.batch} × {shape.seqlen_kv:,} {ratio:.2f}×" for shape, ratio in both.items()),
            None,
        )
    for shape in mine:
        one = dataclasses.replace(shape, seqlen_q=1)
        if shape.seqlen_q > 1 and one in mine:
            yield Bar(
                f"{shape.seqlen_q} queries to {shape.batch} × {shape.seqlen_kv:,} keys: time over one query's",
                f"{mine[one] / mine[shape]:.2f}×",
                None,
            )


def section(document: dict) -> str:
    """The bars of the run, then GB/s and µs of every shape, and host times."""
    peers = list(dict.fromkeys(r["peer"] for r in document["records"]))
    copy, read = (document[key] / 1e9 for key in ("copy_bytes_per_second", "read_bytes_per_second"))
    parts = [
        f"Memory: a copy of 1 GiB {copy:,.0f} GB/s (read and written), a pure read {read:,.0f} GB/s"
        f"{render_results.gpu_text(document)}. GB/s count the bytes of K and V that a query sees, each once. Times are those "
        "of calls in a CUDA graph, by turns; K and V rotate over 400 MB, so that no cache holds them. Every result was checked "
        "against float64 on a slice. A window is named by the keys to the left of a query's own.\n",
        *render_results.bar_table(bars(document)),
    ]
    if here := rows(document, "graph"):
        parts += [_rate_table(here, peers, document)]
    if here := rows(document, "host"):
        parts += render_results.host_table(here, "host", peers)
    return "\n".join(parts + render_results.without_number(document))


def _rate_table(here: list[Row], peers: list[str], document: dict) -> str:
    shown = [peer for peer in peers if any(peer in row.records for row in here)]
    ratios = {**paged_ratios(document), **ragged_ratios(document), **window_ratios(document)}
    lines = []
    for row in here:
        cells = [f"{row.shape.bytes_read() / 1e6:,.0f}"]
        for peer in shown:
            r = row.records.get(peer)
            flops = f", {render_results.rate(r['flops_per_second'])}" if r and "flops_per_second" in r else ""
            cells.append(f"{r['bytes_per_second'] / 1e9:,.0f} ({r['seconds'] * 1e6:,.1f}{flops})" if r else "–")
        best, mine = row.best_other, row.ours
        cells.append(f"{row.ratio(best):.3f}× ({best['peer']})" if best and mine else "–")
        cells.append(f"{mine['bytes_per_second'] / document['read_bytes_per_second']:.0%}" if mine else "–")
        cells.append(f"{ratios[row.shape]:.3f}×" if row.shape in ratios else "–")
        lines.append([str(row.shape), *cells])
    header = ["shape", "MB", *(f"{peer}: GB/s (µs)" for peer in shown), "flashmla / best other", "of a pure read"]
    return render_results.table([*header, "of dense, equal, as short a cache"], lines)


def plots(document: dict, path: Path) -> list[Path]:
    ceilings = {
        "copy, read and written": document["copy_bytes_per_second"], "pure read": document["read_bytes_per_second"]
    }  # fmt: skip
    quantity = render_results.Quantity("bytes_per_second", "GB/s of K and V", 1e9, ceilings)
    return render_results.plots(document, path, ("graph",), quantity)
