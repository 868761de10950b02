"""The data of fine-tuning in runs: losses, the preview, streams. No network."""

# ruff: noqa: F811 (tests take the fixtures that they import)

from __future__ import annotations

import json
import re
from pathlib import Path

import gloo_processes
import numpy as np
import pytest
import torch
from data_support import (  # noqa: F401 (fixtures)
    datasets,
    documents,
    fresh_accelerate_state,
    options,
    results,
    tiny_model,
    tokenizer,
    write_jsonl,
)

from flashmla_hf.training import data, encoding, finetune, packing, preview, rows, stream
from flashmla_hf.training.arguments import DataArguments, UserError

# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    """Chats of very different length, and one that no piece of 64 tokens holds."""
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    turns = [[{"role": "user", "content": "fox " * (1 + i % 7)}, {"role": "assistant", "content": "yes " * (2 + i % 5)}] for i in range(40)]  # fmt: skip
    turns[7] = turns[7] * 3 + [{"role": "user", "content": "the " * 100}, {"role": "assistant", "content": "no " * 90}]
    return write_jsonl(file, [{"messages": messages} for messages in turns])


def test_the_loss_is_a_mean_over_the_trained_tokens_whatever_the_batches(tiny_model, chats, tmp_path):
    shared = {"train_file": chats, "assistant_only_loss": True, "max_steps": 3, "validation_split_percentage": 20}
    ways = {
        "accumulated": {"gradient_accumulation_steps": 2},
        "batched": {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 3},
        "patched": {"gradient_accumulation_steps": 2, "patches": "all"},
        "eager": {"gradient_accumulation_steps": 2, "attn_implementation": "eager"},
    }
    found = {}
    for name, way in ways.items():
        finetune.main(options(tiny_model, tmp_path / name, **shared, **way))
        found[name] = results(tmp_path / name)
    for name in ways:
        np.testing.assert_allclose(found[name][0], found["eager"][0], rtol=1e-4)
        assert found[name][1]["eval_loss"] == pytest.approx(found["eager"][1]["eval_loss"], rel=1e-4)
    report = found["eager"][1]
    assert 0 < report["train_loss_tokens"] < report["train_tokens"]


def test_the_first_loss_is_that_of_each_trained_token(tiny_model, chats, tmp_path, tokenizer):
    """Every chat alone, unpacked and without our collator: the loss of a step is the mean over its trained tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    short = write_jsonl(tmp_path / "a.jsonl", [json.loads(line) for line in chats.read_text().splitlines()[:7]])
    sums, count, length = 0.0, 0, 0
    for line in short.read_text().splitlines():
        messages = json.loads(line)["messages"]
        before = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        end = len(ids) - 1  # without the line's end, which follows <|im_end|>
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        target = torch.tensor(ids[len(before) : end])
        sums += float(torch.nn.functional.cross_entropy(logits[len(before) - 1 : end - 1], target, reduction="sum"))
        count += len(target)
        length += len(ids)
    shared = {"train_file": short, "assistant_only_loss": True, "max_length": length, "max_steps": 1}
    finetune.main(options(tiny_model, tmp_path / "out", **shared))
    losses, report = results(tmp_path / "out")
    assert report["train_loss_tokens"] == count, "the seven chats are not the one pack that the test needs"
    assert losses[0] == pytest.approx(sums / count, rel=1e-4)


def test_other_marks_are_another_run(tiny_model, chats, tmp_path):
    shared = {"train_file": chats, "max_steps": 1, "save_steps": 1}
    finetune.main(options(tiny_model, tmp_path, **shared))
    with pytest.raises(SystemExit, match="belongs to another run"):
        finetune.main(
            options(tiny_model, tmp_path, **shared, assistant_only_loss=True, resume_from_checkpoint="latest")
        )


def test_the_preview_marks_what_is_trained_on_and_ends(tiny_model, chats, tmp_path, capsys):
    shared = {"train_file": chats, "assistant_only_loss": True}
    finetune.main(options(tiny_model, tmp_path / "out", **shared, preview=True))
    said = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    marked = re.search(r"tokens; (\d+) trained on, between ⟦ and ⟧", said)
    assert marked, said
    assert "<|im_start|>assistant\n  | ⟦yes yes" in said
    assert re.search(r"yes <\|im_end\|>⟧", said)
    finetune.main(options(tiny_model, tmp_path / "out", **shared, max_steps=1))
    assert "⟦" in capsys.readouterr().out


def test_the_short_preview_is_short_and_harmless(tokenizer):
    text = packing.marked(tokenizer("the fox \x1b[2J " * 900)["input_ids"])
    shown = preview.preview([text] * 30, tokenizer, is_short=True)
    assert len(shown) < 3000
    assert "\x1b" not in shown
    assert r"\x1b[2J" in shown
    assert "and 22 more pieces" in shown
    assert "all of it is trained on" in shown


# ---------------------------------------------------------------- streams


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(stream, "WINDOW_PACKS", 4)
    monkeypatch.setattr(stream, "WINDOW_TOKENS", 1)
    monkeypatch.setattr(stream, "ROWS_AT_A_TIME", 3)


def test_a_stream_that_is_one_window_trains_as_the_list_does(tiny_model, chats, tmp_path):
    table = [json.loads(line) for line in chats.read_text().splitlines()]
    datasets.Dataset.from_list(table).to_parquet(tmp_path / "chats.parquet")
    shared = {"assistant_only_loss": True, "max_steps": 4, "gradient_accumulation_steps": 2}
    found = {}
    for name, more in {
        "list": {"train_file": chats},
        "stream": {"train_file": chats, "streaming": True},
        "parquet": {"train_file": tmp_path / "chats.parquet", "streaming": True},
        "dataset": {"dataset_name": chats.parent, "streaming": True},
    }.items():
        finetune.main(options(tiny_model, tmp_path / name, **shared, **more))
        found[name] = results(tmp_path / name)[0]
    assert found["stream"] == found["parquet"] == found["dataset"] == found["list"]


def packs_of(file, tokenizer, **more):
    data_args = DataArguments(train_file=str(file), streaming=True, max_length=64, assistant_only_loss=True, **more)
    args = finetune.TrainingArguments(output_dir="x")
    return data._stream(data_args, args, encoding.Encoder(tokenizer, data_args), rows.BadRows(data_args.skip_bad_rows))


def test_a_stream_of_many_windows_holds_every_row_once_an_epoch(chats, tokenizer, small_windows):
    packs = packs_of(chats, tokenizer)
    args = DataArguments(assistant_only_loss=True)
    every = data.encode(documents(chats)[0], encoding.Encoder(tokenizer, args), rows.BadRows())
    expected = sorted(piece.tolist() for one in packing.pack(every, 64) for piece in one)
    orders = []
    for epoch in (0, 1):
        found = []
        while len(found) < len(expected):
            found += [piece.tolist() for piece in packs.take(1)[0]]
            assert packs.place.epoch == epoch
        assert sorted(found) == expected
        assert packs.place.window > 2
        orders.append(found)
    assert orders[0] != orders[1], "the second epoch has the order of the first"


def test_a_stream_goes_on_at_its_place(chats, tokenizer, small_windows, tmp_path):
    """From any place, with bad rows before it and in it, over the end of the data."""
    table = chats.read_text().splitlines()
    file = write_jsonl(tmp_path / "a.jsonl", ["{oops", *table[:20], "", '{"messages": []}', *table[20:], "{oops"])
    with pytest.raises(UserError, match="line 1: not a JSON object"):
        packs_of(file, tokenizer)
    packs = packs_of(file, tokenizer, skip_bad_rows=True)
    places, taken = [], []
    while packs.place.epoch < 2:
        places.append(stream.StreamPlace(**vars(packs.place)))
        taken += packs.take(1)
    assert packs.bad_rows.count == 3
    other = packs_of(file, tokenizer, skip_bad_rows=True)
    for i in (len(places) - 2, 0, len(places) // 3, 2 * len(places) // 3):
        other.seek(places[i])
        for expected in taken[i : i + 5]:
            found = other.take(1)[0]
            assert [piece.tolist() for piece in found] == [piece.tolist() for piece in expected]
    other.seek(places[len(places) // 3])
    other.take(2 * len(places) // 3)
    assert other.bad_rows.count == 3


def test_a_streamed_run_resumes_with_the_same_losses(tiny_model, chats, tmp_path, small_windows):
    shared = {
        "train_file": chats, "streaming": True, "assistant_only_loss": True, "gradient_accumulation_steps": 3,
        "lr_scheduler_type": "constant", "save_steps": 3,
    }  # fmt: skip
    finetune.main(options(tiny_model, tmp_path / "whole", **shared, max_steps=9))
    finetune.main(options(tiny_model, tmp_path / "parts", **shared, max_steps=3))
    again = {"resume_from_checkpoint": "latest"}
    finetune.main(options(tiny_model, tmp_path / "parts", **shared, max_steps=9, **again))
    assert results(tmp_path / "parts")[0] == results(tmp_path / "whole")[0]
    for changed in ({"streaming": False}, {"max_length": 65}, {"assistant_only_loss": False}, {"skip_bad_rows": True}):
        with pytest.raises(SystemExit, match="belongs to another run"):
            finetune.main(options(tiny_model, tmp_path / "parts", **shared | changed, max_steps=9, **again))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "--streaming: expected --max_steps"),
        ({"max_steps": 1, "validation_split_percentage": 5}, "--streaming: expected --validation_split_percentage 0"),
        ({"max_steps": 1, "max_train_samples": 5}, "--streaming: expected no --max_train_samples"),
    ],
)
def test_what_a_stream_cannot_do_is_said(more, said, tmp_path):
    with pytest.raises(UserError, match=said):
        finetune.parse_arguments(options(tmp_path, tmp_path, train_file="x", streaming=True, **more))


def test_a_stream_of_nothing_ends(tokenizer, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", ["{oops"])
    with pytest.raises(UserError, match="holds nothing to train on"):
        packs_of(file, tokenizer, skip_bad_rows=True)


def test_completion_only_loss_is_a_switch_with_three_states(tmp_path):
    for words, expected in (
        ([], None),
        (["--completion_only_loss"], True),
        (["--completion_only_loss", "false"], False),
    ):
        found = finetune.parse_arguments([*options(tmp_path, tmp_path, train_file="x"), *words])[1]
        assert found.completion_only_loss is expected
    (tmp_path / "c.yaml").write_text("completion_only_loss: false\n")
    words = [*options(tmp_path, tmp_path, train_file="x"), "--config", str(tmp_path / "c.yaml")]
    assert finetune.parse_arguments(words)[1].completion_only_loss is False


def test_two_processes_share_a_stream(tiny_model, chats, tmp_path):
    """Each reads all of it and runs its share: the same packs in the same steps as one process that accumulates."""
    shared = {"train_file": chats, "streaming": True, "assistant_only_loss": True, "max_steps": 3}
    finetune.main(options(tiny_model, tmp_path / "one", **shared, gradient_accumulation_steps=2))
    gloo_processes.run(finetune.main, options(tiny_model, tmp_path / "two", **shared))
    (alone, report), (together, other) = results(tmp_path / "one"), results(tmp_path / "two")
    np.testing.assert_allclose(together, alone, rtol=1e-4)
    for name in ("train_tokens", "train_loss_tokens"):
        assert other[name] == report[name]
