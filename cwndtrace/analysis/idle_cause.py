# SPDX-License-Identifier: Apache-2.0
"""Why a connection rested: the peer was silent, the sending process waited for a disk, or neither.

A rest has two parts. Until data last came in, the connection waited for its peer; what came after is the sender's
own. Of that part the time counts as the disk's during which the sending process, in whichever of its threads, had
block I/O of its own under way.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from cwndtrace.analysis.cost import Bools, Ints

COLUMNS: Final = {
    "cause": "what most of the rest was: peer, disk or application; unknown where block I/O wasn't recorded; empty for "
    "resets that no rest caused",
    "peer_us": "us of the rest until data last came in, or all of it where the peer had closed its window",
    "disk_us": "us of the rest after that during which the sending process had block I/O under way",
    "application_us": "us of the rest that are neither",
    "disk_requests": "requests of that process that began in that part of the rest",
    "disk_device": "the device that had requests under way for longest; empty where none had",
}
"""What ``with_cause`` adds to resets."""

BLOCK_COLUMNS: Final = ("start_ns", "done_ns", "tgid", "device")
"""What it needs of ``block_io``."""

_LAST_PID: Final = 1 << 22
"""PID_MAX_LIMIT of include/linux/threads.h."""


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

    Where nobody used the socket (an ACK reopened the peer's window, which has a process for none), all of the rest
    was the peer's. Write-back by the kernel on a process's behalf counts as the application's own time.
    """
    idle = (resets["reason"].astype(str) == "idle").to_numpy()
    until = resets["ts_ns"].to_numpy(np.int64)
    rest = np.where(idle, resets["idle_us"].to_numpy(np.int64), 0)
    own = np.where(reopened(resets), 0, np.minimum(resets["last_rcv_us"].to_numpy(np.int64), rest))
    disk_ns, requests, device = _own_io(block_io, resets["tgid"].to_numpy(np.int64), until - own * 1000, until)
    disk = disk_ns / 1000
    # A request may have begun a fraction of a jiffy before the rest, which is known to a jiffy only.
    disk = np.minimum(disk, own)
    parts = np.stack([rest - own, disk, own - disk])
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
    "resets": "idle resets whose rest was mostly that",
    "harmful": "of these, those that cost their burst a round trip",
    "lost_us": "us that these cost, estimated, summed",
    "rest_us": "us of rest, summed",
    "disk_us": "us of it under block I/O of the sending process",
    "disk_device": "the device that most of these rests name; empty where none does",
}
"""The columns of ``summary``."""


def summary(judged: pd.DataFrame) -> pd.DataFrame:
    """One row a cause, the dearest first; ``judged`` are the ``verdicts`` of a Trace. The columns are above."""
    idle = judged[judged["cause"] != ""]
    rest = idle[["peer_us", "disk_us", "application_us"]].sum(axis=1)
    rows = idle.assign(rest_us=rest, harmful=(idle["verdict"] == "harmful").astype("int64"), resets=1)
    groups = rows.groupby("cause", sort=False)
    out = groups[["resets", "harmful", "lost_us", "rest_us", "disk_us"]].sum().reset_index()
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
    # In the order of the axis below: to look up 100,000 places among millions takes a fifth of the time then.
    asked = asked[np.lexsort((until[asked], tgid[asked]))]
    # Processes by number, from 1; 0 for those that aren't asked for.
    processes = np.unique(tgid[asked])
    beyond = int(processes[-1]) + 1
    number = np.zeros(beyond + 1, dtype=np.min_scalar_type(len(processes)))
    number[processes] = np.arange(1, len(processes) + 1)
    group = number[np.minimum(of, beyond)]
    # The rows are in order of time: sorting them by process, by radix, keeps each process's so.
    rows = np.argsort(group, kind="stable")[np.count_nonzero(group == 0) :]
    begin, end = (block_io[name].to_numpy()[rows].astype(np.int64, copy=False) for name in ("start_ns", "done_ns"))
    # Each process gets a stretch of one long axis to itself, so that all of them are done at once.
    zero = min(int(begin.min()), int(since.min()))
    stretch = max(int(end.max()), int(until.max())) - zero + 1
    shift = group[rows].astype(np.int64) * stretch - zero
    begin, end = begin + shift, end + shift
    shift = number[tgid[asked]].astype(np.int64) * stretch - zero
    spans = since[asked] + shift, until[asked] + shift
    total[asked] = covered(begin, end, *spans)
    requests[asked] = np.searchsorted(begin, spans[1]) - np.searchsorted(begin, spans[0])
    on = block_io["device"].astype("category")
    codes = on.cat.codes.to_numpy()[rows]
    used = np.flatnonzero(np.bincount(codes, minlength=len(on.cat.categories)))
    best, names = np.zeros(len(spans[0]), dtype=np.int64), np.full(len(spans[0]), "", dtype=object)
    for code in used.tolist():
        mine = np.flatnonzero(codes == code)
        time = covered(begin[mine], end[mine], *spans) if len(used) > 1 else total[asked]
        best, names = np.maximum(time, best), np.where(time > best, str(on.cat.categories[code]), names)
    device[asked] = names
    return total, requests, device
