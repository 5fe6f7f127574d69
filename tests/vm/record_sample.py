# SPDX-License-Identifier: Apache-2.0
"""Record the sample capture that unit tests, docs and notebooks use: tools/vm sample.

A service over a path with an RTT of 200 ms answers with small and large bursts after idle times, with the sysctl on and
off in turns. Then a service at 50 ms is idle because it reads from a slow disk before it answers. This runs in the
patched kernel, so every reset comes from the tracepoint.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

import cwndtrace
from cwndtrace.capture.source import Filters
from cwndtrace.lab.experiment import Lab
from cwndtrace.lab.link import Link
from cwndtrace.lab.measurement import frame
from cwndtrace.lab.recording import Recording
from cwndtrace.lab.scenario import Scenario
from tests.harness import tcp

SCENARIOS = (
    Scenario(link=Link(rtt_ms=200), bursts=(8_000, 100_000, 1_000_000), idle_times=(0.3, 1.0, 2.5), rounds=2),
    Scenario(link=Link(rtt_ms=50), bursts=(1_000_000,), idle_times=(1.1,), rounds=4, mode="disk"),
)


def close_connections(lab: Lab) -> None:
    """End both processes while the path is there, since a FIN that is lost with the path causes a reset by timeout."""
    for end in (lab.client, lab.server):
        end.child.close()
    for namespace in (lab.path.client.namespace, lab.path.server.namespace):
        ss = ("nsenter", f"--net={namespace.path}", "ss", "-tnH", "state", "connected", "exclude", "time-wait")
        tcp.until(lambda ss=ss: not subprocess.check_output(ss), 10, "the connections to close")  # type: ignore[misc]


def main(out: Path) -> None:
    """Record sample.cwnd and sample-measurements.parquet in ``out``, and replace earlier ones."""
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        capture = Path(folder) / "sample.cwnd"
        with Recording(capture, Filters(), cwndtrace.__version__) as recording:
            for scenario in SCENARIOS:
                with Lab(scenario) as lab:
                    for row in lab.rows():
                        cut = f"cwnd {row.cwnd_before} -> {row.cwnd_after}"
                        print(f"{row.setting} {row.burst_bytes} bytes {row.latency_ms:.0f} ms {cut}", flush=True)
                    close_connections(lab)
                    measured.append(frame(lab.taken).assign(mode=scenario.mode))
        print(recording.trace())
        shutil.rmtree(out / "sample.cwnd", ignore_errors=True)
        shutil.copytree(capture, out / "sample.cwnd")
        pd.concat(measured, ignore_index=True).to_parquet(out / "sample-measurements.parquet")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    # A capture stores its command, so the path of this checkout is kept out of it.
    sys.argv = ["tests/vm/record_sample.py", "tests/data"]
    main(target)
