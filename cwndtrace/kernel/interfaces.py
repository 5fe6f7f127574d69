# SPDX-License-Identifier: Apache-2.0
"""Finds interfaces by name, and the interface that a connection sends through."""

from __future__ import annotations

import socket
from functools import cache

from cwndtrace.errors import NotFound
from cwndtrace.kernel import host, netns


def by_name(namespace: netns.Namespace) -> dict[str, int]:
    """Return the index of each interface in a namespace, by name."""
    return {name: index for index, name in netns.inside(namespace, socket.if_nameindex)}


def find(name: str, namespace: netns.Namespace) -> int:
    """Return the index of an interface in a namespace.

    Raises NotFound, which names another namespace that has an interface of that name, or else lists those of this one.
    """
    here = by_name(namespace)
    if name in here:
        return here[name]
    others = [n for n in netns.all_reachable() if n.inode != namespace.inode]
    for other in others:
        try:
            there = by_name(other)
        except NotFound:
            continue
        if name in there:
            raise NotFound(
                f"interface {name} is in network namespace {other.name}, not in this one",
                f"add --netns {other.name if other.path.parent.name == 'netns' else other.inode}",
            )
    listed = f"there are: {', '.join(sorted(here))}"
    if host.in_container() and namespace.inode == netns.own().inode != netns.hosts_inode():
        listed += "; if the host's were meant, start this container with --network=host"
    raise NotFound(f"no interface {name}", listed)


class Routes:
    """The interfaces that the kernel's routing table sends through. Each address is looked up once."""

    def __init__(self, namespace: netns.Namespace) -> None:
        self._namespace = namespace
        self.index_of = cache(self._ask)

    def _ask(self, daddr: str) -> int:
        """Return the index of the interface towards ``daddr``, 0 where there is no route."""
        # Imported here, because it takes 14 MB and much of the start-up time, and only a filter by interface needs it.
        from pyroute2 import IPRoute
        from pyroute2.netlink.exceptions import NetlinkError

        def ask() -> int:
            family = socket.AF_INET6 if ":" in daddr else socket.AF_INET
            with IPRoute() as route:
                for message in route.route("get", dst=daddr, family=family):
                    return int(message.get_attr("RTA_OIF") or 0)
            return 0

        try:
            return netns.inside(self._namespace, ask)
        except (NetlinkError, NotFound):
            return 0
