# SPDX-License-Identifier: Apache-2.0
"""A session turns raw records into batches and losses into dated spans; signals ask it to stop."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from cwndtrace import tcp
from cwndtrace.capture.clocks import Segments, utc_offset_ns
from cwndtrace.capture.connections import Snapshots
from cwndtrace.capture.session import Loss, Tally, describe, ending
from cwndtrace.capture.source import Filters
from cwndtrace.cli.interrupt import Interrupt
from cwndtrace.records import layout
from tests.unit import frames
from tests.unit.fake_source import FakeSource, session_of


def test_chunks_of_one_poll_become_one_batch_for_each_event() -> None:
    a, b = frames.reset(1.0).tobytes(), frames.reset(2.0).tobytes()
    io = frames.block(1.5).tobytes()
    session = session_of(FakeSource([("cwnd_reset", a), ("block_io", io), ("cwnd_reset", b)]))
    batches = session.step()
    assert [(batch.event, len(batch)) for batch in batches] == [("cwnd_reset", 2), ("block_io", 1)]
    assert session.tally.kept == {"cwnd_reset": 2, "block_io": 1}
    assert list(batches[0].to_pandas()["ts_ns"]) == [frames.MONO + frames.SECOND, frames.MONO + 2 * frames.SECOND]


def test_empty_chunks_give_no_batch() -> None:
    session = session_of(FakeSource([("block_io", b"")]))
    assert session.step() == []
    assert session.tally.kept == {"cwnd_reset": 0, "block_io": 0}


def test_records_left_at_the_end_are_counted() -> None:
    source = FakeSource(last=[("block_io", frames.block().tobytes() * 3)])
    with session_of(source) as session:
        assert [len(batch) for batch in session.finish()] == [3]
        assert session.tally.kept["block_io"] == 3
        assert not source.closed
    assert source.closed


def test_a_partial_record_is_refused() -> None:
    session = session_of(FakeSource([("block_io", frames.block().tobytes()[:-1])]))
    with pytest.raises(ValueError, match="multiple"):
        session.step()


def test_losses_are_dated_and_adjacent_ones_are_joined() -> None:
    source = FakeSource(*[[] for _ in range(6)])
    session = session_of(source)
    session.step()
    assert session.tally.lossy == []
    before = time.monotonic_ns()
    source.count.lost["block_io"] = 7
    session.step()
    source.count.lost["block_io"] = 10
    session.step()
    after = time.monotonic_ns()
    session.step()  # nothing is lost here, so the next loss is a separate span
    source.count.lost["block_io"] = 11
    source.count.lost["cwnd_reset"] = 2
    session.step()
    spans = sorted(session.tally.lossy, key=lambda span: (span.event, span.start_ns))
    assert [(span.event, span.lost) for span in spans] == [("block_io", 10), ("block_io", 1), ("cwnd_reset", 2)]
    assert session.start["mono_ns"] <= spans[0].start_ns <= before
    assert before <= spans[0].end_ns <= after <= spans[1].start_ns <= spans[1].end_ns
    assert session.tally.lost == {"block_io": 11, "cwnd_reset": 2}
    meta = ending(session)
    assert meta["counts"] == {"block_io": {"kept": 0, "lost": 11}, "cwnd_reset": {"kept": 0, "lost": 2}}
    assert sum(span["lost"] for span in meta["lossy"]) == 13
    assert meta["clock"]["end"]["mono_ns"] >= meta["clock"]["start"]["mono_ns"]


def test_all_is_read_until_a_snapshot_that_is_being_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    source = FakeSource([], [], [])
    session = session_of(source)
    session.step()
    assert session.read_ns == 0
    source.read_ns = 50
    session.step()
    assert session.read_ns == 50
    snapshots = Snapshots(lambda: None, lambda: 0)
    session.snapshots = snapshots
    snapshots.since_ns = 40.0

    def drained() -> Iterator[pa.Table]:
        snapshots.since_ns = math.inf  # it ends meanwhile, too late for this turn
        return iter([])

    monkeypatch.setattr(snapshots, "drain", drained)
    session.step()
    assert session.read_ns == 40
    session.step()
    assert session.read_ns == 50


def test_many_losses_become_few_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cwndtrace.capture.session.MOST_SPANS", 4)
    source = FakeSource()
    session = session_of(source)
    for number in range(1, 31):
        source.count.lost["block_io"] = number
        session.step()
        session.step()  # nothing is lost here
    spans = session.tally.lossy
    assert len(spans) == 4
    assert sum(span.lost for span in spans) == 30
    assert all(a.end_ns <= b.start_ns for a, b in pairwise(spans))


def test_the_closest_spans_of_an_event_become_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cwndtrace.capture.session.MOST_SPANS", 3)
    tally = Tally()
    tally.add(Loss("cwnd_reset", 112, 113, 9))
    for start, end, lost in ((0, 10, 1), (100, 110, 2), (115, 120, 3), (900, 910, 4)):
        tally.add(Loss("block_io", start, end, lost))
    assert tally.lossy == [
        Loss("cwnd_reset", 112, 113, 9), Loss("block_io", 0, 10, 1), Loss("block_io", 100, 120, 5),
        Loss("block_io", 900, 910, 4),
    ]  # fmt: skip


def test_unchanged_and_withdrawn_resets_are_counted() -> None:
    source = FakeSource([])
    source.count.unchanged, source.count.withdrawn = 5, 3
    session = session_of(source)
    session.step()
    assert (session.tally.unchanged, session.tally.withdrawn) == (5, 3)


def test_batches_have_wall_clock_times() -> None:
    now = np.zeros(1, dtype=layout.event("block_io").dtype)
    before = time.time()
    now["start_ns"] = time.monotonic_ns()
    after = time.time()
    session = session_of(FakeSource([("block_io", now.tobytes())]))
    seen = session.step()[0].to_pandas()["time"].iloc[0]
    assert before - 0.01 <= seen.timestamp() <= after + 0.01
    # This process may lose the CPU between the two clocks, but not each time.
    assert min(abs(utc_offset_ns() - (time.time_ns() - time.monotonic_ns())) for _ in range(20)) < 10_000_000


def test_each_record_has_the_offset_of_its_time_when_the_wall_clock_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records keep their order, and each has the UTC of its own segment."""
    wall, hour = time.time_ns, 3_600_000_000_000
    steps = {0: 0, 1: 5 * hour, 2: -2 * hour}

    def record() -> list[tuple[str, bytes]]:
        now = np.zeros(1, dtype=layout.event("block_io").dtype)
        now["start_ns"] = time.monotonic_ns()
        return [("block_io", now.tobytes())]

    source = FakeSource()
    session = session_of(source)
    for number, step in steps.items():
        monkeypatch.setattr(time, "time_ns", lambda step=step: wall() + step)
        for late in (False, True):
            # The first poll after a step notices it.
            session.step()
            source._polls.append(record())
            (batch,) = session.step()
            row = batch.to_pandas().iloc[0]
            assert abs(row["time"].timestamp() - (wall() + step) / 1e9) < 60, (number, late)
    assert len(session.clock.all) == 3
    offsets = [segment["utc_offset_ns"] - session.start["utc_offset_ns"] for segment in session.clock.all]
    assert [round(offset / hour, 6) for offset in offsets] == [0, 5, -2]
    starts = [segment["mono_ns"] for segment in session.clock.all]
    assert starts == sorted(starts)
    # A record that is read late still has the offset of its time: before the first step the first one.
    early = np.array([starts[0] + 1, starts[1] + 1, starts[2] + 1])
    assert list(session.clock.offsets(early)) == [segment["utc_offset_ns"] for segment in session.clock.all]


@pytest.mark.parametrize("first", [False, True])
def test_a_slow_reading_of_the_clocks_is_no_step(monkeypatch: pytest.MonkeyPatch, first: bool) -> None:
    """That holds for a slow first reading and for slow later ones, as on a machine that stalls within each."""
    wall = time.time_ns

    def late() -> int:
        deadline = time.monotonic_ns() + 5_000_000
        before = wall()
        while time.monotonic_ns() < deadline:
            pass
        return before

    monkeypatch.setattr(time, "time_ns", late if first else wall)
    segments = Segments()
    monkeypatch.setattr(time, "time_ns", wall if first else late)
    assert [segments.check() for _ in range(5)] == [0] * 5
    assert len(segments.all) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_hurries_and_a_third_interrupts(number: signal.Signals) -> None:
    old = signal.getsignal(number)
    with Interrupt(together_s=0) as interrupt:
        seen = [interrupt.requested]
        os.kill(os.getpid(), number)
        seen.append(interrupt.requested)
        seen.append(interrupt.hurried)
        os.kill(os.getpid(), number)
        seen.append(interrupt.hurried)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert seen == [False, True, False, True]
    assert signal.getsignal(number) is old


def test_the_same_signal_twice_at_once_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """timeout(1) sends a signal to the process and to its group. Another signal, or a later one, counts as a second."""
    now = 100.0
    monkeypatch.setattr("cwndtrace.capture.session.time.monotonic", lambda: now)
    with Interrupt() as interrupt:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert (interrupt.requested, interrupt.hurried) == (True, False)
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.hurried
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        now += 2
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.hurried


def test_an_ignored_sighup_stays_ignored() -> None:
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupt.requested
    finally:
        signal.signal(signal.SIGHUP, old)


def test_settings_of_the_start_are_kept_and_later_namespaces_added(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"1": {"name": "this", tcp.IDLE_SYSCTL: 1}}
    monkeypatch.setattr("cwndtrace.kernel.netns.settings", lambda: dict(settings))
    session = session_of(FakeSource([]))
    assert describe(session, Filters(), "0")["sysctls"] == settings
    settings |= {"1": {"name": "this", tcp.IDLE_SYSCTL: 0}, "2": {"name": "pod", tcp.IDLE_SYSCTL: 1}}
    meta = ending(session)
    assert meta["sysctls"] == {"1": {"name": "this", tcp.IDLE_SYSCTL: 1}, "2": settings["2"]}
    assert meta["sysctls_end"] == {"1": settings["1"] | {"new": False}, "2": settings["2"] | {"new": True}}


def test_what_happens_until_the_source_has_stopped_is_counted() -> None:
    source = FakeSource([])
    with session_of(source) as session:
        session.step()
        source.count.lost["cwnd_reset"] = 5
        source.count.unchanged, source.count.withdrawn, source.count.guessed = 3, 2, 1
        session.finish()
        assert session.tally.lost["cwnd_reset"] == 5
        assert [(loss.event, loss.lost) for loss in session.tally.lossy] == [("cwnd_reset", 5)]
        assert (session.tally.unchanged, session.tally.withdrawn, session.tally.guessed) == (3, 2, 1)


def test_the_metadata_has_its_entries_at_the_start_and_at_the_end() -> None:
    session = session_of(FakeSource([]))
    begun = describe(session, Filters(port=443, pid=None), "9.9")
    assert set(begun) == {
        "version", "host", "kernel", "machine", "hz", "command", "filters", "started", "ended", "clock", "sysctls",
        "probes", "block_probe", "cgroups", "devices", "interfaces", "counts", "unchanged", "withdrawn", "guessed",
        "lossy", "left_out", "lacking", "reader_nice",
    }  # fmt: skip
    assert (begun["version"], begun["ended"], begun["filters"]["port"]) == ("9.9", None, 443)
    assert "pid" not in begun["filters"]
    assert begun["probes"] == session.source.probes
    assert begun["block_probe"] == "block_io_start"
    assert begun["clock"] == {"start": session.start, "end": None, "segments": session.clock.all}
    assert (begun["sysctls"], begun["lacking"]) == (session.spaces, [])
    ended = ending(session)
    assert set(ended) == {"ended", "clock", "sysctls", "sysctls_end"} | set(session.meta())
    assert ended["clock"]["end"]["mono_ns"] >= session.start["mono_ns"]
    assert all(space["new"] is False for inode, space in ended["sysctls_end"].items() if inode in session.spaces)
