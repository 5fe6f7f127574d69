# SPDX-License-Identifier: Apache-2.0
"""Verdicts, remedies and their evidence in words."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import pandas as pd

from cwndtrace import format as fmt
from cwndtrace import tcp
from cwndtrace.analysis.remedy import BROAD
from cwndtrace.analysis.verdict import LIMIT_SHARE, Totals
from cwndtrace.format import plural, size, span, threshold
from cwndtrace.present import html
from cwndtrace.store.meta import Meta, NamespaceSettings

LABELS: Final = {
    "harmful": "harmful: cost at least one round trip",
    "burst_fits": "harmless: the burst fits into the window after the reset",
    "same_rounds": "harmless: the burst needs as many round trips from either window",
    "never_full": "harmless: the window was never used up after the reset",
    "receiver_window": "not the window: the receiver's window was the limit",
    "send_buffer": "not the window: the send buffer was the limit",
    "loss": "loss, not idle time",
    "nothing_sent": "harmless: nothing was sent",
    "unknown": "not enough data to say",
    "exempt": "its congestion control is exempt from idle resets",
    "sysctl_off": "idle resets are off in its network namespace",
    "no_reset": "its window was never reset",
}
"""The verdicts with their texts; those from ``exempt`` on apply to connections only."""

_CANT_TELL: Final = "Can't tell whether the congestion window is the cause"
_SPACES: Final = 3
"""The most namespaces for which a command is shown."""


@dataclass(frozen=True)
class Verdict:
    """A verdict: one of ``LABELS`` as ``verdict``, and its evidence as ``text``, for a terminal and Jupyter."""

    verdict: str
    text: str

    def __str__(self) -> str:
        return fmt.clean(f"{LABELS[self.verdict]}. {self.text}")

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html.verdict(LABELS[self.verdict], self.text, harmful=self.verdict == "harmful")


@dataclass(frozen=True, repr=False)
class Host(Verdict):
    """The cost of the resets of a whole capture. Costs are in us, estimated; ``busy_us`` is NaN where it is unknown."""

    resets: int
    harmful: int
    connections: int
    connections_seen: int
    lost_us: float
    busy_us: float

    def __str__(self) -> str:
        return fmt.clean(self.text)

    __repr__ = __str__


# ---- resets and connections --------------------------------------------------------------------------


def reset(row: Mapping[Any, Any]) -> str:
    """Return the evidence for the verdict of one reset, a row of ``resets``, in words."""
    cwnd = f"{row['cwnd_before']} -> {row['cwnd_after']} {'segment' if row['cwnd_after'] == 1 else 'segments'}"
    if row["reason"] == "idle":
        cwnd += f" after {span(row['idle_us'])} of idle time (RTO {span(row['rto_us'])})"
    burst = size(row["burst_bytes"]) if row["burst_bytes"] == row["burst_bytes"] else "an unknown number of bytes"
    fits = size(row["cwnd_after"] * row["mss"])
    reasons: dict[str, str] = {
        "harmful": f"the burst of {burst} needs about {_trips(row['rounds_lost'])} more, "
        f"{span(row['lost_us'])} in all at {span(row['round_us'])} each (estimated)",
        "burst_fits": f"the burst of {burst} fits into the window after the reset ({fits})",
        "same_rounds": f"the burst of {burst} needs {_trips(row['rounds_after'])} from either window",
        "never_full": f"the burst of {burst} came in pieces that never used up the window, which didn't grow",
        "receiver_window": _narrow(row, burst),
        "send_buffer": f"the send buffer of {size(row['limit_bytes'])} is smaller than the window was, and the burst "
        f"is {burst}; at most {_share_of_rounds(row)}",
        "loss": "a retransmission timeout caused the reset, not idle time; ssthresh was "
        f"{threshold(row['ssthresh_after'])} segments after it",
        "nothing_sent": "no data was sent between the reset and the connection's next record",
        "unknown": "no later record says how much was sent, or no round-trip time was ever measured",
    }
    return f"{cwnd}: {reasons[row['verdict']]}"


def _narrow(row: Mapping[Any, Any], burst: str) -> str:
    if row["tgid"] == 0 and row["unsent_bytes"] > 0:
        return f"the peer's window was closed, and {size(row['unsent_bytes'])} waited for it to open"
    if row["rwnd_limited_share"] > LIMIT_SHARE:
        return (
            f"the peer's window held the sender back for {_percent(row['rwnd_limited_share'])} of its busy time; "
            f"at most {_share_of_rounds(row)}"
        )
    return (
        f"the peer offered a window of {size(row['snd_wnd'])}, less than the congestion window was, for a burst of "
        f"{burst}; {_share_of_rounds(row)}"
    )


def _trips(number: float) -> str:
    return plural(round(number), "round trip") if number == number else "an unknown number of round trips"


def _share_of_rounds(row: Mapping[Any, Any]) -> str:
    return f"{row['rounds_lost']:.0f} of {row['rounds_after']:.0f} round trips are due to the reset"


def connection(row: Mapping[Any, Any]) -> str:
    """Return the evidence for the verdict of one connection, a row of ``connections``, in words."""
    number = plural(row["resets"], "reset")
    label = row["verdict"]
    if label == "harmful":
        many = f"{row['resets_harmful']} of {number} cost their bursts {span(row['lost_us'])} in all (estimated)"
        cost = many if row["resets"] > 1 else f"its reset cost its burst {span(row['lost_us'])} (estimated)"
        # Snapshots may have missed some of the bursts, so that the busy time is too short to give a share of.
        whole = row["busy_us"] >= row["lost_us"]
        return cost + (f", {_percent(row['lost_us'] / row['busy_us'])} of the connection's busy time" if whole else "")
    if row["resets"]:
        return LABELS[label] + (f" ({row['verdict_resets']} of {number})" if row["resets"] > 1 else "")
    reasons = {
        "exempt": f"{row['ca_name']} never resets its window after idle time",
        "sysctl_off": f"{tcp.IDLE_SYSCTL} was 0 in namespace {row['netns_ino']} when the capture began",
        "nothing_sent": f"no data was sent in the {row['seen_s']:.0f} s that it was watched",
        "send_buffer": f"no reset; the send buffer held it back for {_percent(row['sndbuf_limited_share'])} of "
        f"its {span(row['busy_us'])} of busy time",
        "receiver_window": f"no reset; the peer's window held it back for {_percent(row['rwnd_limited_share'])} of "
        f"its {span(row['busy_us'])} of busy time",
        "loss": f"no reset, but {plural(row['retrans_segments'], 'retransmitted segment')}",
        "unknown": "only one snapshot shows it, no probe could see idle resets, or some of its records are missing",
    }
    return reasons.get(label, f"no reset while it sent {size(row['sent_bytes'])}")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.095 else f"{100 * share:.1f} %"


# ---- the whole capture -------------------------------------------------------------------------------


def _not_the_window(verdicts: Mapping[str, int], what: str) -> tuple[str, str]:
    """Return the most frequent of the verdicts, and a sentence that names all of them."""
    verdict = next(iter(verdicts))
    claim = _CANT_TELL if verdict == "unknown" else "The congestion window is not the cause"
    reasons = ", ".join(f'{plural(n, "time")} "{LABELS[label]}"' for label, n in verdicts.items())
    return verdict, f"{claim}: {what} ({reasons})."


def host(totals: Totals, lacking: str = "") -> Host:
    """Return the verdict on a whole capture.

    ``lacking`` names the records that the trace kept and the capture doesn't have. If there are any, the records that
    are there allow no verdict on the whole.
    """
    if totals.harmful:
        what = "Idle resets" if totals.idle_only else "Window resets"
        text = (
            f"{what} cost {span(totals.lost_us)} (estimated) over {plural(totals.harmful, 'burst')} on "
            f"{totals.connections} of {plural(totals.connections_seen, 'connection')}"
        )
        known = totals.busy_us >= totals.lost_us
        text += (
            f", {_percent(totals.lost_us / totals.busy_us)} of the {span(totals.busy_us)} of busy time."
            if known
            else "."
        )
        verdict = "harmful"
    elif totals.resets:
        what = f"{plural(totals.resets, 'reset')}, none known to have cost a round trip"
        verdict, text = _not_the_window(totals.verdicts, what)
    elif totals.connections_seen:
        verdict, text = _not_the_window(totals.verdicts, f"no reset on {plural(totals.connections_seen, 'connection')}")
    else:
        verdict, text = "unknown", "No TCP connection was seen."
    if lacking:
        rest = f" By the records that are there, {text[0].lower()}{text[1:]}" if totals.harmful else ""
        verdict, text = "unknown", f"{_CANT_TELL}, because {lacking}.{rest}"
    numbers = (totals.resets, totals.harmful, totals.connections, totals.connections_seen)
    return Host(verdict, text, *numbers, totals.lost_us, totals.busy_us)


# ---- remedies ----------------------------------------------------------------------------------------

REMEDY_COLUMNS: Final = {
    "remedy": "sysctl, initcwnd, ping, bbr, receiver_window, send_buffer, loss or nothing",
    "action": "what to do, and where",
    "saves_us": "time that it would have saved in this capture, us, estimated; missing where the records can't tell",
    "risk": "low, medium or high",
    "why_risk": "what may go wrong",
    "connections": "number of connections that it would have helped",
}
"""The columns of ``remedies``."""


def remedies(found: pd.DataFrame, about: Meta, lacking: str = "") -> pd.DataFrame:
    """Return the rows of ``analysis.remedy.remedies`` with actions and risks in words. ``lacking``: see ``host``."""
    rows = found.to_dict("records")
    texts = [_action(row["remedy"], row["detail"], about, lacking) for row in rows]
    action, why_risk = ([text[i] for text in texts] for i in range(2))
    return found.assign(action=action, why_risk=why_risk)[list(REMEDY_COLUMNS)]


def _action(remedy: str, detail: tuple[Any, ...], about: Meta, lacking: str) -> tuple[str, str]:
    """Return what to do and what may go wrong."""
    if remedy == "sysctl":
        commands = [
            f"{_inside(inode, about)}sysctl -w {tcp.IDLE_SYSCTL}=0{_elsewhere(inode, about)}" for inode in detail
        ]
        more = [f"and in {plural(len(detail) - _SPACES, 'more namespace')}"] if len(detail) > _SPACES else []
        return "; ".join([*commands[:_SPACES], *more]), (
            "each connection in the namespace may send its old window at once after idle time, into a path that may be "
            "busier by then"
        )
    if remedy == "initcwnd":
        value, *peers = detail
        where = f"to {peers[0]}" if len(peers) == 1 else f"to these {len(peers)} peers"
        unusual = "" if value <= BROAD else ", far more than usual"
        return (
            f"set initcwnd {value} on the route {where} (ip route change ... initcwnd {value})",
            f"new connections also begin with {plural(value, 'segment')} at once{unusual}",
        )
    if remedy == "ping":
        interval, shortest = detail
        return (
            f"have the application send a small message at least every {span(interval)} while it is idle "
            f"(the shortest RTO was {span(shortest)}; TCP keepalive carries no data and doesn't count)",
            "more traffic and wake-ups on every connection, and both ends have to agree on what a ping is",
        )
    memory = "more memory on every such connection"
    return {
        "bbr": (
            f"use BBR for these connections ({tcp.CONTROL_SYSCTL}=bbr in their namespace, or TCP_CONGESTION on each)",
            "BBR is a different congestion control: it reacts differently to loss and to other traffic, and only new "
            "connections get it",
        ),
        "receiver_window": ("let the receiver offer more (net.ipv4.tcp_rmem there, or its SO_RCVBUF)", memory),
        "send_buffer": ("let the sender buffer more (net.ipv4.tcp_wmem, or the program's SO_SNDBUF)", memory),
        "loss": ("look for packet loss on the path (the congestion window isn't what these connections lack)", "none"),
        "nothing": (f"trace again, or get the whole capture, because {lacking}" if lacking else _LEAVE, "none"),
    }[remedy]


_LEAVE: Final = "leave the settings as they are"


def remedy(row: Mapping[Any, Any]) -> str:
    """Return a row of ``remedies`` in words."""
    if row["remedy"] == "nothing":
        action = str(row["action"])
        return "Nothing to do: no reset cost a round trip." if action == _LEAVE else f"{action[0].upper()}{action[1:]}."
    saves = row["saves_us"]
    gain = f"saves about {span(saves)} (estimated)" if saves == saves else "the records can't tell what it saves"
    helped = plural(int(row["connections"]), "connection")
    return f"{row['action']}: {gain} on {helped}. Risk {row['risk']}: {row['why_risk']}."


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


def audit(rows: pd.DataFrame, about: Meta) -> pd.DataFrame:
    """Return the rows of ``analysis.remedy.audit`` with ``note``: the settings that differ from the host's."""
    host = _host(about)
    return rows.assign(note=[_note(about.namespaces.get(str(inode)), host) for inode in rows["netns_ino"]])


def _note(space: NamespaceSettings | None, host: NamespaceSettings | None) -> str:
    if space is None or host is None:
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
