# SPDX-License-Identifier: Apache-2.0
"""Remedies for the resets that cost something, with their savings and risks.

cwndtrace never applies a remedy. Savings are estimates from the records, as the costs are.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import pandas as pd

from cwndtrace import tcp
from cwndtrace.analysis import cost
from cwndtrace.format import plural, span
from cwndtrace.store.meta import Meta, NamespaceSettings

COLUMNS: Final = {
    "remedy": "sysctl, initcwnd, ping, bbr, receiver_window, send_buffer, loss or nothing",
    "action": "what to do, and where",
    "saves_us": "time that it would have saved in this capture, us, estimated; missing where the records can't tell",
    "risk": "low, medium or high",
    "why_risk": "what may go wrong",
    "connections": "number of connections that it would have helped",
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
    "note": "settings that differ from the host's",
}
"""The columns of ``audit``."""

_RISKS: Final = ("low", "medium", "high")
_PING_MARGIN: Final = 0.8
"""The ping interval as a share of the RTO, so that even a late ping comes before the RTO is over."""
_SPACES: Final = 3
"""The most namespaces for which a command is shown."""
_BROAD: Final = 64
"""The initial window in segments above which a new connection's first flight is a burst that few paths expect."""

_LEAVE: Final = "leave the settings as they are"


@dataclass(frozen=True)
class _Remedy:
    remedy: str
    action: str
    saves_us: float
    risk: str
    why_risk: str
    connections: int


def remedies(judged: pd.DataFrame, rows: pd.DataFrame, about: Meta, *, lacking: str = "") -> pd.DataFrame:
    """Return remedies, the largest saving first and, for equal savings, the lowest risk first. Never empty.

    ``judged`` are resets of a Trace's ``verdicts`` and ``rows`` are connections of its ``summary``: all of them for the
    host, or those of one connection. The columns are ``COLUMNS``. ``lacking`` is as for ``verdict.host``.
    """
    harmful = judged[judged["verdict"] == "harmful"]
    result = [*_cures(harmful, about), *_limits(rows)]
    if not result and lacking:
        result = [
            _Remedy("nothing", f"trace again, or get the whole capture, because {lacking}", 0.0, "low", "none", 0)
        ]
    elif not result:
        result = [_Remedy("nothing", _LEAVE, 0.0, "low", "none", 0)]
    result.sort(key=lambda r: (-r.saves_us if r.saves_us == r.saves_us else 1.0, _RISKS.index(r.risk)))
    return pd.DataFrame([asdict(row) for row in result], columns=list(COLUMNS))


def _cures(harmful: pd.DataFrame, about: Meta) -> Iterator[_Remedy]:
    if harmful.empty:
        return
    touched, lost = int(harmful["connection"].nunique()), float(harmful["lost_us"].sum())
    spaces = [str(inode) for inode in harmful.groupby("netns_ino")["lost_us"].sum().sort_values().index[::-1]]
    commands = [f"{_inside(inode, about)}sysctl -w {tcp.IDLE_SYSCTL}=0{_elsewhere(inode, about)}" for inode in spaces]
    more = [f"and in {plural(len(spaces) - _SPACES, 'more namespace')}"] if len(spaces) > _SPACES else []
    yield _Remedy(
        "sysctl",
        "; ".join([*commands[:_SPACES], *more]),
        lost,
        "low",
        "each connection in the namespace may send its old window at once after idle time, into a path that may be "
        "busier by then",
        touched,
    )
    yield _initcwnd(harmful)
    idle = harmful[harmful["reason"].astype(str) == "idle"]
    if len(idle):
        period = idle["rto_us"].min() * _PING_MARGIN // 10_000 * 10_000
        yield _Remedy(
            "ping",
            f"have the application send a small message at least every {span(max(period, 10_000))} while it is idle "
            f"(the shortest RTO was {span(idle['rto_us'].min())}; TCP keepalive carries no data and doesn't count)",
            float(idle["lost_us"].sum()),
            "medium",
            "more traffic and wake-ups on every connection, and both ends have to agree on what a ping is",
            int(idle["connection"].nunique()),
        )
    yield _Remedy(
        "bbr",
        f"use BBR for these connections ({tcp.CONTROL_SYSCTL}=bbr in their namespace, or TCP_CONGESTION on each)",
        lost,
        "high",
        "BBR is a different congestion control: it reacts differently to loss and to other traffic, and only new "
        "connections get it",
        touched,
    )


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
    peers = harmful["daddr"].astype(str).unique()
    where = f"to {peers[0]}" if len(peers) == 1 else f"to these {len(peers)} peers"
    return _Remedy(
        "initcwnd",
        f"set initcwnd {value} on the route {where} (ip route change ... initcwnd {value})",
        float(saved.sum()),
        "medium" if value <= _BROAD else "high",
        f"new connections also begin with {plural(value, 'segment')} at once"
        + ("" if value <= _BROAD else ", far more than usual"),
        int(harmful["connection"].nunique()),
    )


def _limits(rows: pd.DataFrame) -> Iterator[_Remedy]:
    """Yield remedies for connections that something other than the congestion window held back."""
    actions = {
        "receiver_window": ("let the receiver offer more (net.ipv4.tcp_rmem there, or its SO_RCVBUF)", "low"),
        "send_buffer": ("let the sender buffer more (net.ipv4.tcp_wmem, or the program's SO_SNDBUF)", "low"),
        "loss": ("look for packet loss on the path (the congestion window isn't what these connections lack)", "low"),
    }
    for label, (action, risk) in actions.items():
        number = int((rows["verdict"] == label).sum())
        if number:
            risky = "more memory on every such connection" if label != "loss" else "none"
            yield _Remedy(label, action, float("nan"), risk, risky, number)


def _inside(inode: str, about: Meta) -> str:
    """Return the prefix for a command that has to run in this network namespace."""
    namespace = about.namespaces.get(inode)
    name = namespace.name if namespace else ""
    if (namespace and namespace.host) or name == "this":
        return ""
    if not name:
        return f"in network namespace {inode}: "
    if name.endswith("]") and "[" in name:
        return f"nsenter -t {name.rpartition('[')[2][:-1]} -n "
    return f"ip netns exec {shlex.quote(name)} "


def _elsewhere(inode: str, about: Meta) -> str:
    """Return a remark on the host's setting, for a namespace other than the host's."""
    host = _host(about)
    if host is None or about.namespaces.get(inode, host).host:
        return ""
    return f" (the host's own setting is {host.idle}, which doesn't apply in this namespace)"


def _host(about: Meta) -> NamespaceSettings | None:
    return next((namespace for namespace in about.namespaces.values() if namespace.host), None)


_UNKNOWN: Final = NamespaceSettings("", False, None, None)


def audit(judged: pd.DataFrame, snapshots: pd.DataFrame, about: Meta) -> pd.DataFrame:
    """Return one row per network namespace: its settings and the connections that they affect.

    The columns are ``AUDIT_COLUMNS``. Settings are those when the capture began. A namespace that came later has a row
    if a snapshot or a reset was in it.
    """
    spaces, host = about.namespaces, _host(about)
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
                "note": _note(space, host),
            }
        )
    kinds = {"slow_start_after_idle": "Int64", "host": "bool"}
    return pd.DataFrame(rows, columns=list(AUDIT_COLUMNS)).astype(kinds)


def _note(space: NamespaceSettings, host: NamespaceSettings | None) -> str:
    if host is None:
        return ""
    settings = {
        tcp.IDLE_SYSCTL: (space.idle, host.idle),
        tcp.CONTROL_SYSCTL: (space.congestion_control, host.congestion_control),
    }
    return "; ".join(
        f"{name} is {here} here but {there} on the host"
        for name, (here, there) in settings.items()
        if here is not None and there is not None and here != there
    )


def sentence(row: Mapping[Any, Any]) -> str:
    """Return a row of ``remedies`` in words."""
    if row["remedy"] == "nothing":
        action = str(row["action"])
        return "Nothing to do: no reset cost a round trip." if action == _LEAVE else f"{action[0].upper()}{action[1:]}."
    saves = row["saves_us"]
    gain = f"saves about {span(saves)} (estimated)" if saves == saves else "the records can't tell what it saves"
    helped = plural(int(row["connections"]), "connection")
    return f"{row['action']}: {gain} on {helped}. Risk {row['risk']}: {row['why_risk']}."
