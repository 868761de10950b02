"""What the processes of test_engines.py do: runs of finetune on an engine of accelerate."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import gloo_processes
from training_support import losses, options

ENGINES = {
    "": {},
    "fsdp2 offload": {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_OFFLOAD_PARAMS": "true",
    },
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"},
    "fsdp2 whole": {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "FSDP_RESHARD_AFTER_FORWARD": "false",
    },
    "zero2": {
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "ACCELERATE_GRADIENT_CLIPPING": "0.5",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    },
    "zero3": {
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
    },
}  # fmt: skip


def finetune(engine: str, arguments: list[str], folder: Path) -> dict | str:
    """A run of finetune: what it logged, or the sentence that ended it."""
    from flashmla_hf.training import engines, finetune

    engines.LOST_PROCESS_WAIT = engines.SAME_MISTAKE_WAIT = 0.2  # no launcher is there to end who waits
    if engine:
        gloo_processes.engine(**ENGINES[engine])
    if "--sp_size" in arguments:
        gloo_processes.prepare_deepspeed()
    try:
        finetune.main(arguments)
    except SystemExit as end:
        return str(end)
    return {"losses": losses(folder), **json.loads((folder / "all_results.json").read_text())}


def launch(engine: str, model: Path, corpus: Path, folder: Path, resumed_at: int = 0, **given) -> dict | str:
    """A run of finetune in two processes, as the main process tells it; the other must agree.

    ``resumed_at``: the run is cut back to its checkpoint of that step, and another launch continues it, ``resumed_by`` so many
    processes, ``resumed_with`` other options. A step reads as many packs.
    """
    processes, variables = given.pop("processes", 2), given.pop("variables", {})
    resumed_by, resumed_with = given.pop("resumed_by", processes), given.pop("resumed_with", {})
    arguments = options(
        model, corpus, folder, **{"use_cpu": not engine, **({"save_steps": resumed_at} if resumed_at else {}), **given}
    )
    call = (finetune, engine, arguments, folder)
    told = gloo_processes.run(*call, processes=processes, **variables)
    if resumed_at and not isinstance(told[0], str):
        for path in folder.iterdir():
            if path.name != f"checkpoint-{resumed_at}":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        accumulated = given.get("gradient_accumulation_steps", 1) * processes // resumed_by
        others = {"resume_from_checkpoint": "latest", "gradient_accumulation_steps": accumulated} | resumed_with
        again = [*arguments, *(part for name, value in others.items() for part in (f"--{name}", str(value)))]
        told = gloo_processes.run(*call[:2], again, folder, processes=resumed_by, **variables)
    assert all(isinstance(one, str) == isinstance(told[0], str) for one in told), told
    return told[0]


def dying(engine: str, arguments: list[str], folder: Path, when: str) -> dict | str:
    """As :func:`finetune`; process 1 is killed in its third step, or while it writes its second checkpoint, or finds no memory."""
    from flashmla_hf.training import finetune as module

    name, last = {"step": ("run_batches", 3), "checkpoint": ("save_checkpoint", 2), "memory": ("run_batches", 3)}[when]
    original, calls = getattr(module, name), []

    def until_killed(*given):
        calls.append(name)
        if os.environ["RANK"] == "1" and len(calls) == last:
            if when == "memory":
                raise MemoryError
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*given)

    setattr(module, name, until_killed)
    return finetune(engine, arguments, folder)


def ended(times: int, folder: Path) -> int:
    """Ends ``times`` process groups right after collectives, before the DDP that holds them is freed."""
    import torch

    from flashmla_hf.training import engines

    accelerator = SimpleNamespace(torch_device_mesh=None, end_training=torch.distributed.destroy_process_group)
    for i in range(times):
        torch.distributed.init_process_group(
            "gloo", f"file://{folder}/{i}", rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"])
        )
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 64))
        model(torch.randn(2, 64)).sum().backward()
        for _ in range(4):
            torch.distributed.all_reduce(torch.randn(64, 64))
        torch.distributed.barrier()
        engines.end_training(accelerator)
        del model
    return times
