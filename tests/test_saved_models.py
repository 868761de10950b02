"""What is saved with our attention and patches loads and generates in plain Transformers, in a process without this package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import FAMILY, build
from forked_python import run_program
from training_support import options
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import flashmla_hf
from flashmla_hf.hf.names import NAMES, is_fp8
from flashmla_hf.training import finetune

PROMPT = [[5, 6, 7, 8, 9]]
# Prints the attention and six tokens of each folder. The entry point is off, and any import of this package fails.
PROGRAM = """
import json, sys
sys.modules["flashmla_hf"] = None
from transformers import AutoConfig, AutoModelForCausalLM
import torch
found = {}
for folder in json.loads(FOLDERS):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = model.generate(torch.tensor(PROMPT), max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    found[folder] = [model.config._attn_implementation, tokens[0, len(PROMPT[0]):].tolist()]
print("found", json.dumps(found))
"""


def in_plain_transformers(folders: list[Path]) -> dict[str, list]:
    program = f"FOLDERS = {json.dumps([str(f) for f in folders])!r}\nPROMPT = {PROMPT}\n{PROGRAM}"
    printed = run_program(program, FLASHMLA_AUTOLOAD="0", TORCH_DEVICE_BACKEND_AUTOLOAD="0", HF_HUB_OFFLINE="1")
    return json.loads(printed.rpartition("found ")[2])


def tokens_of(model) -> list[int]:
    tokens = model.eval().generate(
        torch.tensor(PROMPT), max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0
    )
    return tokens[0, len(PROMPT[0]) :].tolist()


def names_us(folder: Path) -> list[str]:
    """The text files of ``folder`` that hold one of our names."""
    texts = [path for path in folder.rglob("*") if path.suffix in (".json", ".jinja", ".yaml", ".py")]
    return [path.name for path in texts if any(name in path.read_text() for name in NAMES)]


@pytest.mark.usefixtures("fresh_accelerate_state")
def test_saved_models_load_and_generate_without_this_package(tiny_model, corpus, tmp_path):
    expected = {}
    for number, name in enumerate(NAMES):
        model = flashmla_hf.patch(AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=name))
        model.save_pretrained(tmp_path / f"save_pretrained {number}")
        if is_fp8(name):
            model.set_attn_implementation("flashmla")  # what a program without fp8 computes
        expected[tmp_path / f"save_pretrained {number}"] = tokens_of(model)

    model = flashmla_hf.patch(AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="flashmla"))
    rows = [{"input_ids": list(range(5, 25)), "labels": list(range(5, 25))}] * 4
    settings = TrainingArguments(tmp_path / "trainer", max_steps=1, use_cpu=True, report_to="none", learning_rate=1e-2)
    trainer = Trainer(model, settings, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    expected[tmp_path / "trainer"] = expected[tmp_path / "trainer/checkpoint-1"] = tokens_of(model)

    for kind, more in (("all weights", {"patches": "all"}), ("adapter", {"patches": "all", "use_peft": True})):
        out = tmp_path / kind
        arguments = options(tiny_model, corpus, out, max_steps=2, **more)
        finetune.main(arguments)
        ours = AutoModelForCausalLM.from_pretrained(out, attn_implementation="flashmla")
        expected[out] = tokens_of(ours)

    found = in_plain_transformers(list(expected))
    assert found == {str(folder): ["sdpa", tokens] for folder, tokens in expected.items()}
    assert len({tuple(tokens) for tokens in expected.values()}) > 1  # training has changed something


@pytest.mark.parametrize("family", ["Gemma3 images", "Pixtral (Llava)", "GPT-OSS"])
def test_no_configuration_holds_our_name(family, tmp_path):
    """Configurations of submodels, and classes that are told which flash names they know."""
    model = build(FAMILY[family], "flashmla", "cpu")
    assert model.config._attn_implementation == "flashmla"
    model.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path / "config")
    assert names_us(tmp_path) == []
