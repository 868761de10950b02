"""Decoding of multi-head latent attention with and without the patch "mla_decode": a whole model, and one attention layer.

A way is a name of an attention, and after "+" the patch: "flashmla+mla_decode", "flashmla", "sdpa".
"""

from __future__ import annotations

import copy
import inspect
import math
import statistics

import torch
from generation import ERRORS, FLOOR, POISON, REFERENCE, RESERVE, Decoding, Generation, Point
from peers import Peer
from timing import free, gpu_state, peak_memory, rotation, spread, start_turn
from transformers import DeepseekV3Config, DeepseekV3Model, StaticCache

import flashmla_hf

WAYS = ("flashmla+mla_decode", "flashmla", "sdpa")
LAYER = "layer"  # the kind of cache of a point that is one layer: a full static one
LAYER_MODELS = {"cuda": "deepseek-v3", "cpu": "tiny-v3"}
# Experts are chosen by rank, so that rounding changes some. No error beyond this is taken for right, whatever sdpa's is.
LARGEST_BOUND = 0.25
CALLS, REPEATS = {"cuda": 20, "cpu": 1}, 10  # calls of a CUDA graph, and how often it is replayed


def use(model, way: str) -> None:
    flashmla_hf.unpatch(model)
    name, _, patch = way.partition("+")
    model.set_attn_implementation(name)
    if patch:
        flashmla_hf.patch(model, [patch])


def write_rows(cache, layer: int, latents: torch.Tensor, rotated: torch.Tensor, way: str) -> None:
    """Writes latents and rotated keys [batch, 1, rows, dim] as the way's layers do."""
    if "+" in way:
        rows = torch.cat((latents, rotated), dim=-1)
        latents, rotated = rows, rows[..., :0]
    cache.update(latents, rotated, layer)


def difference(got: torch.Tensor, truth: torch.Tensor) -> float:
    """The norm of the difference over the norm; infinite for anything that is not a finite number."""
    if got.shape != truth.shape or not torch.isfinite(got).all():
        return math.inf
    return float((got.float() - truth.float()).norm() / truth.float().norm())


class LatentGeneration(Generation):
    """A model that all points share; its attention is switched between the ways."""

    def __init__(self, name: str, dtype: str, device: str) -> None:
        super().__init__(name, dtype, device)
        self._way, self._noise = REFERENCE, None

    def use(self, attention: str) -> None:
        use(self.model, attention)
        self._way = attention

    def bytes_per_token(self, cache: str = "dynamic") -> int:
        config = self.model.config
        return config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim) * self.dtype.itemsize

    def refusal(self, point: Point) -> str | None:
        """Why the device's memory cannot hold the point: weights, cache, and one layer that eager attention expands."""
        config = self.model.config
        rows = point.batch_size * point.context
        widths = 2 * (config.qk_nope_head_dim + config.v_head_dim) + config.qk_rope_head_dim
        expanded = rows * config.num_attention_heads * widths * self.dtype.itemsize
        cache = rows * self.bytes_per_token()
        needed = self.weight_bytes + cache * (1 + 2 / config.num_hidden_layers) + expanded + RESERVE
        return self.too_large(needed, {"weights": self.weight_bytes, "cache": cache, "an expanded layer": expanded})

    def write_random_rows(self, cache, point: Point, layer: int, generator: torch.Generator) -> None:
        """Random latents and rotated keys of ``layer``. Each row's latents have another mean: another row than the right one
        shows."""
        config = self.model.config
        options = {"generator": generator, "device": self.device, "dtype": self.dtype}
        latents, rotated = (
            torch.randn((point.batch_size, 1, point.rows, dim), **options)
            for dim in (config.kv_lora_rank, config.qk_rope_head_dim)
        )
        latents += torch.randn((point.batch_size, 1, 1, config.kv_lora_rank), **options)
        for row, start in enumerate(point.starts()):
            latents[row, :, :start] = POISON
        write_rows(cache, layer, latents, rotated, self._way)

    def measure(self, point: Point) -> dict:
        """A record's status and numbers, as :meth:`Generation.measure`. Logits are compared with eager attention, unpatched, in
        the same dtype; the bound is four times the error of sdpa."""
        if reason := self.refusal(point):
            return {"status": "does_not_fit", "reason": reason}
        if self._noise is None:
            small = Point(point.model, "sdpa", "dynamic", 2, 256, dtype=point.dtype, tokens=1)
            expected = self._expected(small)
            self.use("sdpa")
            self._noise = difference(Decoding(self, small, "dynamic").warm_up(), expected)
        bound = min(LARGEST_BOUND, max(FLOOR[point.dtype], ERRORS * self._noise))
        truth = self._expected(point)
        logits, numbers = self.timed(point)
        error = difference(logits, truth)
        return _record(error, bound) | numbers


class LatentLayer:
    """One attention layer of DeepSeek-V3's shape and a full static cache: a step reads every row."""

    def __init__(self, name: str, dtype: str, device: str) -> None:
        self.dtype, self.device = getattr(torch, dtype), device
        sizes = {
            "deepseek-v3": {},  # the configuration's defaults
            "tiny-v3": {
                "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 64,
                "q_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
            },
        }[name]  # fmt: skip
        # The rest of the layer is not called.
        self.config = DeepseekV3Config(
            num_hidden_layers=1, vocab_size=32, intermediate_size=64, first_k_dense_replace=1, **sizes
        )
        torch.manual_seed(0)
        with torch.device(device):
            self.model = DeepseekV3Model._from_config(self.config, attn_implementation="sdpa", dtype=self.dtype)
        self.model.eval().requires_grad_(False)
        self._bounds: dict[str, tuple[float, float]] = {}

    def measure(self, point: Point) -> dict:
        """A record's status and numbers: seconds of a call, and peak memory with the weights and the cache."""
        if point.attention not in self._bounds:
            self._bounds[point.attention] = self._check(point.attention)
        error, bound = self._bounds[point.attention]
        record = _record(error, bound)
        if record["status"] != "ok":
            return record
        use(self.model, point.attention)
        call = self._call(self.model, point.attention, point.batch_size, point.context)
        free(self.device)
        in_use = torch.cuda.memory_allocated() if self.device == "cuda" else 0
        beyond = peak_memory(call, self.device)
        timed = rotation(Peer(call), [call], CALLS[self.device], self.device)
        seconds = [start_turn(timed, 1, self.device, "fwd")() / CALLS[self.device] for _ in range(REPEATS)]
        width = self.config.kv_lora_rank + self.config.qk_rope_head_dim
        return record | {
            "seconds": statistics.median(seconds),
            "spread": spread(seconds),
            "peak_bytes": None if beyond is None else in_use + beyond,
            "cache_bytes": point.batch_size * point.context * width * self.dtype.itemsize,
            **gpu_state(self.device),
        }

    @torch.no_grad()
    def _call(self, model, way: str, batch_size: int, context: int):
        """A function of one step: the last of ``context`` tokens, written again at each call."""
        generator = torch.Generator(self.device).manual_seed(0)
        options = {"generator": generator, "device": self.device, "dtype": self.dtype}
        cache = StaticCache(config=self.config, max_cache_len=context)
        parts = (
            torch.randn((batch_size, 1, context - 1, dim), **options).to(model.dtype)
            for dim in (self.config.kv_lora_rank, self.config.qk_rope_head_dim)
        )
        write_rows(cache, 0, *parts, way)
        hidden = torch.randn((batch_size, 1, self.config.hidden_size), **options).to(model.dtype)
        positions = torch.full((batch_size, 1), context - 1, device=self.device)
        embeddings = model.rotary_emb(hidden, position_ids=positions)
        attention = model.layers[0].self_attn
        parameters = inspect.signature(attention.forward).parameters
        name = "cache" if "cache" in parameters else "past_key_values"

        @torch.no_grad()
        def call() -> torch.Tensor:
            out, _ = attention(
                hidden_states=hidden, position_embeddings=embeddings, attention_mask=None, **{name: cache}
            )
            cache.layers[0].cumulative_length.sub_(1)  # no crop before Transformers 5.24
            return out

        return call

    def _check(self, way: str) -> tuple[float, float]:
        """The error of a short cache's step against sdpa in float32 with the same weights, and its bound."""
        truth = self._call(copy.deepcopy(_unpatched(self.model)).float(), "sdpa", 2, 256)()
        errors = {}
        for name in ("sdpa", way):
            use(self.model, name)
            errors[name] = difference(self._call(self.model, name, 2, 256)(), truth)
        dtype = str(self.dtype).removeprefix("torch.")
        return errors[way], min(LARGEST_BOUND, max(FLOOR[dtype], ERRORS * errors["sdpa"]))


def _unpatched(model):
    use(model, "sdpa")
    return model


def _record(error: float, bound: float) -> dict:
    status = {"status": "ok"} if error <= bound else {
        "status": "wrong", "reason": f"off by {error:.2g}, relative to the norm; at most {bound:.2g} is right",
    }  # fmt: skip
    return status | {"errors": {"these rows": error}, "bound": bound}


class Measured:
    """Measures points of both kinds; each model is made when its first point comes."""

    def __init__(self, model: str, dtype: str, device: str) -> None:
        self.arguments, self.layer_model = (model, dtype, device), LAYER_MODELS["cpu" if "tiny" in model else device]
        self._made: dict[str, LatentGeneration | LatentLayer] = {}

    def measure(self, point: Point) -> dict:
        kind = LAYER if point.cache == LAYER else "model"
        if kind not in self._made:
            self._made.clear()  # one model at a time on the device
            free(self.arguments[2])
            make = LatentLayer if kind == LAYER else LatentGeneration
            name = self.layer_model if kind == LAYER else self.arguments[0]
            self._made[kind] = make(name, *self.arguments[1:])
        return self._made[kind].measure(point)
