"""Compiled steps of several tokens on a static cache, whose number of tokens is data: chunks of a prompt, drafts."""

from __future__ import annotations

import hf_support
import pytest
import torch
import transformers
from hf_support import DEVICE, ROWS, SEQLEN, batch_of
from test_hf_generate import DECODE, pair
from torch._dynamo.backends.common import aot_autograd

pytestmark = [
    hf_support.needs_kernel,
    pytest.mark.usefixtures("recompile_limit_is_put_back"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def assert_steps_equal_eager(eager, ours, compiled, rows):
    """A prompt by ``ours``, and steps of several tokens after it by ``compiled``."""
    batch = batch_of(rows)
    steps = (SEQLEN, 3, 3, 20, 2)
    tokens = torch.randint(3, 60, (len(rows), sum(steps[1:])), generator=torch.Generator().manual_seed(8)).to(DEVICE)
    ids, mask = (
        torch.cat([batch["input_ids"], tokens], 1),
        torch.cat([batch["attention_mask"], torch.ones_like(tokens)], 1),
    )
    length = ids.shape[1] + 5
    caches = [transformers.StaticCache(config=model.config, max_cache_len=length) for model in (eager, ours)]
    start = 0
    with torch.no_grad():
        for step in steps:
            stop = start + step
            given = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop], "use_cache": True}
            given["position_ids"] = (mask[:, :stop].cumsum(-1) - 1).clamp(min=0)[:, start:]
            function = ours if start == 0 else compiled
            want = eager(**given, past_key_values=caches[0]).logits
            got = function(**given, past_key_values=caches[1]).logits
            real = mask[:, start:stop].bool()
            torch.testing.assert_close(got[real], want[real], atol=1e-3, rtol=1e-3)
            start = stop


@pytest.mark.skipif(DEVICE.type != "cpu", reason="flex is no operator of ours")
@pytest.mark.skipif(hf_support.is_oracle_in_place(), reason="the oracle is no operator")
@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_a_compiled_step_of_several_tokens_on_a_static_cache_takes_no_dense_mask(name):
    """Chunks of a prompt and drafts of assisted decoding: up to 16 queries read the cache where it lies, more go packed.

    Full rows and padded ones take the same graphs.
    """
    eager, ours = pair(name)
    graphs: list = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(ours.forward, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    counts = []
    for rows in ROWS.values():
        assert_steps_equal_eager(eager, ours, compiled, rows)
        counts.append(len(graphs))
    assert counts == counts[:1] * len(ROWS)
    for graph in graphs:
        calls = [str(node.target) for node in graph.graph.nodes if "flashmla" in str(node.target)]
        assert len(calls) == ours.config.num_hidden_layers
        assert not any("scaled_dot_product" in str(node.target) for node in graph.graph.nodes)
    decoding = [[DECODE in str(n.target) for n in g.graph.nodes if "flashmla" in str(n.target)] for g in graphs]
    assert [True] * ours.config.num_hidden_layers in decoding
    assert [False] * ours.config.num_hidden_layers in decoding


def test_a_compiled_step_on_a_static_cache_keeps_its_mask_for_what_needs_it():
    """Rows that end in padding, weights that are asked for, and padding with holes, which a graph refuses."""
    eager, ours = pair("Llama")
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(9)).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    compiled = torch.compile(ours.forward, backend="aot_eager", fullgraph=True)
    for options in ({}, {"output_attentions": True}):
        torch._dynamo.reset()
        caches = [transformers.StaticCache(config=model.config, max_cache_len=16) for model in (eager, ours)]
        with torch.no_grad():
            for model, cache in zip((eager, ours), caches, strict=True):
                # With the options, too: Transformers prepares for them once, under a lock that no graph enters.
                model(ids[:, :7], attention_mask=mask[:, :7], past_key_values=cache, **options)
            given = {"input_ids": ids[:, 7:], "attention_mask": mask, **options}
            want, got = eager(**given, past_key_values=caches[0]), compiled(**given, past_key_values=caches[1])
        real = mask[:, 7:].bool()
        torch.testing.assert_close(got.logits[real], want.logits[real], atol=1e-3, rtol=1e-3)
        if options:
            for mine, theirs in zip(got.attentions, want.attentions, strict=True):
                torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)
    cache = transformers.StaticCache(config=ours.config, max_cache_len=16)
    mask[0, 3] = 0
    with torch.no_grad():
        ours(ids[:, :7], attention_mask=mask[:, :7], past_key_values=cache)
        with pytest.raises(RuntimeError, match="expected one range of valid keys per row"):
            compiled(input_ids=ids[:, 7:], attention_mask=mask, past_key_values=cache)
