# SPDX-License-Identifier: Apache-2.0
"""The description of an experiment: its path, bursts, idle times and number of rounds, and the checks of these."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Final, Literal

from cwndtrace.errors import UsageError
from cwndtrace.format import plural
from cwndtrace.lab import wire
from cwndtrace.lab.link import Link

Mode = Literal["reply", "push", "disk"]
HOW: Final[dict[Mode, str]] = {"reply": "client", "push": "timer", "disk": "disk"}
"""The value of ``wire.IDLE_MODES`` for each mode."""
MAX_ROUNDS: Final = 1000


@dataclass(frozen=True)
class Scenario:
    """An A/B experiment: each round measures, with each setting, each burst (bytes) after each idle time (seconds).

    ``mode`` is ``reply`` (the client is idle, then sends a request), ``push`` (the server waits on a timer, then sends)
    or ``disk`` (the server gets a request, reads from a slow device for the idle time, then answers). ``sndbuf`` is in
    bytes; None means one that no burst fills.
    """

    link: Link = field(default_factory=lambda: Link(rtt_ms=100))
    bursts: tuple[int, ...] = (100_000, 1_000_000)
    idle_times: tuple[float, ...] = (1.0,)
    rounds: int = 5
    cc: str = "cubic"
    family: Literal[4, 6] = 4
    mode: Mode = "reply"
    sndbuf: int | None = None

    def changed(self, **values: Any) -> Scenario:
        """Return a copy with other values for fields of the scenario or its link; None leaves a field as it is."""
        given = {name: value for name, value in values.items() if value is not None}
        link = {f.name: given.pop(f.name) for f in fields(Link) if f.name in given}
        return replace(self, link=replace(self.link, **link), **given)

    def check(self) -> None:
        """Raise UsageError for a value that is out of range."""
        self.link.check()
        if not self.bursts or not self.idle_times:
            raise UsageError("there is nothing to measure", "give at least one --burst and one --idle")
        for burst in self.bursts:
            if not wire.MIN_BURST <= burst <= wire.MAX_BURST:
                raise UsageError(
                    f"a burst of {plural(burst, 'byte')} is out of range",
                    f"give {wire.MIN_BURST} bytes to {wire.MAX_BURST >> 20} MiB",
                )
        for idle in self.idle_times:
            if not 0 <= idle <= wire.MAX_IDLE_S:
                raise UsageError(f"an idle time of {idle:g} s is out of range", f"give 0 to {wire.MAX_IDLE_S:g} s")
        if not 1 <= self.rounds <= MAX_ROUNDS:
            raise UsageError(f"{plural(self.rounds, 'round')} are out of range", f"give 1 to {MAX_ROUNDS}")
        if self.family not in (4, 6):
            raise UsageError(f"there is no address family {self.family}", "give 4 or 6")
        if not self.cc.isidentifier():
            raise UsageError(f"{self.cc!r} is no name of a congestion control", f"this kernel has: {wire.available()}")
        if self.sndbuf is not None and not 4608 <= self.sndbuf <= 1 << 30:
            raise UsageError(
                f"a send buffer of {plural(self.sndbuf, 'byte')} is out of range", "give 4608 bytes to 1 GiB"
            )

    @property
    def cells(self) -> list[tuple[int, float]]:
        """The pairs of (burst, idle time), in the order in which a round measures them."""
        return [(burst, idle) for idle in self.idle_times for burst in self.bursts]

    def patience_s(self, burst: int) -> float:
        """Return how long a burst may take, in seconds, before the path counts as dead."""
        wire_s = burst * 8 / self.link.rate if self.link.rate is not None else 0.0
        return 30 + 100 * self.link.rtt_ms / 1e3 + 4 * wire_s


PRESETS: Final[dict[str, Scenario]] = {
    "quick": Scenario(link=Link(rtt_ms=50), bursts=(100_000, 1_000_000), idle_times=(0.8,), rounds=4),
    "blog": Scenario(
        link=Link(rtt_ms=200),
        bursts=(100_000, 300_000, 1_000_000, 2_000_000),
        idle_times=(0.5, 1.0, 2.0, 5.0),
        rounds=3,
    ),
    "disk": Scenario(link=Link(rtt_ms=50), bursts=(1_000_000,), idle_times=(1.1,), rounds=4, mode="disk"),
}
"""quick takes less than half a minute. blog is a service over a long path, and takes several minutes. In disk, the
server is idle because it reads a disk."""
