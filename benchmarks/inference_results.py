"""What runs of bench_generate.py and bench_serving.py are held against, and their parts of RESULTS.md."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import render_results
from records import card, commits_of
from verdicts import Bar, geometric_mean

from flashmla_hf.host_memory import GIB

OURS, PEER = "flashmla", "sdpa"
AT_MOST = 1.0  # times sdpa's time a token, at every point
LONG, LONG_AIM = 131072, 0.8  # tokens, and times sdpa's time there
SERVING_AIM = 1.3  # times sdpa's tokens a second
CACHES = {
    "dynamic": "Dynamic cache",
    "compiled": "Static cache, the step compiled by generate() (torch.compile, CUDA graphs)",
    "static": "Static cache, not compiled",
    "fp8": "Fp8 cache",
    "compiled-fp8": "Static fp8 cache, the step compiled by generate()",
}
FP8_AT_LEAST = 1.7  # times the tokens a second of a 16-bit cache, of LONG tokens in FP8_ROWS rows
FP8_ROWS = 8


def section(document: dict) -> str:
    return _generate_section(document) if document["kind"] == "generate" else _serving_section(document)


def plots(document: dict, path: Path) -> list[Path]:
    return _generate_plot(document, path) if document["kind"] == "generate" else _serving_plot(document, path)


def bars(document: dict) -> Iterator[Bar]:
    """The bars of a GPU run, as far as it measured them."""
    if document["environment"]["device_type"] != "cuda":
        return
    yield from _generate_bars(document) if document["kind"] == "generate" else _serving_bars(document)


def _shape(record: dict) -> tuple[int, int, bool]:
    return record["batch_size"], record["context"], record["is_padded"]


def _label(shape: tuple[int, int, bool]) -> str:
    batch_size, context, is_padded = shape
    return f"batch {batch_size}{' padded' if is_padded else ''}, {context:,}"


def _measured(document: dict, cache: str) -> dict[tuple, dict[str, dict]]:
    """Records with a number, by the batch's shape and attention: the smaller caches first."""
    found: dict[tuple, dict[str, dict]] = {}
    for r in sorted(document["points"], key=lambda r: (r["batch_size"] * r["context"], r["context"])):
        if r["status"] == "ok" and r["cache"] == cache:
            found.setdefault(_shape(r), {})[r["attention"]] = r
    return found


def _ratio(records: dict[str, dict], other: str) -> float | None:
    """Our time over the ``other``'s."""
    if OURS in records and other in records:
        return records[OURS]["seconds"] / records[other]["seconds"]
    return None


def ratios_to_sdpa(document: dict, cache: str) -> dict[tuple[int, int, bool], float]:
    """Our time a token over sdpa's, by (rows, tokens, whether they are padded)."""
    pairs = {shape: _ratio(records, PEER) for shape, records in _measured(document, cache).items()}
    return {shape: ratio for shape, ratio in pairs.items() if ratio is not None}


def _generate_bars(document: dict) -> Iterator[Bar]:
    for cache in CACHES:
        ratios = ratios_to_sdpa(document, cache)
        if not ratios:
            continue
        worst = max(ratios, key=ratios.__getitem__)
        yield Bar(
            f"{cache} cache: at most {AT_MOST}× sdpa's time a token at every point",
            f"highest {ratios[worst]:.2f}× ({_label(worst)}), geometric mean {geometric_mean([*ratios.values()]):.2f}× over "
            f"{len(ratios)}",
            ratios[worst] <= AT_MOST,
        )
        for shape in (shape for shape in ratios if shape[1] >= LONG):
            yield Bar(
                f"{cache} cache, {_label(shape)}, aim: at most {LONG_AIM}× sdpa's time",
                f"{ratios[shape]:.2f}×",
                ratios[shape] <= LONG_AIM,
            )

    yield from _fp8_bars(document)


def _fp8_bars(document: dict) -> Iterator[Bar]:
    """A cache in fp8 beside each 16-bit one: a growing one, and a compiled static one."""
    measured = {cache: _measured(document, cache) for cache in CACHES}
    for kind in ("fp8", "compiled-fp8"):
        for (shape, records), cache in itertools.product(measured[kind].items(), ("dynamic", "compiled", "static")):
            if other := measured[cache].get(shape, {}).get(OURS):
                gain = other["seconds"] / records[OURS]["seconds"]
                is_judged = shape[0] >= FP8_ROWS and shape[1] >= LONG
                asked = f", at least {FP8_AT_LEAST}×" if is_judged else ""
                yield Bar(
                    f"{kind} cache, {_label(shape)}{asked} the tokens a second of a 16-bit {cache} cache",
                    f"{gain:.2f}×",
                    gain >= FP8_AT_LEAST if is_judged else None,
                )


def readme_rows(document: dict) -> Iterator[str]:
    """Rows of README's table: the longest context of the first kind of cache, or the largest number of requests."""
    device = card(document["environment"])
    if document["kind"] == "generate":
        for cache in CACHES:
            if ratios := ratios_to_sdpa(document, cache):
                shape = max(ratios, key=lambda shape: (shape[1], shape[0]))
                ours = _measured(document, cache)[shape][OURS]
                yield (
                    f"| `generate()`, {ours['model']}'s shape, {cache} cache, {device}, {_label(shape)} tokens "
                    f"| {1e3 * ours['seconds']:.1f} ms a token, {ratios[shape]:.2f} × sdpa's time; geometric mean over "
                    f"{len(ratios)} points {geometric_mean([*ratios.values()]):.2f} × |"
                )
                break
        return
    workloads = {key: found for key, found in _workloads(document).items() if PEER in found}
    if workloads:
        key = max(workloads, key=lambda key: (key[3], key[0]))
        found = workloads[key]
        best = max((name for name in found if OURS in name), key=lambda name: _gain(found, name), default=None)
        if best is not None:
            yield (
                f"| continuous batching, {key[1]}'s shape, {device}, Transformers {key[0]}, {key[3]} requests of {key[4]:,} to "
                f"{key[5]:,} tokens | `{best}`: {found[best]['answer_tokens_per_second']:,.0f} tokens/s, "
                f"{_gain(found, best):.2f} × sdpa's |"
            )


def _generate_section(document: dict) -> str:
    points = document["points"]
    parts = [
        f"Decoding by `generate()` with random weights in {_all_of(points, 'model')}'s shape{_depth(points)}, "
        f"{_all_of(points, 'dtype')}, from "
        "a cache filled with random numbers. Cells: ms a token (the median of "
        f"{_all_of(points, 'tokens')}), and the peak of memory in GiB, weights and cache included. Tokens are those of the "
        "longest row at the last measured one; padded rows have down to half as many. Every point's logits were compared with "
        f"eager attention's{commits_of(document)}{render_results.gpu_text(document | {'records': points})}.\n",
        *render_results.bar_table(bars(document)),
    ]
    for cache, title in CACHES.items():
        if measured := _measured(document, cache):
            parts += [f"### {title}\n", _generate_table(measured)]
    return "\n".join([*parts, *_without_number(points)])


def _depth(points: list[dict]) -> str:
    depths = sorted({point["layers"] for point in points if point.get("layers")})
    return f", {' and '.join(map(str, depths))} layers deep" if depths else ""


def _generate_table(measured: dict[tuple, dict[str, dict]]) -> str:
    attentions = list(dict.fromkeys(name for records in measured.values() for name in records))
    others = [name for name in attentions if name != OURS]
    lines = []
    for (batch_size, context, is_padded), records in measured.items():
        cells = [f"{1e3 * r['seconds']:.2f} ms, {_gib(r)}" if (r := records.get(name)) else "–" for name in attentions]
        cells += [render_results.times(_ratio(records, name)) for name in others]
        lines.append([f"{batch_size}{', padded' if is_padded else ''}", f"{context:,}", *cells])
    header = ["batch", "tokens", *attentions, *(f"{OURS} / {name}, time" for name in others)]
    return render_results.table(header, lines)


def _gib(record: dict) -> str:
    return "–" if record["peak_bytes"] is None else f"{record['peak_bytes'] / GIB:.2f} GiB"


def _generate_plot(document: dict, path: Path) -> list[Path]:
    by_cache = {cache: _measured(document, cache) for cache in CACHES}
    shapes = list(dict.fromkeys(shape for measured in by_cache.values() for shape in measured))
    heights = {
        f"{attention}, {cache}": [
            1e3 * measured.get(shape, {}).get(attention, {}).get("seconds", 0) for shape in shapes
        ]
        for cache, measured in by_cache.items()
        for attention in dict.fromkeys(name for records in measured.values() for name in records)
    }
    if not heights:
        return []
    title = f"generate(), {_all_of(document['points'], 'model')}, {document['environment']['device']}"
    target, labels = path.with_suffix(".png"), [*map(_label, shapes)]
    return render_results.bar_plot(target, labels, heights, "ms a token", title, is_logarithmic=True)


# ---------------------------------------------------------------- continuous batching


def _workloads(document: dict) -> dict[tuple, dict[str, dict]]:
    """Records with a number, by what was asked for (release of Transformers, model, requests) and attention."""
    found: dict[tuple, dict[str, dict]] = {}
    for r in document["points"]:
        if r["status"] == "ok":
            found.setdefault(_workload(r), {})[r["attention"]] = r
    return found


def _workload(r: dict) -> tuple:
    requests = (r["requests"], *r["prompts"], *r["answers"], r["max_batch_tokens"])
    return (r["transformers"], r["model"], r["dtype"], *requests)


def _unfinished(document: dict, workload: tuple) -> dict[str, dict]:
    """Records of attentions that did not end in their time, of one of the keys of :func:`_workloads`."""
    return {
        r["attention"]: r
        for r in document["points"]
        if r["status"] == "timeout" and "seconds_at_least" in r and _workload(r) == workload
    }


def _least_gain(records: dict[str, dict], name: str, unfinished: dict[str, dict]) -> float | None:
    """What tokens a second of ``name`` are at least over sdpa's, if sdpa did not end in its time."""
    if PEER in records or PEER not in unfinished or name not in records:
        return None
    return unfinished[PEER]["seconds_at_least"] / records[name]["seconds"]  # of the same tokens


def _gain(records: dict[str, dict], name: str) -> float | None:
    """Tokens a second of ``name`` over sdpa's."""
    rates = {attention.removeprefix("paged|"): r["answer_tokens_per_second"] for attention, r in records.items()}
    return rates[name.removeprefix("paged|")] / rates[PEER] if PEER in rates else None


def _serving_bars(document: dict) -> Iterator[Bar]:
    for key, records in _workloads(document).items():
        release, _, _, requests, *_ = key
        for name in (name for name in records if "flashmla" in name):
            what = f"Transformers {release}, {requests} requests, {name}, aim: at least {SERVING_AIM}× sdpa's tokens a second"
            if (gain := _gain(records, name)) is not None:
                yield Bar(what, f"{gain:.2f}×", gain >= SERVING_AIM)
            elif (least := _least_gain(records, name, _unfinished(document, key))) is not None:
                met = True if least >= SERVING_AIM else None  # sdpa may be slower than is known
                yield Bar(what, f"more than {least:.2f}×: sdpa did not end", met)


def _serving_section(document: dict) -> str:
    parts = [
        "Continuous batching with random weights: tokens of the answers a second, from the arrival of all requests to the end "
        "of the last one. Lengths are log-uniform, the same for every attention. What Transformers captures before the first "
        "request is stated apart; memory includes the cache, which Transformers sizes by what is free"
        f"{commits_of(document)}.\n",
        *render_results.bar_table(bars(document)),
    ]
    for key, records in _workloads(document).items():
        release, model, dtype, requests, *lengths, batch = key
        unfinished = _unfinished(document, key)
        shortest, longest, least, most = (f"{n:,}" for n in lengths)
        limit = f", at most {batch:,} tokens a step" if batch else ""
        parts += [
            f"### Transformers {release}: {requests} requests, {shortest} to {longest} tokens in, {least} to {most} out"
            f"{limit}, {model}, {dtype}\n",
            render_results.table(
                ["attention", "tokens/s", "with the prompts'", "s", "GiB", "block tables", "s before", "over sdpa"],
                [
                    [
                        name.replace("|", "\\|"),
                        f"{r['answer_tokens_per_second']:,.0f}",
                        f"{r['tokens_per_second']:,.0f}",
                        f"{r['seconds']:.1f}",
                        _gib(r),
                        "yes" if r["block_tables"] else "no",
                        f"{r['warmup_seconds']:.1f}",
                        f"> {render_results.times(least)}"
                        if (least := _least_gain(records, name, unfinished)) is not None
                        else render_results.times(_gain(records, name)),
                    ]
                    for name, r in records.items()
                ]
                + [
                    [
                        name.replace("|", "\\|"),
                        f"< {r['answer_tokens'] / r['seconds_at_least']:,.0f}",
                        "–",
                        f"> {r['seconds_at_least']:.1f}",
                        *["–"] * 4,
                    ]
                    for name, r in unfinished.items()
                ],
            ),
        ]
    return "\n".join([*parts, *_without_number(document["points"])])


def _serving_plot(document: dict, path: Path) -> list[Path]:
    workloads = _workloads(document)
    names = list(dict.fromkeys(name for records in workloads.values() for name in records))
    if not names:
        return []
    heights = {
        name: [records.get(name, {}).get("answer_tokens_per_second", 0) for records in workloads.values()]
        for name in names
    }
    labels = [f"Transformers {release}, {requests} requests" for release, _, _, requests, *_ in workloads]
    title = f"continuous batching, {document['environment']['device']}"
    return render_results.bar_plot(path.with_suffix(".png"), labels, heights, "answer tokens a second", title)


# ---------------------------------------------------------------- both


def _all_of(points: list[dict], field: str) -> str:
    return ", ".join(dict.fromkeys(str(r[field]) for r in points)) or "no"


def _without_number(points: list[dict]) -> list[str]:
    lines = []
    for r in points:
        if r["status"] != "ok":
            what = f"{r['cache']}, {_label(_shape(r))}" if "cache" in r else f"{r['requests']} requests"
            name = r["attention"].replace("|", "\\|")
            lines.append(f"- {name}, {what}: {r['status'].replace('_', ' ')}: {r['reason']}")
    return ["\n".join(["Without a number:\n", *lines, ""])] if lines else []
