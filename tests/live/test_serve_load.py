# SPDX-License-Identifier: Apache-2.0
"""Tests that ``cwndtrace serve`` serves honest peers among those that don't read, read slowly or send nothing."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from cwndtrace.lab import serve, wire
from tests.harness.lab import Started, serving
from tests.harness.tcp import until

pytestmark = pytest.mark.live

LARGEST = wire.REQUEST.pack(wire.MAX_BURST, 1, 0.0, 0)
SERVED_S = 1.0
MOST_KB = 200_000


@pytest.fixture
def server() -> Iterator[tuple[Started, int]]:
    with serving() as (started, place):
        yield started, int(place.rpartition(":")[2])


def connected(stack: ExitStack, port: int, source: str, data: bytes) -> socket.socket:
    """Return a connection from this address of loopback, which counts as a separate peer."""
    sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), 10, source_address=(source, 0)))
    sock.sendall(data)
    return sock


def memory_kb(pid: int) -> int:
    """Return the largest resident memory that a process has had so far, in kB."""
    match = re.search(r"^VmHWM:\s*(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1])


def took_s(port: int, size: int) -> float:
    """Return the time in s in which an honest peer connects, requests a burst and receives it."""
    begin = time.monotonic()
    with ExitStack() as stack:
        sock = connected(stack, port, "127.0.0.2", wire.HELLO + wire.REPLY)
        assert wire.receive(sock, len(wire.HELLO)) == wire.HELLO
        sock.sendall(wire.REQUEST.pack(size, 7, 0.0, 0))
        assert wire.STAMP.unpack(wire.receive(sock, size)[: wire.STAMP.size])[0] == 7
    return time.monotonic() - begin


def test_honest_peers_are_served_among_hostile_ones(server: tuple[Started, int]) -> None:
    started, port = server
    with ExitStack() as stack:
        for _ in range(12):
            connected(stack, port, "127.0.0.3", wire.HELLO + wire.REPLY + LARGEST)
        for _ in range(64):
            connected(stack, port, "127.0.0.4", wire.HELLO[:1])
        slow = [connected(stack, port, "127.0.0.5", wire.HELLO + wire.REPLY + LARGEST) for _ in range(12)]
        for sock in slow:
            # At this point the server answers the hostile peers, and hasn't just accepted them.
            wire.receive(sock, len(wire.HELLO) + wire.STAMP.size)
        for _ in range(5):
            for sock in slow:
                sock.recv(1)
            assert took_s(port, 1_000_000) < SERVED_S
        assert memory_kb(started.process.pid) < MOST_KB


def test_no_peer_gets_more_than_its_share(server: tuple[Started, int]) -> None:
    started, port = server
    with ExitStack() as stack:
        kept = [connected(stack, port, "127.0.0.4", wire.HELLO + wire.REPLY) for _ in range(serve.MAX_OF_ONE_PEER)]
        for sock in kept:
            wire.receive(sock, len(wire.HELLO))
        assert connected(stack, port, "127.0.0.4", b"").recv(1) == b""
        started.wait_for(re.compile(r"^refused so far: 1 connection \(too many at once\)$", re.MULTILINE))
        assert took_s(port, 1000) < SERVED_S
        kept[0].close()

        def let_in() -> bool:
            # A refused peer that has sent data gets a TCP reset.
            with suppress(ConnectionError), ExitStack() as once:
                return bool(connected(once, port, "127.0.0.4", wire.HELLO + wire.REPLY).recv(1))
            return False

        until(let_in, 10, "room for one more")
