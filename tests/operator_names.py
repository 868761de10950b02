"""The operators that calls inside a block come to."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class OperatorNames(TorchDispatchMode):
    """``with OperatorNames() as seen: ...``: ``seen.names``, without overloads, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(operator._schema.name)
        return operator(*args, **(kwargs or {}))
