"""Work that may run out of memory or hang, in a Python process of its own that reports its result in one line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """How a process ended. ``status`` is ok, timeout, out_of_memory (the system killed the process) or error.

    ``result`` is the report of a process that is ok; of any other, ``reason`` says in one line why it is not.
    """

    status: str
    reason: str = ""
    result: dict | None = None


def run(command: list[str], mark: str, timeout: float) -> Outcome:
    """Runs ``command`` for at most ``timeout`` seconds and reads the line of JSON that begins with ``mark``.

    Never raises for anything that happens in the process.
    """
    # Waiting threads sleep instead of spinning: beside other work, spinning makes a step ten times slower.
    env = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return Outcome("timeout", f"took longer than {timeout:.0f} s")
    finally:
        # Also if this process is interrupted: no child outlives its reader.
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    for line in stdout.splitlines():
        if line.startswith(mark):
            return Outcome("ok", result=json.loads(line.removeprefix(mark)))
    if process.returncode == -signal.SIGKILL:
        return Outcome("out_of_memory", "the system killed the process")
    return Outcome("error", (stderr.strip() or "no output").splitlines()[-1])
