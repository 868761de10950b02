"""Exact, memory-efficient attention for Hugging Face Transformers: ``attn_implementation="flashmla"``.

Importing this package registers it with Transformers: now if that is imported, else as soon as it will be; without
Transformers nothing happens. Everything public is imported on first use (PEP 562): ``import torch`` itself calls
:func:`flashmla_hf.autoload.install`, when torch is only partially there and every import would be paid by everybody.
"""

import importlib
import sys
import types

from flashmla_hf import autoload

__version__ = "0.1.0"

# Public name -> the module that defines it.
_PUBLIC = {
    "flash_attn_func": "flashmla_hf.attention",
    "flash_attn_varlen_func": "flashmla_hf.attention",
    "register": "flashmla_hf.hf",
    "check": "flashmla_hf.hf_check",
}
__all__ = ["__version__", "attention", *_PUBLIC]


class _Package(types.ModuleType):
    """This package as a module whose attribute ``attention`` is the function, also after the import system has bound
    the submodule of the same name to it."""

    @property
    def attention(self):
        return importlib.import_module("flashmla_hf.attention").attention

    @attention.setter
    def attention(self, submodule):
        pass


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), "attention", *_PUBLIC])


autoload.watch_unless_torch_is_loading()
