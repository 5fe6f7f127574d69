# SPDX-License-Identifier: Apache-2.0
"""What limits the report of a fleet, in words: captures that couldn't be read or aren't whole, and their clocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import pandas as pd

from cwndtrace import format as fmt
from cwndtrace.format import plural

NAMED: Final = 3
"""The most captures or hosts that a sentence names."""


def failed(captures: pd.DataFrame, most: int = NAMED) -> list[str]:
    """Return lines on the captures that couldn't be read: their number, and the reasons of the first ``most``."""
    broken = captures[captures["status"] != "ok"]
    if not len(broken):
        return []
    they = "it" if len(broken) == 1 else "them"
    lines = [
        f"{len(broken):,} of {plural(len(captures), 'capture')} couldn't be read, so no figure here has what is in "
        f"{they}."
    ]
    lines += [f"{capture(row)}: {row['reason']}" for row in broken.head(most).to_dict("records")]
    if len(broken) > most:
        lines.append(f"and {plural(len(broken) - most, 'more capture')} that couldn't be read; --json has them all.")
    return lines


def capture(row: Mapping[Any, Any]) -> str:
    """Return the name of a capture, with that of its host if it doesn't tell that."""
    tells = {row["host"], f"host={row['host']}"} & {*row["capture"].split("/")}
    return str(row["capture"]) if tells else f"{row['capture']} of {row['host']}"


def limits(captures: pd.DataFrame) -> list[str]:
    """Return lines on captures that aren't whole, saw no idle resets, or were filtered in different ways."""
    read, lines = captures[captures["status"] == "ok"], []
    partly = read[~read["whole"].fillna(value=False)]
    if len(partly):
        listed = some([f"{capture(row)} ({_partly(row)})" for row in partly.to_dict("records")], "; ")
        lines.append(f"{_of(partly, read)} {_are(partly)}n't whole, so figures may be too low: {listed}.")
    blind = read[~read["can_see_idle"].fillna(value=True)]
    if len(blind):
        listed = some([capture(row) for row in blind.to_dict("records")])
        lines.append(f"No probe could see idle resets in {_of(blind, read)}: {listed}.")
    filters = read["filters"].value_counts()
    if len(filters) > 1:
        kinds = some([f"{str(name) or 'no filter'} in {number:,}" for name, number in filters.items()], "; ")
        lines.append(f"Captures were filtered in different ways, so their figures can't be compared: {kinds}.")
    return lines


def _partly(row: Mapping[Any, Any]) -> str:
    reasons = [] if row["state"] == "complete" else [f"it is {row['state'] or 'of an unknown state'}"]
    if row["lost_records"]:
        reasons.append(fmt.lost(row["lost_records"], "record"))
    if row["absent_records"]:
        reasons.append(f"{plural(row['absent_records'], 'record')} missing or lacking values")
    return ", ".join(reasons or [row["warnings"] or "its parts aren't as the trace wrote them"])


def clocks(
    stepped: pd.DataFrame, ahead: pd.DataFrame, undated: pd.DataFrame, overlaps: pd.DataFrame, skews: pd.DataFrame
) -> list[str]:
    """Return lines on clocks that don't agree: the findings of ``fleet.clocks``. All times are left as they are."""
    lines = []
    if len(stepped):
        listed = some([f"{capture(row)} ({_shift(row['clock_shift_s'])})" for row in stepped.to_dict("records")])
        lines.append(f"The clock was stepped, suspends included, during {count(stepped)}: {listed}.")
    if len(ahead):
        listed = some([f"{capture(row)} ({_seconds(row['ahead_s'])})" for row in ahead.to_dict("records")])
        lines.append(
            f"The clock of the host or of the storage is wrong where a capture ended after it was stored: {listed}."
        )
    if len(undated):
        listed = some([capture(row) for row in undated.to_dict("records")])
        lines.append(f"{count(undated)} {'does' if len(undated) == 1 else 'do'}n't say when: {listed}.")
    lines += _overlaps(overlaps)
    lines += [
        f"The clock of {row['host']} is {_seconds(abs(row['ahead_s']))} "
        f"{'ahead of' if row['ahead_s'] > 0 else 'behind'} that of {row['other']} (estimated, from "
        f"{plural(row['connections'], 'connection')} that both saw begin and end); which one is right can't be told."
        for row in skews.head(NAMED).to_dict("records")
    ]
    if len(skews) > NAMED:
        lines.append(f"The clocks of {plural(len(skews) - NAMED, 'more pair')} of hosts differ.")
    return lines


_OVERLAPS: Final = {
    "twice": "so both traced at once, and what both have counts twice",
    "set_back": "because the clock was set back in between",
    "other_boot": "so the clock was set back, or two hosts have this name",
    "unknown": "so both traced at once and what both have counts twice, or the clock was set back, which can't be told",
}


def _overlaps(overlaps: pd.DataFrame) -> list[str]:
    lines = []
    for kind, why in _OVERLAPS.items():
        mine = overlaps[overlaps["kind"] == kind]
        if len(mine):
            listed = some(
                [
                    f"{capture(row)} and {row['other']} by {_seconds(row['overlap_s'])}"
                    for row in mine.to_dict("records")
                ]
            )
            lines.append(f"By their times, captures of one host overlap, {why}: {listed}.")
    return lines


# ---- parts of sentences ------------------------------------------------------------------------------


def some(items: Iterable[str], between: str = ", ") -> str:
    """Return the first ``NAMED`` items in a row, with the number of those that are left out."""
    listed = list(items)
    more = [f"{len(listed) - NAMED:,} more"] if len(listed) > NAMED else []
    return between.join(listed[:NAMED] + more)


def count(captures: pd.DataFrame) -> str:
    """Return the number of some captures with its noun."""
    return plural(len(captures), "capture")


def _of(mine: pd.DataFrame, captures: pd.DataFrame) -> str:
    return f"{len(mine):,} of {count(captures)}"


def _are(mine: pd.DataFrame) -> str:
    return "is" if len(mine) == 1 else "are"


def _shift(seconds: float) -> str:
    return fmt.signed(seconds, _seconds) if seconds == seconds else "by an unknown time"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.1f} s"
