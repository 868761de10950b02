"""Rows of files, folders and datasets, each with its place (``notes/a.jsonl, line 3``). Readers are generators: a row is
read when it is needed.

A row is a dict of columns, or a string: the text of a whole file. A row that cannot be read comes as a BadRow in its place,
so that the rows after it can still be read, counted or used.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from flashmla_hf.training.arguments import UserError, first_line


class BadRow(ValueError):
    """A row that cannot be used. The message says what is wrong with it; its place is kept beside it."""


class Place(NamedTuple):
    source: str  # a file, or a dataset and its split
    unit: str = ""  # "line" or "row"; empty if the whole file is one row
    number: int = 0  # from 1

    def __str__(self) -> str:
        return f"{self.source}, {self.unit} {self.number}" if self.unit else self.source


Row = dict | str | BadRow
Rows = Iterator[tuple[Place, Row]]
# The columns to read, of those that there are. Raises BadRow if none of them can be used.
Choose = Callable[[list[str]], list[str]]


JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
TABLES = (".csv", ".tsv")


@dataclass
class BadRows:
    """The bad rows of a run's data: counted, and skipped if the user asks for it."""

    is_skipping: bool = False
    count: int = 0
    shown: list[str] = field(default_factory=list)  # the first few, each with its place

    def add(self, place: Place, error: BadRow) -> None:
        self.count += 1
        if len(self.shown) < 3:
            self.shown.append(f"{place}: {error}")

    def check(self) -> None:
        """Raises UserError if there are bad rows and they are not to be skipped."""
        if self.count and not self.is_skipping:
            number = f"there are {self.count} bad rows in all" if self.count > 1 else "it is the only bad row"
            raise UserError(f"{self.shown[0]} ({number}; --skip_bad_rows leaves bad rows out, and counts them)")


def read_files(path: str, choose: Choose, split: str) -> Rows:
    """The rows of a folder, a .jsonl/.json/.parquet file or a text file, in a fixed order.

    ``split`` matters to a folder that ``DatasetDict.save_to_disk`` wrote. Raises UserError if something cannot be read.
    """
    root = Path(path)
    with _refusals_named(root):
        is_folder, is_file, is_there = root.is_dir(), root.is_file(), root.exists()
    if is_folder and is_saved_dataset(root):
        yield from _read_dataset_rows(_open_saved(root, split), f"{path}, split {split!r}", choose)
        return
    if not is_there:
        raise UserError(f"{path}: no such file or folder")
    if not is_folder and not is_file:
        raise UserError(f"{path}: expected a file or a folder, got a pipe or a device: write what it gives to a file")
    files = [root] if is_file else sorted(_files_in(root, set()))
    if not files:
        raise UserError(f"the folder {path} holds no files")
    for file in files:
        with _refusals_named(file):
            yield from _read_file(file, choose)


@contextlib.contextmanager
def _refusals_named(path: Path) -> Iterator[None]:
    """Makes what the system refuses (no permission, a name that is too long, a broken disk) a UserError that names ``path``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or first_line(error)}") from None


def _files_in(folder: Path, above: set[Path]) -> Iterator[Path]:
    """The files of ``folder`` and of the folders in it, links followed, without names with a leading dot. What cannot be read
    raises UserError, because data that is left out shows in nothing.

    ``above``: the folders on the way to this one. A link back to one of them adds no file.
    """
    with _refusals_named(folder):
        entries, place = list(folder.iterdir()), folder.resolve()
    if place in above:
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        with _refusals_named(entry):
            is_folder, is_file = entry.is_dir(), entry.is_file()
        if is_folder:
            yield from _files_in(entry, above | {place})
        elif is_file:
            yield entry
        else:
            got = "a pipe or a device" if entry.exists() else "a link to nothing"
            raise UserError(
                f"{entry}: expected a file or a folder, got {got}: remove it, or give it a name with a leading dot, which is "
                "left out"
            )


def _read_file(file: Path, choose: Choose) -> Rows:
    kind = file.suffix.lower()
    if kind in TABLES:
        raise UserError(
            f"{file}: expected rows of JSON or parquet, or a text, got a table that would be read as one text. Convert it: "
            f"datasets.load_dataset('csv', data_files={str(file)!r})['train'].to_json('data.jsonl'). In a folder, a name "
            "with a leading dot is left out"
        )
    if kind == ".parquet":
        yield from _read_parquet(file, choose)
    elif kind in (*JSON_LINES, ".json"):
        with file.open("rb") as opened:
            start = opened.read(4096).decode("utf-8-sig", "ignore").lstrip()
        yield from _read_array(file) if kind == ".json" and start.startswith("[") else _read_lines(file)
    else:
        try:
            yield Place(str(file)), file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            yield Place(str(file)), BadRow(f"not text: byte {error.start} is not UTF-8")


def _read_lines(file: Path) -> Rows:
    # In bytes, which end lines at "\n" alone: JSON allows U+2028 and its like inside a string.
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = Place(str(file), "line", number)
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield place, BadRow(f"not text: byte {error.start} of the line is not UTF-8")
                continue
            if text.strip():
                yield place, _json_object(text)


def parse_json(text: str) -> object:
    """What ``text`` says. Raises BadRow if that is not JSON, or more than Python reads."""
    try:
        return json.loads(text)
    except RecursionError:
        raise BadRow("it is nested too deeply") from None
    except ValueError as error:  # a JSONDecodeError, or a number of thousands of digits
        raise BadRow(first_line(error)) from None


def _json_object(text: str) -> dict | BadRow:
    try:
        row = parse_json(text)
    except BadRow as error:
        return BadRow(f"not a JSON object: {error}")
    return row if isinstance(row, dict) else BadRow(f"expected a JSON object, got {type(row).__name__}")


def _read_array(file: Path) -> Rows:
    """A .json file that is one array of objects."""
    try:
        rows = parse_json(file.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, BadRow) as error:
        raise UserError(f"{file} is not a readable JSON array: {first_line(error)}") from None
    assert isinstance(rows, list)  # it begins with a bracket
    for number, row in enumerate(rows, start=1):
        expected = BadRow(f"expected a JSON object, got {type(row).__name__}")
        yield Place(str(file), "row", number), row if isinstance(row, dict) else expected


def _read_parquet(file: Path, choose: Choose) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file}: reading parquet needs the package pyarrow: pip install pyarrow") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            columns = _columns_of(str(file), opened.schema_arrow.names, choose)
            for batch in opened.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield Place(str(file), "row", number), row
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{file} is not a readable parquet file: {' '.join(str(error).split())}") from None


def _columns_of(source: str, columns: list[str], choose: Choose) -> list[str]:
    try:
        return choose(columns)
    except BadRow as error:  # of every row
        raise UserError(f"{source}: {error}") from None


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``save_to_disk`` of the package datasets wrote this folder."""
    is_one_split = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return is_one_split or (folder / "dataset_dict.json").is_file()


def _open_saved(folder: Path, split: str):
    datasets = _datasets(f"{folder} was written by save_to_disk")
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # as for load_dataset
        raise UserError(f"{folder} cannot be loaded: {first_line(error)}") from None
    if not isinstance(found, datasets.DatasetDict):
        return found
    if split not in found:
        raise UserError(f"{folder} holds the splits {', '.join(found)}, and not {split!r}: name one of them")
    return found[split]


def _datasets(why: str):
    try:
        import datasets
    except ImportError:
        raise UserError(f"{why}, and reading it needs the package datasets: pip install datasets") from None
    return datasets


def read_dataset(name: str, config: str | None, split: str, is_streaming: bool, choose: Choose) -> Rows:
    """The rows of ``datasets.load_dataset(name, config, split=split)``; ``name`` may be a folder of ``save_to_disk``."""
    source = f"dataset {name!r}, split {split!r}"
    if Path(name).is_dir() and is_saved_dataset(Path(name)):
        rows = _open_saved(Path(name), split)
    else:
        datasets = _datasets(source)
        try:
            rows = datasets.load_dataset(name, config, split=split, streaming=is_streaming)
        except Exception as error:  # datasets raises many kinds, all about the name, the network or the files
            raise UserError(f"{source} cannot be loaded: {first_line(error)}") from None
    yield from _read_dataset_rows(rows, source, choose)


def _read_dataset_rows(rows, source: str, choose: Choose) -> Rows:
    if rows.column_names is not None:  # a stream may not know its columns
        rows = rows.select_columns(_columns_of(source, rows.column_names, choose))
    each = iter(rows)
    number = 0
    while True:
        try:
            row = next(each)
        except StopIteration:
            return
        except Exception as error:  # as for load_dataset
            raise UserError(f"{source} cannot be read after row {number}: {first_line(error)}") from None
        number += 1
        yield Place(source, "row", number), row
