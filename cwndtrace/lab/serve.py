# SPDX-License-Identifier: Apache-2.0
"""The server of an experiment: it answers requests with bursts, and reads and discards the bursts that it receives.

It does both on one port (see cwndtrace.lab.wire). For a client that uses neither protocol it is a plain sink: it
discards all data, until the client has been silent for a minute.
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
"""The limit of connections from one address, or one /64 of IPv6, so that no single peer keeps the others out."""
# The limit of silence between two bursts: the longest idle time that ``reproduce`` can ask for, and a minute more.
QUIET_S: Final = wire.MAX_IDLE_S + 60
_TURN_S: Final = 1.0
UNSENT: Final = 512 << 10
"""The limit of unsent bytes of a burst in the kernel. Data in flight is kept there too, for retransmission."""
# The receive buffer for requests of 25 bytes each; anything more that a peer sends meanwhile waits on the peer's side.
_REQUESTS: Final = 64 << 10

DiskRead = Callable[[float], dict[str, Any]]
"""A function that reads a disk for a number of seconds and returns its figures (see cwndtrace.lab.disk.read_for)."""


@dataclass
class Settings:
    """The settings of a server. Without ``disk``, requests for idle time on disk are refused."""

    cc: str | None = None
    sndbuf: int | None = None
    disk: DiskRead | None = None
    on_burst: Callable[[dict[str, Any]], None] | None = None
    """called for each burst sent, on any thread: ``id``, ``size``, ``read`` (from disk), ``sent`` (``wire.Sent``)"""
    on_error: Callable[[CwndtraceError], None] | None = None
    """called with the error of one connection"""
    on_turn: Callable[[ServerCounters], None] | None = None
    """called with the totals for each new connection, and at least every second"""
    patience_s: float = 60.0
    """how long a burst may take, in either direction"""
    silence_s: float = 60.0
    """how long a peer may be silent within a message; between bursts, a peer that is silent for longer is
    disconnected only when a new connection needs its place"""
    bounded: bool = True
    """limit the kernel memory for a peer that asks for bursts; off where the send buffer is part of the measurement"""


@dataclass
class ServerCounters:
    """The counters of a server since its start."""

    connections: int = 0
    refused: int = 0
    bursts_sent: int = 0
    bursts_taken: int = 0
    bytes_taken: int = 0
    open: dict[socket.socket, str] = field(default_factory=dict)
    """the open connections, and the peer of each (``peer_of``)"""


class Server:
    """A server that listens as soon as it is constructed, and a context manager. ``run`` accepts until ``close``."""

    def __init__(self, host: str, port: int, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.totals = ServerCounters()
        self._lock = threading.Lock()
        self._idle_since: dict[socket.socket, float] = {}
        """since when a peer is silent between bursts, where it may be"""
        # All threads write discarded data to the same buffer, since none reads it.
        self._discarded = bytearray(1 << 18)
        self._closed = False
        if not 0 <= port < 65536:
            raise UsageError(f"there is no port {port}", "give 0 (any free port) to 65535")
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
        """The port that the server listens on."""
        return int(self._listener.getsockname()[1])

    def run(self) -> None:
        """Accept connections until ``close``, and serve each on a new thread."""
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
                # The listener is closed; or there are no free descriptors, or the peer left the queue, which mustn't
                # end the server.
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
                # No thread can be started now, which must end only this connection and not the server.
                self._release(sock)

    def _has_room(self, peer: str) -> bool:
        """Return true if there is room for one more connection of that peer.

        If there is none, but the connection that has been idle longest has been so for ``silence_s``, this disconnects
        that one to make room. Call it with the lock held: without it, a socket that it shuts down may have been closed
        and its descriptor reused.
        """
        candidates = [sock for sock, owner in self.totals.open.items() if owner == peer]
        if len(candidates) < MAX_OF_ONE_PEER:
            if len(self.totals.open) < MAX_CONNECTIONS:
                return True
            candidates = list(self.totals.open)
        idle = ((self._idle_since.get(sock, math.inf), sock) for sock in candidates)
        since, longest = min(idle, key=lambda pair: pair[0])
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
            pass  # the peer closed the connection, which is no error of the server
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
            self._discard(sock, None)
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
        """Wait for events of poll(2) or the connection's end; return true if one came within ``seconds``."""
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
            raise UsageError(f"a peer's request for {plural(size, 'byte')} after {idle_s:g} s is out of range")
        read: dict[str, Any] = {}
        if wire.IDLE_MODES[how] == "disk":
            if self.settings.disk is None:
                raise UsageError("a peer asked for idle time on disk, and this server has no slow device")
            read = self.settings.disk(idle_s)
        elif wire.IDLE_MODES[how] == "timer" and self._stay_idle(sock, idle_s, select.POLLRDHUP):
            return False  # the peer has closed its side
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
            raise UsageError(f"a peer's burst of {plural(size, 'byte')} is out of range")
        self._discard(sock, size - len(raw))
        sock.settimeout(self.settings.patience_s)
        with self._lock:
            self.totals.bursts_taken += 1
        sock.sendall(wire.DONE)
        return True

    def _discard(self, sock: socket.socket, size: int | None) -> None:
        """Read and discard ``size`` bytes within ``patience_s``, or if None all data until the end or the timeout."""
        deadline = time.monotonic() + self.settings.patience_s
        while size is None or size > 0:
            if size is not None:
                sock.settimeout(_left(deadline))
            count = sock.recv_into(self._discarded, 0 if size is None else min(size, len(self._discarded)))
            if not count:
                if size is None:
                    return
                raise ConnectionResetError("the peer closed the connection inside a burst")
            with self._lock:
                self.totals.bytes_taken += count
            if size is not None:
                size -= count

    def close(self) -> None:
        """Stop accepting and end the connections. Safe to call from another thread or a signal handler."""
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
    """Return ``size`` bytes from a socket, or fewer if the peer closes its side before. Raises TimeoutError."""
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
    """Return the seconds until the deadline. Raises TimeoutError if it has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
    return left


def peer_of(address: str) -> str:
    """Return the peer that an address counts as: an IPv4 address, also one mapped into IPv6, or an IPv6 /64."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 4:
        return str(ip)
    return str(ip.ipv4_mapped or ipaddress.IPv6Network((int(ip), 64), strict=False))


def _cannot_listen(host: str, port: int, e: OSError) -> CwndtraceError:
    if isinstance(e, PermissionError):
        return PermissionNeeded(f"port {port} is for root only", "choose one above 1023")
    if e.errno == errno.EADDRINUSE:
        return UsageError(f"port {port} is taken", "choose another, or stop its process, which ss -ltnp shows")
    return UsageError(f"can't listen on {host} port {port}: {e.strerror or e}", "give an address of this machine")
