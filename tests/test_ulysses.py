"""Rows divided among processes by DeepSpeed's Ulysses attention, with our kernel in it, give one process's loss and gradients."""

from __future__ import annotations

from types import SimpleNamespace

import gloo_processes
import pytest
import torch
import transformers
import ulysses_cases

from flashmla_hf.training import sequence_parallel
from flashmla_hf.training.arguments import UserError

needs_deepspeed = pytest.mark.skipif(not gloo_processes.HAS_DEEPSPEED, reason="not installed: deepspeed, einops")


@needs_deepspeed
@pytest.mark.parametrize(("processes", "name"), [(2, "flashmla"), (2, "flashmla/flash-attn3"), (4, "flashmla")])
def test_divided_rows_give_the_loss_and_gradients_of_each_document_alone(processes, name):
    """Packed documents; windows, softcap, sinks, fewer heads of keys than processes; LoRA; every patch that supports the model."""
    families = (
        ulysses_cases.FAMILIES if processes == 2 and name == "flashmla" else ("Llama, one head of keys", "GptOss")
    )
    cases = [(family, False, True) for family in families]
    cases += [("Llama", True, True), ("GptOss", False, False)] if processes == 2 else []
    results = gloo_processes.run(ulysses_cases.ulysses, cases, name, processes=processes)
    for (family, lora, patched), got in zip(cases, results[0], strict=True):
        expected = ulysses_cases.eager(family, lora)
        case = f"{family}, LoRA {lora}, patched {patched}"
        assert got.keys() == expected.keys(), case
        for part, value in expected.items():
            near = 2e-4 * max(1e-3, float(value.abs().max()))
            torch.testing.assert_close(
                torch.from_numpy(got[part]),
                value,
                atol=near,
                rtol=1e-3,
                msg=lambda m, where=f"{case}: {part}": f"{where}: {m}",
            )


# ---- refusals --------------------------------------------------------------------------------------------------------


def arguments(**given):
    return SimpleNamespace(sp_size=2, **given)


@pytest.mark.parametrize(
    ("processes", "implementation", "size", "said"),
    [
        (3, "flashmla", 2, "expected a divisor of the number of processes, 3, got 2"),
        (2, "sdpa", 2, "which would attend across documents"),
        (2, "eager", 2, "which would attend across documents"),
        (
            2,
            "flashmla_fp8",
            2,
            "got flashmla_fp8, which has no kernel for the GPUs .* Leave out --sp_size, or give flashmla$",
        ),
        (2, "somebody/flash-attn9", 2, "got somebody/flash-attn9, which has not been tried with divided sequences$"),
    ],
)
def test_what_cannot_be_divided_is_refused(processes, implementation, size, said):
    with pytest.raises(UserError, match=said):
        sequence_parallel.check(
            SimpleNamespace(num_processes=processes),
            SimpleNamespace(attn_implementation=implementation),
            SimpleNamespace(sp_size=size),
        )


@pytest.mark.parametrize("name", ["sp", "cp", "tp"])
def test_another_division_by_accelerate_launch_is_refused(name, monkeypatch):
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", "2")
    for implementation, said in (("flashmla", "on any engine$"), ("flashmla_fp8", "on any engine and not in fp8$")):
        with pytest.raises(UserError, match=f"parallelism_config_{name}_size: expected 1, got 2.*--sp_size.*{said}"):
            sequence_parallel.check(
                SimpleNamespace(num_processes=2),
                SimpleNamespace(attn_implementation=implementation),
                SimpleNamespace(sp_size=1),
            )


@pytest.mark.parametrize("name", ["flashmla", "flashmla_fp8"])
def test_torchs_context_parallelism_is_refused_under_the_name_that_was_asked_for(name, monkeypatch):
    from flashmla_hf.hf import transformers_private

    model = transformers.LlamaForCausalLM._from_config(
        transformers.LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
        ),
        attn_implementation=name,
    )
    monkeypatch.setattr(transformers_private, "context_parallel_is_active", lambda: True)
    with pytest.raises(NotImplementedError, match=f"^{name} in LlamaAttention: torch's context parallelism is active"):
        model(torch.ones(1, 8, dtype=torch.long))


@pytest.mark.parametrize(
    ("config", "size", "said"),
    [
        (transformers.LlamaConfig(hidden_size=96, num_attention_heads=6), 4, "expected a divisor of its 6 heads"),
        (
            transformers.LlamaConfig(hidden_size=96, num_attention_heads=12, num_key_value_heads=3),
            2,
            "a divisor or a multiple of its 3",
        ),
        (transformers.DeepseekV3Config(), 2, "expected heads of one size"),
        (transformers.Llama4TextConfig(), 2, "Ulysses passes no mask on"),
        (transformers.Qwen3NextConfig(), 2, "got linear_attention"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_a_model_whose_attention_cannot_be_divided_is_refused(config, size, said):
    with pytest.raises(UserError, match=said):
        sequence_parallel.check_model(config, size)


def test_a_part_has_its_successors_labels_and_the_boundaries_of_the_whole_row():
    whole = ulysses_cases.packed_row("flashmla")
    parts = [ulysses_cases.packed_row("flashmla", sequence_parallel.Share(0, 1, part, 2).cut) for part in range(2)]
    joined = {
        name: torch.cat([part[name] for part in parts], 1)[0] for name in ("input_ids", "shift_labels", "position_ids")
    }
    tokens = whole["input_ids"].shape[1]
    assert tokens == 37
    assert len(joined["input_ids"]) == 38
    assert joined["input_ids"][:tokens].equal(whole["input_ids"][0])
    assert joined["shift_labels"][: tokens - 1].equal(whole["labels"][0, 1:])
    assert joined["shift_labels"][tokens - 1 :].tolist() == [-100, -100]
    assert joined["position_ids"][tokens:].tolist() == [0]
    for part in parts:
        assert part["cu_seq_lens_q"].tolist() == [0, 11, 14, 31, 37, 38]


# ---- accelerate's own switch -----------------------------------------------------------------------------------------


@needs_deepspeed
def test_accelerates_parallelism_config_trains_with_our_kernel():
    first, second = (gloo_processes.run(ulysses_cases.by_accelerate, name) for name in ("flashmla/flash-attn3", "sdpa"))
    assert first[0] == pytest.approx(second[0], rel=1e-5)
