# SPDX-License-Identifier: Apache-2.0
"""Telling a service manager: whoever that is, it holds up and breaks nothing."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from cwndtrace.cli import main, systemd


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "_address", "")


@pytest.mark.parametrize("arguments", [["--version"], ["report", "nothing"], ["doctor", "--help"]])
def test_no_command_leaves_the_address_to_its_children(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/notify")
    CliRunner().invoke(main, arguments)
    assert "NOTIFY_SOCKET" not in os.environ


@pytest.mark.parametrize(
    "address", ["", "relative", "vsock:2:1234", "/nowhere/at/all", "/" + "x" * 200, "@", "/\udcff"]
)
def test_an_address_that_is_none(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    systemd.take()
    systemd.tell("READY=1")


def test_one_who_does_not_read_holds_nothing_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        systemd.take()
        # More than any queue of datagrams holds.
        for _ in range(5000):
            systemd.tell("READY=1")
        assert manager.recv(100) == b"READY=1"
