# SPDX-License-Identifier: Apache-2.0
"""The content of a report: the answer, its evidence, and caveats about missing records."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Final

import pandas as pd

from cwndtrace import format as fmt
from cwndtrace.analysis import direction, idle_cause, recovery, threads
from cwndtrace.analysis import groups as group_analysis
from cwndtrace.errors import making_sense
from cwndtrace.present import groups as groups_in_words
from cwndtrace.present import text as in_words
from cwndtrace.present.direction import elsewhere
from cwndtrace.present.text import Host
from cwndtrace.records import arrow
from cwndtrace.trace import Trace

RESETS: Final = ("cwnd_reset", "cwnd_recovery", "connections")
RESET: Final = (
    *("time", "connection", "saddr", "sport", "daddr", "dport", "comm", "reason", "idle_us", "rto_us", "srtt_us"),
    *("cwnd_before", "cwnd_after", "chain", "chain_window", "chain_resets", "burst_bytes", "bursts", "waiting_bytes"),
    *("outcome", "verdict", "lost_us", "predicted_us"),
    *("cause", "peer_us", "disk_us", "application_us", "disk_device"),
)
"""The columns of ``Trace.verdicts`` that JSON has of each reset."""


@dataclass(frozen=True)
class Report:
    """The content of a report: frames of a Trace as its methods return them, and ``caveats``.

    Those of ``missing`` are on records that the trace kept and the capture doesn't have; they are shown before all
    else. The others are ``limits`` of the rest. ``groups`` are grouped ``by``; ``grouped`` says that a table of them
    tells the reader something.
    """

    trace: Trace
    host: Host
    connections: pd.DataFrame
    groups: pd.DataFrame
    by: str
    grouped: bool
    resets: pd.DataFrame
    chains: pd.DataFrame
    causes: pd.DataFrame
    devices: pd.DataFrame
    remedies: pd.DataFrame
    due: pd.DataFrame
    heartbeats: pd.DataFrame
    audit: pd.DataFrame
    caveats: dict[str, list[str]]

    @cached_property
    def processes(self) -> pd.DataFrame:
        """``Trace.block_submitters()``, for which all block requests are read: the screen doesn't show it."""
        return self.trace.block_submitters()

    @cached_property
    def owners(self) -> pd.DataFrame:
        """``Trace.block_owners()``, of which the same is true."""
        return self.trace.block_owners()


def report(trace: Trace, by: str | None = None, prefix: tuple[int, int] = group_analysis.PREFIX) -> Report:
    """Return the report on a capture.

    ``by`` and ``prefix`` are those of ``Trace.groups``. Without ``by``, connections are grouped by service, and only
    where that tells something.
    """
    resets, devices = threads.each([lambda: trace.verdicts, trace.block_summary])
    connections = trace.summary()
    groups = trace.groups(by or "service", prefix)
    return Report(
        trace=trace,
        host=trace.host(),
        connections=connections,
        groups=groups,
        by=by or "service",
        grouped=groups_in_words.telling(groups) if by is None else by != "connection" and len(groups) > 0,
        resets=resets,
        chains=recovery.chains(resets),
        causes=idle_cause.summary(resets),
        devices=devices,
        remedies=trace.remedies(),
        due=trace.due(),
        heartbeats=trace.heartbeats(),
        audit=trace.audit(),
        caveats=_caveats(trace, connections),
    )


def _caveats(trace: Trace, connections: pd.DataFrame) -> dict[str, list[str]]:
    gaps = trace.gaps()
    limits = [*_direction(connections), *(f"{line}." for line in trace.warnings if line not in gaps)]
    if trace.about.kept_from is not None:
        limits.append(f"{in_words.window(trace.about)}.")
    if trace.status != "complete":
        limits.append(f"The capture is {trace.status}: records that it had not yet written are missing.")
    for kind, number in trace.left_out.items():
        line = fmt.left_out(kind, number)
        limits.append(f"{line[0].upper()}{line[1:]}.")
    unseen = [reason for reason, probe in trace.about.probes.items() if not probe]
    if unseen:
        limits.append(f"Resets of reason {', '.join(unseen)} couldn't be seen on this kernel.")
    lost = {name: trace.lost(name) for name in arrow.TABLES}
    limits += [f"{fmt.lost(lost[name], 'record', name)}, so figures may be too low." for name in RESETS if lost[name]]
    if lost["block_io"]:
        limits.append(
            f"{fmt.lost(lost['block_io'], 'block request')}, so figures may be too low, and more of the idle time may "
            "have been the disk's than is shown."
        )
    if trace.about.guessed:
        limits.append(f"{fmt.guessed(trace.about.guessed)}.")
    if number := trace.named_by_namespace:
        limits.append(
            f"This host has cgroup v1, where containers need not have a cgroup v2 of their own: the workload of "
            f"{fmt.plural(number, 'connection')} is inferred from the network namespace."
        )
    if not trace.block_recorded:
        limits.append(
            "Block I/O wasn't recorded, so a disk can't be told from the application as the cause of idle time."
        )
    return {"missing": [f"{line}." for line in gaps], "limits": limits}


def _direction(connections: pd.DataFrame) -> list[str]:
    """Return sentences on the connections whose windows are kept at an end that isn't in the capture."""
    receivers = connections[direction.sender_elsewhere(connections)].to_dict("records")
    lines = [elsewhere(receivers, len(connections))] if receivers else []
    little = int(direction.may_receive(connections).sum())
    if little:
        lines.append(
            "The capture doesn't say how much its connections received, so it can't tell whether the sender is the "
            f"other end of the {little:,} of {fmt.plural(len(connections), 'connection')} that sent less than "
            f"{fmt.size(direction.LEAST_BYTES)}."
        )
    return lines


@making_sense()
def as_json(found: Report) -> dict[str, Any]:
    """Return the report as one object for JSON: missing figures are null, times are ISO 8601 in UTC.

    Raises CaptureError if the rows contradict each other.
    """
    about = found.trace.about
    why = [in_words.reset(row) for row in found.resets.to_dict("records")]
    frames = {
        "groups": found.groups,
        "connections": _timed(found.connections, "first_seen", "last_seen"),
        "resets": _timed(found.resets[[*RESET]], "time").assign(row=found.resets.index, why=why),
        "chains": found.chains,
        "causes": found.causes,
        "block_io_by_device": found.devices,
        "block_io_by_process": found.processes,
        "block_io_by_workload": found.owners,
        "remedies": found.remedies,
        "due": found.due,
        "heartbeats": found.heartbeats,
        "namespaces": found.audit,
    }
    return {
        "event": "report",
        "time": about.ended or about.started,
        "capture": str(found.trace.path),
        "status": found.trace.status,
        "answer": {name: _plain(value) for name, value in asdict(found.host).items()},
        "grouped_by": found.by,
        "caveats": [line for lines in found.caveats.values() for line in lines],
        **{name: records(frame) for name, frame in frames.items()},
    }


def _timed(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
    return frame.assign(**{name: frame[name].map(pd.Timestamp.isoformat) for name in columns})


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return one dict per row, with None for missing values."""
    return [{str(name): _plain(value) for name, value in row.items()} for row in frame.to_dict("records")]


def _plain(value: Any) -> Any:
    return None if value is pd.NA or (isinstance(value, float) and not math.isfinite(value)) else value
