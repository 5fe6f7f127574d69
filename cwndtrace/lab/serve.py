# SPDX-License-Identifier: Apache-2.0
"""A server to measure against: it answers requests by bursts, and swallows bursts that it is sent.

Both modes are on one port (see cwndtrace.lab.wire); what speaks neither is swallowed as a plain sink does, until it has
been silent for a minute.
"""

from __future__ import annotations

import errno
import ipaddress
import math
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self

from cwndtrace.errors import CwndtraceError, PermissionNeeded, UsageError
from cwndtrace.format import plural
from cwndtrace.lab import wire

MAX_CONNECTIONS: Final = 128
MAX_OF_ONE_PEER: Final = 16
"""Connections from one address, or one /64 of IPv6: nobody alone keeps the others out."""
# Who speaks as ``reproduce`` does may be idle between bursts, for as long as idle time may take.
QUIET_S: Final = wire.MAX_IDLE_S + 60
_TURN_S: Final = 1.0
UNSENT: Final = 512 << 10
"""Most bytes of a burst that wait in the kernel to be sent. What is on its way is kept there too, to be sent again."""
# Receive buffer for requests, which are 25 bytes: what more a peer sends meanwhile waits on its side.
_REQUESTS: Final = 64 << 10

DiskRead = Callable[[float], dict[str, Any]]
"""Spends so many seconds reading a disk; returns what it read."""


@dataclass
class Settings:
    """What a server's connections get; ``disk`` spends idle time reading, and without it such requests are refused."""

    cc: str | None = None
    sndbuf: int | None = None
    disk: DiskRead | None = None
    on_burst: Callable[[dict[str, Any]], None] | None = None
    """told of each burst sent: ``id``, ``size``, ``read`` (from disk), ``sent`` (``wire.Sent``), on some thread"""
    on_error: Callable[[CwndtraceError], None] | None = None
    """told of what went wrong with one connection"""
    on_turn: Callable[[Totals], None] | None = None
    """told how it stands at each connection that comes, and at least every second"""
    patience_s: float = 60.0
    """how long a burst may take, whichever way it goes"""
    silence_s: float = 60.0
    """how long a peer may say nothing, except between bursts, where it makes room only for who finds none"""
    bounded: bool = True
    """whether the kernel keeps little for who asks for bursts; not where what a send buffer takes is measured"""


@dataclass
class Totals:
    """What a server has done so far."""

    connections: int = 0
    refused: int = 0
    bursts_sent: int = 0
    bursts_taken: int = 0
    bytes_taken: int = 0
    open: dict[socket.socket, str] = field(default_factory=dict)
    """the connections that are served, and whose each is (``peer_of``)"""


class Server:
    """Listens from the start; ``run`` accepts until ``close``. A context manager."""

    def __init__(self, host: str, port: int, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.totals = Totals()
        self._lock = threading.Lock()
        self._idle_since: dict[socket.socket, float] = {}
        """since when a peer says nothing and needn't"""
        # Written to by all, since nobody looks at what was swallowed.
        self._swallowed = bytearray(1 << 18)
        self._closed = False
        if not 0 <= port < 65536:
            raise UsageError(f"no port {port}", "ports go from 0 (any free one) to 65535")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, port), family=family, backlog=MAX_CONNECTIONS)
        except OSError as e:
            raise _cannot_listen(host, port, e) from e
        try:
            wire.set_up(self._listener, self.settings.cc, self.settings.sndbuf)
        except BaseException:
            self._listener.close()
            raise

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self._listener.getsockname()[1])

    def run(self) -> None:
        """Accept connections until ``close``; a thread each."""
        if self.settings.on_turn is not None:
            self._listener.settimeout(_TURN_S)
        while not self._closed:
            if self.settings.on_turn is not None:
                self.settings.on_turn(self.totals)
            try:
                sock, address = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                # Closed; or else out of descriptors, or the peer went away in the queue: those don't end the server.
                time.sleep(0.05)
                continue
            peer = peer_of(address[0])
            with self._lock:
                room = self._has_room(peer)
                if room:
                    self.totals.open[sock] = peer
                    self.totals.connections += 1
                else:
                    self.totals.refused += 1
            if not room:
                sock.close()
                continue
            try:
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()
            except RuntimeError:
                # No room for a thread now: that is this connection's end, and not the server's.
                self._release(sock)

    def _has_room(self, peer: str) -> bool:
        """Whether one more of that peer is served. Who has been idle longest, and for long, is let go for it.

        Call it with the lock held: else a socket that it ends may be closed already, and its descriptor another one's.
        """
        among = [sock for sock, whose in self.totals.open.items() if whose == peer]
        if len(among) < MAX_OF_ONE_PEER:
            if len(self.totals.open) < MAX_CONNECTIONS:
                return True
            among = list(self.totals.open)
        since, longest = min(((self._idle_since.get(sock, math.inf), sock) for sock in among), key=lambda pair: pair[0])
        if time.monotonic() - since < self.settings.silence_s:
            return False
        del self.totals.open[longest]
        with suppress(OSError):
            longest.shutdown(socket.SHUT_RDWR)
        return True

    def _serve(self, sock: socket.socket) -> None:
        try:
            self._speak(sock)
        except CwndtraceError as e:
            if self.settings.on_error is not None:
                self.settings.on_error(e)
        except OSError:
            pass  # the peer went away, which is its right
        finally:
            self._release(sock)

    def _release(self, sock: socket.socket) -> None:
        with self._lock:
            self.totals.open.pop(sock, None)
        sock.close()

    def _speak(self, sock: socket.socket) -> None:
        opening = _receive(sock, len(wire.HELLO) + 1, self.settings.silence_s)
        mode = opening[len(wire.HELLO) :]
        sock.settimeout(self.settings.silence_s)
        if opening[: len(wire.HELLO)] != wire.HELLO or mode not in (wire.REPLY, wire.SINK):
            self._swallow(sock, None)
            return
        wire.set_up(sock, self.settings.cc, self.settings.sndbuf)
        if mode == wire.REPLY and self.settings.bounded:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _REQUESTS)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)
        sock.sendall(wire.HELLO)
        while self._stay_idle(sock, QUIET_S, select.POLLIN):
            if not (self._reply(sock) if mode == wire.REPLY else self._take(sock)):
                return

    def _stay_idle(self, sock: socket.socket, seconds: float, events: int) -> bool:
        """Wait for events of poll(2), or for the connection's end; whether any came in so many seconds."""
        poll = select.poll()
        poll.register(sock, events)
        with self._lock:
            self._idle_since[sock] = time.monotonic()
        try:
            return bool(poll.poll(1000 * seconds))
        finally:
            with self._lock:
                del self._idle_since[sock]

    def _reply(self, sock: socket.socket) -> bool:
        raw = _receive(sock, wire.REQUEST.size, self.settings.silence_s)
        if len(raw) < wire.REQUEST.size:
            return False
        size, number, idle_s, how = wire.REQUEST.unpack(raw)
        if not wire.MIN_BURST <= size <= wire.MAX_BURST or not 0 <= idle_s <= wire.MAX_IDLE_S or how > 2:
            raise UsageError(f"a peer asked for {plural(size, 'byte')} after {idle_s:g} s: out of bounds")
        read: dict[str, Any] = {}
        if wire.IDLE_MODES[how] == "disk":
            if self.settings.disk is None:
                raise UsageError("a peer asked for idle time on disk, and this server has no slow device")
            read = self.settings.disk(idle_s)
        elif wire.IDLE_MODES[how] == "timer" and self._stay_idle(sock, idle_s, select.POLLRDHUP):
            return False  # nobody is there any more to send it to
        sock.settimeout(self.settings.patience_s)
        sent = wire.send_burst(sock, wire.STAMP.pack(number, time.monotonic_ns()), size)
        with self._lock:
            self.totals.bursts_sent += 1
        if self.settings.on_burst is not None:
            self.settings.on_burst({"id": number, "size": size, "read": read, "sent": sent.to_dict()})
        return True

    def _take(self, sock: socket.socket) -> bool:
        raw = _receive(sock, wire.STAMP.size, self.settings.silence_s)
        if len(raw) < wire.STAMP.size:
            return False
        _, size = wire.STAMP.unpack(raw)
        if not wire.MIN_BURST <= size <= wire.MAX_BURST:
            raise UsageError(f"a peer sent a burst of {plural(size, 'byte')}: out of bounds")
        self._swallow(sock, size - len(raw))
        sock.settimeout(self.settings.patience_s)
        with self._lock:
            self.totals.bursts_taken += 1
        sock.sendall(wire.DONE)
        return True

    def _swallow(self, sock: socket.socket, size: int | None) -> None:
        """Read and drop ``size`` bytes, within the patience for a burst, or all until the end or the time-out."""
        deadline = time.monotonic() + self.settings.patience_s
        while size is None or size > 0:
            if size is not None:
                sock.settimeout(_left(deadline))
            count = sock.recv_into(self._swallowed, 0 if size is None else min(size, len(self._swallowed)))
            if not count:
                if size is None:
                    return
                raise ConnectionResetError("the peer closed the connection inside a burst")
            with self._lock:
                self.totals.bytes_taken += count
            if size is not None:
                size -= count

    def close(self) -> None:
        """Stop accepting and end the connections; may be called from another thread or a signal handler."""
        self._closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in list(self.totals.open):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _receive(sock: socket.socket, size: int, patience_s: float) -> bytes:
    """So many bytes, in however many pieces they come; fewer where the peer ends before. Raises TimeoutError."""
    data = b""
    deadline = time.monotonic() + patience_s
    while len(data) < size:
        sock.settimeout(_left(deadline))
        more = sock.recv(size - len(data))
        if not more:
            break
        data += more
    return data


def _left(deadline: float) -> float:
    """Seconds until then. Raises TimeoutError where there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
    return left


def peer_of(address: str) -> str:
    """Whom an address counts as: itself, IPv4 also where IPv6 maps it, and of IPv6 the network /64."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if found.version == 4:
        return str(found)
    return str(found.ipv4_mapped or ipaddress.IPv6Network((int(found), 64), strict=False))


def _cannot_listen(host: str, port: int, e: OSError) -> CwndtraceError:
    if isinstance(e, PermissionError):
        return PermissionNeeded(f"port {port} is for root only", "choose one above 1023")
    if e.errno == errno.EADDRINUSE:
        return UsageError(f"port {port} is taken", "choose another, or stop what listens there: ss -ltnp")
    return UsageError(f"can't listen on {host} port {port}: {e.strerror or e}", "give an address of this machine")
