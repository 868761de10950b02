"""What a patched model computes again in backward: how often each kernel and product runs, under hooks and dropout."""

from collections import Counter

import families
import hf_support
import pytest
import torch
from patches_support import SINGLE, assert_equal, batch_of, lora, model_of, small, step
from torch.utils._python_dispatch import TorchDispatchMode

import flashmla_hf
from flashmla_hf.patches import structure, tiles

pytestmark = hf_support.needs_kernel


@pytest.mark.parametrize("patches", [["checkpointing", "keep_attention"], None], ids=["kept", "all"])
@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_kept_attention_runs_its_kernel_once_per_layer(name, patches, monkeypatch):
    operators = Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            operators[function.name()] += 1
            return function(*args, **(kwargs or {}))

    for kept, runs in ((0, 4), (1, 3), (True, 2)):
        model = flashmla_hf.patch(model_of(name), patches, **small(patches) | {"keep_attention": kept})
        operators.clear()
        with Counting():
            step(model, batch_of(name))
        assert operators["flashmla::flash_attn_forward"] == runs
        assert operators["flashmla::flash_attn_backward"] == 2
        flashmla_hf.unpatch(model)


def test_tiles_inside_a_checkpointed_layer_recompute_the_mlp_once():
    model = model_of("Llama")
    rows = Counter()
    model.model.layers[0].mlp.up_proj.register_forward_hook(
        lambda m, args, out: rows.update(n=args[0].shape[:-1].numel())
    )
    flashmla_hf.patch(model, ["checkpointing", "mlp"], mlp_tile=8)
    rows.clear()  # the trial of a block while patching is none of a step
    step(model, batch_of("Llama"))
    assert rows["n"] == 2 * families.BATCH * families.SEQLEN


@pytest.mark.parametrize("patches", ["checkpointing", "keep_attention", "offload"])
def test_retained_graphs_give_the_gradients_twice(patches):
    model = flashmla_hf.patch(model_of("Llama"), SINGLE[patches])
    loss = model(**batch_of("Llama"), use_cache=False).loss
    loss.backward(retain_graph=True)
    once = {n: p.grad.clone() for n, p in model.named_parameters()}
    loss.backward()
    assert all(torch.equal(p.grad, 2 * once[n]) for n, p in model.named_parameters())


class Products(TorchDispatchMode):
    """Multiplications and additions of matrix products. Not torch's FlopCounterMode: its hooks would be in the way."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.addmm_.default):
            self.flops += 2 * out.numel() * args[-2].shape[1]
        assert function not in (torch.ops.aten.bmm.default, torch.ops.aten.linear.default)
        return out


def products(model, batch):
    with Products() as counted:
        step(model, batch)
    return counted.flops


@pytest.mark.parametrize("is_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("tile", [7, 1000], ids=["tiles", "checkpoint alone"])
def test_the_second_run_of_an_mlp_leaves_its_last_product_out(tile, is_lora):
    """Both in tiles, and in a checkpointed layer whose MLP is one tile."""
    model, batch = model_of("Llama"), batch_of("Llama")
    model = lora(model) if is_lora else model
    hidden, ff, rank = model.config.hidden_size, model.config.intermediate_size, 4 * is_lora
    tokens = batch["input_ids"].numel()
    attention = structure.decoder_layers(model, "test")[0].attention
    plain = products(model, batch)
    flashmla_hf.patch(model, ["mlp", "checkpointing", *["lora"] * is_lora], mlp_tile=tile)
    again = products(model, batch) - plain
    widths = [tuple(p.shape) for n, p in attention.named_parameters() if "proj" in n and p.dim() == 2]
    expected = sum(2 * tokens * a * b for a, b in widths)  # the attention block's, with its adapters
    expected += 2 * 2 * tokens * (hidden * ff + rank * (hidden + ff))  # gate and up
    expected += 2 * tokens * ff * rank  # x Aᵀ of the last layer
    assert again == len(structure.decoder_layers(model, "test")) * expected


def test_a_hook_on_the_last_layer_sees_its_result_in_every_run():
    model, batch = model_of("Llama"), batch_of("Llama")
    expected = step(model, batch)
    flashmla_hf.patch(model, ["mlp"], mlp_tile=7)
    sums = []
    layers = structure.decoder_layers(model, "test")
    for layer in layers:
        layer.mlp.down_proj.register_forward_hook(lambda module, args, out: sums.append(float(out.detach().sum())))
    assert_equal(step(model, batch), expected)
    tiles_of_layer = len(sums) // (2 * len(layers))
    backward = [sums[i : i + tiles_of_layer] for i in range(len(sums) // 2, len(sums), tiles_of_layer)]
    again = [value for layer in reversed(backward) for value in layer]
    assert again == pytest.approx(sums[: len(sums) // 2], rel=1e-5)


def test_code_after_the_last_layer_runs_on_its_result():
    """An MLP whose result is not its last layer's, though it has its shape: in place, and scaled."""

    class Scaled(torch.nn.Module):
        def __init__(self, in_place):
            super().__init__()
            self.up_proj, self.down_proj, self.in_place = torch.nn.Linear(8, 24), torch.nn.Linear(24, 8), in_place

        def forward(self, x):
            out = self.down_proj(torch.tanh(self.up_proj(x)))
            return out.exp_() if self.in_place else out.exp()

    for in_place in (True, False):
        model, batch = model_of("Llama"), batch_of("Llama")
        torch.manual_seed(0)
        for layer in structure.decoder_layers(model, "test"):
            layer.module.mlp = Scaled(in_place)
            for linear in (layer.module.mlp.up_proj, layer.module.mlp.down_proj):
                hidden = model.config.hidden_size
                wide = linear is layer.module.mlp.up_proj
                linear.weight = torch.nn.Parameter(torch.randn(24 if wide else hidden, hidden if wide else 24) / 8)
                linear.bias = torch.nn.Parameter(torch.zeros(24 if wide else hidden))
        expected = step(model, batch)
        flashmla_hf.patch(model, ["mlp"], mlp_tile=7)
        assert_equal(step(model, batch), expected)


def test_dropout_in_tiles_is_replayed_in_backward():
    """Finite differences know whether backward drops what the forward pass dropped."""
    torch.manual_seed(0)
    block = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.Dropout(0.5), torch.nn.Tanh(), torch.nn.Linear(6, 4)
    ).double()
    x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)

    def function(x, *parameters):
        torch.manual_seed(7)
        return tiles.in_tiles(block, block.forward, x, 3)

    assert torch.autograd.gradcheck(function, (x, *block.parameters()))


def test_dropout_by_the_function_is_replayed_too_and_refused_by_chunks_of_attention():
    """StarCoder2's blocks drop without a dropout layer."""
    model, batch = model_of("StarCoder2", residual_dropout=0.5), batch_of("StarCoder2")
    flashmla_hf.patch(model, ["mlp"], mlp_tile=7)

    def loss():
        torch.manual_seed(1)
        return model(**batch, use_cache=False).loss

    model.zero_grad()
    loss().backward()
    weight = model.model.layers[0].mlp.c_proj.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    found, values = float((weight.grad * direction).sum()), []
    with torch.no_grad():
        for move in (1e-2, -2e-2):
            weight.add_(move * direction)
            values.append(float(loss()))
    assert found == pytest.approx((values[0] - values[1]) / 2e-2, rel=0.05)
    flashmla_hf.unpatch(model)
    flashmla_hf.patch(model, ["attention"], attention_chunk=7)
    with pytest.raises(flashmla_hf.patches.PatchError, match="a dropout layer"):
        loss()
