# SPDX-License-Identifier: Apache-2.0
"""What the kernel answers about sockets is taken apart as include/uapi/linux/inet_diag.h says."""

from __future__ import annotations

import errno
import socket
import struct
from typing import Any

import pytest

from cwndtrace.kernel import inet_diag

DONE = struct.pack("=IHHII", 20, 3, 0, 1, 0) + bytes(4)


def attribute(kind: int, payload: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def info(size: int = 232, **members: int) -> bytes:
    """Return struct tcp_info with these members: at the offsets of rtt, snd_cwnd and snd_wnd."""
    raw = bytearray(512)
    for name, value in members.items():
        struct.pack_into("I", raw, {"rtt": 68, "snd_cwnd": 80, "snd_wnd": 228}[name], value)
    return bytes(raw[:size])


def message(*attributes: bytes, sport: int = 443, **fields: Any) -> bytes:
    """Return the message of one socket: its addresses and ports, and attributes."""
    values = {"family": 2, "state": 1, "inode": 77, "uid": 1000, "cookie": 0x1_0000_0002} | fields
    body = struct.pack(
        "=BBBB2s2s16s16sIQIIIII",
        values["family"], values["state"], 0, 0, struct.pack(">H", sport), struct.pack(">H", 5000),
        socket.inet_aton("10.0.0.1") + bytes(12), socket.inet_aton("10.0.0.2") + bytes(12), 3, values["cookie"],
        0, 0, 0, values["uid"], values["inode"],
    ) + b"".join(attributes)  # fmt: skip
    return struct.pack("=IHHII", 16 + len(body), 20, 2, 1, 0) + body


class Netlink:
    """A netlink socket that answers each request with the next of ``answers``, a list of reads."""

    def __init__(self, *answers: list[bytes]) -> None:
        self.answers = [list(each) for each in answers]
        self.requests: list[bytes] = []

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def bind(self, address: tuple[int, int]) -> None:
        assert address == (0, 0)

    def send(self, request: bytes) -> None:
        self.requests.append(request)

    def recv(self, room: int) -> bytes:
        assert room >= 1 << 16
        return self.answers[len(self.requests) - 1].pop(0)


@pytest.fixture
def dumped(monkeypatch: pytest.MonkeyPatch) -> Any:
    def dump(*answers: list[bytes], states: int = 1 << 1) -> tuple[inet_diag.Sockets, Netlink]:
        netlink = Netlink(*answers)

        def made(*arguments: int) -> Netlink:
            assert arguments == (socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 4)
            return netlink

        monkeypatch.setattr(socket, "socket", made)
        return inet_diag.dump(states), netlink

    return dump


def test_the_request_asks_for_these_states_of_each_family(dumped: Any) -> None:
    _, netlink = dumped([DONE], [DONE], states=0b10110)
    for request, family in zip(netlink.requests, (socket.AF_INET, socket.AF_INET6), strict=True):
        length, kind, flags, number, pid = struct.unpack_from("=IHHII", request)
        assert (length, kind, flags, number, pid) == (len(request), 20, 0x301, 1, 0)
        # The extensions are those of tcp_info, the congestion control and the memory.
        assert struct.unpack_from("=BBBBI", request, 16) == (family, socket.IPPROTO_TCP, 0b1001010, 0, 0b10110)
        assert len(request) == 16 + 56


def test_each_socket_has_its_members(dumped: Any) -> None:
    memory = struct.pack("=9I", 1, 2, 3, 2_626_560, 5, 6, 7, 8, 9)
    whole = [
        attribute(2, info(240, rtt=107_000, snd_cwnd=11, snd_wnd=65_535)), attribute(4, b"bbr\0"),
        attribute(7, memory), attribute(21, struct.pack("=Q", 5555)),
    ]  # fmt: skip
    found, _ = dumped(
        [message(*whole) + message(attribute(2, info(104, snd_cwnd=12)), sport=80, state=8), DONE], [DONE]
    )
    assert found.messages["sport"].tolist() == [443, 80]
    assert found.messages["dport"].tolist() == [5000, 5000]
    assert found.messages["state"].tolist() == [1, 8]
    assert found.messages["cookie"].tolist() == [0x1_0000_0002] * 2
    assert (found.messages["uid"][0], found.messages["inode"][0], found.messages["ifindex"][0]) == (1000, 77, 3)
    assert bytes(found.messages["saddr"][0])[:4] == socket.inet_aton("10.0.0.1")
    assert found.info["snd_cwnd"].tolist() == [11, 12]
    # An older kernel's struct is shorter, and what it lacks is 0.
    assert found.info["rtt"].tolist() == [107_000, 0]
    assert found.info["snd_wnd"].tolist() == [65_535, 0]
    assert (found.control, found.sndbuf, found.cgroup) == ([b"bbr", b""], [2_626_560, None], [5555, None])


def test_sockets_of_both_families_and_of_many_reads_come_together(dumped: Any) -> None:
    one = [message(attribute(2, info()), sport=number) for number in range(1, 6)]
    found, netlink = dumped([one[0] + one[1], one[2], DONE], [one[3] + one[4] + DONE])
    assert found.messages["sport"].tolist() == [1, 2, 3, 4, 5]
    assert netlink.closed


def test_a_socket_without_tcp_info_is_left_out(dumped: Any) -> None:
    found, _ = dumped([message(attribute(4, b"cubic\0")) + message(attribute(2, info()), sport=80), DONE], [DONE])
    assert found.messages["sport"].tolist() == [80]
    assert found.control == [b""]


def test_attributes_of_odd_sizes_and_of_no_size_are_passed_over(dumped: Any) -> None:
    odd = attribute(9, b"abcde"), struct.pack("=HH", 0, 9), attribute(7, bytes(15)), attribute(21, bytes(7))
    found, _ = dumped([message(*odd, attribute(2, info(snd_cwnd=7))), DONE], [DONE])
    assert found.info["snd_cwnd"].tolist() == [7]
    assert (found.sndbuf, found.cgroup) == ([None], [None])


def test_an_error_of_the_kernel_is_raised(dumped: Any) -> None:
    refused = struct.pack("=IHHIIi", 36, 2, 0, 1, 0, -errno.EPERM) + bytes(16)
    with pytest.raises(PermissionError) as caught:
        dumped([refused])
    assert caught.value.errno == errno.EPERM


def test_chosen_sockets_keep_their_columns_together(dumped: Any) -> None:
    import numpy as np

    rows = [message(attribute(2, info(snd_cwnd=n)), attribute(4, b"c%d" % n), sport=n) for n in range(4)]
    found, _ = dumped([*rows, DONE], [DONE])
    some = found.where(np.array([False, True, False, True]))
    assert (some.messages["sport"].tolist(), some.info["snd_cwnd"].tolist()) == ([1, 3], [1, 3])
    assert (some.control, some.sndbuf, some.cgroup) == ([b"c1", b"c3"], [None, None], [None, None])
