"""``--patches``: auto pays for no memory that is not needed, all is all that the model supports, and names are binding."""

from __future__ import annotations

import json
import logging

import pytest
import transformers
from training_support import losses, options

import flashmla_hf
from flashmla_hf.host_memory import GIB
from flashmla_hf.training import finetune, machine, model
from flashmla_hf.training.arguments import parse_arguments, parse_patches, required_patches

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")


def planned(tiny_model, corpus, tmp_path, monkeypatch, free, device="cpu", **more):
    model_args, data_args, args = parse_arguments(options(tiny_model, corpus, tmp_path, use_peft=True, **more))
    monkeypatch.setattr(machine, "memory_available", lambda device: free)
    monkeypatch.setattr(type(args), "device_type", device)
    return model.plan_patches(model_args, args, data_args.max_length)


def test_auto_follows_length_and_free_memory(tiny_model, corpus, tmp_path, monkeypatch):
    def plan(free, **more):
        return planned(tiny_model, corpus, tmp_path, monkeypatch, free, **more)

    assert plan(16 * GIB) == ["light"]
    assert plan(GIB // 10**4) == ["all"]
    assert plan(16 * GIB, max_length=10**7) == ["all"]
    assert plan(16 * GIB, max_length=2048, per_device_train_batch_size=5000) == ["all"]
    # On a GPU the patches themselves divide what is free, at each length.
    assert plan(16 * GIB, device="cuda") == ["all"]
    # What is named is taken as it is.
    assert plan(16 * GIB, patches="all") == ["all"]
    assert plan(16 * GIB, patches="none") == ["none"]


def test_a_model_that_the_ledger_does_not_know_gets_all(tiny_model, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "ledger_of", lambda *args: None)
    assert planned(tiny_model, corpus, tmp_path, monkeypatch, 16 * GIB) == ["all"]


def test_the_default_run_is_light_and_learns_the_same(tiny_model, corpus, tmp_path):
    shared = {"use_peft": True, "max_steps": 3, "lr_scheduler_type": "constant"}
    for name, more in {"auto": {}, "none": {"patches": "none"}}.items():
        finetune.main(options(tiny_model, corpus, tmp_path / name, **shared, **more))
    assert losses(tmp_path / "auto") == pytest.approx(losses(tmp_path / "none"), rel=1e-5)
    applied = {n: json.loads((tmp_path / n / "all_results.json").read_text())["patches"] for n in ("auto", "none")}
    assert applied == {"auto": ["loss", "rope", "lora"], "none": []}


@pytest.fixture
def cohere(tiny_model, tmp_path):
    """A model whose rotary layout the patch rope does not support, with the tiny model's tokenizer."""
    config = transformers.CohereConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=304, max_position_embeddings=2048,
    )  # fmt: skip
    folder = tmp_path / "cohere"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def test_all_is_all_that_the_model_supports_and_a_name_is_binding(cohere, corpus, tmp_path, caplog):
    shared = {"use_peft": True, "max_steps": 1}
    with caplog.at_level(logging.WARNING, "flashmla_hf"):
        finetune.main(options(cohere, corpus, tmp_path / "all", **shared, patches="all"))
    assert "left out 'rope'" in caplog.text
    applied = json.loads((tmp_path / "all" / "all_results.json").read_text())["patches"]
    assert "rope" not in applied
    assert "loss" in applied
    for i, wanted in enumerate((["rope"], ["all", "rope"], ["light", "rope"])):
        arguments = [*options(cohere, corpus, tmp_path / str(i), **shared), "--patches", *wanted]
        with pytest.raises(SystemExit, match=r"'rope' does not support this model"):
            finetune.main(arguments)


def test_groups_and_names():
    assert parse_patches(["light"], "cuda", True) == (["loss", "rope", "lora"], {})
    assert parse_patches(["light", "mlp_tile=8"], "cpu", False) == (["loss", "mlp", "rope"], {"mlp_tile": 8})
    assert parse_patches(["auto"], "cuda", True) == (list(flashmla_hf.DEFAULT_PATCHES), {})
    assert required_patches(["all"]) == set()
    assert required_patches(["all", "offload=3"]) == {"offload"}
    assert required_patches(["loss"]) is None
    with pytest.raises(ValueError, match="auto: expected it alone, got auto loss"):
        parse_patches(["auto", "loss"], "cpu", True)
