# SPDX-License-Identifier: Apache-2.0
"""The commands of remedies do what they say, as root's shell runs them, and change nothing else."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness import tcp
from tests.unit import frames

pytestmark = pytest.mark.live

SEGMENTS = 21
"""Segments that waited, by the capture that is written here."""


@pytest.fixture(scope="module")
def spaces(make_space: Callable[[], tcp.Space]) -> tuple[tcp.Space, tcp.Space]:
    """Two joined namespaces; the first has a default route through the second, with attributes of its own."""
    near, far = make_space(), make_space()
    tcp.join(near, far, "joined", ["10.9.0.1/24", "fd09::1/64"], ["10.9.0.2/24", "10.8.0.1/32", "fd09::2/64"])
    near.ip("route", "add", "default", "via", "10.9.0.2", "metric", "77", "mtu", "1400")
    return near, far


def commands(folder: Path, space: tcp.Space, daddr: str) -> dict[str, str]:
    """Return the command of each remedy for a costly connection from ``space`` to an address."""
    reset = frames.reset(10, netns_ino=space.inode, daddr=daddr, saddr="fd09::1" if ":" in daddr else "10.9.0.1")
    seen = [frames.snapshot(at, netns_ino=space.inode, daddr=daddr, bytes_sent=41_100_000) for at in (20, 30)]
    trace = frames.capture(
        folder / "a.cwnd",
        resets=frames.table("cwnd_reset", reset),
        connections=frames.snapshots(*seen),
        sysctls={str(space.inode): {"name": space.name, "host": False, "net.ipv4.tcp_slow_start_after_idle": 1}},
    )
    waited = SEGMENTS * 1448 - 100
    trace._verdicts = trace._verdicts.assign(
        verdict="harmful", lost_us=400_000.0, waiting_bytes=waited, chain_window=2827
    )
    return {row["remedy"]: row["command"] for row in trace.remedies().to_dict("records")}


def shell(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("daddr", ["10.9.0.2", "10.8.0.1", "fd09::2"])
def test_a_route_gets_the_initial_window_and_keeps_the_rest(
    spaces: tuple[tcp.Space, tcp.Space], tmp_path: Path, daddr: str
) -> None:
    near, _ = spaces
    before = near.ip("route", "get", "fibmatch", daddr)
    assert "initcwnd" not in before
    done = shell(commands(tmp_path, near, daddr)["initcwnd"])
    assert done.returncode == 0, done.stderr
    after = near.ip("route", "get", "fibmatch", daddr)
    assert re.sub(rf" initcwnd {SEGMENTS}\b", "", after).split() == before.split()
    assert f" initcwnd {SEGMENTS}" in after


def test_a_connection_that_exists_already_keeps_the_window_that_its_route_got(
    spaces: tuple[tcp.Space, tcp.Space], drain: tcp.Drain, tmp_path: Path
) -> None:
    near, far = spaces
    near.ip("route", "replace", "10.9.0.0/24", "dev", "joined", "src", "10.9.0.1")
    c = tcp.connect(near, drain, address="10.9.0.2", to=far, device="joined")
    try:
        c.grow(100)
        assert shell(commands(tmp_path, near, "10.9.0.2")["initcwnd"]).returncode == 0
        # The socket looks its route up again when it sends, so the first reset may still use the old one.
        c.grow(100)
        i = c.info()
        c.until(lambda now: now.last_snd_us > 8 * i.rto_us, "idle time of many RTOs")
        assert c.send().after.cwnd == SEGMENTS
    finally:
        c.close()


def test_the_sysctl_is_set_in_its_namespace_only(spaces: tuple[tcp.Space, tcp.Space], tmp_path: Path) -> None:
    near, far = spaces
    setting = Path("/proc/sys/net/ipv4/tcp_slow_start_after_idle")
    here = setting.read_text()
    assert shell(commands(tmp_path, near, "10.9.0.2")["sysctl"]).returncode == 0
    assert [space.enter(setting.read_text) for space in (near, far)] == ["0\n", "1\n"]
    assert setting.read_text() == here
    near.sysctl("net.ipv4.tcp_slow_start_after_idle", "1")


def test_bbr_is_refused_in_a_namespace_where_the_host_does_not_allow_it(
    spaces: tuple[tcp.Space, tcp.Space], tmp_path: Path
) -> None:
    near, _ = spaces
    folder = Path("/proc/sys/net/ipv4")
    if "bbr" not in (folder / "tcp_available_congestion_control").read_text().split():
        pytest.skip("this kernel has no bbr: modprobe tcp_bbr")
    allowed = "bbr" in (folder / "tcp_allowed_congestion_control").read_text().split()
    shell(commands(tmp_path, near, "10.9.0.2")["bbr"])
    assert (near.enter((folder / "tcp_congestion_control").read_text) == "bbr\n") == allowed
    # The same for one that isn't allowed, where there is one.
    names = {kind: (folder / f"tcp_{kind}_congestion_control").read_text().split() for kind in ("available", "allowed")}
    for name in sorted({*names["available"]} - {*names["allowed"]}):
        with pytest.raises(PermissionError):
            near.sysctl("net.ipv4.tcp_congestion_control", name)
