# SPDX-License-Identifier: Apache-2.0
"""Tests of the block program for kernels before 6.5 against the one for later kernels; both trace at once."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cwndtrace.capture.block_program import BLOCK_IO, BLOCK_IO_OLD
from cwndtrace.kernel.btf import Btf
from tests.harness.disk import BLOCK, Disk, Traced, accounted, again_if_hidden, file_system, fio, loop

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(shutil.which("fio") is None, reason="needs fio: apt install fio"),
]


@pytest.fixture
def disk() -> Iterator[Disk]:
    with loop() as device:
        yield device


@contextmanager
def scheduler(disk: Disk, name: str) -> Iterator[None]:
    """Let ``disk`` use an I/O scheduler until exit."""
    file = Path("/sys/block", disk.path.name, "queue/scheduler")
    if name not in file.read_text().replace("[", " ").replace("]", " ").split():
        pytest.skip(f"this kernel has no I/O scheduler {name}: modprobe {name}")
    file.write_text(name)
    try:
        yield
    finally:
        file.write_text("none")


def many_loads(disk: Disk) -> None:
    """Read, write, discard and flush ``disk`` directly, buffered, by a file system, and so that requests merge."""
    for options in (
        "--rw=randrw --ioengine=libaio --iodepth=32 --number_ios=3000",
        "--rw=write --ioengine=libaio --iodepth=32 --iodepth_batch=8 --number_ios=1000",
        "--rw=write --ioengine=psync --direct=0 --size=8m --end_fsync=1",
        "--rw=read --ioengine=psync --direct=0 --size=8m",
        "--rw=randtrim --ioengine=psync --number_ios=200",
        "--rw=randwrite --ioengine=psync --direct=0 --fsync=8 --number_ios=400",
    ):
        fio(disk, *options.split())
    with tempfile.TemporaryDirectory() as folder, file_system(disk, Path(folder, "mounted")) as mounted:
        for number in range(20):
            with (mounted / str(number)).open("wb") as file:
                file.write(random.randbytes(20_000))
                os.fsync(file.fileno())
    disk.settled()


@pytest.mark.parametrize("name", ["none", "mq-deadline", "bfq"])
@again_if_hidden
def test_both_programs_record_the_same_requests(disk: Disk, name: str) -> None:
    if lacks := BLOCK_IO.lacks(Btf.running()):
        pytest.skip(f"this kernel has no tracepoint {lacks}: boot Linux 6.5 or newer")
    with scheduler(disk, name):
        before = disk.stat()
        with Traced(program=BLOCK_IO) as new, Traced(program=BLOCK_IO_OLD) as old:
            many_loads(disk)
        counted = disk.stat() - before
    accounted(new, counted, disk)
    accounted(old, counted, disk)
    columns = ["dev", "sector", "bytes", "op", "flags", "tgid", "tid", "comm", "cgroup_id", "owner_cgroup_id", "error"]
    rows = []
    for traced in (new, old):
        frame = traced.records(disk).sort_values("start_ns")
        rows.append(frame.assign(nth=frame.groupby(columns).cumcount()))
    both = rows[0].merge(rows[1], on=[*columns, "nth"], suffixes=("_new", "_old"))
    assert len(both) > 4000
    # A request that only one of them has was lost to the other, which counts it.
    assert len(rows[0]) - len(both) <= old.lost + old.unfinished
    assert len(rows[1]) - len(both) <= new.lost + new.unfinished
    assert old.tally.guessed == 0
    # The old program sees the bio before the new one sees its request.
    early = (both["start_ns_new"].astype("int64") - both["start_ns_old"].astype("int64")).median()
    assert 0 <= early < 50_000
    assert (both["done_ns_new"].astype("int64") - both["done_ns_old"].astype("int64")).abs().median() < 50_000


_BACKWARDS = "--rw=write:-8k --ioengine=libaio --iodepth=16 --iodepth_batch=16 --number_ios=64"


@again_if_hidden
def test_a_request_whose_bio_is_hidden_is_charged_to_the_task_that_queues_it(disk: Disk) -> None:
    """Of 16 bios that merge, each in front of the one before, only the last in the chain got the request."""
    before = disk.stat()
    with Traced(program=BLOCK_IO_OLD) as traced:
        fio(disk, *_BACKWARDS.split())
    accounted(traced, disk.stat() - before, disk)
    records = traced.records(disk)
    merged = records[records["bytes"] > 4 * BLOCK]
    assert 0 < len(merged) == traced.tally.guessed
    assert set(merged["comm"]) == {"fio"}
