# SPDX-License-Identifier: Apache-2.0
"""Checks for settings with which ``run`` would wait for idle resets in vain, or see a part of a program only."""

from __future__ import annotations

import shlex
from collections.abc import Set as AbstractSet
from typing import Final

from cwndtrace import format as fmt
from cwndtrace import privileges
from cwndtrace.kernel import host, netns
from cwndtrace.kernel.siblings import Siblings
from cwndtrace.tcp import EXEMPT, IDLE_SYSCTL

_LOOKING: Final = {
    privileges.SYS_ADMIN: "CAP_SYS_ADMIN",
    privileges.SYS_PTRACE: "CAP_SYS_PTRACE",
    privileges.DAC_READ_SEARCH: "CAP_DAC_READ_SEARCH",
}
_NAMED: Final = 3
"""The most processes that a warning names."""


def warnings(controls: AbstractSet[str], settings: list[tuple[netns.Namespace, int | None]], what: str) -> list[str]:
    """Return a line for each thing that makes idle resets impossible now; the list is empty if they can happen.

    ``controls`` are the congestion controls of the existing connections. ``settings`` are the traced namespaces, each
    with its value of IDLE_SYSCTL. ``what`` names the target of the trace.
    """
    lines = []
    off = [namespace for namespace, value in settings if value == 0]
    if off and len(off) == len(settings):
        command = f"sysctl -w {IDLE_SYSCTL}=1"
        where = "this network namespace" if off[0].name == "this" else f"network namespace {off[0].name}"
        if off[0].path.parent.name == "netns":
            command = f"ip netns exec {off[0].name} {command}"
        lines.append(f"{IDLE_SYSCTL} is 0 in {where}: no window is reset after idle time ({command} turns it on)")
    if not controls:
        lines.append(f"{what} carries no TCP connection now")
    elif controls <= EXEMPT:
        names = ", ".join(sorted(controls))
        lines.append(
            f"every connection on {what} uses {names}, which is exempt from idle resets "
            "(net.ipv4.tcp_congestion_control sets it for new connections)"
        )
    return lines


def left_out(pid: int, siblings: Siblings) -> str:
    """Return the warning that a filter by ``pid`` leaves out the connections of other processes, with the remedy."""
    names = [fmt.process(comm, other) for other, comm in siblings.processes]
    if len(names) > _NAMED:
        names[_NAMED:] = [f"{len(names) - _NAMED} more"]
    who = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    total = fmt.plural(siblings.held + siblings.others, "connection")
    cure = "trace without -p, or by --cgroup or --port"
    if siblings.cgroup is not None:
        cure = f"--cgroup {shlex.quote(siblings.cgroup)} traces all of them"
    elif siblings.port is not None:
        cure = f"--port {siblings.port} traces all of them"
    hold = "holds" if len(siblings.processes) == 1 else "hold"
    return (
        f"process {pid} has {siblings.held:,} of {total} of its program: {who} {hold} {siblings.others:,} that aren't "
        f"traced ({cure})"
    )


def container() -> list[tuple[str, str]]:
    """Return cause and remedy of each thing that a trace from inside this container can't see of the host.

    The list is empty outside of containers. Call it after ``host.enter_cgroup_namespace`` and before privileges are
    dropped.
    """
    if not host.in_container():
        return []
    if not host.sees_all_processes():
        cause = "this container sees no processes but its own: snapshots lack the connections of other containers"
        return [(cause, "start it with --pid=host, in Kubernetes hostPID: true; on a host that is no container itself")]
    found = []
    if lacking := [name for number, name in _LOOKING.items() if number not in privileges.held()]:
        cause = f"this container lacks {', '.join(lacking)}, with which the host's processes and files are seen"
        found.append((cause, " ".join(f"--cap-add={name.removeprefix('CAP_')}" for name in lacking)))
    # Without CAP_SYS_PTRACE the root can't be reached either, and the line above says so.
    if privileges.SYS_PTRACE in privileges.held() and (why := host.lacking_root()) is not None:
        cause = f"the host's files, which name its containers and network namespaces, can't be read: {why}"
        found.append((cause, "--security-opt apparmor=unconfined, or the host's / as -v /:/host:ro,rslave"))
    if not host.in_first_cgroup_namespace():
        cause = "paths of cgroups begin at this container's own"
        found.append((cause, "--cgroupns=host, or --cap-add=SYS_ADMIN --cap-add=SYS_PTRACE"))
    return found
