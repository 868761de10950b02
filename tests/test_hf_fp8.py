"""``attn_implementation="flashmla_fp8"`` and ``Fp8Cache`` in Transformers, each against plain code that rounds the same numbers."""

import copy
import pickle
import re

import pytest
import torch
import transformers
from counting import counted_calls
from fp8_cases import E4M3
from hf_support import DEVICE, build_causal_lm, close, needs_kernel, random_ids
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface

import flashmla_hf
from flashmla_hf.fp8.quantization import quantize, quantize_tokens, rotate
from flashmla_hf.hf import fp8_layers

pytestmark = [
    pytest.mark.usefixtures("recompile_limit_is_put_back"),
    needs_kernel, pytest.mark.skipif(DEVICE.type != "cpu", reason="compares with the CPU's exact probabilities"),
    pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning"),
]  # fmt: skip
FAMILIES = {
    "Llama": {}, "Mistral": {"sliding_window": 24}, "Gemma2": {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16},
    "GptOss": {"head_dim": 16, "sliding_window": 24, "num_local_experts": 2, "num_experts_per_tok": 1},
}  # fmt: skip
each_family = pytest.mark.parametrize("family", FAMILIES)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def rounding_eager(module, query, key, value, attention_mask, scaling, dropout=0.0, softcap=None, s_aux=None, **kwargs):
    """Eager attention of q, k and v that went to fp8 and back. [batch, heads, seqlen, dim] with eager's mask."""
    q, k = (rotate(x.transpose(1, 2), is_key) for x, is_key in ((query, False), (key, True)))
    q, k, v = (
        _StraightThrough.apply(x, quantize(x).dequantize()).transpose(1, 2) for x in (q, k, value.transpose(1, 2))
    )
    k, v = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (k, v))
    scores = q @ k.mT * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    if s_aux is not None:
        scores = torch.cat([scores, s_aux[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    weights = scores.softmax(-1)
    weights = weights if s_aux is None else weights[..., :-1]
    return (weights @ v).transpose(1, 2).contiguous(), None


def assert_same_rounding(got, expected, exact, name=""):
    """got differs from exact as expected does. A last bit of fp32 before a rounding to 3 bits moves single numbers by a step of
    those, and layers pass it on, so norms are compared, not the largest difference."""
    step, error = (expected - exact).norm(), (got - expected).norm()
    assert error <= 0.2 * step, f"{name}: {error:.3e} off, where rounding makes {step:.3e}"


AttentionInterface.register("rounding_eager", rounding_eager)
AttentionMaskInterface.register("rounding_eager", eager_mask)


def ours_and_rounding(family, ours="flashmla_fp8"):
    model = build_causal_lm(ours, family, **FAMILIES[family])
    if family == "GptOss":
        type(model)._compatible_flash_implementations = None
    return model, build_causal_lm("rounding_eager" if ours == "flashmla_fp8" else "eager", family, **FAMILIES[family])


@each_family
def test_a_model_in_fp8_is_eager_attention_of_rounded_numbers(family):
    model, rounding = ours_and_rounding(family)
    ids = random_ids(2, 150)
    with counted_calls() as calls:
        got = model(ids, labels=ids, use_cache=False)
        got.loss.backward()
    assert calls == {"fp8 cpu": 2}
    expected = rounding(ids, labels=ids, use_cache=False)
    expected.loss.backward()
    plain = build_causal_lm("flashmla", family, **FAMILIES[family])
    exact = plain(ids, labels=ids, use_cache=False)
    exact.loss.backward()
    assert_same_rounding(got.logits, expected.logits, exact.logits, "logits")
    for (name, p), other, third in zip(
        model.named_parameters(), rounding.parameters(), plain.parameters(), strict=True
    ):
        if other.grad is not None:
            assert_same_rounding(p.grad, other.grad, third.grad, name)
    assert (got.logits - exact.logits).norm() < 0.5 * exact.logits.norm()


def test_packed_rows_and_padding_are_those_of_flashmla():
    """A packed row is its documents alone; padding on the left changes nothing for the real tokens."""
    model = build_causal_lm("flashmla_fp8")
    ids = random_ids(1, 70)
    positions = torch.cat([torch.arange(40), torch.arange(30)])[None]
    alone = [model(ids[:, a:b], use_cache=False).logits for a, b in ((0, 40), (40, 70))]
    packed = model(ids, position_ids=positions, use_cache=False).logits
    assert close(packed, torch.cat(alone, 1))
    padded = torch.nn.functional.pad(ids[:, :40], (6, 0))
    mask = torch.ones_like(padded)
    mask[:, :6] = 0
    with counted_calls() as calls:
        logits = model(
            padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False
        ).logits
    assert calls == {"fp8 cpu": 2}
    assert close(logits[:, 6:], alone[0])


def test_every_step_of_generate_is_in_fp8():
    model = build_causal_lm("flashmla_fp8")
    ids = random_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with counted_calls() as calls:
        model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert calls == {"fp8 cpu": 2 * 8}


def test_continuous_batching_is_in_fp8():
    model = build_causal_lm("flashmla_fp8")
    config = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    with counted_calls() as calls:
        outputs = model.generate_batch(
            [random_ids(9).tolist(), random_ids(5, seed=1).tolist()], generation_config=config
        )
    assert len(outputs) == 2
    assert set(calls) == {"fp8 cpu"}


# ---- What fp8 does not cover -----------------------------------------------------------------------------------------


def test_what_fp8_does_not_cover_raises_in_words():
    model = build_causal_lm("flashmla_fp8")
    ids = random_ids(1, 20)
    holes = torch.ones_like(ids)
    holes[0, 5] = 0
    custom = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril(3)
    for options, got in (
        ({"output_attentions": True}, "output_attentions=True"), ({"attention_mask": holes}, "a mask that is not one of padding"),
        ({"attention_mask": custom}, "a mask that is not one of padding"),
    ):  # fmt: skip
        message = f"expected a call that fp8 covers, got {got}"
        with pytest.raises(NotImplementedError, match=re.escape(message)):
            model(ids, use_cache=False, **options)
    dropping = build_causal_lm("flashmla_fp8", attention_dropout=0.1).train()
    with pytest.raises(NotImplementedError, match=r'got a dropout of 0\.1\. Use attn_implementation="flashmla"'):
        dropping(ids, use_cache=False)


def test_models_on_transformers_flash_path_are_refused():
    config = transformers.FalconConfig(vocab_size=96, hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(ValueError, match="which calls Transformers' flash path"):
        transformers.FalconForCausalLM._from_config(config, attn_implementation="flashmla_fp8")
    model = transformers.FalconForCausalLM._from_config(config, attn_implementation="flashmla")
    model.set_attn_implementation("flashmla_fp8")  # Transformers says that it changes nothing
    assert model.config._attn_implementation == "flashmla"


def test_check_says_what_fp8_is():
    model = build_causal_lm("flashmla_fp8", attention_dropout=0.1)
    report = flashmla_hf.check(model)
    assert report
    assert "in fp8, which is not exact; on a GPU that is not a Hopper the call raises" in str(report)
    assert "in training its dropout of 0.1 raises" in str(report)
    t5 = transformers.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    report = flashmla_hf.check(transformers.T5EncoderModel._from_config(t5, attn_implementation="flashmla_fp8"))
    assert not report
    assert "which takes no position_bias" in str(report)


# ---- Fp8Cache --------------------------------------------------------------------------------------------------------


class RoundingLayer(DynamicLayer):
    """Transformers' own cache, of numbers that went to fp8 and back; the first tokens are handed on as they came."""

    def update(self, key_states, value_states, *args, **kwargs):
        was_empty = self.get_seq_length() == 0
        keys, values = (
            (data.float() * scale[..., None]).to(x.dtype)
            for x, (data, scale) in ((x, quantize_tokens(x)) for x in (key_states, value_states))
        )
        kept = super().update(keys, values)
        return (key_states, value_states) if was_empty else kept


def rounding_cache():
    return Cache(layer_class_to_replicate=RoundingLayer)


@each_family
def test_generate_reads_the_cache_of_rounded_numbers(family):
    model, eager = ours_and_rounding(family, "flashmla")
    ids = random_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    options = {
        "attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    with counted_calls() as calls:
        got = model.generate(ids, past_key_values=flashmla_hf.Fp8Cache(), **options)
    assert calls == {"cpu": 2, "fp8 cpu": 2 * 11}
    expected = eager.generate(ids, past_key_values=rounding_cache(), **options)
    assert torch.equal(got.sequences, expected.sequences)
    longer = torch.nn.functional.pad(mask, (0, 11), value=1)
    exact = eager.generate(got.sequences[:, :-1], **options | {"attention_mask": longer, "max_new_tokens": 1})
    assert close(got.logits[0], expected.logits[0])
    assert_same_rounding(got.logits[-1], expected.logits[-1], exact.logits[0])


def test_beams_and_assisted_decoding():
    model, eager = build_causal_lm("flashmla"), build_causal_lm("eager")
    ids = random_ids(2, 30)
    options = {"max_new_tokens": 10, "do_sample": False}
    beams = model.generate(ids, past_key_values=flashmla_hf.Fp8Cache(), num_beams=3, **options)
    assert torch.equal(beams, eager.generate(ids, past_key_values=rounding_cache(), num_beams=3, **options))
    text = torch.cat([ids[:1], ids[:1]], 1)
    plain = model.generate(text, past_key_values=flashmla_hf.Fp8Cache(), **options)
    assert torch.equal(plain, eager.generate(text, past_key_values=rounding_cache(), **options))
    cropped = model.generate(text, past_key_values=flashmla_hf.Fp8Cache(), prompt_lookup_num_tokens=3, **options)
    assert torch.equal(plain, cropped)


@torch.no_grad()
def test_a_long_second_prompt_reads_the_cache():
    model, eager = build_causal_lm("flashmla"), build_causal_lm("eager")
    ids = random_ids(1, 300)
    logits = []
    for m, cache in ((model, flashmla_hf.Fp8Cache()), (eager, rounding_cache())):
        m(ids[:, :120], past_key_values=cache)
        logits.append(m(ids[:, 120:], past_key_values=cache).logits)
        assert cache.get_seq_length() == 300
    assert close(*logits)


@torch.no_grad()
def test_crop_forgets_and_reset_empties():
    model = build_causal_lm("flashmla")
    ids = random_ids(1, 50)
    cache, straight = flashmla_hf.Fp8Cache(), flashmla_hf.Fp8Cache()
    model(ids[:, :20], past_key_values=cache)
    model(random_ids(1, 30, seed=9), past_key_values=cache)
    cache.crop(-30)
    assert cache.get_seq_length() == 20
    got = model(ids[:, 20:], past_key_values=cache).logits
    model(ids[:, :20], past_key_values=straight)
    assert torch.equal(got, model(ids[:, 20:], past_key_values=straight).logits)
    with pytest.raises(ValueError, match="tokens_to_remove: expected a negative number"):
        cache.crop(10)
    cache.reset()
    assert cache.get_seq_length() == 0
    model(random_ids(3, 20), past_key_values=cache)


def bytes_of(cache):
    names = [n for n in ("keys", "values", "key_scales", "value_scales") if hasattr(cache.layers[0], n)]
    return sum(getattr(layer, name).untyped_storage().nbytes() for layer in cache.layers for name in names)


@torch.no_grad()
def test_the_cache_takes_half_the_memory():
    options = {"head_dim": 128}
    model = build_causal_lm("flashmla", **options).to(torch.bfloat16)
    caches = flashmla_hf.Fp8Cache(), transformers.DynamicCache()
    ids = random_ids(2, 2 * fp8_layers.GROWTH - 3)
    for cache in caches:
        model(ids, past_key_values=cache)
        for token in random_ids(3, 2, 1):
            model(token, past_key_values=cache)

    ours, theirs = map(bytes_of, caches)
    assert ours == (0.5 + 4 / 256) * theirs  # a scale of 4 bytes for 128 numbers of 2
    assert caches[0].layers[0].keys.dtype == E4M3


of_each_kind = pytest.mark.parametrize(
    "new_cache",
    [lambda model: flashmla_hf.Fp8Cache(), lambda model: flashmla_hf.Fp8Cache(model.config, max_cache_len=51)],
    ids=["growing", "static"],
)


@torch.no_grad()
@of_each_kind
def test_the_batch_of_a_cache_can_be_repeated_and_selected(new_cache):
    model, ids = build_causal_lm("flashmla"), random_ids(2, 20)
    cache, swapped = new_cache(model), new_cache(model)
    model(ids, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    model(ids.flip(0), past_key_values=swapped)
    token = random_ids(2, 1, seed=4)
    assert torch.equal(model(token, past_key_values=cache).logits, model(token, past_key_values=swapped).logits)


@torch.no_grad()
@of_each_kind
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_of_a_cache_goes_on_as_it_would(copied, new_cache):
    model, ids = build_causal_lm("flashmla"), random_ids(2, 12)
    cache = new_cache(model)
    model(ids[:, :8], past_key_values=cache)
    other = copied(cache)
    got = model(ids[:, 8:], past_key_values=other).logits
    assert cache.get_seq_length() == 8
    assert torch.equal(got, model(ids[:, 8:], past_key_values=cache).logits)


@torch.no_grad()
@pytest.mark.parametrize(("first", "second"), [(3, 1), (1, 3)])
@pytest.mark.parametrize("is_cropped", [False, True])
def test_rows_of_another_batch_are_refused_before_anything_is_written(first, second, is_cropped):
    model, ids = build_causal_lm("flashmla"), random_ids(3, 12)
    cache = flashmla_hf.Fp8Cache()
    model(ids[:first, :8], past_key_values=cache)
    cache.crop(-8 if is_cropped else 0)
    with pytest.raises(ValueError, match=rf"Fp8Cache: keys: expected shape \[{first}, .*, got \[{second}, "):
        model(ids[:second, 8:], past_key_values=cache)
    assert cache.get_seq_length() == (0 if is_cropped else 8)


@pytest.mark.parametrize(
    ("implementation", "operation"), [("eager", "indexing"), ("sdpa", "scaled_dot_product_attention")]
)
def test_another_attention_cannot_read_the_cache(implementation, operation):
    model, cache = build_causal_lm(implementation), flashmla_hf.Fp8Cache()
    message = rf'Fp8Cache: its keys and values are in fp8, and {operation} was called on them: .* Load the model with attn_implementation="flashmla"'
    with pytest.raises(RuntimeError, match=message):
        model.generate(random_ids(1, 9), past_key_values=cache, max_new_tokens=3)


def test_what_the_cache_does_not_cover_raises_in_words():
    model, ids = build_causal_lm("flashmla"), random_ids(1, 20)

    def read(**options):
        cache = flashmla_hf.Fp8Cache()
        with torch.no_grad():
            model(ids, past_key_values=cache)
            model(ids, past_key_values=cache, **options)

    holes = torch.ones(1, 40, dtype=torch.long)
    holes[0, 5] = 0
    for options, got in (
        ({"output_attentions": True}, "output_attentions=True"),
        ({"attention_mask": holes}, "a mask that is not"),
    ):
        with pytest.raises(
            NotImplementedError, match=f"Fp8Cache in LlamaAttention: expected a call that fp8 covers, got {got}"
        ):
            read(**options)
    cache = flashmla_hf.Fp8Cache()
    model(ids, past_key_values=cache)
    with pytest.raises(RuntimeError, match="expected keys and values that require no gradient"):
        model(ids, past_key_values=cache)
    for access in (cache.update_conv_state, cache.get_conv_state):
        with pytest.raises(NotImplementedError, match="one with convolutional states"):
            access(ids, 0)


@pytest.mark.parametrize("through", ["the prompt", "the step"])
def test_gradients_through_the_cache_raise_also_if_queries_have_none(through):
    """A frozen model and a prompt that is learned, or a step whose keys and values alone have a gradient."""
    model, ids = build_causal_lm("flashmla").requires_grad_(False), random_ids(1, 6)
    cache, embedded = flashmla_hf.Fp8Cache(), model.get_input_embeddings()(ids).detach()
    model(inputs_embeds=embedded.clone().requires_grad_(through == "the prompt"), past_key_values=cache)
    with torch.no_grad():
        model(ids[:, :2], past_key_values=cache)  # reading without gradients stays possible
    if through == "the step":
        model.model.layers[0].self_attn.v_proj.requires_grad_(True)
    with pytest.raises(RuntimeError, match="expected keys and values that require no gradient"):
        model(ids[:, :2], past_key_values=cache)


def test_the_cache_reads_padded_rows_in_chunks_and_padding_at_the_end():
    """A row that has no key yet, and a step whose last token is padding, are no holes."""
    model, ids = build_causal_lm("flashmla"), random_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :8] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    whole = model.generate(ids, past_key_values=flashmla_hf.Fp8Cache(), **settings)
    chunks = model.generate(ids, past_key_values=flashmla_hf.Fp8Cache(), prefill_chunk_size=5, **settings)
    assert chunks.shape == whole.shape
    cache = flashmla_hf.Fp8Cache()
    trailing = torch.cat((mask, torch.tensor([[1, 1], [1, 0]])), 1)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        padded = model(ids[:, :2], attention_mask=trailing, past_key_values=cache).logits[1, 0]
        alone = flashmla_hf.Fp8Cache()
        model(ids[1:], past_key_values=alone)
        expected = model(ids[1:, :1], past_key_values=alone).logits[0, 0]
    torch.testing.assert_close(padded, expected, rtol=1e-4, atol=1e-4)


def test_encoder_decoder_models_take_it():
    config = transformers.BartConfig(
        vocab_size=96, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=2, forced_eos_token_id=None, init_std=0.5,
    )  # fmt: skip
    tokens = []
    for implementation, cache in (("flashmla", flashmla_hf.Fp8Cache()), ("eager", rounding_cache())):
        torch.manual_seed(0)
        model = transformers.BartForConditionalGeneration._from_config(
            config, attn_implementation=implementation
        ).eval()
        cache = transformers.EncoderDecoderCache(cache, transformers.DynamicCache())
        tokens.append(
            model.generate(random_ids(2, 12), past_key_values=cache, max_new_tokens=8, do_sample=False, num_beams=1)
        )
    assert torch.equal(*tokens)
