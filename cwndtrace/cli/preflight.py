# SPDX-License-Identifier: Apache-2.0
"""Why nothing may ever happen: what would make ``run`` wait in vain."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from cwndtrace.kernel import netns
from cwndtrace.tcp import EXEMPT, IDLE_SYSCTL


def warnings(controls: AbstractSet[str], settings: list[tuple[netns.Namespace, int | None]], what: str) -> list[str]:
    """What makes idle resets impossible now, a line each; empty where they can happen.

    ``controls`` are the congestion controls of the connections there are, ``settings`` the namespaces that are traced
    with IDLE_SYSCTL there, ``what`` names the target.
    """
    found = []
    off = [namespace for namespace, value in settings if value == 0]
    if off and len(off) == len(settings):
        command = f"sysctl -w {IDLE_SYSCTL}=1"
        where = "this network namespace" if off[0].name == "this" else f"network namespace {off[0].name}"
        if off[0].path.parent.name == "netns":
            command = f"ip netns exec {off[0].name} {command}"
        found.append(f"{IDLE_SYSCTL} is 0 in {where}: no window is reset after idle time ({command} turns it on)")
    if not controls:
        found.append(f"{what} carries no TCP connection now")
    elif controls <= EXEMPT:
        names = ", ".join(sorted(controls))
        found.append(
            f"every connection on {what} uses {names}, which is exempt from idle resets "
            "(net.ipv4.tcp_congestion_control sets it for new connections)"
        )
    return found
