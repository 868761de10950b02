"""Times and checks builds of the fp8 forward: `python variants/measure.py 0 1 1:2 1:0 2 ...` from the repository's root.

`n` is variants_xz/n.so.xz (0: the library that lies in flashmla_hf), `n:t` the same with FLASHMLA_FP8_TURNS=t. Each in a process of
its own, which first checks (a broken rule ends it with FAILED), then times. Overwrites flashmla_hf/libflashmla_sm90.so, and puts it
back.
"""

import lzma
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "flashmla_hf" / "libflashmla_sm90.so"


def worker() -> None:
    import math

    import torch

    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from flashmla_hf import attention

    def normal(*shape, seed=0, dtype=torch.bfloat16):
        return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)

    def rms(x):
        return x.double().pow(2).mean().sqrt().item()

    def fp8(q, k, v, impl=None, **options):
        return attention(q, k, v, precision="fp8", return_lse=True, impl=impl, **options)

    failures, worst, count, step = [], 0.0, 0, int(os.environ.get("CHECK_STEP", "1"))
    cases = [
        (1, 1, 1, 1, 1), (1, 3, 3, 2, 1), (2, 113, 203, 4, 2), (1, 1023, 1024, 2, 2), (2, 1000, 1000, 4, 1), (1, 300, 1100, 2, 2),
        (1, 1100, 300, 3, 1), (2, 129, 640, 8, 1), (1, 2049, 2049, 2, 1),
    ]  # fmt: skip
    for dim in (128, 64, 96, 40):
        for dtype in (torch.bfloat16, torch.float16):
            for n, (batch, seqlen_q, seqlen_kv, heads_q, heads_kv) in enumerate(cases):
                for options in ({}, {"is_causal": True}, {"window": (129, 0)}, {"window": (50, 300)}, {"softcap": 20.0}, {"scale": -0.05}):
                    count += 1
                    if count % step:
                        continue
                    q = normal(batch, seqlen_q, heads_q, dim, seed=n, dtype=dtype)
                    k, v = (normal(batch, seqlen_kv, heads_kv, dim, seed=n + s, dtype=dtype) for s in (1, 2))
                    k[:, 130:140] *= 4
                    v[:, 200:210] *= 64
                    out, lse = fp8(q, k, v, **options)
                    want, want_lse = fp8(q, k, v, "reference", **options)
                    exact = attention(q.double(), k.double(), v.double(), impl="reference", **options)
                    finite = want_lse.isfinite()
                    lse_off = (lse - want_lse)[finite].abs().max().item() if finite.any() else 0.0
                    off, err = rms(out.double() - want.double()), rms(want.double() - exact)
                    allowed = 0.35 * err + 4 * torch.finfo(dtype).eps * (rms(exact) + 1e-6)
                    worst = max(worst, off / max(allowed, 1e-30))
                    if not (torch.equal(lse.isfinite(), finite) and off <= allowed and lse_off <= 0.02):
                        failures.append(f"{dim} {dtype} {cases[n]} {options}: {off:.2e}, allowed {allowed:.2e}, lse {lse_off:.2e}")
    for name in "qkv":
        for value in (math.nan, math.inf, -math.inf):
            for column in range(296, 304):
                x = {"q": normal(1, 400, 2, 128), "k": normal(1, 400, 2, 128, seed=1), "v": normal(1, 400, 2, 128, seed=2)}
                x[name][0, column, 1, 3] = value
                poisoned = fp8(**x, is_causal=True)[0].isnan().any(-1)[0]
                seen = slice(column, column + 1) if name == "q" else slice(column, None)
                hidden = {"q": slice(column + 1, None), "k": slice(0, column), "v": slice(0, 256 - 63)}[name]
                if not poisoned[seen, 1].all() or poisoned[:, 0].any() or poisoned[hidden, 1].any():
                    failures.append(f"not finite: {name} {value} {column}")
    for magnitude in (1e-30, 1e15):
        q, k, v = normal(1, 300, 2, 128) / magnitude, normal(1, 300, 2, 128, seed=1) * magnitude, normal(1, 300, 2, 128, seed=2) * magnitude
        out, want = fp8(q, k, v)[0], fp8(q, k, v, "reference")[0]
        if not rms(out.double() / magnitude - want.double() / magnitude) < 0.02 * rms(want.double() / magnitude):
            failures.append(f"magnitude {magnitude}")
    if failures:
        print(f"  FAILED: {len(failures)} checks\n   ", "\n    ".join(failures[:12]))
    else:
        print(f"  checks passed, worst {worst:.2f} of what is allowed")

    from torch.profiler import ProfilerActivity, profile

    for dim, heads in ((128, 16), (64, 32)):
        q, k, v = (normal(1, 16384, heads, dim, seed=n) for n in range(3))
        for is_causal in (False, True):
            flops = 4 * 16384**2 * heads * dim / (2 if is_causal else 1)
            line = f"  d{dim} {'causal' if is_causal else 'full  '}"
            for precision in ("fp8", None):
                options = {"precision": "fp8"} if precision else {}

                def call():
                    return attention(q, k, v, is_causal=is_causal, **options)

                for _ in range(3):
                    call()
                times = []
                for _ in range(20):
                    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    begin.record()
                    call()
                    end.record()
                    torch.cuda.synchronize()
                    times.append(begin.elapsed_time(end))
                times.sort()
                with profile(activities=[ProfilerActivity.CUDA]) as record:
                    for _ in range(5):
                        call()
                    torch.cuda.synchronize()
                parts = {}
                for event in record.key_averages():
                    for part in ("quantize_queries", "quantize_keys", "quantize", "fp8_forward", "forward_kernel"):
                        if part in event.key:
                            time = getattr(event, "device_time_total", 0) or getattr(event, "cuda_time_total", 0)
                            parts[part] = parts.get(part, 0) + time / 5
                            break
                line += f" | {'fp8 ' if precision else 'bf16'} {times[10]:.3f} ms = {flops / times[10] / 1e9:.0f} TFLOP/s (" + ", ".join(
                    f"{part} {time:.0f} us" + (f" = {flops / time / 1e6:.0f}" if "forward" in part else "") for part, time in parts.items()
                ) + ")"
            print(line, flush=True)
    sys.exit(bool(failures))


def main() -> None:
    if sys.argv[1:] == ["--worker"]:
        worker()
    kept = LIBRARY.with_suffix(".kept")
    shutil.copy(LIBRARY, kept)
    failed, checked = [], {"0"}
    subprocess.run([str(ROOT / "variants" / "micro")], check=False)
    try:
        for name in sys.argv[1:]:
            variant, _, turns = name.partition(":")
            LIBRARY.unlink(missing_ok=True)
            if variant == "0":
                shutil.copy(kept, LIBRARY)
            else:
                packed = ROOT / "variants_xz" / f"{variant}.so.xz"
                if not packed.exists():
                    print(f"variant {variant} is not built")
                    continue
                LIBRARY.write_bytes(lzma.decompress(packed.read_bytes()))
            clocks = subprocess.run(["nvidia-smi", "--query-gpu=name,clocks.sm,power.draw", "--format=csv,noheader"],
                                    capture_output=True, text=True, check=False).stdout.strip()  # fmt: skip
            print(f"variant {name} ({clocks})", flush=True)
            environment = os.environ | ({"FLASHMLA_FP8_TURNS": turns} if turns else {})
            environment["CHECK_STEP"] = "7" if variant in checked else "1"  # whole once a variant
            checked.add(variant)
            try:
                code = subprocess.run([sys.executable, __file__, "--worker"], env=environment, timeout=120, check=False).returncode
            except subprocess.TimeoutExpired:
                code = "hang"
            if code:
                failed.append(f"{name} ({code})")
    finally:
        LIBRARY.unlink(missing_ok=True)
        kept.rename(LIBRARY)
    if failed:
        sys.exit(f"FAILED: {', '.join(failed)}")


main()
