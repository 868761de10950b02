"""The sizes of a decoder-only model: its parameters and the floating-point operations that it needs."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from flashmla_hf.training.arguments import UserError, first_line


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder-only model."""

    hidden: int
    layers: int
    heads_q: int
    heads_kv: int
    head_dim: int
    intermediate: int
    vocabulary: int
    is_tied: bool = False  # one matrix is both embedding and head
    window: int | None = None  # keys that a query sees, itself included; None: all before it
    positions: int | None = None  # the positions that the model was made for; None: its configuration does not say

    @classmethod
    def of(cls, config) -> Shape:
        """The shape in a Transformers configuration.

        Raises ValueError, naming the field, if the configuration is not that of a dense decoder-only model.
        """
        if is_encoder(config) or getattr(config, "is_encoder_decoder", False):
            raise ValueError(
                f"{type(config).__name__} is of a model with an encoder: the ledger knows decoder-only models"
            )
        config = config.get_text_config()

        def need(*names: str) -> int:
            for name in names:
                if isinstance(value := getattr(config, name, None), int):
                    return value
            raise ValueError(f"{type(config).__name__} has no {names[0]}: the ledger knows decoder-only models")

        experts = max(
            getattr(config, name, None) or 0 for name in ("num_local_experts", "num_experts", "n_routed_experts")
        )
        if experts > 1:
            raise ValueError(f"{type(config).__name__} has {experts} experts: the ledger knows dense models")
        if not isinstance(getattr(config, "intermediate_size", None) or 0, int):
            raise ValueError(f"{type(config).__name__} has layers of several widths: the ledger knows one")
        heads = need("num_attention_heads")
        window = getattr(config, "sliding_window", None)
        if getattr(config, "use_sliding_window", True) is False:
            window = None
        types = getattr(config, "layer_types", None)
        if types and len(set(types)) > 1:
            window = None  # the layers that see everything decide
        hidden = need("hidden_size")
        return cls(
            hidden=hidden,
            layers=need("num_hidden_layers"),
            heads_q=heads,
            heads_kv=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or hidden // heads,
            # Not every configuration names it; four times is what those models have.
            intermediate=getattr(config, "intermediate_size", None) or 4 * hidden,
            vocabulary=need("vocab_size"),
            is_tied=bool(getattr(config, "tie_word_embeddings", False)),
            window=window,
            positions=positions_of(config),
        )

    @property
    def linear_parameters(self) -> int:
        """The parameters of the layers' seven projections."""
        attention = 2 * self.hidden * self.head_dim * (self.heads_q + self.heads_kv)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def matmul_parameters(self) -> int:
        """The parameters that every token is multiplied with: projections and head, not the embedding's look-up."""
        return self.linear_parameters + self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        embeddings = self.vocabulary * self.hidden * (1 if self.is_tied else 2)
        return self.linear_parameters + embeddings + (2 * self.layers + 1) * self.hidden

    def lora_parameters(self, rank: int) -> int:
        """The parameters of an adapter on the seven projections: rank x (in + out) each."""
        q, kv, d, f = self.head_dim * self.heads_q, self.head_dim * self.heads_kv, self.hidden, self.intermediate
        return self.layers * rank * (2 * (d + q) + 2 * (d + kv) + 3 * (d + f))

    def attended_pairs(self, length: int) -> int:
        """(query, key) pairs of one causal sequence, within the window if there is one."""
        w = min(self.window or length, length)
        return w * (w + 1) // 2 + (length - w) * w

    def training_flops(self, lengths: list[int], use_peft: bool) -> int:
        """Floating-point operations of forward and backward over sequences of ``lengths``, recomputation not counted.

        A matrix product of P parameters takes 2P per token forward, 2P for its input's gradient and, if its weights are
        trained, 2P for theirs: 6P in all, and 4P under LoRA (whose own products are left out). Attention's forward takes
        4 · head_dim · heads per pair, its backward 2.5 times as much.
        """
        linear = (4 if use_peft else 6) * self.matmul_parameters * sum(lengths)
        forward = 4 * self.head_dim * self.heads_q * self.layers * sum(map(self.attended_pairs, lengths))
        return linear + forward * 7 // 2


# Published models by a short name, for questions that need no download.
PUBLISHED = {
    "smollm2-135m": Shape(576, 30, 9, 3, 64, 1536, 49152, is_tied=True, positions=8192),
    "llama-1b": Shape(2048, 16, 32, 8, 64, 8192, 128256, is_tied=True, positions=131072),
    "llama-8b": Shape(4096, 32, 32, 8, 128, 14336, 128256, positions=131072),
    "mistral-7b": Shape(4096, 32, 32, 8, 128, 14336, 32000, window=4096, positions=32768),
}


def is_encoder(config) -> bool:
    """Whether the model's tokens see the ones after them (BERT): Transformers can also load such a model as a causal one."""
    if getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False):
        return False
    return getattr(config, "model_type", None) in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def positions_of(config) -> int | None:
    """``max_position_embeddings`` of a Transformers configuration; None if it does not say."""
    value = getattr(config.get_text_config(), "max_position_embeddings", None)
    return value if isinstance(value, int) and value > 0 else None


def load_config(name: str) -> PreTrainedConfig:
    """The configuration of the model ``name``: a folder with config.json, or a name on the Hub.

    Raises UserError if there is none.
    """
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"model {name!r} has no loadable configuration: {first_line(error)}") from None
