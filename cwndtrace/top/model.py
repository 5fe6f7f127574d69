# SPDX-License-Identifier: Apache-2.0
"""The connections and resets of a running trace, with bounded memory however long it runs."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cwndtrace.analysis import peer_window
from cwndtrace.analysis.verdict import FLOOR_US
from cwndtrace.records import arrow
from cwndtrace.store.meta import Meta
from cwndtrace.top.devices import Devices
from cwndtrace.top.history import History
from cwndtrace.top.names import LiveNames

MOST_CONNECTIONS: Final = 20_000
"""The most connections that are kept. Beyond it, those that are closed and cost least make room."""
MOST_RESETS: Final = 300
"""The resets that are kept one by one, those that came last."""
MOST_AWAITED: Final = 100_000
"""The most resets whose cost is still to come, and the most costs whose reset is."""
_ROUND_NS: Final = 1_000_000_000
"""A snapshot of all namespaces takes less, and the next one comes later."""

_ENDS: Final = ("netns_ino", "saddr", "sport", "daddr", "dport")
_OF_RESET: Final = (
    *(*_ENDS, "ts_ns", "sock_cookie", "skaddr", "cgroup_id", "tgid", "comm", "process", "reason", "idle_us", "rto_us"),
    *("srtt_us", "cwnd_before", "cwnd_after", "ca_name", "unsent_bytes", "unacked_bytes", "mss", "snd_wnd"),
    *("tcp_state", "time"),
)
_OF_SNAPSHOT: Final = (
    *(*_ENDS, "sock_cookie", "pid", "comm", "sock_cgroup_id", "state", "cwnd", "srtt_us", "ca_name", "listener_pid"),
    *("listener", "ts_ns"),
)
_OF_RECOVERY: Final = ("reset_ts_ns", "end_ts_ns", "skaddr", "cost_us", "after_loss_us", "outcome")
WANTED: Final = {
    "cwnd_reset": _OF_RESET,
    "connections": _OF_SNAPSHOT,
    "cwnd_recovery": _OF_RECOVERY,
    "workloads": tuple(name for name in arrow.schema("workloads").names if name != "time"),
    "processes": ("pid", "comm", "cgroup"),
    "cwnd_sample": ("ts_ns", "sock_cookie", "skaddr", "cwnd"),
    "block_io": ("start_ns", "done_ns", "dev", "op", "bytes", "error"),
}
"""The columns of each table that ``Model.add`` takes."""


@dataclass(slots=True, eq=False)
class Watched:
    """One connection: the last that is known of it, and sums. Times are in us or, on CLOCK_MONOTONIC, in ns."""

    ends: tuple[int, str, int, str, int]
    cookie: int = 0
    skaddr: int = 0
    group: int = 0
    pid: int = 0
    process: str = ""
    service: str = ""
    state: str = ""
    ca_name: str = ""
    cwnd: int = 0
    srtt_us: int = 0
    resets: int = 0
    idle_longest_us: int = 0
    cost_us: float = 0.0
    costs: int = 0
    """The number of its resets whose cost was measured."""
    seen_ns: int = 0
    spans: tuple[tuple[int, int, float], ...] = ()
    """The last followed windows: from when to when, and the cost in us."""


@dataclass(slots=True)
class WorkloadSum:
    """The sums of a workload's connections; cost in us, measured."""

    open: int = 0
    connections: int = 0
    resets: int = 0
    cost_us: float = 0.0
    costs: int = 0
    worst: Watched | None = None


@dataclass(slots=True, eq=False)
class LiveReset:
    """One reset as it came: its row, and its connection."""

    row: dict[str, Any]
    of: Watched


@dataclass
class Model:
    """What is shown of a capture. ``version`` changes with everything that does."""

    about: Meta
    devices: Devices = field(default_factory=Devices)
    history: History = field(default_factory=History)
    names: LiveNames = field(default_factory=LiveNames)
    version: int = 0
    resets: int = 0
    cost_us: float = 0.0
    newest_ns: int = 0
    """The time of the latest record, CLOCK_MONOTONIC."""
    left_out: int = 0
    """The number of connections that made room for others."""
    falls: deque[LiveReset] = field(default_factory=lambda: deque(maxlen=MOST_RESETS))

    def __post_init__(self) -> None:
        self._known: dict[tuple[Any, int], Watched] = {}
        self._last: dict[Any, Watched] = {}
        self._awaiting: dict[tuple[int, int], Watched] = {}
        self._early: dict[tuple[int, int], dict[str, Any]] = {}
        self._snapshot_ns = 0
        self.describe(self.about)

    def describe(self, about: Meta) -> None:
        """Take what meta.json says now."""
        self.about = about
        self.devices.names, self.names.alone = about.devices, about.cgroups in ("", "v2")

    @property
    def connections(self) -> Iterable[Watched]:
        """All connections that are kept, in no order."""
        return self._known.values()

    def is_open(self, one: Watched) -> bool:
        """Return true for a connection that the last snapshot showed."""
        return bool(one.state) and one.seen_ns > self._snapshot_ns - _ROUND_NS

    def workload(self, one: Watched) -> str:
        """Return the workload of a connection; empty where it isn't known."""
        return self.names.workload(one.group, one.pid)

    def process(self, one: Watched) -> str:
        """Return the name of the process that holds a connection; empty where it isn't known."""
        return self.names.process(one.pid) or one.process

    def workloads(self) -> dict[str, WorkloadSum]:
        """Return the sums of each workload's connections that are kept."""
        sums: dict[str, WorkloadSum] = {}
        for one in self.connections:
            mine = sums.setdefault(self.workload(one), WorkloadSum())
            mine.open += self.is_open(one)
            mine.connections += 1
            mine.resets += one.resets
            mine.cost_us += one.cost_us
            mine.costs += one.costs
            if one.resets and (mine.worst is None or _worth(one) > _worth(mine.worst)):
                mine.worst = one
        return sums

    def add(self, table: str, data: pa.Table) -> None:
        """Count new rows of a table, with the columns that ``WANTED`` names."""
        data = _whole(table, data)
        if not len(data):
            return
        self.version += 1
        if table == "block_io":
            self.devices.add(data)
            self._newest(data["done_ns"])
        elif table == "cwnd_sample":
            self.history.add(
                cookie=_array(data["sock_cookie"]),
                skaddr=_array(data["skaddr"]),
                ts_ns=_array(data["ts_ns"]),
                cwnd=_array(data["cwnd"]),
            )
            self._newest(data["ts_ns"])
        elif table == "connections":
            self._add_snapshots(data)
        else:
            if "time" in data.column_names:  # a number, because Python's own times end with the year 9999
                at = data.column_names.index("time")
                data = data.set_column(at, "utc_ns", pc.multiply(data["time"].cast(pa.int64()), 1000))
            rows = data.to_pylist()
            add = {
                "cwnd_reset": self._add_resets,
                "cwnd_recovery": self._add_recoveries,
                "workloads": self.names.add_workloads,
                "processes": self.names.add_processes,
            }[table]
            add(rows)
        self._make_room()

    def _newest(self, stamps: Any) -> None:
        self.newest_ns = max(self.newest_ns, int(pc.max(stamps).as_py()))

    def _find(self, ends: Any, cookie: int) -> Watched:
        one = self._known.get((ends, cookie))
        if one is None and not cookie:
            one = self._last.get(ends)
        elif one is None and (one := self._known.pop((ends, 0), None)):
            # The kernel makes a socket's cookie when something first asks for it.
            one.cookie = cookie
            self._known[ends, cookie] = one
        if one is None:
            one = self._known[ends, cookie] = Watched(ends, cookie)
        self._last[ends] = one
        return one

    def _add_resets(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            one = self._find(tuple(row[name] for name in _ENDS), row["sock_cookie"])
            one.resets += 1
            one.skaddr = row["skaddr"]
            if row["reason"] == "idle":
                one.idle_longest_us = max(one.idle_longest_us, row["idle_us"])
            if row["tgid"]:
                one.pid, one.process = row["tgid"], row["process"] or row["comm"]
            one.group = row["cgroup_id"] or one.group
            if row["ts_ns"] >= one.seen_ns:
                one.cwnd, one.srtt_us, one.ca_name = row["cwnd_after"], row["srtt_us"], row["ca_name"]
            key = row["skaddr"], row["ts_ns"]
            _bounded(self._awaiting, key, one)
            if early := self._early.pop(key, None):
                self._add_recoveries([early])
            missing = {name: math.nan if value is None else value for name, value in row.items()}
            self.falls.append(LiveReset({**row, "label": peer_window.reason(missing)}, one))
        self.resets += len(rows)
        names = ("sock_cookie", "skaddr", "ts_ns")
        columns = {name: np.array([row[name] for row in rows], np.uint64) for name in names}
        for side, at in (("cwnd_before", 0), ("cwnd_after", 1)):
            self.history.add(
                cookie=columns["sock_cookie"],
                skaddr=columns["skaddr"],
                ts_ns=columns["ts_ns"].astype(np.int64) + at,
                cwnd=np.array([row[side] for row in rows], np.uint32).astype(np.int32),
            )
        self.newest_ns = max(self.newest_ns, *(row["ts_ns"] for row in rows))

    def _add_recoveries(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            key = row["skaddr"], row["reset_ts_ns"]
            one = self._awaiting.pop(key, None)
            if one is None:
                _bounded(self._early, key, row)
            elif row["cost_us"] is not None:
                self._charge(one, row)

    def _charge(self, one: Watched, row: dict[str, Any]) -> None:
        """Add the cost of a followed window, as analysis/recovery.py and analysis/verdict.py count it.

        Where two followed spans overlap, they measured the same waiting, and that of the earlier one counts.
        """
        cost = float(row["cost_us"])
        if row["outcome"] == "capture_end" and cost < FLOOR_US:
            return
        if cost < FLOOR_US and (row["after_loss_us"] or 0) >= FLOOR_US:
            cost = 0.0
        begin, end = row["reset_ts_ns"], row["end_ts_ns"]
        if any(other[0] < begin < other[1] for other in one.spans):
            cost = 0.0
        inner = [span for span in one.spans if begin < span[0] < end]
        more = cost - sum(span[2] for span in inner)
        one.spans = (*(span for span in one.spans if span not in inner), (begin, end, cost))[-4:]
        one.cost_us += more
        one.costs += 1
        self.cost_us += more

    def _add_snapshots(self, data: pa.Table) -> None:
        columns = [data[name].to_pylist() for name in _OF_SNAPSHOT[len(_ENDS) :]]
        ends = zip(*(data[name].to_pylist() for name in _ENDS), strict=True)
        for end, cookie, pid, comm, group, state, cwnd, srtt, ca, listener_pid, listener, ts in zip(
            ends, *columns, strict=True
        ):
            one = self._find(end, cookie)
            if ts < one.seen_ns or not cwnd:
                continue
            one.seen_ns, one.state, one.cwnd, one.srtt_us, one.ca_name = ts, state, cwnd, srtt, ca
            one.group = group or one.group
            if pid:
                one.pid, one.process = pid, comm
            if listener or listener_pid:
                one.service = f"{listener}:{end[2]}"
        newest = int(pc.max(data["ts_ns"]).as_py())
        self._snapshot_ns, self.newest_ns = max(self._snapshot_ns, newest), max(self.newest_ns, newest)
        self.history.add(cookie=_array(data["sock_cookie"]), ts_ns=_array(data["ts_ns"]), cwnd=_array(data["cwnd"]))
        # As in top, what is gone disappears, but what had a reset stays.
        for key in [key for key, one in self._known.items() if not one.resets and not self.is_open(one)]:
            self._forget(key)

    def _make_room(self) -> None:
        if len(self._known) <= MOST_CONNECTIONS:
            return
        order = sorted(self._known, key=lambda key: (self.is_open(self._known[key]), *_worth(self._known[key])))
        for key in order[: len(order) - MOST_CONNECTIONS * 9 // 10]:
            self._forget(key)
            self.left_out += 1

    def _forget(self, key: tuple[Any, int]) -> None:
        one = self._known.pop(key)
        if self._last.get(one.ends) is one:
            del self._last[one.ends]


def _worth(one: Watched) -> tuple[float, int]:
    return one.cost_us, one.resets


def _bounded(known: dict[Any, Any], key: Any, value: Any) -> None:
    known[key] = value
    if len(known) > MOST_AWAITED:
        del known[next(iter(known))]


def _array(column: pa.ChunkedArray) -> Any:
    return column.to_numpy().astype(np.int64)


def _whole(table: str, data: pa.Table) -> pa.Table:
    """Return the rows that have all values that a verdict needs; those of older versions may lack some."""
    for name in arrow.needed(table):
        if name in data.column_names and data[name].null_count:
            data = data.filter(data[name].is_valid())
    return data
