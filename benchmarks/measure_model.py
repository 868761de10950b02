"""One measured point of a model: peak memory and time of a training step or of decoding, in a process of its own.

    python benchmarks/measure_model.py '{"model": "tiny", "attn_implementation": "sdpa", "context": 512}'

Each point has a process of its own. An allocator keeps its memory, so only the first measurement in a process is clean,
and a point that does not fit must not end the others. The other programs call ``in_subprocess``.

Peak memory is the memory that the step adds to the loaded model and its optimizer's states. On a GPU it is the allocator's own
count; on a CPU the largest resident size of the process since just before the step (VmHWM), less the resident size then.

MFU is the model's own floating-point operations (Shape.training_flops: recomputation is not counted) per second,
as a share of the device's rate in the point's dtype by its data sheet.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import models
import torch

import flashmla_hf
from flashmla_hf import host_memory
from flashmla_hf.training import child_process, machine
from flashmla_hf.training.model import keep_adapter_inputs
from flashmla_hf.training.shape import Shape
from flashmla_hf.training.terms import Switches

RESULT_MARK = "MEASURED "


@dataclass(frozen=True)
class Point:
    """One measurement. ``context`` is the tokens of one sequence; decoding continues after them."""

    model: str
    attn_implementation: str
    context: int
    mode: str = "train"  # or "decode"
    batch_size: int = 1
    new_tokens: int = 32  # of decoding
    dtype: str = "float32"
    device: str = "cpu"
    use_peft: bool = True  # LoRA r=16 on every linear layer; otherwise all weights have gradients
    load_in_4bit: bool = False  # the frozen linear layers but the head, by bitsandbytes (nf4, double quantization)
    lora_dtype: str = "float32"  # of the adapter; otherwise "auto", the model's
    has_autocast: bool = True  # for an adapter in float32 beside a model that is not; otherwise as peft alone computes
    gradient_checkpointing: bool = False  # Transformers' own
    patches: tuple[str, ...] = ()  # names in flashmla_hf.PATCHES
    patch_options: tuple[tuple[str, int], ...] = ()  # of flashmla_hf.patch
    liger: bool = False  # the kernels of the package liger-kernel
    sliding_window: int | None = None  # tokens a query sees, for a shape of models.SHAPES; None: the model's own
    optim: str = "none"  # or "adamw_torch": a training step ends with the optimizer's
    warmup: int = 32  # tokens of the step before the measured one
    repeats: int = 1  # timed steps after the first, which is measured for memory; 0: the first is timed, too
    memory_limit: int | None = None  # bytes: on a CPU for the whole process, on a GPU for torch's allocator
    series: str = ""  # the compared setting, as the command line of memory_report.py names it: "flashmla+all"

    def __post_init__(self):
        # JSON has lists, and files from before there were series have none.
        object.__setattr__(self, "patches", tuple(self.patches))
        object.__setattr__(self, "patch_options", tuple((name, value) for name, value in self.patch_options))
        object.__setattr__(self, "series", self.series or self.attn_implementation)

    @property
    def label(self) -> str:
        return f"{self.series} {self.context}"

    @property
    def fills_memory(self) -> bool:
        """Whether patches use all free memory: the peak then says how much there was, not how much a token needs."""
        chosen = {"keep_attention", "offload"} & set(self.patches) - dict(self.patch_options).keys()
        return self.device == "cuda" and bool(chosen)

    def switches(self) -> Switches:
        """The settings of this point that the ledger needs."""
        itemsize = getattr(torch, self.dtype).itemsize
        return Switches(
            attn_implementation=self.attn_implementation,
            patches=frozenset(self.patches),
            liger=self.liger,
            gradient_checkpointing=self.gradient_checkpointing,
            use_peft=self.use_peft,
            weight_bytes=itemsize,
            load_in_4bit=self.load_in_4bit,
            adapter_bytes=4 if self.lora_dtype == "float32" else itemsize,
            casts_adapter_inputs=not self.patches if self.has_autocast else "lora" not in self.patches,
            activation_bytes=itemsize,
            **dict(self.patch_options),
        )


@dataclass
class Measurement:
    """``status`` is ok, out_of_memory, timeout, skipped or error; the numbers are there if it is ok."""

    point: Point
    status: str
    reason: str = ""
    peak_bytes: int | None = None  # above the loaded model
    model_bytes: int | None = None  # the loaded model and optimizer states: allocated on a GPU, resident on a CPU
    seconds: float | None = None  # the fastest step, or time per decoded token
    all_seconds: list[float] | None = None
    tokens_per_second: float | None = None
    peak_allocated_bytes: int | None = None  # in all: model_bytes + peak_bytes
    peak_reserved_bytes: int | None = None  # by the allocator, from the device
    host_pinned_bytes: int | None = None  # the peak of torch's own host allocator
    model_flops: int | None = None  # of a training step
    mfu: float | None = None
    peak_flops: str | None = None  # of the device, and the source of the number
    memory_bytes: int | None = None  # that the device has, or memory_limit
    environment: dict | None = None  # records.describe() of the run that measured it

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)


# ---------------------------------------------------------------- in the parent


def in_subprocess(point: Point, timeout: float) -> Measurement:
    """Measures ``point`` in a fresh Python process; never raises for anything that happens in it."""
    command = [sys.executable, str(Path(__file__).resolve()), json.dumps(dataclasses.asdict(point))]
    outcome = child_process.run(command, RESULT_MARK, timeout)
    if outcome.result is None:
        return Measurement(point, outcome.status, outcome.reason)
    return Measurement(**outcome.result | {"point": point})


# ---------------------------------------------------------------- in the child


class Step:
    """What a point measures: its model, loaded once, for contexts of any length. ``run(ids)`` returns seconds."""

    def __init__(self, point: Point) -> None:
        _limit_memory(point)
        dtype = getattr(torch, point.dtype)
        load = models.load_4bit if point.load_in_4bit else models.load
        self.model = load(point.model, point.attn_implementation, dtype, point.device, point.sliding_window)
        self.vocabulary = self.model.config.get_text_config().vocab_size
        self.run = _train_step(self.model, point) if point.mode == "train" else _decode(self.model, point)
        self.peak_flops = machine.peak_flops(point.device, point.dtype) if point.mode == "train" else None

    def ids(self, point: Point, context: int) -> torch.Tensor:
        """Random tokens [batch, context], the same ones for the same point."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.vocabulary, (point.batch_size, context), generator=generator).to(point.device)


def _limit_memory(point: Point) -> None:
    if point.device == "cpu" and point.memory_limit:
        # An allocation beyond it fails as out of memory, before the machine starts swapping or killing.
        resource.setrlimit(resource.RLIMIT_DATA, (point.memory_limit, point.memory_limit))
    elif point.memory_limit:
        share = point.memory_limit / machine.memory_limit("cuda")
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))


def measure(point: Point, step: Step | None = None) -> Measurement:
    """Measures ``point`` in this process. ``step`` is one that was made for a point of another context, and has run."""
    is_first = step is None
    step = step or Step(point)
    ids, run = step.ids(point, point.context), step.run
    # Touches every weight (files are mapped lazily), makes the optimizer's states, and lets libraries build what they keep
    # (Triton compiles, cuBLAS chooses): a first long step is then timed like any other, but for the host memory that the
    # patch offload pins in it.
    if is_first:
        run(ids[:, : point.warmup])
    gc.collect()
    before = _reset_peak(point.device)
    times = [run(ids)]
    peak = _peak(point.device)
    on_gpu = point.device == "cuda"
    reserved = torch.cuda.max_memory_reserved() if on_gpu else None
    pinned = torch.cuda.host_memory_stats().get("allocated_bytes.peak") if on_gpu else None
    host_memory.return_freed_blocks(False)
    times += [run(ids) for _ in range(point.repeats)]
    timed = times[1:] or times
    # The fastest: whatever else the machine does can only add to a step.
    seconds = min(timed)
    tokens = point.batch_size * (point.context if point.mode == "train" else 1)
    flops, mfu, peak_flops = None, None, None
    if point.mode == "train":
        rate, source = step.peak_flops
        shape = Shape.of(step.model.config)
        flops = shape.training_flops([point.context] * point.batch_size, point.use_peft)
        mfu, peak_flops = flops / seconds / rate, f"{rate / 1e12:.4g} TFLOP/s, {source}"
    return Measurement(
        point,
        "ok",
        peak_bytes=peak - before,
        model_bytes=before,
        seconds=seconds,
        all_seconds=timed,
        tokens_per_second=tokens / seconds,
        peak_allocated_bytes=peak,
        peak_reserved_bytes=reserved,
        host_pinned_bytes=pinned,
        model_flops=flops,
        mfu=mfu,
        peak_flops=peak_flops,
        memory_bytes=min(machine.memory_limit(point.device), point.memory_limit or sys.maxsize),
    )


def _train_step(model: torch.nn.Module, point: Point):
    """A function of ids [batch, context] that runs forward, backward and the optimizer if there is one; returns seconds."""
    model.config.use_cache = False
    if point.liger:
        _apply_liger(model)
    if point.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if point.use_peft:
        from peft import LoraConfig, get_peft_model

        # The adapter in float32, computing in the model's dtype by autocast, unless told otherwise.
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora, autocast_adapter_dtype=point.lora_dtype == "float32")
    if point.patches:
        flashmla_hf.patch(model, point.patches, **dict(point.patch_options))
        if point.use_peft and point.has_autocast:
            # As flashmla finetune does; a series without patches is peft's and Transformers' own.
            keep_adapter_inputs(model)
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = None
    if point.optim == "adamw_torch":
        # Fused: without temporaries of the weights' size.
        optimizer = torch.optim.AdamW(trainable, lr=1e-5, fused=point.device == "cuda")
    is_mixed = point.dtype != "float32" and any(parameter.dtype == torch.float32 for parameter in trainable)
    is_autocast = is_mixed and point.has_autocast

    def run(ids: torch.Tensor) -> float:
        started = _now(point.device)
        with torch.autocast(point.device, dtype=getattr(torch, point.dtype), enabled=is_autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        return _now(point.device) - started

    return run


def _apply_liger(model: torch.nn.Module) -> None:
    """All of Liger's kernels for this kind of model: fused loss, rotary embedding, norms, SwiGLU."""
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance
    except ImportError as error:
        raise SystemExit(
            f"a series with liger needs the package liger-kernel ({error}): pip install liger-kernel"
        ) from None
    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise SystemExit(f"liger-kernel has nothing for model type {model.config.model_type!r}: leave that series out")
    _apply_liger_kernel_to_instance(model)


def _decode(model: torch.nn.Module, point: Point):
    """A function of ids [batch, context] that continues them greedily and returns the seconds per new token."""

    def generate(ids: torch.Tensor, count: int) -> float:
        started = _now(point.device)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        return _now(point.device) - started

    def run(ids: torch.Tensor) -> float:
        # The first token pays for reading the prompt: time is the difference of two runs.
        return max(generate(ids, point.new_tokens + 1) - generate(ids, 1), 1e-9) / point.new_tokens

    return run


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _reset_peak(device: str) -> int:
    """Starts a new peak; returns the memory in use now."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    host_memory.return_freed_blocks(True)
    host_memory.reset_peak()  # if it is not permitted, the peak includes loading, which a large step exceeds
    return host_memory.resident_bytes()


def _peak(device: str) -> int:
    return machine.peak_memory(torch.device(device))


def out_of_memory_reason(error: BaseException) -> str:
    """Where memory ran out, for a table."""
    return "no room on the host" if machine.NO_HOST_MEMORY in str(error) else "the allocation failed"


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        fields = ", ".join(f"{f.name}" for f in dataclasses.fields(Point))
        print(
            f"{__doc__}\nThe argument is JSON with these fields (model, attn_implementation, context needed): {fields}"
        )
        sys.exit(0 if len(sys.argv) == 2 else 2)
    try:
        point = Point(**json.loads(sys.argv[1]))
    except (TypeError, json.JSONDecodeError) as error:
        sys.exit(f"measure_model: {error}; --help says what is expected")
    try:
        result = measure(point)
    except (RuntimeError, MemoryError) as error:
        if not machine.is_out_of_memory(error):
            raise
        result = Measurement(point, "out_of_memory", out_of_memory_reason(error))
    print(RESULT_MARK + json.dumps(result.as_dict()), flush=True)


if __name__ == "__main__":
    main()
