# SPDX-License-Identifier: Apache-2.0
"""The A/B experiment: the same bursts with ``tcp_slow_start_after_idle`` on and off, in turns, in the lab's namespaces.

Each setting has one long-lived connection of its own, and the sysctl is switched just before that connection's turn.
One connection for both would be unfair: what the setting does to the window and to ssthresh in one turn would still
be there in the next one, to the credit or the debit of the other setting. Before each measured burst the window is
brought back to where it holds the largest burst, so that each cell starts from the same state, whatever came before;
what remains between the two is the idle time and the setting.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Final, Self

from cwndtrace.capture.target import need_root
from cwndtrace.errors import CwndtraceError
from cwndtrace.format import plural
from cwndtrace.lab import cleanup, wire
from cwndtrace.lab.disk import SlowDevice, slow_device
from cwndtrace.lab.measurement import Measurement, Setting, limits, measured
from cwndtrace.lab.owner import Owner
from cwndtrace.lab.path import Kind, Path, open_path, set_in_both
from cwndtrace.lab.scenario import HOW, Scenario
from cwndtrace.lab.workload import PORT, ClientProcess, Received, ServerProcess
from cwndtrace.tcp import IDLE_SYSCTL

SETTINGS: Final[tuple[Setting, ...]] = ("on", "off")
_SYSCTL_VALUE: Final = {"on": "1", "off": "0"}
_BUFFER_ROOM: Final = 4
_MIN_BUFFER: Final = 1 << 20
_MAX_BUFFER: Final = 1 << 30
# Bursts that a window may take to hold the largest burst; then a new connection is tried, twice.
_WARM_TRIES: Final = 14
_WARM_ENOUGH: Final = 1.9
_CONNECTIONS: Final = 3
# A path with losses or a rate never gets there: so many bursts have to do.
_WARM_LIMITED: Final = 6
_PINGS: Final = 50
# The least of them may be this much longer than asked for: a share, and what waking three processes takes.
_RTT_SLACK: Final = 1.1
_RTT_SLACK_MS: Final = 0.2
# What the line itself needs for a ping there and back, headers counted generously.
_PING_BITS: Final = 3200


class Lab:
    """A scenario, set up: namespaces, path, server, client. A context manager; leaving it puts everything back.

    ``path.server.namespace`` is where the bursts are sent from, so that a tracer can be pointed at it before ``rows``
    is called. What an earlier, killed run had left is removed. It has to be left on the thread that entered it.
    """

    path: Path
    server: ServerProcess
    client: ClientProcess
    device: SlowDevice | None = None

    def __init__(self, scenario: Scenario, force: Kind | None = None) -> None:
        scenario.check()
        self.scenario = scenario
        self.force = force
        self.taken: list[Measurement] = []
        self._stack = ExitStack()
        self._number = 0

    def __enter__(self) -> Self:
        need_root("the lab")
        with ExitStack() as stack:
            self._open(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def _open(self, stack: ExitStack) -> None:
        cleanup.sweep()
        scenario, owner = self.scenario, Owner.new()
        self.path = stack.enter_context(open_path(scenario.link, scenario.family, self.force, owner))
        self._tune()
        if scenario.mode == "disk":
            self.device = stack.enter_context(slow_device(owner))
        device = self.device.path if self.device is not None else None
        end = self.path.server
        # Both start before either is waited for: most of it is starting Python.
        self.server = ServerProcess(end.namespace, end.address, scenario.cc, scenario.sndbuf, device)
        stack.enter_context(self.server.child)
        self.client = ClientProcess(self.path.client.namespace)
        stack.enter_context(self.client.child)
        self.server.wait()
        self.client.wait()
        if self.device is not None:
            self.device.admit(self.server.child.pid)
        for setting in SETTINGS:
            self._connect(setting)
        self._hold()

    def _tune(self) -> None:
        """Buffers that no burst fills, and no memory of earlier connections; in the lab's namespaces only."""
        room = min(_MAX_BUFFER, max(_MIN_BUFFER, _BUFFER_ROOM * max(self.scenario.bursts)))
        set_in_both(self.path, "net.ipv4.tcp_wmem", f"4096 {room} {room}")
        set_in_both(self.path, "net.ipv4.tcp_rmem", f"4096 {room} {room}")
        set_in_both(self.path, "net.ipv4.tcp_no_metrics_save", "1")

    def _connect(self, setting: Setting) -> None:
        self.client.connect(setting, self.path.server.address, self.scenario.patience_s(0))

    def _hold(self) -> None:
        """Raise CwndtraceError where the path is longer than asked for."""
        wanted, reached = self.scenario.link.rtt_ms, float("inf")
        own = 0.0 if self.scenario.link.rate is None else _PING_BITS * 1e3 / self.scenario.link.rate
        # Each of them may be held up where the machine is busy, which says nothing of the path.
        for _ in range(_PINGS):
            received, _, _ = self._exchange("off", wire.MIN_BURST, 0, "client")
            reached = min(reached, (received.last_ns - received.request_ns) / 1e6 - own)
            if reached <= _RTT_SLACK * wanted + _RTT_SLACK_MS:
                return
        raise CwndtraceError(
            f"an RTT of {wanted:g} ms can't be held here: {reached:.2f} ms was reached",
            f"ask for {reached:.1f} ms or more, or leave the machine more idle",
        )

    @property
    def port(self) -> int:
        """The server's port."""
        return PORT

    @property
    def expected_s(self) -> float:
        """About how long ``rows`` takes, seconds."""
        rtt = self.scenario.link.rtt_ms / 1e3
        each = [idle + 10 * rtt for _, idle in self.scenario.cells]
        return len(SETTINGS) * self.scenario.rounds * sum(each)

    def rows(self) -> Iterator[Measurement]:
        """Measure; a row as soon as it is there. What was measured stays in ``taken`` whatever happens.

        Raises CwndtraceError where the server or the client goes away.
        """
        for number in range(1, self.scenario.rounds + 1):
            for setting in SETTINGS:
                self._switch(setting)
                for burst, idle in self.scenario.cells:
                    row = self._measure(number, setting, burst, idle)
                    self.taken.append(row)
                    yield row

    def notes(self) -> list[str]:
        """Sentences on what was not as asked: a path that wasn't held, buffers that were the limit, a low window."""
        held = limits(self.taken)
        said = self.path.warnings() + held
        largest = max(self.scenario.bursts)
        if not held and not self._limited and any(row.cwnd_before * row.mss < largest for row in self.taken):
            low = min(row.cwnd_before for row in self.taken)
            said.append(
                f"the window didn't always hold the largest burst before idle time: {plural(low, 'segment')} at least"
            )
        return said

    @property
    def _limited(self) -> bool:
        return self.scenario.link.rate is not None or self.scenario.link.loss > 0

    def _switch(self, setting: Setting) -> None:
        set_in_both(self.path, IDLE_SYSCTL, _SYSCTL_VALUE[setting])

    def _exchange(
        self, name: Setting, size: int, idle_s: float, how: str
    ) -> tuple[Received, wire.Sent, dict[str, float]]:
        self._number += 1
        patience = self.scenario.patience_s(size)
        received = self.client.burst(name, self._number, size, idle_s, how, patience)
        sent, read = self.server.sent(self._number, patience)
        return received, sent, read

    def _warm(self, setting: Setting) -> None:
        """Bring the window to where it holds the largest burst, or, where the path won't let it, near its best."""
        largest = max(self.scenario.bursts)
        for _ in range(_CONNECTIONS):
            still = 0
            for tries in range(_WARM_TRIES):
                _, sent, _ = self._exchange(setting, largest, 0, "client")
                # It grows while it is used up, to about twice the burst: then each cell begins with the same window.
                holds = sent.end.snd_cwnd * sent.end.snd_mss
                still = 0 if sent.end.snd_cwnd > sent.before.snd_cwnd else still + 1
                if holds >= _WARM_ENOUGH * largest or (holds >= largest and still == 2):
                    return
                full = sent.first_bytes < largest and still == 2
                if full or (self._limited and tries >= _WARM_LIMITED):
                    return
            if holds >= largest:
                return
            # Something, such as a late packet, ended slow start early, and from there it would take minutes.
            self._connect(setting)

    def _measure(self, number: int, setting: Setting, burst: int, idle: float) -> Measurement:
        self._warm(setting)
        received, sent, read = self._exchange(setting, burst, idle, HOW[self.scenario.mode])
        begin = received.request_ns if self.scenario.mode == "reply" else received.stamp_ns
        return measured(
            round=number,
            setting=setting,
            idle_s=idle,
            burst_bytes=burst,
            latency_ms=(received.last_ns - begin) / 1e6,
            end_ns=received.last_ns,
            sent=sent,
            netns_ino=self.path.server.namespace.inode,
            read_ms=read.get("longest_ms", 0.0),
        )
