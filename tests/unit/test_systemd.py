# SPDX-License-Identifier: Apache-2.0
"""Notifications to a service manager never block and raise no errors, whatever NOTIFY_SOCKET contains."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from cwndtrace.cli import main, systemd

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "contrib/systemd/cwndtrace.service"


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "_address", "")
    monkeypatch.setattr(systemd, "_watchdog_s", 0.0)
    monkeypatch.setattr(systemd, "_alive_at", 0.0)


@pytest.mark.parametrize("arguments", [["--version"], ["report", "nothing"], ["doctor", "--help"]])
def test_no_command_leaves_notify_socket_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    names = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
    for name in names:
        monkeypatch.setenv(name, "7")
    CliRunner().invoke(main, arguments)
    assert not set(names) & set(os.environ)


@pytest.mark.parametrize(
    "address", ["", "relative", "vsock:2:1234", "/nowhere/at/all", "/" + "x" * 200, "@", "/\udcff"]
)
def test_an_invalid_address_is_ignored(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    systemd.take()
    systemd.tell("READY=1")


def test_a_manager_that_does_not_read_never_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        systemd.take()
        # No queue of datagrams holds this many.
        for _ in range(5000):
            systemd.tell("READY=1")
        assert manager.recv(100) == b"READY=1"


@pytest.mark.parametrize(
    ("limit", "pid", "messages"),
    [
        ("3000000", "own", 2),
        ("3000000", "", 2),
        ("3000000", "1", 0),
        ("", "", 0),
        ("-3", "", 0),
        ("\u0663", "", 0),
        ("9" * 400, "", 0),
    ],
)
def test_a_watchdog_hears_of_a_trace_that_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str, pid: str, messages: int
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        # Not every locale has all characters.
        monkeypatch.setitem(os.environb, b"WATCHDOG_USEC", limit.encode())
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "own" else pid)
        systemd.take()
        for step in (0, 0.9, 0.2):  # the second comes too early: a message each third of the limit is enough
            now += step
            systemd.alive()
        for _ in range(messages):
            assert manager.recv(100) == b"WATCHDOG=1"
        with pytest.raises(BlockingIOError):
            manager.recv(100)


# ---- the unit --------------------------------------------------------------------------------------


def analyze(*arguments: str) -> str:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze, which Debian's package systemd has: sudo apt-get install systemd")
    done = subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "cwndtrace.service"
    unit.write_text(UNIT.read_text(encoding="utf-8").replace("/opt/cwndtrace/bin/cwndtrace", "/bin/true"))
    assert str(unit) not in analyze("verify", str(unit))


def test_the_score_of_the_unit_is_the_one_on_the_page() -> None:
    score = re.search(
        r"Overall exposure level for cwndtrace.service: ([\d.]+)", analyze("security", "--offline=true", str(UNIT))
    )
    assert score is not None
    documented = re.search(r"gives it ([\d.]+) of 10", (ROOT / "docs/metrics.md").read_text(encoding="utf-8"))
    assert documented is not None
    # Releases of systemd weigh a little differently.
    assert float(score[1]) == pytest.approx(float(documented[1]), abs=0.5)


def test_each_setting_of_the_unit_that_could_be_stricter_has_its_reason() -> None:
    lines = UNIT.read_text(encoding="utf-8").splitlines()
    looser = ("PrivateUsers=no", "PrivateNetwork=no", "RestrictAddressFamilies=", "RestrictNamespaces=", "ProtectProc=")
    for start in (
        *looser,
        "ProtectHome=",
        "SystemCallFilter=",
        "CapabilityBoundingSet=",
        "IPAddressDeny=",
        "MemoryHigh=",
    ):
        (place,) = [number for number, line in enumerate(lines) if line.startswith(start)]
        assert lines[place - 1].startswith("# "), start


def test_the_unit_starts_a_command_that_exists() -> None:
    (command,) = re.findall(r"^ExecStart=\S+ (.*)$", UNIT.read_text(encoding="utf-8"), re.MULTILINE)
    name, *arguments = command.split()
    # Click keeps a command's option for help, which has the group's names only in a context of the group.
    group = main.make_context("cwndtrace", [], resilient_parsing=True)
    run = main.get_command(group, name)
    assert run is not None
    run.make_context(name, arguments, parent=group)
