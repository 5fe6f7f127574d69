# SPDX-License-Identifier: Apache-2.0
"""Records as a ring hands them over, and writers that write them raw."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cwndtrace import store
from cwndtrace.records import arrow, layout
from cwndtrace.store import raw, spool
from tests.unit import frames


def records(first: int, count: int, offset_ns: int = frames.OFFSET) -> arrow.TimedRecords:
    """Return block requests whose sectors count up from ``first``."""
    rows = np.concatenate([frames.block(n / 100, sector=n) for n in range(first, first + count)])
    return arrow.TimedRecords("block_io", rows.tobytes(), np.full(count, offset_ns, np.int64))


def append(writer: store.CaptureWriter, *batches: arrow.TimedRecords) -> None:
    """Add records, and flush each batch as if its time had come."""
    for rows in batches:
        writer.add(rows.event, rows)
        writer._buffers[rows.event].due = 0.0
        writer.flush()


def sectors(path: Path) -> list[int]:
    """Return the sectors of all requests in a capture, in its order."""
    return list(store.open_capture(path).table("block_io")["sector"].to_pylist())


def parts(path: Path, table: str = "block_io") -> list[str]:
    """Return the names of a table's files."""
    return sorted(part.name for part in (path / table).iterdir())


def always_raw(patch: pytest.MonkeyPatch) -> None:
    """Have writers write all records raw, and make Parquet of nothing before the end."""
    patch.setattr(spool.Pace, "behind", lambda *_: True)
    patch.setattr(spool.Spool, "due_s", lambda _: float("inf"))


def frame_ends(content: bytes, table: str = "block_io") -> Iterator[tuple[int, int]]:
    """Yield where each frame of a raw part ends, in bytes, and how many records there are up to it."""
    at, rows = len(raw.header(table)), 0
    while at < len(content):
        count = int.from_bytes(content[at + 8 : at + 12], "little")
        at, rows = at + 20 + count * layout.event(table).size, rows + count
        yield at, rows
