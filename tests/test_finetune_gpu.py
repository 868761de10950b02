"""Fine-tuning on the GPU: a small Llama in bfloat16 trains with attn_implementation="flashmla" as it does with eager.

    python3 -m pytest tests/test_finetune_gpu.py                   # under a minute on an H100, half of it compiling
    python3 -m pytest tests/test_finetune_gpu.py -m "not slow"

What is compared is the curve of the loss. Two trainings that differ by rounding drift apart, so nobody's curve is the one to
hit: the truth is the curve of eager attention in float32, and ours, in bfloat16, may be as far from it as twice the curve of
eager in bfloat16 (root mean square over the steps), plus 3e-4 of the loss, since where eager's rounding errors cancel its
distance is luck. Wrong attention and wrong gradients must be farther (the negative controls).
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
import transformers
from counting import counted_calls
from gpu_support import DEVICE, IMPL, needs_sm90
from hf_support import direct, dispatch

pytestmark = needs_sm90
STEPS, BATCH, HALF_OF_A_ROW = (50, 4, 128) if DEVICE == "cuda" else (12, 2, 40)
LAYERS, VOCAB = 2, 256
# On the CPU inductor would compile C++ for half a minute, which is not what is tested.
BACKEND = "inductor" if DEVICE == "cuda" else "aot_eager"


def everything(model):
    return model


def last_layer_and_head(model):
    """The rest is frozen: the first layer's attention has no gradients to compute."""
    model.requires_grad_(False)
    model.model.layers[-1].requires_grad_(True)
    model.lm_head.requires_grad_(True)
    return model


def norms_and_head(model):
    """Every attention passes gradients on, and none of its projections trains."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name or "lm_head" in name)
    return model


def lora(model):
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM"))


def build(impl, trains):
    """Weights so large that the scores' standard deviation is about 2.5: the attention decides."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=LAYERS, num_attention_heads=8, num_key_value_heads=2,
        head_dim=64, vocab_size=VOCAB, initializer_range=0.1, max_position_embeddings=1024,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation=impl)
    return trains(model.to(DEVICE).train())


def train(model, dtype):
    """The losses of ``STEPS`` steps on rows whose second half repeats the first, in float32 weights."""
    generator = torch.Generator().manual_seed(2)
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=1e-3)
    losses = []
    for _ in range(STEPS):
        half = torch.randint(0, VOCAB, (BATCH, HALF_OF_A_ROW), generator=generator)
        ids = torch.cat([half, half], dim=1).to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).double().cpu()


@functools.cache
def eager(trains, dtype):
    return train(build("eager", trains), dtype)


def distance(curve, truth):
    return float((curve - truth).square().mean().sqrt())


def limit(trains):
    truth = eager(trains, torch.float32)
    return 2.0 * distance(eager(trains, torch.bfloat16), truth) + 3e-4 * float(truth.mean())


def assert_trains_like_eager(curve, trains):
    apart, allowed = distance(curve, eager(trains, torch.float32)), limit(trains)
    assert apart <= allowed, f"{apart:.2e} from eager in float32, allowed {allowed:.2e}; losses {curve.tolist()}"


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["plain", "gradient checkpointing"])
@pytest.mark.parametrize("trains", [everything, lora, last_layer_and_head, norms_and_head], ids=lambda f: f.__name__)
def test_the_loss_falls_as_it_does_with_eager_attention(trains, is_checkpointed):
    model = build("flashmla", trains)
    if is_checkpointed:
        model.gradient_checkpointing_enable()
    with counted_calls() as calls:
        curve = train(model, torch.bfloat16)
    assert calls == {IMPL: STEPS * LAYERS * (2 if is_checkpointed else 1)}
    assert_trains_like_eager(curve, trains)
    truth = eager(trains, torch.float32)
    assert truth[-1] < truth[0], "nothing is learnt: the comparison says little"


@pytest.mark.slow
def test_a_compiled_model_trains_as_with_eager_attention():
    torch._dynamo.reset()
    model = torch.compile(build("flashmla", everything), backend=BACKEND)
    with counted_calls() as calls:
        curve = train(model, torch.bfloat16)
    assert set(calls) == {IMPL}
    assert_trains_like_eager(curve, everything)


def with_gradients_a_row_late(x):
    x = x * 1
    x.register_hook(lambda grad: grad.roll(1, dims=1))
    return x


CONTROLS = {
    "half scale": lambda call, run: run(replace(call, scale=call.scale / 2)),
    "not causal": lambda call, run: run(replace(call, window_right=-1)),
    "a window": lambda call, run: run(replace(call, window_left=HALF_OF_A_ROW // 2)),
    "no gradient of q": lambda call, run: run(replace(call, q=call.q.detach())),
    "no gradient of k": lambda call, run: run(replace(call, k=call.k.detach())),
    "v's gradients a row too late": lambda call, run: run(replace(call, v=with_gradients_a_row_late(call.v))),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_training_with_wrong_attention_breaks_the_rule(control, monkeypatch):
    right = dispatch.IMPLEMENTATIONS[IMPL]
    wrong = replace(right, run=functools.partial(CONTROLS[control], run=right.run))
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, IMPL, wrong)
    monkeypatch.setattr(direct, "enabled", False)
    curve = train(build("flashmla", everything), torch.bfloat16)
    with pytest.raises(AssertionError, match="from eager in float32"):
        assert_trains_like_eager(curve, everything)
