"""The tables of bench_distributed.py's points: what one GPU gives too, long steps, scaling beside peers, attention alone."""

from __future__ import annotations

from flashmla_hf.host_memory import GIB


def name_of(record: dict) -> str:
    """The setting of a point, in words."""
    engine = {"one": "one GPU", "ddp": "DDP", "fsdp2": "FSDP2", "ulysses": "Ulysses", "ring": "ring"}[record["engine"]]
    what = "flashmla" if record["attention"] == "flashmla" else "SDPA"
    if record["kind"] in ("train", "same"):
        what += " + patches" if record["is_patched"] else " + checkpointing" + " + Liger" * record["liger"]
    where = f" on {record['gpus']}" if record["gpus"] > 1 else ""
    return f"{engine}{where}, {what}"


def describe(record: dict) -> str:
    trained = "LoRA" if record["use_peft"] else "all weights"
    head = (
        f"{record['group']:<9} {record['kind']:<9} {name_of(record):<44} {record['context']:>9,} tokens, {trained:<11} "
    )
    if record["status"] != "ok":
        return f"{head}{record['status'].replace('_', ' ')}: {record['reason']}"
    if record["kind"] == "same":
        return f"{head}loss {record['losses'][0]:.4f} -> {record['losses'][-1]:.4f}"
    if record["kind"] == "gradient":
        return f"{head}error {record['gradient_error']:.1e} in {record['worst_gradient']}"
    if record["kind"] == "attention":
        return f"{head}{1e3 * record['seconds']:.1f} ms, {record['flops_per_second'] / 1e12:.3g} TFLOP/s a GPU"
    return (
        f"{head}{record['seconds']:.2f} s, {record['tokens_per_second']:,.0f} tokens/s, MFU {record['mfu']:.1%}, "
        f"peak {record['peak_bytes'] / GIB:.1f} GiB, pinned {record['pinned_bytes'] / GIB:.1f} GiB"
    )


def loss_difference(record: dict, alone: dict) -> float:
    """The largest relative difference of a step's loss from one GPU's."""
    return max(abs(a - b) / abs(b) for a, b in zip(record["losses"], alone["losses"], strict=True))


def section(document: dict) -> str:
    """Markdown of the whole file."""
    ok = [r for r in document["points"] if r["status"] == "ok"]
    parts = [_same(ok), _gradients(ok), _train(ok), _attention(ok), _without_a_number(document["points"])]
    return "\n".join(part for part in parts if part)


def _table(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _setting(record: dict) -> tuple:
    """What two points share that differ in the engine and the number of GPUs alone."""
    return tuple(record[name] for name in ("model", "layers", "context", "documents", "use_peft", "dtype"))


def _same(ok: list[dict]) -> str:
    mine = [r for r in ok if r["kind"] == "same"]
    alone = {(_setting(r), r["steps"]): r for r in mine if r["engine"] == "one"}
    lines = [
        [name_of(r), f"{r['model']}, {r['context']:,} in {r['documents']}", str(r["steps"]), f"{loss_difference(r, one):.1e}"]
        for r in mine
        if r["engine"] != "one" and (one := alone.get((_setting(r), r["steps"])))
    ]  # fmt: skip
    if not lines:
        return ""
    header = [
        "engine",
        "tokens and documents of a row",
        "steps",
        "largest relative difference of a loss from one GPU's",
    ]
    return f"### The same losses\n\n{_table(header, lines)}"


def _gradients(ok: list[dict]) -> str:
    lines = [
        [name_of(r), f"{r['gradients']}", f"{r['gradient_error']:.1e}", r["worst_gradient"]]
        for r in ok
        if r["kind"] == "gradient"
    ]
    header = ["engine", "gradients", "largest error, of its norm", "in"]
    return f"### The same gradients, float32\n\n{_table(header, lines)}" if lines else ""


def _train(ok: list[dict]) -> str:
    mine = sorted((r for r in ok if r["kind"] == "train"), key=lambda r: (not r["use_peft"], r["context"], r["gpus"]))
    alone = {_setting(r): r for r in mine if r["engine"] == "one"}
    lines = []
    for r in mine:
        one = alone.get(_setting(r))
        faster = f"{r['tokens_per_second'] / one['tokens_per_second']:.2f} ×" if one and one is not r else "–"
        depth = f"{r['model']}, {r['layers']} layers" if r["layers"] else r["model"]
        lines.append(
            [
                f"{r['context']:,}", f"{depth}, {'LoRA' if r['use_peft'] else 'all weights'}", name_of(r),
                f"{r['seconds']:.2f}", f"{r['tokens_per_second']:,.0f}", f"{r['mfu']:.1%}", faster,
                f"{r['peak_bytes'] / GIB:.1f}", f"{r['pinned_bytes'] / GIB:.1f}",
            ]
        )  # fmt: skip
    header = ["tokens", "model", "how", "s/step", "tokens/s", "MFU", "of one GPU", "peak, GiB a GPU", "pinned, GiB"]
    return f"### Steps\n\n{_table(header, lines)}" if lines else ""


def _attention(ok: list[dict]) -> str:
    mine = [r for r in ok if r["kind"] == "attention"]
    alone = {_setting(r): r for r in mine if r["engine"] == "one"}
    lines = []
    for r in mine:
        one = alone.get(_setting(r))
        share = f"{r['flops_per_second'] / one['flops_per_second']:.0%}" if one and one is not r else "–"
        rate = f"{r['flops_per_second'] / 1e12:.3g}"
        lines.append([name_of(r), f"{r['context']:,} in {r['documents']}", f"{1e3 * r['seconds']:.1f}", rate, share])
    header = ["how", "tokens and documents", "ms, forward and backward", "TFLOP/s a GPU", "of one GPU's rate"]
    return f"### Attention alone\n\n{_table(header, lines)}" if lines else ""


def _without_a_number(points: list[dict]) -> str:
    missing = [r for r in points if r["status"] != "ok"]
    if not missing:
        return ""
    return "Without a number:\n\n" + "".join(f"- {' '.join(describe(r).split())}\n" for r in missing)
