# SPDX-License-Identifier: Apache-2.0
"""The workload, verdict, cost and cause of resets while the trace runs, by the functions that reports use.

This imports pandas, which a trace needs only once there is a reset. All that is kept here is bounded. Where something
that a verdict or a cause needs has been let go, they are unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import pandas as pd
import pyarrow as pa

from cwndtrace.analysis import block_io, connections, idle_cause, recovery, verdict, workloads
from cwndtrace.analysis.cost import LOSSES
from cwndtrace.records import arrow, frames

MOST_WAITING: Final = 20_000
"""The most resets whose bursts haven't ended, and the most recoveries whose resets haven't come in, that are kept."""
_MOST_BEFORE: Final = 2_000
"""The most judged resets that are kept, from which it follows which of a connection's data are requests."""
_MOST_NAMES: Final = 5_000
_NAME_WAIT_NS: Final = 3_000_000_000
"""For how long a reset waits for the name of its workload, which is looked up after the reset came in."""
_SETTLE_NS: Final = 500_000_000
"""For how long a burst has to have ended, so that the block requests before it have come in."""
_CAUSES: Final = {"peer": "peer", "disk": "disk", "probably disk": "disk", "application": "application", "": "none"}


@dataclass(frozen=True)
class News:
    """What came in since the last time, and all block requests that are kept, of which those until ``gone_ns`` lack."""

    resets: list[arrow.TimedRecords] = field(default_factory=list)
    recoveries: list[arrow.TimedRecords] = field(default_factory=list)
    workloads: list[pa.Table] = field(default_factory=list)
    processes: list[pa.Table] = field(default_factory=list)
    requests: list[arrow.TimedRecords] = field(default_factory=list)
    gone_ns: int = 0


class Judge:
    """Holds resets until their bursts have ended. ``done`` says that there is nothing to do until something comes in.

    ``cgroups`` is that of ``Naming``, ``follows`` says whether windows are followed, and ``recorded`` whether block I/O
    is traced, since ``started_ns`` of CLOCK_MONOTONIC.
    """

    def __init__(self, *, cgroups: str, follows: bool, recorded: bool, started_ns: int) -> None:
        self._cgroups = cgroups
        self._follows = follows
        self._recorded = recorded
        self._started_ns = started_ns
        self._nameless = _empty("cwnd_reset")
        self._waiting = self._nameless.assign(workload="")
        self._before = self._waiting
        self._recoveries = self._recoveries_before = _empty("cwnd_recovery")
        self._known = {name: _empty(name) for name in ("workloads", "processes")}
        self._snapshots = _empty("connections")
        self._naming = self._names()
        self._news_ns, self.done = 0, True

    def take(
        self, news: News, devices: Mapping[str, str], now_ns: int, *, last: bool = False
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Return the resets that have a workload now, and those whose bursts have ended, with what reports say of them.

        Each reset is in each of the two once. The columns of the second are ``workload``, ``cause``, ``verdict`` and
        ``lost_us``. ``last`` says that nothing more will come.
        """
        if news.resets or news.recoveries or news.workloads or news.processes:
            self._news_ns, self.done = now_ns, False
        elif self.done and not last:
            return self._waiting.head(0), self._concluded(self._waiting.head(0), self._recoveries, news, devices)
        # What came in last has a name by now, and its burst has ended long enough ago, or won't without other news.
        self.done = now_ns - self._news_ns > _NAME_WAIT_NS
        for name, tables in (("workloads", news.workloads), ("processes", news.processes)):
            if tables:
                new = _joined([self._known[name], *(_frame(table, name) for table in tables)])
                self._known[name] = new.tail(_MOST_NAMES)
                self._naming = self._names()
        self._nameless = _joined([self._nameless, *_frames("cwnd_reset", news.resets)])
        self._recoveries = _joined([self._recoveries, *_frames("cwnd_recovery", news.recoveries)])
        named = self._named(now_ns, last=last)
        self._waiting = _joined([self._waiting, named])
        return named, self._judged(news, devices, now_ns, last=last)

    def _names(self) -> workloads.Naming:
        known = workloads.workloads(self._known["workloads"])
        return workloads.Naming(known, workloads.processes(self._known["processes"], known), self._cgroups)

    def _named(self, now_ns: int, *, last: bool) -> pd.DataFrame:
        """Take out and return the nameless resets that have a workload now, or won't get one."""
        if self._nameless.empty:
            return self._waiting.head(0)
        rows, snapshots = connections.identify(self._nameless, self._snapshots)
        names = self._naming.of_connections(rows, snapshots)[0]["workload"]
        ready = (names != "") | (self._nameless["ts_ns"] < now_ns - _NAME_WAIT_NS) | last
        out = self._nameless.assign(workload=names)[ready].reset_index(drop=True)
        self._nameless = self._nameless[~ready].reset_index(drop=True)
        return out

    def _judged(self, news: News, devices: Mapping[str, str], now_ns: int, *, last: bool) -> pd.DataFrame:
        ended = self._ended(now_ns if last else now_ns - _SETTLE_NS, last=last)
        out = self._waiting[ended].reset_index(drop=True)
        self._waiting = self._waiting[~ended].reset_index(drop=True)
        evicted = self._waiting.head(max(0, len(self._waiting) - MOST_WAITING))
        self._waiting = self._waiting.tail(MOST_WAITING)
        unknown = evicted.assign(cause="unknown", verdict="unknown", lost_us=0.0)
        keys = pd.MultiIndex.from_frame(out[["skaddr", "ts_ns"]])
        mine = pd.MultiIndex.from_frame(self._recoveries[["skaddr", "reset_ts_ns"]]).isin(keys)
        followed, self._recoveries = self._recoveries[mine], self._recoveries[~mine].tail(MOST_WAITING)
        return _joined([self._concluded(out, followed, news, devices), unknown])

    def _ended(self, until_ns: int, *, last: bool) -> pd.Series:
        """Return which of the waiting resets have ended: their recovery is there, or none will come."""
        rows = self._waiting
        if last or not self._follows or rows.empty:
            return pd.Series(True, index=rows.index)
        recoveries = self._recoveries[self._recoveries["end_ts_ns"] <= until_ns]
        there = pd.MultiIndex.from_frame(rows[["skaddr", "ts_ns"]]).isin(
            pd.MultiIndex.from_frame(recoveries[["skaddr", "reset_ts_ns"]])
        )
        done = pd.Series(there, index=rows.index)
        # A window is followed from a reset to the next one for the same reason, so an older one has no recovery.
        newest = rows["ts_ns"].where(done).groupby([rows["skaddr"], rows["reason"]]).transform("max")
        done |= (rows["ts_ns"] < newest) | rows["reason"].isin(LOSSES)
        # Where two followed spans of a socket overlap, the cost is that of the one that began first.
        oldest = rows["ts_ns"].where(~done).groupby(rows["skaddr"]).transform("min")
        return done & ~(rows["ts_ns"] > oldest)

    def _concluded(
        self, ended: pd.DataFrame, followed: pd.DataFrame, news: News, devices: Mapping[str, str]
    ) -> pd.DataFrame:
        """Return resets whose bursts have ended with ``cause``, ``verdict`` and ``lost_us``."""
        if ended.empty:
            return ended.assign(cause="", verdict="", lost_us=0.0)
        rows, _ = connections.identify(_joined([self._before, ended]), self._snapshots)
        recoveries = recovery.with_duration(_joined([self._recoveries_before, followed]), rows)
        found = recovery.of_resets(rows, recoveries)
        judged = verdict.resets(pd.concat([rows, found], axis=1).assign(burst_bytes=found["acked_bytes"]))
        requests = self._requests(news.requests, ended, devices)
        judged = idle_cause.with_cause(
            judged,
            requests,
            recoveries,
            recorded=self._recorded,
            started_ns=max(self._started_ns, news.gone_ns),
        ).tail(len(ended))
        self._before = _joined([self._before, ended]).tail(_MOST_BEFORE)
        self._recoveries_before = _joined([self._recoveries_before, followed]).tail(_MOST_BEFORE)
        return judged.assign(
            cause=[_CAUSES.get(cause, "unknown") for cause in judged["cause"]], lost_us=judged["lost_us"].fillna(0.0)
        )

    @staticmethod
    def _requests(kept: list[arrow.TimedRecords], ended: pd.DataFrame, devices: Mapping[str, str]) -> pd.DataFrame:
        """Return the block requests that may have been in flight while these resets' connections were idle."""
        idle = ended[ended["reason"] == "idle"]
        table = arrow.schema("block_io").empty_table()
        if kept and len(idle):
            since = int((idle["ts_ns"] - idle["idle_us"] * 1000).min())
            together = arrow.TimedRecords.joined(kept)
            near = np.flatnonzero(together.records["done_ns"] >= np.uint64(max(since, 0)))
            table = arrow.to_arrow("block_io", together.records[near], together.utc_offsets_ns[near])
        rows = frames.frame(table, "block_io").sort_values("start_ns", kind="stable", ignore_index=True)
        return block_io.add(rows, devices, ("device", "latency_us"))


def _frames(name: str, records: list[arrow.TimedRecords]) -> list[pd.DataFrame]:
    return [_frame(arrow.TimedRecords.joined(records).to_arrow(), name)] if records else []


def _frame(table: pa.Table, name: str) -> pd.DataFrame:
    """Return rows as a frame of a Trace has them, with texts as plain strings."""
    out = frames.frame(table, name)
    return out.astype({n: str for n, kind in out.dtypes.items() if isinstance(kind, pd.CategoricalDtype)})


def _empty(name: str) -> pd.DataFrame:
    return _frame(arrow.schema(name).empty_table(), name)


def _joined(parts: list[pd.DataFrame]) -> pd.DataFrame:
    """Return the rows of all parts with new numbers; the types are those of the first part that has any."""
    some = [part for part in parts if len(part)] or parts[:1]
    return pd.concat(some, ignore_index=True) if len(some) > 1 else some[0].reset_index(drop=True)
