"""The points of bench_distributed.py, in their order, each short enough for its time limit.

A step whose predicted time (distributed_predictions.py) does not fit is cut to fewer layers, which the table names. The
search for the longest step that a peer can take has one point for each trial: it goes on where the file ends.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass

from flashmla_hf.host_memory import GIB
from flashmla_hf.training import engines

GROUPS = ("same", "million", "long", "full", "scaling", "peers", "longest", "attention")
PACKS_PER_STEP = 8  # of "same", on any number of GPUs
SHORT, SCALED, MILLION = 8192, 131072, 2**20  # tokens of a row
WINDOW = 4096  # tokens that a query sees
LEAN = 52.0  # GiB a GPU: the published step's 56 GB
STEPS, TINY_STEPS = 20, 3
TINY = {"dtype": "float32", "device": "cpu", "memory_gib": None, "layers": None}
TINY_MODELS = {"qwen3-8b": "tiny-qwen3", "sinks-1b": "tiny-sinks"}  # of the others: tiny-heads
TINY_SHORTER, TINY_LEAST, TINY_WINDOW = 1024, 64, 16  # times; tokens
STARTING = 90.0  # seconds of a point before its steps: processes, weights, a short step
MARGIN = 1.2  # times the predicted seconds
MOST_TRIALS, PRECISE = 8, 0.1  # of a search: trials, and the share of the length to which it is known
RESULTS = ("ok", "out_of_memory", "timeout")  # of a trial: a length that fits, or one that does not


@dataclass(frozen=True)
class Point:
    """What is measured. ``context`` is the tokens of a row, cut into ``documents``."""

    group: str
    kind: str
    engine: str
    gpus: int
    model: str
    context: int
    documents: int = 1
    attention: str = "flashmla"  # or sdpa: torch's choice
    use_peft: bool = True
    is_patched: bool = True  # all patches; otherwise what people do today: Transformers' checkpointing, and Liger
    liger: bool = False
    layers: int | None = None  # of the model; None: its own number
    steps: int = 1
    dtype: str = "bfloat16"
    device: str = "cuda"
    memory_gib: float | None = 78.0  # of each GPU, that torch may use
    window: int | None = None  # tokens that a query sees; None: the model's own

    @property
    def sp(self) -> int:
        """The processes that share a sequence."""
        return self.gpus if self.engine in ("ulysses", "ring") else 1

    @property
    def groups(self) -> int:
        """The groups of processes that have rows of their own."""
        return self.gpus // self.sp

    def variables(self) -> dict[str, str]:
        """What ``accelerate launch`` would set."""
        if self.engine in ("one", "ddp") or self.kind == "attention":
            return {}
        # Each process makes the weights itself.
        return engines.FSDP2_VARIABLES | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}


def points_of(args: argparse.Namespace) -> list[Point]:
    """Group by group, in the order of ``args.only``. The searches of "longest" add theirs: see :func:`following`."""
    found = {
        "same": _same, "million": _million, "long": _long, "full": _full, "scaling": _scaling, "peers": _peers,
        "longest": lambda args: [], "attention": _attention,
    }  # fmt: skip
    points = [_point(args, group, *one) for group in args.only for one in found[group](args)]
    points = list(dict.fromkeys(_equally_deep(points)))
    if args.points is not None:
        points = [points[number] for number in args.points]
    return points[: args.limit]


Given = tuple[str, str, int, dict]  # kind, engine, GPUs and other fields


def _peer(args: argparse.Namespace) -> dict:
    return {"model": "llama-8b", "is_patched": False, "liger": not args.tiny, "attention": "sdpa"}


def _same(args: argparse.Namespace) -> list[Given]:
    steps = TINY_STEPS if args.tiny else STEPS
    small = {"model": "llama-1b", "use_peft": False, "context": SHORT}
    packed = {**small, "documents": 4, "steps": steps}
    windowed, sinks = {**packed, "window": 1024}, {**packed, "model": "sinks-1b"}

    def sharded(engines: tuple[str, ...], given: dict) -> list[Given]:
        """FSDP2 has weights in bf16, and DDP runs under autocast: each is compared with one GPU that does the same."""
        return [("same", "fsdp2", 1, given), *(("same", engine, args.gpus, given) for engine in engines)]

    return [
        ("same", "one", 1, packed),
        ("same", "ddp", args.gpus, packed),
        *sharded(("ulysses", "fsdp2"), packed),
        *sharded(("ring",), {**small, "steps": steps}),
        *sharded(("ulysses",), windowed),
        *sharded(("ulysses",), sinks),
        # A small model: float32 runs on no Hopper kernel, and every process holds the whole, too.
        *(
            ("gradient", engine, args.gpus, {**small, "model": "small-heads", "documents": 4, "dtype": "float32"})
            for engine in ("ulysses", "fsdp2", "ddp")
        ),
    ]


def _million(args: argparse.Namespace) -> list[Given]:
    """1,048,576 tokens a step with all weights, and the losses of fewer GPUs at a length that both hold."""
    if args.gpus < 8 and not args.tiny:
        return []
    whole = {"use_peft": False, "context": MILLION, "memory_gib": LEAN}
    shorter = {"model": "llama-8b", "use_peft": False, "context": SCALED, "steps": TINY_STEPS if args.tiny else 8}
    steps = [
        ("train", engine, args.gpus, {**whole, "model": model})
        for model in ("llama-8b", "qwen3-8b")
        for engine in ("ulysses", "ring")
    ]
    held = [  # two GPUs have one as their half
        ("train", engine, gpus, shorter)
        for engine, gpus in (
            ("ulysses" if args.gpus > 3 else "one", args.gpus // 2),
            ("ulysses", args.gpus),
            ("ring", args.gpus),
        )
    ]
    published = (
        "train",
        "ring",
        args.gpus,
        {**_peer(args), "model": "qwen3-8b", "use_peft": False, "context": MILLION},
    )
    return [steps[0], *held, *steps[1:], published]


def _long(args: argparse.Namespace) -> list[Given]:
    """LoRA: dense, by our ring, packed and with a window."""

    def step(engine: str, context: int, **given) -> Given:
        return "train", engine, args.gpus, {"model": "llama-8b", "context": context, **given}

    points = [
        step("ulysses", SCALED * args.gpus),
        step("ring", SCALED * args.gpus),
        step("ulysses", 2 * SCALED * args.gpus),
        step("ulysses", SCALED * args.gpus, documents=8 * args.gpus),
        step("ulysses", SCALED * args.gpus, window=WINDOW),
    ]
    if args.gpus >= 8 or args.tiny:
        points.append(step("ulysses", 4 * SCALED * args.gpus))
    return points


def _full(args: argparse.Namespace) -> list[Given]:
    given = {"model": "llama-8b", "use_peft": False}
    return [("train", "ulysses", args.gpus, {**given, "context": each * args.gpus}) for each in (SCALED // 2, SCALED)]


def _scaling(args: argparse.Namespace) -> list[Given]:
    """On all GPUs, on half of them, and so on to one."""
    gpus, given = args.gpus, {"model": "llama-8b", "context": SCALED, "steps": 2}
    numbers = [gpus >> i for i in range(gpus.bit_length())] if gpus & (gpus - 1) == 0 else [gpus, 1]
    return [("train", "ulysses" if number > 1 else "one", number, given) for number in numbers]


def _peers(args: argparse.Namespace) -> list[Given]:
    given = {"context": SCALED, "steps": 2}
    theirs = [
        ("train", engine, args.gpus, {**_peer(args), **given, "use_peft": use_peft})
        for use_peft in (True, False)
        for engine in ("ring", "ulysses")
    ]
    return [*theirs, ("train", "ulysses", args.gpus, {**given, "model": "llama-8b", "use_peft": False})]


def _attention(args: argparse.Namespace) -> list[Given]:
    given = {"model": "llama-8b", "context": SCALED // 2 * args.gpus, "steps": 3}
    return [
        ("attention", engine, gpus, {**given, "documents": documents})
        for documents in (4 * args.gpus, 1)
        for engine, gpus in (("ulysses", args.gpus), ("one", 1))
    ]


def _point(args: argparse.Namespace, group: str, kind: str, engine: str, gpus: int, given: dict) -> Point:
    given = {"memory_gib": args.gpu_memory, **given}
    if given["memory_gib"] and args.gpu_memory:
        given["memory_gib"] = min(given["memory_gib"], args.gpu_memory)
    if args.tiny:
        given |= TINY | {
            "model": TINY_MODELS.get(given["model"], "tiny-heads"),
            "context": max(TINY_LEAST, given["context"] // TINY_SHORTER),
            "window": TINY_WINDOW if given.get("window") else None,
        }
    elif given["model"] == "small-heads":
        given |= {"model": "llama-1b", "layers": 2}
    elif kind == "train" and group != "longest":
        given = {"layers": args.layers, **given}
    point = Point(group=group, kind=kind, engine=engine, gpus=gpus, **given)
    return point if args.tiny else shortened(point, limit_of(args), args.starting)


# ---------------------------------------------------------------- time


def limit_of(args: argparse.Namespace) -> float:
    """Seconds that a point may take, its start included."""
    return min(args.time_limit, args.time_budget or args.time_limit)


def expected_seconds(point: Point, starting: float = STARTING) -> float:
    """Seconds that a point takes by the prediction, its start included, on the safe side."""
    from distributed_predictions import predict

    if point.device == "cpu":
        return 0.0  # a trial of the program: nothing is predicted of it
    predicted = predict(point) or {}
    return starting + MARGIN * point.steps * predicted.get("seconds", 0.0)


def shortened(point: Point, limit: float, starting: float = STARTING) -> Point:
    """``point`` with as many layers as fit ``limit`` seconds: its own number, if that does."""
    if point.kind != "train" or expected_seconds(point, starting) <= limit:
        return point
    import models

    layers = point.layers or models.config_of(point.model).num_hidden_layers
    while layers > 1 and expected_seconds(dataclasses.replace(point, layers=layers), starting) > limit:
        layers -= 1
    return dataclasses.replace(point, layers=layers)


def _equally_deep(points: list[Point]) -> list[Point]:
    """``points``, with the fewest layers that one of those has that it is compared with: other engines, numbers of GPUs."""
    fewest: dict[tuple, int] = {}

    def key(point: Point) -> tuple:
        names = ("kind", "model", "context", "documents", "use_peft", "steps", "dtype", "memory_gib", "window")
        return tuple(getattr(point, name) for name in names)

    for point in points:
        if point.kind == "train" and point.layers:
            fewest[key(point)] = min(point.layers, fewest.get(key(point), point.layers))
    return [dataclasses.replace(point, layers=fewest.get(key(point), point.layers)) for point in points]


# ---------------------------------------------------------------- the longest steps


def following(args: argparse.Namespace, records: list[dict]) -> Point | None:
    """The next trial of the searches for the longest steps, after the ``records`` of a file; None if all have ended.

    With LoRA and with all weights: what people do today, then ours. Our trials have a window: memory does not ask for what a
    query sees, and a step of the whole depth ends in time. Last, ours without it at each length that a peer ended with.
    """
    from distributed_predictions import longest_by_ledger

    if "longest" not in args.only or args.points is not None:
        return None
    trials = [record for record in records if record["group"] == "longest"]
    if args.limit is not None and len(trials) >= args.limit - len(points_of(args)):
        return None
    ours = {"engine": "ulysses", "is_patched": True, "liger": False, "attention": "flashmla"}
    beside: list[Point] = []
    for use_peft in (True, False):
        for engine, given in (("ring", _peer(args)), ("ulysses", _peer(args)), ("ulysses", None)):
            given = given or {"model": "llama-8b", "window": WINDOW}
            first = _point(
                args, "longest", "train", engine, args.gpus, {**given, "use_peft": use_peft, "context": SCALED}
            )
            if first.is_patched and not args.tiny:
                first = dataclasses.replace(first, context=longest_by_ledger(first))
            mine = [record for record in trials if _is_trial(record, first)]
            point = _next_trial(args, first, mine)
            if point is not None:
                return point
            lengths = [record["context"] for record in mine if record["status"] == "ok"]
            if lengths and not first.is_patched:
                beside.append(dataclasses.replace(first, **ours, context=max(lengths)))
    known = {tuple(record[name] for name in vars(first)) for record in trials if record["status"] != "skipped"}
    return next((point for point in beside if tuple(vars(point).values()) not in known), None)


def _is_trial(record: dict, point: Point) -> bool:
    fields = dataclasses.asdict(point)
    return all(record.get(name) == value for name, value in fields.items() if name != "context")


def _next_trial(args: argparse.Namespace, first: Point, trials: list[dict]) -> Point | None:
    """None after the last one: the length is known to PRECISE, an error is no length, or there have been MOST_TRIALS."""
    from flashmla_hf.training.max_length import next_length

    trials = [record for record in trials if record["status"] != "skipped"]  # by a budget
    if not trials:
        return first
    if len(trials) >= MOST_TRIALS or any(record["status"] not in RESULTS for record in trials):
        return None
    fit = max((record["context"] for record in trials if record["status"] == "ok"), default=0)
    fails = min((record["context"] for record in trials if record["status"] != "ok"), default=None)
    if fails is not None and fails - fit <= max(TINY_LEAST, PRECISE * fit):
        return None
    found = [{"length": r["context"], "status": r["status"], "peak_bytes": r.get("peak_bytes", 0)} for r in trials]
    memory = int((first.memory_gib or 8) * GIB)
    bound = 2 * first.context if args.tiny else longest_in(first, limit_of(args), args.starting)
    context = next_length(found, memory, bound)
    return None if context is None else dataclasses.replace(first, context=context)


def longest_in(point: Point, limit: float, starting: float = STARTING) -> int:
    """The most tokens, those of ``point`` times 2 or 3 halved some times, whose step fits ``limit`` seconds."""
    context = point.context
    while expected_seconds(dataclasses.replace(point, context=2 * context), starting) <= limit:
        context *= 2
    more = dataclasses.replace(point, context=3 * context // 2)
    return more.context if expected_seconds(more, starting) <= limit else context
