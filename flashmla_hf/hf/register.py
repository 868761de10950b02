"""Registration with Transformers. Importing this module registers."""

from __future__ import annotations

import threading

from transformers import modeling_utils
from transformers.masking_utils import AttentionMaskInterface

from flashmla_hf.hf import forward, masks, transformers_private
from flashmla_hf.hf.names import NAMES, PAGED_PREFIX, is_fp8

_lock = threading.Lock()


def register() -> None:
    """Makes our names known to Transformers as ``attn_implementation``. Calling it again changes nothing.

    Raises: AttributeError if this release of Transformers lacks something that is wrapped; nothing is changed then.
    """
    with _lock:
        current = [getattr(owner, name) for owner, name, _ in transformers_private.WRAPPED]
        for (owner, name, wrap), original in zip(transformers_private.WRAPPED, current, strict=True):
            if not hasattr(original, "_flashmla_wraps"):
                setattr(owner, name, wrap(original))
        for name in NAMES:
            function = forward.fp8_forward if is_fp8(name) else forward.attention_forward
            AttentionMaskInterface.register(name, masks.flashmla_mask)
            modeling_utils.AttentionInterface.register(name, function)
            # The paged names get no mask function, as in Transformers: continuous batching then builds no mask at all.
            modeling_utils.AttentionInterface.register(PAGED_PREFIX + name, function)


# The import hook of autoload.py registers by importing this module.
register()
