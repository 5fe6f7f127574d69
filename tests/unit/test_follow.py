# SPDX-License-Identifier: Apache-2.0
"""A follower hands out each row once, whatever becomes of the capture meanwhile."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from cwndtrace import store
from cwndtrace.errors import CaptureError
from cwndtrace.store import writer
from cwndtrace.store.follow import MOST_WARNINGS, Follower
from tests.unit import frames

WANTED = {"cwnd_reset": ("ts_ns", "sock_cookie"), "connections": ("ts_ns", "sock_cookie")}


def begin(path: Path) -> store.CaptureWriter:
    return store.CaptureWriter.create(path, frames.meta())


def add(to: store.CaptureWriter, *cookies: int) -> None:
    to.add("cwnd_reset", frames.table("cwnd_reset", *(frames.reset(n, sock_cookie=n) for n in cookies)))
    to._buffers["cwnd_reset"].due = 0.0
    to.flush()


def cookies(follower: Follower, table: str = "cwnd_reset", budget_s: float = 60.0) -> list[int]:
    rows = [data for name, data in follower.new_rows(budget_s) if name == table]
    return [cookie for data in rows for cookie in data["sock_cookie"].to_pylist()]


def test_rows_of_a_part_that_is_rewritten_come_once(tmp_path: Path) -> None:
    trace = begin(tmp_path / "a.cwnd")
    follower = Follower(tmp_path / "a.cwnd", WANTED)
    assert (cookies(follower), follower.status, follower.behind) == ([], "running", False)
    add(trace, 1, 2)
    assert cookies(follower) == [1, 2]
    assert cookies(follower) == []
    add(trace, 3)
    assert len(list((tmp_path / "a.cwnd" / "cwnd_reset").iterdir())) == 1
    assert cookies(follower) == [3]
    trace.close()
    assert (cookies(follower), follower.status) == ([], "complete")


def test_rows_of_sealed_parts_come_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SEAL_ROWS", 3)
    trace = begin(tmp_path / "a.cwnd")
    follower = Follower(tmp_path / "a.cwnd", WANTED)
    add(trace, 1, 2)
    assert cookies(follower) == [1, 2]
    add(trace, 3)
    add(trace, 4)
    add(trace, 5, 6)
    assert cookies(follower) == [3, 4, 5, 6]
    add(trace, 7)
    trace.close()
    assert cookies(follower) == [7]


def test_a_budget_that_is_over_leaves_rows_for_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SEAL_ROWS", 1)
    trace = begin(tmp_path / "a.cwnd")
    for number in (1, 2, 3):
        add(trace, number)
    trace.close()
    follower = Follower(tmp_path / "a.cwnd", WANTED)
    assert (cookies(follower, budget_s=-1), follower.behind) == ([1], True)
    assert (cookies(follower), follower.behind) == ([2, 3], False)


def test_only_the_last_parts_of_snapshots_are_read_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SEAL_ROWS", 1)
    trace = begin(tmp_path / "a.cwnd")
    for number in range(1, 6):
        trace.add("connections", frames.snapshots(frames.snapshot(number, sock_cookie=number)))
        trace.flush(force=True)
    follower = Follower(tmp_path / "a.cwnd", WANTED, newest=frozenset({"connections"}))
    assert cookies(follower, "connections") == [4, 5]
    trace.add("connections", frames.snapshots(frames.snapshot(6, sock_cookie=6)))
    trace.close()
    assert cookies(follower, "connections") == [6]


def test_old_parts_may_be_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SEAL_ROWS", 1)
    trace = begin(tmp_path / "a.cwnd")
    follower = Follower(tmp_path / "a.cwnd", WANTED)
    for number in (1, 2, 3):
        add(trace, number)
    (tmp_path / "a.cwnd" / "cwnd_reset" / "part-000001.parquet").unlink()
    assert cookies(follower) == [2, 3]
    add(trace, 4)
    for part in (2, 3):
        (tmp_path / "a.cwnd" / "cwnd_reset" / f"part-{part:06}.parquet").unlink()
    assert cookies(follower) == [4]
    assert not follower.warnings
    trace.close()


def test_a_capture_that_is_deleted_or_replaced_is_gone(tmp_path: Path) -> None:
    trace = begin(tmp_path / "a.cwnd")
    add(trace, 1)
    first, second = Follower(tmp_path / "a.cwnd", WANTED), Follower(tmp_path / "a.cwnd", WANTED)
    (tmp_path / "a.cwnd").rename(tmp_path / "b.cwnd")
    assert (cookies(first), first.status) == ([], "gone")
    other = begin(tmp_path / "a.cwnd")
    add(other, 9)
    assert (cookies(second), second.status) == ([], "gone")
    trace.close()
    other.close()
    shutil.rmtree(tmp_path / "a.cwnd")
    with pytest.raises(CaptureError, match="There is no"):
        Follower(tmp_path / "a.cwnd", WANTED)


def test_damaged_parts_are_left_out_with_a_warning_and_read_once_they_are_whole(tmp_path: Path) -> None:
    trace = begin(tmp_path / "a.cwnd")
    add(trace, 1)
    part = tmp_path / "a.cwnd" / "cwnd_reset" / "part-000001.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:-9])
    follower = Follower(tmp_path / "a.cwnd", WANTED)
    for _ in range(3):
        assert cookies(follower) == []
    assert len(follower.warnings) == 1
    assert "cwnd_reset/part-000001.parquet can't be read" in follower.warnings[0]
    part.write_bytes(whole)
    assert cookies(follower) == [1]
    trace.close()


def test_links_pipes_and_folders_in_place_of_parts_do_no_harm(tmp_path: Path) -> None:
    trace = begin(tmp_path / "a.cwnd")
    add(trace, 1)
    folder = tmp_path / "a.cwnd" / "cwnd_reset"
    (folder / "part-000002.parquet").symlink_to("/etc/passwd")
    os.mkfifo(folder / "part-000003.parquet")
    (folder / "part-000004.parquet").mkdir()
    for number in range(5, 30):
        (folder / f"part-\x1b[31m{number}.parquet").write_bytes(b"PAR1")
    follower = Follower(tmp_path / "a.cwnd", WANTED)
    assert cookies(follower) == [1]
    assert len(follower.warnings) == MOST_WARNINGS
    assert all(line.isprintable() for line in follower.warnings)
    trace.close()
