# SPDX-License-Identifier: Apache-2.0
"""An interface is found by its name, or the error says where it is, and a peer is routed through one."""

from __future__ import annotations

import errno
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pyroute2.netlink.exceptions import NetlinkError

from cwndtrace.errors import NotFound
from cwndtrace.kernel import host, interfaces, netns
from cwndtrace.kernel.interfaces import Routes
from cwndtrace.kernel.netns import Namespace
from tests.harness.loopback import need_loopback

HERE = Namespace(41, "this", Path("/proc/thread-self/ns/net"))
GONE = Namespace(44, "nginx[9]", Path("/proc/9/ns/net"))
BLUE = Namespace(42, "blue", Path("/run/netns/blue"))
POD = Namespace(43, "web[7]", Path("/proc/7/ns/net"))
THERE = {41: {"lo": 1, "eth0": 3}, 42: {"lo": 1, "wlan0": 5}, 43: {"lo": 1, "eth1": 7}}


@pytest.fixture(autouse=True)
def spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let there be three namespaces with interfaces, and one that is gone."""

    def by_name(namespace: Namespace) -> dict[str, int]:
        if namespace.inode not in THERE:
            raise NotFound(f"network namespace {namespace.name} is gone")
        return THERE[namespace.inode]

    monkeypatch.setattr(interfaces, "by_name", by_name)
    monkeypatch.setattr(netns, "all_reachable", lambda: iter((HERE, GONE, BLUE, POD)))
    monkeypatch.setattr(host, "in_container", lambda: False)


def test_an_interface_has_its_index_in_the_namespace() -> None:
    assert [interfaces.find(name, HERE) for name in ("lo", "eth0")] == [1, 3]
    assert interfaces.find("eth1", POD) == 7


@pytest.mark.parametrize(("name", "place", "option"), [("wlan0", "blue", "blue"), ("eth1", r"web\[7\]", "43")])
def test_the_error_names_the_namespace_that_has_the_interface(name: str, place: str, option: str) -> None:
    with pytest.raises(NotFound, match=f"interface {name} is in network namespace {place}, not in this one") as caught:
        interfaces.find(name, HERE)
    assert caught.value.remedy == f"add --netns {option}"


@pytest.mark.parametrize(
    ("contained", "own", "hosts", "meant"),
    [
        (False, 41, 1, False),  # on the host
        (True, 41, 1, True),
        (True, 41, None, True),  # which one the host's is can't be seen
        (True, 41, 41, False),  # the container has the host's network
        (True, 42, 1, False),  # another namespace was named
    ],
)
def test_the_error_lists_the_interfaces_and_in_a_container_says_how_to_have_the_hosts(
    monkeypatch: pytest.MonkeyPatch, contained: bool, own: int, hosts: int | None, meant: bool
) -> None:
    monkeypatch.setattr(host, "in_container", lambda: contained)
    monkeypatch.setattr(netns, "own", lambda: Namespace(own, "this", Path("/proc/thread-self/ns/net")))
    monkeypatch.setattr(netns, "hosts_inode", lambda: hosts)
    with pytest.raises(NotFound, match="no interface none") as caught:
        interfaces.find("none", HERE)
    hint = "; if the host's were meant, start this container with --network=host" if meant else ""
    assert caught.value.remedy == f"there are: eth0, lo{hint}"


class MadeRoutes:
    """It stands for the kernel's routing table, of which ``asked`` are the questions."""

    asked: list[tuple[str, int]]

    def __enter__(self) -> MadeRoutes:
        return self

    def __exit__(self, *_: object) -> None: ...

    def route(self, command: str, *, dst: str, family: int) -> list[Any]:
        assert command == "get"
        self.asked.append((dst, family))
        if dst == "192.0.2.1":
            raise NetlinkError(errno.ENETUNREACH)
        index = {"10.2.0.9": 7, "2001:db8::9": 8}.get(dst)
        return [SimpleNamespace(get_attr={"RTA_OIF": index}.__getitem__)] if dst != "10.9.9.9" else []


def test_each_peer_is_routed_once_and_by_its_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MadeRoutes, "asked", [], raising=False)
    monkeypatch.setattr("pyroute2.IPRoute", MadeRoutes)
    routes = Routes(netns.own())
    peers = ("10.2.0.9", "2001:db8::9", "10.0.0.1", "10.9.9.9", "192.0.2.1")
    for _ in range(2):
        assert [routes.index_of(peer) for peer in peers] == [7, 8, 0, 0, 0]
    families = (socket.AF_INET, socket.AF_INET6, socket.AF_INET, socket.AF_INET, socket.AF_INET)
    assert MadeRoutes.asked == list(zip(peers, families, strict=True))


def test_the_own_addresses_are_routed_through_the_loopback_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    need_loopback()
    asked = []
    real = netns.inside

    def inside(namespace: Namespace, work: object) -> object:
        asked.append(namespace)
        return real(namespace, work)  # type: ignore[arg-type]

    monkeypatch.setattr(netns, "inside", inside)
    here = netns.own()
    routes = Routes(here)
    for _ in range(2):
        assert routes.index_of("127.0.0.1") == socket.if_nametoindex("lo")
    assert asked == [here]


def test_a_namespace_that_is_gone_has_no_route() -> None:
    assert Routes(Namespace(1, "gone", Path("/proc/0/ns/net"))).index_of("127.0.0.1") == 0
