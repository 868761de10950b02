"""Compares the machine code of two builds of the Hopper kernels: `python3 csrc/sm90/compare_sass.py OLD NEW...`.

For whoever renames or moves code in the kernels: instructions must stay what they were. OLD is a library, an object or a
cubin, NEW one or several of them. Kernels are paired by name, template arguments aside from types; a kernel that was renamed is paired
by its instructions. The exit code is 1 if a kernel of NEW has no twin in OLD. Needs CUDA's cuobjdump and c++filt (CUOBJDUMP names another).
"""

import hashlib
import os
import re
import subprocess
import sys
from collections import defaultdict


def kernels(path: str) -> dict[str, list[str]]:
    """Demangled name -> instructions, without addresses, encodings and line tables."""
    program = os.environ.get("CUOBJDUMP", "cuobjdump")
    text = subprocess.run([program, "-sass", path], capture_output=True, text=True, check=True).stdout
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            current = found.setdefault(match[1], [])
        elif match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?);?\s*/\*", line):
            current.append(match[2])
    names = subprocess.run(["c++filt"], input="\n".join(found), capture_output=True, text=True, check=True).stdout
    return dict(zip(names.splitlines(), found.values(), strict=True))


def short(name: str) -> str:
    plain = re.sub(r"\w+::", "", name.removeprefix("void ").replace("(anonymous namespace)::", ""))
    return re.sub(r"\((?!\w+\)[\w-]).*$", "", plain)


def digest(instructions: list[str]) -> str:
    return hashlib.sha256("\n".join(instructions).encode()).hexdigest()


def main(old_path: str, *new_paths: str) -> int:
    old = kernels(old_path)
    by_digest: dict[str, set[str]] = defaultdict(set)
    for name, instructions in old.items():
        by_digest[digest(instructions)].add(short(name))
    by_name = {short(name): instructions for name, instructions in old.items()}
    different = 0
    for path in new_paths:
        for name, instructions in kernels(path).items():
            twins = by_digest.get(digest(instructions), set())
            if short(name) in twins:
                print(f"same       {short(name)}")
            elif twins:
                print(f"renamed    {short(name)} was {', '.join(sorted(twins))}")
            else:
                different += 1
                before = by_name.get(short(name))
                count = "new" if before is None else f"{len(before)} -> {len(instructions)} instructions"
                print(f"DIFFERENT  {short(name)}: {count}")
    return int(different > 0)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
