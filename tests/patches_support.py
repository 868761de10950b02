"""The models, batches and comparisons of the tests of the memory patches."""

import copy
import sys

import families
import hf_support
import pytest
import torch
from families import FAMILY

import flashmla_hf

NAMES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3 text", "Phi3", "Mixtral")
SINGLE = {
    "loss": ["loss"],
    "mlp": ["mlp"],
    "norm": ["norm"],
    "rope": ["rope"],
    "checkpointing": ["checkpointing"],
    "keep_attention": ["checkpointing", "keep_attention"],
    "offload": ["checkpointing", "offload"],
    "attention": ["attention"],
    "all": None,
}
# Tiles that do not divide the 40 tokens of a batch.
SMALL = {"mlp_tile": 7, "loss_chunk": 9, "attention_chunk": 7, "keep_attention": True}


def small(names=None, **options):
    """The options that belong to the patches in ``names``, out of ``options`` or, if there are none, of SMALL."""
    return hf_support.patch_options(names, options or SMALL)


def patched(model, names=None):
    """``model`` with the patches in ``names`` and the options of SMALL that belong to them."""
    return flashmla_hf.patch(model, names, **small(names))


TILED = ("all", "mlp", "loss", "attention")


def model_of(name, dtype=torch.float32, **config):
    family = FAMILY[name]
    if config:
        family = copy.copy(family)
        plain = family.config
        object.__setattr__(family, "config", lambda: _with(plain(), config))
    return families.build(family, "flashmla", "cpu").to(dtype).train()


def _with(config, options):
    for key, value in options.items():
        setattr(config, key, value)
    return config


def batch_of(name, padding="none"):
    return families.inputs(FAMILY[name], padding, "cpu")


def step(model, *batches, **kwargs):
    """Loss and gradients after forward and backward over every batch."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(**batch, use_cache=False, **kwargs).loss
        loss.backward()
        total += float(loss.detach())
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(got, expected, tolerance=2e-5):
    assert abs(got[0] - expected[0]) <= tolerance * max(1.0, abs(expected[0]))
    assert got[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        worst = (got[1][name].float() - grad.float()).abs().max()
        assert worst <= tolerance * max(1.0, float(grad.float().abs().max())), name


def lora(model, **options):
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj"]
    present = [
        t
        for t in targets
        if any(n.endswith("." + t) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear))
    ]
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=present, init_lora_weights=False, task_type="CAUSAL_LM", **options
    )
    return peft.get_peft_model(model, config)


def attributes(model):
    """Every instance attribute of every module, and the rotation that the model's module calls."""
    module = sys.modules[type(model).__module__]
    state = {(name, key): value for name, m in model.named_modules() for key, value in vars(m).items()}
    return {k: v if not isinstance(v, dict) else dict(v) for k, v in state.items()} | {
        "rope": getattr(module, "apply_rotary_pos_emb", None)
    }


def message(model, *args, **kwargs):
    before = attributes(model) if hasattr(model, "named_modules") else None
    with pytest.raises(flashmla_hf.patches.PatchError) as error:
        flashmla_hf.patch(model, *args, **kwargs)
    if before is not None:
        after = attributes(model)
        assert all(after[k] is before[k] or after[k] == before[k] for k in before)  # refused means untouched
        assert after.keys() == before.keys()
    return str(error.value)
