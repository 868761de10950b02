"""Programs in forks of one process that has torch's modules: of a program's seconds, importing torch takes most.

In a fork ``torch`` is not imported, though its submodules are. ``import torch`` then runs what torch's own import ends with, while
torch counts as being imported: it loads the entry points. So whatever depends on when torch is imported, by whom, and what it
loads, is as in a fresh process. Transformers, accelerate, peft and this package are not there, and are really imported; variables
that torch itself reads when it is imported are those of the tests. A program
that needs a GPU runs in a fresh process: torch's import may have asked the driver, which then does not work in a fork.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent

# A line of its input is a program to start, answered by the fork's id, or a fork to ask for its exit code (null: it runs).
_SERVER = """
import contextlib, importlib, importlib.machinery, json, os, signal, sys, traceback
import torch
for name in ("torch._dynamo", "torch._inductor.fx_passes.post_grad", "torch.distributed.fsdp", "torch.distributed.tensor",
             "torch.utils.tensorboard", "scipy.optimize", "networkx", "fastapi", "uvicorn", "openai"):
    with contextlib.suppress(Exception):
        importlib.import_module(name)
# The hub's package reads its variables when it is imported.
assert not {"transformers", "accelerate", "peft", "flashmla_hf", "huggingface_hub"} & {*sys.modules}

class Torch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            spec = importlib.machinery.ModuleSpec(name, self, origin=torch.__file__, is_package=True)
            spec.submodule_search_locations = torch.__path__
            return spec

    def create_module(self, spec):
        sys.meta_path.remove(self)  # not in find_spec, by which Transformers asks whether torch is installed
        return torch

    def exec_module(self, module):
        if torch._is_device_backend_autoload_enabled():
            torch._import_device_backends()

answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    asked = json.loads(line)
    if "pid" in asked:
        pid, status = os.waitpid(asked["pid"], 0 if asked["wait"] else os.WNOHANG)
        answer = os.waitstatus_to_exitcode(status) if pid else None
    else:
        answer = os.fork()
        if answer == 0:
            code = 1
            try:
                answers.close()
                signal.alarm(asked["limit"])
                for number, name in enumerate((os.devnull, *asked["said"])):
                    os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), number)
                os.environ.clear()
                os.environ.update(asked["environment"])
                os.chdir(asked["folder"])
                sys.path[:0], sys.argv = asked["path"], ["-c", *asked["arguments"]]
                sys.meta_path.insert(0, Torch())
                del sys.modules["torch"]
                exec(compile(asked["program"], "<string>", "exec"), {"__name__": "__main__"})
                code = 0
            except SystemExit as end:
                if isinstance(end.code, str):
                    print(end.code, file=sys.stderr)
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
    print(json.dumps(answer), file=answers, flush=True)
"""


@functools.cache
def _server() -> subprocess.Popen:
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen([sys.executable, "-c", _SERVER], env=environment, **pipes)
    atexit.register(server.communicate)  # the end of its input ends it
    return server


def _ask(**asked):
    server = _server()
    print(json.dumps(asked), file=server.stdin, flush=True)
    answer = server.stdout.readline()
    assert answer, "the process that forks has ended"
    return json.loads(answer)


class Process:
    """``program`` in a fork, in ``folder``, with ``path`` before ``sys.path`` and ``environment`` alone; ended after ``limit``
    seconds. It writes to ``stdout.txt`` and ``stderr.txt`` of its folder, or both to ``said``."""

    def __init__(
        self, program: str, folder: Path, path: list[str], environment: dict[str, str], *arguments: str,
        said: Path | None = None, limit: int = 240,
    ) -> None:  # fmt: skip
        self.said = [said or folder / name for name in ("stdout.txt", "stderr.txt")]
        for file in self.said:
            file.write_text("")
        self.exit_code: int | None = None
        self.pid = _ask(
            program=program, folder=str(folder), path=path, environment=environment, arguments=arguments, limit=limit,
            said=[str(file) for file in self.said],
        )  # fmt: skip

    def poll(self, wait: bool = False) -> int | None:
        """The exit code, negative for a signal; ``None`` while the program runs."""
        if self.exit_code is None:
            self.exit_code = _ask(pid=self.pid, wait=wait)
        return self.exit_code

    def wait(self, timeout: float | None = None) -> int:
        """The exit code of the program, as of ``subprocess.Popen``."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll(wait=deadline is None) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a fork", timeout)
            time.sleep(0.02)
        return self.exit_code

    def terminate(self, number: int = signal.SIGTERM) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.terminate(signal.SIGKILL)

    def output(self) -> tuple[str, str]:
        """What it wrote to standard output and error, when it has ended."""
        self.wait()
        return tuple(file.read_text() for file in self.said)


def run_program(program: str, timeout: int = 240, **environment: str) -> str:
    """As ``fresh_python.run_program``, in a fork."""
    with tempfile.TemporaryDirectory() as folder:
        process = Process(
            program, Path(folder), [str(TESTS), str(TESTS.parent)], os.environ | environment, limit=timeout
        )
        said, errors = process.output()
    assert process.exit_code == 0, f"exit code {process.exit_code}\n{errors[-4000:]}"
    return said.strip()
