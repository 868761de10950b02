"""Tiny models of every family with multi-head latent attention, the families whose latent attention is sparse, and comparisons
of patched and unpatched models.

tests/test_patches_mla.py compares both lists with the modeling files of Transformers, so that a new family is noticed.
"""

from __future__ import annotations

import contextlib

import families
import hf_support
import pytest
import torch
import transformers
from families import DEEPSEEK, Family, _config
from hf_support import DEVICE, SEQLEN, generate_greedily
from transformers import DynamicCache, StaticCache

import flashmla_hf
from flashmla_hf import decode
from flashmla_hf.patches import structure

needs_float32 = pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU's kernel takes no float32")
latent_tests = [hf_support.needs_kernel, needs_float32, pytest.mark.filterwarnings("ignore::FutureWarning")]
TOLERANCE = 1e-4
PATCH = ["mla_decode"]

HYBRID = {
    "layer_types": ["linear_attention", "full_attention"], "mlp_layer_types": ["dense", "sparse"], "num_local_experts": 4,
}  # fmt: skip
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "mscale_all_dim": 0.7,
}

ALL = (
    Family("DeepSeek-V2", "DeepseekV2ForCausalLM",
           _config("DeepseekV2Config", **{**DEEPSEEK, "q_lora_rank": None}, topk_method="greedy", routed_scaling_factor=1.0),
           note="queries of one projection"),
    Family("DeepSeek-V3", "DeepseekV3ForCausalLM", _config("DeepseekV3Config", **DEEPSEEK)),
    Family("DeepSeek-V3 yarn", "DeepseekV3ForCausalLM",
           _config("DeepseekV3Config", **DEEPSEEK, rope_parameters=YARN), note="a scale with mscale"),
    Family("AXK1", "AXK1ForCausalLM", _config("AXK1Config", **DEEPSEEK)),
    Family("Bailing hybrid", "BailingHybridForCausalLM", _config("BailingHybridConfig", **DEEPSEEK, **HYBRID),
           note="linear layers beside it; a gate on the output"),
    Family("GLM-4 MoE lite", "Glm4MoeLiteForCausalLM", _config("Glm4MoeLiteConfig", **DEEPSEEK)),
    Family("Kimi linear", "KimiLinearForCausalLM",
           _config("KimiLinearConfig", **DEEPSEEK, **HYBRID, linear_head_dim=8, linear_num_heads=4),
           note="linear layers beside it; nothing is rotated"),
    Family("LongCat-Flash", "LongcatFlashForCausalLM",
           _config("LongcatFlashConfig", **DEEPSEEK, ffn_hidden_size=48, expert_ffn_hidden_size=24, num_layers=2,
                   zero_expert_num=1, moe_topk=2),
           note="two attention blocks a layer; scaled latents"),
    Family("MiniCPM3", "MiniCPM3ForCausalLM", _config("MiniCPM3Config", **DEEPSEEK)),
    Family("Mistral 4", "Mistral4ForCausalLM", _config("Mistral4Config", **DEEPSEEK), note="scaled queries"),
    Family("Youtu", "YoutuForCausalLM", _config("YoutuConfig", **DEEPSEEK)),
)  # fmt: skip
# Older releases of Transformers lack some.
FAMILIES = tuple(family for family in ALL if hasattr(transformers, family.model))
FAMILY = {family.name: family for family in FAMILIES}

# Attention classes that are served, and those whose indexer selects keys.
SERVED = {
    "AXK1Attention", "BailingHybridAttention", "DeepseekV2Attention", "DeepseekV3Attention", "Glm4MoeLiteAttention",
    "KimiLinearAttention", "LongcatFlashMLA", "MiniCPM3Attention", "Mistral4Attention", "YoutuAttention",
}  # fmt: skip
SPARSE = {
    "AXK2Attention", "DeepseekV32Attention", "Dots3NoteTextAttention", "Glm5NextTextAttention", "GlmMoeDsaAttention",
    "HYV4Attention", "HYV4VLAttention", "MistralLarge4TextAttention",
}  # fmt: skip


def pair(name, implementation="flashmla"):
    """(unpatched, patched): the same weights, in evaluation mode."""
    plain = families.build(FAMILY[name], implementation, DEVICE)
    patched = families.build(FAMILY[name], "flashmla", DEVICE, plain.state_dict())
    return plain, flashmla_hf.patch(patched, PATCH)


def generate(model, batch, **options):
    return generate_greedily(model, batch, **{"max_new_tokens": 8, **options})


def assert_close(got, expected, tolerance=TOLERANCE):
    scale = max(1.0, float(expected.abs().max()))
    assert float((got - expected).abs().max()) <= tolerance * scale


def assert_same_answer(got, expected):
    assert torch.equal(got.sequences, expected.sequences)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        assert_close(ours, theirs)


@contextlib.contextmanager
def counted(monkeypatch):
    """Numbers of (attention to latents, expansions of latents) inside."""
    counts, original = [0, 0], decode.decode_attention

    def spy(*args, **kwargs):
        counts[0] += kwargs.get("head_dim_v") is not None
        return original(*args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(decode, "decode_attention", spy)
        yield counts


def cache_of(model, kind, rows=40):
    return DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=rows)


def as_argument(model, cache):
    """The keyword argument of a forward that takes ``cache``."""
    return {structure.cache_name(model): cache}


@torch.no_grad()
def steps(model, cache, sizes=(SEQLEN, 1, 1, 4, 1), seed=3, rows=2):
    """Logits [rows, tokens, vocabulary] of forward passes over so many tokens, each on the cache that the others left."""
    ids = torch.randint(3, 60, (rows, sum(sizes)), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    logits, start = [], 0
    for size in sizes:
        positions = torch.arange(start, start + size, device=DEVICE)[None]
        out = model(ids[:, start : start + size], position_ids=positions, use_cache=True, **as_argument(model, cache))
        logits.append(out.logits)
        start += size
    return torch.cat(logits, dim=1)
