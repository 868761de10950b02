"""The error of attention in fp8, emulated on a CPU: benchmarks/results/fp8-error-cpu.json, and the tables of docs/fp8.md.

    python benchmarks/bench_fp8_error.py                  # everything: half an hour on two cores
    python benchmarks/bench_fp8_error.py --parts random
    python benchmarks/bench_fp8_error.py --parts          # measures nothing, writes docs/fp8.md from the file

Three parts. ``random``: root mean square error against float64 of normal inputs, and of normal inputs with outliers (0.1 % of
entries get a normal number of variance 100 added, the test of FlashAttention 3's paper), by ways to quantise. ``layers``: the
same ways on queries, keys and values of every layer of SmolLM2-135M reading source code. ``loss``: the loss of that model on
held-out text, in fp8 and exact, weights and the rest in float32. The first two round the probabilities to fp8, as the kernel is
to; the last does not (impl "cpu").
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import documents
import models
import records
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import flashmla_hf
from flashmla_hf.fp8 import emulation
from flashmla_hf.fp8.quantization import BLOCK_ROWS, quantize, rotate

PAGE = records.REPOSITORY / "docs" / "fp8.md"
# Head dim, length, heads, causal.
SHAPES = [
    (64, 1024, 4, False), (80, 1024, 4, False), (128, 1024, 4, False), (128, 1024, 4, True), (256, 1024, 4, False),
    (128, 4096, 1, False), (128, 4096, 1, True),
]  # fmt: skip
DISTRIBUTIONS = ("normal", "outliers")
# The ways to quantise: is there a rotation, rows of a block (None: all of a head), is the scale a power of two.
WAYS: dict[str, tuple[bool, int | None, bool]] = {
    "plain": (False, None, False),
    "blocks": (False, BLOCK_ROWS, False),
    "rotation": (True, None, False),
    "rotation, blocks": (True, BLOCK_ROWS, False),
    "ours": (True, BLOCK_ROWS, True),
}
CONTEXTS = (512, 8192)
TOKENS = 8192  # of each context's loss


def inputs(distribution: str, head_dim: int, length: int, heads: int, seed: int) -> list[torch.Tensor]:
    """q, k and v, bf16 [1, length, heads, head_dim]."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for _ in range(3):
        x = torch.randn(1, length, heads, head_dim, generator=generator)
        if distribution == "outliers":
            is_outlier = torch.rand(x.shape, generator=generator) < 0.001
            x += 10.0 * torch.randn(x.shape, generator=generator) * is_outlier
        tensors.append(x.bfloat16())
    return tensors


def errors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool) -> dict[str, float]:
    """Root mean square error against float64 of exact attention in bf16 and of every way; "output": its root mean square."""
    truth = flashmla_hf.attention(q.double(), k.double(), v.double(), is_causal=is_causal, impl="reference")
    q16, k16, v16 = (x.bfloat16() for x in (q, k, v))

    def rms(x: torch.Tensor) -> float:
        return x.pow(2).mean().sqrt().item()

    found = {"output": rms(truth)}
    found["bf16"] = rms(flashmla_hf.attention(q16, k16, v16, is_causal=is_causal).double() - truth)
    call = SimpleNamespace(
        cu_seqlens_q=None, window_left=-1, window_right=0 if is_causal else -1, scale=q.shape[-1] ** -0.5, softcap=0.0,
        sinks=None,
    )  # fmt: skip
    for name, (is_rotated, block_rows, power_of_two) in WAYS.items():
        rotated = (rotate(q, False), rotate(k, True)) if is_rotated else (q, k)
        tensors = [quantize(x, block_rows=block_rows, power_of_two=power_of_two) for x in (*rotated, v)]
        found[name] = rms(emulation.attention(*tensors, call).to(torch.bfloat16).double() - truth)
    return found


def random_part() -> list[dict]:
    points = [(distribution, *shape) for distribution in DISTRIBUTIONS for shape in SHAPES]
    found = []
    for distribution, head_dim, length, heads, is_causal in tqdm(points):
        result = errors(*inputs(distribution, head_dim, length, heads, seed=0), is_causal)
        shape = {"head_dim": head_dim, "length": length, "heads": heads, "causal": is_causal}
        found.append({"distribution": distribution, **shape, "rmse": result})
    return found


# ---- A real model ----------------------------------------------------------------------------------------------------


def held_out_tokens(folder: Path, count: int) -> torch.Tensor:
    """[1, count] tokens of long modules of Python's standard library, at most 8,192 of each."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens: list[int] = []
    for text in documents.standard_library().values():
        if len(text) > 40_000:
            tokens += tokenizer(text[: 4 * 8192])["input_ids"][:8192]
        if len(tokens) >= count:
            break
    return torch.tensor(tokens[:count])[None]


def load(folder: Path, attn_implementation: str):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attn_implementation
    ).eval()


def layers_part(folder: Path) -> list[dict]:
    """The errors at every layer, relative to the root mean square of its output."""
    found: list[dict] = []

    def probe(module, query, key, value, attention_mask, scaling, **kwargs):
        assert scaling == query.shape[-1] ** -0.5, scaling
        q, k, v = (x.transpose(1, 2).bfloat16() for x in (query, key, value))
        result = errors(q, k, v, is_causal=True)
        found.append({name: value / result["output"] for name, value in result.items() if name != "output"})
        exact = flashmla_hf.attention(*(x.transpose(1, 2) for x in (query, key, value)), is_causal=True)
        return exact, None

    AttentionInterface.register("fp8_probe", probe)
    AttentionMaskInterface.register("fp8_probe", lambda *args, **kwargs: None)
    with torch.no_grad():
        load(folder, "fp8_probe")(held_out_tokens(folder, 1024), use_cache=False)
    return found


def loss_of(model, tokens: torch.Tensor, context: int, cache: Callable | None = None) -> float:
    """Mean loss of the next token in pieces of ``context`` tokens; with a cache, in the second half of each, which reads it."""
    total, count = 0.0, 0
    for piece in tqdm(tokens.split(context, dim=1), leave=False):
        start = 0
        if cache is None:
            hidden = model.model(piece, use_cache=False).last_hidden_state
        else:
            start, kept = context // 2, cache()
            model.model(piece[:, :start], past_key_values=kept, use_cache=True)
            hidden = model.model(piece[:, start:], past_key_values=kept, use_cache=True).last_hidden_state
        targets = piece[0, start + 1 :]
        for rows, labels in zip(hidden[0, :-1].split(1024), targets.split(1024), strict=True):
            logits = model.lm_head(rows)
            total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            count += len(labels)
    return total / count


def loss_part(folder: Path) -> list[dict]:
    tokens, found = held_out_tokens(folder, TOKENS), []
    with torch.no_grad():
        for context in CONTEXTS:
            row = {name: loss_of(load(folder, name), tokens, context) for name in ("flashmla", "flashmla_fp8")}
            found.append(
                {"context": context, "what": "attention", "exact": row["flashmla"], "fp8": row["flashmla_fp8"]}
            )
        model = load(folder, "flashmla")
        row = {"context": 2048, "what": "cache", "exact": loss_of(model, tokens, 2048, DynamicCache)}
        found.append(row | {"fp8": loss_of(model, tokens, 2048, flashmla_hf.Fp8Cache)})
    return found


# ---- docs/fp8.md -----------------------------------------------------------------------------------------------------


def tables(document: dict) -> dict[str, str]:
    """The generated parts of docs/fp8.md by their names."""
    return {
        "random": "\n\n".join(_random_table(document, d) for d in DISTRIBUTIONS),
        "layers": _layers_table(document["layers"]),
        "loss": _loss_table(document["loss"]),
        "record": records.sentence(document["environment"]),
    }


def _random_table(document: dict, distribution: str) -> str:
    titles = {"normal": "Normal inputs", "outliers": "Normal inputs with outliers"}
    lines = [f"{titles[distribution]}:", "", "| head dim, tokens, mask | bf16 | " + " | ".join(WAYS) + " |"]
    lines.append("|---" * (len(WAYS) + 2) + "|")
    for point in document["random"]:
        if point["distribution"] == distribution:
            mask = "causal" if point["causal"] else "full"
            cells = " | ".join(f"{point['rmse'][name]:.1e}" for name in ("bf16", *WAYS))
            lines.append(f"| {point['head_dim']}, {point['length']:,}, {mask} | {cells} |")
    return "\n".join(lines)


def _layers_table(layers: list[dict]) -> str:
    lines = ["| of 30 layers | bf16 | " + " | ".join(WAYS) + " |", "|---" * (len(WAYS) + 2) + "|"]
    for title, pick in (("median", lambda x: sorted(x)[len(x) // 2]), ("worst", max)):
        cells = " | ".join(f"{100 * pick([layer[name] for layer in layers]):.2f} %" for name in ("bf16", *WAYS))
        lines.append(f"| {title} | {cells} |")
    return "\n".join(lines).replace("of 30 layers", f"of {len(layers)} layers")


def _loss_table(rows: list[dict]) -> str:
    lines = ["| in fp8 | tokens of a piece | loss, exact | loss, fp8 | perplexity |", "|---|---|---|---|---|"]
    names = {"attention": "`flashmla_fp8`", "cache": "`Fp8Cache`, second half of a piece"}
    for row in rows:
        change = 100 * (math.exp(row["fp8"] - row["exact"]) - 1)
        lines.append(
            f"| {names[row['what']]} | {row['context']:,} | {row['exact']:.4f} | {row['fp8']:.4f} | {change:+.2f} % |"
        )
    return "\n".join(lines)


def updated(text: str, document: dict) -> str:
    """``text`` of docs/fp8.md with the tables of ``document`` between ``<!-- fp8 NAME -->`` and ``<!-- /fp8 -->``."""
    for name, table in tables(document).items():
        pattern = rf"(<!-- fp8 {name} -->\n).*?(\n<!-- /fp8 -->)"
        text, count = re.subn(pattern, lambda found, t=table: found[1] + t + found[2], text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(
                f"bench_fp8_error: docs/fp8.md: expected the markers of {name!r} once, found them {count} times"
            )
    return text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="*", default=["random", "layers", "loss"], choices=["random", "layers", "loss"]
    )
    parser.add_argument("--output_dir", type=Path, default=records.RESULTS)
    records.add_dirty_option(parser)
    args = parser.parse_args(argv)
    records.refuse_dirty_tree("bench_fp8_error", args.output_dir, args.allow_dirty)
    path = args.output_dir / "fp8-error-cpu.json"
    document = json.loads(path.read_text()) if path.exists() else {"kind": "fp8_error"}
    folder = models.smollm2_folder() if {"layers", "loss"} & {*args.parts} else Path()
    measures = {"random": random_part, "layers": lambda: layers_part(folder), "loss": lambda: loss_part(folder)}
    for part in args.parts:
        document["environment"] = records.describe("cpu")
        document[part] = measures[part]()
        records.write_json(document, path)
    if args.output_dir == records.RESULTS:
        PAGE.write_text(updated(PAGE.read_text(), document))


if __name__ == "__main__":
    main()
