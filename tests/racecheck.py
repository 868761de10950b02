"""The hazards that racecheck reports, as a set that can be committed: a new one fails, whatever their number.

    python3 tests/racecheck.py build/gpu/racecheck.log              # what is new, what is gone; exit code 1 if anything is new
    python3 tests/racecheck.py build/gpu/racecheck.log --print      # all of it, in the format of tests/racecheck_accepted.txt

A hazard is a kernel (without template arguments) and two accesses, each with its kind and the text of its source line, which
stays when lines above it come and go. A build without line numbers gives the kinds alone. docs/kernels.md ("What racecheck
says") traces the accepted ones.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ACCEPTED = Path(__file__).with_name("racecheck_accepted.txt")

FIRST = re.compile(r"Race reported between (?P<kind>\w+) access at (?P<place>.+)$")
OTHER = re.compile(r"^=*\s*and (?P<kind>\w+) access at (?P<place>.+?)(?:\s*\[\d+ hazards?\])?\s*$")
SUMMARY = re.compile(r"RACECHECK SUMMARY: (\d+) hazards? displayed")
# The three ways compute-sanitizer has named a place: offset, file, line and kernel; kernel and offset, with or without
# file and line; offset and kernel.
PLACES = (
    re.compile(r"^0x[0-9a-f]+ in (?P<file>[^:]+):(?P<line>\d+):(?P<kernel>.+)$"),
    re.compile(r"^(?P<kernel>.+)\+0x[0-9a-f]+(?: in (?P<file>[^:]+):(?P<line>\d+))?$"),
    re.compile(r"^0x[0-9a-f]+ in (?P<kernel>.+)$"),
)


def hazards(output: str) -> set[str]:
    """Every pair of accesses that ``output`` of racecheck reports. ValueError if the summary counts what cannot be read."""
    found, first = set(), None
    for line in output.splitlines():
        if match := FIRST.search(line):
            first = match
        elif first is not None and (match := OTHER.match(line)):
            kernel, *_ = _place(first["place"])
            pair = sorted(f"{access['kind']} {_source(access['place'])}".strip() for access in (first, match))
            found.add(" | ".join((kernel, *pair)))
    counted = sum(int(match[1]) for match in SUMMARY.finditer(output))
    if counted and not found:
        raise ValueError(f"racecheck's output: expected to read {counted} hazards, got none (another format?)")
    return found


def _place(text: str) -> tuple[str, str | None, str | None]:
    """Kernel, file and line of a place."""
    for pattern in PLACES:
        if match := pattern.match(text.strip()):
            groups = match.groupdict()
            return _kernel_name(groups["kernel"]), groups.get("file"), groups.get("line")
    raise ValueError(f"racecheck's output: expected a kernel and an offset, got {text!r}")


def _kernel_name(signature: str) -> str:
    """The function's name without namespaces, template arguments and parameters."""
    plain, depth = "", 0
    for character in signature.removeprefix("void ").replace("(anonymous namespace)::", ""):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            break
        if depth == 0 and character != ">":
            plain += character
    return plain.split("::")[-1].strip()


def _source(place: str) -> str:
    _, file, line = _place(place)
    if file is None:
        return ""
    name = file.replace("\\", "/").rsplit("/", 1)[-1]
    sources = sorted((ROOT / "csrc").rglob(name))
    lines = sources[0].read_text().splitlines() if sources else []
    text = " ".join(lines[int(line) - 1].split()) if 0 < int(line) <= len(lines) else f"line {line}"
    return f"{name}: {text}"


def accepted() -> set[str]:
    lines = (line.strip() for line in ACCEPTED.read_text().splitlines())
    return {line for line in lines if line and not line.startswith("#")}


def new_hazards(output: str) -> list[str]:
    """Those of ``output`` that nobody has accepted."""
    return sorted(hazards(output) - accepted())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="what compute-sanitizer --tool racecheck printed")
    parser.add_argument("--print", action="store_true", help="print every hazard in the format of the accepted list")
    args = parser.parse_args(arguments)
    output = args.log.read_text(errors="replace")
    if args.print:
        print(*sorted(hazards(output)), sep="\n")
        return 0
    new, gone = new_hazards(output), sorted(accepted() - hazards(output))
    for title, lines in (("new", new), ("accepted, and not seen", gone)):
        print(f"{title}: {len(lines)}", *lines, sep="\n  ")
    return 1 if new else 0


if __name__ == "__main__":
    sys.exit(main())
