"""Records every attribute that a patch sets on a model, with the value before it, so that ``unpatch`` can restore it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from torch import nn

from flashmla_hf.patches.structure import PatchError

_ABSENT = object()
_NO_COPIES = "_flashmla_no_copies"


class _NoCopies:
    """An attribute beside those that a patch sets on ``owner``. It refuses to be copied, and thereby a copy of ``owner``: the
    copied functions would compute with the original's weights."""

    def __init__(self, owner: object) -> None:
        self.owner = type(owner).__name__

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise PatchError(
            f"flashmla_hf.patch: cannot copy or pickle {self.owner}, a patched module: the copy would use the original's "
            "weights. Copy the model before flashmla_hf.patch or after flashmla_hf.unpatch(model). Call peft's get_peft_model "
            "and add_adapter before flashmla_hf.patch. state_dict and save_pretrained work on a patched model"
        )


class _Hook(_NoCopies):
    """A forward pre-hook of ``owner``. Pickle meets it before the attributes, and copies no function that another one made."""

    def __init__(self, owner: object, check: Callable[[nn.Module, tuple, dict[str, Any]], None]) -> None:
        super().__init__(owner)
        self.check = check

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.check(module, args, kwargs)


class Replacements:
    """Attributes that were set on instances. :meth:`undo` restores them; a class attribute reappears by deletion."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.left_out: dict[str, str] = {}
        # owner, name, the value before, the value after
        self._set: list[tuple[object, str, object, object]] = []
        self._undo: list[Callable[[], object]] = []

    def set(self, owner: object, name: str, value: object, may_change: bool = False) -> None:
        """Sets an attribute. ``may_change``: it is a switch that others may turn; :meth:`undo` restores it all the same."""
        if name != _NO_COPIES and _NO_COPIES not in vars(owner):
            self.set(owner, _NO_COPIES, _NoCopies(owner))
        self._set.append((owner, name, vars(owner).get(name, _ABSENT), _ABSENT if may_change else value))
        vars(owner)[name] = value

    def hook(self, owner: nn.Module, check: Callable[[nn.Module, tuple, dict[str, Any]], None]) -> None:
        """Calls ``check`` before every forward of ``owner``."""
        self.on_undo(owner.register_forward_pre_hook(_Hook(owner, check), with_kwargs=True).remove)

    def on_undo(self, undo: Callable[[], object]) -> None:
        """Has :meth:`undo` call ``undo``."""
        self._undo.append(undo)

    def add(self, others: Replacements) -> None:
        """Appends ``others``, which were made after these."""
        self._set += others._set
        self._undo += others._undo

    def undo(self) -> None:
        """Restores everything. Raises RuntimeError and changes nothing if an attribute was replaced after it was set here."""
        latest: dict[tuple[int, str], tuple[object, str, object]] = {}
        for owner, name, _, value in self._set:
            latest[id(owner), name] = (owner, name, value)
        for owner, name, value in latest.values():
            found = vars(owner).get(name, _ABSENT)
            # accelerate's unwrap_model sets the function that it finds as a bound method.
            if value is not _ABSENT and found is not value and getattr(found, "__func__", None) is not value:
                what = type(owner).__name__ if isinstance(owner, nn.Module) else repr(owner)
                raise RuntimeError(
                    f"flashmla_hf.unpatch: {what}.{name} was replaced after flashmla_hf.patch: expected the function of the "
                    "patch, got another one. Undo the later change first (accelerate: "
                    "accelerator.unwrap_model(model, keep_fp32_wrapper=False))"
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
