# SPDX-License-Identifier: Apache-2.0
"""Groups of connections in words, for the screen and the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import pandas as pd

from cwndtrace.format import clean, plural
from cwndtrace.present import text as in_words

NOUNS: Final = {"workload": "workload", "service": "service", "peer": "network", "connection": "connection"}
"""What one group is called, by how they are grouped."""

TITLES: Final = {"workload": "workload", "service": "workload and service", "peer": "network of the peer"}
"""What connections are grouped by, to follow "by"."""

HEADS: Final = {"workload": "Workload", "service": "Service", "peer": "Peers"}
"""The columns that name a group, with their titles."""


def telling(groups: pd.DataFrame) -> bool:
    """Return whether groups by workload or service tell more than the connections do.

    That is where there are at least two, and one of them has a name. A single one is told in a sentence (``single``).
    """
    return len(groups) > 1 and _named(groups)


def _named(groups: pd.DataFrame) -> bool:
    names = [groups[name] != "" for name in ("workload", "service") if name in groups]
    return any(bool(column.any()) for column in names)


def single(groups: pd.DataFrame) -> str:
    """Return a sentence if all connections are of one group with a name, else an empty text."""
    if len(groups) != 1 or not _named(groups):
        return ""
    row = groups.iloc[0].to_dict()
    names = [row[name] for name in ("service", "workload") if row.get(name)]
    number = row["connections"]
    subject = "The connection is" if number == 1 else f"All {plural(number, 'connection')} are"
    return clean(f"{subject} of {' in '.join(names)}.")


def names(row: Mapping[Any, Any]) -> dict[str, str]:
    """Return what names a group, by the keys of ``HEADS`` that it has; a dash where nothing is known.

    Connections without a service are named by their process, after ``outgoing`` if this end is known to have opened
    them.
    """
    shown = {name: clean(row[name]) for name in HEADS if name in row}
    if shown.get("service") == "":
        outgoing = ["outgoing"] if row["outgoing"] is True else []
        shown["service"] = " ".join([*outgoing, clean(row["process"])]).strip()
    return {name: value or "-" for name, value in shown.items()}


def cause(row: Mapping[Any, Any]) -> str:
    """Return the cause of most of the cost or of the idle time, with its share if that isn't all; a dash for none."""
    if not row["cause"]:
        return "-"
    part = f" ({_percent(row['cause_share'])} of {row['cause_of']})" if row["cause_share"] < 1 else ""
    return f"{row['cause']}{part}"


def _percent(share: float) -> str:
    """Return a share as text that says neither all nor nothing."""
    return f"{min(max(round(100 * share), 1), 99)} %"


def verdict(row: Mapping[Any, Any], label: str | None = None) -> str:
    """Return the verdict on a group, with the number of connections that have it if others don't.

    ``label`` takes the place of its text.
    """
    label = in_words.LABELS[row["verdict"]] if label is None else label
    number, of = row["verdict_connections"], row["connections"]
    return label if number == of else f"{label} ({number:,} of {of:,})"


def more(rest: pd.DataFrame, noun: str) -> str:
    """Return a line on the rows that a table leaves out: groups, or connections, which have no ``connections``."""
    number = plural(len(rest), f"more {noun}")
    with_connections = f" with {plural(int(rest['connections'].sum()), 'connection')}" if "connections" in rest else ""
    total = rest[["resets", "resets_harmful", "resets_unknown", "lost_us"]].sum().to_dict()
    resets = int(total["resets"])
    harmful = f", {int(total['resets_harmful']):,} of them harmful" if total["resets_harmful"] else ""
    cost = f"; cost {in_words.cost(total)}" if resets else ""
    return f"and {number}{with_connections}: {plural(resets, 'reset') if resets else 'no reset'}{harmful}{cost}"
