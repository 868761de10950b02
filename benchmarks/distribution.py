"""What a run over random shapes says: the distribution of our rate over the best peer's, worst shape first, with reasons."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import render_results
import verdicts
from verdicts import Bar, Row, geometric_mean

LOW, LOWER = 0.97, 0.95
MOST_LOWER = 0.05  # of the shapes may be below LOWER
AIMS = {"fwd": 1.03, "bwd": 1.05}


@dataclass(frozen=True)
class Distribution:
    """One direction: (ratio to the best other peer, row), the worst first."""

    mode: str
    ratios: list[tuple[float, Row]]

    @property
    def mean(self) -> float:
        return geometric_mean([ratio for ratio, _ in self.ratios])

    def share_below(self, limit: float) -> float:
        return sum(ratio < limit for ratio, _ in self.ratios) / len(self.ratios)


def distributions(document: dict) -> Iterator[Distribution]:
    """Of the directions that were measured, over shapes that we and some other peer have a number for."""
    for mode in ("fwd", "bwd"):
        rows = [row for row in verdicts.rows(document, mode) if row.ours and row.best_other]
        if rows:
            yield Distribution(mode, sorted(((row.ratio(row.best_other), row) for row in rows), key=lambda x: x[0]))


def bars(document: dict) -> Iterator[Bar]:
    if document["environment"]["device_type"] != "cuda":
        return
    seeds = ", ".join(map(str, document["seeds"]))
    for found in distributions(document):
        below, count, aim = found.share_below(LOWER), len(found.ratios), AIMS[found.mode]
        lowest = found.ratios[0][0]
        yield Bar(
            f"{found.mode}: geometric mean ≥ 1.00× the best other peer, random shapes of seeds {seeds}",
            f"{found.mean:.3f}× over {count} shapes",
            found.mean >= 1.0,
        )
        yield Bar(
            f"{found.mode}: fewer than {MOST_LOWER:.0%} of them below {LOWER}×",
            f"{below:.0%}, lowest {lowest:.2f}×",
            below < MOST_LOWER,
        )
        yield Bar(
            f"{found.mode}, aim: geometric mean ≥ {aim:.2f}×, none below {LOW}×",
            f"{found.mean:.3f}×, {found.share_below(LOW):.0%} below",
            found.mean >= aim and lowest >= LOW,
        )


def reason(row: Row) -> str:
    """Why ours is not faster, by the model of its schedule."""
    schedule = (row.ours or {}).get("schedule")
    return schedule["reason"] if schedule else "no model of this kernel"


def _share_of_ceiling(row: Row, document: dict) -> str:
    return f"{row.ours['flops_per_second'] / document['matmul_flops_per_second'][row.shape.dtype]:.0%}"


def lines(document: dict) -> list[str]:
    """The same for a terminal."""
    said = []
    for found in distributions(document):
        said.append(
            f"{found.mode}: {len(found.ratios)} shapes, geometric mean {found.mean:.3f}× the best other peer, "
            f"{found.share_below(LOWER):.0%} below {LOWER}, {found.share_below(LOW):.0%} below {LOW}; worst first:"
        )
        for ratio, row in found.ratios:
            why = f"  {reason(row)}" if ratio < LOW else ""
            head = f"  {ratio:5.2f}× {row.best_other['peer']:<12} {row.shape!s:<44}"
            said.append(f"{head} {_share_of_ceiling(row, document):>4} of the matrix product{why}")
    return said


def section(document: dict) -> list[str]:
    """Markdown, for the page of results."""
    parts = []
    for found in distributions(document):
        parts.append(
            f"Random shapes of seeds {', '.join(map(str, document['seeds']))}, {found.mode}: flashmla / best other peer. "
            f"Geometric mean over {len(found.ratios)} shapes: {found.mean:.3f}×; {found.share_below(LOWER):.0%} below "
            f"{LOWER}×, {found.share_below(LOW):.0%} below {LOW}×. Reasons are those of a model of the kernel's schedule "
            "(`benchmarks/schedule_model.py`): factors on the time.\n"
        )
        table = [
            [
                f"{ratio:.2f}×",
                str(row.shape),
                row.best_other["peer"],
                render_results.rate(row.ours["flops_per_second"]),
                _share_of_ceiling(row, document),
                reason(row) if ratio < LOW else "",
            ]
            for ratio, row in found.ratios
        ]
        header = ["ratio", "shape", "best other", "flashmla", "of the matrix product", f"why, below {LOW}×"]
        parts.append(render_results.table(header, table))
    return parts
