# SPDX-License-Identifier: Apache-2.0
"""What each command prints is what somebody has reviewed, at 80 and at 140 columns.

``pytest --renew-texts tests/unit/test_texts.py`` writes the texts anew and shows what changed.
"""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import pytest

import cwndtrace
from cwndtrace.capture import clocks, session
from cwndtrace.cli import COMMANDS, doctor, main, reproduce
from cwndtrace.lab.statistics import summarise
from tests.unit import frames, playing, reviewed
from tests.unit.fake_source import FakeSource
from tests.unit.terminal import terminal

DATA = Path(__file__).parents[1] / "data"
WIDTHS = pytest.mark.parametrize("columns", [80, 140])


once = functools.cache(cwndtrace.load)
"""Each capture is in the current folder of each test, and is analysed once for all."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with two captures, in a time zone that isn't UTC."""
    shutil.copytree(DATA / "sample.cwnd", tmp_path / "a.cwnd")
    shutil.copytree(DATA / "stale-send-buffer.cwnd", tmp_path / "b.cwnd")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cwndtrace, "load", once)
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    time.tzset()
    yield tmp_path
    monkeypatch.undo()
    time.tzset()


def printed(columns: int, capsys: pytest.CaptureFixture[str], call: Callable[[], object]) -> str:
    """Return what is printed to a terminal of this width, then what went to stderr and the exit code."""
    code = 0
    with terminal(columns) as lines:
        try:
            call()
        except SystemExit as end:
            code = int(end.code or 0)
    errors = click.unstyle(capsys.readouterr().err)
    assert all(line.isprintable() for line in [*lines(), *errors.splitlines()])
    return "".join(f"{line}\n" for line in [*lines(), "-- stderr", *errors.splitlines(), f"-- exit {code}"])


ON_CAPTURES = {
    "report": ["report", "a.cwnd"],
    "report-by-peer": ["report", "b.cwnd", "--by", "peer"],
    "report-json": ["report", "b.cwnd", "--json"],
    "compare": ["compare", "a.cwnd", "b.cwnd"],
    "dump": ["dump", "a.cwnd", "--last", "5s", "-o", "c.cwnd"],
    "export": ["export", "a.cwnd", "--csv", "verdicts=v.csv", "--jsonl", "block_io=b.jsonl.gz"],
    "plot": ["plot", "a.cwnd", "-o", "a.svg"],
    "top-connections": ["top", "a.cwnd", "--once"],
    "top-workloads": ["top", "a.cwnd", "--once", "--page", "workloads"],
    "top-devices": ["top", "a.cwnd", "--once", "--page", "devices"],
    "top-resets": ["top", "a.cwnd", "--once", "--page", "resets"],
    "no-capture": ["report", "missing.cwnd"],
}


@WIDTHS
@pytest.mark.parametrize("name", ON_CAPTURES)
def test_commands_on_captures(
    name: str, columns: int, capsys: pytest.CaptureFixture[str], pytestconfig: pytest.Config
) -> None:
    text = printed(columns, capsys, lambda: main(ON_CAPTURES[name], prog_name="cwndtrace"))
    reviewed.check(pytestconfig, f"{name}-{columns}", text)


@pytest.mark.parametrize("name", ["", *COMMANDS, "fleet report"])
def test_help(name: str, capsys: pytest.CaptureFixture[str], pytestconfig: pytest.Config) -> None:
    """Click breaks its lines at 80 columns, whatever the terminal has."""
    words = [*name.split(), "--help"]
    wide, narrow = (printed(each, capsys, lambda: main(words, prog_name="cwndtrace")) for each in (140, 80))
    assert wide == narrow
    reviewed.check(pytestconfig, f"help-{name.replace(' ', '-') or 'all'}", narrow)


@WIDTHS
def test_doctor(
    columns: int, capsys: pytest.CaptureFixture[str], pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its findings are given, because each machine has others."""
    facts = [
        doctor.Fact("kernel", "Linux 6.12.0 x86_64"),
        doctor.Fact("lockdown", "integrity", doctor.LACK, "boot without lockdown=confidentiality if probes fail"),
        doctor.Fact("probe sendmsg", "sees idle, rto_loss"),
        doctor.Fact("bcc", "python3-bpfcc isn't installed", doctor.BAD, "apt install python3-bpfcc"),
    ]
    found = doctor.Findings(facts, {"idle": "sendmsg", "rto_loss": "sendmsg", "app_limited": None}, block=True)
    for name in ("target.need_root", "host.enter_cgroup_namespace"):
        monkeypatch.setattr(f"cwndtrace.cli.doctor.{name}", lambda *_: None)
    monkeypatch.setattr(doctor, "examine", lambda: found)
    text = printed(columns, capsys, lambda: main(["doctor"], prog_name="cwndtrace"))
    reviewed.check(pytestconfig, f"doctor-{columns}", text)


def traced() -> FakeSource:
    """Return a source of three resets, what two of them cost, block requests, and a loss."""
    resets = [frames.reset(1), frames.reset(4, reason="rto_loss"), frames.reset(6, comm=b"\xff\x1b[31m")]
    costs = [frames.recovered(1, 0.4), frames.recovered(6, 0.2)]
    blocks = np.concatenate([frames.block(2, sector=n, latency_us=100 + n) for n in range(20)])
    source = FakeSource(
        [("cwnd_reset", each.tobytes()) for each in resets],
        [("cwnd_recovery", each.tobytes()) for each in costs],
        [("block_io", blocks.tobytes())],
    )
    source.events = ("cwnd_reset", "cwnd_recovery", "block_io")
    source.count.lost = {"cwnd_reset": 0, "cwnd_recovery": 0, "block_io": 12}
    source.count.guessed = 3
    return source


@WIDTHS
@pytest.mark.parametrize("block", [False, True])
def test_run(
    columns: int,
    block: bool,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    pytestconfig: pytest.Config,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The lines while it traces and the summary, at a clock that stands still."""
    now: dict[str, Any] = {"mono_ns": frames.MONO + 8 * frames.SECOND, "utc_offset_ns": frames.OFFSET}
    monkeypatch.setattr(session, "clock", lambda: dict(now))
    monkeypatch.setattr(clocks, "_reading", lambda *_: (0, frames.OFFSET))
    text = printed(columns, capsys, lambda: playing.played(traced(), folder, as_json=False, print_block=block))
    reviewed.check(pytestconfig, f"run{'-block' * block}-{columns}", text)


@WIDTHS
def test_reproduce(columns: int, capsys: pytest.CaptureFixture[str], pytestconfig: pytest.Config) -> None:
    """The table of what was measured; measuring needs root."""
    summary = summarise(pd.read_parquet(DATA / "sample-measurements.parquet"))
    text = printed(columns, capsys, lambda: click.echo("\n".join(reproduce.costs_of(summary))))
    reviewed.check(pytestconfig, f"reproduce-{columns}", text)
