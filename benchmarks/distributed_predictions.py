"""What the ledger predicts of bench_distributed.py's points, before they run: bytes a GPU, pinned bytes, seconds a step.

    python benchmarks/bench_distributed.py --gpus 8 --dry_run     # prints them, and writes them as JSON

The measured run keeps the prediction in the record of its point and prints it beside. Seconds are those of
flashmla_hf/training/step_time.py; attention alone runs at the rate of one H200 in benchmarks/results. docs/distributed.md has
the steps of eight GPUs as a table, which `make readme` writes.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json

import distributed_results
import models
import records
import shapes
from distributed_points import PACKS_PER_STEP, STARTING, Point, following, points_of

import flashmla_hf
from flashmla_hf.host_memory import GIB
from flashmla_hf.training.ledger import RESERVE, Ledger, Prediction, build_ledger, most
from flashmla_hf.training.shape import Shape
from flashmla_hf.training.step_time import Cluster, StepTime, exchanged_bytes
from flashmla_hf.training.terms import Switches

ATTENTION = "attention-h200-sm90.json"  # of one GPU
LONG_SHAPE = "d128 B1 H32/8 S65536 causal bf16"
HOST_GIB, MOST_HOST_GIB = 128.0, 560.0  # of a host, for each GPU, and in all
HOST_SHARE = 0.95  # of it for layers' inputs, as the patch "offload" takes it
BACKWARD = 2.5  # operations of attention's backward, as multiples of its forward's
PUBLISHED = (
    "Published, measured: [TRL 1.13](https://github.com/huggingface/trl/releases/tag/v1.13.0) (torch's ring, cuDNN, FSDP2, "
    "offload), Qwen3-8B, all weights, 8 H100, 1,048,576 tokens: 380 s a step, 56.2 GB (52.3 GiB) a GPU, 39 % MFU."
)


def lengths_of(point: Point) -> list[int]:
    """Tokens of each document of a row."""
    return shapes.log_uniform(point.documents, point.context, 1 if point.kind == "attention" else 8)


def predict(point: Point, cluster: Cluster | None = None) -> dict | None:
    """``seconds`` of a step, or of a call of attention, and what the kind has: bytes of the GPU and of the host, rates.

    None for what the ledger does not know: models with experts, and gradients beside those of a whole model.
    """
    cluster = cluster or Cluster()
    if point.kind == "gradient":
        return None
    try:
        shape = _shape(point)
    except ValueError:
        return None
    return _attention(point, shape, cluster) if point.kind == "attention" else _step(point, shape, cluster)


def _shape(point: Point) -> Shape:
    config = copy.deepcopy(models.config_of(point.model, point.window))
    config.num_hidden_layers = point.layers or config.num_hidden_layers
    config.layer_types = None  # of the former number of layers
    return Shape.of(config)


def _step(point: Point, shape: Shape, cluster: Cluster) -> dict:
    lengths = lengths_of(point)
    rows = PACKS_PER_STEP // point.groups if point.kind == "same" else 1  # one after the other
    ledger = ledger_of(point, shape)
    one = Prediction(ledger, point.context, 1).step_time(cluster)
    # The ledger's time is that of one document; a ring sends keys and values alone, beside the computation.
    share = shape.training_flops(lengths, point.use_peft) / shape.training_flops([point.context], point.use_peft)
    time = dataclasses.replace(one, compute=share * one.compute)
    if point.engine == "ring":
        sent = ring_bytes(shape, ledger.switches, point.context) / cluster.nvlink / 1e9
        time = StepTime(time.compute, 0.0, time.sharding + sent)
    seconds = rows * time.seconds
    tokens = rows * point.groups * point.context
    flops = rows * shape.training_flops(lengths, point.use_peft) / point.sp
    return {
        "peak_bytes": round(ledger.peak(point.context)),
        "pinned_bytes": round(point.gpus * ledger.host(point.context)),
        "seconds": seconds,
        "exchange_seconds": rows * time.exchange,
        "tokens_per_second": tokens / seconds,
        "mfu": flops / seconds / cluster.tflops / 1e12,
    }


def ledger_of(point: Point, shape: Shape) -> Ledger:
    """Of a ring the same as of Ulysses: each GPU has its part of the tokens."""
    prediction = flashmla_hf.ledger(
        models.config_of(point.model, point.window),
        point.context,
        attn_implementation=point.attention,
        patches="all" if point.is_patched else "none",
        liger=point.liger,
        gradient_checkpointing=not point.is_patched,
        use_peft=point.use_peft,
        dtype=point.dtype,
        gpus=point.gpus,
        sp=point.sp,
        fsdp=point.gpus > 1 and point.engine != "ddp",
    )
    switches = prediction.ledger.switches
    if point.is_patched and point.gpus > 1:  # the inputs of so many layers as the host has room for
        host = min(MOST_HOST_GIB, HOST_GIB * point.gpus) * GIB * HOST_SHARE
        each = shape.hidden * switches.activation_bytes * point.context * point.groups
        switches = dataclasses.replace(switches, offload=min(shape.layers - 1, int(host // each)))
    if point.kind == "same":  # float32 weights, computed with in bfloat16
        switches = dataclasses.replace(switches, weight_bytes=4)
    return build_ledger(shape, switches)


def fits(point: Point) -> bool:
    """Whether the peak is within a GPU's memory, by the ledger, with its reserve."""
    return predict(point)["peak_bytes"] <= (1 - RESERVE) * point.memory_gib * GIB


def longest_by_ledger(point: Point) -> int:
    """The most tokens that fit, a multiple of what every engine divides."""
    step = 1024 * point.gpus
    return step * max(1, most(lambda steps: fits(dataclasses.replace(point, context=steps * step))))


def ring_bytes(shape: Shape, s: Switches, tokens: int) -> float:
    """Bytes that a GPU sends on in a ring: keys and values past every other GPU, forward and again; backward, their
    gradients too."""
    part = 2 * shape.heads_kv * shape.head_dim * s.activation_bytes * tokens / s.sp
    return (2 * s.is_checkpointed + 3 - s.is_checkpointed) * shape.layers * part * (s.sp - 1)


def _attention(point: Point, shape: Shape, cluster: Cluster) -> dict:
    shape = dataclasses.replace(shape, layers=1)
    pairs = sum(map(shape.attended_pairs, lengths_of(point)))
    forward = 4 * shape.head_dim * shape.heads_q * pairs / point.gpus
    rates = kernel_rates()
    computing = forward / rates["fwd"] + BACKWARD * forward / rates["bwd"]
    switches = Switches(gpus=point.gpus, sp=point.sp)
    exchange = exchanged_bytes(shape, switches, point.context) / cluster.nvlink / 1e9
    seconds = computing + exchange
    return {
        "seconds": seconds,
        "exchange_seconds": exchange,
        "flops_per_second": (1 + BACKWARD) * forward / seconds,
        "share_of_one_gpu": computing / seconds,
    }


@functools.cache
def kernel_rates() -> dict[str, float]:
    """FLOP/s of our forward and backward on one GPU, of a long row in bfloat16."""
    document = json.loads((records.RESULTS / ATTENTION).read_text())
    return {
        r["mode"]: r["flops_per_second"]
        for r in document["records"]
        if r["peer"] == "flashmla" and r["shape"] == LONG_SHAPE and r["mode"] in ("fwd", "bwd")
    }


def document_of(points: list[Point], args: argparse.Namespace) -> dict:
    """The content of the JSON file of a dry run."""
    if (first := following(args, [])) is not None:
        points = [*points, first]
    predicted = [dataclasses.asdict(point) | {"predicted": predict(point)} for point in points]
    return {
        "kind": "distributed_predictions",
        "cluster": dataclasses.asdict(Cluster()),
        "gpus": args.gpus,
        "commit": records.commit(),
        "points": predicted,
    }


# ---------------------------------------------------------------- the table of docs/distributed.md


def table(gpus: int = 8) -> str:
    """Our steps of a million tokens, of LoRA and of scaling, each of the whole depth."""
    args = argparse.Namespace(
        gpus=gpus, tiny=False, only=["million", "long", "scaling"], limit=None, layers=None, gpu_memory=78.0,
        time_limit=float("inf"), time_budget=None, points=None, starting=STARTING,
    )  # fmt: skip
    header = [
        "tokens", "documents", "model", "how", "GPUs", "peak at least, GiB a GPU", "pinned, GiB", "s/step", "MFU",
    ]  # fmt: skip
    lines = []
    for point in filter(lambda point: point.is_patched, points_of(args)):
        found, record = predict(point), dataclasses.asdict(point)
        memory = f"{found['peak_bytes'] / GIB:.1f}" + ("" if fits(point) else ", does not fit")
        lines.append(
            [
                f"{point.context:,}", f"{point.documents}", distributed_results.model_of(record),
                distributed_results.name_of(record | {"gpus": 1}), f"{point.gpus}", memory,
                f"{found['pinned_bytes'] / GIB:,.0f}", f"{found['seconds']:,.0f}", f"{found['mfu']:.0%}",
            ]
        )  # fmt: skip
    return distributed_results.table(header, lines).rstrip("\n")


def caption(gpus: int = 8) -> str:
    """What else is predicted, what is assumed, and what was published."""
    attention = Point("attention", "attention", "ulysses", gpus, "llama-8b", 65536 * gpus)
    step = Point("longest", "train", "ulysses", gpus, "llama-8b", 2**20)
    dense, packed = (
        predict(dataclasses.replace(attention, documents=number))["share_of_one_gpu"] for number in (1, 4 * gpus)
    )
    lora, whole = (longest_by_ledger(dataclasses.replace(step, use_peft=use_peft)) for use_peft in (True, False))
    return (
        f"The longest steps that fit {step.memory_gib:g} GiB a GPU and {MOST_HOST_GIB:g} GiB of the host, by the ledger: "
        f"{lora:,} tokens with LoRA, {whole:,} with all weights. Attention alone, {attention.context:,} tokens over {gpus} "
        f"GPUs: {dense:.0%} of one GPU's rate for one document, {packed:.0%} for {4 * gpus}.\n\n{PUBLISHED}"
    )
