# SPDX-License-Identifier: Apache-2.0
"""A question to the helper process gets an answer, or fails soon, whatever happens to the helper."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from cwndtrace.capture import connections, privsep
from cwndtrace.capture.connections import Columns, Snapshots
from cwndtrace.capture.privsep import Helper, PrivilegedHelper
from cwndtrace.capture.source import Filters
from tests.harness.tcp import stop, until


class Unsendable(Exception):
    """An exception that can be pickled, but not unpickled."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(one + two)

    def __reduce__(self) -> tuple[type, tuple[int]]:
        # Without this, Dask makes it whole again: it changes how all exceptions of a process are pickled.
        return type(self), (3,)


@pytest.fixture
def helper(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[PrivilegedHelper]:
    """A helper whose answers are replaced by those that the tests need; the parameter is its time to answer, s."""

    def fail(error: Exception) -> object:
        raise error

    answers = {
        "snapshot": lambda _helper, _: ([], 7.0),
        "settings": lambda _helper, _: lambda: "no function can be sent",
        "idle_sysctls": lambda _helper, _: fail(Unsendable(1, 2)),
        "watched": lambda _helper, _: (True, "eth0"),
        "pid_sockets": lambda _helper, _: fail(OSError(12, "an error of what was asked")),
        "cgroup_ids": lambda _helper, _: set(range(1_000_000)),
    }
    monkeypatch.setattr(privsep, "_QUESTIONS", answers)
    monkeypatch.setattr("cwndtrace.privileges.drop", lambda *_: None)
    monkeypatch.setattr(privsep, "_QUICK_S", getattr(request, "param", 5))
    privileged_helper = PrivilegedHelper(Filters(), None)
    yield privileged_helper
    privileged_helper.close()
    assert privileged_helper._process.exitcode is not None


def test_an_answer_that_cannot_be_sent_counts_as_none(helper: PrivilegedHelper) -> None:
    assert helper.settings() == {}
    assert helper.lacking is not None
    assert "couldn't send its answer" in helper.lacking
    assert helper.idle_sysctls() == []
    # It still answers other questions.
    assert helper.watched() == (True, "eth0")


def test_an_error_of_the_question_is_raised(helper: PrivilegedHelper) -> None:
    with pytest.raises(OSError, match="an error of what was asked"):
        helper.pid_sockets()
    assert helper.lacking is None


def test_no_signal_that_can_be_ignored_ends_the_helper(helper: PrivilegedHelper) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGALRM, signal.SIGTSTP):
        os.kill(helper.pid, number)
    assert helper.snapshot() == ([], 7.0)
    assert helper.watched() == (True, "eth0")


@pytest.mark.slow
def test_a_stopped_helper_is_waited_for_once(helper: PrivilegedHelper) -> None:
    stop(helper.pid)
    helper._quick._timeout_s = 1
    assert helper.watched() is None
    assert helper.lacking is not None
    assert "didn't answer within 1 s" in helper.lacking
    # No further question is sent while an answer is late.
    number = helper._quick._number
    assert [helper.watched() for _ in range(100)] == [None] * 100
    assert helper._quick._number == number
    os.kill(helper.pid, signal.SIGCONT)
    helper._quick._timeout_s = 60
    assert helper._quick._end.poll(60)
    assert helper.watched() == (True, "eth0")


@pytest.mark.slow
@pytest.mark.parametrize("helper", [1], indirect=True)
def test_a_helper_that_stops_within_an_answer_gives_none(helper: PrivilegedHelper) -> None:
    """The answer has megabytes, more than the socket holds, so the helper is still sending when it is stopped."""
    helper._quick._end.send_bytes(b"1 cgroup_ids -")
    assert helper._quick._end.poll(60)
    stop(helper.pid)
    assert helper.watched() is None
    assert helper.lacking is not None
    assert "was stopped in the middle of an answer" in helper.lacking
    assert helper.watched() is None


@pytest.mark.parametrize(
    ("filters", "later"),
    [
        (Filters(), ""),
        (Filters(pid=9), ", sockets that the process opens later"),
        (Filters(unit="nginx.service"), ", cgroups that are made later"),
    ],
)
def test_a_killed_helper_gives_no_answers(helper: PrivilegedHelper, filters: Filters, later: str) -> None:
    helper._filters = filters
    os.kill(helper.pid, signal.SIGKILL)
    assert helper.watched() is None
    assert helper.snapshot() is None
    assert helper.lacking == (
        "the helper process ended unexpectedly (see dmesg for the reason); the trace goes on without snapshots of "
        f"connections, later changes of network settings and interfaces, names of workloads{later}"
    )


def test_every_question_is_a_method_of_the_helper() -> None:
    assert set(privsep._QUESTIONS) <= set(dir(Helper))


@pytest.mark.slow
@pytest.mark.parametrize("answered", [True, False])
def test_a_delayed_snapshot_does_not_lengthen_the_interval(answered: bool) -> None:
    """A snapshot that a stopped helper delays takes no CPU time, so the interval to the next one stays the same."""
    started, may_end = threading.Event(), threading.Event()

    def take() -> tuple[list[Columns], float] | None:
        if not started.is_set() and threading.current_thread() is not threading.main_thread():
            started.set()
            assert may_end.wait(60)
            return ([], 0.0) if answered else None
        return [], 0.0

    snapshots = Snapshots(take, lambda: 0, interval_s=0.01)
    taken = list(snapshots.drain())

    def begun() -> bool:
        taken.extend(snapshots.drain())
        return started.is_set()

    until(begun, 60, "the second snapshot")
    time.sleep(1)  # the delay; if it counted as work, the next interval would be 20 s
    may_end.set()

    def more() -> bool:
        taken.extend(snapshots.drain())
        return len(taken) >= 4

    until(more, 60, "the snapshots after that")
    snapshots.finish()


class FakeTime:
    """A clock that is an event, too, which is set after ``end`` seconds. Waiting for it takes no real time."""

    def __init__(self, end: float) -> None:
        self.now, self._end = 0.0, end
        self.passing: Callable[[], object] = lambda: None
        """What happens while somebody waits."""

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        self.passing()
        return self.is_set()

    def is_set(self) -> bool:
        return self.now >= self._end


def in_fake_time(monkeypatch: pytest.MonkeyPatch, fake: FakeTime, cpu_s: float, took_s: float) -> Snapshots:
    """Return snapshots whose thread ``_run`` stands for; each takes these times and has the moment when it began."""
    clocks = SimpleNamespace(monotonic=lambda: fake.now, thread_time=lambda: 0.0)
    monkeypatch.setattr(connections, "time", clocks)
    monkeypatch.setattr(connections, "table", lambda taken, _: taken)
    snapshots = Snapshots(lambda: None, lambda: 0)

    def take() -> tuple[list[Columns], float]:
        begun: list[Columns] = [{"begun": np.array([fake.now])}]
        fake.now += took_s
        return begun, cpu_s

    snapshots._take = take
    monkeypatch.setattr(snapshots, "_stop", fake)
    return snapshots


def moments(snapshots: Snapshots) -> list[float]:
    return [float(columns["begun"][0]) for taken in snapshots._tables for columns in taken]


@pytest.mark.parametrize(
    ("cpu_s", "took_s", "apart_s"),
    [
        (0.01, 0.01, 2.01),
        (0.2, 0.2, 4.2),  # a twentieth of a CPU
        (0.2, 3.0, 7.0),  # it waited for a CPU, so the pause isn't longer
        (0.2, 7.5, 10.0),
        (3.1, 3.1, 10.0),  # very many connections: a twentieth would be one a minute
        (3.1, 28.0, 30.0),
    ],
)
def test_snapshots_follow_their_cpu_time_and_are_at_most_ten_seconds_apart(
    monkeypatch: pytest.MonkeyPatch, cpu_s: float, took_s: float, apart_s: float
) -> None:
    fake, begun = FakeTime(end=200), []
    snapshots = in_fake_time(monkeypatch, fake, cpu_s, took_s)

    def drain() -> None:
        begun.extend(moments(snapshots))
        snapshots._tables = []

    fake.passing = drain
    snapshots._run()
    gaps = [after - before for before, after in pairwise(begun)]
    assert gaps == pytest.approx([apart_s] * len(gaps))
    assert len(gaps) >= 5
    # The last one comes at the end, whenever the one before it was.
    (last,) = moments(snapshots)
    assert last >= 200


def test_a_reader_that_stalls_for_a_moment_does_not_double_the_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, begun = FakeTime(end=20), []
    snapshots = in_fake_time(monkeypatch, fake, 1.0, 0.0)

    def drain_late() -> None:
        if fake.now > 12:
            begun.extend(moments(snapshots))
            snapshots._tables = []

    fake.passing = drain_late
    snapshots._run()
    assert [*begun, *moments(snapshots)] == pytest.approx([2, 14, 24])
