"""Documents -> tokens -> pieces of at most ``max_length`` -> packs of pieces -> batches without padding.

DataCollatorWithFlattening lays a batch of packs end to end and marks where each piece begins (``position_ids``,
``cu_seq_lens_*``): no token attends to another document.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from transformers import DataCollatorWithFlattening, PreTrainedTokenizerBase

from flashmla_hf.training.arguments import DataArguments, UserError, first_line

Pack = list[np.ndarray]  # pieces of documents, int32 [piece_length] each, together at most max_length tokens


def read_documents(path: str, text_field: str) -> list[str]:
    """The documents of a folder, a .jsonl/.json/.parquet file or a text file, in a fixed order."""
    root = Path(path)
    if root.is_dir():
        paths = (p for p in root.rglob("*") if not any(part.startswith(".") for part in p.relative_to(root).parts))
        files = sorted(p for p in paths if p.is_file())
        if not files:
            raise UserError(f"the folder {path} holds no files")
    elif root.is_file():
        files = [root]
    else:
        raise UserError(f"{path}: no such file or folder")
    documents = [document for file in files for document in _read_file(file, text_field) if document.strip()]
    if not documents:
        raise UserError(f"{path} holds no text")
    return documents


def _read_file(file: Path, text_field: str) -> list[str]:
    if file.suffix == ".parquet":
        return _read_parquet(file, text_field)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not text: byte {error.start} is not UTF-8") from None
    if file.suffix not in (".jsonl", ".json"):
        return [text]
    rows = []
    # Not splitlines(): JSON allows U+2028 and its like inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}, line {number} is not a JSON object: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{file}, line {number}: expected a JSON object, got {type(row).__name__}")
        if text_field not in row:
            raise UserError(_no_column(f"{file}, line {number}", text_field, list(row)))
        rows.append(_checked_text(row[text_field], file, number))
    return rows


def _read_parquet(file: Path, text_field: str) -> list[str]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file}: reading parquet needs the package pyarrow: pip install pyarrow") from None
    try:
        table = pyarrow.parquet.read_table(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{file} is not a readable parquet file: {' '.join(str(error).split())}") from None
    if text_field not in table.column_names:
        raise UserError(_no_column(str(file), text_field, table.column_names))
    return [_checked_text(value, file, row) for row, value in enumerate(table[text_field].to_pylist(), start=1)]


def _no_column(where: str, text_field: str, columns: list[str]) -> str:
    return f"{where} has no column {text_field!r}, only {columns}: name one with --dataset_text_field"


def _checked_text(value: object, where: object, row: int) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}, row {row}: expected text, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}, row {row}: character {error.start} is half of a pair (a lone surrogate)") from None
    return value


def load_documents(data_args: DataArguments, seed: int) -> tuple[list[str], list[str]]:
    """Training and held-out documents; a document is wholly on one side."""
    if data_args.dataset_name is not None:
        train, held_out = _load_dataset(data_args)
    else:
        train = read_documents(data_args.train_file, data_args.dataset_text_field)
        held_out = []
    if data_args.validation_file is not None:
        held_out = read_documents(data_args.validation_file, data_args.dataset_text_field)
    if not held_out and data_args.validation_split_percentage > 0:
        if len(train) < 2:
            raise UserError(
                "the training data is a single document, which cannot be split into training and held-out documents: "
                "give --validation_file, or --validation_split_percentage 0"
            )
        order = np.random.default_rng(seed).permutation(len(train))
        count = min(max(1, round(len(train) * data_args.validation_split_percentage / 100)), len(train) - 1)
        train, held_out = [train[i] for i in sorted(order[count:])], [train[i] for i in sorted(order[:count])]
    return train, held_out


def _load_dataset(data_args: DataArguments) -> tuple[list[str], list[str]]:
    try:
        import datasets
    except ImportError:
        raise UserError("--dataset_name needs the package datasets: pip install datasets") from None

    def split(name: str) -> list[str]:
        try:
            rows = datasets.load_dataset(data_args.dataset_name, data_args.dataset_config, split=name)
        except Exception as error:  # datasets raises many kinds, all about the name, the network or the files
            raise UserError(
                f"dataset {data_args.dataset_name!r}, split {name!r} cannot be loaded: {first_line(error)}"
            ) from None
        if data_args.dataset_text_field not in rows.column_names:
            raise UserError(_no_column(data_args.dataset_name, data_args.dataset_text_field, rows.column_names))
        texts = rows[data_args.dataset_text_field]
        return [_checked_text(value, data_args.dataset_name, row) for row, value in enumerate(texts, start=1)]

    held_out = split(data_args.dataset_test_split) if data_args.dataset_test_split else []
    return split(data_args.dataset_train_split), held_out


def tokenize(documents: list[str], tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """Token ids of each document, int32 [length], ended by the end-of-text token if the tokenizer has one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [np.array(ids + end, dtype=np.int32) for ids in tokenizer(documents, verbose=False)["input_ids"]]


def pack(documents: list[np.ndarray], max_length: int) -> list[Pack]:
    """Cuts documents into pieces of at most ``max_length`` tokens and packs the pieces, best fit decreasing.

    Source: Ding et al. 2024, arXiv 2404.10830 (TRL's packing strategy "bfd"): nothing is cut that fits whole.
    """
    pieces = [ids[start : start + max_length] for ids in documents for start in range(0, len(ids), max_length)]
    pieces = [piece for piece in pieces if len(piece) > 1]  # a single token predicts nothing
    pieces.sort(key=len, reverse=True)  # stable: the order is a function of the data alone
    packs: list[Pack] = []
    with_room: dict[int, list[int]] = {}  # tokens still free -> packs with that much room
    for piece in pieces:
        rooms = [room for room in with_room if room >= len(piece)]
        if rooms:
            room = min(rooms)
            index = with_room[room].pop()
            if not with_room[room]:
                del with_room[room]
            packs[index].append(piece)
        else:
            room, index = max_length, len(packs)
            packs.append([piece])
        if room - len(piece) > 1:
            with_room.setdefault(room - len(piece), []).append(index)
    return packs


def spread(packs: list[Pack], count: int | None) -> list[Pack]:
    """``count`` of the packs (``None``: all), from the whole list: it is sorted by the longest piece."""
    if count is None or count >= len(packs):
        return packs
    return [packs[i] for i in np.linspace(0, len(packs) - 1, count, dtype=int)]


def predicted_tokens(packs: list[Pack]) -> int:
    """How many tokens have a loss: all but the first of each piece."""
    return sum(len(piece) - 1 for one in packs for piece in one)


class Collator:
    """Packs -> one row [1, tokens] of input_ids, labels, position_ids, and cu_seq_lens_* for flash-style attention."""

    def __init__(self, attn_implementation: str):
        is_flash = "flash" in attn_implementation  # Transformers' own test of which backends read cu_seq_lens_*
        self.flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=is_flash)

    def __call__(self, packs: list[Pack], device: torch.device) -> dict:
        batch = self.flatten([{"input_ids": piece} for one in packs for piece in one])
        batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
        # A cache is of no use here, and with one Transformers would not see where packed documents begin.
        return batch | {"use_cache": False}
