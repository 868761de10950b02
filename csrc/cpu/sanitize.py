"""Builds csrc/cpu with AddressSanitizer and UBSan and runs sanitize.cpp: `make sanitize` (a minute or two on two cores).

Every source is compiled with its own instruction-set flags from sources.json, as setup.py does for the library.
"""

import json
import os
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitize"
SANITIZERS = "-fsanitize=address,undefined"
FLAGS = ["-O1", "-g1", "-std=c++17", "-ffp-contract=fast", SANITIZERS, "-fno-sanitize-recover=undefined",
         "-fno-omit-frame-pointer", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # fmt: skip


def main() -> None:
    cxx = os.environ.get("CXX", "g++")
    table = json.loads((ROOT / "csrc/cpu/sources.json").read_text())
    # ops_cpu.cpp is the only source that sees torch: the driver takes its place.
    jobs = [("csrc/cpu/sanitize.cpp", [])] + [
        (row["file"], row["flags"])
        for row in table["sources"]
        if row["arch"] in (None, platform.machine()) and row["file"] != "csrc/ops_cpu.cpp"
    ]
    BUILD.mkdir(parents=True, exist_ok=True)

    def compile_one(job: tuple[str, list[str]]) -> str:
        source, flags = job
        target = str(BUILD / f"{Path(source).stem}.o")
        subprocess.run([cxx, *FLAGS, *flags, f"-I{ROOT / 'csrc'}", "-c", str(ROOT / source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, jobs))
    program = str(BUILD / "sanitize")
    subprocess.run([cxx, SANITIZERS, *objects, "-o", program, "-lpthread"], check=True)
    subprocess.run([program], check=True)


if __name__ == "__main__":
    main()
