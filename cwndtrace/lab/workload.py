# SPDX-License-Identifier: Apache-2.0
"""The lab's server and client: two processes in two namespaces, with long-lived connections between them.

Run as a program, with the arguments PARENT server|client NAMESPACE SETTINGS, this module is one of the two. The parent
controls them through ``ServerProcess`` and ``ClientProcess``.
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
    """The receiver's times of one burst, in ns of CLOCK_MONOTONIC."""

    request_ns: int
    stamp_ns: int
    """when the sender began to send"""
    first_ns: int
    last_ns: int


class ServerProcess:
    """The server process. It listens when ``wait`` has returned."""

    def __init__(
        self, where: Namespace, address: str, cc: str, sndbuf: int | None = None, device: str | None = None
    ) -> None:
        settings = {"address": address, "cc": cc, "sndbuf": sndbuf, "device": device}
        self.child = Child("workload", "server", where.address, json.dumps(settings))

    def wait(self) -> None:
        """Wait until the server listens. Raises KernelLacks for an unknown congestion control."""
        self.child.receive(_START_S)

    def sent(self, number: int, timeout_s: float) -> tuple[wire.Sent, dict[str, Any]]:
        """Return the server's figures of burst ``number``, and of its reads from disk before that."""
        deadline = time.monotonic() + timeout_s
        while True:
            message = self.child.receive(max(0.0, deadline - time.monotonic()))
            if message.get("id") == number:
                return wire.Sent.from_dict(message["sent"]), message["read"]


class ClientProcess:
    """The client process, whose connections have names."""

    def __init__(self, where: Namespace) -> None:
        self.child = Child("workload", "client", where.address, "{}")

    def wait(self) -> None:
        """Wait until the client accepts commands."""
        self.child.receive(_START_S)

    def connect(self, name: str, address: str, timeout_s: float) -> None:
        """Open a connection called ``name``, and close an earlier one of that name."""
        self.child.ask({"do": "connect", "name": name, "address": address, "timeout_s": timeout_s}, timeout_s + 5)

    def burst(self, name: str, number: int, size: int, idle_s: float, how: str, timeout_s: float) -> Received:
        """Request ``size`` bytes after the idle time and read them.

        Raises CwndtraceError if the server ends or takes longer than ``timeout_s``.
        """
        command = {"do": "burst", "name": name, "id": number, "size": size, "idle_s": idle_s, "how": how}
        answer = self.child.ask({**command, "timeout_s": timeout_s}, idle_s + timeout_s + 5)
        return Received(**answer["received"])


# ---- inside the children --------------------------------------------------------------------------


def serve(address: str, cc: str, sndbuf: int | None, device: str | None) -> None:
    """Run the server until its parent ends."""

    end_with_stdin()
    disk = None if device is None else read_for(device)
    # The lab measures how much of a burst the send buffer takes at once, so the server mustn't limit that.
    settings = Settings(cc=cc, sndbuf=sndbuf, disk=disk, on_burst=say, on_error=say_error, bounded=False)
    with Listener(address, PORT, settings) as listener:
        say({"ready": listener.port})
        listener.run()


class Connections:
    """The client's connections by name, and the commands on them."""

    def __init__(self) -> None:
        self._socks: dict[str, socket.socket] = {}
        self._last_ns: dict[str, int] = {}
        self._room = bytearray(1 << 20)

    def connect(self, name: str, address: str, timeout_s: float) -> dict[str, Any]:
        """Open a connection, and close an earlier one of that name."""
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
        """Request a burst after the idle time, which counts from the last byte received, and read it."""
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
    """Run the client: carry out the commands on stdin until it is closed."""
    connections = Connections()
    say({"ready": True})
    for line in sys.stdin:
        command = json.loads(line)
        do = command.pop("do")
        try:
            say(connections.connect(**command) if do == "connect" else connections.burst(**command))
        except TimeoutError:
            say(
                {
                    "error": "the server took too long",
                    "remedy": "check the path's loss and rate, and run the command again",
                }
            )
        except OSError as e:
            say({"error": f"the server went away: {e.strerror or e}", "remedy": START_AGAIN})


def main() -> None:
    """Run the server or the client in a namespace, as the command line says."""
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
