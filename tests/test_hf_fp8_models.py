"""``Fp8Cache`` in models that ask more of a cache than to append keys and values: cross-attention, shared keys, other states."""

import pytest
import torch
import transformers
from hf_support import DEVICE, build_causal_lm, close, needs_kernel, random_ids
from test_hf_fp8_cache import of_each_kind, rounding_cache

import flashmla_hf

pytestmark = [
    needs_kernel, pytest.mark.skipif(DEVICE.type != "cpu", reason="compares with the CPU's exact probabilities"),
    pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning"),
]  # fmt: skip


def bart(implementation, decoder_layers=2):
    config = transformers.BartConfig(
        vocab_size=96, d_model=32, encoder_layers=1, decoder_layers=decoder_layers, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=2, forced_eos_token_id=None, init_std=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.BartForConditionalGeneration._from_config(config, attn_implementation=implementation).eval()


@pytest.mark.parametrize("crosses_in_fp8", [False, True])
@pytest.mark.parametrize("kind", ["growing", "static"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["", "beams"])
@pytest.mark.parametrize("layers", [1, 2])
def test_encoder_decoder_models_take_it(kind, crosses_in_fp8, options, layers):
    """The encoder's keys and values may be in fp8, too: a decoder reads them from their layers."""
    model, eager, ids = bart("flashmla", layers), bart("eager", layers), random_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0

    def new(room):
        return flashmla_hf.Fp8Cache(model.config, max_cache_len=room) if kind == "static" else flashmla_hf.Fp8Cache()

    crosses = (
        (new(12), rounding_cache()) if crosses_in_fp8 else (transformers.DynamicCache(), transformers.DynamicCache())
    )
    settings = {
        "attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True,
    } | options  # fmt: skip
    got, expected = (
        m.generate(ids, past_key_values=transformers.EncoderDecoderCache(cache, cross), **settings)
        for m, cache, cross in zip((model, eager), (new(9), rounding_cache()), crosses, strict=True)
    )
    assert torch.equal(got.sequences, expected.sequences)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        assert close(ours, theirs)


@of_each_kind
@pytest.mark.parametrize("layers", [1, 2])
def test_encoder_decoder_models_are_told_which_cache_they_take(new_cache, layers):
    """Of one cache alone they write both attentions' keys into one layer. Others ask it for its parts."""
    model = bart("flashmla", layers)
    cache, way_out = new_cache(model), r"takes transformers.EncoderDecoderCache\(Fp8Cache\(\), DynamicCache\(\)\)"
    message = rf"Fp8Cache in BartAttention: expected a cache of its own for cross-attention, .* {way_out}"
    for given in (cache, transformers.EncoderDecoderCache(both := new_cache(model), both)):
        with pytest.raises(RuntimeError, match=message):
            model.generate(random_ids(2, 12), past_key_values=given, max_new_tokens=8)
    if layers > 1:  # a configuration that does not say it
        unsaid = bart("flashmla", layers)
        unsaid.model.decoder.config.is_encoder_decoder = False
        for attention in (layer.encoder_attn for layer in unsaid.model.decoder.layers):
            attention.config = unsaid.model.decoder.config
        with torch.no_grad(), pytest.raises(RuntimeError, match=rf"layer 1: expected 15 tokens .* {way_out}"):
            unsaid(random_ids(2, 12), decoder_input_ids=random_ids(2, 3), past_key_values=new_cache(model))
    for name in ("self_attention_cache", "cross_attention_cache", "is_updated"):
        assert not hasattr(cache, name)
        with pytest.raises(AttributeError, match=way_out):
            getattr(cache, name)


def test_a_cache_is_made_of_a_configuration_and_a_length_alone():
    """T5Gemma makes the cache of its cross-attention by the class that it is given, and the arguments of DynamicCache."""
    with pytest.raises(
        TypeError, match=r"got offloading\. .* takes transformers\.EncoderDecoderCache\(Fp8Cache\(\), Dyn"
    ):
        flashmla_hf.Fp8Cache(config=transformers.LlamaConfig(), offloading=False)


@torch.no_grad()
@of_each_kind
def test_what_a_model_asks_of_a_layer_beyond_keys_and_values_raises_in_words(new_cache):
    """DeepSeek V4 keeps compressed keys there. Transformers asks whether there is such an attribute, and must be told no."""
    model = build_causal_lm("flashmla")
    cache = new_cache(model)
    model(random_ids(1, 4), past_key_values=cache)
    assert not any(hasattr(cache.layers[1], name) for name in ("activate_past_recording", "store_compression_weights"))
    with pytest.raises(AttributeError, match=r"Fp8Cache: its layers hold keys and values alone, .* Use DynamicCache\("):
        cache.layers[1].store_compression_weights("compressor")


@torch.no_grad()
@of_each_kind
def test_keys_that_layers_share_move_to_another_device(new_cache):
    """Of a model on several devices that shares keys and values among layers (Gemma 4)."""
    model, ids = build_causal_lm("flashmla"), random_ids(2, 12)
    cache = new_cache(model)
    model(ids, past_key_values=cache)
    rows = cache.layers[0].keys
    there = rows.to(torch.device("meta"), non_blocking=True)
    assert (there.device.type, there.shape, there.dtype, rows.device.type) == ("meta", rows.shape, rows.dtype, "cpu")
    assert there.scale.device.type == "meta"
    assert there.lengths is None if rows.lengths is None else there.lengths.device.type == "meta"
    same = rows.to("cpu")
    assert torch.equal(same.e4m3.view(torch.uint8), rows.e4m3.view(torch.uint8))
    for wrong in (
        lambda: rows.to(torch.float16),
        lambda: rows.to(dtype=torch.float16),
        lambda: rows.to("cpu", torch.half),
    ):
        with pytest.raises(RuntimeError, match="and to was called on them"):
            wrong()


@torch.no_grad()
def test_a_window_that_no_mask_says_is_refused_once_it_hides_a_key():
    """Moshi's masks are causal alone: Transformers' sliding caches drop the rows that its window hides. An Fp8Cache drops none."""
    config = transformers.MoshiConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, ffn_dim=96,
        sliding_window=12, max_position_embeddings=64, num_codebooks=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MoshiForCausalLM._from_config(config, attn_implementation="flashmla").eval()
    ids, last, exact = random_ids(2, 14), [], []
    cache, dropping = flashmla_hf.Fp8Cache(), transformers.DynamicCache(config=config)
    for begin, end in ((0, 10), (10, 11), (11, 12)):
        for c, logits in ((cache, last), (dropping, exact)):
            logits.append(model(ids[:, begin:end], past_key_values=c).logits)
    for ours, theirs in zip(last, exact, strict=True):
        assert (ours - theirs).norm() < 0.1 * theirs.norm()
    with pytest.raises(
        NotImplementedError, match=r"sliding window of 12 tokens, got 13 keys .* Use DynamicCache\(config="
    ):
        model(ids[:, 12:13], past_key_values=cache)


def mllama(implementation):
    text = {
        "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 96, "cross_attention_layers": [1], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
        "max_position_embeddings": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 4, "intermediate_size": 48,
        "vision_output_dim": 64, "image_size": 16, "patch_size": 8, "max_num_tiles": 2, "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.MllamaConfig(text_config=text, vision_config=vision, image_token_index=95)
    model = transformers.MllamaForConditionalGeneration._from_config(config, attn_implementation=implementation)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name:  # of the cross-attention, closed by the initialisation
                parameter.fill_(1.0)
            elif parameter.dim() >= 2:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def images_and_text():
    """Two rows of one image each, of two tiles and of one."""
    ids = random_ids(2, 9)
    ids[:, 0] = 95
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "aspect_ratio_ids": torch.tensor([[2], [1]]),
        "pixel_values": torch.randn(2, 1, 2, 3, 16, 16, generator=torch.Generator().manual_seed(3)),
        "aspect_ratio_mask": torch.tensor([[[1, 1]], [[1, 0]]]),
        "cross_attention_mask": torch.tensor([[1, 1], [1, 0]]).view(2, 1, 1, 2).repeat(1, 9, 1, 1),
    }  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["", "beams"])
def test_layers_of_cross_attention_among_the_others_cache_what_they_see(options):
    """Mllama's hold the keys of images, of another number, and mask them by a floating mask of one query."""
    given = images_and_text() | {
        "max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    cache = flashmla_hf.Fp8Cache()
    got = mllama("flashmla").generate(**given, **options, past_key_values=cache)
    expected = mllama("eager").generate(**given, **options, past_key_values=rounding_cache())
    assert torch.equal(got.sequences, expected.sequences)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        assert close(ours, theirs)
    assert [layer.get_seq_length() for layer in cache.layers] == [14, 2 * 5, 14]


@torch.no_grad()
def test_the_other_layers_of_such_a_model_hold_the_same_tokens():
    model, given, cache = mllama("flashmla"), images_and_text(), flashmla_hf.Fp8Cache()
    model(**given, past_key_values=cache)
    with pytest.raises(NotImplementedError, match="output_attentions=True"):
        model(given["input_ids"][:, :2], past_key_values=cache, output_attentions=True)
    with pytest.raises(RuntimeError, match=r"layer 2: expected 12 tokens with the 1 that come, .* got 10"):
        model(given["input_ids"][:, :1], past_key_values=cache)
    static = flashmla_hf.Fp8Cache(model.config, max_cache_len=40)
    with pytest.raises(RuntimeError, match=r"layer 1: expected 9 tokens .* got 10\. .* take Fp8Cache\(\), which grows"):
        model(**given, past_key_values=static)


@torch.no_grad()
@of_each_kind
def test_a_floating_mask_of_one_query_is_read_if_it_hides_keys_and_weighs_none(new_cache):
    model, ids = build_causal_lm("flashmla"), random_ids(2, 21)
    visible = torch.ones(2, 1, 1, 21, dtype=torch.bool)
    visible[0, ..., :4] = False
    for value in (torch.finfo(torch.float32).min, -torch.inf, -1.0):
        cache, plain = new_cache(model), new_cache(model)
        for c in (cache, plain):
            model(ids[:, :20], past_key_values=c)
        rows = 21 if cache.get_max_length() < 0 else 51
        hides = torch.nn.functional.pad(visible, (0, rows - 21))
        added = torch.where(hides, 0.0, value)
        if value == -1.0:
            with pytest.raises(NotImplementedError, match="a mask that is not one of padding"):
                model(ids[:, 20:], attention_mask=added, past_key_values=cache)
            continue
        got = model(ids[:, 20:], attention_mask=added, past_key_values=cache).logits
        assert torch.equal(got, model(ids[:, 20:], attention_mask=hides, past_key_values=plain).logits)
    cache = new_cache(model)
    model(ids[:, :20], past_key_values=cache)
    with pytest.raises(NotImplementedError, match="a mask that is not one of padding"):
        model(ids[:, 20:], attention_mask=torch.full_like(added, -torch.inf), past_key_values=cache)


@torch.no_grad()
def test_a_graph_compares_no_layers_of_two_devices():
    """A model on several devices has its cache there, too."""
    cache = flashmla_hf.Fp8Cache(build_causal_lm("flashmla").config, max_cache_len=8)

    def step(here, there):
        return cache.update(here, here, 0)[0].shape, cache.update(there, there, 1)[0].shape

    here, there = torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16, device="meta")
    torch._dynamo.reset()
    step(here, there)
    assert torch.compile(step, backend="eager")(here, there) == ((2, 2, 8, 16),) * 2
