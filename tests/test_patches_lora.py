"""The patch "lora": equal to peft's own layers, used where it can be, and out of the way where it cannot."""

import copy

import hf_support
import peak_memory
import peft
import pytest
import torch
from patches_support import NAMES, assert_equal, batch_of, lora, message, model_of, small, step
from peft.tuners.lora.layer import Linear

import flashmla_hf

pytestmark = hf_support.needs_kernel


@pytest.fixture
def peft_calls(monkeypatch):
    """How often peft's own forward ran: patched layers fall back to it."""
    calls, forward = [], Linear.forward

    def counted(self, *args, **kwargs):
        calls.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Linear, "forward", counted)
    return calls


@pytest.mark.parametrize("names", [["lora"], flashmla_hf.DEFAULT_PATCHES], ids=["alone", "with the others"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_pefts(name, names, peft_calls):
    model, batch = lora(model_of(name)), batch_of(name)
    expected = step(model, batch)
    assert peft_calls
    flashmla_hf.patch(model, names, **small(names))
    peft_calls.clear()  # the trial of a block while patching is none of a step
    assert_equal(step(model, batch), expected)
    assert not peft_calls
    flashmla_hf.unpatch(model)
    again = step(model, batch)
    assert peft_calls
    assert all(torch.equal(again[1][n], g) for n, g in expected[1].items())


def test_the_result_of_a_layer_with_a_bias_may_be_changed_in_place():
    """Torch's linear layer with a bias returns a view, whose slices Phi rotates. RoCBert adds to its result."""
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(8, 8))
    wrapped = peft.get_peft_model(layer, peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    adapted, x = wrapped.base_model.model[0], torch.randn(2, 5, 8)

    def gradient(forward):
        y = forward(x)
        y += 1
        y[..., :4].mul_(2)
        return torch.autograd.grad(y.square().sum(), adapted.lora_A["default"].weight)[0]

    torch.testing.assert_close(gradient(flashmla_hf.patches.lora._adapted(adapted)), gradient(adapted))


def test_phis_rotation_of_slices_takes_adapters():
    model = lora(hf_support.build_causal_lm("flashmla", "Phi", partial_rotary_factor=0.5))
    batch = {"input_ids": hf_support.random_ids(2, 12), "labels": hf_support.random_ids(2, 12)}
    expected = step(model, batch)
    flashmla_hf.patch(model, ["lora", "rope"])
    assert_equal(step(model, batch), expected)


def test_the_default_has_patch_lora_only_with_adapters():
    def names(model):
        flashmla_hf.patch(model)
        return vars(flashmla_hf.patches.structure.base_model(model))["_flashmla_patches"].names

    assert names(model_of("Llama")) == tuple(n for n in flashmla_hf.DEFAULT_PATCHES if n != "lora")
    assert names(lora(model_of("Llama"))) == flashmla_hf.DEFAULT_PATCHES


def test_trained_base_weights_and_biases_get_their_gradients():
    layer = torch.nn.Linear(24, 40)
    model = torch.nn.Sequential(torch.nn.Linear(24, 24), layer)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["1"], init_lora_weights=False))
    for p in wrapped.parameters():
        p.requires_grad_(True)
    x = torch.randn(3, 5, 24)

    def gradients():
        wrapped.zero_grad()
        out = wrapped(x)
        out.square().mean().backward()
        return out.detach().clone(), {n: p.grad.clone() for n, p in wrapped.named_parameters() if p.grad is not None}

    expected = gradients()
    assert len(expected[1]) == 6
    flashmla_hf.patches.lora.patch_lora(wrapped, flashmla_hf.patches.Replacements(("lora",)))
    out, got = gradients()
    torch.testing.assert_close(out, expected[0])
    for name, gradient in expected[1].items():
        torch.testing.assert_close(got[name], gradient, msg=name)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16_is_as_exact_as_pefts(adapter_dtype, peft_calls):
    """Against float64, under autocast (adapters in float32, as peft keeps them) and without (all in bfloat16)."""
    model, batch = lora(model_of("Llama")), batch_of("Llama")
    for name, p in model.named_parameters():
        if "lora" not in name or adapter_dtype == torch.bfloat16:
            p.data = p.data.to(torch.bfloat16)
    exact_model = copy.deepcopy(model).double()
    exact_model.get_base_model().set_attn_implementation("eager")
    exact = step(exact_model, batch)[1]

    def errors():
        with torch.autocast("cpu", torch.bfloat16, enabled=adapter_dtype == torch.float32):
            gradients = step(model, batch)[1]
        return {n: float((gradients[n].double() - g).norm() / g.norm()) for n, g in exact.items()}

    allowed = errors()
    peft_calls.clear()
    flashmla_hf.patch(model, ["lora"])
    got = errors()
    assert not peft_calls
    assert sum(got.values()) <= 1.1 * sum(allowed.values())
    assert all(got[n] <= 2 * allowed[n] + 1e-3 for n in got), (got, allowed)


def dropout(model):
    for module in model.modules():
        if isinstance(module, Linear):
            module.lora_dropout["default"] = torch.nn.Dropout(0.5)


def bias(model):
    for module in model.modules():
        if isinstance(module, Linear):
            module.lora_B["default"].bias = torch.nn.Parameter(torch.ones(module.out_features))


def hook(model):
    for module in model.modules():
        if isinstance(module, Linear):
            module.lora_A["default"].register_forward_hook(lambda module, args, out: 2 * out)


def second_adapter(model):
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj",
                      "up_proj", "down_proj"], init_lora_weights=False))  # fmt: skip
    model.base_model.set_adapter(["default", "other"])


def older_peft(model):
    for module in model.modules():
        if isinstance(module, Linear):
            forward, variants = module.forward, vars(module).pop("lora_variant")

            def with_variants(*args, module=module, forward=forward, variants=variants):
                module.lora_variant = variants
                try:
                    return forward(*args)
                finally:
                    del module.lora_variant

            module.forward = with_variants


@pytest.mark.parametrize(
    "change",
    [
        older_peft,
        dropout,
        bias,
        hook,
        second_adapter,
        lambda m: m.merge_adapter(),
        lambda m: m.base_model.disable_adapter_layers(),
        None,
    ],
    ids=["an older peft", "dropout", "bias", "hook", "two adapters", "merged", "disabled", "DoRA"],
)
def test_features_of_peft_beyond_the_plain_sum_use_pefts_own_forward(change, peft_calls):
    model, batch = lora(model_of("Llama"), use_dora=change is None), batch_of("Llama")
    if change is not None:
        change(model)

    def loss():
        torch.manual_seed(7)
        return float(model(**batch, use_cache=False).loss.detach())

    expected = loss()
    assert peft_calls
    peft_calls.clear()
    flashmla_hf.patch(model, ["lora"])
    assert loss() == expected
    assert peft_calls


@pytest.mark.parametrize("is_4bit", [False, True], ids=["Linear", "Linear4bit"])
def test_a_float32_adapter_beside_bfloat16_is_more_exact_than_pefts(is_4bit, peft_calls):
    """peft's default: no autocast, the adapter in float32. Against float64, over twenty layers and inputs."""
    errors = {}
    for seed in range(20):
        torch.manual_seed(seed)
        layer, exact = adapted_layer(is_4bit)
        x, grad = torch.randn(40, 64).bfloat16(), torch.randn(40, 96).bfloat16()
        expected = result_and_gradients(exact, x.double(), grad.double())
        for name in ("peft", "ours"):
            if name == "ours":
                peft_calls.clear()
                flashmla_hf.patches.lora.patch_lora(layer, flashmla_hf.patches.Replacements(("lora",)))
            got = result_and_gradients(layer, x, grad)
            assert [t.dtype for t in got] == [torch.bfloat16] * 2 + [torch.float32] * 2
            for i, (mine, true) in enumerate(zip(got, expected, strict=True)):
                errors.setdefault((name, i), []).append(float((mine.double() - true).norm() / true.norm()))
        assert not peft_calls
    mean = {key: sum(values) / len(values) for key, values in errors.items()}
    assert all(mean["ours", i] <= 1.01 * mean["peft", i] for i in range(4)), mean


def adapted_layer(is_4bit):
    """A layer of peft over bfloat16 or packed weights with a float32 adapter, and the same one in float64."""
    base = torch.nn.Sequential(torch.nn.Linear(64, 96, bias=False)).bfloat16()
    if is_4bit:
        bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        packed = bnb.nn.Linear4bit(64, 96, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        packed.load_state_dict(base[0].state_dict())
        base[0] = packed.to("cpu")
        weight = bnb.functional.dequantize_4bit(base[0].weight.data, base[0].weight.quant_state)
        base.is_loaded_in_4bit = True
    else:
        weight = base[0].weight.detach()
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=False)
    layer = peft.get_peft_model(base, settings)
    exact = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 96, bias=False)).double(), settings).double()
    inner = {n: p.detach().double() for n, p in layer.named_parameters() if "lora" in n}
    exact.load_state_dict({"base_model.model.0.base_layer.weight": weight.double(), **inner})
    return layer, exact


def result_and_gradients(layer, x, grad):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    out = layer(x)
    out.backward(grad)
    adapter = [p.grad for n, p in layer.named_parameters() if "lora" in n]
    return [out.detach(), x.grad, *(g.clone() for g in adapter)]


def test_adapters_of_other_dtypes_stay_pefts(peft_calls):
    """float16 has too small a range for pieces of a float32 number."""
    model, batch = lora(model_of("Llama", torch.float16)), batch_of("Llama")
    assert {p.dtype for n, p in model.named_parameters() if "lora" in n} == {torch.float32}
    expected = step(model, batch)
    peft_calls.clear()
    flashmla_hf.patch(model, ["lora"])
    got = step(model, batch)
    assert peft_calls
    assert got[0] == expected[0]


def test_evaluation_and_dropout_in_it_are_fused(peft_calls):
    model, batch = lora(model_of("Llama")), batch_of("Llama")
    dropout(model)
    model.eval()
    expected = model(**batch, use_cache=False).logits
    peft_calls.clear()
    flashmla_hf.patch(model, ["lora"])
    torch.testing.assert_close(model(**batch, use_cache=False).logits, expected, atol=2e-5, rtol=2e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch, use_cache=False).logits, expected, atol=2e-5, rtol=2e-5)
    assert not peft_calls


def test_a_model_without_such_layers_is_refused():
    text = message(model_of("Llama"), ["lora"])
    assert all(part in text for part in ("LlamaForCausalLM", "'lora'", "peft.tuners.lora.Linear", "get_peft_model"))


def test_patch_lora_makes_no_wide_copies():
    """One projection of 64 to 512: peft makes the adapter's part, its scaled copy and the sum beside the layer's own result."""
    layer = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(64, 512, bias=False)),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=False),
    )
    x = torch.randn(1024, 64, requires_grad=True)
    wide = 1024 * 512 * 4

    def peaks():
        with peak_memory.PeakBytes() as forward:
            out = layer(x)
        grad = torch.ones_like(out)
        with peak_memory.PeakBytes() as backward:
            out.backward(grad)
        return forward.peak / wide, backward.peak / wide

    forward, backward = peaks()
    flashmla_hf.patches.lora.patch_lora(layer, flashmla_hf.patches.Replacements(("lora",)))
    forward_patched, backward_patched = peaks()
    assert forward >= 2.9
    assert backward >= 0.9
    assert forward_patched <= 1.1
    assert backward_patched <= 0.5
