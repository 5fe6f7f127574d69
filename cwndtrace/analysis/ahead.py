# SPDX-License-Identifier: Apache-2.0
"""Connections that an idle reset waits for: those that are idle now, and those that send too little too seldom.

The rule is tcp_slow_start_after_idle_check() of include/net/tcp.h, and how far the window falls is tcp_cwnd_restart()
of net/ipv4/tcp_output.c.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import pandas as pd

from cwndtrace import tcp
from cwndtrace.analysis.verdict import FLOOR_US
from cwndtrace.store.meta import Moment

_OF_SNAPSHOT: Final = [
    "netns_ino", "sock_cookie", "saddr", "sport", "daddr", "dport", "pid", "comm", "idle_us", "rto_us", "srtt_us",
]  # fmt: skip
DUE: Final = {
    **dict.fromkeys(_OF_SNAPSHOT[:8], "as in the table connections"),
    "idle_us": "time since data was last sent, to one millisecond, us",
    "rto_us": "retransmission timeout, us",
    "srtt_us": "smoothed round-trip time, us; 0 where none was measured",
    "cwnd": "congestion window, segments",
    "cwnd_next": "the window that a send at that moment would have left, segments",
    "rounds": "round trips that a burst of the whole window would need more from cwnd_next, in slow start",
}
"""The columns of ``due``."""

BEATS: Final = {
    **dict.fromkeys(_OF_SNAPSHOT[:8], "as in the table connections"),
    "idle_us": "time between its messages: the median before its resets, or, live, the longest that was seen, us",
    "rto_us": "retransmission timeout, us",
    "bytes": "size of a message, median, or, live, all that it sent while it was watched, bytes",
    "resets": "number of idle resets, each by one message; missing where no reset was recorded",
    "cwnd_before": "congestion window before the first of them, segments; missing as resets",
    "cwnd": "congestion window after the last of them, or now, segments",
}
"""The columns of ``beats`` and ``live_beats``."""

_SENDING: Final = ("ESTAB", "CLOSE-WAIT")
_STALE_NS: Final = 15_000_000_000
"""The longest time from a snapshot to the next, or from the last to the end of the trace: ten seconds, and a margin."""


def last_round(snapshots: pd.DataFrame, end: Moment | None) -> pd.DataFrame:
    """Return the rows of a capture's last snapshot; none where the capture ended long after the last rows.

    A snapshot of all namespaces takes less than a second, and the next one comes later. One without a connection leaves
    no row, so that rows from long before the end are of connections that were gone by then.
    """
    stamps = snapshots["ts_ns"].astype("int64")
    if snapshots.empty or (end is not None and end.mono_ns - stamps.max() > _STALE_NS):
        return snapshots.head(0)
    return snapshots[stamps > stamps.max() - 1_000_000_000]


def exposed(snapshot: pd.DataFrame, idle_sysctls: Mapping[int, int | None]) -> pd.DataFrame:
    """Return the rows of a snapshot that an idle reset can happen to.

    Idle resets must be known to be on in their namespace, by inode in ``idle_sysctls``. A congestion control written in
    BPF may be exempt without being recognised.
    """
    on = [inode for inode, value in idle_sysctls.items() if value]
    can = snapshot["state"].astype(str).isin(_SENDING) & snapshot["netns_ino"].isin(on)
    can &= ~snapshot["ca_name"].astype(str).isin(tcp.EXEMPT)
    return snapshot[can].assign(idle_us=snapshot["last_snd_us"].astype("float64"))


def due(
    snapshot: pd.DataFrame, idle_sysctls: Mapping[int, int | None], init_cwnd: Mapping[int, int] | None = None
) -> pd.DataFrame:
    """Return the connections of one snapshot whose windows the next burst resets, those that lose most first.

    A connection whose burst of a whole window would lose less than a millisecond has no row.
    ``init_cwnd`` has initial windows by cookie, where they are known; others count as the kernel's default. The columns
    are ``DUE``.
    """
    rows = exposed(snapshot, idle_sysctls)
    known = {cookie: window for cookie, window in (init_cwnd or {}).items() if window}
    initial = rows["sock_cookie"].map(known).fillna(tcp.INIT_CWND).astype("float64")
    cwnd, rto = rows["cwnd"].astype("float64"), rows["rto_us"].astype("float64")
    rows = rows.assign(initial=initial)[(rows["idle_us"] > rto) & (rto > 0) & (rows["unacked"] == 0) & (cwnd > initial)]
    # The window halves once for each whole RTO before the last, but not below the initial window.
    halvings = np.minimum(np.ceil(rows["idle_us"] / rows["rto_us"]) - 1, 32)
    after = np.maximum(rows["cwnd"].astype("int64") // 2 ** halvings.astype("int64"), rows["initial"].astype("int64"))
    rows = rows.assign(cwnd_next=after, rounds=_rounds(rows["cwnd"], after))
    rows = rows[_worth(rows["rounds"], rows["srtt_us"])]
    order = (rows["rounds"] * rows["srtt_us"].astype("float64")).sort_values(ascending=False, kind="stable").index
    return rows.loc[order, list(DUE)].reset_index(drop=True)


def _worth(rounds: pd.Series, srtt_us: pd.Series) -> pd.Series:
    """Return whether so many round trips are worth a line; a round trip that is 0 is unknown."""
    return (rounds * srtt_us.astype("float64") >= FLOOR_US) | (srtt_us == 0)


def _rounds(window: pd.Series, after: pd.Series) -> pd.Series:
    """Return how many round trips more a burst of ``window`` segments needs from ``after``, in slow start."""
    ratio = window.astype("float64") / after
    return pd.Series(np.ceil(np.log2(ratio + 1)) - 1, index=window.index).astype("int64")


def beats(resets: pd.DataFrame) -> pd.DataFrame:
    """Return the connections on which small messages came more than an RTO apart, so that each cost half the window.

    ``resets`` are those of a Trace. A message counts as small if it fitted into the window that the reset before left,
    and as a heartbeat if it was most of what happened between two resets. Connections on which a burst of the first
    window loses less than a millisecond in the last one have no row. The columns are ``BEATS``.
    """
    needs = [*_OF_SNAPSHOT[:6], "tgid", "comm", "ts_ns", "bytes_sent", "cwnd_before", "cwnd_after", "mss"]
    needs += ["idle_us", "rto_us", "srtt_us", "connection"]
    idle = resets.loc[resets["reason"].astype(str) == "idle", needs]
    idle = idle.sort_values(["connection", "ts_ns"], kind="stable")
    kinds = dict.fromkeys(("ts_ns", "bytes_sent", "cwnd_before", "cwnd_after", "idle_us", "rto_us"), "int64")
    idle = idle.astype(kinds)
    before = idle.groupby("connection")[["ts_ns", "bytes_sent", "cwnd_before", "cwnd_after", "mss"]].shift()
    sent = idle["bytes_sent"] - before["bytes_sent"]
    small = (sent > 0) & (sent <= before["cwnd_after"] * before["mss"])
    small &= idle["idle_us"] * 1000 >= 0.5 * (idle["ts_ns"] - before["ts_ns"])
    small &= idle["cwnd_before"] < before["cwnd_before"]
    # A run is a reset and those after it that small messages caused.
    run = (~small).cumsum()
    length = small.groupby(run).transform("sum")
    members = idle.assign(bytes=sent.where(small), run=run)[length > 0]
    runs = members.groupby("run").agg(
        connection=("connection", "first"), cwnd_before=("cwnd_before", "first"), cwnd=("cwnd_after", "last"),
        resets=("ts_ns", "size"),
    )  # fmt: skip
    deepest = runs.sort_values("resets", ascending=False, kind="stable").drop_duplicates("connection")
    deepest = deepest.set_index("connection")[["cwnd_before", "cwnd"]]
    groups = members.groupby("connection")
    ends = groups[_OF_SNAPSHOT[:6]].first().join(groups[["tgid", "comm"]].last().rename(columns={"tgid": "pid"}))
    medians = groups[["idle_us", "rto_us", "bytes", "srtt_us"]].median()
    counts = deepest.join(groups.size().rename("resets")).astype("Int64")
    out = ends.join(medians).join(counts)
    out = out[_worth(_rounds(out["cwnd_before"], out["cwnd"].astype("float64")), out["srtt_us"])]
    return out.sort_values("resets", ascending=False, kind="stable").reset_index(drop=True)[list(BEATS)]


def live_beats(first: pd.DataFrame, last: pd.DataFrame, idle_sysctls: Mapping[int, int | None]) -> pd.DataFrame:
    """Return the connections that sent little between two snapshots and were idle longer than the RTO in one of them.

    Only those count that have sent more than two initial windows in their life, so that a larger window was of use,
    and whose round trip is a millisecond or more. The columns are ``BEATS``.
    """
    keys = ["netns_ino", "sock_cookie"]
    then = first.set_index(keys)[["bytes_sent", "last_snd_us"]].rename(columns=lambda name: f"{name}_then")
    rows = exposed(last, idle_sysctls).join(then, on=keys, how="inner")
    sent = rows["bytes_sent"].astype("int64") - rows["bytes_sent_then"].astype("int64")
    idle = np.maximum(rows["idle_us"], rows["last_snd_us_then"].astype("float64"))
    initial = tcp.INIT_CWND * rows["mss"].astype("int64")
    large = (rows["bytes_sent"] > 2 * initial) & (rows["srtt_us"] >= FLOOR_US)
    little = (sent > 0) & (sent <= initial)
    unknown = pd.Series(pd.NA, index=rows.index, dtype="Int64")
    found = rows.assign(idle_us=idle, bytes=sent, resets=unknown, cwnd_before=unknown)
    return found[little & large & (idle > rows["rto_us"])].reset_index(drop=True)[list(BEATS)]
