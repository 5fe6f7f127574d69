# SPDX-License-Identifier: Apache-2.0
"""Tests of the experiment: it measures the cost of the setting, over the lab's path and against a server.

They run in namespaces that they make, or on loopback, and check the errors too.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from cwndtrace.errors import CwndtraceError, KernelLacks, NotFound
from cwndtrace.kernel import netns
from cwndtrace.lab import cleanup, experiment, serve, statistics
from cwndtrace.lab.experiment import Lab
from cwndtrace.lab.link import Link
from cwndtrace.lab.measurement import Setting, frame
from cwndtrace.lab.owner import Owner
from cwndtrace.lab.remote import Remote
from cwndtrace.lab.scenario import PRESETS, Scenario
from cwndtrace.lab.workload import ClientProcess
from cwndtrace.tcp import IDLE_SYSCTL
from tests.harness import tcp

pytestmark = pytest.mark.live

SHORT = replace(PRESETS["quick"], bursts=(1_000_000,), rounds=3)


def test_a_burst_after_idle_time_is_twice_as_slow_with_the_setting_on() -> None:
    # If the machine stalls, packets on the path are late, and a note says so.
    for _ in range(3):
        with Lab(SHORT) as lab:
            rows = list(lab.rows())
            notes = lab.notes()
            port, inode = lab.port, lab.path.server.namespace.inode
        if not any("the path was not held" in note for note in notes):
            break
    assert [(r.round, r.setting) for r in rows] == [(n, s) for n in (1, 2, 3) for s in ("on", "off")]
    for row in rows:
        assert row.reset == (row.setting == "on")
        assert row.idle_ms > row.rto_ms
        assert (row.sport, row.netns_ino) == (port, inode)
        assert row.cwnd_before * row.mss >= row.burst_bytes
    # There is one connection for each setting.
    assert len({r.sock_cookie for r in rows}) == 2
    cell = statistics.summarise(frame(rows)).iloc[0]
    assert cell["median_on_ms"] > 2 * cell["median_off_ms"]
    assert cell["cost_low_ms"] > 0
    assert "the setting cost" in cell["verdict"]
    assert notes == []


def test_idle_time_shorter_than_the_rto_costs_nothing() -> None:
    with Lab(replace(SHORT, idle_times=(0.05,), rounds=1)) as lab:
        rows = list(lab.rows())
    assert not any(row.reset for row in rows)


@pytest.mark.parametrize("cc", ["reno", "bbr"])
def test_reno_is_reset_and_bbr_is_exempt(cc: str) -> None:
    try:
        with Lab(replace(SHORT, cc=cc, rounds=1)) as lab:
            rows = list(lab.rows())
    except KernelLacks as e:
        pytest.skip(e.cause)
    assert [row.reset for row in rows] == [cc == "reno", False]


def test_pushed_bursts_over_ipv6_are_measured() -> None:
    with Lab(replace(SHORT, mode="push", family=6, rounds=1)) as lab:
        rows = list(lab.rows())
    assert [row.reset for row in rows] == [True, False]
    # The latency counts from the first byte, without a request: between half an RTT and a whole one.
    assert 25 <= rows[1].latency_ms < 50


def test_idle_time_by_a_slow_disk_resets_the_window() -> None:
    scenario = replace(PRESETS["disk"], rounds=1)
    try:
        with Lab(scenario) as lab:
            assert lab.device is not None
            rows = list(lab.rows())
    except KernelLacks as e:
        pytest.skip(e.cause)
    for row in rows:
        assert row.read_ms > 20
        assert row.idle_ms > 1000
    assert [row.reset for row in rows] == [True, False]


def test_a_burst_bigger_than_the_send_buffer_is_noted() -> None:
    scenario = replace(SHORT, link=Link(rtt_ms=50), sndbuf=200_000, idle_times=(0.3,), rounds=1)
    with Lab(scenario) as lab:
        rows = list(lab.rows())
        notes = lab.notes()
    assert all(row.taken_at_once < row.burst_bytes for row in rows)
    assert any("bigger than the send buffer" in note for note in notes)


def test_measurements_stay_when_the_labs_server_is_killed() -> None:
    with Lab(replace(SHORT, link=Link(rtt_ms=50), idle_times=(0.0,), rounds=50)) as lab:
        rows = lab.rows()
        next(rows)
        os.kill(lab.server.child.pid, signal.SIGKILL)
        with pytest.raises(CwndtraceError, match=r"went away|ended|closed"):
            list(rows)
        assert len(lab.taken) >= 1


def test_an_unknown_congestion_control_is_refused() -> None:
    with (
        pytest.raises(KernelLacks, match="no congestion control nonesuch") as caught,
        Lab(replace(SHORT, cc="nonesuch")),
    ):
        pass
    assert "reno" in caught.value.remedy


def test_an_rtt_that_cannot_be_held_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # The default tolerance is 0.2 ms, and the relay may need less than that.
    monkeypatch.setattr(experiment, "_RTT_SLACK_MS", 0.0)
    impossible = replace(SHORT, link=Link(rtt_ms=0.001))
    with pytest.raises(CwndtraceError, match="can't be held here") as caught, Lab(impossible):
        pass
    assert "ms or more" in caught.value.remedy


# ---- against a server ------------------------------------------------------------------------------


@contextmanager
def served(host: str = "127.0.0.1") -> Iterator[serve.Server]:
    with serve.Server(host, 0) as server:
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            yield server
        finally:
            server.close()
            thread.join()


AGAINST = Scenario(bursts=(100_000,), idle_times=(0.0, 0.4), rounds=2)


@pytest.mark.parametrize("plain", [False, True])
def test_bursts_against_a_server_are_measured(plain: bool) -> None:
    current = netns.read_sysctl(IDLE_SYSCTL)
    with served() as server, Remote("127.0.0.1", server.port, AGAINST, plain=plain) as remote:
        rows = list(remote.rows())
        assert {row.sport for row in rows} == {sock.getsockname()[1] for sock in remote._socks.values()}
    assert len(rows) == 4
    assert {row.setting for row in rows} == {"on" if current else "off"}
    assert all(0 < row.latency_ms < 1000 for row in rows)
    assert "one setting only" in statistics.summarise(frame(rows)).iloc[0]["verdict"]


def test_both_settings_are_measured_against_a_server_in_a_namespace() -> None:
    from cwndtrace.lab.namespaces import namespace

    def work() -> tuple[list[Setting], int, int]:
        with open_loopback(), served() as server:
            before = netns.read_sysctl(IDLE_SYSCTL)
            with Remote("127.0.0.1", server.port, AGAINST, allow_sysctl=True) as remote:
                settings = [row.setting for row in remote.rows()]
            return settings, before, netns.read_sysctl(IDLE_SYSCTL)

    with namespace(Owner.new().name("test")) as where:
        settings, before, after = netns.inside(where, work)
    assert settings == ["on", "on", "off", "off"] * 2
    assert before == after


@contextmanager
def open_loopback() -> Iterator[None]:
    from pyroute2 import IPRoute

    with IPRoute() as route:
        route.link("set", index=1, state="up")
    yield


def test_measurements_stay_when_a_remote_server_goes_away() -> None:
    with served() as server, Remote("127.0.0.1", server.port, replace(AGAINST, rounds=1000)) as remote:
        rows = remote.rows()
        next(rows)
        server.close()
        with pytest.raises(CwndtraceError, match="went away") as caught:
            list(rows)
        assert "1 burst;" in caught.value.remedy or len(remote.taken) > 1


def test_a_missing_server_is_reported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(NotFound, match=r"no server at 127\.0\.0\.1") as caught, Remote("127.0.0.1", port, AGAINST):
        pass
    assert "cwndtrace serve" in caught.value.remedy


def test_a_server_that_is_not_cwndtrace_serve_is_reported() -> None:
    def close_at_once() -> None:
        peer, _ = listener.accept()
        peer.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=close_at_once)
        thread.start()
        with (
            pytest.raises(CwndtraceError, match="doesn't answer as cwndtrace serve"),
            Remote("127.0.0.1", listener.getsockname()[1], AGAINST),
        ):
            pass
        thread.join()


def _idle_sysctl() -> str:
    return Path("/proc/sys/net/ipv4/tcp_slow_start_after_idle").read_text().strip()


def test_untrusted_notes_change_no_sysctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A note may only have a value of one sysctl. Links, pipes and other users' files are no notes."""
    from cwndtrace.lab.namespaces import namespace

    notes, target = tmp_path / "notes", tmp_path / "target"
    notes.mkdir(mode=0o755)
    monkeypatch.setattr(cleanup, "NOTES", notes)
    names = [replace(Owner.new(), pid=2**22 + 7).name("sysctl") for _ in range(6)]

    def work() -> tuple[list[str], str, str, str]:
        here, now = cleanup.here(), _idle_sysctl()
        other = str(1 - int(now))
        wanted = {"value": other, "netns": here}
        target.write_text(json.dumps(wanted))
        (notes / names[0]).symlink_to(target)
        os.mkfifo(notes / names[1])
        (notes / names[2]).write_text(json.dumps({**wanted, "value": "7"}))
        (notes / names[3]).write_text(json.dumps(wanted))
        os.chown(notes / names[3], 65534, 65534)
        # This is an older format, which names the sysctl, so it could name any.
        forged = {"name": "net.ipv4.tcp_congestion_control", "value": "reno", "netns": here}
        (notes / names[4]).write_text(json.dumps(forged))
        (notes / names[5]).write_text("[" * 100_000)
        control = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text()
        swept = cleanup.sweep()
        assert Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text() == control
        return swept, now, _idle_sysctl(), target.read_text()

    with namespace(Owner.new().name("test")) as where:
        swept, before, after, left = netns.inside(where, work)
    assert before == after
    assert json.loads(left)["value"] != before
    assert {line for line in swept if "sysctl" in line} == {f"sysctl of {name}" for name in names}
    assert not list(notes.iterdir())


def test_a_folder_of_notes_that_others_may_write_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cwndtrace.lab.namespaces import namespace

    notes = tmp_path / "notes"
    monkeypatch.setattr(cleanup, "NOTES", notes)

    def work() -> None:
        now = _idle_sysctl()
        with cleanup.host_sysctl(Owner.new(), now):
            assert notes.stat().st_mode & 0o777 == 0o700
            assert [note.stat().st_mode & 0o777 for note in notes.iterdir()] == [0o600]
        for mode, uid in ((0o777, 0), (0o770, 0), (0o755, 65534)):
            notes.chmod(mode)
            os.chown(notes, uid, -1)
            (notes / replace(Owner.new(), pid=2**22 + 7).name("sysctl")).touch()
            with pytest.raises(CwndtraceError, match="can't be trusted") as caught:
                cleanup.sweep()
            assert f"rm -r {notes}" in caught.value.remedy
            with (
                pytest.raises(CwndtraceError, match="can't be trusted"),
                cleanup.host_sysctl(Owner.new(), str(1 - int(now))),
            ):
                pass
            assert _idle_sysctl() == now
        notes.rename(tmp_path / "elsewhere")
        notes.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(CwndtraceError, match="is no folder"):
            cleanup.sweep()

    with namespace(Owner.new().name("test")) as where:
        netns.inside(where, work)


def test_a_namespace_that_replaced_another_is_not_entered(make_space: Callable[[], tcp.Space]) -> None:
    space = make_space()
    before = netns.find(space.name)
    # While it is open, no other namespace gets its inode number.
    held = os.open(before.path, os.O_RDONLY)
    try:
        tcp.run("ip", "netns", "del", space.name)
        tcp.run("ip", "netns", "add", space.name)
        with pytest.raises(NotFound, match="is gone: another network namespace is there now"):
            netns.inside(before, lambda: None)
        child = ClientProcess(before)
        try:
            with pytest.raises(CwndtraceError, match="another network namespace is there now"):
                child.wait()
        finally:
            child.child.close()
    finally:
        os.close(held)


def test_the_hosts_sysctl_is_put_back_by_the_next_start() -> None:
    from cwndtrace.lab.namespaces import namespace

    def work() -> tuple[int, list[str], int]:
        # A killed run leaves the sysctl changed, and a note with the name of an owner that has ended.
        old = netns.read_sysctl(IDLE_SYSCTL)
        dead = replace(Owner.new(), pid=2**22 + 7)
        with cleanup.host_sysctl(dead, str(1 - old)):
            assert netns.read_sysctl(IDLE_SYSCTL) == 1 - old
            note = (cleanup.NOTES / dead.name("sysctl")).read_bytes()
        Path("/proc/sys/net/ipv4/tcp_slow_start_after_idle").write_text(str(1 - old))
        (cleanup.NOTES / dead.name("sysctl")).write_bytes(note)
        return old, cleanup.sweep(), netns.read_sysctl(IDLE_SYSCTL)

    with namespace(Owner.new().name("test")) as where:
        old, swept, now = netns.inside(where, work)
    assert now == old
    assert any(line.startswith("sysctl") for line in swept)
