# SPDX-License-Identifier: Apache-2.0
"""Remedies for the resets that cost something, with their savings and risks.

cwndtrace never applies a remedy. Savings are estimates from the records, as the costs are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import pandas as pd

from cwndtrace import tcp
from cwndtrace.analysis import cost
from cwndtrace.store.meta import Meta, NamespaceSettings

COLUMNS: Final = {
    "remedy": "sysctl, initcwnd, ping, bbr, receiver_window, send_buffer, loss or nothing",
    "saves_us": "time that it would have saved in this capture, us, estimated; missing where the records can't tell",
    "risk": "low, medium or high",
    "connections": "number of connections that it would have helped",
    "detail": "sysctl: inodes of the network namespaces, those that lost most first; initcwnd: the window in segments "
    "and the peers; ping: the interval and the shortest RTO, us",
}
"""The columns of ``remedies``."""

AUDIT_COLUMNS: Final = {
    "netns_ino": "inode of the network namespace",
    "name": "its name in ip netns, this for the one that cwndtrace ran in, or a process in it",
    "host": "whether it is the namespace of process 1",
    "slow_start_after_idle": "1 if idle resets are on, 0 if off; missing where it couldn't be read",
    "congestion_control": "default for new connections; empty where it couldn't be read",
    "live": "connections in the namespace's last snapshot",
    "touched": "of these, those that slow_start_after_idle affects: their congestion control isn't exempt",
    "resets": "idle resets recorded in it",
    "lost_us": "cost of its resets, us, estimated",
}
"""The columns of ``audit``."""

_RISKS: Final = ("low", "medium", "high")
_PING_MARGIN: Final = 0.8
"""The ping interval as a share of the RTO, so that even a late ping comes before the RTO is over."""
BROAD: Final = 64
"""The initial window in segments above which a new connection's first flight is a burst that few paths expect."""


@dataclass(frozen=True)
class _Remedy:
    remedy: str
    saves_us: float
    risk: str
    connections: int
    detail: tuple[Any, ...] = ()


def remedies(judged: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Return remedies, the largest saving first and, for equal savings, the lowest risk first. Never empty.

    ``judged`` are resets of a Trace's ``verdicts`` and ``rows`` are connections of its ``summary``: all of them for the
    host, or those of one connection. The columns are ``COLUMNS``.
    """
    harmful = judged[judged["verdict"] == "harmful"]
    result = [*_cures(harmful), *_limits(rows)] or [_Remedy("nothing", 0.0, "low", 0)]
    result.sort(key=lambda r: (-r.saves_us if r.saves_us == r.saves_us else 1.0, _RISKS.index(r.risk)))
    return pd.DataFrame([asdict(row) for row in result], columns=list(COLUMNS))


def _cures(harmful: pd.DataFrame) -> Iterator[_Remedy]:
    if harmful.empty:
        return
    helped, lost = int(harmful["connection"].nunique()), float(harmful["lost_us"].sum())
    spaces = harmful.groupby("netns_ino")["lost_us"].sum().sort_values().index[::-1]
    yield _Remedy("sysctl", lost, "low", helped, tuple(str(inode) for inode in spaces))
    yield _initcwnd(harmful)
    idle = harmful[harmful["reason"].astype(str) == "idle"]
    if len(idle):
        shortest = float(idle["rto_us"].min())
        interval = max(shortest * _PING_MARGIN // 10_000 * 10_000, 10_000.0)
        connections = int(idle["connection"].nunique())
        yield _Remedy("ping", float(idle["lost_us"].sum()), "medium", connections, (interval, shortest))
    yield _Remedy("bbr", lost, "high", helped)


def _initcwnd(harmful: pd.DataFrame) -> _Remedy:
    """Return the smallest initial window that would have sufficed for all of them, with its saving."""
    after, before = cost.path(harmful, "after"), harmful["cwnd_before"].to_numpy(np.int64)
    burst, rounds_before = (harmful[name].to_numpy(np.int64) for name in ("burst_bytes", "rounds_before"))

    def needed(window: cost.Ints) -> cost.Ints:
        return cost.rounds(burst, **{**after, "cwnd": window})

    # Bisect for the smallest window from which each burst needs no more round trips than from the window before.
    low, high = after["cwnd"], before
    while (low < high).any():
        middle = (low + high) // 2
        enough = needed(middle) <= rounds_before
        low, high = np.where(enough | (low >= high), low, middle + 1), np.where(enough, middle, high)
    value = int(high.max())
    # A restart may leave ssthresh below the window before, whatever the initial window is, so some cost may remain.
    stays = np.maximum(needed(np.maximum(after["cwnd"], value)) - rounds_before, 0)
    saved = np.maximum(harmful["rounds_lost"].to_numpy() - stays, 0) * harmful["round_us"].to_numpy()
    return _Remedy(
        "initcwnd",
        float(saved.sum()),
        "medium" if value <= BROAD else "high",
        int(harmful["connection"].nunique()),
        (value, *harmful["daddr"].astype(str).unique()),
    )


def _limits(rows: pd.DataFrame) -> Iterator[_Remedy]:
    """Yield remedies for connections that something other than the congestion window held back."""
    for label in ("receiver_window", "send_buffer", "loss"):
        number = int((rows["verdict"] == label).sum())
        if number:
            yield _Remedy(label, float("nan"), "low", number)


_UNKNOWN: Final = NamespaceSettings("", False, None, None)


def audit(judged: pd.DataFrame, snapshots: pd.DataFrame, about: Meta) -> pd.DataFrame:
    """Return one row per network namespace: its settings and the connections that they affect.

    The columns are ``AUDIT_COLUMNS``. Settings are those when the capture began. A namespace that came later has a row
    if a snapshot or a reset was in it.
    """
    spaces = about.namespaces
    last = snapshots[snapshots["ts_ns"] == snapshots.groupby("netns_ino")["ts_ns"].transform("max")]
    live = last.groupby("netns_ino").size()
    free = last[last["ca_name"].astype(str).isin(tcp.EXEMPT)].groupby("netns_ino").size()
    idle = judged[judged["reason"].astype(str) == "idle"].groupby("netns_ino").size()
    lost = judged.groupby("netns_ino")["lost_us"].sum()
    seen = {str(inode) for inode in (*live.index, *lost.index)}
    rows = []
    for inode in [*spaces, *sorted(seen - spaces.keys())]:
        number = int(inode) if inode.isdigit() else 0
        space = spaces.get(inode, _UNKNOWN)
        rows.append(
            {
                "netns_ino": number,
                "name": space.name,
                "host": space.host,
                "slow_start_after_idle": space.idle if space.idle in (0, 1) else None,
                "congestion_control": space.congestion_control or "",
                "live": int(live.get(number, 0)),
                "touched": int(live.get(number, 0)) - int(free.get(number, 0)),
                "resets": int(idle.get(number, 0)),
                "lost_us": float(lost.get(number, 0.0)),
            }
        )
    kinds = {"slow_start_after_idle": "Int64", "host": "bool"}
    return pd.DataFrame(rows, columns=list(AUDIT_COLUMNS)).astype(kinds)
