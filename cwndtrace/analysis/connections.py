# SPDX-License-Identifier: Apache-2.0
"""Connections: which records belong to the same one, and what happened to each.

A connection is a socket of the kernel: its network namespace and socket cookie. The kernel makes a cookie
only when somebody asks, so a reset may come from before: such a record is given to the connection with
its addresses and ports that is next seen to have a cookie, or stands for one of its own.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pandas as pd

from cwndtrace.records import layout

_ENDS: Final = ["netns_ino", "saddr", "sport", "daddr", "dport"]
_TEXT: Final = ("saddr", "daddr", "comm", "ca_name", "reason", "state")

COLUMNS: Final = {
    "connection": "key: namespace:cookie in hex, or namespace:addresses@socket where no cookie was ever made",
    "netns_ino": "inode of the network namespace",
    "sock_cookie": "socket cookie; 0 where none was ever made",
    "family": "2 IPv4 (mapped addresses too), 10 IPv6",
    "saddr": "local address",
    "sport": "local port",
    "daddr": "remote address",
    "dport": "remote port",
    "pid": "process last seen to use or hold it; 0 where none was",
    "comm": "its name; empty where unknown",
    "ca_name": "congestion control, the last seen",
    "state": "TCP state in the last snapshot; empty where no snapshot caught it",
    "first_seen": "UTC time of its first record",
    "last_seen": "UTC time of its last record",
    "seen_s": "seconds between the two; the connection itself may be older",
    "snapshots": "snapshots that show it",
    "resets": "records of its window falling at once",
    "resets_idle": "of these, after idle time longer than the RTO",
    "resets_rto_loss": "of these, at a retransmission timeout",
    "resets_app_limited": "of these, for not using the window",
    "idle_total_us": "us of idle time that ended in an idle reset, summed",
    "idle_longest_us": "us, the longest such idle time; 0 where there was none",
    "cwnd_min_segments": "least congestion window seen, after resets included",
    "cwnd_max_segments": "largest congestion window seen, before resets included",
    "cwnd_last_segments": "congestion window in its last record",
    "srtt_us": "us, smoothed round-trip time in its last record",
    "rto_us": "us, retransmission timeout in its last record",
    "bytes_sent": "bytes sent over its life, retransmissions included, in its last record",
    "bytes_acked": "bytes acknowledged over its life, in its last record",
    "total_retrans_segments": "segments retransmitted over its life, in its last record",
}
"""The columns of ``summary``, in order, with what they hold and in which unit."""


def identify(resets: pd.DataFrame, connections: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both frames with a text column ``connection``, equal in all rows of one connection.

    Takes the tables ``cwnd_reset`` and ``connections`` as DataFrames, and returns copies with the same rows
    in the same order. The key is ``NETNS:COOKIE`` (inode decimal, cookie hexadecimal as in ``ss -e``).
    """
    resets, connections = resets.copy(), connections.copy()
    cookies = _cookies(resets, connections)
    if "connection" not in connections:
        connections.insert(1, "connection", _keys(connections, connections["sock_cookie"].to_numpy(np.uint64)))
    if "connection" not in resets:
        resets.insert(1, "connection", _apart(resets, _keys(resets, cookies), cookies))
    return resets, connections


def summary(resets: pd.DataFrame, connections: pd.DataFrame) -> pd.DataFrame:
    """One row a connection, those with most resets and longest idle times first; the columns are ``COLUMNS``.

    Takes the tables ``cwnd_reset`` and ``connections`` as DataFrames, with or without what ``identify``
    adds. A connection that never reset is there as soon as one snapshot caught it.
    """
    resets, connections = identify(resets, connections)
    sightings = pd.concat([_from_resets(resets), _from_snapshots(connections)], ignore_index=True)
    if sightings.empty:
        return pd.DataFrame({name: pd.Series(dtype=_dtype(name)) for name in COLUMNS})
    sightings = sightings.sort_values("ts_ns", kind="stable", ignore_index=True)
    groups = sightings.groupby("connection", sort=False)
    latest = groups.last()  # of each column the last value that isn't missing
    out = latest.drop(
        columns=["time", "ts_ns", "cwnd_low", "cwnd_high", "reset_idle_us", "reset", "snapshot", "reason"]
    )
    out["first_seen"], out["last_seen"] = groups["time"].first(), groups["time"].last()
    # Not by the wall clock: it may have been stepped.
    out["seen_s"] = (groups["ts_ns"].last() - groups["ts_ns"].first()) / 1e9
    out["snapshots"], out["resets"] = groups["snapshot"].sum(), groups["reset"].sum()
    for label in layout.header().enums["reason"].values():
        out[f"resets_{label}"] = (sightings["reason"] == label).groupby(sightings["connection"]).sum()
    out["idle_total_us"], out["idle_longest_us"] = groups["reset_idle_us"].sum(), groups["reset_idle_us"].max()
    out["cwnd_min_segments"], out["cwnd_max_segments"] = groups["cwnd_low"].min(), groups["cwnd_high"].max()
    out = out.rename(columns={"cwnd": "cwnd_last_segments", "total_retrans": "total_retrans_segments"}).reset_index()
    for name in COLUMNS:
        kind = _dtype(name)
        if kind == "str":
            out[name] = out[name].fillna("").astype(str)
        elif kind != "datetime64[us, UTC]":
            out[name] = out[name].fillna(0).astype(kind)
    order = ["resets", "idle_total_us", "first_seen", "connection"]
    return out[list(COLUMNS)].sort_values(order, ascending=[False, False, True, True], ignore_index=True)


def _dtype(column: str) -> Any:
    if column in ("connection", "saddr", "daddr", "comm", "ca_name", "state"):
        return "str"
    if column in ("first_seen", "last_seen"):
        return "datetime64[us, UTC]"
    if column == "seen_s":
        return "float64"
    return "uint64" if column == "sock_cookie" else "int64"


def _plain(frame: pd.DataFrame) -> pd.DataFrame:
    """Times as nanoseconds in int64, which sorting and merging agree on; text columns as text."""
    frame = frame.assign(ts_ns=frame["ts_ns"].astype("int64"), time=frame["time"].astype("datetime64[us, UTC]"))
    return frame.assign(**{name: frame[name].astype(str) for name in _TEXT if name in frame})


def _cookies(resets: pd.DataFrame, connections: pd.DataFrame) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """The cookie of each reset, found from later records where its own is 0."""
    cookies: np.ndarray[tuple[int], np.dtype[np.uint64]] = resets["sock_cookie"].to_numpy(np.uint64).copy()
    if not (cookies == 0).any():
        return cookies
    columns = [*_ENDS, "ts_ns", "sock_cookie"]
    named = _plain(resets[cookies != 0])
    sighted = pd.concat([named[[*columns, "skaddr"]], _plain(connections)[columns]], ignore_index=True)
    sighted = sighted.rename(columns={"sock_cookie": "cookie"}).sort_values("ts_ns", kind="stable")
    # Which socket a cookie belongs to, where a reset told: another socket with the same ports isn't it.
    sockets = named.drop_duplicates(["netns_ino", "sock_cookie"]).set_index(["netns_ino", "sock_cookie"])["skaddr"]
    orphans = _plain(resets)[[*_ENDS, "ts_ns", "skaddr"]].assign(row=np.arange(len(resets)))[cookies == 0]
    orphans = orphans.sort_values("ts_ns", kind="stable")
    same_socket = sighted.dropna(subset=["skaddr"])
    for candidates, by in ((same_socket, [*_ENDS, "skaddr"]), (sighted.drop(columns="skaddr"), _ENDS)):
        found = pd.merge_asof(
            orphans, candidates.astype({n: orphans[n].dtype for n in by}), on="ts_ns", by=by, direction="forward"
        )
        found = found[found["cookie"].notna()]
        known = [
            sockets.get((ns, cookie), sk)
            for ns, cookie, sk in zip(found["netns_ino"], found["cookie"], found["skaddr"], strict=True)
        ]
        found = found[found["skaddr"].to_numpy(np.uint64) == np.array(known, dtype=np.uint64)]
        cookies[found["row"].to_numpy()] = found["cookie"].to_numpy(np.uint64)
        orphans = orphans[~orphans["row"].isin(found["row"])]
    return cookies


def _keys(frame: pd.DataFrame, cookies: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> pd.Series:
    sockets = frame["skaddr"] if "skaddr" in frame else np.zeros(len(frame), dtype=np.uint64)
    ends = [frame[name] for name in _ENDS]
    keys = [
        f"{ns}:{cookie:x}" if cookie else f"{ns}:{saddr}:{sport}-{daddr}:{dport}@{sk:x}"
        for cookie, sk, ns, saddr, sport, daddr, dport in zip(cookies, sockets, *ends, strict=True)
    ]
    return pd.Series(keys, index=frame.index, dtype="str" if keys else "object").astype(str)


def _apart(resets: pd.DataFrame, keys: pd.Series, cookies: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> pd.Series:
    """The keys, told apart where a nameless socket's ends and memory were used again: what was sent never gets less."""
    if not (nameless := cookies == 0).any():
        return keys
    rows = resets.loc[nameless, ["ts_ns", "bytes_sent"]].astype("int64").assign(key=keys[nameless])
    rows = rows.sort_values("ts_ns", kind="stable")
    less = rows.groupby("key")["bytes_sent"].diff() < 0
    before = less.groupby(rows["key"]).cumsum().reindex(keys.index, fill_value=0)
    return keys.where(before == 0, keys + "#" + (before + 1).astype(str))


_SHARED: Final = [
    "time", "ts_ns", "connection", "netns_ino", "sock_cookie", "family", "saddr", "sport", "daddr", "dport",
    "comm", "ca_name", "srtt_us", "rto_us", "bytes_sent", "bytes_acked", "total_retrans",
]  # fmt: skip


def _from_resets(resets: pd.DataFrame) -> pd.DataFrame:
    rows = _plain(resets)
    out = rows[_SHARED].assign(pid=rows["tgid"], cwnd=rows["cwnd_after"], state=None, reason=rows["reason"])
    out["cwnd_low"], out["cwnd_high"] = rows["cwnd_after"], rows["cwnd_before"]
    out["reset_idle_us"] = rows["idle_us"].astype("int64").where(rows["reason"] == "idle", 0)
    out["reset"], out["snapshot"] = 1, 0
    return _missing(out)


def _from_snapshots(connections: pd.DataFrame) -> pd.DataFrame:
    rows = _plain(connections)
    out = rows[_SHARED].assign(pid=rows["pid"], cwnd=rows["cwnd"], state=rows["state"], reason=None)
    out["cwnd_low"], out["cwnd_high"], out["reset_idle_us"] = rows["cwnd"], rows["cwnd"], 0
    out["reset"], out["snapshot"] = 0, 1
    return _missing(out)


def _missing(rows: pd.DataFrame) -> pd.DataFrame:
    """What a record couldn't tell becomes missing, so that the last one that could wins."""
    for name in ("comm", "ca_name", "state", "reason"):
        text = rows[name].astype(object)
        rows[name] = text.where(text != "", None)
    for name in ("pid", "sock_cookie"):
        number = rows[name].astype("UInt64")
        rows[name] = number.mask(number == 0)
    return rows
