"""Compares one forward pass of two models, beside eager in float64 and Transformers' own SDPA."""

from __future__ import annotations

import contextlib
import copy
import functools
from dataclasses import dataclass

import torch

from model_sweep.building import build, copy_state, run
from model_sweep.verdicts import Result, first_line, raised

TOLERANCE = 1e-3
MOST_NOISE = 3e-2  # an eager model that is further from itself in float64 cannot be judged by


def difference(got: dict, want: dict, real: torch.Tensor | None = None) -> tuple[float, str]:
    """(largest difference as a fraction of the largest value, at least 1; the output it is in). ``real`` [batch,
    seqlen]: outputs of that leading shape count there alone. Infinite if the outputs are not of one shape or kind."""
    worst, where = 0.0, ""
    if got.keys() != want.keys():
        return float("inf"), f"outputs {sorted(got.keys() ^ want.keys())}"
    for name, expected in want.items():
        value = got[name]
        if value.shape != expected.shape:
            return float("inf"), f"{name} {[*value.shape]}, not {[*expected.shape]}"
        if not expected.numel():
            continue
        if real is not None and expected.dim() >= 2 and expected.shape[1] == real.shape[1]:
            copies, rest = divmod(expected.shape[0], real.shape[0])  # several codebooks stand in one batch
            if rest == 0:
                there = real.repeat_interleave(copies, 0)
                value, expected = value[there], expected[there]
        if not expected.is_floating_point():
            error = 0.0 if torch.equal(value, expected) else 1.0
        else:
            value, expected = value.double(), expected.double()
            same = (value == expected) | (torch.isnan(value) & torch.isnan(expected))  # infinities as well
            finite = torch.isfinite(expected)
            scale = max(1.0, float(expected[finite].abs().max())) if finite.any() else 1.0
            error = float(torch.where(same, 0.0, (value - expected).abs()).max()) / scale if expected.numel() else 0.0
            error = float("inf") if error != error else error
        if error > worst:
            worst, where = error, name
    return worst, where


def zeros(call, run):
    out, *rest = run(call)
    return (torch.zeros_like(out) + 0.0 * out, *rest)


@dataclass
class Pair:
    """The two models and what is allowed to differ."""

    eager: torch.nn.Module
    ours: torch.nn.Module
    result: Result
    peer_name: str = "no peer"

    def probe(self, name: str, batch: dict, real: torch.Tensor | None = None, **options) -> None:
        """Compares one forward pass. A pass that eager itself refuses is no probe."""
        try:
            want = run(self.eager, batch, **options)
        except Exception as error:
            self.result.probes[name] = f"eager refuses: {first_line(error)[:100]}"
            return
        try:
            got = run(self.ours, batch, **options)
        except Exception as error:
            self.result.probes[name] = raised(error)
            return
        error, where = difference(got, want, real)
        if error <= TOLERANCE:
            self.result.probes[name] = "equal"
            return
        noise = self._noise(batch, want, real, options)
        if noise > MOST_NOISE:
            self.result.probes[name] = f"not judged: eager in float64 is {noise:.1e} from eager"
            return
        if error <= 10 * noise:
            self.result.probes[name] = f"equal within the rounding of eager ({error:.1e}, {noise:.1e})"
            return
        told = "none"
        if self.peer is not None:
            try:
                theirs = run(self.peer, batch, **options)
            except Exception as raised_there:
                told = type(raised_there).__name__
            else:
                if difference(got, theirs, real)[0] <= TOLERANCE:
                    self.result.probes[name] = f"as {self.peer_name}, which differs from eager ({error:.1e} in {where})"
                    return
                told = f"{difference(theirs, want, real)[0]:.1e}"
        self.result.probes[name] = (
            f"DIFFERS by {error:.2e} in {where} ({self.peer_name}: {told}; eager in float64: {noise:.1e})"
        )

    def _noise(self, batch, want, real, options) -> float:
        """How far eager in float64 is from eager in float32: nobody can ask for less."""
        try:
            double = copy.deepcopy(self.eager).double()
            batch = {
                n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in batch.items()
            }
            return difference(run(double, batch, **options), want, real)[0]
        except Exception:
            return 0.0

    @functools.cached_property
    def peer(self) -> torch.nn.Module | None:
        """The same model under SDPA, or under what Transformers takes if nothing is asked for. Where eager and this one
        differ, one of them is wrong in Transformers (a boolean mask that eager adds, a row that sees no key)."""
        for name in ("sdpa", None):
            with contextlib.suppress(Exception):
                model = build(type(self.eager), self.eager.config, name)
                copy_state(self.eager, model)
                self.peer_name = name or "Transformers' default"
                return model
        return None
