# SPDX-License-Identifier: Apache-2.0
"""What a fleet's resets cost, by what people have a name for, and what limits these figures.

All figures are sums over the rows of the captures, so they add up to those of the captures' own reports.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

import pandas as pd

from cwndtrace.analysis import groups
from cwndtrace.fleet import change as changes
from cwndtrace.fleet import clocks as clock_findings
from cwndtrace.fleet import differences
from cwndtrace.fleet.tables import KEY, Frames

BY: Final = {
    "service": groups.BY["service"],
    "workload": groups.BY["workload"],
    "host": ("host",),
    "peer": groups.BY["peer"],
    "kernel": ("kernel",),
}
"""The ways to group the connections of a fleet, each with the columns in which those of one group agree."""

COLUMNS: Final = {
    **{name: groups.COLUMNS[name] for name in ("workload", "service", "outgoing", "process", "peer")},
    "host": "name of the host",
    "kernel": "release of the kernel; empty where unknown",
    "hosts": "number of hosts",
    "connections": "number of connections; one that several captures show counts once in each of them",
    "resets": "number of resets of their windows",
    "resets_harmful": "of these, those that were harmful",
    "resets_unknown": "of these, those of which the cost isn't known",
    "lost_us": "cost of these resets, sum, us, measured; without those that aren't known",
    "predicted_us": "cost of those that aren't known, sum, us, estimated",
    "busy_us": "busy time (data queued or unacknowledged) of the connections, sum, us; missing where that of "
    "one is unknown",
    "traced_s": "length of the captures that show such a connection, sum, s, of those whose length is known",
    "lost_rate_us": "cost per second of these captures, us, measured; missing where no length is known",
    "worst": "the hosts that lost most, at most WORST of them: host, lost_us",
    "verdict": groups.COLUMNS["verdict"],
    "verdict_connections": groups.COLUMNS["verdict_connections"],
}
"""The columns of ``cost``. Of the first seven there are only those of ``BY``."""

WORST: Final = 3
"""The most hosts that a group names."""

_SUMS: Final = ["resets", "resets_harmful", "resets_unknown", "lost_us", "predicted_us"]
_OF_POD: Final = re.compile(r"([^/]+)/[^/]+/([^/]+)")


@dataclass(frozen=True)
class FleetReport:
    """The content of a fleet's report.

    ``costs`` has the result of ``cost`` for each of ``BY``. ``settings`` is that of ``differences.differing``, and
    ``clocks`` that of ``clocks.findings``. With a date ``since``, ``change`` is the result of ``change.change`` for
    groups ``by``, else None, and ``captures`` have a column ``side``, see ``clocks.sides``.
    """

    captures: pd.DataFrame
    connections: pd.DataFrame
    by: str
    costs: dict[str, pd.DataFrame]
    settings: pd.DataFrame
    clocks: clock_findings.ClockFindings
    since: pd.Timestamp | None
    change: pd.DataFrame | None

    @property
    def read(self) -> pd.DataFrame:
        """The rows of the captures that could be read."""
        return self.captures[self.captures["status"] == "ok"]

    @property
    def failed(self) -> pd.DataFrame:
        """The rows of the captures that couldn't be read."""
        return self.captures[self.captures["status"] != "ok"]


def report(
    frames: Frames,
    by: str = "service",
    since: pd.Timestamp | None = None,
    prefix: tuple[int, int] = groups.PREFIX,
) -> FleetReport:
    """Return the report of a fleet. ``by`` is one of ``BY``, and ``prefix`` that of ``analysis.groups``.

    Raises ValueError for another ``by`` or ``prefix``.
    """
    if by not in BY:
        raise ValueError(f"by is one of {', '.join(BY)}, not {by!r}")
    captures = frames.captures.sort_values(KEY, kind="stable", ignore_index=True)
    rows = named(frames.connections, prefix)
    costs = {name: cost(rows, captures, name) for name in BY}
    told = clock_findings.findings(captures, rows)
    changed = None
    if since is not None:
        sides = clock_findings.sides(captures, told, since)
        changed = changes.change(rows, captures, sides, list(BY[by]))
        captures = captures.assign(side=sides)
    settings = differences.differing(rows, captures, frames.settings, list(BY["service"]))
    return FleetReport(captures, rows, by, costs, settings, told, since, changed)


def named(connections: pd.DataFrame, prefix: tuple[int, int] = groups.PREFIX) -> pd.DataFrame:
    """Return the connections, those that lost most first, with what groups them across hosts.

    ``peer`` is the network of the remote address. A workload that is a container of a pod is NAMESPACE/*/CONTAINER,
    because each pod has a name of its own. ``process`` is empty for connections of a service.
    """
    rows = connections.sort_values([*KEY, "connection"], kind="stable")
    rows = rows.sort_values("lost_us", ascending=False, kind="stable", ignore_index=True)
    return rows.assign(
        peer=groups.networks(rows["daddr"], prefix),
        workload=rows["workload"]
        .map({text: across_pods(str(text)) for text in rows["workload"].unique()})
        .astype("str"),
        process=rows["process"].where(rows["service"] == "", ""),
    )


def across_pods(workload: str) -> str:
    """Return the name of a workload without that of its pod: ``default/*/nginx`` for ``default/web-7d9c/nginx``."""
    match = _OF_POD.fullmatch(workload)
    return f"{match[1]}/*/{match[2]}" if match else workload


def cost(rows: pd.DataFrame, captures: pd.DataFrame, by: str) -> pd.DataFrame:
    """Return one row per group of connections, those that lost most first; the columns are ``COLUMNS``.

    ``rows`` is the result of ``named``, ``captures`` that table of a fleet, and ``by`` one of ``BY``.
    """
    keys = list(BY[by])
    number = rows.groupby(keys, sort=False, dropna=False).ngroup()
    grouped = rows.groupby(number, sort=False)
    first = rows[~number.duplicated()].set_index(number[~number.duplicated()])
    traced = _traced(rows, captures, number)
    parts = [
        first[keys],
        grouped["host"].nunique().rename("hosts"),
        grouped.size().rename("connections"),
        grouped[_SUMS].sum(),
        grouped["busy_us"].sum().where(grouped["busy_us"].count() == grouped.size()),
        traced,
        _worst(rows, number),
        groups.verdicts(rows["verdict"], number),
    ]
    out = pd.concat(parts, axis=1).sort_index()
    out = out.sort_values(["lost_us", "resets", "connections"], ascending=False, kind="stable", ignore_index=True)
    return out[[name for name in COLUMNS if name in out]]


def _traced(rows: pd.DataFrame, captures: pd.DataFrame, number: pd.Series) -> pd.DataFrame:
    """Return ``traced_s`` and ``lost_rate_us`` by group."""
    mine = rows[[*KEY, "lost_us"]].assign(group=number).groupby(["group", *KEY], sort=False)["lost_us"].sum()
    both = mine.reset_index().merge(captures[[*KEY, "seconds"]], on=KEY, how="left").dropna(subset="seconds")
    sums = both.groupby("group")[["lost_us", "seconds"]].sum().reindex(number.unique())
    rate = sums["lost_us"] / sums["seconds"].where(sums["seconds"] > 0)
    return pd.DataFrame({"traced_s": sums["seconds"].fillna(0.0), "lost_rate_us": rate})


def _worst(rows: pd.DataFrame, number: pd.Series) -> pd.Series:
    """Return by group the hosts that lost most, as a list of dicts."""
    sums = rows.groupby([number.rename("group"), "host"])["lost_us"].sum().reset_index()
    sums = sums[sums["lost_us"] > 0].sort_values("lost_us", ascending=False, kind="stable")
    found: dict[Any, list[dict[str, Any]]] = {group: [] for group in number.unique()}
    for row in sums.groupby("group").head(WORST).to_dict("records"):
        found[row["group"]].append({"host": row["host"], "lost_us": row["lost_us"]})
    return pd.Series(found, name="worst", dtype="object")
