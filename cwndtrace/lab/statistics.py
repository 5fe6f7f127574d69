# SPDX-License-Identifier: Apache-2.0
"""The cost of the setting: medians and p95 of latencies, and the confidence interval of their difference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import pandas as pd

from cwndtrace.analysis.bootstrap import Values, interval
from cwndtrace.format import nominal_size, plural, signed

_LEAST_MS: Final = 1.0
"""A shorter cost is none, however short the round trip: what wakes the processes at both ends takes as long."""


def summarise(frame: pd.DataFrame, seed: int = 1) -> pd.DataFrame:
    """Return one row per burst and idle time from a frame of measurements (see ``measurement.frame``).

    Columns: ``burst_bytes``, ``idle_s``, ``n_on``, ``n_off``, ``median_on_ms``, ``median_off_ms``, ``p95_on_ms``,
    ``p95_off_ms``, ``cost_ms`` (median with on minus median with off) with its 95 % interval ``cost_low_ms`` and
    ``cost_high_ms``, ``cost_rtts`` (the cost in round trips, by the median of min_rtt), ``resets_on`` (share of bursts
    that began with a fall of the window), ``outcome`` (see ``outcome``) and ``verdict``, a sentence. Columns of an
    unmeasured setting are NaN.
    """
    rows: list[dict[str, Any]] = []
    for (burst, idle), cell in frame.groupby(["burst_bytes", "idle_s"], sort=True):
        on, off = (cell[cell["setting"] == s]["latency_ms"].to_numpy(np.float64) for s in ("on", "off"))
        low, high = interval(on, off, seed)
        cost, rtt_ms = _median(on) - _median(off), float(cell["min_rtt_ms"].median())
        fell = cell[cell["setting"] == "on"]
        row = {
            "burst_bytes": burst,
            "idle_s": idle,
            "n_on": len(on),
            "n_off": len(off),
            "median_on_ms": _median(on),
            "median_off_ms": _median(off),
            "p95_on_ms": _p95(on),
            "p95_off_ms": _p95(off),
            "cost_ms": cost,
            "cost_low_ms": low,
            "cost_high_ms": high,
            "cost_rtts": cost / rtt_ms,
            "resets_on": float((fell["cwnd_after"] < fell["cwnd_before"]).mean()) if len(fell) else float("nan"),
            "outcome": outcome(cost, low, high, rtt_ms),
        }
        rows.append({**row, "verdict": verdict(row)})
    return pd.DataFrame(rows)


def _median(values: Values) -> float:
    return float(np.median(values)) if len(values) else float("nan")


def _p95(values: Values) -> float:
    return float(np.quantile(values, 0.95)) if len(values) else float("nan")


def outcome(cost: float, low: float, high: float, rtt_ms: float) -> str:
    """Return what a cost with its 95 % interval, all in ms, says about the setting.

    - ``one_setting``: the other setting wasn't measured, so ``cost`` is NaN.
    - ``few_rounds``: there were too few for an interval, so its ends are NaN.
    - ``none``: the whole interval is nearer to 0 than half a round trip, or than 1 ms. A reset costs whole round trips.
    - ``cost`` and ``saved``: the whole interval is above or below 0.
    - ``inconclusive``: the interval holds 0 and also a cost, or a saving, of half a round trip or more.
    """
    if np.isnan(cost):
        return "one_setting"
    if np.isnan(low):
        return "few_rounds"
    if _within(low, high) <= max(rtt_ms / 2, _LEAST_MS):
        return "none"
    if low <= 0 <= high:
        return "inconclusive"
    return "cost" if low > 0 else "saved"


def _within(low: float, high: float) -> float:
    return max(abs(low), abs(high))


def _spread(row: Mapping[Any, Any]) -> str:
    low, high = (signed(row[end], "{:.0f}".format) for end in ("cost_low_ms", "cost_high_ms"))
    return f"95 % interval {low} to {high} ms"


def _trips(row: Mapping[Any, Any]) -> str:
    return f"{abs(row['cost_ms']):.0f} ms ({abs(row['cost_rtts']):.1f} round trips)"


def verdict(row: Mapping[Any, Any]) -> str:
    """Return a sentence on what the setting cost this burst after this idle time."""
    return f"{nominal_size(row['burst_bytes'])} after {row['idle_s']:g} s: {_finding(row)}"


def _finding(row: Mapping[Any, Any]) -> str:
    found = row["outcome"]
    if found == "one_setting":
        return "measured with one setting only"
    if found == "few_rounds":
        slower = "slower" if row["cost_ms"] > 0 else "faster"
        return f"{slower} by {_trips(row)} with the setting on, in too few rounds to be sure"
    if found == "none":
        return f"the setting cost nothing, to within {_nothing(row)} ({_spread(row)})"
    if found == "inconclusive":
        return f"inconclusive, {signed(row['cost_ms'], '{:.0f} ms'.format)} ({_spread(row)})"
    return f"the setting {found} {_trips(row)}, {_spread(row)}"


def _nothing(*rows: Mapping[Any, Any]) -> str:
    return f"{max(1, math.ceil(max(_within(row['cost_low_ms'], row['cost_high_ms']) for row in rows)))} ms"


def overall(summary: pd.DataFrame) -> str:
    """Return one sentence for the whole experiment: its highest cost that is certain, or why there is none."""
    cells: dict[str, list[dict[Any, Any]]] = {}
    for row in summary.sort_values("cost_ms").to_dict("records"):
        cells.setdefault(row["outcome"], []).append(row)
    unsure = cells.get("inconclusive", [])
    rest = f"; inconclusive: {len(unsure):,} of {plural(len(summary), 'comparison')}" if unsure else ""
    if "cost" in cells:
        worst = cells["cost"][-1]
        return f"tcp_slow_start_after_idle cost up to {_trips(worst)}: {_took(worst)}{rest}"
    if cells.keys() == {"one_setting"}:
        return "only one setting was measured, so its cost is unknown"
    if "few_rounds" in cells:
        return "too few rounds to be sure: three or more are needed"
    if unsure:
        widest = max(unsure, key=lambda row: float(row["cost_high_ms"] - row["cost_low_ms"]))
        return f"{widest['verdict']}; measure more rounds (--rounds){rest}"
    if "saved" in cells:
        return f"tcp_slow_start_after_idle saved up to {_trips(cells['saved'][0])}: {_took(cells['saved'][0])}"
    return f"tcp_slow_start_after_idle cost nothing here, to within {_nothing(*cells['none'])}"


def _took(row: Mapping[Any, Any]) -> str:
    return (
        f"{nominal_size(int(row['burst_bytes']))} after {row['idle_s']:g} s took"
        f" {row['median_on_ms']:.0f} ms with it and {row['median_off_ms']:.0f} ms without"
    )
