# SPDX-License-Identifier: Apache-2.0
"""Snapshots of connections from what the kernel answered once: each value, each filter, and what is left out.

tests/data/inet_diag.bin has the reads of one dump, each after its length in four bytes. It was taken in a network
namespace with two connections, over IPv4 and IPv6, and a third one that its client had closed.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cwndtrace.capture import connections
from cwndtrace.capture.source import Filters
from cwndtrace.errors import NotFound
from cwndtrace.kernel import inet_diag, interfaces, netns, sockets
from cwndtrace.kernel.inet_diag import Sockets
from cwndtrace.kernel.netns import Namespace
from cwndtrace.records import arrow

RAW = (Path(__file__).parents[1] / "data/inet_diag.bin").read_bytes()
HERE, ELSEWHERE = (Namespace(inode, f"space{inode}", Path("/proc/self/ns/net")) for inode in (41, 42))
SERVER, CLIENT, SERVER_6, CLIENT_6, HALF = 21412611, 21412610, 21412614, 21412613, 21412617
"""The inodes of the sockets, as /proc had them."""
HOLDERS = {21412609: (10, "web"), SERVER: (11, "worker"), CLIENT: (12, "curl"), 21412612: (13, "web6")}


def reads(raw: bytes = RAW) -> list[bytes]:
    """Return what each read of the socket gave."""
    out = []
    while raw:
        (length,) = struct.unpack_from("=I", raw)
        out.append(raw[4 : 4 + length])
        raw = raw[4 + length :]
    return out


class RecordedNetlink:
    """A netlink socket that gives these answers."""

    def __init__(self, answers: list[bytes]) -> None:
        self.answers = answers
        self.sent: list[bytes] = []

    def __enter__(self) -> RecordedNetlink:
        return self

    def __exit__(self, *_: object) -> None: ...

    def bind(self, address: tuple[int, int]) -> None: ...

    def send(self, data: bytes) -> None:
        self.sent.append(data)

    def recv(self, room: int) -> bytes:
        assert len(self.answers[0]) <= room
        return self.answers.pop(0)


def dumped(patch: pytest.MonkeyPatch, answers: list[bytes]) -> Sockets:
    """Return what ``inet_diag.dump`` makes of these answers."""
    netlink = RecordedNetlink(answers)
    with patch.context() as only_here:
        only_here.setattr("cwndtrace.kernel.inet_diag.socket.socket", lambda *_: netlink)
        found = inet_diag.dump(connections._STATE_MASK)
    assert [request[16] for request in netlink.sent] == [2, 10]
    assert netlink.answers == []
    return Sockets(found.messages.copy(), found.info.copy(), found.control, found.sndbuf, found.cgroup)


@pytest.fixture
def take(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """A function that returns the rows of a snapshot of the recorded sockets, in these namespaces.

    ``change`` may change the sockets before.
    """

    def rows(
        filters: Filters | None = None,
        groups: set[int] | None = None,
        *,
        spaces: tuple[Namespace, ...] = (HERE,),
        change: Callable[[Sockets], object] = lambda _: None,
    ) -> list[dict[str, Any]]:
        found = dumped(monkeypatch, reads())
        change(found)
        monkeypatch.setattr(netns, "all_reachable", lambda: list(spaces))
        monkeypatch.setattr(netns, "inside", lambda *_: found)
        monkeypatch.setattr(
            connections._holders, "of", lambda inodes: {each: HOLDERS[each] for each in inodes if each in HOLDERS}
        )
        table = connections.table(connections.look(filters or Filters(), groups), 10**18)
        assert table.schema == arrow.schema("connections")
        made: list[dict[str, Any]] = table.to_pylist()
        return made

    return rows


def inodes(rows: list[dict[str, Any]]) -> list[int]:
    return [row["inode"] for row in rows]


Take = Callable[..., list[dict[str, Any]]]


def test_each_connection_is_as_ss_showed_it(take: Take) -> None:
    """The listening sockets and the one in FIN-WAIT-2, of which the kernel keeps no window, are no rows."""
    names = ("inode", "state", "family", "saddr", "sport", "daddr", "dport", "bytes_acked", "bytes_received")
    assert [tuple(row[name] for name in names) for row in take()] == [
        (SERVER, "ESTAB", 2, "127.0.0.1", 35129, "127.0.0.1", 50872, 100, 20_000),
        (CLIENT, "ESTAB", 2, "127.0.0.1", 50872, "127.0.0.1", 35129, 20_001, 100),
        (HALF, "CLOSE-WAIT", 2, "127.0.0.1", 41445, "127.0.0.1", 53284, 100, 20_001),
        (SERVER_6, "ESTAB", 10, "::1", 41995, "::1", 49974, 100, 20_000),
        (CLIENT_6, "ESTAB", 10, "::1", 49974, "::1", 41995, 20_001, 100),
    ]
    for row in take():
        assert (row["ca_name"], row["ca_state"], row["sock_cgroup_id"], row["netns_ino"]) == ("bbr", "open", 1, 41)
        assert row["cwnd"] in (10, 11)
        assert row["sndbuf"] in (16_384, 3_939_840)


def test_who_holds_a_socket_and_who_listens_for_it(take: Take) -> None:
    held = {row["inode"]: (row["pid"], row["comm"], row["listener_pid"], row["listener"]) for row in take()}
    assert held == {
        SERVER: (11, "worker", 10, "web"), CLIENT: (12, "curl", 0, ""), HALF: (0, "", 0, ""),
        SERVER_6: (0, "", 13, "web6"), CLIENT_6: (0, "", 0, ""),
    }  # fmt: skip


def test_figures_are_those_of_tcp_info_of_which_two_are_in_ms(take: Take) -> None:
    same = ("snd_wnd", "bytes_acked", "bytes_sent", "bytes_received", "unacked", "total_retrans")
    members = dict(zip(same, same, strict=True)) | {
        "cwnd": "snd_cwnd", "ssthresh": "snd_ssthresh", "mss": "snd_mss", "rto_us": "rto", "srtt_us": "rtt",
        "min_rtt_us": "min_rtt", "last_snd_us": "last_data_sent", "last_rcv_us": "last_data_recv",
        "unsent_bytes": "notsent_bytes", "busy_us": "busy_time", "rwnd_limited_us": "rwnd_limited",
        "sndbuf_limited_us": "sndbuf_limited",
    }  # fmt: skip
    values = {column: number for number, column in enumerate(members, start=7)}

    def change(found: Sockets) -> None:
        for column, member in members.items():
            found.info[member] = values[column]

    in_us = {column: 1000 * values[column] for column in ("last_snd_us", "last_rcv_us")}
    for row in take(change=change):
        assert {column: row[column] for column in members} == values | in_us


def test_what_the_kernel_does_not_report_is_missing(take: Take) -> None:
    def change(found: Sockets) -> None:
        found.sndbuf = [None] * len(found.messages)
        found.cgroup = [None] * len(found.messages)

    assert {(row["sndbuf"], row["sock_cgroup_id"]) for row in take(change=change)} == {(None, 0)}


# ---- filters ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filters", "let_through"),
    [
        (Filters(), {SERVER, CLIENT, HALF, SERVER_6, CLIENT_6}),
        (Filters(family=2), {SERVER, CLIENT, HALF}),
        (Filters(family=10), {SERVER_6, CLIENT_6}),
        (Filters(port=35129), {SERVER, CLIENT}),
        (Filters(port=50872), {SERVER, CLIENT}),
        (Filters(port=53284), {HALF}),
        (Filters(port=1), set()),
        (Filters(port=35129, family=10), set()),
        (Filters(netns=41), {SERVER, CLIENT, HALF, SERVER_6, CLIENT_6}),
        (Filters(netns=42), set()),
        (Filters(pid=12), {CLIENT}),
        (Filters(netns=41, ifindex=5), {SERVER_6, CLIENT_6}),
        (Filters(netns=41, ifindex=1), {SERVER, CLIENT, HALF}),
    ],
)
def test_a_filter_lets_through_what_fits_it(
    take: Take, monkeypatch: pytest.MonkeyPatch, filters: Filters, let_through: set[int]
) -> None:
    class FakeRoutes:
        def __init__(self, namespace: Namespace) -> None: ...

        def index_of(self, peer: str) -> int:
            return 5 if ":" in peer else 1

    monkeypatch.setattr(sockets, "inodes_of", lambda pid: {CLIENT} if pid == 12 else set())
    monkeypatch.setattr(interfaces, "Routes", FakeRoutes)
    assert set(inodes(take(filters))) == let_through


@pytest.mark.parametrize("groups", [set(), {1}, {2}, {1, 2}, {7}])
def test_a_set_of_cgroups_and_its_complement_let_each_connection_through_once(take: Take, groups: set[int]) -> None:
    def change(found: Sockets) -> None:
        found.cgroup = [1 + number % 3 for number in range(len(found.messages))]

    inside, outside = (inodes(take(groups=each, change=change)) for each in (groups, {1, 2, 3} - groups))
    assert sorted(inside + outside) == sorted(inodes(take(change=change)))


def test_namespaces_are_told_apart_and_one_that_cannot_be_entered_is_left_out(
    take: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = take(spaces=(HERE, ELSEWHERE))
    assert [row["netns_ino"] for row in rows] == [41] * 5 + [42] * 5
    found = dumped(monkeypatch, reads())

    def inside(namespace: Namespace, _: object) -> Sockets:
        if namespace is HERE:
            return found
        raise NotFound("it is gone", "")

    monkeypatch.setattr(netns, "inside", inside)
    assert {row["netns_ino"] for row in connections.snapshot(Filters(), 0).to_pylist()} == {41}


def test_no_namespace_gives_an_empty_table(take: Take) -> None:
    assert take(spaces=()) == []


# ---- what the kernel sends --------------------------------------------------------------------------


def test_sockets_may_come_in_any_number_of_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dumped(monkeypatch, reads())
    first, done, *rest = reads()
    messages, at = [], 0
    while at < len(first):
        (length,) = struct.unpack_from("=I", first, at)
        messages.append(first[at : at + length])
        at += (length + 3) & ~3
    split = dumped(monkeypatch, [*messages, done, *rest])
    assert np.array_equal(split.messages, whole.messages)
    assert split.control == whole.control


def test_an_error_of_the_kernel_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = struct.pack("=IHHIIi", 36, 2, 0, 1, 0, -errno.EPERM) + bytes(16)
    netlink = RecordedNetlink([refusal])
    monkeypatch.setattr("cwndtrace.kernel.inet_diag.socket.socket", lambda *_: netlink)
    with pytest.raises(OSError, match="not permitted") as refused:
        inet_diag.dump(1)
    assert refused.value.errno == errno.EPERM


def test_a_shorter_tcp_info_of_an_older_kernel_has_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's structure grew over time, and the message ends where it did then."""
    message = bytes(inet_diag.MESSAGE.itemsize)
    info = struct.pack("=HH", 4 + 104, 2) + b"\1" * 104
    body = message + info
    one = struct.pack("=IHHII", 16 + len(body), 20, 0, 1, 0) + body
    done = struct.pack("=IHHIIi", 20, 3, 0, 1, 0, 0)
    found = dumped(monkeypatch, [one + done, done])
    assert found.info["snd_cwnd"].tolist() == [0x01010101]
    assert found.info["bytes_sent"].tolist() == [0]
    assert (found.sndbuf, found.cgroup, found.control) == ([None], [None], [b""])
