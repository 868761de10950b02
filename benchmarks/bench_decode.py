"""Attention of a few queries to long caches, beside its peers: GB/s of K and V, and ratios to peers and to the memory.

    python benchmarks/bench_decode.py                                      # this machine's suites
    python benchmarks/bench_decode.py --suite table --peers flashmla sdpa-cudnn sdpa-flash
    python benchmarks/bench_decode.py --suite paged ragged --resume        # into the same file
    python benchmarks/bench_decode.py --shape "d128 B8 H32/8 S1/8192 paged64 bf16"
    python benchmarks/bench_decode.py --check                              # results against float64, no timing
    python benchmarks/bench_decode.py --list                               # the shapes of each suite

How it measures. "graph": a CUDA graph of 20 calls or more, replayed; seconds of a replay over its calls. The host has no
part in it, as in a compiled or captured decoding step. Each call has the next of as many copies of K and V as hold 400 MB,
so that the L2 cache answers for none of them. Peers take turns, graph by graph, in orders in which each comes after every
other as often (bench_attention.py says more). "host": the time until an asynchronous call returns, 100 calls back to back.
On a CPU "graph" is a series of plain calls.

No number without a right answer: every implementation's output is compared with attention in float64 (decode_check.py). A
wrong one is named and not timed.

GB/s are the bytes of K and V that some query sees, each once, over the time; queries and output are left out. Rows of latents
("latent576/512") are keys and, in their first columns, values: they count once, and both products' TFLOP/s stand beside. Two
rates of the machine stand beside them, of the same run: a copy of 1 GiB, its bytes read and written both counted, and a
reduction of 1 GiB, which only reads, as decoding does. Windows are named by the keys to the left of a query's own.
"""

from __future__ import annotations

import argparse
import math
import statistics

import decode_results
import render_results
import torch
from decode_check import ROTATED_BYTES, Inputs, expected, verdict
from decode_peers import DEFAULT_PEERS, PEERS
from decode_results import LARGE
from decode_shapes import DEFAULT_SUITES, MODES, SUITES, TABLE, DecodeShape
from peers import Unsupported
from series import Benchmark, Job
from timing import Timed, free, gpu_state, interleaved, read_bandwidth, rotation, short_copy_seconds, spread

from flashmla_hf.training.arguments import first_line

CALLS = {"cuda": 20, "cpu": 1}  # of a graph, at least


@torch.no_grad()
def measure_shape(job: Job, device: str, repeats: int, seconds: float, is_timed: bool = True) -> list[dict]:
    """One record per peer and mode: seconds, spread, bytes per second and errors, or why there are none."""
    shape: DecodeShape = job.shape
    results, runs, errors_of = [], {}, {}

    def refuse(peer: str, status: str, reason: str) -> None:
        results.append({"shape": str(shape), "peer": peer, "mode": None, "status": status, "reason": reason})

    try:
        inputs = Inputs.random(shape, device)
        truth = expected(shape, inputs)
    except torch.OutOfMemoryError:
        for name in dict.fromkeys(name for peers in job.peers.values() for name in peers):
            refuse(name, "out_of_memory", "the GPU's memory does not hold the cache")
        free(device)
        return results
    for name in dict.fromkeys(name for peers in job.peers.values() for name in peers):
        try:
            peer = PEERS[name](shape, inputs, device)
            problem, errors_of[name] = verdict(shape, peer, inputs, truth)
            if problem is None:
                runs[name] = peer
            else:
                refuse(name, "wrong", problem)
        except Unsupported as error:
            refuse(name, "unsupported", str(error))
        except Exception as error:  # a peer's refusal can be any exception; it is recorded, and the others go on
            refuse(name, "unsupported", first_line(error)[:200])
        free(device)
    if not is_timed:
        return results

    count = len(inputs.caches) * math.ceil(CALLS[device] / len(inputs.caches))
    for mode, peers in job.peers.items():
        calls, state, in_a_turn = {}, {}, count if mode == "graph" else 1
        for name in [name for name in peers if name in runs]:
            mine = inputs.calls(runs[name])
            try:
                if mode == "graph":
                    calls[name] = rotation(runs[name], mine, count, device)
                else:
                    calls[name] = Timed(runs[name], mine[0])
            except Exception as error:  # as above: what cannot be captured, say
                refuse(name, "unsupported", f"{mode}: {first_line(error)[:200]}")
        halfway = lambda state=state: state.update(gpu_state(device))  # noqa: E731
        for name, turns in interleaved(calls, device, mode, repeats, seconds, halfway).items():
            times = [turn / in_a_turn for turn in turns]
            record = {
                "shape": str(shape),
                "peer": name,
                "mode": mode,
                "status": "ok",
                "seconds": statistics.median(times),
                "spread": spread(times),
                "turns": len(times),
                "errors": errors_of[name],
                **state,
            }
            if mode == "graph":
                record |= {
                    "copies": len(inputs.caches),
                    "calls": count,
                    "bytes": shape.bytes_read(name == "flashmla-fp8"),
                }
                record["bytes_per_second"] = record["bytes"] / record["seconds"]
                if shape.is_latent:
                    record["flops_per_second"] = shape.flops() / record["seconds"]
            results.append(record)
        calls.clear()
        free(device)
    return results


def _ceilings(device: str, shapes: list[DecodeShape]) -> dict:
    """What the machine's memory gives, beside a copy: at length, and to copies of as many bytes as rows of the table read."""
    sizes = sorted({shape.bytes_read() for shape in shapes if shape in TABLE and shape.bytes_read() >= LARGE})
    return {
        "read_bytes_per_second": read_bandwidth(device),
        "copy_seconds_of_bytes": {
            str(size): short_copy_seconds(device, size, ROTATED_BYTES[device], CALLS[device]) for size in sizes
        },
    }


def summary(results: list[dict]) -> list[str]:
    lines = []
    for r in results:
        head = f"{r['shape']:<44} {r['peer']:<18}"
        if r["status"] != "ok":
            lines.append(f"{head} {r['status'].replace('_', ' ')}: {r['reason']}")
        else:
            rate = f", {r['bytes_per_second'] / 1e9:,.0f} GB/s" if "bytes_per_second" in r else ""
            rate += f", {render_results.rate(r['flops_per_second'])}" if "flops_per_second" in r else ""
            lines.append(f"{head} {r['mode']:<6}{r['seconds'] * 1e6:9.1f} µs ±{100 * r['spread']:.0f} %{rate}")
    return lines


BENCHMARK = Benchmark(
    program="bench_decode",
    kind="decode",
    suites=SUITES,
    default_suites=DEFAULT_SUITES,
    peers=PEERS,
    default_peers=DEFAULT_PEERS,
    modes=MODES,
    default_modes={"cpu": ("graph",), "cuda": ("graph",)},
    shape=DecodeShape,
    example="d128 B8 H32/8 S1/8192 paged64 bf16",
    measure=measure_shape,
    ceilings=_ceilings,
    bars=decode_results.bars,
    summary=summary,
)


def check_only(args: argparse.Namespace) -> int:
    """Compares every peer with float64 and times nothing; the number of wrong ones."""
    wrong = checked = 0
    for job in BENCHMARK.jobs(args, []):
        for line in summary(results := measure_shape(job, args.device, 0, 0.0, is_timed=False)):
            print(line, flush=True)
        wrong += sum(r["status"] == "wrong" for r in results)
        checked += len({name for peers in job.peers.values() for name in peers}) - len(results)
    print(f"{checked} results are right, {wrong} are wrong")
    return wrong


def main(argv: list[str] | None = None) -> None:
    parser = BENCHMARK.parser(__doc__)
    parser.add_argument("--check", action="store_true", help="compare results with float64, time and write nothing")
    args = parser.parse_args(argv)
    if args.check and not args.list:
        raise SystemExit(1 if check_only(args) else 0)
    BENCHMARK.run(args)


if __name__ == "__main__":
    main()
