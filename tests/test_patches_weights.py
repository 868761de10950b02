"""Weights that come and go: offloaded, sharded, made for each call. A patched model computes what the unpatched one does, or
the patch is refused by name; and a patched model compiles first thing in a process."""

import os
import random
import subprocess
import sys
from pathlib import Path

import accelerate
import hf_support
import pytest
import torch
from patches_support import SINGLE, assert_equal, batch_of, lora, model_of, patched, small, step
from torch import nn
from torch.nn.utils import prune

from flashmla_hf.patches import PatchError, mlp, weights

pytestmark = hf_support.needs_kernel
WITHOUT_LOSS = [name for name in SINGLE if name not in ("loss", "all")]


def loss_of(model, batch):
    with torch.no_grad():
        return float(model(**batch, use_cache=False).loss)


# ---------------------------------------------------------------- offloaded and dispatched


def offload(model, kind, folder):
    if kind == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device="cpu")
    if kind == "disk_offload":
        return accelerate.disk_offload(model, str(folder), execution_device="cpu")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
              "model.norm": "disk", "lm_head": "disk"}  # fmt: skip
    assert kind == "device_map"
    return accelerate.dispatch_model(model, places, offload_dir=str(folder), main_device="cpu", force_hooks=True)


KINDS = ("cpu_offload", "disk_offload", "device_map")


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_over_offloaded_output_embeddings_is_refused(kind, tmp_path):
    model = offload(model_of("Llama"), kind, tmp_path)
    for names in (["loss"], None):
        with pytest.raises(
            PatchError, match=r"patch 'loss' .*expected a torch.nn.Linear whose weights can be read.*offloading"
        ):
            patched(model, names)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_over_output_embeddings_that_are_offloaded_later_is_refused_in_the_call(kind, tmp_path):
    model = offload(patched(model_of("Llama"), ["loss"]), kind, tmp_path)
    with pytest.raises(PatchError, match=r"patch 'loss' .*offloading"):
        loss_of(model, batch_of("Llama"))


@pytest.mark.parametrize("patches", WITHOUT_LOSS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_offloaded_model_computes_the_same_loss_with_every_patch_but_that_of_the_loss(patches, kind, tmp_path):
    """With a graph and without; its backward is torch's to refuse: accelerate has taken the weights away by then."""
    model, batch = model_of("Llama"), batch_of("Llama")
    expected = loss_of(model, batch)
    model = patched(offload(model, kind, tmp_path), SINGLE[patches])
    with_graph = float(model(**batch, use_cache=False).loss.detach())
    assert (with_graph, loss_of(model, batch)) == pytest.approx((expected, expected), rel=2e-5)


@pytest.mark.parametrize("patches", WITHOUT_LOSS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_patched_first", [False, True], ids=["offloaded first", "patched first"])
def test_adapters_that_are_offloaded_with_their_model_lose_nothing_by_a_patch(
    patches, kind, is_patched_first, tmp_path
):
    """accelerate loses the gradients of what it offloads; what the unpatched model has is there, or the patch is refused."""
    batch, results = batch_of("Llama"), []
    for names in ([], SINGLE[patches]):
        model = lora(model_of("Llama"))
        try:
            if is_patched_first and names:
                patched(model, names)
            folder = tmp_path / str(bool(names))
            folder.mkdir()
            offload(model.get_base_model(), kind, folder)
            if not is_patched_first and names:
                patched(model, names)
            results.append(step(model, batch))
        except PatchError as error:
            assert "elsewhere" in str(error) or "changed between" in str(error)  # noqa: PT017
            return
    assert_equal(results[1], results[0])


def test_a_hook_that_only_places_weights_changes_nothing():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    batch, model = batch_of("Llama"), model_of("Llama")
    expected = step(model, batch)
    add_hook_to_module(model.lm_head, AlignDevicesHook(execution_device="cpu"))
    assert_equal(step(patched(model, ["loss"]), batch), expected)


# ---------------------------------------------------------------- output embeddings that are more than a plain linear layer


class Quantized(torch.Tensor):
    """A weight of a class of its own, as torchao's are."""


def quantized(head):
    head.weight = nn.Parameter(head.weight.data.as_subclass(Quantized), requires_grad=False)


HEADS = {
    "a parametrization": lambda head: nn.utils.parametrizations.weight_norm(head),
    "pruning": lambda head: prune.l1_unstructured(head, "weight", 0.5),
    "a weight of a class of its own": quantized,
    "another forward": lambda head: setattr(head, "forward", lambda x: nn.functional.linear(x, head.weight) * 2),
    "freed memory": lambda head: head.weight.untyped_storage().resize_(0),
}  # fmt: skip


@pytest.mark.parametrize("change", HEADS)
def test_output_embeddings_beyond_a_plain_linear_layer_are_refused(change):
    model = model_of("Llama")
    HEADS[change](model.lm_head)
    with pytest.raises(PatchError, match="patch 'loss' does not support this model"):
        patched(model, ["loss"])


@pytest.mark.parametrize("change", [name for name in HEADS if name != "another forward"])
def test_output_embeddings_that_change_after_patch_are_refused_in_the_call(change):
    model = patched(model_of("Llama"), ["loss"])
    HEADS[change](model.lm_head)
    with pytest.raises(PatchError, match="patch 'loss' does not support this model"):
        loss_of(model, batch_of("Llama"))


def test_a_backward_hook_on_the_output_embeddings_is_refused_and_others_are_called():
    batch, model = batch_of("Llama"), model_of("Llama")
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    expected = step(model, batch)
    assert_equal(step(patched(model, ["loss"]), batch), expected)
    model.lm_head.register_full_backward_hook(lambda *args: None)
    with pytest.raises(PatchError, match="a backward hook, which needs logits"):
        model(**batch, use_cache=False)


# ---------------------------------------------------------------- sharded


def in_two_processes(program: str) -> list[str]:
    """What rank 0 prints; ``program`` finds ``model()``, ``batch``, ``shard(model, own)``, ``loss(model)``."""
    source = f"""
import os, sys, torch, transformers, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import flashmla_hf
dist.init_process_group("gloo")
torch.set_num_threads(1)
config = transformers.LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
ids = torch.randint(3, 90, (1, 40), generator=torch.Generator().manual_seed(0))
def model():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation="flashmla").train()
def shard(m, own=()):
    mesh = init_device_mesh("cpu", (2,))
    for part in (*[m.get_submodule(name) for name in own], *m.model.layers, m):
        fully_shard(part, mesh=mesh)
    return m
def run(m):
    loss = m(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    norms = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in m.parameters()]
    return [float(loss), float(sum(g.double().square().sum() for g in norms))]
def tell(*things):
    if dist.get_rank() == 0: print(*things, flush=True)
{program}
dist.destroy_process_group()
"""
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]
    result = subprocess.run(
        [*launch, sys.executable, "-W", "ignore", "-c", source],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip().splitlines()


def test_shards_of_fully_shard_train_as_unsharded_or_are_refused():
    printed = in_two_processes(
        """
tell(run(model()))
for names, own in (
    (["mlp", "norm", "rope", "checkpointing"], ["lm_head"]), (["loss", "mlp", "norm"], []), (["loss"], ["lm_head"]),
    (["mlp"], ["model.layers.0.mlp.down_proj"]), (["norm"], ["model.norm"]), (["attention"], []),
):
    options = {"mlp_tile": 7} if "mlp" in names else {"attention_chunk": 7} if "attention" in names else {}
    m = shard(flashmla_hf.patch(model(), names, **options), own)
    try:
        tell(names, own, run(m))
    except flashmla_hf.patches.PatchError as error:
        tell(names, own, "refused", str(error).replace(chr(10), " "))
try:
    flashmla_hf.patch(shard(model()), ["mlp"])
    tell("patched after fully_shard")
except flashmla_hf.patches.PatchError as error:
    tell("refused", error)
"""
    )
    expected, *cases, after = printed
    for line in cases:
        if "refused" not in line:
            found, wanted = (
                [float(x) for x in text.rpartition("[")[2].strip("]").split(", ")] for text in (line, expected)
            )
            assert found == pytest.approx(wanted, rel=1e-4), line
    assert not any("refused" in line for line in cases[:3])
    assert "expected a model that is not sharded" in after


# ---------------------------------------------------------------- norms


class NormWithBias(nn.Module):
    def __init__(self, like):
        super().__init__()
        self.weight, self.variance_epsilon = like.weight, like.variance_epsilon
        self.bias = nn.Parameter(torch.zeros_like(like.weight))

    def forward(self, x):
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon) + self.bias


def test_a_norm_with_a_bias_is_not_taken_for_torchs():
    norm = model_of("Llama").model.norm
    assert mlp._rms_norm_eps(norm) == norm.variance_epsilon
    assert mlp._rms_norm_eps(NormWithBias(norm)) is None


def test_unreadable_weights_are_named_with_the_reason():
    layer, x = nn.Linear(4, 4), torch.ones(1, 4)
    assert weights.unreadable(layer, x) is None
    assert "meta" in weights.unreadable(layer.to("meta"), x)
    assert weights.unreadable(layer, x.to("meta")) is None


# ---------------------------------------------------------------- compiled first thing in a process


COMPILED = """
import sys, torch, transformers, flashmla_hf
from torch._dynamo.utils import counters
names, options = {names!r}, {options!r}
config = transformers.LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
torch.manual_seed(0)
model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="flashmla").train()
batches = [torch.randint(3, 90, (2, length)) for length in (16, 24, 17, 40)]
def run(model, ids):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return torch.stack([loss.detach(), *(p.grad.norm() for p in model.parameters())])
if names != "unpatched":
    flashmla_hf.patch(model, names, **options)
compiled = torch.compile(model, backend="aot_eager")
got = [run(compiled, ids) for ids in batches]
graphs = counters["stats"]["unique_graphs"]
if names != "unpatched":
    flashmla_hf.unpatch(model)
for x, ids in zip(got, batches):
    torch.testing.assert_close(x, run(model, ids), rtol=1e-4, atol=1e-4)
print("graphs", graphs)
"""


def graphs_of(names, options):
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}  # fmt: skip
    source = COMPILED.format(names=names, options=options)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", source], env=environment, capture_output=True, text=True, timeout=400
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return int(result.stdout.split()[-1])


@pytest.fixture(scope="module")
def unpatched_graphs():
    return graphs_of("unpatched", {})


@pytest.mark.slow
@pytest.mark.parametrize("patches", SINGLE)
def test_a_patched_model_compiles_first_thing_in_a_process_at_several_lengths(patches, unpatched_graphs):
    options = small(SINGLE[patches], mlp_tile=7, loss_chunk=9) if patches in ("all", "mlp", "loss") else {}
    assert graphs_of(SINGLE[patches], options) <= unpatched_graphs + 2


# ---------------------------------------------------------------- combinations


def prepared(model):
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # an earlier test's bf16 would stay
    return accelerate.Accelerator(cpu=True, mixed_precision="no").prepare(model)


SITUATIONS = {
    "as it is": lambda model: model,
    "tied": lambda model: (setattr(model.lm_head, "weight", model.model.embed_tokens.weight), model)[1],
    "eval": lambda model: model.eval(),
    "bias of the head": lambda model: (
        setattr(model.lm_head, "bias", nn.Parameter(torch.randn(model.lm_head.out_features) / 9)),
        model,
    )[1],
    "frozen head": lambda model: (model.lm_head.requires_grad_(False), model)[1],
    "Transformers' checkpointing": lambda model: (model.gradient_checkpointing_enable(), model)[1],
    "adapters": lora,
}
AFTERWARDS = {
    "nothing": lambda model: model,
    "moved": lambda model: model.to("cpu", torch.float64).to(torch.float32),
    "state read and loaded": lambda model: (model.load_state_dict(model.state_dict()), model)[1],
    "prepared": prepared,
    "checkpointing switched on": lambda model: (model.gradient_checkpointing_enable(), model)[1],
    "evaluated in between": lambda model: (model.eval(), loss_of(model, batch_of("Llama")), model.train())[-1],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(24))
def test_patches_and_situations_drawn_together_equal_eager(seed):
    draw = random.Random(seed)
    before, after = draw.choice(list(SITUATIONS)), draw.choice(list(AFTERWARDS))
    single = draw.sample(["loss", "mlp", "norm", "rope", "checkpointing"], draw.randint(1, 5))
    names = single + [n for n in ("keep_attention", "offload") if "checkpointing" in single and draw.random() < 0.5]
    if "keep_attention" not in names and draw.random() < 0.3:
        names.append("attention")
    batch = batch_of("Llama")
    model = SITUATIONS[before](model_of("Llama"))
    is_training = model.training
    model.set_attn_implementation("eager")
    expected = step(model, batch)
    model.set_attn_implementation("flashmla")
    model = AFTERWARDS[after](patched(model, names))
    model.train(is_training)
    assert_equal(step(model, batch), expected, tolerance=1e-4)
