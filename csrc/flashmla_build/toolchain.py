"""What the CUDA library is built with: nvcc, an architecture list that names Hopper, and CUTLASS's headers."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from flashmla_build.environment import site_packages
from flashmla_build.sources import source_table
from flashmla_build.terminal import tell

# The oldest nvcc that was seen to compile the kernels; csrc/check_headers.py compiles host code with its headers.
MINIMUM_NVCC = (12, 4)


class CudaUnavailable(Exception):
    """One sentence: why libflashmla_sm90.so cannot be built here, and the way out."""


@dataclass(frozen=True)
class Cuda:
    nvcc: str
    release: str
    cutlass: Path  # the include directory


def find_cuda(downloads: Path) -> Cuda:
    """Everything libflashmla_sm90.so is built with, or :class:`CudaUnavailable`."""
    check_arch_list()
    nvcc, release = find_nvcc()
    return Cuda(nvcc, release, find_cutlass(downloads))


def check_arch_list() -> None:
    listed = re.split(r"[\s;,]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(" ;,"))
    if listed == [""]:
        return
    others = [arch for arch in listed if arch.lower().removesuffix("+ptx") not in ("9.0", "9.0a", "hopper")]
    if len(others) == len(listed):
        raise CudaUnavailable(
            f"TORCH_CUDA_ARCH_LIST: expected 9.0 among the entries, got {' '.join(listed)!r}, and the library is for Hopper "
            "GPUs alone: add 9.0, or unset it."
        )
    if others:
        tell(
            f"flashmla_hf: TORCH_CUDA_ARCH_LIST: {', '.join(others)} ignored, the CUDA library is for Hopper (9.0) alone."
        )


def find_nvcc() -> tuple[str, str]:
    """(program, release): of CUDA_HOME where that is set, else of PATH or of the toolkit's usual place."""
    oldest = ".".join(map(str, MINIMUM_NVCC))
    home = os.environ.get("CUDA_HOME")
    if home:
        nvcc = shutil.which("nvcc", path=str(Path(home) / "bin"))
        if nvcc is None:
            raise CudaUnavailable(
                f"CUDA_HOME: expected the directory of a CUDA toolkit, got {home!r}, which has no bin/nvcc."
            )
    else:
        nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
        if nvcc is None:
            raise CudaUnavailable(
                f"nvcc was not found: put a CUDA toolkit >= {oldest} on PATH, or name its directory in CUDA_HOME."
            )
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"release (\d+)\.(\d+)", answer)
    if match is None:
        raise CudaUnavailable(
            f"{nvcc} --version: expected a line with its release, got {answer.strip()!r}: reinstall the toolkit."
        )
    if tuple(map(int, match.groups())) < MINIMUM_NVCC:
        raise CudaUnavailable(
            f"nvcc {'.'.join(match.groups())} is too old: expected CUDA >= {oldest}; install a newer toolkit, or name one in "
            "CUDA_HOME."
        )
    return nvcc, ".".join(match.groups())


def find_cutlass(downloads: Path) -> Path:
    """CUTLASS's include directory: FLASHMLA_CUTLASS_DIR, else an installed nvidia-cutlass, else downloaded once.

    Downloaded here and not by a build requirement (pyproject.toml, a PEP 517 hook): pip would install six packages this
    one depends on and the compiler does not need, and without a network it would end the CPU build, too.
    """
    table = source_table("sm90")
    override = os.environ.get("FLASHMLA_CUTLASS_DIR")
    if override:
        if not (Path(override) / "include" / "cutlass" / "cutlass.h").is_file():
            raise CudaUnavailable(
                "FLASHMLA_CUTLASS_DIR: expected a CUTLASS checkout, which holds include/cutlass/cutlass.h, got "
                f"{override!r}, which does not."
            )
        return Path(override) / "include"
    name, version = table["cutlass"].split("==")
    inside = Path("cutlass_library") / "source" / "include"
    target = downloads / f"cutlass-{version}"
    for place in (*site_packages(), target):
        # Of another release what the kernels use may be missing or differ.
        if cutlass_version(place / inside) == version.split(".")[:3]:
            return (place / inside).resolve()

    temporary = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    requirement = temporary / "requirement.txt"
    requirement.write_text(f"{table['cutlass']} --hash=sha256:{table['cutlass_sha256']}\n")
    # Without PYTHONPATH: through it build isolation hides the environment's pip. An environment made by uv has no pip.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # Short waits: where there is no network, a build for the CPU shall not wait for minutes.
    environment |= {"PIP_DEFAULT_TIMEOUT": "15", "UV_HTTP_TIMEOUT": "15", "PIP_RETRIES": "1", "PIP_USER": "0"}
    programs = [[sys.executable, "-m", "pip"], *([[shutil.which("uv"), "pip"]] if shutil.which("uv") else [])]
    for program in programs:
        command = [*program, "install", "--quiet", "--no-deps", "--only-binary", ":all:", "--require-hashes",
                   "--target", str(temporary), "-r", str(requirement)]  # fmt: skip
        tell(shlex.join(command))
        try:
            subprocess.run(command, env=environment, timeout=120, check=True, capture_output=True, text=True)
        except subprocess.TimeoutExpired:
            problem = "no answer in 120 seconds"
        except subprocess.CalledProcessError as error:
            problem = ([line for line in error.stderr.splitlines() if line.strip()] or ["no message"])[-1]
        else:
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
            return (target / inside).resolve()
    shutil.rmtree(temporary)
    raise CudaUnavailable(
        f"CUTLASS's headers could not be downloaded ({problem}): install them into this environment (pip install --no-deps "
        f"{name}=={version}), or name a CUTLASS checkout in FLASHMLA_CUTLASS_DIR."
    )


def cutlass_version(include: Path) -> list[str] | None:
    header = include / "cutlass" / "version.h"
    if not header.is_file():
        return None
    return re.findall(r"#define CUTLASS_(?:MAJOR|MINOR|PATCH)\s+(\d+)", header.read_text())
