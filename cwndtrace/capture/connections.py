# SPDX-License-Identifier: Apache-2.0
"""Snapshots of the TCP connections there are, through inet_diag: what ss shows, as a table."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import pyarrow as pa
from pyroute2 import DiagSocket
from pyroute2.netlink.exceptions import NetlinkError

from cwndtrace.capture.source import Filters
from cwndtrace.errors import NotFound
from cwndtrace.events import CONNECTIONS, address
from cwndtrace.kernel import cgroups, interfaces, netns, sockets

# Bits of include/net/tcp_states.h; TIME_WAIT, CLOSE, LISTEN, SYN_RECV have no window of interest.
_STATES: Final = {
    1: "ESTAB",
    2: "SYN-SENT",
    4: "FIN-WAIT-1",
    5: "FIN-WAIT-2",
    8: "CLOSE-WAIT",
    9: "LAST-ACK",
    11: "CLOSING",
}
_STATE_MASK: Final = sum(1 << state for state in _STATES)
# INET_DIAG_INFO, INET_DIAG_CONG, INET_DIAG_SKMEMINFO, as bits of their number less one.
_EXTENSIONS: Final = (1 << 1) | (1 << 3) | (1 << 6)
_SK_MEMINFO_SNDBUF: Final = 3
_TCP: Final = 6
# A snapshot may take this share of one CPU: with very many connections they come less often.
_SHARE: Final = 0.05

Row = dict[str, Any]


def snapshot(filters: Filters, utc_offset_ns: int) -> pa.Table:
    """The connections that ``filters`` let through, as a table of ``events.CONNECTIONS``.

    Namespaces that can't be entered are left out. The interface is the one that the route to the peer
    goes out of.
    """
    holders = sockets.holders()
    mine = None if filters.pid is None else sockets.inodes_of(filters.pid)
    groups = None if filters.cgroup is None else cgroups.ids(filters.cgroup)
    rows: list[Row] = []
    for namespace in netns.all_reachable():
        if filters.netns is not None and namespace.inode != filters.netns:
            continue
        try:
            found = netns.inside(namespace, _dump)
        except (NotFound, NetlinkError, OSError):
            continue
        routes = interfaces.Routes(namespace)
        now = time.monotonic_ns()
        for message in found:
            row = _row(message, namespace.inode, holders, now, utc_offset_ns)
            if (
                filters.family in (None, row["family"])
                and filters.port in (None, row["sport"], row["dport"])
                and (mine is None or row["inode"] in mine)
                and (groups is None or message.get_attr("INET_DIAG_CGROUP_ID") in groups)
                and (filters.ifindex is None or routes.index_of(row["daddr"]) == filters.ifindex)
            ):
                rows.append(row)
    columns = {name: [row[name] for row in rows] for name in CONNECTIONS.names}
    arrays = [pa.array(columns[f.name], type=f.type) for f in CONNECTIONS]
    return pa.Table.from_arrays(arrays, schema=CONNECTIONS)


def _dump() -> list[Any]:
    with DiagSocket() as diag:
        diag.bind()
        messages: list[Any] = []
        for family in (socket.AF_INET, socket.AF_INET6):
            messages += diag.get_sock_stats(family=family, states=_STATE_MASK, protocol=_TCP, extensions=_EXTENSIONS)
        return messages


def _row(m: Any, inode: int, holders: dict[int, tuple[int, str]], now_ns: int, utc_offset_ns: int) -> Row:
    info = m.get_attr("INET_DIAG_INFO") or {}
    saddr, daddr = _address(m["idiag_src"]), _address(m["idiag_dst"])
    pid, comm = holders.get(m["idiag_inode"], (0, ""))

    def value(name: str) -> int:
        return int(info.get(f"tcpi_{name}") or 0)

    return {
        "time": (now_ns + utc_offset_ns) // 1000,
        "ts_ns": now_ns,
        "sock_cookie": m["idiag_cookie"],
        "netns_ino": inode,
        "family": socket.AF_INET6 if ":" in daddr else socket.AF_INET,
        "state": _STATES.get(m["idiag_state"], str(m["idiag_state"])),
        "saddr": saddr,
        "sport": m["idiag_sport"],
        "daddr": daddr,
        "dport": m["idiag_dport"],
        "inode": m["idiag_inode"],
        "uid": m["idiag_uid"],
        "pid": pid,
        "comm": comm,
        "ca_name": m.get_attr("INET_DIAG_CONG") or "",
        "ca_state": value("ca_state"),
        "cwnd": value("snd_cwnd"),
        "ssthresh": value("snd_ssthresh"),
        "mss": value("snd_mss"),
        "rto_us": value("rto"),
        "srtt_us": value("rtt"),
        "min_rtt_us": value("min_rtt"),
        "snd_wnd": value("snd_wnd"),
        "last_snd_us": value("last_data_sent") * 1000,
        "last_rcv_us": value("last_data_recv") * 1000,
        "bytes_acked": value("bytes_acked"),
        "bytes_sent": value("bytes_sent"),
        "unsent_bytes": value("notsent_bytes"),
        "unacked": value("unacked"),
        "total_retrans": value("total_retrans"),
        "busy_us": value("busy_time"),
        "rwnd_limited_us": value("rwnd_limited"),
        "sndbuf": _sndbuf(m.get_attr("INET_DIAG_SKMEMINFO")),
        "sndbuf_limited_us": value("sndbuf_limited"),
    }


def _sndbuf(memory: str | None) -> int | None:
    """The send buffer among the numbers of INET_DIAG_SKMEMINFO, which pyroute2 gives as hexadecimal text."""
    raw = bytes.fromhex((memory or "").replace(":", ""))
    at = 4 * _SK_MEMINFO_SNDBUF
    return int.from_bytes(raw[at : at + 4], sys.byteorder) if len(raw) >= at + 4 else None


def _address(text: str) -> str:
    return address(socket.inet_pton(socket.AF_INET6, text)) if ":" in text else text


class Snapshots:
    """Takes a snapshot at the start, every ``interval_s`` seconds, and on ``finish``.

    Those in between are taken on a thread of its own, which the first ``drain`` starts: what power was given up until
    then, it hasn't either.
    """

    def __init__(self, take: Callable[[], pa.Table], interval_s: float = 2.0) -> None:
        self._take = take
        self._interval_s = interval_s
        self._tables: list[pa.Table] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.error: Exception | None = None
        self._one()
        self._thread = threading.Thread(target=self._run, name="connections", daemon=True)

    def _one(self) -> float:
        begin = time.monotonic()
        table = self._take()
        with self._lock:
            self._tables.append(table)
        return time.monotonic() - begin

    def _run(self) -> None:
        took = 0.0
        while not self._stop.wait(max(self._interval_s, took / _SHARE)):
            try:
                took = self._one()
            except Exception as e:  # must reach the session, not die with the thread
                self.error = e
                return

    def drain(self) -> Iterator[pa.Table]:
        """The snapshots that came in since the last call; raises what stopped the thread, if anything did."""
        if self.error is not None:
            raise self.error
        if self._thread.ident is None and not self._stop.is_set():
            self._thread.start()
        with self._lock:
            tables, self._tables = self._tables, []
        return iter(tables)

    def finish(self) -> Iterator[pa.Table]:
        """Take a last one and stop."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._one()
        return self.drain()
