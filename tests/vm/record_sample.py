# SPDX-License-Identifier: Apache-2.0
"""Record the sample capture that unit tests, docs and notebooks use: tools/vm sample.

A service over a path of 200 ms answers with bursts after rests, with the sysctl on and off in turns, while a
process on the same machine reads a disk. Runs in the patched kernel, so that every reset comes from the tracepoint.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import threading
from pathlib import Path

import cwndtrace
from cwndtrace.capture.source import Filters
from cwndtrace.lab.demo import loop_device, read_at_random
from cwndtrace.lab.experiment import Lab
from cwndtrace.lab.link import Link
from cwndtrace.lab.measurement import frame
from cwndtrace.lab.recording import Recording
from cwndtrace.lab.scenario import Scenario

SCENARIO = Scenario(link=Link(rtt_ms=200), bursts=(100_000, 300_000, 1_000_000), rests=(1.0, 2.5), rounds=2)


def main(out: Path) -> None:
    """Record into ``out``: sample.cwnd and sample-measurements.parquet, replacing what is there."""
    stop = threading.Event()
    with tempfile.TemporaryDirectory() as folder, Lab(SCENARIO) as lab, loop_device(64 << 20) as device:
        capture = Path(folder) / "sample.cwnd"
        disk = threading.Thread(target=read_at_random, args=(device, stop), daemon=True)
        filters = Filters(netns=lab.path.server.namespace.inode)
        with Recording(capture, filters, cwndtrace.__version__) as recording:
            disk.start()
            for row in lab.rows():
                print(
                    row.setting,
                    row.burst_bytes,
                    f"{row.latency_ms:.0f} ms",
                    row.cwnd_before,
                    row.cwnd_after,
                    flush=True,
                )
            stop.set()
            disk.join()
        print(recording.trace())
        shutil.rmtree(out / "sample.cwnd", ignore_errors=True)
        shutil.copytree(capture, out / "sample.cwnd")
        frame(lab.taken).to_parquet(out / "sample-measurements.parquet")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
