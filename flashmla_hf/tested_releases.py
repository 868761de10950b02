"""The releases of other packages that this one is tested with: the one place that names them.

The Makefile, both requirements files and csrc/check_headers.py install these; tests/test_doctor.py holds them to this table.
"""

from __future__ import annotations

import re

# Package -> its tested releases up to the second number, the oldest first.
TESTED: dict[str, tuple[str, ...]] = {
    "torch": ("2.10", "2.11", "2.12", "2.13", "2.14", "2.15"),
    "transformers": ("5.17", "5.23", "5.24"),
    "accelerate": ("1.15",),
    "peft": ("0.21",),
}


def release(version: str) -> tuple[int, int]:
    """The first two numbers of a version: (2, 13) of "2.13.0+cpu"."""
    major, minor = re.findall(r"\d+", f"{version}.0")[:2]
    return int(major), int(minor)


def is_tested(package: str, version: str) -> bool:
    return release(version) in {release(tested) for tested in TESTED[package]}


def is_newer_than_tested(package: str, version: str) -> bool:
    return release(version) > release(TESTED[package][-1])
