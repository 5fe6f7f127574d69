# SPDX-License-Identifier: Apache-2.0
"""Tests of tracing on each CPU of a guest, and while CPUs go offline and come back.

Every reset is kept, and each record of block I/O is kept or counted as lost. Only a guest of tools/vm has its CPUs
switched, whatever the environment says.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import pytest

from tests.harness import tcp
from tests.harness.disk import BLOCK, SLAB, Disk, Traced, aligned, loop, stat_of
from tests.harness.guest import in_guest
from tests.harness.tracing import Tracer, check

pytestmark = pytest.mark.vm

CPUS: Final = range(os.sysconf("SC_NPROCESSORS_CONF"))
READS: Final = 25
ROUNDS: Final = 2
LONG_S: Final = 120


@pytest.fixture(scope="module", autouse=True)
def guest() -> Iterator[None]:
    """Skip the tests outside of a guest, because they switch CPUs; bring all CPUs online at the end."""
    if not in_guest():
        pytest.skip("needs a guest of its own: make vm-test")
    yield
    for cpu in CPUS[1:]:
        switch(cpu, True)


@pytest.fixture
def disk() -> Iterator[Disk]:
    """A loop device whose requests end on the CPU that they began on, so each CPU has some."""
    with loop() as device:
        (Path("/sys/block") / device.path.name / "queue/rq_affinity").write_text("2")
        yield device


def switch(cpu: int, on: bool) -> None:
    """Bring a CPU online, or take it offline, and return when that is done."""
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/online")
    path.write_text(str(int(on)))
    assert path.read_text().strip() == str(int(on))


class Worker(threading.Thread):
    """A thread that reads blocks and lets a connection be idle and send, on one CPU as long as that is online."""

    def __init__(self, cpu: int, disk: Disk, connection: tcp.TcpConnection) -> None:
        super().__init__(daemon=True)
        self.cpu = cpu
        self.reads = 0
        self.rounds: Counter[bool] = Counter()
        """The number of rounds on its CPU (True), and on others while that was offline (False)."""
        self.error: BaseException | None = None
        self.ended = threading.Event()
        self._disk = disk
        self._connection = connection

    def run(self) -> None:
        """Work until ``ended`` is set."""
        try:
            with self._disk.opened() as fd, aligned(BLOCK) as buffer:
                while not self.ended.is_set():
                    here = self._move()
                    self._connection.grow()
                    for block in range(READS):
                        assert os.preadv(fd, [buffer], block * BLOCK) == BLOCK
                        self.reads += 1
                    now = self._connection.quiet()
                    self.ended.wait(max(0, now.rto_us - now.last_snd_us) / 1e6 + 0.02)
                    self._connection.idle(0)
                    self._connection.send()
                    self.rounds[here] += 1
        except BaseException as e:
            self.error = e

    def _move(self) -> bool:
        with suppress(OSError):
            os.sched_setaffinity(0, {self.cpu})
            return True
        return False


class Workers:
    """A worker for each CPU; they run while it is entered."""

    def __init__(self, disk: Disk, connections: list[tcp.TcpConnection]) -> None:
        self.workers = [Worker(cpu, disk, connection) for cpu, connection in zip(CPUS, connections, strict=True)]

    def until_busy(self, cpu: int, here: bool) -> None:
        """Wait until the CPU's worker has done another round, on its CPU if ``here``, else on another one."""
        worker = self.workers[cpu]
        before = worker.rounds[here]
        tcp.until(lambda: worker.error or worker.rounds[here] > before, LONG_S, f"CPU {cpu}'s worker")
        if worker.error:
            raise worker.error

    def __enter__(self) -> Self:
        for worker in self.workers:
            worker.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for worker in self.workers:
            worker.ended.set()
        for worker in self.workers:
            worker.join()
        errors = [worker.error for worker in self.workers if worker.error]
        if errors and error is None:
            raise errors[0]


@pytest.mark.parametrize("moving", [False, True], ids=["still", "moving"])
def test_no_reset_is_lost_and_reads_are_kept_or_counted(
    moving: bool, disk: Disk, space: tcp.Space, drain: tcp.Drain
) -> None:
    """With ``moving``, one CPU comes online after tracing began, and each CPU goes offline and comes back."""
    assert str(len(CPUS)) == os.environ["CWNDTRACE_VM_CPUS"]
    if moving and len(CPUS) == 1:
        pytest.skip("the only CPU can't go offline")
    if moving:
        switch(CPUS[-1], False)
    connections = [tcp.connect(space, drain) for _ in CPUS]
    switched, before = 0, disk.stat()
    try:
        with Tracer(netns=space.name, idle_only=True) as tracer:
            begin = time.monotonic()
            with Traced() as traced, Workers(disk, connections) as load:
                if moving:
                    switch(CPUS[-1], True)
                for _ in range(ROUNDS):
                    for cpu in CPUS:
                        if moving and cpu:
                            switch(cpu, False)
                            load.until_busy(cpu, here=False)
                            switch(cpu, True)
                            switched += 2
                        load.until_busy(cpu, here=True)
                reads = sum(worker.reads for worker in load.workers)
            took = time.monotonic() - begin
            reads = sum(worker.reads for worker in load.workers)
            tcp.until(lambda: (disk.stat() - before).reads >= reads, LONG_S, "all reads to be counted")
            resets = check(tracer, *connections)
            lost = dict(tracer.tally.lost)
    finally:
        for connection in connections:
            connection.close()
    records = traced.records(disk)
    by_cpu = dict(sorted(Counter(records["cpu"]).items()))
    print(
        f"{len(CPUS)} CPUs, switched {switched} times, {took:.0f} s on {tracer.probe}: "
        f"{reads} reads, {len(records)} kept, {traced.lost} lost, "
        f"by CPU {by_cpu}; {resets} resets, all kept; lost {lost}"
    )
    assert len(records) + traced.lost == (disk.stat() - before).reads == reads
    assert stat_of(records).writes == 0
    assert set(by_cpu) == set(CPUS)
    assert resets >= len(CPUS) * ROUNDS
    # A skipped run of the program that follows windows counts as a lost sample.
    assert not any(number for name, number in lost.items() if name != "cwnd_sample")


def test_records_on_an_offline_cpu_are_read_at_the_end(disk: Disk) -> None:
    if len(CPUS) == 1:
        pytest.skip("the only CPU can't go offline")
    last = CPUS[-1]
    everywhere = os.sched_getaffinity(0)
    # These fill two slabs, and one record of a third.
    reads = 2 * SLAB + 1
    with Traced(poll=False) as traced:
        os.sched_setaffinity(0, {last})
        try:
            disk.read(*range(reads))
        finally:
            os.sched_setaffinity(0, everywhere)
        switch(last, False)
    switch(last, True)
    records = traced.records(disk)
    assert (len(records), traced.lost) == (reads, 0)
    assert set(records["cpu"]) == {last}
