"""The table of profile_attention.py."""

from __future__ import annotations

# ncu's name -> column. Shares are of the most the hardware sustains, over the whole kernel.
SHARES = {
    "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_elapsed": "tensor cores",
    "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed": "shared memory",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_elapsed": "exponentials",
    "sm__inst_issued.avg.pct_of_peak_sustained_elapsed": "instruction issue",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "L2",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM",
}


def section(document: dict) -> str:
    """A row per kernel: how busy it keeps each part of the GPU, the busiest in bold."""
    if any("shape" in record for record in document["records"]):
        calls, column = "one call of each shape", "shape"
    else:
        mask = "causal" if document["is_causal"] else "full"
        calls = f"{document['seqlen']:,} tokens a sequence, {mask}, bf16, one run of each kernel"
        column = "head dims (qk/v)"
    lines = [
        f"Share of what the hardware sustains, by Nsight Compute: {calls}. The busiest is in bold.\n",
        f"| kernel | {column} | cycles | " + " | ".join(SHARES.values()) + " |",
        "|---|---|---|" + "---|" * len(SHARES),
    ]
    for record in document["records"]:
        busiest = max(record["shares"].values())
        cells = [f"**{s:.0%}**" if s == busiest else f"{s:.0%}" for s in record["shares"].values()]
        name = record.get("shape", record["head_dims"])
        lines.append(f"| {record['kernel']} | {name} | {record['cycles']:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
