"""The memory ledger of a training step: how many bytes of what, from a model's shape and the switches of a run.

    flashmla ledger llama-8b --patches none
    flashmla ledger llama-8b --patches loss mlp checkpointing --memory_gib 80
    flashmla ledger FOLDER --tokens 32768 --full

In Python: ``print(flashmla_hf.ledger("llama-8b", 131072, patches="all"))``.

Pure arithmetic, no tensor is made. A step passes three moments at which memory can peak. The ledger says which of them is
the highest and what it consists of:

    loss        weights + states + what the layers left + logits and their cross-entropy
    mlp         weights + states + what the layers left + one layer's MLP in backward + what its attention saved
    attention   weights + states + what the layers left + one layer's attention in backward

"What the layers left" is every layer's activations, or, with checkpointing, every layer's input alone.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from flashmla_hf.host_memory import GIB
from flashmla_hf.training.arguments import parse_patches
from flashmla_hf.training.options import LARGEST_COUNT, at_least
from flashmla_hf.training.shape import PUBLISHED, Shape, load_config
from flashmla_hf.training.step_time import MFU, Cluster, StepTime, step_time
from flashmla_hf.training.terms import MOMENTS, Switches, Term, terms_of

KIB = 2**10
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "4bit": 2}
RESERVE = 0.06  # of the memory: the allocator's split blocks, cuBLAS's workspaces and the context, which are no tensors


def most(fits: Callable[[int], bool]) -> int:
    """The largest number of which ``fits`` is true, as it is of all below; 0 if it is of none from 1 on."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class Ledger:
    """The terms of one training step of a model under some switches."""

    shape: Shape
    switches: Switches
    terms: tuple[Term, ...]

    def moment(self, tokens: int, batch_size: int = 1) -> str:
        """The one of MOMENTS at which memory peaks."""
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
        """The most tokens whose peak fits in ``memory`` bytes, with a reserve for memory that is no tensor; 0 if none do."""
        usable = memory * (1 - RESERVE)
        return most(lambda tokens: self.peak(tokens, batch_size) <= usable)

    def advice(self, tokens: int, batch_size: int = 1) -> str:
        """For a message: the largest term, and the switch that removes it or the next one."""
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

    def describe(self, tokens: int, batch_size: int = 1) -> str:
        """A Markdown table of the terms at the peak."""
        lines = ["| term | KiB per token | GiB |", "|---|---|---|"]
        for term in self.live(tokens, batch_size):
            size = term.at(tokens, batch_size)
            per_token = (size - term.fixed) / tokens / batch_size
            lines.append(f"| {term.name} | {f'{per_token / KIB:,.0f}' if per_token else '–'} | {size / GIB:,.2f} |")
        moment = self.moment(tokens, batch_size)
        lines.append(f"| **peak, at the {moment}** | | **{self.peak(tokens, batch_size) / GIB:,.2f}** |")
        if self.host(tokens):
            lines.append(f"| pinned host memory | | {self.host(tokens, batch_size) / GIB:,.2f} |")
        return "\n".join(lines) + "\n"

    def _at(self, moment: str) -> list[Term]:
        return [term for term in self.terms if moment in term.moments and not term.is_on_host]


def build_ledger(shape: Shape, switches: Switches) -> Ledger:
    """The ledger of a training step with AdamW on one sequence."""
    return Ledger(shape, switches, terms_of(shape, switches))


def components(shape: Shape, activation_bytes: int = 2) -> dict[str, tuple[float, float]]:
    """Bytes per token, least and most, of the terms that every long run of Transformers' own attention meets."""
    plain = Switches(
        "flash_attention_2",
        gradient_checkpointing=True,
        adapter_bytes=activation_bytes,
        activation_bytes=activation_bytes,
    )

    def total(switches: Switches, *names: str) -> float:
        return sum(term.per_token for term in build_ledger(shape, switches).terms if term.name in names)

    lean = "one layer's attention in backward"
    logits = total(replace(plain, keeps_logits=True), "logits and cross-entropy")
    states, mlp = total(plain, "checkpointed hidden states"), total(plain, "one layer's MLP in backward")
    all_kept = replace(plain, patches=frozenset({"checkpointing", "keep_attention"}), keep_attention=shape.layers)
    kept = total(all_kept, "kept attention outputs")
    wide = total(replace(plain, attn_implementation="sdpa"), lean, "repeated keys and values")
    return {
        "logits and cross-entropy": (logits, logits),
        "checkpointed hidden states": (states, states),
        "one layer's MLP in backward": (mlp, mlp),
        "one layer's attention in backward": (total(plain, lean), wide),
        "kept attention outputs": (kept, kept),
    }


# ---------------------------------------------------------------- from Python, and the command


@dataclass(frozen=True)
class Prediction:
    """The memory of one training step, as :func:`ledger` predicts it. ``print(prediction)`` is meant to be read."""

    ledger: Ledger
    tokens: int
    batch_size: int

    @property
    def peak_bytes(self) -> int:
        """Bytes on the device at the highest moment of the step."""
        return round(self.ledger.peak(self.tokens, self.batch_size))

    @property
    def host_bytes(self) -> int:
        """Bytes of pinned host memory."""
        return round(self.ledger.host(self.tokens, self.batch_size))

    def step_time(self, cluster: Cluster | None = None) -> StepTime:
        """The seconds of the step on ``cluster`` (by default hosts of eight H100s), predicted by training/step_time.py."""
        given = self.ledger.shape, self.ledger.switches, self.tokens, self.batch_size
        return step_time(*given, cluster or Cluster())

    def longest(self, memory_gib: float) -> int:
        """The most tokens of one sequence that fit in ``memory_gib`` GiB of the device, 6 % of it in reserve."""
        return self.ledger.longest(math.floor(memory_gib * GIB), self.batch_size)

    def __str__(self) -> str:
        return self.ledger.describe(self.tokens, self.batch_size)


def ledger(  # noqa: PLR0913, the switches of a run
    model,
    tokens: int = 32768,
    *,
    batch_size: int = 1,
    attn_implementation: str = "flashmla",
    patches: str | Sequence[str] = "none",
    liger: bool = False,
    gradient_checkpointing: bool = False,
    use_peft: bool = True,
    lora_r: int = 16,
    dtype: str = "bfloat16",
    gpus: int = 1,
    sp: int = 1,
    fsdp: bool = False,
) -> Prediction:
    """Predicts the memory of one training step with AdamW. Arithmetic alone: no weight is loaded, no tensor made.

    Args:
        model: a Transformers model or configuration, a folder with config.json, a name on the Hub, or one of
            smollm2-135m, llama-1b, llama-8b, mistral-7b.
        tokens: length of one sequence.
        patches: the memory patches, as ``flashmla finetune --patches`` takes them: names of ``flashmla_hf.PATCHES``,
            ``name=number``, ``"all"`` or ``"none"``.
        liger: whether the kernels of the package liger-kernel are used.
        use_peft: an adapter of rank ``lora_r`` is trained, otherwise all weights.
        dtype: ``"bfloat16"`` or ``"float32"``, of weights, adapter and activations; ``"4bit"`` is bfloat16 with the frozen
            weights of the linear layers but the head in 4 bits (QLoRA).
        gpus: the prediction is of each of so many GPUs.
        sp: GPUs that share each sequence (``flashmla finetune --sp_size``), a divisor of ``gpus``.
        fsdp: weights, gradients and optimizer states are in parts on all GPUs (FSDP2), instead of whole on each (DDP).

    Raises:
        ValueError: a model that is not a dense decoder, an unknown patch or dtype, numbers below 1, or an ``sp`` that divides
            neither ``gpus`` nor the model's heads.
    """
    numbers = (("tokens", tokens), ("batch_size", batch_size), ("lora_r", lora_r), ("gpus", gpus), ("sp", sp))
    for name, value in numbers:
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"flashmla_hf.ledger: {name}: expected a number of at least 1, got {value!r}")
        if value > LARGEST_COUNT:
            raise ValueError(f"flashmla_hf.ledger: {name}: expected at most {LARGEST_COUNT}, got more")
    if gpus % sp:
        raise ValueError(f"flashmla_hf.ledger: sp: expected a divisor of gpus {gpus}, got {sp}")
    shape = _shape_of(model)
    if shape.heads_q % sp or (shape.heads_kv % sp and sp % shape.heads_kv):
        raise ValueError(
            f"flashmla_hf.ledger: sp: expected a divisor of the model's {shape.heads_q} heads, and a divisor or a multiple of "
            f"its {shape.heads_kv} heads of keys, got {sp}"
        )
    if dtype not in ITEM_BYTES:
        raise ValueError(f"flashmla_hf.ledger: dtype: expected one of {', '.join(ITEM_BYTES)}, got {dtype!r}")
    if dtype == "4bit" and not use_peft:
        raise ValueError("flashmla_hf.ledger: dtype '4bit': expected an adapter, because 4-bit weights are not trained")
    names, options = parse_patches([patches] if isinstance(patches, str) else list(patches), "cuda", use_peft)
    switches = Switches(
        attn_implementation=attn_implementation,
        patches=frozenset(names),
        liger=liger,
        gradient_checkpointing=gradient_checkpointing,
        use_peft=use_peft,
        lora_r=lora_r,
        weight_bytes=ITEM_BYTES[dtype],
        load_in_4bit=dtype == "4bit",
        adapter_bytes=ITEM_BYTES[dtype],
        activation_bytes=ITEM_BYTES[dtype],
        gpus=gpus,
        sp=sp,
        fsdp=fsdp,
        **options,
    )
    return Prediction(build_ledger(shape, switches), tokens, batch_size)


def _shape_of(model) -> Shape:
    if isinstance(model, str):
        return PUBLISHED[model] if model in PUBLISHED else Shape.of(load_config(model))
    return Shape.of(getattr(model, "config", model))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="flashmla ledger", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help=f"{', '.join(PUBLISHED)}, a folder with config.json, or a name on the Hub")
    parser.add_argument(
        "--tokens", "--max_length", type=at_least(1), default=32768, help="length of a sequence (default: 32768)"
    )
    parser.add_argument("--batch_size", type=at_least(1), default=1, help="sequences (default: 1)")
    parser.add_argument("--attn_implementation", default="flashmla", help="flashmla (default), sdpa, eager, ...")
    parser.add_argument(
        "--patches", nargs="+", default=["none"], help="as of flashmla finetune: names, name=number, all, none"
    )
    parser.add_argument("--liger", action="store_true", help="with the kernels of the package liger-kernel")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="Transformers' own")
    parser.add_argument("--full", action="store_true", help="train all weights instead of LoRA")
    parser.add_argument("--load_in_4bit", action="store_true", help="QLoRA: frozen linear layers in 4 bits")
    parser.add_argument("--gpus", type=at_least(1), default=1, help="GPUs; the prediction is of each (default: 1)")
    parser.add_argument("--sp", type=at_least(1), default=1, help="GPUs that share each sequence (default: 1)")
    parser.add_argument(
        "--fsdp", action="store_true", help="weights, gradients and states in parts on all GPUs (FSDP2)"
    )
    links = parser.add_argument_group("links, for the seconds of a step on several GPUs")
    for name, default, help_text in (
        ("gpus_per_host", Cluster.gpus_per_host, "GPUs that NVLink joins"),
        ("nvlink", Cluster.nvlink, "GB/s that a GPU sends by it"),
        ("network", Cluster.network, "GB/s that a GPU sends to other hosts"),
        ("tflops", Cluster.tflops, "TFLOP/s of a GPU, by its data sheet"),
        ("mfu", MFU, "share of them that one GPU reaches alone"),
    ):
        links.add_argument(f"--{name}", type=type(default), default=default, help=f"{help_text} (default: {default:g})")
    parser.add_argument(
        "--memory_gib", type=float, default=80.0, help="memory to find the longest context for (default: 80)"
    )
    args = parser.parse_args(argv)
    if not 0 < args.memory_gib <= LARGEST_COUNT / GIB:
        expected = f"GiB above 0 and at most {LARGEST_COUNT / GIB:.1e}"
        parser.error(f"--memory_gib: expected {expected}, got {args.memory_gib}")
    try:
        prediction = ledger(
            args.model,
            args.tokens,
            batch_size=args.batch_size,
            attn_implementation=args.attn_implementation,
            patches=args.patches,
            liger=args.liger,
            gradient_checkpointing=args.gradient_checkpointing,
            use_peft=not args.full,
            dtype="4bit" if args.load_in_4bit else "bfloat16",
            gpus=args.gpus,
            sp=args.sp,
            fsdp=args.fsdp,
        )
        cluster = Cluster(args.gpus_per_host, args.nvlink, args.network, args.tflops, args.mfu)
    except ValueError as error:
        sys.exit(f"flashmla ledger: {error}")
    print(assumptions(prediction, args.memory_gib))
    print()
    print(prediction)
    print(_longest(prediction, args.memory_gib))
    if args.gpus > 1:
        print(_seconds(prediction, cluster))


def assumptions(prediction: Prediction, memory_gib: float) -> str:
    """One line: the length, batch, training, attention, patches and memory that the prediction is of."""
    switches, positions = prediction.ledger.switches, prediction.ledger.shape.positions
    beyond = f" (beyond the model's {positions:,} positions)" if positions and prediction.tokens > positions else ""
    dtype = "float32" if switches.activation_bytes == ITEM_BYTES["float32"] else "bfloat16"
    parts = [
        f"{prediction.tokens:,} tokens{beyond} x {prediction.batch_size}",
        f"LoRA of rank {switches.lora_r}" if switches.use_peft else "all weights trained",
        f"4-bit base, {dtype}" if switches.load_in_4bit else dtype,
        f"attention {switches.attn_implementation}",
        f"patches {' '.join(sorted(switches.patches)) or 'none'}",
    ]
    parts += [name for name in ("gradient_checkpointing", "liger") if getattr(switches, name)]
    if switches.gpus == 1:
        return f"assumed: {', '.join(parts)}, a card of {memory_gib:g} GiB"
    sharing = f", {switches.sp} for each sequence" if switches.sp > 1 else ""
    parts.append(f"each of {switches.gpus} GPUs by {'FSDP2' if switches.fsdp else 'DDP'}{sharing}")
    return f"assumed: {', '.join(parts)}, cards of {memory_gib:g} GiB"


def _seconds(prediction: Prediction, cluster: Cluster) -> str:
    """The sentence about the time of a step; no measurement on several GPUs stands behind it yet."""
    time, switches = prediction.step_time(cluster), prediction.ledger.switches
    tokens = prediction.tokens * prediction.batch_size * switches.gpus // switches.sp
    hosts = -(-switches.gpus // cluster.gpus_per_host)
    return (
        f"a step, predicted and not yet confirmed on several GPUs: {time.seconds:,.3g} s, {tokens / time.seconds:,.0f} "
        f"tokens/s on {hosts} host{'s' * (hosts > 1)}. Computing takes {time.compute:,.3g} s at an MFU of {cluster.mfu:.0%}, "
        f"the exchange of Ulysses {time.exchange:,.3g} s, and {'FSDP2' if switches.fsdp else 'DDP'}'s traffic beside it "
        f"{time.sharding:,.3g} s"
    )


def _longest(prediction: Prediction, memory_gib: float) -> str:
    """The sentence about the longest context; memory alone does not make the model able to use it."""
    longest, positions = prediction.longest(memory_gib), prediction.ledger.shape.positions
    text = f"longest context in {memory_gib:g} GiB, {RESERVE:.0%} of it in reserve: {longest:,} tokens"
    return f"{text} by memory; the model has {positions:,} positions" if positions and longest > positions else text


if __name__ == "__main__":
    main()
