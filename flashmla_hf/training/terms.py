"""The terms of the memory ledger: the parts of a training step's memory, their bytes, and the moments at which they are live.

Each term is ``fixed + min(per_token · n, most) + per_pair · n²`` bytes for a sequence of n tokens. Tensor counts are those
of Transformers' Llama layer: comments list what is live, in units of a hidden vector (h), a query or attention output (q),
a key or value (kv) and an MLP activation (f), per token, in the activations' dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from flashmla_hf.host_memory import GIB
from flashmla_hf.training.shape import Shape

FP32 = 4
# Per weight in 4 bits: the scale of 64 weights in 8 bits, and the float32 scale of 256 such scales.
PACKED_BYTES = 1 / 2 + 1 / 64 + FP32 / (64 * 256)
MOMENTS = ("loss", "mlp", "attention")
OUR_BACKENDS = ("flashmla", "fmla", "flashmla/flash-attn3", "flashmla_fp8")
LEAN_BACKENDS = (*OUR_BACKENDS, "flash_attention_2", "flash_attention_3")  # they store no scores and repeat no keys


@dataclass(frozen=True)
class Switches:
    """The settings of a run that decide its memory."""

    attn_implementation: str = "flashmla"
    patches: frozenset[str] = frozenset()
    liger: bool = False
    gradient_checkpointing: bool = False
    use_peft: bool = True
    lora_r: int = 16
    weight_bytes: int = 2  # per loaded weight
    load_in_4bit: bool = False  # the linear layers but the head, which then have PACKED_BYTES
    adapter_bytes: int = 4  # per adapter weight
    casts_adapter_inputs: bool = True  # as peft does by itself, whatever autocast then computes in
    activation_bytes: int = 2
    keeps_logits: bool = False  # whether the caller holds on to the model's output until after the backward pass
    loss_chunk: int = 2048  # tokens whose logits exist at a time under the loss patch
    mlp_tile: int | None = None  # tokens whose intermediates exist at a time under the mlp patch; None: 2 GiB of them
    attention_chunk: int = 16384  # tokens whose queries exist at a time under the attention patch
    offload: int | None = None  # layers that the offload patch sends to the host; None: all but the last
    keep_attention: int | None = None  # layers whose attention stays on the device; None: none, they only use free room
    gpus: int = 1
    sp: int = 1  # GPUs that share each sequence (Ulysses)
    fsdp: bool = (
        False  # weights, gradients and states are in parts on all GPUs (FSDP2); without it each GPU has them whole
    )

    @property
    def is_checkpointed(self) -> bool:
        return self.gradient_checkpointing or "checkpointing" in self.patches

    @property
    def is_loss_chunked(self) -> bool:
        return self.liger or "loss" in self.patches

    @property
    def is_ours(self) -> bool:
        return self.attn_implementation in OUR_BACKENDS


@dataclass(frozen=True)
class Term:
    """One line of the ledger."""

    name: str
    moments: tuple[str, ...]  # at which of MOMENTS it is live
    per_token: float = 0.0
    fixed: float = 0.0
    per_pair: float = 0.0
    most: float = math.inf
    remover: str | None = None  # the switch that removes it, for a message
    is_on_host: bool = False

    def at(self, tokens: int, batch_size: int = 1) -> float:
        """Bytes for ``batch_size`` sequences of ``tokens``."""
        growing = min(batch_size * self.per_token * tokens, self.most)
        return self.fixed + growing + batch_size * self.per_pair * tokens**2


@dataclass(frozen=True)
class _Sizes:
    """Bytes per token of one layer's tensors: in the activations' dtype, ``lse`` and norms in fp32."""

    h: int  # a hidden vector
    q: int  # a query or an attention output
    kv: int  # a key or a value
    f: int  # an MLP activation
    lse: int
    norms_saved: int  # both norms in fp32, and the residual between them

    @staticmethod
    def of(shape: Shape, activation_bytes: int) -> _Sizes:
        a = activation_bytes
        q, kv = shape.heads_q * shape.head_dim * a, shape.heads_kv * shape.head_dim * a
        norms_saved = 2 * shape.hidden * (FP32 + a)
        return _Sizes(shape.hidden * a, q, kv, shape.intermediate * a, FP32 * shape.heads_q, norms_saved)

    @property
    def attention_saved(self) -> int:
        """Normed input h, rotated q and k, v, output q, log-sum-exp."""
        return self.h + 2 * self.q + 2 * self.kv + self.lse


def terms_of(shape: Shape, switches: Switches) -> tuple[Term, ...]:
    """The terms of a training step with AdamW on one sequence, on each GPU."""
    size = _Sizes.of(shape, switches.activation_bytes)
    terms = (
        *_fixed(shape, switches),
        *_loss(shape, switches, size),
        *_left_by_layers(shape, switches, size),
        *_mlp_backward(switches, size),
        *_attention_backward(shape, switches, size),
        *_scores(shape, switches, size),
        *_adapter_inputs(shape, switches),
        *_exchanges(shape, switches, size),
    )
    # A GPU has its part of the tokens, or in attention its part of the heads.
    return tuple(replace(x, per_token=x.per_token / switches.sp, per_pair=x.per_pair / switches.sp) for x in terms)


def _fixed(shape: Shape, s: Switches) -> list[Term]:
    """Weights, gradients and AdamW's two moments. Gradients and moments are in the dtype of the trained weights."""
    packed = shape.linear_parameters if s.load_in_4bit else 0
    parts = s.gpus if s.fsdp else 1
    # accelerate leaves packed weights whole.
    size = (shape.parameters - packed) * s.weight_bytes / parts + packed * PACKED_BYTES
    weights = Term("weights", MOMENTS, fixed=size)
    if s.use_peft:
        adapter = shape.lora_parameters(s.lora_r) * s.adapter_bytes / parts
        terms = [
            weights,
            *_gathered(shape, s),
            Term("adapter, its gradients and optimizer states", MOMENTS, fixed=4 * adapter),
        ]
        if s.load_in_4bit:
            # Tiles keep the three of an MLP while they run.
            number = 3 if "mlp" in s.patches else 1
            one = shape.hidden * shape.intermediate * s.activation_bytes
            terms.append(Term("an MLP's weights, unpacked", ("mlp",), fixed=number * one))
            one = shape.hidden * shape.heads_q * shape.head_dim * s.activation_bytes
            terms.append(Term("a projection's weights, unpacked", ("attention",), fixed=one))
        return terms
    if s.weight_bytes > 2:
        weights = replace(weights, remover="use --dtype bfloat16, or --use_peft")
    trained = shape.parameters * s.weight_bytes / parts
    # The gradients are complete only at the end of the backward pass, but AdamW's states stay from step to step.
    return [
        weights,
        *_gathered(shape, s),
        Term("gradients", MOMENTS, fixed=trained, remover="use --use_peft"),
        Term("optimizer states", MOMENTS, fixed=2 * trained, remover="use --use_peft"),
    ]


def _gathered(shape: Shape, s: Switches) -> list[Term]:
    """What FSDP2 gathers and reduces a unit at a time: a layer while the next one's weights arrive, and the head at the loss.
    DDP has its gradients a second time, in the buckets that cross GPUs."""
    if s.gpus == 1:
        return []
    if not s.fsdp:
        trained = shape.lora_parameters(s.lora_r) * s.adapter_bytes if s.use_peft else shape.parameters * s.weight_bytes
        return [Term("DDP's buckets of gradients", MOMENTS, fixed=trained, remover="use FSDP2")]
    layer = 0 if s.load_in_4bit else shape.linear_parameters / shape.layers
    head = shape.vocabulary * shape.hidden * s.activation_bytes
    terms = [
        Term("two layers' gathered weights", ("mlp", "attention"), fixed=2 * layer * s.activation_bytes),
        Term("the gathered head", ("loss",), fixed=head),
    ]
    if not s.use_peft:
        # In the computation's dtype, and in float32 for the sum over GPUs.
        reduced = layer * (s.activation_bytes + (FP32 if s.activation_bytes < s.weight_bytes else 0))
        terms.append(Term("one layer's gradients before they are divided", ("mlp", "attention"), fixed=reduced))
    return terms


def _loss(shape: Shape, s: Switches, size: _Sizes) -> list[Term]:
    """The head's output, its fp32 copy, log-softmax and its gradient. The first is free before the backward pass if only
    the loss is kept."""
    a, terms = s.activation_bytes, []
    if s.is_loss_chunked:
        # Logits, their softmax in fp32, and its gradient.
        per_token = shape.vocabulary * (2 * a + FP32)
        most = s.loss_chunk * per_token
        terms.append(Term("logits of one chunk of the loss", ("loss",), per_token=per_token, most=most))
        if not s.use_peft:
            # Summed over the chunks in fp32, then in the weights' dtype.
            head = shape.vocabulary * shape.hidden * (FP32 + s.weight_bytes)
            terms.append(Term("the head's gradient", ("loss",), fixed=head))
    else:
        per_logit = (a if s.keeps_logits else 0) + 3 * FP32
        use = "add loss to --patches"
        terms.append(Term("logits and cross-entropy", ("loss",), per_token=shape.vocabulary * per_logit, remover=use))
    terms.append(Term("final hidden states and their gradient", ("loss",), per_token=2 * size.h))
    return terms


def _left_by_layers(shape: Shape, s: Switches, size: _Sizes) -> list[Term]:
    """What the forward pass leaves for the backward pass."""
    if not s.is_checkpointed:
        # Saved by the MLP: normed input h, gate, its activation, up, their product; the first and third not with Liger.
        mlp_saved = size.h + (3 if s.liger else 4) * size.f
        saved = size.attention_saved + mlp_saved + size.norms_saved
        use = "add --gradient_checkpointing, or checkpointing to --patches"
        return [Term("activations of every layer", MOMENTS, per_token=shape.layers * saved, remover=use)]
    terms, away = [], 0
    if "offload" in s.patches:
        away = shape.layers - 1 if s.offload is None else min(s.offload, shape.layers)
        # The input of the layer in work, and the next one's on its way.
        terms.append(Term("hidden states on their way to the host and back", MOMENTS, per_token=2 * size.h))
        terms.append(Term("hidden states on the host", (), per_token=away * size.h, is_on_host=True))
    use = "add checkpointing offload to --patches" if not away else None
    on_device = (shape.layers - away) * size.h
    terms.append(Term("checkpointed hidden states", MOMENTS, per_token=on_device, remover=use))
    if "keep_attention" in s.patches and s.keep_attention:
        kept = min(s.keep_attention, shape.layers) * (size.q + size.lse)
        use = "take keep_attention out of --patches"
        terms.append(Term("kept attention outputs", MOMENTS, per_token=kept, remover=use))
    return terms


def _mlp_backward(s: Switches, size: _Sizes) -> list[Term]:
    """One layer's MLP in backward, beside what its attention and norms saved in the layer's second forward."""
    terms = []
    if s.is_checkpointed:
        terms.append(Term("what that layer's attention saved", ("mlp",), per_token=size.attention_saved))
        if "norm" not in s.patches and not s.liger:
            use = "add norm to --patches"
            terms.append(Term("fp32 copies in that layer's norms", ("mlp",), per_token=size.norms_saved, remover=use))
    if "mlp" in s.patches:
        terms.append(Term("input, output and gradient of one layer's MLP", ("mlp",), per_token=3 * size.h))
        most = 2 * GIB if s.mlp_tile is None else s.mlp_tile * 7 * size.f
        terms.append(Term("one tile of an MLP in backward", ("mlp",), per_token=7 * size.f, most=most))
    else:
        # gate, its activation, up, product and the gradients of the last two; input, output and gradient of the layer.
        per_token = 6 * size.f + 3 * size.h - (size.f if s.liger else 0)
        terms.append(Term("one layer's MLP in backward", ("mlp",), per_token=per_token, remover="add mlp to --patches"))
    return terms


def _attention_backward(shape: Shape, s: Switches, size: _Sizes) -> list[Term]:
    # Normed input and the residual's gradient 2h; q, k, v as projected q + 2kv, q and k as rotated q + kv; output and its
    # gradient 2q; gradients of q, k, v q + 2kv; log-sum-exp and delta; the fp32 sums of dq, which our Hopper kernels hold
    # for some kv heads at a time: for one, where that is more than 256 MiB. Of shorter sequences they are at most 512 MiB
    # for some more, and are counted for one.
    sums = shape.head_dim * FP32 * (shape.heads_q // shape.heads_kv if s.is_ours else shape.heads_q)
    attention = 2 * size.h + 5 * size.q + 5 * size.kv + 2 * size.lse + sums
    if "rope" in s.patches or s.liger:
        attention -= size.q + size.kv
    if "attention" in s.patches:
        # Of all tokens: input, output and their gradients, keys and values, and the fp32 sums of their gradients.
        whole = 3 * size.h + 2 * size.kv + 2 * shape.heads_kv * shape.head_dim * FP32
        most = s.attention_chunk * attention
        return [
            Term("input, keys and values of one layer's attention", ("attention",), per_token=whole),
            Term("one chunk of attention in backward", ("attention",), per_token=attention, most=most),
        ]
    # The patch attention lowers it, but refuses packed documents, which finetune trains on: no advice.
    use = None if "rope" in s.patches or s.liger else "add rope to --patches"
    return [Term("one layer's attention in backward", ("attention",), per_token=attention, remover=use)]


def _scores(shape: Shape, s: Switches, size: _Sizes) -> list[Term]:
    """Tensors that our attention does not make and others do: repeated keys, masks, scores."""
    terms, use = [], "use --attn_implementation flashmla"
    if s.attn_implementation not in LEAN_BACKENDS and shape.heads_kv < shape.heads_q:
        # K and V repeated to the query heads, and their gradients.
        terms.append(Term("repeated keys and values", ("attention",), per_token=4 * size.q, remover=use))
    if s.attn_implementation == "sdpa" and shape.window:
        # Transformers gives SDPA a window as one mask of booleans for all layers.
        terms.append(Term("the window's mask", MOMENTS, per_pair=1, remover=use))
    if s.attn_implementation == "eager":
        # Softmax in fp32 and two gradients of it; if the model computes in less, the softmax's cast and its gradient.
        casts = s.activation_bytes if s.activation_bytes < FP32 else 0
        pair, live = shape.heads_q * (3 * FP32 + 2 * casts), ("attention",)
        if not s.is_checkpointed:
            # Softmax and its cast stay for every layer.
            pair, live = pair + (shape.layers - 1) * shape.heads_q * (FP32 + casts), MOMENTS
        terms.append(Term("scores of eager attention", live, per_pair=pair, remover=use))
    return terms


def _exchanges(shape: Shape, s: Switches, size: _Sizes) -> list[Term]:
    """Queries, keys and values of one layer on their way between tokens and heads: sent and received."""
    if s.sp == 1:
        return []
    repeated = max(1, s.sp // shape.heads_kv)  # fewer heads of keys than GPUs
    return [Term("what Ulysses sends and receives", ("attention",), per_token=2 * (size.q + 2 * repeated * size.kv))]


def _adapter_inputs(shape: Shape, s: Switches) -> list[Term]:
    """Each adapter casts its input to its own dtype, which autograd keeps until the layer is done."""
    if not s.use_peft or s.adapter_bytes == s.activation_bytes or not s.casts_adapter_inputs:
        return []
    casts = s.adapter_bytes * (3 * shape.hidden + shape.heads_q * shape.head_dim)
    mlp_casts = s.adapter_bytes * (2 * shape.hidden + shape.intermediate)
    use = "train with flashmla finetune, or the adapter in the weights' dtype"
    layers = 1 if s.is_checkpointed else shape.layers
    here = ("mlp", "attention") if s.is_checkpointed else MOMENTS
    terms = [Term("inputs of attention's adapters in float32", here, per_token=layers * casts, remover=use)]
    if "mlp" not in s.patches:
        here = ("mlp",) if s.is_checkpointed else MOMENTS
        terms.append(Term("inputs of the MLP's adapters in float32", here, per_token=layers * mlp_casts, remover=use))
    return terms
