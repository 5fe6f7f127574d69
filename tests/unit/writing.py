# SPDX-License-Identifier: Apache-2.0
"""A process that writes a capture as a trace does: ``python -m tests.unit.writing PATH CONNECTIONS``.

It prints a line for each round, which is on the disk half a second later. When stdin ends, it completes the capture.
"""

from __future__ import annotations

import random
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from cwndtrace import store
from cwndtrace.errors import CaptureError
from tests.harness.command import CHECKOUT, ENVIRONMENT
from tests.unit import frames

_ROUND_S: Final = 0.5
SNAPSHOT_S: Final = 10.0
_WORKLOADS: Final = 12


def _connection(number: int) -> dict[str, Any]:
    address = f"10.2.{number // 250 % 250}.{number % 250}"
    return {"sock_cookie": number + 1, "dport": 1024 + number % 60_000, "daddr": address}


def snapshot(number: int, at_s: float) -> dict[str, Any]:
    """Return one connection of a snapshot."""
    group = number % _WORKLOADS
    return frames.snapshot(
        at_s, cwnd=random.randint(10, 3000), comm=f"app{group}", pid=100 + group, sock_cgroup_id=10 + group,
        srtt_us=random.randint(100, 200_000), listener=f"app{group}", **_connection(number),
    )  # fmt: skip


def name_workloads(writer: store.CaptureWriter) -> None:
    """Write the names of the connections' workloads."""
    names = [
        {"cgroup_id": 10 + n, "path": f"/system.slice/app{n}.service", "container_name": f"shop-{n}"}
        for n in range(_WORKLOADS)
    ]
    writer.add("workloads", frames.workloads(*names))


def write_round(writer: store.CaptureWriter, connections: int) -> None:
    """Write some resets with their costs, and block requests."""
    now = time.monotonic() - 0.3
    for number in random.sample(range(connections), min(connections, 4)):
        at = now - random.random() / 10
        skaddr = 0xFFFF_0000_0000_0000 + number
        group = number % _WORKLOADS
        fields: dict[str, Any] = {"skaddr": skaddr, "tgid": 100 + group, "cgroup_id": 10 + group}
        fields |= {"comm": f"app{group}".encode(), "idle_us": random.randint(300_000, 9_000_000)}
        writer.add("cwnd_reset", frames.table("cwnd_reset", frames.reset(at, **fields, **_connection(number))))
        cost = frames.recovered(at, 0.2, skaddr=skaddr, sock_cookie=number + 1, cost_us=random.randint(0, 900_000))
        writer.add("cwnd_recovery", frames.table("cwnd_recovery", cost))
    requests = [
        frames.block(now, random.expovariate(1 / 800), dev=dev << 20, op=op)
        for dev in (7, 259)
        for op in ("read", "write")
        for _ in range(10)
    ]
    writer.add("block_io", frames.table("block_io", *requests))
    writer.flush(force=False)


@contextmanager
def written(path: Path, connections: int) -> Iterator[subprocess.Popen[str]]:
    """Run a process that writes a capture."""
    command = [sys.executable, "-m", "tests.unit.writing", str(path), str(connections)]
    with subprocess.Popen(command, cwd=CHECKOUT, stdin=-1, stdout=-1, text=True, env=ENVIRONMENT) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "\n"
            yield process
        finally:
            process.kill()


def main() -> None:
    """Write until stdin ends."""
    path, connections = Path(sys.argv[1]), int(sys.argv[2])
    frames.MONO = 0  # times are those of this machine's clock
    offset = time.time_ns() - time.monotonic_ns()
    clock = {"start": {"mono_ns": time.monotonic_ns(), "utc_offset_ns": offset}, "segments": []}
    devices = {"7:0": "loop0", "259:0": "nvme0n1"}
    writer = store.CaptureWriter.create(path, frames.meta(clock=clock, devices=devices, ended=None, cgroups="v2"))
    name_workloads(writer)
    due = 0.0
    while True:
        if (now := time.monotonic()) >= due:
            writer.add("connections", frames.snapshots(*(snapshot(n, now) for n in range(connections))))
            due = now + SNAPSHOT_S
        try:
            write_round(writer, connections)
        except CaptureError:  # somebody deleted it
            return
        print(flush=True)
        if select.select([sys.stdin], [], [], _ROUND_S)[0]:
            break
    writer.close()


if __name__ == "__main__":
    main()
