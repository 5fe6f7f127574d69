# SPDX-License-Identifier: Apache-2.0
"""A capture as a trace for Perfetto: connections, block devices and losses on one axis of time.

Block requests, of which there may be many millions, are read part by part, twice: once to find out for which ones sends
waited, and once to write them. All other tables are frames in memory, as for a report.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from operator import itemgetter
from typing import Any, Final

import numpy as np
import pandas as pd

from cwndtrace import format as fmt
from cwndtrace.analysis.cost import Ints
from cwndtrace.analysis.idle_cause import COLUMNS as CAUSE
from cwndtrace.analysis.idle_disk import NEEDS
from cwndtrace.errors import making_sense
from cwndtrace.export.lanes import Depth, Lanes
from cwndtrace.export.packets import Packets
from cwndtrace.export.text import Writable
from cwndtrace.trace import Trace

REQUEST: Final = ("bytes", "sector", "issue_ns", "error", "comm", "tgid", "tid", "owner")
"""The columns of ``Trace.block_io`` that a request's slice has as arguments."""

IDLE: Final = ("idle_us", "rto_us", *(name for name in CAUSE if name != "disk_last"))
"""The columns of ``Trace.verdicts`` that the slice of an idle period has as arguments."""

_READ: Final = tuple(dict.fromkeys((*NEEDS, *REQUEST)))
_ROWS: Final = 1 << 14
"""The number of requests that are Python objects at once."""

_NEVER: Final = int(np.iinfo(np.int64).max)
_NONE: Final = np.zeros(0, np.int64)


@making_sense()
def write(trace: Trace, file: Writable) -> int:
    """Write a trace of ``trace`` to ``file``, and return its number of slices, instants and counter values.

    Raises CaptureError where the rows make no sense together, and OSError.
    """
    packets, requests = Packets(file), _Requests(trace)
    verdicts = trace.verdicts_by(requests.survey())
    _capture(packets, trace, verdicts, requests)
    flows: dict[int, list[int]] = defaultdict(list)
    for flow, row in enumerate(verdicts["disk_last"].tolist(), start=1):
        if row >= 0:
            flows[row].append(flow)
    _connections(packets, trace, verdicts)
    requests.write(packets, flows)
    return packets.events


# ---- the capture itself ------------------------------------------------------------------------------


def _capture(packets: Packets, trace: Trace, verdicts: pd.DataFrame, requests: _Requests) -> None:
    """Write the clocks, what is known of the capture, and what it lacks."""
    about = trace.about
    began = verdicts["ts_ns"] - verdicts["idle_us"] * 1000
    times = [began, trace.recoveries["end_ts_ns"], *(frame["ts_ns"] for frame in (trace.resets, trace.connections))]
    known = [column.dropna() for column in times]  # rows of an older version may lack any
    seen = [int(each) for column in known if len(column) for each in (column.min(), column.max())]
    seen += [requests.first_ns, requests.last_ns] if requests.last_ns else []
    first, last = max(min(seen, default=0), 0), max(seen, default=0)
    begin = about.begin.mono_ns if about.begin else first
    end = max(about.end.mono_ns if about.end else last, begin)
    # Before the first of these moments Perfetto couldn't tell the time: that of what began before the capture did.
    moments = [min(first, begin) if seen else begin, begin, *(each.mono_ns for each in about.segments), end]
    packets.clocks((at, about.utc_ns(at)) for at in sorted({*moments}))

    facts = {
        **{name: getattr(about, name) for name in ("host", "kernel", "version", "started", "ended")},
        **{f"filter {name}": value for name, value in about.filters.items()},
        **{f"probe for {reason}": probe or "none" for reason, probe in about.probes.items()},
    }
    track = packets.track("capture")
    packets.slice(track, f"capture, {trace.status}", begin, end, facts)
    lacks = [*trace.warnings, *trace.unseen()]
    if number := trace.lost("block_io"):
        lacks.append(fmt.lost(number, "block request"))
    if not trace.block_recorded:
        lacks.append("block I/O wasn't recorded")
    if about.filters:
        lacks.append(f"filtered: only {', '.join(f'{name}={value}' for name, value in about.filters.items())}")
    _slices(packets, "missing or incomplete", 0, [(line, begin, end, {}) for line in dict.fromkeys(lacks)])
    losses = ((fmt.lost(each.lost, "record", each.event), each) for each in about.lossy)
    _slices(packets, "losses", 0, [(name, each.start_ns, each.end_ns, asdict(each)) for name, each in losses])


_Slice = tuple[str, int, int, Mapping[str, Any]]


def _slices(packets: Packets, name: str, parent: int, rows: Iterable[_Slice]) -> None:
    """Write slices to as many tracks as they need; each is its name, its start and end in ns, and its arguments."""
    rows = sorted(rows, key=itemgetter(1, 2))
    times = np.array([row[1:3] for row in rows], dtype=np.int64).reshape(-1, 2)
    lanes = Lanes().place(times[:, 0], times[:, 1]).tolist()
    tracks = [packets.track(name, parent) for _ in range(max(lanes, default=-1) + 1)]
    for lane, row in zip(lanes, rows, strict=True):
        packets.slice(tracks[lane], *row)


# ---- connections -------------------------------------------------------------------------------------


def _connections(packets: Packets, trace: Trace, verdicts: pd.DataFrame) -> None:
    """Write the tracks of each connection, under that of its process."""
    verdicts = verdicts.assign(flow=range(1, len(verdicts) + 1))
    tables = [
        dict(iter(frame.groupby("connection", sort=False)))
        for frame in (verdicts, trace.recoveries.dropna(subset="connection"), _points(trace))
    ]
    known = trace.summary().to_dict("records")
    under: dict[tuple[int, str], int] = {}
    for row in known:
        holder = row["pid"], row["process"]
        if holder not in under:
            under[holder] = packets.process(*holder) if row["pid"] else packets.track("no process known")
        place = f" in {row['workload']}" if row["workload"] else ""
        track = packets.track(f"{fmt.connection(row)}{place}", under[holder])
        _connection(packets, track, *(table.get(row["connection"]) for table in tables))
    orphans = [table.get("") for table in tables]
    if any(frame is not None for frame in orphans):
        _connection(packets, packets.track("connections whose resets were lost"), *orphans)


def _connection(
    packets: Packets,
    track: int,
    verdicts: pd.DataFrame | None,
    recoveries: pd.DataFrame | None,
    points: pd.DataFrame | None,
) -> None:
    for name in ("cwnd", "ssthresh"):
        values = None if points is None else points[["ts_ns", name]].dropna().astype("int64")
        if values is not None and len(values):
            counter = packets.track(name, track, unit="segments")
            for at, value in zip(values["ts_ns"].tolist(), values[name].tolist(), strict=True):
                packets.value(counter, at, value)
    if verdicts is not None:
        rows = verdicts.drop(columns=["time", "flow", "disk_last"]).to_dict("records")
        for row, flow, last in zip(rows, verdicts["flow"], verdicts["disk_last"], strict=True):
            args = {str(name): value for name, value in row.items()}
            flows = [int(flow)] if last >= 0 else []
            packets.instant(track, f"{row['reason']} reset: {row['verdict']}", row["ts_ns"], args, flows)
        _slices(packets, "idle", track, _idle(rows))
    if recoveries is not None:
        _slices(packets, "followed window", track, _waiting(recoveries))


def _idle(rows: list[dict[Any, Any]]) -> Iterator[_Slice]:
    for row in rows:
        if row["reason"] == "idle":
            args = {name: row[name] for name in IDLE}
            yield row["cause"], row["ts_ns"] - row["idle_us"] * 1000, row["ts_ns"], args


def _waiting(recoveries: pd.DataFrame) -> Iterator[_Slice]:
    for row in recoveries.drop(columns="time").to_dict("records"):
        args = {str(name): value for name, value in row.items()}
        # The columns have floats where rows of an older version, which aren't here, lack a value.
        yield row["outcome"], int(row["reset_ts_ns"]), int(row["end_ts_ns"]), args


def _points(trace: Trace) -> pd.DataFrame:
    """Return all that is known of windows: ``connection``, ``ts_ns``, ``cwnd`` and ``ssthresh``, in order of time.

    At the moment of a reset there are the window before it and the one after it, in this order.
    """
    resets = trace.resets
    ended, before, after = ("end_ts_ns", "_end"), ("ts_ns", "_before"), ("ts_ns", "_after")
    tables = [(trace.recoveries, ended), (resets, before), (resets, after)]
    tables += [(trace.connections, ("ts_ns", "")), (trace.samples, ("ts_ns", ""))]
    points = [
        frame[["connection", at, f"cwnd{which}", f"ssthresh{which}"]].set_axis(
            ["connection", "ts_ns", "cwnd", "ssthresh"], axis=1
        )
        for frame, (at, which) in tables
    ]
    return pd.concat(points).dropna(subset="connection").sort_values("ts_ns", kind="stable", ignore_index=True)


# ---- block devices -----------------------------------------------------------------------------------


class _Device:
    """The tracks of a block device."""

    def __init__(self, packets: Packets, name: str) -> None:
        self._packets = packets
        self._track = packets.track(f"block device {name}")
        self._counter = packets.track("requests in flight", self._track, unit="requests")
        self._tracks: list[int] = []
        self._lanes, self._depth = Lanes(), Depth()

    def lanes(self, start_ns: Ints, end_ns: Ints) -> Ints:
        """Return the track for each request of a batch."""
        lanes = self._lanes.place(start_ns, end_ns)
        for _ in range(int(lanes.max(initial=-1)) + 1 - len(self._tracks)):
            self._tracks.append(self._packets.track(f"lane {len(self._tracks) + 1}", self._track))
        return np.array(self._tracks, dtype=np.int64)[lanes]

    def count(self, start_ns: Ints, end_ns: Ints, until_ns: int) -> None:
        """Write how many requests were in flight until a moment; a batch of them may still reach beyond it."""
        for at, depth in self._depth.add(start_ns, end_ns, until_ns):
            self._packets.value(self._counter, at, depth)


class _Requests:
    """The block requests of a capture, read part by part. A request is named by its part and its row in that."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._parts: list[tuple[int, int]] = []
        self.last_ns = 0

    @property
    def first_ns(self) -> int:
        """The start of the first request that ``survey`` has seen, ns of CLOCK_MONOTONIC."""
        return min((first for first, _ in self._parts), default=_NEVER)

    def survey(self) -> Iterator[pd.DataFrame]:
        """Yield the requests of each part, with their names in the column ``row``, and take note of the parts."""
        for number, batch in enumerate(self._trace.block_batches(*_READ)):
            self._parts.append((_first_ns(batch), len(batch)))
            self.last_ns = max(self.last_ns, int(batch["done_ns"].max()) if len(batch) else 0)
            yield batch.assign(row=np.arange(len(batch)) + (number << 32))

    def write(self, packets: Packets, flows: Mapping[int, list[int]]) -> None:
        """Write the requests that ``survey`` has seen, with the ``flows`` that start at some of them, by their names.

        Parts of a running trace may have become longer since, and those of a window may be gone.
        """
        devices: dict[str, _Device] = {}
        later = np.minimum.accumulate([_NEVER, *(first for first, _ in reversed(self._parts))])[::-1][1:].tolist()
        following = 0
        for batch in self._trace.block_batches(*_READ):
            number = next((n for n in range(following, len(self._parts)) if self._is(n, batch)), None)
            if number is None:
                continue
            following, until, batch = number + 1, later[number], batch.iloc[: self._parts[number][1]]
            order = np.lexsort((batch["done_ns"], batch["start_ns"]))
            batch = batch.iloc[order]
            start, end = (batch[name].to_numpy(np.int64) for name in ("start_ns", "done_ns"))
            device = batch["device"].astype("category").cat
            places = {str(name): np.flatnonzero(device.codes == code) for code, name in enumerate(device.categories)}
            tracks = np.zeros(len(batch), np.int64)
            for name, at in places.items():
                if len(at):
                    if name not in devices:
                        devices[name] = _Device(packets, name)
                    tracks[at] = devices[name].lanes(start[at], end[at])
            _write(packets, batch, tracks, order + (number << 32), flows)
            for name, each in devices.items():
                at = places.get(name, _NONE)
                each.count(start[at], end[at], until)

    def _is(self, number: int, batch: pd.DataFrame) -> bool:
        """Return whether a batch is the part with this number."""
        first_ns, rows = self._parts[number]
        return len(batch) >= rows and _first_ns(batch.iloc[:rows] if rows else batch) == first_ns


def _first_ns(batch: pd.DataFrame) -> int:
    return int(batch["start_ns"].min()) if len(batch) else _NEVER


def _write(packets: Packets, batch: pd.DataFrame, tracks: Ints, names: Ints, flows: Mapping[int, list[int]]) -> None:
    """Write the slices of requests with these ``names``."""
    for begin in range(0, len(batch), _ROWS):
        some = slice(begin, begin + _ROWS)
        values = {
            name: batch[name].iloc[some].astype(object).tolist() for name in ("op", "start_ns", "done_ns", *REQUEST)
        }
        args = zip(*(values[name] for name in REQUEST), strict=True)
        columns = (
            tracks[some].tolist(),
            values["op"],
            values["start_ns"],
            values["done_ns"],
            args,
            names[some].tolist(),
        )
        for track, op, start, end, figures, name in zip(*columns, strict=True):
            packets.slice(track, op, start, end, dict(zip(REQUEST, figures, strict=True)), flows.get(name, ()))
