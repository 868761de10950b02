"""The memory patches change memory only: losses and gradients equal the unpatched model's, family by family."""

import families
import hf_support
import pytest
import torch
import transformers
from families import FAMILY
from patches_support import NAMES, SINGLE, TILED, assert_equal, batch_of, lora, model_of, small, step

import flashmla_hf

pytestmark = hf_support.needs_kernel


@pytest.mark.parametrize("patches", SINGLE, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_equal_the_unpatched_models(name, patches):
    model, batch = model_of(name), batch_of(name)
    expected = step(model, batch)
    options = small(SINGLE[patches]) if patches in TILED else {}
    flashmla_hf.patch(model, SINGLE[patches], **options)
    got = step(model, batch)
    assert_equal(got, expected)
    if patches in ("checkpointing", "keep_attention", "offload"):  # the same arithmetic, in the same order
        assert got[0] == expected[0]
        assert all(torch.equal(got[1][n], g) for n, g in expected[1].items())
    flashmla_hf.unpatch(model)
    again = step(model, batch)
    assert again[0] == expected[0]
    assert all(torch.equal(again[1][n], g) for n, g in expected[1].items())


@pytest.mark.parametrize("patches", SINGLE, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_lora_gradients_equal_the_unpatched_models(name, patches):
    model, batch = lora(model_of(name)), batch_of(name)
    expected = step(model, batch)
    assert all("lora" in n for n in expected[1])
    flashmla_hf.patch(model, SINGLE[patches], **small(SINGLE[patches]) if patches in TILED else {})
    assert_equal(step(model, batch), expected)


@pytest.mark.parametrize("patches", SINGLE, ids=str)
def test_accumulated_gradients_equal_the_unpatched_models(patches):
    """Two forward and backward passes, then one backward for two forward passes."""
    model, batch = model_of("Llama"), batch_of("Llama")
    other = families.inputs(FAMILY["Llama"], "none" if patches == "attention" else "right", "cpu", seed=5)
    count = {"num_items_in_batch": torch.tensor(70)}

    def both():
        model.zero_grad()
        losses = [model(**b, **count, use_cache=False).loss for b in (batch, other)]
        sum(losses).backward()
        return float(sum(losses).detach()), {n: p.grad.clone() for n, p in model.named_parameters()}

    expected = step(model, batch, other, **count), both()
    flashmla_hf.patch(model, SINGLE[patches], **small(SINGLE[patches]) if patches in TILED else {})
    assert_equal(step(model, batch, other, **count), expected[0])
    assert_equal(both(), expected[1])


@pytest.mark.parametrize("patches", [p for p in SINGLE if p != "attention"], ids=str)
@pytest.mark.parametrize("name", ["Llama", "Gemma3 text", "Phi3"])
def test_packed_documents_stay_apart(name, patches):
    documents = [{"input_ids": list(range(3, 3 + n)), "labels": list(range(3, 3 + n))} for n in (9, 1, 14)]
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=False)
    batch = {k: v for k, v in collate(documents).items() if k != "attention_mask"}
    model = model_of(name)
    expected = step(model, batch)
    flashmla_hf.patch(model, SINGLE[patches], **small(SINGLE[patches]) if patches in TILED else {})
    assert_equal(step(model, batch), expected)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padded_batches_equal_the_unpatched_models(padding):
    for name in ("Llama", "Gemma2"):
        model, batch = model_of(name), batch_of(name, padding)
        expected = step(model, batch)
        assert_equal(step(flashmla_hf.patch(model, **small()), batch), expected)


@pytest.mark.parametrize("patches", SINGLE, ids=str)
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Phi3", "Qwen3"])
def test_bf16_gradients_are_as_close_to_fp32_as_the_unpatched_models(name, patches):
    batch = batch_of(name)
    truth = step(model_of(name), batch)
    model = model_of(name, torch.bfloat16)
    plain = step(model, batch)
    flashmla_hf.patch(model, SINGLE[patches], **small(SINGLE[patches]) if patches in TILED else {})
    got = step(model, batch)

    def error(grads):
        return sum(float((grads[n].float() - g).square().sum()) for n, g in truth[1].items()) ** 0.5

    assert error(got[1]) <= 1.3 * error(plain[1])
    assert abs(got[0] - plain[0]) <= 2e-2 * abs(plain[0])


@pytest.mark.parametrize("patches", SINGLE, ids=str)
def test_autocast_gradients_are_as_close_as_the_unpatched_models(patches):
    batch, model = batch_of("Llama"), model_of("Llama")
    truth = step(model, batch)

    def autocast_step():
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        return float(loss), {n: p.grad.clone() for n, p in model.named_parameters()}

    plain = autocast_step()
    flashmla_hf.patch(model, SINGLE[patches], **small(SINGLE[patches]) if patches in TILED else {})
    got = autocast_step()
    assert got[1].keys() == plain[1].keys()
    assert all(g.dtype == torch.float32 for g in got[1].values())

    def error(grads):
        return sum(float((grads[n].float() - g).square().sum()) for n, g in truth[1].items()) ** 0.5

    assert error(got[1]) <= 1.3 * error(plain[1])


def test_a_patched_model_generates_the_same_tokens():
    for name in ("Llama", "Gemma3 text", "Mixtral"):
        model = model_of(name).eval()
        ids = batch_of(name)["input_ids"]
        expected = model.generate(ids, max_new_tokens=8, do_sample=False)
        assert torch.equal(
            flashmla_hf.patch(model, **small()).generate(ids, max_new_tokens=8, do_sample=False), expected
        )


def test_gradients_through_logits_equal_without_labels():
    model, batch = model_of("Gemma2"), batch_of("Gemma2")
    batch.pop("labels")

    def gradients():
        model.zero_grad()
        model(**batch, use_cache=False).logits.square().mean().backward()
        return 0.0, {n: p.grad.clone() for n, p in model.named_parameters()}

    expected = gradients()
    flashmla_hf.patch(model, **small())
    assert_equal(gradients(), expected, 1e-4)


def test_a_batch_without_labels_gives_no_gradient_instead_of_nan():
    model, batch = model_of("Llama"), batch_of("Llama")
    batch["labels"] = torch.full_like(batch["labels"], -100)
    for patches in ([], ["loss"]):
        flashmla_hf.patch(model, patches)
        loss, gradients = step(model, batch)
        assert loss != loss  # 0 / 0, as without the patch
        assert all(not g.any() for g in gradients.values())
        flashmla_hf.unpatch(model)


OTHERS = (
    "Qwen2-MoE",
    "Qwen3-MoE",
    "Gemma",
    "Phi",
    "Granite",
    "OLMo2",
    "StarCoder2",
    "StableLM",
    "SmolLM3",
    "Cohere",
    "GLM4",
)


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_of_the_same_structure_equal_the_unpatched_models(name):
    model, batch = model_of(name), batch_of(name)
    expected = step(model, batch)
    names = [n for n in flashmla_hf.DEFAULT_PATCHES if n != "lora" and not (n == "rope" and name in ("Cohere", "GLM4"))]
    assert_equal(step(flashmla_hf.patch(model, names, **small(names)), batch), expected)


@pytest.mark.parametrize("name", NAMES)
def test_attention_in_chunks_equals_inside_checkpointed_layers(name):
    model, batch = model_of(name), batch_of(name)
    expected = step(model, batch)
    names = [n for n in flashmla_hf.PATCHES if n not in ("keep_attention", "lora", "mla_decode")]
    flashmla_hf.patch(model, names, mlp_tile=7, loss_chunk=9, attention_chunk=7)
    assert_equal(step(model, batch), expected)


def test_a_patched_model_saves_what_an_unpatched_one_loads(tmp_path):
    model, batch = model_of("Gemma2"), batch_of("Gemma2")
    expected = step(model, batch)
    flashmla_hf.patch(model).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="flashmla").train()
    assert_equal(step(loaded, batch), expected)


@pytest.mark.parametrize("is_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    "options", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=["fp32", "bf16", "switch"]
)
def test_trainer_learns_the_same(tmp_path, options, is_lora):
    torch.manual_seed(0)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 60, (8, 12)).tolist()]

    def losses(patched):
        model = model_of("Llama")
        model = lora(model) if is_lora else model
        if patched:
            flashmla_hf.patch(model, **small())
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
            learning_rate=1e-3, report_to="none", use_cpu=True, save_strategy="no", seed=1, eval_strategy="steps", eval_steps=3,
            **options,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=transformers.default_data_collator
        )
        trainer.train()
        return [x[k] for x in trainer.state.log_history for k in ("loss", "eval_loss") if k in x]

    expected, got = losses(False), losses(True)
    assert len(expected) == 4
    assert got == pytest.approx(expected, rel=2e-2 if "bf16" in options else 2e-4)


@pytest.mark.slow
def test_compiled_models_compute_the_same():
    """Inside torch.compile the model's own norms, rotation, MLP and logits run (the compiler fuses those); the loss is the
    same, checkpointing is torch's."""
    model, batch = model_of("Llama"), batch_of("Llama")
    expected = step(model, batch)
    flashmla_hf.patch(model, **small())
    compiled = torch.compile(model, backend="aot_eager")
    loss = compiled(**batch, use_cache=False).loss
    model.zero_grad()
    loss.backward()
    assert_equal((float(loss), {n: p.grad for n, p in model.named_parameters()}), expected)
