# SPDX-License-Identifier: Apache-2.0
"""The cause of idle time: the peer was silent, the sender waited for a disk, or neither.

Idle time has two parts. After data last came in, the time is the sender's own. Until then, the connection waited for
its peer if what came in was a request (``idle_peer``); if not, it can't be told whose that time was. The disk's is what
the sending thread had block I/O of its own in flight for, in the sender's own time and in the unclear part.

Block I/O of others is weaker evidence: that of other threads of the process, of other processes of its cgroup, and of
the journal of a file system to which it wrote. The sender may have waited for it, or have slept beside it. It probably
waited if the block I/O ended shortly before the send; if it went on beyond the send, that can't be told.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from cwndtrace.analysis import idle_peer
from cwndtrace.analysis.cost import Bools, Ints
from cwndtrace.analysis.idle_disk import InFlight, Spans, Submitters
from cwndtrace.analysis.peer_window import reopened

CAUSES: Final = {
    "peer": "the connection waited for a request of its peer",
    "disk": "the sending thread had block I/O of its own in flight",
    "probably disk": "inferred: block I/O of disk_of was in flight, and ended shortly before the send",
    "application": "the sender's own time, without block I/O that it may have waited for",
    "peer or application": "data came in that need not have been a request",
    "disk or application": "block I/O of disk_of was in flight; whether the sender waited for it isn't known",
    "unknown": "the sender's own time, or unclear, where block I/O wasn't recorded in all of the idle time",
}
"""The causes, by what is true of the largest part of the idle time."""

COLUMNS: Final = {
    "cause": "the largest part of the idle time, one of CAUSES; empty for resets that no idle time caused",
    "peer_us": "idle time until the peer's request came in, us; all of it where the peer had closed its window",
    "unclear_us": "idle time until data came in that need not have been a request, us",
    "disk_us": "idle time after that during which block I/O of disk_of was in flight, us; with a cause that names the "
    "disk, also such time in the unclear part",
    "application_us": "the rest of the idle time, us",
    "disk_of": "whose: the process's (process), above all its sending thread's (thread), all of its cgroup's (cgroup), "
    "or its writes and those of the file system's journal (journal); empty where disk_us is 0",
    "disk_requests": "its requests that began after data last came in",
    "disk_device": "the device that had requests of it in flight for longest in that time; empty where none had",
}
"""The columns that ``with_cause`` adds to resets."""

_ROOT: Final = 1
"""The id of the root cgroup. That two processes are in it says little."""


def with_cause(
    resets: pd.DataFrame,
    block_io: pd.DataFrame,
    recoveries: pd.DataFrame,
    *,
    column: Callable[[str], npt.NDArray[np.integer]] | None = None,
    recorded: bool = True,
    started_ns: int = 0,
) -> pd.DataFrame:
    """Return ``resets`` with ``COLUMNS``. Takes frames of a Trace; ``column`` is that of ``Submitters``.

    ``recorded`` says whether block I/O was traced, and ``started_ns`` since when, in ns of CLOCK_MONOTONIC. Where data
    waited for the peer's closed window, all of the idle time counts as the peer's.
    """
    column = column or (lambda name: block_io[name].to_numpy())
    idle = (resets["reason"].astype(str) == "idle").to_numpy()
    until = resets["ts_ns"].to_numpy(np.int64)
    idle_us = np.where(idle, resets["idle_us"].to_numpy(np.int64), 0)
    closed = reopened(resets).to_numpy(np.bool_)
    own = np.where(closed, 0, np.minimum(resets["last_rcv_us"].to_numpy(np.int64), idle_us))
    data_came = idle & ~closed & (own < idle_us)
    clear = closed | idle_peer.asked(resets, recoveries, data_came)
    time = _Time(np.where(clear, idle_us - own, 0), np.where(clear, 0, idle_us - own), own)
    spans = Spans(until - (time.unclear + own) * 1000, until - own * 1000, until)
    cause, disk, whose = _sender(resets, Submitters(block_io, column), spans, time)
    named = np.isin(cause, ["disk", "probably disk"])
    before = np.where(named, np.minimum(disk.before_us, time.unclear), 0)
    # Idle time is only known to a jiffy, so a request may have begun a fraction of a jiffy before it.
    in_flight = np.minimum(disk.own_us, own)
    disk_of = np.where(in_flight + before > 0, whose, "")
    unseen = (not recorded) | (until - idle_us * 1000 < started_ns)
    cause = np.where(unseen & ~named & (cause != "peer"), "unknown", cause)
    return resets.assign(
        cause=pd.Series(np.where(idle, cause, ""), index=resets.index, dtype="str"),
        peer_us=time.peer.astype(np.float64),
        unclear_us=time.unclear - before,
        disk_us=in_flight + before,
        application_us=own - in_flight,
        disk_of=pd.Series(disk_of, index=resets.index, dtype="str"),
        disk_requests=disk.requests,
        disk_device=pd.Series(disk.device, index=resets.index, dtype="str"),
    )


@dataclass(frozen=True)
class _Time:
    """The idle time before each reset in its parts, us: the peer's, what may be the peer's, and the sender's own."""

    peer: Ints
    unclear: Ints
    own: Ints

    def cause(self, disk: InFlight) -> npt.NDArray[np.object_]:
        """Return the cause where the sender's own time is the application's, but for the disk's."""
        parts = np.stack([self.peer, self.unclear, self.own - np.minimum(disk.own_us, self.own)])
        names = np.array(["peer", "peer or application", "application"], dtype=object)
        largest: npt.NDArray[np.object_] = names[parts.argmax(axis=0)]
        return largest

    def mostly(self, disk: InFlight, *, unclear: bool = True) -> Bools:
        """Return where block I/O was in flight for the largest part; with ``unclear``, that part's counts too."""
        before = np.minimum(disk.before_us, self.unclear) if unclear else np.zeros(len(self.own))
        own = np.minimum(disk.own_us, self.own)
        others = np.stack([self.peer, self.unclear - before, self.own - own])
        most: Bools = (before + own > 0) & (before + own >= others.max(axis=0)) & (before + own > self.peer)
        return most


def _sender(
    resets: pd.DataFrame, submitters: Submitters, spans: Spans, time: _Time
) -> tuple[npt.NDArray[np.object_], InFlight, npt.NDArray[np.object_]]:
    """Return the cause, the block I/O that may speak for it, and whose that is."""
    tgid, cgroup = resets["tgid"].to_numpy(np.int64), resets["cgroup_id"].to_numpy(np.uint64)
    disk = submitters.processes(tgid, spans)
    # What isn't true of the whole process isn't true of one of its threads.
    thread = np.where(time.mostly(disk), resets["tid"].to_numpy(np.int64), 0)
    certain = time.mostly(submitters.threads(thread, spans))
    cause = np.where(certain, "disk", time.cause(disk))
    whose = np.where(certain, "thread", "process").astype(object)
    left = ~certain & (time.peer < time.unclear + time.own)

    def infer(name: str, other: InFlight, ended: Bools) -> None:
        """Take other block I/O as the cause where it was in flight for the largest part, and nothing else was."""
        nonlocal disk, left
        probably = left & time.mostly(other) & ended
        maybe = left & ~probably & time.mostly(other, unclear=False)
        cause[probably], cause[maybe] = "probably disk", "disk or application"
        disk = other.where(probably | maybe, disk)
        whose[probably | maybe] = name
        left = left & ~probably & ~maybe

    infer("process", disk, disk.late & ~disk.goes_on)
    journal = submitters.journals(np.where(left, tgid, 0), spans)
    # A journal that goes on without this process works for others, too.
    infer("journal", journal, journal.late & (~journal.goes_on | disk.goes_on))
    group = submitters.cgroups(np.where(left & (tgid > 0), cgroup, 0).astype(np.uint64), spans)
    infer("cgroup", group, group.late & ~group.goes_on & (cgroup != _ROOT))
    return cause, disk, whose


SUMMARY_COLUMNS: Final = {
    "cause": "as in COLUMNS",
    "resets": "number of idle resets with this cause",
    "harmful": "of these, those that were harmful",
    "lost_us": "cost of these, sum, us, measured",
    "idle_us": "idle time before all of these resets, sum, us",
    "disk_us": "part of that during which the block I/O was in flight that COLUMNS describes, us",
    "disk_device": "the device that most of these resets name; empty where none does",
}
"""The columns of ``summary``."""

_PARTS: Final = ["peer_us", "unclear_us", "disk_us", "application_us"]


def summary(judged: pd.DataFrame) -> pd.DataFrame:
    """Return one row per cause, the largest cost first; ``judged`` are the ``verdicts`` of a Trace.

    The columns are ``SUMMARY_COLUMNS``.
    """
    idle = judged[judged["cause"] != ""]
    rows = idle.assign(
        idle_us=idle[_PARTS].sum(axis=1), harmful=(idle["verdict"] == "harmful").astype("int64"), resets=1
    )
    groups = rows.groupby("cause", sort=False)
    out = groups[["resets", "harmful", "lost_us", "idle_us", "disk_us"]].sum().reset_index()
    named = rows[rows["disk_device"] != ""].groupby("cause")["disk_device"].agg(lambda names: names.mode().iloc[0])
    out["disk_device"] = pd.Series([str(named.get(cause, "")) for cause in out["cause"]], dtype="str")
    return out.sort_values(["lost_us", "resets"], ascending=False, ignore_index=True)[list(SUMMARY_COLUMNS)]
