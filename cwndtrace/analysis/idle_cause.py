# SPDX-License-Identifier: Apache-2.0
"""The cause of idle time: the peer was silent, the sending process waited for a disk, or neither.

Idle time has two parts. Until data last came in, the connection waited for its peer. The rest is the sender's own. Of
the sender's part, the time counts as the disk's during which the sending process, in any of its threads, had block I/O
of its own in flight.
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
    "cause": "the largest part of the idle time: peer, disk or application; unknown in place of application where "
    "block I/O wasn't recorded; empty for resets that no idle time caused",
    "peer_us": "idle time until data last came in, us; all of it where the peer had closed its window",
    "disk_us": "idle time after that during which the sending process had block I/O in flight, us",
    "application_us": "the rest of the idle time, us",
    "disk_requests": "requests of that process that began after data last came in",
    "disk_device": "the device that had requests of it in flight for longest in that time; empty where none had",
}
"""The columns that ``with_cause`` adds to resets."""

_LAST_PID: Final = 1 << 22
"""PID_MAX_LIMIT of include/linux/threads.h."""

_BATCH: Final = 1 << 19
"""About how many requests are processed at once: few enough that their data nearly stays in the CPU's caches."""


def covered(begin: Ints, end: Ints, since: Ints, until: Ints) -> Ints:
    """Return how much of each span [since, until] the intervals [begin, end] cover, in the unit of the arguments.

    A moment that several intervals cover counts once. Intervals are in the order of their start and may overlap. Spans
    may overlap and come in any order.
    """
    if not len(begin):
        return np.zeros(len(since), dtype=np.int64)
    reach = np.maximum.accumulate(end)
    opens = np.flatnonzero(np.concatenate([[True], begin[1:] > reach[:-1]]))
    starts, ends = begin[opens], reach[np.append(opens[1:], len(reach)) - 1]
    before = np.concatenate([[0], np.cumsum(ends - starts)])

    def busy(moment: Ints) -> Ints:
        """Return how much is covered up to each moment."""
        index = np.searchsorted(starts, moment, side="right")
        still_to_come = np.maximum(ends[np.maximum(index - 1, 0)] - moment, 0)
        return before[index] - np.where(index > 0, still_to_come, 0)

    return np.where(until > since, busy(until) - busy(since), 0)


def with_cause(resets: pd.DataFrame, block_io: pd.DataFrame, *, recorded: bool = True) -> pd.DataFrame:
    """Return ``resets`` with ``COLUMNS``. Takes frames of a Trace; ``recorded`` says whether block I/O was traced.

    Where an ACK reopened the peer's window, and no process used the socket, all of the idle time counts as the peer's.
    Write-back by the kernel on a process's behalf counts as the application's own time.
    """
    idle = (resets["reason"].astype(str) == "idle").to_numpy()
    until = resets["ts_ns"].to_numpy(np.int64)
    idle_us = np.where(idle, resets["idle_us"].to_numpy(np.int64), 0)
    own = np.where(reopened(resets), 0, np.minimum(resets["last_rcv_us"].to_numpy(np.int64), idle_us))
    disk_ns, requests, device = _own_io(block_io, resets["tgid"].to_numpy(np.int64), until - own * 1000, until)
    disk = disk_ns / 1000
    # Idle time is only known to a jiffy, so a request may have begun a fraction of a jiffy before it.
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
    "resets": "number of idle resets with this cause",
    "harmful": "of these, those that were harmful",
    "lost_us": "cost of these, sum, us, measured",
    "idle_us": "idle time before all of these resets, sum, us",
    "disk_us": "part of that during which the sending process had block I/O in flight, us",
    "disk_device": "the device that most of these resets name; empty where none does",
}
"""The columns of ``summary``."""


def summary(judged: pd.DataFrame) -> pd.DataFrame:
    """Return one row per cause, the largest cost first; ``judged`` are the ``verdicts`` of a Trace.

    The columns are ``SUMMARY_COLUMNS``.
    """
    idle = judged[judged["cause"] != ""]
    idle_us = idle[["peer_us", "disk_us", "application_us"]].sum(axis=1)
    rows = idle.assign(idle_us=idle_us, harmful=(idle["verdict"] == "harmful").astype("int64"), resets=1)
    groups = rows.groupby("cause", sort=False)
    out = groups[["resets", "harmful", "lost_us", "idle_us", "disk_us"]].sum().reset_index()
    named = rows[rows["disk_device"] != ""].groupby("cause")["disk_device"].agg(lambda names: names.mode().iloc[0])
    out["disk_device"] = pd.Series([str(named.get(cause, "")) for cause in out["cause"]], dtype="str")
    return out.sort_values(["lost_us", "resets"], ascending=False, ignore_index=True)[list(SUMMARY_COLUMNS)]


def reopened(resets: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """Return which idle resets came with an ACK that opened the peer's closed window.

    At such a reset unsent data was waiting, and no task was sending.
    """
    from_ack = (resets["tgid"] == 0) & (resets["unsent_bytes"] > 0) & (resets["reason"].astype(str) == "idle")
    mask: Bools = from_ack.to_numpy(dtype=np.bool_)
    return mask


def _own_io(block_io: pd.DataFrame, tgid: Ints, since: Ints, until: Ints) -> tuple[Ints, Ints, npt.NDArray[np.object_]]:
    """Return the block I/O of each process in its span.

    These are the ns that its requests cover, how many of them began in the span, and the device that covers most of it.
    """
    if (block_io["start_ns"].to_numpy()[1:] < block_io["start_ns"].to_numpy()[:-1]).any():
        block_io = block_io.sort_values("start_ns")
    total, requests = np.zeros(len(tgid), dtype=np.int64), np.zeros(len(tgid), dtype=np.int64)
    device = np.full(len(tgid), "", dtype=object)
    owner = block_io["tgid"].to_numpy()
    wanted = np.flatnonzero((tgid > 0) & (tgid <= _LAST_PID) & (until > since))
    wanted = wanted[np.isin(tgid[wanted], np.unique(owner).astype(np.int64))]
    if not len(wanted):
        return total, requests, device
    # Order by process and then by time, so that the spans of a process are contiguous.
    wanted = wanted[np.lexsort((until[wanted], tgid[wanted]))]
    # The processes get numbers from 1; all others are 0.
    processes, first = np.unique(tgid[wanted], return_index=True)
    beyond = int(processes[-1]) + 1
    number = np.zeros(beyond + 1, dtype=np.min_scalar_type(len(processes)))
    number[processes] = np.arange(1, len(processes) + 1)
    group = number[np.minimum(owner, beyond)]
    # The rows are in order of time, and a stable sort by process, by radix, keeps that order within each process.
    rows = np.argsort(group, kind="stable")
    bounds = np.searchsorted(group, np.arange(1, len(processes) + 2), sorter=rows)
    spans = np.append(first, len(wanted))
    disks = block_io["device"].astype("category").cat
    columns = (*(block_io[name].to_numpy() for name in ("start_ns", "done_ns")), disks.codes.to_numpy())
    # One at a time would be slow for a hundred thousand processes, and all at once for the memory of millions of rows.
    for batch in _batches(np.diff(bounds)):
        mine, here = rows[bounds[batch.start] : bounds[batch.stop]], wanted[spans[batch.start] : spans[batch.stop]]
        begin, end, code = (column[mine] for column in columns)
        # Each process gets a stretch of one long time axis to itself, so that one call handles all of them.
        at = np.repeat(np.arange(len(batch)), np.diff(bounds[batch.start : batch.stop + 1]))
        whose = np.repeat(np.arange(len(batch)), np.diff(spans[batch.start : batch.stop + 1]))
        begin, end = begin.astype(np.int64, copy=False), end.astype(np.int64, copy=False)
        zero = min(int(begin.min()), int(since[here].min()))
        stretch = max(int(end.max()), int(until[here].max())) - zero + 1
        begin, end = begin + (at * stretch - zero), end + (at * stretch - zero)
        spans_at = tuple(moments[here] + (whose * stretch - zero) for moments in (since, until))
        total[here] = covered(begin, end, *spans_at)
        requests[here] = np.searchsorted(begin, spans_at[1]) - np.searchsorted(begin, spans_at[0])
        used = np.flatnonzero(np.bincount(code, minlength=len(disks.categories))).tolist()
        best, names = np.zeros(len(here), dtype=np.int64), np.full(len(here), "", dtype=object)
        for disk in used:
            its = np.flatnonzero(code == disk)
            time = covered(begin[its], end[its], *spans_at) if len(used) > 1 else total[here]
            best, names = np.maximum(time, best), np.where(time > best, str(disks.categories[disk]), names)
        device[here] = names
    return total, requests, device


def _batches(sizes: Ints) -> Iterator[range]:
    """Return ranges of indices into ``sizes``, each with a sum of about ``_BATCH`` or less, or with one index."""
    number = (np.cumsum(sizes) - 1) // _BATCH
    cuts = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(sizes)]
    return (range(begin, end) for begin, end in pairwise(cuts))
