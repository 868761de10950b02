"""QLoRA by flashmla finetune: it trains, saves an adapter that loads, resumes, and says what is missing."""

from __future__ import annotations

import importlib.util
import json

import models
import pytest
import torch
from training_support import losses, options

import flashmla_hf
from flashmla_hf.host_memory import GIB
from flashmla_hf.training import finetune, quantization
from flashmla_hf.training.terms import PACKED_BYTES

pytestmark = pytest.mark.usefixtures("fresh_accelerate_state")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@needs_bitsandbytes
def test_qlora_trains_evaluates_resumes_and_saves_an_adapter_that_loads(tiny_model, corpus, tmp_path, capsys):
    from peft import AutoPeftModelForCausalLM

    shared = {
        "use_peft": True, "load_in_4bit": True, "patches": "all", "max_steps": 4, "save_steps": 2, "eval_steps": 1,
        "validation_split_percentage": 10, "lr_scheduler_type": "constant", "learning_rate": 2e-2,
    }  # fmt: skip
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    finetune.main(options(tiny_model, corpus, whole, **shared))
    results = json.loads((whole / "all_results.json").read_text())
    assert results["eval_loss"] < results["first_eval_loss"]
    printed = capsys.readouterr().out
    everything = sum(p.numel() for p in AutoPeftModelForCausalLM.from_pretrained(whole).parameters())
    assert f"of {everything:,} parameters are trained" in printed

    finetune.main(options(tiny_model, corpus, resumed, **shared | {"max_steps": 2}))
    finetune.main(options(tiny_model, corpus, resumed, **shared, resume_from_checkpoint="latest"))
    assert losses(resumed) == losses(whole)


@needs_bitsandbytes
def test_patches_change_no_loss_and_an_evaluation_on_a_cpu_no_gradient(tiny_model, corpus, tmp_path):
    shared = {
        "use_peft": True, "load_in_4bit": True, "max_steps": 3, "lr_scheduler_type": "constant",
        "validation_split_percentage": 10,
    }  # fmt: skip
    found = {}
    for name, more in {"plain": {"patches": "none"}, "evaluated": {"patches": "none", "eval_steps": 1},
                       "patched": {"patches": "all"}}.items():  # fmt: skip
        finetune.main(options(tiny_model, corpus, tmp_path / name, **shared, **more))
        found[name] = losses(tmp_path / name)
    assert found["evaluated"] == found["plain"]
    assert found["patched"] == pytest.approx(found["plain"], rel=2e-5)


def test_what_is_missing_is_named_with_the_way_out(tiny_model, corpus, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="expected --use_peft, because 4-bit weights are not trained"):
        finetune.main(options(tiny_model, corpus, tmp_path, load_in_4bit=True))
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install bitsandbytes"):
        finetune.main(options(tiny_model, corpus, tmp_path, load_in_4bit=True, use_peft=True))


@needs_bitsandbytes
def test_a_random_model_is_packed_layer_by_layer_and_the_ledger_counts_its_weights():
    model = models.load_4bit("tiny", "flashmla", torch.bfloat16, "cpu")
    assert not any(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    dense = models.load("tiny", "flashmla", torch.bfloat16, "cpu")
    assert quantization.parameter_count(model) == sum(p.numel() for p in dense.parameters())
    assert torch.equal(model.model.rotary_emb.inv_freq, dense.model.rotary_emb.inv_freq)
    ids = torch.randint(512, (1, 32))
    assert torch.isfinite(model(input_ids=ids).logits).all()

    linear = [m for m in model.modules() if hasattr(m, "quant_state")]
    packed = sum(m.weight.numel() + m.weight.absmax.numel() + 4 * m.weight.nested_absmax.numel() for m in linear)
    weights = sum(torch.Size(m.weight.quant_state.shape).numel() for m in linear)
    # A small matrix has a float32 scale for fewer than 256 of the other scales.
    assert packed == pytest.approx(weights * PACKED_BYTES, rel=1e-2)


def test_the_ledger_of_a_qlora_step():
    dense, packed = (
        flashmla_hf.ledger("llama-8b", 131072, patches="all", dtype=dtype) for dtype in ("bfloat16", "4bit")
    )
    saved = (dense.peak_bytes - packed.peak_bytes) / GIB
    assert 9 < saved < 10  # 13 GiB of linear weights become 3.4; an MLP's three are unpacked
    assert packed.longest(22) > 100_000
    with pytest.raises(ValueError, match="'4bit': expected an adapter"):
        flashmla_hf.ledger("llama-8b", dtype="4bit", use_peft=False)
