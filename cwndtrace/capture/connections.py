# SPDX-License-Identifier: Apache-2.0
"""Snapshots of all TCP connections through inet_diag: the data that ss shows, as a table."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cwndtrace.capture.source import Filters
from cwndtrace.errors import NotFound
from cwndtrace.kernel import cgroups, inet_diag, interfaces, netns, sockets
from cwndtrace.records.arrow import CONNECTIONS, address, enum_labels, numbers, texts, values

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
_STATE_MASK: Final = sum(1 << state for state in _STATES)
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


_holders: Final = sockets.SocketHolders()


def snapshot(filters: Filters, utc_offset_ns: int) -> pa.Table:
    """Return the connections that ``filters`` let through, as a table of ``records.arrow.CONNECTIONS``.

    Namespaces that can't be entered are left out. A filter by interface compares the one of the route to the peer.
    """
    held = None if filters.pid is None else sockets.inodes_of(filters.pid)
    groups = None if filters.cgroup is None else cgroups.ids(filters.cgroup)[0]
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
    tables = []
    for namespace, dumped, now in found:
        table = _table(dumped, namespace.inode, holders, now, utc_offset_ns)
        keep = np.ones(len(table), dtype=np.bool_)
        if filters.family is not None:
            keep &= _column(table, "family") == filters.family
        if filters.port is not None:
            keep &= (_column(table, "sport") == filters.port) | (_column(table, "dport") == filters.port)
        if held is not None:
            keep &= np.isin(_column(table, "inode"), list(held))
        if groups is not None:
            keep &= np.array([group in groups for group in dumped.cgroup], dtype=np.bool_)
        if filters.ifindex is not None:
            peers, routes = table["daddr"].combine_chunks(), interfaces.Routes(namespace)
            routed = [routes.index_of(peer) == filters.ifindex for peer in peers.dictionary.to_pylist()]
            keep &= np.array(routed, dtype=np.bool_)[values(peers.indices)]
        tables.append(table if keep.all() else table.take(numbers(pa.int64(), np.flatnonzero(keep))))
    return pa.concat_tables(tables) if tables else pa.Table.from_batches([], CONNECTIONS)


def _column(table: pa.Table, name: str) -> npt.NDArray[Any]:
    return values(table[name].combine_chunks())


def _table(
    found: inet_diag.Sockets, inode: int, holders: dict[int, tuple[int, str]], now_ns: int, utc_offset_ns: int
) -> pa.Table:
    m, info = found.messages, found.info
    saddr, daddr = (_addresses(m["family"], m[name]) for name in ("saddr", "daddr"))
    six = np.array([":" in text for text in daddr.dictionary.to_pylist()], dtype=np.bool_)
    no_holder = (0, "")
    held = [holders.get(number, no_holder) for number in m["inode"].tolist()]
    has_sndbuf = np.array([size is not None for size in found.sndbuf], dtype=np.bool_)
    states = [_STATES.get(state, str(state)) for state in m["state"].tolist()]
    columns: dict[str, Any] = {
        "time": np.full(len(m), (now_ns + utc_offset_ns) // 1000, np.int64),
        "ts_ns": np.full(len(m), now_ns, np.uint64),
        "sock_cookie": m["cookie"],
        "netns_ino": np.full(len(m), inode, np.uint32),
        "family": np.where(six[values(daddr.indices)], socket.AF_INET6, socket.AF_INET),
        "state": texts(states).dictionary_encode(),
        "saddr": saddr,
        "sport": m["sport"],
        "daddr": daddr,
        "dport": m["dport"],
        "inode": m["inode"],
        "uid": m["uid"],
        "pid": np.array([pid for pid, _ in held], np.uint32),
        "comm": texts([comm for _, comm in held]).dictionary_encode(),
        "ca_name": texts([name.decode("ascii", "replace") for name in found.control]).dictionary_encode(),
        "ca_state": enum_labels("ca_state", info["ca_state"]),
        "sndbuf": numbers(pa.uint32(), np.array([size or 0 for size in found.sndbuf], np.uint32), has_sndbuf),
        **{name: info[of].astype(np.uint64) * factor for name, (of, factor) in _OF_INFO.items()},
    }
    arrays = []
    for f in CONNECTIONS:
        column = columns[f.name]
        if isinstance(column, np.ndarray):
            column = numbers(f.type, column.astype("i8" if pa.types.is_timestamp(f.type) else f.type.to_pandas_dtype()))
        arrays.append(column.cast(f.type))
    return pa.Table.from_arrays(arrays, schema=CONNECTIONS)


def _addresses(families: np.ndarray, raw: np.ndarray) -> pa.DictionaryArray:
    """Return addresses as text, with a dictionary: there are fewer addresses than connections."""
    places: dict[str, int] = {}
    known: dict[tuple[int, bytes], int] = {}
    indices = []
    for key in zip(families.tolist(), raw.tolist(), strict=True):
        if key not in known:
            family, packed = key
            text = socket.inet_ntoa(packed[:4]) if family == socket.AF_INET else address(packed)
            known[key] = places.setdefault(text, len(places))
        indices.append(known[key])
    return pa.DictionaryArray.from_arrays(numbers(pa.int32(), np.array(indices, np.int32)), texts(list(places)))


def pause_s(interval_s: float, cpu_s: float, took_s: float) -> float:
    """Return the seconds from the end of a snapshot to the begin of the next one.

    ``cpu_s`` and ``took_s`` are the CPU time and the time that the snapshot took. A wait for a CPU doesn't make the
    pause longer, but shorter, so that two snapshots begin at most ten seconds apart unless one takes that long itself.
    """
    return max(interval_s, min(cpu_s / _SHARE, _MOST_S - took_s))


class Snapshots:
    """Snapshots of connections: one at the start, one every ``interval_s`` seconds, and one on ``finish``.

    With very many connections they come less often, see ``pause_s``.

    The first ``drain`` starts a thread for those in between, so the thread doesn't have the privileges that the process
    has dropped before. It takes none while one waits to be drained: they would pile up behind a stalled reader.
    ``take`` returns a table and the seconds of CPU time that it took, or None where no snapshot could be taken.
    """

    def __init__(self, take: Callable[[], tuple[pa.Table, float] | None], interval_s: float = 2.0) -> None:
        self._take = take
        self._interval_s = interval_s
        self._tables: list[pa.Table] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.error: Exception | None = None
        self.late = False
        self._take_one()
        self._thread = threading.Thread(target=self._run, name="connections", daemon=True)

    def _take_one(self) -> float:
        """Take a snapshot and return the pause after it, in seconds."""
        begin = time.monotonic()
        table, cpu_s = self._take() or (None, 0.0)
        with self._lock:
            self._tables += [] if table is None else [table]
        return pause_s(self._interval_s, cpu_s, time.monotonic() - begin)

    def _run(self) -> None:
        pause, last = self._interval_s, False
        while not last:
            last = self._stop.wait(pause)
            if self._tables and not last:
                pause = self._interval_s
                continue
            try:
                pause = self._take_one()
            except Exception as e:  # drain() raises it in the session's thread
                self.error = e
                return

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
