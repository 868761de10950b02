"""What a build says, and to whom."""

from __future__ import annotations

import functools
import os
import re
import sys
from pathlib import Path
from typing import NoReturn, TextIO

OURS = "flashmla_hf: "


def tell(text: str) -> None:
    """Prints in one piece: several threads print, and ``print`` writes the end of a line apart from it.

    A line of this package's own also goes to the terminal if an installer keeps what a build prints from it.
    """
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
    if text.startswith(OURS) and (terminal := hidden_terminal()) is not None:
        terminal.write(f"\r\x1b[K{text}\n")  # over what the installer's spinner left in the line
        terminal.flush()


def fail(sentence: str) -> NoReturn:
    raise SystemExit(f"{OURS}{sentence}")


@functools.cache
def hidden_terminal() -> TextIO | None:
    """The terminal that pip or uv, without -v and -q, keeps a build from: a build of minutes that says nothing looks dead."""
    if sys.stdout.isatty():
        return None
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
        return open("/dev/tty", "w") if hides_builds(words, os.environ) else None
    except OSError:  # no terminal, or not Linux
        return None


def hides_builds(words: list[str], environment: os._Environ | dict[str, str]) -> bool:
    """Whether this command line is one of pip or uv that shows nothing of a build, and that was not told to be quiet."""
    is_installer = any(re.fullmatch(r"pip[\d.]*|uv", Path(word).name) for word in words[:3]) and "run" not in words
    said = [word for word in words if re.fullmatch(r"-[A-Za-z]*[qv]+[A-Za-z]*|--quiet|--verbose", word)]
    return is_installer and not said and not {"PIP_QUIET", "PIP_VERBOSE"} & environment.keys()
