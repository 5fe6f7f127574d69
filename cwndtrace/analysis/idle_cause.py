# SPDX-License-Identifier: Apache-2.0
"""Why a connection was idle: the peer was silent, the sending process waited for a disk, or neither.

Idle time has two parts. Until data last came in, the connection waited for its peer; what came after is the sender's
own. Of that part the time counts as the disk's during which the sending process, in whichever of its threads, had
block I/O of its own under way.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from cwndtrace.analysis.cost import Bools, Ints

COLUMNS: Final = {
    "cause": "what most of the idle time was: peer, disk or application; unknown where block I/O wasn't recorded; "
    "empty for resets that no idle time caused",
    "peer_us": "us of the idle time until data last came in, or all of it where the peer had closed its window",
    "disk_us": "us of the idle time after that during which the sending process had block I/O under way",
    "application_us": "us of the idle time that are neither",
    "disk_requests": "requests of that process that began in that part of the idle time",
    "disk_device": "the device that had requests under way for longest; empty where none had",
}
"""What ``with_cause`` adds to resets."""

BLOCK_COLUMNS: Final = ("start_ns", "done_ns", "tgid", "device")
"""What it needs of ``block_io``."""

_LAST_PID: Final = 1 << 22
"""PID_MAX_LIMIT of include/linux/threads.h."""

_BATCH: Final = 1 << 19
"""Requests that are looked at at once: what they take stays in the CPU's caches, or nearly."""


def covered(begin: Ints, end: Ints, since: Ints, until: Ints) -> Ints:
    """How much of each span [since, until] the intervals [begin, end] cover, each moment counted once.

    One answer a span, in the unit of the arguments. Intervals may overlap, and are in the order of their begin; spans
    may overlap, in any order.
    """
    if not len(begin):
        return np.zeros(len(since), dtype=np.int64)
    reach = np.maximum.accumulate(end)
    opens = np.flatnonzero(np.concatenate([[True], begin[1:] > reach[:-1]]))
    starts, ends = begin[opens], reach[np.append(opens[1:], len(reach)) - 1]
    before = np.concatenate([[0], np.cumsum(ends - starts)])

    def busy(moment: Ints) -> Ints:
        """How much is covered up to a moment."""
        index = np.searchsorted(starts, moment, side="right")
        still_to_come = np.maximum(ends[np.maximum(index - 1, 0)] - moment, 0)
        return before[index] - np.where(index > 0, still_to_come, 0)

    return np.where(until > since, busy(until) - busy(since), 0)


def with_cause(resets: pd.DataFrame, block_io: pd.DataFrame, *, recorded: bool = True) -> pd.DataFrame:
    """``resets`` with ``COLUMNS``. Takes frames of a Trace; ``recorded`` says whether block I/O was traced at all.

    Where nobody used the socket (an ACK reopened the peer's window, which has a process for none), all of the idle time
    was the peer's. Write-back by the kernel on a process's behalf counts as the application's own time.
    """
    idle = (resets["reason"].astype(str) == "idle").to_numpy()
    until = resets["ts_ns"].to_numpy(np.int64)
    idle_us = np.where(idle, resets["idle_us"].to_numpy(np.int64), 0)
    own = np.where(reopened(resets), 0, np.minimum(resets["last_rcv_us"].to_numpy(np.int64), idle_us))
    disk_ns, requests, device = _own_io(block_io, resets["tgid"].to_numpy(np.int64), until - own * 1000, until)
    disk = disk_ns / 1000
    # A request may have begun a fraction of a jiffy before the idle time, which is known to a jiffy only.
    disk = np.minimum(disk, own)
    parts = np.stack([idle_us - own, disk, own - disk])
    cause = np.array(["peer", "disk", "application" if recorded else "unknown"], dtype=object)[parts.argmax(axis=0)]
    return resets.assign(
        cause=pd.Series(np.where(idle, cause, ""), index=resets.index, dtype="str"),
        peer_us=parts[0].astype(np.float64),
        disk_us=disk,
        application_us=parts[2],
        disk_requests=requests,
        disk_device=pd.Series(device, index=resets.index, dtype="str"),
    )


SUMMARY_COLUMNS: Final = {
    "cause": "as in COLUMNS",
    "resets": "idle resets whose idle time was mostly that",
    "harmful": "of these, those that cost their burst a round trip",
    "lost_us": "us that these cost, estimated, summed",
    "idle_us": "us of idle time, summed",
    "disk_us": "us of it under block I/O of the sending process",
    "disk_device": "the device that most of these idle times name; empty where none does",
}
"""The columns of ``summary``."""


def summary(judged: pd.DataFrame) -> pd.DataFrame:
    """One row a cause, the dearest first; ``judged`` are the ``verdicts`` of a Trace. The columns are above."""
    idle = judged[judged["cause"] != ""]
    idle_us = idle[["peer_us", "disk_us", "application_us"]].sum(axis=1)
    rows = idle.assign(idle_us=idle_us, harmful=(idle["verdict"] == "harmful").astype("int64"), resets=1)
    groups = rows.groupby("cause", sort=False)
    out = groups[["resets", "harmful", "lost_us", "idle_us", "disk_us"]].sum().reset_index()
    named = rows[rows["disk_device"] != ""].groupby("cause")["disk_device"].agg(lambda names: names.mode().iloc[0])
    out["disk_device"] = pd.Series([str(named.get(cause, "")) for cause in out["cause"]], dtype="str")
    return out.sort_values(["lost_us", "resets"], ascending=False, ignore_index=True)[list(SUMMARY_COLUMNS)]


def reopened(resets: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """Which idle resets came with an ACK that opened the peer's closed window: unsent data waited, and no task sent."""
    asleep = (resets["tgid"] == 0) & (resets["unsent_bytes"] > 0) & (resets["reason"].astype(str) == "idle")
    found: Bools = asleep.to_numpy(dtype=np.bool_)
    return found


def _own_io(block_io: pd.DataFrame, tgid: Ints, since: Ints, until: Ints) -> tuple[Ints, Ints, npt.NDArray[np.object_]]:
    """For each process and span: ns covered by its requests, how many began in it, the device that covers most."""
    if (block_io["start_ns"].to_numpy()[1:] < block_io["start_ns"].to_numpy()[:-1]).any():
        block_io = block_io.sort_values("start_ns")
    total, requests = np.zeros(len(tgid), dtype=np.int64), np.zeros(len(tgid), dtype=np.int64)
    device = np.full(len(tgid), "", dtype=object)
    of = block_io["tgid"].to_numpy()
    asked = np.flatnonzero((tgid > 0) & (tgid <= _LAST_PID) & (until > since))
    asked = asked[np.isin(tgid[asked], np.unique(of).astype(np.int64))]
    if not len(asked):
        return total, requests, device
    # By process and then by time, so that what belongs together lies together.
    asked = asked[np.lexsort((until[asked], tgid[asked]))]
    # Processes by number, from 1; 0 for those that aren't asked for.
    processes, first = np.unique(tgid[asked], return_index=True)
    beyond = int(processes[-1]) + 1
    number = np.zeros(beyond + 1, dtype=np.min_scalar_type(len(processes)))
    number[processes] = np.arange(1, len(processes) + 1)
    group = number[np.minimum(of, beyond)]
    # The rows are in order of time: sorting them by process, by radix, keeps each process's so.
    rows = np.argsort(group, kind="stable")
    bounds = np.searchsorted(group, np.arange(1, len(processes) + 2), sorter=rows)
    spans = np.append(first, len(asked))
    on = block_io["device"].astype("category").cat
    columns = (*(block_io[name].to_numpy() for name in ("start_ns", "done_ns")), on.codes.to_numpy())
    # Many at a time, or a hundred thousand processes would take long; not all, or memory for millions of rows would.
    for some in _batches(np.diff(bounds)):
        mine, here = rows[bounds[some.start] : bounds[some.stop]], asked[spans[some.start] : spans[some.stop]]
        begin, end, code = (column[mine] for column in columns)
        # Each process gets a stretch of one long axis to itself, so that all of them are done at once.
        at = np.repeat(np.arange(len(some)), np.diff(bounds[some.start : some.stop + 1]))
        whose = np.repeat(np.arange(len(some)), np.diff(spans[some.start : some.stop + 1]))
        begin, end = begin.astype(np.int64, copy=False), end.astype(np.int64, copy=False)
        zero = min(int(begin.min()), int(since[here].min()))
        stretch = max(int(end.max()), int(until[here].max())) - zero + 1
        begin, end = begin + (at * stretch - zero), end + (at * stretch - zero)
        asks = tuple(moments[here] + (whose * stretch - zero) for moments in (since, until))
        total[here] = covered(begin, end, *asks)
        requests[here] = np.searchsorted(begin, asks[1]) - np.searchsorted(begin, asks[0])
        used = np.flatnonzero(np.bincount(code, minlength=len(on.categories))).tolist()
        best, names = np.zeros(len(here), dtype=np.int64), np.full(len(here), "", dtype=object)
        for disk in used:
            its = np.flatnonzero(code == disk)
            time = covered(begin[its], end[its], *asks) if len(used) > 1 else total[here]
            best, names = np.maximum(time, best), np.where(time > best, str(on.categories[disk]), names)
        device[here] = names
    return total, requests, device


def _batches(sizes: Ints) -> Iterator[range]:
    """``sizes`` in runs of places whose sum is about _BATCH or less, or of one."""
    number = (np.cumsum(sizes) - 1) // _BATCH
    cuts = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(sizes)]
    return (range(begin, end) for begin, end in pairwise(cuts))
