# SPDX-License-Identifier: Apache-2.0
"""Read captures: all parts that can be read, with a warning for each one that can't."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cwndtrace import format as fmt
from cwndtrace.errors import CaptureError, for_lack_of_memory
from cwndtrace.format import plural
from cwndtrace.lazy import pa
from cwndtrace.records import arrow
from cwndtrace.store import files
from cwndtrace.store.layout import META, SCHEMA_VERSION, boot_id, final_name, part_name, process_start, show
from cwndtrace.store.meta import Meta
from cwndtrace.store.parquet_limits import Footer, UnsafeFile

MOST_ROWS: Final = 100_000_000
"""The most rows that are read of a capture, all its tables together, unless the caller gives another number. A day of
1,000 block requests per second has fewer."""

_NEVER: Final = 1 << 64
"""Later than any clock of 64 bits."""

_MOST_LOOKED_AT: Final = 10_000
"""The most entries of a folder without meta.json that are searched for captures, to name them in the error."""


def read_errors() -> tuple[type[Exception], ...]:
    """Return the errors that pyarrow raises for damaged files: one wrong byte in a footer may cause any of them."""
    return OSError, ValueError, KeyError, pa.ArrowException


@dataclass(frozen=True)
class Capture:
    """A capture on disk.

    ``meta`` is the content of its meta.json, ``about`` the same checked and typed. ``status`` is ``complete``,
    ``running`` (its writer lives), ``interrupted`` (its writer is gone and never closed it) or ``failed``.
    ``warnings`` begins with the things that the trace had to do without, and grows as ``table`` meets parts that can't
    be read; ``missing`` and ``strange`` report other gaps. ``shown`` is the path to show to people if it isn't
    ``path``. ``max_rows`` is the most rows that all tables may have together.
    """

    path: Path
    meta: dict[str, Any]
    about: Meta
    status: str
    warnings: list[str] = field(default_factory=list)
    shown: Path | None = None
    max_rows: int = MOST_ROWS
    _footer_cache: dict[tuple[Path, int, int, int], Footer] = field(default_factory=dict, repr=False)
    _unread: set[Path] = field(default_factory=set, repr=False)

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Return all rows of a table: the columns of its schema first, then any that a later version added.

        ``columns`` names the columns of the schema to read; others aren't read then. Columns that an earlier version
        didn't write are null. Without any part the table is empty. A part that is cut off or corrupt is left out, with
        a line in ``warnings``. ``time`` is in microseconds; the ``*_ns`` columns are exact. Raises KeyError for a table
        that neither this version nor the capture has.
        """
        strange = name not in arrow.TABLES
        if strange and (not name or Path(name).name != name or name.startswith(".") or not (self.path / name).is_dir()):
            raise KeyError(name)
        known = None if strange else arrow.schema(name)
        if known is not None and columns is not None:
            known = pa.schema([known.field(column) for column in columns], metadata=known.metadata)
        tables = [table for _, table in self._each(name, known, columns)]
        if not tables:
            return known.empty_table() if known else pa.table({})
        return pa.concat_tables(tables, promote_options="permissive").unify_dictionaries()

    def pieces(self, name: str, columns: Sequence[str], parts: Sequence[Path] | None = None) -> Iterator[pa.Table]:
        """Yield the rows of ``table`` part by part, so that memory never holds all of them twice.

        The first piece is always empty. ``parts`` are those of ``parts(name)`` that are read, by default all.
        """
        schema = arrow.schema(name)
        known = pa.schema([schema.field(column) for column in columns], metadata=schema.metadata)
        yield known.empty_table()
        yield from (table for _, table in self._each(name, known, columns, parts))

    def pieces_and_rest(self, name: str, columns: Sequence[str], clock: str) -> Iterator[tuple[pa.Table, int | None]]:
        """Yield the rows of ``table`` part by part, and the least value of ``clock`` in all parts that follow.

        That is by their footers, which may be wrong; it is None where one doesn't say.
        """
        footers, parts = self._footers(name), self.parts(name)
        rest: dict[Path, int | None] = {}
        least: int | None = _NEVER
        for part in reversed(parts):
            rest[part] = least
            mine = footers[part.name].least.get(clock) if part.name in footers else None
            least = None if mine is None or least is None else min(mine, least)
        schema = arrow.schema(name)
        known = pa.schema([schema.field(column) for column in columns], metadata=schema.metadata)
        yield from ((table, rest[part]) for part, table in self._each(name, known, columns, parts))

    def rows(self, name: str) -> int:
        """Return how many rows of a table are on disk. This is cheap, because it reads only the parts' footers."""
        return sum(footer.rows for footer in self._footers(name).values())

    def largest(self, name: str) -> int:
        """Return how many rows the largest part of a table has."""
        return max((footer.rows for footer in self._footers(name).values()), default=0)

    def missing(self, name: str) -> tuple[int, int]:
        """Return how many rows of a table are absent or unreadable, and how many the trace kept, by ``meta.json``.

        Rows of parts that the trace deleted, because they were older than its window, don't count.
        The first is 0 while the trace runs, and where ``meta.json`` doesn't say. It is 0 too where the trace was
        killed: the numbers that it wrote meanwhile count rows that it hadn't written yet.
        """
        if self.status in ("running", "interrupted"):
            return 0, 0
        there, listed = self._footers(name), self._listed(name)
        counts = self.about.counts or {}
        kept = (counts[name].kept if name in counts else 0) - self.about.unwritten.get(name, 0)
        if name in self.about.deleted:
            kept -= self.about.deleted[name].rows
        written = sum(footer.rows for footer in listed.values())
        rows = {part: there[part].rows if part in there else 0 for part in listed}
        lacking = sum(max(footer.rows - rows[part], 0) for part, footer in listed.items())
        if not listed:
            lacking = max(kept - self.rows(name), 0)
        elif kept > written:
            lacking += kept - written
        return lacking, max(kept, written)

    def strange(self, name: str) -> list[str]:
        """Return the parts of a table that aren't as the trace wrote them; none if ``meta.json`` lists no parts."""
        listed = self._listed(name)
        if self.about.parts is None:
            return []
        return [part for part, footer in self._footers(name).items() if footer != listed.get(part)]

    def gone(self, name: str) -> list[str]:
        """Return the parts of a table that ``meta.json`` lists and that are absent or unreadable."""
        return [part for part in self._listed(name) if part not in self._footers(name)]

    def partly(self, name: str) -> tuple[int, list[str]]:
        """Return how many rows of a table lack columns that the analyses need, and the names of these columns."""
        needed = arrow.needed(name)
        lacking = [
            (footer.rows, footer.columns) for footer in self._footers(name).values() if not footer.columns >= {*needed}
        ]
        return sum(rows for rows, _ in lacking), [n for n in needed if any(n not in there for _, there in lacking)]

    def _listed(self, name: str) -> dict[str, Footer]:
        parts = (self.about.parts or {}).get(name, ())
        first = self.about.deleted[name].parts + 1 if name in self.about.deleted else 1
        return {
            part_name(n): Footer(part.rows, part.bytes, part.footer_crc32) for n, part in enumerate(parts, start=first)
        }

    def _footers(self, name: str) -> dict[str, Footer]:
        """Return the footer of each part of a table that can be read. It is read again only if the file has changed.

        A raw part has the name that it gets as Parquet, under which ``meta.json`` lists it.
        """
        footers = {}
        for part in self.parts(name):
            try:
                footer = files.either(part, self._footer)
            except read_errors() as error:
                self.warn(part, error)
            else:
                if footer.damage:
                    self.warn(part, UnsafeFile(footer.damage), "its rows from there on")
                if part not in self._unread:
                    footers[final_name(part.name)] = footer
        return footers

    def _footer(self, part: Path) -> Footer:
        status = part.lstat()
        key = part, status.st_ino, status.st_mtime_ns, status.st_size
        if key not in self._footer_cache:
            self._footer_cache[key] = files.footer(part)
        return self._footer_cache[key]

    def _bound(self, name: str) -> None:
        """Raise CaptureError where there are more rows than may be read."""
        total = sum(self.rows(table) for table in {*arrow.TABLES, name})
        if total > self.max_rows:
            holds = f"{show(self.shown or self.path)} holds {plural(total, 'row')}"
            cause = f"{holds}, and the limit is {self.max_rows:,}."
            remedy = "If there is memory for them (a block request takes about 100 bytes, a reset 1,000 bytes), raise "
            raise CaptureError(cause, f"{remedy}--max-rows (max_rows in Python).")

    def parts(self, name: str) -> list[Path]:
        """Return the files of a table, whether they can be read or not, in order. Raises CaptureError for too many."""
        folder = self.path / name
        if folder.is_symlink():
            self.warn(folder, UnsafeFile("it is a symbolic link"))
        try:
            return files.parts(folder)
        except UnsafeFile as error:
            raise CaptureError(f"{show(folder)} can't be read: {error}.", "Give another capture.") from error
        except PermissionError as error:
            cause = f"{show(folder)} can't be read: {error.strerror}."
            raise CaptureError(cause, "Read it as the user who wrote it.") from error

    def _each(
        self,
        name: str,
        known: pa.Schema | None,
        columns: Sequence[str] | None = None,
        parts: Sequence[Path] | None = None,
    ) -> Iterator[tuple[Path, pa.Table]]:
        self._bound(name)
        for part in self.parts(name) if parts is None else parts:
            try:
                data = read_part(part, known, columns)
            except read_errors() as error:
                if for_lack_of_memory(error):  # pyarrow's MemoryError is an ArrowException too
                    raise
                self._unread.add(part)
                self.warn(part, error)
            else:
                yield part, data

    def warn(self, part: Path, error: Exception, rows: str = "its rows") -> None:
        """Take note that a part, or some of its rows, can't be read."""
        reason = fmt.clean(str(error).split("\n", 1)[0])[:160]
        line = f"{part.relative_to(self.path)} is cut off or corrupt, {rows} are left out ({reason})"
        if line.split(" (")[0] not in {w.split(" (")[0] for w in self.warnings}:
            self.warnings.append(line)


def read_part(part: Path, known: pa.Schema | None, columns: Sequence[str] | None = None) -> pa.Table:
    """Return all rows of a part with the columns of ``known``, or as they are for None. Raises ``read_errors()``."""
    data = files.either(part, lambda there: files.table(there, columns))
    return data if known is None else _conform(data, known)


def open_capture(path: str | os.PathLike[str], *, max_rows: int = MOST_ROWS) -> Capture:
    """Open a capture for reading. Its tables are read on demand, if they have at most ``max_rows`` rows together.

    Raises CaptureError, with a remedy, for anything that isn't a capture this version can read.
    """
    where = Path(path)
    try:
        _refuse_mistakes(where)
        meta = _read_meta(where)
        if _status(meta) == "interrupted":
            meta = _read_meta(where)  # the writer may have closed it and ended after the first read
    except PermissionError as error:
        cause = f"{show(where)} can't be read: {error.strerror}."
        raise CaptureError(cause, "Read it as the user who wrote it.") from error
    about = Meta.parse(meta)
    return Capture(where, meta, about, _status(meta), list(about.lacking), max_rows=max_rows)


def _refuse_mistakes(where: Path) -> None:
    if (where / META).is_file():
        return
    if not where.exists():
        longer = where.with_name(f"{where.name}.cwnd") if where.name else where
        remedy = f"Did you mean {show(longer)}?" if longer.is_dir() else "Check the name; ls -d *.cwnd lists captures."
        raise CaptureError(f"There is no {show(where)}.", remedy)
    owner = next((p for p in where.absolute().parents[:2] if (p / META).is_file()), None)
    if owner:
        raise CaptureError(f"{show(where)} is a part of a capture, not the whole.", f"Open {show(owner)}.")
    if not where.is_dir():
        raise CaptureError(f"{show(where)} is a file.", "A capture is a directory; give the one that cwndtrace wrote.")
    inside = _captures_in(where)
    if inside:
        names = ", ".join(show(found) for found in inside[:8]) + (", ..." if len(inside) > 8 else "")
        holds = "a capture" if len(inside) == 1 else f"{len(inside)} captures"
        raise CaptureError(f"{show(where)} isn't a capture, it holds {holds}.", f"Open {names}.")
    raise CaptureError(f"{show(where)} isn't a capture: it has no {META}.", "Give the directory that cwndtrace wrote.")


def _captures_in(where: Path) -> list[Path]:
    """Return the captures in a folder or in its folders. Only the first _MOST_LOOKED_AT entries are searched."""
    left = iter(range(_MOST_LOOKED_AT))

    def folders(place: Path) -> Iterator[Path]:
        with suppress(OSError), os.scandir(place) as entries:
            for _, entry in zip(left, entries, strict=False):
                if entry.is_dir():
                    yield Path(entry.path)

    near = list(folders(where))
    far = (inner for folder in near for inner in folders(folder))
    return sorted(folder for folder in (*near, *far) if (folder / META).is_file())


def _read_meta(where: Path) -> dict[str, Any]:
    file = where / META
    tables = f"Its tables may still open with pandas.read_parquet({str(where / 'cwnd_reset')!r})."
    try:
        meta = json.loads(files.meta(file))
    except PermissionError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CaptureError(f"{show(file)} can't be read: {fmt.clean(str(error))}.", fmt.clean(tables)) from error
    version = meta.get("schema") if isinstance(meta, dict) else None
    if type(version) is not int or version < 1:
        raise CaptureError(f"{show(file)} isn't that of a capture: it has no schema number.", "Give another directory.")
    if version > SCHEMA_VERSION:
        cause = f"{show(where)} has schema {version}; this cwndtrace reads up to {SCHEMA_VERSION}."
        writer = fmt.clean(str(meta.get("version", "a newer one")))[:40]
        raise CaptureError(cause, f"Upgrade cwndtrace: the capture was written by {writer}.")
    return dict(meta)


def _status(meta: dict[str, Any]) -> str:
    status = meta.get("status")
    if status in ("complete", "failed"):
        return str(status)
    pid = meta.get("pid")
    started = process_start(pid) if isinstance(pid, int) and meta.get("boot_id") == boot_id() else None
    return "running" if started is not None and started == meta.get("pid_start") else "interrupted"


def _conform(data: pa.Table, known: pa.Schema) -> pa.Table:
    present = set(data.column_names)
    for name in present & set(known.names) - arrow.MAY_BE_NULL:
        if data.column(name).null_count:
            raise UnsafeFile(f"values of {name} are missing")
    columns = [_cast(data.column(f.name), f) if f.name in present else pa.nulls(len(data), f.type) for f in known]
    for column in columns:
        if pa.types.is_timestamp(column.type):
            # This raises for times that nanoseconds in 64 bits can't express, and that pandas couldn't show.
            column.cast(pa.timestamp("ns", tz=column.type.tz))
    extra = [f for f in data.schema if f.name not in known.names]
    schema = pa.schema([*known, *extra], metadata=known.metadata)
    return pa.Table.from_arrays([*columns, *(data.column(f.name) for f in extra)], schema=schema)


def _cast(column: pa.ChunkedArray, to: pa.Field) -> pa.ChunkedArray:
    unit = to.metadata[b"unit"].decode()
    if unit.startswith("enum ") and pa.types.is_integer(column.type):  # as version 1 wrote ca_state of connections
        codes = arrow.values(column.combine_chunks())
        return pa.chunked_array([arrow.enum_labels(unit.removeprefix("enum "), codes)])
    return column.cast(to.type)
