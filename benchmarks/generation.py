"""Decoding by generate() with a cache that is filled without a prefill: its points, and how one is measured and checked."""

from __future__ import annotations

import copy
import inspect
import math
import statistics
import time
from dataclasses import dataclass

import models
import torch
import torch._dynamo
from timing import free, gpu_state, peak_memory, spread
from transformers import DynamicCache, LogitsProcessor, StaticCache, StoppingCriteria

from flashmla_hf import Fp8Cache, host_memory
from flashmla_hf.host_memory import GIB
from flashmla_hf.training import machine

# "compiled": static, and generate() compiles the step, as it does on a GPU. "fp8": our Fp8Cache, which grows; "compiled-fp8":
# the static one, compiled.
CACHES = ("dynamic", "static", "compiled", "fp8", "compiled-fp8")
COMPILED, IN_FP8 = ("compiled", "compiled-fp8"), ("fp8", "compiled-fp8")
# generate() compiles on a GPU by itself, with these options. A CPU must be told.
COMPILE_OPTIONS = {"cuda": {}, "cpu": {"mode": None}}
REFERENCE = "eager"
POISON = 100.0  # V in the rows of padding: an implementation that reads them is far off
RESERVE = 2 * GIB  # CUDA's context, workspaces, logits
# The least bound on a difference of logits, relative to the largest one. The bound is ERRORS times the error of eager
# attention in the same dtype, measured in this run, if that is more.
FLOOR = {"float32": 1e-3, "bfloat16": 1e-2}
ERRORS = 4.0
FP8_FLOOR = 0.1  # of points with an fp8 cache, whose numbers are off by 2.6 %; another row's or head's give about 1
SHORT, SHORT_STEPS = 192, 8  # tokens of the check's rows, and how many of them are decoded
SHORT_STARTS = {"equal rows": (0, 0), "padded rows": (0, 5, 61, 130)}  # the first real token of each row


@dataclass(frozen=True)
class Point:
    """One measurement. The last measured token is number ``context`` of the longest row."""

    model: str
    attention: str  # attn_implementation
    cache: str  # of CACHES
    batch_size: int
    context: int
    is_padded: bool = False  # rows of different lengths, from context down to about half of it, padded on the left
    dtype: str = "bfloat16"
    tokens: int = 32  # timed
    warmup: int = 8  # before them: what is compiled, captured or chosen
    layers: int | None = None  # of the model; None: its own

    @property
    def rows(self) -> int:
        """Rows of the cache that are filled: generate() then reads one token and makes the others."""
        return self.context - self.warmup - self.tokens - 1

    def starts(self) -> list[int]:
        """The first real token of each row."""
        return [self.rows * i // (2 * self.batch_size) if self.is_padded else 0 for i in range(self.batch_size)]


class Forced(LogitsProcessor):
    """Makes generate() choose given tokens [steps, batch], and keeps the logits that it would have chosen by."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens, self.seen = tokens, []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = self.tokens[len(self.seen)][:, None]
        self.seen.append(scores.float().cpu())
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


class Clock(StoppingCriteria):
    """Never stops, and notes when each step got here. generate() waits for a step before it begins the next one."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores, **_) -> torch.Tensor:
        self.at.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Decoding:
    """A filled cache, its tokens and its mask: what generate() goes on from. The same for every implementation."""

    def __init__(self, generation: Generation, point: Point, cache: str) -> None:
        self.generation, self.point, self.kind = generation, point, cache
        model, device = generation.model, generation.device
        generator = torch.Generator(device).manual_seed(0)
        shape = (point.batch_size, point.rows + 1)
        self.ids = torch.randint(model.config.vocab_size, shape, generator=generator, device=device)
        self.forced = torch.randint(
            model.config.vocab_size, (point.warmup, point.batch_size), generator=generator, device=device
        )
        starts = torch.tensor(point.starts(), device=device)[:, None]
        self.mask = (torch.arange(shape[1], device=device)[None] >= starts).long()
        if cache == "dynamic":
            self.cache = DynamicCache(config=model.config)
        elif cache == "fp8":
            self.cache = Fp8Cache()
        elif cache == "compiled-fp8":
            self.cache = Fp8Cache(model.config, max_cache_len=point.context)
        else:
            self.cache = StaticCache(config=model.config, max_cache_len=point.context)
        for layer in range(model.config.num_hidden_layers):
            generation.write_random_rows(self.cache, point, layer, generator)

    def _generate(self, count: int, **options) -> None:
        """``count`` tokens more, the first by a step that is not compiled: generate() takes it for the prefill."""
        before = self.ids.shape[1]
        if self.kind in COMPILED:
            compiling = self.generation.compile_options
        else:
            compiling = {"disable_compile": True}
        self.ids = self.generation.model.generate(
            self.ids, attention_mask=self.mask, max_new_tokens=count, do_sample=False, use_cache=True,
            **{self.generation.cache_name: self.cache}, **compiling, **options,
        )  # fmt: skip
        if self.ids.shape[1] != before + count:
            raise RuntimeError(f"generate() made {self.ids.shape[1] - before} tokens of {count}")
        self.mask = torch.nn.functional.pad(self.mask, (0, count), value=1)

    def warm_up(self) -> torch.Tensor:
        """The logits [steps, batch, vocabulary] of the steps before the timed ones, whose tokens are given: float32, on the
        CPU."""
        forced = Forced(self.forced)
        self._generate(self.point.warmup, logits_processor=[forced])
        return torch.stack(forced.seen)

    def time(self) -> list[float]:
        """Seconds of each of the timed tokens."""
        clock = Clock()
        self._generate(self.point.tokens + 1, stopping_criteria=[clock])
        return [after - before for before, after in zip(clock.at, clock.at[1:], strict=False)]


class Generation:
    """A model that all points share; its attention is switched between them. Random weights, made on the device."""

    def __init__(self, name: str, dtype: str, device: str, layers: int | None = None) -> None:
        self.dtype, self.device = getattr(torch, dtype), device
        self.model = models.load(name, REFERENCE, self.dtype, device, layers=layers).requires_grad_(False)
        # No row ends by itself.
        self.model.generation_config.eos_token_id, self.model.generation_config.pad_token_id = None, 0
        parameters = inspect.signature(self.model.forward).parameters
        self.cache_name = "cache" if "cache" in parameters else "past_key_values"
        self.weight_bytes = sum(p.numel() * p.element_size() for p in self.model.parameters())
        self.short_errors: dict[str, dict[str, float]] = {}  # of each attention: case -> error
        self._truth: tuple[tuple, torch.Tensor] | None = None

    @property
    def compile_options(self) -> dict:
        from transformers import CompileConfig

        if self.device == "cuda":
            return {}
        config = CompileConfig(**COMPILE_OPTIONS[self.device])
        config._compile_all_devices = True
        return {"compile_config": config}

    def refusal(self, point: Point) -> str | None:
        """Why the device's memory cannot hold the point, by arithmetic: weights, cache, and the copies that a step makes.

        A dynamic cache is copied one layer at a time, and eager attention, the reference of every point, repeats the K and V of
        a layer for each head that shares them.
        """
        config = self.model.config
        layers, groups = config.num_hidden_layers, config.num_attention_heads // config.num_key_value_heads
        cache = point.batch_size * point.context * self.bytes_per_token()  # the reference's, if no other
        needed = self.weight_bytes + cache * (1 + (1 + groups) / layers) + RESERVE
        return self.too_large(needed, {"weights": self.weight_bytes, "cache": cache})

    def too_large(self, needed: float, parts: dict[str, float]) -> str | None:
        """Why the device's memory cannot hold ``needed`` bytes, most of them those of ``parts``; ``None`` if it can."""
        available = machine.memory_limit(self.device)
        if needed <= available:
            return None
        said = ", ".join(f"{size / GIB:.0f} of {name}" for name, size in parts.items())
        return f"would take {needed / GIB:.0f} GiB of {available / GIB:.0f}: {said}"

    def bytes_per_token(self, cache: str = "dynamic") -> int:
        """Of a cache; in fp8 a row of a head has one scale of four bytes."""
        config = self.model.config
        row = config.head_dim + 4 if cache in IN_FP8 else config.head_dim * self.dtype.itemsize
        return 2 * config.num_hidden_layers * config.num_key_value_heads * row

    def write_random_rows(self, cache, point: Point, layer: int, generator: torch.Generator) -> None:
        """Random K and V of ``layer``. V's mean differs by row, head and dim: another row or head than the right one shows."""
        config = self.model.config
        heads, dim = config.num_key_value_heads, config.head_dim
        size = (point.batch_size, heads, point.rows, dim)
        options = {"generator": generator, "device": self.device, "dtype": self.dtype}
        k, v = torch.randn(size, **options), torch.randn(size, **options)
        v += torch.randn((point.batch_size, heads, 1, dim), **options)
        for row, start in enumerate(point.starts()):
            v[row, :, :start] = POISON
        cache.update(k, v, layer)

    def measure(self, point: Point) -> dict:
        """A record's status and numbers: seconds a token (the median), peak memory in all, and the errors of the logits."""
        if reason := self.refusal(point):
            return {"status": "does_not_fit", "reason": reason}
        errors = dict(self._short(point.attention))
        bound = self.bound(point.dtype)
        if problem := _problem(errors, bound):
            return {"status": "wrong", "reason": problem, "errors": errors, "bound": bound}
        if point.cache in IN_FP8:
            bound = max(bound, FP8_FLOOR)
        truth = self._expected(point)
        logits, numbers = self.timed(point)
        errors["these rows"] = relative_error(logits, truth)
        problem = _problem(errors, bound)
        # A wrong point keeps its time in the file, for whoever looks for the fault; no table shows it.
        return {
            **({"status": "ok"} if problem is None else {"status": "wrong", "reason": problem}),
            **numbers,
            "errors": errors,
            "bound": bound,
        }

    def timed(self, point: Point) -> tuple[torch.Tensor, dict]:
        """The logits of the first steps, whose tokens are given, and a record's numbers: seconds a token and peak memory."""
        self.use(point.attention)
        self._forget_compiled()
        counters = torch._dynamo.utils.counters
        counters.clear()
        try:
            decoding = Decoding(self, point, point.cache)
            free(self.device)
            in_use = torch.cuda.memory_allocated() if self.device == "cuda" else host_memory.resident_bytes()
            kept, started = [], time.perf_counter()
            beyond = peak_memory(lambda: kept.append(decoding.warm_up()), self.device)
            first_seconds = time.perf_counter() - started
            seconds = decoding.time()
            state = gpu_state(self.device)
        finally:
            self._forget_compiled()
        compiled = {
            "graphs": counters["stats"]["unique_graphs"],
            "graph_breaks": sum(counters["graph_break"].values()),
            "cudagraph_skips": counters["inductor"]["cudagraph_skips"],
        }
        return kept[0], {
            "seconds": statistics.median(seconds),
            "spread": spread(seconds),
            "all_seconds": [round(s, 7) for s in seconds],
            "first_seconds": first_seconds,
            "peak_bytes": None if beyond is None else in_use + beyond,
            "cache_bytes": point.batch_size * point.context * self.bytes_per_token(point.cache),
            "weight_bytes": self.weight_bytes,
            **(compiled if point.cache in COMPILED else {}),
            **state,
        }

    def use(self, attention: str) -> None:
        """Has the model compute by the implementation ``attention``."""
        self.model.set_attn_implementation(attention)

    def _forget_compiled(self) -> None:
        """Every point compiles for its own shapes, as a program that starts with them does."""
        if getattr(self.model, "_compiled_call", None) is not None:
            del self.model._compiled_call
            torch._dynamo.reset()
            free(self.device)

    def _expected(self, point: Point) -> torch.Tensor:
        """The logits of the point's first steps by eager attention with a dynamic cache."""
        key = (point.batch_size, point.context, point.is_padded, point.tokens, point.warmup)
        if self._truth is None or self._truth[0] != key:
            self._truth = None
            self.use(REFERENCE)
            self._truth = (key, Decoding(self, point, "dynamic").warm_up())
            free(self.device)
        return self._truth[1]

    # ------------------------------------------------------------ a real prefill of short rows, against float32

    def bound(self, dtype: str) -> float:
        """The largest relative error of logits that is taken for right."""
        return max(FLOOR[dtype], ERRORS * max(self._short(REFERENCE).values()))

    def _short(self, attention: str) -> dict[str, float]:
        """The errors of the logits of short rows, prefilled and then decoded, against eager attention in float32."""
        if attention not in self.short_errors:
            if not self.short_errors and attention != REFERENCE:
                self._short(REFERENCE)
            if not self.short_errors:
                reference = copy.deepcopy(self.model).float()
                self._short_truth = {name: self._short_logits(reference, name) for name in SHORT_STARTS}
                del reference
                free(self.device)
            self.use(attention)
            self.short_errors[attention] = {
                name: relative_error(self._short_logits(self.model, name), truth)
                for name, truth in self._short_truth.items()
            }
        return self.short_errors[attention]

    @torch.no_grad()
    def _short_logits(self, model, case: str) -> torch.Tensor:
        """Logits [steps, batch, vocabulary] of the last tokens of the case's rows: a prefill, then given tokens one by one."""
        starts = torch.tensor(SHORT_STARTS[case], device=self.device)[:, None]
        generator = torch.Generator(self.device).manual_seed(1)
        shape = (len(starts), SHORT)
        ids = torch.randint(model.config.vocab_size, shape, generator=generator, device=self.device)
        mask = (torch.arange(SHORT, device=self.device)[None] >= starts).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache, steps = DynamicCache(config=model.config), []
        first = SHORT - SHORT_STEPS
        for begin, end in ((0, first), *((i, i + 1) for i in range(first, SHORT))):
            out = model(
                input_ids=ids[:, begin:end], attention_mask=mask[:, :end], position_ids=positions[:, begin:end],
                use_cache=True, logits_to_keep=1, **{self.cache_name: cache},
            )  # fmt: skip
            steps.append(out.logits[:, -1].float().cpu())
        return torch.stack(steps)


def relative_error(got: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest difference over the largest value; infinite for anything that is not a finite number."""
    if got.shape != truth.shape or not torch.isfinite(got).all():
        return math.inf
    return float((got - truth).abs().max() / truth.abs().max())


def _problem(errors: dict[str, float], bound: float) -> str | None:
    case, error = max(errors.items(), key=lambda item: item[1])
    return (
        f"logits of {case} are off by {error:.2g} of the largest; at most {bound:.2g} is right"
        if error > bound
        else None
    )
