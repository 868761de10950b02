"""The plan of checkpointing divides tensors between GPU and host by the memory that is free."""

import hf_support
import torch
import transformers
from patches_support import model_of

import flashmla_hf
from flashmla_hf import host_memory
from flashmla_hf.patches import checkpointing, memory, mlp, structure

pytestmark = hf_support.needs_kernel

GIB = 2**30


def planned(monkeypatch, free, host, keep_attention, offload_layers, parameters=lambda: ()):
    """Of 32 layers: (inputs on the host, kept attention, of it on the host), where an input and an attention output are 1 GiB."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(memory, "device_free_bytes", lambda device: free * GIB)
    monkeypatch.setattr(host_memory, "available_bytes", lambda: host * GIB)
    attention = torch.nn.Module()
    attention.config, attention.head_dim = transformers.LlamaConfig(num_attention_heads=32), 128
    layer = structure.Layer("layer", torch.nn.Module(), "self_attn", attention, None, None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        hidden = torch.empty(1, 2**17, 4096, dtype=torch.bfloat16, device="cuda")
    plan = checkpointing.Checkpointing([layer] * 32, keep_attention, offload_layers, parameters).plan(hidden)
    return plan.first_on_device, 32 - plan.first_kept, plan.first_kept_on_device - plan.first_kept


def test_the_plan_fills_the_gpu_then_the_host(monkeypatch):
    # What one layer works with, 12 tensors of 1 GiB, and 5 GiB of chunks and tiles are left free, and a tenth of everything.
    assert planned(monkeypatch, 200, 0, "auto", "auto") == (0, 32, 0)  # 163 GiB of room: all of both fit
    assert planned(monkeypatch, 80, 0, "auto", "auto") == (0, 23, 0)  # 55: the inputs, and 23 attention outputs
    assert planned(monkeypatch, 80, 10, "auto", "auto") == (0, 28, 5)  # and 5 on the host: 3/4, less a reserve of 2
    assert planned(monkeypatch, 40, 100, "auto", "auto") == (13, 32, 32)  # 19: inputs first, the rest to the host
    assert planned(monkeypatch, 40, 36, "auto", "auto") == (13, 12, 12)
    assert planned(monkeypatch, 10, 100, "auto", "auto") == (31, 32, 32)  # the last input is needed at once
    assert planned(monkeypatch, 10, 30, "auto", "auto") == (26, 0, 0)  # all that the host has, less a twentieth and 2
    assert planned(monkeypatch, 10, 0, "auto", 31) == (31, 0, 0)
    assert planned(monkeypatch, 80, 0, "auto", None) == (0, 23, 0)
    assert planned(monkeypatch, 40, 0, "auto", None) == (0, 0, 0)
    assert planned(monkeypatch, 40, 0, None, None) == (0, 0, 0)
    assert planned(monkeypatch, 10, 0, 5, None) == (0, 5, 0)  # numbers are taken as they are
    assert planned(monkeypatch, 10, 0, True, 20) == (20, 32, 20)


def test_the_plan_leaves_room_for_gradients_that_are_not_there_yet(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        weights = [torch.nn.Parameter(torch.empty(GIB // 2, dtype=torch.bfloat16, device="cuda")) for _ in range(10)]
        frozen = torch.nn.Parameter(torch.empty(GIB, device="cuda"), requires_grad=False)
    # 10 GiB of 80, of which nine tenths were counted: 46 of room instead of 55.
    assert planned(monkeypatch, 80, 0, "auto", "auto", lambda: [*weights, frozen]) == (0, 14, 0)
    for weight in weights:
        weight.grad = weight.detach()
    assert planned(monkeypatch, 80, 0, "auto", "auto", lambda: weights) == (0, 23, 0)
    runner = flashmla_hf.patch(model := model_of("Llama")).model.layers[0]._gradient_checkpointing_func.checkpointing
    expected = sum(p.numel() * 4 for p in model.parameters())
    assert memory.missing_gradient_bytes(runner.parameters(), torch.device("cpu")) == expected


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    # 24 / 4 * 0.75 = 4.5 GiB each, less the reserve of 2: 2 beside the 23 on the GPU.
    assert planned(monkeypatch, 80, 24, "auto", "auto") == (0, 25, 2)
    assert planned(monkeypatch, 80, 40, "auto", "auto") == (0, 28, 5)  # 40 / 4: as one process with 10


def test_the_mlps_tile_follows_free_memory(monkeypatch):
    monkeypatch.setattr(memory, "device_free_bytes", lambda device: 40 * GIB)
    per_token = 7 * 14336 * 2
    device = torch.device("cuda")
    assert mlp.auto_tile(32768, per_token, device) == 32768  # 6 of 40 GiB: as it is
    assert mlp.auto_tile(131072, per_token, device) == 8192
    monkeypatch.setattr(memory, "device_free_bytes", lambda device: GIB // 4)
    assert mlp.auto_tile(131072, per_token, device) == mlp.SMALLEST_TILE


def test_host_memory_is_the_least_of_the_system_and_the_control_group(tmp_path, monkeypatch):
    free = host_memory.available_bytes()
    assert free > 0
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(host_memory, "_meminfo_available", lambda: 100 * GIB)
    assert host_memory.available_bytes() == 100 * GIB  # no control group
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text(f"{6 * GIB}\n")
    assert host_memory.available_bytes() == 100 * GIB
    (tmp_path / "memory.max").write_text(f"{10 * GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {GIB}\n")
    assert host_memory.available_bytes() == 5 * GIB
