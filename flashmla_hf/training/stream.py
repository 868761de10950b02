"""Packs of data that is read as training goes on: a window of it is held at a time.

Rows are read in order, until their tokens fill a window. A window is packed as a whole data set would be, and its packs run
in a random order of its own. After the last row the data begins again. Every process reads all rows and runs its share.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np

from flashmla_hf.training.arguments import UserError
from flashmla_hf.training.encoding import Encoder
from flashmla_hf.training.formats import Formats
from flashmla_hf.training.packing import Pack, largest_id, pack
from flashmla_hf.training.rows import BadRow, BadRows, Place, Rows

WINDOW_PACKS = 64  # a window is as many tokens as these hold,
WINDOW_TOKENS = 2**22  # and at least this many
ROWS_AT_A_TIME = 64  # are tokenized together


@dataclass
class StreamPlace:
    """The next pack of a stream: what a checkpoint holds of it."""

    epoch: int = 0  # how often the data has ended
    rows: int = 0  # of this epoch, before the window
    window: int = 0  # of this epoch
    index: int = 0  # of the pack in the window
    bad_rows: int = 0  # of the first epoch, before the window


class PackStream:
    """Packs, in the order in which they are trained on. ``place`` is that of the next one."""

    def __init__(
        self, read: Callable[[], Rows], formats: Formats, encoder: Encoder, bad_rows: BadRows, max_length: int, seed: int,
        keeps_blank: bool,
    ):  # fmt: skip
        self.read, self.formats, self.encoder, self.bad_rows = read, formats, encoder, bad_rows
        self.max_length, self.seed, self.keeps_blank = max_length, seed, keeps_blank
        self.embedded: int | None = None  # the rows of the model's embedding, if they are known
        self.seek(StreamPlace())
        self.first_window = self._packs

    def seek(self, place: StreamPlace) -> None:
        """Goes to ``place``. The rows before its window are read and not tokenized."""
        self.place = StreamPlace(**asdict(place))
        self.bad_rows.count = place.bad_rows
        self.bad_rows.shown.clear()
        self._open()
        self._read_window()

    def take(self, count: int) -> list[Pack]:
        """The next ``count`` packs."""
        taken: list[Pack] = []
        while len(taken) < count:
            while self.place.index == len(self._packs):
                self._next_window()
            taken.append(self._packs[self.place.index])
            self.place.index += 1
        return taken

    def _open(self) -> None:
        rows = itertools.islice(self.read(), self.place.rows, None)
        self._documents = self._encoded(rows)

    def _next_window(self) -> None:
        place = self.place
        if self._rows_of_window:
            place.rows, place.window, place.index = place.rows + self._rows_of_window, place.window + 1, 0
            if place.epoch == 0:
                place.bad_rows = self.bad_rows.count
        else:  # the data has ended
            place.epoch, place.rows, place.window, place.index = place.epoch + 1, 0, 0, 0
            self._open()
        self._read_window()

    def _read_window(self) -> None:
        size = max(WINDOW_PACKS * self.max_length, WINDOW_TOKENS)
        self._rows_of_window, tokens = 0, 0
        documents: list[np.ndarray] = []
        for where, document in self._documents:
            self._rows_of_window += 1
            if isinstance(document, BadRow):
                if self.place.epoch == 0:  # later they are the same again
                    self.bad_rows.add(where, document)
                    self.bad_rows.check()
            elif document is not None:
                documents.append(document)
                tokens += len(document)
                if tokens >= size:
                    break
        packs = pack(documents, self.max_length)
        if self.embedded is not None and packs and largest_id(packs) >= self.embedded:
            raise UserError(f"the tokenizer gives token {largest_id(packs)}, and the model embeds {self.embedded}")
        if not packs and self.place.rows == 0 and self.place.window == 0:
            raise UserError("the training data is too short: it holds nothing to train on")
        place = self.place
        order = np.random.default_rng((self.seed, place.epoch, place.window)).permutation(len(packs))
        self._packs = [packs[i] for i in order]

    def _encoded(self, rows: Rows) -> Iterator[tuple[Place, np.ndarray | BadRow | None]]:
        """Every row's tokens, or what is wrong with it, or None if it is blank."""
        while chunk := list(itertools.islice(rows, ROWS_AT_A_TIME)):
            contents: list = []
            for _, row in chunk:
                try:
                    contents.append(self.formats.content(row))
                except BadRow as error:
                    contents.append(error)
            whole = [c for c in contents if not isinstance(c, BadRow) and not self._is_blank(c)]
            encoded = iter(self.encoder.encode(whole))
            for (where, _), content in zip(chunk, contents, strict=True):
                if isinstance(content, BadRow):
                    yield where, content
                else:
                    yield where, None if self._is_blank(content) else next(encoded)

    def _is_blank(self, content: object) -> bool:
        return isinstance(content, str) and not self.keeps_blank and not content.strip()
