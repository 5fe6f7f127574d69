# SPDX-License-Identifier: Apache-2.0
"""Check that the installed ``cwndtrace run`` records exactly the resets that TCP_INFO shows.

    python -m tests.vm.known_resets [RESETS]

This runs in the Vagrant VM, as root. A connection in a separate network namespace is idle RESETS times, and after each
reset sends once more without idle time. The exit code is 1 if the records and the resets differ.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

from tests.harness import tcp

IDLE_S = 0.8


def trace(space: tcp.Space, connection: tcp.TcpConnection, resets: int) -> list[dict[str, Any]]:
    """Trace while the connection is idle ``resets`` times, and return the reset records."""
    command = ["cwndtrace", "run", "--json", "--no-block", "--netns", space.name, "--port", str(connection.sport)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/tmp") as tracer:
        assert tracer.stderr is not None
        try:
            stderr = ""
            for line in tracer.stderr:
                stderr += line
                if line.startswith("Tracing "):
                    break
            else:
                sys.exit(f"cwndtrace run ended early: {stderr}")
            for _ in range(resets):
                connection.grow()
                time.sleep(IDLE_S)
                connection.send()
                connection.send()
        finally:
            tracer.send_signal(signal.SIGINT)
            out, _ = tracer.communicate(timeout=120)
    return [record for record in map(json.loads, out.splitlines()) if record["event"] == "cwnd_reset"]


def main(resets: int) -> int:
    """Compare the resets with their records, print both, and return the exit code."""
    space, drain = tcp.Space(f"{tcp.PREFIX}{os.getpid()}-known"), tcp.Drain()
    try:
        connection = tcp.connect(space, drain)
        connection.grow()
        connection.sends.clear()
        connection.blind.clear()
        records = trace(space, connection, resets)
        known = [send for send in connection.sends if send.reason]
        expected = [(send.reason, send.before.cwnd, send.after.cwnd) for send in known]
        connection.close()
    finally:
        drain.close()
        space.close()
    # On a machine that stalls, a connection may be idle where no TCP_INFO is read.
    seen = [r for r in records if not any(start <= r["ts_ns"] <= end for start, end in connection.blind)]
    traced = [(r["reason"], r["cwnd_before"], r["cwnd_after"]) for r in seen]
    probes = {r["probe"] for r in records}
    print(f"TCP_INFO:  {expected}\ncwndtrace: {traced} by {', '.join(sorted(probes))}")
    fine = traced == expected and len(expected) >= resets
    verdict = "exact" if fine else "NOT THE SAME"
    print(f"{len(traced)} resets traced, {len(expected)} known of at least {resets}: {verdict}")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 5))
