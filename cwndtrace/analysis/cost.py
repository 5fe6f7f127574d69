# SPDX-License-Identifier: Apache-2.0
"""The cost of a reset: measured where its window was followed, and predicted by the kernel's growth rules.

The prediction is the number of round trips that a burst needs from the window after the reset, less those from the
window before. Slow start adds the segments that were acknowledged, up to ssthresh, however the receiver delays its ACKs
(tcp_slow_start() in net/ipv4/tcp_cong.c), so the window doubles in each round trip that used it up. Then reno adds one
segment per round trip (tcp_cong_avoid_ai()). cubic adds at most half of the window (bictcp_update() in
net/ipv4/tcp_cubic.c), and adds that much as long as its curve is above the window. After idle time the curve continues
where it was, at the window before the reset.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from cwndtrace.analysis import recovery

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

# The most round trips that are simulated until a window is back.
_MOST_ROUNDS: Final = 10_000
# No window reaches an ssthresh that was never set.
_NEVER_SET: Final = 2**62

LOSSES: Final = ("rto_loss", "tlp_loss")
"""The reasons for which a reset has no cost here: it is that of the loss."""

COLUMNS: Final = {
    "burst_bytes": "bytes sent between this reset and the connection's next one, or the end of the capture",
    "round_us": "round-trip time of the estimate, us: the smallest that the kernel knew, because after idle time the "
    "path holds no queue of the connection's own; the smoothed one where the kernel knew none",
    "rounds_after": "round trips that these bytes need from the window after the reset, estimated",
    "rounds_before": "round trips that they would have needed from the window before the chain of resets, estimated",
    "rounds_lost": "rounds_after less rounds_before",
    "predicted_us": "cost of the reset, us, estimated: rounds_lost times round_us. It takes the bytes for one burst, "
    "and the peer's window for as large as at the reset",
    "regain_us": "time until the window is as large as before the chain, if there is always data to send, us, "
    "estimated; missing where it never gets there",
}
"""The columns that ``price`` adds to resets, besides ``recovery.FOLLOWED``."""


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
    avoidance = np.where(reno | (window >= target), window + 1, np.minimum(window * 1.5, target))
    # tcp_slow_start() leaves the ACKs that come after it has reached ssthresh to avoidance.
    slow_start = np.maximum(np.minimum(window + np.floor(window), ssthresh), avoidance)
    return np.where(window < ssthresh, slow_start, avoidance)


def bursts(resets: pd.DataFrame, connections: pd.DataFrame) -> pd.Series:
    """Return the bytes of the burst after each reset, indexed as ``resets``; missing where no later record shows them.

    Takes frames of a Trace (with ``connection``). The bytes are ``bytes_sent`` of the connection's next reset, or of
    its last snapshot if there is none, less ``bytes_sent`` of the reset itself.
    """
    ordered = resets[["ts_ns", "bytes_sent", "connection"]].sort_values("ts_ns", kind="stable")
    end = ordered["bytes_sent"].astype("float64").groupby(ordered["connection"]).shift(-1)
    # A snapshot from before the reset, or with data that is still to be sent, doesn't show the whole burst.
    last = connections.sort_values("ts_ns", kind="stable").drop_duplicates("connection", keep="last")
    last = last[last["unsent_bytes"] == 0].set_index("connection")
    at_last = last.index.get_indexer(pd.Index(ordered["connection"]))
    seen_ns, seen = (
        pd.Series(np.append(last[name].to_numpy(np.float64), np.nan)[at_last], index=ordered.index)
        for name in ("ts_ns", "bytes_sent")
    )
    end = end.fillna(seen.where(seen_ns >= ordered["ts_ns"].astype("float64")))
    sent = end - ordered["bytes_sent"].astype("float64")
    return sent.where(sent >= 0).reindex(resets.index)


def predict(resets: pd.DataFrame, connections: pd.DataFrame, recoveries: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return ``resets`` with ``COLUMNS`` and ``recovery.FOLLOWED``, from ``bursts`` and ``price``.

    Takes frames of a Trace. A connection that ended before another snapshot sent at least what was acknowledged while
    its window was followed.
    """
    followed = recovery.of_resets(resets, recoveries)
    seen = pd.concat([bursts(resets, connections), followed["acked_bytes"]], axis=1)
    return _priced(resets.assign(burst_bytes=seen.max(axis=1)), followed)


def price(resets: pd.DataFrame, recoveries: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return ``resets`` with ``COLUMNS`` and ``recovery.FOLLOWED``, from their ``burst_bytes``.

    Predictions are missing where the burst is missing, and for ``LOSSES``.
    """
    return _priced(resets, recovery.of_resets(resets, recoveries))


def _priced(resets: pd.DataFrame, followed: pd.DataFrame) -> pd.DataFrame:
    whole = resets.assign(cwnd_before=followed["chain_window"].fillna(resets["cwnd_before"].astype("float64")))
    lost = resets["reason"].isin(LOSSES)
    srtt, burst = resets["srtt_us"].astype("float64"), resets["burst_bytes"].where(~lost)
    trip = resets["min_rtt_us"].fillna(srtt)
    after, before = (_rounds(whole, burst, side) for side in ("after", "before"))
    back = pd.Series(regain(**path(whole, "after")), index=resets.index)
    out = resets.assign(
        round_us=trip,
        rounds_after=after,
        rounds_before=before,
        rounds_lost=after - before,
        predicted_us=(after - before) * trip,
        regain_us=(back * srtt).where((back >= 0) & ~lost),
        **{name: followed[name] for name in recovery.FOLLOWED},
    )
    names = [*COLUMNS, *recovery.FOLLOWED]
    return out[[*(name for name in resets if name not in names), *names]]


def path(rows: pd.DataFrame, side: str) -> dict[str, Any]:
    """Return the arguments of ``rounds`` but the burst, for the window on ``side`` (before, after) of each reset."""
    names = {"cwnd": f"cwnd_{side}", "ssthresh": f"ssthresh_{side}", "limit_bytes": "snd_wnd", "mss": "mss"}
    rows = rows.assign(**{names["ssthresh"]: rows[names["ssthresh"]].fillna(_NEVER_SET)})
    numbers = {argument: rows[name].to_numpy(np.int64) for argument, name in names.items()}
    reno = (rows["ca_name"].astype(str) == "reno").to_numpy()
    return {**numbers, "target": rows["cwnd_before"].to_numpy(np.int64), "reno": reno}


def _rounds(rows: pd.DataFrame, sent: pd.Series, side: str) -> pd.Series:
    """Return ``rounds`` for bytes ``sent`` from the window on one ``side`` of each reset; missing where they are."""
    there = sent.notna().to_numpy()
    count = rounds(
        sent.to_numpy()[there].astype(np.int64), **{name: column[there] for name, column in path(rows, side).items()}
    )
    found = np.full(len(rows), np.nan)
    found[there] = count
    return pd.Series(found, index=rows.index)
