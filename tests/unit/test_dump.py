# SPDX-License-Identifier: Apache-2.0
"""A dump holds exactly the rows of its span, opens as any capture, and doesn't care what happens to the other one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from cwndtrace import store
from cwndtrace.errors import CaptureError
from cwndtrace.records import arrow
from cwndtrace.report import content
from cwndtrace.store import dump as module
from cwndtrace.store import files, folder
from cwndtrace.store.dump import Dump, Moments, clock_column, dump
from cwndtrace.store.layout import META
from cwndtrace.trace import load
from tests.unit import frames

NAMES = ("workloads", "processes")
LOSSY: list[dict[str, Any]] = [
    {"event": "block_io", "start_ns": frames.MONO + a * 10**9, "end_ns": frames.MONO + b * 10**9, "lost": n}
    for a, b, n in ((1, 2, 5), (30, 31, 3))
]


def at(seconds: float) -> int:
    return frames.MONO + int(seconds * frames.SECOND)


def between(start_s: float, end_s: float) -> Moments:
    return Moments(at(start_s), at(end_s))


def capture(path: Path, seconds: int = 60) -> store.Capture:
    """Return a capture with rows of all tables but samples in each second, in six parts for each table."""
    writer = store.CaptureWriter.create(path, about())
    resets, connections = frames.story(seconds=seconds)
    recoveries = frames.followed(resets, connections)
    whole = {"cwnd_reset": resets, "connections": connections, "cwnd_recovery": recoveries}
    for n in range(6):
        for table, rows in whole.items():
            writer.add(table, rows.slice(len(rows) * n // 6, len(rows) * (n + 1) // 6 - len(rows) * n // 6))
        # A request that took long comes in after later ones.
        late = [frames.block(max(0.0, n * 10 - 15), latency_us=20e6)]
        requests = [frames.block(n * 10 + m / 5, sector=n * 50 + m) for m in range(50)]
        writer.add("block_io", frames.table("block_io", *requests, *late))
        writer.add("workloads", frames.workloads({"cgroup_id": n + 1, "path": f"/{n}.service"}))
        writer.flush(force=True)
    writer.close("complete", **ending(path, seconds))
    return store.open_capture(path)


def about(**values: Any) -> dict[str, Any]:
    moment = {"mono_ns": frames.MONO, "utc_offset_ns": frames.OFFSET}
    return frames.meta(clock={"start": moment, "end": None, "segments": [moment]}, lossy=LOSSY, **values)


def ending(path: Path, seconds: int) -> dict[str, Any]:
    moment = {"mono_ns": frames.MONO, "utc_offset_ns": frames.OFFSET}
    end = {"mono_ns": at(seconds), "utc_offset_ns": frames.OFFSET}
    opened = store.open_capture(path)
    kept = {table: {"kept": opened.rows(table), "lost": 0} for table in arrow.TABLES}
    kept["block_io"]["lost"] = 8
    return {"clock": {"start": moment, "end": end, "segments": [moment]}, "counts": kept}


def rows(path: Path, table: str) -> pd.DataFrame:
    """Return the rows of a table as pandas reads them from the parts, in one order."""
    frame = store.open_capture(path).table(table).to_pandas()
    frame = frame.astype({name: "str" for name in frame.columns if isinstance(frame[name].dtype, pd.CategoricalDtype)})
    return pd.DataFrame(frame.sort_values(list(frame.columns), ignore_index=True))


def assert_exact(made: Dump, whole: dict[str, pd.DataFrame]) -> None:
    """Assert that a dump has the rows of its span, and no others."""
    for table, all_of_them in whole.items():
        expected = all_of_them
        if table not in NAMES:
            clock = all_of_them[clock_column(table)]
            expected = all_of_them[(clock >= made.span.start_ns) & (clock < made.span.end_ns)]
        pd.testing.assert_frame_equal(rows(made.path, table), expected.reset_index(drop=True))
        assert made.rows[table] == len(expected)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> store.Capture:
    """A capture that no test changes."""
    return capture(tmp_path_factory.mktemp("recorded") / "a.cwnd")


@pytest.fixture(scope="module")
def recorded_rows(recorded: store.Capture) -> dict[str, pd.DataFrame]:
    """The rows of each of its tables."""
    return {table: rows(recorded.path, table) for table in arrow.TABLES}


@pytest.fixture
def whole(recorded: store.Capture, tmp_path: Path) -> store.Capture:
    """The same capture in a.cwnd, for a test that may change it."""
    return store.open_capture(shutil.copytree(recorded.path, tmp_path / "a.cwnd"))


@pytest.mark.quick(2)
@pytest.mark.parametrize("span", [(0, 60), (12.3, 37.7), (20, 30), (30, 30.2), (59.999, 60), (12, 12.000001)])
@pytest.mark.parametrize("links", [True, False])
def test_a_dump_has_exactly_the_rows_of_its_span(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recorded: store.Capture,
    recorded_rows: dict[str, pd.DataFrame],
    span: tuple[float, float],
    links: bool,
) -> None:
    if not links:
        monkeypatch.setattr(folder.Folder, "link", lambda *_: False)
    made = dump(recorded, tmp_path / "b.cwnd", between(*span), why="a test")
    assert_exact(made, recorded_rows)
    opened = load(tmp_path / "b.cwnd")
    assert (opened.status, opened.warnings, opened.gaps()) == ("complete", [], [])
    assert (opened.started_ns, opened.about.end.mono_ns if opened.about.end else 0) == (at(span[0]), at(span[1]))
    assert opened.about.dumped == "a.cwnd"
    assert opened.meta["dump"]["why"] == "a test"
    assert opened.lost("block_io") == sum(
        each["lost"] for each in LOSSY if each["end_ns"] >= at(span[0]) and each["start_ns"] < at(span[1])
    )
    if links:  # copies have the same rows
        content.report(opened)
    assert (made.linked, made.copied)[links] == 0
    assert [path.name for path in tmp_path.rglob(".*")] == []


@pytest.mark.slow
def test_whole_parts_are_links_that_survive_the_capture(tmp_path: Path, whole: store.Capture) -> None:
    dump(whole, tmp_path / "b.cwnd", between(10, 45))
    inodes = {path.stat().st_ino for path in (tmp_path / "a.cwnd").rglob("part-*")}
    shared = [path for path in (tmp_path / "b.cwnd").rglob("part-*") if path.stat().st_ino in inodes]
    assert len(shared) >= 8
    before = {table: rows(tmp_path / "b.cwnd", table) for table in arrow.TABLES}
    folder.remove(tmp_path / "a.cwnd", None)
    for table, frame in before.items():
        pd.testing.assert_frame_equal(rows(tmp_path / "b.cwnd", table), frame)
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in (tmp_path / "b.cwnd").rglob("part-*"))


def test_a_dump_of_a_dump(tmp_path: Path, recorded: store.Capture, recorded_rows: dict[str, pd.DataFrame]) -> None:
    first = dump(recorded, tmp_path / "b.cwnd", between(10, 50))
    second = dump(store.open_capture(first.path), tmp_path / "c.cwnd", between(20, 30))
    assert_exact(second, recorded_rows)
    assert load(second.path).gaps() == []


def test_a_part_that_vanishes_moves_the_beginning_of_the_dump(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: store.Capture, recorded_rows: dict[str, pd.DataFrame]
) -> None:
    """A window deletes parts, after meta.json says so, while they are being linked."""
    real = folder.Folder.link
    oldest = list((tmp_path / "a.cwnd").rglob("part-00000[12].parquet"))
    last = max(
        max(pq.read_table(path)[clock_column(path.parent.name)].to_pylist())
        for path in oldest
        if path.parent.name not in NAMES
    )

    def link(self: folder.Folder, name: str, file: Any) -> bool:
        if oldest[0].exists():
            meta = json.loads((tmp_path / "a.cwnd" / META).read_text())
            (tmp_path / "a.cwnd" / META).write_text(json.dumps({**meta, "kept_from": last + 1}))
            for path in oldest:
                path.unlink()
        return real(self, name, file)

    monkeypatch.setattr(folder.Folder, "link", link)
    made = dump(whole, tmp_path / "b.cwnd", between(5, 50))
    assert not oldest[0].exists()
    assert made.span == Moments(last + 1, at(50))
    for table, frame in recorded_rows.items():
        if table not in NAMES:
            clock = frame[clock_column(table)]
            expected = frame[(clock > last) & (clock < at(50))].reset_index(drop=True)
            pd.testing.assert_frame_equal(rows(made.path, table), expected)
    assert load(made.path).gaps() == []


def test_a_span_that_vanishes_leaves_nothing(tmp_path: Path, whole: store.Capture) -> None:
    meta = json.loads((tmp_path / "a.cwnd" / META).read_text())
    (tmp_path / "a.cwnd" / META).write_text(json.dumps({**meta, "kept_from": at(55)}))
    with pytest.raises(CaptureError, match="left the window"):
        dump(whole, tmp_path / "b.cwnd", between(5, 50))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.cwnd"]


def test_the_part_that_is_still_written_is_taken_as_it_is(tmp_path: Path) -> None:
    writer = store.CaptureWriter.create(tmp_path / "a.cwnd", about(), flush_seconds=0)
    writer.add("block_io", frames.table("block_io", *(frames.block(n, sector=n) for n in range(10))))
    writer.flush()
    made = dump(store.open_capture(tmp_path / "a.cwnd"), tmp_path / "b.cwnd", between(0, 100))
    writer.add("block_io", frames.table("block_io", *(frames.block(n, sector=n) for n in range(10, 20))))
    writer.flush()
    writer.close()
    assert rows(made.path, "block_io")["sector"].tolist() == list(range(10))
    assert rows(tmp_path / "a.cwnd", "block_io")["sector"].tolist() == list(range(20))
    assert load(made.path).gaps() == []


def test_what_a_dump_is_known_to_lack_is_in_its_account(tmp_path: Path, whole: store.Capture) -> None:
    made = dump(whole, tmp_path / "b.cwnd", between(5, 50), lacking="the end may be missing")
    assert "the end may be missing" in load(made.path).warnings


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: store.Capture) -> None:
    monkeypatch.setattr(folder.Folder, "link", lambda *_: False)
    real = folder.Folder.write

    def full(self: folder.Folder, name: str, fill: Callable[..., object]) -> None:
        if name == "part-000004.parquet":
            raise OSError(28, os.strerror(28))
        real(self, name, fill)

    monkeypatch.setattr(folder.Folder, "write", full)
    with pytest.raises(CaptureError, match=r"b.cwnd can't be written: No space left") as refused:
        dump(recorded, tmp_path / "b.cwnd", between(0, 60))
    assert "Free some space" in refused.value.remedy
    assert sorted(path.name for path in tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_dump_has_its_name_once_it_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: store.Capture
) -> None:
    """A kill leaves a hidden folder, which opens too, or a whole dump."""
    real = module._trim
    seen: list[store.Capture] = []

    def look(*arguments: Any) -> None:
        assert not (tmp_path / "b.cwnd").exists()
        (hidden,) = tmp_path.glob(".b.cwnd.*.tmp")
        seen.append(store.open_capture(hidden))
        assert [seen[-1].table(table) for table in arrow.TABLES]
        assert seen[-1].warnings == []
        if len(seen) == 1:
            content.report(load(hidden))
        real(*arguments)

    monkeypatch.setattr(module, "_trim", look)
    dump(recorded, tmp_path / "b.cwnd", between(12, 37))
    assert {each.status for each in seen} == {"running"}
    assert len(seen) > 5


def test_a_name_that_is_taken_is_refused(tmp_path: Path, recorded: store.Capture) -> None:
    (tmp_path / "b.cwnd").mkdir()
    with pytest.raises(CaptureError, match=r"b.cwnd exists already"):
        dump(recorded, tmp_path / "b.cwnd", between(0, 60))
    assert [path.name for path in tmp_path.iterdir()] == ["b.cwnd"]


def test_what_the_capture_lacks_is_said(tmp_path: Path, whole: store.Capture) -> None:
    part = tmp_path / "a.cwnd" / "cwnd_reset" / "part-000003.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    (tmp_path / "a.cwnd" / "block_io" / "part-000002.parquet").unlink()
    meta = json.loads((tmp_path / "a.cwnd" / META).read_text())
    (tmp_path / "a.cwnd" / META).write_text(json.dumps({**meta, "unwritten": {"block_io": 4}}))
    made = dump(store.open_capture(whole.path), tmp_path / "b.cwnd", between(0, 60))
    damaged, *missing = load(made.path).warnings
    assert damaged.startswith("cwnd_reset/part-000003.parquet is cut off or corrupt, its rows are left out")
    resets = meta["parts"]["cwnd_reset"]["rows"][2]
    assert missing == [
        f"the dumped capture lacks {number} records of {table}, perhaps some of this span"
        for table, number in (("cwnd_reset", resets), ("block_io", 55))
    ]
    assert "unwritten" not in load(made.path).meta
    assert len(load(made.path).resets) < len(frames.story(seconds=60)[0])


def test_only_own_files_are_linked(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recorded: store.Capture,
    recorded_rows: dict[str, pd.DataFrame],
) -> None:
    monkeypatch.setattr(folder, "_file_system_uid", lambda: 54321)
    monkeypatch.setattr(folder, "_reach", lambda path: os.open(path, os.O_PATH))
    made = dump(recorded, tmp_path / "b.cwnd", between(0, 60))
    assert (made.linked, made.copied) == (0, len([*made.path.rglob("part-*")]))
    assert_exact(made, recorded_rows)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "meta",
    [{"counts": 7, "lossy": [1], "clock": {"segments": 3}}, {"dump": "x" * 500, "clock": 5}, {"lossy": {}, "parts": 1}],
)
@pytest.mark.usefixtures("whole")
def test_a_hostile_meta_json_gives_a_capture(tmp_path: Path, meta: dict[str, Any]) -> None:
    before = json.loads((tmp_path / "a.cwnd" / META).read_text())
    (tmp_path / "a.cwnd" / META).write_text(json.dumps({**before, **meta}))
    made = dump(store.open_capture(tmp_path / "a.cwnd"), tmp_path / "b.cwnd", between(10, 20))
    trace = load(made.path)
    assert len(trace.block_io) == 51
    content.report(trace)


@pytest.mark.usefixtures("whole")
def test_a_meta_json_that_cant_be_written_is_refused(tmp_path: Path) -> None:
    before = json.loads((tmp_path / "a.cwnd" / META).read_text())
    (tmp_path / "a.cwnd" / META).write_text(json.dumps({**before, "filters": {"pid": float("nan")}}))
    with pytest.raises(CaptureError, match="isn't as cwndtrace writes it"):
        dump(store.open_capture(tmp_path / "a.cwnd"), tmp_path / "b.cwnd", between(10, 20))
    assert not (tmp_path / "b.cwnd").exists()


def test_a_folder_that_cant_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: store.Capture
) -> None:

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files, "parts", refuse)
    with pytest.raises(CaptureError, match=r"cwnd_reset can't be read: Permission denied"):
        dump(recorded, tmp_path / "b.cwnd", between(0, 60))
    assert not (tmp_path / "b.cwnd").exists()


def test_parts_of_other_kinds_are_left_out(tmp_path: Path, whole: store.Capture) -> None:
    parts = tmp_path / "a.cwnd" / "block_io"
    stranger = pq.read_table(parts / "part-000001.parquet")
    pq.write_table(stranger.drop_columns(["start_ns"]), parts / "part-000007.parquet")
    (parts / "part-000008.parquet").symlink_to("/etc/passwd")
    os.mkfifo(parts / "part-000009.parquet")
    text = stranger.set_column(1, "start_ns", stranger["comm"])
    pq.write_table(text, parts / "part-000010.parquet")
    made = dump(whole, tmp_path / "b.cwnd", between(0, 60))
    assert len(rows(made.path, "block_io")) == 306
    assert len(whole.warnings) == 4
    assert not any(path.is_symlink() for path in (tmp_path / "b.cwnd").rglob("*"))
