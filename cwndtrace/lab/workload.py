# SPDX-License-Identifier: Apache-2.0
"""The lab's server and client: a process each, in a namespace each, with long-lived connections between them.

Run as a process, with the arguments PARENT server|client NAMESPACE SETTINGS, this module is one of the two. The parent
holds them as ``ServerProcess`` and ``ClientProcess``.
"""

from __future__ import annotations

import errno
import json
import socket
import sys
import time
from dataclasses import dataclass
from typing import Any, Final

from cwndtrace.errors import CwndtraceError
from cwndtrace.kernel.netns import Namespace
from cwndtrace.lab import wire
from cwndtrace.lab.child import START_AGAIN, Child, end_with_stdin, enter, live_with, say, say_error
from cwndtrace.lab.disk import read_for
from cwndtrace.lab.serve import Server as Listener
from cwndtrace.lab.serve import Settings

PORT: Final = 5001
_START_S: Final = 30.0


@dataclass(frozen=True)
class Received:
    """The receiver's account of one burst; all times are ns of CLOCK_MONOTONIC."""

    request_ns: int
    stamp_ns: int
    """when the sender began"""
    first_ns: int
    last_ns: int


class ServerProcess:
    """The server process; listening once this returns. Raises KernelLacks' cause for an unknown ``cc``."""

    def __init__(
        self, where: Namespace, address: str, cc: str, sndbuf: int | None = None, device: str | None = None
    ) -> None:
        settings = {"address": address, "cc": cc, "sndbuf": sndbuf, "device": device}
        self.child = Child("workload", "server", where.address, json.dumps(settings))

    def wait(self) -> None:
        """Until it listens."""
        self.child.receive(_START_S)

    def sent(self, number: int, timeout_s: float) -> tuple[wire.Sent, dict[str, Any]]:
        """Its account of burst ``number``, and what it read from disk before."""
        deadline = time.monotonic() + timeout_s
        while True:
            message = self.child.receive(max(0.0, deadline - time.monotonic()))
            if message.get("id") == number:
                return wire.Sent.from_dict(message["sent"]), message["read"]


class ClientProcess:
    """The client process, with connections by name."""

    def __init__(self, where: Namespace) -> None:
        self.child = Child("workload", "client", where.address, "{}")

    def wait(self) -> None:
        """Until it takes commands."""
        self.child.receive(_START_S)

    def connect(self, name: str, address: str, timeout_s: float) -> None:
        """Open connection ``name``, in place of one of that name."""
        self.child.ask({"do": "connect", "name": name, "address": address, "timeout_s": timeout_s}, timeout_s + 5)

    def burst(self, name: str, number: int, size: int, idle_s: float, how: str, timeout_s: float) -> Received:
        """Be idle, ask for ``size`` bytes and read them. Raises CwndtraceError if the server or the time runs out."""
        command = {"do": "burst", "name": name, "id": number, "size": size, "idle_s": idle_s, "how": how}
        answer = self.child.ask({**command, "timeout_s": timeout_s}, idle_s + timeout_s + 5)
        return Received(**answer["received"])


# ---- inside the children --------------------------------------------------------------------------


def serve(address: str, cc: str, sndbuf: int | None, device: str | None) -> None:
    """The server: answers until it is killed with its parent."""

    end_with_stdin()
    disk = None if device is None else read_for(device)
    # How much of a burst the send buffer takes at once is one of the things that are measured.
    settings = Settings(cc=cc, sndbuf=sndbuf, disk=disk, on_burst=say, on_error=say_error, bounded=False)
    with Listener(address, PORT, settings) as listener:
        say({"ready": listener.port})
        listener.run()


class Connections:
    """The client's connections, and what it does on them."""

    def __init__(self) -> None:
        self._socks: dict[str, socket.socket] = {}
        self._last_ns: dict[str, int] = {}
        self._room = bytearray(1 << 20)

    def connect(self, name: str, address: str, timeout_s: float) -> dict[str, Any]:
        """Open one, in place of one of that name."""
        if name in self._socks:
            self._socks.pop(name).close()
        sock = socket.create_connection((address, PORT), timeout_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(wire.HELLO + wire.REPLY)
        wire.receive(sock, len(wire.HELLO))
        self._socks[name] = sock
        self._last_ns[name] = time.monotonic_ns()
        return {"connected": name}

    def burst(self, name: str, id: int, size: int, idle_s: float, how: str, timeout_s: float) -> dict[str, Any]:
        """Be idle (counted from the last byte that came in), ask, read."""
        sock = self._socks[name]
        sock.settimeout(timeout_s + (idle_s if how != "client" else 0))
        if how == "client":
            time.sleep(max(0.0, (self._last_ns[name] - time.monotonic_ns()) / 1e9 + idle_s))
            idle_s = 0.0
        request_ns = time.monotonic_ns()
        sock.sendall(wire.REQUEST.pack(size, id, idle_s, wire.IDLE_MODES.index(how)))
        head = wire.receive(sock, wire.STAMP.size)
        first_ns = time.monotonic_ns()
        left = size - len(head)
        while left:
            count = sock.recv_into(self._room, min(left, len(self._room)))
            if not count:
                raise ConnectionResetError(errno.ECONNRESET, "the server closed the connection inside a burst")
            left -= count
        last_ns = self._last_ns[name] = time.monotonic_ns()
        stamp_ns = wire.STAMP.unpack(head)[1]
        times = {"request_ns": request_ns, "stamp_ns": stamp_ns, "first_ns": first_ns, "last_ns": last_ns}
        return {"received": times}


def ask() -> None:
    """The client: carries out the commands on stdin until it ends."""
    connections = Connections()
    say({"ready": True})
    for line in sys.stdin:
        command = json.loads(line)
        do = command.pop("do")
        try:
            say(connections.connect(**command) if do == "connect" else connections.burst(**command))
        except TimeoutError:
            say({"error": "the server took too long", "remedy": "lossier or slower than it was asked to be?"})
        except OSError as e:
            say({"error": f"the server went away: {e.strerror or e}", "remedy": START_AGAIN})


def main() -> None:
    """Become the server or the client, in a namespace."""
    parent, role, namespace, settings = sys.argv[1:]
    live_with(int(parent))
    enter(namespace)
    try:
        if role == "server":
            serve(**json.loads(settings))
        else:
            ask()
    except CwndtraceError as e:
        say_error(e)


if __name__ == "__main__":
    main()
