"""Work that may run out of memory or hang, in a Python process of its own that reports its result in one line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

# The child has a session of its own, so a terminal's Ctrl-C or hang-up reaches this process alone.
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# The program of a second process, which ends the child's session if this process is killed: its input then ends. No handler
# runs here at a SIGKILL, and the child could end neither while it starts nor its own children.
_GUARD = "import os, sys; sys.stdin.read(); os.killpg(int(sys.argv[1]), 9)"


@dataclass(frozen=True)
class Outcome:
    """How a process ended. ``status`` is ok, timeout, out_of_memory (the system killed the process) or error.

    ``result`` is the report of a process that is ok; of any other, ``reason`` says in one line why it is not.
    """

    status: str
    reason: str = ""
    result: dict | None = None


def run(
    command: list[str], mark: str, timeout: float, variables: dict[str, str] | None = None, speaker: str = ""
) -> Outcome:
    """Runs ``command`` for at most ``timeout`` seconds and reads the line of JSON that begins with ``mark``.

    ``variables`` are added to its environment. The reason of an error is the last line that begins with ``speaker``, or the
    last one of all: a launcher of several processes has words of its own after theirs.
    Never raises for anything that happens in the process. A signal that ends this process ends the child and its children
    first; if this process is killed, they are killed too.
    """
    # Waiting threads sleep instead of spinning: beside other work, spinning makes a step ten times slower.
    env = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | (variables or {})
    with _ending_signals_kept() as kept:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True
        )
        try:
            kept.process = process
            if kept.received:  # while the child was made
                _kill(process)
            with guarded(process):
                stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            return Outcome("timeout", f"took longer than {timeout:.0f} s")
        finally:
            # Also after an exception: no child outlives its reader.
            if process.poll() is None:
                _kill(process)
                process.communicate()
    for line in stdout.splitlines():
        if line.startswith(mark):
            return Outcome("ok", result=json.loads(line.removeprefix(mark)))
    if process.returncode == -signal.SIGKILL:
        return Outcome("out_of_memory", "the system killed the process")
    lines = (stderr.strip() or "no output").splitlines()
    return Outcome("error", next((line for line in reversed(lines) if speaker and line.startswith(speaker)), lines[-1]))


@contextlib.contextmanager
def guarded(process: subprocess.Popen) -> Iterator[None]:
    """Within it, the end of this process, a SIGKILL too, is that of ``process`` and its children (a session of their own)."""
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _GUARD, str(process.pid)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
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
    received: list[int] = field(default_factory=list)


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def _ending_signals_kept() -> Iterator[_Kept]:
    """Within it, a signal of ENDING_SIGNALS kills the child; at its end, the signal does what it did before."""
    kept, before = _Kept(), {}

    def end_child(number: int, frame: object) -> None:
        kept.received.append(number)
        if kept.process is not None:
            _kill(kept.process)

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
