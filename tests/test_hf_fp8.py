"""``attn_implementation="flashmla_fp8"`` in Transformers, against plain code that rounds the same numbers."""

import re

import pytest
import torch
import transformers
from counting import counted_calls
from hf_support import DEVICE, build_causal_lm, close, needs_kernel, random_ids
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface

import flashmla_hf
from flashmla_hf.fp8.quantization import quantize, rotate

pytestmark = [
    pytest.mark.usefixtures("recompile_limit_is_put_back"),
    needs_kernel, pytest.mark.skipif(DEVICE.type != "cpu", reason="compares with the CPU's exact probabilities"),
    pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning"),
]  # fmt: skip
FAMILIES = {
    "Llama": {}, "Mistral": {"sliding_window": 24}, "Gemma2": {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16},
    "GptOss": {"head_dim": 16, "sliding_window": 24, "num_local_experts": 2, "num_experts_per_tok": 1},
}  # fmt: skip
each_family = pytest.mark.parametrize("family", FAMILIES)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def rounding_eager(module, query, key, value, attention_mask, scaling, dropout=0.0, softcap=None, s_aux=None, **kwargs):
    """Eager attention of q, k and v that went to fp8 and back. [batch, heads, seqlen, dim] with eager's mask."""
    q, k = (rotate(x.transpose(1, 2), is_key) for x, is_key in ((query, False), (key, True)))
    q, k, v = (
        _StraightThrough.apply(x, quantize(x).dequantize()).transpose(1, 2) for x in (q, k, value.transpose(1, 2))
    )
    k, v = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (k, v))
    scores = q @ k.mT * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    if s_aux is not None:
        scores = torch.cat([scores, s_aux[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    weights = scores.softmax(-1)
    weights = weights if s_aux is None else weights[..., :-1]
    return (weights @ v).transpose(1, 2).contiguous(), None


def assert_same_rounding(got, expected, exact, name=""):
    """got differs from exact as expected does. A last bit of fp32 before a rounding to 3 bits moves single numbers by a step of
    those, and layers pass it on, so norms are compared, not the largest difference."""
    step, error = (expected - exact).norm(), (got - expected).norm()
    assert error <= 0.2 * step, f"{name}: {error:.3e} off, where rounding makes {step:.3e}"


AttentionInterface.register("rounding_eager", rounding_eager)
AttentionMaskInterface.register("rounding_eager", eager_mask)


def ours_and_rounding(family, ours="flashmla_fp8"):
    model = build_causal_lm(ours, family, **FAMILIES[family])
    if family == "GptOss":
        type(model)._compatible_flash_implementations = None
    return model, build_causal_lm("rounding_eager" if ours == "flashmla_fp8" else "eager", family, **FAMILIES[family])


@each_family
def test_a_model_in_fp8_is_eager_attention_of_rounded_numbers(family):
    model, rounding = ours_and_rounding(family)
    ids = random_ids(2, 150)
    with counted_calls() as calls:
        got = model(ids, labels=ids, use_cache=False)
        got.loss.backward()
    assert calls == {"fp8 cpu": 2}
    expected = rounding(ids, labels=ids, use_cache=False)
    expected.loss.backward()
    plain = build_causal_lm("flashmla", family, **FAMILIES[family])
    exact = plain(ids, labels=ids, use_cache=False)
    exact.loss.backward()
    assert_same_rounding(got.logits, expected.logits, exact.logits, "logits")
    for (name, p), other, third in zip(
        model.named_parameters(), rounding.parameters(), plain.parameters(), strict=True
    ):
        if other.grad is not None:
            assert_same_rounding(p.grad, other.grad, third.grad, name)
    assert (got.logits - exact.logits).norm() < 0.5 * exact.logits.norm()


def test_packed_rows_and_padding_are_those_of_flashmla():
    """A packed row is its documents alone; padding on the left changes nothing for the real tokens."""
    model = build_causal_lm("flashmla_fp8")
    ids = random_ids(1, 70)
    positions = torch.cat([torch.arange(40), torch.arange(30)])[None]
    alone = [model(ids[:, a:b], use_cache=False).logits for a, b in ((0, 40), (40, 70))]
    packed = model(ids, position_ids=positions, use_cache=False).logits
    assert close(packed, torch.cat(alone, 1))
    padded = torch.nn.functional.pad(ids[:, :40], (6, 0))
    mask = torch.ones_like(padded)
    mask[:, :6] = 0
    with counted_calls() as calls:
        logits = model(
            padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False
        ).logits
    assert calls == {"fp8 cpu": 2}
    assert close(logits[:, 6:], alone[0])


def test_every_step_of_generate_is_in_fp8():
    model = build_causal_lm("flashmla_fp8")
    ids = random_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with counted_calls() as calls:
        model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert calls == {"fp8 cpu": 2 * 8}


def test_continuous_batching_is_in_fp8():
    model = build_causal_lm("flashmla_fp8")
    config = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    with counted_calls() as calls:
        outputs = model.generate_batch(
            [random_ids(9).tolist(), random_ids(5, seed=1).tolist()], generation_config=config
        )
    assert len(outputs) == 2
    assert set(calls) == {"fp8 cpu"}


# ---- What fp8 does not cover -----------------------------------------------------------------------------------------


def test_what_fp8_does_not_cover_raises_in_words():
    model = build_causal_lm("flashmla_fp8")
    ids = random_ids(1, 20)
    holes = torch.ones_like(ids)
    holes[0, 5] = 0
    custom = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril(3)
    for options, got in (
        ({"output_attentions": True}, "output_attentions=True"), ({"attention_mask": holes}, "a mask that is not one of padding"),
        ({"attention_mask": custom}, "a mask that is not one of padding"),
    ):  # fmt: skip
        message = f"expected a call that fp8 covers, got {got}"
        with pytest.raises(NotImplementedError, match=re.escape(message)):
            model(ids, use_cache=False, **options)
    dropping = build_causal_lm("flashmla_fp8", attention_dropout=0.1).train()
    with pytest.raises(NotImplementedError, match=r'got a dropout of 0\.1\. Use attn_implementation="flashmla"'):
        dropping(ids, use_cache=False)


def test_models_on_transformers_flash_path_are_refused():
    config = transformers.FalconConfig(vocab_size=96, hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(ValueError, match="which calls Transformers' flash path"):
        transformers.FalconForCausalLM._from_config(config, attn_implementation="flashmla_fp8")
    model = transformers.FalconForCausalLM._from_config(config, attn_implementation="flashmla")
    model.set_attn_implementation("flashmla_fp8")  # Transformers says that it changes nothing
    assert model.config._attn_implementation == "flashmla"


def test_check_says_what_fp8_is():
    model = build_causal_lm("flashmla_fp8", attention_dropout=0.1)
    report = flashmla_hf.check(model)
    assert report
    assert "in fp8, which is not exact; on a GPU that is not a Hopper the call raises" in str(report)
    assert "in training its dropout of 0.1 raises" in str(report)
    t5 = transformers.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    report = flashmla_hf.check(transformers.T5EncoderModel._from_config(t5, attn_implementation="flashmla_fp8"))
    assert not report
    assert "which takes no position_bias" in str(report)
