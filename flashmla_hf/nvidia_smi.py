"""What the driver's command-line tool says of the first GPU. It makes no CUDA context in this process."""

from __future__ import annotations

import subprocess


def query(*fields: str) -> list[str] | None:
    """The values of ``fields`` (``nvidia-smi --help-query-gpu``) without units; ``None`` if the tool does not answer."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "-i", "0"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in output.split("\n")[0].split(",")]
    return values if len(values) == len(fields) and all(values) else None
