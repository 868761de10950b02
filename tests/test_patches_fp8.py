"""The memory patches of training under attn_implementation="flashmla_fp8": losses and gradients are those without the patch."""

from __future__ import annotations

import families
import hf_support
import pytest
import torch
from families import FAMILY
from patches_support import assert_equal, batch_of, step

import flashmla_hf
from flashmla_hf.patches import checkpointing

pytestmark = hf_support.needs_kernel

CHECKPOINTED = {
    "keep_attention": (["checkpointing", "keep_attention"], {}),
    "keep_attention of one layer": (["checkpointing", "keep_attention"], {"keep_attention": 1}),
    "offload": (["checkpointing", "offload"], {}),
    "offload of one layer": (["checkpointing", "offload"], {"offload": 1}),
    "both": (["checkpointing", "keep_attention", "offload"], {"keep_attention": True, "offload": 2}),
    "default": (None, {}),
}


def model_of(name):
    return families.build(FAMILY[name], "flashmla_fp8", "cpu").train()


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp8 has no kernel for GPUs")
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
@pytest.mark.parametrize("patches", CHECKPOINTED)
def test_loss_and_gradients_are_those_without_the_patch(patches, name, padding):
    names, options = CHECKPOINTED[patches]
    batch = batch_of(name, padding)
    expected = step(model_of(name), batch)
    exact = step(families.build(FAMILY[name], "flashmla", "cpu").train(), batch)
    assert expected[0] != exact[0]  # fp8 computes something else, so that a fall back to the exact kernel would show
    model = flashmla_hf.patch(model_of(name), names, **options)
    assert_equal(step(model, batch), expected, 1e-6 if names else 2e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp8 has no kernel for GPUs")
def test_packed_documents_under_kept_attention_whose_kernel_runs_once(monkeypatch):
    ids = torch.randint(3, 60, (1, 40), generator=torch.Generator().manual_seed(4))
    positions = torch.cat([torch.arange(17), torch.arange(23)])[None]
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions}
    expected = step(model_of("Llama"), batch)
    loaded, load = [], checkpointing.KeptAttention.load
    monkeypatch.setattr(checkpointing.KeptAttention, "load", lambda self: loaded.append(load(self)) or loaded[-1])
    model = flashmla_hf.patch(model_of("Llama"), ["checkpointing", "keep_attention"], keep_attention=True)
    assert_equal(step(model, batch), expected, 1e-6)
    layers = model.config.num_hidden_layers
    assert [x is None for x in loaded] == layers * [True] + layers * [False]
