"""``Fp8Cache``, growing, and what both kinds of it do, against Transformers' own cache of numbers that went to fp8 and back."""

import copy
import pickle

import pytest
import torch
import transformers
from counting import counted_calls
from fp8_cases import E4M3
from hf_support import DEVICE, build_causal_lm, close, needs_kernel, random_ids
from test_hf_fp8 import assert_same_rounding, each_family, ours_and_rounding
from transformers.cache_utils import Cache, DynamicLayer

import flashmla_hf
from flashmla_hf.fp8.quantization import quantize_tokens
from flashmla_hf.hf import fp8_layers

pytestmark = [
    pytest.mark.usefixtures("recompile_limit_is_put_back"),
    needs_kernel, pytest.mark.skipif(DEVICE.type != "cpu", reason="compares with the CPU's exact probabilities"),
    pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning"),
]  # fmt: skip


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


def assert_crop_forgets(model, cache, straight, ids):
    """``cache`` holds the first 20 of ids [1, 50], ``straight`` none: 30 others are forgotten by crop."""
    model(random_ids(1, 30, seed=9), past_key_values=cache)
    cache.crop(-30)
    assert cache.get_seq_length() == 20
    got = model(ids[:, 20:], past_key_values=cache).logits
    model(ids[:, :20], past_key_values=straight)
    assert torch.equal(got, model(ids[:, 20:], past_key_values=straight).logits)
    with pytest.raises(ValueError, match="tokens_to_remove: expected a negative number"):
        cache.crop(10)


@torch.no_grad()
def test_crop_forgets_and_reset_empties():
    model = build_causal_lm("flashmla")
    ids = random_ids(1, 50)
    cache, straight = flashmla_hf.Fp8Cache(), flashmla_hf.Fp8Cache()
    model(ids[:, :20], past_key_values=cache)
    assert_crop_forgets(model, cache, straight, ids)
    cache.reset()
    assert cache.get_seq_length() == 0
    model(random_ids(3, 20), past_key_values=cache)


def bytes_of(cache):
    is_fp8 = isinstance(cache, flashmla_hf.Fp8Cache)
    names = ("key_data", "value_data", "key_scales", "value_scales") if is_fp8 else ("keys", "values")
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
    assert caches[0].layers[0].key_data.dtype == E4M3


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
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_of_a_static_cache_says_that_its_addresses_stay(copied):
    """Otherwise CUDA graphs of torch.compile skip the step that writes to it."""
    model, ids = build_causal_lm("flashmla"), random_ids(2, 12)
    cache = flashmla_hf.Fp8Cache(model.config, max_cache_len=20)
    model(ids, past_key_values=cache)
    for c in (cache, copied(cache)):
        for layer in c.layers:
            assert all(hasattr(getattr(layer, name), "_dynamo_static_input_type") for name in layer._buffers())


@of_each_kind
def test_a_cache_of_inference_mode_is_written_outside_of_it(new_cache):
    """generate() computes under no_grad(). Copies that inference mode made, and what it reordered, too."""
    model, ids = build_causal_lm("flashmla"), random_ids(2, 40)
    options = {"max_new_tokens": 6, "do_sample": False}
    caches = [new_cache(model) for _ in range(3)]
    with torch.inference_mode():
        for cache in caches:
            model(ids[:, :20], past_key_values=cache)
            model(ids[:, 20:30], past_key_values=cache)
            cache.reorder_cache(torch.tensor([1, 0]))
            cache.batch_select_indices(torch.tensor([1, 0]))
            cache.crop(-10)
        caches[1] = copy.deepcopy(caches[1])
        caches[2] = pickle.loads(pickle.dumps(caches[2]))
    for cache in caches:
        straight = new_cache(model)
        with torch.no_grad():
            model(ids[:, :20], past_key_values=straight)
        expected = model.generate(ids, past_key_values=straight, **options)
        assert torch.equal(model.generate(ids, past_key_values=cache, **options), expected)
        cache.reset()
        assert torch.equal(
            model.generate(ids, past_key_values=cache, **options),
            model.generate(ids, past_key_values=new_cache(model), **options),
        )


def left_uneven(new_cache):
    """A model, ids [2, 30], and a cache of the first 20 whose first layer has three more."""
    model, ids = build_causal_lm("flashmla"), random_ids(2, 30)
    cache = new_cache(model)
    model(ids[:, :20], past_key_values=cache)
    with pytest.raises(NotImplementedError, match="output_attentions=True"):
        model(ids[:, 20:23], past_key_values=cache, output_attentions=True)
    return model, ids, cache


@torch.no_grad()
@of_each_kind
def test_a_cache_that_an_exception_left_uneven_is_refused_until_it_is_emptied(new_cache):
    """The layers in front of the exception have its tokens, those behind it have not: positions and masks are those of the first."""
    model, ids, cache = left_uneven(new_cache)
    for tokens in (23, 24):
        message = f"layer 1: expected {tokens + 1} tokens with the 1 that come, as the layer before it has, got 21. .* reset\\("
        with pytest.raises(RuntimeError, match=message):
            model(ids[:, :1], past_key_values=cache)
    cache.reset()
    fresh = new_cache(model)
    for c in (cache, fresh):
        model(ids, past_key_values=c)
    token = random_ids(2, 1, seed=4)
    assert torch.equal(model(token, past_key_values=cache).logits, model(token, past_key_values=fresh).logits)


@torch.no_grad()
@of_each_kind
def test_an_uneven_cache_is_refused_also_where_nobody_asks_for_its_length(new_cache):
    """With positions and a mask of their own models ask no cache, so that only the layers say where a pass begins."""
    model, ids, cache = left_uneven(new_cache)
    rows = 24 if cache.get_max_length() < 0 else 51
    given = {"position_ids": torch.tensor([[23]]), "attention_mask": torch.ones(2, 1, 1, rows, dtype=torch.bool)}
    with pytest.raises(RuntimeError, match="layer 1: expected 24 tokens"):
        model(ids[:, 23:24], past_key_values=cache, **given)


@torch.no_grad()
@of_each_kind
def test_crop_takes_whole_numbers_of_tokens(new_cache):
    """A float would be a length that no tensor has."""
    model, ids = build_causal_lm("flashmla"), random_ids(2, 12)
    cache = new_cache(model)
    model(ids, past_key_values=cache)
    for wrong in (-1.0, None, "3"):
        with pytest.raises(
            TypeError, match=r"Fp8Cache.crop: tokens_to_remove: expected a negative number .*, an int, got"
        ):
            cache.crop(wrong)
    cache.crop(torch.tensor(-4))
    lengths = [layer.get_seq_length() for layer in cache.layers]
    assert lengths == [8, 8]
    assert all(type(length) is int for length in lengths)


@torch.no_grad()
@of_each_kind
def test_what_a_model_reads_of_a_layer_itself_is_no_bits(new_cache):
    """Loops over layers do (Dory), which would compute with e4m3 numbers without their scales."""
    model, ids = build_causal_lm("flashmla"), random_ids(2, 12)
    cache = new_cache(model)
    assert [layer.keys for layer in cache.layers] == [None] * len(cache.layers)
    model(ids, past_key_values=cache)
    for rows in (cache.layers[1].keys, cache.layers[1].values):
        assert isinstance(rows, fp8_layers.Fp8Rows)
        assert (rows.dtype, rows.shape[2]) == (torch.float32, 12 if cache.get_max_length() < 0 else 51)
        assert rows.numel() == rows.shape.numel()  # models ask whether there are any (Mllama)
        with pytest.raises(RuntimeError, match="Fp8Cache: its keys and values are in fp8, and cat was called on them"):
            torch.cat([rows, torch.zeros(2, 2, 1, 16)], dim=-2)


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
    for access, kind in (
        (cache.update_conv_state, "convolutional"),
        (cache.get_conv_state, "convolutional"),
        (cache.update_indexer, "indexer's"),
    ):
        with pytest.raises(NotImplementedError, match=f"one with {kind} states. Use DynamicCache"):
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


@torch.no_grad()
@of_each_kind
def test_under_autocast_a_step_has_its_dtype(new_cache):
    """As with any other cache: rotary embeddings leave queries in float32, which the kernel of a GPU does not read."""
    model, ids = build_causal_lm("flashmla"), random_ids(2, 30)
    caches, dtypes = (new_cache(model), transformers.DynamicCache()), []
    layer = model.model.layers[0].self_attn.o_proj
    layer.register_forward_pre_hook(lambda module, args: dtypes.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits = [[model(part, past_key_values=c).logits for part in (ids[:, :20], ids[:, 20:])][1] for c in caches]
    assert dtypes == [torch.bfloat16] * 4
    exact = build_causal_lm("eager")(ids).logits[:, 20:]
    ours, theirs = ((x - exact).norm() for x in logits)
    assert ours < 0.3 * exact.norm(), (ours, theirs)


@torch.no_grad()
@of_each_kind
def test_boundaries_of_packed_sequences_are_refused_by_a_pass_that_reads_the_cache(new_cache):
    """A cached row is one sequence here."""
    model, ids = build_causal_lm("flashmla"), random_ids(1, 30)
    bounds = [torch.tensor(x, dtype=torch.int32) for x in ([0, 4, 10], [0, 12, 30])]
    both = {"cu_seq_lens_q": bounds[0], "cu_seq_lens_k": bounds[1], "max_length_q": 6, "max_length_k": 18}
    for given in (both, {"cu_seq_lens_q": bounds[0]}, {"cu_seq_lens_k": bounds[1]}):
        cache = new_cache(model)
        model(ids[:, :20], past_key_values=cache)
        with pytest.raises(
            NotImplementedError, match=r"Fp8Cache in LlamaAttention: .* got cu_seq_lens_q .* Use DynamicC"
        ):
            model(ids[:, 20:], past_key_values=cache, **given)


@torch.no_grad()
def test_a_graph_that_meets_an_uneven_growing_cache_raises():
    """It is a graph for each length, and compares the layers as Python does."""
    model, ids, cache = build_causal_lm("flashmla"), random_ids(2, 30), flashmla_hf.Fp8Cache()
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend="eager")
    model(ids[:, :20], past_key_values=cache)
    compiled(input_ids=ids[:, 20:21], past_key_values=cache)
    with pytest.raises(NotImplementedError, match="output_attentions=True"):
        model(ids[:, 21:23], past_key_values=cache, output_attentions=True)
    with pytest.raises(RuntimeError, match=r"layer 1: expected 24 tokens with the 1 that come, .* got 22"):
        compiled(input_ids=ids[:, 23:24], past_key_values=cache)
