# SPDX-License-Identifier: Apache-2.0
"""Dumps TCP sockets from the kernel (sock_diag(7)) as columns, since there may be tens of thousands of them."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cwndtrace.kernel.tcp_info import FIELDS, SIZE

_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY = 4, 20
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_REQUEST_DUMP: Final = 0x1 | 0x300
_TCP: Final = 6
_ROOM: Final = 1 << 18
_INFO, _CONG, _SKMEMINFO, _CGROUP = 2, 4, 7, 21
_EXTENSIONS: Final = sum(1 << (attribute - 1) for attribute in (_INFO, _CONG, _SKMEMINFO))
_HEADER: Final = struct.Struct("=IHHII")
_ATTRIBUTE: Final = struct.Struct("=HH")

MESSAGE: Final = np.dtype(
    [
        ("family", "u1"), ("state", "u1"), ("timer", "u1"), ("retrans", "u1"), ("sport", ">u2"), ("dport", ">u2"),
        ("saddr", "V16"), ("daddr", "V16"), ("ifindex", "u4"), ("cookie", "u8"), ("expires", "u4"), ("rqueue", "u4"),
        ("wqueue", "u4"), ("uid", "u4"), ("inode", "u4"),
    ]
)  # fmt: skip
"""struct inet_diag_msg of include/uapi/linux/inet_diag.h."""

INFO: Final = np.dtype(
    {
        "names": list(FIELDS),
        "formats": [code for code, _ in FIELDS.values()],
        "offsets": [offset for _, offset in FIELDS.values()],
        "itemsize": SIZE,
    }
)
"""struct tcp_info; a member that this kernel doesn't have is 0."""


@dataclass
class Sockets:
    """Columns with one entry per socket. ``sndbuf`` and ``cgroup`` are None where the kernel doesn't report them."""

    messages: npt.NDArray[Any] = field(default_factory=lambda: np.zeros(0, MESSAGE))
    info: npt.NDArray[Any] = field(default_factory=lambda: np.zeros(0, INFO))
    control: list[bytes] = field(default_factory=list)
    sndbuf: list[int | None] = field(default_factory=list)
    cgroup: list[int | None] = field(default_factory=list)

    def where(self, chosen: npt.NDArray[np.bool_]) -> Sockets:
        """Return the chosen sockets."""
        lists = ([each for each, wanted in zip(column, chosen, strict=True) if wanted] for column in self._lists())
        return Sockets(self.messages[chosen], self.info[chosen], *lists)  # type: ignore[arg-type]

    def _lists(self) -> tuple[Sequence[object], ...]:
        return self.control, self.sndbuf, self.cgroup


def dump(states: int) -> Sockets:
    """Return the TCP sockets of this network namespace whose state is a bit of ``states``, but for mini sockets.

    Raises OSError.
    """
    found, messages, info = Sockets(), bytearray(), bytearray()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as netlink:
        netlink.bind((0, 0))
        for family in (socket.AF_INET, socket.AF_INET6):
            body = struct.pack("=BBBBI48x", family, _TCP, _EXTENSIONS, 0, states)
            netlink.send(_HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, 1, 0) + body)
            while _take(netlink.recv(_ROOM), found, messages, info):
                pass
    found.messages, found.info = np.frombuffer(messages, MESSAGE), np.frombuffer(info, INFO)
    return found


def _take(data: bytes, found: Sockets, messages: bytearray, info: bytearray) -> bool:
    """Append the sockets of one read to ``found``, ``messages`` and ``info``. Return False after the last read."""
    at, header, attribute, body = 0, _HEADER.unpack_from, _ATTRIBUTE.unpack_from, _HEADER.size
    while at + body <= len(data):
        length, kind, _, _, _ = header(data, at)
        if kind == _NLMSG_DONE:
            return False
        if kind == _NLMSG_ERROR:
            (code,) = struct.unpack_from("=i", data, at + body)
            raise OSError(-code, os.strerror(-code))
        begin = at + body
        here, end = at + body + MESSAGE.itemsize, at + length
        payloads: dict[int, bytes] = {}
        while here + 4 <= end:
            size, which = attribute(data, here)
            payloads[which] = data[here + 4 : here + size]
            here += (max(size, 4) + 3) & ~3
        at += (length + 3) & ~3
        # In TIME-WAIT and mostly in FIN-WAIT-2, the kernel keeps only the addresses and ports of a connection.
        if _INFO not in payloads:
            continue
        messages += data[begin : begin + MESSAGE.itemsize]
        info += payloads[_INFO][:SIZE].ljust(SIZE, b"\0")
        found.control.append(payloads.get(_CONG, b"").rstrip(b"\0"))
        memory, group = payloads.get(_SKMEMINFO, b""), payloads.get(_CGROUP, b"")
        found.sndbuf.append(int.from_bytes(memory[12:16], "little") if len(memory) >= 16 else None)
        found.cgroup.append(int.from_bytes(group[:8], "little") if len(group) >= 8 else None)
    return True
