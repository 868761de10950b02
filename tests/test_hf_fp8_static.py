"""A static ``Fp8Cache``: the tokens of the growing one, a compiled step that is one graph for all steps, and its limits."""

import copy
import re

import pytest
import torch
import transformers
from counting import counted_calls
from fp8_cases import E4M3
from hf_support import DEVICE, build_causal_lm, needs_kernel, random_ids
from test_hf_fp8 import FAMILIES, each_family
from test_hf_fp8_cache import assert_crop_forgets, bytes_of
from torch._dynamo.testing import CompileCounterWithBackend

import flashmla_hf
from flashmla_hf.fp8 import cached
from flashmla_hf.fp8.quantization import quantize_tokens
from flashmla_hf.hf import fp8_layers

pytestmark = [
    pytest.mark.usefixtures("recompile_limit_is_put_back"),
    needs_kernel, pytest.mark.skipif(DEVICE.type != "cpu", reason="compares with the CPU's exact probabilities"),
    pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning"),
]  # fmt: skip
PROMPT, NEW = 40, 12
ROOM = PROMPT + NEW - 1  # the last token is not cached


def static(model, room=ROOM):
    return flashmla_hf.Fp8Cache(model.config, max_cache_len=room)


def prompts(rows, padded=False, seed=0):
    ids = random_ids(rows, PROMPT, seed=seed)
    mask = torch.ones_like(ids)
    if padded:
        mask[-1, :9] = 0
    return ids, mask


def generated(model, cache, ids, mask, **options):
    return model.generate(
        ids, attention_mask=mask, past_key_values=cache, do_sample=False, **{"max_new_tokens": NEW} | options
    )


def compiling(backend, fullgraph=True):
    """What makes generate() compile its steps on a CPU, as it does on a GPU by itself."""
    config = transformers.CompileConfig(backend=backend, fullgraph=fullgraph, mode=None)
    config._compile_all_devices = True
    return {"compile_config": config, "disable_compile": False}


def graphs_made():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def forget_graphs():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@each_family
@pytest.mark.parametrize("padded", [False, True])
def test_generate_gives_the_tokens_of_the_growing_cache(family, padded):
    model = build_causal_lm("flashmla", family, **FAMILIES[family])
    ids, mask = prompts(2, padded)
    expected = generated(model, flashmla_hf.Fp8Cache(), ids, mask)
    with counted_calls() as calls:
        got = generated(model, static(model), ids, mask)
    assert calls == {"cpu": 2, "fp8 cpu": 2 * (NEW - 1)}
    assert torch.equal(got, expected)


@pytest.mark.parametrize("heads_kv", [1, 4])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_one_row_of_wide_heads(head_dim, heads_kv):
    model = build_causal_lm("flashmla", head_dim=head_dim).to(torch.bfloat16)
    ids, mask = prompts(1)
    for room in (ROOM, 3 * ROOM):
        assert torch.equal(
            generated(model, static(model, room), ids, mask), generated(model, flashmla_hf.Fp8Cache(), ids, mask)
        )


@each_family
def test_generate_compiles_all_steps_into_one_graph(family):
    """Of full and of padded rows, and of a cache that has been emptied. A sliding StaticCache has two graphs."""
    model = build_causal_lm("flashmla", family, **FAMILIES[family])
    cache, options = static(model), compiling("eager")
    forget_graphs()
    for padded, seed in ((False, 0), (True, 1), (False, 2)):
        ids, mask = prompts(2, padded, seed)
        expected = generated(model, flashmla_hf.Fp8Cache(), ids, mask)
        assert torch.equal(generated(model, cache, ids, mask, **options), expected)
        assert graphs_made() == 1
        assert cache.get_seq_length() == ROOM
        cache.reset()


@torch.no_grad()
def test_a_compiled_forward_pass_of_the_model_does_not_compile_again():
    """Also with steps of several tokens (drafts, chunks), which may be another graph, and a prompt that is compiled."""
    model, counter = build_causal_lm("flashmla", "Mistral", sliding_window=24), CompileCounterWithBackend("aot_eager")
    ids = random_ids(2, 60)
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend=counter, fullgraph=True)
    caches, start = (static(model, 60), flashmla_hf.Fp8Cache()), 0
    for step, graphs in ((30, 1), (1, 2), (1, 2), (1, 2), (5, None), (5, None), (1, None), (1, None)):
        stop = start + step
        given = {"position_ids": torch.arange(start, stop)[None], "use_cache": True}
        expected = model(ids[:, start:stop], past_key_values=caches[1], **given).logits
        got = compiled(input_ids=ids[:, start:stop], past_key_values=caches[0], **given).logits
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        assert graphs is None or counter.frame_count <= graphs
        start = stop
    assert counter.frame_count <= 3
    assert caches[0].get_seq_length() == start


def append_on_a_cpu(addresses):
    """A stand-in for Hopper's kernel of append_to_cache, which notes the addresses that it writes to."""

    def append(k_cache, v_cache, k, v, begins, table, k_descale=None, v_descale=None):
        addresses.append((k_cache.data_ptr(), v_cache.data_ptr(), k_descale.data_ptr(), v_descale.data_ptr()))
        end = begins + k.shape[1]
        for x, cache, factors in ((k, k_cache, k_descale), (v, v_cache, v_descale)):
            data, scale = quantize_tokens(x)
            for row, (first, last) in enumerate(zip(begins.tolist(), end.tolist(), strict=True)):
                cache[row, first:last], factors[row, first:last] = data[row], scale[row]
        return end

    return append


def test_a_compiled_step_writes_where_the_cache_lies_and_copies_nothing(monkeypatch):
    """The operator gets the cache's own memory from inductor, in a graph too: a functionalised copy would have another address."""
    addresses = []
    library = torch.library.Library("flashmla", "IMPL")
    library.impl("append_to_cache", append_on_a_cpu(addresses), "CPU")
    try:
        model = build_causal_lm("flashmla")
        ids, mask = prompts(2, padded=True)
        expected = generated(model, flashmla_hf.Fp8Cache(), ids, mask)
        monkeypatch.setattr(cached, "_has_kernel_of_writing", lambda k, v: True)
        cache = static(model)
        torch._dynamo.reset()
        got = generated(model, cache, ids, mask, **compiling("inductor"))
        assert torch.equal(got, expected)
        own = [tuple(getattr(layer, name).data_ptr() for name in layer._buffers()[:4]) for layer in cache.layers]
        assert addresses == own * NEW
    finally:
        library._destroy()


# ---- More tokens than there is room for -----------------------------------------------------------------------------


def contents(cache):
    return [getattr(layer, name).clone() for layer in cache.layers for name in layer._buffers()]


def bits(x):
    return x.view(torch.uint8)


@pytest.mark.parametrize("options", [{}, compiling("aot_eager")], ids=["eager", "compiled"])
def test_generate_beyond_the_room_raises_before_anything_is_overwritten(options):
    model = build_causal_lm("flashmla")
    ids, mask = prompts(2)
    cache = static(model, ROOM)
    torch._dynamo.reset()
    message = (
        f"Fp8Cache: max_cache_len: expected at least {ROOM + 1} (it holds {ROOM} tokens, and 1 come), got {ROOM}. "
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        generated(model, cache, ids, mask, max_new_tokens=NEW + 1, **options)
    assert cache.get_seq_length() == ROOM
    prompt = re.escape(f"expected at least {PROMPT} (it holds 0 tokens, and {PROMPT} come), got {PROMPT - 1}")
    with pytest.raises(ValueError, match=prompt):
        generated(model, static(model, PROMPT - 1), ids, mask, **options)


@torch.no_grad()
def test_a_compiled_step_beyond_the_room_raises_from_the_graph():
    model, ids = build_causal_lm("flashmla"), random_ids(2, 9)
    cache = static(model, 8)
    model(ids[:, :7], past_key_values=cache)
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    given = {"past_key_values": cache, "use_cache": True}
    compiled(input_ids=ids[:, 7:8], position_ids=torch.tensor([[7]]), **given)
    before = contents(cache)
    with pytest.raises(RuntimeError, match="Fp8Cache: max_cache_len: expected room for the tokens of a compiled step"):
        compiled(input_ids=ids[:, 8:], position_ids=torch.tensor([[8]]), **given)
    assert cache.get_seq_length() == 8
    for x, y in zip(before, contents(cache), strict=True):
        assert torch.equal(bits(x), bits(y))


@torch.no_grad()
@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_compiled_step_of_layers_that_an_exception_left_uneven_raises_from_the_graph(fullgraph):
    """Python knows no lengths there, so the graph compares them; a step of even layers goes on in it."""
    model, ids = build_causal_lm("flashmla"), random_ids(2, 30)
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=fullgraph)
    cache, straight = static(model), flashmla_hf.Fp8Cache()
    for begin in (20, 21, 22):
        given = {"position_ids": torch.tensor([[begin]]), "use_cache": True}
        for c in (cache, straight) if begin == 20 else ():
            model(ids[:, :20], past_key_values=c)
        got = compiled(input_ids=ids[:, begin : begin + 1], past_key_values=cache, **given).logits
        expected = model(ids[:, begin : begin + 1], past_key_values=straight, **given).logits
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(NotImplementedError, match="output_attentions=True"):
        model(ids[:, 23:25], past_key_values=cache, output_attentions=True)
    given = {"position_ids": torch.tensor([[25]]), "use_cache": True}
    with pytest.raises(RuntimeError, match=r"in layers that hold the same tokens, got .*reset\(\) empties it"):
        compiled(input_ids=ids[:, 25:26], past_key_values=cache, **given)
    cache.reset()
    fresh = flashmla_hf.Fp8Cache()
    for c in (cache, fresh):
        model(ids[:, :25], past_key_values=c)
    got = compiled(input_ids=ids[:, 25:26], past_key_values=cache, **given).logits
    expected = model(ids[:, 25:26], past_key_values=fresh, **given).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_rows_that_are_not_in_use_are_read_by_no_mask():
    """One that a user wrote says nothing of them, and they hold anything."""
    model, ids = build_causal_lm("flashmla"), random_ids(2, 12)
    cache, grown = static(model, 30), flashmla_hf.Fp8Cache()
    for c in (cache, grown):
        model(ids[:, :11], past_key_values=c)
    for layer in cache.layers:
        layer.key_data[:, :, 12:] = layer.value_data[:, :, 12:] = torch.nan
        layer.key_scales[:, :, 12:] = layer.value_scales[:, :, 12:] = torch.nan
    expected = model(ids[:, 11:], past_key_values=grown).logits
    for mask in (None, torch.ones(2, 12, dtype=torch.long), torch.ones(2, 1, 1, 30, dtype=torch.bool)):
        got = model(ids[:, 11:], attention_mask=mask, past_key_values=cache).logits
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        cache.crop(-1)


# ---- What else a cache does ------------------------------------------------------------------------------------------


def test_generate_goes_on_from_the_cache_of_another_call():
    model = build_causal_lm("flashmla")
    ids, mask = prompts(2, padded=True)
    answers = []
    for cache in (static(model, 90), flashmla_hf.Fp8Cache()):
        first = generated(model, cache, ids, mask)
        longer = torch.cat([first, random_ids(2, 20, seed=3)], 1)
        answers.append(generated(model, cache, longer, torch.nn.functional.pad(mask, (0, NEW + 20), value=1)))
        assert cache.get_seq_length() == PROMPT + 2 * NEW + 20 - 1
    assert torch.equal(*answers)


def test_beams_assisted_decoding_and_chunks_of_a_prompt():
    model = build_causal_lm("flashmla")
    ids, mask = prompts(2, padded=True)
    text = torch.cat([ids[:1]] * 2, 1)
    whole = torch.ones_like(text)
    for given, options in (
        ((ids, mask), {"num_beams": 3}),
        ((ids, mask), {"prefill_chunk_size": 16}),
        ((text, whole), {"prompt_lookup_num_tokens": 3}),
    ):
        expected = generated(model, flashmla_hf.Fp8Cache(), *given, **options)
        assert torch.equal(generated(model, static(model, 100), *given, **options), expected), options


def test_compiled_chunks_of_a_prompt_and_drafts():
    model = build_causal_lm("flashmla")
    ids, mask = prompts(2, padded=True)
    text = torch.cat([ids[:1]] * 2, 1)
    for given, options in (
        ((ids, mask), {"prefill_chunk_size": 16}),
        ((text, torch.ones_like(text)), {"prompt_lookup_num_tokens": 3}),
    ):
        expected = generated(model, flashmla_hf.Fp8Cache(), *given, **options)
        forget_graphs()
        assert torch.equal(generated(model, static(model, 100), *given, **options, **compiling("eager")), expected)
        least = 2 if "prefill_chunk_size" in options else 0  # Transformers 5.17 does not compile drafts
        assert least <= graphs_made() <= 4


@pytest.mark.parametrize(("rows", "options"), [(2, {}), (4, {"num_beams": 2})], ids=["", "beams"])
def test_buffers_are_made_early_and_beams_are_reordered_where_they_lie(rows, options):
    model = build_causal_lm("flashmla")
    ids, mask = prompts(2)
    cache = static(model)
    cache.early_initialization(rows, 2, 16, torch.float32, torch.device("cpu"))
    addresses = [x.data_ptr() for x in cache.layers[1]._rows()]
    expected = generated(model, flashmla_hf.Fp8Cache(), ids, mask, **options)
    assert torch.equal(generated(model, cache, ids, mask, **options), expected)
    assert [x.data_ptr() for x in cache.layers[1]._rows()] == addresses


@torch.no_grad()
def test_crop_forgets_and_reset_empties_and_neither_moves_the_buffers():
    model, ids = build_causal_lm("flashmla"), random_ids(1, 50)
    cache, straight = static(model, 60), static(model, 60)
    model(ids[:, :20], past_key_values=cache)
    addresses = [x.data_ptr() for x in cache.layers[0]._rows()]
    cache.crop(0)
    assert_crop_forgets(model, cache, straight, ids)
    for empty in (cache.reset, lambda: cache.crop(-99)):
        empty()
        assert cache.get_seq_length() == 0
        got = model(ids[:, :20], past_key_values=cache).logits  # the prompt attends to itself, not to what is rounded
        assert torch.equal(got, model(ids[:, :20], use_cache=False).logits)
    assert [x.data_ptr() for x in cache.layers[0]._rows()] == addresses


@torch.no_grad()
def test_the_cache_takes_half_the_memory_of_a_static_one():
    model, ids = build_causal_lm("flashmla", head_dim=128).to(torch.bfloat16), random_ids(2, 9)
    caches = static(model), transformers.StaticCache(config=model.config, max_cache_len=ROOM)
    for cache in caches:
        model(ids, past_key_values=cache)
    ours, theirs = map(bytes_of, caches)
    assert ours == (0.5 + 4 / 256) * theirs
    assert caches[0].layers[0].key_data.dtype == E4M3
    assert caches[0].get_max_cache_shape() == ROOM if hasattr(caches[0], "get_max_cache_shape") else True


# ---- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_cache_len": 10}, "config: expected one, since max_cache_len is given, got None"),
        ({"config": transformers.LlamaConfig()}, "max_cache_len: expected one, since config is given, got None"),
        *(
            (
                {"config": transformers.LlamaConfig(), "max_cache_len": x},
                "max_cache_len: expected a positive int (of tokens)",
            )
            for x in (0, -3, True, 2.5, "9")
        ),
    ],
)
def test_arguments_that_make_no_cache_raise(given, message):
    with pytest.raises(ValueError, match=re.escape(f"Fp8Cache: {message}")):
        flashmla_hf.Fp8Cache(**given)


def test_what_is_no_configuration_and_layers_that_are_unknown_are_refused():
    with pytest.raises(TypeError, match=r"config: expected the configuration of a model \(model.config\), got Linear"):
        flashmla_hf.Fp8Cache(torch.nn.Linear(2, 2), max_cache_len=10)
    config = transformers.LlamaConfig(num_hidden_layers=2)
    config.layer_types = ["full_attention", "heavily_compressed_attention"]
    with pytest.raises(
        NotImplementedError, match=r"config: .* got one of type 'heavily_compressed_attention'. Use Dyn"
    ):
        flashmla_hf.Fp8Cache(config, max_cache_len=10)


def test_a_model_with_other_states_than_keys_and_values_is_refused():
    config = transformers.Lfm2Config(**{"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]})
    with pytest.raises(
        NotImplementedError, match="Fp8Cache: config: expected a model whose layers cache keys and values"
    ):
        flashmla_hf.Fp8Cache(config, max_cache_len=10)


@torch.no_grad()
@pytest.mark.parametrize(("first", "second"), [(3, 1), (1, 3)])
def test_rows_of_another_batch_are_refused_before_anything_is_written(first, second):
    model, ids = build_causal_lm("flashmla"), random_ids(3, 12)
    cache = static(model)
    model(ids[:first, :8], past_key_values=cache)
    cache.reset()
    with pytest.raises(
        ValueError, match=rf"Fp8Cache: keys: expected shape \[{first}, .*, got \[{second}, .*new Fp8Cache"
    ):
        model(ids[:second, 8:], past_key_values=cache)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("options", [{}, compiling("eager")], ids=["eager", "compiled"])
def test_another_attention_cannot_read_the_cache(implementation, options):
    model = build_causal_lm(implementation)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=r"Fp8Cache: its keys and values are in fp8, and .* was called on them"):
        generated(model, static(model), *prompts(1), **options)


def test_rows_refuse_what_code_does_with_keys_by_name():
    e4m3, scale = torch.zeros(2, 3, 5, 16, dtype=E4M3), torch.ones(2, 3, 5)
    rows = fp8_layers.Fp8Rows(e4m3, scale, torch.bfloat16)
    assert (rows.shape, rows.size(1), rows.dtype, rows.device.type) == (e4m3.shape, 3, torch.bfloat16, "cpu")
    q = torch.zeros(2, 3, 5, 16)
    for name, act in (
        ("transpose", lambda: rows.transpose(1, 2)), ("to", lambda: rows.to(q.dtype)), ("indexing", lambda: rows[:, :, 0]),
        ("indexing", lambda: [*rows]), ("cat", lambda: torch.cat([rows, q])), ("matmul", lambda: q @ rows),
        ("scaled_dot_product_attention", lambda: torch.nn.functional.scaled_dot_product_attention(q, rows, rows)),
    ):  # fmt: skip
        with pytest.raises(
            RuntimeError, match=f"Fp8Cache: its keys and values are in fp8, and {name} was called on them"
        ):
            act()
    assert copy.deepcopy(rows).shape == e4m3.shape


@torch.no_grad()
def test_what_the_cache_does_not_cover_raises_in_words():
    model, ids = build_causal_lm("flashmla"), random_ids(1, 20)
    holes = torch.ones(1, 40, dtype=torch.long)
    holes[0, 5] = 0
    for options, got in (
        ({"output_attentions": True}, "output_attentions=True"), ({"attention_mask": holes}, "a mask that is not"),
    ):  # fmt: skip
        cache = static(model)
        model(ids, past_key_values=cache)
        with pytest.raises(NotImplementedError, match=f"Fp8Cache in LlamaAttention: .*, got {got}"):
            model(ids, past_key_values=cache, **options)
    cache = static(model)
    with torch.enable_grad():
        model(ids, past_key_values=cache)
        with pytest.raises(RuntimeError, match="expected keys and values that require no gradient"):
            model(ids, past_key_values=cache)
