"""The sweep for compute-sanitizer (tests/sanitize_gpu.py) covers every kernel, is right, and notices wrong results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gpu_support
import pytest
import sanitize_gpu
import torch
from cases import SM90_ROWS
from cpu_support import needs_cpu_library
from gpu_support import DEVICE, needs_sm90

TESTS = Path(__file__).parent


@needs_cpu_library
def test_the_sweep_for_the_sanitizer_is_right_on_the_cpu_and_covers_every_kernel():
    assert sanitize_gpu.sweep("cpu") == []
    covered = {(c.sm90_row, c.mask_kind, c.is_packed) for c, _ in sanitize_gpu.sweep_cases()}
    assert len(covered) == len(SM90_ROWS) * 3 * 2
    assert {(case.sm90_row, dtype) for case, dtype in sanitize_gpu.sweep_cases()} == {
        (row, dtype) for row in SM90_ROWS for dtype in gpu_support.HALF
    }


@needs_cpu_library
def test_the_sweep_for_the_sanitizer_finds_wrong_results():
    forward = torch.ops.flashmla.flash_attn_forward

    def unmasked(*arguments):
        return forward(*arguments[:9], -1, -1, *arguments[11:])

    def shifted(*arguments):
        out, lse = forward(*arguments)
        return out.roll(1, dims=-1), lse

    for wrong in (unmasked, shifted):
        assert len(sanitize_gpu.sweep("cpu", wrong)) >= 12


def test_the_sweep_for_the_sanitizer_covers_every_decode_kernel():
    cases = sanitize_gpu.decode_cases_of_sweep()
    for part, values in (
        ("row, dtype", {(sanitize_gpu.decode_row(case), dtype) for case, dtype in cases}),
        ("row, split or not", {(sanitize_gpu.decode_row(case), case.num_splits) for case, _ in cases}),
        ("row, pages or not", {(sanitize_gpu.decode_row(case), case.page_size > 0) for case, _ in cases}),
    ):
        assert len(values) == 2 * len(sanitize_gpu.DECODE_ROWS), part
    several = [case for case, _ in cases if case.num_splits != 1]
    assert any(case.window for case in several)
    assert any(case.starts for case in several)
    assert any(case.seqlen_q * case.heads_q // case.heads_kv > 64 for case in several)


@needs_cpu_library
def test_the_sweep_for_the_sanitizer_finds_wrong_decoding():
    decode = torch.ops.flashmla.flash_attn_decode

    def unmasked(*arguments):  # to the right: to the left lie pages that are none
        return decode(*arguments[:9], -1, *arguments[10:])

    def started_at_0(*arguments):
        return decode(*arguments[:5], None, *arguments[6:])

    for wrong in (unmasked, started_at_0):
        found = [
            x
            for case, dtype in sanitize_gpu.decode_cases_of_sweep()[:16]
            for x in sanitize_gpu.run_decode(case, dtype, "cpu", wrong)
        ]
        assert len(found) >= 8, found


@needs_sm90
@pytest.mark.skipif(DEVICE == "cpu", reason="is the same test")
def test_the_sweep_for_the_sanitizer_is_right_on_this_gpu():
    result = subprocess.run([sys.executable, TESTS / "sanitize_gpu.py"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert " 0 wrong results" in result.stdout
