# SPDX-License-Identifier: Apache-2.0
"""Two captures side by side, before and after a change: what differs, by how much, how surely."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

import numpy as np
import pandas as pd

from cwndtrace.analysis.bootstrap import Values, cliffs_delta, interval
from cwndtrace.store.meta import Meta

COLUMNS: Final = {
    "measure": "what was measured, one of MEASURES or latency of a block operation",
    "unit": "the unit of before, after, difference, low and high",
    "centre": "median or mean, of the values",
    "n_before": "values in the first capture",
    "n_after": "values in the second one",
    "before": "the centre of the first",
    "after": "the centre of the second",
    "difference": "after less before",
    "low": "lower end of the difference's 95 % bootstrap interval; missing with fewer than three values on a side",
    "high": "its upper end",
    "cliffs_delta": "how often a value after is above one before, less how often below: -1 to 1; missing for means",
    "effect": "that in a word, or for means the change's share of the larger one: none, small, medium or large; unsure "
    "where the interval holds 0",
}
"""The columns of ``compare``."""

MEASURES: Final[dict[str, tuple[str, Literal["median", "mean"], str]]] = {
    "reset_rate": ("1/min", "mean", "idle resets a minute, over equal slots of the capture"),
    "lost_rate": ("us/s", "mean", "time lost to resets a second, estimated, over the same slots"),
    "busy_per_mb": ("us/MB", "median", "time with data under way for each MB sent, between snapshots of a connection"),
    "lost": ("us", "median", "what a reset cost its burst, estimated; 0 where it was harmless"),
    "cwnd_after": ("segments", "median", "the window that a reset left"),
    "back_after": ("us", "median", "from a reset until the window was back, where it came back"),
    "srtt": ("us", "median", "smoothed round-trip time, at snapshots of connections that sent"),
}
"""What is compared besides block I/O: unit, centre and meaning."""

_SLOTS: Final = 300
_MOST: Final = 1000
"""Values of a group that are resampled: of more, so many drawn at random."""
_WORDS: Final = ((0.147, "none"), (0.33, "small"), (0.474, "medium"), (2.0, "large"))
"""The usual names of Cliff's delta (Romano and others, 2006), here for shares as well."""


def measures(
    judged: pd.DataFrame,
    snapshots: pd.DataFrame,
    recoveries: pd.DataFrame,
    block_io: pd.DataFrame,
    seconds: tuple[float, float],
) -> dict[str, Values]:
    """The values of each measure in one capture. Takes frames of a Trace; ``seconds`` its begin and end, monotonic."""
    idle = judged[judged["reason"].astype(str) == "idle"]
    edges = np.linspace(*seconds, _SLOTS + 1)
    at, width = idle["ts_ns"].to_numpy(np.float64) / 1e9, (edges[-1] - edges[0]) / _SLOTS
    number, _ = np.histogram(at, edges)
    lost, _ = np.histogram(at, edges, weights=idle["lost_us"].to_numpy())
    ordered = snapshots.sort_values("ts_ns", kind="stable")
    numbers = ordered[["bytes_sent", "busy_us"]].astype("float64")
    moved = numbers.groupby(ordered["connection"]).diff()
    sent = moved["bytes_sent"] > 0
    back = recoveries.loc[recoveries["outcome"].astype(str) == "regained", "duration_us"]
    values = {
        "reset_rate": number / width * 60,
        "lost_rate": lost / width,
        "busy_per_mb": (moved["busy_us"] / moved["bytes_sent"] * 1e6)[sent].dropna(),
        "lost": idle["lost_us"],
        "cwnd_after": idle["cwnd_after"],
        "back_after": back,
        "srtt": ordered.loc[sent, "srtt_us"],
    }
    values |= {f"latency of {op}": mine["latency_us"] for op, mine in block_io.groupby("op", observed=True)}
    return {name: np.asarray(found, dtype=np.float64) for name, found in values.items()}


def compare(before: Mapping[str, Values], after: Mapping[str, Values]) -> pd.DataFrame:
    """One row a measure that either has a value of; the columns are ``COLUMNS``. Takes what ``measures`` gives."""
    rows = []
    for name in dict.fromkeys((*before, *after)):
        pair = before.get(name, np.zeros(0)), after.get(name, np.zeros(0))
        if not len(pair[0]) and not len(pair[1]):
            continue
        unit, centre, _ = MEASURES.get(name, ("us", "median", ""))
        sampled = [_sample(values) for values in pair]
        low, high = interval(sampled[1], sampled[0], resamples=2000, of=centre)
        middle = [float(getattr(np, centre)(values)) if len(values) else float("nan") for values in pair]
        change = middle[1] - middle[0]
        # Most slots of a rate are empty: how often one is above another says nothing of the rate.
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


def _sample(values: Values) -> Values:
    return values if len(values) <= _MOST else np.random.default_rng(1).choice(values, _MOST, replace=False)


def _effect(strength: float, low: float, high: float) -> str:
    if np.isnan(low) or np.isnan(strength) or (low <= 0 <= high and (low, high) != (0, 0)):
        return "unsure"
    return next(word for most, word in _WORDS if abs(strength) < most)


def span(about: Meta, *frames: pd.DataFrame) -> tuple[float, float]:
    """Begin and end of a capture in seconds of CLOCK_MONOTONIC: from its metadata, else from its records."""
    stamps = [float(frame["ts_ns"].min()) for frame in frames if len(frame)]
    stamps += [float(frame["ts_ns"].max()) for frame in frames if len(frame)]
    stamps += [float(moment.mono_ns) for moment in (about.begin, about.end) if moment]
    begin, end = min(stamps, default=0.0) / 1e9, max(stamps, default=0.0) / 1e9
    return begin, max(end, begin + 0.001)
