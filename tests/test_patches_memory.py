"""Each patch frees what it claims to free: bytes alive on a small model, operation by operation."""

import sys
import weakref

import hf_support
import peak_memory
import pytest
import torch
import transformers
from patches_support import batch_of, lora, model_of, small

import flashmla_hf
from flashmla_hf.patches import checkpointing, mlp, offload, rope

pytestmark = hf_support.needs_kernel


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


def test_attention_in_chunks_lowers_the_peak(small_pieces):
    names = ["loss", "mlp", "norm", "rope", "checkpointing"]
    whole, chunked = trace(names)[1], trace([*names, "attention"], attention_chunk=64)[1]
    assert whole - chunked > 1.5
