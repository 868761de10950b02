"""The default of ``patch``: it applies what supports a model, and the report names what was left out or has no effect."""

import logging
import types

import families
import hf_support
import pytest
import torch
import transformers
from families import FAMILY
from patches_support import assert_equal, attributes, batch_of, lora, message, model_of, step

import flashmla_hf
from flashmla_hf.patches import UnsupportedPatch

pytestmark = hf_support.needs_kernel
# The default on a model without adapters.
ALL = tuple(name for name in flashmla_hf.DEFAULT_PATCHES if name != "lora")


def llama(kind):
    """A two-layer Llama of the class ``kind``."""
    config = FAMILY["Llama"].config()
    config.pad_token_id, config.num_labels = 0, 3
    torch.manual_seed(0)
    return kind._from_config(config, attn_implementation="flashmla").train()


def gradients(model, loss_of):
    model.zero_grad()
    loss = loss_of(model)
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def classification_loss(model):
    ids = batch_of("Llama")["input_ids"]
    return model(input_ids=ids, labels=torch.arange(len(ids)) % 3, use_cache=False).loss


def hidden_loss(model):
    return model(input_ids=batch_of("Llama")["input_ids"], use_cache=False).last_hidden_state.square().mean()


@pytest.mark.parametrize(
    ("kind", "loss_of"),
    [(transformers.LlamaForSequenceClassification, classification_loss), (transformers.LlamaModel, hidden_loss)],
    ids=["classification", "decoder alone"],
)
def test_a_model_without_a_language_models_loss_gets_the_other_patches(kind, loss_of, caplog):
    model = llama(kind)
    expected = gradients(model, loss_of)
    with caplog.at_level(logging.WARNING, "flashmla_hf"):
        assert flashmla_hf.patch(model) is model
    report = flashmla_hf.patch_report(model)
    assert report.applied == tuple(name for name in ALL if name != "loss")
    assert report.left_out == {
        "loss": "get_output_embeddings(): expected the linear layer of a causal language model, got none",
        "lora": "the model has no LoRA adapters",
    }
    assert report.idle == {}
    assert "left out: loss: get_output_embeddings()" in str(report)
    (said,) = [r.getMessage() for r in caplog.records if r.name == "flashmla_hf"]
    assert said == f"flashmla_hf.patch({kind.__name__}): left out 'loss' ({report.left_out['loss']})"
    assert_equal(gradients(model, loss_of), expected)
    flashmla_hf.unpatch(model)
    assert flashmla_hf.patch_report(model).applied == ()
    # A name, or an option of a patch, asks for that patch.
    for arguments in ({"patches": ["mlp", "loss"]}, {"loss_chunk": 9}):
        assert "patch 'loss' does not support this model" in message(model, **arguments)


def test_a_model_in_float16_gets_the_patches_but_the_loss(caplog):
    model, batch = model_of("Llama").half(), batch_of("Llama")
    expected = gradients(model, lambda m: m(**batch, use_cache=False).loss)
    with caplog.at_level(logging.WARNING, "flashmla_hf"):
        flashmla_hf.patch(model)
    report = flashmla_hf.patch_report(model)
    assert report.applied == tuple(name for name in ALL if name != "loss")
    assert "expected weights in bfloat16 or float32, got float16: gradients are computed" in report.left_out["loss"]
    assert [r.getMessage().split(" (get")[0] for r in caplog.records if r.name == "flashmla_hf"] == [
        "flashmla_hf.patch(LlamaForCausalLM): left out 'loss'"
    ]
    got = gradients(model, lambda m: m(**batch, use_cache=False).loss)
    assert got[0] == pytest.approx(expected[0], rel=1e-2)
    assert any(g.count_nonzero() for g in got[1].values())
    flashmla_hf.unpatch(model)
    for arguments in ({"patches": ["loss"]}, {"loss_chunk": 9}):
        assert "patch 'loss' does not support this model: get_output_embeddings()" in message(model, **arguments)
    flashmla_hf.patch(model.bfloat16())
    assert "loss" in flashmla_hf.patch_report(model).applied


def test_a_supported_model_gets_all_defaults_without_a_word(caplog):
    with caplog.at_level(logging.WARNING, "flashmla_hf"):
        model = flashmla_hf.patch(model_of("Llama"))
        adapted = flashmla_hf.patch(lora(model_of("Llama")))
    assert not [r for r in caplog.records if r.name == "flashmla_hf"]
    assert flashmla_hf.patch_report(model).applied == ALL
    assert str(flashmla_hf.patch_report(model)).endswith("\nleft out: lora: the model has no LoRA adapters")
    assert flashmla_hf.patch_report(adapted) == flashmla_hf.patches.PatchReport(flashmla_hf.DEFAULT_PATCHES, {}, {})


def test_one_unsupported_part_leaves_the_others():
    """Cohere rotates pairs side by side; a patch that fails half way is undone."""
    model, batch = model_of("Cohere"), batch_of("Cohere")
    expected = step(model, batch)
    flashmla_hf.patch(model)
    report = flashmla_hf.patch_report(model)
    assert report.applied == tuple(name for name in ALL if name != "rope")
    assert "rotation of halves" in report.left_out["rope"]
    assert_equal(step(model, batch), expected)
    model = model_of("Llama")
    model.model.layers[1].mlp.jitter_noise = 0.1
    untouched = dict(vars(model.model.layers[0].mlp))
    flashmla_hf.patch(model)
    assert "jitter" in flashmla_hf.patch_report(model).left_out["mlp"]
    assert dict(vars(model.model.layers[0].mlp)) == untouched


def test_without_checkpointing_its_dependants_are_left_out_too():
    model = model_of("Llama")
    model.supports_gradient_checkpointing = False
    flashmla_hf.patch(model)
    report = flashmla_hf.patch_report(model)
    assert report.applied == ("loss", "mlp", "norm", "rope")
    assert report.left_out["offload"] == "it needs the patch 'checkpointing', which was left out"
    flashmla_hf.unpatch(model)
    assert "'checkpointing' does not support" in message(model, offload=1)  # an option asks for what its patch needs


def test_a_model_that_no_default_supports_is_refused():
    text = message(families.build(FAMILY["BERT"], "flashmla", "cpu"))
    assert "BertForMaskedLM): no default patch supports this model: mlp: " in text
    assert "loss: loss_function: expected transformers' ForCausalLMLoss" in text


def test_exclude_removes_patches_and_what_needs_them():
    model = flashmla_hf.patch(model_of("Llama"), exclude=["checkpointing", "loss"])
    assert flashmla_hf.patch_report(model).applied == ("mlp", "norm", "rope")
    flashmla_hf.unpatch(model)
    flashmla_hf.patch(model, ["mlp", "norm"], exclude="norm")
    assert flashmla_hf.patch_report(model).applied == ("mlp",)
    flashmla_hf.unpatch(model)
    assert "got 'los'" in message(model, exclude=["los"])
    assert "needs patch 'checkpointing'" in message(model, ["checkpointing", "offload"], exclude=["checkpointing"])
    assert "option mlp_tile=7 needs patch 'mlp'" in message(model, exclude=["mlp"], mlp_tile=7)


def test_the_remedy_that_a_refusal_names_works():
    model = model_of("GPT-OSS")  # its MLP returns a tuple
    remedy = message(model, exclude=["rope"], mlp_tile=7).rpartition("Exclude it: ")[2]
    assert remedy == "flashmla_hf.patch(model, exclude=['mlp'])"
    expected = step(model, batch_of("GPT-OSS"))
    eval(remedy, {"flashmla_hf": flashmla_hf, "model": model})
    assert_equal(step(model, batch_of("GPT-OSS")), expected)


def test_an_unsupported_patch_says_which_and_why():
    with pytest.raises(UnsupportedPatch) as error:
        flashmla_hf.patch(llama(transformers.LlamaModel), ["loss"])
    assert error.value.patch == "loss"
    assert error.value.reason.startswith("get_output_embeddings(): expected")


# ---------------------------------------------------------------- a loss of another library


OTHER_FORWARD = """
import functools
def install(model):
    original = model.forward
    @functools.wraps(type(model).forward)
    def fused_forward(self, *args, fused=False, **kwargs):
        return original(*args, **kwargs)
    model.forward = types.MethodType(fused_forward, model)
"""


def install(model, library):
    """Replaces the model's forward as TRL and Liger do: by a bound function of their module."""
    scope = {"__name__": library, "types": types}
    exec(OTHER_FORWARD, scope)
    scope["install"](model)


@pytest.mark.parametrize("library", ["trl.trainer.utils", "liger_kernel.transformers.model.llama"])
@pytest.mark.parametrize("is_before", [True, False], ids=["before patch", "after patch"])
def test_the_report_says_that_another_librarys_loss_makes_ours_idle(library, is_before, caplog):
    model = model_of("Llama")
    with caplog.at_level(logging.WARNING, "flashmla_hf"):
        if is_before:
            install(model, library)
        flashmla_hf.patch(model)
        if not is_before:
            assert flashmla_hf.patch_report(model).idle == {}
            install(model, library)
    report = flashmla_hf.patch_report(model)
    assert report.applied == ALL
    assert report.idle == {"loss": f"{library} has replaced the model's forward and computes the loss itself"}
    assert f"idle: loss: {library}" in str(report)
    said = [r.getMessage() for r in caplog.records if r.name == "flashmla_hf"]
    assert bool(said) == is_before
    assert all("'loss' has no effect" in line for line in said)


def test_the_fused_loss_of_the_installed_trl_is_recognised():
    add_fused_lm_head = pytest.importorskip("trl.trainer.utils", reason="not installed: trl").add_fused_lm_head
    model, batch = model_of("Llama"), batch_of("Llama")
    expected = float(model(**batch).loss)
    flashmla_hf.patch(model)
    add_fused_lm_head(model)
    reason = flashmla_hf.patch_report(model).idle["loss"]
    assert reason == "trl.trainer.utils has replaced the model's forward and computes the loss itself"
    assert float(model(**batch, fused_lm_head=True).loss) == pytest.approx(expected, rel=1e-5)


def test_other_replaced_forwards_are_not_taken_for_a_fused_loss():
    model = model_of("Llama")
    install(model, "my_trainer")
    flashmla_hf.patch(model)
    assert flashmla_hf.patch_report(model).idle == {}
    assert attributes(model)  # still a model
