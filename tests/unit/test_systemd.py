# SPDX-License-Identifier: Apache-2.0
"""Notifications to a service manager never block and raise no errors, whatever NOTIFY_SOCKET contains."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from cwndtrace.cli import main, systemd


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "_address", "")


@pytest.mark.parametrize("arguments", [["--version"], ["report", "nothing"], ["doctor", "--help"]])
def test_no_command_leaves_notify_socket_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/notify")
    CliRunner().invoke(main, arguments)
    assert "NOTIFY_SOCKET" not in os.environ


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
