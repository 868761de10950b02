"""Exact, memory-efficient attention for Hugging Face Transformers: ``attn_implementation="flashmla"``.

Importing this package registers it with Transformers: now if Transformers is imported, else when it will be. Everything public
is imported on first use (PEP 562), because ``import torch`` itself calls :func:`flashmla_hf.autoload.install`: torch is only
partially imported then, and every program that uses torch would wait for our imports.
"""

import importlib

from flashmla_hf import autoload

__version__ = "0.1.0"

# Public name -> the module that defines it.
_PUBLIC = {
    "attention": "flashmla_hf.dispatch",
    "decode_attention": "flashmla_hf.decode",
    "latent_attention": "flashmla_hf.latent",
    "flash_attn_func": "flashmla_hf.flash_attn_api",
    "flash_attn_varlen_func": "flashmla_hf.flash_attn_api",
    "flash_attn_with_kvcache": "flashmla_hf.flash_attn_api",
    "Fp8Cache": "flashmla_hf.hf.fp8_cache",
    "register": "flashmla_hf.hf.register",
    "check": "flashmla_hf.hf.check",
    "patch": "flashmla_hf.patches",
    "unpatch": "flashmla_hf.patches",
    "patch_report": "flashmla_hf.patches",
    "ledger": "flashmla_hf.training.ledger",
    "DEFAULT_PATCHES": "flashmla_hf.patches",
    "PATCHES": "flashmla_hf.patches",
    "PATCH_OPTIONS": "flashmla_hf.patches",
}
_WITHOUT_TRANSFORMERS = {
    "flashmla_hf.dispatch",
    "flashmla_hf.decode",
    "flashmla_hf.latent",
    "flashmla_hf.flash_attn_api",
    "flashmla_hf.hf.check",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _PUBLIC[name] not in _WITHOUT_TRANSFORMERS:
        autoload.import_transformers()
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


autoload.watch_unless_torch_is_loading()
