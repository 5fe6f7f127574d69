# SPDX-License-Identifier: Apache-2.0
"""A test of tracing with more block requests under way at once than the BPF program's tables hold.

128 hardware queues of 1,024 requests each: 16 devices of null_blk with a queue for each of 8 CPUs.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import pytest

from cwndtrace.lab.disk import CONFIGFS
from cwndtrace.records.layout import bpf_dir
from tests.harness.disk import BLOCK, Disk, Traced
from tests.harness.guest import in_guest
from tests.harness.sysctl import sysctl
from tests.harness.tcp import until

pytestmark = pytest.mark.vm

CPUS: Final = 8
DEVICES: Final = 16
DEPTH: Final = 1024
ROUNDS: Final = 2
UNDER_WAY_S: Final = 30
"""How long each request takes. All are submitted by then.

Switching a device on reads its partition table, which fails after 5 s and is tried again: 16 minutes for 16 devices.
"""
ROOM: Final = (1 << int(re.findall(r"define SLOT_BITS (\d+)", (bpf_dir() / "block.h").read_text())[0])) + 65536


@contextmanager
def null_device(number: int) -> Iterator[Disk]:
    """Yield a device with a queue of 1,024 requests for each CPU."""
    folder = CONFIGFS / f"cwt-{os.getpid()}-{number}"
    disk = Disk(Path("/dev", folder.name), -1, 1 << 30)
    folder.mkdir()
    try:
        settings = {"size": 1024, "blocksize": BLOCK, "submit_queues": CPUS, "hw_queue_depth": DEPTH}
        for name, value in (settings | {"irqmode": 2, "completion_nsec": UNDER_WAY_S * 10**9}).items():
            (folder / name).write_text(str(value))
        (folder / "power").write_text("1")
        _attribute(disk, "queue/io_timeout").write_text(str(10 * UNDER_WAY_S * 1000))
        yield disk
    finally:
        folder.rmdir()


def in_flight(disks: list[Disk]) -> int:
    """Return the requests that are under way."""
    return sum(int(word) for disk in disks for word in _attribute(disk, "inflight").read_text().split())


def _attribute(disk: Disk, name: str) -> Path:
    return Path("/sys/block", disk.path.name, name)


def traced_reading(disks: list[Disk], depth: int) -> tuple[int, int]:
    """Trace ROUNDS reads with ``depth`` requests in each queue. Returns the most at once and how many were lost."""
    together = CPUS * len(disks) * depth
    # One process for each CPU, which takes its queue of each device in turn.
    options = (
        f"--rw=randread --norandommap --bs={BLOCK} --direct=1 --ioengine=libaio --iodepth={depth * len(disks)} "
        f"--numjobs={CPUS} --size={len(disks)}g --io_size={ROUNDS * depth * len(disks) * BLOCK} "
        f"--cpus_allowed_policy=split --cpus_allowed=0-{CPUS - 1} --file_service_type=roundrobin"
    )
    files = ":".join(str(disk.path) for disk in disks)
    before = [disk.stat() for disk in disks]
    with Traced() as traced, sysctl("kernel.bpf_stats_enabled", 1):
        command = ["fio", "--name=queues", *options.split(), f"--filename={files}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as fio:
            until(lambda: in_flight(disks) >= 0.95 * together, 600, "the queues to be full")
            most = in_flight(disks)
            output, _ = fio.communicate(timeout=900)
        assert fio.returncode == 0, output
        times = {name: f"{ns / runs:,.0f} ns" for name, (runs, ns) in traced.run_times().items() if runs}
    for disk, counted in zip(disks, before, strict=True):
        assert (disk.settled() - counted).reads == ROUNDS * CPUS * depth
    kept = len(traced.records(*disks))
    print(f"{most:,} requests at once, room for {ROOM:,}: {kept:,} kept, {traced.lost:,} lost; a run: {times}")
    assert kept + traced.lost == ROUNDS * together
    return most, traced.lost


@pytest.mark.timeout(2400)
def test_requests_beyond_the_tables_count_as_lost() -> None:
    if not in_guest() or os.cpu_count() != CPUS:
        pytest.skip("needs a guest with 8 CPUs: tools/vm queues")
    with ExitStack() as stack:
        stack.enter_context(sysctl("fs.aio-max-nr", 4 * CPUS * DEVICES * DEPTH))
        disks = [stack.enter_context(null_device(number)) for number in range(DEVICES)]
        _, lost = traced_reading(disks, 64)
        assert lost == 0
        most, lost = traced_reading(disks, DEPTH)
    assert most > ROOM
    assert 0 < lost <= ROUNDS * (CPUS * DEVICES * DEPTH - ROOM) * 1.1
