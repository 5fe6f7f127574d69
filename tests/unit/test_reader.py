# SPDX-License-Identifier: Apache-2.0
"""A part's columns are made those of its table, damage is refused, and what is missing of a capture is counted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cwndtrace.errors import CaptureError
from cwndtrace.records import arrow
from cwndtrace.store import open_capture, reader
from cwndtrace.store.layout import META, SCHEMA_VERSION, boot_id, process_start
from cwndtrace.store.parquet_limits import UnsafeFile
from tests.unit import frames

KNOWN = arrow.schema("connections")


def snapshots() -> pa.Table:
    return frames.snapshots(*(frames.snapshot(at, bytes_sent=at) for at in (1, 2, 3)))


def holed(column: str) -> pa.Table:
    """Return snapshots of which the second one lacks a value."""
    table = snapshots()
    at = table.column_names.index(column)
    values = table.column(column).combine_chunks()
    values = values.take(pa.array([0, None, 2]))
    return table.set_column(at, table.schema.field(at), values)


@pytest.mark.parametrize("column", ["ts_ns", "cwnd", "saddr", "sock_cgroup_id", "listener"])
def test_a_null_where_the_trace_writes_none_is_damage(column: str) -> None:
    with pytest.raises(UnsafeFile, match=f"values of {column} are missing"):
        reader._conform(holed(column), KNOWN)


@pytest.mark.parametrize("column", sorted(arrow.MAY_BE_NULL))
def test_a_null_is_none_where_the_kernel_may_not_tell(column: str) -> None:
    assert reader._conform(holed(column), KNOWN).column(column).null_count == 1


def test_columns_are_those_of_the_table_in_its_order_and_then_later_ones() -> None:
    table = snapshots().drop_columns(["busy_us", "sndbuf"]).append_column("later", pa.array([7, None, 9]))
    mixed = table.select(["later", *reversed(table.column_names[:-1])])
    out = reader._conform(mixed, KNOWN)
    assert out.column_names == [*KNOWN.names, "later"]
    assert [out.schema.field(name).type for name in KNOWN.names] == KNOWN.types
    assert out.column("busy_us").null_count == out.column("sndbuf").null_count == 3
    assert out.column("later").to_pylist() == [7, None, 9]
    assert out.column("bytes_sent").to_pylist() == [1, 2, 3]
    assert out.schema.metadata == KNOWN.metadata


def test_numbers_of_an_enum_become_its_labels() -> None:
    table = snapshots()
    at = table.column_names.index("ca_state")
    out = reader._conform(table.set_column(at, "ca_state", pa.array([0, 1, 99], pa.uint8())), KNOWN)
    assert out.column("ca_state").to_pylist() == ["open", "disorder", "99"]


def test_a_time_that_pandas_cannot_show_is_refused() -> None:
    table = snapshots()
    for us, fits in ((2**63 // 1000 - 1, True), (2**62, False)):
        late = table.set_column(0, KNOWN.field("time"), pa.array([1, 2, us], pa.timestamp("us", tz="UTC")))
        if fits:
            assert len(reader._conform(late, KNOWN)) == 3
        else:
            with pytest.raises(pa.ArrowInvalid):
                reader._conform(late, KNOWN)


# ---- what is missing --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a capture of three snapshots in each of three parts."""
    path = tmp_path / "a.cwnd"
    frames.capture(path, connections=snapshots())
    parts = sorted((path / "connections").iterdir())
    first = parts[0].read_bytes()
    meta = json.loads((path / META).read_text())
    for number in (2, 3):
        (path / "connections" / f"part-{number:06d}.parquet").write_bytes(first)
    meta["parts"]["connections"] = {name: each * 3 for name, each in meta["parts"]["connections"].items()}
    meta["counts"]["connections"] = {"kept": 9, "lost": 0}
    (path / META).write_text(json.dumps(meta))
    return path


def changed(folder: Path, **entries: Any) -> reader.Capture:
    meta = json.loads((folder / META).read_text())
    (folder / META).write_text(json.dumps(meta | entries))
    return open_capture(folder)


def test_a_whole_capture_lacks_nothing(folder: Path) -> None:
    capture = open_capture(folder)
    assert (capture.rows("connections"), capture.missing("connections")) == (9, (0, 9))
    assert capture.strange("connections") == capture.gone("connections") == []
    assert len(capture.table("connections")) == 9
    assert capture.warnings == []


def test_parts_that_are_gone_or_changed_are_named_and_their_rows_counted(folder: Path) -> None:
    (folder / "connections" / "part-000002.parquet").unlink()
    (folder / "connections" / "part-000003.parquet").write_bytes(b"PAR1")
    pq.write_table(snapshots().slice(0, 1), folder / "connections" / "part-000001.parquet")
    pq.write_table(snapshots(), folder / "connections" / "part-000009.parquet")
    capture = open_capture(folder)
    assert capture.gone("connections") == ["part-000002.parquet", "part-000003.parquet"]
    assert capture.strange("connections") == ["part-000001.parquet", "part-000009.parquet"]
    # Two of the first part, and all of two others.
    assert capture.missing("connections") == (8, 9)
    assert len(capture.table("connections")) == 4
    assert [line.split(" is ")[0] for line in capture.warnings] == ["connections/part-000003.parquet"]


def test_rows_that_were_kept_and_never_written_are_missing(folder: Path) -> None:
    counts = json.loads((folder / META).read_text())["counts"]
    capture = changed(folder, counts=counts | {"connections": {"kept": 12, "lost": 0}})
    assert capture.missing("connections") == (3, 12)
    assert changed(folder, unwritten={"connections": 2}).missing("connections") == (1, 10)
    assert changed(folder, unwritten={"connections": 5}).missing("connections") == (0, 9)


@pytest.mark.parametrize("number", range(3))
def test_without_a_list_of_parts_the_counts_tell_what_is_missing(folder: Path, number: int) -> None:
    for part in range(number):
        (folder / "connections" / f"part-{part + 1:06d}.parquet").unlink()
    capture = changed(folder, parts=None)
    assert capture.missing("connections") == (3 * number, 9)
    assert capture.strange("connections") == capture.gone("connections") == []


def test_a_trace_that_runs_or_was_killed_lacks_nothing(folder: Path) -> None:
    (folder / "connections" / "part-000001.parquet").unlink()
    mine = {"pid": os.getpid(), "pid_start": process_start(os.getpid()), "boot_id": boot_id(), "status": "running"}
    capture = changed(folder, **mine)
    assert (capture.status, capture.missing("connections")) == ("running", (0, 0))
    for other in ({"boot_id": "another"}, {"pid_start": 1}, {"pid": 2**22 + 1}, {"pid": None}):
        capture = changed(folder, **mine | other)
        assert (capture.status, capture.missing("connections")) == ("interrupted", (0, 0))
    capture = changed(folder, status="failed")
    assert (capture.status, capture.missing("connections")) == ("failed", (3, 9))


def test_parts_that_left_the_window_are_not_missed(folder: Path) -> None:
    listed = json.loads((folder / META).read_text())["parts"]["connections"]
    for number in (1, 2):
        (folder / "connections" / f"part-{number:06d}.parquet").unlink()
    left = {"connections": {name: each[:1] for name, each in listed.items()}}
    capture = changed(folder, deleted={"connections": {"parts": 2, "rows": 6}}, parts=left)
    assert capture.missing("connections") == (0, 3)
    assert capture.strange("connections") == capture.gone("connections") == []


def test_rows_beyond_the_limit_are_not_read(folder: Path) -> None:
    assert len(open_capture(folder, max_rows=9).table("connections")) == 9
    with pytest.raises(CaptureError, match=r"holds 9 rows, and the limit is 8\.") as caught:
        open_capture(folder, max_rows=8).table("connections")
    assert "raise --max-rows (max_rows in Python)." in caught.value.remedy


def test_pieces_are_the_parts_after_an_empty_one(folder: Path) -> None:
    pieces = list(open_capture(folder).pieces("connections", ["ts_ns", "bytes_sent"]))
    assert [len(piece) for piece in pieces] == [0, 3, 3, 3]
    assert {tuple(piece.column_names) for piece in pieces} == {("ts_ns", "bytes_sent")}
    assert open_capture(folder).table("connections", ["bytes_sent"]).to_pydict() == {"bytes_sent": [1, 2, 3] * 3}


@pytest.mark.parametrize("name", ["", ".", "..", "../a.cwnd", ".hidden", "power", "meta.json"])
def test_only_folders_of_the_capture_are_tables(folder: Path, name: str) -> None:
    (folder / ".hidden").mkdir()
    with pytest.raises(KeyError):
        open_capture(folder).table(name)


def test_a_table_of_a_later_version_is_read_as_it_is(folder: Path) -> None:
    (folder / "power").mkdir()
    pq.write_table(pa.table({"watts": [1, None]}), folder / "power" / "part-000001.parquet")
    assert open_capture(folder).table("power").to_pydict() == {"watts": [1, None]}


@pytest.mark.parametrize(
    ("schema", "cause"),
    [
        (None, "it has no schema number"), ("1", "it has no schema number"), (0, "it has no schema number"),
        (True, "it has no schema number"),
        (SCHEMA_VERSION + 1, f"has schema {SCHEMA_VERSION + 1}; this cwndtrace reads up to {SCHEMA_VERSION}."),
    ],
)  # fmt: skip
def test_a_schema_that_this_version_does_not_know_is_refused(folder: Path, schema: object, cause: str) -> None:
    with pytest.raises(CaptureError) as caught:
        changed(folder, schema=schema, version="9.9\x1b")
    assert cause in str(caught.value.cause)
    if type(schema) is int and schema > 1:
        assert caught.value.remedy == "Upgrade cwndtrace: the capture was written by 9.9?."
