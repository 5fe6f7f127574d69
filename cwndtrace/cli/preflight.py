# SPDX-License-Identifier: Apache-2.0
"""Checks for settings with which ``run`` would wait for idle resets in vain, or see a part of a program only."""

from __future__ import annotations

import shlex
from collections.abc import Set as AbstractSet
from typing import Final

from cwndtrace import format as fmt
from cwndtrace.kernel import netns
from cwndtrace.kernel.siblings import Siblings
from cwndtrace.tcp import EXEMPT, IDLE_SYSCTL

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
