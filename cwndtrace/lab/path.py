# SPDX-License-Identifier: Apache-2.0
"""A long path between two network namespaces of its own: a router with netem, or two TUN devices and a relay."""

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
# Blocks for documentation (RFC 5737, RFC 3849): nothing real has them, and they exist only inside the lab.
_ADDRESSES: Final = {4: ("192.0.2.1", "192.0.2.2", 24), 6: ("2001:db8::1", "2001:db8::2", 64)}
_ROOMY: Final = 100_000
_MTU: Final = 1500
_SEQUENCE: Final = 7
_IFA_F_NODAD: Final = 0x02
# So late may the relay be before a measurement deserves a warning: this share of the RTT, and never below 2 ms.
_LATE_SHARE: Final = 0.1
_LATE_MS: Final = 2.0


@dataclass(frozen=True)
class End:
    """One end of a path: its namespace, and its address there on the device ``lab0``."""

    namespace: netns.Namespace
    address: str
    device: str = DEVICE


@dataclass
class Path:
    """An open path. ``kind`` says what makes it: ``netem`` in the kernel, or ``relay`` in user space."""

    kind: Kind
    why: str
    link: Link
    client: End
    server: End
    relay: Child | None = None
    _refused: int = 0
    """packets refused before both ends were up: what IPv6 says by itself when one end comes up before the other"""

    def figures(self) -> dict[str, Any]:
        """What crossed so far: kind, packets and bytes each way, what was dropped, how late it was at worst.

        A path by netem keeps no figures of its own, so there is only ``kind``.
        """
        found: Message = {"kind": self.kind}
        if self.relay is not None:
            sent = self.relay.ask({"figures": True})
            found |= {"to_server": sent["to_second"], "to_client": sent["to_first"], "cpu_s": sent["cpu_s"]}
        return found

    def warnings(self) -> list[str]:
        """Sentences on what of the wanted path was not held; empty where all was."""
        found = self.figures()
        allowed = max(_LATE_MS, _LATE_SHARE * self.link.rtt_ms)
        late = max((found[way]["late_p99_ms"] for way in ("to_server", "to_client") if way in found), default=0.0)
        refused = _refused(found) - self._refused
        said = []
        if late > allowed:
            worst = max(found[way]["late_max_ms"] for way in ("to_server", "to_client"))
            said.append(
                f"the path was not held: the relay was up to {late:.1f} ms late for 99 % of the packets and {worst:.1f}"
                f" ms at worst, on an RTT of {self.link.rtt_ms:g} ms; leave the machine more idle, or ask for less rate"
            )
        if refused:
            said.append(f"the kernel refused {plural(refused, 'packet')} of the relay")
        return said


@contextmanager
def open_path(
    link: Link,
    family: Literal[4, 6] = 4,
    force: Kind | None = None,
    owner: Owner | None = None,
) -> Iterator[Path]:
    """Two new namespaces joined by a path as ``link`` says; all gone at the end.

    netem is tried first, and the relay where the kernel lacks it; ``force`` allows one only. Raises UsageError for an
    impossible link, PermissionNeeded without root, KernelLacks where neither works.
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
        why = "as asked"
        if force != "relay":
            try:
                router = stack.enter_context(_open_netem(link, ends, owner))
            except _NoNetemError as e:
                why = str(e)
        if router is None:
            if force == "netem":
                raise KernelLacks(f"no path by netem: {why}", "modprobe sch_netem, or let the relay make the path")
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
    """What this kernel lacks for a path by netem."""


@contextmanager
def _open_netem(link: Link, ends: tuple[End, End], owner: Owner) -> Iterator[netns.Namespace]:
    """Join the ends by veth through a router whose ways out have netem. Raises _NoNetemError where the kernel can't.

    Not on the ends' own ways out: TCP is told of a full queue there at once, where a real one loses packets.
    """

    def join() -> None:
        with IPRoute() as route:
            for end in ends:
                fd = setns.opened(end.namespace.path, end.namespace.inode)
                try:
                    peer = {"ifname": end.device, "net_ns_fd": fd}
                    route.link("add", ifname=_towards(end), kind="veth", peer=peer)
                finally:
                    os.close(fd)

    def lengthen() -> None:
        for end in ends:
            _netem(link, _towards(end))

    def part() -> None:
        for end in ends:
            _delete(_towards(end))

    with namespace(owner.name("router")) as router:
        try:
            netns.inside(router, join)
        except NetlinkError as e:
            raise _NoNetemError(f"this kernel has no veth ({e})") from e
        try:
            netns.inside(router, lengthen)
        except NetlinkError as e:
            # With the namespace they would go too, but only some time later, and the relay wants their names.
            netns.inside(router, part)
            if e.code not in (errno.ENOENT, errno.EOPNOTSUPP, errno.EINVAL):
                raise KernelLacks(f"netem failed: {e}", "force the relay") from e
            raise _NoNetemError("this kernel has no netem") from e
        if link.segmented:
            for end in ends:
                netns.inside(end.namespace, lambda end=end: _segment(end.device))  # type: ignore[misc]
        yield router


def _towards(end: End) -> str:
    """The name of the router's device that leads to an end."""
    return f"to-{end.namespace.name.rpartition('-')[2]}"


def _forward(ends: tuple[End, End], router: netns.Namespace) -> None:
    """Have the router pass packets on; the ends are up. Hardware addresses are written down, so nobody asks for one."""
    six = ":" in ends[0].address
    write_sysctl(router, "net.ipv6.conf.all.forwarding" if six else "net.ipv4.ip_forward", "1")
    for end, other in (ends, ends[::-1]):
        theirs = netns.inside(end.namespace, lambda end=end: _hardware(end.device))  # type: ignore[misc]
        ours = netns.inside(router, lambda end=end, lladdr=theirs: _lead_to(end, lladdr))  # type: ignore[misc]
        netns.inside(
            end.namespace,
            lambda end=end, other=other, lladdr=ours: _know(end.device, other.address, lladdr),  # type: ignore[misc]
        )


def _lead_to(end: End, lladdr: str) -> str:
    """In the router: the way to an end; the hardware address of the device that leads there."""
    device = _towards(end)
    with IPRoute() as route:
        index = _index(route, device)
        route.link("set", index=index, state="up")
        route.route("add", dst=f"{end.address}/{128 if ':' in end.address else 32}", oif=index)
    _know(device, end.address, lladdr)
    return _hardware(device)


def _know(device: str, address: str, lladdr: str) -> None:
    """Who has an address, for good."""
    with IPRoute() as route:
        route.neigh("add", dst=address, lladdr=lladdr, ifindex=_index(route, device), state="permanent")


def _hardware(device: str) -> str:
    with IPRoute() as route:
        return str(route.get_links(_index(route, device))[0].get_attr("IFLA_ADDRESS"))


def _segment(device: str) -> None:
    """No super-segments: each packet on its own."""
    with IPRoute() as route:
        route.link("set", index=_index(route, device), gso_max_segs=1)


def _index(route: IPRoute, device: str) -> int:
    return int(route.link_lookup(ifname=device)[0])


def _delete(device: str) -> None:
    with IPRoute() as route:
        route.link("del", index=_index(route, device))


def _netem(link: Link, device: str) -> None:
    """netem on the way out of a device. Its limit counts what is delayed as well as what waits; it takes no seed."""
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
        # route.tc would send the rate twice, the second time as an estimator, which the kernel refuses.
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
            cause = f"no path can be made here: {without}the relay failed: {e.cause}"
            raise KernelLacks(cause, e.remedy or "modprobe sch_netem, or modprobe tun") from e
        yield relay


def _bring_up(end: End, bits: int) -> None:
    """Address, queue and link state; runs inside the end's namespace."""
    six = ":" in end.address
    with IPRoute() as route:
        index = _index(route, end.device)
        route.link("set", index=route.link_lookup(ifname="lo")[0], state="up")
        route.link("set", index=index, txqlen=10_000)
        # Duplicate address detection would hold a new address back for a second.
        flags = {"flags": _IFA_F_NODAD, "family": socket.AF_INET6} if six else {}
        try:
            route.addr("add", index=index, address=end.address, prefixlen=bits, **flags)
        except NetlinkError as e:
            if six:
                raise KernelLacks(f"no IPv6 in a network namespace here: {e}", "use -4") from e
            raise
        route.link("set", index=index, state="up")


def set_in_both(path: Path, name: str, value: str) -> None:
    """Set a sysctl at both ends of a path, and nowhere else."""
    for end in (path.client, path.server):
        write_sysctl(end.namespace, name, value)
