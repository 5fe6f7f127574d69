# SPDX-License-Identifier: Apache-2.0
"""A realistic experiment: latencies that were measured over a path of 100 ms, with some noise, and their records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd

from cwndtrace.lab import statistics
from cwndtrace.lab.measurement import Measurement, frame
from cwndtrace.records import layout
from tests.unit import frames

RTT_MS, RTO_MS, MSS, FULL = 100.0, 308.0, 1448, 2796
ON_MS = {
    100_000: {0.15: 102.0, 1.0: 101.0, 2.0: 202.0},
    300_000: {0.15: 103.0, 1.0: 104.0, 2.0: 306.0},
    1_000_000: {0.15: 108.0, 1.0: 210.0, 2.0: 410.0},
    2_000_000: {0.15: 111.0, 1.0: 315.0, 2.0: 616.0},
}
"""Latency in ms with the setting on, by burst in bytes and idle time in s."""
OFF_MS = {100_000: 102.0, 300_000: 104.0, 1_000_000: 108.0, 2_000_000: 112.0}
IDLE_S = (0.15, 1.0, 2.0)


@dataclass(frozen=True)
class Experiment:
    """The results of an experiment: its measurements, and for each setting the resets and the observed windows."""

    measured: pd.DataFrame
    resets: dict[str, pd.DataFrame]
    observed: dict[str, pd.DataFrame]

    @property
    def summary(self) -> pd.DataFrame:
        """Summarise the measurements as ``reproduce`` does."""
        return statistics.summarise(self.measured)

    @property
    def pairs(self) -> pd.DataFrame:
        """Return the predicted and the measured cost of each burst that followed a reset."""
        rng = np.random.default_rng(5)
        on = self.measured[
            (self.measured["setting"] == "on") & (self.measured["cwnd_after"] < self.measured["cwnd_before"])
        ]
        cost = on["latency_ms"] - on["burst_bytes"].map(OFF_MS)
        trips = (cost / RTT_MS).round() + rng.choice([0, 0, 0, 0, 0, 0, 0, 1], len(on))
        return pd.DataFrame(
            {
                "burst_bytes": on["burst_bytes"],
                "idle_s": on["idle_s"],
                "ca_name": "cubic",
                "rtt_ms": on["srtt_ms"],
                "predicted_ms": trips * on["srtt_ms"],
                "recorded_ms": trips * on["srtt_ms"] + 1,
                "measured_ms": cost,
            }
        ).reset_index(drop=True)


def halved(before: int, idle_ms: float, initial: int = 10) -> int:
    """Return the window after idle time, by the loop of the kernel's tcp_cwnd_restart()."""
    delta, cwnd, restart = idle_ms - RTO_MS, before, min(initial, before)
    while delta > 0 and cwnd > restart:
        cwnd >>= 1
        delta -= RTO_MS
    return max(cwnd, restart)


def experiment(
    *, rounds: int = 5, bursts: tuple[int, ...] = tuple(ON_MS), idle_times: tuple[float, ...] = IDLE_S, seed: int = 3
) -> Experiment:
    """Make an experiment whose rounds send each burst after each idle time, with the setting on and then off."""
    rng = np.random.default_rng(seed)
    rows: list[Measurement] = []
    records: list[layout.Records] = []
    windows: dict[str, list[tuple[int, int]]] = {"on": [], "off": []}
    now = frames.MONO + frames.SECOND
    for number in range(1, rounds + 1):
        for setting in ("on", "off"):
            for idle_s in idle_times:
                for burst in bursts:
                    start = now + int(idle_s * 1e9)
                    idle_ms = idle_s * 1e3 + float(rng.uniform(0, 12))
                    before = FULL + int(rng.integers(-60, 60)) if setting == "on" else FULL
                    after = halved(before, idle_ms) if setting == "on" else before
                    known = ON_MS[min(ON_MS, key=lambda size: abs(size - burst))]
                    on_ms = known[min(known, key=lambda length: abs(length - idle_s))]
                    base = on_ms if setting == "on" else OFF_MS.get(burst, 112.0)
                    latency = base + float(rng.gamma(1.5, 1.6))
                    end = start + int(latency * 1e6)
                    last = before
                    if after < before:
                        records.append(frames.reset(
                            idle_us=int(idle_ms * 1e3), cwnd_before=before, cwnd_after=after, rto_us=int(RTO_MS * 1e3),
                            srtt_us=100_400, ts_ns=start + 60_000, sport=5001,
                        ))  # fmt: skip
                        trips = round(latency / RTT_MS)
                        windows["on"] += [(start + int(n * 0.98e8), min(before, after << n)) for n in range(1, trips)]
                        last = min(before, after << trips)
                    rows.append(Measurement(
                        round=number, setting="on" if setting == "on" else "off", idle_s=idle_s, burst_bytes=burst,
                        latency_ms=latency, start_ns=start, end_ns=end,
                        acked_ns=end + int(RTT_MS / 2 * 1e6), idle_ms=idle_ms, cwnd_before=before,
                        cwnd_after=after, cwnd_end=last, ssthresh_before=2**31 - 1, ssthresh_after=2**31 - 1,
                        srtt_ms=100.4, min_rtt_ms=RTT_MS, rto_ms=RTO_MS, mss=MSS, snd_wnd=8_000_000, sndbuf=16_000_000,
                        taken_at_once=burst,
                        rwnd_limited_ms=0.0, sndbuf_limited_ms=0.0, retrans=0, read_ms=0.0,
                        sock_cookie=33 if setting == "on" else 34, netns_ino=frames.NETNS, sport=5001,
                    ))  # fmt: skip
                    now = end + (500_000_000 if after < before else 110_000_000)
    observed = {s: pd.DataFrame(points, columns=["ts_ns", "cwnd"]).astype("int64") for s, points in windows.items()}
    resets = {on: frames.pandas(frames.table("cwnd_reset", *of)) for on, of in (("on", records), ("off", []))}
    return Experiment(frame(rows), resets, observed)


def resets(*rows: dict[str, Any]) -> pd.DataFrame:
    """Return resets as a Trace has them, each with these values."""
    return frames.pandas(frames.table("cwnd_reset", *(frames.reset(**row) for row in rows)))


STORY: Final = experiment()
NOTHING: Final = experiment(rounds=0)
