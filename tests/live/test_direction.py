# SPDX-License-Identifier: Apache-2.0
"""A trace at the receiving end of a transfer says that the sender is the other end; one at the sending end doesn't.

The transfer crosses a path of the lab. Each trace sees one end only.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

import cwndtrace
from cwndtrace.lab import path as paths
from cwndtrace.lab.link import Link
from cwndtrace.report import content
from tests.harness import tcp
from tests.harness.command import running
from tests.harness.lab import PathEnd
from tests.harness.tcp import until

pytestmark = pytest.mark.live

PIECE: Final = bytes(20_000)
PORT: Final = 9443


@pytest.fixture(scope="module")
def ends() -> Iterator[tuple[PathEnd, PathEnd]]:
    """The server's and the client's end of a path of 20 ms."""
    with paths.open_path(Link(rtt_ms=20), force="relay") as path:
        yield PathEnd(path.server), PathEnd(path.client)


@contextmanager
def download(ends: tuple[PathEnd, PathEnd], drain: tcp.Drain) -> Iterator[None]:
    """Send data from the server, which listens, to the client until the end of the context."""
    server, client = ends
    connection = tcp.connect(
        client, drain, address=server.address, to=server, from_server=True, device=client.device, port=PORT
    )
    stopped = threading.Event()

    def send() -> None:
        while not stopped.wait(0.1):
            connection.sock.send(PIECE)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        connection.close()


@pytest.mark.parametrize("as_json", [False, True])
def test_the_receiving_end_names_the_sender_and_what_to_run_there(
    ends: tuple[PathEnd, PathEnd], drain: tcp.Drain, tmp_path: Path, as_json: bool
) -> None:
    server, client = ends
    options = ["--json"] if as_json else []
    arguments: tuple[str | Path, ...] = ("-n", client.name, "--no-block", "-o", tmp_path / "a.cwnd", *options)
    with download(ends, drain), running(*arguments) as run:
        run.wait_for(re.compile("^warning: 1 of 1 connection mostly receives: "), 60)
        code, stdout, stderr = run.end()
    assert code == 0, stderr
    line = (
        f"1 of 1 connection mostly receives: its sender is at the other end ({server.address}, port {PORT}). "
        f"Its window is kept there: run `sudo cwndtrace run --port {PORT}` on {server.address}."
    )
    assert stderr.count("mostly receives") == 1
    assert line in stderr
    if as_json:
        assert {json.loads(row)["event"] for row in stdout.splitlines()} <= {"started", "workloads", "lost", "summary"}
    trace = cwndtrace.load(tmp_path / "a.cwnd")
    (row,) = trace.summary().to_dict("records")
    assert (row["daddr"], row["dport"]) == (server.address, PORT)
    assert row["mostly_receives"] is True
    assert row["received_bytes"] >= len(PIECE)
    assert line in content.report(trace).caveats["limits"]


def test_the_sending_end_says_nothing_of_it(ends: tuple[PathEnd, PathEnd], drain: tcp.Drain, tmp_path: Path) -> None:
    path = tmp_path / "a.cwnd"
    with download(ends, drain), running("-n", ends[0].name, "--no-block", "-o", path) as run:
        until(lambda: cwndtrace.load(path).summary()["snapshots"].sum() >= 2, 60, "a second snapshot")
        code, _, stderr = run.end()
    assert code == 0, stderr
    trace = cwndtrace.load(path)
    (row,) = trace.summary().to_dict("records")
    assert row["mostly_receives"] is False
    assert row["sent_bytes"] >= len(PIECE)
    assert "mostly" not in stderr + " ".join(content.report(trace).caveats["limits"])
