"""What would make a patched model silently wrong raises by name, and what looks like it but is harmless works as before."""

import copy
import io
import pickle

import hf_support
import peft
import pytest
import torch
from patches_support import assert_equal, batch_of, lora, model_of, patched, step

import flashmla_hf
from flashmla_hf.patches import PatchError

pytestmark = hf_support.needs_kernel


# ---------------------------------------------------------------- copies


def test_a_copy_of_a_patched_model_raises():
    model = patched(model_of("Llama"))
    for make in (
        copy.deepcopy,
        torch.optim.swa_utils.AveragedModel,
        pickle.dumps,
        lambda m: torch.save(m, io.BytesIO()),
    ):
        with pytest.raises(PatchError, match=r"cannot copy or pickle \w+, a patched module"):
            make(model)
    flashmla_hf.unpatch(model)
    assert_equal(step(copy.deepcopy(model), batch_of("Llama")), step(model, batch_of("Llama")))
    with pytest.raises(PatchError, match="Call peft's get_peft_model and add_adapter before"):
        lora(patched(model), modules_to_save=["norm"])


def test_adapters_after_patch_need_no_copy():
    model, batch = lora(model_of("Llama")), batch_of("Llama")
    expected = step(model, batch)
    assert_equal(step(lora(patched(model_of("Llama"))), batch), expected)


# ---------------------------------------------------------------- derivatives


@pytest.mark.parametrize("names", [["loss"], ["loss", "mlp"], ["norm"], ["rope"], ["lora"]], ids="+".join)
def test_second_derivatives_raise(names):
    model = model_of("Llama")
    model = lora(model) if names == ["lora"] else model
    model.set_attn_implementation("eager")  # flashmla's own refuses them too
    loss = patched(model, names)(**batch_of("Llama"), use_cache=False).loss
    weight = next(p for n, p in model.named_parameters() if p.requires_grad and "q_proj" in n)
    with pytest.raises(PatchError, match="expected first derivatives only, got create_graph=True"):
        torch.autograd.grad(loss, [weight], create_graph=True)


def test_patched_models_compute_the_same_in_inference_mode():
    model, batch = lora(model_of("Llama")), batch_of("Llama")
    for train in (True, False):
        model.train(train)
        with torch.inference_mode():
            expected = model(**batch, use_cache=False).loss
            got = patched(model)(**batch, use_cache=False).loss
        flashmla_hf.unpatch(model)
        torch.testing.assert_close(got, expected)


# ---------------------------------------------------------------- what changes between forward and backward


def write(model):
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            layer.mlp.down_proj.base_layer.weight.mul_(2.0)


def second_adapter(model):
    model.add_adapter("second", peft.LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=False))
    model.base_model.set_adapter("second")


@pytest.mark.parametrize(
    ("change", "what"),
    [(write, "weights"), (second_adapter, "adapters"), (lambda m: m.base_model.disable_adapter_layers(), "adapters")],
    ids=["weights", "another adapter", "no adapter"],
)
def test_a_module_that_runs_again_changed_raises(change, what):
    model = lora(model_of("Llama"))
    for p in model.parameters():
        p.requires_grad_(True)
    loss = patched(model, ["mlp"])(**batch_of("Llama"), use_cache=False).loss
    change(model)
    with pytest.raises(PatchError, match=f"{what} changed between forward and backward"):
        loss.backward()


@pytest.mark.parametrize("names", [["checkpointing"], None], ids=["checkpointing", "all"])
def test_adapters_switched_between_two_forward_passes_raise(names):
    """Two adapters' losses in one backward: checkpointed layers would run both with the second."""
    model = lora(model_of("Llama"))
    model.add_adapter("second", model.peft_config["default"])
    for p in model.parameters():
        p.requires_grad_(True)
    flashmla_hf.patch(model, names)
    losses = []
    for name in ("default", "second"):
        model.base_model.set_adapter(name)
        for p in model.parameters():
            p.requires_grad_(True)
        losses.append(model(**batch_of("Llama"), use_cache=False).loss)
    with pytest.raises(PatchError, match=r"LlamaDecoderLayer: adapters changed between"):
        sum(losses).backward()
    step(model, batch_of("Llama"))


def test_dropout_switched_off_before_backward_raises_where_there_is_some():
    for rate in (0.5, 0.0):
        model = patched(lora(model_of("Llama"), lora_dropout=rate), ["mlp"])
        loss = model(**batch_of("Llama"), use_cache=False).loss
        model.eval()
        if rate:
            with pytest.raises(PatchError, match="dropout layers changed between"):
                loss.backward()
        else:
            loss.backward()


@pytest.mark.parametrize("change", ["merge_adapter", "disable_adapter_layers"])
def test_trained_weights_that_have_no_part_in_a_block_get_no_gradient(change):
    """As in the model's own backward: a merged adapter is no part of the sum, and what is before it is frozen."""
    model = lora(model_of("Llama"))
    getattr(model, change, getattr(model.base_model, change))()
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name or "lm_head" in name)
    expected = step(model, batch_of("Llama"))
    assert_equal(step(patched(model, ["mlp"]), batch_of("Llama")), expected)
    assert any("lm_head" in name for name in expected[1])


def test_weights_exchanged_for_a_call_raise():
    model, batch = patched(model_of("Llama"), ["mlp"]), batch_of("Llama")
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    loss = torch.func.functional_call(model, weights, kwargs={**batch, "use_cache": False}).loss
    with pytest.raises(PatchError, match="weights changed between"):
        loss.backward()


@pytest.mark.parametrize("is_adapted", [False, True], ids=["plain", "lora"])
def test_gradients_by_torch_func_are_those_without_patches(is_adapted):
    """Per sample, too: what the patches compute by has no rule for the transforms."""
    model, batch = model_of("Llama"), batch_of("Llama")
    model = lora(model) if is_adapted else model
    weights = {n: p.detach() for n, p in model.named_parameters() if "lora_" in n or "layers.1." in n}

    def loss(weights, ids, labels):
        given = {"input_ids": ids[None], "labels": labels[None], "use_cache": False}
        return torch.func.functional_call(model, weights, kwargs=given).loss

    def gradients():
        found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, batch["input_ids"], batch["labels"])
        return 0.0, {name: grad.detach() for name, grad in found.items()}

    expected = gradients()
    assert all(grad.abs().max() > 0 for grad in expected[1].values())
    patched(model)
    assert_equal(gradients(), expected)


def test_a_pass_without_gradients_in_between_is_no_change():
    """A reference pass without the adapter before backward (DPO), with DoRA, whose magnitude needs the base layer's result."""

    def gradients(model):
        model.zero_grad()
        loss = model(**batch_of("Llama"), use_cache=False).loss
        with torch.no_grad(), model.disable_adapter():
            reference = model(**batch_of("Llama"), use_cache=False).loss
        (loss - reference).backward()
        return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients(lora(model_of("Llama"), use_dora=True))
    for is_first in (True, False):
        model = model_of("Llama")
        model = (
            lora(patched(model, ["mlp"]), use_dora=True) if is_first else patched(lora(model, use_dora=True), ["mlp"])
        )
        assert_equal(gradients(model), expected)


def test_parameters_that_peft_wraps_in_every_forward_are_no_change():
    model, batch = model_of("Mixtral"), batch_of("Mixtral")
    config = peft.LoraConfig(
        r=4, target_modules=[], target_parameters=["mlp.experts.down_proj"], init_lora_weights=False
    )
    model = peft.get_peft_model(model, config)
    expected = step(model, batch, batch)
    assert expected[1]
    assert_equal(step(patched(model, ["mlp"]), batch, batch), expected)


# ---------------------------------------------------------------- what takes part from outside


@pytest.mark.parametrize(("names", "child"), [(["mlp"], "mlp.down_proj"), (["attention"], "self_attn.o_proj")], ids=str)
def test_a_trained_vector_that_a_hook_adds_raises(names, child):
    model = patched(model_of("Llama"), names)
    vector = torch.nn.Parameter(torch.ones(model.config.hidden_size))
    model.model.layers[1].get_submodule(child).register_forward_hook(lambda module, args, out: out + vector)
    loss = model(**batch_of("Llama"), use_cache=False).loss
    with pytest.raises(PatchError, match=r"a trained tensor \[\d+\] from elsewhere"):
        loss.backward()


def test_a_layer_called_twice_keeps_its_product():
    class Twice(torch.nn.Module):
        def __init__(self, width):
            super().__init__()
            self.linear = torch.nn.Linear(width, width)

        def forward(self, x):
            return self.linear(torch.tanh(self.linear(x)))

    def model_with():
        model = model_of("Llama")
        torch.manual_seed(5)
        for layer in model.model.layers:
            layer.mlp = Twice(model.config.hidden_size)
        return model

    expected = step(model_with(), batch_of("Llama"))
    assert_equal(step(patched(model_with(), ["mlp"]), batch_of("Llama")), expected)


def test_alora_is_not_cut_into_tiles():
    model, batch = lora(model_of("Llama"), alora_invocation_tokens=[7, 8]), batch_of("Llama")
    batch["input_ids"][:, 6:8] = torch.tensor([7, 8])
    for names in (["mlp"], ["attention"]):
        patched(model, names)
        with pytest.raises(PatchError, match=f"patch '{names[0]}': .* with a forward pre-hook"):
            model(**batch, use_cache=False)
        flashmla_hf.unpatch(model)


def test_a_projection_with_a_hook_is_not_overwritten():
    def loss_of(model):
        seen = []
        model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, args, out: seen.append(out))
        loss = model(**batch_of("Llama"), use_cache=False).loss + 1e-2 * seen[0].sum()
        loss.backward()
        return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters()}

    assert_equal(loss_of(patched(model_of("Llama"), ["rope"])), loss_of(model_of("Llama")))


def test_a_lora_layer_with_a_forward_of_its_own_keeps_it():
    model, batch = lora(model_of("Llama")), batch_of("Llama")
    layer = model.get_decoder().layers[0].mlp.down_proj
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)
    expected = step(model, batch)
    assert_equal(step(patched(model, ["lora"]), batch), expected)


# ---------------------------------------------------------------- caches, switches and wrappers


def test_a_prefix_that_checkpointed_layers_would_leave_out_raises():
    config = peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    model, batch = peft.get_peft_model(model_of("Llama"), config), batch_of("Llama")
    patched(model)
    with pytest.raises(PatchError, match="expected empty past_key_values, got 4 tokens"):
        model(**batch)
    model.eval()
    model(**batch)
    flashmla_hf.unpatch(model)
    model.train()
    expected = step(model, batch)
    assert_equal(step(patched(model, ["mlp", "norm", "rope"]), batch), expected)


def test_chunks_of_another_attention_raise():
    model = patched(model_of("Llama"), ["attention"])
    model.set_attn_implementation("sdpa")
    with pytest.raises(PatchError, match="got attn_implementation='sdpa'"):
        model(**batch_of("Llama"), use_cache=False)


def test_backward_under_autocast_has_the_dtypes_of_the_forward_pass():
    model, batch = lora(model_of("Llama")), batch_of("Llama")
    expected = step(model, batch)
    model.zero_grad()
    loss = patched(model)(**batch, use_cache=False).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    # What is not ours is torch's to cast: some of it computes in bfloat16 there.
    assert got.keys() == expected[1].keys()
    for name, grad in expected[1].items():
        assert (got[name] - grad).abs().max() <= 0.02 * grad.abs().max(), name


def test_the_remedy_for_accelerate_works():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # it remembers another test's precision
    model, batch = patched(model_of("Llama"), ["loss"]), batch_of("Llama")
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    wrapped = accelerator.prepare(model)
    with pytest.raises(RuntimeError, match="keep_fp32_wrapper=False"):
        flashmla_hf.unpatch(model)
    unwrapped = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    expected = step(model_of("Llama"), batch)
    assert_equal(step(unwrapped, batch), expected)
    assert_equal(step(flashmla_hf.unpatch(model), batch), expected)
