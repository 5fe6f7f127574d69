# SPDX-License-Identifier: Apache-2.0
"""A trace: a capture as DataFrames, for scripts and notebooks."""

from __future__ import annotations

import html
import os
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd

from cwndtrace import format as fmt
from cwndtrace import store
from cwndtrace.analysis import block_io as block_analysis
from cwndtrace.analysis import compare, cost, idle_cause, recovery, remedy, verdict
from cwndtrace.analysis import connections as connection_analysis
from cwndtrace.analysis.verdict import Host, Verdict
from cwndtrace.errors import NotFound, making_sense
from cwndtrace.records import arrow
from cwndtrace.store.meta import Meta

_CELL = 100  # characters of a line that came from outside
_VERDICT_NEEDS = {"cwnd_reset": "reset", "connections": "snapshot", "cwnd_recovery": "followed window"}
"""Tables without some of whose rows no verdict on the whole holds, and what a row of each is called."""


def load(path: str | os.PathLike[str], *, max_rows: int = store.MOST_ROWS) -> Trace:
    """Open the capture ``path``, also one that is still being written or was cut short.

    Raises CaptureError, with the cause and what to do, for anything that isn't one, and later for one that has more
    than ``max_rows`` rows.
    """
    return Trace(store.open_capture(path, max_rows=max_rows))


class _Units(dict[str, str]):
    """Units by column. pandas copies what is in ``attrs`` with each step of an analysis, which took a fifth of it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Units:
        return self


@dataclass(frozen=True, repr=False)
class Connection:
    """One connection of a trace; its frames are rows of the trace's. ``about`` is its row of ``Trace.summary()``."""

    about: dict[str, Any]
    resets: pd.DataFrame
    snapshots: pd.DataFrame
    recoveries: pd.DataFrame

    @property
    def verdict(self) -> Verdict:
        """Whether its resets mattered, with the evidence."""
        return Verdict(self.about["verdict"], self.about["why"])

    def facts(self) -> list[tuple[str, str]]:
        """What fits on one screen, name and value, fit for a terminal."""
        row, most = self.about, self.about["cwnd_max_segments"]
        facts = [
            ("process", _shown(fmt.process(row["comm"], row["pid"]))),
            ("congestion control", _shown(row["ca_name"])),
            ("seen", f"{row['seen_s']:,.1f} s in {fmt.plural(row['snapshots'], 'snapshot')}"),
            ("state", _shown(row["state"] or "unknown")),
            (
                "resets",
                f"{row['resets']} ({row['resets_harmful']} harmful), lost {fmt.span(row['lost_us'])} (estimated)",
            ),
            ("window", f"{row['cwnd_min_segments']} to {most} {'segment' if most == 1 else 'segments'}"),
            ("round trip, RTO", f"{fmt.span(row['srtt_us'])}, {fmt.span(row['rto_us'])}"),
            ("sent", fmt.size(row["sent_bytes"])),
        ]
        if row["resets_idle"]:
            longest = f"{fmt.span(row['idle_longest_us'])}, {row['idle_per_rto_max']:.1f} RTOs"
            facts.insert(4, ("longest idle time", longest))
        dear = self.resets[self.resets["verdict"] == "harmful"].sort_values("lost_us", ascending=False)
        facts += [("dear reset", fmt.clean(verdict.explain(each))) for each in dear.head(3).to_dict("records")]
        return [*facts, ("verdict", str(self.verdict))]

    def __repr__(self) -> str:
        return _text(f"connection {_shown(fmt.connection(self.about))}", self.facts())

    def _repr_html_(self) -> str:
        return _table(f"<b>connection</b> <code>{_escaped(fmt.connection(self.about))}</code>", self.facts())


class Trace:
    """What one capture holds.

    The frames are read when first asked for and then kept. Each begins with ``time`` (UTC) and is in order of
    time; the other columns are those of the capture's tables, whose units and descriptions are in their Parquet
    metadata, the units in ``frame.attrs["units"]`` too. Text columns are plain strings; in ``block_io``, which can have
    millions of rows, they are categories. An empty table is a frame with all its columns and no row.
    """

    def __init__(self, capture: store.Capture) -> None:
        self._capture = capture

    @property
    def path(self) -> Path:
        """The capture's directory."""
        return self._capture.shown or self._capture.path

    @cached_property
    def meta(self) -> dict[str, Any]:
        """The content of ``meta.json``, its texts clean of what could steer a terminal."""
        cleaned: dict[str, Any] = _cleaned(self._capture.meta)
        return cleaned

    @property
    def about(self) -> Meta:
        """``meta`` checked and typed: what the analyses use."""
        return self._capture.about

    @property
    def status(self) -> str:
        """``complete``, ``running``, ``interrupted`` or ``failed``."""
        return self._capture.status

    @property
    def warnings(self) -> list[str]:
        """What of what the trace kept isn't there, then what couldn't be read so far, a line each."""
        return [*self.gaps(), *self._capture.warnings]

    def gaps(self) -> list[str]:
        """Which records that the trace kept aren't in the capture, by its own account of them; a line each."""
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
                    f"{fmt.plural(partly, 'record')} of {table} lack values that an older recording doesn't have: "
                    + ", ".join(columns)
                )
            if strange := self._capture.strange(table):
                lines.append(f"what lies there isn't what the trace wrote{_some(table, strange, ': ')}")
        return lines

    def _lacking(self) -> str:
        """Why nothing can be said of the resets on the whole; empty where it can."""
        for table, kind in _VERDICT_NEEDS.items():
            lacking, kept = self._capture.missing(table)
            if lacking:
                return f"{lacking:,} of {fmt.plural(kept, kind)} are not in the capture"
            partly, columns = self._capture.partly(table)
            if partly:
                return f"{fmt.plural(partly, kind)} lack values of an older recording ({', '.join(columns)})"
        return ""

    @property
    def started_ns(self) -> int:
        """When tracing began, in ns of CLOCK_MONOTONIC: by the metadata, or else the first record."""
        if self.about.begin is not None:
            return self.about.begin.mono_ns
        frames = ((self._resets, "ts_ns"), (self._connections, "ts_ns"), (self._requests, "start_ns"))
        return min((int(f[name].min()) for f, name in frames if len(f)), default=0)

    @property
    def left_out(self) -> dict[str, int]:
        """How many ``cgroups`` and ``sockets`` of what was asked for the filter had no room for, where it was so."""
        return {kind: number for kind, number in self.about.left_out.items() if kind in ("cgroups", "sockets")}

    def lost(self, table: str) -> int:
        """Records of one of the capture's tables that the kernel or the disk lost, as far as ``meta.json`` says."""
        counts = self.about.counts or {}
        return (counts[table].lost if table in counts else 0) + self.about.unwritten.get(table, 0)

    @property
    def resets(self) -> pd.DataFrame:
        """One row a congestion-window reset, with ``connection``, the key that ``summary`` uses.

        Rows of an older recording lack the columns that it doesn't have, ``connection`` too, and are in no analysis.
        """
        return self._and_partly("cwnd_reset", self._resets)

    @property
    def connections(self) -> pd.DataFrame:
        """One row a snapshot of a connection, with the key ``connection``."""
        return self._and_partly("connections", self._connections)

    @cached_property
    @making_sense()
    def block_io(self) -> pd.DataFrame:
        """One row a finished block request, with ``device``, ``latency_us`` and ``queue_us``."""
        whole = block_analysis.with_latency(self._whole("block_io"), self.about.devices)
        return self._and_partly("block_io", whole)

    def block_columns(self, *columns: str) -> pd.DataFrame:
        """``block_io`` with these columns alone, in the same order; reads no other, and keeps nothing.

        Of what ``block_io`` adds to the capture's columns, ``device``, ``latency_us`` and ``queue_us`` may be named.
        Requests that lack one of these columns are left out. Raises KeyError for others.
        """
        known = arrow.schema("block_io").names
        needs = [name for name in known if name in columns or name == "start_ns"]
        needs += [n for column in columns if column not in known for n in block_analysis.NEEDS[column]]
        devices = self.about.devices
        pieces = self._capture.pieces("block_io", list(dict.fromkeys(needs)))
        whole = (arrow.whole(piece.to_pandas(use_threads=False), "block_io") for piece in pieces)
        frames = (block_analysis.add(frame, devices, columns) for frame in whole)
        names = tuple(dict.fromkeys(("start_ns", *columns)))
        frame = block_analysis.joined(frames, names, self._capture.rows("block_io"))
        return frame if names == columns else frame[list(columns)]

    @cached_property
    @making_sense()
    def _requests(self) -> pd.DataFrame:
        """Of each block request what the analyses use: a third of it."""
        return self.block_columns(*block_analysis.USED)

    @cached_property
    def recoveries(self) -> pd.DataFrame:
        """One row a window that was followed after its reset, with ``connection``, ``duration_us``, ``round_trips``."""
        return self._and_partly("cwnd_recovery", self._recoveries)

    @cached_property
    @making_sense()
    def _recoveries(self) -> pd.DataFrame:
        return recovery.with_duration(_as_text(self._whole("cwnd_recovery")), self._resets)

    @cached_property
    @making_sense()
    def samples(self) -> pd.DataFrame:
        """The windows on their way back, at most one row a round-trip time, with ``connection``."""
        whole = recovery.identify(_as_text(self._whole("cwnd_sample")), self._resets)
        return self._and_partly("cwnd_sample", whole)

    @making_sense()
    def costs(self) -> pd.DataFrame:
        """``resets`` with what each is predicted to have cost, and how long its window took to come back.

        The added columns are ``analysis.cost.COLUMNS`` and ``analysis.cost.MEASURED``.
        """
        return cost.predict(self._resets, self._connections, self._recoveries)

    @cached_property
    @making_sense()
    def verdicts(self) -> pd.DataFrame:
        """``costs()`` with what each reset meant and why its connection had been idle.

        The added columns are ``analysis.verdict.COLUMNS`` and ``analysis.idle_cause.COLUMNS``.
        """
        return idle_cause.with_cause(self._judged, self._requests, recorded=self.block_recorded)

    @cached_property
    @making_sense()
    def _judged(self) -> pd.DataFrame:
        """Without the causes: what the block requests, of which there may be millions, aren't read for."""
        return verdict.resets(self.costs(), self._connections)

    @property
    def block_recorded(self) -> bool:
        """Whether block I/O was traced, so that none in idle time means that there was none."""
        counts = self.about.counts
        return counts is None or "block_io" in counts or bool(self._capture.rows("block_io"))

    def summary(self) -> pd.DataFrame:
        """One row a connection; ``cwndtrace.analysis.connections.COLUMNS`` and ``verdict.CONNECTION_COLUMNS``."""
        return self._summary.copy()

    @cached_property
    @making_sense()
    def _summary(self) -> pd.DataFrame:
        rows = connection_analysis.summary(self._resets, self._connections)
        return verdict.connections(rows, self._judged, self._connections, self.about, whole=not self._lacking())

    @making_sense()
    def remedies(self, connection: str | None = None) -> pd.DataFrame:
        """What to do, best first, for all or for one ``connection``; the columns are ``analysis.remedy.COLUMNS``.

        Raises NotFound for a key that isn't in ``summary()``.
        """
        judged, rows = self._judged, self._summary
        if connection is not None:
            rows = rows[rows["connection"] == connection]
            if rows.empty:
                raise _no_connection(connection)
            judged = judged[judged["connection"] == connection]
        return remedy.remedies(judged, rows, self.about, lacking=self._lacking())

    @making_sense()
    def compare(self, after: Trace) -> pd.DataFrame:
        """What differs in a later capture, how surely and how much; the columns are ``analysis.compare.COLUMNS``."""
        return compare.compare(self._measures(), after._measures())

    def _measures(self) -> dict[str, Any]:
        span = compare.span(self.about, self._resets, self._connections)
        return dict(compare.measures(self._judged, self._connections, self._recoveries, self._requests, span))

    def connection(self, key: str) -> Connection:
        """One connection by its key in ``summary()``; raises NotFound where there is none."""
        rows = self._summary[self._summary["connection"] == key]
        if rows.empty:
            raise _no_connection(key)
        frames = (self.verdicts, self._connections, self._recoveries)
        about = {str(name): value for name, value in rows.iloc[0].to_dict().items()}
        return Connection(about, *(frame[frame["connection"] == key] for frame in frames))

    def explain(self, reset: int) -> Verdict:
        """What one reset meant, by its row in ``verdicts``; raises KeyError where there is none."""
        row = self._judged.loc[reset].to_dict()
        return Verdict(row["verdict"], verdict.explain(row))

    @making_sense()
    def audit(self) -> pd.DataFrame:
        """What each network namespace is set to, and whom that touches; the columns are ``remedy.AUDIT_COLUMNS``."""
        return remedy.audit(self._judged, self._connections, self.about)

    @making_sense()
    def host(self) -> Host:
        """What the resets cost on the whole, and whether that is the answer at all."""
        return verdict.host(self._summary, self._judged, self._lacking())

    @making_sense()
    def block_summary(self) -> pd.DataFrame:
        """One row a device and operation; the columns are ``cwndtrace.analysis.block_io.COLUMNS``."""
        return block_analysis.summary(self._requests)

    def block_submitters(self) -> pd.DataFrame:
        """One row a submitting process; the columns are ``cwndtrace.analysis.block_io.SUBMITTER_COLUMNS``."""
        return block_analysis.by_submitter(self._requests)

    def block_heat_map(self) -> pd.DataFrame:
        """How many requests of which latency began when, see ``cwndtrace.analysis.block_io.heat_map``."""
        return block_analysis.heat_map(self._requests)

    @cached_property
    @making_sense()
    def _identified(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        resets, connections = (_as_text(self._whole(name)) for name in ("cwnd_reset", "connections"))
        # Older recordings have rows of what is left of closed connections, which has no window and no round trip.
        connections = connections[connections["cwnd"] > 0].reset_index(drop=True)
        return connection_analysis.identify(resets, connections)

    @property
    def _resets(self) -> pd.DataFrame:
        return self._identified[0]

    @property
    def _connections(self) -> pd.DataFrame:
        return self._identified[1]

    def _whole(self, table: str) -> pd.DataFrame:
        """The rows of a table that the analyses can do with: those with all that they need."""
        return arrow.whole(self._frame(table), table)

    def _and_partly(self, table: str, whole: pd.DataFrame) -> pd.DataFrame:
        """``whole``, and the rows that lack something, at their times; what is computed is missing in these."""
        if not self._capture.partly(table)[0]:
            return whole
        frame = self._frame(table)
        partly = frame[frame[arrow.needed(table)].isna().any(axis=1)]
        both = pd.concat([whole, partly]).sort_values(_clock(frame), kind="stable", ignore_index=True)
        both.attrs.update(frame.attrs)
        return both

    def _frame(self, table: str) -> pd.DataFrame:
        # Not what a stranger or a later version added: it might take the name of what is computed here.
        rows = arrow.clean_texts(self._capture.table(table, arrow.schema(table).names))
        told = _Units(
            {f.name: f.metadata[b"unit"].decode() for f in rows.schema if f.metadata and b"unit" in f.metadata}
        )
        frame: pd.DataFrame = rows.to_pandas(use_threads=False)  # as store.files.read
        frame = frame.sort_values(_clock(frame), kind="stable", ignore_index=True)
        frame.attrs["units"] = told
        return frame

    def __repr__(self) -> str:
        return _text(f"cwndtrace capture {_shown(self.path)} ({self.status})", self.facts())

    def _repr_html_(self) -> str:
        caption = f"<b>cwndtrace capture</b> <code>{_escaped(self.path)}</code> ({_escaped(self.status)})"
        return _table(caption, self.facts())

    def facts(self) -> list[tuple[str, str]]:
        """What fits on one screen, name and value, fit for a terminal."""
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
        if steps := self._steps():
            facts.append(("clock", f"stepped by {', '.join(f'{step:+,.3f} s' for step in steps[:5])}; suspends count"))
        if about.unchanged:
            facts.append(("unchanged", f"{fmt.plural(about.unchanged, 'idle restart')} left the window as it was"))
        probes = ", ".join(f"{reason}: {probe or 'none'}" for reason, probe in about.probes.items())
        facts.append(("probes", _shown(probes)))
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
        begin = f"from {started:%Y-%m-%d %H:%M:%S} UTC"
        if ended is None:
            return begin
        lasted = (ended - started).total_seconds()
        if self.about.begin and self.about.end:
            # The wall clock may have been stepped.
            lasted = (self.about.end.mono_ns - self.about.begin.mono_ns) / 1e9
        return f"{begin} to {ended:%H:%M:%S}, {lasted:,.1f} s"

    def _steps(self) -> list[float]:
        """By how many seconds the wall clock was stepped, each time."""
        return [(after - before) / 1e9 for before, after in pairwise(self.about.utc_offsets_ns)]


def _clock(frame: pd.DataFrame) -> str:
    """The column by which the rows of a table are in order."""
    return next(str(name) for name in frame.columns if str(name).endswith("_ns"))


def _some(table: str, parts: list[str], before: str) -> str:
    """The first of some parts of a table, and how many more there are; nothing where there is none."""
    more = f" and {fmt.plural(len(parts) - 1, 'other part')}" if len(parts) > 1 else ""
    return f"{before}{table}/{fmt.clean(parts[0])[:_CELL]}{more}" if parts else ""


def _no_connection(key: str) -> NotFound:
    return NotFound(f"there is no connection {key} in this capture", "Trace.summary() has the keys")


def _text(head: str, facts: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in facts)
    return "\n".join([head, *(f"  {name:<{width}}  {value}" for name, value in facts)])


def _table(caption: str, facts: list[tuple[str, str]]) -> str:
    rows = "".join(
        f"<tr><th style='text-align:left'>{_escaped(name)}</th><td style='text-align:left'>{_escaped(value)}</td></tr>"
        for name, value in facts
    )
    return f"<div>{caption}<table>{rows}</table></div>"


def _escaped(value: object) -> str:
    return html.escape(_shown(value))


def _as_text(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.astype({name: str for name, kind in frame.dtypes.items() if isinstance(kind, pd.CategoricalDtype)})


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
