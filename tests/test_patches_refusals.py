"""Patches refuse models, options and calls that they cannot serve, and unpatch restores every attribute."""

import sys
import warnings

import families
import hf_support
import pytest
import torch
import transformers
from families import FAMILY
from patches_support import NAMES, assert_equal, attributes, batch_of, message, model_of, small, step

import flashmla_hf
from flashmla_hf import host_memory
from flashmla_hf.patches import rope

pytestmark = hf_support.needs_kernel


@pytest.mark.parametrize("name", NAMES)
def test_unpatch_restores_every_attribute(name):
    model = model_of(name)
    before = attributes(model)
    assert flashmla_hf.patch(model) is model
    changed = [k for k, v in attributes(model).items() if k not in before or (v is not before[k] and v != before[k])]
    assert len(changed) >= 4 * 2
    assert flashmla_hf.unpatch(model) is model
    after = attributes(model)
    assert after.keys() == before.keys()
    assert all(after[k] is before[k] or after[k] == before[k] for k in before)
    assert flashmla_hf.unpatch(model) is model


def test_another_model_of_the_family_stays_unpatched():
    patched, plain = model_of("Llama"), model_of("Llama")
    module = sys.modules[type(plain).__module__]
    users = rope.num_users(module)
    other = flashmla_hf.patch(model_of("Llama"), ["rope"])
    expected = step(plain, batch_of("Llama"))
    flashmla_hf.patch(patched)
    got = step(plain, batch_of("Llama"))
    assert got[0] == expected[0]
    assert all(torch.equal(got[1][n], g) for n, g in expected[1].items())
    flashmla_hf.unpatch(patched)
    assert rope.num_users(module) == users + 1  # the other model still needs it
    flashmla_hf.unpatch(other)
    assert rope.num_users(module) == users


def test_unknown_names_and_double_patches_are_refused():
    model = model_of("Llama")
    text = message(model, ["los"])
    assert all(part in text for part in ("LlamaForCausalLM", "'los'", "'loss'"))
    for name in ("keep_attention", "offload"):
        assert "'checkpointing'" in message(model, [name])
    assert "mlp_tile" in message(model, mlp_tile=0)
    for option, name in flashmla_hf.PATCH_OPTIONS.items():
        text = message(model, ["norm"], **{option: 8})
        assert f"option {option}=8 needs patch {name!r}, but only ['norm'] are selected" in text
    assert "keep_attention" in message(model, keep_attention="all")
    flashmla_hf.patch(model, ["loss"])
    text = message(model, ["mlp"])
    assert "patched already (loss)" in text
    assert "unpatch" in text


@pytest.mark.parametrize(
    ("name", "patch", "parts"),
    [
        ("Cohere", "rope", ["CohereForCausalLM", "model.layers.0.self_attn (CohereAttention)", "rotation of halves"]),
        ("GPT-2", "mlp", ["GPT2LMHeadModel", "decoder", "'layers'"]),
        (
            "GPT-2",
            "checkpointing",
            ["GPT2LMHeadModel", "'layers'", "exclude=['checkpointing', 'keep_attention', 'offload']"],
        ),
        ("DeepSeek-V3", "rope", ["DeepseekV3ForCausalLM", "model.layers.0"]),
        ("BERT", "loss", ["BertForMaskedLM", "ForCausalLMLoss"]),
    ],
)
def test_models_without_the_structure_are_refused_by_name_and_module(name, patch, parts):
    family = FAMILY[name]
    model = families.build(family, "flashmla", "cpu")
    text = message(model, [patch])
    for part in [*parts, f"patch '{patch}' does not support this model", "flashmla_hf.patch(model, exclude="]:
        assert part in text, text


def test_kept_attention_needs_this_packages_attention():
    model = families.build(FAMILY["Llama"], "sdpa", "cpu")
    assert "attn_implementation" in message(model, ["checkpointing", "keep_attention"])
    flashmla_hf.patch(model)  # the default does without it
    assert [*flashmla_hf.patch_report(model).left_out] == ["lora", "keep_attention"]


def test_a_module_that_is_no_transformers_model_is_refused():
    assert "torch.nn.modules.linear.Linear" in message(torch.nn.Linear(2, 2))


def test_a_head_with_adapters_is_refused_and_a_trained_copy_is_not():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    assert "torch.nn.Linear" in message(peft.get_peft_model(model_of("Llama"), config), ["loss"])
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model, batch = peft.get_peft_model(model_of("Llama"), config), batch_of("Llama")
    expected = step(model, batch)
    assert any("lm_head" in n for n in expected[1])
    assert_equal(step(flashmla_hf.patch(model, **small()), batch), expected)


def test_any_other_use_of_promised_logits_raises():
    model = flashmla_hf.patch(model_of("Llama"), ["loss"])
    logits = model(**batch_of("Llama"), use_cache=False).logits
    for use in (
        lambda: logits.shape, lambda: logits[0], lambda: torch.softmax(logits, -1), lambda: logits + 1, lambda: list(logits),
        lambda: logits * torch.ones(1), lambda: logits.detach(),
    ):  # fmt: skip
        with pytest.raises((RuntimeError, TypeError, AttributeError)) as error:
            use()
        assert "PromisedLogits" in str(error.value) or "without labels for logits" in str(error.value)


def test_labels_of_another_length_than_the_hidden_states_are_refused():
    model = flashmla_hf.patch(model_of("Llama"), ["loss"], loss_chunk=5)
    with pytest.raises(flashmla_hf.patches.PatchError, match=r"expected as many labels .* 10, got 40"):
        model(**batch_of("Llama"), logits_to_keep=5, use_cache=False)


@pytest.mark.parametrize("method", ["evaluate", "predict"])
def test_a_trainer_that_gathers_logits_is_refused_with_the_remedy(tmp_path, method):
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 60, (4, 12)).tolist()]
    arguments = transformers.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = transformers.Trainer(
        flashmla_hf.patch(model_of("Llama"), ["loss"]), arguments, eval_dataset=rows, compute_metrics=lambda _: {},
        data_collator=transformers.default_data_collator,
    )  # fmt: skip
    with pytest.raises(TypeError, match="prediction_loss_only=True, or exclude the patch"):
        getattr(trainer, method)(rows)


def test_float16_is_refused_by_the_loss():
    model = flashmla_hf.patch(model_of("Llama"), ["loss"])
    with (
        torch.autocast("cpu", dtype=torch.float16),
        pytest.raises(flashmla_hf.patches.PatchError, match="bfloat16 or float32"),
    ):
        model(**batch_of("Llama"), use_cache=False)


def test_router_logits_are_refused_in_tiles():
    model = flashmla_hf.patch(model_of("Mixtral"), ["mlp"])
    with pytest.raises(flashmla_hf.patches.PatchError, match="output_router_logits"):
        model(**batch_of("Mixtral"), output_router_logits=True)
    flashmla_hf.unpatch(model)
    assert model(**batch_of("Mixtral"), output_router_logits=True).aux_loss is not None


def test_router_logits_that_the_configuration_asks_for_leave_out_the_tiles():
    """Also that of the text in a model of images: tiles would give the logits of their last rows alone, without a gradient."""
    text = {
        **hf_support.SIZES, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "output_router_logits": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64}
    config = transformers.Qwen3VLMoeConfig(
        text_config=text, vision_config=vision | {"deepstack_visual_indexes": [0]}, image_token_id=90, video_token_id=91
    )
    model = transformers.Qwen3VLMoeForConditionalGeneration._from_config(config, attn_implementation="flashmla")
    assert "output_router_logits: expected False" in message(model, ["mlp"])
    flashmla_hf.patch(model)
    assert "output_router_logits: expected False" in flashmla_hf.patch_report(model).left_out["mlp"]
    flashmla_hf.unpatch(model)
    config.text_config.output_router_logits = False
    flashmla_hf.patch(model, ["mlp"], mlp_tile=3)
    with pytest.raises(flashmla_hf.patches.PatchError, match="output_router_logits"):
        model(input_ids=torch.arange(1, 9)[None], output_router_logits=True)


def test_offload_without_host_memory_is_refused(monkeypatch):
    model = flashmla_hf.patch(model_of("Llama"), ["checkpointing", "offload"])
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 2**30)
    with pytest.raises(RuntimeError, match=r"host memory: expected .* got 1.0 GiB available.*exclude=\['offload'\]"):
        model(**batch_of("Llama"), use_cache=False)


@pytest.mark.parametrize("settings", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_transformers_checkpointing_switch_keeps_the_patch_without_a_word(settings):
    model, batch = model_of("Llama"), batch_of("Llama")
    expected = step(model, batch)
    flashmla_hf.patch(model, ["checkpointing", "keep_attention"])
    ours = model.model.layers[0]._gradient_checkpointing_func
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="flashmla")
        model.gradient_checkpointing_enable(settings)
    assert model.model.layers[0]._gradient_checkpointing_func is ours
    assert_equal(step(model, batch), expected, 0.0)
    model.gradient_checkpointing_disable()
    assert not model.model.layers[1].gradient_checkpointing
    flashmla_hf.unpatch(model)


@pytest.mark.parametrize(
    ("name", "switch"),
    [
        ("preserve_rng_state", lambda model: model.gradient_checkpointing_enable({"preserve_rng_state": False})),
        ("every_n_layers", lambda model: model._set_gradient_checkpointing(every_n_layers=2)),
        ("the function print", lambda model: model._set_gradient_checkpointing(gradient_checkpointing_func=print)),
    ],
)
def test_a_setting_of_transformers_checkpointing_that_the_patch_does_not_honour_is_named(name, switch):
    model = flashmla_hf.patch(model_of("Llama"))
    with pytest.warns(UserWarning, match=f"own way: {name} of gradient_checkpointing_enable.* has no effect"):
        switch(model)
    assert model.model.layers[1].gradient_checkpointing


def test_checkpointing_that_was_on_before_is_on_again_after():
    model = model_of("Llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    before = model.model.layers[0]._gradient_checkpointing_func
    flashmla_hf.unpatch(flashmla_hf.patch(model))
    assert model.model.layers[0]._gradient_checkpointing_func is before
    assert model.is_gradient_checkpointing


def test_unpatch_refuses_a_method_that_was_wrapped_since():
    model = flashmla_hf.patch(model_of("Llama"), ["loss"])
    ours = model.forward
    model.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(RuntimeError, match=r"LlamaForCausalLM.forward was replaced"):
        flashmla_hf.unpatch(model)
    model.forward = ours
    flashmla_hf.unpatch(model)


def test_attention_in_chunks_refuses_what_it_cannot_compute():
    model, batch = model_of("Llama"), batch_of("Llama")
    flashmla_hf.patch(model, ["attention"], attention_chunk=7)
    restarting = torch.cat([torch.arange(9), torch.arange(11)]).expand(2, -1)
    for extra, reason in (
        (batch_of("Llama", "left"), "padding"),
        ({"position_ids": restarting, "attention_mask": None}, "packed documents"),
        ({"use_cache": True}, "a cache"),
    ):
        with pytest.raises(
            flashmla_hf.patches.PatchError, match=rf"model.layers.0.self_attn \(LlamaAttention\).*{reason}"
        ):
            model(**{**batch, "use_cache": False, **extra})
    assert "exclude each other" in message(model_of("Llama"), ["attention", "checkpointing", "keep_attention"])
