# SPDX-License-Identifier: Apache-2.0
"""Compare recorded and predicted costs with the lab's clock over a grid of paths, bursts and idle times.

    sudo .venv/bin/python benchmarks/cost_grid.py --out grid            (about 15 minutes)
    .venv/bin/python benchmarks/cost_grid.py --read grid                (print the figures of a run again)

Each configuration (RTT, congestion control, rate) runs in a separate process with its own namespaces. A few run at a
time, because most of their time is idle.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pandas as pd

import cwndtrace
from cwndtrace.analysis import cost
from cwndtrace.capture.source import Filters
from cwndtrace.lab.experiment import Lab
from cwndtrace.lab.link import Link
from cwndtrace.lab.measurement import frame
from cwndtrace.lab.recording import Recording, beside_baseline
from cwndtrace.lab.scenario import Scenario

RTTS_MS = (20, 50, 100, 200)
CCS = ("cubic", "reno")
PATHS: dict[str, tuple[float | None, ...]] = {"all": (None, 100e6), "open": (None,), "limited": (100e6,)}
"""Rates of the bottleneck in bit/s."""
BURSTS = (15_000, 60_000, 300_000, 1_000_000, 4_000_000)
IDLE_RTO = (0.5, 1.5, 3.0, 5.0, 8.0)
# The least that the kernel adds to the round-trip time for an RTO (TCP_RTO_MIN), in seconds.
RTO_MIN_S = 0.2
AT_ONCE = 6


def one(rtt_ms: int, cc: str, rate: float | None, loss: float, rounds: int, out: Path) -> None:
    """Measure one configuration into ``out``."""
    out.mkdir(parents=True)
    rto_s = rtt_ms / 1e3 + RTO_MIN_S
    link = Link(rtt_ms=rtt_ms, rate=rate, loss=loss)
    scenario = replace(
        Scenario(), link=link, bursts=BURSTS, idle_times=tuple(r * rto_s for r in IDLE_RTO), rounds=rounds, cc=cc
    )
    with Lab(scenario) as lab:
        filters = Filters(netns=lab.path.server.namespace.inode)
        with Recording(out / "grid.cwnd", filters, cwndtrace.__version__):
            for _ in lab.rows():
                pass
        for note in lab.notes():
            print(f"RTT {rtt_ms} ms, {cc}, rate {rate}: {note}", file=sys.stderr)
        frame(lab.taken).assign(path_rtt_ms=rtt_ms, rate=rate or 0.0, cc=cc).to_parquet(out / "bursts.parquet")


def everything(rounds: int, rates: tuple[float | None, ...], loss: float, out: Path) -> None:
    """Measure the grid into ``out``."""
    waiting = list(enumerate(product(RTTS_MS, CCS, rates)))
    running: list[subprocess.Popen[bytes]] = []
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            number, (rtt, cc, rate) = waiting.pop(0)
            command = [sys.executable, __file__, "--one", f"{rtt},{cc},{rate or 0},{loss}", "--rounds", str(rounds)]
            running.append(subprocess.Popen([*command, "--out", str(out / f"{number:02}")]))
        if running[0].wait():
            sys.exit("a configuration failed; its lines above say why")
        running.pop(0)


def read(folder: Path) -> pd.DataFrame:
    """Return the bursts that began with a reset, with predicted and measured times, of all configurations of a run."""
    parts = sorted(folder.iterdir())
    rows = []
    for part in parts:
        trace = cwndtrace.load(part / "grid.cwnd")
        bursts = beside_baseline(pd.read_parquet(part / "bursts.parquet"), trace.resets)
        rows.append(cost.price(bursts, trace.recoveries))
    return pd.concat(rows, ignore_index=True)


def report(bursts: pd.DataFrame) -> None:
    """Print how far recorded and predicted costs are from those of the clock, for all bursts and by configuration."""
    pairs = bursts.assign(
        recorded_ms=bursts["first_cost_us"] / 1000,
        predicted_ms=bursts["predicted_us"] / 1000,
        measured_ms=bursts["latency_ms"] - bursts["baseline_ms"],
        rtt_ms=bursts["path_rtt_ms"],
    ).dropna(subset=["recorded_ms", "predicted_ms", "measured_ms"])
    print(
        f"left out: {len(bursts) - len(pairs)} of {len(bursts)} bursts, which have no like burst with the setting off"
    )
    dear = pairs["measured_ms"] >= pairs["rtt_ms"] / 2
    print(f"{len(pairs)} bursts began with a reset; {int(dear.sum())} of them took at least half a round trip longer")
    lossy = pairs["outcome"] == "loss"
    for side in ("recorded", "predicted"):
        error = pairs[f"{side}_ms"] - pairs["measured_ms"]
        within = error.abs() <= pairs["rtt_ms"]
        near = error.abs() <= (0.1 * pairs["measured_ms"]).clip(lower=10)
        relative = (error.abs() / pairs["measured_ms"])[dear]
        pairs[f"{side}_within"], pairs[f"{side}_error_rtts"] = within, error / pairs["rtt_ms"]
        print(
            f"{side}: within one round trip {100 * within.mean():.1f} % (of the {int(lossy.sum())} with a loss "
            f"{100 * within[lossy].mean():.1f} %), within 10 ms or 10 % {100 * near.mean():.1f} %; "
            f"median error of those {int(dear.sum())} {100 * relative.median():.1f} %"
        )
    keys = ["path_rtt_ms", "cc", "rate", "burst_bytes"]
    figures = pairs.groupby(keys).agg(
        bursts=("recorded_within", "size"),
        recorded_within=("recorded_within", "mean"),
        recorded_error_rtts=("recorded_error_rtts", "median"),
        predicted_within=("predicted_within", "mean"),
        predicted_error_rtts=("predicted_error_rtts", "median"),
    )
    print(figures.round(3).to_string())


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--read", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--paths", choices=PATHS, default="all", help="paths with a bottleneck, without, or both")
    parser.add_argument("--loss", type=float, default=0.0, help="the share of packets that the path loses")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        rtt, cc, rate, loss = arguments.one.split(",")
        one(int(rtt), cc, float(rate) or None, float(loss), arguments.rounds, arguments.out)
        return
    if arguments.read is None:
        everything(arguments.rounds, PATHS[arguments.paths], arguments.loss, arguments.out)
    report(read(arguments.read or arguments.out))


if __name__ == "__main__":
    main()
