"""Patch "mla_decode": decoding attends to cached latents. Logits and tokens are the unpatched model's, on every family.

The models are tiny, in float32, with weights large enough that a wrong attention shows.
"""

import copy
import re
from pathlib import Path

import families
import mla_families
import pytest
import torch
import transformers
from hf_support import DEVICE, ROWS, SEQLEN, batch_of
from mla_families import (
    FAMILY,
    PATCH,
    as_argument,
    assert_close,
    assert_same_answer,
    cache_of,
    counted,
    generate,
    latent_tests,
    pair,
    steps,
)  # fmt: skip
from torch._dynamo.backends.common import aot_autograd

import flashmla_hf
from flashmla_hf.patches import structure
from flashmla_hf.training import quantization

pytestmark = [*latent_tests, pytest.mark.usefixtures("recompile_limit_is_put_back")]


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


def test_every_family_of_transformers_is_known():
    """A new one belongs into tests/mla_families.py: served, and compared here, or refused."""
    assert latent_classes() <= mla_families.SERVED | mla_families.SPARSE


def test_every_served_class_is_compared():
    compared = set()
    for family in mla_families.FAMILIES:
        model = families.build(family, "flashmla", DEVICE)
        compared |= {type(m).__name__ for m in structure.latent_attentions(model, "mla_decode").values()}
    assert compared == mla_families.SERVED & latent_classes()


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


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["DeepSeek-V2", "DeepSeek-V3"])
def test_strategies_give_the_unpatched_models_tokens(name, strategy):
    plain, patched = pair(name)
    rows = (SEQLEN,) if "assisted" in strategy else ROWS["padded"]
    expected, got = (generate(m, batch_of(rows), **STRATEGIES[strategy]).sequences for m in (plain, patched))
    assert torch.equal(got, expected)


def test_an_assistant_model_gives_the_unpatched_models_tokens():
    plain, patched = pair("DeepSeek-V3")
    batch = batch_of((SEQLEN,))
    for assistant in (plain, patched):
        expected, got = (generate(m, batch, assistant_model=assistant).sequences for m in (plain, patched))
        assert torch.equal(got, expected)


def test_a_compiled_step_is_one_graph_that_attends_to_latents():
    """For full and padded rows alike."""
    plain, patched = pair("DeepSeek-V3")
    expected = [generate(plain, batch_of(rows), cache_implementation="static") for rows in ROWS.values()]
    torch._dynamo.reset()
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    config = transformers.CompileConfig(fullgraph=True, backend=aot_autograd(fw_compiler=keep), mode=None)
    config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": config, "disable_compile": False}
    for rows, answer in zip(ROWS.values(), expected, strict=True):
        assert_same_answer(generate(patched, batch_of(rows), **options), answer)
    (graph,) = graphs
    calls = [node for node in graph.graph.nodes if "flash_attn_decode" in str(node.target)]
    assert len(calls) == patched.config.num_hidden_layers
    assert {node.meta["val"][0].shape[-1] for node in calls} == {patched.config.kv_lora_rank}


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_compiled_model_prefills_and_decodes_as_the_unpatched_one(kind):
    """``torch.compile(model)``: the prefill is compiled, too. Compiled code follows a model that is unpatched.

    A dense model with DeepSeek-V3's attention: experts break the graph, and took a third of the compiler's time.
    """
    plain, patched = pair("Youtu")
    expected = steps(plain, cache_of(plain, kind), (SEQLEN, 1, 1))
    torch._dynamo.reset()
    compiled = torch.compile(patched, backend="aot_eager")
    for width in (24, 16):  # of rows, and of the unpatched model's keys
        cache, got, start = cache_of(patched, kind), [], 0
        ids = torch.randint(3, 60, (2, SEQLEN + 2), generator=torch.Generator().manual_seed(3)).to(DEVICE)
        for size in (SEQLEN, 1, 1):
            positions = torch.arange(start, start + size, device=DEVICE)[None]
            with torch.no_grad():
                out = compiled(
                    ids[:, start : start + size], position_ids=positions, use_cache=True, **as_argument(patched, cache)
                )
            got.append(out.logits)
            start += size
        assert_close(torch.cat(got, dim=1), expected)
        assert {layer.keys.shape[-1] for layer in cache.layers} == {width}
        flashmla_hf.unpatch(patched)


# ---- Numbers ---------------------------------------------------------------------------------------------------------


def test_bfloat16_is_as_close_to_float32_as_without_the_patch():
    plain, patched = pair("DeepSeek-V3")
    truth = steps(plain, cache_of(plain, "dynamic"))
    halves = [m.to(torch.bfloat16) for m in (plain, patched)]
    errors = [float((steps(m, cache_of(m, "dynamic")).float() - truth).abs().mean()) for m in halves]
    assert errors[1] <= 1.5 * errors[0], errors


def test_autocast():
    plain, patched = pair("DeepSeek-V3")
    with torch.autocast(DEVICE.type, torch.bfloat16):
        expected, got = (steps(m, cache_of(m, "dynamic")).float() for m in (plain, patched))
    assert_close(got, expected, 0.1)


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
                m(ids, use_cache=True, **as_argument(m, copy.deepcopy(cache)), **options)
                for m, cache in zip((plain, patched), caches, strict=True)
            )
        assert_close(got.logits, expected.logits)
        for ours, theirs in zip(got.attentions or (), expected.attentions or (), strict=True):
            assert_close(ours, theirs)


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


def test_a_step_with_gradients_expands_and_has_them():
    plain, patched = pair("DeepSeek-V3")
    results = []
    for model in (plain, patched):
        cache = cache_of(model, "dynamic")
        steps(model, cache, (SEQLEN,))
        token = torch.tensor([[5], [7]], device=DEVICE)
        model(token, use_cache=True, **as_argument(model, cache)).logits.square().sum().backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert any("kv_b_proj" in n for n in results[1])
    for n, g in results[0].items():
        assert_close(results[1][n], g, 1e-5)


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


def test_adapters_in_float32_beside_a_bfloat16_model(monkeypatch):
    """peft's default. In training mode, the trial draws no dropout."""
    plain, patched = (
        with_lora(families.build(FAMILY["DeepSeek-V3"], "flashmla", DEVICE).to(torch.bfloat16), lora_dropout=0.5)
        for _ in range(2)
    )
    flashmla_hf.patch(patched.train(), PATCH)
    assert all(m.training for m in patched.modules())
    patched.eval()
    with counted(monkeypatch) as counts:
        got = steps(patched, cache_of(patched, "dynamic"))
    assert counts[0] > 0
    truth = steps(plain.float(), cache_of(plain, "dynamic"))
    expanded = steps(plain.to(torch.bfloat16), cache_of(plain, "dynamic"))
    errors = [float((x.float() - truth).norm() / truth.norm()) for x in (got, expanded)]
    assert errors[0] <= 2.0 * errors[1], errors


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
        quantization.keep_trainable_on_cpu(model)  # else the first call packs it for a kernel of bfloat16
        return model.eval()

    plain, patched = packed(), flashmla_hf.patch(packed(), PATCH)
    with counted(monkeypatch) as counts:
        got = generate(patched, batch_of(ROWS["padded"]))
    assert counts[0] > 0
    assert_same_answer(got, generate(plain, batch_of(ROWS["padded"])))


def test_weights_that_are_loaded_for_each_call_are_honoured(monkeypatch):
    accelerate = pytest.importorskip("accelerate")
    plain, patched = pair("DeepSeek-V3")
    expected = generate(plain, batch_of(ROWS["alike"]))
    accelerate.cpu_offload(patched, execution_device=DEVICE)
    with counted(monkeypatch) as counts:
        assert_same_answer(generate(patched, batch_of(ROWS["alike"])), expected)
    assert counts[0] > 0


def test_a_short_cache_is_expanded_if_the_matrix_costs_more(monkeypatch):
    """The matrix of an adapted projection is its result for kv_lora_rank rows."""
    patched = flashmla_hf.patch(with_lora(families.build(FAMILY["DeepSeek-V3"], "flashmla", DEVICE)), PATCH)
    rank = patched.config.kv_lora_rank
    with counted(monkeypatch) as counts:
        steps(patched, cache_of(patched, "dynamic"), (rank - 1, 1))
        assert counts[0] == 0
        steps(patched, cache_of(patched, "dynamic"), (rank, 1))
        assert counts[0] == len(structure.latent_attentions(patched.get_base_model(), "mla_decode"))


# ---- Documentation ---------------------------------------------------------------------------------------------------


def test_the_example_of_the_documentation_runs():
    plain, _ = pair("DeepSeek-V2")
    text = (Path(__file__).resolve().parent.parent / "docs" / "inference.md").read_text()
    code = text.split("<!-- example: latents -->\n```python\n")[1].split("```")[0]
    expected = plain.generate(**batch_of(ROWS["padded"]), max_new_tokens=32, do_sample=False)
    names = {"model": plain, "inputs": batch_of(ROWS["padded"])}
    exec(code, names)
    assert torch.equal(names["tokens"], expected)
    assert flashmla_hf.patch_report(plain).applied == ("mla_decode",)
