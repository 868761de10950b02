"""The seconds of a training step on several GPUs, predicted by a small model: operations at a stated rate, bytes over links.

    compute    the model's own operations (Shape.training_flops), divided among the GPUs of a sequence, at ``mfu`` of the
               device's rate: what one GPU reaches at that length, recomputation and offloading included
    exchange   Ulysses' all-to-alls: queries, keys, values and outputs of each layer, forward, again if layers are run again,
               and their gradients. Nothing is computed meanwhile
    sharding   FSDP2's gathers of weights, for forward and for backward, and the sums of gradients; or DDP's sums. They cross
               while the layers compute: what counts is the longer of the two

An all-to-all sends each of its partners the same number of bytes; those of other hosts go by the network, after the ones by
NVLink. A gather or a sum is a ring through all GPUs, which enters and leaves a host by all its network cards at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flashmla_hf.training.shape import Shape
from flashmla_hf.training.terms import FP32, Switches

GIGA = 1e9
# Of the 8B shape's LoRA step of 524,288 tokens on one H200 (benchmarks/results/memory-llama-8b-h200.json).
MFU = 0.43


@dataclass(frozen=True)
class Cluster:
    """GPUs and their links. The defaults are hosts of eight H100s: NVLink 4, and a network card of 400 Gbit/s for each."""

    gpus_per_host: int = 8
    nvlink: float = 450.0  # GB/s that a GPU sends to the others of its host
    network: float = 50.0  # GB/s that a GPU sends to other hosts
    tflops: float = 989.0  # of a GPU, dense products in the computation's dtype
    mfu: float = MFU

    def __post_init__(self):
        for name in ("gpus_per_host", "nvlink", "network", "tflops", "mfu"):
            value = getattr(self, name)
            if not 0 < value < math.inf or (name == "mfu" and value > 1):
                raise ValueError(
                    f"Cluster: {name}: expected a number above 0{' and up to 1' * (name == 'mfu')}, got {value}"
                )


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step of every GPU."""

    compute: float
    exchange: float
    sharding: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.sharding) + self.exchange


def step_time(shape: Shape, switches: Switches, tokens: int, batch_size: int, cluster: Cluster) -> StepTime:
    """The seconds of a step of ``batch_size`` sequences of ``tokens``, each one document, for each ``switches.sp`` GPUs."""
    flops = shape.training_flops([tokens] * batch_size, switches.use_peft) / switches.sp
    compute = flops / (cluster.mfu * cluster.tflops * 1e12)
    exchange = _all_to_all(exchanged_bytes(shape, switches, tokens * batch_size), switches.sp, cluster)
    return StepTime(compute, exchange, _ring(sharded_bytes(shape, switches), switches.gpus, cluster))


def exchanged_bytes(shape: Shape, s: Switches, tokens: int) -> float:
    """Bytes that a GPU sends in Ulysses' all-to-alls of a step: of each tensor, the part that is another GPU's."""
    if s.sp == 1:
        return 0.0
    repeated = max(1, s.sp // shape.heads_kv)  # fewer heads of keys than GPUs
    vectors = 2 * shape.heads_q + 2 * repeated * shape.heads_kv
    passes = 3 if s.is_checkpointed else 2
    whole = passes * shape.layers * vectors * shape.head_dim * s.activation_bytes * tokens / s.sp
    return whole * (s.sp - 1) / s.sp


def sharded_bytes(shape: Shape, s: Switches) -> float:
    """Bytes that pass each GPU in a ring, for weights and gradients of one step: those that it has not itself."""
    if s.gpus == 1:
        return 0.0
    others = (s.gpus - 1) / s.gpus
    trained = shape.lora_parameters(s.lora_r) if s.use_peft else shape.parameters
    if not s.fsdp:  # DDP: a sum in parts, and the gathering of its parts
        return 2 * others * trained * (s.adapter_bytes if s.use_peft else s.weight_bytes)
    packed = shape.linear_parameters if s.load_in_4bit else 0
    gathered = 2 * (shape.parameters - packed) * s.activation_bytes  # before forward and before backward
    return others * (gathered + trained * FP32)


def _all_to_all(sent: float, gpus: int, cluster: Cluster) -> float:
    """Seconds of all-to-alls in which a GPU sends ``sent`` bytes to the other ``gpus`` - 1."""
    if gpus == 1:
        return 0.0
    here = min(gpus, cluster.gpus_per_host) - 1
    away = gpus - 1 - here
    share = sent / (gpus - 1) / GIGA
    return share * here / cluster.nvlink + share * away / cluster.network


def _ring(passed: float, gpus: int, cluster: Cluster) -> float:
    """Seconds of rings in which ``passed`` bytes pass each of ``gpus``."""
    rate = cluster.nvlink
    if gpus > cluster.gpus_per_host:
        rate = min(rate, cluster.gpus_per_host * cluster.network)
    return passed / GIGA / rate
