# SPDX-License-Identifier: Apache-2.0
"""Connections grouped by what people have a name for: a workload, a service, a peer's network.

All figures are sums over the connections of a group, and its verdict is never more certain than theirs.
"""

from __future__ import annotations

import ipaddress
from typing import Final

import numpy as np
import pandas as pd

from cwndtrace.analysis.verdict import CANT_TELL, VERDICTS

BY: Final = {
    "workload": ("workload",),
    "service": ("workload", "service", "outgoing", "process"),
    "peer": ("peer",),
    "connection": ("connection",),
}
"""The ways to group, each with the columns in which the connections of one group agree."""

PREFIX: Final = (24, 48)
"""The bits of an IPv4 and of an IPv6 address that peers of one group share, unless set otherwise."""

COLUMNS: Final = {
    "workload": "as in analysis.connections.COLUMNS; empty where unknown",
    "service": "the same; empty for connections that this end opened, and where that isn't known",
    "outgoing": "true for connections that this end opened; missing where that isn't known",
    "process": "name of the process; empty for a service, which has a name of its own",
    "peer": "network of the remote addresses, or the address where the prefix is all of it",
    "connection": "key of the connection",
    "connections": "number of connections",
    "addresses": "number of different remote addresses",
    "resets": "number of resets of their windows",
    "resets_harmful": "of these, those that were harmful",
    "resets_unknown": "of these, those of which the cost isn't known",
    "lost_us": "cost of these resets, sum, us, measured; without those that aren't known",
    "predicted_us": "cost of those that aren't known, sum, us, estimated",
    "cause": "the cause of the largest part of the cost of idle resets, or of their idle time where no cost of them is "
    "known; one of analysis.idle_cause.CAUSES, empty where there was none",
    "cause_share": "that part; missing where there is no cause",
    "cause_of": "what it is a part of: cost or idle time",
    "worst": "key of the connection that lost most; of those that lost the same, the first one in Trace.summary()",
    "worst_us": "its cost, us, measured",
    "verdict": "one of VERDICTS: harmful if any connection is, else can't tell if that holds for any, else another "
    "limit or a loss if any had one, else a harmless one; of several, the most frequent",
    "verdict_connections": "number of connections with that verdict",
}
"""The columns of ``groups``. Of the first six there are only those of ``BY``."""

_SUMS: Final = ["resets", "resets_harmful", "resets_unknown", "lost_us", "predicted_us"]
_WEIGHTS: Final = (
    ("harmful",),
    CANT_TELL,
    ("receiver_window", "send_buffer", "paced", "loss", "handshake"),
    ("slight", "nothing_waited", "as_before", "burst_fits", "nothing_sent"),
    ("exempt", "sysctl_off", "no_reset"),
)
"""All verdicts: one of an earlier line decides for a group that also has others."""


def groups(
    summary: pd.DataFrame, judged: pd.DataFrame, by: str = "service", prefix: tuple[int, int] = PREFIX
) -> pd.DataFrame:
    """Return one row per group of connections, those that lost most first; the columns are ``COLUMNS``.

    ``summary`` is that of a Trace, and ``judged`` its ``verdicts``; without the column ``cause``, causes are empty.
    ``by`` is one of ``BY``, and ``prefix`` as ``PREFIX``. Raises ValueError for others.
    """
    if by not in BY:
        raise ValueError(f"by is one of {', '.join(BY)}, not {by!r}")
    rows = summary.sort_values("lost_us", ascending=False, kind="stable", ignore_index=True)
    if by == "peer":
        rows["peer"] = networks(rows["daddr"], prefix)
    keys = list(BY[by])
    if by == "service":
        rows["process"] = rows["process"].where(rows["service"] == "", "")
    number = rows.groupby(keys, sort=False, dropna=False).ngroup()
    grouped = rows.groupby(number, sort=False)
    first = rows[~number.duplicated()].set_index(number[~number.duplicated()])
    out = pd.concat(
        [
            first[keys],
            grouped.size().rename("connections"),
            grouped["daddr"].nunique().rename("addresses"),
            grouped[_SUMS].sum(),
            _causes(judged, pd.Series(number.to_numpy(), index=rows["connection"])),
            first[["connection", "lost_us"]].rename(columns={"connection": "worst", "lost_us": "worst_us"}),
            verdicts(rows["verdict"], number),
        ],
        axis=1,
    )
    texts = {"cause": out["cause"].fillna("").astype(str), "cause_of": out["cause_of"].fillna("").astype(str)}
    out = out.assign(**texts, cause_share=out["cause_share"].astype("float64"))
    # The groups are numbered by their costliest connections, so that a tie is in the summary's order.
    order = ["lost_us", "resets", "connections"]
    out = out.sort_index().sort_values(order, ascending=False, kind="stable", ignore_index=True)
    return out[[name for name in COLUMNS if name in out]]


def _causes(judged: pd.DataFrame, number: pd.Series) -> pd.DataFrame:
    """Return ``cause``, ``cause_share`` and ``cause_of`` by group; ``number`` has the group of each connection."""
    names = ["cause", "cause_share", "cause_of"]
    idle = judged[judged["cause"] != ""] if "cause" in judged else judged.iloc[:0]
    parts = pd.DataFrame(
        {
            "group": idle["connection"].map(number),
            "cause": idle.get("cause", ""),
            "cost": idle["lost_us"].astype("float64").fillna(0),
            "idle time": idle["idle_us"].astype("float64"),
        }
    ).dropna(subset="group")
    sums = parts.groupby(["group", "cause"])[["cost", "idle time"]].sum().reset_index()
    if sums.empty:
        return pd.DataFrame(columns=names)
    whole = sums.groupby("group")[["cost", "idle time"]].transform("sum")
    of_cost = whole["cost"] > 0
    sums["cause_share"] = (sums["cost"] / whole["cost"]).where(of_cost, sums["idle time"] / whole["idle time"])
    sums["cause_of"] = pd.Series(np.where(of_cost, "cost", "idle time"), index=sums.index, dtype="str")
    # A damaged capture may have idle resets after no idle time.
    largest = (
        sums.dropna(subset="cause_share")
        .sort_values("cause_share", ascending=False, kind="stable")
        .drop_duplicates("group")
    )
    return largest.set_index(largest["group"].astype("int64"))[names]


def verdicts(verdict: pd.Series, number: pd.Series) -> pd.DataFrame:
    """Return ``verdict`` and ``verdict_connections`` by group."""
    counts = verdict.groupby([number, verdict]).size().rename_axis(["group", "verdict"]).rename("n").reset_index()
    names = counts["verdict"].astype(str)
    weight = names.map({name: line for line, verdicts in enumerate(_WEIGHTS) for name in verdicts})
    order = counts.assign(weight=weight, more=-counts["n"], at=names.map(VERDICTS.index))
    chosen = order.sort_values(["weight", "more", "at"], kind="stable").drop_duplicates("group").set_index("group")
    return pd.DataFrame({"verdict": chosen["verdict"], "verdict_connections": chosen["n"].astype("int64")})


def networks(addresses: pd.Series, prefix: tuple[int, int] = PREFIX) -> pd.Series:
    """Return the network of each address as text. Raises ValueError for a prefix that no address has."""
    for bits, most in zip(prefix, (32, 128), strict=True):
        if not 0 <= bits <= most:
            raise ValueError(f"a prefix of /{bits} isn't within 0 and {most} bits")
    return addresses.map({text: _network(str(text), prefix) for text in addresses.unique()}).astype("str")


def _network(text: str, prefix: tuple[int, int]) -> str:
    """Return the network of one address; a text that is none, as a damaged capture may hold, is a peer of its own."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return text
    if address.version == 6 and address.ipv4_mapped:
        address = address.ipv4_mapped
    bits = prefix[0] if address.version == 4 else prefix[1]
    network = ipaddress.ip_network((address.packed, bits), strict=False)
    return str(network.network_address if bits == network.max_prefixlen else network)
