# SPDX-License-Identifier: Apache-2.0
"""The protocol between the ends of an experiment, and a function that sends a burst and reads TCP_INFO about it.

A connection opens with ``HELLO`` and a mode, which the server answers with ``HELLO``:

- reply: the peer sends requests (``REQUEST``), and the server answers each with that many bytes, of which the first 16
  are ``STAMP``. A peer that closes its side while the server is idle before an answer counts as gone;
- sink: the peer sends bursts, each of which begins with ``STAMP``. The server answers each with one byte, ``DONE``,
  when all of it has arrived.

A server reads a connection that opens with anything else to its end and never answers. A plain TCP client can
therefore use it as a sink.
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
from cwndtrace.kernel.tcp_info import TcpInfo

HELLO: Final = b"cwt1"
REPLY: Final = b"R"
SINK: Final = b"S"
DONE: Final = b"."
REQUEST: Final = struct.Struct("<QQdB")
"""Size in bytes, number, idle time in seconds, index of ``IDLE_MODES``."""
STAMP: Final = struct.Struct("<QQ")
"""Number; then the CLOCK_MONOTONIC ns at which sending began in a reply, or the size in bytes in a burst to a sink."""
IDLE_MODES: Final = ("client", "timer", "disk")
"""The idle end: the client before its request, the server on a timer, or the server while it reads its slow device."""
MIN_BURST: Final = STAMP.size
MAX_BURST: Final = 256 << 20
MAX_IDLE_S: Final = 3600.0
_ZEROS: Final = memoryview(bytes(1 << 20))
"""The content of bursts after the stamp, repeated, so that memory doesn't grow with the number of peers."""
_SO_COOKIE: Final = 57
_SO_SNDBUFFORCE: Final = 32


@dataclass(frozen=True)
class Sent:
    """The sender's figures of a burst: TCP_INFO before it, after the first write, and after all was acknowledged."""

    before: TcpInfo
    after: TcpInfo
    end: TcpInfo
    start_ns: int
    first_ns: int
    end_ns: int
    first_bytes: int
    """bytes that the first write put into the send buffer"""
    acked: bool
    """true if all data was acknowledged before the peer sent data or closed its side"""
    sndbuf: int
    cookie: int
    port: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, for JSON; ``from_dict`` reads them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Sent:
        """Return the record that ``to_dict`` was called on."""
        infos = {name: TcpInfo(**values[name]) for name in ("before", "after", "end")}
        return cls(**{**values, **infos})


def receive(sock: socket.socket, size: int) -> bytes:
    """Return exactly ``size`` bytes from a socket. Raises ConnectionResetError if the peer closes its side before."""
    data = bytearray()
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            raise ConnectionResetError("the peer closed the connection")
        data += more
    return bytes(data)


def set_up(sock: socket.socket, cc: str | None, sndbuf: int | None) -> None:
    """Set a socket's congestion control and send buffer (bytes); None leaves the kernel's default.

    Raises KernelLacks, with the names of those available, for a congestion control that the kernel doesn't have.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if sndbuf is not None:
        # The kernel doubles the value, for its own overhead. SO_SNDBUFFORCE can exceed the host's limit, as root.
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
    """Return the names of the congestion controls that the kernel has loaded, separated by spaces."""
    try:
        return Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text(encoding="ascii").strip()
    except OSError:
        return "unknown"


def send_burst(sock: socket.socket, stamp: bytes, size: int) -> Sent:
    """Send ``size`` bytes that begin with ``stamp``, and wait until they are acknowledged or the peer sends data.

    The first write doesn't block, so that ``after`` is read before any ACK can arrive. All data has to be acknowledged
    within the socket's timeout or, if it has none, within a minute of the last write. Raises OSError, and
    CwndtraceError if the peer stops acknowledging.
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
    """Return the parts of a burst's content from the byte at offset ``done`` on."""
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
            raise CwndtraceError("the peer stopped acknowledging", "check that it still runs and reads its data")
