# SPDX-License-Identifier: Apache-2.0
"""A test of the causes of idle time on connections for which they are known: chatter, requests, disks and sleeps."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

import cwndtrace
from cwndtrace.capture.source import Filters
from cwndtrace.kernel import cgroups
from cwndtrace.lab.recording import Recording
from tests.harness import disk, tcp

pytestmark = pytest.mark.live

IDLE_S: Final = 1.5
BURST: Final = 200_000
READ: Final = 1 << 20


@dataclass
class IdleSenders:
    """What the scenarios share; ``expected`` has the causes of each connection's idle times of at least a second."""

    connect: tcp.Connect
    device: disk.Disk
    folder: Path
    expected: dict[str, tuple[tcp.TcpConnection, list[str]]] = field(default_factory=dict)

    def connection(self, name: str, *causes: str) -> tcp.TcpConnection:
        """Return a connection whose window is open, with the causes to find in turn; ``a|b`` is either of two."""
        c = self.connect()
        c.grow()
        self.expected[name] = c, list(causes)
        return c


def burst(c: tcp.TcpConnection) -> None:
    """Send, and leave the window open for the next time."""
    c.sock.sendall(bytes(BURST))
    c.quiet()
    c.grow()


def ask(c: tcp.TcpConnection, size: int = 300) -> None:
    """Send a request from the peer and read it at the sending end, with the chatter before it."""
    c.peer.sendall(bytes(size - 1) + b"?")
    while not c.sock.recv(1 << 16).endswith(b"?"):
        pass


def late(seconds: float = IDLE_S) -> None:
    """Wait for the sender's own timer."""
    time.sleep(seconds)


@contextmanager
def meanwhile(work: Callable[[threading.Event], object]) -> Iterator[None]:
    """Run ``work`` in another thread until exit, when its argument is set."""
    stop = threading.Event()
    thread = threading.Thread(target=work, args=(stop,))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def chatter(c: tcp.TcpConnection, every: float, phase: float) -> Iterator[None]:
    """Let the peer send ten bytes by its own clock, after ``phase`` seconds for the first time."""

    def talk(stop: threading.Event) -> None:
        wait = phase
        while not stop.wait(wait):
            c.peer.send(b"0123456789")
            wait = every

    with meanwhile(talk):
        yield


def read_for(path: Path, go_on: Callable[[], bool]) -> None:
    """Read a device past the page cache."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, READ) as buffer:
            at = 0
            while go_on():
                at = (at + os.preadv(fd, [buffer], at)) % (32 * READ)
    finally:
        os.close(fd)


_CHILD: Final = """
import mmap, os, sys, time
fd, buffer, end = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT), mmap.mmap(-1, 1 << 20), time.monotonic() + 1.5
while time.monotonic() < end:
    os.preadv(fd, [buffer], 0)
os.write(1, b"done")
"""


def piped(device: disk.Disk) -> None:
    """Wait for a child process that reads a device and then writes to a pipe."""
    with subprocess.Popen([sys.executable, "-S", "-c", _CHILD, str(device.path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.read() == b"done"


@contextmanager
def own_cgroup() -> Iterator[None]:
    """Put this process into a new cgroup until exit."""
    before = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    home = cgroups.mount_point() / before.lstrip("/")
    new = home / f"{tcp.PREFIX}{os.getpid()}-idle"
    new.mkdir()
    try:
        (new / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (home / "cgroup.procs").write_text(str(os.getpid()))
        new.rmdir()


# ---- the scenarios ----------------------------------------------------------------------------------


def requests(lab: IdleSenders) -> None:
    """The peer asks after a pause, and the sender answers at once."""
    c = lab.connection("request and answer", *["peer"] * 3)
    for _ in range(3):
        late()
        ask(c)
        burst(c)


def small_requests(lab: IdleSenders) -> None:
    """A request of few bytes is one, too, if it is answered."""
    c = lab.connection("small requests", *["peer"] * 2)
    for _ in range(2):
        late()
        ask(c, 10)
        burst(c)


def slow_server(lab: IdleSenders) -> None:
    """The peer asks at once, and the sender takes its time. In its own cgroup, nobody else's disk may be the cause."""
    with own_cgroup():
        c = lab.connection("slow server", "application")
        ask(c)
        late()
        burst(c)


def timer(lab: IdleSenders) -> None:
    """The sender sends by its own clock, and the peer is silent; in its own cgroup too."""
    with own_cgroup():
        c = lab.connection("timer, silent peer", *["application"] * 2)
        for _ in range(2):
            late()
            burst(c)


def timer_and_chatter(lab: IdleSenders) -> None:
    """The sender sends by its own clock, and the peer sends ten bytes a second by its own."""
    c = lab.connection("timer, chatty peer", *["peer or application"] * 3)
    with chatter(c, 1, 0.3):
        for _ in range(3):
            late(2.15)
            burst(c)


def slow_and_chatter(lab: IdleSenders) -> None:
    """The sender takes its time for an answer, and the peer chats meanwhile."""
    c = lab.connection("slow server, chatty peer", "peer or application")
    with chatter(c, 0.4, 0.2):
        ask(c)
        late(1.7)
        burst(c)


def requests_and_chatter(lab: IdleSenders) -> None:
    """The peer chats and then asks for something."""
    c = lab.connection("request, chatty peer", *["peer"] * 2)
    for _ in range(2):
        with chatter(c, 0.5, 0.4):
            late()
            ask(c, 1000)
            burst(c)


def reads(lab: IdleSenders) -> None:
    """The sending thread reads from a disk, whatever the peer sends meanwhile."""
    c = lab.connection("own reads, chatty peer", "disk")
    end = time.monotonic() + IDLE_S
    with chatter(c, 0.4, 0.2):
        read_for(lab.device.path, lambda: time.monotonic() < end)
        burst(c)


def fsyncs(lab: IdleSenders) -> None:
    """The sending thread is inside fsync nearly all the time."""
    c = lab.connection("fsync", "disk|probably disk")
    with disk.file_system(lab.device, lab.folder / "mounted") as path, (path / "file").open("wb") as file:
        end = time.monotonic() + IDLE_S
        while time.monotonic() < end:
            if file.tell() > 8 << 20:
                file.seek(0)
                file.truncate()
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
        burst(c)


def child_in_cgroup(lab: IdleSenders) -> None:
    """A child in the sender's own cgroup reads and pipes."""
    with own_cgroup():
        c = lab.connection("child that pipes, own cgroup", "probably disk")
        piped(lab.device)
        burst(c)


def child_in_root(lab: IdleSenders) -> None:
    """The same where all processes are in the root cgroup, which says less."""
    c = lab.connection("child that pipes", "disk or application")
    piped(lab.device)
    burst(c)


def sleep_beside_reads(lab: IdleSenders) -> None:
    """The sending thread sleeps, and others read: several, so that a read is under way when it sends."""
    c = lab.connection("sleep beside reads", "disk or application")
    with ExitStack() as readers:
        for _ in range(3):
            readers.enter_context(meanwhile(lambda stop: read_for(lab.device.path, lambda: not stop.is_set())))
        late()
        burst(c)


SCENARIOS: Final = (
    requests, small_requests, slow_server, timer, timer_and_chatter, slow_and_chatter, requests_and_chatter, reads,
    fsyncs, child_in_cgroup, child_in_root, sleep_beside_reads,
)  # fmt: skip


def test_causes_of_idle_time_are_right(tmp_path: Path, connect: tcp.Connect) -> None:
    with ExitStack() as stack:
        lab = IdleSenders(connect, stack.enter_context(disk.loop()), tmp_path)
        before = lab.connection("idle since before the trace", "unknown")
        time.sleep(1)
        with Recording(tmp_path / "a.cwnd", Filters(), cwndtrace.__version__) as recording:
            burst(before)
            for scenario in SCENARIOS:
                scenario(lab)
        rows = recording.trace().verdicts
    rows = rows[(rows["reason"] == "idle") & (rows["idle_us"] >= 1e6)]
    wrong = []
    for name, (c, causes) in lab.expected.items():
        mine = rows[(rows["netns_ino"] == c.space.inode) & (rows["sport"] == c.sport) & (rows["dport"] == c.dport)]
        found = list(mine["cause"])
        print(f"{name:<30}{', '.join(found)}")
        if len(found) != len(causes) or any(f not in one.split("|") for f, one in zip(found, causes, strict=True)):
            parts = ["idle_us", "last_rcv_us", "unclear_us", "disk_us", "disk_of", "disk_device"]
            wrong.append((name, causes, mine[["cause", *parts]].to_dict("records")))
    assert not wrong
