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

from cwndtrace.capture import privsep
from cwndtrace.capture.connections import Snapshots
from cwndtrace.capture.privsep import Helper, PrivilegedHelper
from cwndtrace.capture.source import Filters
from tests.harness.tcp import stop, until


class Unsendable(Exception):
    """Can be packed, and not be unpacked."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(one + two)


@pytest.fixture
def helper(monkeypatch: pytest.MonkeyPatch) -> Iterator[PrivilegedHelper]:
    """One that has questions whose answers are what a test needs."""

    def fail(error: Exception) -> object:
        raise error

    answers = {
        "snapshot": lambda _helper, number: (number, 0.0),
        "settings": lambda _helper, _: lambda: "no function can be sent",
        "idle_sysctls": lambda _helper, _: fail(Unsendable(1, 2)),
        "watched": lambda _helper, _: (True, "eth0"),
        "pid_sockets": lambda _helper, _: fail(OSError(12, "an error of what was asked")),
        "cgroup_ids": lambda _helper, _: set(range(1_000_000)),
    }
    monkeypatch.setattr(privsep, "_QUESTIONS", answers)
    monkeypatch.setattr("cwndtrace.privileges.drop", lambda *_: None)
    monkeypatch.setattr(privsep, "_QUICK_S", 5)
    made = PrivilegedHelper(Filters(), None)
    yield made
    made.close()
    assert made._process.exitcode is not None


def test_what_can_not_be_sent_is_no_answer(helper: PrivilegedHelper) -> None:
    assert helper.settings() == {}
    assert helper.lacking is not None
    assert "couldn't send its answer" in helper.lacking
    assert helper.idle_sysctls() == []
    # It goes on to answer what can be.
    assert helper.watched() == (True, "eth0")


def test_an_error_is_an_answer(helper: PrivilegedHelper) -> None:
    with pytest.raises(OSError, match="an error of what was asked"):
        helper.pid_sockets()
    assert helper.lacking is None


def test_no_signal_that_can_be_ignored_ends_it(helper: PrivilegedHelper) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGALRM, signal.SIGTSTP):
        os.kill(helper.pid, number)
    assert helper.snapshot(7) == (7, 0.0)
    assert helper.watched() == (True, "eth0")


def test_one_that_is_stopped_costs_one_wait(helper: PrivilegedHelper) -> None:
    stop(helper.pid)
    assert helper.watched() is None
    assert helper.lacking is not None
    assert "didn't answer within 5 s" in helper.lacking
    # Not even asked, as long as an answer is late.
    number = helper._quick._number
    assert [helper.watched() for _ in range(100)] == [None] * 100
    assert helper._quick._number == number
    os.kill(helper.pid, signal.SIGCONT)
    assert helper._quick._end.poll(60)
    assert helper.watched() == (True, "eth0")


def test_one_that_is_stopped_in_the_midst_of_an_answer(helper: PrivilegedHelper) -> None:
    """Its megabytes don't fit into the socket, so that it is still sending when they begin to arrive."""
    helper._quick._end.send_bytes(b"1 cgroup_ids 0")
    assert helper._quick._end.poll(60)
    stop(helper.pid)
    assert helper.watched() is None
    assert helper.lacking is not None
    assert "was stopped in the middle of an answer" in helper.lacking
    assert helper.watched() is None


def test_one_that_is_gone(helper: PrivilegedHelper) -> None:
    os.kill(helper.pid, signal.SIGKILL)
    assert helper.watched() is None
    assert helper.snapshot(1) is None
    assert helper.lacking is not None
    assert "ended unexpectedly" in helper.lacking


def test_what_it_is_asked_is_what_the_helper_answers() -> None:
    assert set(privsep._QUESTIONS) <= set(dir(Helper))


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
