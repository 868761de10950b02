"""The memory patches on the GPU: gradients, peak memory, and offload on real streams.

    python3 -m pytest tests/test_patches_gpu.py -s       # prints the peaks; one process, for it needs the GPU's memory

A Llama of 8 layers in bf16, its attention on sm90. Gradients are compared as vectors: bf16 rounds single elements apart.
"""

from __future__ import annotations

import functools
import gc
import itertools

import gpu_support
import hf_support
import pytest
import torch
import transformers

import flashmla_hf
from flashmla_hf.patches import memory, mla, mlp, rope, structure

pytestmark = gpu_support.needs_sm90
DEVICE = gpu_support.DEVICE
NUM_LAYERS, WIDTH, FF, VOCAB = 8, 1024, 3584, 32768
CHECKPOINTED = ("loss", "mlp", "norm", "rope", "checkpointing")
SELECTIONS = {
    "loss": ["loss"],
    "mlp": ["mlp"],
    "norm": ["norm"],
    "rope": ["rope"],
    "checkpointing": ["checkpointing"],
    "keep_attention": ["checkpointing", "keep_attention"],
    "offload": ["checkpointing", "offload"],
    "attention": ["attention"],
    "default": None,
}
# Tiles small enough that 4096 tokens fill several.
OPTIONS = {
    "mlp_tile": 1000,
    "loss_chunk": 1000,
    "attention_chunk": 1000,
    "keep_attention": True,
    "offload": NUM_LAYERS - 1,
}


def patch(model, names, **options):
    """With the options that ``names`` have."""
    flashmla_hf.patch(model, names, **hf_support.patch_options(names, options))


def model_of(is_lora=False, seed=0):
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=FF, num_hidden_layers=NUM_LAYERS, num_attention_heads=8,
        num_key_value_heads=2, head_dim=128, max_position_embeddings=2**17, initializer_range=0.04, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    with torch.device(DEVICE):  # where random weights take no seconds
        model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="flashmla", dtype=torch.bfloat16)
    model.train()
    if is_lora:
        peft = pytest.importorskip("peft")
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=8, target_modules=targets, init_lora_weights=False), autocast_adapter_dtype=False
        )
    return model


def batch_of(tokens, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (1, tokens), generator=generator).to(DEVICE)
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def step(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return float(loss.detach()), {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}


@functools.cache
def exact_gradients(is_lora):
    """Of the same weights in float32, attention by SDPA."""
    model = model_of(is_lora).float()
    (model.get_base_model() if is_lora else model).set_attn_implementation("sdpa")
    return step(model, batch_of(4096))[1]


def errors(gradients, is_lora):
    exact = exact_gradients(is_lora)
    assert gradients.keys() == exact.keys()
    return {name: float((gradients[name] - g).norm() / g.norm()) for name, g in exact.items()}


@pytest.mark.parametrize("is_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_loss_and_gradients_are_as_exact_as_the_unpatched_models(selection, is_lora):
    model, batch = model_of(is_lora), batch_of(4096)
    unpatched = step(model, batch)
    patch(model, SELECTIONS[selection], **OPTIONS)
    patched = step(model, batch)
    assert patched[0] == pytest.approx(unpatched[0], rel=2e-3)
    allowed = errors(unpatched[1], is_lora)
    for name, error in errors(patched[1], is_lora).items():
        assert error <= 1.3 * allowed[name] + 1e-3, f"{name}: {error:.4f}, unpatched {allowed[name]:.4f}"
    flashmla_hf.unpatch(model)
    assert step(model, batch)[0] == pytest.approx(unpatched[0], rel=1e-4)


def peak(selection, tokens, is_lora=True, **options):
    """KiB per token that forward and backward need beyond the model, at the highest."""
    model, batch = model_of(is_lora), batch_of(tokens)
    if selection != []:
        patch(model, selection, **options)
    step(model, batch)  # the kernels are loaded, the libraries have their workspaces
    model.zero_grad()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(model, batch)
    return (torch.cuda.max_memory_allocated() - before) / tokens / 1024


@pytest.mark.skipif(DEVICE == "cpu", reason="measures a GPU")
def test_every_patch_lowers_the_peak(monkeypatch):
    tokens = 32768
    # The model is narrow: chunks made for wide ones would be the peak themselves.
    monkeypatch.setattr(mlp, "NORM_TILE_ELEMENTS", 2**20)
    options = {"mlp_tile": 1024, "loss_chunk": 256, "attention_chunk": 4096}
    peaks = {
        "unpatched": peak([], tokens),
        "loss": peak(["loss"], tokens, **options),
        "+ mlp": peak(["loss", "mlp"], tokens, **options),
        "+ norm": peak(["loss", "mlp", "norm"], tokens, **options),
        "+ checkpointing": peak(["loss", "mlp", "norm", "checkpointing"], tokens, **options),
        "+ offload": peak(
            ["loss", "mlp", "norm", "checkpointing", "offload"], tokens, offload=NUM_LAYERS - 1, **options
        ),
        "+ attention": peak(
            ["loss", "mlp", "norm", "checkpointing", "offload", "attention"], tokens, offload=NUM_LAYERS - 1, **options
        ),
    }
    kept = peak([*CHECKPOINTED, "keep_attention"], tokens, keep_attention=True, **options)
    parked = peak(
        [*CHECKPOINTED, "keep_attention", "offload"], tokens, keep_attention=True, offload=NUM_LAYERS - 1, **options
    )
    print(
        {name: round(value, 1) for name, value in (peaks | {"kept": kept, "kept, offloaded": parked}).items()},
        "KiB/token",
    )
    values = list(peaks.values())
    assert all(later < earlier for earlier, later in itertools.pairwise(values)), peaks
    assert parked < kept


@pytest.mark.skipif(DEVICE == "cpu", reason="measures a GPU")
def test_rope_in_place_takes_no_copies():
    q = torch.randn(1, 32768, 32, 128, dtype=torch.bfloat16, device=DEVICE).transpose(1, 2)
    k = torch.randn(1, 32768, 8, 128, dtype=torch.bfloat16, device=DEVICE).transpose(1, 2)
    cos, sin = (torch.randn(1, 32768, 128, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    original = transformers.models.llama.modeling_llama.apply_rotary_pos_emb
    expected = original(q.clone(), k.clone(), cos, sin)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        got = rope.rotate_in_place(q, k, cos, sin)
    assert torch.cuda.max_memory_allocated() - before < q.numel() * 2 / 2
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_offload_over_many_steps_of_changing_lengths_learns_the_same():
    """Copies that were too early or too late would show as other losses: AdamW carries every difference on."""

    def losses(names, **options):
        model = flashmla_hf.patch(model_of(is_lora=True), names, **options)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        found = []
        for number, tokens in enumerate((8192, 3000, 16384, 16384, 777, 12288, 16384, 8192)):
            if number % 3 == 2:  # an evaluation in between
                with torch.no_grad():
                    model(**batch_of(512))
            if number == 5:  # a forward pass that no backward follows
                model(**batch_of(4096))
            loss = model(**batch_of(tokens, seed=number)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(loss.detach()))
        return found

    expected = losses(["loss", "checkpointing"])
    for names, number in (
        (["loss", "checkpointing", "offload"], 7),
        (["loss", "checkpointing", "offload", "keep_attention"], 8),
    ):
        options = {"keep_attention": True} if "keep_attention" in names else {}
        assert losses(names, offload=number, **options) == pytest.approx(expected, rel=1e-3), names


def test_offloaded_gradients_equal_those_of_checkpointing():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        model, batch = model_of(), batch_of(16384)
        flashmla_hf.patch(model, list(CHECKPOINTED), mlp_tile=2048)
        expected = step(model, batch)
        flashmla_hf.unpatch(model)
        flashmla_hf.patch(model, None, mlp_tile=2048, keep_attention=True, offload=NUM_LAYERS)
        for _ in range(4):
            got = step(model, batch)
            assert got[0] == pytest.approx(expected[0], rel=1e-5)
            for name, gradient in expected[1].items():
                assert float((got[1][name] - gradient).norm()) <= 2e-3 * float(gradient.norm()), name
    finally:
        torch.use_deterministic_algorithms(False)


def test_kept_attention_runs_its_kernel_once_per_layer():
    model = model_of()
    for kept in (0, 3, True):
        flashmla_hf.patch(model, ["checkpointing", "keep_attention"], keep_attention=kept)
        # Backward runs on a thread of its own: a profile sees it, a dispatch mode does not.
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step(model, batch_of(1024))
        called = sum(e.count for e in profile.key_averages() if e.key == "flashmla::flash_attn_forward")
        assert called == 2 * NUM_LAYERS - (NUM_LAYERS if kept is True else kept)
        flashmla_hf.unpatch(model)


def test_free_memory_is_what_torch_may_take():
    torch.cuda.empty_cache()  # what earlier tests left can be had without asking the driver, whatever the limit
    total = torch.cuda.mem_get_info()[1]
    held = torch.empty(2**28, dtype=torch.uint8, device=DEVICE)
    try:
        torch.cuda.set_per_process_memory_fraction(0.05)
        free = memory.device_free_bytes(torch.device(DEVICE))
        assert free <= 0.05 * total - held.numel()
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(free + 2**26, dtype=torch.uint8, device=DEVICE)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert memory.device_free_bytes(torch.device(DEVICE)) >= free


@pytest.mark.parametrize("tokens", [4096, 65536 + 37])
def test_products_of_bfloat16_with_float32_are_those_of_float32(tokens):
    from flashmla_hf.patches import precision

    torch.manual_seed(0)
    x = torch.randn(tokens, 1024, device=DEVICE, dtype=torch.bfloat16)
    w = torch.randn(1024, 16, device=DEVICE)
    low = torch.randn(tokens, 16, device=DEVICE)
    b = torch.randn(16, 1024, device=DEVICE)

    def error(got, exact):
        return float((got.double() - exact).norm() / exact.norm())

    # Sums of 4,096 terms on tensor cores: flashmla_hf/patches/precision.py. A product in TF32 has 3e-4.
    assert error(precision.matmul(x, w), x.double() @ w.double()) <= 4e-6
    assert error(precision.matmul(x.t(), low), x.t().double() @ low.double()) <= 4e-6
    assert error(precision.matmul(low.t(), x), low.t().double() @ x.double()) <= 4e-6
    exact = x.double() + 2 * low.double() @ b.double()
    theirs = (x.float() + 2 * (low @ b)).to(torch.bfloat16)  # one rounding, as peft's
    got = x.clone()
    precision.add_matmul(got, low, b, 2.0)
    assert error(got, exact) <= 1.01 * error(theirs, exact)


def test_a_4bit_base_on_the_gpu_has_the_unpatched_gradients():
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(256, 512, bias=False)).bfloat16()
    packed = bnb.nn.Linear4bit(256, 512, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    packed.load_state_dict(base[0].state_dict())
    base[0], base.is_loaded_in_4bit = packed.to(DEVICE), True
    layer = peft.get_peft_model(base, peft.LoraConfig(r=16, target_modules=["0"], init_lora_weights=False)).to(DEVICE)
    x = torch.randn(4096, 256, device=DEVICE, dtype=torch.bfloat16)
    grad = torch.randn(4096, 512, device=DEVICE, dtype=torch.bfloat16)

    def gradients():
        layer.zero_grad()
        rows = x.clone().requires_grad_()
        out = layer(rows)
        out.backward(grad)
        return [out.detach(), rows.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]

    expected = gradients()
    flashmla_hf.patches.lora.patch_lora(layer, flashmla_hf.patches.Replacements(("lora",)))
    for got, unpatched in zip(gradients(), expected, strict=True):
        # One rounding instead of several in bfloat16; adapters have float32 gradients.
        allowed = 1e-2 if got.dtype == torch.bfloat16 else 1e-5
        assert float((got - unpatched).norm()) <= allowed * float(unpatched.norm())


# ---- Decoding from latents -------------------------------------------------------------------------------------------


def latent_model():
    """DeepSeek-V2-Lite's attention, in two layers."""
    config = transformers.DeepseekV2Config(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=16,
        num_key_value_heads=16, kv_lora_rank=512, q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        first_k_dense_replace=2, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return transformers.DeepseekV2ForCausalLM._from_config(config, attn_implementation="flashmla").eval()


def no_latent_kernel():
    rows = torch.zeros(1, 1, 16, 576, device=DEVICE, dtype=torch.bfloat16)
    return mla.no_kernel(rows, 512, 16)


@torch.no_grad()
def latent_steps(model, kind):
    """Logits of a prefill of 100 tokens, two steps of one token and one of three, left-padded."""
    static = transformers.StaticCache(config=model.config, max_cache_len=128)
    cache = transformers.DynamicCache(config=model.config) if kind == "dynamic" else static
    ids = torch.randint(0, 512, (3, 105), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    positions, logits, start = (mask.cumsum(1) - 1).clamp(min=0), [], 0
    for size in (100, 1, 1, 3):
        tokens = slice(start, start + size)
        out = model(
            ids[:, tokens], attention_mask=mask[:, : tokens.stop], position_ids=positions[:, tokens], use_cache=True,
            **{structure.cache_name(model): cache},
        )  # fmt: skip
        logits.append(out.logits[:, -1].float())
        start += size
    return torch.stack(logits)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_decoding_from_latents_is_as_close_to_float32_as_expanding_them(kind):
    if (reason := no_latent_kernel()) is not None:
        pytest.skip(reason)
    model = latent_model()
    model.set_attn_implementation("sdpa")
    truth = latent_steps(model, kind)
    model.to(torch.bfloat16).set_attn_implementation("flashmla")
    expanded = latent_steps(model, kind)
    flashmla_hf.patch(model, ["mla_decode"])
    errors = [float((x - truth).norm() / truth.norm()) for x in (latent_steps(model, kind), expanded)]
    assert errors[0] <= 2.0 * errors[1], errors


def test_a_gpu_without_a_kernel_for_latents_is_refused():
    if no_latent_kernel() is None:
        pytest.skip("this build has the kernel")
    with pytest.raises(
        flashmla_hf.patches.PatchError, match="a device with a kernel for latents of 512 of 576 columns"
    ):
        flashmla_hf.patch(latent_model().to(torch.bfloat16), ["mla_decode"])
