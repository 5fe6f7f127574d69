# SPDX-License-Identifier: Apache-2.0
"""reproduce shows each measurement while it traces, and keeps and reports what it has, even if it breaks off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from cwndtrace.capture import stream
from cwndtrace.capture.source import Filters
from cwndtrace.cli import reproduce
from cwndtrace.errors import CwndtraceError
from cwndtrace.lab.measurement import Measurement
from cwndtrace.store import open_capture
from cwndtrace.store.folder import Folder
from tests.unit import experiments, frames
from tests.unit.fake_source import FakeSource, session_of

Output = pytest.CaptureFixture[str]
ROWS = [
    Measurement(**{str(name): value for name, value in row.items()})
    for row in experiments.experiment(rounds=1, bursts=(1_000_000,), idle_times=(1.0,)).measured.to_dict("records")
]
"""A burst after a second, with the setting on and off."""


class MadeLab:
    """A lab with these measurements, which breaks off after them."""

    def __init__(self, rows: list[Measurement], error: CwndtraceError | None = None) -> None:
        self.taken: list[Measurement] = []
        self._rows, self._error = rows, error

    def rows(self) -> Iterator[Measurement]:
        for row in self._rows:
            self.taken.append(row)
            yield row
        if self._error is not None:
            raise self._error

    def notes(self) -> list[str]:
        return ["a note"]


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The reports that were asked for. The trace has one reset, and its report fails with status 3."""
    asked: list[tuple[Any, ...]] = []

    def report(path: Path, folder: Folder, notes: list[str], *, dark: bool) -> int:
        asked.append((path, folder.path.resolve(), notes, dark))
        return 3

    source = FakeSource([("cwnd_reset", frames.reset().tobytes())])
    monkeypatch.setattr(stream, "open_session", lambda *_, **__: session_of(source))
    monkeypatch.setattr(reproduce, "_run_report", report)
    return asked


def measure(folder: Path, lab: MadeLab) -> None:
    with Folder.make(folder, None) as opened:
        reproduce._measure(lab, Filters(), folder, opened, probe=None, dark=True)  # type: ignore[arg-type]


def test_measurements_are_shown_kept_and_reported(
    tmp_path: Path, reported: list[tuple[Any, ...]], capsys: Output
) -> None:
    with pytest.raises(SystemExit) as end:
        measure(tmp_path / "a", MadeLab(ROWS))
    assert end.value.code == 3
    stdout, stderr = capsys.readouterr()
    assert stderr == "Tracing: idle by sendmsg.\n"
    head, on, off = stdout.splitlines()
    assert head.split() == ["ROUND", "SETTING", "IDLE", "BURST", "LATENCY", "CWND", "(segments)"]
    assert on.split()[:6] == ["1", "on", "1.00", "s", "1", "MB"]
    assert on.endswith(f" ms   {ROWS[0].cwnd_before} -> {ROWS[0].cwnd_after}")
    assert off.endswith(f" ms   {ROWS[1].cwnd_before}")
    assert pd.read_parquet(tmp_path / "a" / "measurements.parquet")["setting"].tolist() == ["on", "off"]
    assert open_capture(tmp_path / "a" / "capture.cwnd").rows("cwnd_reset") == 1
    assert reported == [(tmp_path / "a", tmp_path / "a", ["a note"], True)]


@pytest.mark.parametrize("number", [0, 1])
def test_a_run_that_breaks_off_is_an_error_and_what_it_has_is_reported(
    tmp_path: Path, reported: list[tuple[Any, ...]], number: int
) -> None:
    with pytest.raises(CwndtraceError, match="the path broke"):
        measure(tmp_path / "a", MadeLab(ROWS[:number], CwndtraceError("the path broke", "")))
    assert (tmp_path / "a" / "measurements.parquet").exists() == bool(reported) == bool(number)
