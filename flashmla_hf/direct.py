"""The fast path: plain calls reach the compiled libraries without torch's dispatcher (csrc/direct/direct.cpp).

The dispatcher takes longer than the launch of a short kernel. Each function here returns ``None`` if the fast path does not
apply: a dispatch mode, a profiler or ``torch.func`` is active, a tensor is a subclass or a negated view, a tensor must be
copied first, or an argument is invalid. Nothing has been computed then, and the caller takes the operators, which report
errors.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from flashmla_hf import libraries, recompute_cache, tested_releases

# The module of Python's limited API, beside this file.
FILENAME = "_direct.abi3.so"

# Whether calls may take the fast path. :func:`load` turns it on; tests that replace an implementation turn it off.
enabled = False

module: Any = None


def is_tested_torch() -> bool:
    """Whether the module knows everything that watches calls in the torch that is imported: another release may have more."""
    return tested_releases.is_tested("torch", torch.__version__)


def load(apply_attention: Any) -> None:
    """Loads the module and turns the fast path on, or writes the reason into :data:`libraries.unavailable`.

    Args:
        apply_attention: the autograd function of the operators, applied to calls that need gradients.
    """
    global module, enabled
    if not libraries.path_of(FILENAME).exists():
        libraries.unavailable["direct"] = f"{FILENAME} was not built"
        return
    if not is_tested_torch():
        releases = ", ".join(tested_releases.TESTED["torch"])
        libraries.unavailable["direct"] = (
            f"off: tested with torch {releases}, and this is {torch.__version__}; every call goes through torch's dispatcher"
        )
        level = logging.WARNING if os.environ.get("FLASHMLA_LOG", "0") == "1" else logging.INFO
        logging.getLogger("flashmla_hf").log(level, "%s: %s", FILENAME, libraries.unavailable["direct"])
        return
    device_types = {"CPU": 0, "CUDA": 1}  # c10/core/DeviceType.h
    loaded = [
        (device_types[key], impl, str(libraries.path_of(filename)))
        for key, (impl, filename) in libraries.LIBRARIES.items()
        if impl not in libraries.unavailable
    ]
    try:
        from flashmla_hf import _direct

        _direct.set_up(apply_attention, tuple(loaded))
    except (ImportError, AttributeError, RuntimeError) as error:
        # This torch lacks something that the module uses, or the libraries are of another build.
        libraries.unavailable["direct"] = f"{FILENAME} is not used with torch {torch.__version__}: {error}"
        return
    module, enabled = _direct, True


def attend(request: tuple) -> Any:
    """``flashmla_hf.attention`` of a plain call: out, or (out, lse); ``None`` if the fast path does not apply.

    ``request`` is the tuple that :func:`flashmla_hf.dispatch.attention` builds, in the order that ``attend`` of
    csrc/direct/direct.cpp reads. A recomputed layer gets the outputs of its first run by the operators.
    """
    return module.attend(*request) if enabled and recompute_cache.active.cache is None else None


def decode(request: tuple) -> Any:
    """``flashmla_hf.decode_attention`` of a plain call without new keys: out, or (out, lse); ``None`` if the fast path does not
    apply. ``request`` is the tuple that it builds, in the order that ``decode`` of csrc/direct/direct.cpp reads."""
    return module.decode(*request) if enabled else None


def backward(dout, dlse, out, lse, needs: tuple[bool, ...], inputs: tuple) -> tuple | None:
    """The gradients of q, k, v and sinks (``None`` for those not in ``needs``); ``None`` if the fast path does not apply.

    ``inputs`` are the operator's arguments in order. A graph of the gradients (``create_graph=True``) is refused by the
    operator, so it does not come from here.
    """
    if not enabled or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    return module.backward(dout, dlse, out, lse, *needs, *inputs)
