"""The plan of checkpointing divides tensors between GPU and host by the memory that is free."""

import dataclasses

import hf_support
import pytest
import torch
import transformers
from patches_support import assert_equal, batch_of, lora, model_of, step

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


def whole_layers(monkeypatch, free, keep_attention="auto", offload_layers="auto", tokens=2**14, name="Llama"):
    """Of 32 layers like Llama-3.1-8B's: how many run without a checkpoint, at 16,384 tokens."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(memory, "device_free_bytes", lambda device: free * GIB)
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 0)
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=1, num_attention_heads=32, num_key_value_heads=8
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    (layer,) = structure.decoder_layers(model, "checkpointing")
    with FakeTensorMode(allow_non_fake_inputs=True):
        hidden = torch.empty(1, tokens, 4096, dtype=torch.bfloat16, device="cuda")
    plan = checkpointing.Checkpointing([layer] * 32, keep_attention, offload_layers).plan(hidden)
    return 32 - plan.first_whole


def test_layers_that_fit_run_without_a_checkpoint(monkeypatch):
    # A layer's tensors are at most 4 GiB at 16,384 tokens: 2.6 by the ledger's count, and what it does not count.
    assert whole_layers(monkeypatch, 20) == 0
    some = whole_layers(monkeypatch, 78)
    assert 5 < some < 32
    assert whole_layers(monkeypatch, 40) < some
    assert whole_layers(monkeypatch, 300) == 32
    assert whole_layers(monkeypatch, 78, tokens=2048) == 32
    assert whole_layers(monkeypatch, 78, tokens=131072) == 0
    # A number says that memory is to be spared, or how it is to be used.
    assert whole_layers(monkeypatch, 300, keep_attention=32) == 0
    assert whole_layers(monkeypatch, 300, keep_attention=True) == 0
    assert whole_layers(monkeypatch, 300, offload_layers=31) == 0
    assert whole_layers(monkeypatch, 300, keep_attention=None) == 0


@pytest.mark.parametrize("is_adapted", [False, True], ids=["bare", "adapters"])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Phi3"])
def test_a_layer_saves_no_more_than_the_plan_counts(name, is_adapted, monkeypatch):
    model = model_of(name)
    batch = batch_of(name)
    if is_adapted:
        model = lora(model)
    inner = structure.base_model(model)
    saved = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x):
        if x.untyped_storage().data_ptr() not in weights:
            saved[x.untyped_storage().data_ptr()] = (x.untyped_storage().nbytes(), x)
        return x

    forward = checkpointing.Checkpointing.run
    counted = []

    def run(self, index, function, *args):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = forward(self, index, function, *args)
        tokens = args[0].shape[:-1].numel()
        counted.append((sum(n for n, _ in saved.values()), structure.saved_elements(self.layers[index]) * tokens * 4))
        return out

    monkeypatch.setattr(checkpointing.Checkpointing, "run", run)
    plan = checkpointing.Checkpointing.plan
    monkeypatch.setattr(
        checkpointing.Checkpointing, "plan", lambda self, x: dataclasses.replace(plan(self, x), first_whole=0)
    )
    for names in (["checkpointing"], None):
        expected = step(model, batch)
        flashmla_hf.patch(model, names)
        assert_equal(step(model, batch), expected)
        flashmla_hf.unpatch(model)
    assert len(counted) == 2 * inner.config.num_hidden_layers
    assert all(0 < real <= estimated for real, estimated in counted), counted


def test_switching_adapters_is_still_refused_in_the_layers_with_a_checkpoint(monkeypatch):
    model = lora(model_of("Llama"))
    plan = checkpointing.Checkpointing.plan
    monkeypatch.setattr(
        checkpointing.Checkpointing, "plan", lambda self, x: dataclasses.replace(plan(self, x), first_whole=1)
    )
    flashmla_hf.patch(model, ["checkpointing"])
    loss = model(**batch_of("Llama"), use_cache=False).loss
    model.base_model.disable_adapter_layers()
    with pytest.raises(flashmla_hf.patches.PatchError, match="adapters changed"):
        loss.backward()


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
