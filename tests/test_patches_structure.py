"""What a model's blocks and forward do that a patch cannot follow is found by ``patch`` itself, not in the first step."""

import copy

import hf_support
import pytest
import torch
import transformers
from model_sweep.building import build, build_eager, copy_state
from model_sweep.verdicts import Result
from patches_support import assert_equal, batch_of, lora, message, model_of, step

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
