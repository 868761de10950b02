"""Compares the machine code of builds of the Hopper kernels: `python3 csrc/sm90/compare_sass.py OLD NEW...`.

For whoever renames or moves code in the kernels: instructions must stay what they were. OLD is a library, an object or a
cubin, NEW one or several of them. Kernels are paired by name, or, if they were renamed, by their instructions. The exit code
is 1 if a kernel of NEW has no twin in OLD. Needs CUDA's cuobjdump (the variable CUOBJDUMP names another) and c++filt.
"""

import hashlib
import os
import re
import subprocess
import sys
from collections import defaultdict


def kernels(path: str) -> list[tuple[str, list[str]]]:
    """(demangled name, instructions without addresses, encodings and line tables); of several instances of a template, each."""
    program = os.environ.get("CUOBJDUMP", "cuobjdump")
    text = subprocess.run([program, "-sass", path], capture_output=True, text=True, check=True).stdout
    found: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            found.append((match[1], []))
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);?\s*/\*", line):
            found[-1][1].append(match[1].strip())
    names = "\n".join(name for name, _ in found)
    readable = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True).stdout.splitlines()
    return [(short(name), instructions) for name, (_, instructions) in zip(readable, found, strict=True)]


def short(name: str) -> str:
    plain = re.sub(r"\w+::", "", name.removeprefix("void ").replace("(anonymous namespace)::", ""))
    return re.sub(r"\((?!\w+\)[\w-]).*$", "", plain)


def digest(instructions: list[str]) -> str:
    return hashlib.sha256("\n".join(instructions).encode()).hexdigest()


def main(old_path: str, *new_paths: str) -> int:
    twins_of: dict[str, set[str]] = defaultdict(set)
    lengths: dict[str, int] = {}
    for name, instructions in kernels(old_path):
        twins_of[digest(instructions)].add(name)
        lengths[name] = len(instructions)
    different = 0
    for path in new_paths:
        for name, instructions in kernels(path):
            twins = twins_of.get(digest(instructions), set())
            if name in twins:
                print(f"same       {name}")
            elif twins:
                print(f"renamed    {name} was {', '.join(sorted(twins))}")
            else:
                different += 1
                print(f"DIFFERENT  {name}: {lengths.get(name, 'no')} -> {len(instructions)} instructions")
    return int(different > 0)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
