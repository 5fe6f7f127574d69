# SPDX-License-Identifier: Apache-2.0
"""Writing on a separate thread loses no rows, never blocks the tracer, and reports errors."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cwndtrace.errors import CaptureError
from cwndtrace.records import arrow, layout
from cwndtrace.store import CaptureWriter, ThreadedWriter, open_capture, writer_thread
from tests.harness.tcp import until


def rows(number: int) -> pa.Table:
    return arrow.to_arrow("block_io", np.zeros(number, dtype=layout.event("block_io").dtype), 0)


def test_all_added_rows_are_on_disk_after_close(tmp_path: Path) -> None:
    writer = ThreadedWriter(CaptureWriter.create(tmp_path / "a.cwnd", {}))
    for number in (1, 20, 300):
        writer.add("block_io", rows(number))
    writer.close("complete", ended="now")
    writer.close("failed")
    capture = open_capture(tmp_path / "a.cwnd")
    assert (capture.rows("block_io"), capture.status, capture.meta["ended"]) == (321, "complete", "now")


def test_rows_that_wait_come_before_raw_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = CaptureWriter.create(tmp_path / "a.cwnd", {})
    may_add, late, add = threading.Event(), [], inner.add
    monkeypatch.setattr(inner, "add", lambda table, data: (may_add.wait(30), add(table, data)))
    monkeypatch.setattr(inner, "flush", lambda **how: late.append(how["late"]))
    writer = ThreadedWriter(inner)
    for _ in range(3):
        writer.add("block_io", rows(1))
    may_add.set()
    until(lambda: len(late) >= 3, 30, "a look at the disk after each of the three")
    assert late[:3] == [True, True, False]
    writer.close()


def test_a_writer_without_rows_starts_no_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    writer = ThreadedWriter(CaptureWriter.create(tmp_path / "a.cwnd", {}))
    writer.flush()
    assert threading.active_count() == before
    writer.close()
    assert open_capture(tmp_path / "a.cwnd").status == "complete"


def test_add_never_waits_and_rows_beyond_the_buffer_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_thread, "BUFFER_ROWS", 100)
    may_add, inner = threading.Event(), CaptureWriter.create(tmp_path / "a.cwnd", {})
    real = inner.add
    monkeypatch.setattr(inner, "add", lambda table, data: (may_add.wait(30), real(table, data)))
    writer = ThreadedWriter(inner)
    for _ in range(3):
        writer.add("block_io", rows(40))
    may_add.set()
    writer.close()
    capture = open_capture(tmp_path / "a.cwnd")
    assert capture.rows("block_io") == 80
    assert capture.meta["unwritten"] == {"block_io": 40}


def test_flush_raises_the_error_of_the_disk_until_it_recovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = CaptureWriter.create(tmp_path / "a.cwnd", {}, flush_seconds=0)
    real, refused = inner.flush, threading.Event()

    def refuse(**_: bool) -> None:
        refused.set()
        raise CaptureError("full", "free some")

    monkeypatch.setattr(inner, "flush", refuse)
    writer = ThreadedWriter(inner)
    writer.add("block_io", rows(5))
    assert refused.wait(30)
    refused.clear()
    assert refused.wait(30)  # the first error has been stored once there is a second
    with pytest.raises(CaptureError, match="full"):
        writer.flush()
    monkeypatch.setattr(inner, "flush", real)
    deadline, failing = time.monotonic() + 30, True
    while failing and time.monotonic() < deadline:
        try:
            writer.flush()
            failing = False
        except CaptureError:
            time.sleep(0.01)
    assert not failing
    writer.close()
    assert open_capture(tmp_path / "a.cwnd").rows("block_io") == 5


def test_waiting_ends_with_the_rows_on_the_disk_or_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = CaptureWriter.create(tmp_path / "a.cwnd", {}, flush_seconds=1000)
    writer = ThreadedWriter(inner)
    writer.add("block_io", rows(5))
    writer.wait()
    assert open_capture(tmp_path / "a.cwnd").rows("block_io") == 5

    def refuse(*, force: bool = False, late: bool = False) -> None:  # noqa: ARG001
        if force:
            raise CaptureError("full", "free some")

    with monkeypatch.context() as patch:
        patch.setattr(inner, "flush", refuse)
        with pytest.raises(CaptureError, match="full"):
            writer.wait()
    writer.close()


def test_another_error_than_one_of_the_disk_ends_the_trace(tmp_path: Path) -> None:
    writer = ThreadedWriter(CaptureWriter.create(tmp_path / "a.cwnd", {}))
    writer.add("nothing of ours", rows(1))
    with pytest.raises(ValueError, match="isn't a table"):
        writer.close()
    assert open_capture(tmp_path / "a.cwnd").status == "failed"
