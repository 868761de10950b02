"""Memory patches for long-context training: :func:`patch` and :func:`unpatch`.

Each patch removes one of the components that grow with the sequence, by structure, on one model, in place:

=================  ====================================================================================================
loss               linear layer and cross-entropy over chunks of tokens: no logits (:mod:`loss`)
mlp                the layer's token-wise block over tiles of tokens, recomputed in backward (:mod:`mlp`)
norm               norms that save their input instead of its fp32 copies (:mod:`mlp`)
rope               queries and keys rotated in place (:mod:`rope`)
attention          the attention block over chunks of the sequence; not on by default (:mod:`attention`)
lora               a linear layer and its adapter in one result (:mod:`lora`)
checkpointing      a decoder layer keeps its input and runs again in backward (:mod:`checkpointing`)
keep_attention     ... and its attention's (out, lse), so that the kernel does not run again
offload            ... in pinned host memory, copied beside the computation (:mod:`offload`)
=================  ====================================================================================================

docs/patches.md says what each saves and costs.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from flashmla_hf.patches import attention, checkpointing, lora, loss, mlp, rope, structure, weights
from flashmla_hf.patches.replacements import Replacements
from flashmla_hf.patches.structure import PatchError

__all__ = ["DEFAULT_PATCHES", "PATCHES", "PATCH_OPTIONS", "PatchError", "patch", "unpatch"]

PATCHES = {
    "loss": "linear layer and cross-entropy over chunks of tokens, without the logits",
    "mlp": "the MLP over tiles of tokens, recomputed in backward",
    "norm": "norms save their input instead of fp32 copies of it",
    "rope": "rotary embedding in place, without copies of queries and keys",
    "attention": "the attention block over chunks of the sequence: less memory, one more attention forward (not a default)",
    "lora": "a linear layer and its LoRA adapter in one result, without the adapter's wide copies",
    "checkpointing": "every decoder layer keeps its input and runs again in backward",
    "keep_attention": "checkpointed layers keep their attention's output: its kernel does not run again",
    "offload": "what checkpointed layers keep goes to pinned host memory, beside the computation",
}
# "lora" where there are adapters to patch.
DEFAULT_PATCHES = tuple(name for name in PATCHES if name != "attention")
# Keyword of :func:`patch` -> the patch it belongs to.
PATCH_OPTIONS = {
    "mlp_tile": "mlp",
    "loss_chunk": "loss",
    "attention_chunk": "attention",
    "keep_attention": "keep_attention",
    "offload": "offload",
}
NEEDS_CHECKPOINTING = ("keep_attention", "offload")
_RECORD = "_flashmla_patches"


def patch(
    model: nn.Module,
    patches: Iterable[str] | None = None,
    *,
    mlp_tile: int | None = None,
    loss_chunk: int | None = None,
    attention_chunk: int | None = None,
    keep_attention: bool | int | str | None = None,
    offload: int | str | None = None,
) -> nn.Module:
    """Patches ``model`` in place and returns it.

    Args:
        model: a ``transformers.PreTrainedModel``, or a ``peft.PeftModel`` around one, before it is wrapped or compiled.
        patches: names out of :data:`PATCHES`; ``None`` is :data:`DEFAULT_PATCHES`, all but "attention", and "lora" only where
            there are adapters for it.
        mlp_tile: tokens per tile; ``None`` chooses by free memory, once per length: all tokens where their intermediates are
            a small share of it.
        loss_chunk: tokens whose logits exist at a time (2048).
        attention_chunk: tokens per chunk of the patch "attention" (16384).
        keep_attention: how many layers (the last ones) keep their attention: ``True`` is all, a number that many,
            ``None`` or "auto" as many as have a place.
        offload: how many layers (the first ones) send what they keep to the host; ``None`` or "auto" as many as have no
            place on the GPU, never the last. On a machine without a GPU, all but the last.

    Raises:
        PatchError (a ValueError): unknown names, an option of a patch that is not among them, a model that is patched
        already, or one without the structure that a patch needs: names the model's class, the module, what was
        expected, and the way out. Nothing is changed then.
    """
    names = _checked_names(model, patches)
    for name, value, least in (
        ("mlp_tile", mlp_tile, 1),
        ("loss_chunk", loss_chunk, 1),
        ("attention_chunk", attention_chunk, 1),
        ("offload", None if offload == "auto" else offload, 0),
    ):
        if value is not None and (type(value) is not int or value < least):
            raise PatchError(f"flashmla_hf.patch: {name}: expected a number of at least {least}, got {value!r}")
    if keep_attention not in (None, "auto", True) and (type(keep_attention) is not int or keep_attention < 0):
        raise PatchError(
            f"flashmla_hf.patch: keep_attention: expected True, 'auto' or a number, got {keep_attention!r}"
        )

    given = {
        "mlp_tile": mlp_tile,
        "loss_chunk": loss_chunk,
        "attention_chunk": attention_chunk,
        "keep_attention": keep_attention,
        "offload": offload,
    }
    for option, value in given.items():
        name = PATCH_OPTIONS[option]
        if value is not None and name not in names:
            raise PatchError(
                f"flashmla_hf.patch({type(model).__name__}): {option}: expected it with patch {name!r} alone, got "
                f"{value!r} with {list(names)}. Add {name!r}, or leave {option} out"
            )

    inner = structure.base_model(model)
    if _RECORD in vars(inner):
        raise PatchError(
            f"flashmla_hf.patch({type(inner).__name__}): expected an unpatched model, got one that is patched already "
            f"({', '.join(vars(inner)[_RECORD].names)}). Call flashmla_hf.unpatch(model) first"
        )
    weights.refuse_sharded(inner)
    replacements = Replacements(names)
    try:
        if "mlp" in names:
            mlp.patch_mlp(inner, replacements, mlp_tile)
        if "norm" in names:
            mlp.patch_norm(inner, replacements)
        if "rope" in names:
            rope.patch_rope(inner, replacements)
        if "attention" in names:  # around the rotation's mark
            attention.patch_attention(inner, replacements, attention_chunk)
        if "lora" in names:
            lora.patch_lora(inner, replacements)
        if "checkpointing" in names:
            keep = ("auto" if keep_attention is None else keep_attention) if "keep_attention" in names else None
            where = ("auto" if offload is None else offload) if "offload" in names else None
            checkpointing.patch_checkpointing(inner, replacements, keep, where)
        if "loss" in names:
            loss.patch_loss(inner, replacements, loss_chunk)
    except BaseException:
        replacements.undo()
        raise
    vars(inner)[_RECORD] = replacements
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Puts back everything that :func:`patch` replaced, and returns ``model``. An unpatched model is returned as it is.

    Raises RuntimeError where somebody replaced one of the patched attributes since (accelerate's wrapped forward).
    """
    inner = structure.base_model(model)
    replacements = vars(inner).get(_RECORD)
    if replacements is not None:
        replacements.undo()
        del vars(inner)[_RECORD]
    return model


def _checked_names(model: nn.Module, patches: Iterable[str] | None) -> tuple[str, ...]:
    if patches is None:
        names = tuple(name for name in DEFAULT_PATCHES if name != "lora" or lora.adapted_layers(model))
    else:
        names = tuple([patches] if isinstance(patches, str) else patches)
    for name in names:
        if name not in PATCHES:
            raise PatchError(
                f"flashmla_hf.patch({type(model).__name__}): expected names out of {list(PATCHES)}, got {name!r}"
            )
        if name in NEEDS_CHECKPOINTING and "checkpointing" not in names:
            raise PatchError(
                f"flashmla_hf.patch({type(model).__name__}): patch {name!r} works on checkpointed layers: expected "
                f"'checkpointing' beside it, got {list(names)}. Add it, or leave {name!r} out"
            )
    if "attention" in names and "keep_attention" in names:
        raise PatchError(
            f"flashmla_hf.patch({type(model).__name__}): patches 'attention' and 'keep_attention' exclude each other: "
            "expected one (the chunks of 'attention' run again in backward), got both. Leave one out"
        )
    return names
