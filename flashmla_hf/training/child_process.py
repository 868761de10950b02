"""Work that may run out of memory or hang, in a Python process of its own that answers in one line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """``status`` is ok, timeout, out_of_memory (the system killed the process) or error. ``reason`` where it is not ok, else
    ``result``: what stood behind the mark."""

    status: str
    reason: str = ""
    result: dict | None = None


def ask(command: list[str], mark: str, timeout: float) -> Answer:
    """Runs ``command`` for at most ``timeout`` seconds; its answer is the line of JSON that begins with ``mark``. Never raises
    for what happens in there."""
    # Waiting threads sleep instead of spinning: beside other work, spinning makes a step ten times slower.
    env = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return Answer("timeout", f"took longer than {timeout:.0f} s")
    finally:
        # Also when this process is interrupted: no child outlives its reader.
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    for line in stdout.splitlines():
        if line.startswith(mark):
            return Answer("ok", result=json.loads(line.removeprefix(mark)))
    if process.returncode == -signal.SIGKILL:
        return Answer("out_of_memory", "the system killed the process")
    return Answer("error", (stderr.strip() or "no output").splitlines()[-1])
