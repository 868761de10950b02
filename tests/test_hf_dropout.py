"""Dropout in training through Transformers' interface, where a GPU has a fused kernel for it (``torch_flash``).

flash_operator.py takes the place of torch's operators, and a CPU passes for a GPU.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from counting import counted_calls
from flash_operator import FlashOperator

pytest.importorskip("transformers")

import families
import transformers
from families import FAMILY

from flashmla_hf import notices
from flashmla_hf.backends import aten_flash
from flashmla_hf.hf import check, forward


@pytest.fixture
def operator(monkeypatch):
    monkeypatch.setattr(aten_flash, "device_refusal", lambda device: None)
    monkeypatch.setattr(notices, "_warned", set())
    stand_in = FlashOperator()
    library = stand_in.install()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="flashmla")
        yield stand_in
    library._destroy()


def tensors(seqlen=24, heads=(4, 2, 2)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, h, seqlen, 16, generator=generator).bfloat16().requires_grad_() for h in heads]


def layer(is_causal=True):
    module = torch.nn.Module()
    module.is_causal = is_causal
    return module


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_padded_batches_drop_in_the_fused_kernel(side, is_causal, operator):
    query, key, value = tensors()
    mask = None
    if side != "none":
        mask = torch.ones(2, 24, dtype=torch.bool)
        hidden = slice(0, 7) if side == "left" else slice(17, None)
        mask[1, hidden] = False
        with torch.no_grad():
            value[1, :, hidden] = 1e4  # a row that saw it would be far off
    with counted_calls() as calls:
        out, _ = forward.attention_forward(
            layer(is_causal), query, key, value, mask, dropout=0.5, is_causal=is_causal, scaling=0.25
        )
        out[mask].float().sum().backward() if mask is not None else out.float().sum().backward()
    assert calls == {"torch_flash": 1}
    assert operator.arguments["dropout_p"] == 0.5
    seen = out if mask is None else out[mask]
    assert seen.abs().max() < 20
    assert query.grad.isfinite().all()
    if mask is not None:
        assert not value.grad[1, :, hidden].any()


def test_packed_rows_drop_in_the_fused_kernel(operator):
    query, key, value = (t[:1] for t in tensors())
    positions = torch.tensor([[*range(10), *range(14)]])
    with counted_calls() as calls:
        forward.attention_forward(layer(), query, key, value, None, dropout=0.25, position_ids=positions)
    assert calls == {"torch_flash": 1}
    assert operator.arguments["dropout_p"] == 0.25
    assert operator.arguments["is_causal"]


@pytest.mark.parametrize(
    "options", [{"softcap": 5.0}, {"s_aux": torch.ones(4)}, {"position_bias": torch.zeros(1, 4, 24, 24)}]
)
def test_what_the_fused_kernel_does_not_compute_is_computed_as_before(options, operator):
    query, key, value = tensors()
    with warnings.catch_warnings(), counted_calls() as calls:
        warnings.simplefilter("ignore")
        forward.attention_forward(layer(), query, key, value, None, dropout=0.25, **options)
    assert "torch_flash" not in calls
    assert sum(calls.values()) == 1


def test_on_a_cpu_dropout_is_computed_as_before():
    query, key, value = tensors()
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[1, 17:] = False
    with warnings.catch_warnings(), counted_calls() as calls:
        warnings.simplefilter("ignore")
        forward.attention_forward(layer(), query, key, value, mask, dropout=0.25)
    assert calls == {"sdpa": 1}


def test_a_model_trains_with_dropout_in_every_layer(operator):
    config = FAMILY["Llama"].config()
    config.attention_dropout = 0.5
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="flashmla", dtype=torch.bfloat16)
    families._spread(model)
    ids = torch.arange(1, 25).view(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    with counted_calls() as calls:
        loss = model.train()(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
    assert calls == {"torch_flash": config.num_hidden_layers}
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_the_report_on_a_model_says_where_dropout_runs(operator, monkeypatch):
    config = FAMILY["Llama"].config()
    config.attention_dropout = 0.1
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="flashmla")
    inside = "in training its dropout of 0.1 is computed by torch's FlashAttention (torch_flash) in fp16 and bf16"
    outside = "in training its dropout of 0.1 is exact, but computed outside the fused kernel"
    assert inside in str(check.check(model))
    for layer in model.model.layers:
        layer.self_attn.sinks = torch.zeros(4)
    assert outside in str(check.check(model))
    monkeypatch.undo()  # a CPU again
    for layer in model.model.layers:
        del layer.self_attn.sinks
    assert outside in str(check.check(model))
