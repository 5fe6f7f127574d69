# SPDX-License-Identifier: Apache-2.0
"""What a reset cost: the round trips that a burst needs from the window after it, less those from the window before.

The growth rules are the kernel's. Slow start adds what was acknowledged, up to ssthresh, however the receiver
delays its ACKs (tcp_slow_start() in net/ipv4/tcp_cong.c), so the window doubles each round trip that used it up.
Then reno adds one segment a round trip (tcp_cong_avoid_ai()); cubic at most half of the window
(bictcp_update() in net/ipv4/tcp_cubic.c), which it does as long as its curve is above the window: after a rest
the curve goes on where it was, at the window before.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

COLUMNS: Final = {
    "burst_bytes": "bytes sent between this reset and the connection's next one, or the end of the capture",
    "limit_bytes": "bytes that could be under way at most: the receiver's window, or the send buffer where a snapshot "
    "tells of a smaller one",
    "rounds_after": "round trips that the burst needs from the window after the reset",
    "rounds_before": "round trips that it would have needed from the window before",
    "rounds_lost": "round trips, estimated: the difference, or where fewer the doublings that the window went through",
    "predicted_us": "us, estimated: rounds_lost times the smoothed round-trip time",
    "grew_rounds": "doublings that the window went through while it was followed; missing where that isn't known",
    "measured_us": "us from the reset until the window was back, less what the bytes acknowledged until then need from "
    "the window before: an upper bound, pauses of the application count; missing where the window never came back",
}
"""What ``predict`` adds to resets."""


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
        w, room = window[active], np.minimum(window[active].astype(np.int64), limit[active])
        # Where the window isn't used up it no longer grows (tcp_is_cwnd_limited()): the rest goes at one pace.
        steady = (left[active] <= room) | (room < w.astype(np.int64))
        total[active] += np.where(steady, -(-left[active] // room), 1)
        grown = np.where(
            w < ssthresh[active],
            np.minimum(w + room, ssthresh[active]),
            np.where(reno[active] | (w >= target[active]), w + 1, np.minimum(w * 1.5, target[active])),
        )
        window[active] = grown
        left[active] -= room
        active = active[~steady]
    return total


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


def predict(resets: pd.DataFrame, connections: pd.DataFrame, recoveries: pd.DataFrame | None = None) -> pd.DataFrame:
    """``resets`` with ``COLUMNS``: ``bursts`` and their ``price``. Takes frames of a Trace.

    A connection that ended before another snapshot has sent at least what was acknowledged while it was followed.
    """
    seen = pd.concat([bursts(resets, connections), _followed(resets, recoveries)["_since"]], axis=1)
    # The kernel widens a buffer as the window grows: the largest that was seen counts.
    buffers = connections["sndbuf"].astype("float64").groupby(connections["connection"]).max()
    buffer = resets["connection"].map(buffers[buffers > 0]).astype("float64")
    limit = np.fmin(resets["snd_wnd"].astype("float64"), buffer)
    return price(resets.assign(burst_bytes=seen.max(axis=1), limit_bytes=limit), recoveries)


def price(resets: pd.DataFrame, recoveries: pd.DataFrame | None = None) -> pd.DataFrame:
    """``resets``, whose ``burst_bytes`` and perhaps ``limit_bytes`` are known, with the other ``COLUMNS``.

    They are missing where the burst is, and for timeouts, whose cost is the loss's. The round-trip time is the
    smoothed one of the record, the limit the receiver's window of the record if none is given. What the window did
    afterwards (``recoveries`` of a Trace) bounds the estimate: a burst that comes in pieces needs less than one at
    once.
    """
    if "limit_bytes" not in resets:
        resets = resets.assign(limit_bytes=resets["snd_wnd"].astype("float64"))
    out = resets.join(_followed(resets, recoveries))
    priced = (out["reason"].astype(str) != "rto_loss") & out["burst_bytes"].notna()
    acked = out.pop("_acked")
    after, before = (_rounds(out, out["burst_bytes"].where(priced), side) for side in ("after", "before"))
    difference = after - before
    lost = pd.concat([difference, out["grew_rounds"]], axis=1).min(axis=1).where(difference.notna())
    srtt = out["srtt_us"].astype("float64")
    spent = out.pop("_spent_us") - _rounds(out, acked.where(priced), "before") * srtt
    out = out.assign(
        rounds_after=after,
        rounds_before=before,
        rounds_lost=lost,
        predicted_us=lost * srtt,
        measured_us=np.maximum(spent, 0),
    )
    return out[[*(name for name in resets if name not in COLUMNS), *COLUMNS]]


def _rounds(rows: pd.DataFrame, sent: pd.Series, side: str) -> pd.Series:
    """``rounds`` for bytes sent from the window on one ``side`` of each reset; missing where the bytes are."""
    known = rows[sent.notna()]
    column = {
        name: known[name].to_numpy(np.int64) for name in (f"cwnd_{side}", f"ssthresh_{side}", "limit_bytes", "mss")
    }
    count = rounds(
        sent[known.index].to_numpy().astype(np.int64),
        cwnd=column[f"cwnd_{side}"],
        ssthresh=column[f"ssthresh_{side}"],
        limit_bytes=column["limit_bytes"],
        mss=column["mss"],
        target=known["cwnd_before"].to_numpy(np.int64),
        reno=(known["ca_name"].astype(str) == "reno").to_numpy(),
    )
    return pd.Series(count, index=known.index, dtype="float64").reindex(rows.index)


def _followed(resets: pd.DataFrame, recoveries: pd.DataFrame | None) -> pd.DataFrame:
    """``grew_rounds``, bytes acknowledged since, and these and us for windows that came back; indexed as ``resets``."""
    names = ["grew_rounds", "_since", "_acked", "_spent_us"]
    if recoveries is None or recoveries.empty:
        return pd.DataFrame(np.nan, index=resets.index, columns=names)
    keys = resets[["skaddr", "ts_ns"]].rename(columns={"ts_ns": "reset_ts_ns"})
    row = keys.merge(recoveries.drop_duplicates(["skaddr", "reset_ts_ns"]), how="left", on=list(keys.columns))
    row.index = resets.index
    start, end = row["cwnd_start"].astype("float64").clip(lower=1), row["cwnd_end"].astype("float64")
    # In slow start a round trip that the window held back doubles it. Later it needn't, and what a loss takes away
    # hides how far it had come.
    told = (end < row["ssthresh_end"].astype("float64")) & (row["outcome"].astype(str) != "loss")
    back = row["outcome"].astype(str) == "regained"
    values = (
        pd.Series(np.ceil(np.log2((end / start).clip(lower=1))), index=row.index).where(told),
        row["bytes_acked"].astype("float64"),
        row["bytes_acked"].astype("float64").where(back),
        row["duration_us"].where(back),
    )
    return pd.DataFrame(dict(zip(names, values, strict=True)))
