"""``generate`` by every cache and strategy gives eager's tokens; decoding reads the cache where it lies and waits for nothing.

The prompts are longer than the windows, and so are the answers: sliding caches turn over.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, field
from pathlib import Path

import families
import hf_support
import pytest
import torch
import transformers
from counting import counted_calls
from families import FAMILY
from hf_support import (
    DEVICE,
    ROWS,
    SEQLEN,
    batch_of,
    build_causal_lm,
    close,
    generate_greedily,
    kernel_calls,
    save_word_tokenizer,
)
from torch._dynamo.backends.common import aot_autograd
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flashmla_hf import decode, direct, validation

pytestmark = [
    hf_support.needs_kernel,
    pytest.mark.usefixtures("recompile_limit_is_put_back"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

NAMES = ["Llama", "Mistral", "Gemma2", "Gemma3 text", "GPT-OSS", "Qwen2", "DeepSeek-V3"]
NEW_TOKENS = 12
# Of module scope, which groups the tests of a model: it is built once.
by_name = pytest.mark.parametrize("name", NAMES, scope="module")


@functools.lru_cache(maxsize=2)
def pair(name: str):
    """(eager, ours), the same weights."""
    family = FAMILY[name]
    eager = families.build(family, "eager", DEVICE)
    return eager, families.build(family, family.impl, DEVICE, eager.state_dict())


def generate(model, batch, **options):
    return generate_greedily(model, batch, **{"max_new_tokens": NEW_TOKENS, **options})


def assert_same(got, want, what: str = "") -> None:
    assert torch.equal(got.sequences, want.sequences), what
    if got.logits is not None:
        assert len(got.logits) == len(want.logits) > 0
        for step, (a, b) in enumerate(zip(got.logits, want.logits, strict=True)):
            assert close(a, b), f"{what} logits of step {step}"


ROUTES = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "beams, static": {"num_beams": 2, "cache_implementation": "static"},
    "prefill in chunks": {"prefill_chunk_size": 5},
    "prefill in chunks, static": {"prefill_chunk_size": 5, "cache_implementation": "static"},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("rows", ROWS)
@by_name
def test_every_cache_and_strategy_gives_eagers_tokens_and_logits(name, rows):
    batch, models = batch_of(ROWS[rows]), pair(name)
    for route, options in ROUTES.items():
        outputs = []
        for model in models:
            torch.manual_seed(3)
            with counted_calls() as calls:
                outputs.append(generate(model, batch, **options))
        assert_same(outputs[1], outputs[0], route)
        assert kernel_calls(calls) > 0
        assert calls["reference"] == 0 or hf_support.is_oracle_in_place(), dict(calls)


@pytest.mark.parametrize("count", [SEQLEN, 5], ids=["a full row", "a padded row"])
@by_name
@pytest.mark.parametrize("route", ["a smaller model", "the same model", "prompt lookup"])
def test_assisted_decoding_gives_eagers_tokens(route, name, count):
    eager, ours = pair(name)
    batch = batch_of([count])
    # A prompt that repeats, so that looking it up finds something.
    batch["input_ids"] = torch.cat([batch["input_ids"][:, :-6], batch["input_ids"][:, -3:].repeat(1, 2)], dim=1)
    want = generate(eager, batch)
    if route == "prompt lookup":
        options = {"prompt_lookup_num_tokens": 4}
    else:
        # Another seed: it guesses other tokens, most of which are wrong; the same model guesses all of them right.
        family = FAMILY[name]
        state = ours.state_dict() if route == "the same model" else None
        draft = families.build(family, family.impl, DEVICE, state, seed=1)
        draft.generation_config.num_assistant_tokens = 5
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        draft.generation_config.assistant_confidence_threshold = 0.0
        options = {"assistant_model": draft}
        try:
            generate(eager, batch, assistant_model=families.build(family, "eager", DEVICE, draft.state_dict()))
        except RuntimeError as error:
            pytest.skip(f"eager attention cannot in this Transformers: {error}")  # 5.17, windows and full layers
    with watched(ours) as layers:
        got = generate(ours, batch, **options)
    assert_same(got, want)
    queries = {layer.queries for layer in layers if layer.queries < layer.keys}
    if route == "the same model":
        assert max(queries) > 2, "several queries a row"


# ---- What a decoding step does -----------------------------------------------------------------------------------------

WAITS = {
    "item",
    "tolist",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "nonzero",
    "equal",
    "cpu",
    "is_nonzero",
    "numpy",
}
WAITING_OPERATORS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique2"}


@dataclass
class Layer:
    """What the attention of one layer did in one forward pass."""

    index: int
    batch: int
    queries: int
    keys: int
    operators: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)  # operators that made something as large as a quarter of the keys
    is_in_place: bool = True  # every operator of this package got memory of the cache


class _Functions(TorchFunctionMode):
    def __init__(self, layer: Layer):
        super().__init__()
        self.layer = layer

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in WAITS and not (name == "cpu" and args[0].device.type == "cpu"):
            self.layer.waits.append(name)
        return function(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, layer: Layer, key: torch.Tensor, value: torch.Tensor):
        super().__init__()
        self.layer, self.cache = layer, [x.untyped_storage().data_ptr() for x in (key, value)]
        self.limit = key.numel() // 4

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in WAITING_OPERATORS:
            self.layer.waits.append(name)
        if func.namespace == "flashmla":
            self.layer.operators.append(name)
            self.layer.is_in_place &= [x.untyped_storage().data_ptr() for x in args[1:3]] == self.cache
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.numel() > self.limit and x.untyped_storage().data_ptr() not in given:
                self.layer.copies.append(name)
        return out


@contextlib.contextmanager
def watched(model):
    """A :class:`Layer` for every call of the attention function of ``model`` inside the block."""
    layers, name = [], model.config._attn_implementation
    functions = transformers.AttentionInterface._global_mapping
    original, was_enabled = functions[name], direct.enabled
    checks = decode._check_values, validation._check_longest

    def attention(module, query, key, value, *args, **options):
        layer = Layer(module.layer_idx, query.shape[0], query.shape[2], key.shape[2])
        layers.append(layer)
        with _Functions(layer), _Operators(layer, key, value):
            return original(module, query, key, value, *args, **options)

    direct.enabled = False  # it calls the kernels past torch's dispatcher, where nobody watches
    # Both read values on a CPU alone, where it waits for nothing.
    decode._check_values = validation._check_longest = lambda *_: None
    functions[name] = attention
    try:
        yield layers
    finally:
        functions[name], direct.enabled = original, was_enabled
        decode._check_values, validation._check_longest = checks


FORWARD, DECODE = "flash_attn_forward", "flash_attn_decode"
# A full row under a static cache is a slice of it; where rows differ, lengths and starts are arguments of the operator.
IN_PLACE = [
    ("dynamic", "alike", FORWARD),
    ("dynamic", "padded", DECODE),
    ("static", "alike", FORWARD),
    ("static", "padded", DECODE),
    ("beams", "padded", DECODE),
    ("beams", "alike", FORWARD),
]


@pytest.mark.skipif(DEVICE.type != "cpu", reason="flex is no operator of ours")
@pytest.mark.skipif(hf_support.is_oracle_in_place(), reason="the oracle copies")
@pytest.mark.parametrize("name", ["Llama", "Mistral", "GPT-OSS"])
@pytest.mark.parametrize(("route", "rows", "operator"), IN_PLACE)
def test_a_decoding_step_reads_the_cache_where_it_lies_and_waits_for_nothing(name, route, rows, operator):
    ours = pair(name)[1]
    ids = torch.randint(3, 60, (2, 90), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    if rows == "padded":
        mask[0, :40] = 0
    batch = {"input_ids": (ids * mask).to(DEVICE), "attention_mask": mask.to(DEVICE)}
    options = {"output_logits": False, "return_dict_in_generate": False}
    with watched(ours) as layers:
        ours.generate(**batch, max_new_tokens=5, do_sample=False, disable_compile=True, **ROUTES[route], **options)
    decoding = [layer for layer in layers if layer.queries == 1]
    assert len(decoding) == 4 * ours.config.num_hidden_layers
    seen = set()
    for layer in decoding:
        kind = getattr(ours.config, "layer_types", None)
        is_sliding = name == "Mistral" or (kind is not None and kind[layer.index] == "sliding_attention")
        # A row that is padding alone, or a window without any, is alike in all rows.
        expected = {operator} if not is_sliding else {operator, FORWARD}
        assert set(layer.operators) <= expected, layer
        assert len(layer.operators) == 1, layer
        assert layer.is_in_place, layer
        assert not layer.copies or is_sliding, layer  # six keys are hardly larger than a query
        seen.add(layer.index)
    # One synchronisation a mask and step is allowed (boundaries.py); layers that share the mask have none.
    for step in range(4):
        waits = [layer.waits for layer in decoding[step * len(seen) : (step + 1) * len(seen)]]
        kinds = len(set(getattr(ours.config, "layer_types", None) or ["all"]))
        assert sum(map(len, waits)) <= kinds, waits


def test_waits_do_not_grow_with_the_layers():
    counts = []
    for number in (2, 5):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**{**families.TEXT, "num_hidden_layers": number})
        model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="flashmla").to(DEVICE).eval()
        per_route = []
        for route in ("dynamic", "static"):
            for rows in ROWS.values():
                with watched(model) as layers:
                    generate(model, batch_of(rows), **ROUTES[route])
                per_route.append(sum(len(layer.waits) for layer in layers))
        counts.append(per_route)
    assert counts[0] == counts[1]


def test_the_watch_sees_copies_and_waits(monkeypatch):
    """The negative control of the tests above."""
    ours = pair("Llama")[1]
    name = ours.config._attn_implementation
    functions = transformers.AttentionInterface._global_mapping
    original = functions[name]

    def careless(module, query, key, value, *args, **options):
        assert int(key[0, 0, 0, 0].long()) == key[0, 0, 0, 0].long().item()
        return original(module, query, key.clone(), value, *args, **options)

    monkeypatch.setitem(functions, name, careless)
    with watched(ours) as layers:
        generate(ours, batch_of((SEQLEN,)))
    decoding = [layer for layer in layers if layer.queries == 1]
    assert all(len(layer.waits) >= 2 for layer in decoding)
    assert not any(layer.is_in_place for layer in decoding)
    assert any("clone" in layer.copies for layer in decoding)


# ---- torch.compile -----------------------------------------------------------------------------------------------------


def compile_config(backend, fullgraph=True):
    config = transformers.CompileConfig(mode=None, backend=backend, fullgraph=fullgraph)
    config._compile_all_devices = True
    return config


VIEWS = (
    "view",
    "_unsafe_view",
    "transpose",
    "permute",
    "slice",
    "expand",
    "unsqueeze",
    "squeeze",
    "alias",
    "reshape",
    "select",
)


# How static caches write: a full one by index, a sliding one that turns over by a copy of its own.
UPDATES = ("index_copy", "index_put", "copy", "placeholder")


def origin(node):
    """The node whose memory ``node`` is a view of."""
    while node.op == "call_function" and getattr(node.target, "overloadpacket", None) is not None:
        if node.target.overloadpacket.__name__ not in VIEWS:
            break
        node = node.args[0]
    return node


@pytest.mark.skipif(DEVICE.type != "cpu", reason="flex is no operator of ours")
@pytest.mark.skipif(hf_support.is_oracle_in_place(), reason="the oracle is no operator")
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GPT-OSS"])
def test_compiled_static_decoding_is_one_graph_that_reads_the_cache(name):
    """fullgraph, for full and padded rows alike; every layer's call reads what the cache's own update returned."""
    eager, ours = pair(name)
    graphs: dict[str, list] = {"eager": [], "ours": []}
    for who, model in (("eager", eager), ("ours", ours)):
        torch._dynamo.reset()

        def keep(graph, _, kept=graphs[who]):
            kept.append(graph)
            return graph

        config = compile_config(aot_autograd(fw_compiler=keep))
        options = {"cache_implementation": "static", "compile_config": config, "disable_compile": False}
        for rows in ROWS.values():
            batch = batch_of(rows)
            assert_same(generate(model, batch, **options), generate(eager, batch))
    # A sliding cache of Transformers counts its tokens in Python: one more graph, for eager attention too.
    assert len(graphs["ours"]) <= len(graphs["eager"]) <= 2
    for graph in graphs["ours"]:
        calls = [node for node in graph.graph.nodes if "flashmla" in str(node.target)]
        assert len(calls) == ours.config.num_hidden_layers
        for call in calls:
            assert DECODE in str(call.target)
            for cache in call.args[1:3]:
                source = origin(cache)
                made_by = getattr(getattr(source.target, "overloadpacket", None), "__name__", source.op)
                assert made_by in UPDATES, (made_by, source)


# ---- The documentation -------------------------------------------------------------------------------------------------

SMALL = 256 << 20  # bytes


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the examples choose a device by themselves")
def test_the_examples_of_the_documentation_run(tmp_path, monkeypatch):
    """All three give the same tokens, those of eager attention."""
    pytest.importorskip("accelerate")
    # Pages for continuous batching take nine tenths of the machine's memory, all of it written.
    psutil = pytest.importorskip("psutil")
    memory = psutil.virtual_memory()._replace(total=psutil.Process().memory_info().rss + SMALL, available=SMALL)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    text = (Path(__file__).parent.parent / "docs" / "inference.md").read_text()
    eager = build_causal_lm("eager")
    eager.save_pretrained(tmp_path)
    save_word_tokenizer(tmp_path)
    names = {"MODEL": str(tmp_path), "PROMPTS": ["w5 w6 w7 w8 w9", "w11 w12"]}
    tokens = {}
    for example in ("generate", "static", "batch"):
        code = text.split(f"<!-- example: {example} -->\n```python\n")[1].split("```")[0]
        code = code.replace('device_map="auto"', 'device_map="cpu"')
        with counted_calls() as calls:
            exec(compile(code, "inference.md", "exec"), names)
        assert kernel_calls(calls) > 0, example
        tokens[example] = names["tokens"]
    want = eager.generate(**names["inputs"], max_new_tokens=32, do_sample=False)
    assert torch.equal(tokens["generate"], want)
    assert torch.equal(tokens["static"], want)
    generated = [output.generated_tokens for output in names["outputs"].values()]
    assert sorted(generated) == sorted(want[:, names["inputs"]["input_ids"].shape[1] :].tolist())
