"""Registration with Transformers, and everything of it that is private or differs between its releases.

A new release of Transformers is checked against this file and :mod:`paged`. Checked against 5.17, 5.23 and 5.24.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Iterator

import torch
from transformers import modeling_flash_attention_utils, modeling_utils
from transformers.masking_utils import AttentionMaskInterface

from flashmla_hf.flash_attn_api import flash_attn_func, flash_attn_varlen_func
from flashmla_hf.hf import check, forward, masks
from flashmla_hf.hf.names import KERNEL_NAME, NAME, NAMES, PAGED_PREFIX, is_ours
from flashmla_hf.notices import warn_once


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

    lazy_imports._flashmla_wraps = original  # type: ignore[attr-defined]
    return lazy_imports


def _wrap_check_and_adjust(original):
    """Every route to an attention implementation of a model ends in this method."""

    @functools.wraps(original)
    def check_and_adjust(self, attn_implementation, *args, **kwargs):
        if not is_ours(attn_implementation):
            return original(self, attn_implementation, *args, **kwargs)
        if _must_run_with_eager(self, attn_implementation):
            return original(self, "eager", *args, **kwargs)
        _declare_compatible(type(self))
        _provide_flash_path(type(self))
        # Transformers loads names of the shape of KERNEL_NAME from the hub, so the checks are made for NAME.
        checked = attn_implementation.replace(KERNEL_NAME, NAME)
        chosen = original(self, checked, *args, **kwargs)
        return chosen if checked == attn_implementation else chosen.replace(NAME, KERNEL_NAME)

    check_and_adjust._flashmla_wraps = original  # type: ignore[attr-defined]
    return check_and_adjust


def _wrap_get_correct(original):
    """What ``set_attn_implementation`` of a model asks its submodels, in place of the method above."""

    @functools.wraps(original)
    def get_correct(self, requested_attention, *args, **kwargs):
        if is_ours(requested_attention):
            if _must_run_with_eager(self, requested_attention):
                return original(self, "eager", *args, **kwargs)
            _provide_flash_path(type(self))
        return original(self, requested_attention, *args, **kwargs)

    get_correct._flashmla_wraps = original  # type: ignore[attr-defined]
    return get_correct


def _must_run_with_eager(model: modeling_utils.PreTrainedModel, implementation: str) -> bool:
    reason = check.reason_for_eager(type(model), model.config) or _reason_by_classes(type(model))
    if reason is not None:
        warn_once(
            f"flashmla: {reason}. attn_implementation={implementation!r} has no effect there: "
            '"eager" is used. flashmla_hf.check(model) lists the layers.',
            stacklevel=3,
        )
    return reason is not None


def _declare_compatible(model_class: type) -> None:
    """Adds our name to ``_compatible_flash_implementations``: GPT-OSS and its kin list the kernels that know sinks and
    replace every other flash name by one from the hub. On first use, so that classes imported later are covered."""
    for cls in model_class.__mro__:
        names = cls.__dict__.get("_compatible_flash_implementations")
        if names is not None and NAME not in names:
            cls._compatible_flash_implementations = [*names, NAME]  # type: ignore[attr-defined]


def _class_dictionaries(model_class: type) -> Iterator[tuple[str, dict]]:
    """The dictionaries from an attention implementation to a class beside ``model_class`` and its bases. They know no
    registered names: Falcon, GPT-J, Bark in 5.17, SAM, SAM-HQ."""
    for cls in _model_classes(model_class):
        for name, classes in list(vars(sys.modules[cls.__module__]).items()):  # other threads load models, too
            if name.endswith("_ATTENTION_CLASSES") and isinstance(classes, dict) and "eager" in classes:
                yield name, classes


def _model_classes(model_class: type) -> list[type]:
    """``model_class`` and its bases that are models, with the modules that define them."""
    root = modeling_utils.PreTrainedModel
    bases = [cls for cls in model_class.__mro__ if issubclass(cls, root) and cls is not root]
    return [cls for cls in bases if cls.__module__ in sys.modules]


def _reason_by_classes(model_class: type) -> str | None:
    """Why ``model_class`` must run with eager: a dictionary holds no class that may be given our masks."""
    for name, classes in _class_dictionaries(model_class):
        if "flash_attention_2" not in classes and _reads_masks(_own_class(classes)):
            return f"{model_class.__name__} chooses its attention class from {name}, which knows no registered names"
    return None


def _own_class(classes: dict) -> type[torch.nn.Module]:
    """The class that computes attention by itself, in memory that is linear in the sequence if there is one."""
    return classes.get("sdpa", classes["eager"])


def _reads_masks(attention_class: type[torch.nn.Module]) -> bool:
    return "attention_mask" in inspect.signature(attention_class.forward).parameters


def _provide_flash_path(model_class: type) -> None:
    """Falcon, GPT-J and Bark import Transformers' flash path only where flash-attn is installed, and use it unasked.
    Dictionaries of classes get our names."""
    forward = modeling_flash_attention_utils._flash_attention_forward
    for cls in _model_classes(model_class):
        if check.uses_flash_path(cls):
            vars(sys.modules[cls.__module__]).setdefault("_flash_attention_forward", forward)
    for _, classes in _class_dictionaries(model_class):
        for ours in NAMES:
            classes.setdefault(ours, classes.get("flash_attention_2", _own_class(classes)))


# What of Transformers is replaced, and by what.
_WRAPPED = (
    (modeling_flash_attention_utils, "_lazy_imports", _wrap_lazy_imports),
    (modeling_utils.PreTrainedModel, "_check_and_adjust_attn_implementation", _wrap_check_and_adjust),
    (modeling_utils.PreTrainedModel, "get_correct_attn_implementation", _wrap_get_correct),
)
_lock = threading.Lock()


def register() -> None:
    """Makes our names known to Transformers as ``attn_implementation``. Calling it again changes nothing.

    Raises: AttributeError if this release of Transformers lacks something that is wrapped; nothing is changed then.
    """
    with _lock:
        current = [getattr(owner, name) for owner, name, _ in _WRAPPED]
        for (owner, name, wrap), original in zip(_WRAPPED, current, strict=True):
            if not hasattr(original, "_flashmla_wraps"):
                setattr(owner, name, wrap(original))
        for name in NAMES:
            AttentionMaskInterface.register(name, masks.flashmla_mask)
            modeling_utils.AttentionInterface.register(name, forward.attention_forward)
            # The paged names get no mask function, as in Transformers: continuous batching then builds no mask at all.
            modeling_utils.AttentionInterface.register(PAGED_PREFIX + name, forward.attention_forward)


# Whoever imports this module wants that; the import hook of autoload.py relies on it.
register()
