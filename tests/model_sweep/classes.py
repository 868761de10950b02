"""The classes that the sweep tries: every model class that an ``Auto…`` mapping of the installed Transformers names.

Nothing here names a model, so a class that is new in a later release is found without a change.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers.models.auto import configuration_auto, modeling_auto


@dataclass(frozen=True)
class Candidate:
    """A model class by name, and the model type whose configuration builds it."""

    class_name: str
    model_type: str

    def __str__(self) -> str:
        return self.class_name


def candidates() -> list[Candidate]:
    """Every class of every mapping once, ordered by model type (the order of the documentation), then by name.

    A class that several model types share is tried with the type that it is named after, the shortest otherwise.
    """
    types_of: dict[str, set[str]] = {}
    for mapping_name in dir(modeling_auto):
        if not mapping_name.endswith("_MAPPING_NAMES") or mapping_name.startswith("CONFIG_"):
            continue
        for model_type, names in getattr(modeling_auto, mapping_name).items():
            for name in (names,) if isinstance(names, str) else names:
                if model_type in configuration_auto.CONFIG_MAPPING_NAMES:
                    types_of.setdefault(name, set()).add(model_type)
    found = [Candidate(name, min(types, key=lambda t: _distance(t, name))) for name, types in types_of.items()]
    return sorted(found, key=lambda candidate: (candidate.model_type, candidate.class_name))


def _distance(model_type: str, class_name: str) -> tuple:
    """Small for a model type that ``class_name`` is named after; the longest such type first."""
    plain = model_type.replace("_", "").replace("-", "").lower()
    return (not class_name.lower().startswith(plain), -len(plain), model_type)
