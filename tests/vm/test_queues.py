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
from tests.harness.tcp import until

pytestmark = pytest.mark.vm

CPUS: Final = 8
DEVICES: Final = 16
DEPTH: Final = 1024
ROUNDS: Final = 2
UNDER_WAY_S: Final = 60
"""How long each request takes. All are submitted by then."""
ROOM: Final = (1 << int(re.findall(r"define SLOT_BITS (\d+)", (bpf_dir() / "block.h").read_text())[0])) + 65536
_AIO: Final = Path("/proc/sys/fs/aio-max-nr")


@contextmanager
def null_device(number: int) -> Iterator[Disk]:
    """Yield a device with a queue of 1,024 requests for each CPU."""
    folder = CONFIGFS / f"cwt-{os.getpid()}-{number}"
    folder.mkdir()
    try:
        settings = {"size": 1024, "blocksize": BLOCK, "submit_queues": CPUS, "hw_queue_depth": DEPTH}
        for name, value in (settings | {"irqmode": 2, "completion_nsec": UNDER_WAY_S * 10**9}).items():
            (folder / name).write_text(str(value))
        (folder / "power").write_text("1")
        index = (folder / "index").read_text().strip()
        named = Path("/dev", folder.name)
        yield Disk(named if named.exists() else Path(f"/dev/nullb{index}"), -1, 1 << 30)
    finally:
        folder.rmdir()


@contextmanager
def many_contexts() -> Iterator[None]:
    """Allow as many requests of asynchronous I/O as all queues hold."""
    before = _AIO.read_text()
    _AIO.write_text(str(4 * CPUS * DEVICES * DEPTH))
    try:
        yield
    finally:
        _AIO.write_text(before)


def in_flight(disk: Disk) -> int:
    """Return the requests that are under way."""
    return sum(map(int, (Path("/sys/block") / disk.path.name / "inflight").read_text().split()))


@pytest.mark.timeout(1800)
def test_requests_beyond_the_tables_count_as_lost() -> None:
    if not in_guest() or os.cpu_count() != CPUS:
        pytest.skip("needs a guest with 8 CPUs: tools/vm queues")
    together = CPUS * DEVICES * DEPTH
    with ExitStack() as stack:
        stack.enter_context(many_contexts())
        disks = [stack.enter_context(null_device(number)) for number in range(DEVICES)]
        before = [disk.stat() for disk in disks]
        with Traced() as traced:
            # fio starts one process for each CPU and device.
            options = (
                f"--rw=randread --bs={BLOCK} --direct=1 --ioengine=libaio --iodepth={DEPTH} --numjobs={CPUS} --size=1g "
                f"--io_size={ROUNDS * DEPTH * BLOCK} --cpus_allowed_policy=split --cpus_allowed=0-{CPUS - 1}"
            )
            jobs = " ".join(f"--name={disk.path.name} --filename={disk.path}" for disk in disks)
            command = ["fio", "--name=global", *options.split(), *jobs.split()]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as fio:
                until(lambda: sum(map(in_flight, disks)) >= 0.95 * together, 600, "the queues to be full")
                most = sum(map(in_flight, disks))
                output, _ = fio.communicate(timeout=900)
            assert fio.returncode == 0, output
        seen = traced.records(*disks)
        for disk, counted in zip(disks, before, strict=True):
            assert (disk.settled() - counted).reads == ROUNDS * CPUS * DEPTH
        print(f"{most:,} requests at once, room for {ROOM:,}: {len(seen):,} kept, {traced.lost:,} lost")
        assert most > ROOM
        assert len(seen) + traced.lost == ROUNDS * together
        assert 0 < traced.lost <= ROUNDS * (together - ROOM) * 1.1
