# SPDX-License-Identifier: Apache-2.0
"""Delays and losses on a namespace's loopback by netem, and the resets that they force."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from tests.harness import tcp


@contextmanager
def netem(space: tcp.Space, *options: str) -> Iterator[Callable[[], None]]:
    """Yield a function that gives the namespace's loopback a netem qdisc with these options; remove that on exit.

    tc is started before this yields and waits for that call, because under software emulation it takes an RTO to start.
    """
    tc_there = ("tc", "-n", space.name)
    with subprocess.Popen([*tc_there, "-batch", "-"], stdin=subprocess.PIPE, text=True) as tc:
        assert tc.stdin is not None
        tell = partial(print, file=tc.stdin, flush=True)
        tell("qdisc replace dev lo root pfifo")
        try:
            tcp.until(lambda: "pfifo" in tcp.run(*tc_there, "qdisc", "show", "dev", "lo"), 20, "tc to start")
            yield lambda: tell("qdisc replace dev lo root netem", *options)
        finally:
            tell("qdisc del dev lo root")
            tc.stdin.close()
    assert tc.returncode == 0


def leave_unused(
    space: tcp.Space, connection: tcp.TcpConnection, before_each: Callable[[], object] = lambda: None
) -> None:
    """Make tcp_cwnd_application_limited() take back half of the unused part of the window.

    It does so if the last ACK is an RTO old and there was no idle time of an RTO before the send. So data must be under
    way whose ACK is late, but not so late that the data is sent again. ``before_each`` is called once per attempt,
    with the window grown.
    """
    for _ in range(20):
        with netem(space, "delay", "80ms") as begin:
            connection.grow(40)
            before_each()
            begin()
            connection.until(lambda i: i.last_snd_us >= 0.8 * i.rto_us, "idle time")
            connection.send()
            connection.until(lambda i: i.last_ack_us > i.rto_us, "an RTO since the last ACK")
            send = connection.send()
            connection.quiet()
        if send.reason == "app_limited":
            return
    raise AssertionError(f"no send lowered the unused window: {connection.sends[-8:]}")


def repair_tails(space: tcp.Space, connections: list[tcp.TcpConnection]) -> None:
    """Make tcp_process_tlp_ack() lower the window of each connection.

    It does so if a tail loss probe replaced a lost segment, and an ACK of later data shows that. So a single segment is
    lost, and the link is back before the probe.
    """
    for connection in connections:
        for _ in range(20):
            recoveries = space.counter("TCPLossProbeRecovery")
            with netem(space, "loss", "100%") as begin:
                begin()
                tcp.until(lambda: "netem" in tcp.run("tc", "-n", space.name, "qdisc"), 20, "the losses to begin")
                connection.send()
            connection.quiet()
            connection.send()
            connection.quiet()
            if space.counter("TCPLossProbeRecovery") > recoveries:
                break
        else:
            raise AssertionError(f"no tail loss probe came before the timeout: {connection.info()}")


def drop_until_a_timeout(space: tcp.Space, connections: list[tcp.TcpConnection]) -> None:
    """Drop all packets on the namespace's loopback until each connection has had a retransmission timeout."""
    with netem(space, "loss", "100%") as begin:
        begin()

        def lost() -> bool:
            # Packets that leave before the first drop are acknowledged.
            for connection in connections:
                if not connection.info().unacked:
                    connection.sock.send(b"x" * 5000)
            return all(c.info().retransmits for c in connections)

        tcp.until(lost, 60, "a retransmission timeout of each")
    for connection in connections:
        connection.quiet()
