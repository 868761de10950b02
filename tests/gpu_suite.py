"""Everything for a GPU host, in parts that can be run alone; a summary at the end, exit code 1 where a part failed.

    make gpu                                      # all of it; make gpu PARTS="sm90 sweep" some of it
    python3 tests/gpu_suite.py                    # the same without make (the libraries must be built)
    python3 tests/gpu_suite.py sm90 sanitize --time_budget 300
    python3 tests/gpu_suite.py --list

Each part is a process with a limit of its own: one that hangs or crashes costs its limit and no more. What it printed goes
to the terminal and to --output_dir. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import racecheck

ROOT = Path(__file__).resolve().parent.parent
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
# Small calls leave a GPU idle most of the time: where pytest-xdist is installed, four processes share it.
PARALLEL = (*PYTEST, "-n", "4") if importlib.util.find_spec("xdist") else PYTEST
# Not initcheck: it does not see what the copy engine stores, and takes every output for uninitialised.
SANITIZERS = ("memcheck", "racecheck", "synccheck")
SANITIZER_ERROR = 86


@dataclass(frozen=True)
class Step:
    """``python3 arguments``, under ``tool`` where one is named, for at most ``limit`` seconds. ``expected``: exit codes."""

    name: str
    arguments: tuple[str, ...]
    limit: int
    tool: str | None = None
    expected: tuple[int, ...] = (0,)


def sanitizer(tool: str) -> Step:
    # racecheck's exit code says that there are hazards; racecheck_problem says whether they are among the accepted ones.
    expected = (0, SANITIZER_ERROR) if tool == "racecheck" else (0,)
    return Step(tool, ("tests/sanitize_gpu.py",), 300, tool, expected)


def benchmark(name: str, program: str, *options: str) -> Step:
    budget = ("--device", "cuda", "--time_budget", "240")
    return Step(name, (f"benchmarks/{program}.py", *budget, "--output_dir", "build/gpu/bench", *options), 420)


def files(*subjects: str) -> tuple[str, ...]:
    """The test files of ``subjects``, from the root of the checkout."""
    return tuple(f"tests/test_{subject}.py" for subject in subjects)


# Every test of attention to caches that is not another implementation's: -k finds parameters, and some tests have none.
DECODE = (*(f"tests/{path.name}" for path in sorted((ROOT / "tests").glob("test_decode*.py"))),
          "-k", "sm90 or not (cpu or reference)")  # fmt: skip

# In order: what decides whether the kernel is right comes first.
PARTS: dict[str, tuple[Step, ...]] = {
    "doctor": (Step("doctor", ("-m", "flashmla_hf", "doctor"), 120),),
    "sm90": (
        Step(
            "sm90", (*PARALLEL, *files("sm90", "sm90_refusals", "sm90_boundaries", "sm90_streams", "sanitize_gpu")), 300
        ),
        Step("sm90 backward", (*PARALLEL, *files("sm90_backward", "sm90_backward_streams")), 300),
        # Each of these wants half of the GPU's memory.
        Step("sm90 addresses", (*PYTEST, *files("sm90_addresses", "sm90_backward_addresses")), 240),
        Step("sm90 contract", (*PARALLEL, *files("gpu", "direct", "aten_flash"), "-k", "sm90 or not flex"), 240),
    ),
    "decode": (Step("decode", (*PARALLEL, *DECODE), 400),),
    "latent": (
        Step("latent", (*PARALLEL, *files("latent"), "-k", "sm90"), 400),
        Step("latent on a GPU", (*PARALLEL, *files("sm90_latent")), 200),
    ),
    # Apart: where a test has replaced torch.cuda's functions, torch.compile does not know them later.
    "fp8": (
        Step("fp8", (*PARALLEL, *files("sm90_fp8")), 400),
        Step("fp8 caches", (*PARALLEL, *files("sm90_fp8_decode", "fp8_decode")), 400),
        # Inductor's processes beside those of pytest-xdist would share the cores.
        Step("fp8 compiled", (*PYTEST, *files("sm90_fp8_static")), 300),
        Step("fp8 python", (*PARALLEL, *files("fp8_kernel")), 200),
    ),
    "robust": (
        Step("robust", (*PARALLEL, *files("gpu_robust", "gpu_threads", "gpu_hidden_values")), 400),
        # Each of these wants the GPU's memory, or torch's allocator, to itself.
        Step("robust memory", (*PYTEST, *files("gpu_memory_limits")), 300),
    ),
    "sweep": (Step("sweep", (*PARALLEL, *files("fuzz"), "-k", "sm90"), 300),),
    "hf": (Step("hf", (*PARALLEL, *files("hf_gpu")), 300),),
    "patches": (Step("patches", (*PYTEST, *files("patches_gpu")), 180),),
    "finetune": (Step("finetune", (*PYTEST, *files("finetune_gpu")), 180),),
    "sanitize": (
        # The sanitizer must see an overrun before its silence counts.
        Step("memcheck control", ("tests/sanitize_gpu.py", "--control"), 60, "memcheck", (SANITIZER_ERROR,)),
        *map(sanitizer, SANITIZERS),
    ),
    "flex": (Step("flex", (*PYTEST, *files("gpu"), "-k", "flex", "-m", "not slow"), 420),),
    "bench": (benchmark("bench", "bench_attention"),),
    # Shapes that nobody has tuned for: another seed shows others.
    "bench-random": (benchmark("bench-random", "bench_attention", "--suite", "random", "--name", "attention-random"),),
    "bench-decode": (benchmark("bench-decode", "bench_decode"),),
    "bench-decode-latent": (
        benchmark("bench-decode-latent", "bench_decode", "--suite", "latent", "--name", "decode-latent"),
    ),
    "bench-fp8": (benchmark("bench-fp8", "bench_attention", "--suite", "fp8", "--name", "attention-fp8"),),
    "bench-fp8-cache": (benchmark("bench-fp8-cache", "bench_decode", "--suite", "fp8", "--name", "decode-fp8"),),
    "bench-wide": (benchmark("bench-wide", "bench_attention", "--suite", "wide", "--name", "attention-wide"),),
    "bench-latent-training": (
        benchmark(
            "bench-latent-training", "bench_attention", "--suite", "latent-training", "--name", "attention-latent"
        ),
    ),
    "bench-generate": (benchmark("bench-generate", "bench_generate"),),
    "bench-latent": (benchmark("bench-latent", "bench_latent_decode"),),
    "bench-serving": (benchmark("bench-serving", "bench_serving", "--requests", "64"),),
    "profile": (Step("profile", ("benchmarks/profile_attention.py", "--output_dir", "build/gpu/bench"), 200),),
}
NEED_SM90 = (
    "sm90", "decode", "latent", "fp8", "robust", "sweep", "hf", "finetune", "sanitize", "bench-decode", "bench-decode-latent", "bench-fp8",
    "bench-fp8-cache",
    "bench-wide", "bench-generate", "bench-latent", "bench-latent-training", "bench-serving", "profile",
)  # fmt: skip


def find_sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")


def run(command: list[str], limit: float, log: Path) -> int | None:
    """Runs it, shows and keeps what it prints; its exit code, or ``None`` where it ran into the limit."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "PYTHONUNBUFFERED": "1"}  # fmt: skip
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        deadline, shown = time.monotonic() + limit, 0
        code = None
        while code is None and time.monotonic() < deadline:
            try:
                code = process.wait(0.2)
            except subprocess.TimeoutExpired:
                shown = show(log, shown)
        if code is None:
            os.killpg(process.pid, signal.SIGKILL)  # with its children
            process.wait()
        show(log, shown)
    return code


def show(log: Path, begin: int) -> int:
    with log.open("rb") as file:
        file.seek(begin)
        new = file.read()
    sys.stdout.write(new.decode(errors="replace"))
    sys.stdout.flush()
    return begin + len(new)


def verdict(step: Step, code: int | None, output: str) -> str:
    """passed, FAILED, timed out, or why it says nothing."""
    if step.tool is not None and ("Device not supported" in output or "Unable to find injection" in output):
        return "not run: compute-sanitizer does not work on this machine"
    if code is None:
        return "FAILED: ran into its limit"
    if "--control" in step.arguments and "control: wrote past the end" not in output:
        return "not run: this torch cannot compile the control"
    if code not in step.expected:
        return f"FAILED (exit code {code})"
    if step.tool == "racecheck" and (problem := racecheck_problem(output)):
        return f"FAILED: {problem}"
    if PYTEST[1] in step.arguments and " passed" not in last_line(output):
        return "not run: every test was skipped"
    return "passed"


def racecheck_problem(output: str) -> str | None:
    """What is wrong with the hazards of ``output``; those of the accepted list are not."""
    try:
        new = racecheck.new_hazards(output)
    except ValueError as error:
        return str(error)
    return f"{len(new)} new hazards (python3 tests/racecheck.py says which)" if new else None


def last_line(output: str) -> str:
    lines = [line.strip(" =") for line in output.splitlines() if line.strip(" =")]
    return lines[-1] if lines else ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--time_budget", type=float, default=1800, metavar="S", help="begin nothing after this")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "build" / "gpu", help="default: build/gpu")
    parser.add_argument("--list", action="store_true", help="print the commands of every part and end")
    args = parser.parse_args(arguments)
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}: expected some of {', '.join(PARTS)}")
    if args.list:
        for part, steps in PARTS.items():
            for step in steps:
                tool = f"compute-sanitizer --tool {step.tool} " if step.tool else ""
                print(f"{part:<12} at most {step.limit:>3} s  {tool}python3 {' '.join(step.arguments)}")
        return 0
    import torch

    if not torch.cuda.is_available():
        print("gpu_suite: torch sees no GPU here")
        return 2
    del torch  # this process stays off the GPU
    probe = "import gpu_support; print(gpu_support.sm90_missing() or '')"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    probed = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True, timeout=120)
    missing = probed.stdout.strip() or ("" if probed.returncode == 0 else last_line(probed.stderr))

    args.output_dir.mkdir(parents=True, exist_ok=True)
    started, summary = time.monotonic(), []
    for part in args.parts or PARTS:
        for step in PARTS[part]:
            left = args.time_budget - (time.monotonic() - started)
            tool = find_sanitizer() if step.tool else None
            if left < 5:
                summary.append((step.name, 0.0, "FAILED: no time was left", ""))
                continue
            if part in NEED_SM90 and missing:
                # On another GPU that is as it should be; on Hopper the library ought to be there.
                outcome = "not run" if missing == "not a Hopper GPU" else "FAILED"
                summary.append((step.name, 0.0, f"{outcome}: {missing}", ""))
                continue
            if step.tool and tool is None:
                summary.append((step.name, 0.0, "not run: there is no compute-sanitizer here", ""))
                continue
            prefix = [tool, "--tool", step.tool, "--error-exitcode", str(SANITIZER_ERROR)] if step.tool else []
            print(f"\n==== {step.name}", flush=True)
            begun = time.monotonic()
            log = args.output_dir / f"{step.name.replace(' ', '-')}.log"
            code = run([*prefix, sys.executable, *step.arguments], min(step.limit, left), log)
            output = log.read_text(errors="replace")
            summary.append((step.name, time.monotonic() - begun, verdict(step, code, output), last_line(output)))

    print(f"\n{'step':<17}{'seconds':>8}  result")
    for name, seconds, result, line in summary:
        print(f"{name:<17}{seconds:>8.1f}  {result}  |  {line[:90]}")
    failed = [name for name, _, result, _ in summary if result.startswith("FAILED")]
    print(f"{len(failed)} of {len(summary)} steps failed" + (f": {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
