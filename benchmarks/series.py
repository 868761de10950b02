"""A benchmark of shapes, peers and modes as a program: its arguments, what a run still has to measure, and the run itself."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import records
import render_results
import torch
import verdicts
from shapes import DTYPES, Suite
from timing import copy_bandwidth, free
from tqdm import tqdm

from flashmla_hf.training import machine
from flashmla_hf.training.options import at_least


@dataclass(frozen=True)
class Job:
    shape: object  # Shape or DecodeShape
    peers: dict[str, list[str]]  # of each mode


@dataclass(frozen=True)
class Benchmark:
    """What one program measures. Dictionaries without a further word are by device, "cpu" or "cuda"."""

    program: str
    kind: str  # begins the name of its JSON file
    suites: dict[str, Suite]  # by name
    default_suites: dict[str, tuple[str, ...]]
    peers: Iterable[str]
    default_peers: dict[str, tuple[str, ...]]
    modes: tuple[str, ...]
    default_modes: dict[str, tuple[str, ...]]
    shape: type  # with parse(text), the inverse of str
    example: str  # of a shape's text
    measure: Callable[[Job, str, int, float], list[dict]]  # of a job, a device, repeats and seconds: records
    ceilings: Callable[[str, list], dict]  # of a device and all shapes of the file: what results are held against
    bars: Callable[[dict], Iterable[verdicts.Bar]]
    summary: Callable[[list[dict]], list[str]]  # of new records: lines for the terminal
    report: Callable[[dict], list[str]] = lambda document: []  # of the whole file at the end: more lines
    prepare: Callable[[list[Job], str], None] = lambda jobs, device: None  # before anything is measured

    def parser(self, description: str) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--device", choices=("cpu", "cuda"), default=machine.default_device())
        parser.add_argument("--suite", nargs="+", choices=list(self.suites), help="named shapes; default: the device's")
        if any(suite.draw for suite in self.suites.values()):
            parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the suite random (default: 0)")
            parser.add_argument(
                "--shapes", type=at_least(1), default=20, metavar="N", help="of the suite random (default: 20)"
            )
        parser.add_argument("--shape", nargs="+", metavar="SHAPE", help=f"own shapes, e.g. '{self.example}'")
        parser.add_argument("--dtype", choices=list(DTYPES), help="instead of each shape's own")
        names = list(self.peers)
        parser.add_argument("--peers", nargs="+", choices=names, metavar="PEER", help=f"of {', '.join(names)}")
        gpu, cpu = (" ".join(self.default_modes[device]) for device in ("cuda", "cpu"))
        parser.add_argument(
            "--directions",
            nargs="+",
            choices=self.modes,
            metavar="MODE",
            help=f"of {', '.join(self.modes)}; default: the suite's own, else {gpu} on a GPU, {cpu} on a CPU",
        )
        parser.add_argument("--repeats", type=int, default=10, help="turns per peer at least (default: 10)")
        parser.add_argument(
            "--seconds",
            type=float,
            metavar="S",
            help="per peer, shape and mode, about (default: 0.2 on a GPU, 1 on a CPU)",
        )
        parser.add_argument("--time_budget", type=float, metavar="S", help="begin no shape after this many seconds")
        parser.add_argument("--name", help=f"name of the JSON file; default: {self.kind}-DEVICE")
        parser.add_argument("--resume", action="store_true", help="keep the file's records, measure only what it lacks")
        parser.add_argument("--output_dir", type=Path, default=records.RESULTS, help="default: benchmarks/results")
        parser.add_argument("--list", action="store_true", help="print the shapes of every suite and end")
        records.add_dirty_option(parser)
        return parser

    def jobs(self, args: argparse.Namespace, earlier: list[dict]) -> list[Job]:
        """The measurements that the arguments name and ``earlier`` records lack. Suites may share shapes: each is measured
        once."""
        chosen = [(shapes_of(suite, args), suite) for suite in map(self.suites.get, args.suite or ())]
        if args.shape:
            chosen.append(([self.shape.parse(text) for text in args.shape], None))
        elif not args.suite:
            chosen = [(suite.shapes, suite) for suite in map(self.suites.get, self.default_suites[args.device])]
        asked: dict[object, dict[str, list[str]]] = {}
        for shapes, suite in chosen:
            peers = args.peers or (suite and suite.peers) or self.default_peers[args.device]
            for shape in shapes:
                if args.dtype:
                    shape = dataclasses.replace(shape, dtype=args.dtype)
                for mode in args.directions or (suite and suite.modes) or self.default_modes[args.device]:
                    mine = asked.setdefault(shape, {}).setdefault(mode, [])
                    mine += [peer for peer in peers if peer not in mine]
        result = []
        for shape, modes in asked.items():
            mine = [r for r in earlier if r["shape"] == str(shape)]
            have = {(r["peer"], r["mode"]) for r in mine}
            missing = {}
            for mode, peers in modes.items():
                if not all((peer, mode) in have or (peer, None) in have for peer in peers):
                    # Peers are compared within one series of turns only: those that were there before run again.
                    missing[mode] = list(dict.fromkeys([r["peer"] for r in mine if r["mode"] == mode] + peers))
            if missing:
                result.append(Job(shape, missing))
        return result

    def document(self, device: str, todo: list[Job], resumed: dict) -> dict:
        """The file before the first shape; ``resumed`` is the one that is gone on with."""
        earlier = resumed["records"]
        environment = records.describe(device)
        return {
            "kind": self.kind,
            "environment": environment,
            "driver": environment.get("driver"),
            **self.ceilings(device, [job.shape for job in todo] + [self.shape.parse(r["shape"]) for r in earlier]),
            "copy_bytes_per_second": copy_bandwidth(device),
            "orders": resumed.get("orders"),  # of the peers' turns; files from before there was a choice have none
            "records": earlier,
            "skipped": [],
        }

    def run(self, args: argparse.Namespace) -> None:
        """Measures, and after every shape writes the file; ends the program if a result was wrong."""
        if args.list:
            for name, suite in self.suites.items():
                print(name, *(f"  {shape}" for shape in shapes_of(suite, args)), sep="\n")
            return
        if args.device == "cuda" and not torch.cuda.is_available():
            sys.exit(f"{self.program}: --device cuda: torch sees no GPU here")
        records.refuse_dirty_tree(self.program, args.output_dir, args.allow_dirty)
        name = args.name or f"{self.kind}-{records.slug(machine.device_name(args.device))}"
        path = args.output_dir / f"{name}.json"
        resumed = {"records": [], "orders": "balanced"}
        if args.resume and path.exists():
            resumed = json.loads(path.read_text())
        try:
            todo = self.jobs(args, resumed["records"])
        except ValueError as error:
            sys.exit(f"{self.program}: --shape: {error}")
        seconds = args.seconds or (0.2 if args.device == "cuda" else 1.0)

        started = time.monotonic()
        document = self.document(args.device, todo, resumed)
        if any(self.suites[suite].draw for suite in args.suite or ()):
            document["seeds"] = sorted({*resumed.get("seeds", ()), args.seed})
        self.prepare(todo, args.device)
        free(args.device)
        wrong = []
        bar = tqdm(todo, unit="shape", desc="measuring")
        for job in bar:
            bar.set_postfix_str(str(job.shape))
            left = None if args.time_budget is None else args.time_budget - (time.monotonic() - started)
            if left is not None and left <= 0:
                document["skipped"].append(str(job.shape))
            else:
                results = self.measure(job, args.device, args.repeats, seconds)
                document["records"] = merge(document["records"], results)
                wrong += [r for r in results if r["status"] == "wrong"]
                for line in self.summary(results):
                    bar.write(line)
            records.write_json(document, path)
        document["environment"]["clocks_at_end"] = machine.clocks(args.device)
        records.write_json(document, path)
        if document["skipped"]:
            print(f"not measured, --time_budget {args.time_budget:.0f} s was used up: {'; '.join(document['skipped'])}")
        for line in [*self.report(document), *verdicts.lines(self.bars(document))]:
            print(line)
        table = render_results.write(args.output_dir)
        print(f"written in {time.monotonic() - started:.0f} s: {path} and {table}")
        if wrong:
            first = wrong[0]
            sys.exit(
                f"{self.program}: WRONG RESULTS, not timed: {first['peer']} at {first['shape']}: {first['reason']}"
            )


def shapes_of(suite: Suite, args: argparse.Namespace) -> list:
    return suite.shapes if suite.draw is None else suite.draw(args.seed, args.shapes, args.device)


def merge(earlier: list[dict], new: list[dict]) -> list[dict]:
    """The new records, and those earlier ones they do not replace."""
    replaced = {(r["shape"], r["mode"]) for r in new}
    refused = {(r["shape"], r["peer"]) for r in new}
    return [
        r
        for r in earlier
        if (r["shape"], r["mode"]) not in replaced and not (r["mode"] is None and (r["shape"], r["peer"]) in refused)
    ] + new
