"""4-bit bases of bitsandbytes (QLoRA) under every patch: the gradients of the adapters equal those of the unpatched model."""

import copy

import hf_support
import pytest
import torch
from patches_support import SINGLE, assert_equal, batch_of, lora, model_of, small, step

import flashmla_hf
from flashmla_hf.patches import quantized, weights

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytestmark = [
    hf_support.needs_kernel,
    pytest.mark.filterwarnings("ignore:.*quantization state not initialized"),
]


def quantized_model(tmp_path, name="Llama", dtype=torch.float32, compute_dtype=None, **lora_options):
    """A small model loaded in nf4 with double quantization, as Transformers loads one, with adapters of peft."""
    import transformers

    model = model_of(name, dtype)
    model.save_pretrained(tmp_path / "model")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype or dtype,
    )
    loaded = (
        type(model)
        .from_pretrained(
            tmp_path / "model",
            quantization_config=settings,
            dtype=dtype,
            attn_implementation="flashmla",
            device_map="cpu",
        )
        .train()
    )
    assert sum(quantized.is_4bit(m) for m in loaded.modules()) >= 7
    for parameter in loaded.parameters():
        parameter.requires_grad_(False)
    return lora(loaded, **lora_options) if lora_options is not None else loaded


@pytest.fixture
def unpacked(monkeypatch):
    """How often a weight was unpacked, and how often peft's own forward ran."""
    from peft.tuners.lora.bnb import Linear4bit

    calls, unpack, forward = {"unpack": 0, "peft": 0}, quantized._unpack, Linear4bit.forward

    def counted_unpack(*args):
        calls["unpack"] += 1
        return unpack(*args)

    def counted_forward(self, *args, **kwargs):
        calls["peft"] += 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(quantized, "_unpack", counted_unpack)
    monkeypatch.setattr(Linear4bit, "forward", counted_forward)
    return calls


@pytest.mark.parametrize("names", [*SINGLE.values(), ["lora"], ["lora", "mlp"]], ids=[*SINGLE, "lora", "lora and mlp"])
def test_gradients_equal_those_of_the_unpatched_model(names, tmp_path, unpacked):
    model, batch = quantized_model(tmp_path), batch_of("Llama")
    expected = step(model, batch)
    assert expected[1]
    flashmla_hf.patch(model, names, **small(names))
    unpacked["peft"] = 0  # the trial of a block while patching is none of a step
    assert_equal(step(model, batch), expected, tolerance=1e-5)
    if names is None or "lora" in names:
        assert unpacked["unpack"]
        assert not unpacked["peft"]
    report = flashmla_hf.patch_report(model)
    assert not report.partial
    assert "lora" not in report.left_out
    flashmla_hf.unpatch(model)
    again = step(model, batch)
    assert all(torch.equal(again[1][n], g) for n, g in expected[1].items())


@pytest.mark.parametrize("name", ["Mistral", "Qwen2", "Qwen3", "Gemma2", "Phi3"])
def test_other_families(name, tmp_path, unpacked):
    model, batch = quantized_model(tmp_path, name), batch_of(name)
    expected = step(model, batch)
    flashmla_hf.patch(model, **small())
    unpacked["peft"] = 0
    assert_equal(step(model, batch), expected, tolerance=2e-5)
    assert not unpacked["peft"]


@pytest.mark.parametrize("adapters", ["float32", "bfloat16", "float32 under autocast"])
@pytest.mark.parametrize("names", [["lora"], None], ids=["lora", "all"])
def test_bfloat16_is_as_exact_as_unpatched(names, adapters, tmp_path, unpacked):
    model, batch = quantized_model(tmp_path, dtype=torch.bfloat16), batch_of("Llama")
    for name, p in model.named_parameters():
        if "lora" in name and adapters == "bfloat16":
            p.data = p.data.to(torch.bfloat16)
    exact = exact_gradients(model, tmp_path, batch)

    def errors():
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in adapters):
            gradients = step(model, batch)[1]
        return {n: float((gradients[n].double() - g).norm() / g.norm()) for n, g in exact.items()}

    allowed = errors()
    flashmla_hf.patch(model, names, **small(names))
    unpacked["peft"] = 0
    got = errors()
    assert not unpacked["peft"]
    # Of one model and one batch this is chance; tests/test_patches_lora.py compares single layers closely.
    assert all(got[n] <= 2 * allowed[n] + 1e-3 for n in got), (got, allowed)


def exact_gradients(model, tmp_path, batch):
    """The adapters' gradients in float64, over the dense weights that the packed ones stand for."""
    import peft
    import transformers

    config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    base = type(model.get_base_model())._from_config(config, attn_implementation="eager")
    exact = peft.get_peft_model(base, copy.deepcopy(model.peft_config["default"]))
    tensors = {n: p.detach() for n, p in model.named_parameters()}
    for name, module in model.named_modules():
        if quantized.is_4bit(module):
            state = quantized.state_of(module.weight)
            tensors[f"{name}.weight"] = quantized.dense(module.weight, state, torch.float32)
    exact = exact.double().train()
    missing = exact.load_state_dict({n: t.double() for n, t in tensors.items()}, strict=False)
    assert not missing.unexpected_keys
    assert all("rotary" in key or "lm_head" in key for key in missing.missing_keys)
    return {n: g for n, g in step(exact, batch)[1].items() if "lora" in n}


def test_tiles_unpack_each_weight_once_per_pass(tmp_path, unpacked):
    model, batch = quantized_model(tmp_path), batch_of("Llama")
    layers = model.config.num_hidden_layers
    flashmla_hf.patch(model, ["mlp", "lora"], mlp_tile=7)
    loss = model(**batch, use_cache=False).loss
    # The attention's four projections, and the MLP's three, whatever the number of tiles.
    assert unpacked["unpack"] == 7 * layers
    unpacked["unpack"] = 0
    loss.backward()
    # The first layer's queries, keys and values have an input without a gradient.
    assert unpacked["unpack"] == 7 * layers - 3


def test_layers_without_an_adapter(tmp_path):
    """An MLP whose layers have no adapter: its last product is skipped in backward all the same."""
    model, batch = quantized_model(tmp_path), batch_of("Llama")
    import peft

    bare = model.unload()
    torch.manual_seed(3)
    model = peft.get_peft_model(
        bare, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    )
    expected = step(model, batch)
    flashmla_hf.patch(model, **small())
    assert_equal(step(model, batch), expected, tolerance=1e-5)


def test_a_layer_that_computes_in_another_dtype_stays_pefts_and_is_reported(tmp_path, unpacked, caplog):
    model, batch = quantized_model(tmp_path, dtype=torch.bfloat16, compute_dtype=torch.float32), batch_of("Llama")
    expected = step(model, batch)
    unpacked["peft"] = 0
    flashmla_hf.patch(model, ["lora"])
    assert "bnb_4bit_compute_dtype" in flashmla_hf.patch_report(model).partial["lora"]
    assert "bnb_4bit_compute_dtype" in caplog.text
    assert step(model, batch)[0] == expected[0]
    assert unpacked["peft"]


def test_evaluation(tmp_path):
    model, batch = quantized_model(tmp_path), batch_of("Llama")
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    expected = model(**inputs, use_cache=False).logits.detach()
    flashmla_hf.patch(model)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs, use_cache=False).logits, expected, atol=2e-5, rtol=2e-5)


def test_a_packed_head_is_refused_by_loss():
    head = bnb.nn.Linear4bit(64, 128, bias=False)
    assert "not quantized yet" in weights.unreadable(head)
    assert weights.unreadable(head.to("cpu")) is None  # a Linear4bit, which the patch loss refuses by its class
    assert quantized.is_4bit(head)
    assert not quantized.is_4bit(torch.nn.Linear(2, 2))
