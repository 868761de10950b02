"""Runs the sweep: one process per class, so that a crash or a hang ends that class alone.

    python -m model_sweep --output build/model_sweep.json                  every class, two at a time
    python -m model_sweep --only '^Llama' --output /tmp/llama.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import transformers

import flashmla_hf  # noqa: F401  (registers the name)
from model_sweep import probes
from model_sweep.classes import Candidate, candidates

MEMORY = 10 << 30


def start(candidate: Candidate, seconds: int, only_forward: bool) -> tuple[int, int]:
    """Forks a process that examines ``candidate``; (its id, where it writes the result)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    status = 1
    try:
        os.close(reader)
        signal.alarm(seconds)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        began = time.time()
        result = probes.examine(candidate, only_forward)
        result.seconds = round(time.time() - began, 2)
        with os.fdopen(writer, "w") as file:
            json.dump(result.as_dict(), file)
        status = 0
    finally:
        os._exit(status)


def finish(candidate: Candidate, child: int, reader: int) -> dict:
    with os.fdopen(reader) as file:
        text = file.read()
    _, status = os.waitpid(child, 0)
    if text:
        return json.loads(text)
    result = probes.Result(candidate.class_name, candidate.model_type, "failed")
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    result.reason = "took too long" if number == signal.SIGALRM else f"the process died: signal {number}, status {status}"
    return result.as_dict()


def sweep(chosen: list[Candidate], jobs: int, seconds: int, only_forward: bool = False, on_result=lambda r: None) -> list[dict]:
    import select

    pending, running, results = list(chosen), {}, []
    while pending or running:
        while pending and len(running) < jobs:
            candidate = pending.pop(0)
            child, reader = start(candidate, seconds, only_forward)
            running[reader] = (candidate, child)
        for reader in select.select(list(running), [], [])[0]:
            candidate, child = running.pop(reader)
            results.append(finish(candidate, child, reader))
            on_result(results[-1])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression on class names")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=180, help="limit of one class")
    parser.add_argument("--only_forward", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [c for c in candidates() if re.search(options.only, c.class_name)]
    done = 0

    def show(result):
        nonlocal done
        done += 1
        print(f"[{done}/{len(chosen)}] {result['class_name']}: {result['status']} ({result['seconds']} s) {result['reason'][:300]}", flush=True)

    began = time.time()
    results = sweep(chosen, options.jobs, options.seconds, options.only_forward, show)
    results.sort(key=lambda r: (r["model_type"], r["class_name"]))
    options.output.write_text(
        json.dumps({"transformers": transformers.__version__, "torch": torch.__version__, "seconds": round(time.time() - began), "classes": results}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
