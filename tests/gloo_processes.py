"""Functions of test files in several processes that talk over gloo, on a CPU, within a bounded time.

Processes are forked from one server that has imported the heavy packages, so that a test pays for what it does. accelerate neither shards nor runs DeepSpeed on a CPU: :func:`engine` makes it take gloo for the
backend of a GPU whose device is the CPU.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None and importlib.util.find_spec("einops") is not None
PRELOADED = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "flashmla_hf.training.finetune",
    "deepspeed",
    "torch.distributed.fsdp",
)
LIMIT = 100.0  # seconds that a call may take


class ProcessError(AssertionError):
    """A process raised, ended, or took too long: its arguments are every such process's stacks, and the others' results."""


def run(function: Callable, *arguments: Any, processes: int = 2, limit: float = LIMIT, **environment: str) -> list[Any]:
    """What ``function(*arguments)`` returns in each of the processes, by rank. ``function`` is of a module, and its result pickles.

    Every process has RANK, WORLD_SIZE, ... as torchrun sets them, and ``environment``.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed asks when it is imported, by the server
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        mine, theirs = context.Pipe(duplex=False)
        variables = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", **environment,
        }  # fmt: skip
        said = tempfile.NamedTemporaryFile("r")  # noqa: SIM115, open until its process has ended
        process = context.Process(
            target=_call, args=(theirs, said.name, variables, sys.path, function, arguments), daemon=True
        )
        process.start()
        theirs.close()
        started.append((process, mine, said))
    deadline = time.monotonic() + limit
    results: list[Any] = []
    errors = []
    for rank, (process, pipe, said) in enumerate(started):
        # After a first error the others wait for a process that is gone.
        left = 2.0 if errors else max(0.0, deadline - time.monotonic())
        try:
            error, result = pipe.recv() if pipe.poll(left) else (f"no answer after {limit} s", None)
        except EOFError:
            error, result = "ended without an answer", None
        if error is not None and process.is_alive():
            os.kill(process.pid, signal.SIGUSR1)  # it writes where it stands: see _call
            time.sleep(0.5)
        results.append(result)
        if error is not None:
            errors.append(f"rank {rank}: {error}\n{said.read()[-4000:]}")
    for process, _, said in started:
        process.join(0 if errors else 10)
        if process.is_alive():
            process.kill()
        said.close()
    if errors:
        raise ProcessError("\n".join(errors), results)
    return results


def _call(pipe, said_at: str, variables: dict[str, str], path: list[str], function: Callable, arguments: tuple) -> None:
    os.environ.update(variables)
    sys.path[:] = path
    warnings.simplefilter("ignore")
    said = os.open(said_at, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(said, stream)
    faulthandler.register(signal.SIGUSR1, file=said, all_threads=True)
    import torch

    torch.set_num_threads(1)
    try:
        pipe.send((None, function(*arguments)))
    except BaseException as error:
        told = str(error) if isinstance(error, SystemExit) else traceback.format_exc()[-2000:]
        pipe.send((f"{type(error).__name__}: {told}", None))
    pipe.close()
    # Not by the interpreter's end: a process group whose other side is gone may block it.
    sys.stdout.flush()
    os._exit(0)


# ---- engines of accelerate on a CPU ----------------------------------------------------------------------------------


def engine(**variables: str) -> None:
    """Lets accelerate run FSDP and DeepSpeed on this process's CPU, over gloo; ``variables`` are what ``accelerate launch`` sets."""
    from accelerate import state
    from accelerate.utils import DistributedType

    for name, value in {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu", **variables}.items():
        os.environ.setdefault(name, value)  # what a test gives a call of run() wins
    state.PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    if variables.get("FSDP_OFFLOAD_PARAMS") == "true":
        from torch.distributed.fsdp import CPUOffloadPolicy

        CPUOffloadPolicy.__init__.__defaults__ = (False,)  # without a GPU no memory can be pinned
    if variables.get("ACCELERATE_USE_DEEPSPEED") == "true":
        prepare_deepspeed()


def prepare_deepspeed() -> None:
    """DeepSpeed would compile an operator for shared memory when it starts; gloo does without."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
