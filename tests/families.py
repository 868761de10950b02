"""The model families that the parity suite proves: one row per family, a tiny model and its inputs.

A row says how to build the configuration, which model class reads it, and what the family is special for. The README's
support table is made from the suite's results over these rows (tests/support_table.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

VOCAB, HIDDEN, SEQLEN, BATCH = 64, 32, 20, 2
TEXT = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
HEADS_8 = {**TEXT, "head_dim": 8}
SLIDING = ["sliding_attention", "full_attention"]
ENCODER = {k: v for k, v in TEXT.items() if k not in ("num_key_value_heads", "bos_token_id", "eos_token_id")} | {
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
VISION = {
    "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """``layers``: attention calls of one forward pass. ``impl``: the name to load it under. ``wrong``: the negative
    controls that apply (each must fail the comparison). ``dense_only``: exact, but no call reaches the kernel
    (position bias)."""

    name: str
    model: str
    config: Callable
    inputs: str = "text"
    layers: int = 2
    paddings: tuple[str, ...] = ("none", "left", "right")
    generates: bool = True
    static: bool = True
    packs: bool | None = None
    wrong: tuple[str, ...] = ("zeros", "half scale", "mask ignored", "causal flipped")
    impl: str = "flashmla"
    dense_only: bool = False
    note: str = ""

    def __post_init__(self):
        if self.packs is None:  # position_ids of restarting sequences reach the attention of every text decoder
            object.__setattr__(self, "packs", self.inputs == "text" and self.generates)

    def __str__(self) -> str:
        return self.name


def _config(name: str, base: dict | None = None, **options):
    def build():
        import transformers

        return getattr(transformers, name)(**{**(TEXT if base is None else base), **options})

    return build


CAUSAL = ("zeros", "half scale", "mask ignored", "causal flipped")
WINDOWED = (*CAUSAL, "window ignored")
ROPE_32 = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
DEEPSEEK = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_shared_experts": 1, "head_dim": 8,
}  # fmt: skip


def _gemma3_multimodal():
    import transformers

    text = {**HEADS_8, "sliding_window": 6, "layer_types": SLIDING, "query_pre_attn_scalar": 8}
    vision = {**VISION, "vision_use_head": False}
    return transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=60, boi_token_index=61,
        eoi_token_index=62,
    )  # fmt: skip


def _paligemma():
    import transformers

    text = {**HEADS_8, "model_type": "gemma"}
    vision = {**VISION, "vision_use_head": False, "projection_dim": HIDDEN, "model_type": "siglip_vision_model"}
    return transformers.PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=60, projection_dim=HIDDEN, hidden_size=HIDDEN
    )


def _qwen2_vl(version="2"):
    import transformers

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text = {**TEXT, "rope_parameters": rope}
    vision = {
        "depth": 2, "embed_dim": HIDDEN, "hidden_size": HIDDEN, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
    }  # fmt: skip
    cls = transformers.Qwen2VLConfig
    if version == "2.5":
        cls = transformers.Qwen2_5_VLConfig
        vision = {k: v for k, v in vision.items() if k not in ("embed_dim", "mlp_ratio")} | {
            "intermediate_size": 48, "out_hidden_size": HIDDEN, "window_size": 16, "fullatt_block_indexes": [1],
        }  # fmt: skip
    return cls(
        text_config=text, vision_config=vision, image_token_id=60, vision_start_token_id=61, vision_end_token_id=62,
        video_token_id=63,
    )  # fmt: skip


def _pixtral():
    import transformers

    return transformers.LlavaConfig(
        text_config={**HEADS_8, "model_type": "mistral", "sliding_window": None},
        vision_config={**VISION, "model_type": "pixtral", "head_dim": 8},
        image_token_index=60, vision_feature_select_strategy="full", vision_feature_layer=-1,
    )  # fmt: skip


def _clip():
    import transformers

    text = {**ENCODER, "max_position_embeddings": 32, "eos_token_id": 63, "projection_dim": 16}
    text = {k: v for k, v in text.items() if "dropout" not in k}
    return transformers.CLIPConfig(text_config=text, vision_config={**VISION, "projection_dim": 16}, projection_dim=16)


def _siglip():
    import transformers

    text = {k: v for k, v in ENCODER.items() if "dropout" not in k} | {"max_position_embeddings": SEQLEN}
    return transformers.SiglipConfig(text_config=text, vision_config=VISION)


GPT2 = {
    "vocab_size": VOCAB, "n_positions": 128, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
BART = {
    "vocab_size": VOCAB, "d_model": HIDDEN, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 128,
    "dropout": 0.0,
    "attention_dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}  # fmt: skip
WHISPER = BART | {
    "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 64, "suppress_tokens": None,
    "begin_suppress_tokens": None,
}  # fmt: skip
T5 = {
    "vocab_size": VOCAB, "d_model": HIDDEN, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "dropout_rate": 0.0, "pad_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip

FAMILIES = (
    Family("Llama", "LlamaForCausalLM", _config("LlamaConfig")),
    Family("Mistral", "MistralForCausalLM", _config("MistralConfig", sliding_window=6), wrong=WINDOWED,
           note="sliding window"),
    Family("Mixtral", "MixtralForCausalLM", _config("MixtralConfig", num_local_experts=4, sliding_window=None)),
    Family("Qwen2", "Qwen2ForCausalLM",
           _config("Qwen2Config", use_sliding_window=True, sliding_window=6, layer_types=SLIDING), wrong=WINDOWED,
           note="sliding and full layers"),
    Family("Qwen2-MoE", "Qwen2MoeForCausalLM",
           _config("Qwen2MoeConfig", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
                   shared_expert_intermediate_size=24)),
    Family("Qwen3", "Qwen3ForCausalLM", _config("Qwen3Config", HEADS_8), note="query and key norms"),
    Family("Qwen3-MoE", "Qwen3MoeForCausalLM",
           _config("Qwen3MoeConfig", HEADS_8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)),
    Family("Gemma", "GemmaForCausalLM", _config("GemmaConfig", HEADS_8)),
    Family("Gemma2", "Gemma2ForCausalLM",
           _config("Gemma2Config", HEADS_8, sliding_window=6, layer_types=SLIDING, query_pre_attn_scalar=8,
                   attn_logit_softcapping=5.0),
           wrong=(*WINDOWED, "softcap ignored"), note="softcap, sliding window"),
    Family("Gemma3 text", "Gemma3ForCausalLM",
           _config("Gemma3TextConfig", HEADS_8, sliding_window=6, layer_types=SLIDING, query_pre_attn_scalar=8),
           wrong=WINDOWED, note="sliding window"),
    Family("Gemma3 images", "Gemma3ForConditionalGeneration", _gemma3_multimodal, inputs="gemma3", layers=4,
           wrong=("zeros", "half scale", "mask ignored"),
           note="images see themselves both ways: dense mask in the language layers, kernel in the vision tower"),
    Family("Phi", "PhiForCausalLM", _config("PhiConfig", partial_rotary_factor=0.5)),
    Family("Phi3", "Phi3ForCausalLM", _config("Phi3Config", sliding_window=6), wrong=WINDOWED, note="fused qkv"),
    Family("Granite", "GraniteForCausalLM", _config("GraniteConfig", attention_multiplier=0.25)),
    Family("OLMo2", "Olmo2ForCausalLM", _config("Olmo2Config")),
    Family("StarCoder2", "Starcoder2ForCausalLM", _config("Starcoder2Config", sliding_window=6), wrong=WINDOWED),
    Family("StableLM", "StableLmForCausalLM", _config("StableLmConfig", partial_rotary_factor=0.5)),
    Family("Cohere", "CohereForCausalLM", _config("CohereConfig", logit_scale=1.0)),
    Family("Cohere2", "Cohere2ForCausalLM", _config("Cohere2Config", logit_scale=1.0, sliding_window=6,
           layer_types=SLIDING), wrong=WINDOWED),
    Family("SmolLM3", "SmolLM3ForCausalLM", _config("SmolLM3Config", no_rope_layers=[1, 0])),
    Family("GLM4", "Glm4ForCausalLM", _config("Glm4Config", HEADS_8)),
    Family("DeepSeek-V2", "DeepseekV2ForCausalLM",
           _config("DeepseekV2Config", **DEEPSEEK, topk_method="greedy", routed_scaling_factor=1.0),
           note="head dims 24 (query, key) and 16 (value): no padding"),
    Family("DeepSeek-V3", "DeepseekV3ForCausalLM", _config("DeepseekV3Config", **DEEPSEEK),
           note="head dims 24 (query, key) and 16 (value): no padding"),
    Family("GPT-OSS", "GptOssForCausalLM",
           _config("GptOssConfig", HEADS_8, num_local_experts=4, num_experts_per_tok=2, sliding_window=6,
           layer_types=SLIDING,
                   **ROPE_32),
           wrong=(*WINDOWED, "sinks ignored"), note="attention sinks, with their gradient"),
    Family("Granite-SWA", "GraniteSWAForCausalLM",
           _config("GraniteSWAConfig", sliding_window=6, layer_types=SLIDING, attention_multiplier=0.35),
           wrong=(*WINDOWED, "sinks ignored"), note="attention sinks"),
    Family("MiMo-V2-Flash", "MiMoV2FlashForCausalLM",
           _config("MiMoV2FlashConfig", head_dim=16, v_head_dim=8, sliding_window=6, layer_types=SLIDING,
                   n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
           wrong=(*WINDOWED, "sinks ignored"), note="attention sinks; head dims 16 (query, key) and 8 (value)"),
    Family("GPT-NeoX", "GPTNeoXForCausalLM", _config("GPTNeoXConfig")),
    Family("GPT-2", "GPT2LMHeadModel", _config("GPT2Config", GPT2)),
    Family("OPT", "OPTForCausalLM",
           _config("OPTConfig", ffn_dim=48, word_embed_proj_dim=HIDDEN, dropout=0.0, activation_function="gelu"),
           packs=False),
    Family("BERT", "BertForMaskedLM", _config("BertConfig", ENCODER), generates=False),
    Family("RoBERTa", "RobertaForMaskedLM", _config("RobertaConfig", ENCODER), generates=False),
    Family("ModernBERT", "ModernBertForMaskedLM",
           _config("ModernBertConfig", ENCODER, local_attention=6, layer_types=SLIDING, cls_token_id=1, sep_token_id=2),
           generates=False, wrong=WINDOWED, note="bidirectional window"),
    Family("ViT", "ViTForImageClassification", _config("ViTConfig", VISION, num_labels=4), inputs="pixels",
           paddings=("none",), generates=False, wrong=("zeros", "half scale", "causal flipped")),
    Family("CLIP", "CLIPModel", _clip, inputs="clip", layers=4, paddings=("none", "right"), generates=False,
           wrong=("zeros", "half scale", "causal flipped")),
    Family("SigLIP", "SiglipModel", _siglip, inputs="clip", layers=4, paddings=("none",), generates=False,
           wrong=("zeros", "half scale", "causal flipped"), note="its pooling head uses torch's own attention"),
    Family("Pixtral (Llava)", "LlavaForConditionalGeneration", _pixtral, inputs="pixtral", layers=4, paddings=("none",
           "left"), note="packed images in the vision tower"),
    Family("Qwen2-VL", "Qwen2VLForConditionalGeneration", _qwen2_vl, inputs="qwen2_vl", layers=4, paddings=("none",
           "left"), note="packed images in the vision tower"),
    Family("Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration", lambda: _qwen2_vl("2.5"), inputs="qwen2_vl", layers=4,
           paddings=("none", "left"), note="packed images and windows in the vision tower"),
    Family("PaliGemma", "PaliGemmaForConditionalGeneration", _paligemma, inputs="paligemma", layers=4,
           wrong=("zeros", "half scale", "mask ignored"), paddings=("none", "left"),
           note="prefix seen in both directions: dense mask in training, kernel in the vision tower"),
    Family("Whisper", "WhisperForConditionalGeneration", _config("WhisperConfig", WHISPER), inputs="whisper", layers=6,
           paddings=("none",), wrong=("zeros", "half scale", "causal flipped"),
           note="encoder, decoder, cross-attention"),
    Family("BART", "BartForConditionalGeneration", _config("BartConfig", BART), inputs="seq2seq", layers=6,
           paddings=("none", "right"), note="encoder, decoder, cross-attention"),
    Family("T5", "T5ForConditionalGeneration", _config("T5Config", T5), inputs="seq2seq", layers=6, paddings=("none",
           "right"), wrong=(), dense_only=True, note="position bias: exact, outside the kernel"),
    Family("Falcon", "FalconForCausalLM",
           _config("FalconConfig", TEXT, num_kv_heads=2, new_decoder_architecture=True, hidden_dropout=0.0,
                   attention_dropout=0.0, alibi=False),
           packs=False, wrong=("zeros", "half scale", "causal flipped"), note="through Transformers' own flash path"),
    Family("GPT-J", "GPTJForCausalLM",
           _config("GPTJConfig", {**GPT2, "rotary_dim": 4}), packs=False,
           wrong=("zeros", "half scale", "causal flipped"),
           note="through Transformers' own flash path before 5.24"),
    Family("Llama 4 text", "Llama4ForCausalLM",
           _config("Llama4TextConfig", HEADS_8, num_local_experts=2, attention_chunk_size=8, intermediate_size_mlp=48,
                   layer_types=["chunked_attention", "full_attention"], no_rope_layers=[1, 0], moe_layers=[0]),
           impl="fmla", packs=False, static=False, note='attn_implementation="fmla" beyond one attention chunk'),
    Family("T5Gemma", "T5GemmaForConditionalGeneration",
           lambda: _t5gemma(), inputs="seq2seq", layers=6, paddings=("none", "right"),
           note="bidirectional window, cross-attention"),
)  # fmt: skip
FAMILY = {family.name: family for family in FAMILIES}


def _t5gemma():
    import transformers

    part = {**HEADS_8, "sliding_window": 4, "layer_types": SLIDING, "query_pre_attn_scalar": 8, "dropout_rate": 0.0,
            "attention_dropout": 0.0}  # fmt: skip
    return transformers.T5GemmaConfig(encoder=part, decoder={**part, "is_decoder": True}, dropout_rate=0.0,
                                      attention_dropout=0.0, vocab_size=VOCAB, pad_token_id=0)  # fmt: skip


def build(family: Family, attn_implementation: str, device, state: dict | None = None, seed: int = 0):
    """The family's tiny model, in evaluation mode, fp32, with weights large enough that attention decides its
    outputs."""
    import transformers

    torch.manual_seed(seed)
    model = getattr(transformers, family.model)._from_config(family.config(), attn_implementation=attn_implementation)
    if state is not None:
        model.load_state_dict(state)
    else:
        _spread(model)
    return model.to(device).eval()


def _spread(model: torch.nn.Module) -> None:
    """Tiny models as they are initialised (std 0.02) barely attend: attention that returns zeros passes most tests on
    them. Matrices of std 0.5 and noise on vectors (norms, biases, sinks) make every wrong attention visible."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "sinks" in name:
                parameter.copy_(2.0 * noise)
            elif parameter.dim() >= 2:
                parameter.copy_(0.5 * noise * min(1.0, (HIDDEN / parameter.shape[-1]) ** 0.5))
            else:
                parameter.add_(0.2 * noise)


def inputs(family: Family, padding: str, device, seed: int = 2) -> dict:
    """Inputs of one training step, with labels (-100 on padding, and on the token that padding would predict)."""
    generator = torch.Generator().manual_seed(seed)

    def ids(*shape, low=3, high=60):
        return torch.randint(low, high, shape, generator=generator)

    def pixels(*shape):
        return torch.randn(*shape, generator=generator)

    input_ids = ids(BATCH, SEQLEN)
    mask = torch.ones(BATCH, SEQLEN, dtype=torch.long)
    if padding == "left":
        mask[0, :5] = 0
    elif padding == "right":
        mask[1, -6:] = 0
    batch = {"input_ids": input_ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    labels = input_ids.masked_fill(mask == 0, -100)
    labels[:, 1:] = labels[:, 1:].masked_fill(mask[:, :-1] == 0, -100)
    kind = family.inputs
    if kind == "text":
        batch["labels"] = labels
    elif kind == "pixels":
        batch = {"pixel_values": pixels(BATCH, 3, 16, 16), "labels": torch.tensor([0, 3])}
    elif kind == "clip":
        batch["pixel_values"] = pixels(BATCH, 3, 16, 16)
        batch["return_loss"] = True
        if "CLIP" in family.name:
            batch["input_ids"][:, -7] = 63  # the end of the text, whose state is the text's
    elif kind == "gemma3":
        batch["input_ids"][:, 8:12] = 60
        batch["token_type_ids"] = (batch["input_ids"] == 60).long()
        batch["pixel_values"] = pixels(BATCH, 3, 16, 16)
        batch["labels"] = labels
    elif kind == "paligemma":
        batch["input_ids"] = torch.cat([torch.full((BATCH, 16), 60), batch["input_ids"][:, 5:]], dim=1)
        batch["attention_mask"] = torch.cat([torch.ones(BATCH, 16, dtype=torch.long), mask[:, 5:]], dim=1)
        if padding == "left":
            batch["input_ids"] = torch.nn.functional.pad(batch["input_ids"], (2, 0), value=0)
            batch["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (2, 0), value=0)
        types = torch.zeros_like(batch["input_ids"])
        types[:, -8:] = 1  # the suffix: causal
        batch["token_type_ids"] = types
        batch["labels"] = batch["input_ids"].masked_fill(types == 0, -100)
        batch["pixel_values"] = pixels(BATCH, 3, 16, 16)
    elif kind == "pixtral":
        batch["input_ids"][:, 6:14] = 60  # 2 x 4 and 4 x 2 patches, two images packed into one row of the vision tower
        batch["pixel_values"] = pixels(BATCH, 3, 16, 16)
        batch["image_sizes"] = torch.tensor([[8, 16], [16, 8]])
        batch["labels"] = labels
    elif kind == "qwen2_vl":
        # Images of 4 x 4 and 4 x 8 patches, merged 2 x 2 into 4 and 8 tokens.
        batch["input_ids"][0, 6:10] = 60
        batch["input_ids"][1, 6:14] = 60
        batch["input_ids"][:, 5] = 61
        batch["image_grid_thw"] = torch.tensor([[1, 4, 4], [1, 4, 8]])
        batch["pixel_values"] = pixels(16 + 32, 3 * 2 * 4 * 4)
        batch["mm_token_type_ids"] = (batch["input_ids"] == 60).int()
        batch["labels"] = labels
    elif kind == "whisper":
        batch = {"input_features": pixels(BATCH, 8, 32), "labels": ids(BATCH, 10)}
    elif kind == "seq2seq":
        batch["labels"] = ids(BATCH, 10)
    else:
        raise ValueError(f"unknown inputs {kind!r}")
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
