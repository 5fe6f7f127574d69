# SPDX-License-Identifier: Apache-2.0
"""The cause of idle time: the peer was silent, the sender waited for a disk, or neither.

Idle time has two parts. After data last came in, the time is the sender's own. Until then, the connection waited for
its peer if what came in was a request (``idle_peer``); if not, it can't be told whose that time was. The disk's is what
the sending thread had block I/O of its own in flight for, in the sender's own time and in the unclear part.

Block I/O of others is weaker evidence: that of other threads of the process, of other processes of its cgroup or of
kernel threads for it, and of the journal of a file system to which it wrote. The sender may have waited for it, or have
slept beside it. It probably waited if the block I/O ended shortly before the send; if it went on beyond the send, that
can't be told.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from cwndtrace.analysis import idle_peer
from cwndtrace.analysis.cost import Bools, Ints
from cwndtrace.analysis.idle_disk import InFlight, Spans
from cwndtrace.analysis.idle_windows import Whole, Windows
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
    "disk_last": "row in block_io of the last of its requests to end before the send, for which the send waited; -1 "
    "where none did, and where the cause isn't disk or probably disk",
}
"""The columns that ``with_cause`` adds to resets."""

_ROOT: Final = 1
"""The id of the root cgroup. That two processes are in it says little."""


def with_cause(
    resets: pd.DataFrame,
    block_io: pd.DataFrame | Windows,
    recoveries: pd.DataFrame,
    *,
    recorded: bool = True,
    started_ns: int = 0,
) -> pd.DataFrame:
    """Return ``resets`` with ``COLUMNS``. Takes frames of a Trace; ``block_io`` may be one for ``Submitters``.

    ``recorded`` says whether block I/O was traced, and ``started_ns`` since when, in ns of CLOCK_MONOTONIC. Where data
    waited for the peer's closed window, all of the idle time counts as the peer's.
    """
    windows = Whole(block_io) if isinstance(block_io, pd.DataFrame) else block_io
    idle = (resets["reason"].astype(str) == "idle").to_numpy()
    until = resets["ts_ns"].to_numpy(np.int64)
    idle_us = np.where(idle, resets["idle_us"].to_numpy(np.int64), 0)
    closed = reopened(resets).to_numpy(np.bool_)
    own = np.where(closed, 0, np.minimum(resets["last_rcv_us"].to_numpy(np.int64), idle_us))
    data_came = idle & ~closed & (own < idle_us)
    clear = closed | idle_peer.asked(resets, recoveries, data_came)
    time = _Time(np.where(clear, idle_us - own, 0), np.where(clear, 0, idle_us - own), own)
    spans = Spans(until - (time.unclear + own) * 1000, until - own * 1000, until)
    cause, disk, whose = _sender(resets, windows, spans, time, idle)
    named = np.isin(cause, ["disk", "probably disk"])
    before = np.where(named, np.minimum(disk.before_us, time.unclear), 0)
    # Idle time is only known to a jiffy, so a request may have begun a fraction of a jiffy before it.
    in_flight = np.minimum(disk.own_us, own)
    disk_of = np.where(in_flight + before > 0, whose, "")
    unseen = (not recorded) | (until - idle_us * 1000 < started_ns)
    cause = np.where(unseen & ~named & (cause != "peer"), "unknown", cause)
    last = np.where(named, disk.last, -1)
    last[last >= 0] = windows.rows(last[last >= 0], disk.last_ns[last >= 0])
    return resets.assign(
        cause=pd.Series(np.where(idle, cause, ""), index=resets.index, dtype="str"),
        peer_us=time.peer.astype(np.float64),
        unclear_us=time.unclear - before,
        disk_us=in_flight + before,
        application_us=own - in_flight,
        disk_of=pd.Series(disk_of, index=resets.index, dtype="str"),
        disk_requests=disk.requests,
        disk_device=pd.Series(disk.device, index=resets.index, dtype="str"),
        disk_last=last,
    )


@dataclass(frozen=True)
class _Time:
    """The idle time before each reset in its parts, us: the peer's, what may be the peer's, and the sender's own."""

    peer: Ints
    unclear: Ints
    own: Ints

    def of(self, at: Ints) -> _Time:
        """Return the times of the resets ``at``."""
        return _Time(self.peer[at], self.unclear[at], self.own[at])

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
    resets: pd.DataFrame, windows: Windows, spans: Spans, time: _Time, idle: Bools
) -> tuple[npt.NDArray[np.object_], InFlight, npt.NDArray[np.object_]]:
    """Return the cause, the block I/O that may speak for it, and whose that is."""
    tgid, tid = (resets[name].to_numpy(np.int64) for name in ("tgid", "tid"))
    cgroup = np.where(tgid > 0, resets["cgroup_id"].to_numpy(np.uint64), np.uint64(0))
    disk, own, has_journal = InFlight.none(len(resets)), InFlight.none(len(resets)), False
    for at, submitters in windows.of(idle):
        found = submitters.processes(tgid[at], spans.of(at))
        # What isn't true of the whole process isn't true of one of its threads.
        thread = np.where(time.of(at).mostly(found), tid[at], 0)
        disk.put(at, found)
        own.put(at, submitters.threads(thread, spans.of(at)))
        has_journal |= submitters.has_journal()
    certain = time.mostly(own)
    disk = replace(
        disk, last=np.where(certain, own.last, disk.last), last_ns=np.where(certain, own.last_ns, disk.last_ns)
    )
    cause = np.where(certain, "disk", time.cause(disk))
    whose = np.where(certain, "thread", "process").astype(object)
    left = ~certain & (time.peer < time.unclear + time.own)

    def infer(name: str, other: InFlight, ended: Bools) -> None:
        """Take other block I/O as the cause where it was in flight for the largest part, and nothing else was."""
        nonlocal disk, left
        if not (left & ((other.before_us > 0) | (other.own_us > 0))).any():
            return
        probably = left & time.mostly(other) & ended
        maybe = left & ~probably & time.mostly(other, unclear=False)
        cause[probably], cause[maybe] = "probably disk", "disk or application"
        disk = other.where(probably | maybe, disk)
        whose[probably | maybe] = name
        left = left & ~probably & ~maybe

    infer("process", disk, disk.late & ~disk.goes_on)
    device = np.full(len(resets), "", dtype=object)
    left_over = left & idle
    if has_journal and left_over.any():
        for at, submitters in windows.of(left_over):
            device[at] = submitters.written(tgid[at], spans.of(at))
    if not has_journal and not cgroup[left_over].any():
        return cause, disk, whose
    journal, waited, with_write_back = (InFlight.none(len(resets)) for _ in range(3))
    writers = np.unique(tgid[device != ""])
    for at, submitters in windows.of(left_over):
        journal.put(at, submitters.journals(device[at], writers, spans.of(at)))
        for group, found in zip((waited, with_write_back), submitters.cgroups(cgroup[at], spans.of(at)), strict=True):
            group.put(at, found)
    # A journal that goes on without this process works for others, too.
    infer("journal", journal, journal.late & (~journal.goes_on | disk.goes_on))
    infer("cgroup", waited, waited.late & ~waited.goes_on & (cgroup != _ROOT))
    # Tasks wait for write-back in the background only if they have too many dirty pages, and that isn't seen.
    infer("cgroup", with_write_back, np.zeros(len(left), dtype=np.bool_))
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
    idle = judged.loc[judged["cause"] != "", ["cause", "verdict", "lost_us", "disk_device", *_PARTS]]
    rows = idle.assign(
        idle_us=idle[_PARTS].sum(axis=1), harmful=(idle["verdict"] == "harmful").astype("int64"), resets=1
    )
    groups = rows.groupby("cause", sort=False)
    out = groups[["resets", "harmful", "lost_us", "idle_us", "disk_us"]].sum().reset_index()
    named = rows[rows["disk_device"] != ""].groupby("cause")["disk_device"].agg(lambda names: names.mode().iloc[0])
    out["disk_device"] = pd.Series([str(named.get(cause, "")) for cause in out["cause"]], dtype="str")
    return out.sort_values(["lost_us", "resets"], ascending=False, ignore_index=True)[list(SUMMARY_COLUMNS)]
