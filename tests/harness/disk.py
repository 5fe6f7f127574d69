# SPDX-License-Identifier: Apache-2.0
"""Loop devices over memory, what the kernel itself counts of them, and a trace of what they do."""

from __future__ import annotations

import fcntl
import functools
import mmap
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Final, Self

import pandas as pd

from cwndtrace.capture.live import Kernel
from cwndtrace.capture.program import Program
from cwndtrace.capture.session import Batch, Session, Tally
from cwndtrace.capture.source import Filters
from cwndtrace.records.layout import bpf_dir
from tests.harness.tcp import until

SECTOR: Final = 512
BLOCK: Final = 4096
SLAB: Final = int((bpf_dir() / "block_io.bpf.c").read_text().partition("#define SLAB_RECORDS ")[2].split()[0])
"""How many records a CPU hands over at once."""
_BLKFLSBUF: Final = 0x1261
_BLKDISCARD: Final = 0x1277


@dataclass(frozen=True)
class Stat:
    """What /sys/block/NAME/stat counts: finished requests and their sectors, by kind."""

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
        """Major and minor number, as records show them."""
        number = self.path.stat().st_rdev
        return f"{os.major(number)}:{os.minor(number)}"

    def stat(self) -> Stat:
        """The kernel's own counters now."""
        # Documentation/block/stat.rst: ios, merges, sectors and ticks for reads and for writes; three of the
        # queue; ios, merges, sectors and ticks for discards.
        columns = [int(text) for text in (Path("/sys/block") / self.path.name / "stat").read_text().split()]
        return Stat(columns[0], columns[2], columns[4], columns[6], columns[11], columns[13])

    @contextmanager
    def opened(self, flags: int = os.O_RDWR) -> Iterator[int]:
        """A file descriptor of it, direct and read-write if nothing else is said."""
        fd = os.open(self.path, flags | (os.O_DIRECT if flags == os.O_RDWR else 0))
        try:
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def counted(self, requests: int) -> Iterator[None]:
        """Leaving it waits until the kernel has counted so many more reads and writes.

        It wakes who waits for a request before it counts it and calls block_io_done.
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
        """Drop what the page cache holds of it."""
        with self.opened(os.O_RDONLY) as fd:
            fcntl.ioctl(fd, _BLKFLSBUF, 0)


@contextmanager
def aligned(size: int) -> Iterator[mmap.mmap]:
    """A buffer that direct I/O takes."""
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
    """A process that has opened ``disk`` and reads so many blocks when told to: by ``go``, or to its end by a line
    that ``communicate`` sends it."""
    command = [sys.executable, "-c", _READER, str(disk.path), str(reads)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def go(process: subprocess.Popen[str]) -> None:
    """Have a ``reader`` read; it has when this returns, and lives on."""
    assert process.stdin is not None
    assert process.stdout is not None
    print(file=process.stdin, flush=True)
    assert process.stdout.readline() == "done\n"


@contextmanager
def loop(size: int = 64 << 20) -> Iterator[Disk]:
    """A loop device of ``size`` bytes; it goes when the block is left, and so does its memory."""
    backing = os.memfd_create("cwndtrace-test")
    try:
        os.ftruncate(backing, size)
        made = subprocess.run(
            ["losetup", "--find", "--show", f"/proc/{os.getpid()}/fd/{backing}"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert made.returncode == 0, f"losetup failed, perhaps for lack of the module (modprobe loop): {made.stderr}"
        disk = Disk(Path(made.stdout.strip()), backing, size)
        try:
            # udev reads a device that is new or was written to, but not one that somebody has locked.
            with disk.opened(os.O_RDONLY) as locked:
                fcntl.flock(locked, fcntl.LOCK_EX)
                yield disk
        finally:
            subprocess.run(["losetup", "--detach", str(disk.path)], check=True)
    finally:
        os.close(backing)


@dataclass
class Traced:
    """Block I/O traced while it is entered. Leave it before you look at ``records``; ``seen`` may be read before.

    ``unfinished`` is how many requests had been issued and had no end when it was left.
    """

    made: ClassVar[list[Traced]] = []

    filters: Filters = field(default_factory=Filters)
    poll: bool = True
    seen: list[Batch] = field(default_factory=list)
    unfinished: int = 0

    def __enter__(self) -> Self:
        self._kernel = Kernel(self.filters, reasons=())
        self.session = Session(self._kernel)
        self.made.append(self)
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
            flights = self.block.rows("slots")
            self.unfinished = sum(1 for _, flight in flights if flight["rq"] and flight["issue_ns"])
        finally:
            self.session.close()

    @property
    def block(self) -> Program:
        """What is in the kernel for it."""
        assert self._kernel._block is not None
        return self._kernel._block

    @property
    def tally(self) -> Tally:
        """What was kept and lost."""
        return self.session.tally

    @property
    def lost(self) -> int:
        """Records counted as lost."""
        return self.tally.lost["block_io"]

    def records(self, *disks: Disk) -> pd.DataFrame:
        """The records of ``disks``, in the order in which they were handed over."""
        frames = [batch.to_pandas() for batch in self.seen]
        rows = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame({"dev": []})
        return rows[rows["dev"].isin([disk.dev for disk in disks])].reset_index(drop=True)


def again_if_hidden(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test again, twice at most, if it failed and the kernel hid the end of a request from its trace.

    Some kernels don't run programs over tasks that a policy protects, and an end may come in an interrupt over
    one. The trace counts these requests, as lost or as unfinished; one that is neither is a failure at once.
    """

    @functools.wraps(test)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        for left in (2, 1, 0):
            Traced.made.clear()
            try:
                test(*args, **kwargs)
                return
            except AssertionError:
                if not left or not any(traced.lost + traced.unfinished for traced in Traced.made):
                    raise

    return wrapped


def accounted(traced: Traced, counted: Stat, *disks: Disk) -> None:
    """Each request that the kernel counted has one record, or its end was hidden and it counts as that."""
    short = counted - stat_of(traced.records(*disks))
    requests = short.reads, short.writes, short.discards
    assert min(*requests, short.read_sectors, short.write_sectors, short.discard_sectors) >= 0, short
    assert sum(requests) <= traced.lost + traced.unfinished, short


def stat_of(records: pd.DataFrame) -> Stat:
    """Records summed up as the kernel counts requests."""

    def kind(op: str) -> tuple[int, int]:
        rows = records[records["op"] == op]
        return len(rows), int(rows["bytes"].sum()) // SECTOR

    return Stat(*kind("read"), *kind("write"), *kind("discard"))


def fio(disk: Disk, *options: str) -> None:
    """Run fio on ``disk``: 4 KiB direct reads at random unless ``options`` say otherwise."""
    base = ["--name=test", f"--filename={disk.path}", f"--size={disk.size}", "--bs=4k", "--direct=1", "--rw=randread"]
    done = subprocess.run(["fio", "--minimal", *base, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
