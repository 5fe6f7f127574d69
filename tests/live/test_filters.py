# SPDX-License-Identifier: Apache-2.0
"""Tests that each filter passes exactly the resets and the connections in snapshots that it should.

Connections of every kind that a filter distinguishes send at the same times, and each filter has a tracer.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from cwndtrace.capture.connections import snapshot
from cwndtrace.capture.source import Filters
from cwndtrace.errors import NotFound
from cwndtrace.kernel import cgroups
from tests.harness import tcp
from tests.harness.tcp import Connect, Send, TcpConnection, until
from tests.harness.tracing import Tracer, check, differences, key

pytestmark = pytest.mark.live

SHORT, LONG = 0.45, 0.9
MIN_IDLE: Final = 0.7
"""An idle time between SHORT and LONG, in seconds."""


@pytest.fixture(scope="module")
def cgroup() -> Iterator[Path]:
    """A cgroup below another one; both are removed at the end."""
    try:
        outer = cgroups.mount_point() / f"{tcp.PREFIX}{os.getpid()}"
    except NotFound as e:
        pytest.skip(f"{e.cause}; {e.remedy}")
    inner = outer / "inner"
    inner.mkdir(parents=True)
    try:
        yield inner
    finally:
        for folder in (inner, outer):
            until(lambda f=folder: _removed(f), 20, f"{folder} to be empty")  # type: ignore[misc]


def _removed(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        folder.rmdir()
    return not folder.exists()


@dataclass
class World:
    """Two namespaces with two links between them, another process, and a connection of each kind, by name."""

    a: tcp.Space
    b: tcp.Space
    holder: tcp.Holder
    cgroup: Path
    named: dict[str, TcpConnection] = field(default_factory=dict)

    @property
    def all(self) -> list[TcpConnection]:
        return list(self.named.values())

    def names(self, keys: list[Any]) -> list[str]:
        """Return the names of the connections with these keys, in order."""
        by_key = {c.key: name for name, c in self.named.items()}
        return sorted(by_key[k] for k in keys if k in by_key)


@pytest.fixture(scope="module")
def world(tracer: Tracer, make_space: Callable[[], tcp.Space], drain: tcp.Drain, cgroup: Path) -> Iterator[World]:
    # A new one is made for each probe, because a tracer doesn't see idle time that began before it.
    tracer.settle()
    a, b = make_space(), make_space()
    tcp.join(a, b, "cwt1", ["10.1.0.1/24"], ["10.1.0.2/24"])
    tcp.join(a, b, "cwt2", ["10.2.0.1/24", "fd00:2::1/64"], ["10.2.0.2/24", "fd00:2::2/64"])
    # The first connection over a new IPv6 link may have to wait, which makes its RTO long.
    tcp.connect(a, drain, to=b, address="fd00:2::2", device="cwt2").close()
    holder = tcp.Holder(a, cgroup)
    connected = World(a, b, holder, cgroup)
    try:
        connected.named = {
            "first": tcp.connect(a, drain, to=b, address="10.1.0.2", device="cwt1"),
            "second": tcp.connect(a, drain, to=b, address="10.2.0.2", device="cwt2"),
            "second6": tcp.connect(a, drain, to=b, address="fd00:2::2", device="cwt2", ca="reno"),
            "mapped": tcp.connect(a, drain, to=b, address="10.1.0.2", device="cwt1", mapped=True),
            "back": tcp.connect(b, drain, to=a, address="10.1.0.1", device="cwt1"),
            "lo": tcp.connect(a, drain),
            "lo_b": tcp.connect(b, drain, from_server=True),
            "here": tcp.connect(tcp.Here(), drain),
            "held": tcp.connect(a, drain, by=holder),
            "closed": tcp.connect(a, drain, by=holder, read_buffer=200_000),
        }
        yield connected
    finally:
        for connection in connected.all:
            connection.close()
        holder.close()


@dataclass(frozen=True)
class FilterCase:
    """A filter, as arguments of Tracer, and the names of the connections whose resets pass it."""

    arguments: Callable[[World], dict[str, Any]]
    names: str
    min_idle: float = 0.0


EVERY: Final = "first second second6 mapped back lo lo_b here held closed"

CASES: Final = {
    "iface": FilterCase(lambda w: {"iface": "cwt1", "netns": w.a.name}, "first mapped"),
    "iface here": FilterCase(lambda _: {"iface": "lo"}, "here"),
    "pid": FilterCase(lambda w: {"pid": w.holder.pid}, "held closed"),
    "port local": FilterCase(lambda w: {"port": w.named["first"].sport}, "first"),
    "port remote": FilterCase(lambda w: {"port": w.named["second6"].dport}, "second6"),
    "netns": FilterCase(lambda w: {"netns": w.b.name}, "back lo_b"),
    "cgroup": FilterCase(lambda w: {"cgroup": str(w.cgroup.parent)}, "held closed"),
    "family 4": FilterCase(lambda _: {"family": 4}, EVERY.replace("second6 ", "")),
    "family 6": FilterCase(lambda _: {"family": 6}, "second6"),
    "min idle": FilterCase(lambda _: {"min_idle": MIN_IDLE}, EVERY, MIN_IDLE),
    "all at once": FilterCase(
        lambda w: {
            "iface": "lo",
            "netns": w.a.name,
            "pid": w.holder.pid,
            "port": w.named["held"].dport,
            "cgroup": str(w.cgroup),
            "family": 4,
            "min_idle": MIN_IDLE,
        },
        "held",
        MIN_IDLE,
    ),
}


@pytest.fixture(scope="module")
def watched(tracer: Tracer, world: World) -> Iterator[dict[str, Tracer]]:
    """The tracer of each case, after every connection has had a short and a long idle time."""
    with contextlib.ExitStack() as stack:
        tracers = {}
        for name, case in CASES.items():
            watcher = stack.enter_context(
                Tracer(tracer.probe, connections=True, idle_only=True, **case.arguments(world))
            )
            watcher.passes = _passes(world, case)
            tracers[name] = watcher
        for idle in (SHORT, LONG):
            for connection in world.all:
                connection.grow()
            _close_grown(world.named["closed"])
            for connection in world.all:
                connection.idle(idle)
            for name, connection in world.named.items():
                # On a slow machine a connection may send close to min_idle; it then waits until the case is clear.
                connection.until(lambda i: not MIN_IDLE - 0.2 < i.last_snd_us / 1e6 < MIN_IDLE + 0.05, "a clear case")
                if name == "held":
                    connection.send(lambda: world.holder.send(0), world.holder.who)
                elif name == "closed":
                    connection.reopen()
                else:
                    connection.send()
            reasons = {name: c.sends[-1].reason for name, c in world.named.items()}
            assert reasons == dict.fromkeys(world.named, "idle")
        yield tracers


def _close_grown(connection: TcpConnection) -> None:
    """Close the peer's window while the sender's window is still so large that idle time resets it."""
    for _ in range(20):
        connection.grow()
        if connection.fill().cwnd > tcp.INIT_CWND:
            return
        # On a slow machine idle time between two sends has reset it already.
        connection.reopen()
    raise AssertionError(f"the window is always reset before the peer's is closed: {connection.info()}")


def _passes(world: World, case: FilterCase) -> Callable[[TcpConnection, Send], bool]:
    passing = {world.named[name].key for name in case.names.split()}
    return lambda c, s: c.key in passing and s.before.last_snd_us >= case.min_idle * 1e6


@pytest.mark.parametrize("name", CASES)
def test_a_filter_passes_its_resets(watched: dict[str, Tracer], world: World, name: str) -> None:
    resets = check(watched[name], *world.all)
    case = CASES[name]
    # On a slow machine idle times are longer, and there may be more of them.
    assert resets >= len(case.names.split()) * (1 if case.min_idle else 2)
    assert watched[name].dropped <= 0


@pytest.mark.parametrize("name", CASES)
def test_a_filter_passes_its_connections_in_snapshots(watched: dict[str, Tracer], world: World, name: str) -> None:
    """min_idle applies only to resets, because a connection's later idle times aren't known in advance."""
    watched[name].settle()
    keys = {key(row) for row in watched[name].snapshots}
    assert world.names(list(keys)) == sorted(CASES[name].names.split())


def test_a_reset_without_a_task_passes_the_filter_by_process(watched: dict[str, Tracer], world: World) -> None:
    records = watched["pid"].of(world.named["closed"])
    assert [r["tgid"] for r in records].count(tcp.NO_TASK[0]) >= 2


def test_a_snapshot_agrees_with_tcp_info_and_proc(tracer: Tracer, world: World) -> None:
    tracer.settle()
    infos = {name: connection.quiet() for name, connection in world.named.items()}
    cookies = {name: connection.cookie() for name, connection in world.named.items()}
    rows = {key(row): row for row in snapshot(Filters(), 0).to_pylist()}
    for name, connection in world.named.items():
        row, info = rows[connection.key], infos[name]
        holder = min(os.getpid(), world.holder.pid) if name in ("held", "closed") else os.getpid()
        truth = {
            "sock_cookie": cookies[name],
            "family": connection.family,
            "state": "ESTAB",
            "inode": os.fstat(connection.sock.fileno()).st_ino,
            "uid": 0,
            "pid": holder,
            "comm": Path(f"/proc/{holder}/comm").read_text().rstrip("\n"),
            "ca_name": connection.ca,
            "ca_state": "open",
            "cwnd": info.cwnd,
            "ssthresh": info.ssthresh,
            "mss": info.mss,
            "rto_us": info.rto_us,
            "srtt_us": info.srtt_us,
            "min_rtt_us": info.min_rtt_us,
            "snd_wnd": info.snd_wnd,
            "bytes_acked": info.bytes_acked,
            "bytes_sent": info.bytes_sent,
            "unsent_bytes": 0,
            "unacked": 0,
            "total_retrans": info.total_retrans,
        }
        assert {column: row[column] for column in truth} == truth
        for column, since in (("last_snd_us", info.last_snd_us), ("last_rcv_us", info.last_rcv_us)):
            assert since <= row[column] < since + 20_000_000
    assert {rows[world.named["mapped"].key]["saddr"]} == {"10.1.0.1"}


def test_a_socket_that_a_process_opens_later_is_traced(tracer: Tracer, connect: Connect, world: World) -> None:
    """The sockets of a traced process are looked up again and again."""
    with Tracer(tracer.probe, idle_only=True, pid=world.holder.pid) as watching:
        late = connect(world.a, by=world.holder)
        for _ in range(6):
            late.grow()
            late.idle(SHORT)
            late.send()
            if watching.of(late):
                break
        # On a slow machine the first send of grow() may have ended idle time too.
        record = watching.of(late)[-1]
        assert not differences(watching, late, late.sends[-1], record)
