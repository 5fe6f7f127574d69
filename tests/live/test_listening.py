# SPDX-License-Identifier: Apache-2.0
"""Tests that the lab's servers listen only in their network namespaces, or on loopback unless told otherwise."""

from __future__ import annotations

import re
import socket

import pytest

from cwndtrace.kernel import netns
from cwndtrace.lab import demo
from cwndtrace.lab.experiment import Lab
from cwndtrace.lab.scenario import PRESETS
from tests.harness.lab import started
from tests.harness.tcp import listening

pytestmark = pytest.mark.live


def test_listening_sees_a_listener() -> None:
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with socket.create_server((address, 0), family=family) as server:
            assert (address, server.getsockname()[1]) in listening()


def test_the_labs_server_listens_only_in_its_namespace() -> None:
    before = listening()
    with Lab(PRESETS["quick"].changed(rounds=1)) as lab:
        assert listening() <= before
        end = lab.path.server
        inside = netns.inside(end.namespace, listening)
        assert {address for address, _ in inside} == {end.address}
        assert netns.inside(lab.path.client.namespace, listening) == set()


def test_serve_listens_on_loopback_unless_told() -> None:
    before = listening()
    with started("serve", "--port", "0") as server:
        port = int(server.wait_for(re.compile(r"^Listening on 127\.0\.0\.1 port (\d+);", re.MULTILINE))[1])
        assert listening() - before == {("127.0.0.1", port)}
    with started("serve", "--port", "0", "--host", "::1") as server:
        port = int(server.wait_for(re.compile(r"^Listening on ::1 port (\d+);", re.MULTILINE))[1])
        assert listening() - before == {("::1", port)}


def test_the_demos_server_listens_on_loopback() -> None:
    before = listening()
    with demo.connection() as sender:
        assert {address for address, _ in listening() - before} == {"127.0.0.1"}
        assert sender.getpeername()[0] == "127.0.0.1"
