# SPDX-License-Identifier: Apache-2.0
"""What a reset cost: the round trips that a burst needs from the window after it, less those from the window before.

The growth rules are the kernel's. Slow start adds what was acknowledged, up to ssthresh, however the receiver
delays its ACKs (tcp_slow_start() in net/ipv4/tcp_cong.c), so the window doubles each round trip that used it up.
Then reno adds one segment a round trip (tcp_cong_avoid_ai()); cubic at most half of the window
(bictcp_update() in net/ipv4/tcp_cubic.c), which it does as long as its curve is above the window: after idle time
the curve goes on where it was, at the window before.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

# Round trips that are simulated at most until a window is back.
_MOST_ROUNDS: Final = 10_000
# min_rtt_us before the first sample.
_NO_RTT: Final = 2**32 - 1

COLUMNS: Final = {
    "burst_bytes": "bytes sent between this reset and the connection's next one, or the end of the capture",
    "limit_bytes": "bytes that could be under way at most: the receiver's window, or the send buffer where a snapshot "
    "tells of a smaller one",
    "round_us": "us: the round trip that is counted with: the least that the kernel knew, since after idle time no "
    "queue of the connection's own is on the path; the smoothed one where it knew none",
    "rounds_after": "round trips that the burst needs from the window after the reset",
    "rounds_before": "round trips that it would have needed from the window before",
    "rounds_lost": "round trips, estimated: the difference, or where fewer the doublings that the window went through",
    "predicted_us": "us, estimated: rounds_lost times round_us",
    "regain_us": "us, estimated: until the window is what it was, with data to send all the time; missing where never",
}
"""What ``price`` adds to resets."""

MEASURED: Final = {
    "regained_us": "us, measured: until the window was what it had been; missing where it wasn't, or wasn't followed",
    "measured_us": "us: regained_us less what the bytes acknowledged until then need from the window before; an upper "
    "bound of what the reset cost, since pauses of the application count",
    "grew_rounds": "doublings that the window went through while it was followed; missing where that isn't known",
}
"""What it adds besides from windows that were followed."""


def rounds(burst: Ints, *, cwnd: Ints, ssthresh: Ints, limit_bytes: Ints, mss: Ints, target: Ints, reno: Bools) -> Ints:
    """The round trips in which each burst is sent; all arguments are arrays of one length.

    ``burst`` in bytes, ``cwnd`` and ``ssthresh`` in segments at its begin, ``limit_bytes`` the receiver's
    window or the send buffer, whichever is less; ``target`` is the window in segments up to which cubic's curve
    is known to reach (0 where it isn't known). 0 for an empty burst.
    """
    mss = np.maximum(mss, 1)
    left, limit = -(-burst // mss), np.maximum(limit_bytes // mss, 1)
    window, total = np.maximum(cwnd, 1).astype(np.float64), np.zeros(len(burst), dtype=np.int64)
    active = np.flatnonzero(left > 0)
    while len(active):
        whole = window[active].astype(np.int64)
        room = np.minimum(whole, limit[active])
        # Where the window isn't used up it no longer grows (tcp_is_cwnd_limited()): the rest goes at one pace.
        steady = (left[active] <= room) | (room < whole)
        total[active] += np.where(steady, -(-left[active] // room), 1)
        window[active] = _grown(window[active], ssthresh[active], target[active], reno[active])
        left[active] -= room
        active = active[~steady]
    return total


def regain(*, cwnd: Ints, ssthresh: Ints, limit_bytes: Ints, mss: Ints, target: Ints, reno: Bools) -> Ints:
    """The round trips in which each window that is always used up grows to ``target``; arguments as for ``rounds``.

    -1 where the limit keeps it from ever growing so far.
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
    """Windows after a round trip that used them up."""
    slow_start = np.minimum(window + np.floor(window), ssthresh)
    avoidance = np.where(reno | (window >= target), window + 1, np.minimum(window * 1.5, target))
    return np.where(window < ssthresh, slow_start, avoidance)


def bursts(resets: pd.DataFrame, connections: pd.DataFrame) -> pd.Series:
    """Bytes that each idle reset's burst sent, indexed as ``resets``; missing where nothing later tells.

    Takes frames of a Trace (with ``connection``). ``bytes_sent`` of the connection's next reset, or of its
    next snapshot after which it was idle or ended, less that of the reset itself.
    """
    last = connections.groupby("connection")["bytes_sent"].max()
    ordered = resets.sort_values("ts_ns")
    following = ordered.groupby("connection")["bytes_sent"].shift(-1)
    final = ordered["connection"].map(last)
    end = following.where(following.notna(), final)
    sent = end.astype("float64") - ordered["bytes_sent"].astype("float64")
    return sent.where(sent >= 0).reindex(resets.index)


def predict(resets: pd.DataFrame, connections: pd.DataFrame, recoveries: pd.DataFrame | None = None) -> pd.DataFrame:
    """``resets`` with ``COLUMNS`` and ``MEASURED``: ``bursts`` and their ``price``. Takes frames of a Trace.

    A connection that ended before another snapshot has sent at least what was acknowledged while it was followed.
    """
    seen = pd.concat([bursts(resets, connections), _followed(resets, recoveries)["since"]], axis=1)
    # The kernel widens a buffer as the window grows: the largest that was seen counts.
    buffers = connections["sndbuf"].astype("float64").groupby(connections["connection"]).max()
    buffer = resets["connection"].map(buffers[buffers > 0]).astype("float64")
    limit = np.fmin(resets["snd_wnd"].astype("float64"), buffer)
    return price(resets.assign(burst_bytes=seen.max(axis=1), limit_bytes=limit), recoveries)


def price(resets: pd.DataFrame, recoveries: pd.DataFrame | None = None) -> pd.DataFrame:
    """``resets``, whose ``burst_bytes`` and perhaps ``limit_bytes`` are known, with ``COLUMNS`` and ``MEASURED``.

    They are missing where the burst is, and for timeouts, whose cost is the loss's. The limit is the receiver's window
    of the record if none is given. What the window did afterwards (``recoveries`` of a Trace) bounds the estimate: a
    burst that comes in pieces needs less than one at once.
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
    """The arguments of ``rounds`` but the burst, from the window on one ``side`` of each reset."""
    names = {"cwnd": f"cwnd_{side}", "ssthresh": f"ssthresh_{side}", "limit_bytes": "limit_bytes", "mss": "mss"}
    numbers = {argument: rows[name].to_numpy(np.int64) for argument, name in names.items()}
    reno = (rows["ca_name"].astype(str) == "reno").to_numpy()
    return {**numbers, "target": rows["cwnd_before"].to_numpy(np.int64), "reno": reno}


def _rounds(rows: pd.DataFrame, sent: pd.Series, side: str) -> pd.Series:
    """``rounds`` for bytes sent from the window on one ``side`` of each reset; missing where the bytes are."""
    known = rows[sent.notna()]
    count = rounds(sent[known.index].to_numpy().astype(np.int64), **path(known, side))
    return pd.Series(count, index=known.index, dtype="float64").reindex(rows.index)


def _followed(resets: pd.DataFrame, recoveries: pd.DataFrame | None) -> pd.DataFrame:
    """What windows did that were followed, indexed as ``resets``.

    ``grew_rounds`` and ``regained_us`` of ``MEASURED``, ``since`` bytes acknowledged while it was followed, ``acked``
    these where it came back.
    """
    names = ["grew_rounds", "regained_us", "since", "acked"]
    if recoveries is None or recoveries.empty:
        return pd.DataFrame(np.nan, index=resets.index, columns=names)
    keys = resets[["skaddr", "ts_ns"]].rename(columns={"ts_ns": "reset_ts_ns"})
    row = keys.merge(recoveries.drop_duplicates(["skaddr", "reset_ts_ns"]), how="left", on=list(keys.columns))
    row.index = resets.index
    start, end = row["cwnd_start"].astype("float64").clip(lower=1), row["cwnd_end"].astype("float64")
    # In slow start a round trip that the window held back doubles it. Later it needn't, and what a loss takes away
    # hides how far it had come.
    told = (end < row["ssthresh_end"].astype("float64")) & (row["outcome"].astype(str) != "loss")
    back, acked = row["outcome"].astype(str) == "regained", row["bytes_acked"].astype("float64")
    doublings = pd.Series(np.ceil(np.log2((end / start).clip(lower=1))), index=row.index)
    values = (doublings.where(told), row["duration_us"].where(back), acked, acked.where(back))
    return pd.DataFrame(dict(zip(names, values, strict=True)))
