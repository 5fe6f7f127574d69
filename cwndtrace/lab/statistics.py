# SPDX-License-Identifier: Apache-2.0
"""The cost of the setting: medians and p95 of latencies, and the confidence interval of their difference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from cwndtrace.analysis.bootstrap import Values, interval
from cwndtrace.format import nominal_size


def summarise(frame: pd.DataFrame, seed: int = 1) -> pd.DataFrame:
    """Return one row per burst and idle time from a frame of measurements (see ``measurement.frame``).

    Columns: ``burst_bytes``, ``idle_s``, ``n_on``, ``n_off``, ``median_on_ms``, ``median_off_ms``, ``p95_on_ms``,
    ``p95_off_ms``, ``cost_ms`` (median with on minus median with off) with its 95 % interval ``cost_low_ms`` and
    ``cost_high_ms``, ``cost_rtts`` (the cost in round trips, by the median of min_rtt), ``resets_on`` (share of bursts
    that began with a fall of the window) and ``verdict``, a sentence. Columns of an unmeasured setting are NaN.
    """
    rows: list[dict[str, Any]] = []
    for (burst, idle), cell in frame.groupby(["burst_bytes", "idle_s"], sort=True):
        on, off = (cell[cell["setting"] == s]["latency_ms"].to_numpy(np.float64) for s in ("on", "off"))
        low, high = interval(on, off, seed)
        cost = _median(on) - _median(off)
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
            "cost_rtts": cost / float(cell["min_rtt_ms"].median()),
            "resets_on": float((fell["cwnd_after"] < fell["cwnd_before"]).mean()) if len(fell) else float("nan"),
        }
        rows.append({**row, "verdict": verdict(row)})
    return pd.DataFrame(rows)


def _median(values: Values) -> float:
    return float(np.median(values)) if len(values) else float("nan")


def _p95(values: Values) -> float:
    return float(np.quantile(values, 0.95)) if len(values) else float("nan")


def verdict(row: dict[str, Any]) -> str:
    """Return a sentence on what the setting cost this burst after this idle time."""
    cell = f"{nominal_size(row['burst_bytes'])} after {row['idle_s']:g} s:"
    cost, low, high = row["cost_ms"], row["cost_low_ms"], row["cost_high_ms"]
    if np.isnan(cost):
        return f"{cell} measured with one setting only"
    trips = f"{abs(cost):.0f} ms ({abs(row['cost_rtts']):.1f} round trips)"
    if np.isnan(low):
        direction = "slower" if cost > 0 else "faster"
        return f"{cell} {direction} by {trips} with the setting on, in too few rounds to be sure"
    spread = f"95 % interval {round(low)} to {round(high)} ms"
    if low <= 0 <= high:
        return f"{cell} the setting cost nothing ({spread})"
    return f"{cell} the setting {'cost' if cost > 0 else 'saved'} {trips}, {spread}"


def overall(summary: pd.DataFrame) -> str:
    """Return one sentence for the whole experiment: its highest cost that is certain (interval above 0), or none."""
    sure = summary[summary["cost_low_ms"] > 0]
    if not sure.empty:
        worst = sure.sort_values("cost_ms").iloc[-1]
        return (
            f"tcp_slow_start_after_idle cost up to {worst['cost_ms']:.0f} ms ({worst['cost_rtts']:.1f} round trips):"
            f" {nominal_size(int(worst['burst_bytes']))} after {worst['idle_s']:g} s took"
            f" {worst['median_on_ms']:.0f} ms with it and {worst['median_off_ms']:.0f} ms without"
        )
    if summary["cost_ms"].isna().all():
        return "only one setting was measured, so its cost is unknown"
    if summary["cost_low_ms"].isna().any():
        return "too few rounds to be sure: three or more are needed"
    return "tcp_slow_start_after_idle cost nothing here"
