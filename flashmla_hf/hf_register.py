"""Registration with Transformers, and everything of it that is private or differs between its releases.

A new release of Transformers is checked against this file and :mod:`hf_paged`. Checked against 5.17, 5.23 and 5.24.
"""

from __future__ import annotations

import functools
import sys

from transformers import modeling_flash_attention_utils, modeling_utils
from transformers.masking_utils import AttentionMaskInterface

from flashmla_hf import hf, hf_check, hf_masks
from flashmla_hf.dispatch import flash_attn_func, flash_attn_varlen_func
from flashmla_hf.hf_names import NAME, NAMES, PAGED_PREFIX, is_ours


def _wrap_lazy_imports(original):
    """Transformers preloads a flash library for every name that contains "flash", from the hub if it does not know the
    name, and model init then fails. For our names this gives our functions; they also serve models that call
    Transformers' own flash path (Falcon, remote code)."""

    @functools.wraps(original)
    def lazy_imports(implementation, *args, **kwargs):
        if is_ours(implementation):
            pad, unpad = modeling_flash_attention_utils._pad_input, modeling_flash_attention_utils._unpad_input
            return flash_attn_func, flash_attn_varlen_func, None, pad, unpad
        return original(implementation, *args, **kwargs)

    lazy_imports._flashmla_wraps = original
    return lazy_imports


def _wrap_check_and_adjust(original):
    """Every route to an attention implementation ends in this method of the model."""

    @functools.wraps(original)
    def check_and_adjust(self, attn_implementation, *args, **kwargs):
        if is_ours(attn_implementation):
            reason = hf_check.reason_for_eager(type(self))
            if reason is not None:
                hf._warn_once(
                    f"flashmla: {reason}. attn_implementation={attn_implementation!r} has no effect there: "
                    '"eager" is used. flashmla_hf.check(model) lists the layers.'
                )
                return original(self, "eager", *args, **kwargs)
            _declare_compatible(type(self))
            _provide_flash_path(type(self))
        return original(self, attn_implementation, *args, **kwargs)

    check_and_adjust._flashmla_wraps = original
    return check_and_adjust


def _declare_compatible(model_class: type) -> None:
    """Adds our name to ``_compatible_flash_implementations``: GPT-OSS and its kin list the kernels that know sinks and
    replace every other flash name by one from the hub. On first use, so that classes imported later are covered."""
    for cls in model_class.__mro__:
        names = cls.__dict__.get("_compatible_flash_implementations")
        if names is not None and NAME not in names:
            cls._compatible_flash_implementations = [*names, NAME]


def _provide_flash_path(model_class: type) -> None:
    """Falcon, GPT-J and Bark import Transformers' flash path only where flash-attn is installed, use it unasked,
    and in 5.17 choose their attention class from a dictionary that knows no registered names."""
    if not hf_check.uses_flash_path(model_class):
        return
    contents = vars(sys.modules[model_class.__module__])
    contents.setdefault("_flash_attention_forward", modeling_flash_attention_utils._flash_attention_forward)
    for name, classes in contents.items():
        if name.endswith("_ATTENTION_CLASSES") and "flash_attention_2" in classes:
            for ours in NAMES:
                classes.setdefault(ours, classes["flash_attention_2"])


def register() -> None:
    """Makes ``attn_implementation="flashmla"`` (and ``"fmla"``) known to Transformers. Calling it again changes
    nothing."""
    for name in NAMES:
        AttentionMaskInterface.register(name, hf_masks.flashmla_mask)
        modeling_utils.AttentionInterface.register(name, hf.attention_forward)
        # The paged names get no mask function, as in Transformers: continuous batching then builds no mask at all.
        modeling_utils.AttentionInterface.register(PAGED_PREFIX + name, hf.attention_forward)
    for owner, name, wrap in (
        (modeling_flash_attention_utils, "_lazy_imports", _wrap_lazy_imports),
        (modeling_utils.PreTrainedModel, "_check_and_adjust_attn_implementation", _wrap_check_and_adjust),
    ):
        current = getattr(owner, name)
        if not hasattr(current, "_flashmla_wraps"):
            setattr(owner, name, wrap(current))


# Whoever imports this module wants that; the import hook of autoload.py relies on it.
register()
