"""Patch "mla_decode": what it restores, and what it refuses by name."""

import copy
import pickle
import re
from pathlib import Path

import families
import hf_support
import mla_families
import pytest
import torch
import transformers
from hf_support import DEVICE, ROWS, SEQLEN, batch_of
from mla_families import (  # fmt: skip
    FAMILY,
    PATCH,
    assert_same_answer,
    cache_of,
    generate,
    pair,
    steps,
)
from patches_support import attributes, message

import flashmla_hf
from flashmla_hf.patches import PatchError, forwards, latent_rows, mla, structure

pytestmark = mla_families.latent_tests


# ---- Patch and unpatch -----------------------------------------------------------------------------------------------


def test_unpatch_restores_every_attribute():
    plain, _ = pair(
        "DeepSeek-V3",
    )
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


def test_it_works_beside_the_patches_of_training():
    plain, _ = pair("DeepSeek-V3")
    patched = families.build(FAMILY["DeepSeek-V3"], "flashmla", DEVICE, plain.state_dict())
    flashmla_hf.patch(patched, ["mlp", "norm", "checkpointing", "mla_decode"], mlp_tile=5)
    assert_same_answer(generate(patched, batch_of(ROWS["padded"])), generate(plain, batch_of(ROWS["padded"])))


# ---- Refusals --------------------------------------------------------------------------------------------------------


def test_sparse_attention_is_refused_by_name():
    seen, everything = set(), ""
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        if "self.kv_b_proj = " in path.read_text():
            everything += path.read_text()
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
    assert seen
    assert seen == {name for name in mla_families.SPARSE if f"class {name}(" in everything}


def test_a_model_without_latents_is_refused_by_name():
    text = message(hf_support.build_causal_lm("flashmla"), PATCH)
    assert "modules: expected attention blocks with kv_a_proj_with_mqa, kv_a_layernorm, kv_b_proj" in text
    assert text.endswith("Exclude it: flashmla_hf.patch(model, exclude=['mla_decode'])")


def test_a_forward_that_caches_expanded_keys_is_refused():
    class Expanded(attention_class()):
        def forward(self, hidden_states, attention_mask=None, cache=None, **kwargs):
            keys, values = cache.update(hidden_states, hidden_states, 0)
            return attention_interface(self, hidden_states, keys, values)  # noqa: F821

    text = message(changed(Expanded), PATCH)
    assert "expected a forward that caches latents and expands them by expand_kv, got one that caches expanded" in text


def test_another_attention_implementation_is_refused():
    text = message(families.build(FAMILY["DeepSeek-V3"], "sdpa", DEVICE), PATCH)
    assert "expected attn_implementation='flashmla' (it reads latents), got 'sdpa'" in text


def test_a_device_without_a_kernel_is_refused(monkeypatch):
    model = families.build(FAMILY["DeepSeek-V3"], "flashmla", DEVICE)
    monkeypatch.setattr(mla.decode, "kernel_refusal", lambda *args, **kwargs: "a reason")
    assert "expected a device with a kernel for latents of 16 of 24 columns, got a reason" in message(model, PATCH)


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


def test_a_bias_is_refused():
    model = families.build(FAMILY["DeepSeek-V3"], "flashmla", DEVICE)
    block = next(iter(structure.latent_attentions(model, "mla_decode").values()))
    block.kv_b_proj = torch.nn.Linear(16, 128)
    assert "expected kv_b_proj without a bias, got one" in message(model, PATCH)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_that_was_filled_without_the_patch_is_refused(kind):
    plain, patched = pair("DeepSeek-V3")
    cache = cache_of(plain, kind)
    steps(plain, cache, (SEQLEN,))
    with pytest.raises(PatchError, match="expected one that holds rows of 24 numbers, got keys of width 16: it was"):
        steps(patched, cache, (1,))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), lambda x: x])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_that_was_filled_under_the_patch_is_refused_after_unpatch(kind, copied):
    """Also a copy of it. The model goes on with a new cache, and with the old one if it is patched again."""
    plain, patched = pair("DeepSeek-V3")
    expected = steps(plain, cache_of(plain, kind), (SEQLEN, 1, 1))[:, -1:]
    cache = cache_of(patched, kind)
    steps(patched, cache, (SEQLEN, 1))
    cache = copied(cache)
    flashmla_hf.unpatch(patched)
    text = "expected the rows of 24 numbers that the patch 'mla_decode' filled it with, got keys of width 16 and values of "
    with pytest.raises(
        PatchError, match=f"flashmla_hf.unpatch: .*{text}width 8 of an unpatched model. Begin with a new cache"
    ):
        steps(patched, cache, (1,))
    mla_families.assert_close(steps(patched, cache_of(patched, kind), (SEQLEN, 1, 1))[:, -1:], expected)


def test_a_cache_that_was_filled_under_the_patch_serves_a_model_that_is_patched_again():
    plain, patched = pair("DeepSeek-V3")
    ids = torch.randint(3, 60, (2, SEQLEN + 2), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    answers = []
    for model in (plain, patched):
        cache = cache_of(model, "dynamic")
        with torch.no_grad():
            model(ids[:, :SEQLEN], use_cache=True, **mla_families.as_argument(model, cache))
            if model is patched:
                flashmla_hf.patch(flashmla_hf.unpatch(model), PATCH)
            answers.append(model(ids[:, SEQLEN:], use_cache=True, **mla_families.as_argument(model, cache)).logits)
    mla_families.assert_close(answers[1], answers[0])


def test_a_cache_that_was_reset_serves_the_unpatched_model():
    plain, patched = pair("DeepSeek-V3")
    cache = cache_of(patched, "dynamic")
    steps(patched, cache, (SEQLEN,))
    cache.reset()
    if cache.layers[0].keys is not None:
        pytest.skip("this release of Transformers keeps the rows of a cache that is reset, as zeros")
    flashmla_hf.unpatch(patched)
    mla_families.assert_close(steps(patched, cache), steps(plain, cache_of(plain, "dynamic")))


def test_marked_layers_are_not_registered_with_transformers():
    """Transformers registers each subclass of a layer that has a _layer_type, and would make caches of ours."""
    from transformers import cache_utils
    from transformers.cache_utils import DynamicLayer

    class OfAType(DynamicLayer):
        _layer_type = "of_a_type"

    cache = transformers.DynamicCache()
    cache.layers.append(OfAType())
    latent_rows.mark(cache, 0)
    assert cache.layers[0].holds_rows
    registered = getattr(cache_utils, "DYNAMIC_LAYER_TYPE_MAPPING", {})
    assert not any(hasattr(cls, "holds_rows") for cls in registered.values())


def test_other_caches_are_refused_by_name():
    from transformers.cache_utils import DynamicLayer
    from transformers.generation.continuous_batching import PagedAttentionCache

    class OfEightBits(DynamicLayer):
        def _quantize(self, x):
            return x

    _, patched = pair("DeepSeek-V3")
    cache = cache_of(patched, "dynamic")
    cache.layers[0] = OfEightBits()
    with pytest.raises(PatchError, match=r"got a OfEightBits\. Use a DynamicCache or a StaticCache"):
        steps(patched, cache)
    with pytest.raises(PatchError, match=r"got a Fp8Cache\. Use a DynamicCache"):
        steps(patched, flashmla_hf.Fp8Cache())
    block = next(iter(structure.latent_attentions(patched, "mla_decode").values()))
    with pytest.raises(PatchError, match="got the cache of continuous batching"):
        vars(block)["_flashmla_latents"].check_cache(PagedAttentionCache.__new__(PagedAttentionCache), 0)


def test_a_cache_by_position_and_missing_values_are_refused():
    _, patched = pair("DeepSeek-V3")
    block = next(iter(structure.latent_attentions(patched, "mla_decode").values()))
    with pytest.raises(PatchError, match="expected the cache by its name, got it by position"):
        block(torch.ones(1, 1, 32), None, None, cache_of(patched, "dynamic"))
    from flashmla_hf.hf.forward import attention_forward

    with pytest.raises(ValueError, match=r"flashmla in Linear: value: expected a torch.Tensor, got None"):
        attention_forward(torch.nn.Linear(1, 1), torch.ones(1, 2, 1, 8), torch.ones(1, 1, 1, 8), None)
