# SPDX-License-Identifier: Apache-2.0
"""Turns what users name (eth0, a pid, a namespace) into filters, and refuses names of things that don't exist."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Literal

from cwndtrace.capture.source import Filters
from cwndtrace.errors import NotFound, PermissionNeeded, UsageError
from cwndtrace.kernel import cgroups, host, interfaces, netns
from cwndtrace.names.lookup import Lookup
from cwndtrace.names.select import Selection


def need_root(what: str) -> None:
    """Raise PermissionNeeded unless this process runs as root."""
    if os.geteuid() != 0:
        raise PermissionNeeded(f"{what} needs root", "prefix the command with sudo")


def resolve(
    *,
    iface: str | None = None,
    pid: int | None = None,
    port: int | None = None,
    namespace: str | None = None,
    cgroup: str | None = None,
    container: str | None = None,
    pod: str | None = None,
    unit: str | None = None,
    family: Literal[4, 6] | None = None,
    min_idle_s: float | None = None,
) -> Filters:
    """Return the filters for these names and numbers.

    An interface is looked up in ``namespace``, by default in this process's own. ``min_idle_s`` is in seconds. Raises
    NotFound for a name that doesn't exist, listing those that do, and UsageError for numbers out of range.
    """
    if port is not None and not 0 < port < 65536:
        raise UsageError(f"no port {port}", "ports go from 1 to 65535")
    if min_idle_s is not None and min_idle_s < 0:
        raise UsageError("idle time can't be negative", "give it as 500ms or 2s")
    if pid is not None and not host.sees_all_processes():
        cause = f"process {pid} here has another pid on the host, and the kernel filters by that one"
        raise UsageError(cause, "start the container with the host's pid namespace (--pid=host), or use another filter")
    if pid is not None and not Path(f"/proc/{pid}").exists():
        raise NotFound(f"no process {pid}", "see ps; to trace one that isn't running yet, filter by port or cgroup")
    if sum(each is not None for each in (cgroup, container, pod, unit)) > 1:
        raise UsageError("more than one workload is named", "give one of --cgroup, --container, --pod and --unit")
    if pod is not None and "/" not in pod:
        raise UsageError(
            f"no namespace of Kubernetes in {pod}", f"give it as NAMESPACE/NAME, for example default/{pod}"
        )
    where = netns.find(namespace) if namespace is not None else None
    if iface is not None:
        where = where or netns.own()
    filters = Filters(
        ifindex=interfaces.find(iface, where) if iface is not None and where is not None else None,
        netns=where.inode if where is not None else None,
        netns_name=where.name if where is not None and namespace is not None else None,
        pid=pid,
        port=port,
        family={None: None, 4: int(socket.AF_INET), 6: int(socket.AF_INET6)}[family],
        cgroup=cgroups.find(cgroup) if cgroup is not None else None,
        container=container,
        pod=pod,
        unit=unit,
        min_idle_us=round(min_idle_s * 1e6) if min_idle_s is not None else None,
    )
    if filters.workload is not None:
        Selection(filters.workload, Lookup()).check()
    return filters


def named(filters: Filters, iface: str | None = None) -> str:
    """Return a description for users: ``eth0, port 443 in network namespace web (inode 4026532281)``."""
    parts = [
        iface,
        f"port {filters.port}" if filters.port is not None else None,
        f"process {filters.pid}" if filters.pid is not None else None,
        f"cgroup {cgroups.shown(filters.cgroup)}" if filters.cgroup is not None else None,
        f"{filters.workload.kind} {filters.workload.text}" if filters.workload is not None else None,
    ]
    what = ", ".join(part for part in parts if part)
    if filters.netns_name is None:
        return what or "this machine"
    where = f"network namespace {filters.netns_name} (inode {filters.netns})"
    return f"{what} in {where}" if what else where
