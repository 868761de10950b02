"""One measured point on several GPUs, in each of its processes: bench_distributed.py starts them by torchrun.

    torchrun --nproc_per_node 2 benchmarks/measure_distributed.py '{"kind": "train", "engine": "ulysses", "gpus": 2, ...}'

Models have random weights, made where they are trained, and read real text: the pages of docs/, a byte a token. A point is run
by what ``flashmla finetune`` runs: its engines, packs, steps and patches. The ring alone is accelerate's ``cp_size``, as its
documentation has it, over torch's own flash attention or ours.

kind        same       the losses of some steps, to be compared with those of one GPU
            gradient   the gradients of one step in float32, compared with those of the whole model in each process
            train      seconds, peak and pinned memory of long steps, of the slowest and fullest process
            attention  forward and backward of one layer's attention alone, the exchange between GPUs included
engine      one, ddp, fsdp2, ulysses (on FSDP2, all GPUs share each sequence), ring (on FSDP2, likewise)
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import fcntl
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import models
import numpy as np
import records
import shapes
import torch
from distributed_points import PACKS_PER_STEP, Point

import flashmla_hf
from flashmla_hf.host_memory import GIB
from flashmla_hf.training import engines, machine, sequence_parallel
from flashmla_hf.training.arguments import ModelArguments, TrainingArguments, first_line, parse_arguments
from flashmla_hf.training.model import add_adapter, keep_adapter_inputs, make_optimizer
from flashmla_hf.training.packing import NO_LOSS, Collator, Pack
from flashmla_hf.training.shape import Shape
from flashmla_hf.training.step import run_batches, step_batches

MARK = "DISTRIBUTED "
TURN = "FLASHMLA_TURN"  # in the environment: a file that those hold who measure
TURN_SECONDS = "FLASHMLA_TURN_SECONDS"  # no turn is longer
WARMUP = 4096  # tokens of the step before the timed ones


class Run:
    """A model, prepared for a point, and its steps."""

    def __init__(self, point: Point) -> None:
        self.point = point
        self.model_args, self.args = _arguments(point)
        self.accelerator = _ring_accelerator(point) if point.engine == "ring" else _accelerator(self)
        self.device = self.accelerator.device
        if self.device.type == "cuda" and point.memory_gib:
            share = point.memory_gib * GIB / torch.cuda.get_device_properties(self.device).total_memory
            # One process alone has "cuda", without a number.
            torch.cuda.set_per_process_memory_fraction(min(1.0, share), self.device.index or 0)
        if point.engine == "ring":
            self.args.sp_size = point.gpus  # from here on: all processes have the same rows
        self.whole = build(point, self.device, self.model_args)
        self.expected = _whole_gradients(self) if point.kind == "gradient" else {}  # before attention is divided
        if point.engine == "ulysses":
            sequence_parallel.divide_attention(self.whole, self.args)
        trainable = [parameter for parameter in self.whole.parameters() if parameter.requires_grad]
        optimizer = make_optimizer(trainable, self.args)
        self.model, self.optimizer = self.accelerator.prepare(self.whole, optimizer)
        self.model.train()
        self.share = sequence_parallel.Share.of(self.accelerator, self.args)
        self.collate = Collator(point.attention, self.share.cut if point.engine != "ring" else None)

    def step(self, packs: list[Pack], number: int = 0) -> float:
        """One optimizer step on this step's share of ``packs``; its loss, of all processes."""
        batches, loss_tokens, _ = step_batches(packs, number, self.accelerator, self.args)
        if self.point.liger and hasattr(head := self.whole.get_output_embeddings(), "unshard"):
            # Liger's loss reads the head's weight and never calls the head, which accelerate makes a unit of its own
            # if there is an adapter: without this the peer ends in an error.
            head.unshard()
        if self.point.engine == "ring":
            loss = self._ring_batches(batches, loss_tokens)
        else:
            loss = run_batches(self.model, batches, loss_tokens, self.collate, self.accelerator)
        if self.point.kind == "gradient":
            return float(self.accelerator.reduce(loss, "sum"))
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(self.accelerator.reduce(loss, "sum"))

    def _ring_batches(self, batches: list[list[Pack]], loss_tokens: int) -> torch.Tensor:
        total = torch.zeros((), device=self.device)
        for i, batch in enumerate(batches):
            row = self.collate(batch, self.device)
            row["shift_labels"] = torch.nn.functional.pad(row["labels"][:, 1:], (0, 1), value=NO_LOSS)
            names = ("input_ids", "position_ids", "labels", "shift_labels")
            buffers = [row[name].contiguous() for name in names]
            divided = self.accelerator.maybe_context_parallel(buffers, [1] * len(names), set(buffers))
            with divided, _flash_in_ring(self.point), engines.accumulating(
                self.accelerator, self.model, i == len(batches) - 1
            ):  # fmt: skip
                inputs = dict(zip(names, buffers, strict=True)) | {"use_cache": False}
                loss = self.model(**inputs, num_items_in_batch=loss_tokens).loss
                total += loss.detach()
                engines.backward(self.accelerator, loss)
        return total


# ---------------------------------------------------------------- what is built


def _arguments(point: Point) -> tuple[ModelArguments, TrainingArguments]:
    """The options that ``flashmla finetune`` would have."""
    is_on_cpu = point.device == "cpu" and not point.variables()
    accumulated = PACKS_PER_STEP // point.groups if point.kind == "same" else 1
    # Fresh weights without a warm-up: at 1e-4 the loss rises in some steps, at 2e-5 it falls from 12 to 5 in six, and rounding
    # grows a hundredfold in twenty.
    learning_rate = 2e-6 if point.kind == "same" else 1e-4
    given: dict[str, Any] = {
        "model_name_or_path": "none", "train_file": "none", "output_dir": "none", "report_to": "none",
        "use_peft": point.use_peft, "use_cpu": is_on_cpu, "gradient_accumulation_steps": accumulated,
        # All weights are trained in their own dtype, as AdamW's moments are.
        "bf16": point.dtype == "bfloat16" and (point.use_peft or point.kind == "same"), "dtype": point.dtype,
        "learning_rate": learning_rate, "max_grad_norm": 1.0, "sp_size": point.sp if point.engine == "ulysses" else 1,
        "patches": "all" if point.is_patched else "none",
    }  # fmt: skip
    model_args, _, args = parse_arguments([part for name, value in given.items() for part in (f"--{name}", str(value))])
    return model_args, args


def build(point: Point, device: torch.device, model_args: ModelArguments) -> torch.nn.Module:
    """Random weights, the same in each process, with an adapter and patches as ``flashmla finetune`` would add them."""
    config = copy.deepcopy(models.config_of(point.model, point.window))
    if point.layers:
        config.num_hidden_layers = point.layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: point.layers]
    name = "sdpa" if point.engine == "ring" else point.attention
    dtype = torch.float32 if point.kind == "same" else getattr(torch, point.dtype)
    torch.manual_seed(0)
    with torch.device(device):  # drawn on a CPU, 8B weights take minutes
        model = models.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=name)
    if point.liger:
        from measure_model import _apply_liger

        _apply_liger(model)
    if not point.is_patched:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if point.use_peft:
        torch.manual_seed(1)
        model = add_adapter(model, model_args, None)
        if point.dtype == "bfloat16" and point.is_patched:
            keep_adapter_inputs(model)
    if point.is_patched:
        # The experts of gpt-oss return a tuple, which tiles do not take.
        flashmla_hf.patch(model, exclude=["mlp"] if config.model_type == "gpt_oss" else [])
    return model.train()


def _accelerator(run: Run):
    if run.point.device == "cpu" and run.point.variables():
        _let_a_cpu_shard(run.point)
    return engines.make_accelerator(run.model_args, run.args)


_kept: list[Any] = []  # without its handle the operators of torch come back


def _ring_accelerator(point: Point):
    from accelerate import Accelerator, ParallelismConfig
    from accelerate.utils import TorchContextParallelConfig

    if point.device == "cpu":
        _let_a_cpu_shard(point)
    handler = TorchContextParallelConfig(cp_comm_strategy="alltoall")
    accelerator = Accelerator(
        mixed_precision="bf16" if point.dtype == "bfloat16" and (point.use_peft or point.kind == "same") else "no",
        parallelism_config=ParallelismConfig(cp_size=point.gpus, cp_handler=handler),
    )
    if point.attention == "flashmla" or point.device == "cpu":  # a CPU has no other
        from flashmla_hf import torch_flash

        _kept.append(torch_flash.install(point.device.upper()))
    if point.attention == "flashmla":
        policy = accelerator.state.fsdp_plugin.mixed_precision_policy
        if policy is not None:  # as flashmla finetune: sums of gradients in float32
            policy = dataclasses.replace(policy, output_dtype=None, reduce_dtype=torch.float32)
            accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    return accelerator


@contextlib.contextmanager
def _flash_in_ring(point: Point) -> Iterator[None]:
    """SDPA chooses our kernels if they are asked for; otherwise what it chooses by itself, which is cuDNN on a Hopper GPU."""
    if point.device == "cpu":
        import ring_cases  # of tests/: on a CPU SDPA chooses an operator that torch's ring does not know

        with ring_cases.sdpa_chooses_flash():
            yield
    elif point.attention == "flashmla":
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            yield
    else:
        yield


def _let_a_cpu_shard(point: Point) -> None:
    """accelerate shards on GPUs alone. For trials of this program on a CPU, tests/ has what makes it take gloo."""
    sys.path.append(str(records.REPOSITORY / "tests"))
    import gloo_processes

    gloo_processes.engine(**point.variables())
    if point.engine == "ulysses":
        gloo_processes.prepare_deepspeed()


def packs(point: Point, count: int, context: int | None = None) -> list[Pack]:
    """``count`` rows of ``context`` tokens of text, each cut into documents: of one length if attention alone is measured."""
    context = context or point.context
    text = b"".join(path.read_bytes() for path in sorted((records.REPOSITORY / "docs").glob("*.md")))
    text = text * -(-count * context // len(text))
    ids = np.frombuffer(text[: count * context], np.uint8).astype(np.int32).reshape(count, context)
    bounds = np.cumsum(shapes.log_uniform(point.documents, context, 1 if point.kind == "attention" else 8))[:-1]
    return [np.split(row, bounds) for row in ids]


# ---------------------------------------------------------------- what is measured


def measure(point: Point) -> dict:
    """The point's numbers, the same in every process."""
    return {"same": _same, "gradient": _gradient, "train": _train, "attention": _attention}[point.kind](point)


def _same(point: Point) -> dict:
    run = Run(point)
    rows = packs(point, PACKS_PER_STEP * point.steps)
    losses = [run.step(rows, number) for number in range(point.steps)]
    return _of_all(run) | {"losses": losses}


def _whole_gradients(run: Run) -> dict[str, torch.Tensor]:
    """Of the whole model, without patches, over the rows of all processes."""
    point = run.point
    model = build(dataclasses.replace(point, engine="one", is_patched=False), run.device, run.model_args)
    collate, rows = Collator(point.attention), packs(point, point.groups)
    items = sum(len(piece) - 1 for row in rows for piece in row)
    for row in rows:
        model(**collate([row], run.device), num_items_in_batch=items).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _gradient(point: Point) -> dict:
    """The largest difference of a parameter's gradient, as a share of its norm."""
    run = Run(point)
    rows, expected = packs(point, point.groups), run.expected
    run.step(rows)
    worst = ("", 0.0)
    for name, parameter in run.model.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("module.")
            got = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
            want = expected[name]
            error = float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-12))
            worst = max(worst, (name, error), key=lambda one: one[1])
    return _of_all(run) | {"worst_gradient": worst[0], "gradient_error": worst[1], "gradients": len(expected)}


def _train(point: Point) -> dict:
    run = Run(point)
    run.step(packs(point, point.groups, min(WARMUP, point.context)))
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    rows, seconds, losses = packs(point, point.groups), [], []
    for _ in range(point.steps):
        started = _now(point.device)
        losses.append(run.step(rows))
        seconds.append(_now(point.device) - started)
    found = _of_all(run, min(seconds))
    slowest = found["seconds"]
    lengths = [len(piece) for row in rows for piece in row]
    config = getattr(run.whole, "config", None)
    flops = Shape.of(config).training_flops(lengths, point.use_peft)
    rate, source = machine.peak_flops(point.device, point.dtype)
    return found | {
        "losses": losses,
        "all_seconds": seconds,
        "tokens_per_second": sum(lengths) / slowest,
        "mfu": flops / point.gpus / slowest / rate,
        "peak_flops": f"{rate / 1e12:.4g} TFLOP/s, {source}",
    }


def _attention(point: Point) -> dict:
    """One layer's attention as Transformers calls it, with DeepSpeed's Ulysses around it if processes share the sequence."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if point.device == "cpu" and point.sp > 1:
        _let_a_cpu_shard(point)
    model_args, args = _arguments(point)
    args.sp_size = point.sp
    is_on_cpu = point.device == "cpu"
    if point.sp > 1:
        torch.distributed.init_process_group("gloo" if is_on_cpu else "nccl")
    rank = machine.process_index()
    device = torch.device("cpu" if is_on_cpu else f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    if not is_on_cpu:
        torch.cuda.set_device(device)
    model = build(dataclasses.replace(point, layers=1, use_peft=False, is_patched=False), device, model_args)
    sequence_parallel.divide_attention(model, args)
    share = sequence_parallel.Share(0, 1, rank, point.sp)
    row = Collator(point.attention, share.cut)(packs(point, 1), device)
    layer = model.model.layers[0].self_attn
    config, tokens = model.config, row["input_ids"].shape[1]
    generator = torch.Generator(device).manual_seed(rank)
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    q, k, v = (
        torch.randn(1, n, tokens, layer.head_dim, device=device, dtype=getattr(torch, point.dtype), generator=generator)
        .requires_grad_()
        for n in heads
    )  # fmt: skip
    options = {name: value for name, value in row.items() if name.startswith(("cu_seq", "max_length"))}
    attend = ALL_ATTENTION_FUNCTIONS[config._attn_implementation]
    dout = torch.randn(1, tokens, heads[0] * layer.head_dim, device=device, dtype=q.dtype, generator=generator)

    def call() -> None:
        out, _ = attend(
            layer, q, k, v, None, scaling=layer.scaling, dropout=0.0, position_ids=row["position_ids"], **options
        )
        torch.autograd.grad(out, (q, k, v), dout.view(out.shape))  # Ulysses joins the heads

    seconds = _fastest(call, point, device)
    shape = dataclasses.replace(Shape.of(config), layers=1)
    lengths = [len(piece) for piece in packs(point, 1)[0]]
    flops = 14 * shape.head_dim * shape.heads_q * sum(map(shape.attended_pairs, lengths))  # forward 4, backward 10
    return {"seconds": seconds, "flops_per_second": flops / point.gpus / seconds}


def _fastest(call: Callable[[], None], point: Point, device: torch.device) -> float:
    """Seconds of the fastest of ``steps`` calls, of the slowest process."""
    call()
    found = []
    for _ in range(point.steps):
        started = _now(point.device)
        call()
        found.append(_now(point.device) - started)
    value = torch.tensor(min(found), dtype=torch.float64, device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
    return float(value)


def _of_all(run: Run, seconds: float = 0.0) -> dict:
    """Peak memory and seconds of the fullest and the slowest process, and the host memory that all have pinned."""
    peak = machine.peak_memory(run.device)
    on_gpu = run.device.type == "cuda"
    pinned = torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0) if on_gpu else 0
    reserved = torch.cuda.max_memory_reserved() if on_gpu else 0
    most = torch.tensor([peak, seconds, reserved], dtype=torch.float64, device=run.device)
    total = torch.tensor(pinned, dtype=torch.float64, device=run.device)
    if run.accelerator.num_processes > 1:
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        torch.distributed.all_reduce(total)
    numbers = {"peak_bytes": int(most[0]), "reserved_bytes": int(most[2]), "pinned_bytes": int(total)}
    return numbers | ({"seconds": float(most[1])} if seconds else {})


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _take_turn() -> None:
    """Holds the file of TURN until this process ends, after who holds it now. The other processes wait for the first one."""
    if (path := os.environ.get(TURN)) and machine.process_index() == 0:
        file = open(path, "a")  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX)
        _kept.append(file)
        signal.alarm(int(os.environ[TURN_SECONDS]))  # ends this process, and with it all


def main() -> None:
    point = Point(**json.loads(sys.argv[1]))
    try:
        _take_turn()
        found = {"status": "ok", **measure(point)}
    except Exception as error:  # recorded, whatever it is: a peer's refusal can be any
        traceback.print_exc()
        found = {"status": "error", "reason": f"{type(error).__name__}: {first_line(error)}"[:300]}
        if machine.is_out_of_memory(error):
            found = {"status": "out_of_memory", "reason": "the allocation failed"}
        # At once, because the other processes wait for this one; the launcher ends them.
        print(MARK + json.dumps(found), flush=True)
        os._exit(1)
    if machine.process_index() == 0:
        print(MARK + json.dumps(found), flush=True)
    sys.stdout.flush()
    os._exit(0)  # a process group that is left to the interpreter's end may wait for the others


if __name__ == "__main__":
    main()
