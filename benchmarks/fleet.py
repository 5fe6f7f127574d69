# SPDX-License-Identifier: Apache-2.0
"""Measure a fleet of captures of about 10 MB with one and with two workers: time, CPU, memory. Needs no root.

    .venv/bin/python -m benchmarks.fleet --captures 1000

Four captures are generated; the others are hard links to their files. Each measurement is a separate process.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np

from benchmarks.common import BenchmarkResults, Values, folder, options, size
from benchmarks.reading import SECONDS, requests, resets
from cwndtrace.records import arrow
from cwndtrace.store import CaptureWriter
from cwndtrace.store.writer import PART_ROWS

_DISTINCT = 4
_REQUESTS = 550_000
_RESETS = 4_000
_WANTED = {
    "2 workers / 1 worker": "at most 0.6, on two CPUs that are idle otherwise",
    "memory of the driver, for each further capture": "grows with connections, not with bytes",
}


def make(path: Path, seed: int) -> None:
    """Write a capture of about 10 MB: block requests, and resets of two hundred connections."""
    rng = np.random.default_rng(seed)
    clocks = {
        "start": {"mono_ns": 0, "utc_offset_ns": 10**18},
        "end": {"mono_ns": SECONDS * 10**9, "utc_offset_ns": 10**18},
    }
    meta = {"host": f"host{seed}", "clock": clocks, "devices": {"8:0": "sda", "8:16": "sdb", "259:0": "nvme0n1"}}
    counts = {"block_io": {"kept": _REQUESTS, "lost": 0}, "cwnd_reset": {"kept": _RESETS, "lost": 0}}
    writer = CaptureWriter.create(path, {**meta, "counts": counts})
    writer.add("cwnd_reset", arrow.to_arrow("cwnd_reset", resets(_RESETS, rng), 10**18))
    for since, until in pairwise([*range(0, _REQUESTS, PART_ROWS), _REQUESTS]):
        share = SECONDS / _REQUESTS
        rows = requests(until - since, since * share, until * share, rng)
        writer.add("block_io", arrow.to_arrow("block_io", rows, 10**18))
        writer.flush()
    writer.close()


def fleet(place: Path, captures: int) -> None:
    """Make so many captures below ``place``, of a host each."""
    made = [place.with_name(f"{seed}.cwnd") for seed in range(_DISTINCT)]
    for seed, path in enumerate(made):
        if not path.exists():
            make(path, seed)
    for number in range(captures):
        shutil.copytree(made[number % _DISTINCT], place / f"host=h{number:05}" / "a.cwnd", copy_function=os.link)


def once(place: str, result: str, workers: str) -> None:
    """Compute a result and print what it took. This is the process that is measured."""
    from cwndtrace.fleet.result import compute

    begin = time.monotonic()
    made = compute([place], Path(result), workers=int(workers))
    took = time.monotonic() - begin
    computed = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = {name: len(frame) for name, frame in made.frames().named().items()}
    own, inner = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    figures = {
        "s": took, "cpu": inner.ru_utime + inner.ru_stime, "driver cpu": own.ru_utime + own.ru_stime,
        "driver MB": computed / 1e3, "with frames MB": own.ru_maxrss / 1e3, "worker MB": inner.ru_maxrss / 1e3,
        "failed": int((made.captures["status"] != "ok").sum()), "connections": rows["connections"],
    }  # fmt: skip
    print(json.dumps(figures))


def measured(place: Path, result: Path, workers: int) -> dict[str, float]:
    """Run ``once`` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.fleet", "once", str(place), str(result), str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    shutil.rmtree(result)
    figures: dict[str, float] = json.loads(done.stdout)
    assert not figures["failed"]
    return figures


def main() -> None:
    """Run the benchmark and write its report."""
    asked = options(__doc__, captures=(40, "number of captures"))
    report = BenchmarkResults("fleet", _WANTED)
    with folder() as place:
        fleet(place / "all", asked.captures)
        fleet(place / "few", asked.captures // 4)
        report.add("bytes of a capture", size(place / "0.cwnd") / 1e6, "MB")
        few = measured(place / "few", place / "result", 1)
        runs: dict[int, list[dict[str, float]]] = {1: [], 2: []}
        for _ in range(asked.rounds):
            for workers, done in runs.items():
                done.append(measured(place / "all", place / "result", workers))
        for workers, done in runs.items():
            for what, key, unit in (
                ("time", "s", "s"), ("CPU of the workers", "cpu", "s"), ("CPU of the driver", "driver cpu", "s"),
                ("memory of the driver", "driver MB", "MB"), ("the same with all frames", "with frames MB", "MB"),
                ("memory of the largest worker", "worker MB", "MB"),
            ):  # fmt: skip
                report.add(f"{what}, {workers} worker{'s' * (workers > 1)}", Values(unit, [run[key] for run in done]))
        ratio = [two["s"] / one["s"] for one, two in zip(runs[1], runs[2], strict=True)]
        report.add("2 workers / 1 worker", Values("", ratio))
        more = (runs[1][0]["driver MB"] - few["driver MB"]) / (asked.captures - asked.captures // 4)
        report.add("memory of the driver, for each further capture", more * 1000, "kB")
        report.add("connections", float(runs[1][0]["connections"]))
    report.write()


if __name__ == "__main__":
    if sys.argv[1:2] == ["once"]:
        once(*sys.argv[2:])
    else:
        main()
