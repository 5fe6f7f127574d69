# SPDX-License-Identifier: Apache-2.0
"""Looks up, while a trace runs, what the ids in new records stand for: the tables ``workloads`` and ``processes``."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cwndtrace.lazy import pa
from cwndtrace.names.lookup import MOST_IDS, Found, Workload
from cwndtrace.names.processes import Process
from cwndtrace.records import arrow

_AGAIN_S: Final = 30.0
"""Known ids are looked up again this often, since names change, processes end, and their pids are used again."""
_SHARE: Final = 0.1
"""Lookups may take this share of the time, except for the first."""
_LAST_S: Final = 2.0
MOST_KNOWN: Final = 65_536
"""The most workloads, and the most processes, that are known at one time."""

_GROUPS: Final = ("cgroup_id", "owner_cgroup_id", "sock_cgroup_id")
_PIDS: Final = ("tgid", "pid", "listener_pid")

Ids = tuple[set[int], set[int]]
"""Ids of cgroups, and pids."""


def ids(rows: pa.Table | arrow.TimedRecords) -> Ids:
    """Return the ids of cgroups and the pids in rows of one event, without 0."""
    return _distinct(rows, _GROUPS), _distinct(rows, _PIDS)


def _distinct(rows: pa.Table | arrow.TimedRecords, names: Iterable[str]) -> set[int]:
    if isinstance(rows, arrow.TimedRecords):
        records = rows.records
        columns = [records[name] for name in names if name in (records.dtype.names or ())]
    else:
        columns = [arrow.values(rows[name].combine_chunks()) for name in names if name in rows.column_names]
    return {value for column in columns for value in _changes(column)} - {0}


def _changes(column: npt.NDArray[Any]) -> set[int]:
    """Return the distinct values; those that follow each other alike, as most do, are compared only once."""
    changed = np.flatnonzero(column[1:] != column[:-1]) + 1
    return set(np.append(column[:1], column[changed]).tolist())  # np.unique would import numpy.ma


@dataclass
class _Sighting:
    item: Workload | Process
    first_ns: int
    last_ns: int


class NameLookups:
    """Looks up each new id once, on a thread of its own, and each known one again from time to time.

    ``ask`` takes ids of cgroups and pids, and returns what was found of them, or None where nothing could be looked up.
    Rows come from ``drain``: one when something is first seen, and one more when it was last seen. The first ``drain``
    starts the thread, so that it doesn't have the privileges that the process has dropped before. ``lacking`` says why
    nothing is looked up any longer; None as long as it is. Where old rows are deleted, ``repeat_s`` is the time in
    seconds after which the row of what is still there is written again.
    """

    def __init__(self, ask: Callable[[list[int], list[int]], Found | None]) -> None:
        self._ask = ask
        self._lock = threading.Lock()
        self._wake = threading.Event()
        # When a record last had each id, ns of CLOCK_MONOTONIC: groups first, as everywhere here, then pids.
        self._used: tuple[dict[int, int], dict[int, int]] = ({}, {})
        self._waiting: Ids = (set(), set())
        self._known: dict[tuple[Any, ...], _Sighting] = {}
        self._rows: list[_Sighting] = []
        self._stopping = False
        self._repeated = time.monotonic()
        self.repeat_s = math.inf
        self._thread = threading.Thread(target=self._run, name="names", daemon=True)
        self.lacking: str | None = None

    def see(self, rows: pa.Table | arrow.TimedRecords) -> None:
        """Take note of the ids in rows."""
        now = time.monotonic_ns()
        for found, used, waiting in zip(ids(rows), self._used, self._waiting, strict=True):
            with self._lock:
                new = found - used.keys()
                if len(used) + len(new) > MOST_KNOWN:
                    found, new = found - new, set()
                waiting |= new
                used.update(dict.fromkeys(found, now))
            if new:
                self._wake.set()

    def drain(self, utc_offset_ns: int) -> dict[str, pa.Table]:
        """Return the new rows of each table."""
        if self._thread.ident is None and not self._stopping:
            self._thread.start()
        with self._lock:
            rows, self._rows = self._rows, []
        return tables(rows, utc_offset_ns) if rows else {}

    def finish(self, utc_offset_ns: int) -> dict[str, pa.Table]:
        """Look up what is left, stop, and return the new rows and the last one of all that is still there."""
        with self._lock:
            self._stopping = True
        self._wake.set()
        if self._thread.ident is None:
            self._thread.start()
        self._thread.join(_LAST_S)
        with self._lock:
            for key in list(self._known):
                self._write_last(key)
        return self.drain(utc_offset_ns)

    def _run(self) -> None:
        pause = min(_AGAIN_S, self.repeat_s)
        again = time.monotonic() + pause
        while True:
            self._wake.wait(max(0.0, again - time.monotonic()))
            with self._lock:
                self._wake.clear()
                groups, pids = (
                    [waiting.pop() for _ in range(min(len(waiting), MOST_IDS))] for waiting in self._waiting
                )
                stopping = self._stopping
            begin = time.monotonic()
            try:
                if groups or pids:
                    self._look_up(groups, pids)
                elif stopping:
                    self._look_again()
                    return
                elif begin >= again:
                    self._look_again()
                    again = time.monotonic() + pause
                self._repeat()
            except Exception as e:  # whatever it is, a trace without names is better than none
                self.lacking = f"looking up names failed ({type(e).__name__}: {e}); the trace goes on without them"
                return
            if stopping or any(self._waiting):
                self._wake.set()
            if not stopping:
                time.sleep((time.monotonic() - begin) * (1 - _SHARE) / _SHARE)

    def _look_up(self, groups: list[int], pids: list[int]) -> None:
        found = self._ask(groups, pids) or Found()
        self._note(found, time.monotonic_ns())

    def _look_again(self) -> None:
        """Look up all that is known again, and forget what is gone."""
        with self._lock:
            groups, pids = (sorted(used.keys() - new) for used, new in zip(self._used, self._waiting, strict=True))
        for at in range(0, max(len(groups), len(pids)), MOST_IDS):
            some = groups[at : at + MOST_IDS], pids[at : at + MOST_IDS]
            found = self._ask(*some)
            if found is None:
                return
            now = time.monotonic_ns()
            there = self._note(found, now)
            with self._lock:
                self._forget(some, found, there)

    def _repeat(self) -> None:
        """Write the row of all that is known again, once that is due."""
        if time.monotonic() - self._repeated < self.repeat_s:
            return
        self._repeated = time.monotonic()
        with self._lock:
            self._rows += [replace(known) for known in self._known.values()]

    def _note(self, found: Found, now: int) -> set[tuple[Any, ...]]:
        """Take note of what was found, and return its keys."""
        there = set()
        with self._lock:
            items: list[Workload | Process] = [*found.workloads, *found.processes]
            for seen in items:
                key = _key(seen)
                there.add(key)
                known = self._known.get(key)
                item = seen if known is None else _with_names_of(known.item, seen)
                if known is not None and known.item == item:
                    known.last_ns = now
                else:
                    # What has another name now was last seen with the former one when it was last looked up.
                    self._rows += [known] if known is not None and known.last_ns > known.first_ns else []
                    self._known[key] = _Sighting(item, now, now)
                    self._rows.append(_Sighting(item, now, now))
        return there

    def _forget(self, asked: tuple[list[int], list[int]], found: Found, there: set[tuple[Any, ...]]) -> None:
        """Write the last row of what was asked for and is gone, so that its id counts as new if it comes again."""
        groups, pids = set(asked[0]), set(asked[1])
        gone = [
            key
            for key, known in self._known.items()
            if key not in there and (known.item.pid in pids if isinstance(known.item, Process) else key[0] in groups)
        ]
        for key in gone:
            self._write_last(key)
        for used, lost in zip(
            self._used,
            (groups - {each.cgroup_id for each in found.workloads}, pids - {each.pid for each in found.processes}),
            strict=True,
        ):
            for each in lost:
                used.pop(each, None)

    def _write_last(self, key: tuple[Any, ...]) -> None:
        """Write the last row of what is known by a key, and forget it."""
        known = self._known.pop(key)
        used = self._used[isinstance(known.item, Process)].get(key[0], 0)
        known.last_ns = max(known.last_ns, used)
        self._rows += [known] if known.last_ns > known.first_ns else []


def _with_names_of(before: Workload | Process, item: Workload | Process) -> Workload | Process:
    """Return ``item`` with the names that it had before and has no longer.

    While a container is being removed, its files may be gone before its cgroup is.
    """
    if isinstance(item, Workload) and isinstance(before, Workload):
        return replace(item, names=item.names.or_else(before.names))
    return item


def _key(item: Workload | Process) -> tuple[Any, ...]:
    return (item.cgroup_id, item.path) if isinstance(item, Workload) else (item.pid, item.start_ticks, "")


def tables(rows: list[_Sighting], utc_offset_ns: int) -> dict[str, pa.Table]:
    """Return sightings as tables of a capture, by name; those without rows are absent."""
    out = {}
    for name, kind in (("workloads", Workload), ("processes", Process)):
        mine = [row for row in rows if isinstance(row.item, kind)]
        if mine:
            out[name] = _table(name, mine, utc_offset_ns)
    return out


def _table(name: str, rows: list[_Sighting], utc_offset_ns: int) -> pa.Table:
    arrays = []
    for field in arrow.schema(name):
        if field.name == "time":
            items: list[Any] = [(row.first_ns + utc_offset_ns) // 1000 for row in rows]
        elif field.name in ("first_ns", "last_ns"):
            items = [getattr(row, field.name) for row in rows]
        else:
            items = [_value(row.item, field.name) for row in rows]
        arrays.append(arrow.column(field, items))
    return pa.Table.from_arrays(arrays, schema=arrow.schema(name))


def _value(item: Workload | Process, name: str) -> Any:
    return getattr(item, name) if hasattr(item, name) else getattr(item.names, name)  # type: ignore[union-attr]
