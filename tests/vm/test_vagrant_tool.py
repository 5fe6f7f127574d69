# SPDX-License-Identifier: Apache-2.0
"""Tests of tools/vagrant on the host: it restores the firewall and sysctls, and reports leftovers."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.harness import tcp
from tests.harness.scripts import CHECKOUT, load_script

pytestmark = [
    pytest.mark.vm,
    pytest.mark.skipif(shutil.which("iptables") is None, reason="needs iptables: tools/setup packages vagrant"),
]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """The script tools/vagrant as a module."""
    return load_script(CHECKOUT / "tools/vagrant")


@pytest.fixture
def space() -> Iterator[tcp.Space]:
    """A network namespace, which has its own firewall and sysctls."""
    namespace = tcp.Space(f"{tcp.PREFIX}vagrant")
    yield namespace
    namespace.close()


def iptables(*words: str) -> None:
    """Change the firewall of the calling thread's network namespace."""
    subprocess.run(["iptables", *words], check=True)


def test_chains_and_forwarding_are_put_back(tool: ModuleType, space: tcp.Space) -> None:
    def check() -> None:
        iptables("-A", "FORWARD", "-s", "192.0.2.1", "-j", "DROP")
        tool.FORWARD[0].write_text("0")  # a new namespace copies the value of the first one
        before = tool.Traces.now()
        for chain in ("LIBVIRT_FWI", "LIBVIRT_FWO"):
            iptables("-N", chain)
            iptables("-A", "FORWARD", "-j", chain)
            iptables("-A", chain, "-i", "virbr9", "-d", "198.51.100.0/24", "-j", "ACCEPT")
        iptables("-t", "nat", "-N", "LIBVIRT_PRT")
        iptables("-t", "nat", "-A", "POSTROUTING", "-j", "LIBVIRT_PRT")
        iptables("-A", "INPUT", "-s", "192.0.2.2", "-j", "DROP")
        tool.FORWARD[0].write_text("1")
        left = tool.left_behind(before)
        assert len(left) == 10
        assert left[-1].startswith("forwarding ('1', ")
        tool.put_back(before)
        # Rules that other programs added meanwhile stay.
        assert tool.left_behind(before) == ["rules iptables -t filter -A INPUT -s 192.0.2.2/32 -j DROP"]

    assert Path("/proc/sys/net/ipv4/ip_forward") == tool.FORWARD[0]
    space.enter(check)


def test_a_listening_port_is_reported(tool: ModuleType) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert tool.listens(port)
    assert not tool.listens(port)


def test_an_unknown_machine_is_refused() -> None:
    done = subprocess.run([str(CHECKOUT / "tools/vagrant"), "debian11"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "usage: tools/vagrant [debian13 | debian12]\n")
