"""The sweep over Transformers' classes: its probes can fail, and a part of the classes passes them. `make sweep` runs all."""

from __future__ import annotations

import datetime
import json
import os
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from counting import counted_calls
from model_sweep import __main__ as sweeper
from model_sweep import building, comparison, page, probes, verdicts
from model_sweep.classes import Candidate, candidates
from model_sweep.known import KNOWN

# Each stands for a kind that was wrong once: masks that alone say causal, bidirectional or a window; compressed keys; class
# dictionaries; per-layer configurations; sparse selections; chunked audio; composites.
TRICKY = (
    "NllbMoeForConditionalGeneration", "SplinterModel", "PhimoeForCausalLM", "DeepseekV4ForCausalLM", "SamModel",
    "NeoMMEForMaskedLM", "FalconForCausalLM", "AfmoeForCausalLM", "BridgeTowerModel", "Gemma3ForConditionalGeneration",
    "GptOssForCausalLM", "WhisperForConditionalGeneration", "T5ForConditionalGeneration", "LlamaForCausalLM",
    "MistralForCausalLM", "ModernBertForMaskedLM", "Qwen2VLForConditionalGeneration", "BloomForCausalLM",
)  # fmt: skip
# One class in so many, another part every day; FLASHMLA_SWEEP_SHARD=n takes the n-th again, SHARDS=1 all of them.
SHARDS = int(os.environ.get("FLASHMLA_SWEEP_SHARDS", "10"))
SHARD = int(os.environ.get("FLASHMLA_SWEEP_SHARD", datetime.date.today().toordinal())) % SHARDS
UNSOUND = ("failed", "refused", "not as eager")  # each such class stands in model_sweep.known, with its reason
LIMIT = 120  # seconds a class


SWEPT = json.loads((Path(__file__).parent / "model_sweep" / "results.json").read_text())  # by `make sweep`


def tried_in_vain() -> set[str]:
    """Classes of which `make sweep` built no eager model, under this very Transformers, in more than 5 seconds each.

    Nothing of this package runs in that. They take half the time of the sweep; those that fail sooner are tried again.
    """
    if SWEPT["transformers"] != transformers.__version__:
        return set()
    vain = (c for c in SWEPT["classes"] if c["status"] == "cannot build" and c["seconds"] > 5)
    return {c["class_name"] for c in vain if c["reason"] != "took too long"}  # which may be a probe


def chosen() -> list[Candidate]:
    left_out = tried_in_vain()
    return [
        c
        for c in candidates()
        if c.class_name in TRICKY
        or (zlib.crc32(c.class_name.encode()) % SHARDS == SHARD and c.class_name not in left_out)
    ]


@pytest.mark.slow
def test_every_class_of_the_shard_equals_eager_or_says_why_not():
    found = chosen()
    assert len(found) > 40
    results = {r["class_name"]: r for r in sweeper.sweep(found, jobs=2, seconds=LIMIT)}
    wrong = {
        name: f"{r['status']}: {r['reason'][:500]}"
        for name, r in results.items()
        if r["status"] in UNSOUND and not (name in KNOWN and KNOWN[name][0] in r["reason"])
    }
    gone = {name for name in KNOWN if name in results and results[name]["status"] not in UNSOUND}
    assert not wrong, f"FLASHMLA_SWEEP_SHARD={SHARD}\n" + "\n".join(
        f"{name}: {reason}" for name, reason in wrong.items()
    )
    assert not gone, f"equal now, and still among model_sweep.known: {sorted(gone)}"
    equal = sum(r["status"] == "equal" for r in results.values())
    assert equal > len(found) / 2, f"{equal} of {len(found)} classes are equal: the sweep builds too few"


def test_what_was_tried_in_vain_is_left_out_until_another_release(monkeypatch):
    monkeypatch.setitem(SWEPT, "transformers", transformers.__version__)
    left_out = tried_in_vain()
    of = {c["class_name"]: c for c in SWEPT["classes"]}
    assert left_out
    assert not left_out & {*TRICKY, *KNOWN}
    assert not any(of[name]["plan"] or of[name]["probes"] or of[name]["calls"] for name in left_out)
    assert not left_out & {c.class_name for c in chosen()}
    monkeypatch.setitem(SWEPT, "transformers", "0.0")
    assert not tried_in_vain()


def test_the_check_of_the_sweep_agrees_with_the_counted_calls():
    """check(model) says of each layer whether it calls the kernel; the sweep counts the calls."""
    for name in ("LlamaForCausalLM", "T5ForConditionalGeneration"):
        candidate = next(c for c in candidates() if c.class_name == name)
        assert probes.examine(candidate, only_forward=True).probes["check"] == "true", name


def half(call, run):
    out, *rest = run(call)
    return (out / 2, *rest)


def flips_causal(call, run):
    return run(replace(call, window_right=-1 if call.window_right == 0 else 0))


def forgets_the_window(call, run):
    return run(replace(call, window_left=-1))


def ignores_padding(call, run):
    """Packed boundaries become one sequence, so that padding and neighbours are seen."""
    if call.cu_seqlens_q is None:
        return run(call)
    ends = [x[[0, -1]].contiguous() for x in (call.cu_seqlens_q, call.cu_seqlens_kv)]
    return run(replace(call, cu_seqlens_q=ends[0], cu_seqlens_kv=ends[1], max_seqlen_q=call.q.shape[0], max_seqlen_kv=call.k.shape[0]))  # fmt: skip


CONTROLS = [
    ("LlamaForCausalLM", comparison.zeros), ("LlamaForCausalLM", half), ("LlamaForCausalLM", flips_causal),
    ("LlamaForCausalLM", ignores_padding), ("MistralForCausalLM", forgets_the_window), ("BertModel", flips_causal),
    ("BertModel", ignores_padding), ("WhisperForConditionalGeneration", flips_causal),
]  # fmt: skip


@pytest.mark.parametrize(("name", "wrong"), CONTROLS, ids=[f"{name}-{wrong.__name__}" for name, wrong in CONTROLS])
def test_a_wrong_attention_fails_its_probe(name, wrong):
    candidate = next(c for c in candidates() if c.class_name == name)
    model_class = getattr(transformers, name)
    result = verdicts.Result(name, candidate.model_type)
    eager, config, batch = building.build_eager(model_class, model_class.config_class, result)
    ours = building.build(model_class, config, "flashmla")
    building.copy_state(eager, ours)
    pair = comparison.Pair(eager, ours, result)
    with torch.no_grad():
        pair.probe("forward", batch)
        probes.more_probes(pair, batch)
    assert not [v for v in result.probes.values() if v.startswith(("DIFFERS", "RAISES"))], result.probes
    result.probes.clear()
    with counted_calls(wrong=wrong):
        pair.probe("forward", batch)
        if "input_ids" in batch:
            probes.mask_probes(pair, batch)
    assert any(v.startswith("DIFFERS") for v in result.probes.values()), result.probes


def test_a_page_counts_classes_and_gives_reasons():
    common = {"implementation": "flashmla", "probes": {"forward": "equal", "hole": "eager refuses: no"}}
    results = {
        "transformers": "1", "torch": "2",
        "classes": [
            {"class_name": "A", "model_type": "a", "status": "equal", "reason": "", "calls": {"cpu": 2, "sdpa": 1}, **common},
            {"class_name": "B", "model_type": "b", "status": "eager", "reason": "B selects | keys", "calls": {}, **common},
        ],
    }  # fmt: skip
    text = page.page(results)
    assert "2 classes of 2 model types" in text
    assert "| a | A | equal | 1 of 1 | 2 of 3 |  |" in text
    assert "| the class selects \\| keys | eager | B |" in text
