# SPDX-License-Identifier: Apache-2.0
"""Where the clocks of a fleet don't agree with themselves or with each other, and what that leaves unsure.

No time is corrected: which of two clocks was right can't be known from the captures. What is unsure by more than a date
is away counts neither as before nor as after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import pandas as pd

from cwndtrace.fleet.tables import KEY

SLACK_S: Final = 1.0
"""Less than this, in s, isn't worth a word: clocks are set to within milliseconds, and files to within a second."""

SNAPSHOTS_S: Final = 30.0
"""Two clocks differ if the two ends of connections saw them begin this far apart, in s: snapshots are 10 s apart."""

_UNKNOWN_S: Final = 1e9
"""How far a clock may be off that was set by an unknown time, s: more than captures are from any date."""

ENOUGH: Final = 3
"""The least number of connections from which it is told that two hosts' clocks differ."""

OVERLAPS: Final = {
    "host": "name of the host",
    "capture": "the capture that began first",
    "other": "one that began before that had ended, by the host's clock",
    "overlap_s": "for how long, s",
    "kind": "twice: both traced at once; set_back: the clock was set back in between; other_boot: the clock was set "
    "back, or two hosts have this name; unknown: the captures don't tell",
}
SKEWS: Final = {
    "host": "name of one host",
    "other": "name of another",
    "ahead_s": "by how much the first one's clock is ahead of the other's, s, estimated; negative if it is behind",
    "connections": "number of connections that both saw begin and end",
}
_ENDS: Final = ["saddr", "sport", "daddr", "dport"]
_SWAPPED: Final = ["daddr", "dport", "saddr", "sport"]


@dataclass(frozen=True)
class ClockFindings:
    """What was found about the clocks.

    ``stepped``, ``ahead`` and ``undated`` are rows of the captures: those whose host's clock was stepped while they
    traced, those that end after they were stored, and those that don't say when they traced. ``overlaps`` and ``skews``
    have the columns ``OVERLAPS`` and ``SKEWS``.
    """

    stepped: pd.DataFrame
    ahead: pd.DataFrame
    undated: pd.DataFrame
    overlaps: pd.DataFrame
    skews: pd.DataFrame


def findings(captures: pd.DataFrame, connections: pd.DataFrame) -> ClockFindings:
    """Return what the tables of a fleet tell about its clocks."""
    read = captures[captures["status"] == "ok"].join(_spans(captures))
    return ClockFindings(
        stepped=read[(read["clock_steps"] > 0) & ~(read["clock_shift_s"].abs() < SLACK_S)],
        ahead=read[read["ahead_s"] > SLACK_S],
        undated=read[read["begin"].isna() | read["end"].isna()],
        overlaps=_overlaps(read),
        skews=_skews(connections, read),
    )


def _spans(captures: pd.DataFrame) -> pd.DataFrame:
    """Return ``begin`` and ``end`` of each capture by its host's clock.

    A window of the past began later than its trace, and one that was cut short has no time of its end.
    """
    length = _lengths(captures["seconds"])
    window = captures["ended"] - length
    begin = captures["started"].where(~(window > captures["started"]), window)
    return pd.DataFrame({"begin": begin, "end": captures["ended"].fillna(begin + length)})


def _lengths(seconds: pd.Series) -> pd.Series:
    """Return seconds as spans in us: a capture may say that it ended in any year, and spans in ns reach 292 years."""
    return pd.Series((seconds.to_numpy("float64") * 1e6).round().astype("timedelta64[us]"), index=seconds.index)


def _overlaps(read: pd.DataFrame) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    columns = [*KEY, "begin", "end", "boot_id", "begin_ns", "end_ns"]
    dated = read[columns].dropna(subset=["begin", "end"]).sort_values(["begin", "capture"], kind="stable")
    for host, mine in dated.groupby("host", sort=True):
        latest: dict[Any, Any] | None = None
        for each in mine.to_dict("records"):
            if latest is not None:
                shared = (min(latest["end"], each["end"]) - each["begin"]).total_seconds()
                if shared > SLACK_S:
                    names = {"host": host, "capture": latest["capture"], "other": each["capture"]}
                    rows.append(names | {"overlap_s": shared, "kind": _kind(latest, each)})
            latest = each if latest is None or each["end"] > latest["end"] else latest
    return pd.DataFrame(rows, columns=list(OVERLAPS))


def _kind(one: dict[Any, Any], other: dict[Any, Any]) -> str:
    """Return one of the kinds of ``OVERLAPS``, by a clock that is never set."""
    boots = {each["boot_id"] for each in (one, other)}
    if "" in boots:
        return "unknown"
    if len(boots) > 1:
        return "other_boot"
    shared = min(one["end_ns"], other["end_ns"]) - max(one["begin_ns"], other["begin_ns"])
    if shared != shared:
        return "unknown"
    return "twice" if shared > 0 else "set_back"


def _skews(connections: pd.DataFrame, read: pd.DataFrame) -> pd.DataFrame:
    """Return the pairs of hosts whose clocks differ, by connections that both saw begin and end.

    A connection counts only where its ends are unlike those of all others in the fleet, so that hosts with the same
    private addresses aren't compared by chance.
    """
    inner = connections.merge(read[[*KEY, "begin", "end"]], on=KEY)
    margin = pd.Timedelta(seconds=SNAPSHOTS_S)
    unique = inner[~inner.duplicated(_ENDS, keep=False)]
    seen = unique[(unique["first_seen"] - unique["begin"] > margin) & (unique["end"] - unique["last_seen"] > margin)]
    seen = seen[["host", *_ENDS, "first_seen", "last_seen"]]
    pairs = seen.merge(seen, left_on=_ENDS, right_on=_SWAPPED, suffixes=("", "_other"))
    pairs = pairs[pairs["host"] < pairs["host_other"]]
    first, last = ((pairs[name] - pairs[f"{name}_other"]).dt.total_seconds() for name in ("first_seen", "last_seen"))
    # Two connections that had the same ends at different times are apart by any time, but not by the same one.
    pairs = pairs.assign(ahead_s=(first + last) / 2)[(first - last).abs() <= SNAPSHOTS_S]
    key = ["host", "host_other"]
    agree = (pairs["ahead_s"] - pairs.groupby(key)["ahead_s"].transform("median")).abs() <= SNAPSHOTS_S
    grouped = pairs[agree].groupby(key)["ahead_s"]
    out = pd.DataFrame({"ahead_s": grouped.median(), "connections": grouped.size()})
    out = out.rename_axis(["host", "other"]).reset_index()
    differ = (out["connections"] >= ENOUGH) & (out["ahead_s"].abs() > SNAPSHOTS_S)
    return out.loc[differ, list(SKEWS)].reset_index(drop=True)


def sides(captures: pd.DataFrame, told: ClockFindings, since: pd.Timestamp) -> pd.Series:
    """Return on which side of a date each capture is: before, after, spans, undated or unsure.

    It spans the date if the date is within it, and is unsure where it is only within what its clock leaves unsure.
    Captures that couldn't be read have an empty text.
    """
    spans, read = _spans(captures), captures["status"] == "ok"
    unsure = _lengths(_unsure_s(captures, told))
    out = pd.Series("unsure", index=captures.index, dtype="str")
    out = out.mask(spans["begin"] - unsure >= since, "after").mask(spans["end"] + unsure <= since, "before")
    out = out.mask((spans["begin"] < since) & (spans["end"] > since), "spans")
    return out.mask(spans["begin"].isna() | spans["end"].isna(), "undated").where(read, "")


def _unsure_s(captures: pd.DataFrame, told: ClockFindings) -> pd.Series:
    """Return by how much, in s, each capture's times may be wrong, by what was found."""
    out = captures["clock_shift_s"].abs().fillna(_UNKNOWN_S).where(captures["clock_steps"] > 0, 0.0)
    out = out + captures["ahead_s"].where(captures["ahead_s"] > SLACK_S, 0.0).fillna(0.0)
    both = [told.skews[["host", "ahead_s"]], told.skews[["other", "ahead_s"]].rename(columns={"other": "host"})]
    skew = pd.concat(both).assign(ahead_s=lambda rows: rows["ahead_s"].abs()).groupby("host")["ahead_s"].max()
    back = told.overlaps[told.overlaps["kind"] != "twice"].groupby("host")["overlap_s"].max()
    for by_host in (skew, back):
        out = out + captures["host"].map(by_host).astype("float64").fillna(0.0)
    return out
