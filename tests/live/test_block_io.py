# SPDX-License-Identifier: Apache-2.0
"""Tests of block I/O records on loop devices, against the kernel's own counters (diskstats).

Every request that the kernel counts has one record, with the right length, sector, times and submitter.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cwndtrace.capture import bpf_syscall, live
from cwndtrace.capture.block_program import BLOCK_PROGRAMS, BlockProgram
from cwndtrace.capture.session import Session
from cwndtrace.capture.source import Filters
from cwndtrace.kernel import cgroups
from cwndtrace.kernel.btf import Btf
from tests.harness.disk import (
    BLOCK,
    SECTOR,
    SLAB,
    Disk,
    Stat,
    Traced,
    accounted,
    again_if_hidden,
    aligned,
    fio,
    loop,
    reader,
    stat_of,
)

pytestmark = pytest.mark.live

needs_fio = pytest.mark.skipif(shutil.which("fio") is None, reason="needs fio: apt install fio")


@pytest.fixture(autouse=True, params=BLOCK_PROGRAMS, ids=lambda program: program.name)
def program(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> BlockProgram:
    """The program that traces block I/O in this test."""
    chosen: BlockProgram = request.param
    if lacks := chosen.lacks(Btf.running()):
        pytest.skip(f"this kernel has no tracepoint {lacks}: boot Linux 6.5 or newer")
    monkeypatch.setattr(Traced, "chosen", chosen)
    return chosen


@pytest.fixture
def disk() -> Iterator[Disk]:
    with loop() as device:
        yield device


def mine(records: pd.DataFrame) -> pd.DataFrame:
    ours = records[records["tgid"] == os.getpid()]
    return ours.sort_values("start_ns", ignore_index=True)


def assert_sound(records: pd.DataFrame) -> None:
    """Assert the order of times that every record of a loop device must have."""
    assert (records["start_ns"] <= records["issue_ns"]).all()
    assert (records["issue_ns"] < records["done_ns"]).all()


# ---- the fields of a record ----------------------------------------------------------------------------


@again_if_hidden
def test_each_direct_request_has_one_record(disk: Disk) -> None:
    blocks = random.sample(range(disk.size // BLOCK), 211)
    reads, writes = blocks[:97], blocks[97:]
    before, begin = disk.stat(), time.monotonic_ns()
    with Traced() as traced:
        disk.read(*reads)
        disk.write(*writes)
    counted = disk.stat() - before
    records = traced.records(disk)
    assert_sound(records)
    assert stat_of(records) == counted
    assert counted.reads >= len(reads)
    assert counted.writes == len(writes)

    own = mine(records)
    assert list(own["op"]) == ["read"] * len(reads) + ["write"] * len(writes)
    assert list(own["sector"]) == [block * BLOCK // SECTOR for block in blocks]
    assert set(own["bytes"]) == {BLOCK}
    assert set(own["tid"]) == {threading.get_native_id()}
    assert set(own["comm"]) == {Path("/proc/thread-self/comm").read_text().strip()}
    assert set(own["error"]) == {"ok"}
    assert own["start_ns"].iloc[0] > begin
    assert own["done_ns"].iloc[-1] < time.monotonic_ns()
    assert set(own["cpu"]) <= os.sched_getaffinity(0)
    assert traced.lost == 0


@again_if_hidden
def test_a_request_has_the_name_of_its_thread(disk: Disk) -> None:
    tids: list[int] = []

    def work() -> None:
        Path("/proc/thread-self/comm").write_text("a reader")
        tids.append(threading.get_native_id())
        disk.read(1, 2, 3)

    with Traced() as traced:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    records = mine(traced.records(disk))
    assert list(records["tid"]) == tids * 3
    assert set(records["comm"]) == {"a reader"}


@pytest.mark.parametrize("length", [512, 4096, 128 << 10, 1 << 20])
@again_if_hidden
def test_lengths_are_those_of_the_kernel(disk: Disk, length: int) -> None:
    before = disk.stat()
    with Traced() as traced, disk.opened() as fd, aligned(length) as buffer:
        for i in range(3):
            assert os.preadv(fd, [buffer], i * length) == length
    records = traced.records(disk)
    assert stat_of(records) == disk.stat() - before
    assert mine(records)["bytes"].sum() == 3 * length


@again_if_hidden
def test_requests_of_two_devices_are_told_apart() -> None:
    with loop() as one, loop() as two:
        before = one.stat(), two.stat()
        with Traced() as traced:
            threads = [
                threading.Thread(target=one.read, args=range(500)),
                threading.Thread(target=two.write, args=range(300)),
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert stat_of(traced.records(one)) == one.stat() - before[0]
        assert stat_of(traced.records(two)) == two.stat() - before[1]
        assert set(mine(traced.records(one))["op"]) == {"read"}
        assert set(mine(traced.records(two))["op"]) == {"write"}


@again_if_hidden
def test_a_discard_is_recorded(disk: Disk) -> None:
    before = disk.stat()
    with Traced() as traced:
        disk.discard(1 << 20, 3 << 20)
    records = mine(traced.records(disk))
    assert stat_of(traced.records(disk)) == disk.stat() - before
    assert set(records["op"]) == {"discard"}
    assert records["bytes"].sum() == 3 << 20
    assert records["sector"].iloc[0] == (1 << 20) // SECTOR


@again_if_hidden
def test_an_error_is_recorded(disk: Disk) -> None:
    disk.write(0, 1)
    # From here on the loop driver can't read the second block.
    os.ftruncate(disk.backing, BLOCK)
    before = disk.stat()
    with Traced() as traced:
        disk.read(0)
        with pytest.raises(OSError, match=r"Input/output error"):
            disk.read(1)
    assert disk.stat() - before == Stat(2, 2 * BLOCK // SECTOR, 0, 0, 0, 0)
    records = mine(traced.records(disk))
    assert list(records["error"]) == ["ok", "ioerr"]
    assert list(records["sector"]) == [0, BLOCK // SECTOR]


# ---- the submitter ------------------------------------------------------------------------------------


@again_if_hidden
def test_buffered_reads_belong_to_the_reader(disk: Disk) -> None:
    disk.forget()
    with Traced() as traced, disk.opened(os.O_RDONLY) as fd:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        for block in range(0, 1000, 100):
            os.pread(fd, BLOCK, block * BLOCK)
    records = mine(traced.records(disk))
    assert list(records["sector"]) == [block * BLOCK // SECTOR for block in range(0, 1000, 100)]


@again_if_hidden
def test_page_faults_belong_to_the_faulting_thread(disk: Disk) -> None:
    disk.forget()
    shared = mmap.MAP_SHARED
    with Traced() as traced, disk.opened(os.O_RDONLY) as fd, mmap.mmap(fd, disk.size, shared, mmap.PROT_READ) as memory:
        memory.madvise(mmap.MADV_RANDOM)
        for block in range(0, 700, 100):
            memory[block * BLOCK]
    records = mine(traced.records(disk))
    assert set(records["tid"]) == {threading.get_native_id()}
    assert list(records["sector"]) == [block * BLOCK // SECTOR for block in range(0, 700, 100)]


_IN_A_FILE_SYSTEM = """
import ctypes, os, sys
device, folder = sys.argv[1:]
def run(command): assert os.system(command) == 0, command
run(f"mount -t ext4 {device} {folder}")
one, two = (os.open(f"{folder}/{name}", os.O_CREAT | os.O_RDWR) for name in ("one", "two"))
assert ctypes.CDLL(None).syncfs(two) == 0
print("ready", flush=True)
assert sys.stdin.readline()
for i in range(20):
    os.pwrite(one, bytes(4096), i * 4096)
    os.fsync(one)
os.pwrite(two, bytes(1 << 20), 0)
assert ctypes.CDLL(None).syncfs(two) == 0
os.close(one)
os.close(two)
run(f"umount {folder}")
print("done", flush=True)
"""


@again_if_hidden
def test_a_file_systems_requests_belong_to_the_writing_task(disk: Disk, tmp_path: Path) -> None:
    """fsync() writes data in the calling task and lets jbd2 commit the journal; a kworker does the write-back."""
    # Without the lazy initialisation no kernel thread writes later.
    subprocess.run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(disk.path)], check=True)
    # In a separate mount namespace nothing can stay mounted.
    command = ["unshare", "--mount", sys.executable, "-c", _IN_A_FILE_SYSTEM, str(disk.path), str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
            with Traced() as traced:
                before = disk.stat()
                assert writer.communicate("go\n", timeout=30)[0] == "done\n"
            counted = disk.stat() - before
        finally:
            writer.kill()
    assert writer.returncode == 0
    records = traced.records(disk)
    # Flush sequences end twice in the kernel and count once.
    accounted(traced, counted, disk)
    assert_sound(records[records["bytes"] > 0])
    writes = records[records["op"] == "write"]
    # Each fsync() has written its block in the calling task.
    assert len(writes[writes["tgid"] == writer.pid]) >= 20
    assert set(writes[writes["tgid"] == writer.pid]["comm"]) == {Path(sys.executable).name[:15]}
    assert writes["comm"].str.startswith("jbd2/").any()
    assert writes[writes["comm"].str.startswith("kworker/")]["bytes"].sum() >= 1 << 20


def _uring_refused() -> str | None:
    number = {"x86_64": 425, "aarch64": 425, "riscv64": 425}.get(os.uname().machine, 425)
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(number, 1, ctypes.create_string_buffer(120))
    if fd >= 0:
        os.close(fd)
        return None
    return f"this kernel refuses io_uring ({os.strerror(ctypes.get_errno())}): sysctl -w kernel.io_uring_disabled=0"


@needs_fio
@pytest.mark.parametrize("mode", ["", "--force_async=1", "--sqthread_poll=1"], ids=["inline", "workers", "sqpoll"])
@again_if_hidden
def test_io_uring_belongs_to_the_application(disk: Disk, mode: str) -> None:
    refusal = _uring_refused()
    if refusal:
        pytest.skip(refusal)
    before = disk.stat()
    with Traced() as traced:
        fio(disk, "--ioengine=io_uring", "--iodepth=8", "--number_ios=2000", *([mode] if mode else []))
    accounted(traced, disk.stat() - before, disk)
    records = traced.records(disk)
    by_fio = records[records["comm"] == "fio"]
    assert len(by_fio) >= 2000
    assert by_fio["tgid"].value_counts().iloc[0] >= 2000
    assert not records["comm"].str.startswith("iou-").any()
    if mode:
        workers = by_fio[by_fio["tid"] != by_fio["tgid"]]
        assert len(workers) >= 1000, "the kernel's workers did no I/O"


# ---- at a high rate, and without room -----------------------------------------------------


@needs_fio
@again_if_hidden
def test_requests_of_a_flood_are_kept_or_counted(disk: Disk) -> None:
    before = disk.stat()
    with Traced() as traced:
        fio(disk, "--ioengine=libaio", "--iodepth=32", "--norandommap", "--io_size=500m")
    counted = disk.stat() - before
    records = traced.records(disk)
    assert counted.reads >= 120_000
    accounted(traced, counted, disk)
    assert len(records) > 0.99 * counted.reads
    assert_sound(records)
    assert set(records["bytes"]) == {BLOCK}
    # No request has two records: start and sector together are unique.
    assert not records.duplicated(["start_ns", "sector"]).any()


@needs_fio
@pytest.mark.parametrize("bits", [1, 4])
@again_if_hidden
def test_a_crowded_table_of_requests_loses_none(disk: Disk, monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    """With two or sixteen slots, the slot of nearly every request is taken, so requests are chained."""
    real = live._filter_defines
    monkeypatch.setattr(live, "_filter_defines", lambda filters: {**real(filters), "SLOT_BITS": bits})
    before = disk.stat()
    with Traced() as traced:
        fio(disk, "--ioengine=libaio", "--iodepth=16", "--number_ios=20000", "--numjobs=2", "--rw=randrw")
    counted = disk.stat() - before
    records = traced.records(disk)
    accounted(traced, counted, disk)
    assert len(records) > 0.99 * (counted.reads + counted.writes)
    assert set(records["bytes"]) == {BLOCK}
    assert_sound(records)


@needs_fio
@again_if_hidden
def test_a_kernel_without_compare_and_swap_loses_none(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """All requests are in the hash then."""
    monkeypatch.setattr(live, "has_compare_and_swap", lambda: False)
    before = disk.stat()
    with Traced() as traced:
        fio(disk, "--ioengine=libaio", "--iodepth=16", "--number_ios=20000", "--numjobs=2", "--rw=randrw")
        disk.discard(1 << 20, 3 << 20)
    counted = disk.stat() - before
    records = traced.records(disk)
    accounted(traced, counted, disk)
    assert len(records) > 0.99 * (counted.reads + counted.writes)
    assert not any(flight["key"] for flight in traced.flights)
    assert_sound(records)


@again_if_hidden
def test_records_without_room_in_the_buffer_count_as_lost(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "RING_PAGES", 2)
    monkeypatch.setattr(live, "spare_pages", lambda _: 0)
    before = disk.stat()
    with Traced(poll=False) as traced:
        disk.read(*range(1500))
    counted = disk.stat() - before
    records = traced.records(disk)
    assert traced.lost > 0
    assert len(records) + traced.lost >= counted.reads
    assert [loss.event for loss in traced.tally.lossy] == ["block_io"]
    assert traced.tally.lossy[0].lost == traced.lost


@again_if_hidden
def test_records_that_the_ring_has_no_room_for_go_to_the_spare_one(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "RING_PAGES", 2)
    monkeypatch.setattr(live, "spare_pages", lambda _: 256)
    with Traced(poll=False) as traced:
        disk.read(*range(1500))
    assert sorted(mine(traced.records(disk))["sector"]) == [block * BLOCK // SECTOR for block in range(1500)]
    assert traced.lost == 0


@again_if_hidden
def test_a_few_records_arrive_soon_without_more_requests(disk: Disk) -> None:
    with Traced(poll=False) as traced:
        disk.read(5)
        done = time.monotonic()
        while not len(traced.records(disk)) and time.monotonic() - done < 5:
            traced.seen += traced.session.step()
        took = time.monotonic() - done
        assert list(mine(traced.records(disk))["sector"]) == [5 * BLOCK // SECTOR]
    assert took < 0.5
    assert len(mine(traced.records(disk))) == 1


@pytest.mark.parametrize("count", [1, SLAB - 1, SLAB, SLAB + 1, 2 * SLAB + 1])
@again_if_hidden
def test_all_records_are_read_at_the_end(disk: Disk, count: int) -> None:
    with Traced(poll=False) as traced:
        disk.read(*range(count))
    assert len(mine(traced.records(disk))) == count
    assert traced.lost == 0


@pytest.mark.parametrize("count", [1, SLAB, 2 * SLAB + 1])
@again_if_hidden
def test_records_of_offline_cpus_are_read_at_the_end(disk: Disk, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """The kernel's error for an offline CPU is simulated for each CPU; this machine's CPUs stay online."""

    def offline(*_: int) -> None:
        raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))

    with Traced(poll=False) as traced:
        disk.read(*range(count))
        monkeypatch.setattr(bpf_syscall, "run_raw_tracepoint", offline)
    assert len(mine(traced.records(disk))) == count
    assert traced.lost == 0


@again_if_hidden
def test_a_request_that_ends_while_a_slab_is_copied_has_a_separate_entry(disk: Disk) -> None:
    """Such a request ends in an interrupt of the copying CPU; here all CPUs are marked as copying for ever."""
    with Traced(poll=False) as traced:
        fd, slab = traced.block._maps["slabs"]
        busy = (1 << 32).to_bytes(8, "little").ljust((slab.value_size + 7) & ~7, b"\0")
        bpf_syscall.update(fd, bytes(4), busy * bpf_syscall.possible_cpus())
        disk.read(*range(71))
    assert list(mine(traced.records(disk))["sector"]) == [block * BLOCK // SECTOR for block in range(71)]
    assert traced.lost == 0


# ---- filters ---------------------------------------------------------------------------------------


@again_if_hidden
def test_filter_by_process(disk: Disk) -> None:
    with reader(disk, 71) as wanted, reader(disk, 53) as other, Traced(Filters(pid=wanted.pid)) as traced:
        disk.read(*range(31))
        other.communicate("go\n")
        wanted.communicate("go\n")
        disk.read(*range(31))
    records = pd.concat([batch.to_pandas() for batch in traced.seen if batch.event == "block_io"])
    assert set(records["tgid"]) == {wanted.pid}
    assert len(records) == 71


@again_if_hidden
def test_filter_by_cgroup(disk: Disk) -> None:
    folder = cgroups.mount_point() / f"cwndtrace-test-{os.getpid()}"
    below = folder / "below"
    below.mkdir(parents=True)
    try:
        with reader(disk, 71) as direct, reader(disk, 53) as deeper, reader(disk, 31) as outside:
            (folder / "cgroup.procs").write_text(str(direct.pid))
            (below / "cgroup.procs").write_text(str(deeper.pid))
            with Traced(Filters(cgroup=folder)) as traced:
                for process in (outside, direct, deeper):
                    process.communicate("go\n")
        records = pd.concat([batch.to_pandas() for batch in traced.seen if batch.event == "block_io"])
        # Threads of a process that ends may still cause page faults, which read other devices.
        ours = records[records["dev"] == disk.dev]
        assert ours["tgid"].value_counts().to_dict() == {direct.pid: 71, deeper.pid: 53}
        assert set(ours[ours["tgid"] == deeper.pid]["cgroup_id"]) == {below.stat().st_ino}
        assert not (records["tgid"] == outside.pid).any()
    finally:
        below.rmdir()
        folder.rmdir()


@again_if_hidden
def test_a_cgroup_made_later_is_followed(disk: Disk) -> None:
    folder = cgroups.mount_point() / f"cwndtrace-test-{os.getpid()}"
    below = folder / "later"
    folder.mkdir()
    try:
        with reader(disk, 17) as process, Traced(Filters(cgroup=folder), poll=False) as traced:
            below.mkdir()
            (below / "cgroup.procs").write_text(str(process.pid))
            known = time.monotonic() + live.REFRESH_SECONDS + 0.2
            while time.monotonic() < known:
                traced.seen += traced.session.step()
            process.communicate("go\n")
        assert len(traced.records(disk)) == 17
    finally:
        if below.is_dir():
            below.rmdir()
        folder.rmdir()


# ---- several traces ----------------------------------------------------------------------------------


@again_if_hidden
def test_two_traces_record_the_same_requests(disk: Disk) -> None:
    with Traced() as one, Traced() as two:
        disk.read(*range(83))
    a, b = (mine(traced.records(disk)) for traced in (one, two))
    assert list(a["sector"]) == list(b["sector"])
    assert np.abs(a["start_ns"].astype("int64") - b["start_ns"].astype("int64")).max() < 10_000_000


@again_if_hidden
def test_no_program_runs_after_the_end(disk: Disk) -> None:
    kernel = live.Kernel(reasons=())
    session = Session(kernel)
    disk.read(1)
    session.finish()
    kept = session.tally.kept["block_io"]
    disk.read(2)
    assert not any(raw for name, raw in session.source.stop() if name == "block_io")
    assert session.tally.kept["block_io"] == kept
    session.close()
