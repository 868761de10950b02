"""The data of fine-tuning: formats, which tokens have a loss, bad rows, streams, the preview. No network."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")

from flashmla_hf.training import data, encoding, finetune, packing, preview, rows, stream  # noqa: E402
from flashmla_hf.training.arguments import DataArguments, UserError  # noqa: E402

CPU = torch.device("cpu")
# ChatML as many models ship it: nothing marks the assistant's tokens.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Thinking models' templates drop the thoughts of earlier turns: a chat is not a beginning of a longer one.
FORGETFUL = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if loop.last and message['role'] == 'assistant' %}{{ '<think></think>' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Never leaves the assistant's header open.
NO_PROMPT = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
INST = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + '<end>' }}{% endif %}{% endfor %}"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Was heißt „Bär“ auf Japanisch? 🐻"},
    {"role": "assistant", "content": "熊 (くま) 🐻"},
    {"role": "user", "content": "assistant\nthe fox?"},
    {"role": "assistant", "content": "狐\n\nthe quick brown fox"},
]
ANSWERS = ["熊 (くま) 🐻<|im_end|>", "狐\n\nthe quick brown fox<|im_end|>"]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    """A folder with a random two-layer Llama and a byte tokenizer that knows ChatML."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-model")
    bpe = ByteLevelBPETokenizer()
    words = ["the quick brown fox: yes", "a \n\n b", ": yes"] * 9
    control = ["<end>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(words, vocab_size=300, special_tokens=control, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<end>", additional_special_tokens=control[1:]
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=304, max_position_embeddings=2048, initializer_range=0.1, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    """accelerate remembers mixed precision per process; each run here stands for a process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def options(model: Path, output_dir: Path, **more) -> list[str]:
    values = {
        "model_name_or_path": model,
        "output_dir": output_dir,
        "max_length": 64,
        "learning_rate": 5e-3,
        "use_cpu": True,
        "use_peft": True,
        "disable_tqdm": True,
        "report_to": "none",
    } | more
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def encoded(tokenizer, row, **more):
    """The marked tokens of one row. Raises BadRow if it has none."""
    data_args = DataArguments(train_file="x", **more)
    found = encoding.Encoder(tokenizer, data_args).encode([data.Formats(data_args).content(row)])[0]
    if isinstance(found, rows.BadRow):
        raise found
    return found


def trained_texts(tokenizer, piece) -> list[str]:
    """The runs of tokens that have a loss, decoded."""
    return [text for text, has_loss in preview._parts(piece, tokenizer) if has_loss]


def documents(path, **more):
    data_args = DataArguments(train_file=str(path), **more)
    bad_rows = rows.BadRows(data_args.skip_bad_rows)
    return data.load_documents(data_args, 0, bad_rows)[0], bad_rows


def contents(path, **more):
    return [content for _, content in documents(path, **more)[0]]


def results(output_dir: Path) -> tuple[list[float], dict]:
    log = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry], json.loads(
        (output_dir / "all_results.json").read_text()
    )


def write_jsonl(path: Path, rows_of_it: list, end: str = "\n") -> Path:
    text = end.join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows_of_it)
    path.write_bytes(text.encode())
    return path


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
    dataset = datasets.Dataset.from_list(table)
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": dataset, "held": dataset.select([1])}).save_to_disk(tmp_path / "splits")
    for name in ("a.jsonl", "crlf.jsonl", "bom.jsonl", "array.json", "a.parquet", "saved", "splits"):
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
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    path = os.pathsep.join([str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [*launch, "-m", "flashmla_hf.training.finetune", *options(tiny_model, tmp_path / "two", **shared)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, check=True, timeout=400,
    )  # fmt: skip
    (alone, report), (together, other) = results(tmp_path / "one"), results(tmp_path / "two")
    np.testing.assert_allclose(together, alone, rtol=1e-4)
    for name in ("train_tokens", "train_loss_tokens"):
        assert other[name] == report[name]
