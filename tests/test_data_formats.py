"""The data of fine-tuning: formats, which tokens have a loss, bad rows. No network."""

# ruff: noqa: F811 (tests take the fixtures that they import)

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from data_support import (  # noqa: F401 (fixtures)
    ANSWERS,
    CHAT,
    CHATML,
    CPU,
    FORGETFUL,
    INST,
    MARKED,
    NO_PROMPT,
    contents,
    datasets,
    documents,
    encoded,
    fresh_accelerate_state,
    options,
    results,
    tiny_model,
    tokenizer,
    trained_texts,
    write_jsonl,
)

from flashmla_hf.training import data, encoding, finetune, packing, rows
from flashmla_hf.training.arguments import DataArguments, UserError

# ---------------------------------------------------------------- which tokens have a loss


def test_a_chat_is_what_the_template_makes_of_it(tokenizer):
    piece = encoded(tokenizer, {"messages": CHAT})
    assert (piece >= 0).all()
    assert piece.tolist() == tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["by prefixes", "marked"])
def test_the_assistants_tokens_alone_are_trained_in_every_turn(template, tokenizer):
    tokenizer.chat_template = template
    piece = encoded(tokenizer, {"messages": CHAT}, assistant_only_loss=True)
    whole = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]
    assert packing.token_ids(piece).tolist() == whole
    assert trained_texts(tokenizer, piece) == ANSWERS


def test_sharegpt_rows_and_parts_are_the_same_chat(tokenizer):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    sharegpt = {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in CHAT], "id": 3}
    parts = {"messages": [m | {"content": [{"type": "text", "text": m["content"]}], "name": None} for m in CHAT]}
    expected = encoded(tokenizer, {"messages": CHAT}, assistant_only_loss=True)
    for row in (sharegpt, parts):
        np.testing.assert_array_equal(encoded(tokenizer, row, assistant_only_loss=True), expected)


def test_a_template_without_a_header_of_its_own_is_exact_too(tokenizer):
    tokenizer.chat_template = INST
    piece = encoded(tokenizer, {"messages": CHAT[1:]}, assistant_only_loss=True)
    assert trained_texts(tokenizer, piece) == [" 熊 (くま) 🐻<end>", " 狐\n\nthe quick brown fox<end>"]


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (FORGETFUL, CHAT, r"tokens of message 3 are not known.*generation.*--chat_template_path"),
        (NO_PROMPT, CHAT, r"tokens of message 3 are not known"),
        (CHATML, CHAT[2:], r"first message is the assistant's.*--chat_template_path"),
        (CHATML, CHAT[:2], r"no message of the role 'assistant'"),
        (MARKED, CHAT[:2], r"no message of the role 'assistant'"),
        ("{{ raise_exception('no roles here') }}", CHAT, r"template refuses the messages: no roles here"),
    ],
)
def test_what_is_not_exactly_known_is_refused(template, messages, said, tokenizer):
    tokenizer.chat_template = template
    with pytest.raises(rows.BadRow, match=said):
        encoded(tokenizer, {"messages": messages}, assistant_only_loss=True)


def test_the_last_answer_of_a_thinking_template_is_known(tokenizer):
    tokenizer.chat_template = FORGETFUL
    piece = encoded(tokenizer, {"messages": CHAT[:3]}, assistant_only_loss=True)
    assert trained_texts(tokenizer, piece) == ["<think></think>" + ANSWERS[0]]


def test_the_completion_alone_is_trained_unless_all_is_asked_for(tokenizer):
    row = {"prompt": "the quick\n", "completion": "brown fox 🦊"}
    piece = encoded(tokenizer, row)
    assert trained_texts(tokenizer, piece) == ["brown fox 🦊<end>"]
    assert tokenizer.decode(packing.token_ids(piece)) == "the quick\nbrown fox 🦊<end>"
    assert (encoded(tokenizer, row, completion_only_loss=False) >= 0).all()
    np.testing.assert_array_equal(encoded(tokenizer, row, completion_only_loss=True), piece)


def test_a_token_across_the_boundary_is_taken_apart(tokenizer):
    """ "fox: " + "yes" has the token " yes"; the model is given "fox: " and writes "yes"."""
    row = {"prompt": "the fox: ", "completion": "yes"}
    whole, alone = (tokenizer(text)["input_ids"] for text in ("the fox: yes", "the fox: "))
    assert whole[: len(alone)] != alone, "the case does not arise with this tokenizer"
    piece = encoded(tokenizer, row)
    assert trained_texts(tokenizer, piece) == ["yes<end>"]
    assert tokenizer.decode(packing.token_ids(piece)) == "the fox: yes<end>"
    assert encoded(tokenizer, row, completion_only_loss=False).tolist() == [*whole, tokenizer.eos_token_id]


def test_prompts_and_completions_of_messages(tokenizer):
    row = {"prompt": CHAT[:2], "completion": CHAT[2:]}
    piece = encoded(tokenizer, row)
    assert (
        "".join(trained_texts(tokenizer, piece))
        == tokenizer.decode(packing.token_ids(piece)).split("assistant\n", 1)[1]
    )
    assert trained_texts(tokenizer, encoded(tokenizer, row, assistant_only_loss=True)) == ANSWERS
    last = {"prompt": CHAT[:4], "completion": CHAT[4:]}
    assert trained_texts(tokenizer, encoded(tokenizer, last, assistant_only_loss=True)) == ANSWERS[1:]
    tokenizer.chat_template = FORGETFUL
    begun = {"prompt": CHAT[:3], "completion": CHAT[3:]}
    with pytest.raises(rows.BadRow, match="renders the prompt otherwise alone"):
        encoded(tokenizer, begun)


@pytest.mark.parametrize("as_json", [False, True])
def test_tools_are_given_to_the_template(as_json, tokenizer):
    """Keys of None are what datasets and parquet make of a key that another row has."""
    tokenizer.chat_template = "{{ tools | tojson if tools else 'no tools' }}" + MARKED.replace(
        "message['content'] + '<|im_end|>' }}{% endgen",
        "message['content'] + message['tool_calls'] | tojson }}{% endgen",
    )
    tools = [{"type": "function", "function": {"name": "add", "description": "a", "parameters": None}}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": None, "function": {"name": "add"}}]}
    row = {"messages": [CHAT[1], call], "tools": json.dumps(tools) if as_json else tools}
    piece = encoded(tokenizer, row, assistant_only_loss=True)
    assert trained_texts(tokenizer, piece) == ['[{"function": {"name": "add"}}]']
    text = tokenizer.decode(packing.token_ids(piece))
    assert text.startswith('[{"type": "function", "function": {"name": "add", "description": "a"}}]<|im_start|>')
    assert encoded(tokenizer, row | {"tools": None}).size < piece.size


@pytest.mark.parametrize("length", [5, 16, 17, 33, 64])
def test_a_row_that_is_cut_keeps_its_marks(length, tokenizer):
    piece = encoded(tokenizer, {"messages": CHAT * 2}, assistant_only_loss=True)
    text = np.arange(40, dtype=np.int32)
    packs = packing.pack([piece, text], length)
    batch = packing.Collator("flashmla")(packs, CPU)
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    at_start = batch["position_ids"][0] == 0
    is_trained = np.concatenate([p >= 0 for one in packs for p in one])
    expected = torch.where(torch.from_numpy(is_trained) & ~at_start, ids, -100)
    assert torch.equal(labels, expected)
    assert int((labels != -100).sum()) == packing.predicted_tokens(packs)
    # Every piece that has something to predict is there, at its own place in the row.
    cut = [p[start : start + length] for p in (piece, text) for start in range(0, len(p), length)]
    kept = sorted(p.tolist() for p in cut if (p[1:] >= 0).any())
    assert sorted(p.tolist() for one in packs for p in one) == kept
    assert len(kept) < len(cut) or length > 16, "the case of a piece without a loss does not arise"


def test_text_is_packed_as_before(tokenizer):
    """No marks: the ids themselves, and so the fingerprints of runs that began before there were any."""
    texts = ["the quick brown fox", "", "日本語"]
    found = encoding.Encoder(tokenizer, DataArguments(train_file="x")).encode(texts)
    assert [f.tolist() for f in found] == [tokenizer(t)["input_ids"] + [tokenizer.eos_token_id] for t in texts]
    assert all(f.dtype == np.int32 for f in found)


# ---------------------------------------------------------------- files, folders, datasets


def test_every_source_gives_the_same_rows(tmp_path):
    table = [{"messages": CHAT, "extra": 1}, {"messages": CHAT[:3], "extra": 2}]
    expected = [data.Formats(DataArguments()).content(row) for row in table]
    write_jsonl(tmp_path / "a.jsonl", table)
    write_jsonl(tmp_path / "crlf.jsonl", ["", *table, "   ", ""], end="\r\n")
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.jsonl").read_bytes())
    (tmp_path / "array.json").write_text(json.dumps(table, indent=1))
    for kind in ("JSONL", "ndjson", "jsonlines"):
        (tmp_path / f"a.{kind}").write_bytes((tmp_path / "a.jsonl").read_bytes())
    (tmp_path / "array.JSON").write_bytes((tmp_path / "array.json").read_bytes())
    dataset = datasets.Dataset.from_list(table)
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.to_parquet(tmp_path / "a.Parquet")
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": dataset, "held": dataset.select([1])}).save_to_disk(tmp_path / "splits")
    for name in (
        "a.jsonl", "crlf.jsonl", "bom.jsonl", "a.JSONL", "a.ndjson", "a.jsonlines", "array.json", "array.JSON", "a.parquet",
        "a.Parquet", "saved", "splits",
    ):  # fmt: skip
        assert contents(tmp_path / name) == expected, name
        assert contents(tmp_path / name, assistant_only_loss=True) == expected, name
    args = DataArguments(dataset_name=str(tmp_path / "splits"), dataset_test_split="held")
    train, held_out = data.load_documents(args, 0, rows.BadRows())
    assert ([c for _, c in train], [c for _, c in held_out]) == (expected, expected[1:])
    with pytest.raises(UserError, match="holds the splits train, held, and not 'nowhere'"):
        contents(tmp_path / "splits", dataset_train_split="nowhere")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_by_name(streaming, tmp_path):
    """A folder of files stands for a name on the Hub: datasets loads both alike."""
    (tmp_path / "hub").mkdir()
    write_jsonl(
        tmp_path / "hub" / "train.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    )
    args = DataArguments(dataset_name=str(tmp_path / "hub"), streaming=streaming)
    formats = data.Formats(args)
    found = data.documents_of(data.train_rows(args, formats.choose), formats, rows.BadRows())
    assert [(c.prompt, c.completion) for _, c in found] == [("a", "b"), ("c", "d")]
    assert str(found[1][0]) == f"dataset {args.dataset_name!r}, split 'train', row 2"


def test_a_folder_of_notes_and_rows(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.md").write_text("# Notes\r\n\r\nÄ")
    (tmp_path / "blank.txt").write_text(" \n")
    write_jsonl(tmp_path / "deep" / "b.jsonl", [{"text": "row"}, {"messages": CHAT}, {"text": ""}])
    note, row, chat = contents(tmp_path)
    assert (note, row, chat.messages) == ("# Notes\n\nÄ", "row", CHAT)


def test_the_format_of_a_row_that_has_several(tmp_path):
    row = {"text": "t", "messages": CHAT, "prompt": "p", "completion": "c", "body": "b"}
    file = write_jsonl(tmp_path / "a.jsonl", [row])
    assert contents(file) == ["t"]
    assert contents(file, assistant_only_loss=True)[0].messages == CHAT
    assert contents(file, completion_only_loss=True)[0].completion == "c"
    assert contents(file, dataset_text_field="body") == ["b"]
    assert contents(file, dataset_text_field="body", completion_only_loss=True)[0].completion == "c"
    own = write_jsonl(tmp_path / "own.jsonl", [{"dialog": CHAT}])
    assert contents(own, dataset_text_field="dialog", assistant_only_loss=True)[0].messages == CHAT


# ---------------------------------------------------------------- bad rows

BAD = {  # what stands in the second line: what is said of it
    "{oops": "line 2: not a JSON object",
    "[1]": "line 2: expected a JSON object, got list",
    '{"body": "x"}': "line 2: no column 'text', only ['body']",
    '{"text": 3}': "line 2: expected text, got int (column 'text')",
    '{"text": null}': "line 2: expected text, got NoneType",
    '{"messages": []}': "line 2: the list of messages in column 'messages' is empty",
    '{"messages": "hello"}': "line 2: expected a list of messages in column 'messages', got str",
    '{"messages": ["hello"]}': "line 2: message 1: expected an object with 'role' and 'content', got str",
    '{"messages": [{"content": "hello"}]}': "line 2: message 1: expected 'role' and 'content'",
    '{"messages": [{"role": "user", "content": 3}]}': "line 2: expected text, got int",
    '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}': "line 2: message 1: expected text, got parts",
    '{"prompt": "a", "completion": ""}': "line 2: the completion is empty",
    '{"prompt": "a", "completion": []}': "line 2: expected two strings or two lists of messages",
    '{"prompt": "a", "completion": "\\ud800"}': "line 2: character 0 is half of a pair",
}  # fmt: skip


@pytest.mark.parametrize("line", BAD)
def test_a_bad_row_is_named_and_can_be_skipped(line, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, line, "", {"text": "two"}, line])
    with pytest.raises(UserError) as caught:
        contents(file)
    message = str(caught.value)
    assert message.startswith(f"{file}, {BAD[line]}"), message
    assert "2 bad rows in all" in message
    assert "--skip_bad_rows" in message
    assert "\n" not in message
    found, bad_rows = documents(file, skip_bad_rows=True)
    assert [(place.number, content) for place, content in found] == [(1, "one"), (4, "two")]
    assert bad_rows.count == 2


def test_bytes_that_are_not_text_are_a_bad_row(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": "\xff"}\n{"text": "two"}\n')
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\xff")
    with pytest.raises(UserError, match=r"a.jsonl, line 2: not text: byte 10 of the line.*2 bad rows"):
        contents(tmp_path)
    assert contents(tmp_path, skip_bad_rows=True) == ["one", "two"]


def test_a_pipe_is_named_as_one(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match=r"rows\.jsonl: expected a file or a folder, got a pipe or a device"):
        contents(tmp_path / "rows.jsonl")


def test_a_folder_is_read_through_its_links(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    for folder in ("notes", "elsewhere/deep"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "notes" / "a.txt").write_text("here")
    (elsewhere / "deep" / "b.txt").write_text("linked")
    (tmp_path / "notes" / "more").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(tmp_path / "notes")  # which holds the link to elsewhere
    (elsewhere / "deep" / "itself").symlink_to(".")
    (tmp_path / "notes" / ".#lock").symlink_to("nothing")
    assert contents(tmp_path / "notes") == ["here", "linked"]


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("nothing", "a link to nothing: remove it, or give it a name with a leading dot"),
        ("x.txt", "a link to nothing"),  # to itself
        ("/dev/null", "a pipe or a device"),
        ("/proc/self/mem", "x.txt cannot be read: Input/output error"),
    ],
)
def test_what_a_folder_holds_is_read_or_named(target, said, tmp_path):
    """Data that is left out shows in nothing: the run would train on less than it was given."""
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "x.txt").symlink_to(target)
    with pytest.raises(UserError, match=said):
        contents(tmp_path)


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("text")
    inside = Path.iterdir

    def refused(folder):
        if folder.name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return inside(folder)

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(UserError, match="closed cannot be read: Permission denied"):
        contents(tmp_path)


@pytest.mark.parametrize("tools", ["[" + "1" * 5000 + "]", "[" * 100_000])
def test_tools_that_python_cannot_read_are_a_bad_row(tools, tmp_path):
    row = {"messages": [{"role": "user", "content": "Hi"}], "tools": tools}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match="line 1: the column 'tools' is not JSON: "):
        contents(tmp_path)


def test_rows_that_the_wanted_loss_does_not_fit_are_bad(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}])
    with pytest.raises(
        UserError, match=r"line 1: --assistant_only_loss: expected a column of messages.*got \['text'\]"
    ):
        contents(file, assistant_only_loss=True)
    with pytest.raises(UserError, match="--completion_only_loss: expected the columns 'prompt' and 'completion'"):
        contents(file, completion_only_loss=True)
    with pytest.raises(UserError, match=r"holds no text: its rows are bad, all 1; the first is .*line 1"):
        contents(file, completion_only_loss=True, skip_bad_rows=True)
    datasets.Dataset.from_list([{"body": "x"}]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet: no column 'text', only \['body'\]"):
        contents(tmp_path / "a.parquet", skip_bad_rows=True)  # all of them: that is a mistake in the options


def test_rows_found_bad_by_the_tokenizer_are_counted_in_the_report(tiny_model, tmp_path, capsys):
    chats = [{"messages": CHAT}] * 6 + [{"messages": CHAT[:2]}, "{oops", {"messages": CHAT[2:]}]
    file = write_jsonl(tmp_path / "a.jsonl", chats)
    shared = {"train_file": file, "assistant_only_loss": True, "max_steps": 1}
    with pytest.raises(SystemExit, match="line 8: not a JSON object"):
        finetune.main(options(tiny_model, tmp_path / "out", **shared))
    finetune.main(options(tiny_model, tmp_path / "out", **shared, skip_bad_rows=True))
    assert results(tmp_path / "out")[1]["bad_rows"] == 3
    said = capsys.readouterr().out
    assert "bad rows, left out: 3; " in said
    assert "line 7: there is no message of the role 'assistant'" in said


def test_a_tokenizer_without_a_chat_template_says_the_way_out(tokenizer, tmp_path):
    tokenizer.chat_template = None
    for more in ({}, {"assistant_only_loss": True}):
        with pytest.raises(UserError, match=r"no chat template.*--chat_template_path"):
            encoded(tokenizer, {"messages": CHAT}, **more)
    (tmp_path / "chat.jinja").write_text(MARKED)
    encoding.set_chat_template(tokenizer, str(tmp_path / "chat.jinja"))
    assert trained_texts(tokenizer, encoded(tokenizer, {"messages": CHAT}, assistant_only_loss=True)) == ANSWERS
    with pytest.raises(UserError, match=r"--chat_template_path .* cannot be read"):
        encoding.set_chat_template(tokenizer, str(tmp_path / "nowhere"))
