"""Every family of families.py on the GPU in half precision: logits, loss and the gradient of every parameter, with every
kernel call on sm90.

    python3 -m pytest tests/test_hf_gpu.py       # about two minutes on an H100

The truth is eager attention in float32 on the weights rounded to half precision; the rule is that of numerics.py, at the scale
of a model: the error is at most twice that of eager attention in the same dtype. (tests/test_hf_parity.py compares everything
else, in float32.) Sizes are root mean squares, and the median over inputs counts: a router of experts that rounds to another
expert moves single tokens, and with them whole gradients, in either model.
"""

from __future__ import annotations

import functools
import json
import statistics
import warnings
from dataclasses import replace
from pathlib import Path

import families
import gpu_support
import hf_support
import pytest
import torch
from counting import counted_calls, standing_in
from families import FAMILIES
from gpu_support import DEVICE, IMPL, needs_sm90
from hf_support import direct, dispatch

from flashmla_hf import reference
from flashmla_hf.hf import boundaries

pytestmark = needs_sm90
# How many of a family's attention calls without padding are the kernel's, from the recorded results of the parity suite.
RECORDED = json.loads((Path(__file__).parent / "support.json").read_text())["families"]
SEEDS = range(2, 9)  # of the inputs; one is enough where it keeps the rule


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


def step(model, family, padding, seed, dtype):
    """Logits (0 on padding), loss and the gradient of every parameter, in float64. Every model starts from inputs rounded
    to ``dtype``, its own or not."""
    own = next(model.parameters()).dtype
    batch = families.inputs(family, padding, DEVICE, seed)
    batch = {
        name: x.to(dtype).to(own) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in batch.items()
    }
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model(**batch)
        out.loss.backward()
    result = (out.logits_per_image if family.inputs == "clip" else out.logits).detach().double()
    mask = batch.get("attention_mask")
    if result.dim() == 3 and mask is not None and mask.shape[1] == result.shape[1]:
        result = result * mask[..., None]
    gradients = {f"gradient of {n}": p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": result, "loss": out.loss.detach().double(), **gradients}


def size_of(x):
    return float(x.square().mean().sqrt())


def errors(family, padding, dtype, seed):
    """({name: (error of ours, error of eager)}, calls of ours): errors relative to the truth. A gradient counts by its own
    size, down to 1e-2 of the largest one; a key bias, which softmax does not see and whose gradient is rounding noise
    around 0, down to 1e-1."""
    exact, eager, ours = models(family, dtype)
    with counted_calls() as calls:
        got = step(ours, family, padding, seed, dtype)
    truth, expected = (step(model, family, padding, seed, dtype) for model in (exact, eager))
    assert got.keys() == truth.keys() == expected.keys()
    largest = max(size_of(x) for name, x in truth.items() if name.startswith("gradient"))
    found = {}
    for name, x in truth.items():
        least = 0.0
        if name.startswith("gradient"):
            least = largest * (1e-1 if name.endswith(("k_proj.bias", "key.bias")) else 1e-2)
        size = max(size_of(x), least)
        found[name] = size_of(got[name] - x) / size, size_of(expected[name] - x) / size
    return found, calls


def misses_the_rule(family, padding, dtype) -> list[str]:
    """What misses the rule, by name. More inputs follow where one draw misses: on so few numbers eager's error is luck."""
    found = []
    for seed in SEEDS:
        one, calls = errors(family, padding, dtype, seed)
        recorded = sum(RECORDED[family.name]["calls"].get(name, 0) for name in hf_support.KERNELS)
        # A padded chunk (Llama 4) is a dense mask.
        is_expected = calls[IMPL] == recorded if padding == family.paddings[0] else bool(calls[IMPL]) == bool(recorded)
        assert is_expected, f"padding {padding}: calls {dict(calls)}, {recorded} of the kernel on the CPU"
        assert sum(calls.values()) == family.layers
        assert hf_support.kernel_calls(calls) == calls[IMPL]
        found.append(one)
        missed = []
        for name in one:
            mine, theirs = (statistics.median(x) for x in zip(*(errors[name] for errors in found), strict=True))
            if not mine <= 2.0 * theirs + torch.finfo(dtype).eps:
                missed.append(f"{name}: error {mine:.2e}, eager's {theirs:.2e}")
        if not missed:
            break
    return missed


@pytest.mark.parametrize("dtype", gpu_support.HALF, ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_training_steps_in_half_precision_keep_the_error_rule_and_every_kernel_call_is_sm90(family, dtype):
    for padding in family.paddings:
        missed = misses_the_rule(family, padding, dtype)
        assert not missed, f"padding {padding}: " + "; ".join(missed)


def with_half_the_gradient(x):
    return x / 2 + x.detach() / 2  # exact in binary numbers


CONTROLS = {
    "half scale": lambda call, run: run(replace(call, scale=call.scale / 2)),
    "causal flipped": lambda call, run: run(replace(call, window_right=-1 if call.window_right == 0 else 0)),
    "window ignored": lambda call, run: run(replace(call, window_left=-1)),
    "sinks ignored": lambda call, run: run(replace(call, sinks=0.0 * call.sinks - 1e4)),  # their gradient is there, 0
    **{
        f"half the gradient of {name}": lambda call, run, name=name: run(
            replace(call, **{name: with_half_the_gradient(getattr(call, name))})
        )
        for name in "qkv"
    },
}


@pytest.mark.parametrize("control", CONTROLS)
def test_wrong_attention_breaks_the_rule(control):
    """Where float32 finds every wrong attention (test_hf_parity), half precision still finds these."""
    names = {"window ignored": ("Mistral", "Gemma3 text"), "sinks ignored": ("GPT-OSS",)}
    for family in FAMILIES:
        if family.name not in names.get(control, ("Llama", "Qwen3", "GPT-2")):
            continue
        with standing_in(lambda name, call, run: CONTROLS[control](call, run) if name == IMPL else run(call)):
            missed = misses_the_rule(family, "none", torch.bfloat16)
        is_of_forward = "gradient" not in control
        assert missed, f"{family}: {control} passes"
        assert any(text.startswith("logits") for text in missed) == is_of_forward, missed


def test_the_count_notices_a_call_of_another_implementation(monkeypatch):
    """The count above must see it: sm90 refuses, another implementation answers with the right numbers."""
    family = next(family for family in FAMILIES if family.name == "Llama")
    monkeypatch.setattr(direct, "enabled", False)
    saved = dict(dispatch.IMPLEMENTATIONS)
    oracle = dispatch.IMPLEMENTATIONS["reference"]
    dispatch.IMPLEMENTATIONS[IMPL] = replace(saved[IMPL], refusal=lambda call: "a test")
    dispatch.IMPLEMENTATIONS["torch_flash"] = dispatch.IMPLEMENTATIONS["flex"] = oracle
    if IMPL == "cpu":  # nothing comes after it in the table
        dispatch.IMPLEMENTATIONS["cpu"] = oracle
        with counted_calls() as calls:
            step(models(family, torch.bfloat16)[2], family, "none", 2, torch.bfloat16)
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


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=gpu_support.on_gpu)], ids=["", "compiled"])
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GPT-OSS"])
def test_static_caches_decode_on_sm90(name, is_compiled, monkeypatch):
    """A padded batch in bfloat16, by ``generate``'s own compilation with CUDA graphs too: the logits of a dynamic cache."""
    monkeypatch.setattr(reference, "attention", None)  # nothing may fall back to it, in a graph either
    torch._dynamo.reset()
    family = families.FAMILY[name]
    ours = models(family, torch.bfloat16)[2]
    batch = families.inputs(family, "left", DEVICE)
    batch.pop("labels")
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with counted_calls() as calls:
        want = ours.generate(**batch, **options)
    assert calls == {IMPL: 6 * family.layers}
    static = {**options, "cache_implementation": "static", "disable_compile": not is_compiled}
    if is_compiled:
        got = ours.generate(**batch, **static)
    else:
        with counted_calls() as calls:
            got = ours.generate(**batch, **static)
        assert calls == {IMPL: 6 * family.layers}
    first, second = (torch.stack(out.logits[:2]).float() for out in (got, want))  # later ones may follow other tokens
    assert (first - second).square().mean().sqrt() <= 0.05 * second.square().mean().sqrt()


@gpu_support.on_gpu
def test_padding_of_any_length_compiles():
    """One graph for all lengths, the short and the long ones, which inductor reduces in a loop."""

    def ranges(mask):
        found = boundaries.key_ranges(mask)
        return found.start, found.end

    torch._dynamo.reset()
    compiled = torch.compile(ranges, dynamic=True, fullgraph=True)
    for length in (40, 5000, 70_001):
        mask = torch.arange(length, device=DEVICE) >= torch.tensor([[7], [0], [length - 1]], device=DEVICE)
        start, end = compiled(mask)
        assert (start.tolist(), end.tolist()) == ([7, 0, length - 1], [length] * 3)
