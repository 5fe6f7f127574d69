# SPDX-License-Identifier: Apache-2.0
"""Checks for settings with which ``run`` would wait for idle resets in vain."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from cwndtrace.kernel import netns
from cwndtrace.tcp import EXEMPT, IDLE_SYSCTL


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
