"""Reads tiles.h, the table of the Hopper kernels, and writes the tables and limits of the documents: `make tiles`.

A document's text between the markers `<!-- tiles NAME -->` and `<!-- /tiles -->` is this script's. With --check it changes
nothing and fails if a text is out of date. setup.py, the benchmarks and the tests read the table by these functions as well.
"""

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DOCUMENTS = ("README.md", "docs/fp8.md", "docs/inference.md", "docs/limits.md", "docs/kernels.md")
KIND = r"(Forward|Fp8Forward|Backward|BackwardQueries|Decode|E4m3Decode)Config"


def entries(kind: str, path: Path = HERE / "tiles.h") -> list[dict]:
    """The entries of a kind (one of KIND): head_dims, mask (Forward; "kMask" is any), each member."""
    found = []
    for name, arguments, body in re.findall(rf"struct {KIND}<([^>]*)> {{\n(.*?)\n}};", path.read_text(), re.DOTALL):
        if name != kind:
            continue
        *head_dims, mask = [*re.split(r",\s*", arguments), None] if kind != "Forward" else re.split(r",\s*", arguments)
        head_dims = tuple(int(number) for number in head_dims)
        members = re.findall(r"(k\w+) = (\w+)", body)
        numbers = {key: value == "true" if value in ("true", "false") else int(value) for key, value in members}
        found.append({"head_dims": head_dims, "mask": mask, **numbers})
    return found


def head_dims(kind: str = "Forward", path: Path = HERE / "tiles.h") -> list[tuple[int, int]]:
    """(head_dim_qk, head_dim_v) of the list that dispatch.cpp reads, in its order. "Latent" has one entry, and no list."""
    text = re.search(rf"using {kind}HeadDims =\s*((?:HeadDimList)?<?.*?)>;", path.read_text(), re.DOTALL)[1] + ">"
    return [(int(qk), int(v)) for qk, v in re.findall(r"HeadDims<(\d+), (\d+)>", text)]


def num_ctas(head_dim_v: int, path: Path = HERE / "tiles.h") -> int:
    """CTAs that share a work tile."""
    widest = int(re.search(r"return head_dim > (\d+) \? 2 : 1;", path.read_text())[1])
    return 2 if head_dim_v > widest else 1


def limits(path: Path = HERE / "tiles.h") -> dict:
    """What the kernels take: head dims that are multiples of the one, up to another: of most calls, of caches, of
    decoding from latents (qk, v), in fp8; and of caches in fp8."""
    multiple, e4m3_multiple = (
        int(re.search(rf"int {name} = (\d+)", path.read_text())[1])
        for name in ("kHeadDimMultiple", "kE4m3HeadDimMultiple")
    )
    return {
        "head_dim_multiple": multiple,
        "largest_head_dim": head_dims(path=path)[-1][0],
        "largest_decode_head_dim": head_dims("Decode", path)[-1][0],
        "largest_latent_head_dims": list(head_dims("Latent", path)[0]),
        "largest_fp8_head_dim": head_dims("Fp8Forward", path)[-1][0],
        "e4m3_head_dim_multiple": e4m3_multiple,
        "largest_e4m3_decode_head_dim": head_dims("E4m3Decode", path)[-1][0],
    }


def forward_table() -> str:
    lines = [
        "| head dims (qk / v) up to | mask | Q rows × K/V rows | K/V stages | Q buffers | consumers "
        "| registers: producer, consumer | take turns | shared memory, KiB |",
        "|---" * 9 + "|",
    ]
    own_mask = {row["head_dims"] for row in entries("Forward") if row["mask"] != "kMask"}
    for row in entries("Forward"):
        qk, v = row["head_dims"]
        mask = "none" if row["mask"] != "kMask" else "causal, window" if (qk, v) in own_mask else "any"
        ctas = num_ctas(v)
        q, kv = row["kNumQStages"] * row["kBlockQ"], row["kNumStages"] * row["kBlockKV"]
        elements = q * qk + kv * (qk + v)
        if ctas > 1:  # each has half of the rows of Q and half of the columns of V; K in chunks; two buffers of P
            elements = q * qk // 2 + kv * v // 2 + row["kNumKChunks"] * row["kBlockKV"] * 128 + 2 * row["kBlockKV"] * 64
        lines.append(
            f"| {qk} / {v}{', two CTAs' if ctas > 1 else ''} | {mask} "
            f"| {row['kBlockQ']} × {row['kBlockKV']} | {row['kNumStages']} | {row['kNumQStages']} "
            f"| {row['kNumConsumers']} | {row['kProducerRegisters']}, {row['kConsumerRegisters']} "
            f"| {'yes' if row['kPingPong'] else 'no'} | {round(2 * elements / 1024)} |"
        )
    return "\n".join(lines)


def backward_table() -> str:
    lines = [
        "| head dims (qk / v) up to | Q × K/V rows | stages | swizzled columns | the consumer warpgroups share "
        "| registers: producer, consumer | dQ | softcap |",
        "|---" * 8 + "|",
    ]
    queries = {row["head_dims"][0]: row for row in entries("BackwardQueries")}
    for row in entries("Backward"):
        qk, v = row["head_dims"]
        own = queries.get(qk) if row["kSplitsColumns"] else None
        own_kernel = f"its own kernel, {own['kBlockQ']} × {own['kBlockKV']}" if own else "summed in memory"
        lines.append(
            f"| {qk} / {v} | {row['kBlockQ']} × {row['kBlockKV']} | {row['kNumStages']} | {row['kSwizzleColumns']} "
            f"| {'columns' if row['kSplitsColumns'] else 'keys'} | {row['kProducerRegisters']}, {row['kConsumerRegisters']} "
            f"| {own_kernel} "
            f"| {'yes' if row['kHasSoftcap'] else 'in the next entry'} |"
        )
    return "\n".join(lines)


def decode_table() -> str:
    lines = [
        "| head dims (qk / v) up to | keys of a step | stages | CTAs on a multiprocessor | K and V on their way to it, KiB "
        "| shared memory of a CTA, KiB |",
        "|---" * 6 + "|",
    ]
    for row in entries("Decode"):
        qk, v = row["head_dims"]
        columns = qk if row["head_dims"] in head_dims("Latent") else qk + v  # latents hold their values
        ring = 2 * row["kNumStages"] * row["kBlockKV"] * columns
        queries, ctas = 2 * 64 * qk, row["kNumCtas"]
        lines.append(
            f"| {qk} / {v} | {row['kBlockKV']} | {row['kNumStages']} | {ctas} | {round(ctas * ring / 1024)} "
            f"| {round((ring + queries) / 1024)} |"
        )
    return "\n".join(lines)


def fp8_table() -> str:
    lines = [
        "| head dim up to | Q rows × K/V rows | K/V stages | Q buffers | consumers | registers: producer, consumer "
        "| take turns | shared memory, KiB |",
        "|---" * 8 + "|",
    ]
    for row in entries("Fp8Forward"):
        (head_dim,) = row["head_dims"]
        size = head_dim * (row["kNumQStages"] * row["kBlockQ"] + 2 * row["kNumStages"] * row["kBlockKV"])
        size += 2 * head_dim * row["kBlockQ"] if row["kParksOutput"] else 0
        lines.append(
            f"| {head_dim} | {row['kBlockQ']} × {row['kBlockKV']} | {row['kNumStages']} | {row['kNumQStages']} "
            f"| {row['kNumConsumers']} | {row['kProducerRegisters']}, {row['kConsumerRegisters']} "
            f"| {'yes' if row['kPingPong'] else 'no'} | {round(size / 1024)} |"
        )
    return "\n".join(lines)


def e4m3_decode_table(path: Path = HERE / "tiles.h") -> str:
    warps, rows, most_bytes = 4, 8, 228 * 1024
    lines = [
        "| head dim up to | query rows | keys of a stage | stages | CTAs on a multiprocessor "
        "| K and V on their way to it, KiB |",
        "|---" * 6 + "|",
    ]
    for row in entries("E4m3Decode", path):
        (dim,) = row["head_dims"]
        keys, ctas = row["kBlockKV"], row["kNumCtas"]
        parts, stage = warps * rows * (4 * (dim + 4) + 8), keys * (2 * dim + 8)
        stages = (most_bytes // ctas - 1024 - parts - 512) // stage
        lines.append(
            f"| {dim} | {rows} | {keys} | {stages} | {ctas} | {round(ctas * stages * keys * 2 * dim / 1024)} |"
        )
    return "\n".join(lines)


def texts() -> dict[str, str]:
    limit = limits()
    return {
        "forward": f"\n{forward_table()}\n",
        "backward": f"\n{backward_table()}\n",
        "decode": f"\n{decode_table()}\n",
        "fp8": f"\n{fp8_table()}\n",
        "e4m3 decode": f"\n{e4m3_decode_table()}\n",
        "multiple": f"{limit['head_dim_multiple']}",
        "largest latents": "/".join(map(str, limit["largest_latent_head_dims"])),
        "largest fp8": f"{limit['largest_fp8_head_dim']}",
        "e4m3 multiple": f"{limit['e4m3_head_dim_multiple']}",
        "largest e4m3 decode": f"{limit['largest_e4m3_decode_head_dim']}",
        "largest": f"{limit['largest_head_dim']}",
    }


def updated(text: str) -> str:
    for name, value in texts().items():
        text = re.sub(rf"(<!-- tiles {name} -->).*?(<!-- /tiles -->)", rf"\g<1>{value}\g<2>", text, flags=re.DOTALL)
    return text


def main(arguments: list[str]) -> int:
    old = [name for name in DOCUMENTS if updated((ROOT / name).read_text()) != (ROOT / name).read_text()]
    if "--check" in arguments:
        for name in old:
            print(f"{name} differs from csrc/sm90/tiles.h: run `make tiles`", file=sys.stderr)
        return int(bool(old))
    for name in old:
        (ROOT / name).write_text(updated((ROOT / name).read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
