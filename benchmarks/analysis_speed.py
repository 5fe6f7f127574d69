# SPDX-License-Identifier: Apache-2.0
"""How long the analysis of a large capture takes and how much memory: ``python -m benchmarks.analysis_speed``.

Ten million block requests of two hundred processes on three devices and a hundred thousand resets of two hundred
connections; ``--requests`` and ``--resets`` change that. Needs no root. The frames are made as a Trace hands them out;
reading them from disk isn't counted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd

from cwndtrace import events
from cwndtrace.analysis import block_io, connections, cost, idle_cause, verdict

SECONDS = 1000


def make_block_io(number: int, rng: np.random.Generator) -> pd.DataFrame:
    """What the analysis needs of ``Trace.block_io``."""
    start = np.sort(rng.integers(0, SECONDS * 10**9, number))
    queue, service = (rng.exponential(scale, number).astype(np.float32) for scale in (20, 300))
    names = {"device": ["vda", "vdb", "nvme0n1"], "op": ["read", "write"], "error": ["ok", "ioerr"], "comm": ["a", "b"]}
    odds = {"device": [0.6, 0.3, 0.1], "op": [0.7, 0.3], "error": [1, 0], "comm": [0.5, 0.5]}
    return pd.DataFrame(
        {
            "start_ns": start.astype(np.uint64),
            "done_ns": (start + ((queue + service) * 1000).astype(np.int64)).astype(np.uint64),
            "bytes": np.full(number, 4096, dtype=np.uint32),
            "tgid": rng.integers(1, 200, number, dtype=np.uint32),
            "latency_us": (queue + service).astype(np.float64),
            "queue_us": queue.astype(np.float64),
            **{
                name: pd.Categorical.from_codes(rng.choice(len(of), number, p=odds[name]).astype(np.int8), of)  # type: ignore[call-overload]
                for name, of in names.items()
            },
        }
    )


def make_resets(number: int, rng: np.random.Generator) -> pd.DataFrame:
    """``Trace.resets``: each connection rests every two seconds."""
    records = np.zeros(number, dtype=events.event("cwnd_reset").dtype)
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
    frame: pd.DataFrame = events.to_arrow("cwnd_reset", records, 0).to_pandas()
    text = {name: str for name, kind in frame.dtypes.items() if isinstance(kind, pd.CategoricalDtype)}
    return frame.astype(text)


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print how long the body took."""
    begin, cpu = time.monotonic(), time.process_time()
    yield
    print(f"{what:<40} {time.monotonic() - begin:6.2f} s, {time.process_time() - cpu:5.2f} s of CPU")


def peak_gb() -> float:
    """The most memory that this process has had since ``forget_peak``, in GB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e9


def forget_peak() -> None:
    """Count from here on: what making the frames took is of no interest."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    """Make the frames, analyse them, print times and memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000_000)
    parser.add_argument("--resets", type=int, default=100_000)
    arguments = parser.parse_args()
    rng = np.random.default_rng(1)
    blocks, resets = make_block_io(arguments.requests, rng), make_resets(arguments.resets, rng)
    snapshots = events.CONNECTIONS.empty_table().to_pandas()
    forget_peak()
    print(f"{len(blocks):,} requests, {len(resets):,} resets; {peak_gb():.2f} GB before")
    begin, cpu = time.monotonic(), time.process_time()
    with timed("connections"):
        resets, snapshots = connections.identify(resets, snapshots)
        rows = connections.summary(resets, snapshots)
    with timed("cost"):
        priced = cost.predict(resets, snapshots)
    with timed("idle cause"):
        caused = idle_cause.with_cause(priced, blocks)
    with timed("verdicts"):
        judged = verdict.resets(caused, snapshots)
        verdict.host(verdict.connections(rows, judged, snapshots, {}), judged)
    with timed("block I/O by device and operation"):
        block_io.summary(blocks)
    with timed("block I/O by process"):
        block_io.by_submitter(blocks)
    with timed("heat map"):
        block_io.heat_map(blocks)
    wall, cpu = time.monotonic() - begin, time.process_time() - cpu
    print(f"{'all':<40} {wall:6.2f} s, {cpu:5.2f} s of CPU, {peak_gb():.2f} GB at most")


if __name__ == "__main__":
    main()
