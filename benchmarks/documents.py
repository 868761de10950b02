"""Real text that every machine has: the modules of Python's standard library."""

from __future__ import annotations

import sysconfig
from pathlib import Path


def standard_library() -> dict[str, str]:
    """Long modules of this Python's standard library: name -> source. The same for everyone with this Python."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
    documents = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if left_out.isdisjoint(name.parts) and path.stat().st_size > 20_000:
            documents[str(name)] = path.read_text(encoding="utf-8", errors="replace")
    return documents
