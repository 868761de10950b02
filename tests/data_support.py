"""A tiny model with a tokenizer, chat templates and rows, for the tests of fine-tuning's data. No network."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")

from flashmla_hf.training import data, encoding, preview, rows  # noqa: E402
from flashmla_hf.training.arguments import DataArguments  # noqa: E402

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
