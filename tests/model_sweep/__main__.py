"""Runs the sweep: one process per class, so that a crash or a hang ends that class alone.

python -m model_sweep --output build/model_sweep.json                  every class, two at a time
python -m model_sweep --only '^Llama' --output /tmp/llama.json
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import resource
import signal
import sys
import time
from collections import Counter
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
    result.reason = f"the process died: signal {number}, status {status}"
    if number == signal.SIGALRM:
        result.status, result.reason = "cannot build", "took too long"
    return result.as_dict()


def sweep(
    chosen: list[Candidate], jobs: int, seconds: int, only_forward: bool = False, on_result=lambda r: None
) -> list[dict]:
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
    parser.add_argument("--again", nargs="*", help="only classes of these statuses in the output, and new ones")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    gc.freeze()  # what is there already is not copied into every process
    known = {}
    if options.output.exists():
        known = {r["class_name"]: r for r in json.loads(options.output.read_text())["classes"]}
    chosen = [c for c in candidates() if re.search(options.only, c.class_name)]
    if options.again:
        chosen = [c for c in chosen if known.get(c.class_name, {}).get("status") in (None, *options.again)]
    chosen = one_of_each_type_first(chosen)
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


def one_of_each_type_first(chosen: list[Candidate]) -> list[Candidate]:
    """The same classes, so that an interrupted sweep has seen most model types."""
    seen: Counter[str] = Counter()
    rank = {}
    for candidate in chosen:
        rank[candidate] = seen[candidate.model_type]
        seen[candidate.model_type] += 1
    return sorted(chosen, key=rank.get)


def write(path: Path, results: dict[str, dict]) -> None:
    classes = sorted(results.values(), key=lambda r: (r["model_type"], r["class_name"]))
    content = {"transformers": transformers.__version__, "torch": torch.__version__, "classes": classes}
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
