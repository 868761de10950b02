"""The data of a run: rows of files or of a dataset -> contents -> marked tokens -> packs, all of them or a stream.

rows      reads rows                        formats   what their columns mean
encoding  contents -> tokens with marks     packing   tokens -> packs -> batches
stream    packs, read as training goes on   preview   a pack as text
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from flashmla_hf.training.arguments import DataArguments, ModelArguments, TrainingArguments, UserError
from flashmla_hf.training.encoding import Encoder, set_chat_template
from flashmla_hf.training.formats import Content, Formats
from flashmla_hf.training.model import load_tokenizer
from flashmla_hf.training.packing import Pack, pack, predicted_tokens, spread
from flashmla_hf.training.preview import preview
from flashmla_hf.training.rows import BadRow, BadRows, Place, Rows, read_dataset, read_files
from flashmla_hf.training.sequence_parallel import packs_per_step
from flashmla_hf.training.stream import PackStream

Document = tuple[Place, Content]
ROWS_AT_A_TIME = 1000  # are tokenized together


@dataclass
class Data:
    """Packed sequences of a run, to train on and to evaluate on."""

    tokenizer: PreTrainedTokenizerBase
    train_packs: list[Pack] | PackStream
    eval_packs: list[Pack]
    packs_per_step: int  # of all processes
    bad_rows: BadRows  # of training and held-out data

    @property
    def bad_row_count(self) -> int:
        """The bad rows that were left out; of a stream, those that have been read."""
        streamed = self.train_packs.bad_rows.count if isinstance(self.train_packs, PackStream) else 0
        return self.bad_rows.count + streamed

    def known_packs(self) -> list[Pack]:
        """The training packs that are known now: all of them, or those of a stream's first window."""
        return self.train_packs if isinstance(self.train_packs, list) else self.train_packs.first_window

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train_packs) // self.packs_per_step if isinstance(self.train_packs, list) else 0

    def epochs(self, step: int) -> float:
        """How often the data has been read after ``step`` steps; of a stream, whose length is not known, how often whole."""
        return self.train_packs.place.epoch if isinstance(self.train_packs, PackStream) else step / self.steps_per_epoch


def train_rows(data_args: DataArguments, choose) -> Rows:
    if data_args.dataset_name is None:
        return read_files(data_args.train_file, choose, data_args.dataset_train_split)
    split = data_args.dataset_train_split
    return read_dataset(data_args.dataset_name, data_args.dataset_config, split, data_args.streaming, choose)


def held_out_rows(data_args: DataArguments, choose) -> Rows | None:
    if data_args.validation_file is not None:
        return read_files(data_args.validation_file, choose, data_args.dataset_test_split or "test")
    if data_args.dataset_name is None or data_args.dataset_test_split is None:
        return None
    split = data_args.dataset_test_split
    return read_dataset(data_args.dataset_name, data_args.dataset_config, split, data_args.streaming, choose)


def documents_of(rows: Rows, formats: Formats, bad_rows: BadRows, keeps_blank: bool = False) -> list[Document]:
    """What the rows hold, with their places. Bad rows are added to ``bad_rows``."""
    documents = []
    for place, row in rows:
        try:
            content = formats.content(row)
        except BadRow as error:
            bad_rows.add(place, error)
            continue
        if keeps_blank or not isinstance(content, str) or content.strip():
            documents.append((place, content))
    return documents


def load_documents(data_args: DataArguments, seed: int, bad_rows: BadRows) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents; a document is wholly on one side. Streamed training data is not read here."""
    formats = Formats(data_args)
    train: list[Document] = []
    if not data_args.streaming:
        # A dataset's blank rows are documents of the split below; they hold nothing to train on.
        rows = train_rows(data_args, formats.choose)
        train = documents_of(rows, formats, bad_rows, keeps_blank=data_args.dataset_name is not None)
    held_out_read = held_out_rows(data_args, formats.choose)
    held_out = documents_of(held_out_read, formats, bad_rows) if held_out_read is not None else []
    bad_rows.check()
    if not train and not data_args.streaming:
        raise _holds_nothing(data_args.train_file or data_args.dataset_name, bad_rows)
    if held_out_read is not None and not held_out:
        raise _holds_nothing(data_args.validation_file or f"the split {data_args.dataset_test_split!r}", bad_rows)
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


def _holds_nothing(path: str, bad_rows: BadRows) -> UserError:
    because = f": its rows are bad, all {bad_rows.count}; the first is {bad_rows.shown[0]}" if bad_rows.count else ""
    return UserError(f"{path} holds no text{because}")


def encode(documents: Iterable[Document], encoder: Encoder, bad_rows: BadRows) -> list[np.ndarray]:
    """The marked tokens of each document, int32 [length]. Documents that have none are added to ``bad_rows``."""
    documents, tokens = list(documents), []
    for start in range(0, len(documents), ROWS_AT_A_TIME):
        chunk = documents[start : start + ROWS_AT_A_TIME]
        for (place, _), encoded in zip(chunk, encoder.encode([content for _, content in chunk]), strict=True):
            if isinstance(encoded, BadRow):
                bad_rows.add(place, encoded)
            else:
                tokens.append(encoded)
    return tokens


def prepare_data(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments, accelerator: Accelerator
) -> Data:
    """Reads, tokenizes and packs the documents. Raises UserError if they do not fill one step."""
    bad_rows = BadRows(data_args.skip_bad_rows)
    train_documents, held_out_documents = load_documents(data_args, args.seed, bad_rows)
    tokenizer = load_tokenizer(model_args)
    if data_args.chat_template_path is not None:
        set_chat_template(tokenizer, data_args.chat_template_path)
    encoder = Encoder(tokenizer, data_args)
    held_out_tokens = encode(held_out_documents, encoder, bad_rows)
    train_tokens = encode(train_documents, encoder, bad_rows)
    bad_rows.check()
    eval_packs = spread(pack(held_out_tokens, data_args.max_length), data_args.max_eval_samples)
    per_step = packs_per_step(accelerator, args)
    train_packs: list[Pack] | PackStream
    if data_args.streaming:
        train_packs, told = _stream(data_args, args, encoder, bad_rows), "training data is streamed"
    else:
        train_packs = spread(pack(train_tokens, data_args.max_length), data_args.max_train_samples)
        told = _told(train_tokens, train_packs, data_args, per_step)
    accelerator.print(f"{told}; held out: {len(held_out_documents)} documents, {len(eval_packs)} sequences evaluated")
    if bad_rows.count:
        accelerator.print(f"bad rows, left out: {bad_rows.count}; {'; '.join(bad_rows.shown)}")
    data = Data(tokenizer, train_packs, eval_packs, per_step, bad_rows)
    accelerator.print(preview(first_pack(data, args.seed), tokenizer, is_short=not data_args.preview))
    return data


def _told(tokens: list[np.ndarray], packs: list[Pack], data_args: DataArguments, per_step: int) -> str:
    """A sentence on the training data. Raises UserError if it is too short."""
    token_count = sum(map(len, tokens))
    if token_count < data_args.max_length:
        raise UserError(
            f"the training data is too short: {token_count} tokens, fewer than one sequence of "
            f"max_length={data_args.max_length}; give more text or a smaller --max_length"
        )
    if len(packs) < per_step:
        raise UserError(
            f"the training data is too short: {len(packs)} packed sequences of {data_args.max_length} tokens, "
            f"and one optimizer step takes {per_step} (batch size x accumulation x processes)"
        )
    is_masked = any((document < 0).any() for document in tokens)
    trained = f" ({predicted_tokens(packs):,} of them trained on)" if is_masked else ""
    return (
        f"{len(tokens)} training documents: {token_count:,} tokens{trained} in {len(packs)} sequences of at most "
        f"{data_args.max_length}"
    )


def _stream(data_args: DataArguments, args: TrainingArguments, encoder: Encoder, bad_rows: BadRows) -> PackStream:
    formats = Formats(data_args)
    # Bad rows of held-out data are counted by now; a stream sets its own count when it goes to a place.
    streamed = BadRows(bad_rows.is_skipping)
    read = functools.partial(train_rows, data_args, formats.choose)
    keeps_blank = data_args.dataset_name is not None
    return PackStream(read, formats, encoder, streamed, data_args.max_length, args.seed, keeps_blank)


def first_pack(data: Data, seed: int) -> Pack:
    """The first packed sequence of the first step."""
    packs = data.known_packs()
    if isinstance(data.train_packs, PackStream):
        return packs[0]
    return packs[np.random.default_rng((seed, 0)).permutation(len(packs))[0]]


def streamed_options(data_args: DataArguments) -> dict[str, object]:
    """What decides the packs of a stream, beside its first window: for the fingerprint of a run."""
    names = (
        "dataset_name", "dataset_config", "dataset_train_split", "dataset_text_field", "max_length", "assistant_only_loss",
        "completion_only_loss", "skip_bad_rows",
    )  # fmt: skip
    chosen = {name: value for name, value in dataclasses.asdict(data_args).items() if name in names}
    return chosen | {"train_file": data_args.train_file and Path(data_args.train_file).name}
