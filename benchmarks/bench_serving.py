"""Continuous batching (generate_batch) of requests of many lengths, per attention: tokens a second.

    python benchmarks/bench_serving.py                                     # 256 requests to Llama-3.1-8B's shape on a GPU
    python benchmarks/bench_serving.py --requests 64 --attentions flashmla/flash-attn3 sdpa
    python benchmarks/bench_serving.py --time_budget 500                   # again: goes on where the file ends
    python benchmarks/bench_serving.py --attentions flashmla/flash-attn3 sdpa --time_limit 200 --time_budget 290

Weights are random, made on the device. Prompts have 128 to 4,096 random tokens and answers 32 to 512, log-uniform, the same
requests for every attention, all there at the beginning. No answer ends early. Names are those of Transformers: from 5.23 on
"flashmla/flash-attn3" decodes with block tables, while "flashmla", as "sdpa" and "paged|eager", has its keys gathered. sdpa
stays sdpa: Transformers would otherwise take a flash implementation that it finds installed.

The time is from the first request's arrival to the last one's end; what Transformers captures before the first request is
stated beside it. Everything else is Transformers' default: pages, the cache's share of the free memory, CUDA graphs.

No number without right tokens: a few short requests are run first, and the log probabilities of their tokens are compared with
those that eager attention without a cache gives the same tokens. The bound is stated in nats. Of the timed requests every one
must end with as many tokens as it asked for.

An attention that does not end within --time_limit has no rate. All requests took longer than that, which bounds the others'
lead from below: the page says so.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import math
import time
from dataclasses import dataclass

import inference_results
import models
import point_runs
import torch
import transformers
from generation import REFERENCE
from point_runs import OutOfTimeError, Program
from timing import free
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.utils import WorkloadHints

from flashmla_hf.host_memory import GIB
from flashmla_hf.training.options import at_least

ATTENTIONS = ("flashmla/flash-attn3", "flashmla", "sdpa", "paged|eager")
REQUESTS = {"cuda": 256, "cpu": 6}
PROMPTS = {"cuda": (128, 4096), "cpu": (8, 64)}
ANSWERS = {"cuda": (32, 512), "cpu": (4, 16)}
# A CPU has no memory of its own to fill with a cache: blocks of 256 tokens.
CACHE = {"cuda": {}, "cpu": {"num_blocks": 16, "max_batch_tokens": 256}}
CHECKED, CHECKED_TOKENS = (3, 40, 300), 12  # prompts of the check, and the tokens of each answer
# Nats a token, between two implementations in that dtype: 8B's shape on an H100 has 0.19 to 0.22 (flashmla) and 0.28 (sdpa)
# from eager attention. Another mask, head or row is off by more than one.
BOUND = {"float32": 1e-3, "bfloat16": 0.5}


@dataclass(frozen=True)
class Point:
    """One measurement: all requests by one attention."""

    model: str
    attention: str
    requests: int
    prompts: tuple[int, int]  # the shortest and the longest
    answers: tuple[int, int]
    dtype: str
    transformers: str  # the release
    max_batch_tokens: int | None = None  # of one step; None: as Transformers chooses
    seed: int = 0

    def lengths(self) -> list[tuple[int, int]]:
        """Tokens of each prompt and of its answer, log-uniform."""
        generator = torch.Generator().manual_seed(self.seed)
        draws = torch.rand(self.requests, 2, generator=generator, dtype=torch.float64).tolist()
        return [tuple(map(_log_uniform, (self.prompts, self.answers), row)) for row in draws]


def _log_uniform(between: tuple[int, int], draw: float) -> int:
    low, high = between
    return min(high, int(low * ((high + 1) / low) ** draw))


class Serving:
    """A model that all points share; its attention is switched between them."""

    def __init__(self, name: str, dtype: str, device: str) -> None:
        self.dtype, self.device = dtype, device
        self.model = models.load(name, REFERENCE, getattr(torch, dtype), device).requires_grad_(False)
        self.generation_config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)

    def measure(self, point: Point) -> dict:
        self.model.set_attn_implementation(point.attention)
        error = self._error(point.attention)
        bound = BOUND[self.dtype]
        if not error <= bound:
            reason = f"log probabilities are off by {error:.2g} nats; at most {bound:.2g} is right"
            return {"status": "wrong", "reason": reason, "errors": {"log probability": error}, "bound": bound}
        lengths = point.lengths()
        prompts = [self._tokens(length, seed) for seed, (length, _) in enumerate(lengths)]
        options = CACHE[self.device] | ({"max_batch_tokens": point.max_batch_tokens} if point.max_batch_tokens else {})
        record = self._serve(prompts, [count for _, count in lengths], options)
        answered = [len(output.generated_tokens) for output in record.pop("outputs")]
        if answered != [count for _, count in lengths]:
            short = sum(got != count for got, (_, count) in zip(answered, lengths, strict=True))
            return {
                "status": "wrong",
                "reason": f"{short} of {len(lengths)} answers have another length than asked for",
            }
        read, made = (sum(column) for column in zip(*lengths, strict=True))
        return {
            "status": "ok",
            **record,
            "prompt_tokens": read,
            "answer_tokens": made,
            "answer_tokens_per_second": made / record["seconds"],
            "tokens_per_second": (read + made) / record["seconds"],
            "errors": {"log probability": error},
            "bound": bound,
        }

    def _tokens(self, count: int, seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(1, self.model.config.vocab_size, (count,), generator=generator).tolist()

    def _serve(self, prompts: list[list[int]], counts: list[int], options: dict) -> dict:
        """Runs the requests; their outputs in order, the seconds, and what was chosen for them."""
        # Not every release has every setting.
        known = inspect.signature(ContinuousBatchingConfig).parameters
        settings = {"auto_switch_to_flash": False, **options}
        config = ContinuousBatchingConfig(**{name: value for name, value in settings.items() if name in known})
        hints = WorkloadHints(max(map(len, prompts)), max(counts), len(prompts))
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        manager = self.model.init_continuous_batching(self.generation_config, config, workload_hints=hints)
        try:
            manager.warmup()
            manager.start()
            started = time.perf_counter()
            names = [
                manager.add_request(prompt, max_new_tokens=count, eos_token_id=-1)
                for prompt, count in zip(prompts, counts, strict=True)
            ]
            outputs: dict = {}
            try:
                _collect(manager, outputs, len(names))
            except OutOfTimeError as error:
                known = {"seconds_at_least": time.perf_counter() - started, "answer_tokens": sum(counts)}
                reason = f"{error}: {len(outputs)} of {len(names)} requests were answered"
                raise OutOfTimeError(reason, known) from None
            seconds = time.perf_counter() - started
            chosen = manager.continuous_batching_config
            return {
                "outputs": [outputs[name] for name in names],
                "seconds": seconds,
                "warmup_seconds": started - began,
                "peak_bytes": torch.cuda.max_memory_allocated() if self.device == "cuda" else None,
                "block_tables": bool(chosen.max_blocks_per_request),
                "cuda_graphs": [*chosen.cuda_graph_booleans],
            }
        finally:
            _stop(manager)
            del manager
            free(self.device)

    def _error(self, attention: str) -> float:
        """The largest difference of a log probability, in nats, of tokens that short requests were answered with."""
        prompts = [self._tokens(length, 1000 + length) for length in CHECKED]
        options = {"return_logprobs": True, "num_blocks": 16, "max_batch_tokens": 256, "use_cuda_graph": False}
        try:
            outputs = self._serve(prompts, [CHECKED_TOKENS] * len(prompts), options)["outputs"]
        except OutOfTimeError as error:  # what is known of the short requests says nothing of the timed ones
            raise OutOfTimeError(f"the short requests: {error}") from None
        self.model.set_attn_implementation(REFERENCE)
        errors = [self._difference(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]
        self.model.set_attn_implementation(attention)
        return max(errors)

    @torch.no_grad()
    def _difference(self, prompt: list[int], output) -> float:
        answer = torch.tensor(output.generated_tokens, device=self.device)
        ids = torch.cat([torch.tensor(prompt, device=self.device), answer])[None]
        logits = self.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        expected = logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]
        got = torch.tensor(output.logprobs, device=self.device)
        if got.shape != expected.shape or not torch.isfinite(got).all():
            return math.inf
        return float((got - expected).abs().max())


def _collect(manager, outputs: dict, count: int) -> None:
    """Puts the finished requests into ``outputs`` by name, until there are ``count``."""
    while len(outputs) < count:
        output = manager.get_result(timeout=1)
        if output is None and not manager.is_running():
            raise RuntimeError("the thread that generates ended before the last request did")
        if output is not None and output.is_finished():
            if output.error is not None:
                raise RuntimeError(output.error)
            outputs[output.request_id] = output


def _stop(manager) -> None:
    """Ends the manager's thread, also in the middle of its requests. Ends the program if the thread does not end."""
    if manager.is_running():
        hard = {"hard_stop": True} if "hard_stop" in inspect.signature(manager.stop).parameters else {}
        manager.stop(block=True, timeout=30, **hard)
        if manager.is_running():  # it would run beside the next point
            raise SystemExit("bench_serving: the thread that generates goes on 30 s after it was told to stop")
    if hasattr(manager, "destroy"):
        manager.destroy()


def start(args: argparse.Namespace):
    return Serving(args.model, args.dtype, args.device).measure


def describe(record: dict) -> str:
    head = f"{record['attention']:<21}{record['requests']:>4} requests"
    if record["status"] != "ok":
        return f"{head} {record['status'].replace('_', ' ')}: {record['reason']}"
    memory = "" if record["peak_bytes"] is None else f", {record['peak_bytes'] / GIB:.1f} GiB"
    return (
        f"{head} {record['answer_tokens_per_second']:8,.1f} tokens/s ({record['tokens_per_second']:,.0f} with the prompts) "
        f"in {record['seconds']:.1f} s{memory}, block tables {record['block_tables']}, graphs {record['cuda_graphs']}, "
        f"{record['warmup_seconds']:.1f} s before, error {record['errors']['log probability']:.1e}"
    )


PROGRAM = Program("bench_serving", "serving", start, describe, inference_results.section)


def main(argv: list[str] | None = None) -> None:
    parser = point_runs.parser_of(__doc__, PROGRAM.kind)
    parser.add_argument("--requests", type=at_least(1), help="default: 256 on a GPU")
    parser.add_argument("--attentions", nargs="+", default=list(ATTENTIONS), metavar="NAME")
    parser.add_argument(
        "--max_batch_tokens", type=at_least(1), metavar="TOKENS",
        help="read in one step; eager attention holds scores of all of them with every key in the cache",
    )  # fmt: skip
    parser.set_defaults(time_limit=400)
    args = parser.parse_args(argv)
    point_runs.set_defaults(args)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    count = args.requests or REQUESTS[args.device]
    sizes = (count, PROMPTS[args.device], ANSWERS[args.device])
    settings = (*sizes, args.dtype, transformers.__version__, args.max_batch_tokens)
    points = [Point(args.model, name, *settings) for name in args.attentions]
    point_runs.run(PROGRAM, points, args)


if __name__ == "__main__":
    main()
