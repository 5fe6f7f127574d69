# SPDX-License-Identifier: Apache-2.0
"""Write captures in a way that is safe against kill -9 and a full disk."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from cwndtrace import format as fmt
from cwndtrace import privileges
from cwndtrace.errors import CaptureError
from cwndtrace.format import plural
from cwndtrace.lazy import pa
from cwndtrace.records import arrow
from cwndtrace.store.encoding import encoded
from cwndtrace.store.folder import Folder, UnsafePath, refuse
from cwndtrace.store.layout import (
    META,
    MOST_PART_ROWS,
    SCHEMA_VERSION,
    WHOLE_SCHEMA,
    WINDOW_SCHEMA,
    boot_id,
    part_name,
    process_start,
    raw_name,
    show,
)
from cwndtrace.store.meta import Part, listed
from cwndtrace.store.reader import Capture, open_capture
from cwndtrace.store.spool import QUIET_SECONDS, Spool
from cwndtrace.store.window import Window

PART_ROWS: Final = 131_072
"""With this many new rows a part is due at any age. Writing them ends before a ring buffer is full."""

FLUSH_SECONDS: Final = 0.5
"""The time that a row waits in memory. With the tenths of a second that rows spend in the kernel and in the event loop,
a kill loses the rows of about a second."""

OWN_SECONDS: Final = 10.0
"""The same for rows that are only this process's own block I/O. Writing a part causes such I/O, which would otherwise
cause the next part, twice a second, even if nothing else happens."""

SEAL_ROWS: Final = 16_384
SEAL_SECONDS: Final = 60.0
"""A part with this many rows, or of this age, is sealed. Until then each flush rewrites it with the rows that came in
since; otherwise a quiet day would leave a hundred thousand parts of a few rows."""

BUFFER_ROWS: Final = MOST_PART_ROWS
"""The most rows of a table in memory while its disk refuses them (about 100 MB). More are dropped and counted."""

_REMEDIES: Final = {
    errno.ENOSPC: "Free some space there, or write to another disk with -o.",
    errno.EDQUOT: "Free some of your quota, or write to another disk with -o.",
    errno.EFBIG: "Raise the limit on file sizes (ulimit -f).",
    errno.EACCES: "Choose a place you may write to with -o.",
    errno.EPERM: "Choose a place you may write to with -o.",
    errno.EROFS: "Choose a place you may write to with -o.",
    errno.ENAMETOOLONG: "Choose a shorter name with -o.",
    errno.EIO: "The disk is failing: see dmesg, and write to another one with -o.",
}


@dataclass
class _Buffer:
    """The rows of one table's unsealed part.

    The first ``written`` rows are on disk already, the others wait. ``tables`` holds all of them, but only those that
    wait if the part is ``raw``. ``due`` is the time at which those are to be written, ``begun`` the time at which the
    part's first row came in, both by time.monotonic(). ``arrived_ns`` is the time of its last row, in ns.
    """

    tables: list[pa.Table | arrow.TimedRecords] = field(default_factory=list)
    rows: int = 0
    written: int = 0
    due: float = math.inf
    begun: float = 0.0
    arrived_ns: int = 0
    part: int = 1
    raw: bool = False

    @property
    def waiting(self) -> int:
        return self.rows - self.written

    @property
    def _unwritten(self) -> list[pa.Table | arrow.TimedRecords]:
        return self.tables[1:] if self.written and not self.raw else self.tables

    def records(self) -> list[arrow.TimedRecords] | None:
        """Return the rows that wait; None if they aren't all as the kernel wrote them."""
        records = [rows for rows in self._unwritten if isinstance(rows, arrow.TimedRecords)]
        return records if sum(map(len, records)) == self.waiting else None

    def next_part(self) -> None:
        """Begin another part, with the rows that wait."""
        self.tables = [*self._unwritten]
        self.rows, self.written, self.raw = self.waiting, 0, False
        self.part += 1
        self.begun = time.monotonic()

    def clear(self) -> None:
        self.tables.clear()
        self.rows = self.written = 0


class CaptureWriter:
    """A writer of one capture, made by ``create``. It isn't safe for use from several threads at once.

    ``path`` is the capture's directory, and ``folder`` the same, held open. ``lost`` counts the rows that never reached
    the disk, by table. Records that come faster than Parquet can be made of them are written raw, and become Parquet
    when there is time (see ``Spool``). ``close`` makes Parquet of what is left, unless ``go_on``, which is called with
    the number of rows that are left before each part, returns False; those parts stay raw.
    """

    def __init__(
        self, path: Path, folder: Folder, meta: dict[str, Any], flush_seconds: float, window: Window | None = None
    ) -> None:
        self.path = path
        self.folder = folder
        self.lost: Counter[str] = Counter()
        self._meta = meta
        self._flush_seconds = flush_seconds
        self._buffers = {name: _Buffer() for name in arrow.TABLES}
        self._parts: dict[str, dict[int, Part]] = {name: {} for name in arrow.TABLES}
        self._window = window
        self._seal_seconds = min(SEAL_SECONDS, window.most_seal_s) if window else SEAL_SECONDS
        self._unannounced = False
        self._closed = False
        self._spool = Spool(folder, self._parts, window)
        self.go_on: Callable[[int], bool] = lambda _: True

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        meta: dict[str, Any],
        *,
        flush_seconds: float = FLUSH_SECONDS,
        user: privileges.User | None = None,
        window: Window | None = None,
    ) -> CaptureWriter:
        """Create the directory ``path`` and its ``meta.json``, with the status ``running``.

        ``meta`` may hold anything that JSON can. ``schema``, ``status``, ``pid``, ``pid_start`` (clock ticks since
        boot) and ``boot_id`` are filled in; the last three tell a reader whether this process still lives. The capture
        is created with ``user``'s rights and belongs to that user. Parts that leave ``window`` are deleted. Raises
        CaptureError if ``path`` exists, its parent doesn't, or it can't be written.
        """
        path = Path(path)
        identity = {
            "schema": _schema(window),
            "status": "running",
            "pid": os.getpid(),
            "pid_start": process_start(os.getpid()),
            "boot_id": boot_id(),
        }
        with _explained(path):
            folder = Folder.make(path, user)
        writer = cls(path, folder, {**meta, **identity}, flush_seconds, window)
        try:
            writer._write_meta(writer._meta)
        except BaseException as error:
            folder.close()
            with suppress(OSError), privileges.acting_as(folder.user):
                path.rmdir()
            if isinstance(error, OSError):
                raise failed(f"{show(path)} can't be written", error) from error
            raise
        return writer

    def capture(self) -> Capture:
        """Open the capture for reading, even if its directory has been moved or its path can't be walked any longer.

        The result is usable while this writer exists. Raises CaptureError.
        """
        return replace(open_capture(self.folder.path), shown=self.path)

    def add(self, table: str, data: pa.Table | arrow.TimedRecords) -> None:
        """Take the rows of ``data``, which a later ``flush`` writes.

        Raises ValueError for a table that isn't one of ``arrow.TABLES`` and for a schema other than its own.
        """
        if table not in arrow.TABLES:
            raise ValueError(f"{table!r} isn't a table of a capture")
        if isinstance(data, arrow.TimedRecords):
            if data.event != table:
                raise ValueError(f"records of {data.event} don't belong in table {table}")
        elif not data.schema.equals(arrow.schema(table)):
            raise ValueError(f"the schema differs from that of {table}:\n{data.schema}")
        buffer = self._buffers[table]
        if buffer.rows + len(data) > BUFFER_ROWS:
            self.lost[table] += len(data)
        elif len(data):
            now = time.monotonic()
            if not buffer.waiting:
                buffer.due = math.inf
            if not buffer.rows:
                buffer.begun = now
            if buffer.due > now + self._flush_seconds:
                wait = max(OWN_SECONDS, self._flush_seconds) if _own(data) else self._flush_seconds
                buffer.due = min(buffer.due, now + wait)
            buffer.tables.append(data)
            buffer.rows += len(data)
            buffer.arrived_ns = time.monotonic_ns()

    def flush(self, force: bool = False, *, seal: bool = True, late: bool = False) -> None:
        """Write the parts that are due, and delete those that have left the window.

        A part is due ``flush_seconds`` after its first new row, OWN_SECONDS after it if all new rows are this process's
        own block I/O, and at once with PART_ROWS new rows. ``force`` writes all rows, and seals the parts unless
        ``seal`` is False. A raw part that is due becomes Parquet, unless ``late`` says that rows wait for this thread.
        Raises CaptureError if the disk refuses; the rows are then kept, and written again ``flush_seconds`` later at
        the earliest, unless forced.
        """
        if refused := self._flush(force, seal=seal, late=late):
            name, error = refused[0]
            waiting = plural(number := self._buffers[name].waiting, "row")
            failure = (
                f"Writing {name} to {show(self.path)} failed, {waiting} {'waits' if number == 1 else 'wait'} in memory"
            )
            raise failed(failure, error)

    def asked(self) -> bool:
        """Return whether another process asks up to which moment all rows are on disk, see ``written.when_written``."""
        return self.folder.locked()

    def note_written(self, read_ns: int) -> None:
        """Write all rows, and to ``meta.json`` that those from before ``read_ns`` are there. Raises CaptureError."""
        self.flush(force=True, seal=False)
        self.update_meta(written_to=read_ns)

    def parts(self, table: str) -> Mapping[int, Part]:
        """Return the parts of a table that are there, by number."""
        return self._parts[table]

    def list_part(self, table: str, number: int, part: Part) -> None:
        """List a part that was put into the folder beside ``add``, with the number that follows the last one's."""
        self._parts[table][number] = part

    def due_s(self) -> float:
        """Return the seconds until ``flush`` has something to do, negative if it is late, infinite if it hasn't."""
        due = [buffer.due for buffer in self._buffers.values() if buffer.waiting]
        if self._window is not None:
            due.append(self._window.due_ns() / 1e9)
        due += [self._spool.due_s(), *(self._quiet(buffer) for buffer in self._buffers.values())]
        return min(due) - time.monotonic()

    def _flush(self, force: bool, *, seal: bool = True, late: bool = False) -> list[tuple[str, OSError]]:
        """Write the parts that are due, and return the tables that the disk refused, with the errors."""
        for name, buffer in self._buffers.items():
            if self._quiet(buffer) <= time.monotonic():
                self._spool.idle(name)
                self._seal(name, buffer)
        if not self._closed:  # the window ends with the trace
            self._retain()  # first, because it frees space
        refused = []
        for name, buffer in self._buffers.items():
            due = buffer.waiting >= PART_ROWS or time.monotonic() >= buffer.due
            if not buffer.waiting or not (due or force):
                continue
            try:
                if (records := buffer.records()) is not None and self._spool.takes(name, buffer.waiting):
                    self._write_raw(name, buffer, records)
                else:
                    self._write_part(name, buffer, seal=force and seal)
            except OSError as error:
                buffer.due = time.monotonic() + self._flush_seconds
                refused.append((name, error))
        if not (force or late) and time.monotonic() >= self._spool.due_s():
            with suppress(OSError):  # its rows are on the disk, and it is tried again
                self._spool.convert()
        return refused

    def _retain(self) -> None:
        """Delete the parts that have left the window, once meta.json says so."""
        if self._window is None:
            return
        unsealed = sum(self._parts[name][b.part].bytes for name, b in self._buffers.items() if b.written)
        overdue = self._window.overdue(time.monotonic_ns(), unsealed)
        if overdue:
            deleted = dict(self._meta.get("deleted", {}))
            for name, number in overdue:
                rows = deleted.get(name, {}).get("rows", 0) + self._parts[name].pop(number).rows
                deleted[name] = {"parts": number, "rows": rows}
            self._meta = {**self._meta, "kept_from": self._window.kept_from, "deleted": deleted}
        if overdue or self._unannounced:
            # Where the disk is full, meta.json can be written only after the parts are deleted.
            self._unannounced = True
            with suppress(CaptureError):
                self.update_meta()
                self._unannounced = False
        for name, number in overdue:
            with suppress(OSError), self.folder.inside(name) as folder:
                folder.discard(part_name(number))
                folder.discard(raw_name(number))
            self._spool.forget(name, number)

    def _quiet(self, buffer: _Buffer) -> float:
        """Return when a part without new rows is sealed as it is, by time.monotonic(), so that it can get too old."""
        if buffer.waiting or not buffer.rows or not (buffer.raw or self._window):
            return math.inf
        return buffer.arrived_ns / 1e9 + (min(QUIET_SECONDS, self._seal_seconds) if buffer.raw else self._seal_seconds)

    def _seal(self, name: str, buffer: _Buffer) -> None:
        if buffer.raw:
            self._spool.end(name, buffer.part)
            if not buffer.written:
                buffer.raw = False
                return
        if self._window is not None:
            self._window.add(name, buffer.part, self._parts[name][buffer.part].bytes, buffer.arrived_ns)
        buffer.next_part()

    def update_meta(self, **values: Any) -> None:
        """Replace top-level ``values`` of ``meta.json``, all of them or none. Raises CaptureError."""
        meta = {**self._meta, **values}
        try:
            self._write_meta(meta)
        except OSError as error:
            raise failed(f"{show(self.path / META)} can't be written", error) from error
        self._meta = meta

    def close(self, status: str = "complete", **meta: Any) -> None:
        """Write all rows in memory, then ``status`` and ``meta`` to ``meta.json``. A second call does nothing.

        ``meta.json`` also gets ``parts``, the parts that were written, and, if rows were lost, ``unwritten`` with their
        number by table. If the last flush fails, the status is ``failed``, and CaptureError is raised.
        """
        if self._closed:
            return
        self._closed = True
        failure: CaptureError | None = None
        if refused := self._flush(force=True):
            status = "failed"
            for name, _ in refused:
                self.lost[name] += self._buffers[name].waiting
                self._buffers[name].clear()
            given_up = ", ".join(f"{plural(self.lost[name], 'row')} of {name}" for name, _ in refused)
            failure = failed(f"{given_up} never reached {show(self.path)}", refused[0][1])
        for name, buffer in self._buffers.items():
            if buffer.raw:
                self._seal(name, buffer)
        with suppress(OSError):  # the rows are on the disk as they are
            self._spool.convert_all(self.go_on)
        if self.lost:
            meta["unwritten"] = dict(+self.lost)
        self._meta.pop("written_to", None)
        meta["parts"] = {name: listed(parts.values()) for name, parts in self._parts.items() if parts}
        meta["schema"] = SCHEMA_VERSION if self._spool else _schema(self._window)
        try:
            self.update_meta(status=status, **meta)
        except CaptureError as error:
            failure = failure or error
        if failure:
            raise failure

    def _write_raw(self, name: str, buffer: _Buffer, records: list[arrow.TimedRecords]) -> None:
        if buffer.written and not buffer.raw:
            self._seal(name, buffer)
        if self._meta["schema"] != SCHEMA_VERSION:  # first, because an older reader would overlook raw parts
            meta = {**self._meta, "schema": SCHEMA_VERSION}
            self._write_meta(meta)
            self._meta = meta
        buffer.raw = True
        try:
            self._spool.append(name, buffer.part, records)
        except OSError:
            self._seal(name, buffer)
            raise
        buffer.tables.clear()
        buffer.written = buffer.rows
        if buffer.rows >= PART_ROWS or time.monotonic() - buffer.begun >= self._seal_seconds:
            self._seal(name, buffer)

    def _write_part(self, name: str, buffer: _Buffer, *, seal: bool) -> None:
        if buffer.raw:
            self._seal(name, buffer)
        part = part_name(buffer.part)
        begin, waiting = time.monotonic(), buffer.waiting
        rows = arrow.joined(buffer.tables)
        buffer.tables = [rows]

        sealed = seal or buffer.rows >= SEAL_ROWS or time.monotonic() - buffer.begun >= self._seal_seconds
        # Compression takes half of the time of writing a few rows, which is wasted on a part that is rewritten soon.
        codec = "zstd" if sealed else "none"

        content, listed_part = encoded(name, rows, codec)
        self._spool.made(name, waiting, time.monotonic() - begin)
        with self.folder.inside(name) as folder:
            try:
                folder.write(part, lambda file: file.write(content))
            except BaseException:
                # The rows of a new part still count as waiting, so they must not be on disk too.
                if not buffer.written:
                    folder.discard(part)
                raise
        buffer.written = buffer.rows
        self._parts[name][buffer.part] = listed_part
        if sealed:
            self._seal(name, buffer)

    def _write_meta(self, meta: dict[str, Any]) -> None:
        text = json.dumps(meta, indent=1, allow_nan=False)
        self.folder.write(META, lambda file: file.write(text.encode("ascii") + b"\n"))


def _schema(window: Window | None) -> int:
    """Return the version of a capture without raw parts."""
    return WINDOW_SCHEMA if window else WHOLE_SCHEMA


def refuse_place(path: Path, user: privileges.User | None) -> None:
    """Raise the CaptureError of ``create`` where it can be foreseen without creating anything."""
    with _explained(path):
        refuse(path, user)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the errors of creating the folder ``path`` into CaptureError."""
    try:
        yield
    except FileExistsError:
        raise CaptureError(f"{show(path)} exists already.", "Choose another name with -o.") from None
    except FileNotFoundError:
        cause = f"The folder {show(path.parent)} doesn't exist."
        raise CaptureError(cause, "Make it, or choose another place with -o.") from None
    except UnsafePath as error:
        cause = f"{show(path)} can't be made safely: {error.strerror}."
        raise CaptureError(cause, "Give its real place, where nobody else can rename things, with -o.") from error
    except OSError as error:
        raise failed(f"{show(path)} can't be made", error) from error


def _own(rows: pa.Table | arrow.TimedRecords) -> bool:
    """Return True if all rows are block requests of this process."""
    if not isinstance(rows, arrow.TimedRecords) or rows.event != "block_io":
        return False
    return bool((rows.records["tgid"] == os.getpid()).all())


def failed(failure: str, error: OSError) -> CaptureError:
    """Return the error to raise where the disk refuses a capture."""
    reason = error.strerror or fmt.clean(str(error))
    remedy = _REMEDIES.get(error.errno or 0, "Remove the cause, or choose another place with -o.")
    return CaptureError(f"{failure}: {reason}.", remedy)
