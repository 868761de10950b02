"""The table of docs/distributed.md for more GPUs than one host's: the ledger's bytes and seconds. `make readme` writes it."""

from __future__ import annotations

from dataclasses import dataclass

import flashmla_hf
from flashmla_hf.host_memory import GIB
from flashmla_hf.training.step_time import Cluster


@dataclass(frozen=True)
class Plan:
    """A run of the 8B shape with all patches, on FSDP2."""

    use_peft: bool
    gpus: int
    sp: int
    tokens: int


PLANS = (
    Plan(True, 8, 8, 2**20),
    Plan(True, 16, 16, 2**21),
    Plan(True, 64, 32, 2**22),
    Plan(False, 8, 8, 2**19),
    Plan(False, 16, 16, 2**20),
    Plan(False, 64, 8, 2**19),
)


def table(cluster: Cluster | None = None) -> str:
    cluster = cluster or Cluster()
    lines = [
        "| 8B shape | GPUs | hosts | GPUs a sequence | tokens a sequence | peak, GiB a GPU | pinned, GiB a host | s/step "
        "| of it Ulysses | FSDP2, beside it | tokens/s |",
        "|---" * 11 + "|",
    ]
    for plan in PLANS:
        given = {"patches": "all", "use_peft": plan.use_peft, "gpus": plan.gpus, "sp": plan.sp, "fsdp": True}
        prediction = flashmla_hf.ledger("llama-8b", plan.tokens, **given)
        time = prediction.step_time(cluster)
        here = min(plan.gpus, cluster.gpus_per_host)
        cells = [
            "LoRA" if plan.use_peft else "all weights", plan.gpus, -(-plan.gpus // cluster.gpus_per_host), plan.sp,
            f"{plan.tokens:,}", f"{prediction.peak_bytes / GIB:.1f}", f"{here * prediction.host_bytes / GIB:,.0f}",
            f"{time.seconds:,.0f}", f"{time.exchange:.1f}", f"{time.sharding:.1f}",
            f"{plan.tokens * plan.gpus / plan.sp / time.seconds:,.0f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def caption(cluster: Cluster | None = None) -> str:
    """What the table assumes."""
    cluster = cluster or Cluster()
    return (
        f"Assumed: {cluster.gpus_per_host} GPUs a host, each with {cluster.nvlink:g} GB/s of NVLink and {cluster.network:g} "
        f"GB/s to other hosts; an MFU of {cluster.mfu:.0%} of {cluster.tflops:g} TFLOP/s, which one H200 reaches with LoRA at "
        "524,288 tokens."
    )
