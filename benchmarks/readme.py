"""Writes the measured numbers of README.md and docs/install.md, and the figure, from the committed results: `make readme`.

docs/distributed.md gets the ledger's predictions (cluster_plan.py, distributed_predictions.py) between the markers
`<!-- predicted NAME -->` and `<!-- /predicted -->`.

The text between the markers `<!-- measured NAME -->` and `<!-- /measured -->` is this program's, and so is
docs/memory.png. With --check it changes nothing and fails if a text is out of date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import cluster_plan
import decode_results
import distributed_predictions
import inference_results
import install_time
import memory_page
import records
from measure_model import Measurement
from memory_page import ledger_of
from verdicts import geometric_mean, rows

from flashmla_hf.host_memory import GIB

plt = memory_page.plt
README = records.REPOSITORY / "README.md"
INSTALL = records.REPOSITORY / "docs" / "install.md"
DISTRIBUTED = records.REPOSITORY / "docs" / "distributed.md"
FIGURE = records.REPOSITORY / "docs" / "memory.png"
MEMORY = "memory-llama-8b-h200.json"
ATTENTION = "attention-h200-sm90.json"
DECODE = "decode-table-h200.json"  # bench_decode.py --suite table odd --name decode-table-h200
INFERENCE = ("generate-h200.json", "serving-h200.json")  # bench_generate.py and bench_serving.py
LONGEST = {
    "memory-llama-8b-qlora.json": "Llama-3.1-8B, QLoRA",
    "memory-llama-1b-full-h200.json": "Llama-3.2-1B, all weights",
}
PEER, OURS = "#E69F00", "#0072B2"  # Okabe and Ito
CONTEXTS = [2**n for n in range(14, 21)]
CURVE = [2 ** (n / 8) for n in range(8 * 14, 8 * 20 + 1)]


def long_steps() -> tuple[list[Measurement], list[Measurement], float]:
    """Measured steps of the 8B model: ours, those of SDPA with Liger, and the GiB that torch was held to."""
    measured, _ = memory_page.read(records.RESULTS / MEMORY)
    measured = sorted((m for m in measured if m.status == "ok"), key=lambda m: m.point.context)
    ours = [m for m in measured if m.point.attn_implementation == "flashmla"]
    return ours, [m for m in measured if m not in ours], measured[0].point.memory_limit / GIB


def draw(path: Path = FIGURE) -> None:
    """Peak memory and tokens per second against context; the ledger's prediction as a line, measurements as points."""
    ours, peer, limit = long_steps()
    figure, (memory, speed) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    for steps, color, marker, label in (
        (peer, PEER, "v", "SDPA + Liger + checkpointing"),
        (ours, OURS, "o", "flashmla + patches"),
    ):
        contexts = [m.point.context for m in steps]
        ledger = ledger_of(steps[-1].point)
        memory.plot(CURVE, [ledger.peak(round(n)) / GIB for n in CURVE], color=color, linestyle="--", linewidth=1.2)
        memory.plot(
            contexts, [m.peak_allocated_bytes / GIB for m in steps], marker, color=color, label=label, markersize=9
        )
        speed.plot(contexts, [m.tokens_per_second for m in steps], marker, color=color, label=label, markersize=9)
        for m in steps:
            speed.annotate(
                f"{m.tokens_per_second:,.0f}", (m.point.context, m.tokens_per_second), xytext=(9, -3),
                textcoords="offset points", size=9,
            )  # fmt: skip
    memory.axhline(limit, color="black", linewidth=1)
    memory.annotate(f"{limit:.0f} GiB", (CONTEXTS[0], limit), xytext=(2, 3), textcoords="offset points", size=9)
    memory.set(ylim=(0, 1.5 * limit), ylabel="peak GPU memory, GiB")
    speed.set(ylim=(0, None), ylabel="training, tokens per second")
    for axis in (memory, speed):
        axis.set(xscale="log", xlabel="context, tokens", xlim=(CONTEXTS[0] / 1.1, CONTEXTS[-1] * 1.1))
        axis.set_xticks(CONTEXTS, [f"{n // 1024}k" for n in CONTEXTS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    memory.legend(
        loc="lower right", fontsize=9, title="points: measured; dashed: needed, by the ledger", title_fontsize=8
    )
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def caption() -> str:
    """Three numbers of the figure."""
    ours, peer, limit = long_steps()
    same, theirs, longest = ours[0], peer[-1], ours[-1]
    needs = ledger_of(theirs.point).peak(longest.point.context) / GIB
    return (
        f"Llama-3.1-8B, LoRA, whole training steps, one {json_of(MEMORY)['environment']['device']} held to {limit:.0f} GiB. "
        f"At {same.point.context:,} tokens: **{same.tokens_per_second:,.0f} tokens/s** "
        f"in {same.peak_allocated_bytes / GIB:.1f} GiB (SDPA + Liger: {theirs.tokens_per_second:,.0f} in "
        f"{theirs.peak_allocated_bytes / GIB:.1f} GiB). **{longest.point.context:,} tokens** take "
        f"{longest.peak_allocated_bytes / GIB:.1f} GiB and {longest.host_pinned_bytes / GIB:.0f} GiB of the host's memory "
        f"(SDPA + Liger, predicted: {needs:,.0f} GiB)."
    )


def json_of(name: str) -> dict:
    return json.loads((records.RESULTS / name).read_text())


def performance() -> str:
    """A table: our attention beside its peers, and what a longer context buys."""
    document = json_of(ATTENTION)
    device = records.card(document["environment"])
    lines = ["| | measured |", "|---|---|"]
    for mode, word in (("fwd", "forward"), ("bwd", "backward")):
        judged = [row for row in rows(document, mode) if row.is_judged and row.ours]
        cudnn = [row.ratio(row.records["sdpa-cudnn"]) for row in judged if "sdpa-cudnn" in row.records]
        best = [row.ratio(row.best_other) for row in judged if row.best_other]
        lines.append(
            f"| attention, {word}, {device}, {len(best)} shapes of 1k to 64k tokens: speed, geometric mean "
            f"| {geometric_mean(cudnn):.2f} × cuDNN's, {geometric_mean(best):.2f} × the best peer's"
            f"{' (cuDNN, FlashAttention 2 and 4)' if mode == 'fwd' else ''}; lowest {min(best):.2f} × |"
        )
    if (records.RESULTS / DECODE).exists():
        lines.append(decoding(json_of(DECODE)))
    for name in INFERENCE:
        if (records.RESULTS / name).exists():
            lines += inference_results.readme_rows(json_of(name))
    for name, word in LONGEST.items():
        steps = [m for m in memory_page.read(records.RESULTS / name)[0] if m.status == "ok"]
        m = max((m for m in steps if m.point.attn_implementation == "flashmla"), key=lambda m: m.point.context)
        lines.append(
            f"| {word}, {records.card(json_of(name)['environment'])} held to {m.point.memory_limit / GIB:.0f} GiB, "
            "longest measured step "
            f"| {m.point.context:,} tokens, {m.peak_allocated_bytes / GIB:.1f} GiB, {m.tokens_per_second:,.0f} tokens/s |"
        )
    return "\n".join(lines)


def decoding(document: dict) -> str:
    """A row of the table: our reading of caches beside the peers' and the memory's own rate."""
    judged = decode_results.table_rows(document)
    ratios = [row.ratio(row.best_other) for row in judged]
    best = max(row.ours["bytes_per_second"] for row in judged)
    sizes = [row.shape.bytes_read() / 1e6 for row in judged]
    environment, read = document["environment"], document["read_bytes_per_second"] / 1e9
    return (
        f"| decoding, {records.card(environment)}, {len(judged)} caches of {min(sizes):,.0f} to "
        f"{max(sizes):,.0f} MB: speed, geometric mean | {geometric_mean(ratios):.2f} × the best peer's "
        f"(cuDNN, FlashAttention 2); lowest {min(ratios):.2f} ×; up to {best / 1e9:,.0f} GB/s of K and V "
        f"(a pure read: {read:,.0f}) |"
    )


def install() -> str:
    """How long an installation took, on each machine that was measured."""
    found = [json.loads(path.read_text()) for path in sorted(records.RESULTS.glob("install-*.json"))]
    text = "; ".join(map(install_time.sentence, found))
    return f"Measured: {text}."


def updated(text: str, page: Path = README) -> str:
    """``text`` of ``page`` with what stands between the markers written anew."""
    values = {
        README: {"measured caption": caption, "measured performance": performance},
        INSTALL: {"measured install": install},
        DISTRIBUTED: {
            f"predicted {name}": lambda page=page: f"{page.table()}\n\n{page.caption()}"
            for name, page in (("plan", cluster_plan), ("eight", distributed_predictions))
        },
    }
    for name, value in values[page].items():
        new = f"\n{value()}\n" if name == "measured performance" or name.startswith("predicted") else value()
        text, count = re.subn(
            rf"(<!-- {name} -->).*?(<!-- /{name.split()[0]} -->)", rf"\g<1>{new}\g<2>", text, flags=re.DOTALL
        )
        if count != 1:
            sys.exit(f"readme: {page.name}: expected one pair of markers '{name}', found {count}")
    return text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is out of date")
    args = parser.parse_args(argv)
    for page in (README, INSTALL, DISTRIBUTED):
        text = page.read_text()
        new = updated(text, page)
        if args.check and new != text:
            sys.exit(f"{page.name} differs from benchmarks/results: run `make readme`")
        if not args.check:
            page.write_text(new)
    if args.check:
        return
    draw()


if __name__ == "__main__":
    main()
