"""Tiny models of every family with multi-head latent attention, and the families whose latent attention is sparse.

tests/test_patches_mla.py compares both lists with the modeling files of Transformers, so that a new family is noticed.
"""

from __future__ import annotations

from families import DEEPSEEK, Family, _config

HYBRID = {
    "layer_types": ["linear_attention", "full_attention"], "mlp_layer_types": ["dense", "sparse"], "num_local_experts": 4,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8, "mscale_all_dim": 0.7}

FAMILIES = (
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
