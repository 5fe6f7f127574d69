# SPDX-License-Identifier: Apache-2.0
"""A question to the helper process gets an answer, or fails soon, whatever happens to the helper."""

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
    """An exception that can be pickled, but not unpickled."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(one + two)


@pytest.fixture
def helper(monkeypatch: pytest.MonkeyPatch) -> Iterator[PrivilegedHelper]:
    """A helper whose answers are replaced by those that the tests need."""

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
    assert helper.snapshot(7) == (7, 0.0)
    assert helper.watched() == (True, "eth0")


def test_a_stopped_helper_is_waited_for_once(helper: PrivilegedHelper) -> None:
    stop(helper.pid)
    assert helper.watched() is None
    assert helper.lacking is not None
    assert "didn't answer within 5 s" in helper.lacking
    # No further question is sent while an answer is late.
    number = helper._quick._number
    assert [helper.watched() for _ in range(100)] == [None] * 100
    assert helper._quick._number == number
    os.kill(helper.pid, signal.SIGCONT)
    assert helper._quick._end.poll(60)
    assert helper.watched() == (True, "eth0")


def test_a_helper_that_stops_within_an_answer_gives_none(helper: PrivilegedHelper) -> None:
    """The answer has megabytes, more than the socket holds, so the helper is still sending when it is stopped."""
    helper._quick._end.send_bytes(b"1 cgroup_ids 0")
    assert helper._quick._end.poll(60)
    stop(helper.pid)
    assert helper.watched() is None
    assert helper.lacking is not None
    assert "was stopped in the middle of an answer" in helper.lacking
    assert helper.watched() is None


def test_a_killed_helper_gives_no_answers(helper: PrivilegedHelper) -> None:
    os.kill(helper.pid, signal.SIGKILL)
    assert helper.watched() is None
    assert helper.snapshot(1) is None
    assert helper.lacking is not None
    assert "ended unexpectedly" in helper.lacking


def test_every_question_is_a_method_of_the_helper() -> None:
    assert set(privsep._QUESTIONS) <= set(dir(Helper))


@pytest.mark.parametrize("answered", [True, False])
def test_a_delayed_snapshot_does_not_lengthen_the_interval(answered: bool) -> None:
    """A snapshot that a stopped helper delays takes no CPU time, so the interval to the next one stays the same."""
    started, may_end = threading.Event(), threading.Event()
    table = pa.table({"a": [1]})

    def take() -> tuple[pa.Table, float] | None:
        if not started.is_set() and threading.current_thread() is not threading.main_thread():
            started.set()
            assert may_end.wait(60)
            return (table, 0.0) if answered else None
        return table, 0.0

    snapshots = Snapshots(take, interval_s=0.01)
    taken = list(snapshots.drain())
    assert started.wait(60)
    time.sleep(1)  # the delay; if it counted as work, the next interval would be 20 s
    may_end.set()

    def more() -> bool:
        taken.extend(snapshots.drain())
        return len(taken) >= 4

    until(more, 60, "the snapshots after that")
    snapshots.finish()
