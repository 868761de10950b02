"""The device of the Transformers tests, tiny models, the count of kernel calls, and a comparison that wrong attention fails."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace

import pytest
import torch
import transformers

import flashmla_hf
from flashmla_hf import direct, dispatch, libraries
from flashmla_hf.backend import kernel_refusal

transformers.logging.set_verbosity_error()
torch.set_num_threads(min(2, torch.get_num_threads()))
DEVICE = torch.device(os.environ.get("FLASHMLA_TEST_DEVICE", "cpu"))
# FlexAttention multiplies fp32 on tensor cores unless told otherwise; parity is about attention, not about TF32.
torch.backends.cuda.matmul.allow_tf32 = False
TOLERANCE = 1e-3 if DEVICE.type == "cpu" else 4e-3


def is_oracle_in_place() -> bool:
    """Whether the oracle stands in for the kernels (FLASHMLA_TEST_IMPL=reference)."""
    return os.environ.get("FLASHMLA_TEST_IMPL") == "reference"


KERNELS = ("cpu", "sm90", "torch_flash", "flex")

if is_oracle_in_place():
    # Without a compiled library the oracle takes the place of every kernel.
    direct.enabled = False
    for _name in KERNELS:
        dispatch.IMPLEMENTATIONS[_name] = replace(
            dispatch.IMPLEMENTATIONS["reference"], refusal=lambda call: kernel_refusal(call)
        )

flashmla_hf.register()

# The name shaped like a hub kernel's.
SHAPED = "flashmla/flash-attn3"
SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3, "eos_token_id": None, "pad_token_id": 0, "bos_token_id": 1,
}  # fmt: skip


def build_causal_lm(implementation, family="Llama", **options):
    """A two-layer causal language model of ``family`` with weights of seed 0, in evaluation mode on DEVICE."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **options)
    cls = getattr(transformers, f"{family}ForCausalLM")
    return cls._from_config(config, attn_implementation=implementation).to(DEVICE).eval()


def save_word_tokenizer(folder) -> transformers.PreTrainedTokenizerFast:
    """One token for each of the words w1 ... w95, and a chat template that joins the messages."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<unk>": 0, **{f"w{i}": i for i in range(1, SIZES["vocab_size"])}}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", pad_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return tokenizer


def random_ids(*shape, seed=0):
    """Token ids from 3 to 89 of this shape, on DEVICE."""
    return torch.randint(3, 90, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


# Batches of prompts.
SEQLEN = 19
ROWS = {"alike": (SEQLEN, SEQLEN, SEQLEN), "padded": (SEQLEN, 4, 1)}  # real tokens of each row, the padding before them


def batch_of(rows) -> dict:
    """Random prompts, left-padded to SEQLEN tokens: ``rows`` are the numbers of real tokens."""
    ids = torch.randint(3, 60, (len(rows), SEQLEN), generator=torch.Generator().manual_seed(7))
    mask = torch.zeros_like(ids)
    for row, count in enumerate(rows):
        mask[row, SEQLEN - count :] = 1
    return {"input_ids": (ids * mask).to(DEVICE), "attention_mask": mask.to(DEVICE)}


def generate_greedily(model, batch, **options):
    settings = {"do_sample": False, "disable_compile": True, **options}
    return model.generate(**batch, **settings, output_logits=True, return_dict_in_generate=True)


def patch_options(names: list[str] | None, options: dict) -> dict:
    """The ``options`` of ``flashmla_hf.patch`` that belong to the patches in ``names`` (``None``: the default)."""
    names = flashmla_hf.DEFAULT_PATCHES if names is None else names
    return {option: value for option, value in options.items() if flashmla_hf.PATCH_OPTIONS[option] in names}


def kernel_calls(calls: Counter[str]) -> int:
    return sum(calls[name] for name in KERNELS)


def is_built() -> bool:
    """Whether a kernel of DEVICE is there, or the oracle stands in for it."""
    return is_oracle_in_place() or DEVICE.type != "cpu" or "cpu" not in libraries.unavailable


needs_kernel = pytest.mark.skipif(not is_built(), reason=f"the kernel of {DEVICE} is not built")


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    """Whether the largest difference is within ``tolerance`` of the largest value (at least 1)."""
    if got.shape != expected.shape:
        return False
    got, expected = got.detach().float(), expected.detach().float()
    if not (torch.isfinite(got).all() and torch.isfinite(expected).all()):
        return False
    return (
        bool((got - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))) if got.numel() else True
    )
