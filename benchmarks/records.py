"""The files that benchmarks write: the machine, the code and the command of each number; no result replaced by accident."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

from flashmla_hf import nvidia_smi
from flashmla_hf.host_memory import GIB
from flashmla_hf.training import machine

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
PACKAGES = ("torch", "transformers", "accelerate", "peft", "flashmla_hf", "flash-attn-4", "liger-kernel")
# The files that a benchmark itself writes: they do not make the measured code another one.
WRITTEN = ("benchmarks/results", "benchmarks/RESULTS.md")


def describe(device: str) -> dict:
    """The record for results measured on ``device`` ("cpu" or "cuda"): plain strings and numbers, ready for JSON."""
    record = {
        "device": machine.device_name(device),
        "device_type": device,
        "clocks": machine.clocks(device),
        "memory_gib": round(machine.memory_limit(device) / GIB, 1),
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        # Of a path only its name: a machine's folders are nobody's business.
        "command": [
            Path(word).name if Path(word).is_absolute() else word for word in (Path(sys.argv[0]).name, *sys.argv[1:])
        ],
    }
    if device == "cuda":
        record["cuda"] = torch.version.cuda
        record["cudnn"] = torch.backends.cudnn.version()
        record["driver"] = (nvidia_smi.query("driver_version") or ["unknown"])[0]
    return record


def sentence(record: dict) -> str:
    """One line of Markdown for a table's caption."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    threads = f", {record['threads']} threads" if record.get("threads") else ""
    cuda = f", CUDA {record['cuda']}, cuDNN {record['cudnn']}" if record.get("cuda") else ""
    clock = f", {record['clocks']}" if record["clocks"] else ""
    command = f"; `{' '.join(record['command'])}`" if record.get("command") else ""
    return (
        f"{record['device']}{threads}, {record['memory_gib']} GiB{clock}; Python {record['python']}, {versions}{cuda}; "
        f"commit {record['commit']}; {record['date']}{command}"
    )


def card(environment: dict) -> str:
    """The device's name without its maker and memory: H100 for "NVIDIA H100 80GB HBM3"."""
    words = [word for word in environment["device"].split() if word != "NVIDIA" and not word.startswith("HBM")]
    return " ".join(word for word in words if not word.endswith("GB"))


def commit() -> str:
    """Short hash of the checked-out commit, with "+" if files other than results differ from it.

    FLASHMLA_COMMIT says it of a tree carried to a GPU host, whose repository is of another commit, or none ("unknown").
    """
    if told := os.environ.get("FLASHMLA_COMMIT"):
        return told
    git = ["git", "-C", str(REPOSITORY)]
    others = ["--", ".", *(f":(exclude){path}" for path in WRITTEN)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, timeout=20)
        status = subprocess.run([*git, "status", "--porcelain", *others], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    if head.returncode != 0:
        return "unknown"
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def refuse_dirty_tree(program: str, output_dir: Path, allow_dirty: bool) -> None:
    """Ends the program if it would write the numbers of uncommitted code into benchmarks/results."""
    if not allow_dirty and output_dir.resolve() == RESULTS and commit().endswith("+"):
        sys.exit(
            f"{program}: benchmarks/results holds numbers of committed code, and this tree has uncommitted changes: commit "
            "them, write elsewhere with --output_dir, or pass --allow_dirty"
        )


def add_dirty_option(parser) -> None:
    parser.add_argument(
        "--allow_dirty", action="store_true", help="write into benchmarks/results from a tree with uncommitted changes"
    )


def write_json(document: dict, path: Path) -> None:
    """Writes the file whole or not at all: a run that is killed leaves the points it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(unfinished, path)


def slug(text: str) -> str:
    """A device's name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(.*", "", text).lower()).strip("-")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commits_of(document: dict) -> str:
    """The commits of a file's points, as the end of a sentence, if the file's own is not the only one."""
    commits = sorted({record["commit"] for record in document["points"] if "commit" in record})
    own = document.get("environment", {}).get("commit")
    return f"; measured at {', '.join(commits)}" if commits not in ([], [own]) else ""
