# SPDX-License-Identifier: Apache-2.0
"""Resets that are still to come, in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from cwndtrace import format as fmt
from cwndtrace.format import plural, size, span


def due(rows: pd.DataFrame, most: int) -> list[str]:
    """Return a line for each of the first ``most`` rows of ``analysis.ahead.due``, and one for the others."""
    return _lines(rows, most, _due)


def beats(rows: pd.DataFrame, most: int) -> list[str]:
    """Return a line for each of the first ``most`` rows of ``analysis.ahead.beats``, and one for the others."""
    return _lines(rows, most, _beat)


def _lines(rows: pd.DataFrame, most: int, in_words: Callable[[Mapping[Any, Any]], str]) -> list[str]:
    lines = [fmt.clean(in_words(row)) for row in rows.head(most).to_dict("records")]
    return [*lines, *([f"and {plural(len(rows) - most, 'more connection')}"] if len(rows) > most else [])]


def _who(row: Mapping[Any, Any]) -> str:
    process = f" ({fmt.process(row['comm'], row['pid'])})" if row["pid"] else ""
    return f"{fmt.connection(row)}{process}"


def _due(row: Mapping[Any, Any]) -> str:
    more, trip = row["rounds"], row["srtt_us"]
    cost = f", {span(more * trip)} (estimated)" if trip else ""
    return (
        f"{_who(row)}: idle for {span(row['idle_us'])}, longer than its RTO of {span(row['rto_us'])}; a send takes its "
        f"window from {row['cwnd']} to {plural(row['cwnd_next'], 'segment')}, and a burst of a whole window then needs "
        f"up to {plural(more, 'round trip')} more{cost}"
    )


def _beat(row: Mapping[Any, Any]) -> str:
    if pd.isna(row["resets"]):
        return (
            f"{_who(row)}: sent {size(row['bytes'])} while it was watched and was idle for {span(row['idle_us'])} in "
            f"between, longer than its RTO of {span(row['rto_us'])}; its window is {plural(row['cwnd'], 'segment')}"
        )
    return (
        f"{_who(row)}: about {size(row['bytes'])} each {span(row['idle_us'])}, less often than its RTO of "
        f"{span(row['rto_us'])}: {plural(row['resets'], 'reset')}, and the window went from "
        f"{row['cwnd_before']} to {plural(row['cwnd'], 'segment')}"
    )
