"""What a model's blocks and forward do that a patch cannot follow is found by ``patch`` itself, not in the first step."""

import copy

import hf_support
import pytest
import torch
import transformers
from model_sweep.building import build, build_eager, copy_state
from model_sweep.verdicts import Result
from patches_support import assert_equal, batch_of, lora, message, model_of, step
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import flashmla_hf
from flashmla_hf.patches import PatchError

pytestmark = hf_support.needs_kernel

# (class, patch, what the reason names). The patches of the first group are defaults.
LEFT_OUT = [
    (
        "GptOssForCausalLM",
        "mlp",
        "model.layers.0.mlp (GptOssMLP): expected a tensor of its input's shape, computed from",
    ),
    ("DeepseekV4ForCausalLM", "mlp", "(DeepseekV4SparseMoeBlock)"),
    (
        "GPTNeoXForCausalLM",
        "rope",
        "(GPTNeoXAttention): expected queries and keys of separate projections or as slices",
    ),
    (
        "BartForCausalLM",
        "loss",
        "expected a call of self.loss_function, got one that computes the loss from logits itself",
    ),
    (
        "TrOCRForCausalLM",
        "loss",
        "expected a call of self.loss_function, got one that computes the loss from logits itself",
    ),
    ("InklingForCausalLM", "loss", "logits[..., :unpadded_vocab_size]"),
]
BY_NAME = [
    ("GPTNeoXForCausalLM", "attention", "expected a forward that takes a cache as 'cache' or 'past_key_values'"),
    ("OPTForCausalLM", "attention", "expected a forward that takes position_embeddings"),
    (
        "BeamForCausalLM",
        "attention",
        "(BeamAttention): expected a forward without arguments of its own, which may differ",
    ),
    ("DoryForCausalLM", "attention", "got cache_offset, shared_kv_states"),
    (
        "Gemma4ForCausalLM",
        "attention",
        "(Gemma4TextAttention): expected a forward without arguments of its own, which may",
    ),
    ("Gemma4UnifiedForCausalLM", "attention", "got shared_kv_states"),
]


def tiny(class_name):
    """(a tiny model of the class in training mode, a batch with labels) as the sweep of all models makes them."""
    model_class = getattr(transformers, class_name, None)
    if model_class is None:
        pytest.skip(f"the installed Transformers has no {class_name}")
    eager, config, batch = build_eager(model_class, model_class.config_class, Result(class_name, ""))
    model = build(model_class, config, "flashmla")
    copy_state(eager, model)
    for part in model.modules():
        for name, value in vars(part).items():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    return model.train(), batch | {"labels": batch["input_ids"]}


@pytest.mark.parametrize(("class_name", "patch", "part"), LEFT_OUT, ids=lambda x: x[:12])
def test_a_default_patch_that_the_model_cannot_follow_is_left_out(class_name, patch, part):
    model, batch = tiny(class_name)
    assert part in message(model, [patch])
    patched = flashmla_hf.patch(copy.deepcopy(model))
    report = flashmla_hf.patch_report(patched)
    assert part in report.left_out[patch]
    assert report.applied
    assert_equal(step(patched, batch), step(model, batch), 1e-4)


@pytest.mark.parametrize(("class_name", "patch", "part"), BY_NAME, ids=lambda x: x[:12])
def test_chunks_of_attention_are_refused_if_a_chunk_could_not_reach_its_prefix(class_name, patch, part):
    assert part in message(tiny(class_name)[0], [patch])


@pytest.mark.parametrize("class_name", ["Ministral3ForCausalLM", "PersimmonForCausalLM"])
def test_chunks_of_attention_get_positions_and_accept_a_dropout_layer_that_drops_nothing(class_name):
    model, batch = tiny(class_name)
    patched = flashmla_hf.patch(copy.deepcopy(model), ["attention"], attention_chunk=7)
    assert_equal(step(patched, batch), step(model, batch), 1e-4)


@pytest.mark.parametrize("class_name", ["MuseGlimmerForConditionalGeneration", "DiaForConditionalGeneration"])
def test_chunks_of_attention_follow_layers_that_rotate_nothing_or_pass_by_position(class_name):
    model, batch = tiny(class_name)
    if "decoder_input_ids" in batch:
        batch["labels"] = batch["decoder_input_ids"]
    patched = flashmla_hf.patch(copy.deepcopy(model), ["attention"], attention_chunk=7)
    assert_equal(step(patched, batch), step(model, batch), 1e-4)


def test_arguments_by_position_reach_the_names_of_the_blocks_own_forward():
    """In whatever order it has them."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    class Turned(LlamaAttention):
        def forward(self, x, attention_mask=None, position_embeddings=None, cache=None, **kwargs):
            return super().forward(x, position_embeddings, attention_mask, cache, **kwargs)

    class Layer(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x, angles):
            return self.block(x, None, angles)[0]

    model = model_of("Llama")
    for layer in model.model.layers:
        layer.self_attn.__class__ = Turned
    flashmla_hf.patch(model, ["attention"], attention_chunk=7)
    x = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(2), requires_grad=True)
    angles = model.model.rotary_emb(x, torch.arange(20)[None])
    out = Layer(model.model.layers[0].self_attn)(x, angles)
    with torch.no_grad():
        expected = Layer(model.model.layers[0].self_attn)(x, angles)  # without a gradient there are no chunks
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"use_cache": True}, {"use_cache": False}], ids=str)
def test_a_cache_that_a_model_passes_by_position_is_not_written_twice(options):
    """RecurrentGemma passes use_cache and the cache so, and keeps a state in its layers."""
    model, batch = tiny("RecurrentGemmaForCausalLM")
    losses, gradients = [], []
    for patches in (None, ["checkpointing"], ["checkpointing", "offload"], "default"):
        one = copy.deepcopy(model)
        if patches is not None:
            flashmla_hf.patch(one, None if patches == "default" else patches)
        for _ in range(2):  # the second step finds the state of the first
            one.zero_grad()
            loss = one(**batch, **options).loss
            loss.backward()
        losses.append(float(loss.detach()))
        gradients.append({n: p.grad for n, p in one.named_parameters()})
    for loss, one in zip(losses[1:], gradients[1:], strict=True):
        assert_equal((loss, one), (losses[0], gradients[0]), 1e-4)


def test_a_recurrent_model_generates_as_without_the_patches():
    model, batch = tiny("RecurrentGemmaForCausalLM")
    patched = flashmla_hf.patch(copy.deepcopy(model)).eval()
    options = {"max_new_tokens": 6, "do_sample": False}
    got, expected = (m.generate(batch["input_ids"], **options) for m in (patched, model.eval()))
    assert torch.equal(got, expected)


class Block(torch.nn.Module):
    """An MLP [..., hidden] -> [..., hidden], counting its calls in a buffer if it is in training mode."""

    def __init__(self, block):
        super().__init__()
        self.block = block
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, hidden_states):
        self.calls += self.training
        return torch.nn.functional.dropout(self.block(hidden_states), 0.5, self.training)


class Tuple(Block):
    def forward(self, hidden_states):
        return self.block(hidden_states), None


class Nothing(Block):
    def forward(self, hidden_states):
        self.block(hidden_states)


class Flat(Block):
    def forward(self, hidden_states):
        return self.block(hidden_states).flatten(0, 1)


class WithTokens(Block):
    def forward(self, hidden_states, input_ids):
        return self.block(hidden_states)


class WithOption(Block):
    """Its layer, Llama's, does not pass the option."""

    def forward(self, hidden_states, option=None):
        return self.block(hidden_states)


class WithCodebook(Block):
    """As Moshi's: a layer of the depth decoder passes the codebook, and the main decoder's none."""

    def forward(self, hidden_states, codebook_idx=None):
        self.calls += self.training
        out = self.block(hidden_states)
        return out if codebook_idx is None else out * codebook_idx


class ByPosition(WithCodebook):
    """Each token has a weight of its own, even without the codebook (Moshi's flexible layers)."""

    def forward(self, hidden_states, codebook_idx=None):
        return self.block(hidden_states) * torch.arange(1.0, hidden_states.shape[-2] + 1)[:, None]


class Codebooks(LlamaDecoderLayer):
    codebook = None

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
        kwargs = {k: v for k, v in kwargs.items() if k not in ("use_cache", "cache", "past_key_values")}
        out, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = hidden_states + out
        normed = self.post_attention_layernorm(hidden_states)
        return hidden_states + (self.mlp(normed) if self.codebook is None else self.mlp(normed, self.codebook))


class OnlyWhenTraining(Block):
    def forward(self, hidden_states):
        out = self.block(hidden_states)
        return (out, None) if self.training else out


def with_block(kind, layer=1):
    model = model_of("Llama")
    model.model.layers[layer].mlp = kind(model.model.layers[layer].mlp)
    return model


@pytest.mark.parametrize(
    ("kind", "got"),
    [
        (Tuple, "got tuple"),
        (Nothing, "got NoneType"),
        (Flat, "got shape [3, 32] for the input's [1, 3, 32]"),
        (WithTokens, "got a forward of hidden_states, input_ids"),
    ],
)
@pytest.mark.parametrize("has_adapters", [False, True], ids=["plain", "adapters"])
def test_a_block_that_is_no_function_of_rows_is_refused_whatever_it_returns(kind, got, has_adapters):
    model = with_block(kind)
    model = lora(model) if has_adapters else model
    text = message(model, ["mlp"])
    assert f"model.layers.1.mlp ({kind.__name__}): expected a tensor of its input's shape" in text
    assert got in text
    flashmla_hf.patch(model)
    assert got in flashmla_hf.patch_report(model).left_out["mlp"]


def test_an_option_of_a_block_that_its_layer_does_not_pass_is_no_obstacle():
    model, batch = with_block(WithOption), batch_of("Llama")
    expected = step(model, batch)
    assert_equal(step(flashmla_hf.patch(model, ["mlp"], mlp_tile=7), batch), expected)


def with_codebooks(kind):
    model = model_of("Llama")
    for layer in model.model.layers:
        layer.__class__, layer.mlp = Codebooks, kind(layer.mlp)
    return model


def test_an_option_that_a_layer_passes_in_one_of_two_calls_is_no_obstacle():
    model, batch = with_codebooks(WithCodebook), batch_of("Llama")
    expected = step(model, batch)
    assert_equal(step(flashmla_hf.patch(model, ["mlp"], mlp_tile=7), batch), expected)
    assert model.model.layers[0].mlp.calls > 4  # tiles
    model.model.layers[1].codebook = 3.0
    with pytest.raises(
        PatchError, match=r"1.mlp \(WithCodebook\): expected a call with hidden states alone, got further"
    ):
        step(model, batch)


def test_a_block_that_may_get_an_option_is_refused_if_its_rows_differ_alone_or_cannot_be_tried():
    assert "got a forward of hidden_states, codebook_idx" in message(with_codebooks(ByPosition), ["mlp"])
    assert "got a forward of hidden_states, codebook_idx" in message(with_codebooks(WithCodebook).to("meta"), ["mlp"])


def test_moshis_main_decoder_has_tiles():
    model, batch = tiny("MoshiForCausalLM")
    patched = flashmla_hf.patch(copy.deepcopy(model), ["mlp"], mlp_tile=7)
    assert_equal(step(patched, batch), step(model, batch), 1e-4)
    flashmla_hf.patch(model)
    assert [*flashmla_hf.patch_report(model).left_out] == ["lora"]


def test_the_trial_of_a_block_leaves_no_trace():
    model = with_block(Block)
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    flashmla_hf.patch(model, ["mlp"])
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert float(model.model.layers[1].mlp.calls) == 0
    assert all(p.grad is None for p in model.parameters())


def test_a_block_that_fails_in_the_trial_is_left_to_the_call():
    """It may need a GPU, or weights that are loaded later."""
    model = model_of("Llama").to("meta")
    flashmla_hf.patch(model, ["mlp"])
    assert flashmla_hf.patch_report(model).applied == ("mlp",)


def test_a_block_that_returns_a_tuple_in_training_alone_is_refused_in_its_first_step():
    model = flashmla_hf.patch(with_block(OnlyWhenTraining), ["mlp"], mlp_tile=7)
    with pytest.raises(PatchError, match=r"1.mlp \(OnlyWhenTraining\).*got tuple.*exclude=\['mlp'\]"):
        step(model, batch_of("Llama"))
