# SPDX-License-Identifier: Apache-2.0
"""Record raw bytes of a real trace for the unit tests: ``sudo python -m tests.record`` writes tests/data/trace.raw.

Four cubic connections are idle six times each, and this process reads and writes a loop device. Only this process is
traced. A recording is needed again when bpf/events.h changes; the tests fail with a message that says so.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Final

from cwndtrace.capture.live import Kernel
from cwndtrace.capture.source import Filters, RawRecords
from tests.harness import disk, tcp
from tests.harness.replay import record

FILE: Final = Path(__file__).parent / "data" / "trace.raw"
CONNECTIONS: Final = 4
BURSTS: Final = 6
BLOCKS: Final = 150


def work(space: tcp.Space, drain: tcp.Drain, device: disk.Disk) -> None:
    """Do the work that is recorded: bursts after idle time, then block I/O."""
    connections = [tcp.connect(space, drain) for _ in range(CONNECTIONS)]
    for _ in range(BURSTS):
        for connection in connections:
            connection.grow()
        time.sleep(0.5)
        for connection in connections:
            connection.send()
    device.read(*range(BLOCKS))
    device.write(*range(BLOCKS))
    for connection in connections:
        connection.close()


def main() -> None:
    """Trace ``work`` and write its raw records as they arrived."""
    reads: list[RawRecords] = []
    space, drain = tcp.Space(f"cwt-record-{os.getpid()}"), tcp.Drain()
    try:
        with disk.loop() as device:
            kernel = Kernel(Filters(pid=os.getpid()))
            worker = threading.Thread(target=work, args=(space, drain, device))
            worker.start()
            while worker.is_alive():
                reads += kernel.poll(0.1)
            reads += kernel.stop()
            FILE.parent.mkdir(exist_ok=True)
            record(FILE, kernel, reads)
            kernel.close()
    finally:
        drain.close()
        space.close()
    print(f"{FILE}: {FILE.stat().st_size:,} bytes, {len(reads)} reads")


if __name__ == "__main__":
    main()
