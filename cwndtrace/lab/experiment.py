# SPDX-License-Identifier: Apache-2.0
"""The A/B experiment: the same bursts with ``tcp_slow_start_after_idle`` on and off, in turns, in the lab's namespaces.

Each setting has its own long-lived connection, and the sysctl is switched just before that connection's turn. With one
connection for both, the changes to cwnd and ssthresh under one setting would affect the measurements of the other.
Before each measured burst, the connection sends until its window holds the largest burst. Each cell therefore starts
from the same state, and the measured difference comes from the idle time and the setting.
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
# A window that doesn't hold the largest burst after this many bursts is given up for a new connection, at most twice.
_WARM_TRIES: Final = 14
_WARM_ENOUGH: Final = 1.9
_CONNECTIONS: Final = 3
# On a path with losses or a rate the window may never hold the largest burst, so this many bursts are enough.
_WARM_LIMITED: Final = 6
_PINGS: Final = 50
# The lowest measured RTT may exceed the scenario's by this factor, and by the time it takes to wake three processes.
_RTT_SLACK: Final = 1.1
_RTT_SLACK_MS: Final = 0.2
# An upper bound of the bits, with headers, that a ping and its answer put on the line.
_PING_BITS: Final = 3200


class Lab:
    """A context manager that sets up a scenario's namespaces, path, server and client, and removes them on exit.

    It sends the bursts from ``path.server.namespace``, so a tracer can be attached there before ``rows`` is called.
    On entry it also removes what an earlier, killed run left. Enter and leave it on the same thread.
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
        self._set_sysctls()
        if scenario.mode == "disk":
            self.device = stack.enter_context(slow_device(owner))
        device = self.device.path if self.device is not None else None
        end = self.path.server
        # The two processes start at the same time, because most of a start is that of Python.
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
        self._check_rtt()

    def _set_sysctls(self) -> None:
        """Set buffers that no burst fills, and disable the metrics cache of earlier connections, in both namespaces."""
        room = min(_MAX_BUFFER, max(_MIN_BUFFER, _BUFFER_ROOM * max(self.scenario.bursts)))
        set_in_both(self.path, "net.ipv4.tcp_wmem", f"4096 {room} {room}")
        set_in_both(self.path, "net.ipv4.tcp_rmem", f"4096 {room} {room}")
        set_in_both(self.path, "net.ipv4.tcp_no_metrics_save", "1")

    def _connect(self, setting: Setting) -> None:
        self.client.connect(setting, self.path.server.address, self.scenario.patience_s(0))

    def _check_rtt(self) -> None:
        """Raise CwndtraceError if the path's RTT is longer than the scenario's."""
        wanted, reached = self.scenario.link.rtt_ms, float("inf")
        own = 0.0 if self.scenario.link.rate is None else _PING_BITS * 1e3 / self.scenario.link.rate
        # A busy machine may delay any single ping, so the lowest RTT counts.
        for _ in range(_PINGS):
            received, _, _ = self._exchange("off", wire.MIN_BURST, 0, "client")
            reached = min(reached, (received.last_ns - received.request_ns) / 1e6 - own)
            if reached <= _RTT_SLACK * wanted + _RTT_SLACK_MS:
                return
        raise CwndtraceError(
            f"an RTT of {wanted:g} ms can't be held here: the lowest measured RTT is {reached:.2f} ms",
            f"ask for {reached:.1f} ms or more, or reduce the load on this machine",
        )

    @property
    def port(self) -> int:
        """The port that the server listens on."""
        return PORT

    @property
    def expected_s(self) -> float:
        """The estimated time that ``rows`` takes, in seconds."""
        rtt = self.scenario.link.rtt_ms / 1e3
        cell_times = [idle + 10 * rtt for _, idle in self.scenario.cells]
        return len(SETTINGS) * self.scenario.rounds * sum(cell_times)

    def rows(self) -> Iterator[Measurement]:
        """Run the measurements and yield each as soon as it is done; ``taken`` keeps them even after an error.

        Raises CwndtraceError if the server or the client ends.
        """
        for number in range(1, self.scenario.rounds + 1):
            for setting in SETTINGS:
                self._switch(setting)
                for burst, idle in self.scenario.cells:
                    row = self._measure(number, setting, burst, idle)
                    self.taken.append(row)
                    yield row

    def notes(self) -> list[str]:
        """Return sentences on deviations from the scenario: a wrong delay, buffers that limit bursts, a low window."""
        buffer_limits = limits(self.taken)
        sentences = self.path.warnings() + buffer_limits
        largest = max(self.scenario.bursts)
        if not buffer_limits and not self._limited and any(row.cwnd_before * row.mss < largest for row in self.taken):
            low = min(row.cwnd_before for row in self.taken)
            sentences.append(
                "the congestion window didn't always hold the largest burst before the idle time: the smallest was"
                f" {plural(low, 'segment')}"
            )
        return sentences

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
        """Send bursts until the window holds the largest one, or is near the largest size that the path permits."""
        largest = max(self.scenario.bursts)
        for _ in range(_CONNECTIONS):
            still = 0  # bursts in a row in which the window didn't grow
            for tries in range(_WARM_TRIES):
                _, sent, _ = self._exchange(setting, largest, 0, "client")
                # A window that is used up grows to about twice the burst, so each cell begins with the same window.
                holds = sent.end.snd_cwnd * sent.end.snd_mss
                still = 0 if sent.end.snd_cwnd > sent.before.snd_cwnd else still + 1
                if holds >= _WARM_ENOUGH * largest or (holds >= largest and still == 2):
                    return
                full = sent.first_bytes < largest and still == 2
                if full or (self._limited and tries >= _WARM_LIMITED):
                    return
            if holds >= largest:
                return
            # An event such as a late packet ended slow start early; in congestion avoidance, growth would take minutes.
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
