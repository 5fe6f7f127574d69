# SPDX-License-Identifier: Apache-2.0
"""Remedies for the resets that cost something, with their savings and risks.

cwndtrace never applies a remedy. A saving is the measured cost of the resets that a remedy would have prevented.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd

from cwndtrace.store.meta import Meta

COLUMNS: Final = {
    "remedy": "sysctl, sysctl_done, initcwnd, ping, bbr, disk, receiver_window, send_buffer, loss or nothing",
    "saves_us": "time that it would have saved in this capture, us, measured; missing where the records can't tell",
    "risk": "low, medium or high",
    "connections": "number of connections that it would have helped",
    "detail": "what the words need: a dataclass of this module for initcwnd, ping and disk, the inodes of the network "
    "namespaces for sysctl, sysctl_done and bbr, those that lost most first, one of NOTHING for nothing, else None",
}
"""The columns of ``remedies``."""

NOTHING: Final = {
    "none": "no reset was harmful",
    "unknown": "what some resets cost isn't known",
    "unseen": "no connection was seen",
    "other_end": "connections mostly receive, and their senders are at the other end",
}
"""Why there is no remedy."""

_RISKS: Final = ("low", "medium", "high")
_PING_MARGIN: Final = 0.8
"""The ping interval as a share of the RTO, so that even a late ping comes before the RTO is over."""
BROAD: Final = 64
"""The initial window in segments above which a new connection's first flight is a burst that few paths expect."""
_HTTP_PORTS: Final = (80, 8000, 8080)
_HTTP_SERVERS: Final = ("nginx", "apache2", "httpd", "lighttpd", "gunicorn")
"""Local ports and process names by which a server is taken for one that speaks HTTP/1. This is a guess."""


@dataclass(frozen=True)
class Route:
    """A route that some connections send through: the namespace's inode, the interface's index, and a peer behind it.

    ``ifindex`` is 0 where it is unknown.
    """

    netns: str
    ifindex: int
    peer: str


@dataclass(frozen=True)
class InitialWindow:
    """The initial window in segments that suffices, and the routes, those that lost most first.

    ``segments`` is None where no record says how much waited. ``untold`` counts the harmful resets of which none says.
    """

    segments: int | None
    routes: tuple[Route, ...]
    untold: int


@dataclass(frozen=True)
class Ping:
    """The longest interval that prevents idle resets, and the shortest RTO, us.

    ``http`` counts the connections of servers that seem to speak HTTP/1, ``disk`` those that only waited for a disk.
    """

    interval_us: float
    rto_us: float
    http: int
    disk: int


@dataclass(frozen=True)
class SlowDisk:
    """A device that senders waited for before resets, with the process that did most, in us and numbers of requests."""

    device: str
    comm: str
    waited_us: float
    requests: int
    resets: int


@dataclass(frozen=True)
class _Remedy:
    remedy: str
    saves_us: float
    risk: str
    connections: int
    detail: Any = None


def remedies(judged: pd.DataFrame, rows: pd.DataFrame, about: Meta) -> pd.DataFrame:
    """Return remedies, the largest saving first and, for equal savings, the lowest risk first. Never empty.

    ``judged`` are resets of a Trace's ``verdicts`` and ``rows`` are connections of its ``summary``: all of them for the
    host, or those of one connection. The columns are ``COLUMNS``.
    """
    harmful = judged[judged["verdict"] == "harmful"]
    off = harmful["netns_ino"].astype(str).isin([inode for inode, s in about.namespaces.items() if s.idle_last == 0])
    result = [*_cures(harmful[~off]), *_done(harmful[off]), *_limits(rows)]
    result = result or [_nothing(judged, rows)]
    result.sort(key=lambda r: (-r.saves_us if r.saves_us == r.saves_us else 1.0, _RISKS.index(r.risk)))
    return pd.DataFrame([vars(row) for row in result], columns=list(COLUMNS))


def _nothing(judged: pd.DataFrame, rows: pd.DataFrame) -> _Remedy:
    unknown = (judged["verdict"] == "unknown").any() or (rows["verdict"] == "unknown").any()
    other_end = (rows["verdict"] == "other_end").any()
    why = "unseen" if rows.empty else "other_end" if other_end else "unknown" if unknown else "none"
    return _Remedy("nothing", 0.0, risk="low", connections=0, detail=why)


def _saving(remedy: str, saved: pd.DataFrame, risk: str, detail: Any) -> _Remedy:
    """Return a remedy that would have prevented these resets."""
    lost, connections = float(saved["lost_us"].sum()), int(saved["connection"].nunique())
    return _Remedy(remedy, lost, risk, connections, detail)


def _spaces(harmful: pd.DataFrame) -> tuple[str, ...]:
    """Return the inodes of the network namespaces, those that lost most first."""
    lost = harmful.groupby("netns_ino")["lost_us"].sum().sort_values(ascending=False, kind="stable")
    return tuple(str(inode) for inode in lost.index)


def _cures(harmful: pd.DataFrame) -> Iterator[_Remedy]:
    if harmful.empty:
        return
    spaces = _spaces(harmful)
    yield _saving("sysctl", harmful, "low", spaces)
    yield _initcwnd(harmful)
    idle = harmful[harmful["reason"].astype(str) == "idle"]
    yield from _ping(idle)
    yield from _disk(idle)
    yield _saving("bbr", harmful, "high", spaces)


def _done(harmful: pd.DataFrame) -> Iterator[_Remedy]:
    """Yield what needs no remedy any more, because idle resets are off by now."""
    if len(harmful):
        yield _saving("sysctl_done", harmful, "low", _spaces(harmful))


def _initcwnd(harmful: pd.DataFrame) -> _Remedy:
    """Return the smallest initial window in which all data that waited would have fitted.

    A burst for which nobody knows how much waited adds neither to the window nor to the saving.
    """
    waited = -(-harmful["waiting_bytes"].astype("float64") // harmful["mss"].where(harmful["mss"] > 0))
    window = harmful["chain_window"].astype("float64")
    needed = waited.where(waited > 0).clip(upper=window.fillna(np.inf))
    told = harmful[needed.notna()]
    routes = _routes(harmful if told.empty else told)
    if told.empty:
        connections = int(harmful["connection"].nunique())
        detail = InitialWindow(None, routes, len(harmful))
        return _Remedy("initcwnd", float("nan"), risk="medium", connections=connections, detail=detail)
    segments = int(needed.max())
    detail = InitialWindow(segments, routes, len(harmful) - len(told))
    return _saving("initcwnd", told, "medium" if segments <= BROAD else "high", detail)


def _routes(harmful: pd.DataFrame) -> tuple[Route, ...]:
    keys = ["netns_ino", "ifindex", "daddr"]
    known = harmful.assign(ifindex=harmful["ifindex"].fillna(0), daddr=harmful["daddr"].astype(str))
    lost = known.groupby(keys)["lost_us"].sum().sort_values(ascending=False, kind="stable")
    return tuple(Route(str(inode), int(ifindex), str(peer)) for inode, ifindex, peer in lost.index)


def _ping(idle: pd.DataFrame) -> Iterator[_Remedy]:
    """Yield pings for the connections that can send one; a sender that waits for a disk, or an HTTP/1 server, can't."""
    disk = idle["cause"].isin(("disk", "probably disk"))
    http = idle["sport"].isin(_HTTP_PORTS) | idle["comm"].astype(str).isin(_HTTP_SERVERS)
    able = idle[~disk & ~http]
    if able.empty:
        return
    shortest = float(able["rto_us"].min())
    interval = max(shortest * _PING_MARGIN // 10_000 * 10_000, 10_000.0)
    unable = (idle.loc[kind, "connection"] for kind in (http, disk & ~http))
    numbers = (int(keys[~keys.isin(able["connection"])].nunique()) for keys in unable)
    yield _saving("ping", able, "medium", Ping(interval, shortest, *numbers))


def _disk(idle: pd.DataFrame) -> Iterator[_Remedy]:
    """Yield one remedy for each device that senders waited for, with the cost of the resets that only it caused.

    A reset counts if its idle time would not have been longer than the RTO without the disk's part.
    """
    for device, rows in idle[idle["cause"].isin(("disk", "probably disk"))].groupby("disk_device"):
        waited = rows.groupby(rows["comm"].astype(str))["disk_us"].sum()
        only = rows[rows["idle_us"].astype("float64") - rows["disk_us"] <= rows["rto_us"]]
        detail = SlowDisk(
            str(device), str(waited.idxmax()), float(waited.sum()), int(rows["disk_requests"].sum()), len(rows)
        )
        if len(only):
            yield _saving("disk", only, "low", detail)
        else:
            connections = int(rows["connection"].nunique())
            yield _Remedy("disk", float("nan"), risk="low", connections=connections, detail=detail)


def _limits(rows: pd.DataFrame) -> Iterator[_Remedy]:
    """Yield remedies for connections that something other than the congestion window held back."""
    for label in ("receiver_window", "send_buffer", "loss"):
        number = int((rows["verdict"] == label).sum())
        if number:
            yield _Remedy(label, float("nan"), risk="low", connections=number)
