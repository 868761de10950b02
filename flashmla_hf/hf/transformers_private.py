"""Everything of Transformers and torch that is private or differs between their releases.

A new release of Transformers is checked against this file and :mod:`paged`. Checked against 5.17, 5.23 and 5.24. It holds:

* the functions of Transformers that registration wraps (:data:`WRAPPED`), and the reasons to run a model with eager;
* the names of the closures that Transformers' mask functions consist of (:func:`conditions_of`);
* what Transformers declares for the models of a configuration (:func:`is_trusted`);
* the question whether a model collects attention weights (:func:`weights_are_recorded`);
* the question whether context parallelism is active, which torch offers no public function for.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple, NoReturn

import torch
from transformers import masking_utils, modeling_flash_attention_utils, modeling_utils
from transformers.utils import output_capturing

from flashmla_hf import libraries
from flashmla_hf.flash_attn_api import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flashmla_hf.hf import check
from flashmla_hf.hf.names import FP8_NAME, KERNEL_NAME, NAME, NAMES, is_fp8, is_ours
from flashmla_hf.notices import warn_once

# The building blocks of transformers.masking_utils by the names of their closures.
_CAUSAL = "causal_mask_function"
_BIDIRECTIONAL = "bidirectional_mask_function"
_WINDOW = "sliding_window_overlay.<locals>.inner_mask"
_WINDOW_BOTH_WAYS = "sliding_window_bidirectional_overlay.<locals>.inner_mask"
_CHUNKED = "chunked_overlay.<locals>.inner_mask"
_PACKED = "packed_sequence_mask_function.<locals>.inner_mask"
_REMAP = "remap_positions_for_packed_sequence.<locals>.inner_mask"
_AND = "and_masks.<locals>.and_mask"
_AND_CODE = masking_utils.and_masks().__code__

# Their attention classes call Transformers' flash path instead of the interface, which unpads by a 2-D mask itself.
# (The last three are Bark's.)
LEGACY_FLASH_MODEL_TYPES = frozenset({"falcon", "gptj", "semantic", "coarse_acoustics", "fine_acoustics"})


# ---- Mask functions ---------------------------------------------------------------------------------------------------


class Conditions(NamedTuple):
    """The conditions whose conjunction a mask function of Transformers is.

    ``chunk``: the size of the chunks that do not see each other. ``is_packed``: there may be packed sequences.
    """

    is_causal: bool = False
    window: tuple[int, int] | None = None
    chunk: int | None = None
    is_packed: bool = False


def conditions_of(mask_function: Callable) -> Conditions | None:
    """The conditions of ``mask_function``; ``None`` if it has others."""
    if getattr(mask_function, "__module__", "") != masking_utils.__name__:
        return None
    name = mask_function.__qualname__
    cells = {}
    if mask_function.__closure__:
        values = (cell.cell_contents for cell in mask_function.__closure__)
        cells = dict(zip(mask_function.__code__.co_freevars, values, strict=True))
    if name == _CAUSAL:
        return Conditions(is_causal=True)
    if name == _BIDIRECTIONAL:
        return Conditions()
    if name == _WINDOW:
        return Conditions(window=(cells["sliding_window"] - 1, -1))
    if name == _WINDOW_BOTH_WAYS:
        return Conditions(window=(cells["sliding_window"], cells["sliding_window"]))
    if name == _CHUNKED:
        return Conditions(chunk=cells["chunk_size"])
    if name == _PACKED:
        return Conditions(is_packed=True)
    if name == _REMAP:
        return conditions_of(cells["mask_function"])
    if name != _AND:
        return None
    parts = []
    for part in map(conditions_of, cells["mask_functions"]):
        if part is None:
            return None
        parts.append(part)
    windows = [part.window for part in parts if part.window is not None]
    chunks = [part.chunk for part in parts if part.chunk is not None]
    if len(windows) > 1 or len(chunks) > 1:
        return None
    return Conditions(
        any(part.is_causal for part in parts),
        windows[0] if windows else None,
        chunks[0] if chunks else None,
        any(part.is_packed for part in parts),
    )


def conditions_while_compiling(
    mask_function: Callable, local_size: int | None, config, is_bidirectional: bool
) -> Conditions | None:
    """As :func:`conditions_of`, under torch.compile. Dynamo cannot read the cells of a closure, only its code (and its
    ``__qualname__`` from torch 2.13 on)."""
    if mask_function is masking_utils.causal_mask_function:
        return Conditions(is_causal=True)
    if mask_function is masking_utils.bidirectional_mask_function:
        return Conditions()
    if mask_function.__code__ is not _AND_CODE:
        return None
    # Only the create_* functions pass conjunctions (custom ones set use_vmap): a window or chunks if local_size is given,
    # packed sequences, or both. The code does not show whether sequences are packed; looking for them is exact in either case.
    if local_size is None:
        return None if is_bidirectional else Conditions(is_causal=True, is_packed=True)
    is_window = attribute(config, "sliding_window") == local_size
    is_chunk = attribute(config, "attention_chunk_size") == local_size
    if is_window == is_chunk:
        return None
    if is_bidirectional:
        return Conditions(window=(local_size, local_size)) if is_window else None
    if is_window:
        return Conditions(is_causal=True, window=(local_size - 1, -1), is_packed=True)
    return Conditions(is_causal=True, chunk=local_size, is_packed=True)


def attribute(config, name: str):
    """``config.name``, or ``None`` if the configuration has no single value for all layers (some raise then)."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None


# ---- What models declare ----------------------------------------------------------------------------------------------


class _Declared(NamedTuple):
    """What Transformers declares for the models of a configuration class."""

    sdpa: bool
    flash: bool


_declared: dict[type, _Declared] = {}


def _declarations(config_class: type) -> _Declared:
    if config_class not in _declared:
        models = [
            cls
            for cls in _subclasses(modeling_utils.PreTrainedModel)
            if getattr(cls, "config_class", None) is config_class
        ]
        if not models:
            return _Declared(True, True)  # not a model of Transformers but a user's or a test's class
        _declared[config_class] = _Declared(
            any(getattr(cls, "_supports_sdpa", False) for cls in models),
            any(getattr(cls, "_supports_flash_attn", False) for cls in models),
        )
    return _declared[config_class]


@torch.compiler.assume_constant_result
def is_trusted(config_class: type) -> bool:
    """Whether the layers of these models define reliably whether they are causal.

    Transformers declares SDPA or a flash implementation for such models, and both rely on it.
    """
    return any(_declarations(config_class))


@torch.compiler.assume_constant_result
def takes_boolean_masks(config_class: type) -> bool:
    """Whether these models also work with SDPA's masks. Others may use a mask as only eager's floating one allows: they add it
    to their scores, or concatenate it with a floating mask (DeepSeek-V4)."""
    return _declarations(config_class).sdpa


def _subclasses(cls: type) -> Iterator[type]:
    subclass: type
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


# ---- Attention weights ------------------------------------------------------------------------------------------------


def weights_are_recorded() -> bool:
    """Whether a model is collecting attention weights from the outputs of its layers, by Transformers' hooks.

    ``output_attentions=True`` does not reach the attention function of every model: GPT-2 removes it from the arguments.
    """
    collector = output_capturing._active_collector
    if torch.compiler.is_compiling() and not collector.compiling:
        return False  # a layer compiled by itself: the compiler cannot trace a ContextVar
    names = collector.get()
    return bool(names) and any(name.endswith("attentions") for name in names)


# ---- Registration -----------------------------------------------------------------------------------------------------


def _kvcache_function():
    """``flash_attn_with_kvcache`` if this release hands a layer its pages, and a kernel reads them; else ``None``.

    Continuous batching passes block tables if there is such a function. It asks on machines with a GPU alone.
    """
    hands_pages = "v_cache" in inspect.signature(modeling_flash_attention_utils._flash_attention_forward).parameters
    kernel = "sm90" if torch.cuda.is_available() else "cpu"
    return flash_attn_with_kvcache if hands_pages and kernel not in libraries.unavailable else None


def _wrap_lazy_imports(original):
    """Gives our functions for our names.

    Transformers preloads a flash library for every name that contains "flash". It looks on the hub for an unknown name, and
    model init then fails. The functions also serve models that call Transformers' own flash path (Falcon, remote code).
    """

    @functools.wraps(original)
    def lazy_imports(implementation, *args, **kwargs):
        if is_ours(implementation):
            pad, unpad = modeling_flash_attention_utils._pad_input, modeling_flash_attention_utils._unpad_input
            return flash_attn_func, flash_attn_varlen_func, _kvcache_function(), pad, unpad
        return original(implementation, *args, **kwargs)

    lazy_imports._flashmla_wraps = original  # type: ignore[attr-defined]
    return lazy_imports


def _wrap_check_and_adjust(original):
    """Wraps the method in which every choice of a model's attention implementation ends."""

    @functools.wraps(original)
    def check_and_adjust(self, attn_implementation, *args, **kwargs):
        if not is_ours(attn_implementation):
            return original(self, attn_implementation, *args, **kwargs)
        if _must_run_with_eager(self, attn_implementation):
            return original(self, "eager", *args, **kwargs)
        _refuse_fp8(type(self), attn_implementation)
        _declare_compatible(type(self))
        _provide_flash_path(type(self))
        # Transformers loads names in the form of KERNEL_NAME from the hub, so it checks NAME instead.
        checked = attn_implementation.replace(KERNEL_NAME, NAME)
        chosen = original(self, checked, *args, **kwargs)
        return chosen if checked == attn_implementation else chosen.replace(NAME, KERNEL_NAME)

    check_and_adjust._flashmla_wraps = original  # type: ignore[attr-defined]
    return check_and_adjust


def _wrap_get_correct(original):
    """Wraps the method that ``set_attn_implementation`` of a model calls for its submodels, instead of the one above."""

    @functools.wraps(original)
    def get_correct(self, requested_attention, *args, **kwargs):
        if is_ours(requested_attention):
            if _must_run_with_eager(self, requested_attention):
                return original(self, "eager", *args, **kwargs)
            _refuse_fp8(type(self), requested_attention)
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


def _refuse_fp8(model_class: type, implementation: str) -> None:
    """Raises for models on Transformers' flash path: it keeps one set of functions for the process, whatever a model's name."""
    if is_fp8(implementation) and check.uses_flash_path(model_class):
        raise ValueError(
            f"attn_implementation={implementation!r}: expected a model whose layers call the attention interface, got "
            f"{model_class.__name__}, which calls Transformers' flash path. That path is exact here. Use "
            'attn_implementation="flashmla"'
        )


def _declare_compatible(model_class: type) -> None:
    """Adds our names to ``_compatible_flash_implementations``.

    GPT-OSS and similar models list the kernels that know sinks there, and replace every other flash name by one from the hub.
    This runs on first use, so it covers classes that are imported later.
    """
    for cls in model_class.__mro__:
        names = cls.__dict__.get("_compatible_flash_implementations")
        if names is not None and NAME not in names:
            cls._compatible_flash_implementations = [*names, NAME, FP8_NAME]  # type: ignore[attr-defined]


def _class_dictionaries(model_class: type) -> Iterator[tuple[str, dict]]:
    """The dictionaries from an attention implementation to a class in the modules of ``model_class`` and its bases.

    They contain no registered names: Falcon, GPT-J, Bark in 5.17, SAM, SAM-HQ.
    """
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
    """Gives ``model_class`` Transformers' flash path, and adds our names to its dictionaries of classes.

    Falcon, GPT-J and Bark import the flash path only if flash-attn is installed, but use it in any case.
    """
    forward = modeling_flash_attention_utils._flash_attention_forward
    for cls in _model_classes(model_class):
        if check.uses_flash_path(cls):
            vars(sys.modules[cls.__module__]).setdefault("_flash_attention_forward", forward)
    for _, classes in _class_dictionaries(model_class):
        flash_class = classes.get("flash_attention_2")
        if flash_class is not None and not hasattr(flash_class.forward, "_flashmla_wraps"):
            flash_class.forward = _wrap_flash_path(flash_class.forward)
        for ours in NAMES:
            classes.setdefault(ours, flash_class or _own_class(classes))


def _wrap_flash_path(original):
    """Refuses, under our names, what a layer on Transformers' flash path takes and does not honour.

    That path reads a 4-D mask as one of padding, and its layers return their output in place of the weights.
    """
    names = [*inspect.signature(original).parameters]

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        if is_ours(attribute(getattr(self, "config", None), "_attn_implementation")):
            given = dict(zip(names[1:], args, strict=False)) | kwargs
            mask = given.get("attention_mask")
            if mask is not None and mask.dim() != 2:
                _refuse_on_flash_path(self, "attention_mask", "None or 2 dimensions", f"{mask.dim()}: {[*mask.shape]}")
            width = width_before_cut(mask)
            if (
                mask is not None
                and width is not None
                and all(given.get(name) is None for name in ("layer_past", "past_key_values", "cache"))
            ):
                _refuse_on_flash_path(
                    self, "attention_mask", f"{mask.shape[1]} columns, as there are tokens", str(width)
                )
            if given.get("output_attentions"):
                _refuse_on_flash_path(self, "output_attentions", "False", "True")
        return original(self, *args, **kwargs)

    forward._flashmla_wraps = original  # type: ignore[attr-defined]
    return forward


def _refuse_on_flash_path(subject: object, argument: str, expected: str, got: str) -> NoReturn:
    raise ValueError(
        f"flashmla in {type(subject).__name__}: {argument}: expected {expected} (this model calls Transformers' flash path, "
        f'which takes no others), got {got}. Use attn_implementation="eager" or "sdpa"'
    )


_WIDTH = "_flashmla_width"


def mark_cut(mask: torch.Tensor, width: int) -> None:
    """Notes how many columns a mask had, of which the tokens so far left fewer: that many rows has a static cache, and without
    one nobody knows which tokens they are of. Who has the keys finds out."""
    setattr(mask, _WIDTH, width)


def width_before_cut(mask: torch.Tensor | None) -> int | None:
    return getattr(mask, _WIDTH, None)


def refuse_width_of_mask(config, tokens: str, got: torch.Tensor | None) -> NoReturn:
    """Raises for a mask that says nothing of some tokens, or none where a compiled graph does not know how many there are."""
    expected = f"a 2-D mask with a column for each of the {tokens}"
    _refuse_on_flash_path(config, "attention_mask", expected, "None" if got is None else str([*got.shape]))


def refuse_packed_rows(config, mask_function: Callable, batch_size: int) -> None:
    """Raises for packed rows in a batch, which the flash path takes for rows that are not packed: it looks at one row alone."""
    conditions = None if torch.compiler.is_compiling() else conditions_of(mask_function)
    if batch_size > 1 and conditions is not None and conditions.is_packed:
        _refuse_on_flash_path(
            config, "position_ids", "one packed row", f"{batch_size} rows of sequences that begin anew"
        )


# What is replaced in Transformers: (owner, name, what makes the replacement).
WRAPPED = (
    (modeling_flash_attention_utils, "_lazy_imports", _wrap_lazy_imports),
    (modeling_utils.PreTrainedModel, "_check_and_adjust_attn_implementation", _wrap_check_and_adjust),
    (modeling_utils.PreTrainedModel, "get_correct_attn_implementation", _wrap_get_correct),
)


# ---- Context parallelism ----------------------------------------------------------------------------------------------


@torch.compiler.assume_constant_result
def context_parallel_is_active() -> bool:
    """Whether ``torch.distributed.tensor.experimental.context_parallel`` has replaced SDPA right now.

    Torch has no public function for it. Its module keeps the functions that it replaced (monkey-patch mode), or swaps the
    handlers of DTensor's dispatcher (wrapper mode). A graph compiled outside of the region keeps the value: compile inside.
    """
    experimental = "torch.distributed.tensor.experimental"
    for name in (f"{experimental}._context_parallel._attention", f"{experimental}._attention"):
        state = sys.modules.get(name)
        if state is None:
            continue
        if torch.nn.functional.scaled_dot_product_attention in getattr(state, "_replaced_functions", {}):
            return True
        handlers = getattr(state, "existing_custom_ops", None)
        if handlers is not None and state.DTensor._op_dispatcher._custom_op_handlers is not handlers:
            return True
    return False
