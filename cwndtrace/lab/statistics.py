# SPDX-License-Identifier: Apache-2.0
"""What the setting cost: medians, p95, and how sure the difference is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from cwndtrace.analysis.bootstrap import Values, interval


def summarise(frame: pd.DataFrame, seed: int = 1) -> pd.DataFrame:
    """One row per burst and idle time from a frame of measurements (see ``measurement.frame``).

    Columns: ``burst_bytes``, ``idle_s``, ``n_on``, ``n_off``, ``median_on_ms``, ``median_off_ms``, ``p95_on_ms``,
    ``p95_off_ms``, ``cost_ms`` (on less off, of the medians) with ``cost_low_ms`` and ``cost_high_ms``, ``cost_rtts``
    (in round trips of the path's least RTT), ``resets_on`` (share of bursts that began with a fall of the window) and
    ``verdict``, a sentence. What only one setting has leaves the other's columns NaN.
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
    """What the setting cost this burst after this idle time, in a sentence."""
    what = f"{size(row['burst_bytes'])} after {row['idle_s']:g} s:"
    cost, low, high = row["cost_ms"], row["cost_low_ms"], row["cost_high_ms"]
    if np.isnan(cost):
        return f"{what} measured with one setting only"
    trips = f"{abs(cost):.0f} ms ({abs(row['cost_rtts']):.1f} round trips)"
    if np.isnan(low):
        direction = "slower" if cost > 0 else "faster"
        return f"{what} {direction} by {trips} with the setting on, in too few rounds to be sure"
    spread = f"95 % interval {round(low)} to {round(high)} ms"
    if low <= 0 <= high:
        return f"{what} the setting cost nothing ({spread})"
    return f"{what} the setting {'cost' if cost > 0 else 'saved'} {trips}, {spread}"


def size(count: int) -> str:
    """Bytes as a person says them: 300 kB, 1.5 MB."""
    for unit, name in ((1_000_000, "MB"), (1_000, "kB")):
        if count >= unit:
            return f"{count / unit:.4g} {name}"
    return f"{count} B"


def overall(summary: pd.DataFrame) -> str:
    """One sentence for the whole experiment: the dearest burst and idle time that is sure, or that nothing was."""
    sure = summary[summary["cost_low_ms"] > 0]
    if not sure.empty:
        worst = sure.sort_values("cost_ms").iloc[-1]
        return (
            f"tcp_slow_start_after_idle cost up to {worst['cost_ms']:.0f} ms ({worst['cost_rtts']:.1f} round trips):"
            f" {size(int(worst['burst_bytes']))} after {worst['idle_s']:g} s took {worst['median_on_ms']:.0f} ms"
            f" with it and {worst['median_off_ms']:.0f} ms without"
        )
    if summary["cost_ms"].isna().all():
        return "only one setting was measured, so nothing can be said of its cost"
    if summary["cost_low_ms"].isna().any():
        return "too few rounds to be sure: three or more are needed"
    return "tcp_slow_start_after_idle cost nothing here"
