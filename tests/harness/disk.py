# SPDX-License-Identifier: Apache-2.0
"""Loop devices over memory, the kernel's own counters of them, and traces of their requests."""

from __future__ import annotations

import fcntl
import functools
import mmap
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Final, Self

import pandas as pd

from cwndtrace.capture.block_program import BlockProgram
from cwndtrace.capture.live import Kernel
from cwndtrace.capture.program import Program
from cwndtrace.capture.session import Batch, Session, Tally
from cwndtrace.capture.source import Filters
from cwndtrace.records.layout import bpf_dir
from tests.harness.tcp import run, until

SECTOR: Final = 512
BLOCK: Final = 4096
SLAB: Final = int((bpf_dir() / "block.h").read_text().partition("#define SLAB_RECORDS ")[2].split()[0])
"""The number of records that a CPU hands over at once."""
_BLKFLSBUF: Final = 0x1261
_BLKDISCARD: Final = 0x1277
_LOOP_CTL_ADD, _LOOP_CTL_REMOVE = 0x4C80, 0x4C81


@dataclass(frozen=True)
class Stat:
    """The counters of /sys/block/NAME/stat: finished requests and their sectors of 512 bytes, by operation."""

    reads: int
    read_sectors: int
    writes: int
    write_sectors: int
    discards: int
    discard_sectors: int

    def __sub__(self, other: Stat) -> Stat:
        return Stat(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


@dataclass
class Disk:
    """A loop device over anonymous memory."""

    path: Path
    backing: int
    size: int

    @property
    def dev(self) -> str:
        """The major and minor number, as in records."""
        number = self.path.stat().st_rdev
        return f"{os.major(number)}:{os.minor(number)}"

    def stat(self) -> Stat:
        """Return the kernel's counters."""
        # Documentation/block/stat.rst: ios, merges, sectors and ticks for reads and for writes; three of the
        # queue; ios, merges, sectors and ticks for discards.
        columns = [int(text) for text in (Path("/sys/block") / self.path.name / "stat").read_text().split()]
        return Stat(columns[0], columns[2], columns[4], columns[6], columns[11], columns[13])

    def settled(self) -> Stat:
        """Return the kernel's counters once no request has ended for a second.

        A file system writes a little after it is unmounted.
        """
        seen, since = self.stat(), time.monotonic()

        def unchanged() -> bool:
            nonlocal seen, since
            if (now := self.stat()) != seen:
                seen, since = now, time.monotonic()
            return time.monotonic() > since + 1

        until(unchanged, 60, "the disk to be idle")
        return seen

    @contextmanager
    def opened(self, flags: int = os.O_RDWR) -> Iterator[int]:
        """Yield a file descriptor of the device, by default for direct I/O, read and write."""
        fd = os.open(self.path, flags | (os.O_DIRECT if flags == os.O_RDWR else 0))
        try:
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def counted(self, requests: int) -> Iterator[None]:
        """Wait on exit until the kernel has counted this many more reads and writes.

        The kernel wakes the task that waits for a request before it counts the request and calls block_io_done.
        """
        before = self.stat()
        yield
        until(lambda: (d := self.stat() - before).reads + d.writes >= requests, 10, f"{requests} requests counted")

    def read(self, *blocks: int) -> None:
        """Read these blocks of 4 KiB directly, one request each."""
        with self.counted(len(blocks)), self.opened() as fd, aligned(BLOCK) as buffer:
            for block in blocks:
                assert os.preadv(fd, [buffer], block * BLOCK) == BLOCK

    def write(self, *blocks: int) -> None:
        """Write these blocks of 4 KiB directly, one request each."""
        with self.counted(len(blocks)), self.opened() as fd, aligned(BLOCK) as buffer:
            for block in blocks:
                assert os.pwritev(fd, [buffer], block * BLOCK) == BLOCK

    def discard(self, start: int, length: int) -> None:
        """Discard ``length`` bytes from ``start``."""
        with self.opened() as fd:
            fcntl.ioctl(fd, _BLKDISCARD, struct.pack("=QQ", start, length))

    def forget(self) -> None:
        """Drop the device's pages from the page cache."""
        with self.opened(os.O_RDONLY) as fd:
            fcntl.ioctl(fd, _BLKFLSBUF, 0)


@contextmanager
def aligned(size: int) -> Iterator[mmap.mmap]:
    """Yield a buffer that is aligned for direct I/O."""
    with mmap.mmap(-1, size) as buffer:
        yield buffer


_READER: Final = """
import mmap, os, sys
fd, buffer = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT), mmap.mmap(-1, 4096)
print("ready", flush=True)
assert sys.stdin.readline()
for i in range(int(sys.argv[2])):
    os.preadv(fd, [buffer], i % 1000 * 4096)
print("done", flush=True)
sys.stdin.readline()
"""


@contextmanager
def reader(disk: Disk, reads: int) -> Iterator[subprocess.Popen[str]]:
    """Yield a process that has opened ``disk`` and reads this many blocks once it gets a line on stdin.

    ``go`` sends the line and leaves the process running; with ``communicate`` the process ends after the reads.
    """
    command = [sys.executable, "-c", _READER, str(disk.path), str(reads)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def go(process: subprocess.Popen[str]) -> None:
    """Make a ``reader`` read, and return when it has; it keeps running."""
    assert process.stdin is not None
    assert process.stdout is not None
    print(file=process.stdin, flush=True)
    assert process.stdout.readline() == "done\n"


@contextmanager
def new_device() -> Iterator[str]:
    """Yield the path of a loop device that nobody has used; delete it on exit."""
    number = next(n for n in count() if not Path(f"/sys/block/loop{n}").exists())
    with Path("/dev/loop-control").open("rb") as control:
        fcntl.ioctl(control, _LOOP_CTL_ADD, number)

        def deleted() -> bool:
            with suppress(OSError):  # udev may have it open
                fcntl.ioctl(control, _LOOP_CTL_REMOVE, number)
            return not Path(f"/sys/block/loop{number}").exists()

        try:
            yield f"/dev/loop{number}"
        finally:
            until(deleted, 20, f"loop{number} to be deleted")


@contextmanager
def loop(size: int = 64 << 20, device: str = "--find") -> Iterator[Disk]:
    """Yield a loop device of ``size`` bytes, by default a free one; detach it and free its memory on exit."""
    backing = os.memfd_create("cwndtrace-test")
    try:
        os.ftruncate(backing, size)
        done = subprocess.run(
            ["losetup", "--show", device, f"/proc/{os.getpid()}/fd/{backing}"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"losetup failed; the kernel module may be missing (modprobe loop): {done.stderr}"
        disk = Disk(Path(done.stdout.strip()), backing, size)
        try:
            # udev reads a device that is new or was written to, unless it is locked.
            with disk.opened(os.O_RDONLY) as locked:
                fcntl.flock(locked, fcntl.LOCK_EX)
                yield disk
        finally:
            subprocess.run(["losetup", "--detach", str(disk.path)], check=True)
    finally:
        os.close(backing)


@contextmanager
def file_system(disk: Disk, path: Path, *, make: str = "", mount: str = "") -> Iterator[Path]:
    """Make an ext4 file system on a disk and mount it at ``path`` until exit; ``make`` and ``mount`` are options."""
    path.mkdir()
    run("mkfs.ext4", "-q", *make.split(), str(disk.path))
    run("mount", *mount.split(), str(disk.path), str(path))
    try:
        yield path
    finally:
        run("umount", "-l", str(path))


@dataclass
class Traced:
    """A trace of block I/O while it is entered. ``records`` has all of them after exit; ``seen`` grows until then.

    ``flights`` is the BPF program's table of requests at exit, and ``unfinished`` the number of those in it that were
    issued and hadn't ended.
    """

    instances: ClassVar[list[Traced]] = []
    chosen: ClassVar[BlockProgram | None] = None
    """The program of traces that name none; None for the best one."""

    filters: Filters = field(default_factory=Filters)
    poll: bool = True
    program: BlockProgram | None = field(default_factory=lambda: Traced.chosen)
    seen: list[Batch] = field(default_factory=list)
    unfinished: int = 0

    def __enter__(self) -> Self:
        self._kernel = Kernel(self.filters, reasons=(), block_program=self.program)
        self.session = Session(self._kernel)
        self.instances.append(self)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        if self.poll:
            self._thread.start()
        return self

    def _run(self) -> None:
        while not self._stop.is_set():
            self.seen += self.session.step()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            self._stop.set()
            if self.poll:
                self._thread.join()
            self.seen += self.session.finish()
            self.flights = [flight for _, flight in self.block.rows("slots")]
            self.unfinished = sum(1 for flight in self.flights if flight["key"] and flight["issue_ns"])
        finally:
            self.session.close()

    @property
    def block(self) -> Program:
        """The loaded BPF program."""
        assert self._kernel._block is not None
        return self._kernel._block

    @property
    def tally(self) -> Tally:
        """The counts of kept and lost records."""
        return self.session.tally

    @property
    def lost(self) -> int:
        """The number of records that count as lost."""
        return self.tally.lost["block_io"]

    def run_times(self) -> dict[str, tuple[int, int]]:
        """Return runs and nanoseconds of each BPF program so far, while kernel.bpf_stats_enabled is 1."""
        return self._kernel.run_times()

    def records(self, *disks: Disk) -> pd.DataFrame:
        """Return the records of ``disks``, in the order in which they came from the kernel."""
        frames = [batch.to_pandas() for batch in self.seen]
        rows = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame({"dev": []})
        return rows[rows["dev"].isin([disk.dev for disk in disks])].reset_index(drop=True)


def again_if_hidden(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test again, at most twice, if it failed and the kernel hid the end of a request from its trace.

    Some kernels run no programs while a task runs that a security policy protects, and a request may end in an
    interrupt of such a task. The trace counts it as lost or unfinished; without such a count, the test fails at once.
    """

    @functools.wraps(test)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        for left in (2, 1, 0):
            Traced.instances.clear()
            try:
                test(*args, **kwargs)
                return
            except AssertionError:
                if not left or not any(traced.lost + traced.unfinished for traced in Traced.instances):
                    raise

    return wrapped


def accounted(traced: Traced, counted: Stat, *disks: Disk) -> None:
    """Assert that each request that the kernel counted has one record, or counts as lost or unfinished."""
    short = counted - stat_of(traced.records(*disks))
    requests = short.reads, short.writes, short.discards
    assert min(*requests, short.read_sectors, short.write_sectors, short.discard_sectors) >= 0, short
    assert sum(requests) <= traced.lost + traced.unfinished, short


def stat_of(records: pd.DataFrame) -> Stat:
    """Return the sums of records in the form of the kernel's counters, which count zeroing as writing."""

    def sums(*ops: str) -> tuple[int, int]:
        rows = records[records["op"].isin(ops)]
        return len(rows), int(rows["bytes"].sum()) // SECTOR

    return Stat(*sums("read"), *sums("write", "write_zeroes"), *sums("discard"))


def fio(disk: Disk, *options: str) -> None:
    """Run fio on ``disk``; without ``options``, it reads random blocks of 4 KiB directly."""
    base = ["--name=test", f"--filename={disk.path}", f"--size={disk.size}", "--bs=4k", "--direct=1", "--rw=randread"]
    done = subprocess.run(["fio", "--minimal", *base, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
