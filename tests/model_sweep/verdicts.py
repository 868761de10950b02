"""The result of the sweep for one class, and the status that its probes give."""

from __future__ import annotations

import traceback
from dataclasses import asdict, dataclass, field


@dataclass
class Result:
    """What the sweep found about one class. ``status``:

    ``equal``: every probe that applies is. ``eager``: runs with "eager", after our warning. ``refused``: raises, in our words.
    ``no attention``: the model never calls an attention function. ``not discriminating``: equal, but so would zeros be.
    ``not as eager``: equal to Transformers' own SDPA, which differs from eager. ``cannot build``: no tiny configuration or no
    inputs were found. ``failed``: differs from eager, or raises where eager does not.
    """

    class_name: str
    model_type: str
    status: str = "cannot build"
    reason: str = ""
    implementation: str = "flashmla"
    plan: str = ""
    inputs: list[str] = field(default_factory=list)
    probes: dict[str, str] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    layers: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def as_dict(self) -> dict:
        return asdict(self)


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def raised(error: Exception) -> str:
    text = str(error)
    if text.startswith("flashmla"):
        return f"REFUSED {text.strip().splitlines()[0][:400]}"
    last = [f for f in traceback.extract_tb(error.__traceback__) if "torch/nn" not in f.filename][-1]
    return f"RAISES {first_line(error)} ({last.filename.rsplit('/', 1)[-1]}:{last.lineno})"


def verdict(result: Result, said: str = "") -> tuple[str, str]:
    """(status, reason) by what the probes found; ``said`` is our warning at load."""
    probes = {n: v for n, v in result.probes.items() if n not in ("check", "control of zeros")}
    bad = {n: v for n, v in probes.items() if v.startswith(("DIFFERS", "RAISES"))}
    refusals = {n: v for n, v in probes.items() if v.startswith("REFUSED")}
    if bad:
        return "failed", "; ".join(f"{n}: {v}" for n, v in bad.items())
    if refusals:
        return "refused", "; ".join(f"{n}: {v}" for n, v in refusals.items())
    if probes.get("forward", "").startswith("not judged"):
        return "not discriminating", probes["forward"]
    if not result.calls:
        return ("eager", said) if said else ("no attention", "")
    as_peer = {n: v for n, v in probes.items() if v.startswith("as ")}
    if as_peer:
        return "not as eager", "; ".join(f"{n}: {v}" for n, v in as_peer.items())
    if result.probes["control of zeros"] != "noticed":
        return "not discriminating", f"zeros instead of attention: {result.probes['control of zeros']}"
    return "equal", said
