# SPDX-License-Identifier: Apache-2.0
"""The metrics: their names, units and labels, and how a snapshot of them is held.

Names and units are OpenTelemetry's; ``Family.prometheus`` follows from them by the conventions of both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

_SUFFIXES: Final = {"s": "_seconds", "By": "_bytes", "1": "_ratio"}


@dataclass(frozen=True)
class Family:
    """One metric. ``edges`` are the upper edges of a histogram's buckets, without the infinite one."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    edges: tuple[float, ...] = ()

    @property
    def prometheus(self) -> str:
        """The name in Prometheus, without the ``_total`` of a counter."""
        return self.name.replace(".", "_") + _SUFFIXES.get(self.unit, "")


@dataclass(frozen=True)
class Buckets:
    """The counts of a histogram's buckets, each without those below it, the infinite one last, and the values' sum."""

    counts: tuple[int, ...]
    sum: float


Series = dict[tuple[str, ...], float | Buckets]
"""The value for each combination of labels."""
Snapshot = dict[Family, Series]
"""All metrics at one moment."""

_BY_CAUSE: Final = ("cause", "verdict", "workload")
_BY_DEVICE: Final = ("device", "operation")

RESETS: Final = Family(
    "cwndtrace.resets",
    "counter",
    "{reset}",
    "Congestion windows that fell at once.",
    ("reason", "probe", "workload"),
)
JUDGED: Final = Family(
    "cwndtrace.judged_resets",
    "counter",
    "{reset}",
    "Resets whose bursts have ended, by the cause of the idle time and the verdict.",
    _BY_CAUSE,
)
COST: Final = Family(
    "cwndtrace.reset.cost",
    "counter",
    "s",
    "Time by which windows after resets delayed what was sent, measured, of resets whose bursts have ended.",
    _BY_CAUSE,
)
IDLE: Final = Family(
    "cwndtrace.reset.idle",
    "histogram",
    "s",
    "Idle time that ended in an idle reset.",
    edges=(0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800),
)
WINDOW: Final = Family(
    "cwndtrace.reset.window",
    "histogram",
    "1",
    "Congestion window after a reset, as a share of the one before.",
    ("reason",),
    (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9),
)
CONNECTIONS: Final = Family(
    "cwndtrace.connections", "gauge", "{connection}", "TCP connections in the last snapshot of those that are traced."
)
EXEMPT: Final = Family(
    "cwndtrace.connections_exempt",
    "gauge",
    "{connection}",
    "Of these, those whose congestion control is exempt from idle resets.",
)
BUSY: Final = Family(
    "cwndtrace.connection.busy",
    "counter",
    "s",
    "Time with data queued or unacknowledged, summed over connections, from their snapshots.",
)
IDLE_SYSCTL: Final = Family(
    "cwndtrace.slow_start_after_idle",
    "gauge",
    "",
    "net.ipv4.tcp_slow_start_after_idle in the traced network namespace, by default the host's.",
)
REQUESTS: Final = Family("cwndtrace.block.requests", "counter", "{request}", "Finished block requests.", _BY_DEVICE)
BYTES: Final = Family("cwndtrace.block.io", "counter", "By", "Bytes of finished block requests.", _BY_DEVICE)
ERRORS: Final = Family(
    "cwndtrace.block.errors", "counter", "{request}", "Block requests that finished with an error.", _BY_DEVICE
)
LATENCY: Final = Family(
    "cwndtrace.block.latency",
    "histogram",
    "s",
    "Time of block requests from entering the block layer to completion; the edges are exact to one percent.",
    _BY_DEVICE,
    (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5),
)
KEPT: Final = Family(
    "cwndtrace.records.kept", "counter", "{record}", "Records that the trace kept, by table of the capture.", ("event",)
)
LOST: Final = Family(
    "cwndtrace.records.lost", "counter", "{record}", "Records that the kernel couldn't hand over.", ("event",)
)
DROPPED: Final = Family(
    "cwndtrace.output.dropped",
    "counter",
    "{line}",
    "Lines that weren't printed, because they came too fast for the output.",
)
STARTUP: Final = Family(
    "cwndtrace.startup", "gauge", "s", "Time from the start of the command until tracing had begun."
)
BUILD: Final = Family("cwndtrace.build_info", "gauge", "", "1, with the version of cwndtrace.", ("version",))

FAMILIES: Final = (
    *(RESETS, JUDGED, COST, IDLE, WINDOW, CONNECTIONS, EXEMPT, BUSY, IDLE_SYSCTL),
    *(REQUESTS, BYTES, ERRORS, LATENCY, KEPT, LOST, DROPPED, STARTUP, BUILD),
)
"""All metrics, in the order in which they are shown."""
