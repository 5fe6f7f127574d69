# SPDX-License-Identifier: Apache-2.0
"""Read a capture's rows as they come, while its trace runs."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cwndtrace.errors import CaptureError, for_lack_of_memory
from cwndtrace.format import clean
from cwndtrace.lazy import pa
from cwndtrace.records import arrow
from cwndtrace.store import files, reader
from cwndtrace.store.layout import final_name, show
from cwndtrace.store.parquet_limits import UnsafeFile

MOST_WARNINGS: Final = 5
"""The most warnings that are kept, the latest ones."""

_Stamp = tuple[int, int, int]


@dataclass
class _Place:
    """How far a table was read: the last part, what its file was then, and how many of its rows were handed out.

    A raw part has the name that it gets as Parquet. Only the last part ever gets more rows, after the same ones, so
    that nothing has to be known of earlier ones.
    """

    part: str = ""
    stamp: _Stamp = (0, 0, 0)
    rows: int = 0


@dataclass
class Follower:
    """A reader that hands out each row of a capture once.

    ``wanted`` names the columns to read of each table. Of the tables in ``newest``, only the last two parts are read at
    first, because later rows replace the earlier ones. ``status`` is that of the capture, or ``gone`` once it has been
    deleted or another capture took its place. A part that can't be read is left out, with a line in ``warnings``.
    Raises CaptureError where ``path`` isn't a capture.
    """

    path: Path
    wanted: Mapping[str, Sequence[str]]
    newest: frozenset[str] = frozenset()
    warnings: deque[str] = field(default_factory=lambda: deque(maxlen=MOST_WARNINGS))

    def __post_init__(self) -> None:
        capture = reader.open_capture(self.path)
        self.about, self.status = capture.about, capture.status
        self._inode = self.path.stat().st_ino
        self._places = {name: _Place() for name in self.wanted}

    def new_rows(self, budget_s: float) -> Iterator[tuple[str, pa.Table]]:
        """Yield the rows that came since they were last read, by table, part by part.

        It ends early once ``budget_s`` seconds are over; the next call goes on from there. A part is read in any case.
        The status is read before the rows, so that all rows have been handed out once a call that ended in time leaves
        another status than ``running``.
        """
        deadline = time.monotonic() + budget_s
        self._look()
        if self.status == "gone":
            return
        # The tables take turns, so that rows that belong together come at about the same time.
        waiting = {name: deque(self._unread(name, place)) for name, place in self._places.items()}
        while waiting := {name: parts for name, parts in waiting.items() if parts}:
            for name, parts in waiting.items():
                rows = self._rows(name, parts.popleft(), self._places[name])
                if rows is not None and len(rows):
                    yield name, rows
                if time.monotonic() > deadline:
                    self.behind = True
                    return
        self.behind = False

    behind: bool = field(default=True, init=False)
    """True if the last call left rows for the next one."""

    def _look(self) -> None:
        """Read the status and what meta.json says."""
        try:
            there = self.path.stat().st_ino == self._inode
            capture = reader.open_capture(self.path) if there else None
        except (CaptureError, OSError):
            capture = None
        if capture is None:
            self.status = "gone"
        else:
            self.about, self.status = capture.about, capture.status

    def _unread(self, name: str, place: _Place) -> list[Path]:
        try:
            parts = files.parts(self.path / name)
        except (UnsafeFile, OSError) as error:
            self._warn(name, error)
            return []
        first = parts[-2:] if name in self.newest and not place.part else parts
        return [part for part in first if final_name(part.name) >= place.part]

    def _rows(self, name: str, part: Path, place: _Place) -> pa.Table | None:
        """Return the rows of a part that haven't been handed out; None where there are none."""
        try:
            status = files.either(part, os.lstat)
            stamp = status.st_ino, status.st_mtime_ns, status.st_size
            name_then = final_name(part.name)
            if name_then == place.part and stamp == place.stamp:
                return None
            before = place.rows if name_then == place.part else 0
            # A part that can't be read is tried again once it has changed.
            place.part, place.stamp, place.rows = name_then, stamp, before
            schema = arrow.schema(name)
            known = pa.schema([schema.field(column) for column in self.wanted[name]], metadata=schema.metadata)
            data = reader.read_part(part, known, self.wanted[name])
        except FileNotFoundError:  # it was deleted meanwhile, as old parts may be
            return None
        except reader.read_errors() as error:
            if for_lack_of_memory(error):
                raise
            self._warn(f"{name}/{part.name}", error)
            return None
        place.rows = max(before, len(data))
        return data.slice(before)

    def _warn(self, what: str, error: Exception) -> None:
        reason = clean(str(error).split("\n", 1)[0])[:100]
        line = f"{show(Path(what))} can't be read, and its rows are left out ({reason})"
        if line not in self.warnings:
            self.warnings.append(line)
