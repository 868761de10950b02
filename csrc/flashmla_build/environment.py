"""What is found in the environment that the package is installed into: torch, Python's headers, a C++ compiler."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from flashmla_build.terminal import fail

MINIMUM_TORCH = (2, 10)


def site_packages() -> Iterator[Path]:
    """The package directories of the environment being installed into.

    pip's build isolation hides site-packages from ``sys.path`` but runs the environment's own interpreter, so sysconfig
    still names the right directories. uv runs an interpreter of its own making: uv's process knows the environment.
    """
    yield from (Path(sysconfig.get_path(key)) for key in ("purelib", "platlib"))
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    prefixes = [Path(os.environ["VIRTUAL_ENV"])] if "VIRTUAL_ENV" in os.environ else []
    yield from (prefix / "lib" / version / "site-packages" for prefix in (*prefixes, *prefixes_of_uv()))
    yield from (Path(p) for p in (*site.getsitepackages(), site.getusersitepackages(), *sys.path))


def prefixes_of_uv(process: Path | None = None) -> list[Path]:
    """Where uv looks for the environment that it installs into, if it is what runs this build: --python, VIRTUAL_ENV, .venv."""
    process = process or Path(f"/proc/{os.getppid()}")
    try:
        words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        if Path(words[0]).name != "uv":
            return []
        pairs = (process / "environ").read_bytes().decode(errors="replace").split("\0")
        here = (process / "cwd").resolve()
    except OSError:  # not Linux
        return []
    variables = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    given = [following for word, following in itertools.pairwise(words) if word in ("-p", "--python")]
    given += [word.partition("=")[2] for word in words if word.startswith("--python=")]
    # An interpreter, its environment, or a version, which names no folder.
    paths = [here / name for name in given if "/" in name]
    found = [path.parents[1] if path.parent.name == "bin" else path for path in paths]
    found += [here / variables["VIRTUAL_ENV"]] if variables.get("VIRTUAL_ENV") else []
    return [*found, *(folder / ".venv" for folder in (here, *here.parents))]


def find_torch() -> Path:
    override = os.environ.get("FLASHMLA_TORCH_DIR")
    for place in [*([Path(override).parent] if override else []), *site_packages()]:
        package = place / "torch"
        if (package / "version.py").is_file():
            text = (package / "version.py").read_text()
            version = re.search(r"__version__ = '([^']+)'", text).group(1)
            if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_TORCH:
                fail(f"torch {version} is too old: install torch >= {'.'.join(map(str, MINIMUM_TORCH))} first.")
            return package
    fail(
        "torch was not found in this environment: install it first (pip install torch), or name its directory in "
        "FLASHMLA_TORCH_DIR, or build with --no-build-isolation."
    )


def torch_without_cuda(torch_dir: Path) -> str | None:
    """One sentence if this torch is built without CUDA. Read from its files: build isolation cannot import torch."""
    text = (torch_dir / "version.py").read_text()
    if not re.search(r"^cuda\b[^=\n]*= *None\b", text, re.M):
        return None
    version = re.search(r"__version__ = '([^']+)'", text)[1]
    return (
        f"torch {version} has no CUDA, and the Hopper library, minutes of compiling, would not load into it; "
        "FLASHMLA_BUILD=cuda builds it all the same."
    )


def missing_for_direct(torch_dir: Path) -> str | None:
    """One sentence: why _direct.abi3.so cannot be built here; it saves a few microseconds a call, and all else works."""
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's headers (Python.h, of a package like python3-dev) were not found."
    if "struct DLPackExchangeAPI" not in (torch_dir / "include" / "ATen" / "dlpack.h").read_text():
        return "this torch's ATen/dlpack.h has no DLPackExchangeAPI."
    return None


def find_cxx() -> list[str]:
    for candidate in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if candidate and shutil.which(shlex.split(candidate)[0]):
            return shlex.split(candidate)
    fail("no C++ compiler was found: install g++ (>= 9) or clang++ (>= 10), or name one in CXX.")
