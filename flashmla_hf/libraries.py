"""The compiled libraries beside this package: which there are, and why one is not loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch

# Dispatch key -> (implementation name, shared library beside this file). The libraries hold no Python symbols and use
# torch's stable ABI, so one file serves every torch >= 2.10 and every Python.
LIBRARIES = {"CPU": ("cpu", "libflashmla_cpu.so"), "CUDA": ("sm90", "libflashmla_sm90.so")}

# Implementation name -> why its library is not loaded; no entry means that it is loaded and registered. The entry "direct"
# is about the fast path (:mod:`flashmla_hf.direct`), without which every call takes the operators.
unavailable: dict[str, str] = {}


def path_of(filename: str) -> Path:
    """The path of a compiled file, which is built into the package's own directory."""
    return Path(__file__).with_name(filename)


class Sm90Limits(NamedTuple):
    """Head dims of the Hopper kernels are multiples of ``multiple``, up to ``largest``, of caches up to ``largest_decode``, of
    latents in caches up to ``largest_latent`` (qk, v), and in fp8 up to ``largest_fp8``. Those of caches in fp8 are multiples
    of ``e4m3_multiple`` up to ``largest_e4m3_decode``."""

    multiple: int
    largest: int
    largest_decode: int
    largest_latent: tuple[int, int]
    largest_fp8: int
    e4m3_multiple: int
    largest_e4m3_decode: int


def _sm90_limits() -> Sm90Limits | None:
    """What setup.py writes from csrc/sm90/tiles.h. ``None``: not known."""
    try:
        limits = json.loads(path_of("_build.json").read_text())["sm90"]
        qk, v = limits["largest_latent_head_dims"]
        return Sm90Limits(
            limits["head_dim_multiple"], limits["largest_head_dim"], limits["largest_decode_head_dim"], (qk, v),
            limits["largest_fp8_head_dim"], limits["e4m3_head_dim_multiple"], limits["largest_e4m3_decode_head_dim"],
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return None


sm90_limits = _sm90_limits()


def _load() -> None:
    """Loads every library that was built, which registers its kernels with torch, and fills :data:`unavailable`."""
    for impl, filename in LIBRARIES.values():
        path = path_of(filename)
        if not path.exists():
            unavailable[impl] = f"{filename} was not built"
            continue
        try:
            torch.ops.load_library(path)
        except OSError as error:
            if impl == "sm90" and torch.version.cuda is None:
                # The loader's own message would be that libtorch_cuda.so is missing.
                unavailable[impl] = f"{filename} needs a torch with CUDA: torch {torch.__version__} has none"
            else:
                unavailable[impl] = f"{filename} does not load into torch {torch.__version__}: {error}"
            continue
        if impl == "sm90" and sm90_limits is None:
            unavailable[impl] = f"_build.json does not hold the limits of {filename}: build the package again"


_load()
