# SPDX-License-Identifier: Apache-2.0
"""The connections of a capture: which records belong to the same one, and a summary of each.

A connection is a kernel socket, known by its network namespace and socket cookie. The kernel makes a cookie only on
request, so a reset may be older than the cookie. Such a record goes to the connection with its addresses and ports that
is next seen to have a cookie, or counts as a connection of its own.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pandas as pd

from cwndtrace.analysis import direction
from cwndtrace.records import layout

_ENDS: Final = ["netns_ino", "saddr", "sport", "daddr", "dport"]
_TEXT: Final = ("saddr", "daddr", "comm", "ca_name", "reason", "state")
_NAMES: Final = ("workload", "cmdline", "listener")
"""Texts that a Trace adds to the frames, and that those of older captures lack."""

COLUMNS: Final = {
    "connection": "key: namespace:cookie (in hexadecimal), or namespace:addresses@socket where no cookie was ever made",
    "netns_ino": "inode of the network namespace",
    "sock_cookie": "socket cookie; 0 where none was ever made",
    "family": "2 for IPv4 (mapped addresses too), 10 for IPv6",
    "saddr": "local address",
    "sport": "local port",
    "daddr": "remote address",
    "dport": "remote port",
    "pid": "process last seen to use or hold the socket; 0 where none was",
    "comm": "name of that process, or of the thread that sent at its last reset; empty where unknown",
    "process": "name of that process, which is that of its main thread; comm where only a reset shows the process",
    "thread": "name of the thread of pid that sent at its last reset; empty where none did",
    "cmdline": "beginning of the command line of that process; empty where unknown",
    "workload": "unit, pod and container, container, or cgroup of the last record that names one; empty where unknown",
    "service_port": "local port if a process listens on it, or has while the connection was watched; else 0",
    "service": "the name of that process and the port, such as nginx:443; empty where service_port is 0",
    "outgoing": "true if no process was seen to listen on its local port, so that this end opened it; missing where no "
    "snapshot tells",
    "ca_name": "congestion control in the last record that names it",
    "state": "TCP state in its last snapshot; empty where no snapshot shows it",
    "first_seen": "time of its first record, UTC",
    "last_seen": "time of its last record, UTC",
    "seen_s": "seconds between these two; the connection itself may be older",
    "snapshots": "number of snapshots that show it",
    "resets": "number of recorded resets of its congestion window",
    "resets_idle": "of these, those after idle time longer than the RTO",
    "resets_rto_loss": "of these, those at a retransmission timeout",
    "resets_app_limited": "of these, those because the window was not used, by the application or for the peer's",
    "resets_tlp_loss": "of these, those by a loss that a tail loss probe repaired",
    "idle_total_us": "idle time that ended in an idle reset, sum, us",
    "idle_longest_us": "longest such idle time, us; 0 where there was none",
    "cwnd_min_segments": "smallest congestion window seen, including those after resets",
    "cwnd_max_segments": "largest congestion window seen, including those before resets",
    "cwnd_last_segments": "congestion window in its last record",
    "srtt_us": "smoothed round-trip time in its last record, us",
    "rto_us": "retransmission timeout in its last record, us",
    "bytes_sent": "bytes sent over its life, including retransmissions, in its last record",
    "bytes_acked": "bytes acknowledged over its life, in its last record",
    "bytes_received": "bytes received over its life, in its last record; missing in captures of older versions",
    "total_retrans_segments": "segments retransmitted over its life, in its last record",
    "received_bytes": "bytes received while it was watched; missing where no two snapshots tell",
    "mostly_receives": "true if it received more than 10 kB while it was watched, at least ten times what it sent: its "
    "sender is the other end; missing where that isn't known",
}
"""The columns of ``summary``, in order, with their meanings and units."""


def identify(resets: pd.DataFrame, connections: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return both frames with a text column ``connection`` that is equal in all rows of one connection.

    Takes the tables ``cwnd_reset`` and ``connections`` as DataFrames, and returns copies with the same rows in the same
    order. The key is ``NETNS:COOKIE``, with the inode in decimal and the cookie in hexadecimal as in ``ss -e``.
    """
    resets, connections = resets.copy(), connections.copy()
    cookies = _cookies(resets, connections)
    if "connection" not in connections:
        connections.insert(1, "connection", _keys(connections, connections["sock_cookie"].to_numpy(np.uint64)))
    if "connection" not in resets:
        resets.insert(1, "connection", _split_reused(resets, _keys(resets, cookies), cookies))
    return resets, connections


def summary(resets: pd.DataFrame, connections: pd.DataFrame) -> pd.DataFrame:
    """Return one row per connection, those with most resets and longest idle times first; the columns are ``COLUMNS``.

    Takes the tables ``cwnd_reset`` and ``connections`` as DataFrames, with or without the column of ``identify``. A
    connection without a reset has a row as soon as one snapshot shows it.
    """
    resets, connections = identify(resets, connections)
    sightings = pd.concat([_from_resets(resets), _from_snapshots(connections)], ignore_index=True)
    if sightings.empty:
        return pd.DataFrame({name: pd.Series(dtype=_dtype(name)) for name in COLUMNS})
    sightings = sightings.sort_values("ts_ns", kind="stable", ignore_index=True)
    groups = sightings.groupby("connection", sort=False)
    latest = groups.last()  # the last value of each column that isn't missing
    out = latest.drop(
        columns=["time", "ts_ns", "cwnd_low", "cwnd_high", "reset_idle_us", "reset", "snapshot", "reason"]
    )
    out["first_seen"], out["last_seen"] = groups["time"].first(), groups["time"].last()
    # The wall clock may have been stepped, so it gives no durations.
    out["seen_s"] = (groups["ts_ns"].last() - groups["ts_ns"].first()) / 1e9
    out["snapshots"], out["resets"] = groups["snapshot"].sum(), groups["reset"].sum()
    for label in layout.header().enums["reason"].values():
        out[f"resets_{label}"] = (sightings["reason"] == label).groupby(sightings["connection"]).sum()
    out["idle_total_us"], out["idle_longest_us"] = groups["reset_idle_us"].sum(), groups["reset_idle_us"].max()
    out["cwnd_min_segments"], out["cwnd_max_segments"] = groups["cwnd_low"].min(), groups["cwnd_high"].max()
    out["listens"] = groups["listens"].max()
    out = out.assign(**_services(out))
    out["thread"] = _threads(resets, out["pid"])
    moved = direction.watched(connections, ("bytes_sent", "bytes_received")).reindex(out.index)
    mostly = direction.mostly_receives(moved["bytes_sent"], moved["bytes_received"])
    out["received_bytes"] = moved["bytes_received"]
    out["mostly_receives"] = mostly.astype("boolean").where(moved["bytes_received"].notna())
    out = out.rename(columns={"cwnd": "cwnd_last_segments", "total_retrans": "total_retrans_segments"}).reset_index()
    for name in COLUMNS:
        kind = _dtype(name)
        if kind == "str":
            out[name] = out[name].fillna("").astype(str)
        elif kind in ("float64", "boolean"):
            out[name] = out[name].astype(kind)
        elif kind != "datetime64[us, UTC]":
            out[name] = out[name].fillna(0).astype(kind)
    order = ["resets", "idle_total_us", "first_seen", "connection"]
    return out[list(COLUMNS)].sort_values(order, ascending=[False, False, True, True], ignore_index=True)


def _threads(resets: pd.DataFrame, pid: pd.Series) -> pd.Series:
    """Return, by connection, the name of the thread of process ``pid`` that sent at its last reset."""
    tgid = resets["tgid"].astype("float64")
    mine = (tgid > 0) & (tgid == resets["connection"].map(pid.astype("float64")))
    rows = resets.loc[mine, ["connection", "ts_ns", "comm"]].astype({"ts_ns": "int64", "comm": str})
    threads: pd.Series = rows.sort_values("ts_ns", kind="stable").groupby("connection")["comm"].last()
    return threads


def _services(rows: pd.DataFrame) -> dict[str, pd.Series]:
    """Return ``service_port``, ``service`` and ``outgoing`` of connections.

    Takes one row per connection, with ``listens``: 1 if a process was seen to listen on its local port, 0 if none was,
    and missing if no snapshot tells. Such a connection has the service of another one with its local address and port.
    """
    ports = rows.groupby(["netns_ino", "saddr", "sport"], sort=False)
    listens = rows["listens"].fillna(ports["listens"].transform("max").replace(0, np.nan))
    served = listens == 1
    listener = rows["listener"].fillna(ports["listener"].transform("last")).fillna("")
    return {
        "service_port": rows["sport"].astype("int64").where(served, 0),
        "service": (listener + ":" + rows["sport"].astype("int64").astype(str)).where(served, ""),
        "outgoing": (listens == 0).astype("boolean").where(listens.notna()),
    }


def _dtype(column: str) -> Any:
    if column in (*_TEXT, *_NAMES, "connection", "process", "thread", "service"):
        return "str"
    if column in ("first_seen", "last_seen"):
        return "datetime64[us, UTC]"
    if column in ("seen_s", "bytes_received", "received_bytes"):
        return "float64"
    if column in ("mostly_receives", "outgoing"):
        return "boolean"
    return "uint64" if column == "sock_cookie" else "int64"


def _plain(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the frame with ``ts_ns`` as int64, on which sorting and merging agree, and with text columns as text."""
    frame = frame.assign(ts_ns=frame["ts_ns"].astype("int64"), time=frame["time"].astype("datetime64[us, UTC]"))
    return frame.assign(**{name: frame[name].astype(str) for name in _TEXT if name in frame})


def _cookies(resets: pd.DataFrame, connections: pd.DataFrame) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Return the cookie of each reset, taken from later records where its own is 0."""
    cookies: np.ndarray[tuple[int], np.dtype[np.uint64]] = resets["sock_cookie"].to_numpy(np.uint64).copy()
    if not (cookies == 0).any():
        return cookies
    columns = [*_ENDS, "ts_ns", "sock_cookie"]
    named = _plain(resets[cookies != 0])
    sighted = pd.concat([named[[*columns, "skaddr"]], _plain(connections)[columns]], ignore_index=True)
    sighted = sighted.rename(columns={"sock_cookie": "cookie"}).sort_values("ts_ns", kind="stable")
    # The socket address of each cookie that a reset shows, so that no other socket with the same ports gets it.
    sockets = named.drop_duplicates(["netns_ino", "sock_cookie"]).set_index(["netns_ino", "sock_cookie"])["skaddr"]
    orphans = _plain(resets)[[*_ENDS, "ts_ns", "skaddr"]].assign(row=np.arange(len(resets)))[cookies == 0]
    orphans = orphans.sort_values("ts_ns", kind="stable")
    same_socket = sighted.dropna(subset=["skaddr"])
    for candidates, by in ((same_socket, [*_ENDS, "skaddr"]), (sighted.drop(columns="skaddr"), _ENDS)):
        matches = pd.merge_asof(
            orphans, candidates.astype({n: orphans[n].dtype for n in by}), on="ts_ns", by=by, direction="forward"
        )
        matches = matches[matches["cookie"].notna()]
        known = [
            sockets.get((ns, cookie), sk)
            for ns, cookie, sk in zip(matches["netns_ino"], matches["cookie"], matches["skaddr"], strict=True)
        ]
        matches = matches[matches["skaddr"].to_numpy(np.uint64) == np.array(known, dtype=np.uint64)]
        cookies[matches["row"].to_numpy()] = matches["cookie"].to_numpy(np.uint64)
        orphans = orphans[~orphans["row"].isin(matches["row"])]
    return cookies


def _keys(frame: pd.DataFrame, cookies: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> pd.Series:
    parts = frame[_ENDS].assign(cookie=cookies, sk=frame["skaddr"] if "skaddr" in frame else np.uint64(0))
    keys = np.empty(len(frame), dtype=object)
    for rows, columns in ((cookies != 0, ["netns_ino", "cookie"]), (cookies == 0, [*_ENDS, "sk"])):
        # A connection has many rows, and its text is made once.
        among = parts.loc[rows, columns]
        texts = [_key(*row) for row in among.drop_duplicates().itertuples(index=False, name=None)]
        number = among.groupby(columns, sort=False, dropna=False, observed=True).ngroup()
        keys[rows] = np.array(texts, dtype=object)[number.to_numpy()]
    return pd.Series(keys, index=frame.index, dtype="str" if len(keys) else "object").astype(str)


def _key(netns: int, *rest: Any) -> str:
    """Return the key of a socket by its cookie, or by its ends and its address in memory."""
    if len(rest) == 1:
        return f"{netns}:{rest[0]:x}"
    saddr, sport, daddr, dport, sk = rest
    return f"{netns}:{saddr}:{sport}-{daddr}:{dport}@{sk:x}"


def _split_reused(
    resets: pd.DataFrame, keys: pd.Series, cookies: np.ndarray[tuple[int], np.dtype[np.uint64]]
) -> pd.Series:
    """Return the keys, numbered where another socket without a cookie used the same addresses and memory again.

    ``bytes_sent`` of one socket never decreases, so a decrease shows another socket.
    """
    if not (cookieless := cookies == 0).any():
        return keys
    rows = resets.loc[cookieless, ["ts_ns", "bytes_sent"]].astype("int64").assign(key=keys[cookieless])
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
    out["reset"], out["snapshot"], out["bytes_received"], out["listens"] = 1, 0, np.nan, np.nan
    return _missing(_with_names(out, rows))


def _from_snapshots(connections: pd.DataFrame) -> pd.DataFrame:
    rows = _plain(connections)
    out = rows[_SHARED].assign(pid=rows["pid"], cwnd=rows["cwnd"], state=rows["state"], reason=None)
    out["cwnd_low"], out["cwnd_high"], out["reset_idle_us"] = rows["cwnd"], rows["cwnd"], 0
    out["reset"], out["snapshot"], out["bytes_received"] = 0, 1, rows["bytes_received"].astype("float64")
    out = _with_names(out, rows)
    pid = rows["listener_pid"].astype("float64") if "listener_pid" in rows else pd.Series(np.nan, index=rows.index)
    # The process may have ended or be hidden, and its name known none the less.
    out["listens"] = (pid > 0).astype("float64").where(pid.notna()).mask(out["listener"] != "", 1.0)
    return _missing(out)


def _with_names(out: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Return ``out`` with ``_NAMES`` and ``process``, empty where ``rows`` lack a column or a value."""
    none = pd.Series("", index=rows.index, dtype=object)
    text = {
        name: rows[name].astype(object).where(rows[name].notna(), "").astype(str) if name in rows else none
        for name in (*_NAMES, "process")
    }
    return out.assign(**text | {"process": text["process"].where(text["process"] != "", rows["comm"])})


def _missing(rows: pd.DataFrame) -> pd.DataFrame:
    """Replace the values that mean unknown by missing ones, so that the last known value wins."""
    for name in ("comm", "ca_name", "state", "reason", "process", *_NAMES):
        text = rows[name].astype(object)
        rows[name] = text.where(text != "", None)
    for name in ("pid", "sock_cookie"):
        number = rows[name].astype("UInt64")
        rows[name] = number.mask(number == 0)
    return rows
