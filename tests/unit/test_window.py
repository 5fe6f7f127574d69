# SPDX-License-Identifier: Apache-2.0
"""A capture with a window keeps the newest parts, says since when it is complete, and misses nothing of what it keeps.

The clock is the tests' own, so nothing here depends on how long it takes.
"""

from __future__ import annotations

import errno
import json
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cwndtrace import store
from cwndtrace.errors import UsageError
from cwndtrace.report import content
from cwndtrace.store import folder
from cwndtrace.store import writer as writer_module
from cwndtrace.store.layout import META, WINDOW_SCHEMA
from cwndtrace.store.meta import Deleted
from cwndtrace.store.window import LEAST_KEEP_BYTES, LEAST_KEEP_S, Window, window
from cwndtrace.trace import load
from tests.unit import frames

KEEP_S = 100.0


class MadeClock:
    """A clock in place of the module ``time``, in ns of the captures' CLOCK_MONOTONIC."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return frames.MONO / 1e9 + self.now_s

    def monotonic_ns(self) -> int:
        return frames.MONO + int(self.now_s * 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> MadeClock:
    clock = MadeClock()
    monkeypatch.setattr(writer_module, "time", clock)
    return clock


def make(path: Path, keep_s: float = KEEP_S, **limits: float) -> store.CaptureWriter:
    return store.CaptureWriter.create(path, frames.meta(), flush_seconds=0, window=Window(keep_s, **limits))


def requests(at_s: float, count: int = 3, **fields: Any) -> pa.Table:
    """Return block requests of the second before ``at_s``, the last of them at that moment."""
    return frames.table("block_io", *(frames.block(at_s - n / count, **fields) for n in reversed(range(count))))


def starts(path: Path) -> list[float]:
    """Return the start of each block request in a capture, in seconds."""
    values = store.open_capture(path).table("block_io").column("start_ns").to_pylist()
    return sorted((value - frames.MONO) / 1e9 for value in values)


def parts(path: Path, table: str = "block_io") -> list[str]:
    return sorted(part.name for part in (path / table).iterdir())


def trace(
    writer: store.CaptureWriter, clock: MadeClock, until_s: int, step: Callable[[int], None] = lambda _: None
) -> None:
    """Add three block requests in each second, and flush every five seconds."""
    for second in range(int(clock.now_s) + 1, until_s + 1):
        clock.now_s = second
        writer.add("block_io", requests(second))
        step(second)
        if second % 5 == 0:
            writer.flush()


def test_a_window_has_the_limits_that_are_given_and_no_smaller_ones() -> None:
    assert window(None, None) is None
    for keep_s, keep_bytes in ((60.0, None), (None, 50_000_000), (LEAST_KEEP_S, LEAST_KEEP_BYTES)):
        made = window(keep_s, keep_bytes)
        assert made is not None
        assert (made.keep_s, made.keep_bytes) == (keep_s or math.inf, keep_bytes or math.inf)
    for too_small in ((9.9, None), (None, LEAST_KEEP_BYTES - 1)):
        with pytest.raises(UsageError, match="a window takes at least"):
            window(*too_small)


def test_names_outlive_the_records_of_a_window_of_bytes_by_half_an_hour() -> None:
    kept = Window(keep_bytes=100)
    kept.add("workloads", 1, 10, 5)
    for number in (1, 2):
        kept.add("block_io", number, 60, number * 10)
    assert kept.overdue(int(1799e9), 0) == [("block_io", 1)]
    assert kept.overdue(int(1801e9), 0) == [("workloads", 1)]
    # Names that came in after the youngest record that was taken out may be those of records that are left.
    kept.add("workloads", 2, 10, 15)
    assert kept.overdue(int(5000e9), 0) == []


@pytest.mark.slow
def test_parts_that_leave_the_window_are_deleted_whole_and_in_order(tmp_path: Path, clock: MadeClock) -> None:
    writer = make(tmp_path / "a.cwnd")
    seen: list[int] = []
    trace(writer, clock, 1000, lambda _: seen.append(len(writer.parts("block_io"))))
    there = starts(tmp_path / "a.cwnd")
    about = store.open_capture(tmp_path / "a.cwnd").about
    # A part takes a tenth of the window and a flush, and the oldest one still holds a row of it.
    assert 900 - KEEP_S / 10 - 5 - 2 < there[0] < 900
    assert there == pytest.approx([n / 3 for n in range(3001 - len(there), 3001)], abs=1e-8)
    assert about.kept_from is not None
    assert (about.kept_from - frames.MONO) / 1e9 <= 900
    assert all(value > (about.kept_from - frames.MONO) / 1e9 for value in there)
    assert max(seen) <= 13


@pytest.mark.slow
def test_a_whole_run_leaves_a_flat_capture_without_gaps(tmp_path: Path, clock: MadeClock) -> None:
    writer = make(tmp_path / "a.cwnd")
    kept: list[int] = []
    trace(writer, clock, 800, lambda _: kept.append(len(writer.parts("block_io"))))
    writer.close("complete", counts={"block_io": {"kept": 2400, "lost": 0}})
    assert max(kept[200:]) <= max(kept[:200]) + 1
    opened = load(tmp_path / "a.cwnd")
    assert opened.gaps() == []
    assert opened.about.deleted["block_io"].rows == 2400 - len(opened.block_io)
    first = int(parts(tmp_path / "a.cwnd")[0][5:11])
    assert opened.about.deleted["block_io"] == Deleted(first - 1, 2400 - len(opened.block_io))
    assert opened.meta["schema"] == WINDOW_SCHEMA
    assert opened.started_ns == opened.about.kept_from
    limits = content.report(opened).caveats["limits"]
    assert any(line.startswith("The capture holds a window of the trace, from 2026-") for line in limits)


def test_a_part_that_is_missing_from_the_window_is_missed(tmp_path: Path, clock: MadeClock) -> None:
    writer = make(tmp_path / "a.cwnd")
    trace(writer, clock, 500)
    writer.close("complete", counts={"block_io": {"kept": 1500, "lost": 0}})
    victim = parts(tmp_path / "a.cwnd")[2]
    (tmp_path / "a.cwnd" / "block_io" / victim).unlink()
    (gap,) = load(tmp_path / "a.cwnd").gaps()
    assert gap.startswith("45 of ")
    assert gap.endswith(f"; missing: block_io/{victim}")


def test_the_size_bounds_the_window_too(tmp_path: Path, clock: MadeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "SEAL_ROWS", 30)
    writer = make(tmp_path / "a.cwnd", keep_s=float("inf"), keep_bytes=100_000)
    sizes = []

    def measure(_: int) -> None:
        sizes.append(sum(part.stat().st_size for part in (tmp_path / "a.cwnd").rglob("part-*")))

    trace(writer, clock, 400, measure)
    assert 60_000 < max(sizes) < 130_000
    assert max(sizes[200:]) > 60_000
    kept_from = store.open_capture(tmp_path / "a.cwnd").about.kept_from
    assert kept_from is not None
    assert min(starts(tmp_path / "a.cwnd")) > (kept_from - frames.MONO) / 1e9


def test_tables_keep_the_same_span(tmp_path: Path, clock: MadeClock) -> None:
    """A table with few rows doesn't lose its rows of a moment whose rows in another table are still there."""
    writer = make(tmp_path / "a.cwnd")

    def reset(second: int) -> None:
        if second % 70 == 0:
            writer.add("cwnd_reset", frames.table("cwnd_reset", frames.reset(second)))

    trace(writer, clock, 700, reset)
    capture = store.open_capture(tmp_path / "a.cwnd")
    kept_from = capture.about.kept_from or 0
    resets = [ns for ns in capture.table("cwnd_reset").column("ts_ns").to_pylist() if ns >= kept_from]
    assert resets == [frames.MONO + n * 70 * frames.SECOND for n in range(1, 11) if n * 70e9 >= kept_from - frames.MONO]


@pytest.mark.slow
def test_names_stay_while_records_of_their_time_do(tmp_path: Path, clock: MadeClock) -> None:
    """Rows of names that are written again as often as the window asks for are always there."""
    window = Window(KEEP_S)
    writer = store.CaptureWriter.create(tmp_path / "a.cwnd", frames.meta(), flush_seconds=0, window=window)

    def name(second: int) -> None:
        if second % int(window.repeat_s) == 1:
            writer.add("workloads", frames.workloads({"cgroup_id": 7, "path": "/a.service"}))
        if second > KEEP_S:
            assert store.open_capture(tmp_path / "a.cwnd").rows("workloads") >= 1

    trace(writer, clock, 600, name)
    assert len(parts(tmp_path / "a.cwnd", "workloads")) <= 12


def test_a_quiet_trace_deletes_what_gets_too_old(tmp_path: Path, clock: MadeClock) -> None:
    writer = make(tmp_path / "a.cwnd")
    trace(writer, clock, 20)
    while (due := writer.due_s()) < float("inf"):
        assert due > 0
        clock.now_s += due + 0.001
        writer.flush()
    assert KEEP_S < clock.now_s - 20 < KEEP_S + 1
    assert starts(tmp_path / "a.cwnd") == []


def test_meta_json_says_so_before_a_part_is_deleted(
    tmp_path: Path, clock: MadeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever the writer is killed, no moment that meta.json calls complete lacks rows."""
    writer = make(tmp_path / "a.cwnd")
    real, checked = folder.Folder.discard, []

    def discard(self: folder.Folder, name: str) -> None:
        if name.startswith("part-"):
            about = store.open_capture(tmp_path / "a.cwnd").about
            rows = pq.read_table(tmp_path / "a.cwnd" / "block_io" / name)
            assert max(rows["start_ns"].to_pylist()) < (about.kept_from or 0)
            checked.append(name)
        real(self, name)

    monkeypatch.setattr(folder.Folder, "discard", discard)
    trace(writer, clock, 300)
    assert checked == sorted(checked)
    assert len(checked) > 10


def test_a_full_disk_doesnt_keep_old_parts(tmp_path: Path, clock: MadeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = make(tmp_path / "a.cwnd")
    trace(writer, clock, 150)
    before = parts(tmp_path / "a.cwnd")
    real = folder.Folder.write

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(folder.Folder, "write", full)
    clock.now_s = 250
    writer.flush()
    assert len(parts(tmp_path / "a.cwnd")) < len(before)
    stale = json.loads((tmp_path / "a.cwnd" / META).read_text())["kept_from"]
    monkeypatch.setattr(folder.Folder, "write", real)
    writer.flush()
    assert json.loads((tmp_path / "a.cwnd" / META).read_text())["kept_from"] > stale


def test_a_killed_trace_with_a_window_opens(tmp_path: Path, clock: MadeClock) -> None:
    writer = make(tmp_path / "a.cwnd")
    trace(writer, clock, 300)
    meta = json.loads((tmp_path / "a.cwnd" / META).read_text())
    (tmp_path / "a.cwnd" / META).write_text(json.dumps({**meta, "boot_id": "another"}))
    opened = load(tmp_path / "a.cwnd")
    assert opened.status == "interrupted"
    assert opened.gaps() == []
    assert "holds a window" in str(opened)


def test_losses_before_the_window_dont_count(tmp_path: Path, clock: MadeClock) -> None:
    writer = make(tmp_path / "a.cwnd")
    trace(writer, clock, 300)
    spans = [(10, 11, 5), (280, 281, 2)]
    lossy = [
        {"event": "block_io", "start_ns": frames.MONO + a * 10**9, "end_ns": frames.MONO + b * 10**9, "lost": lost}
        for a, b, lost in spans
    ]
    writer.close("complete", counts={"block_io": {"kept": 900, "lost": 7}}, lossy=lossy)
    assert load(tmp_path / "a.cwnd").lost("block_io") == 2


@pytest.mark.slow
def test_any_order_of_arrival_keeps_every_row_of_the_window(tmp_path: Path, clock: MadeClock) -> None:
    """Requests come in when they end, so that their starts aren't in order."""
    rng = random.Random(7)
    writer = make(tmp_path / "a.cwnd")
    added = []

    def late(second: int) -> None:
        at = max(0.5, second - rng.choice((0, 1, 30, 90, 300)) * rng.random())
        added.append(at)
        writer.add("block_io", frames.table("block_io", frames.block(at, latency_us=1)))

    trace(writer, clock, 800, late)
    kept_from = ((store.open_capture(tmp_path / "a.cwnd").about.kept_from or 0) - frames.MONO) / 1e9
    everything = [*added, *(second - n / 3 for second in range(1, 801) for n in range(3))]
    expected = sorted(at for at in everything if at >= kept_from)
    assert [at for at in starts(tmp_path / "a.cwnd") if at >= kept_from] == pytest.approx(expected)
    assert kept_from <= 700
