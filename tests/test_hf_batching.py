"""Continuous batching gives the tokens of generate, with block tables too; what says less is refused."""

from __future__ import annotations

import contextlib
import inspect
import random
import re

import hf_support
import pytest
import torch
import transformers
from counting import counted_calls
from hf_support import DEVICE, SHAPED, SIZES, build_causal_lm, kernel_calls, random_ids
from transformers import modeling_flash_attention_utils
from transformers.generation.continuous_batching import PagedAttentionCache

from flashmla_hf import libraries
from flashmla_hf.hf import forward

pytestmark = [
    hf_support.needs_kernel,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # the paged| prefix after 5.17
]


def batched(model, prompts, sizes=None, **options) -> list[list[int]]:
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0, **options}
    config = transformers.ContinuousBatchingConfig(
        **{"num_blocks": 64, "max_batch_tokens": 64, "use_cuda_graph": False, **(sizes or {})}
    )
    outputs = model.generate_batch(
        inputs=prompts, generation_config=transformers.GenerationConfig(**settings), continuous_batching_config=config,
        progress_bar=False,
    )  # fmt: skip
    assert all(output.error is None for output in outputs.values())
    in_order = sorted(outputs, key=lambda key: [int(number) for number in re.findall(r"\d+", key)])
    return [list(outputs[key].generated_tokens) for key in in_order]


def one_by_one(model, prompts) -> list[list[int]]:
    return [
        model.generate(torch.tensor([p], device=DEVICE), max_new_tokens=6, do_sample=False)[0, len(p) :].tolist()
        for p in prompts
    ]


# Windows, softcap and sinks, alone and beside layers that see everything.
_GPT_OSS = {
    "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
_SLIDING = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
_FULL = {"layer_types": ["full_attention"] * 2}
WINDOWED = {
    "Mistral": ("Mistral", {"sliding_window": 7}),
    "Gemma2": ("Gemma2", {"head_dim": 16, "attn_logit_softcapping": 5.0, **_SLIDING}),
    "Qwen2": ("Qwen2", {"use_sliding_window": True, **_SLIDING}),
    "GPT-OSS": ("GptOss", {**_GPT_OSS, **_SLIDING}),
}
FULL = {
    "Llama": ("Llama", {}),
    "Qwen3": ("Qwen3", {"head_dim": 16}),
    "softcap": ("Gemma2", {"head_dim": 16, "attn_logit_softcapping": 5.0, **_FULL}),
    "sinks": ("GptOss", {**_GPT_OSS, **_FULL}),
}


def random_prompts(count: int, longest: int, seed: int) -> list[list[int]]:
    """Prompts of random lengths, a third of which begin as the one before."""
    source, prompts = random.Random(seed), []
    for _ in range(count):
        begin = source.choice([[], [], prompts[-1][: source.randint(0, 40)] if prompts else []])
        prompts.append(begin + [source.randint(3, 89) for _ in range(source.randint(1, longest - len(begin)))])
    return prompts


def prompts_of(*lengths):
    return [random_ids(1, n, seed=n)[0].tolist() for n in lengths]


@pytest.mark.parametrize("name", ["flashmla", SHAPED])
@pytest.mark.parametrize(
    ("family", "options"), [("Llama", {}), ("Mistral", {"sliding_window": 5}), ("Qwen3", {"head_dim": 16})], ids=str
)
def test_continuous_batching_gives_the_tokens_of_generate(family, options, name):
    prompts = prompts_of(5, 19, 3)
    ours = build_causal_lm(name, family, **options)
    with counted_calls() as calls:
        got = batched(ours, prompts)
    assert kernel_calls(calls) > 0
    assert got == one_by_one(build_causal_lm("eager", family, **options), prompts)
    assert ours.config._attn_implementation == name


BLOCK_SIZE = "page_size" if "page_size" in transformers.ContinuousBatchingConfig.__dataclass_fields__ else "block_size"


@pytest.mark.parametrize("name", ["flashmla", SHAPED])
@pytest.mark.parametrize("kind", [*FULL, *WINDOWED])
def test_many_requests_of_different_lengths_get_the_tokens_of_generate(kind, name):
    """A cache that holds few of them at once: others wait, and blocks that are kept for their content are given up."""
    family, options = {**FULL, **WINDOWED}[kind]
    prompts = random_prompts(24, 70, seed=len(kind))
    ours = build_causal_lm(name, family, **options)
    sizes = {BLOCK_SIZE: 16, "num_blocks": 12, "max_batch_tokens": 48}
    with counted_calls() as calls, evictions() as evicted:
        got = batched(ours, prompts, sizes)
    assert kernel_calls(calls) > 0
    assert calls["reference"] == 0 or hf_support.is_oracle_in_place(), dict(calls)
    assert got == one_by_one(build_causal_lm("eager", family, **options), prompts)
    assert any(evicted) or kind in WINDOWED or not hasattr(PagedAttentionCache, "evict_cached_blocks")


@contextlib.contextmanager
def evictions():
    """Whether blocks were given up, for each time that the cache was asked to (from Transformers 5.24 on)."""
    seen: list[bool] = []
    original = getattr(PagedAttentionCache, "evict_cached_blocks", None)
    with pytest.MonkeyPatch.context() as patch:
        if original is not None:
            patch.setattr(
                PagedAttentionCache, "evict_cached_blocks", lambda self: seen.append(original(self)) or seen[-1]
            )
        yield seen


def test_a_prompt_longer_than_a_batch_is_read_in_parts():
    """Mistral's window lies across the parts."""
    for family, options in (("Llama", {}), ("Mistral", {"sliding_window": 9})):
        prompts = prompts_of(41, 7)
        got = batched(build_causal_lm("flashmla", family, **options), prompts, {"max_batch_tokens": 16})
        assert got == one_by_one(build_causal_lm("eager", family, **options), prompts)


@pytest.mark.parametrize("is_shared", [False, True])
def test_prompts_with_the_same_beginning_share_their_blocks(is_shared):
    beginning = prompts_of(32)[0]
    prompts = [beginning + rest for rest in prompts_of(3, 5)]
    sizes = {BLOCK_SIZE: 16, "allow_block_sharing": is_shared, "max_batch_tokens": 48}
    assert batched(build_causal_lm("flashmla"), prompts, sizes) == one_by_one(build_causal_lm("eager"), prompts)


def test_requests_that_fork_from_one_prompt_go_on_by_themselves():
    prompts = prompts_of(9)
    got = batched(build_causal_lm("flashmla"), prompts, do_sample=True, top_k=1, num_return_sequences=2)
    want = one_by_one(build_causal_lm("eager"), prompts)
    assert got in (want * 2, want)  # 5.17 hands back one of them


def test_continuous_batching_uses_pefts_adapters():
    peft = pytest.importorskip("peft")
    prompts = prompts_of(5, 9)

    def adapted(name):
        model = peft.get_peft_model(build_causal_lm(name), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.3)
        return model.base_model.model.eval()

    got = batched(adapted("flashmla"), prompts)
    assert got == one_by_one(adapted("eager"), prompts)
    assert got != one_by_one(build_causal_lm("eager"), prompts), "the adapter changes nothing"


HANDS_PAGES = "v_cache" in inspect.signature(modeling_flash_attention_utils._flash_attention_forward).parameters


@pytest.mark.skipif(not HANDS_PAGES, reason="this Transformers does not hand a layer its pages")
@pytest.mark.parametrize("prompts", [prompts_of(5, 19, 3, 16, 31), random_prompts(24, 70, seed=1)], ids=["few", "many"])
@pytest.mark.parametrize("kind", FULL)
def test_decoding_with_block_tables_gives_the_tokens_of_generate(kind, prompts, monkeypatch):
    """Transformers has them on a GPU alone: its check is passed over here. Of many requests some outgrow the tables."""
    from transformers.generation.continuous_batching import initialization

    monkeypatch.setattr(initialization, "ensure_decode_fast_path_is_available", lambda *_: None)
    family, options = FULL[kind]
    sizes = {"max_blocks_per_request": 4, BLOCK_SIZE: 16, "num_blocks": 16}
    with counted_calls() as calls, counted_decoding() as decoding:
        got = batched(build_causal_lm(SHAPED, family, **options), prompts, sizes)
    assert got == one_by_one(build_causal_lm("eager", family, **options), prompts)
    assert kernel_calls(calls) > 0, "the prompts"
    assert sum(decoding) > 0, "the tokens after them"


@contextlib.contextmanager
def counted_decoding():
    """The calls of decode_attention with a block table."""
    seen, original = [], forward.decode.decode_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            forward.decode,
            "decode_attention",
            lambda *args, **options: seen.append(options.get("block_table") is not None) or original(*args, **options),
        )
        yield seen


@pytest.mark.skipif(not HANDS_PAGES, reason="this Transformers does not hand a layer its pages")
def test_the_decode_path_finds_the_function_for_block_tables_if_a_kernel_reads_pages(monkeypatch):
    from transformers.generation.continuous_batching import initialization

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    monkeypatch.delitem(libraries.unavailable, "sm90", raising=False)
    config = transformers.LlamaConfig(**SIZES)
    config._attn_implementation = SHAPED
    batching = transformers.ContinuousBatchingConfig(max_blocks_per_request=4)
    initialization.ensure_decode_fast_path_is_available(config, batching, True)
    assert batching.max_blocks_per_request == 4


def test_the_decode_path_is_told_that_there_is_no_function_for_block_tables(monkeypatch):
    """On a GPU it looks for flash_attn_with_kvcache under names with a 2 or 3."""
    from transformers.generation.continuous_batching import initialization

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(libraries.unavailable, "sm90", "not built")
    asked = []
    wrapped = modeling_flash_attention_utils._lazy_imports
    monkeypatch.setattr(
        modeling_flash_attention_utils, "_lazy_imports", lambda *a, **k: asked.append(a[0]) or wrapped(*a, **k)
    )
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    for name in (SHAPED, f"paged|{SHAPED}"):
        config = transformers.LlamaConfig(**SIZES)
        config._attn_implementation = name
        batching = transformers.ContinuousBatchingConfig(max_blocks_per_request=4)
        initialization.ensure_decode_fast_path_is_available(config, batching, True)
        assert batching.max_blocks_per_request == 0
        assert name in asked


@pytest.mark.parametrize("name", ["block_table", "k_cache", "v_cache"])
def test_a_block_table_is_refused_by_name(name):
    x = torch.randn(1, 2, 4, 8, device=DEVICE)
    with pytest.raises(ValueError, match=rf"{name}: expected none.*max_blocks_per_request=0"):
        forward.attention_forward(torch.nn.Module(), x, x, x, **{name: torch.zeros(1, 2, device=DEVICE)})


def test_boundaries_of_every_kind_of_layer_are_refused_if_the_layer_chose_none():
    x = torch.randn(1, 2, 4, 8, device=DEVICE)
    boundaries = torch.tensor([0, 4], dtype=torch.int32, device=DEVICE)
    kinds = {"full_attention": boundaries}
    with pytest.raises(ValueError, match="cu_seq_lens_k: expected the boundaries of this layer's keys, got dict"):
        forward.attention_forward(
            torch.nn.Module(), x, x, x, cu_seq_lens_q=boundaries, cu_seq_lens_k=kinds, max_length_q=4,
            max_length_k={"full_attention": 4}, read_index=[torch.arange(4)], write_index=[torch.arange(4)],
        )  # fmt: skip


@pytest.mark.skipif(not HANDS_PAGES, reason="this Transformers does not hand a layer its pages")
def test_pages_without_the_boundaries_of_their_layer_are_refused():
    x, pages = torch.randn(1, 2, 3, 8, device=DEVICE), torch.zeros(4, 16, 2, 8, device=DEVICE)
    table = torch.zeros(3, 1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(
        ValueError, match=r"cu_seq_lens_k: expected the boundaries of this layer's keys, got dict\. Set max_blocks"
    ):
        forward.attention_forward(
            torch.nn.Module(), x, x, x, cu_seq_lens_k={"full_attention": table}, k_cache=pages, v_cache=pages, block_table=table
        )  # fmt: skip


def test_an_ordinary_cache_among_the_arguments_is_left_alone():
    x = torch.randn(1, 2, 4, 8, device=DEVICE)
    cache = transformers.DynamicCache()
    out, _ = forward.attention_forward(torch.nn.Module(), x, x, x, cache=cache)
    assert torch.equal(out, forward.attention_forward(torch.nn.Module(), x, x, x)[0])
    assert cache.get_seq_length() == 0
