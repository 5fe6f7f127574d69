# SPDX-License-Identifier: Apache-2.0
"""Tests of tools/vm on the host.

A guest that panics or hangs fails, and the end of its console is shown. One that QEMU stops running is booted again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from tests.harness import emulation
from tests.harness.scripts import CHECKOUT, load_script

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """The script tools/vm as a module."""
    return load_script(CHECKOUT / "tools/vm")


def test_a_guest_that_panics_fails(tool: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    guest = replace(tool.GUESTS[0], append="panic=-1 init=/dev/null rootfstype=ext4", deadline_s=300)
    head, *console = tool.test(guest, tool.kernel(guest))
    assert "6.12: the kernel panicked; the end of its console" in head
    assert any("Kernel panic - not syncing" in line for line in console)
    assert "6.12: FAILED" in capfd.readouterr().out


def test_a_guest_that_hangs_fails(tool: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    # Booting takes longer than five seconds.
    guest = replace(tool.GUESTS[0], deadline_s=5)
    head, *console = tool.test(guest, tool.kernel(guest))
    assert "6.12: not done in time; the end of its console" in head
    assert console
    assert "6.12: FAILED" in capfd.readouterr().out


def test_only_processes_that_all_sleep_are_stalled() -> None:
    for script, stalled in (("sleep 60 & wait", True), ("sleep 60 & while :; do :; done", False)):
        with subprocess.Popen(["sh", "-c", script], start_new_session=True) as process:
            try:
                with pytest.raises(emulation.Stalled) if stalled else nullcontext():
                    assert emulation.wait(process, deadline_s=2, look_s=0.05) is None
            finally:
                os.killpg(process.pid, signal.SIGKILL)
    with subprocess.Popen(["sh", "-c", "exit 3"], start_new_session=True) as process:
        assert emulation.wait(process, deadline_s=10) == 3


def test_a_stalled_guest_is_booted_again(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    boots = iter((True, False))

    def boot_once(*_: object) -> tuple[int, list[str]]:
        if next(boots):
            raise emulation.Stalled
        return 0, []

    monkeypatch.setattr(tool, "boot_once", boot_once)
    monkeypatch.setattr(tool, "boot", lambda *_, **__: [])
    assert tool.watched(tool.GUESTS[0], tmp_path, "true") is None
    assert "booting it again" in capsys.readouterr().out


def test_failures_are_repeated_at_the_end(tool: ModuleType, tmp_path: Path) -> None:
    """The input is the output of the installed pytest."""
    (tmp_path / "test_two.py").write_text("def test_right(): pass\n\ndef test_wrong():\n    assert 6 * 7 == 54\n")
    command = [sys.executable, "-m", "pytest", "-v", "--durations=8", "-p", "no:cacheprovider", "--rootdir=."]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    printed = [f"6.12: {line}" for line in done.stdout.splitlines()]
    repeated = tool.findings(printed)
    assert "6.12: E       assert (6 * 7) == 54" in repeated
    assert repeated[-2].startswith("6.12: FAILED test_two.py::test_wrong")
    assert not any("test_right" in line or "slowest" in line for line in repeated)


def test_a_guest_that_ran_no_pytest_has_no_findings(tool: ModuleType) -> None:
    assert tool.findings(["6.12: Traceback (most recent call last):", "6.12: OSError"]) == []
