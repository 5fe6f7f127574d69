# SPDX-License-Identifier: Apache-2.0
"""The cost of a reset: the round trips that a burst needs from the window after it, less those from the window before.

The growth rules are the kernel's. Slow start adds the segments that were acknowledged, up to ssthresh, however the
receiver delays its ACKs (tcp_slow_start() in net/ipv4/tcp_cong.c), so the window doubles in each round trip that used
it up. Then reno adds one segment per round trip (tcp_cong_avoid_ai()). cubic adds at most half of the window
(bictcp_update() in net/ipv4/tcp_cubic.c), and adds that much as long as its curve is above the window. After idle time
the curve continues where it was, at the window before the reset.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

# The most round trips that are simulated until a window is back.
_MOST_ROUNDS: Final = 10_000
# The kernel's min_rtt_us before its first sample.
_NO_RTT: Final = 2**32 - 1

COLUMNS: Final = {
    "burst_bytes": "bytes sent between this reset and the connection's next one, or the end of the capture",
    "limit_bytes": "the most bytes that could be in flight: the receiver's window, or the send buffer where a snapshot "
    "shows a smaller one",
    "round_us": "round-trip time of the estimate, us: the smallest that the kernel knew, because after idle time the "
    "path holds no queue of the connection's own; the smoothed one where the kernel knew none",
    "rounds_after": "round trips that the burst needs from the window after the reset",
    "rounds_before": "round trips that it would have needed from the window before the reset",
    "rounds_lost": "round trips lost, estimated: rounds_after less rounds_before, or the doublings that the window "
    "went through where these are fewer",
    "predicted_us": "cost of the reset, us, estimated: rounds_lost times round_us",
    "regain_us": "time until the window is as large as before the reset, if there is always data to send, us, "
    "estimated; missing where it never gets there",
}
"""The columns that ``price`` adds to resets."""

MEASURED: Final = {
    "regained_us": "time until the window was as large as before the reset, us, measured; missing where it never was, "
    "or wasn't followed",
    "measured_us": "regained_us less the time that the bytes acknowledged until then need from the window before the "
    "reset, us; an upper bound of the reset's cost, because pauses of the application count",
    "grew_rounds": "doublings that the window went through while it was followed; missing where that isn't known",
}
"""The columns that ``price`` also adds, from the windows that were followed."""


def rounds(burst: Ints, *, cwnd: Ints, ssthresh: Ints, limit_bytes: Ints, mss: Ints, target: Ints, reno: Bools) -> Ints:
    """Return the number of round trips in which each burst is sent; all arguments are arrays of one length.

    ``burst`` is in bytes, ``cwnd`` and ``ssthresh`` are in segments at its start. ``limit_bytes`` is the receiver's
    window or the send buffer, whichever is smaller. ``target`` is the window in segments up to which cubic's curve is
    known to reach, 0 where that isn't known. The result is 0 for an empty burst.
    """
    mss = np.maximum(mss, 1)
    left, limit = -(-burst // mss), np.maximum(limit_bytes // mss, 1)
    window, total = np.maximum(cwnd, 1).astype(np.float64), np.zeros(len(burst), dtype=np.int64)
    active = np.flatnonzero(left > 0)
    while len(active):
        whole = window[active].astype(np.int64)
        room = np.minimum(whole, limit[active])
        # A window that isn't used up doesn't grow (tcp_is_cwnd_limited()), so the rest goes at a constant rate.
        steady = (left[active] <= room) | (room < whole)
        total[active] += np.where(steady, -(-left[active] // room), 1)
        window[active] = _grown(window[active], ssthresh[active], target[active], reno[active])
        left[active] -= room
        active = active[~steady]
    return total


def regain(*, cwnd: Ints, ssthresh: Ints, limit_bytes: Ints, mss: Ints, target: Ints, reno: Bools) -> Ints:
    """Return the number of round trips in which each window grows to ``target`` if it is always used up.

    The arguments are those of ``rounds``. The result is -1 where the limit keeps the window from ever growing so far,
    and where it takes more than ``_MOST_ROUNDS`` round trips.
    """
    limit = np.maximum(limit_bytes // np.maximum(mss, 1), 1)
    window, total = np.maximum(cwnd, 1).astype(np.float64), np.zeros(len(cwnd), dtype=np.int64)
    active = np.flatnonzero(window < target)
    for _ in range(_MOST_ROUNDS):
        stuck = window[active].astype(np.int64) > limit[active]
        total[active[stuck]] = -1
        active = active[~stuck]
        window[active] = _grown(window[active], ssthresh[active], target[active], reno[active])
        total[active] += 1
        active = active[window[active] < target[active]]
        if not len(active):
            break
    total[active] = -1
    return total


def _grown(window: Floats, ssthresh: Ints, target: Ints, reno: Bools) -> Floats:
    """Return the windows after a round trip that used them up."""
    slow_start = np.minimum(window + np.floor(window), ssthresh)
    avoidance = np.where(reno | (window >= target), window + 1, np.minimum(window * 1.5, target))
    return np.where(window < ssthresh, slow_start, avoidance)


def bursts(resets: pd.DataFrame, connections: pd.DataFrame) -> pd.Series:
    """Return the bytes of the burst after each reset, indexed as ``resets``; missing where no later record shows them.

    Takes frames of a Trace (with ``connection``). The bytes are ``bytes_sent`` of the connection's next reset, or the
    largest in its snapshots if there is none, less ``bytes_sent`` of the reset itself.
    """
    last = connections.groupby("connection")["bytes_sent"].max()
    ordered = resets.sort_values("ts_ns")
    following = ordered.groupby("connection")["bytes_sent"].shift(-1)
    final = ordered["connection"].map(last)
    end = following.where(following.notna(), final)
    sent = end.astype("float64") - ordered["bytes_sent"].astype("float64")
    return sent.where(sent >= 0).reindex(resets.index)


def predict(resets: pd.DataFrame, connections: pd.DataFrame, recoveries: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return ``resets`` with ``COLUMNS`` and ``MEASURED``, from ``bursts`` and ``price``. Takes frames of a Trace.

    A connection that ended before another snapshot sent at least what was acknowledged while its window was followed.
    """
    seen = pd.concat([bursts(resets, connections), _followed(resets, recoveries)["since"]], axis=1)
    # The kernel enlarges a send buffer as the window grows, so the largest one that was seen counts.
    buffers = connections["sndbuf"].astype("float64").groupby(connections["connection"]).max()
    buffer = resets["connection"].map(buffers[buffers > 0]).astype("float64")
    limit = np.fmin(resets["snd_wnd"].astype("float64"), buffer)
    return price(resets.assign(burst_bytes=seen.max(axis=1), limit_bytes=limit), recoveries)


def price(resets: pd.DataFrame, recoveries: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return ``resets`` with ``COLUMNS`` and ``MEASURED``, from their ``burst_bytes`` and, if there, ``limit_bytes``.

    Costs are missing where the burst is missing, and for timeouts, whose cost is that of the loss. Without
    ``limit_bytes`` the limit is the receiver's window in the record. The growth of the window afterwards
    (``recoveries`` of a Trace) bounds the estimate, because a burst that comes in pieces needs less than one at once.
    """
    if "limit_bytes" not in resets:
        resets = resets.assign(limit_bytes=resets["snd_wnd"].astype("float64"))
    followed = _followed(resets, recoveries)
    timeout = resets["reason"].astype(str) == "rto_loss"
    srtt, burst = resets["srtt_us"].astype("float64"), resets["burst_bytes"].where(~timeout)
    trip = resets["min_rtt_us"].astype("float64").where(resets["min_rtt_us"] != _NO_RTT, srtt)
    after, before = (_rounds(resets, burst, side) for side in ("after", "before"))
    difference = after - before
    lost = pd.concat([difference, followed["grew_rounds"]], axis=1).min(axis=1).where(difference.notna())
    back = pd.Series(regain(**path(resets, "after")), index=resets.index)
    needed = _rounds(resets, followed["acked"].where(~timeout), "before") * trip
    out = resets.assign(
        round_us=trip,
        rounds_after=after,
        rounds_before=before,
        rounds_lost=lost,
        predicted_us=lost * trip,
        regain_us=(back * srtt).where((back >= 0) & ~timeout),
        regained_us=followed["regained_us"],
        measured_us=np.maximum(followed["regained_us"] - needed, 0),
        grew_rounds=followed["grew_rounds"],
    )
    names = [*COLUMNS, *MEASURED]
    return out[[*(name for name in resets if name not in names), *names]]


def path(rows: pd.DataFrame, side: str) -> dict[str, Any]:
    """Return the arguments of ``rounds`` but the burst, for the window on ``side`` (before, after) of each reset."""
    names = {"cwnd": f"cwnd_{side}", "ssthresh": f"ssthresh_{side}", "limit_bytes": "limit_bytes", "mss": "mss"}
    numbers = {argument: rows[name].to_numpy(np.int64) for argument, name in names.items()}
    reno = (rows["ca_name"].astype(str) == "reno").to_numpy()
    return {**numbers, "target": rows["cwnd_before"].to_numpy(np.int64), "reno": reno}


def _rounds(rows: pd.DataFrame, sent: pd.Series, side: str) -> pd.Series:
    """Return ``rounds`` for bytes ``sent`` from the window on one ``side`` of each reset; missing where they are."""
    known = rows[sent.notna()]
    count = rounds(sent[known.index].to_numpy().astype(np.int64), **path(known, side))
    return pd.Series(count, index=known.index, dtype="float64").reindex(rows.index)


def _followed(resets: pd.DataFrame, recoveries: pd.DataFrame | None) -> pd.DataFrame:
    """Return how the followed windows grew after their resets, indexed as ``resets``.

    The columns are ``grew_rounds`` and ``regained_us`` of ``MEASURED``, ``since``, the bytes that were acknowledged
    while the window was followed, and ``acked``, the same only where the window was regained.
    """
    names = ["grew_rounds", "regained_us", "since", "acked"]
    if recoveries is None or recoveries.empty:
        return pd.DataFrame(np.nan, index=resets.index, columns=names)
    keys = resets[["skaddr", "ts_ns"]].rename(columns={"ts_ns": "reset_ts_ns"})
    row = keys.merge(recoveries.drop_duplicates(["skaddr", "reset_ts_ns"]), how="left", on=list(keys.columns))
    row.index = resets.index
    start, end = row["cwnd_start"].astype("float64").clip(lower=1), row["cwnd_end"].astype("float64")
    # In slow start a round trip that the window limited doubles it. In congestion avoidance it needn't, and a loss
    # hides how far the window had grown.
    slow_start = (end < row["ssthresh_end"].astype("float64")) & (row["outcome"].astype(str) != "loss")
    back, acked = row["outcome"].astype(str) == "regained", row["bytes_acked"].astype("float64")
    doublings = pd.Series(np.ceil(np.log2((end / start).clip(lower=1))), index=row.index)
    values = (doublings.where(slow_start), row["duration_us"].where(back), acked, acked.where(back))
    return pd.DataFrame(dict(zip(names, values, strict=True)))
