"""Runs the sweep in forked processes: a crash or a hang ends one class, and the rest goes on in another process.

python -m model_sweep --output build/model_sweep.json                  every class, two at a time
python -m model_sweep --only '^Llama' --output /tmp/llama.json
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import re
import resource
import select
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import transformers

import flashmla_hf  # noqa: F401  (registers the name)
from model_sweep import probes, verdicts
from model_sweep.classes import Candidate, candidates

MEMORY = 10 << 30
PER_PROCESS = 24  # classes: the first one of a model type pays for imports, many leave memory behind


class Worker:
    """A forked process that examines ``chosen`` one after the other and writes a line of JSON for each."""

    def __init__(self, chosen: list[Candidate], seconds: int, only_forward: bool):
        self.left = list(chosen)
        self.text = b""
        self.reader, writer = os.pipe()
        self.child = os.fork()
        if self.child:
            os.close(writer)
            return
        status = 1
        try:
            os.close(self.reader)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            for candidate in chosen:
                signal.alarm(seconds)  # ends the process
                began = time.time()
                try:
                    result = probes.examine(candidate, only_forward)
                except Exception as error:  # of the sweep itself
                    result = verdicts.Result(candidate.class_name, candidate.model_type, "failed")
                    result.reason = f"the sweep itself raises: {verdicts.raised(error)}"
                result.seconds = round(time.time() - began, 2)
                os.write(writer, (json.dumps(result.as_dict()) + "\n").encode())
                gc.collect()
            status = 0
        finally:
            os._exit(status)

    def read(self) -> tuple[list[dict], bool]:
        """(new results, whether the process has ended). A process that died did so in the first class that is left."""
        data = os.read(self.reader, 1 << 16)
        self.text += data
        *lines, self.text = self.text.split(b"\n")
        results = [json.loads(line) for line in lines]
        self.left = self.left[len(results) :]
        if data:
            return results, False
        os.close(self.reader)
        _, status = os.waitpid(self.child, 0)
        if self.left:
            candidate = self.left.pop(0)
            lost = verdicts.Result(candidate.class_name, candidate.model_type, "failed")
            number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
            lost.reason = f"the process died with status {status}"
            if number == signal.SIGALRM:
                lost.status, lost.reason = "cannot build", "took too long"
            results.append(lost.as_dict())
        return results, True


def sweep(
    chosen: list[Candidate], jobs: int, seconds: int, only_forward: bool = False, on_result=lambda r: None
) -> list[dict]:
    """The results of ``chosen``, in the order in which they are found."""
    torch.set_num_threads(1)
    import_what_every_class_needs()
    pending = [chosen[i : i + PER_PROCESS] for i in range(0, len(chosen), PER_PROCESS)]
    running: dict[int, Worker] = {}
    found = []
    while pending or running:
        while pending and len(running) < jobs:
            worker = Worker(pending.pop(0), seconds, only_forward)
            running[worker.reader] = worker
        for reader in select.select(list(running), [], [])[0]:
            results, has_ended = running[reader].read()
            for result in results:
                found.append(result)
                on_result(result)
            if has_ended and (left := running.pop(reader).left):
                pending.insert(0, left)
    return found


def import_what_every_class_needs() -> None:
    """In the process that forks, once. It runs no autograd: its threads would not survive a fork."""
    importlib.import_module("torch._dynamo")
    importlib.import_module("transformers.generation.utils")
    gc.freeze()  # what is there already is not copied into every process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression on class names")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=180, help="limit of one class")
    parser.add_argument("--only_forward", action="store_true")
    parser.add_argument("--first", action="store_true", help="one class of every model type")
    parser.add_argument("--again", nargs="*", help="only classes of these statuses in the output, and new ones")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    known = {}
    if options.output.exists():
        known = {r["class_name"]: r for r in json.loads(options.output.read_text())["classes"]}
    chosen = [c for c in candidates() if re.search(options.only, c.class_name)]
    if options.first:
        chosen = list({c.model_type: c for c in reversed(chosen)}.values())[::-1]
    if options.again:
        chosen = [c for c in chosen if known.get(c.class_name, {}).get("status") in (None, *options.again)]
    results = {name: known[name] for name in known if name in {c.class_name for c in candidates()}}
    count = 0

    def show(result: dict) -> None:
        nonlocal count
        count += 1
        results[result["class_name"]] = result
        print(
            f"[{count}/{len(chosen)}] {result['class_name']}: {result['status']} ({result['seconds']} s) "
            f"{result['reason'][:1500]}",
            flush=True,
        )
        if count % 20 == 0 or count == len(chosen):
            write(options.output, results)

    sweep(chosen, options.jobs, options.seconds, options.only_forward, show)


def write(path: Path, results: dict[str, dict]) -> None:
    classes = sorted(results.values(), key=lambda r: (r["model_type"], r["class_name"]))
    content = {"transformers": transformers.__version__, "torch": torch.__version__, "classes": classes}
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
