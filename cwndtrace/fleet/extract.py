# SPDX-License-Identifier: Apache-2.0
"""One capture as the small frames that a fleet is put together from."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import pandas as pd

from cwndtrace.analysis import compare, groups
from cwndtrace.analysis.histogram import LatencyHistogram
from cwndtrace.errors import CwndtraceError, making_sense
from cwndtrace.fleet import tables
from cwndtrace.fleet.tables import Frames
from cwndtrace.format import clean
from cwndtrace.records import arrow
from cwndtrace.store.layout import META
from cwndtrace.store.reader import read_errors
from cwndtrace.trace import Trace, load

MOST_ROWS: Final = 20_000_000
"""The most rows of one capture, which bounds the memory of a worker to about 2 GB."""

_WARNINGS: Final = 5
_LONGEST_S: Final = 1e9
"""The longest time, 31 years, that a capture may say it lasted or its clock was moved by. Arithmetic on the times of
all captures fails at a longer one, and one capture must not end the report of the others."""
_UNNAMED: Final = "unknown"


def extract(path: Path, host: str, name: str, *, max_rows: int = MOST_ROWS) -> Frames:
    """Return the frames of the capture ``path``, by the analyses of ``cwndtrace report``.

    ``host`` is the host's name, empty to take that of the capture, and ``name`` what the capture is called in the
    result. A capture that can't be read has a row in ``captures`` with the reason, and no other row.
    """
    try:
        return _extract(load(path, max_rows=max_rows), host, name)
    except CwndtraceError as error:
        return failed(host, name, error)
    except read_errors() as error:
        return failed(host, name, CwndtraceError(f"It can't be read: {clean(str(error))}.", "Copy it again."))


def failed(host: str, name: str, error: CwndtraceError) -> Frames:
    """Return the frames of a capture that can't be read."""
    row = dict.fromkeys(tables.COLUMNS["captures"])
    numbers = {column: 0 for column, (kind, _) in tables.COLUMNS["captures"].items() if kind == "count"}
    texts = {column: "" for column, (kind, _) in tables.COLUMNS["captures"].items() if kind == "text"}
    reason = f"{error.cause} {error.remedy}".strip()
    told = {"status": "failed", "reason": clean(reason), "whole": False}
    row |= numbers | texts | told | _key(host, name)
    return Frames(
        tables.conform("captures", pd.DataFrame([row])),
        *(tables.empty(each) for each in ("connections", "workloads", "devices", "settings")),
    )


def _key(host: str, name: str) -> dict[str, str]:
    return {"host": clean(host)[: tables.MOST_TEXT] or _UNNAMED, "capture": clean(name)[: tables.MOST_TEXT]}


@making_sense()
def _extract(trace: Trace, host: str, name: str) -> Frames:
    key = _key(host or trace.about.host, name)
    shared: dict[str, Any] = key | {"kernel": trace.about.kernel}
    connections = trace.summary()
    found = {
        "connections": connections.assign(network=groups.networks(connections["daddr"], tables.NETWORK)),
        "workloads": trace.groups("service"),
        "devices": _devices(trace),
        "settings": _settings(trace),
    }
    frames = {name: tables.conform(name, rows.assign(**shared)) for name, rows in found.items()}
    # The warnings are complete only now that all tables have been read.
    about = pd.DataFrame([shared | _about(trace, connections)])
    return Frames(captures=tables.conform("captures", about), **frames)


def _about(trace: Trace, connections: pd.DataFrame) -> dict[str, Any]:
    about = trace.about
    absent = sum(trace.absent(table) for table in arrow.TABLES)
    lost = sum(trace.lost(table) for table in arrow.TABLES)
    started, ended = (_moment(text) for text in (about.started, about.ended))
    modified = _modified(trace.path / META)
    return {
        "status": "ok",
        "reason": "",
        "version": about.version,
        "state": trace.status,
        "started": started,
        "ended": ended,
        "seconds": _seconds(trace),
        "connections": len(connections),
        **{column: connections[column].sum() for column in ("resets", "resets_harmful", "resets_unknown")},
        **{column: connections[column].sum() for column in ("lost_us", "predicted_us")},
        "lost_records": lost,
        "absent_records": absent,
        "whole": trace.status == "complete" and not lost and not trace.gaps(),
        "warnings": "; ".join(trace.warnings[:_WARNINGS]),
        "verdict": trace.host().verdict,
        "can_see_idle": bool(about.probes.get("idle")) if about.probes else None,
        "clock_steps": sum(before != after for before, after in pairwise(about.utc_offsets_ns)),
        "clock_shift_s": _shift_s(trace),
        "modified": modified,
        "ahead_s": (ended - modified).total_seconds() if ended is not None and modified is not None else None,
        "boot_id": boot if isinstance(boot := trace.meta.get("boot_id"), str) else "",
        "begin_ns": about.begin.mono_ns if about.begin else None,
        "end_ns": about.end.mono_ns if about.end else None,
        "filters": ", ".join(f"{name}={value}" for name, value in sorted(about.filters.items())),
    }


def _seconds(trace: Trace) -> float | None:
    """Return for how long it traced, in seconds.

    None without a beginning, without an end and records, and for an impossible time.
    """
    begin, end = trace.about.begin, trace.about.end
    if begin is None or (end is None and trace.resets.empty and trace.connections.empty):
        return None
    if end is not None:
        return _possible((end.mono_ns - begin.mono_ns) / 1e9)
    first, last = compare.span(trace.about, trace.resets, trace.connections)
    return _possible(last - first)


def _possible(seconds: float) -> float | None:
    return seconds if 0 <= seconds <= _LONGEST_S else None


def _shift_s(trace: Trace) -> float | None:
    """Return by how much the offset to UTC changed while it traced, in seconds; None where no possible one is known."""
    begin, end = trace.about.begin, trace.about.end
    if begin is None or end is None or begin.utc_offset_ns is None or end.utc_offset_ns is None:
        return None
    shift = (end.utc_offset_ns - begin.utc_offset_ns) / 1e9
    return shift if abs(shift) <= _LONGEST_S else None


def _moment(text: str | None) -> pd.Timestamp | None:
    moment = pd.to_datetime(text or "", utc=True, errors="coerce")
    return moment if isinstance(moment, pd.Timestamp) else None


def _modified(file: Path) -> pd.Timestamp | None:
    try:
        return pd.Timestamp(file.lstat().st_mtime_ns // 1000, unit="us", tz="UTC")
    except (OSError, ValueError):
        return None


def _devices(trace: Trace) -> pd.DataFrame:
    """Return ``block_summary`` with a histogram of each row, which can be added to that of another capture."""
    rows = trace.block_summary()
    requests = trace.block_columns("device", "op", "latency_us")
    histograms: dict[tuple[str, str], LatencyHistogram] = {}
    for pair, latencies in requests.groupby(["device", "op"], observed=True)["latency_us"]:
        histogram = histograms.setdefault((str(pair[0]), str(pair[1])), LatencyHistogram())
        histogram.add(latencies.to_numpy())
    packed = [histograms[device, op].pack() for device, op in zip(rows["device"], rows["op"], strict=True)]
    return rows.assign(latency_histogram=pd.Series(packed, index=rows.index, dtype="str"))


def _settings(trace: Trace) -> pd.DataFrame:
    rows = trace.audit().rename(columns={"host": "of_host"})
    spaces = {int(inode): each for inode, each in trace.about.namespaces.items() if inode.isdigit()}
    known = [spaces.get(inode) for inode in rows["netns_ino"]]
    return rows.assign(
        new=pd.array([each.new if each else None for each in known], dtype="boolean"),
        congestion_control=pd.Series([(each and each.congestion_control) or "" for each in known], dtype="str"),
        congestion_control_end=pd.Series([(each and each.congestion_control_end) or "" for each in known], dtype="str"),
    )
