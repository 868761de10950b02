"""``python -m flashmla_hf doctor``: what is installed, what was built, what runs here, and whether it is right.

:func:`examine` collects the report as plain data and decides; :func:`show` prints it. The self-test runs each
implementation this machine has, forward and backward, and holds it to the rule of the test suite: an error, against the
float64 reference, of at most twice that of eager attention in the same dtype.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

import flashmla_hf
from flashmla_hf import direct, libraries, nvidia_smi, reference, tested_releases
from flashmla_hf.dispatch import IMPLEMENTATIONS
from flashmla_hf.validation import Call

PACKAGES = ("flashmla_hf", "torch", "triton", "transformers", "accelerate", "peft", "trl")

# The implementations that compute attention by this package's own means; the others are torch's and the oracle.
TESTED = ("cpu", "sm90", "torch_flash", "flex")


def examine() -> dict:
    """The whole report, made of str, int, float, bool, None, list and dict; ``problems`` is empty if all is well."""
    problems: list[str] = []
    versions = _versions()
    report: dict[str, Any] = {
        "versions": versions,
        "newer than tested": _newer_than_tested(versions),
        "gpus": _gpus(),
        "built": _built(problems),
        "implementations": {name: _examine_implementation(name, problems) for name in TESTED},
        "fp8": "kernels on Hopper GPUs, of caches none yet; emulated on the CPU; other GPUs raise (docs/fp8.md)",
        "transformers": _examine_transformers(problems),
        "problems": problems,
    }
    if not any(entry["available"] for entry in report["implementations"].values()):
        problems.append("no implementation is available: attention() would raise on every call")
    report["passed"] = not problems
    return report


def _versions() -> dict:
    versions: dict[str, str | None] = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = flashmla_hf.__version__ if name == "flashmla_hf" else None
    versions["torch"] = torch.__version__
    versions["cuda of torch"] = torch.version.cuda
    versions["flashmla_hf at"] = str(Path(__file__).parent)
    return versions


def _newer_than_tested(versions: dict[str, str | None]) -> list[str]:
    """A sentence for each release newer than the tested ones: not a problem, but the first place to look."""
    return [
        f"{name} {version} is newer than {tested[-1]}, the newest release that flashmla_hf {flashmla_hf.__version__} was "
        "tested with"
        for name, tested in tested_releases.TESTED.items()
        if (version := versions.get(name)) is not None and tested_releases.is_newer_than_tested(name, version)
    ]


def _gpus() -> list[dict]:
    if not torch.cuda.is_available():
        return []
    (driver,) = nvidia_smi.query("driver_version") or (None,)
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "compute capability": f"{properties.major}.{properties.minor}",
                "memory GiB": round(properties.total_memory / 2**30, 1),
                "driver": driver,
            }
        )
    return gpus


def _built(problems: list[str]) -> dict:
    """What setup.py wrote beside the package, and which of the libraries are there and load."""
    directory = Path(__file__).parent
    manifest = directory / "_build.json"
    built: dict = {"manifest": None}
    if manifest.exists():
        try:
            built["manifest"] = json.loads(manifest.read_text())
        except ValueError as error:
            problems.append(f"{manifest} is not JSON ({error}): reinstall flashmla_hf")
    built["libraries"] = {}
    absent = {"sm90": "no_cuda", "direct": "no_direct"}  # the manifest's entries with the reason
    for name, filename in (*libraries.LIBRARIES.values(), ("direct", direct.FILENAME)):
        exists = (directory / filename).exists()
        built["libraries"][filename] = libraries.unavailable.get(name, "loaded")
        if not exists and built["manifest"] and built["manifest"].get(absent.get(name)):
            built["libraries"][filename] += f": {built['manifest'][absent[name]]}"
        # A torch without CUDA does not need the CUDA library, but one wheel serves both.
        is_off = name == "direct" and not direct.is_tested_torch()  # by choice
        if exists and name in libraries.unavailable and not is_off and (name != "sm90" or torch.version.cuda):
            problems.append(f"{libraries.unavailable[name]}; reinstall flashmla_hf into this environment")
    # The CPU library defines it. It raises if FLASHMLA_CPU_ISA names an instruction set that this CPU lacks.
    built["cpu instruction set"] = None
    if hasattr(torch.ops.flashmla, "cpu_isa"):
        try:
            built["cpu instruction set"] = torch.ops.flashmla.cpu_isa()
        except RuntimeError as error:
            problems.append(str(error).split("\n")[0])
    return built


def _examine_implementation(name: str, problems: list[str]) -> dict:
    device = "cpu" if name == "cpu" else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        return {"available": False, "reason": "no GPU that torch can use", "self-tests": []}
    if name == "cpu" and name in libraries.unavailable:
        problems.append(f"{libraries.unavailable[name]}: reinstall flashmla_hf on a machine with a C++17 compiler")
    dtypes = (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16)
    tests: list[dict] = []
    for dtype in dtypes:
        call = _example(dtype, device)
        reason = IMPLEMENTATIONS[name].refusal(call)
        if reason is not None:
            return {"available": False, "reason": reason, "self-tests": tests}
        test = _self_test(name, call)
        if test["failure"] is not None:
            problems.append(f"{name} fails its self-test in {test['dtype']}: {test['failure']}")
        tests.append(test)
    return {"available": True, "reason": None, "self-tests": tests}


def _example(dtype: torch.dtype, device: str) -> Call:
    """A causal call with grouped heads, a window, more queries than one tile and a length that fills none."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()

    q, k, v = normal(2, 301, 4, 64), normal(2, 301, 2, 64), normal(2, 301, 2, 64)
    return Call(
        q=q, k=k, v=v, sinks=None, attn_mask=None, cu_seqlens_q=None, cu_seqlens_kv=None, max_seqlen_q=q.shape[1],
        max_seqlen_kv=k.shape[1], scale=0.125, window_left=200, window_right=0, softcap=0.0, dropout_p=0.0,
        deterministic=False, return_lse=False, impl=None,
    )  # fmt: skip


def _self_test(name: str, call: Call) -> dict:
    """Time, and errors against float64 beside those of eager; "failure" names what is wrong, or is ``None``."""
    result: dict = {
        "dtype": str(call.q.dtype).removeprefix("torch."),
        "seconds": None,
        "errors": {},
        "failure": None,
    }
    leaves = (call.q, call.k, call.v)
    dout = torch.randn(call.q.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    dout = dout.to(call.q.device, call.q.dtype)

    def run(function, *inputs: torch.Tensor) -> list[torch.Tensor]:
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, dout.to(out.dtype))]

    def truth(q, k, v):
        options: dict[str, Any] = {
            "scale": call.scale,
            "window_left": call.window_left,
            "window_right": call.window_right,
        }
        return reference.attention(q, k, v, **options)[0]

    start = time.perf_counter()
    try:
        got = run(lambda *_: IMPLEMENTATIONS[name].run(call)[0], *leaves)
        if call.q.is_cuda:
            torch.cuda.synchronize()
    except Exception as error:  # the doctor reports what is broken, whatever it is
        result["failure"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        return result
    result["seconds"] = round(time.perf_counter() - start, 3)  # flex: compiling included

    eager = run(lambda q, k, v: _eager(q, k, v, call), *leaves)
    exact = run(truth, *(x.detach().double().requires_grad_() for x in leaves))
    for tensor, mine, theirs, ref in zip(("out", "dq", "dk", "dv"), got, eager, exact, strict=True):
        difference, allowed = ((x.double() - ref).abs().max().item() for x in (mine, theirs))
        # Twice eager's error, and half a unit in the last place, which rounding the result costs in any case.
        allowed = 2 * allowed + 0.5 * torch.finfo(mine.dtype).eps * ref.abs().max().item()
        result["errors"][tensor] = {"error": difference, "allowed": allowed}
        if result["failure"] is None and not difference <= allowed:  # a NaN fails, too
            result["failure"] = f"{tensor}: error {difference:.2e} against float64, allowed {allowed:.2e}"
    return result


def _eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
    """Attention as Transformers' eager functions compute it: products in the input dtype, softmax in float32."""
    group = q.shape[2] // k.shape[2]
    query = q.transpose(1, 2)
    key, value = (x.transpose(1, 2).repeat_interleave(group, dim=1) for x in (k, v))
    scores = query @ key.transpose(-1, -2) * call.scale
    visible = reference.visible_keys(q.shape[1], k.shape[1], call.window_left, call.window_right, q.device)
    assert visible is not None  # the call of _example has a window
    weights = torch.softmax(scores.masked_fill(~visible, -math.inf).float(), dim=-1).to(q.dtype)
    return (weights @ value).transpose(1, 2)


def _examine_transformers(problems: list[str]) -> dict:
    switches = ("FLASHMLA_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD")
    entry_points = importlib.metadata.entry_points(group="torch.backends")
    state: dict = {
        "registered names": None,
        "autoload": "installed" if any(entry.name == "flashmla_hf" for entry in entry_points) else "not installed",
    }
    for name in switches:
        if os.environ.get(name) == "0":
            state["autoload"] += f", switched off by {name}=0"
    if importlib.util.find_spec("transformers") is None:
        return state
    try:
        # Importing it registers.
        from flashmla_hf.hf import register

        known = register.modeling_utils.ALL_ATTENTION_FUNCTIONS
        state["registered names"] = [name for name in register.NAMES if name in known]
        missing = [name for name in register.NAMES if name not in known]
        if missing:
            problems.append(f"attn_implementation {missing} is not registered with Transformers")
    except Exception as error:  # an unknown Transformers is reported; it must not end the report
        problems.append(f"registering with Transformers fails: {type(error).__name__}: {error}")
    return state


# ---- Showing it ------------------------------------------------------------------------------------------------------


def show(report: dict, as_json: bool = False) -> None:
    """Prints the report to stdout: as JSON, with rich if that is installed, else as plain text."""
    if as_json:
        print(json.dumps(report, indent=2))
        return
    sections = _sections(report)
    verdict = _verdict(report)
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        for title, rows in sections:
            print(f"\n{title}")
            width = max(len(name) for name, _, _ in rows)
            for name, value, _ in rows:
                print(f"  {name:<{width}}  {value}")
        print(f"\n{verdict}")
        for problem in report["problems"]:
            print(f"  - {problem}")
        return

    console = Console()
    for title, rows in sections:
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None)
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value, is_good in rows:
            style = {True: "green", False: "red", None: ""}[is_good]
            table.add_row(f"  {escape(name)}", f"[{style}]{escape(value)}[/]" if style else escape(value))
        console.print(table)
        console.print()
    console.print(f"[bold {'green' if report['passed'] else 'red'}]{verdict}[/]")
    for problem in report["problems"]:
        console.print(f"  - {escape(problem)}")


def _verdict(report: dict) -> str:
    if not report["passed"]:
        return "Problems:"
    if report["transformers"]["registered names"] is None:
        return (
            'All is well for attention without Transformers; the name attn_implementation="flashmla" and the commands '
            "check, ledger and finetune need it: pip install transformers."
        )
    return "All is well."


def _sections(report: dict) -> list[tuple[str, list[tuple[str, str, bool | None]]]]:
    """(title, rows of (name, value, whether that is good news or None))."""

    def plain(values: dict) -> list[tuple[str, str, bool | None]]:
        return [(name, "not installed" if value is None else str(value), None) for name, value in values.items()]

    versions = plain(report["versions"])
    versions += [("note", sentence, None) for sentence in report["newer than tested"]]
    for index, gpu in enumerate(report["gpus"]):
        versions.append((f"GPU {index}", ", ".join(f"{k} {v}" if k != "name" else v for k, v in gpu.items()), None))
    if not report["gpus"]:
        versions.append(("GPU", "none", None))

    built = report["built"]
    built_rows = [(name, state, True if state == "loaded" else None) for name, state in built["libraries"].items()]
    built_rows += plain({"instruction set": built["cpu instruction set"] or "unknown"})
    manifest = built["manifest"] or {"manifest": "none (_build.json is missing)"}
    # Absent parts are not listed; the library's line gives the reason.
    built_rows += plain({name: value for name, value in manifest.items() if value and not name.startswith("no_")})

    implementations: list[tuple[str, str, bool | None]] = []
    for name, entry in report["implementations"].items():
        implementations.append(
            (name, "available" if entry["available"] else entry["reason"], entry["available"] or None)
        )
        for test in entry["self-tests"]:
            if test["failure"] is None:
                worst = max(x["error"] / x["allowed"] if x["allowed"] else 0.0 for x in test["errors"].values())
                text = f"forward and backward in {test['seconds']:.2f} s, error {worst:.0%} of what is allowed"
            else:
                text = test["failure"]
            implementations.append((f"  {test['dtype']}", text, test["failure"] is None))

    implementations.append(("fp8", report["fp8"], None))

    state = report["transformers"]
    names = state["registered names"]
    transformers: list[tuple[str, str, bool | None]] = [
        (
            "attn_implementation",
            "Transformers is not installed" if names is None else ", ".join(names),
            bool(names) or None,
        ),
        ("autoload", state["autoload"], None),
    ]
    return [
        ("Versions", versions),
        ("Built", built_rows),
        ("Implementations", implementations),
        ("Transformers", transformers),
    ]


def main(as_json: bool = False) -> int:
    """Examines, prints, and returns the exit code: 0 if nothing is wrong, else 1."""
    report = examine()
    show(report, as_json)
    sys.stdout.flush()
    return 0 if report["passed"] else 1
