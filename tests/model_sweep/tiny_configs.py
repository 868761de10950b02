"""Tiny configurations of any model, by the names of the attributes.

:func:`tiny` builds the default configuration of a class and shrinks what it finds: widths, heads, layers, vocabularies,
experts, images, windows, nested configurations. Models tie their sizes together in ways that no rule knows, so there
are several :data:`PLANS`, from the smallest to the one that leaves every width alone; the sweep takes the first one
whose model runs.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig

VOCAB = 128
FIRST_SPECIAL = 100  # ordinary tokens are below, special ones here and above
WINDOW = 6
CHUNK = 8


@dataclass(frozen=True)
class Plan:
    """``width``: "constant" (all widths 64, heads 4), "divided" (widths by 8, heads as they are) or "kept".
    ``all_layers``: every layer, for models that name layers by number. ``images``: shrinks images as well.
    ``windows``: also sets a window whose default is none."""

    width: str
    all_layers: bool = False
    images: bool = True
    windows: bool = True

    def __str__(self) -> str:
        words = [self.width]
        words += ["all layers"] if self.all_layers else []
        words += [] if self.images else ["full images"]
        words += [] if self.windows else ["no window set"]
        return ", ".join(words)


PLANS = (
    Plan("constant"),
    Plan("constant", windows=False),
    Plan("constant", all_layers=True),
    Plan("divided"),
    Plan("divided", all_layers=True),
    Plan("divided", all_layers=True, images=False, windows=False),
    Plan("kept"),
    Plan("kept", images=False, windows=False),
    Plan("kept", all_layers=True, images=False, windows=False),
)

_BASE_FIELDS = (
    {field.name for field in dataclasses.fields(PreTrainedConfig)}
    if dataclasses.is_dataclass(PreTrainedConfig)
    else set(vars(PreTrainedConfig()))
)
_TOKEN = re.compile(r"(_token_id|_token_index|_token|_patch_id|_token_ids|^(bos|eos|pad|sep|cls|mask|blank|unk)_id)$")
_VOCAB = re.compile(r"vocab|codebook_size$|^num_embeddings$|^n_vocab$|num_codes$|num_atom|num_edges|num_spatial")
_KV_HEADS = re.compile(r"(key_value|kv)_heads|^num_kv|_kv_heads?|multi_query_group")
_HEADS = re.compile(r"(attention_|_|^)heads?$|(^|_)n_heads?(_|$)|num_(key|value|query|attention)?_?heads")
_HEAD_DIM = re.compile(r"head_dim|^d_kv$|d_head|head_size|kv_channels|head_hidden|_head_width|head_channels")
_RANK = re.compile(r"lora_(rank|dim)|_rank$|^rank$|lora_r$")
_PER_TOKEN = re.compile(r"per_tok|top_?k|num_selected|n_activated|^moe_k$")
_EXPERTS = re.compile(r"experts?$|^num_experts|^n_experts|num_local_experts|n_routed")
_LAYERS = re.compile(
    r"(^|_)(num_|n_)?(hidden_|encoder_|decoder_|block_|transformer_|self_attention_|cross_)*(layers?|blocks|depth)$"
)
_NO_LAYERS = re.compile(r"feat_extract|conv|^tdnn|lstm|residual|mlp_only")
_POSITIONS = re.compile(
    r"position_embeddings|n_positions|^n_ctx$|max_.*position|max_seq|max_.*len|context_length|num_position"
)
_IMAGE = re.compile(r"image_size$|img_size$|^input_size$|crop_size$|image_height$|image_width$|^img_(height|width)$")
_WINDOW = re.compile(
    r"^sliding_window(_size)?$|^local_attention$|local_window|attention_window(_size)?$|^window_length$"
)
_CHUNKS = re.compile(r"attention_chunk_size$")
_EVERY = re.compile(r"(_pattern|_interval|_every_n_layers|_frequency|_freq|_step|_period|_stride_layers)$")
_QUERIES = re.compile(r"num_queries|num_query|n_queries|num_latents|num_denoising|image_seq|num_image_tokens")
_WIDTH = re.compile(
    r"size|dim|d_model|d_ff|hidden|embd|channels|width|features|ffn|inner|intermediate|_planes|filters|d_embed|d_inner"
)
_NO_WIDTH = re.compile(
    r"kernel|stride|sampling|rate|hop|n_fft|mel|chunk|window|bucket|frame|patch|batch|num_channels|in_channels|"
    r"audio_channels|pool|merge|grid|group|factor|pretrain|conv_kernel|dilation|max_|min_|_length|temporal|token|"
    r"input_feat|state_size|d_state"
)
_NO_WIDTH_LIST = re.compile(f"{_NO_WIDTH.pattern}|^stage_|^stem_|encoder_in_channels")
_DROP = re.compile(r"drop|pdrop|jitter|mask_time_prob|mask_feature_prob|label_noise|layerdrop")
_INDICES = re.compile(r"(indexes|indices|_layers|layer_ids|_blocks|_idx|_layer_index|_index|layer_idxs?)$")


_RESNET = {
    "embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}  # fmt: skip
# What a model needs although its configuration has no default for it.
_WHERE_NONE = {
    "pad_token_id": 0, "decoder_start_token_id": 0, "prediction_length": 8, "num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1,
    "attn_layer_indices": [1], "vocab_size": VOCAB,
    "image_token_index": 120, "image_token_id": 120,
    "vocabulary_map": {"<image>": 120}, "default_language": "en_XX",
}  # fmt: skip


def tiny(config_class: type[PreTrainedConfig], plan: Plan) -> PreTrainedConfig:
    """A configuration of ``config_class`` shrunk by ``plan``."""
    return config_class(**_shrunk(config_class(), plan, {}))


def _shrunk(config: PreTrainedConfig, plan: Plan, token_ids: dict[str, int]) -> dict:
    """The arguments that make a small ``config``: those that change alone, so that derived ones are derived anew."""
    values = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    defaults = _defaults(type(config))
    rows = _rows(values, plan)
    arguments = {}
    for name, value in values.items():
        if (
            name == "rope_parameters"
            and isinstance(value, dict)
            and "rope_type" in value
            and _rotates_in_sections(type(config))
        ):
            value = {"mrope_section": [16, 24, 24], **value}
        if isinstance(value, PreTrainedConfig):
            if value.model_type == "timm_backbone":  # timm may not be there
                arguments[name] = {"model_type": "resnet", **_RESNET}
                continue
            arguments[name] = {"model_type": value.model_type, **_shrunk(value, plan, token_ids)}
            continue
        if name in _BASE_FIELDS and not _TOKEN.search(name):
            continue
        small = _small(name, value, values, plan, rows, token_ids)
        is_derived = name in defaults and defaults[name] is None and not isinstance(value, list)
        if small != values[name] and not (is_derived and _WIDTH.search(name) and not _KV_HEADS.search(name)):
            arguments[name] = small
    if plan.windows:
        layers = arguments.get("num_hidden_layers", 2)
        for name, kind in (("layer_types", "full_attention"), ("mlp_layer_types", "sparse")):
            if values.get(name, 0) is None:
                arguments[name] = [kind] * layers
        if "use_sliding_window" in values:  # the kinds of layers follow from these
            arguments |= {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
            arguments.pop("layer_types", None)
        elif values.get("sliding_window", 0) is None:
            arguments["sliding_window"] = WINDOW
    arguments |= {name: small for name, small in _WHERE_NONE.items() if values.get(name, 0) is None}
    if plan.width == "constant" and values.get("head_dim", 0) is None and "hidden_size" in values:
        arguments["head_dim"] = 16
    if plan.width == "constant" and defaults.get("num_key_value_heads", 0) is None and "kv_lora_rank" not in values:
        arguments["num_key_value_heads"] = 2
    return arguments


@functools.cache
def _rotates_in_sections(config_class: type) -> bool:
    """Whether the models beside ``config_class`` split their rotation into sections, asked for or not."""
    folder = Path(inspect.getfile(config_class)).parent
    return any("mrope_section" in file.read_text() for file in folder.glob("modeling_*.py"))


def _defaults(config_class: type) -> dict:
    if not dataclasses.is_dataclass(config_class):
        return {}
    return {f.name: f.default for f in dataclasses.fields(config_class) if f.default is not dataclasses.MISSING}


def _rows(values: dict, plan: Plan) -> tuple[int | None, list[int]]:
    """(the number of layers, which of them stay): one of every kind, two at least."""
    count = next(
        (values[n] for n in ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "encoder_layers")
         if isinstance(values.get(n), int)), None,
    )  # fmt: skip
    if count is None or plan.all_layers:
        return count, list(range(count or 0))
    per_layer = [v for v in values.values() if isinstance(v, list | tuple) and len(v) == count and count > 2]
    kinds: dict[str, int] = {}
    for row in range(count):
        kinds.setdefault(str([v[row] for v in per_layer if isinstance(v[row], str | bool)]), row)
    kept = sorted(kinds.values())[:4]
    kept += [row for row in range(count) if row not in kept][: max(0, 2 - len(kept))]
    return count, sorted(kept)


def _small(name: str, value, values: dict, plan: Plan, rows: tuple, token_ids: dict):
    """``value`` made small by what ``name`` says."""
    count, kept = rows
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return False if name in ("apply_spec_augment", "use_mambapy", "use_timm_backbone") and value else value
    if _DROP.search(name) and isinstance(value, int | float):
        return 0.0 if isinstance(value, float) else 0
    if isinstance(value, dict):
        return _small_rope(value, values, plan)
    if _TOKEN.search(name) and not _PER_TOKEN.search(name):
        return _small_token(name, value, token_ids)
    if isinstance(value, list | tuple):
        return _small_list(name, value, plan, rows)
    if not isinstance(value, int):
        return value
    if name.endswith("_offset") and isinstance(values.get(name.replace("_offset", "_period")), int):
        return min(value, 1)
    if _EVERY.search(name):
        return min(value, 2)
    if name in ("n_group", "topk_group", "num_expert_group", "num_expert_groups"):
        return 1
    if _PER_TOKEN.search(name):
        return min(value, values.get("index_kpool", 2) if name == "index_topk" else 2)
    if _EXPERTS.search(name) and "size" not in name:
        return min(value, 1 if "shared" in name else 4)
    if _WINDOW.search(name):
        return WINDOW if value > WINDOW else value
    if _CHUNKS.search(name):
        return CHUNK if value > CHUNK else value
    if name == "max_window_layers":
        return 1
    if name in ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"):
        return min(value, 1)
    if name == "num_pos_feats" and plan.width == "constant":
        return min(value, 32)  # twice that is a width
    if _LAYERS.search(name) and not _NO_LAYERS.search(name):
        if plan.all_layers:
            return value
        return len(kept) if value == count else min(value, 2)
    if _VOCAB.search(name):
        return min(value, VOCAB)
    if _KV_HEADS.search(name):
        heads = next((values[n] for n in ("num_attention_heads", "n_head", "num_heads") if n in values), None)
        return (4 if value == heads else min(value, 2)) if plan.width == "constant" else value
    if _HEADS.search(name) and not _HEAD_DIM.search(name):
        if name.startswith("mamba") and plan.width == "constant":
            return min(value, 8)  # times the head dimension of 16: the inner width, twice the outer one
        return min(value, 4) if plan.width == "constant" else value
    if _POSITIONS.search(name):
        return min(value, 256)
    if _IMAGE.search(name):
        return _small_image(value, values, plan)
    if name.endswith("patch_size") and plan.images and plan.width != "kept":
        return min(value, 4)
    if _QUERIES.search(name):
        return min(value, 8)
    if name == "head_dim" and value == values.get("qk_rope_head_dim"):
        name = "qk_rope_head_dim"
    return _small_width(name, value, plan)


def _small_width(name: str, value: int, plan: Plan) -> int:
    if plan.width == "kept":
        return value
    if _HEAD_DIM.search(name):
        if plan.width == "divided":
            return max(4, value // 8) if value >= 16 else value
        return min(value, 8 if "rope" in name else 24 if name == "qk_head_dim" else 16)
    if _RANK.search(name):
        return min(value, 16)
    if name == "upsample_groups":
        name = "hidden_size"
    if not _WIDTH.search(name) or _NO_WIDTH.search(name):
        return value
    if plan.width == "divided":
        return max(4, value // 8) if value >= 64 else value
    return min(value, 64)


def _small_image(value: int, values: dict, plan: Plan) -> int:
    if not plan.images:
        return value
    stages = any(isinstance(values.get(n), list | tuple) for n in ("depths", "hidden_sizes", "num_heads", "embed_dims"))
    patch = values.get("patch_size")
    patch = patch if isinstance(patch, int) else 4
    if plan.width != "kept":
        patch = min(patch, 4)
    return min(value, 64 if stages else 4 * patch)


def _small_list(name: str, value, plan: Plan, rows: tuple):
    count, kept = rows
    kind = type(value)
    if count is not None and len(value) == count and count > 2 and not plan.all_layers:
        return kind(value[row] for row in kept)
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        return value
    if _IMAGE.search(name) and plan.images:
        return kind(min(item, 64) for item in value)
    if name == "depths" or name.endswith("_depths"):
        return value if plan.all_layers else kind(min(item, 2) for item in value)
    if _INDICES.search(name) and count is not None and not plan.all_layers:
        return kind(min(item, len(kept) - 1) for item in value)
    if name == "hidden_sizes":
        kind = list  # ConvNeXt adds lists to it
    if _WIDTH.search(name) and not _NO_WIDTH_LIST.search(name) and plan.width != "kept":
        return kind(max(4, item // 8) if item >= 32 else item for item in value)
    return value


def _small_token(name: str, value, token_ids: dict[str, int]):
    """The same name has the same id in every nested configuration: special tokens of a model are few."""
    if isinstance(value, list | tuple):
        return type(value)(_small_token(f"{name} {i}", item, token_ids) for i, item in enumerate(value))
    if not isinstance(value, int) or value < FIRST_SPECIAL:
        return value
    alias = name.replace("_index", "_id")
    return token_ids.setdefault(alias, FIRST_SPECIAL + len(token_ids) % (VOCAB - FIRST_SPECIAL))


def _small_rope(rope: dict, values: dict, plan: Plan) -> dict:
    """A rotation in sections keeps their proportion; their sum is half of the rotated head dimension."""
    small = {}
    for key, value in rope.items():
        if isinstance(value, dict):
            value = _small_rope(value, values, plan)
        elif key == "mrope_section" and plan.width != "kept":
            half = 8 if plan.width == "constant" else max(1, sum(value) // 8)
            half = max(1, int(half * rope.get("partial_rotary_factor", 1.0))) if plan.width == "constant" else half
            small_sections = [math.floor(section * half / sum(value)) for section in value]
            small_sections[0] += half - sum(small_sections)
            value = type(value)(small_sections)
        small[key] = value
    return small
