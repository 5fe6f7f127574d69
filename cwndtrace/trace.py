# SPDX-License-Identifier: Apache-2.0
"""A capture as DataFrames, for scripts and notebooks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from cwndtrace import format as fmt
from cwndtrace import store
from cwndtrace.analysis import (
    ahead,
    audit,
    compare,
    cost,
    cured,
    idle_cause,
    idle_windows,
    recovery,
    remedy,
    threads,
    units,
    verdict,
)
from cwndtrace.analysis import block_io as block_analysis
from cwndtrace.analysis import connections as connection_analysis
from cwndtrace.analysis import groups as group_analysis
from cwndtrace.analysis import workloads as workload_analysis
from cwndtrace.analysis.block_figures import BlockRequests
from cwndtrace.analysis.idle_disk import NEEDS
from cwndtrace.errors import NotFound, making_sense
from cwndtrace.present import audit as audit_in_words
from cwndtrace.present import compared, html
from cwndtrace.present import remedies as remedies_in_words
from cwndtrace.present import text as in_words
from cwndtrace.present.compared import Conclusion
from cwndtrace.present.text import Host, Verdict
from cwndtrace.records import arrow, frames
from cwndtrace.store.meta import Meta

_T = TypeVar("_T")
_CELL = 100  # most characters of a text that came from outside
_GATHERED = 1 << 17  # rows of block_io that are computed with at once
_OPTIONAL = ("tid", "cgroup_id")  # columns of block_io without which a request still counts
_VERDICT_NEEDS = {"cwnd_reset": "reset", "connections": "snapshot", "cwnd_recovery": "followed window"}
"""The tables that a verdict on the whole capture needs in full, and the noun for a row of each."""


def load(path: str | os.PathLike[str], *, max_rows: int = store.MOST_ROWS) -> Trace:
    """Open the capture ``path``, which may still be being written or have been cut short.

    Raises CaptureError, with the cause and what to do, if ``path`` isn't a capture. Reading the rows raises it too, if
    the capture has more than ``max_rows`` rows.
    """
    return Trace(store.open_capture(path, max_rows=max_rows))


def _computed(function: Callable[[Any], _T]) -> cached_property[_T]:
    """Return a cached property that raises CaptureError where the capture's rows make no sense together."""
    return cached_property(making_sense()(function))


@dataclass(frozen=True, repr=False)
class Connection:
    """One connection of a trace.

    ``about`` is its row of ``Trace.summary()``. The frames hold its rows of the trace's frames.
    """

    about: dict[str, Any]
    resets: pd.DataFrame
    snapshots: pd.DataFrame
    recoveries: pd.DataFrame

    @property
    def verdict(self) -> Verdict:
        """The verdict on whether its resets mattered, with the evidence."""
        return Verdict(self.about["verdict"], self.about["why"])

    def facts(self) -> list[tuple[str, str]]:
        """Return the main facts, at most one screen of (name, value) pairs that are safe to print to a terminal."""
        row, most = self.about, self.about["cwnd_max_segments"]
        facts = [
            ("process", _shown(fmt.holder(row))),
            *([("workload", _shown(row["workload"]))] if row["workload"] else []),
            ("congestion control", _shown(row["ca_name"])),
            ("seen", f"{row['seen_s']:,.1f} s in {fmt.plural(row['snapshots'], 'snapshot')}"),
            ("state", _shown(row["state"] or "unknown")),
            (
                "resets",
                f"{row['resets']} ({row['resets_harmful']} harmful), cost {fmt.span(row['lost_us'])} (measured)",
            ),
            ("window", f"{row['cwnd_min_segments']} to {most} {'segment' if most == 1 else 'segments'}"),
            ("round trip, RTO", f"{fmt.span(row['srtt_us'])}, {fmt.span(row['rto_us'])}"),
            ("sent", fmt.size(row["sent_bytes"])),
        ]
        if row["resets_idle"]:
            longest = f"{fmt.span(row['idle_longest_us'])}, {row['idle_per_rto_max']:.1f} RTOs"
            facts.insert(len(facts) - 4, ("longest idle time", longest))
        costly = self.resets[self.resets["verdict"] == "harmful"].sort_values("lost_us", ascending=False)
        facts += [("costly reset", fmt.clean(in_words.reset(reset))) for reset in costly.head(3).to_dict("records")]
        return [*facts, ("verdict", str(self.verdict))]

    def __repr__(self) -> str:
        return _text(f"connection {_shown(fmt.connection(self.about))}", self.facts())

    def _repr_html_(self) -> str:
        return html.facts("connection", _shown(fmt.connection(self.about)), self.facts())


class Trace:
    """The contents of one capture.

    Each frame is read when it is first used, and then kept. Its first column is ``time`` (UTC), and its rows are in
    order of time. The other columns are those of the capture's tables, whose Parquet metadata has descriptions. Text
    columns are plain strings; in ``block_io``, which can have millions of rows, they are categories. An empty table is
    a frame with all its columns and no row.

    All frames follow one rule. Counts, segments, bytes and times (us, ns) are int64, so that differences have a sign;
    ``bytes`` of ``block_io`` is int32 where no request has 2 GiB. Columns whose values may be missing are float64, and
    a missing value is NaN: an ssthresh that was never set, min_rtt_us without a sample (the Parquet files have the
    kernel's 2147483647 and 4294967295 there), what an older version didn't record, and computed figures. Ids, ports and
    pids keep the unsigned types of the files. ``frame.attrs["units"]`` has the unit of each column.

    The frames belong to the caller: a change to one of them changes nothing that other members return.
    """

    def __init__(self, capture: store.Capture) -> None:
        self._capture = capture

    @property
    def path(self) -> Path:
        """The capture's directory."""
        return self._capture.shown or self._capture.path

    @cached_property
    def meta(self) -> dict[str, Any]:
        """The content of ``meta.json``, without control characters in its texts."""
        cleaned: dict[str, Any] = _cleaned(self._capture.meta)
        return cleaned

    @property
    def about(self) -> Meta:
        """``meta`` checked and typed, as the analyses use it."""
        return self._capture.about

    @property
    def status(self) -> str:
        """The capture's status: ``complete``, ``running``, ``interrupted`` or ``failed``."""
        return self._capture.status

    @property
    def warnings(self) -> list[str]:
        """Warnings about this capture, one line each.

        First come the lines of ``gaps``, then what the trace had to do without, then the parts that couldn't be read so
        far.
        """
        return [*self.gaps(), *self._capture.warnings]

    def gaps(self) -> list[str]:
        """Return one line for each gap in the records, by the capture's own account of them.

        A gap is a number of records that are missing or that lack values, or parts that aren't as the trace wrote them.
        """
        lines = []
        for table in arrow.TABLES:
            lacking, kept = self._capture.missing(table)
            if lacking:
                lines.append(
                    f"{lacking:,} of {fmt.plural(kept, 'record')} of {table} "
                    f"{'is' if lacking == 1 else 'are'} not in the capture"
                    + _some(table, self._capture.gone(table), "; missing: ")
                )
            partly, columns = self._capture.partly(table)
            if partly:
                lines.append(
                    f"an older version recorded {fmt.plural(partly, 'record')} of {table} without these columns: "
                    + ", ".join(columns)
                )
            if strange := self._capture.strange(table):
                lines.append(f"these parts aren't as the trace wrote them{_some(table, strange, ': ')}")
        return lines

    def _lacking(self) -> str:
        """Return the reason why no verdict on the whole capture is possible; empty where one is."""
        for table, noun in _VERDICT_NEEDS.items():
            lacking, kept = self._capture.missing(table)
            if lacking:
                return f"{lacking:,} of {fmt.plural(kept, noun)} are not in the capture"
            partly, columns = self._capture.partly(table)
            if partly:
                return (
                    f"an older version recorded {fmt.plural(partly, noun)} without some values ({', '.join(columns)})"
                )
        return ""

    @property
    def started_ns(self) -> int:
        """The start of tracing, in ns of CLOCK_MONOTONIC, by the metadata or else by the first record."""
        if self.about.begin is not None:
            return self.about.begin.mono_ns
        frames = [(self._resets, "ts_ns"), (self._connections, "ts_ns"), (self.block_columns("start_ns"), "start_ns")]
        return min((int(f[name].min()) for f, name in frames if len(f)), default=0)

    @property
    def left_out(self) -> dict[str, int]:
        """The numbers of requested ``cgroups`` and ``sockets`` that the filter had no room for, where there are any."""
        return {kind: number for kind, number in self.about.left_out.items() if kind in ("cgroups", "sockets")}

    def lost(self, table: str) -> int:
        """Return how many records of a table the kernel or the disk lost, as far as ``meta.json`` says.

        In a window of the past, these are the ones lost since it began, as far as that is known.
        """
        counts, kept_from = self.about.counts or {}, self.about.kept_from
        lost = counts[table].lost if table in counts else 0
        if kept_from is not None:
            lost = sum(each.lost for each in self.about.lossy if each.event == table and each.end_ns >= kept_from)
        return lost + self.about.unwritten.get(table, 0)

    def absent(self, table: str) -> int:
        """Return how many records of a table the trace kept that aren't in the capture, or lack values."""
        return self._capture.missing(table)[0] + self._capture.partly(table)[0]

    @cached_property
    def resets(self) -> pd.DataFrame:
        """One row per congestion-window reset, with ``connection``, the key that ``summary`` uses, and names.

        ``workload`` is its unit, container or pod. ``process`` is the name of its process, and ``comm`` of its thread.
        ``cmdline`` is the command line. Each is empty where it isn't known.

        Rows from an older version lack the columns that it didn't record, and ``connection``. No analysis uses them.
        """
        return self._and_partly("cwnd_reset", _lent(self._resets))

    @cached_property
    def connections(self) -> pd.DataFrame:
        """One row per snapshot of a connection, with the key ``connection``."""
        return self._and_partly("connections", _lent(self._connections))

    @_computed
    def block_io(self) -> pd.DataFrame:
        """One row per finished block request, with ``device``, ``latency_us`` and ``queue_us``.

        ``submitter`` is the workload of the task that submitted it, ``owner`` the one to which the kernel charges it.
        """
        rows = block_analysis.with_latency(self._whole("block_io"), self.about.devices)
        return self._and_partly("block_io", block_analysis.with_workloads(rows, self._naming))

    def block_columns(self, *columns: str) -> pd.DataFrame:
        """Return only these columns of ``block_io``, with its rows in the same order.

        The added columns ``device``, ``latency_us``, ``queue_us``, ``submitter`` and ``owner`` may be named too. No
        columns are read but those that are needed, and the result isn't kept. Requests that lack one of the columns are
        left out. Raises KeyError for an unknown column.
        """
        names = tuple(dict.fromkeys(("start_ns", *columns)))
        rows = self._capture.rows("block_io")
        batches = self._block_batches(columns, self._capture.parts("block_io"), ahead=_roomy(rows, names))
        frame = block_analysis.joined(batches, names, rows)
        return units.attach(frame if names == columns else frame[list(columns)])

    def block_batches(self, *columns: str) -> Iterator[pd.DataFrame]:
        """Yield the rows of ``block_columns(*columns)`` part by part, as the trace wrote them, in bounded memory.

        The first frame is always empty. Contradictory rows raise what they raise, see ``errors.making_sense``.
        """
        return (units.attach(frame[list(columns)]) for frame in self._block_batches(columns))

    def _block_batches(
        self, columns: tuple[str, ...], parts: Sequence[Path] | None = None, *, ahead: bool = False
    ) -> Iterator[pd.DataFrame]:
        """Yield requests with ``columns``; if ``ahead``, the next ones are read meanwhile in another thread."""
        known = arrow.schema("block_io").names
        needs = [name for name in known if name in columns or name == "start_ns"]
        more = block_analysis.NEEDS | block_analysis.WORKLOADS
        needs += [n for column in columns if column not in known for n in more[column]]
        devices = self.about.devices
        pieces = self._capture.pieces("block_io", list(dict.fromkeys(needs)), parts)
        if parts is not None:
            pieces = (piece for piece, _ in _gathered((piece, None) for piece in pieces))
        clean = (frames.frame(arrow.clean_texts(piece), "block_io") for piece in pieces)
        whole = (frames.whole(frame, "block_io") for frame in clean)
        # What is added is left to the caller, because reading takes about as long as that and putting in order.
        read = threads.ahead(whole) if ahead else whole
        added = (block_analysis.add(frame, devices, columns) for frame in read)
        if named := [column for column in columns if column in block_analysis.WORKLOADS]:
            added = (block_analysis.with_workloads(frame, self._naming, named) for frame in added)
        return added

    def _shares(self) -> BlockRequests:
        """Return the block requests for the figures of groups."""
        parts, rows = self._capture.parts("block_io"), self._capture.rows("block_io")
        number = 2 if rows > _GATHERED and self._roomy() else 1
        # Neighbours go to different threads, so that both have about as much to do.
        shares = [partial(self._block_batches, parts=parts[at::number]) for at in range(number)]
        return BlockRequests(tuple(shares), rows)

    def _roomy(self) -> bool:
        """Return whether there is memory for a second thread to read block requests, too, a few parts at a time."""
        return _roomy(2 * (self._capture.largest("block_io") + _GATHERED), arrow.schema("block_io").names)

    def _in_order(self, columns: tuple[str, ...]) -> Iterator[tuple[pd.DataFrame, int | None]]:
        """Yield what ``idle_windows.Batches`` has, with columns of ``idle_disk.NEEDS``."""
        lacking = self._capture.partly("block_io")[1]
        needs = {*columns, "dev", *(name for name in lacking if name in block_analysis.USED)}
        names = [name for name in arrow.schema("block_io").names if name in needs]
        number = 0
        for piece, rest in _gathered(self._capture.pieces_and_rest("block_io", names, "start_ns")):
            clean = frames.frame(arrow.clean_texts(arrow.filled(piece, _OPTIONAL)), "block_io")
            frame = block_analysis.add(frames.whole(clean, "block_io"), self.about.devices, columns)
            yield frame.assign(row=np.arange(number, number + len(frame))), rest
            number += len(frame)

    def _windows(self) -> idle_windows.Parts:
        roomy = self._roomy()

        def batches(columns: tuple[str, ...]) -> idle_windows.Batches:
            return threads.ahead(self._in_order(columns)) if roomy else self._in_order(columns)

        def starts() -> Iterator[npt.NDArray[np.int64]]:
            return (frame["start_ns"].to_numpy(np.int64) for frame, _ in batches(("start_ns",)))

        return idle_windows.Parts(self._judged, batches, starts, roomy=roomy)

    @cached_property
    def workloads(self) -> pd.DataFrame:
        """One row per cgroup whose id the records have, with its names, and ``workload``, the name for people.

        ``first_ns`` and ``last_ns`` are the span in which it was seen, ns of CLOCK_MONOTONIC.
        """
        return self._and_partly("workloads", _lent(self._naming.workloads))

    @cached_property
    def processes(self) -> pd.DataFrame:
        """One row per process whose pid the records have, with its name, command line and ``workload``."""
        return self._and_partly("processes", _lent(self._naming.processes))

    @property
    def named_by_namespace(self) -> int:
        """The number of connections whose workload is inferred from their network namespace."""
        return self._with_names[2]

    @cached_property
    def recoveries(self) -> pd.DataFrame:
        """One row per window followed after its reset, with ``connection``, ``duration_us`` and ``round_trips``."""
        return self._and_partly("cwnd_recovery", _lent(self._recoveries))

    @_computed
    def _recoveries(self) -> pd.DataFrame:
        return recovery.with_duration(_as_text(self._whole("cwnd_recovery")), self._resets)

    @_computed
    def samples(self) -> pd.DataFrame:
        """Samples of windows that grow back after a reset, at most one per round-trip time, with ``connection``."""
        whole = recovery.identify(_as_text(self._whole("cwnd_sample")), self._resets)
        return self._and_partly("cwnd_sample", whole)

    @making_sense()
    def costs(self) -> pd.DataFrame:
        """Return ``resets`` with the predicted cost of each, and what was measured while its window was followed.

        The added columns are ``analysis.cost.COLUMNS`` and ``analysis.recovery.FOLLOWED``.
        """
        return units.attach(self._costs())

    def _costs(self) -> pd.DataFrame:
        return cost.predict(self._resets, self._connections, self._recoveries)

    @cached_property
    def verdicts(self) -> pd.DataFrame:
        """``costs()`` with the verdict on each reset, and the cause of its connection's idle time.

        The added columns are ``analysis.verdict.COLUMNS`` and ``analysis.idle_cause.COLUMNS``.
        """
        return _lent(self._verdicts)

    @_computed
    def _verdicts(self) -> pd.DataFrame:
        return self._caused(self._windows())

    @making_sense()
    def verdicts_by(self, batches: Iterable[pd.DataFrame]) -> pd.DataFrame:
        """Return ``verdicts`` by all block requests, in batches, of which only those are held that idle causes need.

        The batches are those of ``block_batches``, with the columns ``analysis.idle_disk.NEEDS`` and ``row``: integers
        of the caller's that name the requests, also in ``disk_last``.
        """
        relevant = idle_windows.Relevant(self._resets)
        kept = (batch[relevant(batch)] for batch in batches)
        requests = block_analysis.joined(kept, (*NEEDS, "row"), self._capture.rows("block_io"))
        return _lent(self._caused(requests))

    def _caused(self, requests: pd.DataFrame | idle_windows.Windows) -> pd.DataFrame:
        return idle_cause.with_cause(
            self._judged,
            requests,
            self._recoveries,
            recorded=self.block_recorded,
            started_ns=self.started_ns,
        )

    @_computed
    def _judged(self) -> pd.DataFrame:
        """``verdicts`` without the idle causes, for which millions of block requests might have to be read."""
        return verdict.resets(self._costs())

    @property
    def block_recorded(self) -> bool:
        """True if block I/O was traced, so that no record of it during idle time means that there was none."""
        counts = self.about.counts
        return counts is None or "block_io" in counts or bool(self._capture.rows("block_io"))

    def summary(self) -> pd.DataFrame:
        """Return one row per connection.

        The columns are ``analysis.connections.COLUMNS``, ``analysis.verdict.CONNECTION_COLUMNS`` and
        ``why``, the evidence for the verdict in words.
        """
        return _lent(self._summary)

    @_computed
    def _summary(self) -> pd.DataFrame:
        rows = connection_analysis.summary(self._resets, self._connections)
        judged = verdict.connections(rows, self._judged, self._connections, self.about, whole=not self._lacking())
        why = [in_words.connection(row) for row in judged.to_dict("records")]
        return judged.assign(why=pd.Series(why, index=judged.index, dtype="str"))

    @making_sense()
    def groups(
        self, by: str = "service", prefix: tuple[int, int] = group_analysis.PREFIX, *, causes: bool = True
    ) -> pd.DataFrame:
        """Return one row per group of connections; the columns are ``analysis.groups.COLUMNS``.

        ``by`` is ``workload``, ``service`` (of a workload), ``peer`` or ``connection``. Peers are grouped by the first
        ``prefix`` bits of an IPv4 and of an IPv6 address; (32, 128) is each address. With ``causes``, why they were
        idle is computed too, for which millions of block requests might have to be read. Raises ValueError for
        another ``by`` or ``prefix``.
        """
        return units.attach(
            group_analysis.groups(self._summary, self._verdicts if causes else self._judged, by, prefix)
        )

    @making_sense()
    def remedies(self, connection: str | None = None) -> pd.DataFrame:
        """Return the remedies, best first, for the whole capture or for one ``connection``.

        The columns are ``present.remedies.COLUMNS``. Raises NotFound for a key that isn't in ``summary()``.
        """
        judged, rows = self._verdicts, self._summary
        if connection is not None:
            rows = rows[rows["connection"] == connection]
            if rows.empty:
                raise _no_connection(connection)
            judged = judged[judged["connection"] == connection]
        found = remedy.remedies(judged, rows, self.about)
        return units.attach(remedies_in_words.remedies(found, self.about, self._lacking(), self._owners))

    @_computed
    def _owners(self) -> remedies_in_words.Owners:
        return self._naming.of_namespaces(self._resets, self._connections)

    @making_sense()
    def due(self) -> pd.DataFrame:
        """Return the connections of the last snapshot whose windows their next burst would reset.

        The columns are ``analysis.ahead.DUE``.
        """
        on = {int(inode): each.idle_last for inode, each in self.about.namespaces.items() if inode.isdigit()}
        initial = dict(zip(self._resets["sock_cookie"], self._resets["init_cwnd"], strict=True))
        return ahead.due(ahead.last_round(self._connections, self.about.end), on, initial)

    @making_sense()
    def heartbeats(self) -> pd.DataFrame:
        """Return the connections on which small messages came more than an RTO apart, each of which cost a reset.

        The columns are ``analysis.ahead.BEATS``.
        """
        return ahead.beats(self._resets)

    @making_sense()
    def compare(self, after: Trace) -> pd.DataFrame:
        """Return how much a later capture differs, and how surely; the columns are ``analysis.compare.COLUMNS``."""
        return units.attach(compare.compare(self._measures(), after._measures()))

    @making_sense()
    def conclude(self, after: Trace) -> Conclusion:
        """Return whether the idle resets that cost time in this capture are cured in a later one, and by which setting.

        Where the captures don't show it, the verdict is ``unknown`` and the text says what is lacking.
        """
        pair = self._evidence(), after._evidence()
        return compared.conclude(cured.compared(*pair), *pair)

    def _evidence(self) -> cured.Evidence:
        return cured.Evidence(self._judged, self._connections, self.about, tuple(self.unseen()))

    def unseen(self) -> Iterator[str]:
        """Yield a clause for each way in which resets, or what shows their cost, may be missing from the records."""
        if lacking := self._lacking():
            yield lacking
        for table, noun in _VERDICT_NEEDS.items():
            if table != "cwnd_reset" and (number := self.lost(table)):
                yield fmt.lost(number, noun)
        if self.status != "complete":
            words = {"running": "it is still being written", "interrupted": "the trace was interrupted"}
            yield words.get(self.status, "the trace failed")
        yield from self._hidden()

    def _hidden(self) -> Iterator[str]:
        """Yield a clause for each way in which the trace itself may not have seen all idle resets."""
        if number := self.lost("cwnd_reset"):
            yield fmt.lost(number, "reset")
        if self.about.probes and not self.about.probes.get("idle"):
            yield "no probe could see idle resets"
        for kind, number in self.left_out.items():
            yield fmt.left_out(kind, number)
        least = self.about.filters.get("min_idle_us")
        if isinstance(least, int) and least > 0:
            yield f"resets after less than {fmt.span(least)} of idle time were filtered out"

    def _measures(self) -> dict[str, Any]:
        span = compare.span(self.about, self._resets, self._connections)
        return dict(
            compare.measures(
                self._judged, self._connections, self._recoveries, self.block_columns("op", "latency_us"), span
            )
        )

    def connection(self, key: str) -> Connection:
        """Return one connection by its key in ``summary()``. Raises NotFound where there is none."""
        rows = self._summary[self._summary["connection"] == key]
        if rows.empty:
            raise _no_connection(key)
        mine = (f[f["connection"] == key] for f in (self._verdicts, self._connections, self._recoveries))
        about = {str(name): value for name, value in rows.iloc[0].to_dict().items()}
        return Connection(about, *map(units.attach, mine))

    def explain(self, reset: int) -> Verdict:
        """Return the verdict on one reset, by its row in ``verdicts``. Raises KeyError where there is none."""
        row = self._judged.loc[reset].to_dict()
        return Verdict(row["verdict"], in_words.reset(row))

    @making_sense()
    def audit(self) -> pd.DataFrame:
        """Return each network namespace's settings and the connections that they affect.

        The columns are ``analysis.audit.COLUMNS`` and ``note``, what is unlike the host's or has changed.
        """
        rows = audit.namespaces(self._judged, self._connections, self.about)
        return units.attach(audit_in_words.namespaces(rows, self.about))

    @making_sense()
    def host(self) -> Host:
        """Return the cost of all resets, and the verdict on whether the congestion window is the problem at all."""
        return in_words.host(verdict.host(self._summary, self._judged), self._lacking(), next(self._hidden(), ""))

    def block_summary(self) -> pd.DataFrame:
        """Return one row per device and operation; the columns are ``analysis.block_io.COLUMNS``."""
        return _lent(self._by_device)

    @_computed
    def _by_device(self) -> pd.DataFrame:
        return block_analysis.summary(self._shares())

    def block_submitters(self) -> pd.DataFrame:
        """Return one row per submitting process; the columns are ``analysis.block_io.SUBMITTER_COLUMNS``."""
        return _lent(self._by_submitter)

    @_computed
    def _by_submitter(self) -> pd.DataFrame:
        return block_analysis.by_submitter(self._shares())

    def block_owners(self) -> pd.DataFrame:
        """Return one row per workload that owns requests; the columns are ``analysis.block_io.OWNER_COLUMNS``.

        Where the capture names no workload, there is no row.
        """
        return _lent(self._by_owner)

    @_computed
    def _by_owner(self) -> pd.DataFrame:
        if not len(self._naming.workloads):
            return pd.DataFrame(columns=list(block_analysis.OWNER_COLUMNS))
        return block_analysis.by_owner(self._shares())

    def block_heat_map(self) -> pd.DataFrame:
        """Return the number of requests by start time and latency; see ``analysis.block_io.heat_map``."""
        return units.attach(block_analysis.heat_map(self.block_columns("start_ns", "latency_us")))

    @_computed
    def _identified(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        return self._with_names[:2]

    @_computed
    def _with_names(self) -> tuple[pd.DataFrame, pd.DataFrame, int]:
        resets, connections = (_as_text(self._whole(name)) for name in ("cwnd_reset", "connections"))
        # Older versions also recorded mini sockets of closed connections, which have no window and no round-trip time.
        connections = connections[connections["cwnd"] > 0].reset_index(drop=True)
        return self._naming.of_connections(*connection_analysis.identify(resets, connections))

    @_computed
    def _naming(self) -> workload_analysis.Naming:
        known = workload_analysis.workloads(_as_text(self._whole("workloads")))
        processes = workload_analysis.processes(_as_text(self._whole("processes")), known)
        return workload_analysis.Naming(known, processes, self.about.cgroups or "v2")

    @property
    def _resets(self) -> pd.DataFrame:
        return self._identified[0]

    @property
    def _connections(self) -> pd.DataFrame:
        return self._identified[1]

    def _whole(self, table: str) -> pd.DataFrame:
        """Return the rows of a table that have all values that the analyses need."""
        return frames.without_placeholders(frames.whole(self._raw(table), table, placeholders=True))

    def _and_partly(self, table: str, whole: pd.DataFrame) -> pd.DataFrame:
        """Return ``whole`` and the rows that lack a value, in order of time; the latter have no computed values."""
        if not self._capture.partly(table)[0]:
            return units.attach(whole)
        raw = self._raw(table)
        partly = frames.without_placeholders(raw[raw[arrow.needed(table)].isna().any(axis=1)])
        both = pd.concat([whole, partly]).sort_values(_clock(raw), kind="stable", ignore_index=True)
        return units.attach(both)

    def _raw(self, table: str) -> pd.DataFrame:
        # A column that an untrusted capture or a later version added might have the name of one computed here.
        rows = arrow.clean_texts(self._capture.table(table, arrow.schema(table).names))
        frame = frames.raw(rows, table)
        return frame.sort_values(_clock(frame), kind="stable", ignore_index=True)

    def __repr__(self) -> str:
        return _text(f"cwndtrace capture {_shown(self.path)} ({self.status})", self.facts())

    def _repr_html_(self) -> str:
        return html.facts("cwndtrace capture", _shown(self.path), self.facts(), f" ({_shown(self.status)})")

    def facts(self) -> list[tuple[str, str]]:
        """Return the main facts, at most one screen of (name, value) pairs that are safe to print to a terminal."""
        about = self.about
        on_disk = {table: self._capture.rows(table) for table in arrow.TABLES}
        names = {
            "cwnd_reset": ("reset", "resets"),
            "cwnd_recovery": ("recovery", "recoveries"),
            "block_io": ("block I/O", "block I/Os"),
            "connections": ("snapshot of connections", "snapshots of connections"),
        }
        lost = {table: self.lost(table) for table in arrow.TABLES}
        facts = [
            ("host", f"{_shown(about.host or '?')}, Linux {_shown(about.kernel or '?')}"),
            ("span", self._span()),
            ("kept", ", ".join(f"{on_disk[table]:,} {name[on_disk[table] != 1]}" for table, name in names.items())),
            (
                "lost",
                ", ".join(f"{lost[table]:,} {name[lost[table] != 1]}" for table, name in names.items() if lost[table])
                or "nothing",
            ),
        ]
        if window := in_words.window(about):
            facts.insert(2, ("window", _shown(window)))
        if steps := self._steps():
            shown = ", ".join(fmt.signed(step, "{:,.3f} s".format) for step in steps[:5])
            facts.append(("clock", f"stepped by {shown}, suspends included"))
        if about.unchanged:
            facts.append(("unchanged", f"{fmt.plural(about.unchanged, 'idle restart')} left the window as it was"))
        probes = ", ".join(f"{reason}: {probe or 'none'}" for reason, probe in about.probes.items())
        facts.append(("probes", _shown(probes)))
        if about.block_probe:
            facts.append(("block I/O", f"from {_shown(about.block_probe)} on"))
        if about.guessed:
            facts.append(("guessed", fmt.guessed(about.guessed)))
        if about.filters:
            facts.append(("filters", _shown(", ".join(f"{name}={value}" for name, value in about.filters.items()))))
        facts += [("left out", fmt.left_out(kind, number)) for kind, number in self.left_out.items()]
        warnings = self.warnings
        facts += [("warning", _shown(line)) for line in warnings[:5]]
        if len(warnings) > 5:
            facts.append(("warning", f"and {len(warnings) - 5} more, see .warnings"))
        return facts

    def _span(self) -> str:
        started, ended = _moment(self.about.started), _moment(self.about.ended)
        if started is None:
            return "unknown"
        since = None if self.about.kept_from is None else self.about.utc_ns(self.about.kept_from)
        begin = f"from {f'{started:%Y-%m-%d %H:%M:%S} UTC' if since is None else fmt.moment(since)}"
        if ended is None:
            return begin
        lasted = (ended - started).total_seconds()
        if self.about.begin and self.about.end:
            # The wall clock may have been stepped, and CLOCK_MONOTONIC can't be.
            lasted = (self.about.end.mono_ns - self.about.begin.mono_ns) / 1e9
        return f"{begin} to {ended:%H:%M:%S}, {lasted:,.1f} s"

    def _steps(self) -> list[float]:
        """Return each step of the wall clock, in seconds."""
        return [(after - before) / 1e9 for before, after in pairwise(self.about.utc_offsets_ns)]


def _gathered(pieces: Iterable[tuple[pa.Table, _T]]) -> Iterator[tuple[pa.Table, _T]]:
    """Yield the same rows in fewer pieces, because each takes some time; with each piece goes what came last with it.

    They are neither so small that this time counts, nor so large that their columns don't fit into the CPU's caches.
    """
    kept: list[pa.Table] = []
    rows = 0
    for piece, also in pieces:
        kept.append(piece)
        rows += len(piece)
        if rows >= _GATHERED:
            yield pa.concat_tables(kept), also
            kept, rows = [], 0
    if kept:
        yield pa.concat_tables(kept), also


def _roomy(rows: int, columns: Sequence[str]) -> bool:
    """Return whether there is memory for a second thread to read, too, if so many rows are in memory at once."""
    # While a frame is made, its rows are in memory up to three times.
    return threads.roomy(3 * 8 * rows * len(columns))


def _lent(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a frame of this trace for a caller who may change it. Later versions of pandas copy what is changed only.

    pandas 2 copies all values here, unless its copy-on-write is on.
    """
    return units.attach(frame.assign())


def _clock(frame: pd.DataFrame) -> str:
    """Return the column that orders the rows of a table by time."""
    return next(str(name) for name in frame.columns if str(name).endswith("_ns"))


def _some(table: str, parts: list[str], prefix: str) -> str:
    """Return the first of a table's ``parts`` and how many others there are, after ``prefix``; empty for no parts."""
    more = f" and {fmt.plural(len(parts) - 1, 'other part')}" if len(parts) > 1 else ""
    return f"{prefix}{table}/{fmt.clean(parts[0])[:_CELL]}{more}" if parts else ""


def _no_connection(key: str) -> NotFound:
    return NotFound(f"there is no connection {key} in this capture", "Trace.summary() has the keys")


def _text(head: str, facts: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in facts)
    return "\n".join([head, *(f"  {name:<{width}}  {value}" for name, value in facts)])


def _as_text(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.astype({name: str for name, dtype in frame.dtypes.items() if isinstance(dtype, pd.CategoricalDtype)})


def _moment(value: object) -> pd.Timestamp | None:
    if not isinstance(value, str):
        return None
    moment = pd.to_datetime(value, utc=True, errors="coerce")
    return moment if isinstance(moment, pd.Timestamp) else None


def _cleaned(value: Any) -> Any:
    if isinstance(value, dict):
        return {fmt.clean(name): _cleaned(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_cleaned(inner) for inner in value]
    return fmt.clean(value) if isinstance(value, str) else value


def _shown(value: object) -> str:
    text = fmt.clean(str(value))
    return text if len(text) <= _CELL else f"{text[: _CELL - 1]}…"
