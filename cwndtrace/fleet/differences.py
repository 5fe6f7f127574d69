# SPDX-License-Identifier: Apache-2.0
"""Hosts whose settings differ from those of the other hosts of the same service."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import pandas as pd

from cwndtrace import tcp
from cwndtrace.fleet.tables import KEY

COLUMNS: Final = {
    "setting": f"{tcp.IDLE_SYSCTL}, or congestion control: that which the connections have",
    "value": "its value on these hosts, in the last capture of each; several where its connections differ; empty where "
    "it isn't known of all of them",
    "standing": "majority if more hosts have this value than any other; minority if fewer; tie if as many as have "
    "another and none has more; unknown where the value is",
    "hosts": "names of these hosts, a list",
}
"""The columns of ``differing``, after those that name the service."""

CONTROL: Final = "congestion control"


def differing(rows: pd.DataFrame, captures: pd.DataFrame, settings: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Return one row per value of a setting that the hosts of a service differ in, or that isn't known of all of them.

    Takes the result of ``summary.named``, two tables of a fleet, and the columns that name a service. Services come in
    the order of ``rows``. Hosts are compared only within a service that has a name and at least two hosts.
    """
    named = rows[(rows[["workload", "service", "process"]] != "").any(axis=1)]
    number = named.groupby(keys, sort=False, dropna=False).ngroup().rename("group")
    last = _last(named.assign(group=number), captures)
    known = last.merge(_namespaces(settings), on=[*KEY, "netns_ino"], how="left")
    values = pd.concat(
        [
            known.assign(setting=tcp.IDLE_SYSCTL, value=known["idle"].fillna("")),
            known.assign(setting=CONTROL, value=known["ca_name"]),
        ]
    )
    of_host = _of_host(values[["group", "setting", "host", "value"]].drop_duplicates())
    out: list[dict[str, Any]] = []
    for (group, setting), mine in of_host.groupby(["group", "setting"], sort=True):
        by_value = {str(value): list(hosts) for value, hosts in mine.groupby("value", sort=True)["host"]}
        if len(mine) > 1 and (len(by_value) > 1 or "" in by_value):
            out += [{"group": group, "setting": setting} | row for row in _standing(by_value)]
    first = named.loc[~number.duplicated(), keys].assign(group=number[~number.duplicated()])
    return pd.DataFrame(out, columns=["group", *COLUMNS]).merge(first, on="group")[[*keys, *COLUMNS]]


def _last(rows: pd.DataFrame, captures: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the last capture of each host that shows a service.

    A capture that doesn't say when it began counts as the first.
    """
    begun = rows.merge(captures[[*KEY, "started"]], on=KEY, how="left")
    shown = begun[["group", *KEY, "started"]].drop_duplicates()
    shown = shown.sort_values(["started", "capture"], kind="stable", na_position="first")
    latest = shown.drop_duplicates(["group", "host"], keep="last")[["group", *KEY]]
    return begun.merge(latest, on=["group", *KEY])


def _namespaces(settings: pd.DataFrame) -> pd.DataFrame:
    """Return ``idle``, the last known value of tcp_slow_start_after_idle as text, by namespace of each capture."""
    value = settings["slow_start_after_idle_end"].fillna(settings["slow_start_after_idle"])
    rows = settings[[*KEY, "netns_ino"]].assign(idle=value.astype("str").where(value.notna(), ""))
    return rows.drop_duplicates([*KEY, "netns_ino"])


def _of_host(values: pd.DataFrame) -> pd.DataFrame:
    """Return one row per group, setting and host, with its different values as one text."""
    key = ["group", "setting", "host"]
    several = values.duplicated(key, keep=False)
    together = values[several].groupby(key)["value"].agg(_together).reset_index()
    return pd.concat([values[~several], together], ignore_index=True).sort_values(key, ignore_index=True)


def _together(values: pd.Series) -> str:
    """Return the values of one host as a text, empty if one of them isn't known."""
    different = sorted(set(values))
    return "" if "" in different else " and ".join(different)


def _standing(by_value: Mapping[str, list[str]]) -> list[dict[str, Any]]:
    """Return a row for each value, those of most hosts first and what isn't known last."""
    known = sorted((value for value in by_value if value), key=lambda value: (-len(by_value[value]), value))
    most = max((len(by_value[value]) for value in known), default=0)
    tied = sum(len(by_value[value]) == most for value in known) > 1
    rows = []
    for value in (*known, *([""] if "" in by_value else [])):
        first = "tie" if tied else "majority"
        standing = "unknown" if not value else first if len(by_value[value]) == most else "minority"
        rows.append({"value": value, "standing": standing, "hosts": by_value[value]})
    return rows
