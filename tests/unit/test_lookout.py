# SPDX-License-Identifier: Apache-2.0
"""A process that looks for another one: it always gets an answer, or knows soon that there is none."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pyarrow as pa
import pytest

from cwndtrace.capture import lookout
from cwndtrace.capture.connections import Snapshots
from cwndtrace.capture.lookout import Apart, Lookout
from cwndtrace.capture.source import Filters
from tests.live.tcp import stop, until


class Unsendable(Exception):
    """Can be packed, and not be unpacked."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(one + two)


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[Apart]:
    """One that has questions whose answers are what a test needs."""

    def fail(error: Exception) -> object:
        raise error

    answers = {
        "snapshot": lambda _look, number: (number, 0.0),
        "settings": lambda _look, _: lambda: "no function can be sent",
        "idle_sysctls": lambda _look, _: fail(Unsendable(1, 2)),
        "watched": lambda _look, _: (True, "eth0"),
        "pid_sockets": lambda _look, _: fail(OSError(12, "an error of what was asked")),
        "cgroup_ids": lambda _look, _: set(range(1_000_000)),
    }
    monkeypatch.setattr(lookout, "_QUESTIONS", answers)
    monkeypatch.setattr("cwndtrace.privileges.drop", lambda *_: None)
    monkeypatch.setattr(lookout, "_QUICK_S", 5)
    made = Apart(Filters(), None)
    yield made
    made.close()
    assert made._process.exitcode is not None


def test_what_can_not_be_sent_is_no_answer(apart: Apart) -> None:
    assert apart.settings() == {}
    assert apart.lacking is not None
    assert "had an answer that can't be sent" in apart.lacking
    assert apart.idle_sysctls() == []
    # It goes on to answer what can be.
    assert apart.watched() == (True, "eth0")


def test_an_error_is_an_answer(apart: Apart) -> None:
    with pytest.raises(OSError, match="an error of what was asked"):
        apart.pid_sockets()
    assert apart.lacking is None


def test_no_signal_that_can_be_ignored_ends_it(apart: Apart) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGALRM, signal.SIGTSTP):
        os.kill(apart.pid, number)
    assert apart.snapshot(7) == (7, 0.0)
    assert apart.watched() == (True, "eth0")


def test_one_that_is_stopped_costs_one_wait(apart: Apart) -> None:
    stop(apart.pid)
    assert apart.watched() is None
    assert apart.lacking is not None
    assert "didn't answer within 5 s" in apart.lacking
    # Not even asked, as long as an answer is late.
    number = apart._quick._number
    assert [apart.watched() for _ in range(100)] == [None] * 100
    assert apart._quick._number == number
    os.kill(apart.pid, signal.SIGCONT)
    assert apart._quick._end.poll(60)
    assert apart.watched() == (True, "eth0")


def test_one_that_is_stopped_in_the_midst_of_an_answer(apart: Apart) -> None:
    """Its megabytes don't fit into the socket, so that it is still sending when they begin to arrive."""
    apart._quick._end.send_bytes(b"1 cgroup_ids 0")
    assert apart._quick._end.poll(60)
    stop(apart.pid)
    assert apart.watched() is None
    assert apart.lacking is not None
    assert "was stopped in the midst of an answer" in apart.lacking
    assert apart.watched() is None


def test_one_that_is_gone(apart: Apart) -> None:
    os.kill(apart.pid, signal.SIGKILL)
    assert apart.watched() is None
    assert apart.snapshot(1) is None
    assert apart.lacking is not None
    assert "was ended from outside" in apart.lacking


def test_what_it_is_asked_is_what_a_lookout_answers() -> None:
    assert set(lookout._QUESTIONS) <= set(dir(Lookout))


@pytest.mark.parametrize("answered", [True, False])
def test_one_long_wait_is_no_reason_for_a_longer_one(answered: bool) -> None:
    """A snapshot that a stopped process held up costs no CPU, so the next one comes as soon as ever."""
    asked, goes_on = threading.Event(), threading.Event()
    table = pa.table({"a": [1]})

    def take() -> tuple[pa.Table, float] | None:
        if not asked.is_set() and threading.current_thread() is not threading.main_thread():
            asked.set()
            assert goes_on.wait(60)
            return (table, 0.0) if answered else None
        return table, 0.0

    snapshots = Snapshots(take, interval_s=0.01)
    found = list(snapshots.drain())
    assert asked.wait(60)
    time.sleep(1)  # how long it is held up is the point: counted as work, it would be twenty
    goes_on.set()

    def more() -> bool:
        found.extend(snapshots.drain())
        return len(found) >= 4

    until(more, 60, "the snapshots after that")
    snapshots.finish()
