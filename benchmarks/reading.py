# SPDX-License-Identifier: Apache-2.0
"""Measure time and memory of loading and reporting large captures of several sizes. Needs no root.

    .venv/bin/python -m benchmarks.reading

The captures are generated, and on disk they are as ``run`` writes them: requests of two hundred processes on three
devices, and a hundred thousand resets of two hundred connections. Each measurement is a separate process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.common import COMMAND, BenchmarkResults, Values, folder, options, size
from cwndtrace.records import arrow, layout
from cwndtrace.store import CaptureWriter
from cwndtrace.store.writer import PART_ROWS

SECONDS = 1000
_RESETS = 100_000
_WANTED = {
    "3 columns of 10,000,000 requests": "at most 0.6 s",
    "report of 10,000,000 requests": "at most 2 s",
    "report of 10,000,000 requests, memory": "at most 0.6 GB",
}
_COLUMNS = ("start_ns", "latency_us", "device")
_LOAD = f"import cwndtrace, sys; cwndtrace.load(sys.argv[1]).block_columns{_COLUMNS}"
_ALL = "import cwndtrace, sys; cwndtrace.load(sys.argv[1]).block_io"
# Runs a program and prints its time and memory, by RUSAGE_CHILDREN, since it is the only child.
_MEASURE = """
import json, resource, subprocess, sys, time
begin = time.monotonic()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
took = {"s": time.monotonic() - begin, "cpu": used.ru_utime + used.ru_stime, "GB": used.ru_maxrss * 1024 / 1e9}
print(json.dumps(took))
"""


def requests(number: int, since: float, until: float, rng: np.random.Generator) -> layout.Records:
    """Return finished requests, in order of completion, that start between two times in s."""
    records = np.zeros(number, dtype=layout.event("block_io").dtype)
    start = np.sort(rng.integers(int(since * 1e9), int(until * 1e9), number)).astype(np.uint64)
    queue, service = ((rng.exponential(us, number) * 1000).astype(np.uint64) for us in (20, 300))
    records["start_ns"], records["issue_ns"], records["done_ns"] = start, start + queue, start + queue + service
    records["sector"], records["bytes"] = rng.integers(0, 1 << 31, number) * 8, 4096
    records["dev"] = np.array([8 << 20, 8 << 20 | 16, 259 << 20], np.uint32)[rng.choice(3, number, p=[0.6, 0.3, 0.1])]
    records["op"], records["tgid"] = rng.random(number) > 0.7, rng.integers(1, 200, number)
    records["tid"], records["cpu"] = records["tgid"], rng.integers(0, 8, number)
    records["comm"] = np.array([b"postgres", b"mysqld"])[rng.integers(0, 2, number)]
    return records[np.argsort(records["done_ns"], kind="stable")]


def resets(number: int, rng: np.random.Generator) -> layout.Records:
    """Return resets of two hundred connections after idle times of two seconds."""
    records = np.zeros(number, dtype=layout.event("cwnd_reset").dtype)
    records["ts_ns"] = np.sort(rng.integers(0, SECONDS * 10**9, number))
    records["sock_cookie"] = rng.integers(1, 200, number)
    records["bytes_sent"] = records["ts_ns"] // 5000
    records["cwnd_before"], records["cwnd_after"] = rng.integers(100, 3000, number), rng.integers(10, 100, number)
    records["ssthresh_after"], records["ssthresh_before"] = 2120, 2_147_483_647
    records["tgid"] = rng.integers(1, 200, number)
    for name, value in (
        ("idle_us", 2_000_000), ("last_rcv_us", 1_900_000), ("rto_us", 308_000), ("srtt_us", 107_000), ("mss", 1448),
        ("snd_wnd", 6_291_456), ("init_cwnd", 10), ("family", 2), ("ca_name", b"cubic"), ("comm", b"replica"),
    ):  # fmt: skip
        records[name] = value
    return records


def make(path: Path, number: int) -> None:
    """Write a capture with this number of requests."""
    rng = np.random.default_rng(1)
    clocks = {"start": {"mono_ns": 0, "utc_offset_ns": 10**18}, "end": None}
    meta = {"clock": clocks, "devices": {"8:0": "sda", "8:16": "sdb", "259:0": "nvme0n1"}}
    writer = CaptureWriter.create(path, {**meta, "counts": {"block_io": {"kept": number, "lost": 0}}})
    writer.add("cwnd_reset", arrow.to_arrow("cwnd_reset", resets(_RESETS, rng), 10**18))
    for done in range(0, number, PART_ROWS):
        rows = min(PART_ROWS, number - done)
        since, until = (SECONDS * n / number for n in (done, done + rows))
        writer.add("block_io", arrow.to_arrow("block_io", requests(rows, since, until, rng), 10**18))
        writer.flush()
    writer.close()


def measured(*command: str) -> dict[str, float]:
    """Run a program, and return its wall-clock and CPU time in s and its peak memory in GB."""
    done = subprocess.run([sys.executable, "-c", _MEASURE, *command], capture_output=True, text=True, check=True)
    usage: dict[str, float] = json.loads(done.stdout)
    return usage


def main() -> None:
    """Run the benchmark and write its report."""
    asked = options(__doc__, requests=("1000000,10000000,50000000", "numbers of requests in a capture"))
    report = BenchmarkResults("reading", _WANTED)
    for number in (int(text) for text in asked.requests.split(",")):
        with folder() as place:
            path = place / "large.cwnd"
            begin = time.monotonic()
            make(path, number)
            print(f"{number:,} requests generated in {time.monotonic() - begin:.0f} s")
            report.add(f"bytes a request of {number:,}", size(path / "block_io") / number, "bytes")
            ways = {
                f"3 columns of {number:,} requests": (sys.executable, "-c", _LOAD, str(path)),
                f"all columns of {number:,} requests": (sys.executable, "-c", _ALL, str(path)),
                f"report of {number:,} requests": (*COMMAND, "report", str(path)),
            }
            for what, command in ways.items():
                runs = [measured(*command) for _ in range(asked.rounds if number <= 10**7 else 1)]
                for suffix, name, unit in (("", "s", "s"), (", CPU", "cpu", "s"), (", memory", "GB", "GB")):
                    report.add(what + suffix, Values(unit, [run[name] for run in runs]))
    report.add("(of which python and imports)", measured(sys.executable, "-c", "import cwndtrace.trace")["s"], "s")
    report.write()


if __name__ == "__main__":
    os.environ.setdefault("COLUMNS", "120")
    main()
