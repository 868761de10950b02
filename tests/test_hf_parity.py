"""Every family of families.py against eager attention: logits, loss, the gradient of every parameter, generated tokens.

Settings where wrong attention cannot pass: fp32, large weights, tolerance 1e-3. That this is so is part of the suite
(``test_wrong_attention_fails``). Kernel calls are counted, so that a silent fallback fails. With
FLASHMLA_SUPPORT_JSON=path the results are written there; tests/support_table.py makes README's table of them.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import warnings
from dataclasses import replace

import families
import hf_support
import pytest
import torch
from counting import counted_calls, standing_in
from families import FAMILIES
from hf_support import DEVICE, TOLERANCE, close, kernel_calls

pytestmark = hf_support.needs_kernel

# Of module scope, which groups the tests of a family: its models are built once.
by_family = functools.partial(pytest.mark.parametrize, "family", ids=str, scope="module")
RESULTS: dict[str, dict] = {}


@functools.lru_cache(maxsize=2)
def models(family):
    """(eager, ours), the same weights."""
    eager = families.build(family, "eager", DEVICE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return eager, families.build(family, family.impl, DEVICE, eager.state_dict())


@functools.lru_cache(maxsize=8)
def expected(family, padding):
    return step(models(family)[0], family, padding)


def step(model, family, padding) -> dict:
    """Logits (0 on padding), loss and gradients of one training step."""
    batch = families.inputs(family, padding, DEVICE)
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    logits = out.logits_per_image if family.inputs == "clip" else out.logits
    mask = batch.get("attention_mask")
    if logits.dim() == 3 and mask is not None and mask.shape[1] == logits.shape[1]:
        logits = logits * mask[..., None]
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), "loss": out.loss.detach(), "gradients": gradients}


def differences(got: dict, want: dict) -> list[str]:
    """What differs, by name. A gradient counts by its own size, down to 1e-4 of the largest one; a key bias, which
    softmax does not see and whose gradient is rounding noise around 0, down to 1e-1."""
    wrong = [name for name in ("logits", "loss") if not close(got[name], want[name])]
    if got["gradients"].keys() != want["gradients"].keys():
        return [*wrong, f"which gradients exist: {sorted(got['gradients'].keys() ^ want['gradients'].keys())}"]
    largest = max(float(g.abs().max()) for g in want["gradients"].values())
    for name, gradient in want["gradients"].items():
        floor = 1e-1 if name.endswith(("k_proj.bias", "key.bias")) else 1e-4
        size = max(float(gradient.abs().max()), floor * largest)
        if not close(got["gradients"][name] / size, gradient / size):
            wrong.append(f"gradient of {name}")
    return wrong


def record(family, feature: str) -> None:
    RESULTS.setdefault(family.name, {"features": [], "note": family.note, "impl": family.impl})["features"].append(
        feature
    )


@by_family(FAMILIES)
def test_logits_loss_and_gradients_equal_eager(family):
    ours = models(family)[1]
    for padding in family.paddings:
        with counted_calls() as calls, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = step(ours, family, padding)
        assert sum(calls.values()) == family.layers, f"{padding}: attention calls {dict(calls)}"
        assert family.dense_only == (kernel_calls(calls) == 0), f"{padding}: {dict(calls)}"
        assert calls["reference"] == 0 or hf_support.is_oracle_in_place(), f"{padding}: {dict(calls)}"
        assert not differences(got, expected(family, padding)), padding
        record(family, f"padding {padding}")
        RESULTS[family.name].setdefault("calls", dict(calls))


@by_family([family for family in FAMILIES if family.generates])
def test_generated_tokens_equal_eager(family):
    eager, ours = models(family)
    paddings = [p for p in family.paddings if p != "right"] if family.inputs != "seq2seq" else family.paddings
    for padding in paddings:
        routes = {"dynamic": {}}
        if padding == paddings[-1]:
            routes["beams"] = {"num_beams": 2}
            if family.static:
                routes["static"] = {"cache_implementation": "static"}
        batch = families.inputs(family, padding, DEVICE)
        batch.pop("labels", None)
        for name, options in routes.items():
            tokens = []
            for model in (eager, ours):
                with counted_calls() as calls:
                    # No compilation of the static decode step here: test_hf_features compiles.
                    tokens.append(
                        model.generate(**batch, max_new_tokens=6, do_sample=False, disable_compile=True, **options)
                    )
            assert torch.equal(*tokens), f"{name}, padding {padding}"
            assert family.dense_only or kernel_calls(calls) > 0, f"{name}, padding {padding}: {dict(calls)}"
            record(family, f"generate {name}")


@by_family([family for family in FAMILIES if family.packs])
def test_packed_rows_equal_eager_on_each_sequence(family):
    """Two rows, each of two sequences, position_ids restarting: without a cache (the mask layer sees it) and with
    one."""
    eager, ours = models(family)
    ids = families.inputs(family, "none", DEVICE)["input_ids"]
    cut = [7, 12]
    positions = torch.stack([torch.cat([torch.arange(c), torch.arange(ids.shape[1] - c)]) for c in cut]).to(DEVICE)
    want = torch.stack(
        [
            torch.cat([eager(row[None, :c]).logits[0], eager(row[None, c:]).logits[0]])
            for row, c in zip(ids, cut, strict=True)
        ]
    )
    for use_cache in (False, True):
        with counted_calls() as calls:
            got = ours(ids, position_ids=positions, use_cache=use_cache).logits
        assert kernel_calls(calls) == family.layers
        assert close(got, want), f"use_cache={use_cache}"
    record(family, "packed")


def _wrong_calls():
    """Wrong attentions as functions of the operator's call."""
    return {
        "zeros": lambda call, run: (torch.zeros_like(run(call)[0]) + 0.0 * run(call)[0], None),
        "half scale": lambda call, run: run(replace(call, scale=call.scale / 2)),
        "causal flipped": lambda call, run: run(replace(call, window_right=-1 if call.window_right == 0 else 0)),
        "window ignored": lambda call, run: run(
            replace(call, window_left=-1, window_right=-1 if call.window_right > 0 else call.window_right)
        ),
        "softcap ignored": lambda call, run: run(replace(call, softcap=0.0)),
        "sinks ignored": lambda call, run: run(replace(call, sinks=None)),
        # Boundaries are how masks arrive: forget all but the outer ones.
        "mask ignored": lambda call, run: run(_unmasked(call)),
    }


def _unmasked(call):
    if call.attn_mask is not None:
        return replace(call, attn_mask=torch.ones_like(call.attn_mask, dtype=torch.bool))
    if call.cu_seqlens_q is None or call.cu_seqlens_q.numel() < 5 * families.BATCH:
        return call
    # Five sequences per row (boundaries.py): keep the rows, forget the ranges in them.
    q, kv = call.cu_seqlens_q, call.cu_seqlens_kv
    per_row = (q.numel() - 1) // families.BATCH
    return replace(call, cu_seqlens_q=q[::per_row].contiguous(), cu_seqlens_kv=kv[::per_row].contiguous())


@by_family(FAMILIES)
def test_wrong_attention_fails(family):
    """The negative controls: the comparison above must notice every one of them."""
    ours = models(family)[1]
    for name in family.wrong:
        # In a causal model right padding is behind every token that counts: only left padding needs the mask.
        padding = "none"
        if name == "mask ignored":
            padding = "left" if "left" in family.paddings else "right"
        wrong = _wrong_calls()[name]
        with standing_in(lambda _, call, run, wrong=wrong: wrong(call, run)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = step(ours, family, padding)
        assert "logits" in differences(got, expected(family, padding)), f"attention with {name} passes the comparison"
        record(family, f"fails with {name}")


def test_support_results_are_written(request):
    """Last in the file. Only complete runs are written."""
    path = os.environ.get("FLASHMLA_SUPPORT_JSON")
    if not path:
        pytest.skip("FLASHMLA_SUPPORT_JSON is not set")
    assert RESULTS.keys() == {family.name for family in FAMILIES}, "run the whole file, in one process"
    result = {
        "transformers": importlib.metadata.version("transformers"),
        "torch": torch.__version__,
        "device": DEVICE.type,
        "tolerance": TOLERANCE,
        "families": {name: {**r, "features": sorted(set(r["features"]))} for name, r in RESULTS.items()},
    }
    with open(path, "w") as file:
        json.dump(result, file, indent=1, sort_keys=True)
        file.write("\n")
