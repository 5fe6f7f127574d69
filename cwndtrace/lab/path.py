# SPDX-License-Identifier: Apache-2.0
"""A long path between two new network namespaces: a router with netem, or two TUN devices and a relay."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from pyroute2 import IPRoute
from pyroute2.netlink import NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl import RTM_NEWQDISC, TC_H_ROOT
from pyroute2.netlink.rtnl.tcmsg import sched_netem, tcmsg

from cwndtrace.errors import CwndtraceError, KernelLacks
from cwndtrace.format import plural
from cwndtrace.kernel import netns, setns
from cwndtrace.lab.child import Child, Message
from cwndtrace.lab.link import Link
from cwndtrace.lab.namespaces import namespace, write_sysctl
from cwndtrace.lab.owner import Owner
from cwndtrace.lab.relay import DEVICE

Kind = Literal["netem", "relay"]
KINDS: Final[tuple[Kind, ...]] = ("netem", "relay")
# These blocks are reserved for documentation (RFC 5737, RFC 3849), so no real host has such an address.
_ADDRESSES: Final = {4: ("192.0.2.1", "192.0.2.2", 24), 6: ("2001:db8::1", "2001:db8::2", 64)}
_ROOMY: Final = 100_000
_MTU: Final = 1500
_SEQUENCE: Final = 7
_IFA_F_NODAD: Final = 0x02
# A warning is due if the relay's lateness (p99) exceeds this share of the RTT, and 2 ms.
_LATE_SHARE: Final = 0.1
_LATE_MS: Final = 2.0


@dataclass(frozen=True)
class End:
    """One end of a path: a namespace, and the address of its device ``lab0``."""

    namespace: netns.Namespace
    address: str
    device: str = DEVICE


@dataclass
class Path:
    """An open path. Its ``kind`` is ``netem`` (in the kernel) or ``relay`` (in user space); ``why`` is the reason."""

    kind: Kind
    why: str
    link: Link
    client: End
    server: End
    relay: Child | None = None
    _refused: int = 0
    """packets refused before both ends were up: IPv6's own packets from the end that comes up first"""

    def figures(self) -> dict[str, Any]:
        """Return the figures so far: kind, and for each direction packets, bytes, drops and lateness in ms.

        A path by netem has no counters, so its figures are only ``kind``. A relay's include its CPU time in s.
        """
        figures: Message = {"kind": self.kind}
        if self.relay is not None:
            sent = self.relay.ask({"figures": True})
            figures |= {"to_server": sent["to_second"], "to_client": sent["to_first"], "cpu_s": sent["cpu_s"]}
        return figures

    def warnings(self) -> list[str]:
        """Return sentences on how the path differed from the requested one; empty if it didn't."""
        figures = self.figures()
        allowed = max(_LATE_MS, _LATE_SHARE * self.link.rtt_ms)
        late = max((figures[way]["late_p99_ms"] for way in ("to_server", "to_client") if way in figures), default=0.0)
        refused = _refused(figures) - self._refused
        sentences = []
        if late > allowed:
            worst = max(figures[way]["late_max_ms"] for way in ("to_server", "to_client"))
            sentences.append(
                f"the path was not held: the relay forwarded 99 % of the packets at most {late:.1f} ms late, and the"
                f" others at most {worst:.1f} ms late, on an RTT of {self.link.rtt_ms:g} ms; reduce the load on this"
                " machine, or ask for a lower rate"
            )
        if refused:
            sentences.append(f"the kernel refused {plural(refused, 'packet')} of the relay")
        return sentences


@contextmanager
def open_path(
    link: Link,
    family: Literal[4, 6] = 4,
    force: Kind | None = None,
    owner: Owner | None = None,
) -> Iterator[Path]:
    """Yield a path as ``link`` describes between two new namespaces, and remove all of it on exit.

    netem makes the path, or the relay if the kernel has no netem; ``force`` allows only one of them. Raises UsageError
    for an impossible link, PermissionNeeded without root, KernelLacks if neither works.
    """
    link.check()
    owner = owner or Owner.new()
    local, remote, bits = _ADDRESSES[family]
    with ExitStack() as stack:
        client = End(stack.enter_context(namespace(owner.name("client"))), local)
        server = End(stack.enter_context(namespace(owner.name("server"))), remote)
        ends = client, server
        path = Path("netem", "this kernel has netem", link, client, server)
        router: netns.Namespace | None = None
        why = "as requested"
        if force != "relay":
            try:
                router = stack.enter_context(_open_netem(link, ends, owner))
            except _NoNetemError as e:
                why = str(e)
        if router is None:
            if force == "netem":
                raise KernelLacks(
                    f"netem can't make the path: {why}", "modprobe sch_netem, or use the relay with --path relay"
                )
            path.kind, path.why = "relay", why
            without = "" if force == "relay" else f"{why}, and "
            path.relay = stack.enter_context(_open_relay(link, client, server, without))
        for end in ends:
            netns.inside(end.namespace, lambda end=end: _bring_up(end, bits))  # type: ignore[misc]
        if router is not None:
            _forward(ends, router)
        path._refused = _refused(path.figures())
        yield path


def _refused(figures: dict[str, Any]) -> int:
    return sum(figures[way]["refused"] for way in ("to_server", "to_client") if way in figures)


class _NoNetemError(Exception):
    """The error for a kernel feature that a path by netem needs and this kernel lacks."""


@contextmanager
def _open_netem(link: Link, ends: tuple[End, End], owner: Owner) -> Iterator[netns.Namespace]:
    """Join the ends by veth through a router whose egress has netem. Raises _NoNetemError if the kernel can't.

    netem isn't on the ends' own egress, because TCP learns at once of a full queue on its own host, while a real queue
    on the path loses packets.
    """

    def add_devices() -> None:
        with IPRoute() as route:
            for end in ends:
                fd = setns.opened(end.namespace.path, end.namespace.inode)
                try:
                    peer = {"ifname": end.device, "net_ns_fd": fd}
                    route.link("add", ifname=_router_device(end), kind="veth", peer=peer)
                finally:
                    os.close(fd)

    def add_netem() -> None:
        for end in ends:
            _netem(link, _router_device(end))

    def delete_devices() -> None:
        for end in ends:
            _delete(_router_device(end))

    with namespace(owner.name("router")) as router:
        try:
            netns.inside(router, add_devices)
        except NetlinkError as e:
            raise _NoNetemError(f"this kernel has no veth ({e})") from e
        try:
            netns.inside(router, add_netem)
        except NetlinkError as e:
            # They would go with the namespace, but only some time later, and the relay needs their names now.
            netns.inside(router, delete_devices)
            if e.code not in (errno.ENOENT, errno.EOPNOTSUPP, errno.EINVAL):
                raise KernelLacks(f"netem failed: {e}", "use the relay with --path relay") from e
            raise _NoNetemError("this kernel has no netem") from e
        if link.segmented:
            for end in ends:
                netns.inside(end.namespace, lambda end=end: _disable_gso(end.device))  # type: ignore[misc]
        yield router


def _router_device(end: End) -> str:
    """Return the name of the router's device that leads to an end."""
    return f"to-{end.namespace.name.rpartition('-')[2]}"


def _forward(ends: tuple[End, End], router: netns.Namespace) -> None:
    """Make the router forward packets between the ends, which are up.

    Permanent neighbour entries make ARP and neighbour discovery unnecessary.
    """
    six = ":" in ends[0].address
    write_sysctl(router, "net.ipv6.conf.all.forwarding" if six else "net.ipv4.ip_forward", "1")
    for end, other in (ends, ends[::-1]):
        theirs = netns.inside(end.namespace, lambda end=end: _hardware_address(end.device))  # type: ignore[misc]
        ours = netns.inside(router, lambda end=end, lladdr=theirs: _add_route(end, lladdr))  # type: ignore[misc]
        netns.inside(
            end.namespace,
            lambda end=end, other=other, lladdr=ours: _add_neighbour(end.device, other.address, lladdr),  # type: ignore[misc]
        )


def _add_route(end: End, lladdr: str) -> str:
    """Add the route to an end, in the router's namespace; return the hardware address of the router's device."""
    device = _router_device(end)
    with IPRoute() as route:
        index = _index(route, device)
        route.link("set", index=index, state="up")
        route.route("add", dst=f"{end.address}/{128 if ':' in end.address else 32}", oif=index)
    _add_neighbour(device, end.address, lladdr)
    return _hardware_address(device)


def _add_neighbour(device: str, address: str, lladdr: str) -> None:
    """Add a permanent neighbour entry."""
    with IPRoute() as route:
        route.neigh("add", dst=address, lladdr=lladdr, ifindex=_index(route, device), state="permanent")


def _hardware_address(device: str) -> str:
    with IPRoute() as route:
        return str(route.get_links(_index(route, device))[0].get_attr("IFLA_ADDRESS"))


def _disable_gso(device: str) -> None:
    """Make the kernel send single packets and no super-segments on a device."""
    with IPRoute() as route:
        route.link("set", index=_index(route, device), gso_max_segs=1)


def _index(route: IPRoute, device: str) -> int:
    return int(route.link_lookup(ifname=device)[0])


def _delete(device: str) -> None:
    with IPRoute() as route:
        route.link("del", index=_index(route, device))


def _netem(link: Link, device: str) -> None:
    """Put netem on the egress of a device.

    netem's limit counts the packets that it delays as well as those that queue. It takes no seed.
    """
    options: dict[str, Any] = {"delay": link.one_way_ns // 1000, "limit": _ROOMY}
    if link.rate is not None:
        options["rate"] = f"{round(link.rate)}bit"
        options["limit"] = max(10, round((link.rate / 8 * link.rtt_ms / 2e3 + link.queue) / _MTU))
    if link.loss:
        options["loss"] = link.loss * 100
    with IPRoute() as route:
        index = _index(route, device)
        message = tcmsg()
        message["index"], message["parent"], message["handle"] = index, TC_H_ROOT, 1 << 16
        # route.tc sends the rate twice, the second time as an estimator, which the kernel refuses.
        message["attrs"] = [("TCA_KIND", "netem"), ("TCA_OPTIONS", sched_netem.get_parameters(options))]
        flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL
        route.put(message, msg_type=RTM_NEWQDISC, msg_flags=flags, msg_seq=_SEQUENCE)
        route.get(msg_seq=_SEQUENCE)


@contextmanager
def _open_relay(link: Link, client: End, server: End, without: str) -> Iterator[Child]:
    ends = [end.namespace.address for end in (client, server)]
    with Child("relay", json.dumps(asdict(link)), *ends) as relay:
        try:
            relay.receive(30)
        except CwndtraceError as e:
            cause = f"no path can be made here: {without}the relay failed ({e.cause})"
            raise KernelLacks(cause, e.remedy or "modprobe sch_netem, or modprobe tun") from e
        yield relay


def _bring_up(end: End, bits: int) -> None:
    """Set the address, the queue length and the link state of an end, inside its namespace."""
    six = ":" in end.address
    with IPRoute() as route:
        index = _index(route, end.device)
        route.link("set", index=route.link_lookup(ifname="lo")[0], state="up")
        route.link("set", index=index, txqlen=10_000)
        # Duplicate address detection would delay the use of a new address by a second.
        flags = {"flags": _IFA_F_NODAD, "family": socket.AF_INET6} if six else {}
        try:
            route.addr("add", index=index, address=end.address, prefixlen=bits, **flags)
        except NetlinkError as e:
            if six:
                raise KernelLacks(f"no IPv6 in a network namespace here: {e}", "use -4") from e
            raise
        route.link("set", index=index, state="up")


def set_in_both(path: Path, name: str, value: str) -> None:
    """Set a sysctl in the namespaces of both ends of a path, and nowhere else."""
    for end in (path.client, path.server):
        write_sysctl(end.namespace, name, value)
