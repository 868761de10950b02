"""What this package tells its user while it runs: warnings, each given once, and the log of choices (``FLASHMLA_LOG=1``)."""

from __future__ import annotations

import logging
import os
import warnings

import torch

from flashmla_hf.decode_ops import DecodeArguments
from flashmla_hf.ops import Arguments, dtype_name

logger = logging.getLogger("flashmla_hf")

# Read once: the forward pass reads no environment variable.
LOG_CHOICES = os.environ.get("FLASHMLA_LOG", "0") == "1"

_logged: set[tuple] = set()
_warned: set[str] = set()


def warn_once(message: str, stacklevel: int) -> None:
    """``warnings.warn``, the first time that this process gives the message. ``stacklevel`` counts this function, too."""
    if message not in _warned and not torch.compiler.is_compiling():
        _warned.add(message)
        warnings.warn(message, stacklevel=stacklevel)


def log_choice(call: Arguments | DecodeArguments, impl: str, reason: str) -> None:
    """Logs which implementation computes calls of this shape and why, once for each."""
    if not LOG_CHOICES or torch.compiler.is_compiling():
        return
    key = (tuple(call.q.shape), tuple(call.k.shape), call.v.shape[-1], call.q.dtype, impl, reason)
    if key not in _logged:
        _logged.add(key)
        logger.warning(
            "q%s k%s head_dim_v=%d %s -> %s (%s)", [*key[0]], [*key[1]], key[2], dtype_name(key[3]), impl, reason
        )
