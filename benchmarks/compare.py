"""Two runs of bench_attention.py beside each other: is anything slower than before?

    python benchmarks/compare.py OLD.json NEW.json
    python benchmarks/compare.py OLD.json NEW.json --peers flashmla --tolerance 0.03

Prints old seconds / new seconds (above 1: the new run is faster) of every shape, mode and peer that both files have, and
the geometric mean per mode and peer. Exits with 1 if a geometric mean is below 1 - tolerance, or a single ratio below
1 - 2 x tolerance. Compare runs on the same machine: the two devices and commits are printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import records
from verdicts import geometric_mean

Key = tuple[str, str, str]  # mode, peer, shape


def seconds(document: dict) -> dict[Key, float]:
    """The seconds of every measured call of a document."""
    return {(r["mode"], r["peer"], r["shape"]): r["seconds"] for r in document["records"] if r["status"] == "ok"}


def ratios(old: dict, new: dict, peers: list[str] | None = None) -> dict[Key, float]:
    """Old seconds / new seconds of the calls that both documents have, in the order of the new one."""
    before = seconds(old)
    return {
        key: before[key] / after
        for key, after in seconds(new).items()
        if key in before and (peers is None or key[1] in peers)
    }


def means(found: dict[Key, float]) -> dict[tuple[str, str], float]:
    """The geometric mean of the ratios of each mode and peer."""
    groups: dict[tuple[str, str], list[float]] = {}
    for (mode, peer, _), ratio in found.items():
        groups.setdefault((mode, peer), []).append(ratio)
    return {group: geometric_mean(values) for group, values in groups.items()}


def regressions(found: dict[Key, float], tolerance: float) -> list[str]:
    """A sentence for each mean and each call that became slower than the tolerance allows."""
    slower = [
        f"{mode} {peer}: geometric mean {mean:.3f}×, expected at least {1 - tolerance:.3f}×"
        for (mode, peer), mean in means(found).items()
        if mean < 1 - tolerance
    ]
    return slower + [
        f"{mode} {peer} {shape}: {ratio:.3f}×, expected at least {1 - 2 * tolerance:.3f}×"
        for (mode, peer, shape), ratio in found.items()
        if ratio < 1 - 2 * tolerance
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.add_argument("--peers", nargs="+", metavar="PEER", help="these alone; default: all that both files have")
    parser.add_argument(
        "--tolerance", type=float, default=0.05, help="slower by this share is an error (default: 0.05)"
    )
    args = parser.parse_args(argv)
    documents = [_read(path) for path in (args.old, args.new)]
    for name, document in zip(("old", "new"), documents, strict=True):
        print(f"{name}: {records.sentence(document['environment'])}")
    if documents[0]["environment"]["device"] != documents[1]["environment"]["device"]:
        print("the devices differ: the ratios say more about the machines than about the code")
    found = ratios(*documents, args.peers)
    if not found:
        sys.exit("compare: the two files have no shape, mode and peer in common")
    for (mode, peer, shape), ratio in found.items():
        print(f"{ratio:6.3f}×  {mode:<9} {peer:<22} {shape}")
    for (mode, peer), mean in means(found).items():
        print(f"{mean:6.3f}×  {mode:<9} {peer:<22} geometric mean")
    if slower := regressions(found, args.tolerance):
        sys.exit("compare: slower than the tolerance allows:\n" + "\n".join(slower))


def _read(path: Path) -> dict:
    try:
        document = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        sys.exit(f"compare: {path} cannot be read: {error}")
    if not isinstance(document, dict) or document.get("kind") != "attention":
        sys.exit(f"compare: {path} is not a file of bench_attention.py")
    return document


if __name__ == "__main__":
    main()
