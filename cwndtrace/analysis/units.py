# SPDX-License-Identifier: Apache-2.0
"""The unit of each column of a Trace's frames: by the tables' schemas, by its name's ending, or by a list here."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import pandas as pd

from cwndtrace.records import arrow

_ENDINGS: Final = {
    "_us": "us",
    "_ns": "ns",
    "_s": "s",
    "_bytes": "bytes",
    "_segments": "segments",
    "_share": "share",
}
"""Units by the last part of a name. A share is from 0 to 1."""

_NAMED: Final = {
    "count": (
        *("resets", "resets_idle", "resets_rto_loss", "resets_app_limited", "resets_tlp_loss"),
        *("resets_harmful", "resets_unknown", "addresses", "verdict_connections"),
        *("harmful", "chain_resets", "snapshots", "bursts", "connections", "live", "touched", "disk_requests", "count"),
        *("errors", "requests", "n_before", "n_after", "verdict_resets"),
    ),
    "key": ("connection", "worst", "disk_last"),
    "port": ("service_port",),
    "ns": ("chain",),
    "ratio": ("cliffs_delta",),
    "round trips": ("rounds", "rounds_after", "rounds_before", "rounds_lost", "round_trips"),
    "RTOs": ("idle_per_rto_p50", "idle_per_rto_max"),
    "segments": ("chain_window", "cwnd_next"),
    "text": (
        *("verdict", "why", "cause", "device", "disk_device", "remedy", "action", "risk", "why_risk", "name", "note"),
        *("congestion_control", "measure", "unit", "centre", "effect", "disk_of", "command", "lasting"),
        *("workload", "thread", "service", "peer", "cause_of", "owner", "submitter"),
    ),
    "true or false": ("host", "mostly_receives", "outgoing", "slow_start_after_idle", "slow_start_after_idle_end"),
    "see unit": ("before", "after", "difference", "low", "high"),
    "UTC": ("first_seen", "last_seen"),
}
"""The columns whose names don't tell their unit; ``see unit`` is the unit in the row's column ``unit``."""


class Units(dict[str, str]):
    """Units by column, not copied by ``deepcopy``.

    pandas deep-copies ``attrs`` with each step of an analysis, which would take a fifth of its time.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Units:
        return self


@cache
def of(column: str) -> str | None:
    """Return the unit of a column, or None for a name that no frame of a Trace has."""
    return _listed().get(column) or next((unit for end, unit in _ENDINGS.items() if column.endswith(end)), None)


@cache
def _listed() -> dict[str, str]:
    units = {name: unit for unit, names in _NAMED.items() for name in names}
    for table in arrow.TABLES:
        units |= {field.name: field.metadata[b"unit"].decode() for field in arrow.schema(table)}
    return units


def attach(frame: pd.DataFrame) -> pd.DataFrame:
    """Return ``frame`` with ``attrs["units"]``: the unit of each column, or of each axis where the axes have names."""
    names = [frame.index.name, frame.columns.name] if frame.columns.name is not None else [*frame]
    frame.attrs["units"] = Units({str(name): unit for name in names if (unit := of(str(name)))})
    return frame
