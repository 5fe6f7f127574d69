# SPDX-License-Identifier: Apache-2.0
"""Tests of what resets cost real programs, by their clients' clock: with the sysctl on, minus with the sysctl off.

All programs run on one path, and each keeps one connection over it. A connection is idle for several RTOs before each
burst. Two captures of the same bursts are taken at once, with different probes.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from operator import sub
from pathlib import Path
from statistics import median
from typing import Final

import pandas as pd
import pytest

import cwndtrace
from cwndtrace.lab import path as paths
from cwndtrace.lab.link import Link
from cwndtrace.lab.namespaces import write_sysctl
from cwndtrace.tcp import IDLE_SYSCTL
from cwndtrace.trace import Trace
from tests.harness import programs, tcp
from tests.harness.command import running
from tests.harness.ends import Ends, Kept
from tests.harness.lab import PathEnd

pytestmark = pytest.mark.live

RTT_MS: Final = 100
IDLE_S: Final = 2.5
"""Idle time of eight retransmission timeouts of such a path (about 300 ms)."""
WARM_UPS: Final = 6
BURSTS: Final = 6
"""The number of bursts with the sysctl off, and again with the sysctl on."""
LOST_MS: Final = RTT_MS / 2
"""A client lost time if a burst took this much longer. Less may be the machine's doing."""
PROBES: Final = ("sendmsg", "tcp_probe")
NAMES: Final = [name for names in programs.PROGRAMS.values() for name in names]


@dataclass(frozen=True)
class Burst:
    """A burst: from when records belong to it, CLOCK_MONOTONIC when the client had all of it, and how long it took."""

    since_ns: int
    end_ns: int
    took_ms: float


@dataclass(repr=False)
class Measured:
    """All bursts by connection, in the order in which they were made, and a trace of them by each probe."""

    kept: dict[str, Kept] = field(default_factory=dict)
    off: dict[str, list[Burst]] = field(default_factory=dict)
    on: dict[str, list[Burst]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    traces: dict[str, Trace] = field(default_factory=dict)

    def of(self, name: str) -> Kept:
        """Return a connection, or skip the test if its program isn't installed."""
        if name in self.missing:
            pytest.skip(self.missing[name])
        return self.kept[name]

    def lost_ms(self, name: str) -> list[float]:
        """Return what each burst with the sysctl on took longer than with it off."""
        usual = median(b.took_ms for b in self.off[name])
        return [b.took_ms - usual for b in self.on[name]]

    def costs_ms(self, name: str, probe: str) -> list[float]:
        """Return the measured cost of each of these bursts."""
        return [float(rows["cost_us"].sum()) / 1000 for rows in self.resets(name, probe)]

    def resets(self, name: str, probe: str) -> list[pd.DataFrame]:
        """Return the resets of each burst with the sysctl on, and of the idle time before it, with ``cost_us``."""
        kept, trace = self.kept[name], self.traces[probe]
        rows = trace.verdicts
        mine = rows[(rows["sport"] == kept.sport) & (rows["dport"] == kept.dport) & (rows["reason"] == "idle")]
        costs = trace.recoveries[["skaddr", "reset_ts_ns", "cost_us"]].rename(columns={"reset_ts_ns": "ts_ns"})
        mine = mine.drop(columns="cost_us", errors="ignore").merge(costs, on=["skaddr", "ts_ns"], validate="1:1")
        return [mine[(mine["ts_ns"] > b.since_ns) & (mine["ts_ns"] <= b.end_ns)] for b in self.on[name]]


def make_bursts(kept: Kept, count: int, idle_s: float, delay_s: float) -> list[Burst]:
    """Make bursts, with idle time before each of them; the first comes after ``delay_s`` more."""
    bursts, since = [], time.monotonic_ns()
    time.sleep(delay_s)
    for _ in range(count):
        time.sleep(idle_s)
        start = time.monotonic_ns()
        kept.burst()
        end = time.monotonic_ns()
        bursts.append(Burst(since, end, (end - start) / 1e6))
        since = end
    return bursts


def make_all(kept: dict[str, Kept], count: int, idle_s: float) -> dict[str, list[Burst]]:
    """Make bursts on all connections side by side, spread over the idle time so that few coincide."""
    with ThreadPoolExecutor(len(kept)) as pool:
        delays = (number * idle_s / len(kept) for number in range(len(kept)))
        made = [pool.submit(make_bursts, k, count, idle_s, d) for k, d in zip(kept.values(), delays, strict=True)]
        return {name: future.result() for name, future in zip(kept, made, strict=True)}


def measure(folder: Path) -> Measured:
    """Start all programs, make their bursts with the sysctl off and then on, and trace both."""
    result = Measured()
    with ExitStack() as stack:
        path = stack.enter_context(paths.open_path(Link(rtt_ms=RTT_MS), force="relay"))
        near, far = PathEnd(path.server), PathEnd(path.client)
        setting = partial(write_sysctl, path.server.namespace, IDLE_SYSCTL)
        setting("0")
        for end in (path.server, path.client):
            write_sysctl(end.namespace, "net.ipv4.tcp_no_metrics_save", "1")
        tcp.run("ip", "-n", near.name, "route", "add", far.address, "dev", near.device, "congctl", "cubic")
        where = "--netns", near.name, "--no-block"
        runs = [stack.enter_context(running("-o", folder / f"{p}.cwnd", "--probe", p, *where)) for p in PROBES]
        with ExitStack() as started:
            ends = Ends(near, far, started)
            for start, names in programs.PROGRAMS.items():
                try:
                    result.kept |= zip(names, start(ends), strict=True)
                except programs.Missing as e:
                    result.missing |= dict.fromkeys(names, str(e))
            make_all(result.kept, WARM_UPS, 0)
            result.off = make_all(result.kept, BURSTS, IDLE_S)
            setting("1")
            result.on = make_all(result.kept, BURSTS, IDLE_S)
        for run in runs:
            code, _, errors = run.end()
            assert code == 0, errors
    result.traces = {probe: cwndtrace.load(folder / f"{probe}.cwnd") for probe in PROBES}
    return result


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """The bursts of all programs, which are made once."""
    return measure(tmp_path_factory.mktemp("captures"))


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("name", NAMES)
def test_the_measured_cost_is_what_a_client_lost(measured: Measured, name: str, probe: str) -> None:
    measured.of(name)
    lost, costs = measured.lost_ms(name), measured.costs_ms(name, probe)
    pairs = ", ".join(f"{cost:.0f} of {real:.0f}" for cost, real in zip(costs, lost, strict=True))
    print(f"\n{name}, {probe}: measured {pairs} ms")
    assert median(lost) > LOST_MS, "the resets cost this program nothing, so this measures nothing"
    assert abs(median(costs) - median(lost)) <= max(10, 0.1 * median(lost)), pairs


@pytest.mark.parametrize("probe", PROBES)
def test_few_costs_are_off_by_a_round_trip(measured: Measured, probe: str) -> None:
    if not measured.kept:
        pytest.skip("; ".join({*measured.missing.values()}))
    off = {name: list(map(sub, measured.costs_ms(name, probe), measured.lost_ms(name))) for name in measured.kept}
    far = [(name, round(ms)) for name, errors in off.items() for ms in errors if abs(ms) > RTT_MS]
    assert len(far) <= 0.05 * sum(map(len, off.values())), far


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("name", NAMES)
def test_no_burst_that_lost_time_is_called_harmless(measured: Measured, name: str, probe: str) -> None:
    measured.of(name)
    for real, rows in zip(measured.lost_ms(name), measured.resets(name, probe), strict=True):
        verdicts = set(rows["verdict"])
        assert real < LOST_MS or verdicts & {"harmful", "unknown"}, f"lost {real:.0f} ms: {verdicts}"
