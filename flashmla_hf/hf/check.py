"""Which attention layers of a model use the kernel, and why others do not.

Transformers accepts any registered attention implementation for any model, also for those whose layers never ask for
it (Bloom, MPT, DeBERTa, ...) and go on computing attention by themselves. Those run with "eager" and a warning
(:func:`reason_for_eager`). The code of a layer's class says whether it asks: it mentions ``ALL_ATTENTION_FUNCTIONS``,
or Transformers' flash path ``_flash_attention_forward``.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch

from flashmla_hf import libraries
from flashmla_hf.backends import aten_flash
from flashmla_hf.hf.names import is_fp8, is_ours

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_FLASH_PATH = "_flash_attention_forward"
# Arguments by which sparse models and paged caches tell an attention function which keys to read.
_SELECTING_KWARGS = {"indices", "block_indices", "sinks", "block_table"}
# What the calls of attention layers may name: the parameters of hf.forward.attention_forward.
HONOURED_KWARGS = frozenset(
    {
        "module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "sliding_window",
        "softcap", "s_aux", "position_bias", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q",
        "max_length_k", "output_attentions", "deterministic",
    }
)  # fmt: skip
# Attributes of layers whose scores torch's FlashAttention does not compute: softcap, sinks.
_SCORE_CHANGES = ("attn_logit_softcapping", "softcap", "sinks")
# A call by which a layer only looks at its mask from another side.
_HARMLESS_CALLS = {"to", "contiguous", "type", "get", "pop"}


@dataclass(frozen=True)
class Layer:
    """One attention layer: its name in the model, its class, whether it uses the kernel, and why (not)."""

    name: str
    class_name: str
    uses_kernel: bool
    reason: str


@dataclass(frozen=True)
class Report:
    """What :func:`check` found. ``print(report)`` is meant to be read; ``bool(report)`` is whether every layer uses the
    kernel."""

    model: str
    layers: tuple[Layer, ...]

    def __bool__(self) -> bool:
        return bool(self.layers) and all(layer.uses_kernel for layer in self.layers)

    def __str__(self) -> str:
        using = sum(layer.uses_kernel for layer in self.layers)
        lines = [f"{self.model}: {using} of {len(self.layers)} attention layers use the flashmla kernel"]
        groups: dict[tuple, list[str]] = {}
        for layer in self.layers:
            groups.setdefault((layer.uses_kernel, layer.class_name, layer.reason), []).append(layer.name)
        for (uses_kernel, class_name, reason), names in groups.items():
            where = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
            lines.append(f"  [{'yes' if uses_kernel else 'no '}] {len(names)} x {class_name} ({where}): {reason}")
        return "\n".join(lines)


def check(model: torch.nn.Module) -> Report:
    """A :class:`Report` on every attention layer of ``model``, a Transformers model (or a module that contains one).

    Raises TypeError if ``model`` is not a module, its name for example.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"check: model: expected a torch.nn.Module, got {type(model).__name__}; load it first")
    layers = []
    for name, module in model.named_modules():
        if not _is_attention(type(module)) or _contains_attention(module):
            continue
        layers.append(Layer(name, type(module).__name__, *_verdict(module)))
    return Report(type(model).__name__, tuple(layers))


def reason_for_eager(model_class: type, config=None) -> str | None:
    """Why a model of ``model_class`` must run with ``"eager"`` when our name is asked for; ``None`` for every other.

    Transformers checks no flag for registered names. But an attention class of its own that never calls us still reads
    the masks of Transformers' mask layer, which are made for the name: boolean ones, which it would add to its scores.
    And some layers pass what they selected, or weights of their own, in place of eager's masks.
    """
    classes = _attention_classes(model_class.__module__)
    own = [cls for cls in classes if not _names_used(cls) & {_INTERFACE, _FLASH_PATH}]
    if classes and len(own) == len(classes):
        return f"the attention layers of {model_class.__name__} compute attention by themselves and never call others"
    if model_class.__module__.endswith(".modeling_gpt_neo"):
        return f"the flash path of {model_class.__name__} in Transformers leaves out its local windows"
    if uses_flash_path(model_class) and getattr(config, "alibi", False):
        return f"the flash path of {model_class.__name__} in Transformers has no ALiBi"
    unknown = sorted(set().union(*(_keywords_passed(cls) for cls in classes)) - HONOURED_KWARGS)
    if unknown:
        return (
            f"attention layers of {model_class.__name__} pass {', '.join(unknown)}, which eager's attention honours "
            "(sparse models select keys this way)"
        )
    declares_masks = getattr(model_class, "_supports_sdpa", False) or getattr(
        model_class, "_supports_flash_attn", False
    )
    if not declares_masks and any("softmax" in _names_used(cls) for cls in own):
        return (
            f"some attention layers of {model_class.__name__} compute attention by themselves, with eager's masks only"
        )
    return None


def uses_flash_path(model_class: type) -> bool:
    """Whether attention classes beside ``model_class`` call Transformers' flash path instead of the interface."""
    return any(_FLASH_PATH in _names_used(cls) for cls in _attention_classes(model_class.__module__))


def _verdict(module: torch.nn.Module) -> tuple[bool, str]:
    cls: type = type(module)
    names = _names_used(cls)
    if not names & {_INTERFACE, _FLASH_PATH}:
        return False, "its class computes attention by itself and never asks for an attn_implementation"
    config = getattr(module, "config", None)
    implementation = getattr(config, "_attn_implementation", None)
    if implementation == "eager" and (reason := _module_reason(cls.__module__, config)) is not None:
        return False, f"{reason}; 'eager' is used"
    if not is_ours(implementation):
        return False, f'its attn_implementation is {implementation!r}; set_attn_implementation("flashmla") changes it'
    if unknown := sorted(_keywords_passed(cls) - HONOURED_KWARGS):
        return False, f"it passes {', '.join(unknown)}, which is refused with an error"
    if is_fp8(implementation):
        return _fp8_verdict(module)
    if "position_bias" in _keywords_passed(cls):
        return False, "it adds a position_bias to the scores: exact, but computed outside the fused kernel"
    if _changes_its_mask(cls):
        return False, "it changes the mask that it is given: exact, but computed outside the fused kernel"
    notes = []
    if names & {_FLASH_PATH} and _INTERFACE not in names:
        notes.append("through Transformers' flash path")
    if (dropout := _dropout(module)) > 0.0:
        if _drops_in_a_fused_kernel(module, dropout):
            where = "computed by torch's FlashAttention (torch_flash) in fp16 and bf16"
        else:
            where = "exact, but computed outside the fused kernel"
        notes.append(f"in training its dropout of {dropout} is {where}")
    return True, "; ".join(["it calls the kernel", *notes])


def _fp8_verdict(module: torch.nn.Module) -> tuple[bool, str]:
    """The verdict on a layer that calls us for fp8, which covers less."""
    cls: type = type(module)
    way_out = 'use attn_implementation="flashmla"'
    head_dim = getattr(module, "head_dim", None)
    limits = libraries.sm90_limits
    if any(p.is_cuda for p in module.parameters()):
        if "sm90" in libraries.unavailable or limits is None:
            return False, f"it asks for fp8, which has no kernel here: its call raises; {way_out}"
        if isinstance(head_dim, int) and head_dim > limits.largest_fp8:
            return (
                False,
                f"it asks for fp8 of head_dim {head_dim}, for which a GPU has no kernel: its call raises; {way_out}",
            )
    if "position_bias" in _keywords_passed(cls) or _changes_its_mask(cls):
        return (
            False,
            f"it asks for fp8, which takes no position_bias and no mask of a layer's own: its call raises; {way_out}",
        )
    notes = ["it calls the kernel in fp8, which is not exact; on a GPU that is not a Hopper the call raises"]
    if (dropout := _dropout(module)) > 0.0:
        notes.append(f"in training its dropout of {dropout} raises")
    return True, "; ".join(notes)


def _dropout(module: torch.nn.Module) -> float:
    given = (getattr(module, name, 0.0) for name in ("attention_dropout", "dropout"))
    return next((p for p in given if isinstance(p, float)), 0.0)


def _drops_in_a_fused_kernel(module: torch.nn.Module, dropout: float) -> bool:
    """Whether ``torch_flash`` computes this layer in fp16 and bf16, as far as its device and its attributes tell."""
    weight = next(module.parameters(), None)
    if weight is None or aten_flash.device_refusal(weight.device) or aten_flash.dropout_refusal(dropout):
        return False
    head_dim = getattr(module, "head_dim", None)
    is_small = not isinstance(head_dim, int) or head_dim <= aten_flash.MAX_HEAD_DIM
    return is_small and not any(getattr(module, name, None) is not None for name in _SCORE_CHANGES)


def _module_reason(module_name: str, config) -> str | None:
    models = [cls for cls in _classes_in(module_name) if hasattr(cls, "_supports_sdpa")]
    return next((reason for cls in models if (reason := reason_for_eager(cls, config)) is not None), None)


def _is_attention(cls: type) -> bool:
    return "Attention" in cls.__name__ or "Attn" in cls.__name__ or _INTERFACE in _names_used(cls)


def _contains_attention(module: torch.nn.Module) -> bool:
    """Whether ``module`` is only the wrapper of the layer that computes (``BertAttention`` around
    ``BertSelfAttention``)."""
    cls: type = type(module)
    if _names_used(cls) & {_INTERFACE, _FLASH_PATH}:
        return False
    return any(_is_attention(type(child)) for child in module.modules() if child is not module)


def _classes_in(module_name: str) -> list[type]:
    """The classes that the module ``module_name`` defines, of a copy: other threads may be adding names to it."""
    members = list(vars(sys.modules[module_name]).values()) if module_name in sys.modules else []
    return [cls for cls in members if inspect.isclass(cls) and cls.__module__ == module_name]


def _attention_classes(module_name: str) -> list[type]:
    return [cls for cls in _classes_in(module_name) if issubclass(cls, torch.nn.Module) and "Attention" in cls.__name__]


@functools.cache
def _names_used(cls: type) -> frozenset[str]:
    """Global names and attributes mentioned in the code of ``cls`` and its bases (the libraries' base classes left
    out)."""
    return frozenset(name for code in _codes(cls) for name in code.co_names)


@torch.compiler.assume_constant_result
def is_about_attention(layer_class: type, name: str) -> bool:
    """Whether ``name``, an argument unknown to :func:`flashmla_hf.hf.forward.attention_forward`, may change the attention
    of a layer: it selects keys, the layer itself names it in its call, or eager's attention function beside it does."""
    return name in _SELECTING_KWARGS or name in _keywords_passed(layer_class) or name in _eager_arguments(layer_class)


def passes(layer_class: type, name: str) -> bool:
    """Whether a layer names ``name`` in its call of the attention interface."""
    return name in _keywords_passed(layer_class)


@functools.cache
def _keywords_passed(cls: type) -> frozenset[str]:
    """Names of the keyword arguments in calls of the attention interface by ``cls``: Python keeps those of a call as a
    constant tuple of strings, and every such call names the scale or the dropout."""
    codes = (code for code in _codes(cls) if _INTERFACE in code.co_names)
    constants = (constant for code in codes for constant in code.co_consts if isinstance(constant, tuple))
    return frozenset(
        name
        for names in constants
        if {"scaling", "dropout"} & {name for name in names if isinstance(name, str)}
        for name in names
    )


@functools.cache
def _changes_its_mask(cls: Any) -> bool:
    """Whether the mask in the interface's call of ``cls.forward`` is computed there: concatenated, added to, made."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward))))
    except (OSError, TypeError, SyntaxError):
        return False
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        mask = keywords.get("attention_mask", call.args[4] if len(call.args) > 4 else None)
        if not keywords.keys() & {"scaling", "dropout"} or mask is None:
            continue
        values = [mask]
        if isinstance(mask, ast.Name):
            values = [
                node.value
                for node in ast.walk(tree)
                if isinstance(node, (ast.Assign, ast.AugAssign))
                and any(name.id == mask.id for name in ast.walk(node) if isinstance(name, ast.Name)
                        and isinstance(name.ctx, ast.Store))
            ]  # fmt: skip
        if any(_computes(value) for value in values):
            return True
    return False


def _computes(value: ast.expr) -> bool:
    if isinstance(value, ast.IfExp):
        return _computes(value.body) or _computes(value.orelse)
    if isinstance(value, ast.Call):
        return not isinstance(value.func, ast.Attribute) or value.func.attr not in _HARMLESS_CALLS
    return isinstance(value, (ast.BinOp, ast.UnaryOp))


@functools.cache
def _eager_arguments(cls: type) -> frozenset[str]:
    """Names of the parameters of eager's attention functions that the code of ``cls`` mentions."""
    names: set[str] = set()
    for base in cls.__mro__:
        contents = vars(sys.modules.get(base.__module__, object))
        for name in _names_used(cls):
            function = contents.get(name)
            if "eager" in name and inspect.isfunction(function):
                names |= inspect.signature(function).parameters.keys()
    return frozenset(names)


def _codes(cls: type) -> Iterator[CodeType]:
    for base in cls.__mro__:
        # PreTrainedModel mentions the interface too, to look up names.
        is_library = base.__module__.startswith("transformers.") and not base.__module__.startswith(
            "transformers.models."
        )
        if is_library or base.__module__.startswith("torch.") or base is object:
            continue
        for member in vars(base).values():
            function = inspect.unwrap(member) if callable(member) else None
            code = getattr(function, "__code__", None)
            pending = [code] if code is not None else []
            while pending:
                code = pending.pop()
                yield code
                pending.extend(constant for constant in code.co_consts if isinstance(constant, CodeType))
