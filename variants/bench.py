"""Checks and times variants of the head-dim-512 kernels: bench.py [NAME[:SWITCH...]...].

libflashmla_sm90.NAME.so lie beside this file. Switches of a variant library: `fwd` takes the old forward, `dq` the new kernel
of dQ (without it the old one). Each variant runs in a process of its own, with a time limit (D512_LIMIT, 80 s), on a copy of
the package below FLASHMLA_ROOT. Exit status 1 if one is wrong or hangs.
"""
import json, os, shutil, subprocess, sys, tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = Path(os.environ.get("FLASHMLA_ROOT", HERE.parent))
LIMIT = int(os.environ.get("D512_LIMIT", "80"))

WORKER = r'''
import sys, time, json
import torch
sys.path.insert(0, sys.argv[1])
import numerics
from cases import Case
from flashmla_hf.dispatch import attention
import flashmla_hf
from flashmla_hf import libraries
assert "sm90" not in libraries.unavailable, libraries.unavailable
what = sys.argv[2]
B = {"heads_q": 4, "heads_kv": 2, "head_dim_qk": 512}
CASES = [
    Case("causal 128", seqlen_q=128, is_causal=True, **B),
    Case("full 333", batch=2, seqlen_q=333, **B),
    Case("causal 1000", batch=2, seqlen_q=1000, is_causal=True, **B),
    Case("causal 1023x1024", seqlen_q=1023, seqlen_kv=1024, is_causal=True, **B),
    Case("masked rows", batch=2, seqlen_q=390, seqlen_kv=137, is_causal=True, **B),
    Case("prefill", seqlen_q=60, seqlen_kv=390, is_causal=True, heads_q=16, heads_kv=2, head_dim_qk=512),
    Case("group 7", seqlen_q=70, seqlen_kv=300, is_causal=True, heads_q=7, heads_kv=1, head_dim_qk=512),
    Case("group 5", seqlen_q=30, seqlen_kv=500, is_causal=True, heads_q=5, heads_kv=1, head_dim_qk=512),
    Case("one key", seqlen_q=90, seqlen_kv=1, **B),
    Case("dims 264/504", seqlen_q=203, seqlen_kv=113, heads_q=4, heads_kv=2, head_dim_qk=264, head_dim_v=504),
    Case("softcap", seqlen_q=300, is_causal=True, softcap=20.0, **B),
    Case("sinks", seqlen_q=300, is_causal=True, has_sinks=True, **B),
    Case("outliers", seqlen_q=500, is_causal=True, outliers=10.0, **B),
    Case("packed", seqlens_q=(1, 300, 0, 129, 64), is_causal=True, rest_q=3, rest_kv=2, **B),
    Case("packed group 6", seqlens_q=(40, 30, 0, 29), seqlens_kv=(200, 30, 7, 129), is_causal=True, heads_q=6, heads_kv=1, head_dim_qk=512),
    Case("many tiles", batch=3, seqlen_q=2100, is_causal=True, heads_q=4, heads_kv=1, head_dim_qk=512),
]
if what == "check":
    bad = 0
    for case in CASES:
        try:
            numerics.check("sm90", case, torch.bfloat16, "cuda")
            print("ok   ", case.name, flush=True)
        except Exception as e:
            bad += 1
            print("WRONG", case.name, str(e).splitlines()[0][:300], flush=True)
            if "CUDA error" in str(e): break
    # the same bits every time
    q, k, v = (torch.randn(1, 3000, h, 512, device="cuda", dtype=torch.bfloat16) for h in (16, 2, 2))
    first = attention(q, k, v, is_causal=True, impl="sm90", return_lse=True)
    for _ in range(20):
        again = attention(q, k, v, is_causal=True, impl="sm90", return_lse=True)
        if not (torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])):
            bad += 1; print("WRONG other bits in a repeated call", flush=True); break
    sys.exit(bad > 0)
n, hq, hk, d = 8192, 16, 2, 512
torch.manual_seed(0)
q, k, v = (torch.randn(1, n, h, d, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (hq, hk, hk))
do = torch.randn(1, n, hq, d, device="cuda", dtype=torch.bfloat16)
def timed(f, reps=10):
    for _ in range(3): f()
    torch.cuda.synchronize(); ts = []
    for _ in range(reps):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record(); f(); b.record(); torch.cuda.synchronize(); ts.append(a.elapsed_time(b))
    return sorted(ts)[len(ts) // 2]
out = {}
for causal in (True, False):
    flops = 4 * n * n * d * hq * (0.5 if causal else 1)
    with torch.no_grad(): t = timed(lambda: attention(q, k, v, is_causal=causal, impl="sm90"))
    o = attention(q, k, v, is_causal=causal, impl="sm90")
    tb = timed(lambda: torch.autograd.grad(o, (q, k, v), do, retain_graph=True))
    name = "causal" if causal else "full"
    print(f"{name}: forward {t:.3f} ms {flops/t/1e9:.0f} TFLOP/s, backward {tb:.3f} ms {2.5*flops/tb/1e9:.0f} TFLOP/s", flush=True)
    if causal:
        from torch.profiler import profile, ProfilerActivity
        with profile(activities=[ProfilerActivity.CUDA]) as p:
            for _ in range(3): torch.autograd.grad(o, (q, k, v), do, retain_graph=True)
            torch.cuda.synchronize()
        for e in sorted(p.key_averages(), key=lambda e: -e.device_time_total)[:4]:
            print(f"   {e.device_time_total/e.count/1e3:.3f} ms  {e.key[:70]}", flush=True)
'''

def run(what, name):
    print(f"==== {what} {name}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "flashmla_hf"
        shutil.copytree(ROOT / "flashmla_hf", package, ignore=shutil.ignore_patterns("*.so", "_build.json"))
        lib, *switches = name.split(":")
        shutil.copy(HERE / f"libflashmla_sm90.{lib}.so", package / "libflashmla_sm90.so")
        shutil.copy(HERE / "_build.json", package)
        worker = Path(folder) / "worker.py"
        worker.write_text(WORKER)
        env = {**os.environ, "PYTHONPATH": folder, **{f"FLASHMLA_D512_{switch.upper()}": "1" for switch in switches}}
        try:
            status = subprocess.run([sys.executable, str(worker), str(ROOT / "tests"), what], env=env, cwd=folder, timeout=LIMIT).returncode
        except subprocess.TimeoutExpired:
            print(f"HANGS {what} {name}: ended after {LIMIT} s", flush=True)
            return False
    if status != 0: print(f"FAILED {what} {name}: exit status {status}", flush=True)
    return status == 0

def main():
    names = sys.argv[1:] or ["v3:fwd", "v3", "v3:dq", "base"]
    good = True
    for name in names:
        if name != "base": good &= run("check", name)
        good &= run("time", name)
    sys.exit(not good)

main()
