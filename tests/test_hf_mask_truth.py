"""The mask is the truth: layers that do not say what their masks say, masks that models compute with, positions that jump,
arguments meant for somebody else. Eager in float32 decides."""

from __future__ import annotations

import copy
import inspect
import warnings

import hf_support
import pytest
import torch
import transformers
from hf_support import DEVICE, close

import flashmla_hf
from flashmla_hf.hf import check, forward, masks, refusals

pytestmark = hf_support.needs_kernel

TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.3, "max_position_embeddings": 128,
}  # fmt: skip
UNSAID = {
    "window in the mask alone": ("PhimoeForCausalLM", "PhimoeConfig", {
        **TEXT, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}),
    "no is_causal": ("SplinterModel", "SplinterConfig", {
        **TEXT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "question_token_id": 5}),
    "per-layer configuration": ("NeoMMEForMaskedLM", "NeoMMEConfig", {
        **TEXT, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}),
    "concatenated masks": ("DeepseekV4ForCausalLM", "DeepseekV4Config", {
        "vocab_size": 64, "hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 16, "q_lora_rank": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "qk_rope_head_dim": 8, "sliding_window": 8,
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"], "compress_rate_csa": 4,
        "compress_rate_hca": 8, "o_groups": 2, "o_lora_rank": 16, "index_n_heads": 2, "index_head_dim": 16,
        "index_topk": 2, "hc_mult": 2, "mlp_layer_types": ["moe", "moe"], "initializer_range": 0.3,
        "max_position_embeddings": 256}),
    "ALiBi on a flash path": ("FalconForCausalLM", "FalconConfig", {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True,
        "new_decoder_architecture": False, "multi_query": False, "initializer_range": 0.3}),
}  # fmt: skip


def pair(model, config):
    built = []
    for implementation in ("eager", "flashmla"):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built.append(
                getattr(transformers, model)._from_config(copy.deepcopy(config), attn_implementation=implementation)
            )
    built[1].load_state_dict(built[0].state_dict())
    return [m.to(DEVICE).eval() for m in built]


def ids(*shape, seed=1):
    return torch.randint(6, 60, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("name", UNSAID)
def test_layers_whose_masks_alone_say_what_is_visible_are_exact(name):
    model, config, options = UNSAID[name]
    if not hasattr(transformers, config):
        pytest.skip("not in this Transformers")
    eager, ours = pair(model, getattr(transformers, config)(**options))
    x = ids(2, 24)
    ones = torch.ones_like(x)
    padded = ones.clone()
    padded[0, -5:] = 0  # on the right: behind every token that counts in a causal row
    for mask in (None, ones, ones.int(), ones.bool(), padded):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got, want = (m(input_ids=x, attention_mask=mask)[0] for m in (ours, eager))
        kept = (padded if mask is padded else ones)[..., None]
        assert close(got * kept, want * kept), mask
    # NeoMME's other attention class computes by itself.
    expected = {
        "concatenated masks": {False},
        "ALiBi on a flash path": {False},
        "per-layer configuration": {True, False},
    }
    assert {layer.uses_kernel for layer in flashmla_hf.check(ours).layers} == expected.get(name, {True})


def test_a_decoder_that_never_says_causal_does_not_see_the_future():
    config = transformers.NllbMoeConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, init_std=0.3,
        num_experts=4, decoder_sparse_step=2,
    )  # fmt: skip
    eager, ours = pair("NllbMoeForConditionalGeneration", config)
    source, target = ids(2, 12), ids(2, 9, seed=2)
    with torch.no_grad():
        got, want = (m(input_ids=source, decoder_input_ids=target).logits for m in (ours, eager))
        last = target.clone()
        last[:, -1] = 5
        moved = ours(input_ids=source, decoder_input_ids=last).logits
    assert close(got, want)
    assert torch.equal(got[:, :-1], moved[:, :-1])


POSITIONS = {
    "skips": torch.cat([torch.arange(10), torch.arange(60, 70)]),
    "shared by three": torch.arange(20) // 3,
    "strided": torch.arange(20) * 3,
    "fall": torch.arange(20).flip(0),
    "shared prefix": torch.cat([torch.arange(12), torch.arange(4, 12)]),
    "all alike": torch.zeros(20, dtype=torch.long),
}


@pytest.fixture(scope="module")
def llamas():
    return pair("LlamaForCausalLM", transformers.LlamaConfig(**TEXT, num_key_value_heads=2))


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("mask", ["none", "ones", "one row padded"])
@pytest.mark.parametrize("kind", POSITIONS)
def test_positions_that_jump_cut_what_eager_cuts(kind, mask, use_cache, llamas):
    x = ids(2, 20)
    batch = {"input_ids": x, "position_ids": POSITIONS[kind].to(DEVICE).expand(2, -1), "use_cache": use_cache}
    kept = torch.ones_like(x)
    if mask == "one row padded":
        kept[0, :2] = 0
    if mask != "none":
        batch["attention_mask"] = kept
    with torch.no_grad():
        want, got = (m(**batch).logits * kept[..., None] for m in llamas)
    assert close(got, want)


@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_rows_stay_exact_beside_a_padded_row(use_cache, llamas):
    eager, ours = llamas
    x = ids(2, 20)
    packed = torch.cat([torch.arange(n) for n in (8, 1, 11)])
    positions = torch.stack([packed, (torch.arange(20) - 4).clamp(min=0)]).to(DEVICE)
    mask = torch.ones_like(x)
    mask[1, :4] = 0
    with torch.no_grad():
        got = ours(x, attention_mask=mask, position_ids=positions, use_cache=use_cache).logits
        want = torch.cat([eager(part).logits for part in x[:1].split([8, 1, 11], dim=1)], dim=1)
        assert close(got[:1], want)
        assert close(got[1:, 4:], eager(x[1:, 4:]).logits)


def test_arguments_of_other_attentions_are_ignored_and_selected_keys_are_refused(llamas):
    ours = llamas[1]
    x = ids(1, 8)
    with torch.no_grad():
        want = ours(x).logits
        other = ours(x, generation_mode="text", decoder_attention_mask=torch.ones(1, 3, device=DEVICE)).logits
        assert torch.equal(other, want)
        for name in ("indices", "block_indices", "sinks", "block_table"):
            with pytest.raises(ValueError, match=name):
                refusals.refuse_unknown(ours.model.layers[0].self_attn, {name: x})


def test_the_list_of_honoured_arguments_is_that_of_the_attention_function():
    parameters = inspect.signature(forward.attention_forward).parameters.keys()
    assert parameters - {"kwargs"} == check.HONOURED_KWARGS


def lazy(dtype=torch.bool):
    pattern = masks.Pattern(True, (2, 0))
    return masks.LazyMask(pattern, (2, 1, 6, 6), dtype, torch.empty(0)), pattern.dense(6, 6, torch.device("cpu"))


def test_computing_with_a_lazy_mask_equals_the_dense_mask():
    mask, dense = lazy()
    assert torch.equal(torch.cat([mask, mask], dim=-1), torch.cat([dense, dense], dim=-1).expand(2, -1, -1, -1))
    assert torch.equal(mask[:, :, 1:3, :2], dense.expand(2, 1, 6, 6)[:, :, 1:3, :2])
    additive, _ = lazy(torch.float32)
    scores = torch.randn(2, 4, 6, 6)
    assert torch.equal(scores + additive, scores + torch.where(dense, 0.0, torch.finfo(torch.float32).min))
    mask, _ = lazy()
    for whole in (mask[:, :, :, :6], mask.detach()):
        assert type(whole) is masks.LazyMask


def test_a_lazy_mask_that_was_written_to_loses_its_pattern():
    for write in (lambda m: m[..., 0].fill_(False), lambda m: m.fill_(True), lambda m: m[:, :, :, :6].fill_(False)):
        mask, _ = lazy()
        write(mask)
        assert masks.pattern_of(mask) is None
        q = torch.randn(2, 2, 6, 8)
        got, _ = forward.attention_forward(torch.nn.Module(), q, q, q, mask)
        want, _ = forward.attention_forward(torch.nn.Module(), q, q, q, mask.dense())
        assert torch.equal(got, want)


def test_padded_batches_of_many_lengths_compile_to_two_graphs():
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    eager, ours = pair("LlamaForCausalLM", transformers.LlamaConfig(**TEXT, num_key_value_heads=2))
    compiled = torch.compile(ours, backend="eager")
    for length in (16, 24, 17, 33, 40, 21):
        x, mask = ids(2, length), torch.ones(2, length, dtype=torch.long, device=DEVICE)
        mask[0, : length // 4] = 0
        with torch.no_grad():
            got, want = (m(input_ids=x, attention_mask=mask, use_cache=False).logits for m in (compiled, eager))
        assert close(got * mask[..., None], want * mask[..., None])
    assert counters["stats"]["unique_graphs"] <= 2


FALCON = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False,
    "new_decoder_architecture": True, "num_kv_heads": 2, "initializer_range": 0.3,
}  # fmt: skip


def test_what_transformers_flash_path_does_not_honour_is_refused():
    """Falcon's layers call it. It takes a 4-D mask for padding, knows packed rows in a batch of one, and has no weights."""
    eager, ours = pair("FalconForCausalLM", transformers.FalconConfig(**FALCON))
    x = ids(2, 12)
    positions = torch.arange(12, device=DEVICE)[None].expand(2, -1).clone()
    subject = r"^flashmla in FalconFlashAttention2: "
    with torch.no_grad():
        with pytest.raises(
            ValueError, match=subject + r"attention_mask: expected None or 2 dimensions .*, got 4: \[2, 1, 12, 12\]"
        ):
            ours(x, attention_mask=torch.zeros(2, 1, 12, 12, device=DEVICE))
        with pytest.raises(ValueError, match=subject + r"output_attentions: expected False .*, got True"):
            ours(x, output_attentions=True)
        assert close(ours(x, position_ids=positions, use_cache=False).logits, eager(x, position_ids=positions).logits)
        positions[:, 5:] -= 5
        one = {"position_ids": positions[:1], "use_cache": False}
        alone = eager(x[:1, 5:]).logits
        assert close(ours(x[:1], **one).logits[:, 5:], alone)
        want = eager(x, position_ids=positions, use_cache=False).logits
        if close(want[:1, 5:], alone):
            assert close(ours(x[:1], **one).logits, want[:1])
            with pytest.raises(
                ValueError, match=r"position_ids: expected one packed row .*, got 2 rows of sequences that begin anew"
            ):
                ours(x, position_ids=positions, use_cache=False)
        else:  # in this Transformers' eager attention they do not begin anew
            assert close(ours(x, position_ids=positions, use_cache=False).logits, want)


WIDTHS = {"none": 0, "of the tokens": 12, "of the cache": 30}


@pytest.mark.parametrize("columns", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("name", ["flashmla", "fmla"])
def test_the_flash_path_sees_no_unused_row_of_a_static_cache(name, columns):
    eager, ours = pair("FalconForCausalLM", transformers.FalconConfig(**FALCON))
    ours.set_attn_implementation(name)
    x, got = ids(2, 14), []
    mask = torch.ones(2, 30, dtype=torch.long, device=DEVICE)
    with torch.no_grad():
        for model in (eager, ours):
            cache = transformers.StaticCache(config=model.config, max_cache_len=30)
            tokens, logits = 0, []
            for new in (12, 1, 1):
                tokens += new
                mask[:, tokens:] = 0
                given = {"attention_mask": mask[:, : max(columns, tokens)]} if columns else {}
                logits.append(model(x[:, tokens - new : tokens], past_key_values=cache, **given).logits)
                mask[:, tokens:] = 1
            got.append(torch.cat(logits, 1))
            tokens = model.generate(
                x, max_new_tokens=4, do_sample=False, cache_implementation="static", disable_compile=True
            )
            got.append(tokens)
    assert close(got[0], got[2])
    assert torch.equal(got[1], got[3])


def test_the_flash_path_refuses_a_mask_that_says_nothing_of_some_tokens():
    ours = pair("FalconForCausalLM", transformers.FalconConfig(**FALCON))[1]
    x, cache = ids(2, 12), transformers.DynamicCache()
    mask = torch.ones(2, 9, dtype=torch.long, device=DEVICE)
    with torch.no_grad():
        ours(x[:, :9], attention_mask=mask, past_key_values=cache)
        with pytest.raises(
            ValueError, match=r"attention_mask: expected a 2-D mask with a column for each of the 10 tokens"
        ):
            ours(x[:, :1], attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize(
    ("model", "config"),
    [
        ("FalconForCausalLM", transformers.FalconConfig(**FALCON)),
        (
            "GPTJForCausalLM",
            transformers.GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64),
        ),
    ],
)
def test_the_flash_path_refuses_a_mask_of_more_tokens_than_there_are(model, config):
    """Without a cache nobody knows which they are. The first update of a static cache, of as many rows, knows."""
    # By a layer of that path, or by ours, which GPT-J calls in newer releases.
    expected = r"attention_mask: expected (8 columns, as there are tokens|a mask of the layer's 8 keys)\b.* got "
    eager, ours = pair(model, config)
    x, mask = ids(2, 8), torch.ones(2, 12, dtype=torch.long, device=DEVICE)
    mask[0, :3] = mask[:, 8:] = 0
    with torch.no_grad():
        for given in (mask, torch.ones_like(mask)):
            with pytest.raises(RuntimeError, match="must match the size"):
                eager(x, attention_mask=given, use_cache=False)
            with pytest.raises(ValueError, match=expected):
                ours(x, attention_mask=given, use_cache=False)
        caches = [transformers.StaticCache(config=m.config, max_cache_len=12) for m in (eager, ours)]
        got, want = (
            m(x, attention_mask=mask, past_key_values=c).logits for m, c in zip((ours, eager), caches, strict=True)
        )
        assert close(got[0, 3:], want[0, 3:])
        assert close(got[1], want[1])


def test_a_compiled_flash_path_needs_a_column_of_the_mask_for_each_token_in_a_static_cache():
    eager, ours = pair("FalconForCausalLM", transformers.FalconConfig(**FALCON | {"num_hidden_layers": 1}))
    x = ids(2, 12)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="eager")
    mask = torch.ones(2, 30, dtype=torch.long, device=DEVICE)
    with torch.no_grad():
        caches = [transformers.StaticCache(config=ours.config, max_cache_len=30) for _ in range(2)]
        for model, cache in zip((eager, ours), caches, strict=True):
            model(x[:, :11], attention_mask=mask[:, :11], past_key_values=cache)
        want = eager(x[:, 11:], attention_mask=mask[:, :12], past_key_values=caches[0]).logits
        with pytest.raises(
            ValueError, match=r"expected a 2-D mask with a column for each of the tokens so far .*, got None"
        ):
            compiled(x[:, 11:], past_key_values=caches[1])
        with pytest.raises(RuntimeError, match=r"expected a column for each token so far"):
            compiled(x[:, 11:], attention_mask=mask, past_key_values=caches[1])
        assert close(compiled(x[:, 11:], attention_mask=mask[:, :12], past_key_values=caches[1]).logits, want)


@pytest.mark.parametrize("is_padded", [False, True], ids=["alike", "left"])
def test_tokens_beyond_the_end_of_a_padding_mask_are_hidden_keys_and_queries_like_others(is_padded, llamas):
    """As a loop of decoding has them that does not extend its mask."""
    x = ids(2, 12)
    mask = torch.ones(2, 13, dtype=torch.long, device=DEVICE)
    begin = 3 if is_padded else 0
    mask[0, :begin] = 0
    got = []
    with torch.no_grad():
        for model in llamas:
            cache = transformers.DynamicCache(config=model.config)
            prompt = model(x, attention_mask=mask[:, :9], past_key_values=cache).logits[:, begin:]
            step = model(x[:, :1], attention_mask=mask[:, :12], past_key_values=cache).logits
            chunk = model(x[:, :3], attention_mask=mask, past_key_values=cache).logits
            got.append(torch.cat([prompt, step, chunk], 1))
    assert close(*got)
