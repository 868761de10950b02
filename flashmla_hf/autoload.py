"""Registers with Transformers whenever that is imported, in processes that never import this package.

``import torch`` loads and calls every entry point of the group ``torch.backends``; ours is :func:`install`. At that
moment torch is only partially imported, every Python process that uses torch is paying, and an exception would break
``import torch``. So this module imports the standard library alone, and ``install`` only puts one finder in front of
``sys.meta_path`` which waits for ``transformers.modeling_utils``, registers after that module has run, and is gone. If that
module itself imports torch first (``from transformers import Trainer``), no finder sees it: its spec is watched instead.

Off with ``FLASHMLA_AUTOLOAD=0`` (or ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``, which turns off the whole group).
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys

# The last module that registration needs: it imports the mask and flash modules before it.
_TRIGGER = "transformers.modeling_utils"
_REGISTRATION = "flashmla_hf.hf.register"


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

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


class _WatchedSpec(importlib.machinery.ModuleSpec):
    """The spec of ``transformers.modeling_utils``, or of a module of ours, while it is being imported.

    The import system clears ``_initializing`` in its last step, after a success and after a failure.
    """

    @property
    def _initializing(self) -> bool:
        return self.__dict__["_initializing"]

    @_initializing.setter
    def _initializing(self, value: bool) -> None:
        self.__dict__["_initializing"] = value
        if not value:
            self.__class__ = importlib.machinery.ModuleSpec  # type: ignore[assignment]
            if _TRIGGER in sys.modules:
                _register()
            else:
                _add()  # the import may be tried again


_hook = _Hook()
_is_imported_by_torch = False


def install() -> None:
    """The entry point: registers when Transformers is imported. Never raises."""
    if os.environ.get("FLASHMLA_AUTOLOAD", "1") != "0":
        _wait()
        return
    if _is_imported_by_torch:
        # Loading this entry point has imported the package. Remove it, or a later ``import flashmla_hf`` would find it imported
        # and not register.
        del sys.modules["flashmla_hf"], sys.modules["flashmla_hf.autoload"]


def watch_unless_torch_is_loading() -> None:
    """Registers now if Transformers is imported, else when it will be. ``import flashmla_hf`` calls this.

    While ``import torch`` itself is loading the entry point, :func:`install` decides.
    """
    global _is_imported_by_torch
    _is_imported_by_torch = _is_loading("torch")
    if _is_imported_by_torch:
        return
    if _TRIGGER in sys.modules and not _is_loading(_TRIGGER):
        _register()
    else:
        _wait()


def _wait() -> None:
    """Registers as soon as Transformers has been imported."""
    if _is_loading(_TRIGGER):
        _watch(_TRIGGER)
    else:
        _add()


def _watch(name: str) -> None:
    """Registers when the import of module ``name``, which has begun, ends."""
    sys.modules[name].__spec__.__class__ = _WatchedSpec


def _is_loading(name: str) -> bool:
    return bool(getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False))


def _add() -> None:
    if _hook not in sys.meta_path:
        sys.meta_path.insert(0, _hook)


def _remove() -> None:
    if _hook in sys.meta_path:
        sys.meta_path.remove(_hook)


def import_transformers() -> None:
    """Imports Transformers, and so registers.

    It runs before the import of any module of ours that needs Transformers: two threads that take the two import locks in
    different orders would see each other's modules half imported.
    """
    importlib.import_module(_TRIGGER)


def _register() -> None:
    """Registers. A failure must not break ``import transformers``: it warns, and using one of our names raises."""
    # A module of ours that is imported first (``from flashmla_hf.hf import masks``) imports Transformers: registration needs it
    # whole.
    unfinished = next(
        (name for name in list(sys.modules) if name.startswith("flashmla_hf.") and _is_loading(name)), None
    )
    if unfinished is not None:
        _watch(unfinished)
        return
    try:
        importlib.import_module(_REGISTRATION)  # registers at its end
    except Exception as error:
        import warnings

        reason = f"flashmla_hf did not register with Transformers: {type(error).__name__}: {error}"
        _refuse_our_names(reason, error)
        warnings.warn(reason, stacklevel=2)


def _refuse_our_names(reason: str, cause: Exception) -> None:
    """Makes models that are built with, or switched to, one of our names raise ``reason``.

    Otherwise Transformers would report that it finds no flash attention of that name. Only methods that every release of
    Transformers has are wrapped.
    """
    from flashmla_hf.hf.names import is_ours

    def refuse(implementation) -> None:
        names = implementation.values() if isinstance(implementation, dict) else [implementation]
        for name in filter(is_ours, names):
            if sys.modules.get(_REGISTRATION) is not None:
                return  # a later import has registered
            raise ImportError(
                f"attn_implementation={name!r} cannot be used: {reason}. Install a release of Transformers that this "
                "flashmla_hf supports (python -m flashmla_hf doctor lists what is installed), install a newer flashmla_hf, or "
                'use attn_implementation="sdpa"'
            ) from cause

    def guard(method, implementation_of):
        @functools.wraps(method)
        def guarded(self, *args, **kwargs):
            refuse(implementation_of(next(iter([*args, *kwargs.values()]), None)))
            return method(self, *args, **kwargs)

        return guarded

    model = getattr(sys.modules[_TRIGGER], "PreTrainedModel", None)
    if model is not None:
        model.__init__ = guard(model.__init__, lambda config: getattr(config, "_attn_implementation", None))
        model.set_attn_implementation = guard(model.set_attn_implementation, lambda implementation: implementation)
