"""Every family of families.py on the GPU in half precision: the logits, with every kernel call on sm90.

    python3 -m pytest tests/test_hf_gpu.py       # about a minute on an H100

The truth is eager attention in float32 on the weights rounded to half precision; the rule is that of numerics.py, at the scale
of a model: the error is at most twice that of eager attention in the same dtype. (tests/test_hf_parity.py compares everything
else, in float32.) Sizes are root mean squares: a router of experts that rounds to another expert moves single tokens in
either model.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from dataclasses import replace
from pathlib import Path

import families
import gpu_support
import hf_support
import pytest
import torch
from counting import counted_calls
from families import FAMILIES
from hf_support import dispatch

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

DEVICE = os.environ.get("FLASHMLA_SM90_TESTS_ON", "cuda")  # "cpu": the code of these tests, without the kernel
IMPL = "sm90" if DEVICE == "cuda" else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and gpu_support.sm90_missing() is not None, reason=f"sm90: {gpu_support.sm90_missing()}"
)
# How many of a family's attention calls without padding are the kernel's, from the recorded results of the parity suite.
RECORDED = json.loads((Path(__file__).parent / "support.json").read_text())["families"]
SEEDS = range(2, 6)  # of the inputs; one is enough where it keeps the rule


@pytest.fixture(autouse=True)
def exact_float32():
    """The truth is computed in float32, not in TF32, which convolutions take by default."""
    saved = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # of matrix products hf_support did the same
    yield
    torch.backends.cudnn.allow_tf32 = saved


@functools.lru_cache(maxsize=2)
def models(family, dtype):
    """(eager in float32, eager in ``dtype``, ours in ``dtype``), on the same weights, which ``dtype`` holds exactly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exact = families.build(family, "eager", DEVICE)
        with torch.no_grad():
            for x in (*exact.parameters(), *exact.buffers()):
                if x.is_floating_point():
                    x.copy_(x.to(dtype))
        state = exact.state_dict()
        return exact, *(families.build(family, name, DEVICE, state).to(dtype) for name in ("eager", family.impl))


def logits(model, family, padding, seed, dtype):
    """In float64, 0 on padding. Every model starts from inputs rounded to ``dtype``, its own or not."""
    own = next(model.parameters()).dtype
    batch = families.inputs(family, padding, DEVICE, seed)
    batch = {
        name: x.to(dtype).to(own) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in batch.items()
    }
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model(**batch)
    result = (out.logits_per_image if family.inputs == "clip" else out.logits).double()
    mask = batch.get("attention_mask")
    if result.dim() == 3 and mask is not None and mask.shape[1] == result.shape[1]:
        result = result * mask[..., None]
    return result


def errors(family, padding, dtype, seed):
    """(error of ours, error of eager, calls of ours): errors relative to the truth."""
    exact, eager, ours = models(family, dtype)
    with counted_calls() as calls:
        got = logits(ours, family, padding, seed, dtype)
    truth, expected = (logits(model, family, padding, seed, dtype) for model in (exact, eager))
    mine, theirs = (float((x - truth).square().mean().sqrt() / truth.square().mean().sqrt()) for x in (got, expected))
    return mine, theirs, calls


def misses_the_rule(family, padding, dtype) -> str | None:
    """Both errors averaged over a few inputs, where one draw misses: on so few numbers eager's error is luck."""
    found = []
    for seed in SEEDS:
        mine, theirs, calls = errors(family, padding, dtype, seed)
        recorded = sum(RECORDED[family.name]["calls"].get(name, 0) for name in hf_support.KERNELS)
        # A padded chunk (Llama 4) is a dense mask.
        is_expected = calls[IMPL] == recorded if padding == family.paddings[0] else bool(calls[IMPL]) == bool(recorded)
        assert is_expected, f"padding {padding}: calls {dict(calls)}, {recorded} of the kernel on the CPU"
        assert sum(calls.values()) == family.layers
        assert hf_support.kernel_calls(calls) == calls[IMPL]
        found.append((mine, theirs))
        mine, theirs = (sum(x) / len(found) for x in zip(*found, strict=True))
        if mine <= 2.0 * theirs + torch.finfo(dtype).eps:
            return None
    return f"{family} {dtype}, padding {padding}: error {mine:.2e} of the logits, eager's {theirs:.2e}"


@pytest.mark.parametrize("dtype", gpu_support.HALF, ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_logits_in_half_precision_keep_the_error_rule_and_every_kernel_call_is_sm90(family, dtype):
    for padding in family.paddings:
        missed = misses_the_rule(family, padding, dtype)
        assert missed is None, missed


CONTROLS = {
    "half scale": lambda call, run: run(replace(call, scale=call.scale / 2)),
    "causal flipped": lambda call, run: run(replace(call, window_right=-1 if call.window_right == 0 else 0)),
    "window ignored": lambda call, run: run(replace(call, window_left=-1)),
    "sinks ignored": lambda call, run: run(replace(call, sinks=None)),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_wrong_attention_breaks_the_rule(control):
    """Where float32 finds every wrong attention (test_hf_parity), half precision still finds these."""
    names = {"window ignored": ("Mistral", "Gemma3 text"), "sinks ignored": ("GPT-OSS",)}
    for family in FAMILIES:
        if family.name not in names.get(control, ("Llama", "Qwen3", "GPT-2")):
            continue
        saved = dispatch.IMPLEMENTATIONS[IMPL]
        wrong = functools.partial(CONTROLS[control], run=saved.run)
        dispatch.IMPLEMENTATIONS[IMPL] = replace(saved, run=wrong)
        try:
            assert misses_the_rule(family, "none", torch.bfloat16) is not None, f"{family}: {control} passes"
        finally:
            dispatch.IMPLEMENTATIONS[IMPL] = saved


def test_a_call_that_goes_elsewhere_is_noticed():
    """The count above must see it: sm90 refuses, another implementation answers with the right numbers."""
    family = next(family for family in FAMILIES if family.name == "Llama")
    saved = dict(dispatch.IMPLEMENTATIONS)
    oracle = dispatch.IMPLEMENTATIONS["reference"]
    dispatch.IMPLEMENTATIONS[IMPL] = replace(saved[IMPL], refusal=lambda call: "a test")
    dispatch.IMPLEMENTATIONS["flex"] = oracle
    if IMPL == "cpu":  # nothing comes after it in the table
        dispatch.IMPLEMENTATIONS["cpu"] = oracle
        with counted_calls() as calls:
            logits(models(family, torch.bfloat16)[2], family, "none", 2, torch.bfloat16)
        dispatch.IMPLEMENTATIONS.update(saved)
        assert calls == {"cpu": family.layers}
        return
    try:
        with pytest.raises(AssertionError, match="calls"):
            misses_the_rule(family, "none", torch.bfloat16)
    finally:
        dispatch.IMPLEMENTATIONS.update(saved)


def test_generation_decodes_on_sm90():
    """Prefill and each step with a cache, in bfloat16: the logits of every step beside those of the whole text at once."""
    for name in ("Llama", "Gemma2", "GPT-OSS"):
        family = next(family for family in FAMILIES if family.name == name)
        _, eager, ours = models(family, torch.bfloat16)
        ids = families.inputs(family, "none", DEVICE)["input_ids"]
        with torch.no_grad():
            with counted_calls() as calls:
                out = ours.generate(
                    input_ids=ids, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True,
                    disable_compile=True,
                )  # fmt: skip
            whole, theirs = (
                model(input_ids=out.sequences).logits[:, ids.shape[1] - 1 : -1].float() for model in (ours, eager)
            )
        assert calls == {IMPL: 5 * family.layers}
        steps = torch.stack(out.logits, dim=1).float()
        size = whole.square().mean().sqrt()
        apart = (steps - whole).square().mean().sqrt() / size
        assert apart <= 2 * float((theirs - whole).square().mean().sqrt() / size) + 0.02
