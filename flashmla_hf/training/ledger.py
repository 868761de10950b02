"""The memory ledger of a training step: how many bytes of what, from a model's shape and the switches of a run.

    python scripts/ledger.py llama-8b --patches none
    python scripts/ledger.py llama-8b --patches loss mlp checkpointing --memory_gib 80
    python scripts/ledger.py FOLDER --tokens 32768 --full

Pure arithmetic, no tensor is made. A step passes three moments at which memory can peak, and the ledger says which of
them is the highest and what it consists of:

    loss        weights + states + what the layers left + logits and their cross-entropy
    mlp         weights + states + what the layers left + one layer's MLP in backward + what its attention saved
    attention   weights + states + what the layers left + one layer's attention in backward

"What the layers left" is every layer's activations, or, with checkpointing, every layer's input alone.

Also the arithmetic of speed: the floating-point operations that the model itself needs (recomputation is not counted).
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass, replace

GIB, KIB = 2**30, 2**10
FP32 = 4
MOMENTS = ("loss", "mlp", "attention")
RESERVE = 0.06  # of the memory: the allocator's split blocks, cuBLAS's workspaces and the context, which are no tensors


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

    @classmethod
    def of(cls, config) -> Shape:
        """From a Transformers configuration; raises ValueError, naming the field, where it is not such a model's."""
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
        )

    @property
    def linear_parameters(self) -> int:
        """Of the layers' seven projections."""
        attention = 2 * self.hidden * self.head_dim * (self.heads_q + self.heads_kv)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def matmul_parameters(self) -> int:
        """Those that every token is multiplied with: projections and head, not the embedding's look-up."""
        return self.linear_parameters + self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        embeddings = self.vocabulary * self.hidden * (1 if self.is_tied else 2)
        return self.linear_parameters + embeddings + (2 * self.layers + 1) * self.hidden

    def lora_parameters(self, rank: int) -> int:
        """Of an adapter on the seven projections: rank x (in + out) each."""
        q, kv, d, f = self.head_dim * self.heads_q, self.head_dim * self.heads_kv, self.hidden, self.intermediate
        return self.layers * rank * (2 * (d + q) + 2 * (d + kv) + 3 * (d + f))

    def attended_pairs(self, length: int) -> int:
        """(query, key) pairs of one causal sequence, within the window where there is one."""
        w = min(self.window or length, length)
        return w * (w + 1) // 2 + (length - w) * w

    def training_flops(self, lengths: list[int], use_peft: bool) -> int:
        """Floating-point operations of forward and backward over sequences of ``lengths``, recomputation not counted.

        A matrix product of P parameters takes 2P per token forward, 2P for its input's gradient and, where its weights
        are trained, 2P for theirs: 6P in all, 4P under LoRA (whose own products are left out). Attention's forward
        takes 4 · head_dim · heads per pair, its backward 2.5 times as much.
        """
        linear = (4 if use_peft else 6) * self.matmul_parameters * sum(lengths)
        forward = 4 * self.head_dim * self.heads_q * self.layers * sum(map(self.attended_pairs, lengths))
        return linear + forward * 7 // 2


@dataclass(frozen=True)
class Switches:
    """What of a run decides its memory."""

    attn_implementation: str = "flashmla"
    patches: frozenset[str] = frozenset()
    liger: bool = False
    gradient_checkpointing: bool = False
    use_peft: bool = True
    lora_r: int = 16
    weight_bytes: int = 2  # per loaded weight
    adapter_bytes: int = 4  # per adapter weight
    casts_adapter_inputs: bool = True  # as peft does by itself, whatever autocast then computes in
    activation_bytes: int = 2
    keeps_logits: bool = False  # whether the caller holds on to the model's output until after the backward pass
    loss_chunk: int = 2048  # tokens whose logits exist at a time under the loss patch
    mlp_tile: int | None = None  # tokens whose intermediates exist at a time under the mlp patch; None: 2 GiB of them
    attention_chunk: int = 16384  # tokens whose queries exist at a time under the attention patch
    offload: int | None = None  # layers that the offload patch sends to the host; None: all but the last
    keep_attention: int | None = None  # layers whose attention stays on the device; None: none, they only use free room

    @property
    def is_checkpointed(self) -> bool:
        return self.gradient_checkpointing or "checkpointing" in self.patches

    @property
    def is_loss_chunked(self) -> bool:
        return self.liger or "loss" in self.patches


@dataclass(frozen=True)
class Term:
    """One line of the ledger: ``fixed + min(per_token · n, most) + per_pair · n²`` bytes."""

    name: str
    moments: tuple[str, ...]  # at which of MOMENTS it is live
    per_token: float = 0.0
    fixed: float = 0.0
    per_pair: float = 0.0
    most: float = math.inf
    remover: str | None = None  # the switch that removes it, for a message
    is_on_host: bool = False

    def at(self, tokens: int, batch_size: int = 1) -> float:
        growing = min(batch_size * self.per_token * tokens, self.most)
        return self.fixed + growing + batch_size * self.per_pair * tokens**2


@dataclass(frozen=True)
class Ledger:
    shape: Shape
    switches: Switches
    terms: tuple[Term, ...]

    def moment(self, tokens: int, batch_size: int = 1) -> str:
        """Where the peak is."""
        return max(MOMENTS, key=lambda moment: sum(x.at(tokens, batch_size) for x in self._at(moment)))

    def live(self, tokens: int, batch_size: int = 1) -> list[Term]:
        """The terms on the device at the peak, largest first."""
        here = self._at(self.moment(tokens, batch_size))
        return sorted(here, key=lambda term: -term.at(tokens, batch_size))

    def peak(self, tokens: int, batch_size: int = 1) -> float:
        """Bytes on the device at the highest moment of a step of ``batch_size`` sequences of ``tokens``.

        Patches that choose by free memory (a tile, how many layers stay on the device) are counted at their least.
        """
        return sum(term.at(tokens, batch_size) for term in self.live(tokens, batch_size))

    def host(self, tokens: int, batch_size: int = 1) -> float:
        """Bytes of pinned host memory."""
        return sum(term.at(tokens, batch_size) for term in self.terms if term.is_on_host)

    def bytes_per_token(self, tokens: int) -> float:
        """By how much the peak grows with one more token, at ``tokens``."""
        return self.peak(tokens + 1) - self.peak(tokens)

    def longest(self, memory: int, batch_size: int = 1) -> int:
        """The most tokens whose peak, with a reserve for what is no tensor, fits in ``memory`` bytes; 0 where none do."""
        usable = memory * (1 - RESERVE)
        if self.peak(1, batch_size) > usable:
            return 0
        low, high = 1, 2
        while self.peak(high, batch_size) <= usable:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.peak(middle, batch_size) <= usable else (low, middle)
        return low

    def advice(self, tokens: int, batch_size: int = 1) -> str:
        """For a message: what most of the memory is, and which switch removes it."""
        live = self.live(tokens, batch_size)
        removable = next((term for term in live if term.remover), None)

        def size(term: Term) -> str:
            return f"{term.at(tokens, batch_size) / GIB:,.3g} GiB"

        times = f" x {batch_size} sequences" if batch_size > 1 else ""
        text = (
            f"by the ledger {size(live[0])} of about {self.peak(tokens, batch_size) / GIB:,.3g} GiB at {tokens:,} "
            f"tokens{times} are {live[0].name}"
        )
        if removable is live[0]:
            return f"{text}: {removable.remover}"
        if removable is not None:
            return f"{text}, which stay; next, {size(removable)} are {removable.name}: {removable.remover}"
        return f"{text}, which no switch removes: lower --max_length"

    def _at(self, moment: str) -> list[Term]:
        return [term for term in self.terms if moment in term.moments and not term.is_on_host]


def ledger(shape: Shape, switches: Switches) -> Ledger:
    """The terms of a training step with AdamW on one sequence.

    Tensor counts are those of Transformers' Llama layer: each comment lists what is live, in units of a hidden vector
    (h), a query or attention output (q), a key or value (kv) and an MLP activation (f), per token, in the activations'
    dtype.
    """
    s, a = switches, switches.activation_bytes
    h, q, kv = shape.hidden * a, shape.heads_q * shape.head_dim * a, shape.heads_kv * shape.head_dim * a
    f, lse = shape.intermediate * a, FP32 * shape.heads_q
    is_ours = s.attn_implementation in ("flashmla", "fmla", "flashmla/flash-attn3")
    is_lean = is_ours or s.attn_implementation in ("flash_attention_2", "flash_attention_3")
    terms = list(_fixed(shape, s))

    # ---- logits: the head's output, its fp32 copy, log-softmax and its gradient. The first is free before the backward
    # pass where only the loss is kept.
    if s.is_loss_chunked:
        # Logits, their softmax in fp32, and its gradient.
        per_token = shape.vocabulary * (2 * a + FP32)
        terms.append(
            Term("logits of one chunk of the loss", ("loss",), per_token=per_token, most=s.loss_chunk * per_token)
        )
        if not s.use_peft:
            # Summed over the chunks in fp32, then in the weights' dtype.
            head = shape.vocabulary * shape.hidden * (FP32 + s.weight_bytes)
            terms.append(Term("the head's gradient", ("loss",), fixed=head))
    else:
        per_logit = (a if s.keeps_logits else 0) + 3 * FP32
        use = "add loss to --patches"
        terms.append(Term("logits and cross-entropy", ("loss",), per_token=shape.vocabulary * per_logit, remover=use))
    terms.append(Term("final hidden states and their gradient", ("loss",), per_token=2 * h))

    # ---- what the layers leave for the backward pass
    # Saved by attention: normed input h, rotated q and k, v, output q, log-sum-exp.
    attention_saved = h + 2 * q + 2 * kv + lse
    # Saved by the MLP: normed input h, gate, its activation, up, their product; the first and third not with Liger.
    mlp_saved = h + (3 if s.liger else 4) * f
    # Both norms in fp32, and the residual between them.
    norms_saved = 2 * shape.hidden * (FP32 + a)
    if not s.is_checkpointed:
        saved = attention_saved + mlp_saved + norms_saved
        use = "add --gradient_checkpointing, or checkpointing to --patches"
        terms.append(Term("activations of every layer", MOMENTS, per_token=shape.layers * saved, remover=use))
    else:
        away = 0
        if "offload" in s.patches:
            away = shape.layers - 1 if s.offload is None else min(s.offload, shape.layers)
            # The input of the layer in work, and the next one's on its way.
            terms.append(Term("hidden states on their way to the host and back", MOMENTS, per_token=2 * h))
            terms.append(Term("hidden states on the host", (), per_token=away * h, is_on_host=True))
        use = "add checkpointing offload to --patches" if not away else None
        terms.append(Term("checkpointed hidden states", MOMENTS, per_token=(shape.layers - away) * h, remover=use))
    if s.is_checkpointed and "keep_attention" in s.patches and s.keep_attention:
        kept = min(s.keep_attention, shape.layers) * (q + lse)
        use = "take keep_attention out of --patches"
        terms.append(Term("kept attention outputs", MOMENTS, per_token=kept, remover=use))

    # ---- one layer in backward
    if s.is_checkpointed:
        terms.append(Term("what that layer's attention saved", ("mlp",), per_token=attention_saved))
        if "norm" not in s.patches and not s.liger:
            use = "add norm to --patches"
            terms.append(Term("fp32 copies in that layer's norms", ("mlp",), per_token=norms_saved, remover=use))
    if "mlp" in s.patches:
        terms.append(Term("input, output and gradient of one layer's MLP", ("mlp",), per_token=3 * h))
        most = 2 * GIB if s.mlp_tile is None else s.mlp_tile * 7 * f
        terms.append(Term("one tile of an MLP in backward", ("mlp",), per_token=7 * f, most=most))
    else:
        # gate, its activation, up, product and the gradients of the last two; input, output and gradient of the layer.
        per_token = 6 * f + 3 * h - (f if s.liger else 0)
        terms.append(Term("one layer's MLP in backward", ("mlp",), per_token=per_token, remover="add mlp to --patches"))
    # Normed input and the residual's gradient 2h; q, k, v as projected q + 2kv, q and k as rotated q + kv; output and its
    # gradient 2q; gradients of q, k, v q + 2kv; log-sum-exp and delta; the fp32 sums of dq, which our Hopper kernels hold
    # for as many kv heads at a time as fit in 256 MiB: for one, where it matters.
    sums = shape.head_dim * FP32 * (shape.heads_q // shape.heads_kv if is_ours else shape.heads_q)
    attention = 2 * h + 5 * q + 5 * kv + 2 * lse + sums
    rope_copies = q + kv
    if "rope" in s.patches or s.liger:
        attention -= rope_copies
    if "attention" in s.patches:
        # Of all tokens: input, output and their gradients, keys and values, and the fp32 sums of their gradients.
        whole = 3 * h + 2 * kv + 2 * shape.heads_kv * shape.head_dim * FP32
        name = "input, keys and values of one layer's attention"
        terms.append(Term(name, ("attention",), per_token=whole))
        most = s.attention_chunk * attention
        terms.append(Term("one chunk of attention in backward", ("attention",), per_token=attention, most=most))
    else:
        # The patch attention lowers it, but takes no packed documents, which finetune.py trains on: no advice.
        use = None if "rope" in s.patches or s.liger else "add rope to --patches"
        terms.append(Term("one layer's attention in backward", ("attention",), per_token=attention, remover=use))
    if not is_lean and shape.heads_kv < shape.heads_q:
        # K and V repeated to the query heads, and their gradients.
        use = "use --attn_implementation flashmla"
        terms.append(Term("repeated keys and values", ("attention",), per_token=4 * q, remover=use))
    if s.attn_implementation == "sdpa" and shape.window:
        # Transformers gives SDPA a window as one mask of booleans for all layers.
        terms.append(Term("the window's mask", MOMENTS, per_pair=1, remover="use --attn_implementation flashmla"))
    if s.attn_implementation == "eager":
        # Softmax in fp32 and two gradients of it; where the model computes in less, the softmax's cast and its gradient.
        casts = a if a < FP32 else 0
        pair, live = shape.heads_q * (3 * FP32 + 2 * casts), ("attention",)
        if not s.is_checkpointed:
            # Softmax and its cast stay for every layer.
            pair, live = pair + (shape.layers - 1) * shape.heads_q * (FP32 + casts), MOMENTS
        terms.append(
            Term("scores of eager attention", live, per_pair=pair, remover="use --attn_implementation flashmla")
        )
    # ---- adapters: each casts its input to its own dtype, which autograd keeps until the layer is done.
    if s.use_peft and s.adapter_bytes != a and s.casts_adapter_inputs:
        casts = s.adapter_bytes * (3 * shape.hidden + shape.heads_q * shape.head_dim)
        mlp_casts = s.adapter_bytes * (2 * shape.hidden + shape.intermediate)
        use = "train with scripts/finetune.py, or the adapter in the weights' dtype"
        layers = 1 if s.is_checkpointed else shape.layers
        here = ("mlp", "attention") if s.is_checkpointed else MOMENTS
        terms.append(Term("inputs of attention's adapters in float32", here, per_token=layers * casts, remover=use))
        if "mlp" not in s.patches:
            here = ("mlp",) if s.is_checkpointed else MOMENTS
            terms.append(
                Term("inputs of the MLP's adapters in float32", here, per_token=layers * mlp_casts, remover=use)
            )
    return Ledger(shape, s, tuple(terms))


def _fixed(shape: Shape, s: Switches) -> list[Term]:
    """Weights, gradients and AdamW's two moments; gradients and moments are in the dtype of what is trained."""
    weights = Term("weights", MOMENTS, fixed=shape.parameters * s.weight_bytes)
    if s.use_peft:
        adapter = shape.lora_parameters(s.lora_r) * s.adapter_bytes
        return [weights, Term("adapter, its gradients and optimizer states", MOMENTS, fixed=4 * adapter)]
    if s.weight_bytes > 2:
        weights = replace(weights, remover="use --dtype bfloat16, or --use_peft")
    trained = shape.parameters * s.weight_bytes
    # The gradients are complete only at the end of the backward pass, but AdamW's states stay from step to step.
    return [
        weights,
        Term("gradients", MOMENTS, fixed=trained, remover="use --use_peft"),
        Term("optimizer states", MOMENTS, fixed=2 * trained, remover="use --use_peft"),
    ]


def components(shape: Shape, activation_bytes: int = 2) -> dict[str, tuple[float, float]]:
    """Bytes per token, least and most, of the terms that every long run of Transformers' own attention meets."""
    of = Switches(
        "flash_attention_2",
        gradient_checkpointing=True,
        adapter_bytes=activation_bytes,
        activation_bytes=activation_bytes,
    )

    def term(switches: Switches, *names: str) -> float:
        return sum(t.per_token for t in ledger(shape, switches).terms if t.name in names)

    lean = "one layer's attention in backward"
    logits = term(replace(of, keeps_logits=True), "logits and cross-entropy")
    states, mlp = term(of, "checkpointed hidden states"), term(of, "one layer's MLP in backward")
    all_kept = replace(of, patches=frozenset({"checkpointing", "keep_attention"}), keep_attention=shape.layers)
    kept = term(all_kept, "kept attention outputs")
    wide = term(replace(of, attn_implementation="sdpa"), lean, "repeated keys and values")
    return {
        "logits and cross-entropy": (logits, logits),
        "checkpointed hidden states": (states, states),
        "one layer's MLP in backward": (mlp, mlp),
        "one layer's attention in backward": (term(of, lean), wide),
        "kept attention outputs": (kept, kept),
    }


def describe(of: Ledger, tokens: int, batch_size: int = 1) -> str:
    """A Markdown table of the terms at the peak."""
    lines = ["| term | KiB per token | GiB |", "|---|---|---|"]
    for term in of.live(tokens, batch_size):
        size = term.at(tokens, batch_size)
        per_token = (size - term.fixed) / tokens / batch_size
        lines.append(f"| {term.name} | {f'{per_token / KIB:,.0f}' if per_token else '–'} | {size / GIB:,.2f} |")
    moment = of.moment(tokens, batch_size)
    lines.append(f"| **peak, at the {moment}** | | **{of.peak(tokens, batch_size) / GIB:,.2f}** |")
    if of.host(tokens):
        lines.append(f"| pinned host memory | | {of.host(tokens, batch_size) / GIB:,.2f} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    import models
    from options import at_least

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=f"{', '.join(models.SHAPES)}, a folder with config.json, or a name on the Hub")
    parser.add_argument("--tokens", type=at_least(1), default=32768)
    parser.add_argument("--batch_size", type=at_least(1), default=1)
    parser.add_argument("--attn_implementation", default="flashmla")
    parser.add_argument(
        "--patches", nargs="+", default=["none"], help="as of finetune.py: names, name=number, all, none"
    )
    parser.add_argument("--liger", action="store_true")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--full", action="store_true", help="all weights instead of LoRA")
    parser.add_argument("--memory_gib", type=float, default=80.0, help="for the longest context that fits")
    args = parser.parse_args(argv)
    if not 0 < args.memory_gib < math.inf:
        parser.error(f"--memory_gib: expected GiB above 0, got {args.memory_gib}")
    try:
        shape = Shape.of(models.config_of(args.model))
        patches, options = models.parse_patches(args.patches, "cuda", not args.full)
    except (models.NoModelError, ValueError) as error:
        sys.exit(f"ledger: {error}")
    of = ledger(
        shape,
        Switches(
            attn_implementation=args.attn_implementation,
            patches=frozenset(patches),
            liger=args.liger,
            gradient_checkpointing=args.gradient_checkpointing,
            use_peft=not args.full,
            adapter_bytes=2,
            **options,
        ),
    )
    print(describe(of, args.tokens, args.batch_size))
    longest = of.longest(math.floor(args.memory_gib * GIB), args.batch_size)
    print(f"longest context in {args.memory_gib:g} GiB, {RESERVE:.0%} of it in reserve: {longest:,} tokens")


if __name__ == "__main__":
    main()
