# SPDX-License-Identifier: Apache-2.0
"""Copy a span of a capture, which may still be written, to a capture of its own."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from cwndtrace import privileges
from cwndtrace.errors import CaptureError, for_lack_of_memory
from cwndtrace.format import guessed, plural
from cwndtrace.lazy import pa, pq
from cwndtrace.records import arrow
from cwndtrace.store import files, parquet_limits
from cwndtrace.store.encoding import encoded
from cwndtrace.store.folder import Folder, remove, rename
from cwndtrace.store.layout import is_raw, part_name, show
from cwndtrace.store.meta import Moment, Part
from cwndtrace.store.parquet_limits import UnsafeFile
from cwndtrace.store.reader import Capture, open_capture, read_errors
from cwndtrace.store.window import NAMES
from cwndtrace.store.writer import CaptureWriter, failed, refuse_place

_OF_WHOLE: Final = frozenset(
    ("schema", "status", "pid", "pid_start", "boot_id", "parts", "deleted", "kept_from", "unwritten", "written_to")
).union(("unchanged", "withdrawn", "guessed", "counts", "lossy", "lacking", "clock", "started", "ended", "dump"))
"""The entries of meta.json that hold for the whole capture, or for its files, and not for a span of it."""


@dataclass(frozen=True)
class Moments:
    """The moments from ``start_ns`` to before ``end_ns``, ns of CLOCK_MONOTONIC."""

    start_ns: int
    end_ns: int

    def has(self, clock: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Return which of these moments are in it."""
        return (clock >= self.start_ns) & (clock < self.end_ns)


@dataclass
class Dump:
    """A dump: its span, the number of rows by table, and of the parts by how they came."""

    path: Path
    span: Moments
    lacking: str = ""
    rows: dict[str, int] = field(default_factory=dict)
    linked: int = 0
    copied: int = 0
    rewritten: int = 0


@dataclass
class _Taken:
    """A part in the dump, with its number there. ``clock`` has its least and its greatest moment; None for names."""

    table: str
    number: int
    clock: npt.NDArray[Any] | None


def dump(
    capture: Capture,
    output: Path,
    span: Moments,
    *,
    why: str = "",
    user: privileges.User | None = None,
    lacking: str = "",
) -> Dump:
    """Make the capture ``output``, with ``user``'s rights, of the rows of ``capture`` whose moment is in ``span``.

    A row's moment is its first clock, of which the column ``time`` is the time in UTC. Rows of names are taken whatever
    their time. Parts that are wholly in the span become hard links where that can be. The capture may be written
    meanwhile, and parts may leave its window: the dump then begins later, as ``span`` of the result says. ``why`` says
    what asked for the dump, and ``lacking`` what it is known to lack. Raises CaptureError, and leaves nothing behind
    then. The dump has a hidden name until it is complete, so that a kill leaves none that doesn't open.
    """
    refuse_place(output, user)
    made = Dump(output, span, lacking)
    hidden = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    writer = CaptureWriter.create(hidden, {**_taken_over(capture, why), **_account(capture, made)}, user=user)
    try:
        try:
            taken = [each for table in arrow.TABLES for each in _take(capture, writer, table, made)]
            # meta.json says which parts leave the window before they are deleted.
            kept_from = open_capture(capture.path).about.kept_from or 0
            made.span = Moments(max(span.start_ns, kept_from), span.end_ns)
            if made.span.start_ns >= made.span.end_ns:
                raise CaptureError("All of the span left the window meanwhile.", "Trace with a longer --keep.")
            for each in taken:
                _trim(capture, writer, each, made)
            made.rows = {table: sum(part.rows for part in writer.parts(table).values()) for table in arrow.TABLES}
            writer.close("complete", **_account(capture, made))
            rename(hidden, output.name, user)
        except OSError as error:
            raise failed(f"{show(output)} can't be written", error) from error
    except BaseException:
        with suppress(OSError):
            remove(hidden, user)
        raise
    finally:
        writer.folder.close()
    return made


def _take(capture: Capture, writer: CaptureWriter, table: str, made: Dump) -> Iterator[_Taken]:
    """Link or copy all parts that have rows of the span."""
    parts = capture.parts(table)
    if not parts:
        return
    with writer.folder.inside(table) as into:
        for part in parts:
            number = len(writer.parts(table)) + 1
            put = partial(_put, into, part_name(number), table=table, made=made)
            try:
                written = files.either(part, put)
            except FileNotFoundError:
                # It has left the window. What else is missing is in the capture's own account of its parts.
                continue
            except read_errors() as error:
                if for_lack_of_memory(error):
                    raise
                capture.warn(part, error)
                continue
            if written is not None:
                listed, clock = written
                writer.list_part(table, number, listed)
                yield _Taken(table, number, None if clock is None else np.array([clock.min(), clock.max()]))
        into.sync()


def _put(into: Folder, name: str, part: Path, *, table: str, made: Dump) -> tuple[Part, npt.NDArray[Any] | None] | None:
    """Put a part with rows of the span into the dump; returns what meta.json says of it, and each row's moment."""
    if is_raw(part.name):
        return _put_raw(into, name, part, table, made)
    with files.plain(part) as (file, size):
        with files.opened_parquet(file, size) as opened:
            clock = None if table in NAMES else _clock(opened, table)
        if clock is not None and not made.span.has(clock).any():
            return None
        footer = parquet_limits.footer(file, size)
        if into.link(name, file):
            made.linked += 1
        else:
            file.seek(0)
            _write(into, name, lambda copy: shutil.copyfileobj(file, copy), made)
            made.copied += 1
    return Part(footer.rows, footer.size, footer.crc), clock


def _put_raw(into: Folder, name: str, part: Path, table: str, made: Dump) -> tuple[Part, npt.NDArray[Any]] | None:
    """Make Parquet of the rows of a raw part that are in the span: more rows may come to it, so it can't be linked."""
    rows = files.table(part)
    clock = _values(rows[clock_column(table)])
    inside = made.span.has(clock)
    if not inside.any():
        return None
    content, listed = encoded(table, rows.filter(pa.array(inside)), "zstd")
    _write(into, name, lambda file: file.write(content), made)
    made.rewritten += 1
    return listed, clock[inside]


def _write(into: Folder, name: str, fill: Callable[[BinaryIO], object], made: Dump) -> None:
    try:
        into.write(name, fill)
    except OSError as error:
        raise failed(f"{show(made.path)} can't be written", error) from error


def _clock(opened: pq.ParquetFile, table: str) -> npt.NDArray[Any]:
    """Return the moment of each row of a part. Raises UnsafeFile where it has none."""
    name = clock_column(table)
    column = files.read(opened, [name])
    if column.num_columns != 1 or column.schema.types[0] != pa.uint64() or column[name].null_count:
        raise UnsafeFile(f"values of {name} are missing")
    return _values(column[name])


def _values(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    return np.concatenate([arrow.values(chunk) for chunk in column.chunks] or [np.zeros(0, np.uint64)])


def clock_column(table: str) -> str:
    """Return the column of a table with each row's moment, of which ``time`` is the time in UTC."""
    return next(str(name) for name in arrow.schema(table).names if name.endswith("_ns"))


def _trim(capture: Capture, writer: CaptureWriter, taken: _Taken, made: Dump) -> None:
    """Write a part of the dump again without the rows that aren't in the span, if it has such rows."""
    if taken.clock is None or made.span.has(taken.clock).all():
        return
    name = part_name(taken.number)
    path = writer.folder.path / taken.table / name
    try:
        with files.parquet(path) as opened:
            rows = files.read(opened)
        rows = rows.filter(pa.array(made.span.has(_values(rows[clock_column(taken.table)]))))
    except read_errors() as error:
        if for_lack_of_memory(error):
            raise
        capture.warn(capture.path / taken.table / name, error)
        rows = arrow.schema(taken.table).empty_table()
    with writer.folder.inside(taken.table) as into:
        into.write(name, lambda file: pq.write_table(rows, file, compression="zstd", write_page_checksum=True))
    footer = files.footer(path)
    writer.list_part(taken.table, taken.number, Part(footer.rows, footer.size, footer.crc))
    made.rewritten += 1


def _taken_over(capture: Capture, why: str) -> dict[str, Any]:
    """Return what the dump's meta.json takes over. Raises CaptureError where that can't be written."""
    name = show(Path((capture.shown or capture.path).name))
    about = {key: value for key, value in capture.meta.items() if key not in _OF_WHOLE}
    about["dump"] = {"capture": name, "why": why}
    try:
        json.dumps(about, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise CaptureError(f"The meta.json of {name} isn't as cwndtrace writes it.", "Give another.") from error
    return about


def _account(capture: Capture, made: Dump) -> dict[str, Any]:
    """Return the entries of the dump's meta.json on its span, and on what it has of it."""
    about, span = capture.about, made.span
    lossy = [each for each in about.lossy if each.end_ns >= span.start_ns and each.start_ns < span.end_ns]
    start, end = about.utc_ns(span.start_ns), about.utc_ns(span.end_ns)
    inside = [each for each in about.segments if span.start_ns < each.mono_ns < span.end_ns]
    segments = [Moment(span.start_ns, None if start is None else start - span.start_ns), *inside]
    account: dict[str, Any] = {
        "started": _iso(start),
        "ended": _iso(end),
        "clock": {
            "start": asdict(segments[0]),
            "end": {"mono_ns": span.end_ns, "utc_offset_ns": None if end is None else end - span.end_ns},
            "segments": [asdict(each) for each in segments],
        },
        "lossy": [asdict(each) for each in lossy],
        "lacking": [*filter(None, [made.lacking]), *_lacking(capture)],
    }
    if about.counts is not None:
        lost = {event: sum(each.lost for each in lossy if each.event == event) for event in about.counts}
        account["counts"] = {event: {"kept": made.rows.get(event, 0), "lost": lost[event]} for event in about.counts}
    return account


def _iso(utc_ns: int | None) -> str | None:
    try:
        return None if utc_ns is None else arrow.iso_time(utc_ns)
    except (OverflowError, ValueError):  # an untrusted capture may have any time
        return None


def _lacking(capture: Capture) -> Iterator[str]:
    """Yield what the capture itself lacks, one line each; for most of it nobody can tell whether it is in the span."""
    yield from capture.about.lacking
    unread = capture.warnings[len(capture.about.lacking) :]
    yield from unread[:1]
    if len(unread) > 1:
        yield f"{plural(len(unread) - 1, 'other part')} of the dumped capture can't be read either"
    for table in arrow.TABLES:
        missing = capture.missing(table)[0] + capture.about.unwritten.get(table, 0)
        if missing:
            yield f"the dumped capture lacks {plural(missing, 'record')} of {table}, perhaps some of this span"
    if capture.about.guessed:
        yield f"{guessed(capture.about.guessed)}; so in all of the dumped capture, perhaps not in this span"
