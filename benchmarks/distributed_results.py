"""The tables of bench_distributed.py's points: what one GPU gives too, long steps, scaling beside peers, attention alone."""

from __future__ import annotations

from records import commits_of

from flashmla_hf.host_memory import GIB

WHOLE = 78  # GiB of a GPU that points have, unless they name less


def name_of(record: dict) -> str:
    """The setting of a point, in words."""
    engine = {"one": "one GPU", "ddp": "DDP", "fsdp2": "FSDP2", "ulysses": "Ulysses", "ring": "ring"}[record["engine"]]
    what = "flashmla" if record["attention"] == "flashmla" else "SDPA"
    if record["kind"] in ("train", "same"):
        what += " + patches" if record["is_patched"] else " + checkpointing" + " + Liger" * record["liger"]
    where = f" on {record['gpus']}" if record["gpus"] > 1 or record["engine"] == "fsdp2" else ""
    within = f", in {record['memory_gib']:g} GiB" if (record.get("memory_gib") or WHOLE) < WHOLE else ""
    return f"{engine}{where}, {what}{within}"


def model_of(record: dict) -> str:
    """The model of a point, its depth if it was cut, its window, and what is trained."""
    parts = [record["model"]]
    parts += [f"{record['layers']} layers"] if record["layers"] else []
    parts += [f"window {record['window']:,}"] if record.get("window") else []
    return f"{', '.join(parts)}, {'LoRA' if record['use_peft'] else 'all weights'}"


def _shape_of(record: dict) -> str:
    return f"{record['model']}, window {record['window']:,}" if record.get("window") else record["model"]


def describe(record: dict) -> str:
    head = (
        f"{record['group']:<9} {record['kind']:<9} {name_of(record):<44} {record['context']:>9,} tokens"
        f"{f' in {documents}' if (documents := record['documents']) > 1 else ''}, "
        f"{model_of(record):<24} "
    )
    if record["status"] == "predicted":
        return f"{head}{predicted_text(record['predicted']) or 'not predicted'}"
    if record["status"] != "ok":
        return f"{head}{record['status'].replace('_', ' ')}: {record['reason']}"
    if record["kind"] == "same":
        return f"{head}loss {record['losses'][0]:.4f} -> {record['losses'][-1]:.4f}"
    if record["kind"] == "gradient":
        return f"{head}error {record['gradient_error']:.1e} in {record['worst_gradient']}"
    if record["kind"] == "attention":
        rate = f"{record['flops_per_second'] / 1e12:.3g} TFLOP/s a GPU"
        return f"{head}{1e3 * record['seconds']:.1f} ms, {rate}{_beside(record)}"
    return (
        f"{head}{record['seconds']:.2f} s, {record['tokens_per_second']:,.0f} tokens/s, MFU {record['mfu']:.1%}, "
        f"peak {record['peak_bytes'] / GIB:.1f} GiB, pinned {record['pinned_bytes'] / GIB:.1f} GiB{_beside(record)}"
    )


def predicted_text(predicted: dict | None) -> str:
    """What was predicted of a point; empty if nothing was."""
    if not predicted:
        return ""
    seconds = predicted["seconds"]
    parts = [f"{1e3 * seconds:.1f} ms" if "flops_per_second" in predicted else f"{seconds:.4g} s"]
    if "peak_bytes" in predicted:
        parts.append(f"peak at least {predicted['peak_bytes'] / GIB:.1f} GiB a GPU")
        parts.append(f"pinned {predicted['pinned_bytes'] / GIB:.0f} GiB")
    else:
        parts.append(f"{predicted['share_of_one_gpu']:.0%} of one GPU's rate")
    return ", ".join(parts)


def _beside(record: dict) -> str:
    text = predicted_text(record.get("predicted"))
    return f" (predicted: {text})" if text else ""


def loss_difference(record: dict, alone: dict) -> float:
    """The largest relative difference of a step's loss from another point's."""
    return max(abs(a - b) / abs(b) for a, b in zip(record["losses"], alone["losses"], strict=True))


def section(document: dict) -> str:
    """Markdown of the whole file."""
    ok = [r for r in document["points"] if r["status"] == "ok"]
    commits = commits_of(document)
    parts = [
        f"Points of several runs{commits}.\n" if commits else "",
        _same(ok),
        _gradients(ok),
        _train(ok),
        _beside_peers(ok),
        _fewer(ok),
        _longest(document["points"]),
        _attention(ok),
        _without_a_number(document["points"]),
    ]
    return "\n".join(part for part in parts if part)


def table(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _setting(record: dict) -> tuple:
    """What two points share that differ in the engine and the number of GPUs alone."""
    return tuple(
        record.get(name) for name in ("model", "layers", "context", "documents", "use_peft", "dtype", "window")
    )


def _work(record: dict) -> tuple:
    """What two steps share whose speeds compare. A step that would take too long has fewer layers (bench_distributed.py), and
    its FLOP/s are those of the whole depth to a few hundredths."""
    return _setting(record | {"layers": None})


def _speed(record: dict) -> float:
    """FLOP/s of all GPUs, as a multiple of one GPU's peak."""
    return record["mfu"] * record["gpus"]


def _same(ok: list[dict]) -> str:
    mine = [r for r in ok if r["kind"] == "same"]
    alone = {(_setting(r), r["steps"], r["engine"] == "fsdp2"): r for r in mine if r["gpus"] == 1}
    lines = [
        [
            name_of(r), f"{_shape_of(r)}, {r['context']:,} in {r['documents']}", str(r["steps"]), name_of(one),
            f"{loss_difference(r, one):.1e}",
        ]
        for r in mine
        if r["gpus"] > 1 and (one := alone.get((_setting(r), r["steps"], r["engine"] != "ddp")))
    ]  # fmt: skip
    if not lines:
        return ""
    header = [
        "engine",
        "model, tokens and documents of a row",
        "steps",
        "beside",
        "largest relative difference of a loss",
    ]
    return f"### The same losses\n\n{table(header, lines)}"


def _gradients(ok: list[dict]) -> str:
    lines = [
        [name_of(r), f"{r['gradients']}", f"{r['gradient_error']:.1e}", r["worst_gradient"]]
        for r in ok
        if r["kind"] == "gradient"
    ]
    header = ["engine", "gradients", "largest error, of its norm", "in"]
    return f"### The same gradients, float32\n\n{table(header, lines)}" if lines else ""


def _train(ok: list[dict]) -> str:
    mine = sorted((r for r in ok if r["kind"] == "train"), key=lambda r: (not r["use_peft"], r["context"], r["gpus"]))
    alone = {_work(r): r for r in mine if r["engine"] == "one"}
    lines = []
    for r in mine:
        one = alone.get(_work(r))
        faster = f"{_speed(r) / _speed(one):.2f} ×" if one and one is not r else "–"
        predicted = r.get("predicted") or {}
        lines.append(
            [
                f"{r['context']:,}", f"{r['documents']}", model_of(r), name_of(r),
                f"{r['seconds']:.2f}", f"{r['tokens_per_second']:,.0f}", f"{r['mfu']:.1%}", faster,
                f"{r['peak_bytes'] / GIB:.1f}", f"{r['pinned_bytes'] / GIB:.1f}",
                f"{predicted['seconds']:.2f}" if predicted else "–",
                f"{predicted['peak_bytes'] / GIB:.1f}" if predicted else "–",
            ]
        )  # fmt: skip
    header = [
        "tokens", "documents", "model", "how", "s/step", "tokens/s", "MFU", "of one GPU", "peak, GiB a GPU", "pinned, GiB",
        "predicted s/step", "predicted peak, at least",
    ]  # fmt: skip
    return f"### Steps\n\n{table(header, lines)}" if lines else ""


def _beside_peers(ok: list[dict]) -> str:
    """Our fastest step beside each of a peer's on as many GPUs."""
    mine = [r for r in ok if r["kind"] == "train"]
    lines = []
    for peer in (r for r in mine if not r["is_patched"]):
        ours = [r for r in mine if r["is_patched"] and r["gpus"] == peer["gpus"] and _work(r) == _work(peer)]
        if ours:
            best = max(ours, key=_speed)
            ratio = f"{_speed(best) / _speed(peer):.2f} ×"
            lines.append([f"{peer['context']:,}", model_of(peer), name_of(peer), name_of(best), ratio])
    header = ["tokens", "model", "what people do today", "ours, the fastest", "ours / theirs, FLOP/s"]
    return f"### Beside what people do today\n\n{table(header, lines)}" if lines else ""


def _fewer(ok: list[dict]) -> str:
    """Losses of our steps beside those of the fewest GPUs that had the same ones."""
    mine = [r for r in ok if r["kind"] == "train" and r["is_patched"] and len(r.get("losses", ())) > 1]
    fewest: dict[tuple, dict] = {}
    for r in sorted(mine, key=lambda r: r["gpus"]):
        fewest.setdefault((_setting(r), r["steps"]), r)
    lines = [
        [
            name_of(r),
            name_of(other),
            model_of(r),
            f"{r['context']:,}",
            str(r["steps"]),
            f"{loss_difference(r, other):.1e}",
        ]
        for r in mine
        if (other := fewest[_setting(r), r["steps"]]) is not r
    ]
    header = ["how", "beside", "model", "tokens", "steps", "largest relative difference of a loss"]
    return f"### The losses of fewer GPUs\n\n{table(header, lines)}" if lines else ""


def _longest(points: list[dict]) -> str:
    """What the searches found: the longest step that ran, and the shortest that did not."""
    searches: dict[tuple, list[dict]] = {}
    for r in points:
        is_trial = r["group"] == "longest" and (not r["is_patched"] or r["window"])  # not ours at a peer's length
        if is_trial and r["status"] != "skipped":
            searches.setdefault((model_of(r), name_of(r)), []).append(r)
    lines = []
    for names, trials in searches.items():
        fit = max((r["context"] for r in trials if r["status"] == "ok"), default=0)
        others = sorted((r["context"], r["status"]) for r in trials if r["status"] != "ok")
        beyond = f"{others[0][0]:,}: {others[0][1].replace('_', ' ')}" if others else "–"
        lines.append([*names, f"{fit:,}", beyond, str(len(trials))])
    header = ["model", "how", "longest step, tokens", "shortest that did not run", "trials"]
    return f"### The longest steps\n\n{table(header, lines)}" if lines else ""


def _attention(ok: list[dict]) -> str:
    mine = [r for r in ok if r["kind"] == "attention"]
    alone = {_setting(r): r for r in mine if r["engine"] == "one"}
    lines = []
    for r in mine:
        one = alone.get(_setting(r))
        share = f"{r['flops_per_second'] / one['flops_per_second']:.0%}" if one and one is not r else "–"
        rate = f"{r['flops_per_second'] / 1e12:.3g}"
        told = f"{r['predicted']['share_of_one_gpu']:.0%}" if r.get("predicted") and r["engine"] != "one" else "–"
        lines.append(
            [name_of(r), f"{r['context']:,} in {r['documents']}", f"{1e3 * r['seconds']:.1f}", rate, share, told]
        )
    header = [
        "how",
        "tokens and documents",
        "ms, forward and backward",
        "TFLOP/s a GPU",
        "of one GPU's rate",
        "predicted",
    ]
    return f"### Attention alone\n\n{table(header, lines)}" if lines else ""


def _without_a_number(points: list[dict]) -> str:
    missing = [r for r in points if r["status"] != "ok"]
    if not missing:
        return ""
    return "Without a number:\n\n" + "".join(f"- {' '.join(describe(r).split())}\n" for r in missing)
