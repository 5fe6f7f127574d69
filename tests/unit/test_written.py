# SPDX-License-Identifier: Apache-2.0
"""A reader learns up to which moment a running trace has written its records, and doesn't wait for ever."""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cwndtrace.cli import dump as command
from cwndtrace.errors import CaptureError
from cwndtrace.recorder import Observer, Recorder
from cwndtrace.store import CaptureWriter, ThreadedWriter, open_capture
from cwndtrace.store.layout import META
from cwndtrace.store.written import when_written
from tests.harness.tcp import until
from tests.unit import frames
from tests.unit.fake_source import FakeSource, session_of


class LateSource(FakeSource):
    """A source with one block request in each poll, which a test lets read on by setting ``read_ns``."""

    def poll(self, timeout_s: float) -> list[tuple[str, bytes]]:
        super().poll(timeout_s)
        threading.Event().wait(0.001)
        record = frames.block()
        record["start_ns"] = record["done_ns"] = time.monotonic_ns()
        return [("block_io", record.tobytes())]

    def exhausted(self) -> bool:
        return False


class RunningTrace:
    """A recorder on a thread, which writes the records of a LateSource without anything that a person would see."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.source = LateSource()
        self.over = threading.Event()
        writer = ThreadedWriter(CaptureWriter.create(path, frames.meta(), flush_seconds=60.0))
        recorder = Recorder(session_of(self.source), writer, Observer())
        self.thread = threading.Thread(target=recorder.run, args=(self.over.is_set,))
        self.thread.start()

    def end(self) -> None:
        self.over.set()
        self.thread.join()


@pytest.fixture
def trace(tmp_path: Path) -> Iterator[RunningTrace]:
    running = RunningTrace(tmp_path / "a.cwnd")
    yield running
    running.end()


@pytest.mark.slow
def test_all_rows_from_before_the_moment_are_there(trace: RunningTrace) -> None:
    until(lambda: len(trace.source.waits) > 10, 30, "ten turns")
    asked_ns = time.monotonic_ns()
    trace.source.read_ns = asked_ns - 1
    assert when_written(open_capture(trace.path), asked_ns, 0.7)[1] is False
    trace.source.read_ns = asked_ns
    capture, written = when_written(open_capture(trace.path), asked_ns, 30)
    assert written
    assert capture.about.written_to == asked_ns
    starts = capture.table("block_io", ["start_ns"])["start_ns"].to_pylist()
    assert sum(start < asked_ns for start in starts) >= 10
    assert max(starts) > asked_ns


def test_a_trace_notes_nothing_unless_it_is_asked(trace: RunningTrace) -> None:
    trace.source.read_ns = time.monotonic_ns()
    polls = len(trace.source.waits)
    until(lambda: len(trace.source.waits) > polls + 20, 30, "20 turns")
    assert open_capture(trace.path).about.written_to is None
    assert when_written(open_capture(trace.path), trace.source.read_ns, 30)[1]


@pytest.mark.slow
def test_a_question_seals_no_parts(trace: RunningTrace) -> None:
    for _ in range(3):
        trace.source.read_ns = time.monotonic_ns()
        assert when_written(open_capture(trace.path), trace.source.read_ns, 30)[1]
    assert len(list((trace.path / "block_io").glob("*.parquet"))) == 1


def test_a_capture_that_has_ended_has_all_and_does_not_say_until_when(trace: RunningTrace) -> None:
    trace.source.read_ns = time.monotonic_ns()
    assert when_written(open_capture(trace.path), trace.source.read_ns, 30)[1]
    trace.end()
    capture, written = when_written(open_capture(trace.path), time.monotonic_ns(), 30)
    assert written
    assert "written_to" not in (trace.path / META).read_text()
    assert capture.status == "complete"


def test_a_strangers_lock_does_not_hold_up_a_reader(trace: RunningTrace) -> None:
    """The trace takes any lock for a question; a reader that can't have one is answered too, or goes on without."""
    descriptor = os.open(trace.path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert when_written(open_capture(trace.path), time.monotonic_ns(), 0.2)[1] is False
        trace.source.read_ns = time.monotonic_ns()
        assert when_written(open_capture(trace.path), trace.source.read_ns, 30)[1]
    finally:
        os.close(descriptor)


def test_a_capture_that_was_removed_meanwhile_is_refused_as_anywhere(tmp_path: Path) -> None:
    CaptureWriter.create(tmp_path / "b.cwnd", {})
    capture = open_capture(tmp_path / "b.cwnd")
    shutil.rmtree(tmp_path / "b.cwnd")
    with pytest.raises(CaptureError, match=r"b\.cwnd"):
        when_written(capture, 0)


def test_a_dump_of_a_trace_that_does_not_answer_says_so(trace: RunningTrace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "when_written", lambda capture, moment_ns: when_written(capture, moment_ns, 0.2))
    place = trace.path.with_name("b.cwnd")
    _, warnings = command.dumped(trace.path, place, None, why="a test")
    said = "the trace had not written all of the span when the dump was made, so records at its end may be missing"
    assert warnings == [f"{said}."]
    assert said in open_capture(place).warnings
    monkeypatch.setattr(command, "when_written", when_written)
    trace.source.read_ns = time.monotonic_ns() + 60 * 10**9
    _, warnings = command.dumped(trace.path, trace.path.with_name("c.cwnd"), None, why="a test")
    assert warnings == []
