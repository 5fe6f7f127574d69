# SPDX-License-Identifier: Apache-2.0
"""``cwndtrace top`` with real traces: its own, and those of ``run``, which it watches as another user's process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

import cwndtrace
from tests.harness import tcp
from tests.harness.command import LONG_S, running, send_after_idle
from tests.harness.processes import children
from tests.harness.tcp import Connect, until
from tests.harness.top import next_table, watching
from tests.harness.users import BY_ROOT, BY_SUDO, GID, UID, assert_owned, assert_privileges

pytestmark = pytest.mark.live


def table(process: subprocess.Popen[str]) -> list[str]:
    """Return the lines of the next table."""
    lines = next_table(process)
    assert lines, process.communicate()
    return lines


def row_of(process: subprocess.Popen[str], port: int) -> str:
    """Return the row of a connection once it has a reset."""
    found: list[str] = []

    def there() -> bool:
        lines = table(process)
        begin = next(number for number, line in enumerate(lines) if line.startswith("CONNECTION"))
        at, rows = lines[begin].index("RESETS"), lines[begin + 1 :]
        found[:] = [row for row in rows if f":{port} " in row.split(">")[0] and row[at : at + 6].strip() == "1"]
        return bool(found)

    until(there, LONG_S, f"a row of port {port} with a reset")
    return found[0]


def folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("cwndtrace-top-*"))


@pytest.mark.parametrize(("caller", "uid", "gid"), [(BY_SUDO, UID, GID), (BY_ROOT, 0, 0)], ids=["sudo", "root"])
def test_top_traces_without_privileges_of_its_own(
    caller: tuple[str, ...], uid: int, gid: int, space: tcp.Space, connect: Connect
) -> None:
    before = folders()
    with watching("-n", space.name, before=caller) as process:
        table(process)
        assert_privileges(process.pid, uid, gid, frozenset())
        (folder,) = folders() - before
        connection = connect()
        send_after_idle(connection)
        row = row_of(process, connection.sport)
        assert f"[{os.getpid()}]" in row
        assert_owned(folder, uid, gid)
        (capture,) = folder.iterdir()
        # It is a window, and doesn't fill the disk.
        assert json.loads((capture / "meta.json").read_text(encoding="utf-8"))["schema"] == 3
        traces = children(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(LONG_S) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    assert not [pid for pid in traces if Path(f"/proc/{pid}").exists()]
    assert folders() <= before


def test_a_trace_of_top_ends_with_it(space: tcp.Space) -> None:
    before = folders()
    with watching("-n", space.name, before=BY_SUDO) as process:
        table(process)
        traces = children(process.pid)
        assert traces
        process.kill()
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in traces), LONG_S, "the trace to end")
    for folder in folders() - before:  # nobody was left to delete it
        assert cwndtrace.load(folder / "top.cwnd").status == "complete"
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()


def test_a_capture_that_was_asked_for_stays(space: tcp.Space, connect: Connect, home: Path) -> None:
    with watching("-n", space.name, "-o", home / "a.cwnd", "-d", "1s", before=BY_SUDO) as process:
        table(process)
        send_after_idle(connect())
        assert process.wait(LONG_S) == 0
    assert_owned(home / "a.cwnd", UID, GID)
    assert cwndtrace.load(home / "a.cwnd").status == "complete"


def test_an_error_of_the_trace_is_printed(home: Path) -> None:
    before = folders()
    with watching("-n", "no-such-namespace", before=BY_SUDO) as process:
        stdout, stderr = process.communicate(timeout=LONG_S)
    assert (process.returncode, stdout) != (0, "")
    assert stderr.startswith("cwndtrace: ")
    assert "no-such-namespace" in stderr
    assert folders() <= before
    assert not list(home.iterdir())


@pytest.mark.parametrize(("caller", "uid", "gid"), [(BY_SUDO, UID, GID), (BY_ROOT, 0, 0)], ids=["sudo", "root"])
def test_top_watches_a_trace_without_privileges(
    caller: tuple[str, ...], uid: int, gid: int, space: tcp.Space, connect: Connect, home: Path, tmp_path: Path
) -> None:
    capture = (home if uid else tmp_path) / "a.cwnd"
    with running("-n", space.name, "-o", capture, before=caller) as run, watching(capture, before=caller) as process:
        table(process)
        assert_privileges(process.pid, uid, gid, frozenset())
        connections = [connect(), connect()]
        for connection in connections:
            send_after_idle(connection)
            row_of(process, connection.sport)
        assert run.end()[0] == 0
        assert process.wait(LONG_S) == 0
    assert {each.sport for each in connections} <= set(cwndtrace.load(capture).resets["sport"])
