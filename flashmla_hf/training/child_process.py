"""Work that may run out of memory or hang, in a Python process of its own that reports its result in one line."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

# The child has a session of its own, so a terminal's Ctrl-C or hang-up reaches this process alone.
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# In the environment of the child and of all that it starts: torchrun's workers have sessions of their own, and outlive it.
_NAME = "FLASHMLA_CHILD_OF"


@dataclass(frozen=True)
class Outcome:
    """How a process ended. ``status`` is ok, timeout, out_of_memory (the system killed the process) or error.

    ``result`` is the report of a process that is ok; of any other, ``reason`` says in one line why it is not. ``log`` is what
    the process and all that it started wrote to their standard error.
    """

    status: str
    reason: str = ""
    result: dict | None = None
    log: str = ""


def run(
    command: list[str], mark: str, timeout: float, variables: dict[str, str] | None = None, speaker: str = ""
) -> Outcome:
    """Runs ``command`` for at most ``timeout`` seconds and reads the line of JSON that begins with ``mark``.

    ``variables`` are added to its environment. The reason of an error is the last line that begins with ``speaker``, or the
    last one of all: a launcher of several processes has words of its own after theirs.
    Never raises for anything that happens in the process. A signal that ends this process ends the child and all that it
    started first; if this process is killed, they are killed too. None of them is left when this function returns.
    """
    # Waiting threads sleep instead of spinning: beside other work, spinning makes a step ten times slower.
    name = secrets.token_hex(16)
    env = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | (variables or {}) | {_NAME: name}
    with _ending_signals_kept() as kept:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True
        )
        try:
            kept.process, kept.name = process, name
            if kept.received:  # while the child was made
                _kill(process.pid, name)
            with guarded(process, name):
                stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            _kill(process.pid, name)
            return Outcome("timeout", f"took longer than {timeout:.0f} s", log=process.communicate()[1])
        finally:
            # Also after an exception: no child outlives its reader.
            if process.poll() is None:
                _kill(process.pid, name)
                process.communicate()
            _kill_named(name)
    for line in stdout.splitlines():
        if line.startswith(mark):
            return Outcome("ok", result=json.loads(line.removeprefix(mark)), log=stderr)
    if process.returncode == -signal.SIGKILL:
        return Outcome("out_of_memory", "the system killed the process", log=stderr)
    lines = (stderr.strip() or "no output").splitlines()
    reason = next((line for line in reversed(lines) if speaker and line.startswith(speaker)), lines[-1])
    return Outcome("error", reason, log=stderr)


@contextlib.contextmanager
def guarded(process: subprocess.Popen, name: str = "") -> Iterator[None]:
    """Within it, the end of this process, a SIGKILL too, is that of ``process``, of its children (a session of their own), and
    of all processes that have ``name`` in their environment.

    A second process, this file as a program, waits for the end of its input: no handler runs here at a SIGKILL.
    """
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(process.pid), name], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        yield
    finally:
        guard.kill()
        guard.communicate()


@dataclass
class _Kept:
    """The child, and the signals that came while it ran."""

    process: subprocess.Popen | None = None
    name: str = ""
    received: list[int] = field(default_factory=list)


def _kill(pid: int, name: str) -> None:
    """Ends the session of ``pid``, and all processes that have ``name`` in their environment."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    _kill_named(name)


def _kill_named(name: str) -> None:
    if not name:
        return
    ended: set[str] = set()
    while new := _named(name) - ended:  # one may have started another meanwhile
        for pid in new:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        ended |= new


def _named(name: str) -> set[str]:
    """Numbers of the processes whose environment has ``name``; empty on a system without /proc."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
            if f"{_NAME}={name}".encode() in file.read().split(b"\0"):
                found.add(pid)
    return found


@contextlib.contextmanager
def _ending_signals_kept() -> Iterator[_Kept]:
    """Within it, a signal of ENDING_SIGNALS kills the child; at its end, the signal does what it did before."""
    kept, before = _Kept(), {}

    def end_child(number: int, frame: object) -> None:
        kept.received.append(number)
        if kept.process is not None:
            _kill(kept.process.pid, kept.name)

    # Only the main thread may set handlers. A signal that is ignored (nohup) stays so.
    if threading.current_thread() is threading.main_thread():
        for number in ENDING_SIGNALS:
            handler = signal.getsignal(number)
            if handler not in (None, signal.SIG_IGN):
                before[number] = signal.signal(number, end_child)
    try:
        yield kept
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if kept.received:
            os.kill(os.getpid(), kept.received[0])


if __name__ == "__main__":  # the guard of a process that has just ended, or will
    sys.stdin.read()
    _kill(int(sys.argv[1]), sys.argv[2])
