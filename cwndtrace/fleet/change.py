# SPDX-License-Identifier: Apache-2.0
"""What a change did: the cost per traced second before and after a date, by group of connections.

A host that traced for longer, or in more captures, counts for more. The interval rests on the hosts, which are drawn
anew with all that they have on both sides, because the captures of one host are alike.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from cwndtrace.analysis.bootstrap import CONFIDENCE, Values
from cwndtrace.fleet.tables import KEY

ENOUGH: Final = 5
"""The least number of hosts on each side from which an interval is computed. With fewer, it holds the true ratio less
often than it says, however wide it is made."""

UNKNOWN_SHARE: Final = 0.1
"""The most of a side's resets whose cost may be unknown for its costs to be compared. Those count as nothing."""

RESAMPLES: Final = 2000
_BLOCK: Final = 2_000_000  # numbers that are drawn at a time, which bounds memory
_SIDES: Final = ("before", "after")
_SUMS: Final = ["lost_us", "resets", "resets_unknown", "sent_bytes"]

COLUMNS: Final = {
    "hosts_before": "number of hosts that show the group in captures from before the date",
    "hosts_after": "the same after it",
    "hosts_both": "number of hosts that do on both sides",
    "traced_before_s": "length of these hosts' captures from before the date, sum, s",
    "traced_after_s": "the same after it",
    "lost_before_us": "cost of the resets in these captures, sum, us, measured",
    "lost_after_us": "the same after it",
    "resets_before": "number of resets in these captures",
    "resets_after": "the same after it",
    "unknown_before": "of these, those of which the cost isn't known",
    "unknown_after": "the same after it",
    "rate_before_us": "cost per traced second before the date, us, measured; missing without a traced second",
    "rate_after_us": "the same after it",
    "ratio": "rate_after_us by rate_before_us; missing where nothing was lost before",
    "low": "lower end of its 95 % bootstrap interval over hosts; missing where there is none",
    "high": "upper end of that interval; missing where there is none, or where it has no bound",
    "sent_ratio": "bytes sent per traced second, after the date by before; missing where nothing was sent before",
    "outcome": "less, more, or unsure where the interval holds 1; none_before or none_after where nothing was lost on "
    "one side, none on both; few_hosts, unknown_cost, one_side or no_length where it can't be told",
}
"""The columns of ``change``, after those that name the group."""


def change(rows: pd.DataFrame, captures: pd.DataFrame, side: pd.Series, keys: list[str]) -> pd.DataFrame:
    """Return one row per group of connections that a capture before or after the date shows.

    The columns are ``COLUMNS``, and those that lost most come first. Takes the result of ``summary.named``, the
    captures, the ``side`` of each of them (``clocks.sides``), and the columns that name a group. Captures that are on
    no side, or whose length isn't known, are left out.
    """
    usable = captures[[*KEY, "seconds"]].assign(side=side).dropna(subset="seconds")
    usable = usable[usable["side"].isin(_SIDES)].rename(columns={"seconds": "traced_s"})
    traced = usable.groupby(["host", "side"], as_index=False)["traced_s"].sum()
    number = rows.groupby(keys, sort=False, dropna=False).ngroup().rename("group")
    mine = rows[[*KEY, *_SUMS]].assign(group=number).merge(usable[[*KEY, "side"]], on=KEY)
    sums = mine.groupby(["group", "host", "side"], as_index=False)[_SUMS].sum().merge(traced, on=["host", "side"])
    figures = [*_SUMS, "traced_s"]
    found = {
        group: _compared(hosts.pivot(index="host", columns="side", values=figures))
        for group, hosts in sums.groupby("group")
    }
    compared = pd.DataFrame.from_dict(found, orient="index", columns=list(COLUMNS))
    first = rows.loc[~number.duplicated(), keys].reset_index(drop=True)
    out = first.join(compared, how="inner")
    order = (out["lost_before_us"] + out["lost_after_us"]).argsort(kind="stable")[::-1]
    return out.iloc[order].reset_index(drop=True)


def _compared(hosts: pd.DataFrame) -> dict[str, Any]:
    """Return ``COLUMNS`` of one group; ``hosts`` has a row per host, and columns by figure and side."""
    wide = {
        (name, which): hosts[name, which] if (name, which) in hosts else pd.Series(np.nan, index=hosts.index)
        for name in (*_SUMS, "traced_s")
        for which in _SIDES
    }
    there = {which: wide["traced_s", which].notna() for which in _SIDES}
    total = {pair: float(values.sum()) for pair, values in wide.items()}
    rates = {which: _ratio(total["lost_us", which], total["traced_s", which]) for which in _SIDES}
    sent = {which: _ratio(total["sent_bytes", which], total["traced_s", which]) for which in _SIDES}
    row: dict[str, Any] = {
        **{f"hosts_{which}": int(there[which].sum()) for which in _SIDES},
        "hosts_both": int((there["before"] & there["after"]).sum()),
        **{f"traced_{which}_s": total["traced_s", which] for which in _SIDES},
        **{f"lost_{which}_us": total["lost_us", which] for which in _SIDES},
        **{f"resets_{which}": int(total["resets", which]) for which in _SIDES},
        **{f"unknown_{which}": int(total["resets_unknown", which]) for which in _SIDES},
        **{f"rate_{which}_us": rates[which] for which in _SIDES},
        "ratio": _ratio(rates["after"], rates["before"]),
        "low": float("nan"),
        "high": float("nan"),
        "sent_ratio": _ratio(sent["after"], sent["before"]),
    }
    reason = _reason(row)
    if not reason:
        (lost_before, traced_before), (lost_after, traced_after) = (
            tuple(np.asarray(wide[name, which].fillna(0.0), dtype=np.float64) for name in ("lost_us", "traced_s"))
            for which in _SIDES
        )
        row["low"], high = interval(lost_before, traced_before, lost_after, traced_after)
        row["high"] = high if math.isfinite(high) else float("nan")
        reason = "less" if high < 1 else "more" if row["low"] > 1 else "unsure"
    return row | {"outcome": reason}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else float("nan")


def _reason(row: dict[str, Any]) -> str:
    """Return the outcome that allows no interval; empty where there is one."""
    if not row["hosts_before"] or not row["hosts_after"]:
        return "one_side"
    if not row["traced_before_s"] or not row["traced_after_s"]:
        return "no_length"
    # A side whose known costs are zero lost an unknown time, however few of its costs aren't known.
    shares = {which: UNKNOWN_SHARE if row[f"lost_{which}_us"] else 0.0 for which in _SIDES}
    if any(row[f"unknown_{which}"] > share * row[f"resets_{which}"] for which, share in shares.items()):
        return "unknown_cost"
    if min(row["hosts_before"], row["hosts_after"]) < ENOUGH:
        return "few_hosts"
    zeros = {which for which in _SIDES if not row[f"lost_{which}_us"]}
    return {0: "", 1: f"none_{min(zeros, default='')}", 2: "none"}[len(zeros)]


def interval(
    lost_before: Values, traced_before: Values, lost_after: Values, traced_after: Values, seed: int = 1
) -> tuple[float, float]:
    """Return the 95 % interval of the ratio of two rates, by a bootstrap over hosts, one value per host in each array.

    A host is drawn with all its values, and stands for hosts that are on the same sides as it; one that has no values
    on a side has zeros there. Percentiles are taken further out
    than at 2.5 %, as far as Student's t is from the normal distribution for so few hosts, because percentiles alone
    make an interval too narrow by that much. The upper end is infinite where resamples without a cost before the date
    are that frequent.
    """
    values = np.column_stack([lost_before, traced_before, lost_after, traced_after])
    least = int(min((traced_before > 0).sum(), (traced_after > 0).sum()))
    random = np.random.default_rng(seed)
    sums: Values = np.zeros((RESAMPLES, values.shape[1]))
    for mine in _alike(traced_before > 0, traced_after > 0):
        sums += np.concatenate([_drawn(values[mine], size, random) for size in _blocks(len(mine))])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = (sums[:, 2] / sums[:, 3]) / (sums[:, 0] / sums[:, 1])
    tail = _tail(least)
    # A resample that says nothing counts against both ends.
    low = np.quantile(np.where(np.isnan(ratio), 0.0, ratio), tail, method="lower")
    high = np.quantile(np.where(np.isnan(ratio), np.inf, ratio), 1 - tail, method="higher")
    estimate = (lost_after.sum() / traced_after.sum()) / (lost_before.sum() / traced_before.sum())
    return min(float(low), float(estimate)), max(float(high), float(estimate))


def _alike(before: npt.NDArray[np.bool_], after: npt.NDArray[np.bool_]) -> list[npt.NDArray[np.int64]]:
    """Return the numbers of the hosts in groups that are drawn by themselves: those of both sides, or of one of them.

    Too few to be drawn by themselves are drawn with the largest group.
    """
    kind = 2 * before + after
    number = np.bincount(kind, minlength=4)
    kind = np.where(number[kind] < ENOUGH, number.argmax(), kind)
    return [np.flatnonzero(kind == each) for each in np.unique(kind)]


def _blocks(n: int) -> list[int]:
    size = max(1, min(RESAMPLES, _BLOCK // n))
    return [min(size, RESAMPLES - at) for at in range(0, RESAMPLES, size)]


def _drawn(values: Values, resamples: int, random: np.random.Generator) -> Values:
    """Return the sums of ``values`` over hosts in so many resamples of the hosts."""
    n = len(values)
    counts: npt.NDArray[np.int64] = random.multinomial(n, np.full(n, 1 / n), resamples)
    sums: Values = counts @ values
    return sums


def _tail(hosts: int) -> float:
    """Return the share of resamples beyond each end of an interval."""
    normal = NormalDist()
    z, df = normal.inv_cdf((1 + CONFIDENCE) / 2), hosts - 1
    # Student's t by the expansion of Cornish and Fisher, to 0.3 % from four degrees of freedom on.
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    t = z + sum(term / df ** (power + 1) for power, term in enumerate(terms))
    return normal.cdf(-math.sqrt(hosts / df) * t)
