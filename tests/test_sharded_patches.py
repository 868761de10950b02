"""Patched models whose weights are sharded (fully_shard, ZeRO) lose what the same model loses whole, or the patch is refused."""

from __future__ import annotations

import gloo_processes
import pytest
import sharded_cases
import torch
from sharded_cases import ALL

UNITS = ("layers", "head", "accelerate")


def cases() -> list[dict]:
    built = [{"names": ALL, "units": units, "lora": lora} for units in UNITS for lora in (False, True)]
    built += [{"names": ALL, "units": units, "tied": True} for units in ("layers", "accelerate")]
    built += [{"names": ALL, "units": units, "reshard": False} for units in UNITS]
    built += [{"names": ALL, "units": "accelerate", "offload": True, "lora": lora} for lora in (False, True)]
    built += [{"names": ("attention",)}, {"names": ()}]
    return built


def test_shards_of_fully_shard_train_as_the_whole_model():
    given = cases()
    first, second = gloo_processes.run(sharded_cases.fsdp2, given)
    expected = {}
    for case, got, other in zip(given, first, second, strict=True):
        options = {name: case[name] for name in ("lora", "tied") if name in case}
        key = tuple(options.items())
        if key not in expected:
            expected[key] = sharded_cases.whole(**options)
        assert got == other == pytest.approx(expected[key], rel=2e-4), case


def test_shards_in_mixed_precision_train_as_their_unpatched_model():
    """Weights in float32, computed with in bfloat16; the difference is what another order of sums in bfloat16 makes."""
    given = [
        {"names": names, "units": "accelerate", "precision": torch.bfloat16, "lora": lora}
        for lora in (False, True)
        for names in ((), ALL)
    ]
    got, _ = gloo_processes.run(sharded_cases.fsdp2, given)
    for unpatched, patched in (got[:2], got[2:]):
        assert patched == pytest.approx(unpatched, rel=1e-2)


@pytest.mark.skipif(not gloo_processes.HAS_DEEPSPEED, reason="not installed: deepspeed, einops")
def test_partitions_of_deepspeed_train_as_the_whole_model_or_are_refused():
    others = tuple(name for name in ALL if name != "mlp")
    given = [{"names": ALL, "stage": 2, "lora": lora} for lora in (False, True)]
    given += [{"names": others, "stage": 3, "lora": lora} for lora in (False, True)]
    given += [{"names": others, "stage": 3, "tied": True}]
    given += [{"names": (name,), "stage": 3} for name in ("mlp", "attention")]
    got, _ = gloo_processes.run(sharded_cases.zero, given)
    for case, losses in zip(given[:5], got, strict=False):
        options = {name: case[name] for name in ("lora", "tied") if name in case}
        assert losses == pytest.approx(sharded_cases.whole(**options)[::2], rel=2e-4), case
    for name, refusal in zip(("mlp", "attention"), got[5:], strict=True):
        assert f"patch '{name}' does not support this model" in refusal
        assert "got a partition of DeepSpeed's ZeRO-3" in refusal
