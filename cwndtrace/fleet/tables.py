# SPDX-License-Identifier: Apache-2.0
"""The tables of a fleet: their columns, and how they become Parquet and frames.

Every table begins with ``host`` and ``capture``, which together name one capture of a result.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Final

import pandas as pd
import pyarrow as pa

from cwndtrace.analysis import block_io, connections, groups, units, verdict

UTC: Final = pa.timestamp("us", tz="UTC")
MOST_TEXT: Final = 1000
"""The most characters of a text. Longer ones are cut: a capture may be hostile, and the frames of all are combined."""

NETWORK: Final = (24, 64)
"""The bits of an IPv4 and of an IPv6 address that one ``network`` shares."""

_KEY: Final = {
    "host": ("text", "the host's name: by a folder host=NAME, else by the capture itself"),
    "capture": ("text", "the capture's path below the place where it was found"),
}
KEY: Final = list(_KEY)
"""The columns that together name one capture."""

_CAPTURES: Final = {
    **_KEY,
    "status": ("text", "ok, or failed for a capture that couldn't be read"),
    "reason": ("text", "why it couldn't be read, and what to do; empty for ok"),
    "kernel": ("text", "release of the host's kernel; empty where unknown"),
    "version": ("text", "version of cwndtrace that wrote it; empty where unknown"),
    "state": ("text", "complete, running, interrupted or failed: how the trace ended"),
    "started": ("UTC", "when it started, by the host's clock; missing where unknown"),
    "ended": ("UTC", "when it ended, by the host's clock; missing where it runs or was cut short"),
    "seconds": (
        "float",
        "for how long it traced, s, by a clock that is never set: until its last record where it "
        "was cut short; missing where unknown",
    ),
    "connections": ("count", "number of connections"),
    "resets": ("count", "number of resets"),
    "resets_harmful": ("count", "of these, those that were harmful"),
    "resets_unknown": ("count", "of these, those of which the cost isn't known"),
    "lost_us": ("float", "cost of the resets, sum, us, measured; without those that aren't known"),
    "predicted_us": ("float", "cost of the resets that aren't known, sum, us, estimated"),
    "lost_records": ("count", "records that the kernel or the disk lost while it traced"),
    "absent_records": ("count", "records that the trace kept and the capture doesn't have, or that lack values"),
    "whole": ("flag", "true if the trace ended in order, lost no record, and all that it kept is there"),
    "warnings": ("text", "the first lines of Trace.warnings, separated by semicolons"),
    "verdict": ("text", "one of analysis.verdict.VERDICTS for the whole capture"),
    "can_see_idle": ("flag", "true if a probe saw idle resets; missing where the capture doesn't say"),
    "clock_steps": ("count", "steps of the host's wall clock while it traced, suspends included"),
    "clock_shift_s": ("float", "by how much the wall clock moved against one that is never set, s; missing if unknown"),
    "modified": ("UTC", "modification time of its meta.json, by the clock of where it is stored; missing if unknown"),
    "ahead_s": ("float", "by how much it ended after that time, s: by more than 0, the clocks don't agree"),
    "boot_id": ("text", "the kernel's id of the host's boot; empty where unknown"),
    "begin_ns": ("float", "from when on it is complete, ns of CLOCK_MONOTONIC of that boot; missing where unknown"),
    "end_ns": ("float", "when it ended, by the same clock; missing where unknown"),
    "filters": ("text", "the filters of the trace, NAME=VALUE; empty for none"),
}
_SHARED: Final = {**_KEY, "kernel": _CAPTURES["kernel"]}
_NETWORK: Final = {
    "network": ("text", f"the remote address's network, /{NETWORK[0]} for IPv4 and /{NETWORK[1]} for IPv6"),
}
_HISTOGRAM: Final = {
    "latency_histogram": ("histogram", "what LatencyHistogram.pack() of analysis.histogram gives; its join() adds it"),
}
_SETTINGS: Final = {
    **_SHARED,
    "netns_ino": ("id", "inode of the network namespace"),
    "name": ("text", "its name in ip netns, this for the one that cwndtrace ran in, or a process in it"),
    "of_host": ("flag", "whether it is the namespace of process 1"),
    "new": ("flag", "whether it wasn't there yet when the capture began"),
    "slow_start_after_idle": ("setting", "tcp_slow_start_after_idle when the capture began; missing where unknown"),
    "slow_start_after_idle_end": ("setting", "the same when the capture ended"),
    "congestion_control": ("text", "tcp_congestion_control when the capture began; empty where unknown"),
    "congestion_control_end": ("text", "the same when the capture ended"),
    "live": ("count", "connections in the namespace's last snapshot"),
    "touched": ("count", "of these, those that slow_start_after_idle affects"),
    "resets": ("count", "idle resets recorded in it"),
    "lost_us": ("float", "cost of its resets, us, measured"),
}
_TYPES: Final = {
    "text": pa.string(), "UTC": UTC, "float": pa.float64(), "count": pa.int64(),
    "flag": pa.bool_(), "id": pa.int64(), "setting": pa.int64(), "cookie": pa.uint64(),
    "histogram": pa.string(),
}  # fmt: skip
_DTYPES: Final = {
    "text": "str", "UTC": "datetime64[us, UTC]", "float": "float64", "count": "int64", "flag": "boolean",
    "id": "int64", "setting": "Int64", "cookie": "uint64", "histogram": "str",
}  # fmt: skip
_UNITS: Final = {
    "text": "text",
    "texts": "text",
    "UTC": "UTC",
    "flag": "true or false",
    "id": "id",
    "setting": "sysctl",
}
_FLOATS: Final = frozenset(
    {"seen_s", "bytes_received", "received_bytes", "idle_per_rto_p50", "idle_per_rto_max", "rtt_us", "busy_us"}
    | {"lost_us", "predicted_us", "worst_us"}
)


def _kind(name: str) -> str:
    """Return the kind of a column that an analysis made."""
    unit = units.of(name)
    if name in ("first_seen", "last_seen"):
        return "UTC"
    if name == "sock_cookie":
        return "cookie"
    if unit == "true or false":
        return "flag"
    if name in ("saddr", "daddr", "comm", "ca_name", "state", "op") or unit in ("text", "key"):
        return "text"
    is_latency = name.startswith(("latency_", "queue_", "service_p")) and name.endswith("_us")
    return "float" if name in _FLOATS or name.endswith("_share") or is_latency else "count"


def _kinds(*analyses: dict[str, str]) -> dict[str, tuple[str, str]]:
    return {name: (_kind(name), text) for analysis in analyses for name, text in analysis.items()}


_GROUPS: Final = {name: text for name, text in groups.COLUMNS.items() if name not in ("peer", "connection")}
_WHY: Final = {"why": "the evidence for the verdict, in words"}
COLUMNS: Final[dict[str, dict[str, tuple[str, str]]]] = {
    "captures": _CAPTURES,
    "connections": _SHARED | _NETWORK | _kinds(connections.COLUMNS, verdict.CONNECTION_COLUMNS, _WHY),
    "workloads": _SHARED | _kinds(_GROUPS),
    "devices": _SHARED | _kinds(block_io.COLUMNS) | _HISTOGRAM,
    "settings": _SETTINGS,
}
"""The columns of each table, in order: their kind, and what they mean, with the unit."""


@dataclass(frozen=True)
class Frames:
    """The tables of one capture, or of many: DataFrames with the columns of ``COLUMNS``.

    ``captures`` has one row per capture, ``connections`` one per connection, ``workloads`` one per service of a
    workload, ``devices`` one per device and operation, and ``settings`` one per network namespace.
    """

    captures: pd.DataFrame
    connections: pd.DataFrame
    workloads: pd.DataFrame
    devices: pd.DataFrame
    settings: pd.DataFrame

    def named(self) -> dict[str, pd.DataFrame]:
        """Return the frames by the names of their tables."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _unit(name: str, kind: str) -> str:
    return _UNITS.get(kind) or units.of(name) or "count"


def schema(name: str) -> pa.Schema:
    """Return the Arrow schema of a table; its fields have a ``unit`` and a ``description``. Raises KeyError."""
    return pa.schema(
        [
            pa.field(column, _TYPES[kind], metadata={"unit": _unit(column, kind), "description": text})
            for column, (kind, text) in COLUMNS[name].items()
        ],
        metadata={"table": f"fleet {name}"},
    )


def conform(name: str, rows: pd.DataFrame) -> pd.DataFrame:
    """Return ``rows`` with the columns of a table, in their order and with their types, and texts of bounded length.

    ``attrs["units"]`` has the unit of each column. Raises KeyError for a column that is lacking, and ValueError or
    TypeError for values of another type.
    """
    columns = COLUMNS[name]
    out = rows[list(columns)].astype({column: _DTYPES[kind] for column, (kind, _) in columns.items()})
    texts = {column: out[column].str.slice(0, MOST_TEXT) for column, (kind, _) in columns.items() if kind == "text"}
    out = out.assign(**texts).reset_index(drop=True)
    out.attrs["units"] = units.Units({column: _unit(column, kind) for column, (kind, _) in columns.items()})
    return out


def empty(name: str) -> pd.DataFrame:
    """Return a table without a row."""
    return conform(name, pd.DataFrame({column: [] for column in COLUMNS[name]}))


def to_arrow(name: str, frame: pd.DataFrame) -> pa.Table:
    """Return a frame of ``conform`` as Arrow. Raises the errors of pyarrow."""
    table = pa.Table.from_pandas(frame, schema=schema(name), preserve_index=False)
    return table.replace_schema_metadata(schema(name).metadata)


def to_frame(name: str, table: pa.Table) -> pd.DataFrame:
    """Return the frame that ``to_arrow`` was given. Raises KeyError, ValueError or the errors of pyarrow."""
    columns = table.select(list(COLUMNS[name])).cast(schema(name))
    kinds: dict[Any, Any] = {pa.bool_(): pd.BooleanDtype()}
    if any(kind == "setting" for kind, _ in COLUMNS[name].values()):
        kinds[pa.int64()] = pd.Int64Dtype()
    return conform(name, columns.to_pandas(types_mapper=kinds.get))


def combined(name: str, frames: list[pd.DataFrame]) -> pd.DataFrame:
    """Return the rows of several frames of one table, in order of host, capture and their order in it."""
    rows = [frame for frame in frames if len(frame)]
    if not rows:
        return empty(name)
    both = pd.concat(rows, ignore_index=True)
    return conform(name, both.sort_values(KEY, kind="stable", ignore_index=True))
