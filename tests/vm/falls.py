# SPDX-License-Identifier: Apache-2.0
"""The events that tell of a congestion window, as they fire, and ways to force each of its falls."""

from __future__ import annotations

import contextlib
import ctypes
import re
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from cwndtrace.capture import bcc
from cwndtrace.kernel import btf, facts, ladder
from tests.harness import tcp
from tests.harness.link import VethLink
from tests.harness.netem import drop_until_a_timeout, leave_unused, netem
from tests.harness.tcp import TcpConnection

Fired = frozenset[str]

LONG_S: Final = 0.6
IDLE_SYSCTL: Final = "net.ipv4.tcp_slow_start_after_idle"
TEXT_EVENTS: Final = ("tcp_cwnd_reset", "tcp_cong_state_set")
REDUCTION: Final = ("tcp_cwnd_reduction_tp", "tcp_cwnd_reduction")
"""The names of that tracepoint; DECLARE_TRACE adds _tp since Linux 6.16."""
# From linux/tcp.h.
_REPAIR, _REPAIR_WINDOW, _REPAIR_ON, _REPAIR_OFF_NO_WP = 19, 29, 1, -1
# From asm-generic/socket.h and linux/bpf_common.h.
_ATTACH_FILTER, _DETACH_FILTER, _BPF_RET_K = 26, 27, 0x06


class Events:
    """The events that fire for one local port, while this is open."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._instance = Path(f"/sys/kernel/tracing/instances/cwt-falls-{port}")
        kernel = btf.Btf.running()
        self._reduction = next((name for name in REDUCTION if kernel.has_tracepoint(name)), None)
        self._program = None
        if self._reduction:
            source = Path(__file__).with_name("cwnd_reduction.bpf.c")
            self._program = bcc.build(source, kernel, facts.hz(), {})
            attachment = ladder.Attachment("raw_tracepoint", self._reduction, "on_tcp_cwnd_reduction")
            self._program.attach((attachment,), kernel)
        self._instance.mkdir()
        for name in TEXT_EVENTS:
            (self._instance / f"events/tcp/{name}/enable").write_text("1")
        self._reduced = 0
        self.lines: list[str] = []

    def clear(self) -> None:
        """Forget what has fired so far."""
        (self._instance / "trace").write_text("")
        self._reduced = self._reductions()

    def _reductions(self) -> int:
        if self._program is None:
            return 0
        return sum(struct.unpack("=Q", value)[0] for value in self._program.values("reductions"))

    def fired(self) -> Fired:
        """Return the events of this port since the last ``clear``, such as ``tcp_cwnd_reset (idle)``."""
        own = re.compile(rf"(sport={self._port}|src=\S+:{self._port}) ")
        self.lines = [line for line in (self._instance / "trace").read_text().splitlines() if own.search(line)]
        names = set()
        for line in self.lines:
            name = next(n for n in TEXT_EVENTS if f" {n}: " in line)
            reason = re.search(r" reason=(\w+)", line)
            names.add(f"{name} ({reason[1]})" if reason else name)
        if self._reductions() > self._reduced:
            names.add("tcp_cwnd_reduction")
        return frozenset(names)

    def field(self, name: str) -> list[int]:
        """Return a field of each ``tcp_cwnd_reset`` among the lines that ``fired`` read last."""
        return [int(m[1]) for line in self.lines if (m := re.search(rf" {name}=(\d+)", line)) and "reset:" in line]

    def close(self) -> None:
        """Stop."""
        if self._program is not None:
            self._program.close()
        for name in TEXT_EVENTS:
            (self._instance / f"events/tcp/{name}/enable").write_text("0")
        self._instance.rmdir()


@contextmanager
def qdisc(space: tcp.Space, device: str, *options: str) -> Iterator[None]:
    """Give a device a netem qdisc with these options meanwhile."""
    place = ("tc", "-n", space.name, "qdisc")
    tcp.run(*place, "replace", "dev", device, "root", "netem", *options)
    try:
        yield
    finally:
        tcp.run(*place, "del", "dev", device, "root")


class Fall(NamedTuple):
    """What a forced fall did: the window before and after, and what fired."""

    before: int
    after: int
    fired: Fired


class Forcing:
    """Ways to force falls, each on a new connection; ``connect`` and ``make_space`` are the fixtures."""

    def __init__(self, connect: tcp.Connect, make_space: Callable[[], tcp.Space]) -> None:
        self._connect, self._make_space = connect, make_space

    def _space(self) -> tcp.Space:
        """Return a namespace without restarts after idle time: on a slow machine, any row might have one."""
        space = self._make_space()
        space.sysctl(IDLE_SYSCTL, "0")
        return space

    @contextmanager
    def _grown(self, space: tcp.Space, **options: Any) -> Iterator[tuple[TcpConnection, Events]]:
        connection = self._connect(space, **options)
        events = Events(connection.sport)
        try:
            connection.grow()
            events.clear()
            yield connection, events
        finally:
            events.close()
            connection.close()

    def idle(self) -> Fall:
        """Send after idle time."""
        with self._grown(self._make_space()) as (connection, events):
            connection.idle(LONG_S)
            send = connection.send()
            fired = events.fired()
            assert events.field("notsent_bytes") == [0]
            return Fall(send.before.cwnd, send.after.cwnd, fired)

    def opened_window(self) -> Fall:
        """Open the receiver's window an RTO after it was closed."""
        with self._grown(self._make_space(), read_buffer=100_000) as (connection, events):
            unsent = connection.fill().unsent
            before = connection.idle(LONG_S).cwnd
            events.clear()
            connection.reopen()
            fired = events.fired()
            assert events.field("notsent_bytes") == [unsent]
            return Fall(before, min(events.field("cwnd_after")), fired)

    def timeout(self) -> Fall:
        """Drop data until the timeout."""
        space = self._space()
        with self._grown(space) as (connection, events):
            before = connection.info().cwnd
            drop_until_a_timeout(space, [connection])
            fired = events.fired()
            assert min(events.field("snd_wnd")) > 0
            return Fall(before, min(events.field("cwnd_after")), fired)

    def zero_window(self) -> Fall:
        """Have the timer expire while data is in flight and the receiver's window is 0."""
        space = self._space()
        with self._grown(space) as (connection, events), netem(space, "loss", "100%") as begin:
            before = connection.info().cwnd
            begin()
            tcp.until(lambda: self._unacknowledged(connection), 20, "data in flight")
            close_window(connection.sock)
            connection.until(lambda i: i.cwnd == 1, "the timeout")
            fired = events.fired()
            assert events.field("snd_wnd") == [0]
            return Fall(before, connection.info().cwnd, fired)

    @staticmethod
    def _unacknowledged(connection: TcpConnection) -> bool:
        # netem begins when tc gets to it, so the first data may still be acknowledged.
        connection.sock.send(b"x")
        return connection.info().unacked > 3

    def lost_syn(self) -> Fall:
        """Drop the first SYN."""
        with self._calling(1) as (fall, _sock, _events):
            return fall

    @contextmanager
    def _calling(self, timeouts: int) -> Iterator[tuple[Fall, socket.socket, Events]]:
        """Connect while packets are dropped until that many timeouts, and yield what has fired by then."""
        space = self._make_space()
        with contextlib.ExitStack() as stack:
            listener, sock = (stack.enter_context(space.enter(socket.socket)) for _ in range(2))
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            sock.bind(("127.0.0.1", 0))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
            sock.setblocking(False)
            events = Events(sock.getsockname()[1])
            stack.callback(events.close)
            before = tcp.info(sock).cwnd
            with qdisc(space, "lo", "loss", "100%"):
                with contextlib.suppress(BlockingIOError):
                    sock.connect(listener.getsockname())
                tcp.until(lambda: tcp.info(sock).retransmits >= timeouts, 40, "the SYN's timeouts")
            yield Fall(before, tcp.info(sock).cwnd, events.fired()), sock, events

    def first_window(self) -> Fall:
        """Establish the connection after two timeouts of the SYN."""
        with self._calling(2) as (_, sock, events):
            events.clear()
            tcp.until(lambda: tcp.info(sock).snd_wnd, 40, "the connection")
            return Fall(tcp.INIT_CWND, tcp.info(sock).cwnd, events.fired())

    def application_limit(self) -> Fall:
        """Leave the window unused for an RTO, with data in flight."""
        space = self._make_space()
        with self._grown(space) as (connection, events):
            leave_unused(space, connection, events.clear)
            send = connection.sends[-1]
            fired = events.fired()
            assert min(events.field("idle_us")) >= min(events.field("rto_us"))
            return Fall(send.before.cwnd, send.after.cwnd, fired)

    def loss_probe(self) -> Fall:
        """Lose the last segment, and have a tail loss probe repair it."""
        with self._grown(self._space()) as (connection, events):
            for _ in range(20):
                before = connection.grow()
                events.clear()
                # A filter that lets nothing through, for as long as one segment takes.
                with dropping(connection.peer):
                    connection.sock.send(b"x")
                connection.quiet()
                # The ACK of the next segment is what tells the sender of the loss.
                connection.sock.send(b"x")
                after, fired = connection.quiet(), events.fired()
                # On a slow machine a timeout can come before the probe's ACK.
                if "tcp_cwnd_reset (rto_loss)" not in fired:
                    return Fall(before.cwnd, after.cwnd, fired)
            raise AssertionError(f"no loss was repaired by a probe: {fired}")

    def congestion_mark(self) -> Fall:
        """Mark data as a congested router does, with ECN."""
        link = VethLink(self._space)
        for space in (link.a, link.b):
            space.sysctl("net.ipv4.tcp_ecn", "1")
        with self._grown(link.a, to=link.b, address="10.9.0.2", device="cwt0") as (connection, events):
            before = connection.info().cwnd
            with qdisc(link.a, "cwt0", "loss", "100%", "ecn"):
                connection.sock.send(bytes(20_000))
                connection.until(lambda i: i.cwnd < before, "the reduction")
            connection.quiet()
            connection.send()
            after = connection.quiet().cwnd
            return Fall(before, after, events.fired())

    def larger_segments(self) -> Fall:
        """Have path MTU probing find that larger segments fit."""
        link = VethLink(self._space)
        link.a.sysctl("net.ipv4.tcp_mtu_probing", "2")
        link.a.sysctl("net.ipv4.tcp_base_mss", "512")
        connection = self._connect(link.a, to=link.b, address="10.9.0.2", device="cwt0")
        events = Events(connection.sport)
        try:
            windows = [connection.info()]

            def larger() -> bool:
                connection.sock.send(bytes(4_000))
                windows.append(connection.info())
                return windows[-1].mss > windows[0].mss

            tcp.until(larger, 60, "a larger segment")
            before, after = windows[-2].cwnd, windows[-1].cwnd
            return Fall(before, after, events.fired())
        finally:
            events.close()

    def undo(self) -> Fall:
        """Let the ACKs come after a timeout, which shows that it was in vain."""
        link = VethLink(self._space)
        with self._grown(link.a, to=link.b, address="10.9.0.2", device="cwt0") as (connection, events):
            with qdisc(link.b, "cwt0", "delay", "900ms"):
                connection.sock.send(bytes(20_000))
                before = connection.until(lambda i: i.retransmits > 0, "the timeout").cwnd
                events.clear()
                after = connection.until(lambda i: i.cwnd > before + 10, "the undo").cwnd
            return Fall(before, after, events.fired())


@contextmanager
def dropping(sock: socket.socket) -> Iterator[None]:
    """Drop all packets that come in for a socket meanwhile."""
    program = ctypes.create_string_buffer(struct.pack("=HBBI", _BPF_RET_K, 0, 0, 0), 8)
    sock.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(program)))
    try:
        yield
    finally:
        sock.setsockopt(socket.SOL_SOCKET, _DETACH_FILTER, 0)


def close_window(sock: socket.socket) -> None:
    """Make a sender believe that its receiver's window is 0; Linux receivers don't take a window back."""
    sock.setsockopt(socket.IPPROTO_TCP, _REPAIR, _REPAIR_ON)
    window = bytearray(sock.getsockopt(socket.IPPROTO_TCP, _REPAIR_WINDOW, 20))
    window[4:8] = bytes(4)  # snd_wnd
    sock.setsockopt(socket.IPPROTO_TCP, _REPAIR_WINDOW, bytes(window))
    sock.setsockopt(socket.IPPROTO_TCP, _REPAIR, _REPAIR_OFF_NO_WP)
