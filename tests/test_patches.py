"""The memory patches change memory only: losses and gradients equal the unpatched model's, family by family."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")
import families  # noqa: E402
import hf_support  # noqa: E402

import flashmla_hf  # noqa: E402
from flashmla_hf import ops  # noqa: E402

pytestmark = pytest.mark.skipif(not hf_support.is_built(), reason="no compiled CPU library")
NAMES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3 text", "Phi3", "Mixtral")
FAMILIES = {f.name: f for f in families.FAMILIES}
SINGLE = {
    "loss": ["loss"],
    "mlp": ["mlp"],
    "norm": ["norm"],
    "rope": ["rope"],
    "checkpointing": ["checkpointing"],
    "keep_attention": ["checkpointing", "keep_attention"],
    "offload": ["checkpointing", "offload"],
    "all": None,
}
# Tiles that do not divide the 40 tokens of a batch.
SMALL = {"mlp_tile": 7, "loss_chunk": 9, "keep_attention": True}


def model_of(name, dtype=torch.float32, **config):
    family = FAMILIES[name]
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
    return families.inputs(FAMILIES[name], padding, "cpu")


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


@pytest.mark.parametrize("patches", SINGLE, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_equal_the_unpatched_models(name, patches):
    model, batch = model_of(name), batch_of(name)
    expected = step(model, batch)
    options = SMALL if SINGLE[patches] is None or patches in ("mlp", "loss") else {}
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
