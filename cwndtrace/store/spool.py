# SPDX-License-Identifier: Apache-2.0
"""When records go to the disk as they are, in raw parts, and when these become Parquet."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from cwndtrace.records import arrow
from cwndtrace.store import files, raw
from cwndtrace.store.encoding import encoded
from cwndtrace.store.folder import Folder
from cwndtrace.store.layout import part_name, raw_name
from cwndtrace.store.meta import Part
from cwndtrace.store.parquet_limits import UnsafeFile
from cwndtrace.store.window import Window

LEAST_ROWS: Final = 4096
"""Fewer rows than this that come at a time are always written as Parquet: they take little time."""
BEHIND: Final = 0.8
"""Rows are written raw once making Parquet of them would take more than this share of the time."""
CAUGHT_UP: Final = 0.4
"""They are written as Parquet again once it would take less than this share."""
FREE_SHARE: Final = 4
"""All raw parts together take at most the free space divided by this: they are ten times as large as Parquet."""
CONVERT_SECONDS: Final = 30.0
"""The longest that the end of a trace makes Parquet of raw parts; those that are left then stay raw."""
QUIET_SECONDS: Final = 5.0
"""A raw part without new rows for this time is complete."""

_SOONEST_TRIAL_S: Final = 2.0
_LATEST_TRIAL_S: Final = 64.0
_REFUSED_S: Final = 5.0


class Pace:
    """Whether the records of a table come faster than Parquet can be made of them.

    The time that Parquet takes is that on the wall: it grows where others want the same CPU. Time spent on the disk
    doesn't count, because raw parts wouldn't make it shorter. Moments are those of time.monotonic().
    """

    def __init__(self, now_s: float) -> None:
        self.spooling = False
        self._row_s = 0.0
        self._flushed_s = now_s

    def made(self, rows: int, took_s: float) -> None:
        """Take note of how long it took to make Parquet of ``rows``; of a few rows that says nothing."""
        if rows >= LEAST_ROWS:
            self._row_s = took_s / rows

    def behind(self, rows: int, now_s: float) -> bool:
        """Return whether the rows that came since the last call are to be written raw."""
        elapsed = max(now_s - self._flushed_s, 0.001)
        self._flushed_s = now_s
        share = rows * self._row_s / elapsed
        self.spooling = share > CAUGHT_UP if self.spooling else rows >= LEAST_ROWS and share > BEHIND
        return self.spooling


class Spool:
    """The raw parts of a capture that is being written, listed in ``parts`` with the others and counted in ``window``.

    At most half of the time goes into making Parquet of them. While rows are still written raw, one part at a time is
    tried, ever more rarely, because that shows how long it takes by now. Methods raise OSError.
    """

    def __init__(self, folder: Folder, parts: dict[str, dict[int, Part]], window: Window | None) -> None:
        self._folder = folder
        self._parts = parts
        self._window = window
        self._paces = {table: Pace(time.monotonic()) for table in arrow.TABLES}
        self._open: dict[str, raw.RawPart] = {}
        self._complete: deque[tuple[str, int]] = deque()
        self._left = 0
        self._paced_s = self._trial_at_s = 0.0
        self._trial_s = _SOONEST_TRIAL_S

    def __len__(self) -> int:
        """Return how many raw parts there are."""
        return len(self._complete) + len(self._open) + self._left

    def takes(self, table: str, rows: int) -> bool:
        """Return whether the rows that came since the last call are to be written raw; call it for each flush."""
        if not self._paces[table].behind(rows, time.monotonic()):
            return False
        return table in self._open or self._has_room()

    def made(self, table: str, rows: int, took_s: float) -> None:
        """Take note of how long it took to make Parquet of ``rows``."""
        self._paces[table].made(rows, took_s)

    def append(self, table: str, number: int, rows: list[arrow.TimedRecords]) -> None:
        """Append rows to the raw part ``number``, which is begun with the first, all of them or none."""
        if table not in self._open:
            if not self._complete and not self._open:
                self._trial_s, self._trial_at_s = _SOONEST_TRIAL_S, time.monotonic() + _SOONEST_TRIAL_S
            self._begin(table, raw_name(number))
        self._open[table].append(rows)
        self._parts[table][number] = self._open[table].part

    def end(self, table: str, number: int) -> None:
        """Complete the raw part that ``append`` has begun; one without rows is removed."""
        part = self._open.pop(table, None)
        if part is None:
            return
        part.close()
        if part.part.rows:
            self._complete.append((table, number))
        else:
            with suppress(OSError), self._folder.inside(table) as folder:
                folder.discard(raw_name(number))

    def _begin(self, table: str, name: str) -> None:
        with self._folder.inside(table) as folder:
            file = folder.begin(name)
            try:
                self._open[table] = raw.RawPart(table, file)
            except BaseException:
                file.close()
                folder.discard(name)
                raise

    def idle(self, table: str) -> None:
        """Take note that no rows come any longer."""
        self._paces[table].spooling = False

    def forget(self, table: str, number: int) -> None:
        """Take note that a part was deleted."""
        with suppress(ValueError):
            self._complete.remove((table, number))

    def due_s(self) -> float:
        """Return when the next part is to become Parquet, by time.monotonic(); infinite if there is none."""
        if not self._complete:
            return math.inf
        return max(self._paced_s, self._trial_at_s) if self._spooling() else self._paced_s

    def convert(self) -> None:
        """Make Parquet of the oldest part. If the disk refuses that, it is tried again some seconds later."""
        begin = time.monotonic()
        table, number = self._complete[0]
        try:
            part = self._converted(table, number)
        except (UnsafeFile, FileNotFoundError):  # somebody changed it, or removed it
            self._complete.popleft()
            self._left += 1
            return
        except OSError:
            self._paced_s = time.monotonic() + _REFUSED_S
            raise
        self._complete.popleft()
        self._parts[table][number] = part
        if self._window is not None:
            self._window.resize(table, number, part.bytes)
        now = time.monotonic()
        self._paced_s = 2 * now - begin
        if self._spooling():
            self._trial_s = min(2 * self._trial_s, _LATEST_TRIAL_S)
            self._trial_at_s = now + self._trial_s

    def convert_all(self, go_on: Callable[[int], bool]) -> None:
        """Make Parquet of all complete parts, for CONVERT_SECONDS at most.

        Before each one, ``go_on`` is called with the number of rows that are left, and ends it by returning False.
        """
        end = time.monotonic() + CONVERT_SECONDS
        while self._complete and time.monotonic() < end:
            if not go_on(sum(self._parts[table][number].rows for table, number in self._complete)):
                return
            self.convert()

    def _converted(self, table: str, number: int) -> Part:
        """Write a part as Parquet, and return what meta.json says of it."""
        begin = time.monotonic()
        with files.plain(self._folder.path / table / raw_name(number)) as (file, size):
            rows, footer = raw.read(table, file, size)
        written = self._parts[table][number]
        if (footer.rows, footer.size, footer.crc) != (written.rows, written.bytes, written.footer_crc32):
            raise UnsafeFile("it isn't as it was written")
        content, part = encoded(table, rows, "zstd")
        self._paces[table].made(len(rows), time.monotonic() - begin)
        with self._folder.inside(table) as folder:
            folder.write(part_name(number), lambda file: file.write(content))
            folder.discard(raw_name(number))
        return part

    def _spooling(self) -> bool:
        return any(pace.spooling for pace in self._paces.values())

    def _has_room(self) -> bool:
        """Return whether one more raw part may be begun."""
        disk = os.fstatvfs(self._folder.fileno())
        there = sum(self._parts[table][number].bytes for table, number in self._complete)
        return there <= (disk.f_bavail * disk.f_frsize + there) // FREE_SHARE
