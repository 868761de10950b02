"""Damaged files of a model's weights: cut off, or something else than weights. Only the beginning of each file is read."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

# In the order in which Transformers looks for them: the file, and the index of its parts.
_NAMES = ("model.safetensors", "pytorch_model.bin")
_LFS = b"version https://git-lfs"
_PICKLE = b"\x80"  # begins what torch.save wrote before it wrote archives


def damage(name: str | Path) -> str | None:
    """The sentence about the first damaged file of the weights of ``name``, with the way out; ``None`` if there is none.

    ``name`` is a folder, or a name on the Hub whose files are on this machine. Damage inside of a tensor shows nowhere.
    """
    folder = Path(name) if Path(name).is_dir() else _downloaded(str(name))
    if folder is None:
        return None
    for file in (*_files_of(folder), folder / "adapter_model.safetensors"):
        if file.is_file() and (reason := _reason(file)) is not None:
            way_out = "Copy or download this file again"
            if _beginning(file).startswith(_LFS):
                way_out = "Run git lfs pull in its folder"
            elif not Path(name).is_dir():
                way_out = f"Remove it, and it is downloaded again (hf download {name})"
            return f"{file} is damaged: {reason}. {way_out}"
    return None


def _downloaded(name: str) -> Path | None:
    """The folder into which Transformers has downloaded ``name``."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # the loader says what is wrong with the name
        return None
    return Path(found).parent if isinstance(found, str) else None


def _files_of(folder: Path) -> list[Path]:
    """The files that hold the weights in ``folder``, and the index that names them."""
    for name in _NAMES:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return [index, *(folder / part for part in sorted(_parts(index) or ()))]
    return []


def _parts(index: Path) -> set[str] | None:
    """The files that ``index`` names; ``None`` if it is no index."""
    try:
        parts = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return parts if all(isinstance(part, str) for part in parts) else None


def _reason(file: Path) -> str | None:
    """What is wrong with ``file``; ``None`` if its size and its beginning are those of a whole file."""
    if _beginning(file).startswith(_LFS):
        return "it is a pointer of Git LFS in place of the file"
    if file.suffix == ".json":
        return "expected an index of weights" if _parts(file) is None else None
    if file.suffix == ".bin":
        is_whole = zipfile.is_zipfile(file) or _beginning(file).startswith(_PICKLE)
        return None if is_whole else "expected what torch.save writes, whole"
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np"):
            return None
    except (SafetensorError, OSError, ValueError) as error:
        return f"expected a safetensors file of {file.stat().st_size:,} bytes ({error})"


def _beginning(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(len(_LFS))
