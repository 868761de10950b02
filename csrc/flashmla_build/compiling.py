"""Compiles many sources at once, only those that changed, and tells how far it is."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from flashmla_build.sources import SM90
from flashmla_build.terminal import tell

# Seconds without a finished source after which the build names those that it is compiling.
STILL_COMPILING = 30.0
# Some compilers link their C++ runtime statically. If other libraries saw it, it would mix with the one that torch has loaded,
# of another release, and the first exception would end the process. The unwinder must be the process's own: an exception of
# ours passes through torch's frames, and an unwinder that never ran has no table of registers yet.
LOCAL_RUNTIME = ["-Wl,--exclude-libs,ALL", "-lgcc_s"] if sys.platform == "linux" else []


class CompilerError(Exception):
    """What a compiler or linker failed on: its exit code and the first error it printed."""


@dataclass(frozen=True)
class Job:
    """One object. ``object`` with the suffix .json is its record: the command, what the compiler said, and how long. With the
    suffix .d it is the compiler's list of the files that it read."""

    source: Path
    object: Path
    command: list[str]


def listing_headers(target: Path) -> list[str]:
    """Options by which g++, clang and nvcc write the list of an object's files, less those of the system."""
    return ["-MMD", "-MF", str(target.with_suffix(".d"))]


def compile_all(jobs: dict[str, list[Job]], dispensable: set[str]) -> dict[str, CompilerError]:
    """The first error of each library that has one. No job of that library begins afterwards, and no job at all if the
    library is not dispensable."""
    failed: dict[str, CompilerError] = {}

    def compile_unless_failed(task: tuple[str, Job]) -> bool:
        name, job = task
        if name in failed or failed.keys() - dispensable:
            return False
        try:
            compile_one(job)
        except CompilerError as error:
            failed.setdefault(name, error)
            return False
        return True

    # One pool for all, the CUDA sources first: they take longest.
    tasks = [(name, job) for name, group in jobs.items() for job in group if not is_up_to_date(job)]
    tasks.sort(key=lambda task: task[1].source.suffix != ".cu")
    workers = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    if tasks:
        tell(f"flashmla_hf: compiling {announcement(tasks, workers)}")
    with ThreadPoolExecutor(workers) as pool:
        show_progress({pool.submit(compile_unless_failed, task): task[1] for task in tasks})
    return failed


def announcement(tasks: list[tuple[str, Job]], workers: int) -> str:
    of_cuda = sum(name == SM90 for name, _ in tasks)
    hint = f", {of_cuda} of them for CUDA: minutes; FLASHMLA_BUILD=cpu leaves those out" if of_cuda else ""
    return f"{len(tasks)} sources, {workers} at a time (MAX_JOBS){hint}"


def show_progress(jobs: dict[Future, Job]) -> None:
    """A line for each source that was compiled, and one now and then while none is: a silent build looks dead."""
    pending, started, compiled = set(jobs), time.monotonic(), 0
    while pending:
        done, pending = wait(pending, timeout=STILL_COMPILING, return_when=FIRST_COMPLETED)
        seconds = f"{time.monotonic() - started:.0f} s"
        for future in done:
            if future.result():  # raises what is not a compiler's error
                compiled += 1
                source = jobs[future].source.name
                tell(f"flashmla_hf: {compiled} of {len(jobs)} sources compiled, {seconds}: {source}")
        if not done:
            running = sorted(jobs[future].source.name for future in pending if future.running())
            tell(f"flashmla_hf: still compiling after {seconds}: {', '.join(running)}")


def is_up_to_date(job: Job) -> bool:
    """Whether the object is newer than all it is made of and made by the same command."""
    record, files = job.object.with_suffix(".json"), files_of(job)
    if not files or not all(path.exists() for path in (record, job.object, *files)):
        return False
    before = json.loads(record.read_text())
    # The start counts: what was edited during the compilation is not in the object.
    return before["command"] == job.command and before["started"] > max(path.stat().st_mtime for path in files)


def files_of(job: Job) -> list[Path]:
    """The files that the object was compiled from, as its compiler said; none if there is no list."""
    try:
        rule = job.object.with_suffix(".d").read_text()
    except OSError:
        return []
    # "object: file file \\": a space within a name has a backslash before it, as has the end of a line.
    names = re.findall(r"(?:\\[ #]|[^\s\\])+", rule.partition(": ")[2])
    return [Path(re.sub(r"\\([ #])", r"\1", name)) for name in names]


def compile_one(job: Job) -> None:
    record = job.object.with_suffix(".json")
    record.unlink(missing_ok=True)  # of an object that is about to be replaced
    started = time.time()
    output = run(job.command)
    facts = {"command": job.command, "started": started, "seconds": round(time.time() - started, 1), "output": output}
    record.write_text(json.dumps(facts, indent=1) + "\n")


def run(command: list[str]) -> str:
    """Everything the command said; printed, too, without ptxas's lines on each kernel: check_build.py makes a table of them."""
    tell(shlex.join(command))
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    statistics = re.compile(r"ptxas info\s+: (?!.*Performance Loss)|    \d+ bytes stack frame")
    lines = [line for line in result.stdout.splitlines() if not statistics.match(line)]
    if lines:
        tell("\n".join(lines))
    if result.returncode != 0:
        said = [line.strip() for line in lines if line.strip()] or ["no message"]
        errors = [line for line in said if re.search(r"\b(?:error|fatal|undefined reference)\b", line)]
        raise CompilerError(f"exit code {result.returncode} ({[*errors, said[-1]][0][:300]})")
    return result.stdout
