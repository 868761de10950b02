"""What a patched model was before: every attribute that a patch sets, so that ``unpatch`` can put it back."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from flashmla_hf.patches.structure import PatchError

_ABSENT = object()
_NO_COPIES = "_flashmla_no_copies"


class _NoCopies:
    """Lies beside what a patch sets on ``owner``: copied with it, those functions would compute with the original's weights."""

    def __init__(self, owner: object):
        self.owner = type(owner).__name__

    def __reduce_ex__(self, protocol):
        raise PatchError(
            f"flashmla_hf.patch: {self.owner}: expected no copy of a patched module (it would compute with the original's "
            "weights), got copy.deepcopy or pickle. Copy it before flashmla_hf.patch or after flashmla_hf.unpatch(model); with "
            "peft, get_peft_model and add_adapter come before flashmla_hf.patch. state_dict and save_pretrained need no copy"
        )


class Replacements:
    """Attributes set on instances, undone in reverse order. Class attributes below them reappear by deletion."""

    def __init__(self, names: tuple[str, ...]):
        self.names = names
        self._set: list[tuple[object, str, object, object]] = []
        self._undo: list[Callable[[], None]] = []

    def set(self, owner: object, name: str, value: object, may_change: bool = False) -> None:
        """``may_change``: the attribute is a switch that others turn; it goes back to what it was all the same."""
        if name != _NO_COPIES and _NO_COPIES not in vars(owner):
            self.set(owner, _NO_COPIES, _NoCopies(owner))
        self._set.append((owner, name, vars(owner).get(name, _ABSENT), _ABSENT if may_change else value))
        vars(owner)[name] = value

    def on_undo(self, undo: Callable[[], None]) -> None:
        self._undo.append(undo)

    def undo(self) -> None:
        """Raises RuntimeError, and changes nothing, where somebody else replaced one of the attributes since."""
        latest = {}
        for owner, name, _, value in self._set:
            latest[id(owner), name] = (owner, name, value)
        for owner, name, value in latest.values():
            found = vars(owner).get(name, _ABSENT)
            # accelerate's unwrap_model binds the function that it finds.
            if value is not _ABSENT and found is not value and getattr(found, "__func__", None) is not value:
                what = type(owner).__name__ if isinstance(owner, nn.Module) else repr(owner)
                raise RuntimeError(
                    f"flashmla_hf.unpatch: {what}.{name} was replaced after flashmla_hf.patch: expected to find the patch. "
                    "Undo the later change first (accelerate: accelerator.unwrap_model(model, keep_fp32_wrapper=False))"
                )
        for owner, name, before, _ in reversed(self._set):
            if before is _ABSENT:
                vars(owner).pop(name, None)
            else:
                vars(owner)[name] = before
        for undo in reversed(self._undo):
            undo()
        self._set.clear()
        self._undo.clear()
