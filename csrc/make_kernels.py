"""A wheel as a folder of Hugging Face's kernel hub, in the layout that the package `kernels` loads: `make kernels`.

The folder may be uploaded as a repository of the type "kernel". From the disk, Transformers loads it under a name of the hub:

    LOCAL_KERNELS="owner/flashmla-hf=FOLDER" python program.py

where program.py asks for attn_implementation="owner/flashmla-hf".

One wheel becomes a variant for torch without CUDA and, with the Hopper library in it, one for each major release of CUDA. The
libraries are of torch's stable ABI, so a variant serves every torch that the wheel serves.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "csrc"))
from flashmla_build.terminal import fail, tell  # noqa: E402

# The kernel's name; with underscores, that of the package.
NAME, PACKAGE = "flashmla-hf", "flashmla_hf"
# Of what the folder exports, as its users see it: a change that older ones cannot load under gets another number.
VERSION = 1
HOPPER = f"{PACKAGE}/libflashmla_sm90.so"
# The library holds its CUDA runtime, so it serves the other major release too: the loader wants its name in the variant's.
CUDA_OF_OTHER_MAJOR_RELEASES = ("12.4", "13.0")
LOADER = '''
"""flashmla_hf {version} as a kernel of the hub: the package beside this file, and what Transformers asks a kernel for.

torch's operators of this package have one name, so one process holds one flashmla_hf. If another one is imported already, it
serves if it is of the same release; else importing the kernel raises ImportError.
"""

import importlib
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def _package():
    sys.path.insert(0, str(HERE))
    try:
        package = importlib.import_module("flashmla_hf")
    finally:
        sys.path.remove(str(HERE))
    if package.__version__ != "{version}":
        raise ImportError(
            f"the kernel {{HERE}} is flashmla_hf {version}, and flashmla_hf {{package.__version__}} of "
            f"{{Path(package.__file__).parent}} is imported already: one process holds one of them. Uninstall that one (pip "
            'uninstall flashmla_hf), or use it without the kernel: attn_implementation="flashmla".'
        )
    return package


_flashmla_hf = _package()
attention = _flashmla_hf.attention
flash_attn_func = _flashmla_hf.flash_attn_func
flash_attn_varlen_func = _flashmla_hf.flash_attn_varlen_func
__all__ = ["attention", "flash_attn_func", "flash_attn_varlen_func"]
'''
CARD = """---
license: apache-2.0
library_name: kernels
tags: [kernel, kernels]
---
flashmla_hf {version}: exact streaming attention, forward and backward, for CPUs and Hopper GPUs.

    AutoModelForCausalLM.from_pretrained(model, attn_implementation="OWNER/flashmla-hf", allow_all_kernels=True)

`attention`, `flash_attn_func` and `flash_attn_varlen_func` are exported. One process holds one flashmla_hf: beside another
release, loading raises ImportError.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", type=Path, help="a wheel of this package; make wheel leaves one in dist")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "kernels" / NAME, help="the folder, made anew")
    options = parser.parse_args()
    for variant in make(options.wheel, options.output):
        size = sum(path.stat().st_size for path in variant.rglob("*") if path.is_file())
        tell(f"flashmla_hf: {variant}, {size / 2**20:.1f} MiB")
    tell(f'flashmla_hf: LOCAL_KERNELS="owner/{NAME}={options.output}" and attn_implementation="owner/{NAME}" use it.')


def make(wheel: Path, output: Path) -> list[Path]:
    """Writes the folder and returns its variants. A file of several variants is one on the disk, under several names."""
    if not wheel.is_file():
        fail(f"{wheel}: expected a wheel of {PACKAGE}, found no file: make wheel builds one.")
    match = re.fullmatch(rf"{PACKAGE}-([\w.+]+)-py3-none-[\w.]*linux_[\w.]+\.whl", wheel.name)
    if match is None:
        fail(f"{wheel.name}: expected a wheel of {PACKAGE} for Linux, as make wheel builds it.")
    version = match[1]
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    (output / "README.md").write_text(CARD.format(version=version))
    with tempfile.TemporaryDirectory(dir=output) as unpacked, zipfile.ZipFile(wheel) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith(f"{PACKAGE}/"))
        archive.extractall(unpacked, names)
        built = json.loads((Path(unpacked) / PACKAGE / "_build.json").read_text())
        torch = "".join(built["torch_target"].split("."))
        backends = {"cpu": [name for name in names if name != HOPPER]}
        if HOPPER in names:
            backends |= {f"cu{release.replace('.', '')}": names for release in cuda_releases(built["cuda"])}
        variants = []
        for backend, held in backends.items():
            variant = output / "build" / f"torch-stable-abi{torch}-{backend}-{built['machine']}-linux"
            fill(variant, Path(unpacked), held, version)
            write_metadata(variant, "cpu" if backend == "cpu" else "cuda")
            variants.append(variant)
    return variants


def cuda_releases(compiler: str) -> list[str]:
    """Of each major release of CUDA the oldest that a variant may name: that of the compiler, or of those it does not know."""
    major = compiler.partition(".")[0]
    others = [release for release in CUDA_OF_OTHER_MAJOR_RELEASES if release.partition(".")[0] != major]
    return sorted([compiler, *others], key=float)


def fill(variant: Path, unpacked: Path, names: list[str], version: str) -> None:
    for name in names:
        (variant / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(unpacked / name, variant / name)
    (variant / "__init__.py").write_text(LOADER.lstrip().format(version=version))


def write_metadata(variant: Path, backend: str) -> None:
    """metadata.json: what kernels checks before it loads, with the hash of every other file."""
    digests = {
        path.relative_to(variant).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in sorted(variant.rglob("*"))
        if path.is_file()
    }
    of_all = hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:8]
    metadata = {
        "name": NAME,
        "id": f"_{PACKAGE}_{backend}_{of_all}",
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {
            "type": backend
        },  # no architectures, which kernels would insist on: on other GPUs the package takes flex
        "digest": {"algorithm": "sha256", "files": digests},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


if __name__ == "__main__":
    main()
