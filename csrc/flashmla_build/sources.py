"""The libraries, their sources, and the options that every compiler of them gets."""

from __future__ import annotations

import importlib.util
import json
import platform
import sysconfig
import zlib
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1]
ROOT = CSRC.parent
# The oldest torch whose stable ABI the libraries use (torch/csrc/stable/version.h).
TORCH_TARGET_VERSION = "0x020a000000000000"
CPU, SM90, DIRECT = "flashmla_hf.libflashmla_cpu", "flashmla_hf.libflashmla_sm90", "flashmla_hf._direct"
BACKENDS = {CPU: "cpu", SM90: "sm90", DIRECT: "direct"}  # directories of csrc


def source_table(backend: str) -> dict:
    return json.loads((CSRC / backend / "sources.json").read_text())


def sources_of(backend: str) -> list[tuple[Path, list[str]]]:
    """(source, flags) of a library on this machine's architecture."""
    table = source_table(backend)
    return [
        (path, [*table["common_flags"], *row.get("flags", [])])
        for row in table["sources"]
        if row.get("arch") in (None, platform.machine())
        for path in (sorted(ROOT.glob(row["file"])) if "*" in row["file"] else [ROOT / row["file"]])
    ]


def head_dim_limits() -> dict[str, int]:
    """Which head dims the Hopper kernels take, from their table."""
    spec = importlib.util.spec_from_file_location("sm90_tiles", CSRC / "sm90" / "tiles.py")
    tiles = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiles)
    return tiles.limits()


def macros_and_includes(name: str, torch_dir: Path) -> list[str]:
    """Options of every source of a library; csrc/check_headers.py compiles with them, too."""
    # -isystem: warnings in the headers of others are not ours to see.
    options = [f"-DFLASHMLA_DIRECT_ABI={direct_abi()}u", f"-I{CSRC}", "-isystem", str(torch_dir / "include")]
    if name == DIRECT:  # of torch it sees DLPack's structures, which are an ABI of their own
        return [*options, "-isystem", sysconfig.get_path("include")]
    return [*options, f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]


def direct_abi() -> int:
    """Of the types that csrc/direct/direct.cpp and the libraries share: of another build they are not called directly."""
    return zlib.crc32(b"".join((CSRC / name).read_bytes() for name in ("direct.h", "checks.h", "checks_decode.h")))
