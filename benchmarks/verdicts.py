"""What a benchmark run is held against: rows of one shape, ratios to the peers, and the bars that a GPU run must meet."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from decode_shapes import DecodeShape
from shapes import Shape

DIRECTIONS = ("fwd", "bwd", "fwd+bwd")
CUDNN_AT_LEAST = 0.97  # times cuDNN's rate, on every shape of LONG tokens or more
BEST_AT_LEAST = 0.95  # times the best other peer's rate: geometric mean
# Times the best other peer's rate: geometric mean, and each shape.
AIMS = {"fwd": (1.05, 0.97), "bwd": (1.10, 1.00), "fwd+bwd": (1.05, 0.97)}
RAGGED_AT_LEAST = 0.90  # times the equal-length batch's rate
DETERMINISTIC = "-deterministic"  # ends the name of a peer that is another with reproducible gradients
DETERMINISTIC_AT_MOST, DETERMINISTIC_FROM = 1.20, 2048  # times the default's time; tokens
LONG = 1024


@dataclass(frozen=True)
class Row:
    """One shape in one mode: every peer's record, ours and the best of the others."""

    shape: Shape | DecodeShape
    records: dict[str, dict]

    @property
    def ours(self) -> dict | None:
        return next((r for peer, r in self.records.items() if peer.startswith("flashmla")), None)

    @property
    def best_other(self) -> dict | None:
        others = [r for peer, r in self.records.items() if not peer.startswith("flashmla")]
        return min(others, key=lambda r: r["seconds"], default=None)

    def ratio(self, other: dict | None) -> float | None:
        """How many times faster ours is."""
        return other["seconds"] / self.ours["seconds"] if self.ours and other else None

    @property
    def is_judged(self) -> bool:
        """The shapes the bars speak of: dense, without a window, of 1k tokens or more."""
        return not self.shape.is_packed and self.shape.window is None and self.shape.seqlen_q >= LONG


def rows(document: dict, mode: str) -> list[Row]:
    """The shapes of one mode that have a number."""
    found: dict[str, dict[str, dict]] = {}
    for r in document["records"]:
        if r["mode"] == mode and r["status"] == "ok":
            found.setdefault(r["shape"], {})[r["peer"]] = r
    # Ours is the peer named first in the whole run, if it has a number.
    order = list(dict.fromkeys(r["peer"] for r in document["records"]))
    parse = DecodeShape.parse if document["kind"] == "decode" else Shape.parse
    return [
        Row(parse(text), {peer: by_peer[peer] for peer in order if peer in by_peer}) for text, by_peer in found.items()
    ]


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


@dataclass(frozen=True)
class Bar:
    what: str
    measured: str
    met: bool | None  # None: stated, not judged


def bars(document: dict) -> Iterator[Bar]:
    """The bars of a GPU run, as far as it measured them."""
    if document["environment"]["device_type"] != "cuda":
        return
    yield from _peer_bars(document)
    yield from _host_bars(document)
    yield from _layout_bars(document)
    yield from _deterministic_bars(document)


def _peer_bars(document: dict) -> Iterator[Bar]:
    for mode in DIRECTIONS:
        judged = [row for row in rows(document, mode) if row.is_judged and row.ours]
        to_cudnn = [row.ratio(row.records["sdpa-cudnn"]) for row in judged if "sdpa-cudnn" in row.records]
        to_best = [row.ratio(row.best_other) for row in judged if row.best_other]
        if to_cudnn:
            below = sum(ratio < CUDNN_AT_LEAST for ratio in to_cudnn)
            yield Bar(
                f"{mode}: at least cuDNN on every shape of ≥ 1k tokens (3 % noise allowed)",
                f"{below} of {len(to_cudnn)} shapes below {CUDNN_AT_LEAST}×, lowest {min(to_cudnn):.2f}×, "
                f"geometric mean {geometric_mean(to_cudnn):.2f}×",
                below == 0,
            )
        if to_best:
            mean, lowest = geometric_mean(to_best), min(to_best)
            aim, none_below = AIMS[mode]
            yield Bar(
                f"{mode}: geometric mean ≥ {BEST_AT_LEAST}× the best other peer",
                f"{mean:.3f}× over {len(to_best)} shapes",
                mean >= BEST_AT_LEAST,
            )
            yield Bar(
                f"{mode}, aim: geometric mean ≥ {aim:.2f}× the best other peer, none below {none_below:.2f}×",
                f"{mean:.3f}×, lowest {lowest:.2f}×, {sum(r < none_below for r in to_best)} below",
                mean >= aim and lowest >= none_below,
            )


def _host_bars(document: dict) -> Iterator[Bar]:
    for mode in ("host", "host+grad"):
        ratios = [row.ratio(row.records["sdpa"]) for row in rows(document, mode) if row.ours and "sdpa" in row.records]
        if ratios:
            yield Bar(
                f"{mode}: the eager call takes no longer than scaled_dot_product_attention's, ≤ 1k tokens",
                f"{', '.join(f'{1 / ratio:.2f}×' for ratio in ratios)} its time",
                min(ratios) >= 1.0,
            )


def _layout_bars(document: dict) -> Iterator[Bar]:
    for mode in DIRECTIONS:
        for shape, rates in varlen_rates(document, mode):
            mine = next((by_layout for peer, by_layout in rates.items() if peer.startswith("flashmla")), {})
            equal = mine.get("dense") or mine.get("packed")
            if equal and "ragged" in mine:
                yield Bar(
                    f"{mode}: ragged documents within 10 % of the equal-length batch's FLOP rate, {shape}",
                    f"{mine['ragged'] / equal:.2f}×",
                    mine["ragged"] / equal >= RAGGED_AT_LEAST,
                )
        for row, shares, tiles in window_ratios(document, mode):
            if row.ours and row.ours["peer"] in shares:
                yield Bar(
                    f"{mode}: a window of {row.shape.window:,} in {row.shape.seqlen_q:,} tokens takes time in proportion "
                    "to the tiles visited",
                    f"{shares[row.ours['peer']]:.3f} of causal's time for {tiles:.3f} of its tiles",
                    None,
                )


def _deterministic_bars(document: dict) -> Iterator[Bar]:
    for mode in DIRECTIONS:
        ratios = [
            ratio
            for row, peer, ratio in deterministic_ratios(document, mode)
            if peer.startswith("flashmla") and row.shape.seqlen_q >= DETERMINISTIC_FROM
        ]
        if ratios:
            yield Bar(
                f"{mode}: bitwise reproducible gradients take at most {DETERMINISTIC_AT_MOST:.2f}× the default's time, "
                f"≥ {DETERMINISTIC_FROM // 1024}k tokens",
                f"{min(ratios):.2f} to {max(ratios):.2f}× over {len(ratios)} shapes, "
                f"{sum(ratio > DETERMINISTIC_AT_MOST for ratio in ratios)} above",
                max(ratios) <= DETERMINISTIC_AT_MOST,
            )


def deterministic_ratios(document: dict, mode: str) -> list[tuple[Row, str, float]]:
    """Per shape and peer with reproducible gradients: the time over that of the same peer without."""
    return [
        (row, peer, record["seconds"] / row.records[plain]["seconds"])
        for row in rows(document, mode)
        for peer, record in row.records.items()
        if mode != "fwd" and peer.endswith(DETERMINISTIC) and (plain := peer.removesuffix(DETERMINISTIC)) in row.records
    ]


def lines(held: Iterable[Bar]) -> list[str]:
    word = {True: "pass", False: "FAIL", None: "    "}
    return [f"{word[bar.met]}  {bar.what}: {bar.measured}" for bar in held]


def varlen_rates(document: dict, mode: str) -> list[tuple[str, dict[str, dict[str, float]]]]:
    """Per packed shape (in words): FLOP/s per peer and layout."""
    groups: dict[Shape, dict[str, dict[str, float]]] = {}
    for row in rows(document, mode):
        rates = groups.setdefault(dataclasses.replace(row.shape, layout="dense"), {})
        for peer, record in row.records.items():
            rates.setdefault(peer, {})[row.shape.layout] = record["flops_per_second"]
    return [(str(shape), rates) for shape, rates in groups.items() if any("ragged" in r for r in rates.values())]


def window_ratios(document: dict, mode: str) -> list[tuple[Row, dict[str, float], float]]:
    """Per windowed shape: each peer's time as a share of its time for plain causal, and the share of tiles visited."""
    tile = document.get("window_tile", [128, 128])
    all_rows = rows(document, mode)
    causal = {row.shape: row for row in all_rows if row.shape.window is None}
    result = []
    for row in all_rows:
        whole = causal.get(dataclasses.replace(row.shape, window=None))
        if row.shape.window is not None and whole is not None:
            shares = {
                peer: record["seconds"] / whole.records[peer]["seconds"]
                for peer, record in row.records.items()
                if peer in whole.records
            }
            result.append((row, shares, row.shape.tiles_visited(*tile) / whole.shape.tiles_visited(*tile)))
    return result
