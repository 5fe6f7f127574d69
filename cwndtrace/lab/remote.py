# SPDX-License-Identifier: Apache-2.0
"""The experiment over a real path: bursts from this host to a server that the user runs.

The bursts go from this host to the server, because the window that falls is the sender's, and only this host is traced.
A burst's latency runs from its first byte to the moment when this host knows that the last one has arrived: by the
answer of ``cwndtrace serve``, or, with a plain sink, by the last ACK. The host's sysctl is changed only if allowed.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Final, Self

from cwndtrace.errors import CwndtraceError, NotFound
from cwndtrace.format import plural
from cwndtrace.kernel.netns import read_sysctl
from cwndtrace.lab import cleanup, wire
from cwndtrace.lab.measurement import Measurement, Setting, limits, measured
from cwndtrace.lab.owner import Owner
from cwndtrace.lab.scenario import Scenario
from cwndtrace.tcp import IDLE_SYSCTL

_PATIENCE_S: Final = 60.0
_WARM_TRIES: Final = 12


class Remote:
    """A context manager of connections to HOST:PORT, one for each setting; ``taken`` keeps the measurements.

    ``plain`` means that the server is a sink that never answers. With ``allow_sysctl`` the setting of this process's
    own network namespace is switched between on and off, and restored on exit; without it, only the current setting is
    measured. Of the scenario, only bursts, idle times, rounds, congestion control and send buffer are used.
    """

    def __init__(
        self, host: str, port: int, scenario: Scenario, *, plain: bool = False, allow_sysctl: bool = False
    ) -> None:
        scenario.check()
        self.scenario = scenario
        self.plain = plain
        self.taken: list[Measurement] = []
        self._host, self._port, self._allow = host, port, allow_sysctl
        self._stack = ExitStack()
        self._socks: dict[Setting, socket.socket] = {}
        self._last_ns: dict[Setting, int] = {}
        self._number = 0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            if os.geteuid() == 0:
                cleanup.sweep()
            current: Setting = "on" if read_sysctl(IDLE_SYSCTL) else "off"
            self.settings: tuple[Setting, ...] = ("on", "off") if self._allow else (current,)
            if self._allow:
                value = "1" if current == "on" else "0"
                self._write = stack.enter_context(cleanup.host_sysctl(Owner.new(), value))
            for setting in self.settings:
                self._socks[setting] = stack.enter_context(self._connect())
                self._last_ns[setting] = time.monotonic_ns()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def _connect(self) -> socket.socket:
        try:
            sock = socket.create_connection((self._host, self._port), 10)
        except OSError as e:
            raise NotFound(
                f"there is no server at {self._host} port {self._port}: {e.strerror or e}",
                f"start one there: cwndtrace serve --host :: --port {self._port}",
            ) from e
        try:
            wire.set_up(sock, self.scenario.cc, self.scenario.sndbuf)
            if not self.plain:
                sock.sendall(wire.HELLO + wire.SINK)
                answer = wire.receive(sock, len(wire.HELLO))
                if answer != wire.HELLO:
                    raise CwndtraceError("the server isn't cwndtrace serve", "if it is a plain sink, add --plain")
        except OSError as e:
            sock.close()
            raise CwndtraceError(
                f"the server doesn't answer as cwndtrace serve does: {e.strerror or e}",
                "if it is a plain sink, add --plain",
            ) from e
        except BaseException:
            sock.close()
            raise
        sock.settimeout(_PATIENCE_S)
        return sock

    def rows(self) -> Iterator[Measurement]:
        """Run the measurements and yield each as soon as it is done. Raises CwndtraceError if the server ends."""
        netns_ino = cleanup.here()
        for number in range(1, self.scenario.rounds + 1):
            for setting in self.settings:
                if self._allow:
                    self._write("1" if setting == "on" else "0")
                for burst, idle in self.scenario.cells:
                    self._warm(setting)
                    latency_ms, end_ns, sent = self._burst(setting, burst, idle)
                    row = measured(
                        round=number,
                        setting=setting,
                        idle_s=idle,
                        burst_bytes=burst,
                        latency_ms=latency_ms,
                        end_ns=end_ns,
                        sent=sent,
                        netns_ino=netns_ino,
                    )
                    self.taken.append(row)
                    yield row

    def notes(self) -> list[str]:
        """Return sentences on the buffers that delayed bursts beside the congestion window."""
        return limits(self.taken)

    def _warm(self, setting: Setting) -> None:
        """Send the largest burst repeatedly until the window holds 1.9 of it, or hasn't grown in two bursts."""
        largest = max(self.scenario.bursts)
        still = 0
        for _ in range(_WARM_TRIES):
            _, _, sent = self._burst(setting, largest, 0)
            grown = sent.end.snd_cwnd > sent.before.snd_cwnd
            still = 0 if grown else still + 1
            if still == 2 or sent.end.snd_cwnd * sent.end.snd_mss >= 1.9 * largest:
                return

    def _burst(self, setting: Setting, size: int, idle_s: float) -> tuple[float, int, wire.Sent]:
        """Send a burst after the idle time; return its latency in ms, its end in ns, and the sender's figures."""
        sock = self._socks[setting]
        time.sleep(max(0.0, (self._last_ns[setting] - time.monotonic_ns()) / 1e9 + idle_s))
        self._number += 1
        try:
            sent = wire.send_burst(sock, wire.STAMP.pack(self._number, size), size)
            if not self.plain:
                wire.receive(sock, len(wire.DONE))
            elif not sent.acked:
                raise ConnectionResetError("it closed the connection or sent data, which a plain sink doesn't")
        except OSError as e:
            raise CwndtraceError(
                f"the server at {self._host} port {self._port} went away: {e.strerror or e}",
                f"the measurements so far are kept: {plural(len(self.taken), 'burst')}; "
                "start the server again to measure the rest",
            ) from e
        # With a plain sink the end is when polling noticed the last ACK: every 1/20 of the RTT, or every millisecond if
        # that is longer.
        end_ns = sent.end_ns if self.plain else time.monotonic_ns()
        self._last_ns[setting] = end_ns
        return (end_ns - sent.start_ns) / 1e6, end_ns, sent
