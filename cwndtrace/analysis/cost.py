# SPDX-License-Identifier: Apache-2.0
"""What a reset cost: the round trips that a burst needs from the window after it, less those from the window before.

The growth rules are the kernel's. Slow start adds what was acknowledged, up to ssthresh, however the receiver
delays its ACKs (tcp_slow_start() in net/ipv4/tcp_cong.c), so the window doubles each round trip that used it up.
Then reno adds one segment a round trip (tcp_cong_avoid_ai()); cubic at most half of the window
(bictcp_update() in net/ipv4/tcp_cubic.c), which it does as long as its curve is above the window: after a rest
the curve goes on where it was, at the window before. Where the connection had left slow start only a second or two
ago and never lost a packet the curve isn't there yet, and the window grows by a twentieth: then this is too little.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import pandas as pd

_INFINITE: Final = 0x7FFFFFFF
# Round trips that are simulated at most: a window of 1 has sent 2**30 segments by then even at half growth.
_MOST_ROUNDS: Final = 10_000

COLUMNS: Final = {
    "burst_bytes": "bytes sent between this reset and the connection's next one, or the end of the capture",
    "rounds_after": "round trips that the burst needs from the window after the reset",
    "rounds_before": "round trips that it would have needed from the window before",
    "predicted_us": "us, estimated: the difference in time",
    "regain_us": "us, estimated: until the window is what it was, with data to send all the time; missing where never",
}
"""What ``price`` adds to resets."""

MEASURED: Final = {
    "regained_us": "us, measured: until the window was what it had been; missing where it wasn't, or wasn't followed",
}
"""What ``predict`` adds besides."""


def schedule(
    burst: int, cwnd: int, ssthresh: int, *, mss: int, limit_bytes: int = _INFINITE, target: int = 0, ca: str = "cubic"
) -> list[int]:
    """The segments sent in each round trip of a burst.

    ``burst`` in bytes, ``cwnd`` and ``ssthresh`` in segments at its begin, ``limit_bytes`` the receiver's
    window or the send buffer, whichever is less; ``target`` is the window up to which cubic's curve is known
    to reach (0 where it isn't known). The sum is the burst in segments; empty for an empty burst.
    """
    left = math.ceil(burst / max(mss, 1))
    limit = max(1, limit_bytes // max(mss, 1))
    window = float(max(cwnd, 1))
    rounds: list[int] = []
    while left > 0 and len(rounds) < _MOST_ROUNDS:
        sent = min(left, int(window), limit)
        rounds.append(sent)
        left -= sent
        # One that wasn't used up doesn't grow (tcp_is_cwnd_limited()).
        if sent == int(window):
            window = _grown(window, ssthresh, target, ca)
    return rounds


def _grown(window: float, ssthresh: int, target: int, ca: str) -> float:
    """A window after a round trip that used it up."""
    if window < ssthresh:
        return min(window + int(window), float(ssthresh))
    if ca == "reno" or window >= target:
        return window + 1
    return min(window * 1.5, float(target))


def regain(cwnd: int, ssthresh: int, target: int, *, mss: int, limit_bytes: int = _INFINITE, ca: str = "cubic") -> int:
    """The round trips in which a window that is always used up grows from ``cwnd`` to ``target``.

    -1 where the receiver's window or the send buffer (``limit_bytes``) keeps it from ever growing so far.
    """
    limit, window, rounds = max(1, limit_bytes // max(mss, 1)), float(max(cwnd, 1)), 0
    while window < target:
        if int(window) > limit or rounds == _MOST_ROUNDS:
            return -1
        window = _grown(window, ssthresh, target, ca)
        rounds += 1
    return rounds


def duration_us(rounds: list[int], *, rtt_us: float, mss: int, rate: float | None = None) -> float:
    """Time from a request to the last byte of its reply, in microseconds.

    ``rounds`` is a ``schedule``; ``rate`` the bottleneck in bytes a second, None where there is none. A round
    trip lasts as long as its segments need on the bottleneck, if that is longer.
    """
    if not rounds:
        return 0.0
    if rate is None:
        return rtt_us * len(rounds)
    needs = [sent * mss / rate * 1e6 for sent in rounds]
    return rtt_us + sum(max(rtt_us, need) for need in needs[:-1]) + needs[-1]


def bursts(resets: pd.DataFrame, connections: pd.DataFrame) -> pd.Series:
    """Bytes that each idle reset's burst sent, indexed as ``resets``; missing where nothing later tells.

    Takes frames of a Trace (with ``connection``). ``bytes_sent`` of the connection's next reset, or of its
    next snapshot after which it rested or ended, less that of the reset itself.
    """
    last = connections.groupby("connection")["bytes_sent"].max()
    ordered = resets.sort_values("ts_ns")
    following = ordered.groupby("connection")["bytes_sent"].shift(-1)
    final = ordered["connection"].map(last)
    end = following.where(following.notna(), final)
    sent = end.astype("float64") - ordered["bytes_sent"].astype("float64")
    return sent.where(sent >= 0).reindex(resets.index)


def predict(resets: pd.DataFrame, connections: pd.DataFrame, recoveries: pd.DataFrame) -> pd.DataFrame:
    """``resets`` with ``COLUMNS`` and, beside them, ``MEASURED``. Takes frames of a Trace."""
    regained = recoveries[recoveries["outcome"] == "regained"]
    measured = regained[["skaddr", "reset_ts_ns", "duration_us"]].set_axis(["skaddr", "ts_ns", "regained_us"], axis=1)
    priced = price(resets.assign(burst_bytes=bursts(resets, connections)))
    return priced.merge(measured, how="left", on=["skaddr", "ts_ns"]).set_axis(priced.index)


def price(resets: pd.DataFrame) -> pd.DataFrame:
    """``resets``, whose ``burst_bytes`` is known, with the other ``COLUMNS``.

    They are missing where the burst is, and for timeouts, whose cost is the loss's. The round-trip time is the
    smoothed one of the record, the receiver's window the one of the record.
    """
    names = ["rounds_after", "rounds_before", "predicted_us", "regain_us"]
    rows = [_predict_one(row) for row in resets.to_dict("records")]
    return resets.join(pd.DataFrame(rows, index=resets.index, columns=names, dtype="float64"))


def _predict_one(row: dict[Any, Any]) -> tuple[float, float, float, float]:
    burst = row["burst_bytes"]
    if row["reason"] == "rto_loss":
        return (math.nan,) * 4
    mss, rtt_us, target = int(row["mss"]), float(row["srtt_us"]), int(row["cwnd_before"])
    path: dict[str, Any] = {"mss": mss, "limit_bytes": int(row["snd_wnd"]), "ca": str(row["ca_name"])}
    fallen = int(row["cwnd_after"]), int(row["ssthresh_after"])
    rounds = regain(*fallen, target, **path)
    regain_us = rounds * rtt_us if rounds >= 0 else math.nan
    if not np.isfinite(burst):
        return (math.nan, math.nan, math.nan, regain_us)
    after = schedule(int(burst), *fallen, target=target, **path)
    before = schedule(int(burst), target, int(row["ssthresh_before"]), target=target, **path)
    extra = [duration_us(r, rtt_us=rtt_us, mss=mss) for r in (after, before)]
    return (float(len(after)), float(len(before)), extra[0] - extra[1], regain_us)
