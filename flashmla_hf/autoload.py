"""Registers with Transformers whenever that is imported, in processes that never import this package.

``import torch`` loads and calls every entry point of the group ``torch.backends``; ours is :func:`install`. At that
moment torch is only partially imported, every Python process that uses torch is paying, and an exception would break
``import torch``. So this module imports the standard library alone, and ``install`` only puts one finder in front of
``sys.meta_path`` which waits for ``transformers.modeling_utils``, registers after that module has run, and is gone.

Off with ``FLASHMLA_AUTOLOAD=0`` (or ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``, which turns off the whole group).
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys

# The last module that registration needs: it imports the mask and flash modules before it.
_TRIGGER = "transformers.modeling_utils"


class _Hook(importlib.abc.MetaPathFinder):
    """Finds nothing itself; wraps the loader of ``transformers.modeling_utils``, once."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != _TRIGGER:
            return None
        _remove()  # one shot, and the search below must not come back here
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module):
                try:
                    run(module)
                except BaseException:
                    _add()  # the import may be tried again
                    raise
                _register()

            spec.loader.exec_module = exec_module
        return spec


_hook = _Hook()
_is_imported_by_torch = False


def install() -> None:
    """The entry point: registers when Transformers is imported. Never raises."""
    if os.environ.get("FLASHMLA_AUTOLOAD", "1") != "0":
        _add()
        return
    if _is_imported_by_torch:
        # Loading this entry point has imported the package. Forget that, or a later ``import flashmla_hf`` would find
        # it imported and not register.
        del sys.modules["flashmla_hf"], sys.modules["flashmla_hf.autoload"]


def watch_unless_torch_is_loading() -> None:
    """What ``import flashmla_hf`` does: registers now if Transformers is imported, else when it will be.

    While ``import torch`` itself is loading the entry point, :func:`install` decides.
    """
    global _is_imported_by_torch
    _is_imported_by_torch = _is_loading("torch")
    if _is_imported_by_torch:
        return
    if _TRIGGER in sys.modules and not _is_loading(_TRIGGER):
        _register()
    else:
        _add()


def _is_loading(name: str) -> bool:
    return bool(getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False))


def _add() -> None:
    if _hook not in sys.meta_path:
        sys.meta_path.insert(0, _hook)


def _remove() -> None:
    if _hook in sys.meta_path:
        sys.meta_path.remove(_hook)


def _register() -> None:
    """A failure to register must not break somebody else's ``import transformers``: it is a warning there."""
    try:
        importlib.import_module("flashmla_hf.hf_register")  # registers at its end
    except Exception as error:
        import warnings

        warnings.warn(f"flashmla_hf did not register with Transformers: {type(error).__name__}: {error}", stacklevel=2)
