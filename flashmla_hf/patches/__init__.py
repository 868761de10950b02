"""Memory patches for long-context training, and one for decoding: :func:`patch`, :func:`patch_report` and :func:`unpatch`.

Each patch removes one of the components of memory that grow with the sequence. It finds its place by the structure of the
model, and changes one model in place:

=================  ====================================================================================================
loss               linear layer and cross-entropy over chunks of tokens: no logits are stored (:mod:`loss`)
mlp                the layer's token-wise block runs over tiles of tokens, and again in backward (:mod:`mlp`)
norm               norms save their input instead of its fp32 copies (:mod:`mlp`)
rope               queries and keys are rotated in place (:mod:`rope`)
attention          the attention block runs over chunks of the sequence; not a default (:mod:`attention`)
lora               a linear layer and its adapter share one result (:mod:`lora`)
checkpointing      a decoder layer keeps its input and runs again in backward (:mod:`checkpointing`)
keep_attention     checkpointed layers keep their attention's (out, lse): the kernel runs once (:mod:`checkpointing`)
offload            checkpointed layers keep their tensors in pinned host memory (:mod:`offload`)
mla_decode         decoding attends to cached latents and does not expand them; not a default (:mod:`mla`)
=================  ====================================================================================================

docs/patches.md lists what each saves and costs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from torch import nn

from flashmla_hf.patches import attention, checkpointing, lora, loss, mla, mlp, report, rope, structure, weights
from flashmla_hf.patches.replacements import Replacements
from flashmla_hf.patches.report import PatchReport
from flashmla_hf.patches.structure import NEEDS_CHECKPOINTING, PatchError, UnsupportedPatch

__all__ = [
    "DEFAULT_PATCHES", "PATCHES", "PATCH_OPTIONS", "PatchError", "PatchReport", "UnsupportedPatch", "patch",
    "patch_report", "unpatch",
]  # fmt: skip

PATCHES = {
    "loss": "linear layer and cross-entropy over chunks of tokens, without the logits",
    "mlp": "the MLP over tiles of tokens, recomputed in backward",
    "norm": "norms save their input instead of fp32 copies of it",
    "rope": "rotary embedding in place, without copies of queries and keys",
    "attention": "the attention block over chunks of the sequence: less memory, one more attention forward (not a default)",
    "lora": "a linear layer and its LoRA adapter share one result, without the adapter's wide copies",
    "checkpointing": "every decoder layer keeps its input and runs again in backward",
    "keep_attention": "checkpointed layers keep their attention's output: its kernel does not run again",
    "offload": "checkpointed layers keep their tensors in pinned host memory, copied beside the computation",
    "mla_decode": "decoding attends to the latents in the cache: DeepSeek-V2's kind, for inference (not a default)",
}
INFERENCE_PATCHES = ("mla_decode",)  # change nothing in training
DEFAULT_PATCHES = tuple(name for name in PATCHES if name not in ("attention", *INFERENCE_PATCHES))
# Keyword of :func:`patch` -> the patch it belongs to.
PATCH_OPTIONS = {
    "mlp_tile": "mlp",
    "loss_chunk": "loss",
    "attention_chunk": "attention",
    "keep_attention": "keep_attention",
    "offload": "offload",
}
# "attention" wraps the forward that "rope" sets. The check of "keep_attention" precedes "checkpointing", which applies it.
_ORDER = (
    "mlp",
    "norm",
    "rope",
    "attention",
    "mla_decode",
    "lora",
    "keep_attention",
    "checkpointing",
    "offload",
    "loss",
)
_RECORD = "_flashmla_patches"
_Model = TypeVar("_Model", bound=nn.Module)


def patch(
    model: _Model,
    patches: Iterable[str] | None = None,
    *,
    exclude: Iterable[str] = (),
    mlp_tile: int | None = None,
    loss_chunk: int | None = None,
    attention_chunk: int | None = None,
    keep_attention: bool | int | str | None = None,
    offload: int | str | None = None,
) -> _Model:
    """Patches ``model`` in place and returns it.

    By default it applies those of :data:`DEFAULT_PATCHES` that support the model. :func:`patch_report` lists the ones left out,
    with reasons, and a line of the log names them. A patch that is named, or that an option belongs to, is never left out.

    Args:
        model: a ``transformers.PreTrainedModel``, or a ``peft.PeftModel`` around one, before it is wrapped or compiled.
        patches: names out of :data:`PATCHES`; ``None`` is the default above.
        exclude: names to remove from ``patches`` or from the default. The default without "checkpointing" is also without
            the patches that need it.
        mlp_tile: tokens per tile. ``None`` chooses by free memory, once per length: no tiles if the intermediates of all
            tokens are a small share of it.
        loss_chunk: tokens whose logits exist at a time (2048).
        attention_chunk: tokens per chunk of the patch "attention" (16384).
        keep_attention: how many of the last layers keep their attention. ``True`` is all; ``None`` or "auto" is as many as
            there is room for.
        offload: how many of the first layers keep their tensors on the host. ``None`` or "auto" is as many as have no room
            on the GPU, but not the last layer. On a machine without a GPU it is all but the last.

    Raises:
        PatchError (a ValueError): a name is unknown, an option belongs to a patch that is not selected, the model is patched
            already or sharded, a named patch does not support the model (UnsupportedPatch), or no default patch does. The
            message gives the model's class, the module, what was expected and found, and a remedy. The model is unchanged.
    """
    options = {
        "mlp_tile": mlp_tile,
        "loss_chunk": loss_chunk,
        "attention_chunk": attention_chunk,
        "keep_attention": keep_attention,
        "offload": offload,
    }
    _check_values(options)
    names = _selected(model, patches, exclude)
    _check_selected(model, names, options)
    inner = structure.base_model(model)
    if _RECORD in vars(inner):
        raise PatchError(
            f"flashmla_hf.patch({type(inner).__name__}): expected an unpatched model, got one that is patched already "
            f"({', '.join(vars(inner)[_RECORD].names)}). Call flashmla_hf.unpatch(model) before"
        )
    weights.refuse_sharded(inner)
    required = set(names) if patches is not None else {PATCH_OPTIONS[o] for o, v in options.items() if v is not None}
    if not required.isdisjoint(NEEDS_CHECKPOINTING):
        required.add("checkpointing")
    replacements = _apply(inner, names, required, options)
    vars(inner)[_RECORD] = replacements
    _log(inner, report.of_model(inner, replacements.names, replacements.left_out))
    return model


def patch_report(model: nn.Module) -> PatchReport:
    """The patches of ``model``: applied, left out of the default, and idle because another library computes the loss.

    It looks at the model as it is now, so that it finds a loss that a trainer has installed after :func:`patch`. The report of
    an unpatched model is empty.
    """
    inner = structure.base_model(model)
    replacements = vars(inner).get(_RECORD)
    if replacements is None:
        return PatchReport((), {}, {})
    return report.of_model(inner, replacements.names, replacements.left_out)


def unpatch(model: _Model) -> _Model:
    """Restores everything that :func:`patch` replaced, and returns ``model``. An unpatched model is returned unchanged.

    Raises RuntimeError if a patched attribute was replaced after :func:`patch` (accelerate's wrapped forward).
    """
    inner = structure.base_model(model)
    replacements = vars(inner).get(_RECORD)
    if replacements is not None:
        replacements.undo()
        del vars(inner)[_RECORD]
    return model


def _check_values(options: Mapping[str, bool | int | str | None]) -> None:
    for option, value in options.items():
        if value is None or (value == "auto" and option in ("keep_attention", "offload")):
            continue
        least = 0 if option in ("keep_attention", "offload") else 1
        if option == "keep_attention":
            if value is not True and (type(value) is not int or value < least):
                raise PatchError(
                    f"flashmla_hf.patch: keep_attention: expected True, 'auto' or a number, got {value!r}. Pass the number of "
                    "layers that keep their attention"
                )
        elif type(value) is not int or value < least:
            raise PatchError(f"flashmla_hf.patch: {option}: expected a number of at least {least}, got {value!r}")


def _selected(model: nn.Module, patches: Iterable[str] | None, exclude: Iterable[str]) -> tuple[str, ...]:
    """The names in ``patches``, or the default, without those in ``exclude``."""
    names = DEFAULT_PATCHES if patches is None else tuple([patches] if isinstance(patches, str) else patches)
    excluded = {exclude} if isinstance(exclude, str) else set(exclude)
    for name in (*names, *excluded):
        if name not in PATCHES:
            raise PatchError(
                f"flashmla_hf.patch({type(model).__name__}): expected names out of {list(PATCHES)}, got {name!r}"
            )
    if patches is None and "checkpointing" in excluded:
        excluded.update(NEEDS_CHECKPOINTING)
    return tuple(name for name in names if name not in excluded)


def _check_selected(model: nn.Module, names: tuple[str, ...], options: Mapping[str, bool | int | str | None]) -> None:
    where = f"flashmla_hf.patch({type(model).__name__})"
    for name in NEEDS_CHECKPOINTING:
        if name in names and "checkpointing" not in names:
            raise PatchError(
                f"{where}: patch {name!r} needs patch 'checkpointing', but only {list(names)} are selected. Add "
                f"'checkpointing', or remove {name!r}"
            )
    if "attention" in names and "keep_attention" in names:
        raise PatchError(
            f"{where}: patches 'attention' and 'keep_attention' exclude each other (the chunks of 'attention' run again in "
            "backward): expected one of them, got both. Remove one"
        )
    for option, value in options.items():
        name = PATCH_OPTIONS[option]
        if value is not None and name not in names:
            raise PatchError(
                f"{where}: option {option}={value!r} needs patch {name!r}, but only {list(names)} are selected. Add {name!r}, "
                f"or remove {option}"
            )


def _apply(
    model: nn.Module,
    names: tuple[str, ...],
    required: set[str],
    options: Mapping[str, Any],  # of the types in the signature of patch
) -> Replacements:
    """Applies ``names``. A patch that does not support the model is left out, or raises if it is ``required``."""
    left_out: dict[str, str] = {}

    def number(name: str) -> checkpointing.NumLayers:
        if name not in names or name in left_out:
            return None
        return "auto" if options[name] is None else options[name]

    steps: dict[str, Callable[[Replacements], None]] = {
        "mlp": lambda r: mlp.patch_mlp(model, r, options["mlp_tile"]),
        "norm": lambda r: mlp.patch_norm(model, r),
        "rope": lambda r: rope.patch_rope(model, r),
        "attention": lambda r: attention.patch_attention(model, r, options["attention_chunk"]),
        "mla_decode": lambda r: mla.patch_mla_decode(model, r),
        "lora": lambda r: lora.patch_lora(model, r),
        "keep_attention": lambda r: checkpointing.check_keep_attention(model),
        "checkpointing": lambda r: checkpointing.patch_checkpointing(
            model, r, number("keep_attention"), number("offload")
        ),
        "offload": lambda r: None,  # "checkpointing" applies it
        "loss": lambda r: loss.patch_loss(model, r, options["loss_chunk"]),
    }
    done = Replacements(())
    try:
        for name in (n for n in _ORDER if n in names):
            own = Replacements((name,))
            try:
                steps[name](own)
            except BaseException as error:
                own.undo()
                if not isinstance(error, UnsupportedPatch) or name in required:
                    raise
                left_out[name] = error.reason
            else:
                done.add(own)
        if "checkpointing" in left_out:
            for name in NEEDS_CHECKPOINTING:
                if name in names:
                    left_out.setdefault(name, "it needs the patch 'checkpointing', which was left out")
        done.names = tuple(name for name in names if name not in left_out)
        done.left_out = left_out
        if names and not done.names:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
            raise PatchError(
                f"flashmla_hf.patch({type(model).__name__}): no default patch supports this model: {reasons}"
            )
    except BaseException:
        done.undo()
        raise
    return done


def _log(model: nn.Module, found: PatchReport) -> None:
    """Logs what a user would not expect. A model without adapters has no use for "lora"."""
    parts = [f"left out {name!r} ({reason})" for name, reason in found.left_out.items() if name != "lora"]
    parts += [f"{name!r} has no effect ({reason})" for name, reason in found.idle.items()]
    parts += [f"{name!r} is partial ({reason})" for name, reason in found.partial.items()]
    if parts:
        logging.getLogger("flashmla_hf").warning("flashmla_hf.patch(%s): %s", type(model).__name__, "; ".join(parts))
