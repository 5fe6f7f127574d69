# SPDX-License-Identifier: Apache-2.0
"""Writing a capture, safe against kill -9 and a full disk."""

from __future__ import annotations

import errno
import json
import os
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from cwndtrace import events
from cwndtrace.errors import CaptureError
from cwndtrace.store.layout import META, SCHEMA_VERSION, boot_id, process_start, show

PART_ROWS: Final = 131_072
"""Rows that make a part due, whatever their age: few enough that writing them ends before a ring buffer is full."""

BUFFER_ROWS: Final = 8 * PART_ROWS
"""Rows a table may hold in memory while its disk refuses them (about 100 MB); more are dropped and counted."""

_REMEDIES: Final = {
    errno.ENOSPC: "Free some space there, or write to another disk with -o.",
    errno.EDQUOT: "Free some of your quota, or write to another disk with -o.",
    errno.EFBIG: "Raise the limit on file sizes (ulimit -f).",
    errno.EACCES: "Choose a place you may write to with -o.",
    errno.EPERM: "Choose a place you may write to with -o.",
    errno.EROFS: "Choose a place you may write to with -o.",
    errno.ENAMETOOLONG: "Choose a shorter name with -o.",
    errno.EIO: "The disk itself fails: see dmesg, and write to another one with -o.",
}


@dataclass
class _Buffer:
    """The rows of one table that aren't on disk yet."""

    tables: list[pa.Table] = field(default_factory=list)
    rows: int = 0
    since: float = 0.0
    part: int = 1

    def clear(self) -> None:
        self.tables.clear()
        self.rows = 0


class CaptureWriter:
    """Writes one capture; made by ``create``. Not for use from several threads at once.

    ``path`` is the capture's directory, ``lost`` counts by table the rows that never reached the disk.
    """

    def __init__(self, path: Path, meta: dict[str, Any], flush_seconds: float) -> None:
        self.path = path
        self.lost: Counter[str] = Counter()
        self._meta = meta
        self._flush_seconds = flush_seconds
        self._buffers = {name: _Buffer() for name in events.TABLES}
        self._closed = False

    @classmethod
    def create(cls, path: str | os.PathLike[str], meta: dict[str, Any], *, flush_seconds: float = 5.0) -> CaptureWriter:
        """Make the directory ``path`` and its ``meta.json``, whose status is ``running`` from now on.

        ``meta`` may hold anything that JSON can; ``schema``, ``status``, ``pid``, ``pid_start`` (clock ticks
        since boot) and ``boot_id`` are filled in, because they tell later whether this process still lives.
        Raises CaptureError if ``path`` exists, its parent doesn't, or it can't be written.
        """
        path = Path(path)
        identity = {
            "schema": SCHEMA_VERSION,
            "status": "running",
            "pid": os.getpid(),
            "pid_start": process_start(os.getpid()),
            "boot_id": boot_id(),
        }
        writer = cls(path, {**meta, **identity}, flush_seconds)
        try:
            path.mkdir()
        except FileExistsError:
            raise CaptureError(f"{show(path)} exists already.", "Choose another name with -o.") from None
        except FileNotFoundError:
            cause = f"The folder {show(path.parent)} doesn't exist."
            raise CaptureError(cause, "Make it, or choose another place with -o.") from None
        except OSError as error:
            raise _failed(f"{show(path)} can't be made", error) from error
        try:
            writer._write_meta(writer._meta)
        except BaseException as error:
            with suppress(OSError):
                path.rmdir()
            if isinstance(error, OSError):
                raise _failed(f"{show(path)} can't be written", error) from error
            raise
        with suppress(OSError):  # a folder may be writable and not readable
            _sync_directory(path.parent)
        return writer

    def add(self, table: str, data: pa.Table) -> None:
        """Take the rows of ``data``, to be written by a later ``flush``.

        Raises ValueError for a table that isn't one of ``events.TABLES`` and for a schema other than its own.
        """
        if table not in events.TABLES:
            raise ValueError(f"{table!r} isn't a table of a capture")
        if not data.schema.equals(events.schema(table)):
            raise ValueError(f"the schema differs from that of {table}:\n{data.schema}")
        buffer = self._buffers[table]
        if buffer.rows + len(data) > BUFFER_ROWS:
            self.lost[table] += len(data)
        elif len(data):
            if not buffer.rows:
                buffer.since = time.monotonic()
            buffer.tables.append(data)
            buffer.rows += len(data)

    def flush(self, force: bool = False) -> None:
        """Write the parts that are due: five seconds (``flush_seconds``) after their first row, or PART_ROWS long.

        ``force`` writes all that is held. Raises CaptureError if the disk refuses; the rows are then kept
        and tried again, ``flush_seconds`` later at the earliest unless forced.
        """
        failure: CaptureError | None = None
        for name, buffer in self._buffers.items():
            due = buffer.rows >= PART_ROWS or time.monotonic() - buffer.since >= self._flush_seconds
            if not buffer.rows or not (due or force):
                continue
            try:
                self._write_part(name, buffer)
            except OSError as error:
                buffer.since = time.monotonic()
                what = f"Writing {name} to {show(self.path)} failed, {buffer.rows:,} rows wait in memory"
                failure = failure or _failed(what, error)
        if failure:
            raise failure

    def update_meta(self, **values: Any) -> None:
        """Replace top-level ``values`` of ``meta.json``, the whole file or nothing. Raises CaptureError."""
        meta = {**self._meta, **values}
        try:
            self._write_meta(meta)
        except OSError as error:
            raise _failed(f"{show(self.path / META)} can't be written", error) from error
        self._meta = meta

    def close(self, status: str = "complete", **meta: Any) -> None:
        """Write what is held, then ``status`` and ``meta``; the second call does nothing.

        Where rows had to be given up, ``meta.json`` gets ``unwritten`` with their number by table; where the
        last flush failed, the status is ``failed`` and CaptureError is raised.
        """
        if self._closed:
            return
        self._closed = True
        failure: CaptureError | None = None
        try:
            self.flush(force=True)
        except CaptureError as error:
            failure, status = error, "failed"
            for name, buffer in self._buffers.items():
                self.lost[name] += buffer.rows
                buffer.clear()
        if self.lost:
            meta["unwritten"] = dict(+self.lost)
        try:
            self.update_meta(status=status, **meta)
        except CaptureError as error:
            failure = failure or error
        if failure:
            raise failure

    def _write_part(self, name: str, buffer: _Buffer) -> None:
        folder = self.path / name
        if not folder.is_dir():
            folder.mkdir()
            _sync_directory(self.path)
        final = folder / f"part-{buffer.part:06}.parquet"
        temporary = final.with_name(f".{final.name}.tmp")
        rows = pa.concat_tables(buffer.tables).unify_dictionaries()
        try:
            with temporary.open("wb") as file:
                pq.write_table(rows, file, **_encoding(name))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(final)
            _sync_directory(folder)
        except BaseException:
            # The rows stay in memory, so neither name may hold them as well.
            _discard(temporary)
            _discard(final)
            raise
        buffer.part += 1
        buffer.clear()

    def _write_meta(self, meta: dict[str, Any]) -> None:
        text = json.dumps(meta, indent=1, allow_nan=False)
        temporary = self.path / f".{META}.tmp"
        try:
            with temporary.open("w", encoding="ascii") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path / META)
        except BaseException:
            _discard(temporary)
            raise
        _sync_directory(self.path)


@cache
def _encoding(table: str) -> dict[str, Any]:
    """How the columns of a table are stored: clocks as differences, most by dictionary, sectors by neither.

    Beside one rule for all columns that takes a quarter of the time and half of the space.
    """
    schema = events.schema(table)
    clocks = [f.name for f in schema if pa.types.is_timestamp(f.type) or f.name.endswith("_ns")]
    plain = [f.name for f in schema if f.metadata[b"unit"].startswith(b"sectors")]
    return {
        "compression": "zstd",
        "write_page_checksum": True,
        "use_dictionary": [name for name in schema.names if name not in (*clocks, *plain)],
        "column_encoding": dict.fromkeys(clocks, "DELTA_BINARY_PACKED"),
    }


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _failed(what: str, error: OSError) -> CaptureError:
    reason = error.strerror or events.clean(str(error))
    return CaptureError(f"{what}: {reason}.", _REMEDIES.get(error.errno or 0, "See the reason, or choose another -o."))
