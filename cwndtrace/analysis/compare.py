# SPDX-License-Identifier: Apache-2.0
"""The comparison of two captures, before and after a change: differences, their intervals and effect sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

import numpy as np
import pandas as pd

from cwndtrace.analysis.bootstrap import Values, cliffs_delta, interval
from cwndtrace.store.meta import Meta

COLUMNS: Final = {
    "measure": "name of the measure: one of MEASURES, or latency of a block operation",
    "unit": "the unit of before, after, difference, low and high",
    "centre": "the centre of the values that is compared: median or mean",
    "n_before": "number of values in the first capture",
    "n_after": "number of values in the second capture",
    "before": "centre of the values in the first capture",
    "after": "centre of the values in the second capture",
    "difference": "after less before",
    "low": "lower end of the difference's 95 % bootstrap interval, from all values; missing with fewer than three in a "
    "capture",
    "high": "upper end of that interval, which always holds the difference",
    "cliffs_delta": "how often a value of the second capture is above one of the first, less how often it is below: "
    "-1 to 1; missing for means",
    "effect": "none, small, medium or large, by cliffs_delta, or for means by the change's share of the larger mean; "
    "unsure where the interval is missing or holds 0",
}
"""The columns of ``compare``."""

MEASURES: Final[dict[str, tuple[str, Literal["median", "mean"], str]]] = {
    "reset_rate": ("1/min", "mean", "idle resets per minute, in equal slots of the capture"),
    "lost_rate": ("us/s", "mean", "measured time lost to idle resets per second, in the same slots"),
    "busy_per_mb": (
        "us/MB",
        "median",
        "busy time (data queued or unacknowledged) per MB sent, between snapshots of a connection",
    ),
    "lost": ("us", "median", "time that an idle reset cost its burst, where it was measured"),
    "cwnd_after": ("segments", "median", "congestion window right after an idle reset"),
    "back_after": ("us", "median", "time from a reset until the window had grown back, where it did"),
    "srtt": ("us", "median", "smoothed round-trip time, in snapshots of connections that had sent data"),
}
"""The measures besides block I/O, with unit, centre and meaning."""

_SLOTS: Final = 300
_WORDS: Final = ((0.147, "none"), (0.33, "small"), (0.474, "medium"), (2.0, "large"))
"""The usual names for sizes of Cliff's delta, with upper bounds (Romano and others, 2006); also used for shares."""


def measures(
    judged: pd.DataFrame,
    snapshots: pd.DataFrame,
    recoveries: pd.DataFrame,
    block_io: pd.DataFrame,
    seconds: tuple[float, float],
) -> dict[str, Values]:
    """Return the values of each measure in one capture.

    Takes frames of a Trace. ``seconds`` is the capture's start and end, in seconds of CLOCK_MONOTONIC.
    """
    idle = judged[judged["reason"].astype(str) == "idle"]
    edges = np.linspace(*seconds, _SLOTS + 1)
    at, width = idle["ts_ns"].to_numpy(np.float64) / 1e9, (edges[-1] - edges[0]) / _SLOTS
    number, _ = np.histogram(at, edges)
    lost, _ = np.histogram(at, edges, weights=idle["lost_us"].fillna(0).to_numpy(np.float64))
    ordered = snapshots.sort_values("ts_ns", kind="stable")
    numbers = ordered[["bytes_sent", "busy_us"]].astype("float64")
    moved = numbers.groupby(ordered["connection"]).diff()
    sent = moved["bytes_sent"] > 0
    back = recoveries.loc[recoveries["outcome"].astype(str) == "regained", "duration_us"]
    values = {
        "reset_rate": number / width * 60,
        "lost_rate": lost / width,
        "busy_per_mb": (moved["busy_us"] / moved["bytes_sent"] * 1e6)[sent].dropna(),
        "lost": idle["lost_us"].dropna(),
        "cwnd_after": idle["cwnd_after"],
        "back_after": back,
        "srtt": ordered.loc[sent, "srtt_us"],
    }
    values |= {f"latency of {op}": mine["latency_us"] for op, mine in block_io.groupby("op", observed=True)}
    return {name: np.asarray(series, dtype=np.float64) for name, series in values.items()}


def compare(before: Mapping[str, Values], after: Mapping[str, Values]) -> pd.DataFrame:
    """Return one row per measure that has a value in either capture; the columns are ``COLUMNS``.

    Takes what ``measures`` returns for each capture.
    """
    rows = []
    for name in dict.fromkeys((*before, *after)):
        pair = before.get(name, np.zeros(0)), after.get(name, np.zeros(0))
        if not len(pair[0]) and not len(pair[1]):
            continue
        unit, centre, _ = MEASURES.get(name, ("us", "median", ""))
        low, high = interval(pair[1], pair[0], resamples=2000, of=centre)
        middle = [float(getattr(np, centre)(values)) if len(values) else float("nan") for values in pair]
        change = middle[1] - middle[0]
        # Most slots of a rate are empty, so how often one is above another says nothing about the rate.
        delta = cliffs_delta(pair[1], pair[0]) if centre == "median" else float("nan")
        strength = delta if centre == "median" else change / max(abs(middle[0]), abs(middle[1]), 1e-300)
        rows.append(
            {
                "measure": name, "unit": unit, "centre": centre, "n_before": len(pair[0]), "n_after": len(pair[1]),
                "before": middle[0], "after": middle[1], "difference": change, "low": low, "high": high,
                "cliffs_delta": delta, "effect": _effect(strength, low, high),
            }
        )  # fmt: skip
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _effect(strength: float, low: float, high: float) -> str:
    if np.isnan(low) or np.isnan(strength) or (low <= 0 <= high and (low, high) != (0, 0)):
        return "unsure"
    return next(word for most, word in _WORDS if abs(strength) < most)


def span(about: Meta, *frames: pd.DataFrame) -> tuple[float, float]:
    """Return the start and end of a capture in seconds of CLOCK_MONOTONIC, from its metadata and its records.

    The end is at least 1 ms after the start.
    """
    stamps = [float(frame["ts_ns"].min()) for frame in frames if len(frame)]
    stamps += [float(frame["ts_ns"].max()) for frame in frames if len(frame)]
    stamps += [float(moment.mono_ns) for moment in (about.begin, about.end) if moment]
    begin, end = min(stamps, default=0.0) / 1e9, max(stamps, default=0.0) / 1e9
    return begin, max(end, begin + 0.001)
