# SPDX-License-Identifier: Apache-2.0
"""Why nothing may ever happen: what would make ``run`` wait in vain."""

from __future__ import annotations

import pandas as pd

from cwndtrace.analysis.verdict import EXEMPT
from cwndtrace.kernel import netns


def warnings(connections: pd.DataFrame, namespaces: list[netns.Namespace], what: str) -> list[str]:
    """What makes idle resets impossible now, a line each; empty where they can happen.

    ``connections`` is one snapshot, ``namespaces`` those that are traced, ``what`` names the target.
    """
    found = []
    off = [n for n in namespaces if netns.idle_sysctl(n) == 0]
    if off and len(off) == len(namespaces):
        command = f"sysctl -w {netns.IDLE_SYSCTL}=1"
        where = "this network namespace" if off[0].name == "this" else f"network namespace {off[0].name}"
        if off[0].path.parent.name == "netns":
            command = f"ip netns exec {off[0].name} {command}"
        found.append(f"{netns.IDLE_SYSCTL} is 0 in {where}: no window is reset after a rest ({command} turns it on)")
    if connections.empty:
        found.append(f"{what} carries no TCP connection now")
    elif set(connections["ca_name"]) <= EXEMPT:
        names = ", ".join(sorted(set(connections["ca_name"])))
        found.append(
            f"every connection on {what} uses {names}, which is exempt from idle resets "
            "(net.ipv4.tcp_congestion_control sets it for new connections)"
        )
    return found
