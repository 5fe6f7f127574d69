# SPDX-License-Identifier: Apache-2.0
"""The report of a fleet in words: its answer, settings that differ, and what a change did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import pandas as pd

from cwndtrace.analysis.verdict import CANT_TELL, FLOOR_SHARE
from cwndtrace.format import clean, plural, span
from cwndtrace.present import groups as groups_in_words
from cwndtrace.present import text
from cwndtrace.present.fleet_limits import capture, count, some

HEADS: Final = {**groups_in_words.HEADS, "host": "Host", "kernel": "Kernel"}
"""The columns that name a group, with their titles."""

NOUNS: Final = {**groups_in_words.NOUNS, "host": "host", "kernel": "kernel"}
"""What one group is called, by how they are grouped."""

TITLES: Final = {**groups_in_words.TITLES, "host": "host", "kernel": "kernel"}
"""What connections are grouped by, to follow "by"."""

NO_NAME: Final = "connections without a name"
_SAME_LOAD: Final = (0.8, 1.25)  # between these, what was sent counts as the same


def names(row: Mapping[Any, Any]) -> dict[str, str]:
    """Return what names a group, by the keys of ``HEADS`` that it has; a dash where nothing is known."""
    own = {name: clean(row[name]) or "-" for name in ("host", "kernel") if name in row}
    return groups_in_words.names(row) | own


def group(row: Mapping[Any, Any]) -> str:
    """Return the name of a group in a sentence: ``nginx:443 in nginx.service``."""
    known = names(row)
    parts = [known[name] for name in reversed(known) if known[name] != "-"]
    return " in ".join(parts) or NO_NAME


def worst(row: Mapping[Any, Any]) -> str:
    """Return the hosts of a group that lost most, with their costs; a dash where none lost anything."""
    return ", ".join(f"{clean(each['host'])} ({span(each['lost_us'])})" for each in row["worst"]) or "-"


def busy_share(row: Mapping[Any, Any]) -> float:
    """Return which share of its busy time a group lost; missing where the busy time isn't known in full."""
    return float(row["lost_us"] / row["busy_us"]) if row["busy_us"] >= max(row["lost_us"], 1) else float("nan")


def busy(row: Mapping[Any, Any]) -> str:
    """Return ``busy_share`` for a table: measured, a lower bound (>), or a dash where it is missing or unknown."""
    share = busy_share(row)
    return _bound(text.percent(share), row["lost_us"], row["resets_unknown"], "-") if share == share else "-"


def rate(row: Mapping[Any, Any]) -> str:
    """Return the cost of a group per traced second for a table: measured, a lower bound (>), or unknown."""
    return _rate(row["lost_rate_us"], row["resets_unknown"])


def _rate(us: float, unknown: int) -> str:
    return _bound(f"{span(us)}/s", us, unknown, "unknown") if us == us else "-"


def _bound(shown: str, lost: float, unknown: int, otherwise: str) -> str:
    """Return ``shown`` as a lower bound where the cost of some resets is unknown, as ``text.cost`` does."""
    return shown if not unknown else f">{shown}" if lost else otherwise


# ---- the answer --------------------------------------------------------------------------------------


def answer(rows: pd.DataFrame, captures: pd.DataFrame) -> tuple[str, str]:
    """Return the verdict on a fleet, one of ``analysis.verdict.VERDICTS``, and the answer in a sentence or two.

    Takes its connections and captures. What couldn't be read or isn't whole makes a cost a lower bound, and leaves open
    whether there was none.
    """
    read = captures[captures["status"] == "ok"]
    if not len(captures):
        return "unknown", f"{text.OPEN}, because there is no capture."
    if not len(read):
        return "unknown", f"{text.OPEN}, because no capture could be read."
    if not len(rows):
        return "unknown", f"No TCP connection was seen in {plural(len(read), 'capture')}."
    total = rows[["resets", "resets_harmful", "resets_unknown", "lost_us", "predicted_us"]].sum()
    hosts = int(read["host"].nunique())
    seen = f"{plural(len(rows), 'connection')} of {plural(hosts, 'host')}"
    if total["resets_harmful"]:
        return _late(rows, total, hosts)
    if total["resets_unknown"]:
        estimate = f" (about {span(total['predicted_us'])}, estimated)" if total["predicted_us"] > 0 else ""
        of = f"{int(total['resets_unknown']):,} of {plural(int(total['resets']), 'reset')}"
        return "unknown", f"{text.OPEN}, because the cost of {of} wasn't measured{estimate}."
    open_ = int(rows["verdict"].isin(CANT_TELL).sum())
    if 2 * open_ > len(rows):
        return "unknown", f"{text.OPEN}, because it can't be told for {open_:,} of {seen}."
    resets = int(total["resets"])
    nothing = f"no reset delayed anything: {plural(resets, 'reset')} on {seen}" if resets else ""
    nothing = nothing or f"no window was reset on {seen}"
    if hidden := _hidden(captures):
        return "unknown", f"{text.OPEN}, because {hidden}. By what is there, {nothing}."
    return "nothing_waited" if resets else "no_reset", f"{nothing[0].upper()}{nothing[1:]}."


def _late(rows: pd.DataFrame, total: pd.Series, hosts: int) -> tuple[str, str]:
    late = rows[rows["resets_harmful"] > 0]
    what = "Idle resets" if (late["resets"] == late["resets_idle"]).all() else "Window resets"
    busy = float(rows["busy_us"].sum(skipna=False))  # a share of less than all busy time would be too high
    said = (
        f"{what} made {plural(int(total['resets_harmful']), 'burst')} late on {len(late):,} of "
        f"{plural(len(rows), 'connection')}, on {late['host'].nunique():,} of {plural(hosts, 'host')}, by "
        f"{span(total['lost_us'])} in all (measured){text.of_busy(total['lost_us'], busy)}."
    )
    harmful = bool((rows["verdict"] == "harmful").any())
    if not harmful:
        said += f" That is too little to matter: less than {FLOOR_SHARE:.0%} of each connection's busy time."
    if total["resets_unknown"]:
        said += f" The cost of {plural(int(total['resets_unknown']), 'more reset')} isn't known."
    return "harmful" if harmful else "slight", said


def _hidden(captures: pd.DataFrame) -> str:
    """Return a clause on captures that may hide resets; empty where none does."""
    failed = int((captures["status"] != "ok").sum())
    if failed:
        return f"{plural(failed, 'capture')} couldn't be read"
    partly = int((~captures["whole"].fillna(value=False)).sum())
    if partly:
        return f"{plural(partly, 'capture')} {'is' if partly == 1 else 'are'} not whole"
    blind = int((~captures["can_see_idle"].fillna(value=True)).sum())
    return f"no probe could see idle resets in {plural(blind, 'capture')}" if blind else ""


# ---- settings ----------------------------------------------------------------------------------------


def setting(rows: Sequence[Mapping[Any, Any]]) -> str:
    """Return a sentence on one setting of one service, whose ``rows`` are those of ``fleet.differences.differing``."""
    known = [row for row in rows if row["standing"] != "unknown"]
    unknown: list[str] = next((row["hosts"] for row in rows if row["standing"] == "unknown"), [])
    number = sum(len(row["hosts"]) for row in rows)
    subject = f"{rows[0]['setting']} of {group(rows[0])}"
    if not known:
        return f"Can't tell what {subject} is: no capture of its {plural(number, 'host')} says it of each connection."
    parts: list[str] = []
    for row in known:
        shown = "" if row["standing"] == "majority" else f" ({some(row['hosts'])})"
        share = f"{len(row['hosts']):,}" if parts else f"{len(row['hosts']):,} of {plural(number, 'host')}"
        parts.append(f"{row['value']} on {share}{shown}")
    tie = "; it is a tie, so that none of these is the odd one" if known[0]["standing"] == "tie" else ""
    lack = (
        f"; can't tell for {len(unknown):,} ({some(unknown)}), whose captures don't say it of each connection"
        if unknown
        else ""
    )
    *first, last = parts
    values = f"{', '.join(first)} and {last}" if first else last
    return f"{subject} is {values}{tie}{lack}."


# ---- before and after --------------------------------------------------------------------------------


def sides(captures: pd.DataFrame, since: pd.Timestamp) -> list[str]:
    """Return lines on the captures before and after a date, and on those that are left out of both."""
    parts = []
    for side in ("before", "after"):
        mine = captures[captures["side"] == side]
        parts.append(f"{plural(len(mine), 'capture')} of {plural(int(mine['host'].nunique()), 'host')} {side}")
    lines = [f"{since:%Y-%m-%d %H:%M:%S} UTC: {' and '.join(parts)}."]
    reasons = {
        "spans": ("spans the date", "span the date"),
        "undated": ("doesn't say when it traced", "don't say when they traced"),
        "unsure": (
            "may be on either side, as its clock isn't sure",
            "may be on either side, as their clocks aren't sure",
        ),
    }
    for side, why in reasons.items():
        mine = captures[captures["side"] == side]
        if len(mine):
            listed = some([capture(row) for row in mine.to_dict("records")])
            lines.append(f"Left out: {count(mine)} that {why[len(mine) > 1]}: {listed}.")
    endless = captures[captures["side"].isin(("before", "after")) & captures["seconds"].isna()]
    if len(endless):
        listed = some([capture(row) for row in endless.to_dict("records")])
        lines.append(f"Left out of the figures: {count(endless)} whose length isn't known: {listed}.")
    return lines


def ratio(value: float) -> str:
    """Return a ratio for a table: 0.42; a dash where there is none."""
    return f"{value:.3g}" if value == value else "-"


def interval(row: Mapping[Any, Any]) -> str:
    """Return the interval of a row of ``fleet.change.change``; a dash where there is none."""
    if row["low"] != row["low"]:
        return "-"
    return f"{ratio(row['low'])} to {ratio(row['high']) if row['high'] == row['high'] else 'any'}"


def side_rate(row: Mapping[Any, Any], side: str) -> str:
    """Return the cost per traced second ``before`` or ``after`` a date, of a row of ``fleet.change.change``."""
    return _rate(row[f"rate_{side}_us"], row[f"unknown_{side}"])


def changed(row: Mapping[Any, Any], least_hosts: int) -> str:
    """Return what a row of ``fleet.change.change`` says, in words that begin with the conclusion.

    ``least_hosts`` is the least number of hosts on a side that an interval needs.
    """
    words = {
        "less": "costs less",
        "more": "costs more",
        "unsure": "can't tell: the interval holds 1",
        "none": "nothing was lost on either side",
        "none_before": "nothing was lost before",
        "none_after": "nothing was lost after",
    }
    if row["outcome"] in words:
        return words[row["outcome"]] + _load(row)
    sides = [side for side in ("before", "after") if _short(row, side, least_hosts)]
    return f"can't tell, because {' and '.join(_short(row, side, least_hosts) for side in sides)}"


def _short(row: Mapping[Any, Any], side: str, least_hosts: int) -> str:
    """Return a clause on what one side lacks; empty where it lacks nothing."""
    hosts, resets, unknown = (row[f"{name}_{side}"] for name in ("hosts", "resets", "unknown"))
    outcome = row["outcome"]
    if outcome == "one_side":
        return "" if hosts else f"no capture of known length from {side} shows it"
    if outcome == "no_length":
        return "" if row[f"traced_{side}_s"] else f"no capture from {side} has a length"
    if outcome == "unknown_cost":
        return f"the cost of {unknown:,} of {plural(resets, 'reset')} {side} isn't known" if unknown else ""
    return f"only {plural(hosts, 'host')} {'shows' if hosts == 1 else 'show'} it {side}" if hosts < least_hosts else ""


def _load(row: Mapping[Any, Any]) -> str:
    low, high = _SAME_LOAD
    if row["outcome"] not in ("less", "more") or not (row["sent_ratio"] < low or row["sent_ratio"] > high):
        return ""
    return f"; but it sent {ratio(row['sent_ratio'])} times as much"
