# SPDX-License-Identifier: Apache-2.0
"""A tracer on a separate thread, and comparisons of its records with the sends of known connections."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, Final, Literal, Self

from cwndtrace.capture import target
from cwndtrace.capture.connections import Snapshots
from cwndtrace.capture.live import Kernel
from cwndtrace.capture.privsep import Helper
from cwndtrace.capture.session import Session, Tally
from cwndtrace.errors import NoProbe
from cwndtrace.kernel import btf, facts, ladder
from tests.harness.tcp import Send, TcpConnection, until

Record = dict[str, Any]

EMULATED: Final = "CWNDTRACE_VM" in os.environ
MISSED_US: Final = 300_000

EXACT: Final = ("tracepoint", "fentry", "kprobe")
"""The probes that see the kernel's own change of the window; the others infer it."""


@cache
def left_out() -> dict[str, str]:
    """Return the probes that this machine can't have, with reasons: the kernel lacks a feature, or a policy refuses.

    A probe that fails to load for another reason is not among them, so its tests fail.
    """
    here = facts.ladder_facts(btf.Btf.running())
    reasons = {probe.name: ladder.lacks(here, probe, "idle") or _refused(probe) for probe in ladder.PROBES}
    return {name: why for name, why in reasons.items() if why}


def _refused(probe: ladder.Probe) -> str | None:
    if all(a.kind in ("raw_tracepoint", "tp_btf") for a in probe.attachments["idle"]):
        return None
    try:
        Kernel(probe=probe.name, block=False, reasons=("idle",)).close()
    except NoProbe as e:
        return e.tried[probe.name] if "policy" in str(e) else None
    return None


class Tracer:
    """A session whose batches are collected on a thread, from construction until ``close``."""

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
        # The programs for one reason load in half the time.
        reasons = ("idle",) if idle_only else ladder.REASONS
        self._kernel = Kernel(filters, probe=probe, block=False, reasons=reasons)
        self._session = Session(self._kernel)
        helper = Helper(filters)
        if connections:
            self._session.snapshots = Snapshots(helper.snapshot, lambda: 0)
        self.passes: Callable[[TcpConnection, Send], bool] = lambda _connection, _send: True
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
        """The counts up to the last step."""
        return self._session.tally

    @property
    def dropped(self) -> int:
        """The number of resets for which there was no room: all that count as lost, minus the kernel's skipped runs.

        On a busy machine the kernel skips a run now and then. A skipped run that was a reset has no record.
        """
        return self.tally.lost["cwnd_reset"] - self._kernel.skipped()["cwnd_reset"]

    def sees(self, reason: str) -> bool:
        """Return true if the tracer's probe sees resets for this reason."""
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
        """Return once all records that the kernel has passed on so far are in ``records``, and counted in ``tally``."""
        seen = self._steps
        until(lambda: self.error or self._steps > seen + 1, 20, "the tracer's next step")
        if self.error:
            raise self.error

    def of(self, *connections: TcpConnection) -> list[Record]:
        """Return the records of these connections' sending ends, in order of time."""
        self.settle()
        return self.taken(*connections)

    def taken(self, *connections: TcpConnection) -> list[Record]:
        """Return those that have been read already, without those in ``blind`` spans, where sends are unknown."""
        by_key = {c.key: c for c in connections}
        mine = ((by_key.get(key(r)), r) for r in self.records)
        known = (r for c, r in mine if c and not any(start < r["ts_ns"] < end for start, end in c.blind))
        return sorted(known, key=lambda r: int(r["ts_ns"]))

    def within(self, *inodes: int, since_ns: int = 0) -> list[Record]:
        """Return the records of these network namespaces from this time of CLOCK_MONOTONIC on."""
        self.settle()
        return [r for r in self.records if r["netns_ino"] in inodes and r["ts_ns"] >= since_ns]

    def close(self) -> None:
        """Stop the tracer; raise the error that ended its thread, if there was one."""
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
    """Return the key of the record's connection, as TcpConnection.key."""
    return record["netns_ino"], record["saddr"], record["sport"], record["daddr"], record["dport"]


def expected(connection: TcpConnection, tracer: Tracer) -> list[Send]:
    """Return the sends that reset the window for a reason that the tracer sees, and that pass its filter."""
    return [s for s in connection.sends if s.reason and tracer.sees(s.reason) and tracer.passes(connection, s)]


def check(tracer: Tracer, *connections: TcpConnection) -> int:
    """Compare every field of these connections' records with their sends; return the number of resets.

    No other connection in their network namespaces may have a record since the first of these sends.
    """
    total, keys = 0, {c.key for c in connections}
    start = min((s.start_ns for c in connections for s in c.sends), default=time.monotonic_ns())
    inodes = {c.space.inode for c in connections if c.space.private}
    others = [r for r in tracer.within(*inodes, since_ns=start) if key(r) not in keys]
    assert not others
    for connection in connections:
        sends, records = expected(connection, tracer), tracer.taken(connection)
        recorded = [(r["reason"], r["cwnd_before"], r["cwnd_after"]) for r in records]
        known = [(s.reason, s.before.cwnd, s.after.cwnd) for s in sends]
        assert recorded == known, connection.key
        for send, record in zip(sends, records, strict=True):
            differing = differences(tracer, connection, send, record)
            assert not differing, (differing, send, record)
        total += len(sends)
    return total


def expect_one(tracer: Tracer, connection: TcpConnection) -> None:
    """Assert that a connection's last send, and none before, reset its window, and that the record is right."""
    assert [s.reason for s in connection.sends[-2:]] == [None, "idle"]
    assert check(tracer, connection) == 1


def differences(tracer: Tracer, connection: TcpConnection, send: Send, record: Record) -> dict[str, tuple[Any, Any]]:
    """Return the fields in which a record differs from TCP_INFO before and after the send: name to (record, truth)."""
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
        "unacked_bytes": 0,
        "tcp_state": "established",
        "total_retrans": before.total_retrans,
    }
    if connection.cgroup_id:
        truth["cgroup_id"] = connection.cgroup_id
    if before.snd_wnd:
        truth["snd_wnd"] = before.snd_wnd
    if record["sock_cookie"]:
        # The cookie is read only now, because getsockopt makes one.
        truth["sock_cookie"] = connection.cookie()
    sent = after.bytes_sent - before.bytes_sent
    if send.reason == "app_limited":
        # The window falls after packets have been sent.
        truth["bytes_sent"] = min(max(record["bytes_sent"], before.bytes_sent), after.bytes_sent)
        truth["unsent_bytes"] = min(record["unsent_bytes"], sent + before.unsent)
        # On a slow machine, the ACK of the send before may not have come yet. bytes_acked may count the SYN too.
        waiting = before.bytes_sent - before.bytes_acked + 1 if before.unacked else 0
        truth["unacked_bytes"] = min(max(record["unacked_bytes"], 1), sent + waiting)
        # The kernel's rule: the window wasn't full for an RTO.
        truth["idle_us"] = max(record["idle_us"], before.rto_us)
    differing = {name: (record[name], value) for name, value in truth.items() if record[name] != value}
    if not send.start_ns <= record["ts_ns"] <= send.end_ns:
        differing["ts_ns"] = (record["ts_ns"], (send.start_ns, send.end_ns))
    for name, since in (("idle_us", before.last_snd_us), ("last_rcv_us", before.last_rcv_us)):
        if send.reason == "idle" and not since <= record[name] <= latest_idle_us(since, send):
            differing[name] = (record[name], (since, latest_idle_us(since, send)))
    return differing


def jiffy_us() -> int:
    """Return the length of a jiffy, the unit of the kernel's idle times, in microseconds."""
    return 1_000_000 // facts.hz()


def latest_idle_us(idle_us: int, send: Send) -> int:
    """Return the longest idle time that a record of a send can have, if it was ``idle_us`` before the send.

    Both are whole jiffies, so the record may have as many more as passed during the send: those that fit into its
    time, and one. An emulated machine misses jiffies and makes up for them later.
    """
    ticks = (send.end_ns - send.start_ns) // 1000 // jiffy_us() + 1
    return idle_us + ticks * jiffy_us() + (MISSED_US if EMULATED else 0)
