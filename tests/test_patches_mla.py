"""Patch "mla_decode": decoding attends to cached latents. Logits and tokens are the unpatched model's, on every family.

The models are tiny, in float32, with weights large enough that a wrong attention shows.
"""

import contextlib
import copy
import re
from pathlib import Path

import families
import hf_support
import mla_families
import pytest
import torch
import transformers
from hf_support import DEVICE
from mla_families import FAMILY
from patches_support import attributes, message
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache, StaticCache

import flashmla_hf
from flashmla_hf import decode
from flashmla_hf.patches import PatchError, forwards, mla, structure

HAS_LATENTS = hasattr(
    transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3Attention, "expand_kv"
)  # Transformers 5.24
needs_latents = pytest.mark.skipif(not HAS_LATENTS, reason="this Transformers caches expanded keys and values")
pytestmark = [hf_support.needs_kernel, pytest.mark.filterwarnings("ignore::FutureWarning")]
TOLERANCE, SEQLEN = 1e-4, 19
PATCH = ["mla_decode"]
ROWS = {"alike": (SEQLEN, SEQLEN, SEQLEN), "padded": (SEQLEN, 4, 1)}


def pair(name, implementation="flashmla"):
    """(unpatched, patched): the same weights, in evaluation mode."""
    plain = families.build(FAMILY[name], implementation, DEVICE)
    patched = families.build(FAMILY[name], "flashmla", DEVICE, plain.state_dict())
    return plain, flashmla_hf.patch(patched, PATCH)


def batch_of(rows):
    ids = torch.randint(3, 60, (len(rows), SEQLEN), generator=torch.Generator().manual_seed(7))
    mask = torch.zeros_like(ids)
    for row, count in enumerate(rows):
        mask[row, SEQLEN - count :] = 1
    return {"input_ids": (ids * mask).to(DEVICE), "attention_mask": mask.to(DEVICE)}


def generate(model, batch, **options):
    settings = {"max_new_tokens": 8, "do_sample": False, "disable_compile": True, **options}
    return model.generate(**batch, **settings, output_logits=True, return_dict_in_generate=True)


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


@torch.no_grad()
def steps(model, cache, sizes=(SEQLEN, 1, 1, 4, 1), seed=3, rows=2):
    """Logits [rows, tokens, vocabulary] of forward passes over so many tokens, each on the cache that the others left."""
    ids = torch.randint(3, 60, (rows, sum(sizes)), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    logits, start = [], 0
    for size in sizes:
        positions = torch.arange(start, start + size, device=DEVICE)[None]
        out = model(ids[:, start : start + size], position_ids=positions, cache=cache, use_cache=True)
        logits.append(out.logits)
        start += size
    return torch.cat(logits, dim=1)


# ---- Every family ----------------------------------------------------------------------------------------------------


def latent_classes():
    """The classes of Transformers' modeling files that make a kv_b_proj."""
    found = set()
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        text = path.read_text()
        if "self.kv_b_proj = " in text:
            for part in re.split(r"^class ", text, flags=re.MULTILINE)[1:]:
                if "self.kv_b_proj = " in part:
                    found.add(re.match(r"\w+", part).group())
    return found


@needs_latents
def test_every_family_of_transformers_is_known():
    """A new one belongs into tests/mla_families.py: served, and compared here, or refused."""
    assert latent_classes() == mla_families.SERVED | mla_families.SPARSE


@needs_latents
def test_every_served_class_is_compared():
    compared = set()
    for family in mla_families.FAMILIES:
        model = families.build(family, "flashmla", DEVICE)
        compared |= {type(m).__name__ for m in structure.latent_attentions(model, "mla_decode").values()}
    assert compared == mla_families.SERVED


@needs_latents
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", FAMILY)
def test_logits_are_the_unpatched_models(name, kind, monkeypatch):
    """A prefill, steps of one token, one of four, and a chunk that is expanded."""
    plain, patched = pair(name)
    sizes = (SEQLEN, 1, 1, 4, 18, 1)
    expected = steps(plain, cache_of(plain, kind, 64), sizes)
    cache = cache_of(patched, kind, 64)
    with counted(monkeypatch) as counts:
        got = steps(patched, cache, sizes)
    assert_close(got, expected)
    blocks = structure.latent_attentions(patched, "mla_decode")
    assert counts[0] == 4 * len(blocks)
    for block in blocks.values():
        layer, config = cache.layers[block.layer_idx], patched.config
        assert layer.keys.shape[1::2] == (1, config.kv_lora_rank + config.qk_rope_head_dim)
        assert layer.values.numel() == 0


@needs_latents
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", FAMILY)
def test_generated_tokens_are_the_unpatched_models(name, kind, rows, monkeypatch):
    plain, patched = pair(name)
    options = {"cache_implementation": kind} if kind == "static" else {}
    expected = generate(plain, batch_of(ROWS[rows]), **options)
    with counted(monkeypatch) as counts:
        got = generate(patched, batch_of(ROWS[rows]), **options)
    assert counts[0] == 7 * len(structure.latent_attentions(patched, "mla_decode"))
    assert_same_answer(got, expected)


@needs_latents
@pytest.mark.parametrize("name", ["DeepSeek-V2", "DeepSeek-V3"])
def test_they_are_those_of_eager_attention(name):
    eager, patched = pair(name, "eager")
    for rows in ROWS.values():
        assert_same_answer(generate(patched, batch_of(rows)), generate(eager, batch_of(rows)))


STRATEGIES = {
    "beams": {"num_beams": 3},
    "sampled sequences": {"num_return_sequences": 2, "num_beams": 2},
    "assisted by the prompt": {"prompt_lookup_num_tokens": 3},
    "prefill in parts": {"prefill_chunk_size": 5},
    "prefill in large parts": {"prefill_chunk_size": 17},
}


@needs_latents
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["DeepSeek-V2", "DeepSeek-V3"])
def test_strategies_give_the_unpatched_models_tokens(name, strategy):
    plain, patched = pair(name)
    rows = (SEQLEN,) if "assisted" in strategy else ROWS["padded"]
    expected, got = (generate(m, batch_of(rows), **STRATEGIES[strategy]).sequences for m in (plain, patched))
    assert torch.equal(got, expected)


@needs_latents
def test_an_assistant_model_gives_the_unpatched_models_tokens():
    plain, patched = pair("DeepSeek-V3")
    batch = batch_of((SEQLEN,))
    for assistant in (plain, patched):
        expected, got = (generate(m, batch, assistant_model=assistant).sequences for m in (plain, patched))
        assert torch.equal(got, expected)


@needs_latents
@pytest.mark.parametrize("rows", ROWS)
def test_a_compiled_step_is_one_graph_with_the_same_tokens(rows):
    plain, patched = pair("DeepSeek-V3")
    expected = generate(plain, batch_of(ROWS[rows]), cache_implementation="static")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    config = transformers.CompileConfig(fullgraph=True, backend=counter, mode=None)
    config._compile_all_devices = True
    got = generate(
        patched, batch_of(ROWS[rows]), cache_implementation="static", compile_config=config, disable_compile=False
    )
    assert_same_answer(got, expected)
    assert counter.frame_count == 1


# ---- Numbers ---------------------------------------------------------------------------------------------------------


@needs_latents
def test_bfloat16_is_as_close_to_float32_as_without_the_patch():
    plain, patched = pair("DeepSeek-V3")
    truth = steps(plain, cache_of(plain, "dynamic"))
    halves = [m.to(torch.bfloat16) for m in (plain, patched)]
    errors = [float((steps(m, cache_of(m, "dynamic")).float() - truth).abs().mean()) for m in halves]
    assert errors[1] <= 1.5 * errors[0], errors


@needs_latents
def test_autocast():
    plain, patched = pair("DeepSeek-V3")
    with torch.autocast(DEVICE.type, torch.bfloat16):
        expected, got = (steps(m, cache_of(m, "dynamic")).float() for m in (plain, patched))
    assert_close(got, expected, 0.1)


@needs_latents
def test_attention_weights_and_masks_of_the_user_are_exact():
    plain, patched = pair("DeepSeek-V2")
    caches = [cache_of(m, "dynamic") for m in (plain, patched)]
    for model, cache in zip((plain, patched), caches, strict=True):
        steps(model, cache, (SEQLEN,))
    ids = torch.tensor([[5, 9, 4], [7, 3, 8]], device=DEVICE)
    mask = torch.ones(2, 1, 3, SEQLEN + 3, dtype=torch.bool, device=DEVICE)
    mask[:, :, :, 4:9] = False
    mask[..., -3:] = torch.tril(mask[..., -3:])
    holes = torch.ones(2, SEQLEN + 3, dtype=torch.long, device=DEVICE)
    holes[0, 5:8] = 0
    for options in ({"attention_mask": mask}, {"attention_mask": holes}, {"output_attentions": True}):
        with torch.no_grad():
            expected, got = (
                m(ids, cache=copy.deepcopy(cache), use_cache=True, **options)
                for m, cache in zip((plain, patched), caches, strict=True)
            )
        assert_close(got.logits, expected.logits)
        for ours, theirs in zip(got.attentions or (), expected.attentions or (), strict=True):
            assert_close(ours, theirs)


@needs_latents
@pytest.mark.parametrize("name", ["DeepSeek-V2", "LongCat-Flash"])
def test_training_is_unchanged(name):
    """Losses and gradients, with a cache (Transformers' default) and without."""
    plain, patched = pair(name)
    batch = families.inputs(FAMILY[name], "left", DEVICE)
    for use_cache in (False, True):
        results = []
        for model in (plain, patched):
            model.train()
            model.zero_grad()
            loss = model(**batch, use_cache=use_cache).loss
            loss.backward()
            results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
        (expected, gradients), (got, ours) = results
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        assert ours.keys() == gradients.keys()
        for n, g in gradients.items():
            assert_close(ours[n], g, 1e-5)


@needs_latents
def test_a_step_with_gradients_expands_and_has_them():
    plain, patched = pair("DeepSeek-V3")
    results = []
    for model in (plain, patched):
        cache = cache_of(model, "dynamic")
        steps(model, cache, (SEQLEN,))
        model(torch.tensor([[5], [7]], device=DEVICE), cache=cache, use_cache=True).logits.square().sum().backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert any("kv_b_proj" in n for n in results[1])
    for n, g in results[0].items():
        assert_close(results[1][n], g, 1e-5)


@needs_latents
def test_an_implementation_that_is_set_later_expands(monkeypatch):
    plain, patched = pair("DeepSeek-V3", "sdpa")
    patched.set_attn_implementation("sdpa")
    with counted(monkeypatch) as counts:
        assert_same_answer(generate(patched, batch_of(ROWS["padded"])), generate(plain, batch_of(ROWS["padded"])))
    assert counts[0] == 0


# ---- kv_b_proj that is more than a weight ----------------------------------------------------------------------------


def with_lora(model, **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["kv_b_proj", "o_proj"], init_lora_weights=False, **options)
    return peft.get_peft_model(model, config).eval()


@needs_latents
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.5}], ids=str)
def test_adapters_of_the_projection_are_honoured(options, monkeypatch):
    """Also when they are switched after the patch."""
    plain, patched = (with_lora(families.build(FAMILY["DeepSeek-V3"], "flashmla", DEVICE), **options) for _ in range(2))
    flashmla_hf.patch(patched, PATCH)
    with counted(monkeypatch) as counts:
        assert_same_answer(generate(patched, batch_of(ROWS["padded"])), generate(plain, batch_of(ROWS["padded"])))
    assert counts[0] > 0
    with plain.disable_adapter(), patched.disable_adapter():
        without = generate(patched, batch_of(ROWS["padded"]))
        assert_same_answer(without, generate(plain, batch_of(ROWS["padded"])))
    assert not torch.equal(without.logits[-1], generate(patched, batch_of(ROWS["padded"])).logits[-1])


@needs_latents
def test_four_bit_weights_are_honoured(monkeypatch):
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def packed():
        model = families.build(FAMILY["DeepSeek-V2"], "flashmla", DEVICE)
        for block in structure.latent_attentions(model, "mla_decode").values():
            old = block.kv_b_proj
            block.kv_b_proj = bitsandbytes.nn.Linear4bit(
                old.in_features, old.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
            )
            block.kv_b_proj.weight = bitsandbytes.nn.Params4bit(
                old.weight.detach(), requires_grad=False, quant_type="nf4"
            )
            block.kv_b_proj.to(DEVICE)
        return model.eval()

    plain, patched = packed(), flashmla_hf.patch(packed(), PATCH)
    with counted(monkeypatch) as counts:
        got = generate(patched, batch_of(ROWS["padded"]))
    assert counts[0] > 0
    assert_same_answer(got, generate(plain, batch_of(ROWS["padded"])))


@needs_latents
def test_weights_that_are_loaded_for_each_call_are_honoured(monkeypatch):
    accelerate = pytest.importorskip("accelerate")
    plain, patched = pair("DeepSeek-V3")
    expected = generate(plain, batch_of(ROWS["alike"]))
    accelerate.cpu_offload(patched, execution_device=DEVICE)
    with counted(monkeypatch) as counts:
        assert_same_answer(generate(patched, batch_of(ROWS["alike"])), expected)
    assert counts[0] > 0


@needs_latents
def test_a_short_cache_is_expanded_if_the_matrix_costs_more(monkeypatch):
    """The matrix of an adapted projection is its result for kv_lora_rank rows."""
    patched = flashmla_hf.patch(with_lora(families.build(FAMILY["DeepSeek-V3"], "flashmla", DEVICE)), PATCH)
    rank = patched.config.kv_lora_rank
    with counted(monkeypatch) as counts:
        steps(patched, cache_of(patched, "dynamic"), (rank - 1, 1))
        assert counts[0] == 0
        steps(patched, cache_of(patched, "dynamic"), (rank, 1))
        assert counts[0] == len(structure.latent_attentions(patched.get_base_model(), "mla_decode"))


# ---- Patch and unpatch -----------------------------------------------------------------------------------------------


@needs_latents
def test_unpatch_restores_every_attribute():
    plain, _ = pair("DeepSeek-V3")
    before = attributes(plain)
    flashmla_hf.patch(plain, PATCH)
    assert flashmla_hf.patch_report(plain).applied == ("mla_decode",)
    flashmla_hf.unpatch(plain)
    after = attributes(plain)
    assert after.keys() == before.keys()
    assert all(after[k] is before[k] or after[k] == before[k] for k in before)


def test_it_is_no_default():
    assert "mla_decode" not in flashmla_hf.DEFAULT_PATCHES
    assert "mla_decode" in flashmla_hf.PATCHES


@needs_latents
def test_it_works_beside_the_patches_of_training():
    plain, _ = pair("DeepSeek-V3")
    patched = families.build(FAMILY["DeepSeek-V3"], "flashmla", DEVICE, plain.state_dict())
    flashmla_hf.patch(patched, ["mlp", "norm", "checkpointing", "mla_decode"], mlp_tile=5)
    assert_same_answer(generate(patched, batch_of(ROWS["padded"])), generate(plain, batch_of(ROWS["padded"])))


# ---- Refusals --------------------------------------------------------------------------------------------------------


@needs_latents
def test_sparse_attention_is_refused_by_name():
    seen = set()
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        if "self.kv_b_proj = " in path.read_text():
            module = __import__(f"transformers.models.{path.parent.name}.{path.stem}", fromlist=["x"])
            for name in mla_families.SPARSE & vars(module).keys():
                block = getattr(module, name).__new__(getattr(module, name))
                torch.nn.Module.__init__(block)
                block.indexer = None  # as in a layer that shares another one's
                assert mla._unsupported(block) == (
                    "attention to all keys",
                    "sparse attention: an indexer selects the keys of each query",
                )
                source = forwards.that_names(getattr(module, name), "indexer")
                assert source is not None, f"{name} has no indexer"
                seen.add(name)
    assert seen == mla_families.SPARSE


def test_a_model_without_latents_is_refused_by_name():
    text = message(hf_support.build_causal_lm("flashmla"), PATCH)
    assert "modules: expected attention blocks with kv_a_proj_with_mqa, kv_a_layernorm, kv_b_proj" in text
    assert text.endswith("Exclude it: flashmla_hf.patch(model, exclude=['mla_decode'])")


@pytest.mark.skipif(HAS_LATENTS, reason="this Transformers caches latents")
def test_a_release_that_caches_expanded_keys_is_refused():
    text = message(families.build(FAMILY["DeepSeek-V3"], "flashmla", DEVICE), PATCH)
    assert "expected a forward that caches latents and expands them by expand_kv (Transformers 5.24 and later)" in text


@needs_latents
def test_another_attention_implementation_is_refused():
    text = message(families.build(FAMILY["DeepSeek-V3"], "sdpa", DEVICE), PATCH)
    assert "expected attn_implementation='flashmla' (it reads latents), got 'sdpa'" in text


@needs_latents
def test_a_device_without_a_kernel_is_refused(monkeypatch):
    model = families.build(FAMILY["DeepSeek-V3"], "flashmla", DEVICE)
    monkeypatch.setattr(mla.decode, "kernel_refusal", lambda *args, **kwargs: "a reason")
    assert "expected a device with a kernel for latents of 16 of 24 columns, got a reason" in message(model, PATCH)


@needs_latents
def test_a_device_without_a_kernel_after_the_patch_expands_with_one_warning(monkeypatch):
    plain, patched = pair("DeepSeek-V3")
    monkeypatch.setattr(mla.decode, "kernel_refusal", lambda *args, **kwargs: "a reason")
    monkeypatch.setattr("flashmla_hf.notices._warned", set())
    with pytest.warns(UserWarning, match="expands its latents at each step, as without the patch.*a reason"):
        got = generate(patched, batch_of(ROWS["alike"]))
    assert_same_answer(got, generate(plain, batch_of(ROWS["alike"])))


def attention_class():
    return transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3Attention


def changed(cls):
    """A tiny model whose blocks are of ``cls``, a subclass of its attention."""
    model = families.build(FAMILY["DeepSeek-V3"], "flashmla", DEVICE)
    for block in structure.latent_attentions(model, "mla_decode").values():
        block.__class__ = cls
    return model


@needs_latents
def test_another_expansion_is_found_by_a_trial():
    class Normed(attention_class()):
        def expand_kv(self, kv_nope, k_rot):
            keys, values = super().expand_kv(kv_nope, k_rot)
            return torch.nn.functional.normalize(keys, dim=-1), values

    class Scaled(attention_class()):
        def expand_kv(self, kv_nope, k_rot):
            keys, values = super().expand_kv(kv_nope, k_rot)
            return keys, 1.01 * values

    for cls, what in ((Normed, "scores"), (Scaled, "values")):
        assert re.search(
            f"expected keys and values that are kv_b_proj's of expand_kv's inputs, got {what} that differ by",
            message(changed(cls), PATCH),
        )


@needs_latents
def test_other_uses_of_what_is_cached_are_found_in_the_source():
    class UsesKeys(attention_class()):
        def forward(self, hidden_states, attention_mask=None, cache=None, **kwargs):
            kv_nope, k_rot = cache.update(hidden_states, hidden_states, 0)
            key_states, value_states = self.expand_kv(kv_nope, k_rot)
            key_states = key_states * 2
            return attention_interface(self, hidden_states, key_states, value_states)  # noqa: F821

    class UsesRotated(attention_class()):
        def forward(self, hidden_states, attention_mask=None, cache=None, **kwargs):
            kv_nope, k_rot = cache.update(hidden_states, hidden_states, 0)
            key_states, value_states = self.expand_kv(kv_nope, k_rot)
            return attention_interface(self, key_states, value_states), k_rot.sum()  # noqa: F821

    for cls, use in ((UsesKeys, "key_states"), (UsesRotated, "k_rot")):
        text = message(changed(cls), PATCH)
        assert re.search(f"expected a forward that only hands the results of .*, got '{use} in line", text), text


@needs_latents
def test_a_bias_is_refused():
    model = families.build(FAMILY["DeepSeek-V3"], "flashmla", DEVICE)
    block = next(iter(structure.latent_attentions(model, "mla_decode").values()))
    block.kv_b_proj = torch.nn.Linear(16, 128)
    assert "expected kv_b_proj without a bias, got one" in message(model, PATCH)


@needs_latents
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_that_was_filled_without_the_patch_is_refused(kind):
    plain, patched = pair("DeepSeek-V3")
    cache = cache_of(plain, kind)
    steps(plain, cache, (SEQLEN,))
    with pytest.raises(PatchError, match="expected one that holds rows of 24 numbers, got keys of width 16: it was"):
        steps(patched, cache, (1,))


@needs_latents
def test_other_caches_are_refused_by_name():
    from transformers.cache_utils import DynamicLayer
    from transformers.generation.continuous_batching import PagedAttentionCache

    class OfEightBits(DynamicLayer):
        def _quantize(self, x):
            return x

    _, patched = pair("DeepSeek-V3")
    cache = cache_of(patched, "dynamic")
    cache.layers[0] = OfEightBits()
    with pytest.raises(PatchError, match="got a OfEightBits. Use a DynamicCache or a StaticCache"):
        steps(patched, cache)
    with pytest.raises(PatchError, match="got the cache of continuous batching"):
        steps(patched, PagedAttentionCache.__new__(PagedAttentionCache))


@needs_latents
def test_a_cache_by_position_and_missing_values_are_refused():
    _, patched = pair("DeepSeek-V3")
    block = next(iter(structure.latent_attentions(patched, "mla_decode").values()))
    with pytest.raises(PatchError, match="expected the cache by its name, got it by position"):
        block(torch.ones(1, 1, 32), None, None, cache_of(patched, "dynamic"))
    from flashmla_hf.hf.forward import attention_forward

    with pytest.raises(ValueError, match=r"flashmla in Linear: value: expected a torch.Tensor, got None"):
        attention_forward(torch.nn.Linear(1, 1), torch.ones(1, 2, 1, 8), torch.ones(1, 1, 1, 8), None)
