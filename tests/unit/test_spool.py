# SPDX-License-Identifier: Apache-2.0
"""Records that come faster than Parquet can be made of them are written raw, and every reader sees the same rows."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cwndtrace import store
from cwndtrace.cli.interrupt import Patience
from cwndtrace.errors import CaptureError
from cwndtrace.records import arrow
from cwndtrace.store import encoding, files, spool
from cwndtrace.store import writer as writer_module
from cwndtrace.store.dump import Moments, dump
from cwndtrace.store.folder import Folder
from cwndtrace.store.follow import Follower
from cwndtrace.store.layout import SCHEMA_VERSION, WHOLE_SCHEMA, WINDOW_SCHEMA, part_name, raw_name
from cwndtrace.store.window import Window
from cwndtrace.trace import load
from tests.harness.command import CHECKOUT, ENVIRONMENT
from tests.unit import frames, raws
from tests.unit.raws import append, parts, records, sectors


@pytest.fixture
def raw_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    with monkeypatch.context() as patch:
        raws.always_raw(patch)
        yield patch


def make(path: Path, **options: Any) -> store.CaptureWriter:
    return store.CaptureWriter.create(path, frames.meta(), flush_seconds=0, **options)


def convert_once_listed(patch: pytest.MonkeyPatch, writer: store.CaptureWriter, most: int) -> None:
    """Let so many raw parts become Parquet each time after a reader has listed parts."""
    real = files.parts

    def then_converted(folder: Path) -> list[Path]:
        listed = real(folder)
        for _ in range(min(most, len(writer._spool._complete))):
            writer._spool.convert()
        return listed

    patch.setattr(files, "parts", then_converted)


# ---- when -------------------------------------------------------------------------------------------


def test_a_table_is_written_raw_while_parquet_would_take_most_of_the_time() -> None:
    pace = spool.Pace(0.0)
    assert not pace.behind(1_000_000, 1.0)  # it isn't known yet how long Parquet takes
    pace.made(100, 50.0)
    assert not pace.behind(1_000_000, 2.0)  # a hundred rows don't tell
    pace.made(10_000, 0.1)
    assert not pace.behind(79_000, 3.0)
    assert pace.behind(81_000, 4.0)
    assert pace.behind(41_000, 5.0)
    assert not pace.behind(39_000, 6.0)
    assert not pace.behind(79_000, 7.0)
    assert not pace.behind(spool.LEAST_ROWS - 1, 7.001)


def test_a_slow_encoder_makes_raw_parts_and_a_fast_one_parquet_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, slow = [1000.0], [0.001]
    real = encoding.encoded

    def encoded(table: str, rows: pa.Table, codec: str) -> Any:
        now[0] += slow[0] * len(rows)
        return real(table, rows, codec)

    class SetClock:
        monotonic = staticmethod(lambda: now[0])
        monotonic_ns = staticmethod(lambda: int(now[0] * 1e9))

    for module in (writer_module, spool):
        monkeypatch.setattr(module, "time", SetClock)
        monkeypatch.setattr(module, "encoded", encoded)
    monkeypatch.setattr(spool, "LEAST_ROWS", 10)
    monkeypatch.setattr(writer_module, "PART_ROWS", 40)
    writer = store.CaptureWriter.create(tmp_path / "a.cwnd", frames.meta())

    def second(first: int, count: int) -> list[str]:
        writer.add("block_io", records(first, count))
        now[0] += 1
        writer.flush()
        return parts(tmp_path / "a.cwnd")

    assert second(0, 20) == [part_name(1)]
    slow[0] = 0.5
    assert second(20, 20) == [part_name(1)]
    assert second(40, 20) == [raw_name(2), part_name(1)]
    assert writer.due_s() > 0
    assert second(60, 20) == [raw_name(2), part_name(1)]  # complete now, but rows still come too fast
    slow[0] = 0.0001
    now[0] += 2
    assert second(80, 20) == [raw_name(3), part_name(1), part_name(2)]
    assert second(100, 5) == [part_name(n) for n in (1, 2, 3, 4)]
    assert store.open_capture(tmp_path / "a.cwnd").meta["schema"] == SCHEMA_VERSION
    assert sectors(tmp_path / "a.cwnd") == list(range(105))
    writer.close()
    assert sectors(tmp_path / "a.cwnd") == list(range(105))
    assert store.open_capture(tmp_path / "a.cwnd").meta["schema"] == WHOLE_SCHEMA


def test_parquet_is_tried_ever_more_rarely_while_records_come_too_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0

    def behind(pace: spool.Pace, *_: float) -> bool:
        pace.spooling = True
        return True

    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(spool.Pace, "behind", behind)
    monkeypatch.setattr(writer_module, "PART_ROWS", 2)
    writer = make(tmp_path / "a.cwnd")
    append(writer, *(records(first, 2) for first in range(0, 16, 2)))
    waits = []
    for _ in range(7):
        waits.append(writer._spool.due_s() - now)
        now += waits[-1]
        writer._spool.convert()
    assert waits == [2, 4, 8, 16, 32, 64, 64]


def test_no_parquet_is_tried_while_rows_wait_for_the_writer(tmp_path: Path, raw_only: pytest.MonkeyPatch) -> None:
    writer = make(tmp_path / "a.cwnd")
    append(writer, records(0, 3))
    raw_only.undo()
    raw_only.setattr(writer._buffers["block_io"], "arrived_ns", 0)
    raw_only.setattr(writer._spool, "_trial_at_s", 0.0)
    writer.flush(late=True)
    assert parts(tmp_path / "a.cwnd") == [raw_name(1)]
    writer.flush()
    assert parts(tmp_path / "a.cwnd") == [part_name(1)]


def test_a_raw_part_without_new_rows_is_completed(tmp_path: Path, raw_only: pytest.MonkeyPatch) -> None:
    writer = make(tmp_path / "a.cwnd")
    append(writer, records(0, 3))
    assert 0 < writer.due_s() <= spool.QUIET_SECONDS
    raw_only.undo()
    raw_only.setattr(writer._buffers["block_io"], "arrived_ns", 0)
    writer.flush()
    assert parts(tmp_path / "a.cwnd") == [part_name(1)]
    assert sectors(tmp_path / "a.cwnd") == [0, 1, 2]
    writer.close()


def test_a_raw_part_is_completed_once_it_has_been_written_long_enough(
    tmp_path: Path, raw_only: pytest.MonkeyPatch
) -> None:
    writer = make(tmp_path / "a.cwnd")
    for first, age_s, names in ((0, 0.0, [1]), (3, 0.5, [1]), (6, 1.0, [1]), (9, 0.0, [1, 2])):
        if first:
            begun = time.monotonic() - age_s * writer_module.SEAL_SECONDS
            raw_only.setattr(writer._buffers["block_io"], "begun", begun)
        append(writer, records(first, 3))
        assert parts(tmp_path / "a.cwnd") == [raw_name(n) for n in names]
    writer.close()


def test_a_disk_without_room_for_raw_parts_gets_parquet(tmp_path: Path, raw_only: pytest.MonkeyPatch) -> None:
    disk = os.statvfs(tmp_path)
    empty = os.statvfs_result((*disk[:3], 0, 0, *disk[5:]))
    raw_only.setattr(os, "fstatvfs", lambda _: empty)
    raw_only.setattr(writer_module, "PART_ROWS", 3)
    writer = make(tmp_path / "a.cwnd")
    for first in (0, 3):
        append(writer, records(first, 3))
    assert parts(tmp_path / "a.cwnd") == [raw_name(1), part_name(2)]
    writer.close()
    assert sectors(tmp_path / "a.cwnd") == list(range(6))


# ---- readers ----------------------------------------------------------------------------------------


def test_every_reader_sees_the_same_rows_of_raw_parts(tmp_path: Path, raw_only: pytest.MonkeyPatch) -> None:
    raw_only.setattr(writer_module, "PART_ROWS", 4)
    writer, plain = make(tmp_path / "raw.cwnd"), make(tmp_path / "plain.cwnd")
    writer.go_on = lambda _: False
    reset = frames.reset(0.5)
    for each in (writer, plain):
        if each is plain:
            raw_only.undo()
        each.add("connections", frames.snapshots(frames.snapshot()))
        resets = arrow.TimedRecords("cwnd_reset", reset.tobytes(), records(0, 1).utc_offsets_ns)
        append(each, *(records(n, 2, frames.OFFSET + n) for n in range(0, 10, 2)), resets)
        kept = {"block_io": 10, "cwnd_reset": 1, "connections": 1}
        each.close("complete", counts={table: {"kept": number, "lost": 0} for table, number in kept.items()})
    assert parts(tmp_path / "raw.cwnd") == [raw_name(n) for n in (1, 2, 3)]
    assert parts(tmp_path / "raw.cwnd", "cwnd_reset") == [raw_name(1)]
    one, other = (load(tmp_path / name) for name in ("raw.cwnd", "plain.cwnd"))
    assert one.gaps() == other.gaps() == []
    assert one.resets.equals(other.resets)
    assert one.block_io.equals(other.block_io)
    assert one.verdicts.equals(other.verdicts)
    opened = [store.open_capture(tmp_path / name) for name in ("raw.cwnd", "plain.cwnd")]
    assert opened[0].meta["schema"] == SCHEMA_VERSION
    for table in ("block_io", "cwnd_reset"):
        assert opened[0].table(table).equals(opened[1].table(table))
        assert opened[0].rows(table) == opened[1].rows(table)
        assert opened[0].partly(table) == opened[1].partly(table)
    some = ["sector", "start_ns"]
    assert opened[0].table("block_io", some).equals(opened[1].table("block_io", some))
    # Who reads the folder as Parquet skips the raw parts instead of failing.
    assert pq.read_table(tmp_path / "raw.cwnd" / "connections").num_rows == 1


def test_a_follower_gets_each_row_once_while_parts_become_parquet(tmp_path: Path, raw_only: pytest.MonkeyPatch) -> None:
    raw_only.setattr(writer_module, "PART_ROWS", 4)
    writer = make(tmp_path / "a.cwnd")
    follower = Follower(tmp_path / "a.cwnd", {"block_io": ("start_ns", "sector")})

    def new(budget_s: float = 60.0) -> list[int]:
        return [n for _, rows in follower.new_rows(budget_s) for n in rows["sector"].to_pylist()]

    append(writer, records(0, 3))
    assert new() == [0, 1, 2]
    append(writer, records(3, 1))
    append(writer, records(4, 4), records(8, 1))
    writer._spool.convert()
    assert new(-1) == [3]
    convert_once_listed(raw_only, writer, 9)
    assert new() == [4, 5, 6, 7, 8]
    writer.close()
    assert (new(), list(follower.warnings), follower.status) == ([], [], "complete")


def test_a_capture_is_read_while_parts_become_parquet(tmp_path: Path, raw_only: pytest.MonkeyPatch) -> None:
    raw_only.setattr(writer_module, "PART_ROWS", 2)
    writer = make(tmp_path / "a.cwnd")
    append(writer, *(records(n, 2) for n in (0, 2, 4)))
    convert_once_listed(raw_only, writer, 1)
    capture = store.open_capture(tmp_path / "a.cwnd")
    assert capture.table("block_io")["sector"].to_pylist() == list(range(6))
    assert capture.warnings == []
    writer.close()


def test_a_dump_has_parquet_of_raw_parts_that_are_still_written(tmp_path: Path, raw_only: pytest.MonkeyPatch) -> None:
    raw_only.setattr(writer_module, "PART_ROWS", 5)
    writer = make(tmp_path / "a.cwnd")
    append(writer, *(records(n, 5) for n in (0, 5, 10)), records(15, 2))
    with (tmp_path / "a.cwnd" / "block_io" / raw_name(4)).open("ab") as file:
        file.write(b"half a frame")
    moment = [frames.MONO + n * frames.SECOND // 100 for n in (7, 16)]
    made = dump(writer.capture(), tmp_path / "b.cwnd", Moments(*moment))
    assert (made.rows["block_io"], made.linked, made.copied, made.rewritten) == (9, 0, 0, 3)
    assert parts(tmp_path / "b.cwnd") == [part_name(n) for n in (1, 2, 3)]
    assert sectors(tmp_path / "b.cwnd") == list(range(7, 16))
    dumped = store.open_capture(tmp_path / "b.cwnd")
    assert (dumped.meta["schema"], dumped.strange("block_io"), dumped.warnings) == (WHOLE_SCHEMA, [], [])
    writer.close()


def test_raw_parts_leave_the_window(tmp_path: Path, raw_only: pytest.MonkeyPatch) -> None:
    raw_only.setattr(writer_module, "PART_ROWS", 5)
    writer = make(tmp_path / "a.cwnd", window=Window(keep_bytes=1500))
    for first in range(0, 50, 5):
        append(writer, records(first, 5))
    opened = store.open_capture(tmp_path / "a.cwnd")
    left = sectors(tmp_path / "a.cwnd")
    assert len(left) in (15, 20)
    assert left == list(range(50))[-len(left) :]
    assert (opened.about.deleted["block_io"].rows, opened.meta["schema"]) == (50 - len(left), SCHEMA_VERSION)
    writer.close("complete", counts={"block_io": {"kept": 50, "lost": 0}})
    opened = store.open_capture(tmp_path / "a.cwnd")
    assert (load(tmp_path / "a.cwnd").gaps(), opened.meta["schema"]) == ([], WINDOW_SCHEMA)
    assert sectors(tmp_path / "a.cwnd") == left
    assert writer._window is not None
    assert writer._window._bytes == sum(part.bytes for part in writer.parts("block_io").values())


# ---- ends -------------------------------------------------------------------------------------------


def test_the_end_makes_parquet_of_all_parts_unless_it_is_hurried(tmp_path: Path, raw_only: pytest.MonkeyPatch) -> None:
    raw_only.setattr(writer_module, "PART_ROWS", 2)
    left: list[int] = []
    for name, until in (("a.cwnd", 0), ("b.cwnd", 3)):
        writer = make(tmp_path / name)

        def go_on(rows: int, until: int = until) -> bool:
            left.append(rows)
            return rows > until

        writer.go_on = go_on
        append(writer, *(records(n, 2) for n in (0, 2)), records(4, 1))
        writer.close("complete", counts={"block_io": {"kept": 5, "lost": 0}})
        assert sectors(tmp_path / name) == list(range(5))
        assert load(tmp_path / name).gaps() == []
    assert parts(tmp_path / "a.cwnd") == [part_name(n) for n in (1, 2, 3)]
    assert parts(tmp_path / "b.cwnd") == [raw_name(2), raw_name(3), part_name(1)]
    assert left == [5, 3, 1, 5, 3]
    raw_only.setattr(spool, "CONVERT_SECONDS", -1.0)
    writer = make(tmp_path / "c.cwnd")
    append(writer, records(0, 2))
    writer.close()
    assert parts(tmp_path / "c.cwnd") == [raw_name(1)]


def test_patience_says_so_after_a_second_and_ends_with_the_next_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Signals:
        signals = 1

    now, said = [5.0], list[str]()
    monkeypatch.setattr("cwndtrace.cli.interrupt.time.monotonic", lambda: now[0])
    patience = Patience(Signals(), said.append)  # type: ignore[arg-type]
    assert patience.left(3000)
    assert said == []
    now[0] += 1.5
    assert patience.left(2000)
    assert patience.left(1)
    assert said == ["Making Parquet of 2,000 records that came too fast (Ctrl-C leaves them as they are)"]
    Signals.signals = 2
    assert not patience.left(1)


def test_a_full_disk_loses_no_rows_of_raw_parts(tmp_path: Path, raw_only: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = make(tmp_path / "a.cwnd")
    with raw_only.context() as patch:
        patch.setattr(os, "writev", refuse)
        with pytest.raises(CaptureError, match="3 rows wait in memory"):
            append(writer, records(0, 3))
        assert parts(tmp_path / "a.cwnd") == []
    append(writer, records(3, 1))
    with raw_only.context() as patch:
        patch.setattr(os, "writev", refuse)
        with pytest.raises(CaptureError, match="2 rows wait in memory"):
            append(writer, records(4, 2))
    assert sectors(tmp_path / "a.cwnd") == [0, 1, 2, 3]
    append(writer, records(6, 1))
    assert parts(tmp_path / "a.cwnd") == [raw_name(1), raw_name(2)]
    with raw_only.context() as patch:
        patch.setattr(Folder, "write", refuse)
        with pytest.raises(CaptureError):  # meta.json can't be written either
            writer.close()
    assert sectors(tmp_path / "a.cwnd") == list(range(7))
    assert writer.lost == {}


def test_rows_that_are_no_records_follow_raw_ones_as_parquet(tmp_path: Path, raw_only: pytest.MonkeyPatch) -> None:
    writer = make(tmp_path / "a.cwnd")
    append(writer, records(0, 2))
    writer.add("block_io", records(2, 1))
    writer.add("block_io", records(3, 1).to_arrow())
    writer.flush(force=True)
    append(writer, records(4, 1))
    assert parts(tmp_path / "a.cwnd") == [raw_name(1), raw_name(3), part_name(2)]
    assert sectors(tmp_path / "a.cwnd") == list(range(5))
    writer.close()
    assert sectors(tmp_path / "a.cwnd") == list(range(5))
    del raw_only


def test_a_raw_part_that_somebody_changed_stays_as_it_is(tmp_path: Path, raw_only: pytest.MonkeyPatch) -> None:
    raw_only.setattr(writer_module, "PART_ROWS", 2)
    writer = make(tmp_path / "a.cwnd")
    append(writer, *(records(n, 2) for n in (0, 2, 4, 6)))
    folder = tmp_path / "a.cwnd" / "block_io"
    (folder / raw_name(1)).write_bytes((folder / raw_name(2)).read_bytes()[:-1])
    (folder / raw_name(3)).unlink()
    writer.close()
    assert parts(tmp_path / "a.cwnd") == [raw_name(1), part_name(2), part_name(4)]
    assert sectors(tmp_path / "a.cwnd") == [2, 3, 6, 7]
    capture = store.open_capture(tmp_path / "a.cwnd")
    assert (capture.strange("block_io"), capture.gone("block_io")) == ([part_name(1)], [part_name(3)])
    assert capture.meta["schema"] == SCHEMA_VERSION


def test_a_crash_before_a_raw_part_is_removed_leaves_its_rows_once(
    tmp_path: Path, raw_only: pytest.MonkeyPatch
) -> None:
    writer = make(tmp_path / "a.cwnd")
    append(writer, records(0, 2))
    raw_only.setattr(Folder, "discard", lambda *_: None)
    writer.close()
    assert parts(tmp_path / "a.cwnd") == [raw_name(1), part_name(1)]
    capture = store.open_capture(tmp_path / "a.cwnd")
    assert (capture.rows("block_io"), sectors(tmp_path / "a.cwnd")) == (2, [0, 1])
    assert capture.strange("block_io") == []


KILLED = """
import sys
import pytest
from pathlib import Path
from cwndtrace import store
from cwndtrace.store import spool, writer as writer_module
from tests.unit import frames, raws
spool.Pace.behind = lambda *_: True
spool.Spool.due_s = lambda self: 0.0 if len(self._complete) > 3 else float("inf")
writer_module.PART_ROWS = 60
writer = store.CaptureWriter.create(sys.argv[1], frames.meta(), flush_seconds=0)
batches = [raws.records(first, 20) for first in range(0, 400, 20)]
print("ready", flush=True)
number = 0
while True:
    raws.append(writer, batches[number % len(batches)])
    number += 1
    print(number, flush=True)
"""


@pytest.mark.quick(1)
@pytest.mark.parametrize("seed", range(6))
def test_a_kill_while_raw_parts_are_written_and_converted_leaves_whole_batches(tmp_path: Path, seed: int) -> None:
    path, chance = tmp_path / "a.cwnd", random.Random(seed)
    command = [sys.executable, "-c", KILLED, str(path)]
    with subprocess.Popen(command, cwd=CHECKOUT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE) as child:
        assert child.stdout
        reported = 0
        for _ in range(chance.randrange(20, 60)):
            line = child.stdout.readline().strip()
            reported = int(line) if line != "ready" else 0
        child.kill()
    capture = store.open_capture(path)
    found = capture.table("block_io")["sector"].to_pylist()
    batches, rest = divmod(len(found), 20)
    assert (capture.status, capture.warnings, rest) == ("interrupted", [], 0)
    assert batches >= reported
    assert found == [n for batch in range(batches) for n in range(batch % 20 * 20, batch % 20 * 20 + 20)]
    assert any(name.startswith("part-") for name in parts(path))
    assert any(name.startswith("_part-") for name in parts(path))
