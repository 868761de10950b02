"""What a run of bench_latent_decode.py is held against, and its part of RESULTS.md."""

from __future__ import annotations

from collections.abc import Iterator

import render_results
from verdicts import Bar

from flashmla_hf.host_memory import GIB

PATCHED, UNPATCHED = "flashmla+mla_decode", "flashmla"
LONG, AIM = 32768, 10.0  # tokens, and times the speed without the patch
CACHES = {
    "layer": "One attention layer and a full static cache, calls in a CUDA graph on a GPU",
    "dynamic": "generate(), dynamic cache",
    "compiled": "generate(), static cache, the step compiled (torch.compile, CUDA graphs)",
    "static": "generate(), static cache, not compiled",
}


def measured(document: dict, cache: str) -> dict[tuple[str, str, int, int], dict[str, dict]]:
    """Records with a number by (model, dtype, batch, context) and way: the smaller caches first."""
    found: dict[tuple[str, str, int, int], dict[str, dict]] = {}
    for r in sorted(document["points"], key=lambda r: (r["batch_size"] * r["context"], r["context"])):
        if r["status"] == "ok" and r["cache"] == cache:
            key = (r["model"], r["dtype"], r["batch_size"], r["context"])
            found.setdefault(key, {})[r["attention"]] = r
    return found


def gain(records: dict[str, dict], other: str = UNPATCHED) -> float | None:
    """How many times faster a step is with the patch."""
    if PATCHED in records and other in records:
        return records[other]["seconds"] / records[PATCHED]["seconds"]
    return None


def bars(document: dict) -> Iterator[Bar]:
    """The bars of a GPU run, as far as it measured them."""
    if document["environment"]["device_type"] != "cuda":
        return
    for cache in CACHES:
        for (model, _, batch, context), records in measured(document, cache).items():
            if context == LONG and (factor := gain(records)) is not None:
                yield Bar(
                    f"{model}, {cache}, batch {batch}, {context:,} tokens, aim: at least {AIM:.0f}× the unpatched speed",
                    f"{factor:.1f}×",
                    factor >= AIM,
                )


def section(document: dict) -> str:
    """The bars, then for each kind of cache time and memory of every way."""
    parts = [
        "Random weights, and caches of random latents. Ways: with the patch `mla_decode`, and without it by two attentions, "
        "which expand the cache at each step. Memory is the peak, weights and cache included.\n",
        *render_results.bar_table(bars(document)),
    ]
    for cache, title in CACHES.items():
        found = measured(document, cache)
        for model, dtype in dict.fromkeys(key[:2] for key in found):
            here = {key[2:]: records for key, records in found.items() if key[:2] == (model, dtype)}
            ways = list(dict.fromkeys(way for records in here.values() for way in records))
            header = ["batch", "tokens", *ways, f"{UNPATCHED} / {PATCHED}, time"]
            lines = [
                [
                    str(batch),
                    f"{context:,}",
                    *(_cell(records.get(way)) for way in ways),
                    render_results.times(gain(records)),
                ]
                for (batch, context), records in here.items()
            ]
            parts.append(f"### {title}: {model}, {dtype}\n\n{render_results.table(header, lines)}")
    failed = [r for r in document["points"] if r["status"] != "ok"]
    if failed:
        what = (
            f"- {r['attention']}, {r['cache']}, batch {r['batch_size']}, {r['context']:,}: "
            f"{r['status'].replace('_', ' ')}: {r['reason']}"
            for r in failed
        )
        parts.append("\n".join(["Without a number:\n", *what, ""]))
    return "\n".join(parts)


def _cell(record: dict | None) -> str:
    if record is None:
        return "–"
    memory = "" if record["peak_bytes"] is None else f", {record['peak_bytes'] / GIB:.2f} GiB"
    return f"{1e3 * record['seconds']:.3f} ms{memory}"
