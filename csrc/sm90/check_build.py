"""Builds the libraries with CUDA and fails on what the compilers report: `make cuda` (no GPU is needed).

A kernel that spills registers or whose wgmma instructions are serialized gives right results at a fraction of the speed, so
no test would notice. A warning in csrc, of any compiler, is a failure too: among warnings that are always there nobody sees
a new one. setup.py keeps what the compiler said beside each object: what is up to date is checked as well.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "csrc"))
from flashmla_build import sources  # noqa: E402

BUILD = ROOT / "build" / "cuda"
# Not in ptxas's report: shared memory of a size chosen at launch.
COLUMNS = ("kernel", "registers", "spilled bytes", "stack bytes", "static shared bytes", "barriers")


def main() -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--build-temp", str(BUILD)]
    built = subprocess.run(command, cwd=ROOT, env={**os.environ, "FLASHMLA_BUILD": "cuda"})
    if built.returncode != 0:
        sys.exit(built.returncode)
    failures, total, count = [], 0.0, 0
    for source, record in records():
        total, count = total + record["seconds"], count + 1
        kernels = parse(record["output"])
        print(f"\n{source}: {record['seconds']} s, {len(kernels)} kernels")
        show(kernels)
        found = [*judge(kernels, record["output"], source.endswith(".cu")), *warnings_of_ours(record["output"])]
        failures += [f"{source}: {failure}" for failure in found]
    print(f"\n{count} sources, {total:.0f} s of compiling, counting what is up to date with the time it once took")
    for failure in failures:
        print(f"flashmla_hf: {failure}", file=sys.stderr)
    sys.exit(1 if failures else 0)


def records() -> list[tuple[str, dict]]:
    """(source, what setup.py kept of its compilation) of every library."""
    return [
        (str(source.relative_to(ROOT)), json.loads((BUILD / library / f"{source.stem}.json").read_text()))
        for library, backend in sources.BACKENDS.items()
        for source, _ in sources.sources_of(backend)
    ]


def parse(output: str) -> dict[str, dict[str, int]]:
    """Mangled name -> COLUMNS but the first, of every kernel and every device function that was not inlined."""
    kernels: dict[str, dict[str, int]] = {}
    current: dict[str, int] = {}
    for line in output.splitlines():
        if match := re.search(r"(?:Compiling entry function '|Function properties for )([\w$.]+)", line):
            current = kernels.setdefault(match[1], {})
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            current["stack bytes"], stores, loads = map(int, match.groups())
            current["spilled bytes"] = max(stores, loads)
        elif match := re.search(r"Used (\d+) registers", line):
            current["registers"] = int(match[1])
            for column, pattern in (("barriers", r"used (\d+) barriers"), ("static shared bytes", r"(\d+) bytes smem")):
                found = re.search(pattern, line)
                current[column] = int(found[1]) if found else 0
    return kernels


def judge(kernels: dict[str, dict[str, int]], output: str, expects_kernels: bool) -> list[str]:
    failures = [
        f"{short(name)} spills {row['spilled bytes']} bytes of registers: expected 0"
        for name, row in kernels.items()
        if row.get("spilled bytes", 0) > 0
    ]
    # wgmma serialized, setmaxnreg ignored.
    failures += [line.strip() for line in output.splitlines() if "Potential Performance Loss" in line]
    if expects_kernels and not any("registers" in row and "spilled bytes" in row for row in kernels.values()):
        failures.append("ptxas reported no kernel: expected -Xptxas -v among the flags of sources.json")
    return failures


def warnings_of_ours(output: str) -> list[str]:
    """Warnings that name a place in csrc, and those of ptxas and nvcc, which name no place; each once, and how often."""
    found: Counter[str] = Counter()
    for line in output.splitlines():
        # g++: file:line:column: warning: text; nvcc: file(line): warning #number: text
        located = re.match(r"(?P<file>.+?)(?:\(\d+\)|:\d+(?::\d+)?): (?:warning|remark)\b", line)
        if located and Path(located["file"]).resolve().is_relative_to(ROOT / "csrc"):
            found[line.strip().replace(f"{ROOT}/", "")] += 1
        elif re.match(r"(?:ptxas|nvlink|nvcc)\b.*\bwarning\b", line):
            found[line.strip()] += 1
    return [f"{line} ({count} times)" if count > 1 else line for line, count in found.items()]


def show(kernels: dict[str, dict[str, int]]) -> None:
    if kernels:
        table = [
            COLUMNS,
            *((short(name), *(str(row.get(c, "")) for c in COLUMNS[1:])) for name, row in kernels.items()),
        ]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for name, *numbers in table:
            cells = (number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True))
            print("  " + "  ".join([name.ljust(widths[0]), *cells]))


def short(name: str) -> str:
    """The kernel and its template arguments, without namespaces and parameters."""
    readable = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    readable = re.sub(r"\w+::", "", readable.removeprefix("void ").replace("(anonymous namespace)::", ""))
    return re.sub(r"\((?!\w+\)[\w-]).*$", "", readable)


if __name__ == "__main__":
    main()
