# SPDX-License-Identifier: Apache-2.0
"""Remedies in words: the commands for the right network namespaces, and the form that lasts."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import pandas as pd

from cwndtrace import tcp
from cwndtrace.analysis.remedy import BROAD, InitialWindow, Ping, SlowDisk
from cwndtrace.format import plural, span
from cwndtrace.store.meta import Meta, NamespaceSettings

COLUMNS: Final = {
    "remedy": "sysctl, sysctl_done, initcwnd, ping, bbr, disk, receiver_window, send_buffer, loss or nothing",
    "action": "what to do, and where",
    "command": "the command of it, or several, separated by semicolons; empty where it isn't a command",
    "lasting": "how to make it last beyond a reboot, and for new containers; empty where it lasts by itself",
    "saves_us": "time that it would have saved in this capture, us, measured; missing where the records can't tell",
    "risk": "low, medium or high",
    "why_risk": "what may go wrong",
    "connections": "number of connections that it would have helped",
}
"""The columns of ``remedies``."""

_COMMANDS: Final = 3
"""The most namespaces or routes for which a command is shown."""
_LEAVE: Final = "leave the settings as they are"
_ALLOWED: Final = "net.ipv4.tcp_allowed_congestion_control"
_NETWORKD_MOST: Final = 1023
"""The largest InitialCongestionWindow= that systemd-networkd accepts."""


@dataclass(frozen=True)
class _Words:
    action: str
    why_risk: str = "none"
    command: str = ""
    lasting: str = ""


Owners = Mapping[str, tuple[Mapping[Any, Any], ...]]
"""The workloads of network namespaces, by inode: rows of ``Trace.workloads``."""
NOBODY: Final[Owners] = {}


def remedies(found: pd.DataFrame, about: Meta, lacking: str = "", owners: Owners = NOBODY) -> pd.DataFrame:
    """Return the rows of ``analysis.remedy.remedies`` in words, with ``COLUMNS``.

    ``lacking`` names the records that the trace kept and the capture doesn't have. ``owners`` has the workloads whose
    connections are in each namespace.
    """
    where = _Where(about, owners)
    words = [_words(row["remedy"], row["detail"], where, lacking) for row in found.to_dict("records")]
    texts = {name: [getattr(each, name) for each in words] for name in ("action", "why_risk", "command", "lasting")}
    return found.assign(**{name: pd.Series(column, dtype="str") for name, column in texts.items()})[list(COLUMNS)]


def remedy(row: Mapping[Any, Any]) -> str:
    """Return a row of ``remedies`` in one line: what to do, what it saves and what may go wrong."""
    action = str(row["action"])
    if row["remedy"] == "nothing":
        return "Nothing to do: no reset was harmful." if action == _LEAVE else f"{action[0].upper()}{action[1:]}."
    saves, helped = row["saves_us"], plural(int(row["connections"]), "connection")
    gain = f"{span(saves)} (measured) on {helped}"
    if row["remedy"] == "sysctl_done":
        return f"{action}: nothing is left to do about the {gain} that resets cost before."
    told = f"saves {gain}" if saves == saves else f"the records can't tell what it saves on {helped}"
    return f"{action}: {told}. Risk {row['risk']}: {row['why_risk']}."


# ---- one remedy each ---------------------------------------------------------------------------------


def _words(remedy: str, detail: Any, where: _Where, lacking: str) -> _Words:
    if remedy == "sysctl":
        return _sysctl(detail, where)
    if remedy == "sysctl_done":
        return _Words(f"{tcp.IDLE_SYSCTL} {_since(detail, where)}")
    if remedy == "initcwnd":
        return _initcwnd(detail, where)
    if remedy == "ping":
        return _ping(detail)
    if remedy == "bbr":
        return _bbr(detail, where)
    if remedy == "disk":
        return _disk(detail)
    if remedy == "nothing":
        return _Words(_nothing(detail, lacking))
    memory = "more memory on every such connection"
    return {
        "receiver_window": _Words("let the receiver offer more (net.ipv4.tcp_rmem there, or its SO_RCVBUF)", memory),
        "send_buffer": _Words("let the sender buffer more (net.ipv4.tcp_wmem, or the program's SO_SNDBUF)", memory),
        "loss": _Words("look for packet loss on the path (the congestion window isn't what these connections lack)"),
    }[remedy]


def _sysctl(spaces: tuple[str, ...], where: _Where) -> _Words:
    shown, commands = where.in_each(spaces, f"sysctl -w {tcp.IDLE_SYSCTL}=0", hosts=True)
    return _Words(
        shown,
        "each connection in the namespace may send its old window at once after idle time, into a path that may be "
        "busier by then",
        commands,
        where.lasting(tcp.IDLE_SYSCTL, "0", spaces),
    )


def _since(spaces: tuple[str, ...], where: _Where) -> str:
    names = ", ".join([*(where.name(inode) for inode in spaces[:_COMMANDS]), *_more(len(spaces), "namespace")])
    known = [where.about.namespaces[inode] for inode in spaces]
    if all(space.idle_start == 1 and space.idle_end == 0 for space in known):
        return f"was set to 0 in {names} during the capture"
    return f"is 0 in {names}, by the last that the capture knows"


def _initcwnd(detail: InitialWindow, where: _Where) -> _Words:
    number, routes = len(detail.routes), detail.routes[:_COMMANDS]
    if detail.segments is None:
        others = f" and {plural(number - 1, 'other')}" if number > 1 else ""
        return _Words(
            f"a larger initcwnd on the route to {routes[0].peer}{others} might help, but how large can't be told, "
            "because the capture doesn't say how much data waited for the window",
            "new connections also begin with it",
        )
    shown, commands = [], []
    for route in routes:
        inside, peer = where.inside(route.netns), shlex.quote(route.peer)
        here = inside or ""
        command = f"{here}ip route change $({here}ip route get fibmatch {peer}) initcwnd {detail.segments}"
        commands += [command] if inside is not None else []
        device = where.about.interfaces.get(str(route.ifindex)) if where.name(route.netns) == "this" else None
        shown.append(f"{where.remark(route.netns)}{command}" + (f" (through {device})" if device else ""))
    untold = f"; how much waited after {plural(detail.untold, 'other reset')} isn't known" if detail.untold else ""
    unusual = "" if detail.segments <= BROAD else ", far more than usual"
    networkd = (
        f"InitialCongestionWindow={detail.segments} in the [Route] section of systemd-networkd, which netplan writes "
        f"for congestion-window: {detail.segments} on a route"
        if detail.segments <= _NETWORKD_MOST
        else f"(systemd-networkd's InitialCongestionWindow= takes at most {_NETWORKD_MOST})"
    )
    return _Words(
        f"{'; '.join([*shown, *_more(number, 'route')])}; the inner command prints the route with all that it keeps"
        f"{untold}",
        f"new connections also begin with {plural(detail.segments, 'segment')} at once{unusual}",
        "; ".join(commands),
        f"in the network configuration of the distribution: {networkd}; initcwnd={detail.segments} among the "
        "attributes of ipv4.routes or ipv6.routes in NetworkManager; the command after post-up in "
        "/etc/network/interfaces; for a container's namespace, the command whenever it is made",
    )


def _ping(detail: Ping) -> _Words:
    out = [
        f"{plural(number, 'connection')} {why}"
        for number, why in (
            (detail.http, "of what is one by its port or name"),
            (detail.disk, "whose sender waits for a disk"),
        )
        if number
    ]
    without = f" ({' and '.join(out)} left out)" if out else ""
    return _Words(
        f"if the protocol allows it, have the application send a small message at least every "
        f"{span(detail.interval_us)} while it is idle (the shortest RTO was {span(detail.rto_us)}; TCP keepalive "
        f"carries no data and doesn't count); an HTTP/1 server can't{without}",
        "more traffic and wake-ups on every connection, and both ends have to agree on what a ping is",
    )


def _bbr(spaces: tuple[str, ...], where: _Where) -> _Words:
    shown, commands = where.in_each(spaces, f"sysctl -w {tcp.CONTROL_SYSCTL}=bbr")
    refused = allowed = ""
    if not all(where.is_host(inode) for inode in spaces):
        refused = f"; in a container this is refused unless {_ALLOWED} lists bbr, which only the host can change"
        allowed = f"; on the host, {_ALLOWED} = its present value and bbr"
    return _Words(
        f"use BBR: {shown} (or TCP_CONGESTION in the program){refused}",
        "BBR is a different congestion control: it reacts differently to loss and to other traffic, and only new "
        "connections get it",
        commands,
        where.lasting(tcp.CONTROL_SYSCTL, "bbr", spaces) + allowed,
    )


def _disk(detail: SlowDisk) -> _Words:
    device = detail.device or "the disk"
    return _Words(
        f"make {detail.comm or 'the sender'} wait less for {device}: it waited {span(detail.waited_us)} for "
        f"{plural(detail.requests, 'request')} before {plural(detail.resets, 'harmful reset')} (read ahead, cache "
        "more, or look for what else keeps it busy)",
        "more memory for what is cached",
        f"iostat -x 1 {shlex.quote(detail.device)}" if detail.device else "",
    )


def _nothing(why: str, lacking: str) -> str:
    if lacking:
        return f"trace again, or get the whole capture, because {lacking}"
    if why == "unseen":
        return "trace again while connections are open, with a filter that lets them through: none was seen"
    if why == "other_end":
        return "trace at the other end too, because some connections mostly receive, and their senders are there"
    if why == "unknown":
        return "trace again for longer, because the records of some connections can't tell"
    return _LEAVE


# ---- where it applies --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Where:
    """The network namespaces of a capture, and the workloads whose connections are in them."""

    about: Meta
    owners: Owners

    def lasting(self, setting: str, value: str, spaces: tuple[str, ...]) -> str:
        """Return how a setting lasts in these namespaces: the host's, and those of containers, pods and units."""
        forms = []
        if any(self.is_host(inode) for inode in spaces):
            forms.append(f"/etc/sysctl.d/90-cwndtrace.conf with the line {setting} = {value}")
        others = [inode for inode in spaces if not self.is_host(inode)]
        known = {
            row["workload"]: _lasting_of(row, setting, value) for inode in others for row in self.owners.get(inode, ())
        }
        forms += [*dict.fromkeys(known.values())][:_COMMANDS]
        forms += _more(len({*known.values()}), "workload")
        if any(not self.owners.get(inode) for inode in others):
            forms += [
                f"docker run --sysctl {setting}={value} for a container, and the same option of podman",
                f"{_pod_form(setting, value)} for a pod, {_once_allowed(setting)}",
                "the command, whenever it is made, for a namespace made by hand",
            ]
        return "; ".join(forms)

    def name(self, inode: str) -> str:
        """Return a namespace's name for people."""
        space = self.about.namespaces.get(inode)
        return space.name if space and space.name else f"network namespace {inode}"

    def is_host(self, inode: str) -> bool:
        """Return whether a namespace is the host's; if the capture doesn't say, the one that it was made in."""
        space = self.about.namespaces.get(inode)
        return space is not None and (space.host or (host(self.about) is None and space.name == "this"))

    def in_each(self, spaces: tuple[str, ...], command: str, *, hosts: bool = False) -> tuple[str, str]:
        """Return a command in each namespace, for people and for a shell; ``hosts`` adds the host's own setting."""
        shown, commands = [], []
        for inode in spaces[:_COMMANDS]:
            inside = self.inside(inode)
            commands += [] if inside is None else [f"{inside}{command}"]
            elsewhere = self._elsewhere(inode) if hosts else ""
            shown.append(f"{self.remark(inode)}{inside or ''}{command}{elsewhere}")
        return "; ".join([*shown, *_more(len(spaces), "namespace")]), "; ".join(commands)

    def inside(self, inode: str) -> str | None:
        """Return the prefix for a command that has to run in this network namespace; None where it is unknown."""
        space = self.about.namespaces.get(inode)
        name = space.name if space else ""
        if self.is_host(inode) or name == "this":
            return ""
        if not name:
            return None
        if name.endswith("]") and "[" in name:
            return f"nsenter -t {shlex.quote(name.rpartition('[')[2][:-1])} -n "
        return f"ip netns exec {shlex.quote(name)} "

    def remark(self, inode: str) -> str:
        """Return the words before a command in a namespace: whose it is, or its number where no command enters it."""
        if not self.is_host(inode) and (mine := self.owners.get(inode)):
            more = f" and {plural(len(mine) - 1, 'other workload')}" if len(mine) > 1 else ""
            return f"for {_noun(mine[0])}{mine[0]['workload']}{more}: "
        return f"in network namespace {inode}: " if self.inside(inode) is None else ""

    def _elsewhere(self, inode: str) -> str:
        """Return a remark on the host's setting, for a namespace other than the host's."""
        its = host(self.about)
        if its is None or self.about.namespaces.get(inode, its).host:
            return ""
        return f" (the host's own setting is {its.idle_last}, which doesn't apply in this namespace)"


def _noun(workload: Mapping[Any, Any]) -> str:
    """Return what a workload is, before its name; that of a unit, or of a pod without a name, says so itself."""
    if workload["pod_name"]:
        return "pod "
    return {"container": "container ", "cgroup": "cgroup "}.get(workload["kind"], "")


def _lasting_of(workload: Mapping[Any, Any], setting: str, value: str) -> str:
    """Return how a setting lasts in the network namespace of a workload."""
    if workload["pod_name"] or workload["kind"] == "pod":
        pod = "/".join(part for part in (workload["pod_namespace"], workload["pod_name"]) if part)
        return f"{_pod_form(setting, value)} for pod {pod or workload['pod_uid']}, {_once_allowed(setting)}"
    if workload["kind"] == "container":
        runtime = workload["runtime"] if workload["runtime"] in ("docker", "podman") else "docker"
        other = "" if runtime == workload["runtime"] else ", or the same of its runtime,"
        return f"{runtime} run --sysctl {setting}={value}{other} for container {workload['workload']}"
    if workload["kind"] == "unit":
        # With "!", systemd keeps the unit's network namespace, and root's rights (systemd.service(5)).
        return f"ExecStartPre=!sysctl -w {setting}={value} in the [Service] section of {workload['unit']}"
    return f"the command, whenever the namespace of {workload['workload']} is made"


def _pod_form(setting: str, value: str) -> str:
    return f'securityContext.sysctls with name: {setting} and value: "{value}"'


def _once_allowed(setting: str) -> str:
    return f"once the kubelet of its node runs with --allowed-unsafe-sysctls={setting}"


def _more(number: int, noun: str) -> list[str]:
    return [f"and for {plural(number - _COMMANDS, f'more {noun}')}"] if number > _COMMANDS else []


def host(about: Meta) -> NamespaceSettings | None:
    """Return the namespace of process 1; None where the capture doesn't say which it was."""
    return next((namespace for namespace in about.namespaces.values() if namespace.host), None)
