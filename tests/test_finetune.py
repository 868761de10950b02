"""Fine-tuning a tiny model: LoRA and full, packed and accumulated, by two processes, with patches, and its evaluation."""

from __future__ import annotations

import json

import gloo_processes
import models
import numpy as np
import pytest
import torch
from training_support import losses, options

from flashmla_hf.training import evaluation, finetune
from flashmla_hf.training.model import keep_adapter_inputs

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")


def test_lora_fine_tuning_lowers_the_held_out_loss_and_saves_an_adapter(tiny_model, corpus, tmp_path):
    out = tmp_path / "out"
    finetune.main(
        options(
            tiny_model, corpus, out, use_peft=True, validation_split_percentage=20, eval_on_start=True, max_steps=20,
            gradient_accumulation_steps=2, report_to="tensorboard",
        )
    )  # fmt: skip
    results = json.loads((out / "all_results.json").read_text())
    assert results["eval_loss"] < 0.7 * results["first_eval_loss"]
    assert results["train_steps"] == 20
    assert results["attn_implementation"] == "flashmla"
    assert results["peak_memory_gib"] > 0
    assert (out / "adapter_model.safetensors").stat().st_size > 0
    assert not (out / "model.safetensors").exists()
    assert list((out / "runs").rglob("events.out.tfevents*"))


def test_full_fine_tuning_saves_a_model_that_loads(tiny_model, corpus, tmp_path):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    finetune.main(
        options(tiny_model, corpus, out, max_steps=4, gradient_checkpointing=True, attn_implementation="sdpa")
    )
    trained = AutoModelForCausalLM.from_pretrained(out).lm_head.weight
    assert not torch.equal(trained, AutoModelForCausalLM.from_pretrained(tiny_model).lm_head.weight)


def test_training_in_fp8_is_near_exact_training_and_not_it(tiny_model, corpus, tmp_path):
    shared = {"max_steps": 6, "use_peft": True}
    for name in ("flashmla", "flashmla_fp8"):
        finetune.main(options(tiny_model, corpus, tmp_path / name, **shared, attn_implementation=name))
    exact, fp8 = (torch.tensor(losses(tmp_path / name)) for name in ("flashmla", "flashmla_fp8"))
    assert 1e-6 < (exact - fp8).abs().max() < 3e-2
    results = json.loads((tmp_path / "flashmla_fp8" / "all_results.json").read_text())
    assert results["attn_implementation"] == "flashmla_fp8"


def test_accumulated_batches_train_as_one_large_batch(tiny_model, corpus, tmp_path):
    """Packs differ in length, so a mean of means would not."""
    shared = {"max_steps": 4, "max_grad_norm": 0.5}
    finetune.main(options(tiny_model, corpus, tmp_path / "a", **shared, gradient_accumulation_steps=3))
    finetune.main(options(tiny_model, corpus, tmp_path / "b", **shared, per_device_train_batch_size=3))
    torch.testing.assert_close(losses(tmp_path / "a"), losses(tmp_path / "b"), rtol=1e-4, atol=1e-4)


def test_packed_documents_do_not_see_each_other(tiny_model):
    """The loss of a pack is the token-weighted loss of its documents alone, for every backend."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(5, 300, size=n).astype(np.int32) for n in (20, 50, 31)]
    for attn_implementation in ("flashmla", "sdpa", "eager"):
        model = models.load(str(tiny_model), attn_implementation, torch.float32, "cpu")
        model.config.use_cache = False
        collate = finetune.Collator(attn_implementation)
        device = torch.device("cpu")
        with torch.no_grad():
            together = model(**collate([documents], device), num_items_in_batch=1).loss
            alone = sum(model(**collate([[one]], device), num_items_in_batch=1).loss for one in documents)
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-3)


def test_two_processes_train_as_two_accumulated_batches(tiny_model, corpus, tmp_path):
    """The same packs in the same steps: loss and gradients are shares of the whole, whoever computes them."""
    shared = {"max_steps": 3, "validation_split_percentage": 20, "use_peft": True}
    finetune.main(options(tiny_model, corpus, tmp_path / "one", **shared, gradient_accumulation_steps=2))
    gloo_processes.run(finetune.main, options(tiny_model, corpus, tmp_path / "two", **shared, save_steps=2))
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4, atol=1e-4)
    assert (tmp_path / "two" / "checkpoint-2" / "random_states_1.pkl").exists()
    results = [json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("one", "two")]
    assert results[1]["eval_loss"] == pytest.approx(results[0]["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("family", ["Mixtral", "GPT2"])
def test_models_with_other_outputs_are_evaluated(family, tiny_model, corpus, tmp_path):
    import transformers

    sizes = {"vocab_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    sizes |= {"intermediate_size": 48, "num_key_value_heads": 2} if family == "Mixtral" else {"n_positions": 256}
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**sizes)
    )
    model.save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    finetune.main(
        options(tmp_path / "model", corpus, out, max_steps=2, validation_split_percentage=20, logging_steps=3)
    )
    results = json.loads((out / "all_results.json").read_text())
    if family == "GPT2":
        with pytest.raises(
            SystemExit, match="--max_length: expected at most the 256 positions that the model has learned"
        ):
            finetune.main(options(tmp_path / "model", corpus, tmp_path / "longer", max_length=512))
    assert results["eval_loss"] == pytest.approx(results["train_loss"], rel=0.2)
    assert results["mfu"] is None if family == "Mixtral" else results["mfu"] > 0


def test_clipping_sees_the_parameters_that_prepare_has_put_in_place(tiny_model, corpus, tmp_path, monkeypatch):
    """As sharding does: prepare replaces every parameter."""
    from accelerate import Accelerator

    prepare, clip, seen = Accelerator.prepare, Accelerator.clip_grad_norm_, []

    def replacing(self, model, optimizer):
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
        return prepare(self, model, optimizer)

    def clipping(self, parameters, *args):
        parameters = list(parameters)
        seen.append(any(p.grad is not None for p in parameters))
        return clip(self, parameters, *args)

    monkeypatch.setattr(Accelerator, "prepare", replacing)
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", clipping)
    finetune.main(options(tiny_model, corpus, tmp_path, max_steps=1))
    assert seen == [True]


@pytest.mark.parametrize("use_peft", [True, False], ids=["lora", "full"])
def test_flashmla_with_every_patch_trains_as_eager_without(use_peft, tiny_model, corpus, tmp_path):
    """Same seed, float32: the curves differ by rounding alone; packed documents, accumulation, an odd tile and chunk."""
    shared = {
        "max_steps": 12, "use_peft": use_peft, "gradient_accumulation_steps": 2, "validation_split_percentage": 20,
    }  # fmt: skip
    finetune.main(options(tiny_model, corpus, tmp_path / "eager", **shared, attn_implementation="eager"))
    patches = ["--patches", "all", "offload", "mlp_tile=37", "loss_chunk=29"]
    finetune.main([*options(tiny_model, corpus, tmp_path / "patched", **shared), *patches])
    expected, found = losses(tmp_path / "eager"), losses(tmp_path / "patched")
    assert expected[-1] < 0.8 * expected[0], "nothing is learnt: the comparison says little"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    results = json.loads((tmp_path / "patched" / "all_results.json").read_text())
    assert "offload" in results["patches"]
    assert results["mfu"] > 0


def test_bfloat16_autocast_and_patches_go_together(tiny_model, corpus, tmp_path):
    shared = {"max_steps": 4, "use_peft": True, "bf16": True}
    finetune.main(options(tiny_model, corpus, tmp_path / "plain", **shared))
    finetune.main(options(tiny_model, corpus, tmp_path / "patched", **shared, patches="all"))
    torch.testing.assert_close(losses(tmp_path / "patched"), losses(tmp_path / "plain"), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("attn_implementation", ["flashmla", "eager"])
def test_evaluation_by_position_is_the_loss_of_each_token(tiny_model, attn_implementation, monkeypatch):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    rng = np.random.default_rng(0)
    packs = [[rng.integers(5, 300, size=n).astype(np.int32) for n in sizes] for sizes in ((60, 21), (70,))]
    model = models.load(str(tiny_model), attn_implementation, torch.float32, "cpu")
    model.config.use_cache = False
    monkeypatch.setattr(evaluation, "LOGITS_BYTES", 4 * 304 * 13)  # chunks of 13 tokens
    loss, buckets = finetune.evaluate(model, packs, finetune.Collator(attn_implementation), accelerator, size=2)
    assert "forward" not in vars(model.get_decoder())
    expected: dict[int, list[float]] = {}
    with torch.no_grad():
        for piece in (piece for one in packs for piece in one):
            ids = torch.tensor(piece[None].astype(np.int64))
            each = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
            for position, value in enumerate(each.tolist(), start=1):
                expected.setdefault(2 ** (position.bit_length() - 1), []).append(value)
    assert [b["from"] for b in buckets] == sorted(expected)
    for bucket in buckets:
        assert bucket["tokens"] == len(expected[bucket["from"]])
        assert bucket["loss"] == pytest.approx(np.mean(expected[bucket["from"]]), rel=1e-4)
    every = [value for values in expected.values() for value in values]
    assert loss == pytest.approx(np.mean(every), rel=1e-5)


def test_adapters_inputs_are_not_copied_and_the_numbers_stay_the_same():
    from peft import LoraConfig, get_peft_model

    found = []
    for is_kept in (False, True):
        model = models.load("tiny", "sdpa", torch.bfloat16, "cpu")
        torch.manual_seed(1)
        lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
        if is_kept:
            keep_adapter_inputs(model)
        ids = torch.arange(64)[None]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
