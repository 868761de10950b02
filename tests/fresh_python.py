"""Runs programs and functions of test modules in a Python process of their own, which they may end or must be first in."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import forked_python

TESTS = Path(__file__).resolve().parent


def entry_point_folder(folder: Path) -> str:
    """A folder for PYTHONPATH that has this package's entry point, as an installed package has: a .dist-info of its own."""
    info = folder / "site" / "flashmla_hf_entry-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flashmla-hf-entry\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\nflashmla_hf_entry = flashmla_hf.autoload:install\n")
    return str(info.parent)


def run_program(program: str, timeout: float = 240, **environment: str) -> str:
    """Runs ``program`` with this folder and the checkout on its path, ``environment`` added. Returns what it printed, stripped.
    Fails with the exit code and standard error if the program ends by a signal or an error; after ``timeout`` seconds, too."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path} | environment, capture_output=True,
        text=True, timeout=timeout,
    )  # fmt: skip
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stderr[-4000:]}"
    return result.stdout.strip()


def in_subprocess(module: str, call: str, timeout: float = 120, run=run_program, **environment: str) -> str:
    """``run``, of this module or of forked_python, on ``call``, an expression of the names of the test module ``module``."""
    return run(f"import {module} as t; t.{call}", timeout, **environment)


@functools.cache
def answers_of(module: str, calls: tuple[str, ...], timeout: int = 300, **environment: str) -> dict[str, list]:
    """Of each of ``calls``, expressions of the names of ``module``: [what it returns, the error that it raises or None]. One
    fork (forked_python.py) runs all of them. What they return is of JSON."""
    program = f"""
import json, traceback
import {module} as t
found = {{}}
for call in {calls!r}:
    try:
        found[call] = [eval("t." + call), None]
    except Exception:
        found[call] = [None, traceback.format_exc()]
print("found", json.dumps(found))
"""
    return json.loads(forked_python.run_program(program, timeout, **environment).rpartition("found ")[2])
