# SPDX-License-Identifier: Apache-2.0
"""Tests of the lab's path: it has the requested RTT, rate and losses, and delivers bytes unchanged.

They run in namespaces that they make. Where lateness is no error, the limits allow for a busy machine.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path as File
from typing import Any, Literal

import pytest

from cwndtrace.errors import KernelLacks
from cwndtrace.kernel import netns
from cwndtrace.kernel.tcp_info import TcpInfo
from cwndtrace.lab import wire
from cwndtrace.lab.link import Link
from cwndtrace.lab.path import Path, open_path
from tests.harness.tcp import stop

pytestmark = pytest.mark.live

SEGMENTED = Link(rtt_ms=20, rate=100e6)


@contextmanager
def connection(path: Path) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield both ends of a TCP connection from the client's namespace to the server's."""
    family = socket.AF_INET6 if ":" in path.server.address else socket.AF_INET
    listener = netns.inside(
        path.server.namespace, lambda: socket.create_server((path.server.address, 0), family=family)
    )
    with listener:
        where = listener.getsockname()[:2]
        client = netns.inside(path.client.namespace, lambda: socket.create_connection(where, 30))
        server, _ = listener.accept()
    server.settimeout(60)
    # The default here may be BBR, whose pacing would hide the path's rate.
    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
    with client, server:
        yield client, server


def transfer(server: socket.socket, client: socket.socket, data: bytes) -> tuple[bytes, float]:
    """Send ``data``, and return the received bytes and the time in s."""
    sender = threading.Thread(target=server.sendall, args=(data,))
    begin = time.monotonic()
    sender.start()
    received = wire.receive(client, len(data))
    took = time.monotonic() - begin
    sender.join()
    return received, took


def least_rtt_ms(path: Path) -> float:
    with connection(path) as (client, server):
        for _ in range(8):
            client.sendall(b"?")
            wire.receive(server, 1)
            server.sendall(b"!")
            wire.receive(client, 1)
        return TcpInfo.of(client).min_rtt / 1e3


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("rtt_ms", [10.0, 100.0])
def test_the_rtt_is_held(family: Literal[4, 6], rtt_ms: float) -> None:
    for left in (2, 1, 0):
        with open_path(Link(rtt_ms=rtt_ms), family) as path:
            reached = least_rtt_ms(path)
            warned = path.warnings()
        assert rtt_ms <= reached < rtt_ms * 1.05 + 1
        # On a busy machine a packet may be late, which the path reports.
        if not left:
            assert warned == []
        elif not warned:
            break


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("link", [Link(rtt_ms=20), SEGMENTED], ids=["whole", "segmented"])
def test_bytes_arrive_unchanged(family: Literal[4, 6], link: Link) -> None:
    data = random.Random(7).randbytes(5_000_000)
    with open_path(link, family) as path, connection(path) as (client, server):
        received, _ = transfer(server, client, data)
        figures, warned = path.figures(), path.warnings()
    assert hashlib.sha256(received).digest() == hashlib.sha256(data).digest()
    if path.kind == "relay":
        # The relay forwards whole GSO packets if the link allows it, and packets of an MTU otherwise.
        assert (figures["to_client"]["packets"] < 2000) == (not link.segmented)
        assert figures["to_client"]["bytes"] >= len(data)
        assert [line for line in warned if "refused" in line] == []


def test_the_rate_is_held() -> None:
    # The queue never overflows, so only the rate limits the transfer.
    link = Link(rtt_ms=20, rate=40e6, queue_bytes=4_000_000)
    with open_path(link) as path, connection(path) as (client, server):
        data = bytes(3_000_000)
        _, took = transfer(server, client, data)
        retrans = TcpInfo.of(server).total_retrans
    line_s = len(data) * 8 * 1500 / 1448 / 40e6
    assert retrans == 0
    assert line_s <= took < line_s * 1.15 + 0.3


def test_a_full_queue_drops_and_tcp_recovers() -> None:
    with open_path(Link(rtt_ms=20, rate=20e6, queue_bytes=9_000)) as path, connection(path) as (client, server):
        transfer(server, client, bytes(2_000_000))
        retrans = TcpInfo.of(server).total_retrans
        figures = path.figures()
    assert retrans > 0
    if path.kind == "relay":
        assert figures["to_client"]["dropped"] > 0
        assert figures["to_client"]["lost"] == 0


def test_losses_happen_as_often_as_asked() -> None:
    with open_path(Link(rtt_ms=4, loss=0.02)) as path, connection(path) as (client, server):
        transfer(server, client, bytes(3_000_000))
        retrans = TcpInfo.of(server).total_retrans
        figures = path.figures()
    assert retrans > 10
    if path.kind == "relay":
        there = figures["to_client"]
        assert 0.01 < there["lost"] / (there["lost"] + there["packets"]) < 0.035


def test_a_requested_kind_is_used_or_refused() -> None:
    with open_path(Link(rtt_ms=20), force="relay") as path:
        assert path.kind == "relay"
        assert least_rtt_ms(path) >= 20
    with open_path(Link(rtt_ms=20)) as path:
        has_netem = path.kind == "netem"
    if has_netem:
        with open_path(Link(rtt_ms=20), force="netem") as path:
            assert path.kind == "netem"
    else:
        with pytest.raises(KernelLacks, match="netem") as caught, open_path(Link(rtt_ms=20), force="netem"):
            pass
        assert "sch_netem" in caught.value.remedy


def stop_for_a_while(relay: int, client: socket.socket, server: socket.socket) -> None:
    """Stop the relay for 0.3 s, and assert that a byte arrives only afterwards."""
    client.sendall(b"?")
    stop(relay)
    try:
        server.settimeout(0.3)
        with pytest.raises(TimeoutError):
            server.recv(1)
    finally:
        os.kill(relay, signal.SIGCONT)
    server.settimeout(10)
    assert server.recv(1) == b"?"


def test_a_relay_that_falls_behind_reports_its_delay() -> None:
    with open_path(Link(rtt_ms=20), force="relay") as path, connection(path) as (client, server):
        assert path.relay is not None
        assert path.warnings() == []
        # A relay that is stopped before it has read the packet doesn't count it as late, so this may need repeating.
        for _ in range(10):
            stop_for_a_while(path.relay.pid, client, server)
            figures = path.figures()
            if figures["to_server"]["late_max_ms"] > 200:
                break
        warnings = path.warnings()
    assert figures["to_server"]["late_max_ms"] > 200
    assert len(warnings) == 1
    assert "the path was not held" in warnings[0]


def test_the_error_without_netem_and_tun_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    from cwndtrace.lab import path as module

    def refused(*_: Any) -> None:
        raise module._NoNetemError("this kernel has no netem")

    def no_relay(*_: Any) -> None:
        raise KernelLacks("no TUN device: No such file or directory", "modprobe tun")

    class Failing:
        def __init__(self, *_: str) -> None: ...
        def __enter__(self) -> Failing:
            return self

        def __exit__(self, *_: object) -> None: ...

        receive: Callable[..., None] = no_relay

    monkeypatch.setattr(module, "_open_netem", refused)
    monkeypatch.setattr(module, "Child", Failing)
    with pytest.raises(KernelLacks) as caught, open_path(Link(rtt_ms=20)):
        pass
    assert "no netem" in caught.value.cause
    assert "no TUN" in caught.value.cause
    assert caught.value.remedy


def test_nothing_is_left_and_the_host_is_unchanged() -> None:
    def host() -> tuple[list[str], dict[str, str]]:
        sysctls = {str(f): f.read_text() for f in File("/proc/sys/net/ipv4").glob("tcp_*") if f.stat().st_mode & 0o400}
        return sorted(name for _, name in socket.if_nameindex()), sysctls

    before = host()
    with open_path(Link(rtt_ms=20)) as path:
        names = [path.client.namespace.path, path.server.namespace.path]
        assert all(name.exists() for name in names)
        assert host() == before
    assert not any(name.exists() for name in names)
    assert host() == before
