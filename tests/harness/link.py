# SPDX-License-Identifier: Apache-2.0
"""A link between two network namespaces that can drop all packets of one direction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.harness import tcp


class VethLink:
    """A veth pair between two namespaces that can drop all packets from ``a`` (10.9.0.1) to ``b`` (10.9.0.2)."""

    def __init__(self, make_space: Callable[[], tcp.Space]) -> None:
        self.a, self.b = make_space(), make_space()
        tcp.join(self.a, self.b, "cwt0", ["10.9.0.1/24"], ["10.9.0.2/24"])
        self._mac = tcp.run("ip", "-n", self.b.name, "-o", "link", "show", "cwt0").split("link/ether ")[1].split()[0]
        self._send_to(self._mac)

    def _send_to(self, mac: str) -> None:
        self.a.ip("neigh", "replace", "10.9.0.2", "lladdr", mac, "dev", "cwt0", "nud", "permanent")

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Drop the packets meanwhile: they go to a MAC address that no host has, so the sender sees no error."""
        self._send_to("02:00:00:00:00:99")
        try:
            yield
        finally:
            self._send_to(self._mac)

    def timeouts(self) -> int:
        """Return the number of retransmission timeouts in ``a`` so far."""
        return self.a.counter("TCPTimeouts")
