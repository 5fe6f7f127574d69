# SPDX-License-Identifier: Apache-2.0
"""Snapshots of all TCP connections through inet_diag: the data that ss shows, as a table.

While a trace runs, ``look`` runs in the helper process and returns columns, of which ``table`` makes an Arrow table in
the tracer, so that the helper process never loads pyarrow.
"""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import compress
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cwndtrace.capture.source import Filters
from cwndtrace.errors import NotFound
from cwndtrace.kernel import inet_diag, interfaces, netns, sockets
from cwndtrace.lazy import pa
from cwndtrace.records.arrow import address, column, enum_labels, schema

# Numbers of include/net/tcp_states.h. TIME_WAIT, CLOSE, LISTEN and SYN_RECV have no window of interest.
_STATES: Final = {
    1: "ESTAB",
    2: "SYN-SENT",
    4: "FIN-WAIT-1",
    5: "FIN-WAIT-2",
    8: "CLOSE-WAIT",
    9: "LAST-ACK",
    11: "CLOSING",
}
_LISTEN: Final = 10
_ANY: Final = ("0.0.0.0", "::")  # noqa: S104
_STATE_MASK: Final = sum(1 << state for state in (*_STATES, _LISTEN))
# Columns that come from struct tcp_info, with its member and a factor: it has some times in ms.
_OF_INFO: Final = {
    "cwnd": ("snd_cwnd", 1),
    "ssthresh": ("snd_ssthresh", 1),
    "mss": ("snd_mss", 1),
    "rto_us": ("rto", 1),
    "srtt_us": ("rtt", 1),
    "min_rtt_us": ("min_rtt", 1),
    "snd_wnd": ("snd_wnd", 1),
    "last_snd_us": ("last_data_sent", 1000),
    "last_rcv_us": ("last_data_recv", 1000),
    "bytes_acked": ("bytes_acked", 1),
    "bytes_sent": ("bytes_sent", 1),
    "bytes_received": ("bytes_received", 1),
    "unsent_bytes": ("notsent_bytes", 1),
    "unacked": ("unacked", 1),
    "total_retrans": ("total_retrans", 1),
    "busy_us": ("busy_time", 1),
    "rwnd_limited_us": ("rwnd_limited", 1),
    "sndbuf_limited_us": ("sndbuf_limited", 1),
}
# Snapshots may take this share of one CPU, so they come less often with very many connections, but not more than
# _MOST_S apart: what happens in between would go unseen.
_SHARE: Final = 0.05
_MOST_S: Final = 10.0
_LAST_S: Final = 10.0


Holder = tuple[int, str]
"""Pid and name of a process that holds a socket; ``_NOBODY`` where none was found."""

_NOBODY: Final = (0, "")

_holders: Final = sockets.SocketHolders()


Columns = dict[str, npt.NDArray[Any] | list[str]]
"""Columns of the table ``connections``, but for ``time``, of one network namespace.

``ca_state`` is a number here, and a negative ``sndbuf`` is one that isn't known.
"""


def snapshot(filters: Filters, utc_offset_ns: int) -> pa.Table:
    """Return the connections that ``filters`` let through, but for those by cgroup, as a table of ``records.arrow``."""
    return table(look(filters), utc_offset_ns)


def look(filters: Filters, groups: set[int] | None = None) -> list[Columns]:
    """Return the connections that ``filters`` let through.

    ``groups`` are the ids of the traced cgroups; None for all.
    Namespaces that can't be entered are left out. A filter by interface compares the one of the route to the peer.
    """
    held = None if filters.pid is None else sockets.inodes_of(filters.pid)
    found: list[tuple[netns.Namespace, inet_diag.Sockets, int]] = []
    for namespace in netns.all_reachable():
        if filters.netns is not None and namespace.inode != filters.netns:
            continue
        try:
            dumped = netns.inside(namespace, partial(inet_diag.dump, _STATE_MASK))
        except (NotFound, OSError):
            continue
        if len(dumped.messages):
            found.append((namespace, dumped, time.monotonic_ns()))
    holders = _holders.of({inode for _, dumped, _ in found for inode in dumped.messages["inode"].tolist()})
    taken = []
    for namespace, dumped, now in found:
        listening = dumped.messages["state"] == _LISTEN
        listeners = _listeners(dumped.messages[listening], holders)
        dumped = dumped.where(~listening)
        m = dumped.messages
        peers = _addresses(m["family"], m["daddr"])
        keep = np.ones(len(m), dtype=np.bool_)
        if filters.family is not None:
            keep &= _families(peers) == filters.family
        if filters.port is not None:
            keep &= (m["sport"] == filters.port) | (m["dport"] == filters.port)
        if held is not None:
            # np.isin() would import numpy.ma where there are many.
            keep &= np.fromiter((inode in held for inode in m["inode"].tolist()), np.bool_, len(m))
        if groups is not None:
            keep &= np.array([group in groups for group in dumped.cgroup], dtype=np.bool_)
        if filters.ifindex is not None:
            routes = interfaces.Routes(namespace)
            routed = {peer for peer in set(peers) if routes.index_of(peer) == filters.ifindex}
            keep &= np.array([peer in routed for peer in peers], dtype=np.bool_)
        daddr = [*compress(peers, keep)]
        taken.append(_columns(dumped.where(keep), daddr, namespace.inode, holders, listeners, now))
    return taken


def table(taken: list[Columns], utc_offset_ns: int) -> pa.Table:
    """Return what ``look`` returned as a table of ``records.arrow``, with this offset from CLOCK_MONOTONIC to UTC."""
    of_table = schema("connections")
    tables = [_table(columns, utc_offset_ns, of_table) for columns in taken]
    return pa.concat_tables(tables) if tables else pa.Table.from_batches([], of_table)


def _table(columns: Columns, utc_offset_ns: int, of_table: pa.Schema) -> pa.Table:
    arrays: list[pa.Array] = []
    for f in of_table:
        if f.name == "time":
            arrays.append(column(f, (np.asarray(columns["ts_ns"], np.int64) + utc_offset_ns) // 1000))
        elif f.name == "ca_state":
            arrays.append(enum_labels("ca_state", np.asarray(columns[f.name])))
        else:
            known = np.asarray(columns[f.name]) >= 0 if f.name == "sndbuf" else None
            arrays.append(column(f, columns[f.name], known))
    return pa.Table.from_arrays(arrays, schema=of_table)


def _families(addresses: list[str]) -> npt.NDArray[np.uint8]:
    """Return the families of addresses, IPv4 for mapped ones."""
    return np.array([socket.AF_INET6 if ":" in text else socket.AF_INET for text in addresses], np.uint8)


def _listeners(messages: np.ndarray, holders: dict[int, Holder]) -> dict[tuple[str, int], Holder]:
    """Return the processes that listen, by local address and port; the address is empty for any."""
    found = {}
    addresses = _addresses(messages["family"], messages["saddr"])
    for text, port, inode in zip(addresses, messages["sport"].tolist(), messages["inode"].tolist(), strict=True):
        # The kernel's own servers, such as nfsd, have sockets without a file.
        holder = holders.get(inode, _NOBODY) if inode else (0, "kernel")
        found["" if text in _ANY else text, port] = holder
    return found


def _served(addresses: list[str], ports: list[int], listeners: dict[tuple[str, int], Holder]) -> list[Holder]:
    """Return the process that listens where each connection came in; _NOBODY where none does."""
    if not listeners:
        return [_NOBODY] * len(ports)
    ends = zip(addresses, ports, strict=True)
    return [listeners.get((address, port)) or listeners.get(("", port), _NOBODY) for address, port in ends]


def _columns(
    found: inet_diag.Sockets,
    daddr: list[str],
    inode: int,
    holders: dict[int, Holder],
    listeners: dict[tuple[str, int], Holder],
    now_ns: int,
) -> Columns:
    m, info = found.messages, found.info
    saddr = _addresses(m["family"], m["saddr"])
    held = [holders.get(number, _NOBODY) for number in m["inode"].tolist()]
    served = _served(saddr, m["sport"].tolist(), listeners)
    control = {name: name.decode("ascii", "replace") for name in set(found.control)}
    return {
        "ts_ns": np.full(len(m), now_ns, np.uint64),
        "sock_cookie": m["cookie"],
        "netns_ino": np.full(len(m), inode, np.uint32),
        "family": _families(daddr),
        "state": [_STATES.get(state) or str(state) for state in m["state"].tolist()],
        "saddr": saddr,
        "sport": m["sport"],
        "daddr": daddr,
        "dport": m["dport"],
        "inode": m["inode"],
        "uid": m["uid"],
        "pid": np.array([pid for pid, _ in held], np.uint32),
        "comm": [comm for _, comm in held],
        "ca_name": [control[name] for name in found.control],
        "ca_state": info["ca_state"],
        "sndbuf": np.array([-1 if size is None else size for size in found.sndbuf], np.int64),
        "sock_cgroup_id": np.array([group or 0 for group in found.cgroup], np.uint64),
        "listener_pid": np.array([pid for pid, _ in served], np.uint32),
        "listener": [name for _, name in served],
        **{name: info[of].astype(np.uint64) * factor for name, (of, factor) in _OF_INFO.items()},
    }


def _addresses(families: np.ndarray, raw: np.ndarray) -> list[str]:
    """Return addresses as text, each text once: there are fewer addresses than connections."""
    keys = list(zip(families.tolist(), raw.tolist(), strict=True))
    known = {
        (family, packed): socket.inet_ntoa(packed[:4]) if family == socket.AF_INET else address(packed)
        for family, packed in set(keys)
    }
    return [known[key] for key in keys]


def pause_s(interval_s: float, cpu_s: float, took_s: float) -> float:
    """Return the seconds from the end of a snapshot to the begin of the next one.

    ``cpu_s`` and ``took_s`` are the CPU time and the time that the snapshot took. A wait for a CPU doesn't make the
    pause longer, but shorter, so that two snapshots begin at most ten seconds apart unless one takes that long itself.
    """
    return max(interval_s, min(cpu_s / _SHARE, _MOST_S - took_s))


class Snapshots:
    """Snapshots of connections: one at the start, one every ``interval_s`` seconds, and one on ``finish``.

    With very many connections they come less often, see ``pause_s``.

    The constructor takes the first one. The first ``drain`` starts a thread for those in between, so the thread doesn't
    have the privileges that the process has dropped before. It takes none while one waits to be drained: they would
    pile up behind a stalled reader. ``take`` returns what ``look`` does and the seconds of CPU time that it took,
    or None where no snapshot could be taken. ``utc_offset_ns`` returns the offset that ``table`` is to use.
    ``since_ns`` is when the one that is being taken began, in ns of CLOCK_MONOTONIC, infinite while none is.
    """

    def __init__(
        self,
        take: Callable[[], tuple[list[Columns], float] | None],
        utc_offset_ns: Callable[[], int],
        interval_s: float = 2.0,
    ) -> None:
        self._take = take
        self._utc_offset_ns = utc_offset_ns
        self._interval_s = interval_s
        self._tables: list[pa.Table] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.error: Exception | None = None
        self.late = False
        self.since_ns = time.monotonic() * 1e9
        # Its table is made on the thread, because importing pyarrow takes longer than all else at the start.
        self._first = take()
        self._thread = threading.Thread(target=self._run, name="connections", daemon=True)

    def _add(self, answer: tuple[list[Columns], float] | None) -> float:
        """Make the table of a snapshot, and return the seconds of CPU time that all of it took."""
        if answer is None:
            self.since_ns = math.inf
            return 0.0
        begin = time.thread_time()
        made = table(answer[0], self._utc_offset_ns())
        with self._lock:
            self._tables.append(made)
            self.since_ns = math.inf
        return answer[1] + time.thread_time() - begin

    def _take_one(self) -> float:
        """Take a snapshot and return the pause after it, in seconds."""
        begin = time.monotonic()
        self.since_ns = begin * 1e9
        cpu_s = self._add(self._take())
        return pause_s(self._interval_s, cpu_s, time.monotonic() - begin)

    def _run(self) -> None:
        try:
            self._add(self._first)
            pause, last = self._interval_s, False
            while not last:
                last = self._stop.wait(pause)
                # One that waits to be drained is followed by another only at the end.
                pause = self._interval_s if self._tables and not last else self._take_one()
        except Exception as e:  # drain() raises it in the session's thread
            self.error = e

    def drain(self) -> Iterator[pa.Table]:
        """Return the snapshots since the last call. Raises the error that stopped the thread, if there was one."""
        if self.error is not None:
            raise self.error
        if self._thread.ident is None and not self._stop.is_set():
            self._thread.start()
        with self._lock:
            tables, self._tables = self._tables, []
        return iter(tables)

    def finish(self) -> Iterator[pa.Table]:
        """Take a last snapshot, stop, and return the snapshots since the last ``drain``.

        A last snapshot that isn't there within ten seconds is left out, and ``late`` is then true.
        """
        self._stop.set()
        if self._thread.ident is None:
            self._thread.start()
        self._thread.join(_LAST_S)
        self.late = self._thread.is_alive()
        return self.drain()
