# SPDX-License-Identifier: Apache-2.0
"""A tracer on a thread of its own, and how what it saw is compared with what is known."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Final, Literal, Self

from cwndtrace.capture import target
from cwndtrace.capture.connections import Snapshots
from cwndtrace.capture.live import Kernel
from cwndtrace.capture.privsep import Helper
from cwndtrace.capture.session import Session, Tally
from cwndtrace.kernel import facts, ladder
from tests.harness.tcp import Connection, Send, until

Record = dict[str, Any]

EMULATED: Final = "CWNDTRACE_VM" in os.environ
MISSED_US: Final = 300_000

EXACT: Final = ("tracepoint", "fentry", "kprobe")
"""The rungs that see the kernel's own change of the window; the others infer it."""


class Tracer:
    """Collects what a session yields, from construction on."""

    def __init__(
        self,
        probe: str | None = None,
        *,
        connections: bool = False,
        idle_only: bool = False,
        iface: str | None = None,
        pid: int | None = None,
        port: int | None = None,
        netns: str | None = None,
        cgroup: str | None = None,
        family: Literal[4, 6] | None = None,
        min_idle: float | None = None,
    ) -> None:
        filters = target.resolve(
            iface=iface, pid=pid, port=port, namespace=netns, cgroup=cgroup, family=family, min_idle_s=min_idle
        )
        # One reason takes half as long to load.
        reasons = ("idle",) if idle_only else ladder.REASONS
        self._kernel = Kernel(filters, probe=probe, block=False, reasons=reasons)
        self._session = Session(self._kernel)
        looked = Helper(filters)
        if connections:
            self._session.snapshots = Snapshots(lambda: looked.snapshot(0))
        self.lets: Callable[[Connection, Send], bool] = lambda _connection, _send: True
        self.probes = self._session.source.probes
        self.probe = str(self.probes["idle"])
        self.records: list[Record] = []
        self.recoveries: list[Record] = []
        self.samples: list[Record] = []
        self.snapshots: list[Record] = []
        self.error: BaseException | None = None
        self._steps = 0
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="tracer", daemon=True)
        self._thread.start()

    @property
    def tally(self) -> Tally:
        """What was counted until the last step."""
        return self._session.tally

    @property
    def dropped(self) -> int:
        """Resets for which there was no room: what counts as lost, but for the runs that the kernel skipped.

        Those are a packet here and there on a busy machine; one that was a reset is missing from the records.
        """
        return self.tally.lost["cwnd_reset"] - self._kernel.skipped()["cwnd_reset"]

    def sees(self, reason: str) -> bool:
        """Whether its rung sees this reason."""
        return self.probes.get(reason) is not None

    def _run(self) -> None:
        try:
            while not self._stopped:
                self._take(self._session.step(0.02))
                self._steps += 1
            self._take(self._session.finish())
        except BaseException as e:
            self.error = e

    def _take(self, batches: Iterable[Any]) -> None:
        kept = {
            "cwnd_reset": self.records,
            "cwnd_recovery": self.recoveries,
            "cwnd_sample": self.samples,
            "connections": self.snapshots,
        }
        for batch in batches:
            if batch.event in kept:
                kept[batch.event] += batch.to_dicts()

    def settle(self) -> None:
        """Return once all that the kernel has handed over until now is in ``records``, and counted in ``tally``."""
        seen = self._steps
        until(lambda: self.error or self._steps > seen + 1, 20, "the tracer's next step")
        if self.error:
            raise self.error

    def of(self, *connections: Connection) -> list[Record]:
        """The records of these connections' sending ends, in the order in which they happened."""
        self.settle()
        return self.taken(*connections)

    def taken(self, *connections: Connection) -> list[Record]:
        """Those of them that are here already, without waiting for more; none of a moment when nothing is known."""
        by_key = {c.key: c for c in connections}
        mine = ((by_key.get(key(r)), r) for r in self.records)
        known = (r for c, r in mine if c and not any(start < r["ts_ns"] < end for start, end in c.blind))
        return sorted(known, key=lambda r: int(r["ts_ns"]))

    def within(self, *inodes: int, since_ns: int = 0) -> list[Record]:
        """The records of these network namespaces from a moment of CLOCK_MONOTONIC on."""
        self.settle()
        return [r for r in self.records if r["netns_ino"] in inodes and r["ts_ns"] >= since_ns]

    def close(self) -> None:
        """Stop it; raises what it died of, if it did."""
        self._stopped = True
        self._thread.join()
        self._session.close()
        if self.error:
            raise self.error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def key(record: Record) -> tuple[int, str, int, str, int]:
    """What tells its connection from every other one."""
    return record["netns_ino"], record["saddr"], record["sport"], record["daddr"], record["dport"]


def expected(connection: Connection, tracer: Tracer) -> list[Send]:
    """The sends of a connection that reset its window for a reason that the tracer sees, and pass its filter."""
    return [s for s in connection.sends if s.reason and tracer.sees(s.reason) and tracer.lets(connection, s)]


def check(tracer: Tracer, *connections: Connection) -> int:
    """Compare every field of every record of these connections with what is known; how many resets there were.

    Nothing else in their network namespaces may have one since the first of their sends.
    """
    total, keys = 0, {c.key for c in connections}
    start = min((s.start_ns for c in connections for s in c.sends), default=time.monotonic_ns())
    inodes = {c.space.inode for c in connections if c.space.private}
    strangers = [r for r in tracer.within(*inodes, since_ns=start) if key(r) not in keys]
    assert not strangers
    for connection in connections:
        sends, records = expected(connection, tracer), tracer.taken(connection)
        found = [(r["reason"], r["cwnd_before"], r["cwnd_after"]) for r in records]
        known = [(s.reason, s.before.cwnd, s.after.cwnd) for s in sends]
        assert found == known, connection.key
        for send, record in zip(sends, records, strict=True):
            differing = differences(tracer, connection, send, record)
            assert not differing, (differing, send, record)
        total += len(sends)
    return total


def differences(tracer: Tracer, connection: Connection, send: Send, record: Record) -> dict[str, tuple[Any, Any]]:
    """The fields of a record that aren't what TCP_INFO before and after the send says: name to (record, truth)."""
    before, after = send.before, send.after
    truth: Record = {
        "event": "cwnd_reset",
        "probe": tracer.probes[str(send.reason)],
        "reason": send.reason,
        "netns_ino": connection.space.inode,
        "family": connection.family,
        "saddr": connection.saddr,
        "sport": connection.sport,
        "daddr": connection.daddr,
        "dport": connection.dport,
        "ifindex": connection.ifindex,
        "init_cwnd": connection.init_cwnd,
        "tgid": send.tgid,
        "tid": send.tid,
        "comm": send.comm,
        "ca_name": connection.ca,
        "ca_state": ("open", "disorder", "cwr", "recovery", "loss")[before.ca_state],
        "cwnd_before": before.cwnd,
        "cwnd_after": after.cwnd,
        "ssthresh_before": before.ssthresh,
        "ssthresh_after": after.ssthresh,
        "rto_us": before.rto_us,
        "srtt_us": before.srtt_us,
        "min_rtt_us": before.min_rtt_us,
        "mss": before.mss,
        "bytes_acked": before.bytes_acked,
        "bytes_sent": before.bytes_sent,
        "unsent_bytes": before.unsent,
        "total_retrans": before.total_retrans,
    }
    if connection.cgroup_id:
        truth["cgroup_id"] = connection.cgroup_id
    if before.snd_wnd:
        truth["snd_wnd"] = before.snd_wnd
    if record["sock_cookie"]:
        # Asked for only now: asking makes one.
        truth["sock_cookie"] = connection.cookie()
    if truth["probe"] == "tcp_probe" or send.reason == "app_limited":
        # Seen with the first packet under way, which then counts as sent or as being sent.
        sent = after.bytes_sent - before.bytes_sent
        truth["bytes_sent"] = min(max(record["bytes_sent"], before.bytes_sent), after.bytes_sent)
        truth["unsent_bytes"] = min(record["unsent_bytes"], sent + before.unsent)
    found = {name: (record[name], value) for name, value in truth.items() if record[name] != value}
    if not send.start_ns <= record["ts_ns"] <= send.end_ns:
        found["ts_ns"] = (record["ts_ns"], (send.start_ns, send.end_ns))
    for name, since in (("idle_us", before.last_snd_us), ("last_rcv_us", before.last_rcv_us)):
        if send.reason == "idle" and not since <= record[name] <= latest_idle_us(since, send):
            found[name] = (record[name], (since, latest_idle_us(since, send)))
    return found


def jiffy_us() -> int:
    """One tick of the kernel's clock of idle times."""
    return 1_000_000 // facts.hz()


def latest_idle_us(idle_us: int, send: Send) -> int:
    """The longest that idle time which had lasted ``idle_us`` before a send can have lasted by the time it happened.

    Both are whole ticks of one clock, so a record may be later by the ticks that fell into the send: those that
    fit into its time, and one. An emulated machine misses ticks and makes up for them later.
    """
    ticks = (send.end_ns - send.start_ns) // 1000 // jiffy_us() + 1
    return idle_us + ticks * jiffy_us() + (MISSED_US if EMULATED else 0)
