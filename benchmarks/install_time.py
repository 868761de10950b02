"""The time that `pip install .` of a clean checkout takes on this machine: benchmarks/results/install-*.json.

    python benchmarks/install_time.py --build cpu --name install-cpu

It installs the committed files, with pip's build isolation and without dependencies, into a folder that is removed
afterwards. docs/install.md has the numbers (`make readme`).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import records

BUILT = re.compile(r"flashmla_hf: built (.*) in (\d+) s,")


def measure(build: str) -> dict:
    """Seconds of one installation and of the build in it, with the libraries that it made."""
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "source", Path(scratch) / "installed"
        source.mkdir()
        archive = subprocess.run(
            ["git", "-C", str(records.REPOSITORY), "archive", "HEAD"], capture_output=True, check=True
        )
        subprocess.run(["tar", "-x", "-C", str(source)], input=archive.stdout, check=True)
        started, load = time.monotonic(), os.getloadavg()[0]
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--target", str(target), "."], cwd=source,
            env=os.environ | {"FLASHMLA_BUILD": build}, capture_output=True, text=True,
        )  # fmt: skip
        seconds = time.monotonic() - started
        if done.returncode != 0:
            sys.exit(f"install_time: pip install failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
        built = BUILT.search(done.stdout + done.stderr)
        if built is None:
            sys.exit("install_time: expected the line of the build that says what was built, got none")
        manifest = json.loads(next(target.glob("*/_build.json")).read_text())
    return {
        "build": build,
        "install_seconds": round(seconds, 1),
        "build_seconds": int(built[2]),
        "libraries": manifest["libraries"],
        "compiler": manifest["compiler"],
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(load, 2),
    }


def sentence(document: dict) -> str:
    """What docs/install.md says of one file."""
    record, device = document["record"], document["environment"]["device"].partition(" (")[0]
    what = "with the Hopper library" if "libflashmla_sm90.so" in record["libraries"] else "for the CPU alone"
    cores = f"{record['cores']} cores of {device}"
    if record.get("install_seconds") is None:
        return f"{what} the build took {record['build_seconds']} s on {cores}"
    shared = " that other work shared" if record["load_before"] > 0.5 else ""
    return (
        f"{what} `pip install .` took {record['install_seconds']:.0f} s on {cores}{shared}, {record['build_seconds']} s of it "
        "the build, dependencies not counted"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", choices=["cpu", "cuda"], default="cpu", help="FLASHMLA_BUILD of the installation")
    parser.add_argument("--name", default="install-cpu", help="of the file in benchmarks/results")
    records.add_dirty_option(parser)
    args = parser.parse_args(argv)
    records.refuse_dirty_tree("install_time", records.RESULTS, args.allow_dirty)
    document = {"kind": "install", "environment": records.describe("cpu"), "record": measure(args.build)}
    records.write_json(document, records.RESULTS / f"{args.name}.json")
    print(sentence(document))


if __name__ == "__main__":
    main()
