# SPDX-License-Identifier: Apache-2.0
"""run does what its options say, on a source that the test makes, and leaves a whole capture."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

import cwndtrace
from cwndtrace import privileges
from cwndtrace.capture import priority, target
from cwndtrace.capture.session import Session
from cwndtrace.capture.source import Filters
from cwndtrace.cli import main, preflight, run, user
from cwndtrace.errors import KernelLacks
from cwndtrace.kernel import host
from cwndtrace.store import open_capture
from cwndtrace.store.layout import WHOLE_SCHEMA, WINDOW_SCHEMA
from tests.unit import frames
from tests.unit.fake_source import FakeSource, session_of

Output = pytest.CaptureFixture[str]


class RunOnSource:
    """What run opened, and with which privileges it went on."""

    def __init__(self) -> None:
        reads = (("cwnd_reset", frames.reset(2)), ("block_io", frames.block(3)), ("cwnd_reset", frames.reset(4)))
        self.source = FakeSource(*([(event, record.tobytes())] for event, record in reads))
        self.filters: Filters | None = None
        self.options: dict[str, Any] = {}
        self.dropped: list[tuple[object, ...]] = []
        self.session: Session | None = None

    def open(self, filters: Filters, **options: Any) -> Session:
        self.filters, self.options = filters, options
        self.session = session_of(self.source)
        return self.session

    def drop(self, *what: object) -> None:
        assert self.session is not None
        self.dropped.append((self.session.source.exhausted(), *what))


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RunOnSource:
    made = RunOnSource()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(target, "need_root", lambda _: None)
    monkeypatch.setattr(host, "enter_cgroup_namespace", lambda: True)
    monkeypatch.setattr(preflight, "container", lambda: [("it sees no processes but its own", "start it otherwise")])
    monkeypatch.setattr(user, "invoking", lambda: None)
    monkeypatch.setattr(priority, "raised", contextlib.nullcontext)
    monkeypatch.setattr(privileges, "drop", made.drop)
    monkeypatch.setattr(privileges, "still_privileged", lambda _: [])
    monkeypatch.setattr(run, "open_session", made.open)
    return made


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["run", "-o", "a.cwnd", *words], prog_name="cwndtrace")
    return int(end.value.code or 0)


def test_a_trace_is_printed_summed_up_and_kept(traced: RunOnSource, capfd: Output) -> None:
    assert call() == 0
    stdout, stderr = capfd.readouterr()
    assert [line.split()[1] for line in stdout.splitlines()[:3]] == ["REASON", "idle", "idle"]
    last = stdout.splitlines()[-1]
    assert last == "kept 2 resets, 1 block I/O; lost 0 resets, 0 block I/Os; 0 restarts left the window as it was"
    lines = stderr.splitlines()
    assert lines[0] == "Tracing this machine: idle by sendmsg; rto_loss, app_limited can't be seen on this kernel."
    assert lines[1] == "warning: it sees no processes but its own (start it otherwise)"
    assert lines[3] == "The capture is in a.cwnd. These commands read it:"
    assert traced.filters == Filters()
    announce = traced.options.pop("announce")
    assert traced.options == {"probe": None, "block": None, "privsep": True, "cmdline": True}
    assert announce is run._announce
    # Privileges are dropped before the first record.
    assert traced.dropped == [(False, None, frozenset())]
    trace = cwndtrace.load("a.cwnd")
    assert (trace.status, len(trace.resets), len(trace.block_io)) == ("complete", 2, 1)
    assert trace.meta["schema"] == WHOLE_SCHEMA
    assert traced.session is not None
    assert traced.session.names.repeat_s == math.inf
    assert traced.source.closed


@pytest.mark.usefixtures("traced")
def test_json_is_all_that_is_on_stdout(capfd: Output) -> None:
    assert call("--json", "--block", "--quiet") == 0
    stdout, stderr = capfd.readouterr()
    rows = [json.loads(line) for line in stdout.splitlines()]
    assert [row["event"] for row in rows] == ["started", "cwnd_reset", "block_io", "cwnd_reset", "summary"]
    assert (rows[0]["capture"], rows[0]["traced"]) == ("a.cwnd", "this machine")
    assert rows[-1]["kept"] == {"cwnd_reset": 2, "block_io": 1}
    assert stderr == ""


def test_options_reach_what_they_are_for(traced: RunOnSource, capfd: Output) -> None:
    words = ("-P", "443", "-4", "--min-idle", "500ms", "--probe", "sendmsg", "--no-block", "--no-cmdline")
    assert call(*words, "--keep", "10m", "--stay-root", "--verbose") == 0
    assert traced.filters == Filters(port=443, family=2, min_idle_us=500_000)
    del traced.options["announce"]
    assert traced.options == {"probe": "sendmsg", "block": False, "privsep": False, "cmdline": False}
    # Nothing needs privileges after the trace, and the summary is made without them.
    assert traced.dropped == [(True, None)]
    assert open_capture("a.cwnd").meta["schema"] == WINDOW_SCHEMA
    assert traced.session is not None
    assert traced.session.names.repeat_s == 150
    stdout, stderr = capfd.readouterr()
    assert " block_io " not in stdout
    lines = stderr.splitlines()
    assert lines[0].startswith("Tracing port 443: idle by sendmsg; ")
    assert lines[1] == "  block I/O: from block_io_start on"
    assert lines[2].startswith("  the thread that empties the buffers runs at nice ")
    assert lines[3] == "  idle: not fentry: refused"


def test_a_place_that_is_taken_is_refused_before_anything_is_attached(
    traced: RunOnSource, tmp_path: Path, capfd: Output
) -> None:
    (tmp_path / "a.cwnd").mkdir()
    assert call() == 1
    assert capfd.readouterr().err.startswith("cwndtrace: a.cwnd exists already.")
    assert traced.session is None


def test_a_trace_that_breaks_leaves_a_capture_that_says_so(
    traced: RunOnSource, monkeypatch: pytest.MonkeyPatch, capfd: Output
) -> None:
    def fail(_: float) -> list[Any]:
        raise KernelLacks("the ring is gone", "boot another kernel")

    monkeypatch.setattr(traced.source, "poll", fail)
    assert call() == 77
    assert "cwndtrace: the ring is gone\n  boot another kernel\n" in capfd.readouterr().err
    assert open_capture("a.cwnd").status == "failed"
    assert traced.source.closed
