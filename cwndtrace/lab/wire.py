# SPDX-License-Identifier: Apache-2.0
"""What the lab's ends say to each other, and sending a burst with the kernel's own account of it.

A connection opens with ``HELLO`` and a mode, which the server answers with ``HELLO``:

- reply: the peer sends requests (``REQUEST``); each is answered by so many bytes, of which the first 16 are ``STAMP``;
  where the server is to be idle before, a peer that ends its side meanwhile has left;
- sink: the peer sends bursts, each beginning with ``STAMP``; each is answered by one byte, ``DONE``, once all of it is
  in.

A connection that opens with anything else is read to its end and never answered: a plain TCP client finds a sink here.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from cwndtrace.errors import CwndtraceError, KernelLacks
from cwndtrace.lab.tcpinfo import TcpInfo

HELLO: Final = b"cwt1"
REPLY: Final = b"R"
SINK: Final = b"S"
DONE: Final = b"."
REQUEST: Final = struct.Struct("<QQdB")
"""size in bytes, number, idle time in seconds, how it is spent (an index of ``IDLE_MODES``)"""
STAMP: Final = struct.Struct("<QQ")
"""number, and in a reply the CLOCK_MONOTONIC ns at which sending began, in a sink's burst its size"""
IDLE_MODES: Final = ("client", "timer", "disk")
"""Who is idle: the client before it asks, the server on a timer, or the server by reading from its slow device."""
MIN_BURST: Final = STAMP.size
MAX_BURST: Final = 256 << 20
MAX_IDLE_S: Final = 3600.0
_ZEROS: Final = memoryview(bytes(1 << 20))
"""What bursts hold behind their stamp, over and over: memory for it doesn't grow with who asks."""
_SO_COOKIE: Final = 57
_SO_SNDBUFFORCE: Final = 32


@dataclass(frozen=True)
class Sent:
    """The sender's account of one burst: TCP_INFO before, after the first write, and once all was acknowledged."""

    before: TcpInfo
    after: TcpInfo
    end: TcpInfo
    start_ns: int
    first_ns: int
    end_ns: int
    first_bytes: int
    """how much the send buffer took at once"""
    acked: bool
    """whether all was acknowledged before something else came up"""
    sndbuf: int
    cookie: int
    port: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON; ``from_dict`` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Sent:
        """What ``to_dict`` wrote."""
        infos = {name: TcpInfo(**values[name]) for name in ("before", "after", "end")}
        return cls(**{**values, **infos})


def receive(sock: socket.socket, size: int) -> bytes:
    """Exactly ``size`` bytes. Raises ConnectionResetError where the peer ends first."""
    data = bytearray()
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            raise ConnectionResetError("the peer closed the connection")
        data += more
    return bytes(data)


def set_up(sock: socket.socket, cc: str | None, sndbuf: int | None) -> None:
    """Give a socket its congestion control and send buffer (bytes), None for what the kernel gives.

    Raises KernelLacks for a congestion control that isn't there, naming those that are.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if sndbuf is not None:
        # The kernel doubles what it is given, for its own book-keeping. Past the host's limit only root gets.
        option = _SO_SNDBUFFORCE if os.geteuid() == 0 else socket.SO_SNDBUF
        sock.setsockopt(socket.SOL_SOCKET, option, sndbuf // 2)
    if cc is None:
        return
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, cc.encode())
    except OSError as e:
        if e.errno == errno.EPERM:
            raise KernelLacks(f"congestion control {cc} is for root only here", "run as root") from e
        raise KernelLacks(
            f"this kernel has no congestion control {cc}", f"it has: {available()}; or modprobe tcp_{cc}"
        ) from e


def available() -> str:
    """The congestion controls that are loaded, as text."""
    try:
        return Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text(encoding="ascii").strip()
    except OSError:
        return "unknown"


def send_burst(sock: socket.socket, stamp: bytes, size: int) -> Sent:
    """Send ``size`` bytes that begin with ``stamp`` and wait until they are acknowledged, or the peer says something.

    The first write doesn't block, so that ``after`` is read before any acknowledgement can be back. All has to be
    acknowledged within the socket's time-out, or within a minute of what was sent where it has none. Raises OSError.
    """
    patience = sock.gettimeout()
    parts = _parts(stamp, size, 0)
    start = time.monotonic_ns()
    deadline = None if patience is None else start / 1e9 + patience
    before = TcpInfo.of(sock)
    first = done = sock.sendmsg(parts, (), socket.MSG_DONTWAIT)
    first_ns = time.monotonic_ns()
    after = TcpInfo.of(sock)
    try:
        while done < size:
            if deadline is not None:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
                sock.settimeout(left)
            done += sock.sendmsg(_parts(stamp, size, done))
    finally:
        sock.settimeout(patience)
    end, acked = _until_acked(sock, max(0.001, before.rtt / 20e6), deadline or time.monotonic() + 60)
    return Sent(
        before, after, end, start, first_ns, time.monotonic_ns(), first, acked,
        sndbuf=sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF),
        cookie=struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8))[0],
        port=sock.getsockname()[1],
    )  # fmt: skip


def _parts(stamp: bytes, size: int, done: int) -> list[memoryview]:
    """Where the bytes of a burst lie, from the one numbered ``done`` on."""
    parts = [memoryview(stamp)[done:]] if done < len(stamp) else []
    whole, odd = divmod(size - max(done, len(stamp)), len(_ZEROS))
    return [*parts, *[_ZEROS] * whole, *([_ZEROS[:odd]] if odd else [])]


def _until_acked(sock: socket.socket, interval_s: float, deadline: float) -> tuple[TcpInfo, bool]:
    while True:
        info = TcpInfo.of(sock)
        if not info.unacked and not info.notsent_bytes:
            return info, True
        if select.select([sock], [], [], interval_s)[0]:
            info = TcpInfo.of(sock)
            return info, not info.unacked and not info.notsent_bytes
        if time.monotonic() > deadline:
            raise CwndtraceError("the peer stopped acknowledging", "is it still there, and does it read?")
