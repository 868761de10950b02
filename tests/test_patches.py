"""The memory patches change memory only: losses and gradients equal the unpatched model's, family by family."""

import copy
import sys
import weakref
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers")
import families  # noqa: E402
import hf_support  # noqa: E402
import peak_memory  # noqa: E402

import flashmla_hf  # noqa: E402
from flashmla_hf.patches import checkpointing, memory, mlp, offload, rope, structure, tiles  # noqa: E402

pytestmark = pytest.mark.skipif(not hf_support.is_built(), reason="no compiled CPU library")
NAMES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3 text", "Phi3", "Mixtral")
FAMILIES = {f.name: f for f in families.FAMILIES}
SINGLE = {
    "loss": ["loss"],
    "mlp": ["mlp"],
    "norm": ["norm"],
    "rope": ["rope"],
    "checkpointing": ["checkpointing"],
    "keep_attention": ["checkpointing", "keep_attention"],
    "offload": ["checkpointing", "offload"],
    "attention": ["attention"],
    "all": None,
}
# Tiles that do not divide the 40 tokens of a batch.
SMALL = {"mlp_tile": 7, "loss_chunk": 9, "attention_chunk": 7, "keep_attention": True}


def small(names=None, **options):
    """Of ``options``, SMALL if there are none, those of the patches in ``names``."""
    return hf_support.patch_options(names, options or SMALL)


TILED = ("all", "mlp", "loss", "attention")


def model_of(name, dtype=torch.float32, **config):
    family = FAMILIES[name]
    if config:
        family = copy.copy(family)
        plain = family.config
        object.__setattr__(family, "config", lambda: _with(plain(), config))
    return families.build(family, "flashmla", "cpu").to(dtype).train()


def _with(config, options):
    for key, value in options.items():
        setattr(config, key, value)
    return config


def batch_of(name, padding="none"):
    return families.inputs(FAMILIES[name], padding, "cpu")


def step(model, *batches, **kwargs):
    """Loss and gradients after forward and backward over every batch."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(**batch, use_cache=False, **kwargs).loss
        loss.backward()
        total += float(loss.detach())
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(got, expected, tolerance=2e-5):
    assert abs(got[0] - expected[0]) <= tolerance * max(1.0, abs(expected[0]))
    assert got[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        worst = (got[1][name].float() - grad.float()).abs().max()
        assert worst <= tolerance * max(1.0, float(grad.float().abs().max())), name


@pytest.mark.parametrize("patches", SINGLE, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_equal_the_unpatched_models(name, patches):
    model, batch = model_of(name), batch_of(name)
    expected = step(model, batch)
    options = small(SINGLE[patches]) if patches in TILED else {}
    flashmla_hf.patch(model, SINGLE[patches], **options)
    got = step(model, batch)
    assert_equal(got, expected)
    if patches in ("checkpointing", "keep_attention", "offload"):  # the same arithmetic, in the same order
        assert got[0] == expected[0]
        assert all(torch.equal(got[1][n], g) for n, g in expected[1].items())
    flashmla_hf.unpatch(model)
    again = step(model, batch)
    assert again[0] == expected[0]
    assert all(torch.equal(again[1][n], g) for n, g in expected[1].items())


def lora(model, **options):
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj"]
    present = [
        t for t in targets if any(n.endswith("." + t) for n, m in model.named_modules() if type(m) is torch.nn.Linear)
    ]
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=present, init_lora_weights=False, task_type="CAUSAL_LM", **options
    )
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("patches", SINGLE, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_lora_gradients_equal_the_unpatched_models(name, patches):
    model, batch = lora(model_of(name)), batch_of(name)
    expected = step(model, batch)
    assert all("lora" in n for n in expected[1])
    flashmla_hf.patch(model, SINGLE[patches], **small(SINGLE[patches]) if patches in TILED else {})
    assert_equal(step(model, batch), expected)


@pytest.mark.parametrize("patches", SINGLE, ids=str)
def test_accumulated_gradients_equal(patches):
    """Two forward and backward passes, then one backward for two forward passes."""
    model, batch = model_of("Llama"), batch_of("Llama")
    other = families.inputs(FAMILIES["Llama"], "none" if patches == "attention" else "right", "cpu", seed=5)
    count = {"num_items_in_batch": torch.tensor(70)}

    def both():
        model.zero_grad()
        losses = [model(**b, **count, use_cache=False).loss for b in (batch, other)]
        sum(losses).backward()
        return float(sum(losses).detach()), {n: p.grad.clone() for n, p in model.named_parameters()}

    expected = step(model, batch, other, **count), both()
    flashmla_hf.patch(model, SINGLE[patches], **small(SINGLE[patches]) if patches in TILED else {})
    assert_equal(step(model, batch, other, **count), expected[0])
    assert_equal(both(), expected[1])


@pytest.mark.parametrize("patches", [p for p in SINGLE if p != "attention"], ids=str)
@pytest.mark.parametrize("name", ["Llama", "Gemma3 text", "Phi3"])
def test_packed_documents_stay_apart(name, patches):
    documents = [{"input_ids": list(range(3, 3 + n)), "labels": list(range(3, 3 + n))} for n in (9, 1, 14)]
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=False)
    batch = {k: v for k, v in collate(documents).items() if k != "attention_mask"}
    model = model_of(name)
    expected = step(model, batch)
    flashmla_hf.patch(model, SINGLE[patches], **small(SINGLE[patches]) if patches in TILED else {})
    assert_equal(step(model, batch), expected)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padded_batches_equal(padding):
    for name in ("Llama", "Gemma2"):
        model, batch = model_of(name), batch_of(name, padding)
        expected = step(model, batch)
        assert_equal(step(flashmla_hf.patch(model, **small()), batch), expected)


@pytest.mark.parametrize("patches", SINGLE, ids=str)
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Phi3", "Qwen3"])
def test_bf16_gradients_are_as_close_to_fp32_as_the_unpatched_models(name, patches):
    batch = batch_of(name)
    truth = step(model_of(name), batch)
    model = model_of(name, torch.bfloat16)
    plain = step(model, batch)
    flashmla_hf.patch(model, SINGLE[patches], **small(SINGLE[patches]) if patches in TILED else {})
    got = step(model, batch)

    def error(grads):
        return sum(float((grads[n].float() - g).square().sum()) for n, g in truth[1].items()) ** 0.5

    assert error(got[1]) <= 1.3 * error(plain[1])
    assert abs(got[0] - plain[0]) <= 2e-2 * abs(plain[0])


@pytest.mark.parametrize("patches", SINGLE, ids=str)
def test_autocast_gradients_are_as_close_as_the_unpatched_models(patches):
    batch, model = batch_of("Llama"), model_of("Llama")
    truth = step(model, batch)

    def autocast_step():
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        return float(loss), {n: p.grad.clone() for n, p in model.named_parameters()}

    plain = autocast_step()
    flashmla_hf.patch(model, SINGLE[patches], **small(SINGLE[patches]) if patches in TILED else {})
    got = autocast_step()
    assert got[1].keys() == plain[1].keys()
    assert all(g.dtype == torch.float32 for g in got[1].values())

    def error(grads):
        return sum(float((grads[n].float() - g).square().sum()) for n, g in truth[1].items()) ** 0.5

    assert error(got[1]) <= 1.3 * error(plain[1])


# --- what each patch saves: bytes alive, in units of one layer's hidden states -------------------------------------


@pytest.fixture
def small_pieces(monkeypatch):
    """Chunks and blocks that a thousand tokens fill many times."""
    monkeypatch.setattr(mlp, "NORM_TILE_ELEMENTS", 64 * 64)
    monkeypatch.setattr(rope, "CHUNK", 64)
    monkeypatch.setattr(offload, "BLOCK", 1024)


TOKENS, WIDTH, FF, NUM_LAYERS = 1024, 64, 224, 4
UNIT = TOKENS * WIDTH * 4


def trace(patches, is_lora=False, **options):
    """(held at the end of forward, peak of forward and backward) in hidden states [tokens, hidden], without the host's blocks."""
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=WIDTH, intermediate_size=FF, num_hidden_layers=NUM_LAYERS, num_attention_heads=4,
        num_key_value_heads=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="flashmla").train()
    model = lora(model) if is_lora else model
    if patches != []:
        flashmla_hf.patch(model, patches, **small(patches, mlp_tile=64, loss_chunk=64, keep_attention=True) | options)
    ids = torch.randint(0, 512, (1, TOKENS))
    with peak_memory.PeakBytes(ignored=torch.uint8) as memory:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        held = memory.now
        loss.backward()
    return held / UNIT, memory.peak / UNIT


def test_the_loss_patch_holds_no_logits(small_pieces):
    # The vocabulary is 8 hidden states wide: logits, and a peak of them and two gradients of theirs.
    (held, peak), (held_patched, peak_patched) = trace([], True), trace(["loss"], True)
    assert held - held_patched > 8 - 1.5  # the gradient of the hidden states is there already
    assert peak - peak_patched > 2 * 8


def test_the_mlp_patch_holds_no_intermediates(small_pieces):
    (held, peak), (held_patched, peak_patched) = trace(["loss"]), trace(["loss", "mlp"])
    intermediates = 4 * FF / WIDTH  # gate, up, the activation and the product
    assert held - held_patched == pytest.approx(NUM_LAYERS * intermediates, abs=0.5)
    assert peak - peak_patched >= NUM_LAYERS * intermediates


def test_the_norm_patch_holds_inputs_only(small_pieces):
    held, held_patched = trace(["loss"])[0], trace(["loss", "norm"])[0]
    # fp32 models keep x and its normalised copy; two norms a layer and one at the end.
    assert held - held_patched == pytest.approx(2 * NUM_LAYERS + 1, abs=0.5)
    assert trace(["loss", "checkpointing", "mlp"])[1] - trace(["loss", "checkpointing", "mlp", "norm"])[1] > 1.5


def test_the_rope_patch_copies_no_query(small_pieces):
    q, k = torch.randn(1, 4, TOKENS, 64, requires_grad=True), torch.randn(1, 2, TOKENS, 64, requires_grad=True)
    cos, sin = torch.randn(1, TOKENS, 64), torch.randn(1, TOKENS, 64)
    original = sys.modules["transformers.models.llama.modeling_llama"].apply_rotary_pos_emb

    def peaks(function):
        queries, keys = q * 1, k * 1
        with peak_memory.PeakBytes() as forward:
            queries, keys = function(queries, keys, cos, sin)
        grads = torch.ones_like(queries), torch.ones_like(keys)
        with peak_memory.PeakBytes() as backward:
            torch.autograd.backward((queries, keys), grads)
        return forward.peak / (q.numel() * 4), backward.peak / (q.numel() * 4)

    forward, backward = peaks(original)
    forward_patched, backward_patched = peaks(rope.rotate_in_place)
    assert forward >= 3
    assert backward >= 3.5
    assert forward_patched <= 0.2
    assert backward_patched <= backward - 0.5


def test_checkpointing_holds_one_hidden_state_per_layer(small_pieces):
    held, peak = trace(["loss", "checkpointing"])
    # Beside the inputs: the last result, what the final norm holds, and the loss's gradient.
    assert held == pytest.approx(NUM_LAYERS + 4, abs=0.5)
    assert peak < trace(["loss"])[1] / 2.5


def test_kept_attention_holds_one_output_per_layer_more(small_pieces):
    without, with_it = (trace(["loss", "checkpointing", *more])[0] for more in ([], ["keep_attention"]))
    assert with_it - without == pytest.approx(
        NUM_LAYERS * (1 + 4 / WIDTH), abs=0.1
    )  # out, and lse: one number per head
    two = trace(["loss", "checkpointing", "keep_attention"], keep_attention=2)[0]
    assert two - without == pytest.approx(2 * (1 + 4 / WIDTH), abs=0.1)


def test_offload_holds_the_last_hidden_state_only(small_pieces):
    without, with_it = (trace(["loss", "checkpointing", *more])[0] for more in ([], ["offload"]))
    assert without - with_it == pytest.approx(NUM_LAYERS - 1, abs=0.1)
    everything = trace(["loss", "checkpointing", "offload", "keep_attention"], offload=NUM_LAYERS)[0]
    assert without - everything == pytest.approx(NUM_LAYERS, abs=0.1)


def test_all_patches_together_peak_far_below_checkpointing_alone(small_pieces):
    plain, patched = trace(["loss", "checkpointing"], True)[1], trace(None, True, keep_attention=0)[1]
    assert patched < plain / 2.5


# --- what runs how often ---------------------------------------------------------------------------------------------


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
    step(model, batch_of("Llama"))
    assert rows["n"] == 2 * families.BATCH * families.SEQLEN


def test_kept_tensors_go_with_their_layer_in_backward():
    model = flashmla_hf.patch(model_of("Llama"), ["checkpointing", "keep_attention"], keep_attention=True)
    kept = []
    original = checkpointing.KeptAttention.save
    checkpointing.KeptAttention.save = lambda self, *pair: (kept.append(weakref.ref(self)), original(self, *pair))[1]
    try:
        loss = model(**batch_of("Llama"), use_cache=False).loss
    finally:
        checkpointing.KeptAttention.save = original
    assert len(kept) == 2
    assert all(k() is not None for k in kept)
    loss.backward()
    assert all(k() is None for k in kept)


def test_offloaded_blocks_are_reused_from_step_to_step(small_pieces):
    model = flashmla_hf.patch(
        model_of("Llama"), ["checkpointing", "offload", "keep_attention"], keep_attention=True, offload=2
    )
    runner = model.model.layers[0]._gradient_checkpointing_func.checkpointing
    for _ in range(3):
        loss = model(**batch_of("Llama"), use_cache=False).loss
        (offloader,) = runner._offloaders.values()
        blocks = offloader.arena.num_blocks
        assert len(offloader.arena.free) < blocks
        loss.backward()
        del loss
        assert len(offloader.arena.free) == offloader.arena.num_blocks == blocks
    dropped = model(**batch_of("Llama"), use_cache=False).loss  # no backward
    del dropped
    assert len(offloader.arena.free) == blocks


def test_evaluation_and_no_grad_keep_nothing():
    model, batch = model_of("Llama"), batch_of("Llama")
    with torch.no_grad():
        expected = model(**batch).loss
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    flashmla_hf.patch(model, **small())
    runner = model.model.layers[0]._gradient_checkpointing_func.checkpointing
    for mode in (model.train, model.eval):
        mode()
        with torch.no_grad():
            assert torch.allclose(model(**batch).loss, expected, rtol=1e-5)
            got = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            assert torch.allclose(got, logits, rtol=1e-4, atol=1e-4)
    assert not runner._offloaders


def test_a_patched_model_generates_the_same_tokens():
    for name in ("Llama", "Gemma3 text", "Mixtral"):
        model = model_of(name).eval()
        ids = batch_of(name)["input_ids"]
        expected = model.generate(ids, max_new_tokens=8, do_sample=False)
        assert torch.equal(
            flashmla_hf.patch(model, **small()).generate(ids, max_new_tokens=8, do_sample=False), expected
        )


def test_gradients_through_logits_equal_without_labels():
    model, batch = model_of("Gemma2"), batch_of("Gemma2")
    batch.pop("labels")

    def gradients():
        model.zero_grad()
        model(**batch, use_cache=False).logits.square().mean().backward()
        return 0.0, {n: p.grad.clone() for n, p in model.named_parameters()}

    expected = gradients()
    flashmla_hf.patch(model, **small())
    assert_equal(gradients(), expected, 1e-4)


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


def test_what_follows_the_last_layer_runs_on_its_result():
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


# --- taken back, refused, and together with others ---------------------------------------------------------------------


def attributes(model):
    """Every instance attribute of every module, and what the attention's module calls."""
    module = sys.modules[type(model).__module__]
    state = {(name, key): value for name, m in model.named_modules() for key, value in vars(m).items()}
    return {k: v if not isinstance(v, dict) else dict(v) for k, v in state.items()} | {
        "rope": getattr(module, "apply_rotary_pos_emb", None)
    }


@pytest.mark.parametrize("name", NAMES)
def test_unpatch_restores_every_attribute(name):
    model = model_of(name)
    before = attributes(model)
    assert flashmla_hf.patch(model) is model
    changed = [k for k, v in attributes(model).items() if k not in before or (v is not before[k] and v != before[k])]
    assert len(changed) >= 4 * 2
    assert flashmla_hf.unpatch(model) is model
    after = attributes(model)
    assert after.keys() == before.keys()
    assert all(after[k] is before[k] or after[k] == before[k] for k in before)
    assert flashmla_hf.unpatch(model) is model


def test_another_model_of_the_family_stays_unpatched():
    patched, plain = model_of("Llama"), model_of("Llama")
    module = sys.modules[type(plain).__module__]
    users = getattr(module.apply_rotary_pos_emb, "_flashmla_users", 0)
    other = flashmla_hf.patch(model_of("Llama"), ["rope"])
    expected = step(plain, batch_of("Llama"))
    flashmla_hf.patch(patched)
    got = step(plain, batch_of("Llama"))
    assert got[0] == expected[0]
    assert all(torch.equal(got[1][n], g) for n, g in expected[1].items())
    flashmla_hf.unpatch(patched)
    assert module.apply_rotary_pos_emb._flashmla_users == users + 1  # the other model still needs it
    flashmla_hf.unpatch(other)
    assert getattr(module.apply_rotary_pos_emb, "_flashmla_users", 0) == users


def message(model, *args, **kwargs):
    before = attributes(model) if hasattr(model, "named_modules") else None
    with pytest.raises(flashmla_hf.patches.PatchError) as error:
        flashmla_hf.patch(model, *args, **kwargs)
    if before is not None:
        after = attributes(model)
        assert all(after[k] is before[k] or after[k] == before[k] for k in before)  # refused means untouched
        assert after.keys() == before.keys()
    return str(error.value)


def test_unknown_names_and_double_patches_are_refused():
    model = model_of("Llama")
    text = message(model, ["los"])
    assert all(part in text for part in ("LlamaForCausalLM", "'los'", "'loss'"))
    for name in ("keep_attention", "offload"):
        assert "'checkpointing'" in message(model, [name])
    assert "mlp_tile" in message(model, mlp_tile=0)
    for option, name in flashmla_hf.PATCH_OPTIONS.items():
        text = message(model, ["norm"], **{option: 8})
        assert f"{option}: expected it with patch {name!r} alone, got 8 with ['norm']" in text
    assert "keep_attention" in message(model, keep_attention="all")
    flashmla_hf.patch(model, ["loss"])
    text = message(model, ["mlp"])
    assert "patched already (loss)" in text
    assert "unpatch" in text


@pytest.mark.parametrize(
    ("name", "patch", "parts"),
    [
        ("Cohere", "rope", ["CohereForCausalLM", "model.layers.0.self_attn (CohereAttention)", "rotation of halves"]),
        ("GPT-2", "mlp", ["GPT2LMHeadModel", "decoder", "'layers'"]),
        ("GPT-2", "checkpointing", ["GPT2LMHeadModel", "'layers'", "without 'checkpointing'"]),
        ("DeepSeek-V3", "rope", ["DeepseekV3ForCausalLM", "model.layers.0"]),
        ("BERT", "loss", ["BertForMaskedLM", "ForCausalLMLoss"]),
    ],
)
def test_models_without_the_structure_are_refused_by_name_and_module(name, patch, parts):
    family = FAMILIES[name]
    model = families.build(family, "flashmla", "cpu")
    text = message(model, [patch])
    for part in [*parts, f"patch '{patch}'", "patches=[...]"]:
        assert part in text, text


def test_kept_attention_needs_this_packages_attention():
    model = families.build(FAMILIES["Llama"], "sdpa", "cpu")
    assert "attn_implementation" in message(model)
    flashmla_hf.patch(model, ["loss", "mlp", "norm", "rope", "checkpointing", "offload"])


def test_what_is_no_transformers_model_is_refused():
    assert "torch.nn.modules.linear.Linear" in message(torch.nn.Linear(2, 2))


def test_a_head_with_adapters_is_refused_and_a_trained_copy_is_not():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    assert "torch.nn.Linear" in message(peft.get_peft_model(model_of("Llama"), config), ["loss"])
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model, batch = peft.get_peft_model(model_of("Llama"), config), batch_of("Llama")
    expected = step(model, batch)
    assert any("lm_head" in n for n in expected[1])
    assert_equal(step(flashmla_hf.patch(model, **small()), batch), expected)


def test_any_other_use_of_promised_logits_raises():
    model = flashmla_hf.patch(model_of("Llama"), ["loss"])
    logits = model(**batch_of("Llama"), use_cache=False).logits
    for use in (
        lambda: logits.shape, lambda: logits[0], lambda: torch.softmax(logits, -1), lambda: logits + 1, lambda: list(logits),
        lambda: logits * torch.ones(1), lambda: logits.detach(),
    ):  # fmt: skip
        with pytest.raises((RuntimeError, TypeError, AttributeError)) as error:
            use()
        assert "PromisedLogits" in str(error.value) or "without labels for logits" in str(error.value)


def test_a_batch_without_labels_gives_no_gradient_instead_of_nan():
    model, batch = model_of("Llama"), batch_of("Llama")
    batch["labels"] = torch.full_like(batch["labels"], -100)
    for patches in ([], ["loss"]):
        flashmla_hf.patch(model, patches)
        loss, gradients = step(model, batch)
        assert loss != loss  # 0 / 0, as without the patch
        assert all(not g.any() for g in gradients.values())
        flashmla_hf.unpatch(model)


def test_labels_of_another_length_than_the_hidden_states_are_refused():
    model = flashmla_hf.patch(model_of("Llama"), ["loss"], loss_chunk=5)
    with pytest.raises(flashmla_hf.patches.PatchError, match=r"expected as many labels .* 10, got 40"):
        model(**batch_of("Llama"), logits_to_keep=5, use_cache=False)


@pytest.mark.parametrize("method", ["evaluate", "predict"])
def test_a_trainer_that_gathers_logits_is_told_the_way_out(tmp_path, method):
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 60, (4, 12)).tolist()]
    arguments = transformers.TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = transformers.Trainer(
        flashmla_hf.patch(model_of("Llama"), ["loss"]), arguments, eval_dataset=rows, compute_metrics=lambda _: {},
        data_collator=transformers.default_data_collator,
    )  # fmt: skip
    with pytest.raises(TypeError, match="without 'loss', or evaluate with prediction_loss_only=True"):
        getattr(trainer, method)(rows)


def test_what_shows_at_the_first_step_only_is_refused_there():
    """A tuple instead of hidden states (GPT-OSS), queries that autograd does not let be overwritten (GPT-NeoX)."""
    for name, patch, part in (
        ("GPT-OSS", "mlp", "model.layers.0.mlp (GptOssMLP)"),
        ("GPT-NeoX", "rope", "split projection"),
    ):
        model = flashmla_hf.patch(model_of(name), [patch], **small([patch]))
        with pytest.raises(flashmla_hf.patches.PatchError) as error:
            step(model, batch_of(name))
        assert part in str(error.value)
        assert f"without '{patch}'" in str(error.value)


OTHERS = (
    "Qwen2-MoE",
    "Qwen3-MoE",
    "Gemma",
    "Phi",
    "Granite",
    "OLMo2",
    "StarCoder2",
    "StableLM",
    "SmolLM3",
    "Cohere",
    "GLM4",
)


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_of_the_same_structure_equal_too(name):
    model, batch = model_of(name), batch_of(name)
    expected = step(model, batch)
    names = [n for n in flashmla_hf.DEFAULT_PATCHES if n != "lora" and not (n == "rope" and name in ("Cohere", "GLM4"))]
    assert_equal(step(flashmla_hf.patch(model, names, **small(names)), batch), expected)


@pytest.mark.parametrize("name", NAMES)
def test_attention_in_chunks_equals_inside_checkpointed_layers(name):
    model, batch = model_of(name), batch_of(name)
    expected = step(model, batch)
    names = [n for n in flashmla_hf.PATCHES if n not in ("keep_attention", "lora")]
    flashmla_hf.patch(model, names, mlp_tile=7, loss_chunk=9, attention_chunk=7)
    assert_equal(step(model, batch), expected)


def test_float16_is_refused_by_the_loss():
    model = flashmla_hf.patch(model_of("Llama"), ["loss"])
    with (
        torch.autocast("cpu", dtype=torch.float16),
        pytest.raises(flashmla_hf.patches.PatchError, match="bfloat16 or float32"),
    ):
        model(**batch_of("Llama"), use_cache=False)


def test_a_patched_model_saves_what_an_unpatched_one_loads(tmp_path):
    model, batch = model_of("Gemma2"), batch_of("Gemma2")
    expected = step(model, batch)
    flashmla_hf.patch(model).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="flashmla").train()
    assert_equal(step(loaded, batch), expected)


def test_router_logits_are_refused_in_tiles():
    model = flashmla_hf.patch(model_of("Mixtral"), ["mlp"])
    with pytest.raises(flashmla_hf.patches.PatchError, match="output_router_logits"):
        model(**batch_of("Mixtral"), output_router_logits=True)
    flashmla_hf.unpatch(model)
    assert model(**batch_of("Mixtral"), output_router_logits=True).aux_loss is not None


def test_offload_without_host_memory_is_refused(monkeypatch):
    model = flashmla_hf.patch(model_of("Llama"), ["checkpointing", "offload"])
    monkeypatch.setattr(memory, "host_available_bytes", lambda: 2**30)
    with pytest.raises(RuntimeError, match=r"host memory: expected .* got 1.0 GiB available.*without 'offload'"):
        model(**batch_of("Llama"), use_cache=False)


def test_transformers_checkpointing_switch_keeps_the_patch():
    model, batch = model_of("Llama"), batch_of("Llama")
    expected = step(model, batch)
    flashmla_hf.patch(model, ["checkpointing", "keep_attention"])
    ours = model.model.layers[0]._gradient_checkpointing_func
    with pytest.warns(UserWarning, match="stays as it is"):
        model.gradient_checkpointing_enable()
    assert model.model.layers[0]._gradient_checkpointing_func is ours
    assert_equal(step(model, batch), expected, 0.0)
    model.gradient_checkpointing_disable()
    assert not model.model.layers[1].gradient_checkpointing
    flashmla_hf.unpatch(model)


def test_checkpointing_that_was_on_before_is_on_again_after():
    model = model_of("Llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    before = model.model.layers[0]._gradient_checkpointing_func
    flashmla_hf.unpatch(flashmla_hf.patch(model))
    assert model.model.layers[0]._gradient_checkpointing_func is before
    assert model.is_gradient_checkpointing


def test_unpatch_refuses_what_somebody_else_wrapped_since():
    model = flashmla_hf.patch(model_of("Llama"), ["loss"])
    ours = model.forward
    model.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(RuntimeError, match=r"LlamaForCausalLM.forward was replaced"):
        flashmla_hf.unpatch(model)
    model.forward = ours
    flashmla_hf.unpatch(model)


@pytest.mark.parametrize("is_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    "options", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=["fp32", "bf16", "switch"]
)
def test_trainer_learns_the_same(tmp_path, options, is_lora):
    torch.manual_seed(0)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 60, (8, 12)).tolist()]

    def losses(patched):
        model = model_of("Llama")
        model = lora(model) if is_lora else model
        if patched:
            flashmla_hf.patch(model, **small())
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
            learning_rate=1e-3, report_to="none", use_cpu=True, save_strategy="no", seed=1, eval_strategy="steps", eval_steps=3,
            **options,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=transformers.default_data_collator
        )
        trainer.train()
        return [x[k] for x in trainer.state.log_history for k in ("loss", "eval_loss") if k in x]

    expected, got = losses(False), losses(True)
    assert len(expected) == 4
    assert got == pytest.approx(expected, rel=2e-2 if "bf16" in options else 2e-4)


@pytest.mark.slow
def test_compiled_models_compute_the_same():
    """Inside torch.compile the model's own norms, rotation, MLP and logits run (the compiler fuses those); the loss is the
    same, checkpointing is torch's."""
    model, batch = model_of("Llama"), batch_of("Llama")
    expected = step(model, batch)
    flashmla_hf.patch(model, **small())
    compiled = torch.compile(model, backend="aot_eager")
    loss = compiled(**batch, use_cache=False).loss
    model.zero_grad()
    loss.backward()
    assert_equal((float(loss), {n: p.grad for n, p in model.named_parameters()}), expected)


def test_attention_in_chunks_refuses_what_it_cannot_compute():
    model, batch = model_of("Llama"), batch_of("Llama")
    flashmla_hf.patch(model, ["attention"], attention_chunk=7)
    restarting = torch.cat([torch.arange(9), torch.arange(11)]).expand(2, -1)
    for extra, reason in (
        (batch_of("Llama", "left"), "padding"),
        ({"position_ids": restarting, "attention_mask": None}, "packed documents"),
        ({"use_cache": True}, "a cache"),
    ):
        with pytest.raises(
            flashmla_hf.patches.PatchError, match=rf"model.layers.0.self_attn \(LlamaAttention\).*{reason}"
        ):
            model(**{**batch, "use_cache": False, **extra})
    assert "exclude each other" in message(model_of("Llama"), ["attention", "checkpointing", "keep_attention"])


def test_attention_in_chunks_lowers_the_peak(small_pieces):
    names = ["loss", "mlp", "norm", "rope", "checkpointing"]
    whole, chunked = trace(names)[1], trace([*names, "attention"], attention_chunk=64)[1]
    assert whole - chunked > 1.5


# --- what goes where ---------------------------------------------------------------------------------------------------


GIB = 2**30


def planned(monkeypatch, free, host, keep_attention, offload_layers, parameters=lambda: ()):
    """Of 32 layers: (inputs on the host, kept attention, of it on the host), where an input and an attention output are 1 GiB."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(memory, "device_free_bytes", lambda device: free * GIB)
    monkeypatch.setattr(memory, "host_available_bytes", lambda: host * GIB)
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
    free = memory.host_available_bytes()
    assert free > 0
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_meminfo_available", lambda: 100 * GIB)
    assert memory.host_available_bytes() == 100 * GIB  # no control group
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text(f"{6 * GIB}\n")
    assert memory.host_available_bytes() == 100 * GIB
    (tmp_path / "memory.max").write_text(f"{10 * GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {GIB}\n")
    assert memory.host_available_bytes() == 5 * GIB
