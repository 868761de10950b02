"""``flashmla check MODEL``: which attention layers of a model use the kernel. No weight is read."""

from __future__ import annotations

import sys

import torch
import transformers

import flashmla_hf
from flashmla_hf import weight_files


def main(name: str) -> int:
    """Prints the report of :func:`flashmla_hf.check`; returns 0 if every attention layer uses the kernel, else 1.

    A model with a damaged file of weights is refused, with 1.
    """
    if (damage := weight_files.damage(name)) is not None:
        print(f"flashmla check: {damage}", file=sys.stderr)
        return 1
    try:
        model = build(name)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        print(f"flashmla check: {name!r} cannot be built: {reason}", file=sys.stderr)
        return 1
    report = flashmla_hf.check(model)
    print(report)
    return 0 if report else 1


def build(name: str) -> torch.nn.Module:
    """The model ``name`` (a folder with config.json, or a name on the Hub) on the meta device, with our attention."""
    config = transformers.AutoConfig.from_pretrained(name)
    # The class that the checkpoint was saved from; a configuration that names none gives its base model.
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    model_class = next((cls for cls in named if cls is not None), None)
    with torch.device("meta"):
        if model_class is None:
            return transformers.AutoModel.from_config(config, attn_implementation="flashmla")
        return model_class._from_config(config, attn_implementation="flashmla")
