# SPDX-License-Identifier: Apache-2.0
"""``cwndtrace reproduce`` and ``cwndtrace serve`` as a person types them: what they show, leave, and refuse.

Over the lab's own path, or on loopback in this network namespace or in one that the test makes.
"""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import matplotlib.image
import pandas as pd
import pytest

import cwndtrace
from cwndtrace.format import plural
from cwndtrace.kernel import netns
from cwndtrace.tcp import IDLE_SYSCTL
from tests.harness import tcp
from tests.harness.command import Done, assert_short, call, within
from tests.harness.lab import eventually, leftovers_of, processes_of, serving, started, tcp_sysctls, unrecorded
from tests.harness.users import BY_SUDO, GID, UID, assert_owned, home_of
from tests.others import need_readable_checkout

pytestmark = pytest.mark.live

PICTURES = ("latency", "sawtooth", "staircase", "cost")
HEADER = re.compile(r"^ROUND +SETTING", re.MULTILINE)
ROW = re.compile(r"^ +\d+ +(on|off) ", re.MULTILINE)
# The shortest that there is, for what only has to start.
SHORT = ("--rtt", "20ms", "--burst", "20k", "--idle", "0s", "--rounds", "1")


@contextmanager
def held_up(pid: int, stopped_s: float, running_s: float) -> Iterator[None]:
    """While it is entered, a process is stopped and let go in turns, as on a machine that has no time for it."""
    # By a descriptor: a number may go to another process.
    fd = os.pidfd_open(pid)
    done = threading.Event()

    def work() -> None:
        with suppress(ProcessLookupError):
            while not done.is_set():
                signal.pidfd_send_signal(fd, signal.SIGSTOP)
                done.wait(stopped_s)
                signal.pidfd_send_signal(fd, signal.SIGCONT)
                done.wait(running_s)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        os.close(fd)


def assert_opens(folder: Path) -> cwndtrace.Trace:
    """All that a run writes is there and can be read; the capture."""
    for name in PICTURES:
        height, width = matplotlib.image.imread(folder / f"{name}.png").shape[:2]
        assert min(height, width) > 300
    trace = cwndtrace.load(folder / "capture.cwnd")
    assert trace.status == "complete"
    assert trace.warnings == []
    return trace


def of_the_host() -> tuple[list[str], dict[str, str]]:
    """Its interfaces, and its settings of TCP."""
    return sorted(name for _, name in socket.if_nameindex()), tcp_sysctls()


# ---- the whole story -------------------------------------------------------------------------------


@dataclass
class Run:
    """A finished run."""

    done: Done
    folder: Path
    took_s: float
    load: float
    """of the machine, when it began"""


@pytest.fixture(scope="module")
def quick() -> Iterator[Run]:
    """``reproduce --preset quick``, once for all that look at it, by sudo."""
    with home_of(UID, GID) as home:
        folder, load = home / "quick", os.getloadavg()[0]
        before, begin = of_the_host(), time.monotonic()
        done = call("reproduce", "--preset", "quick", "-o", folder, before=BY_SUDO, seconds=300)
        took_s = time.monotonic() - begin
        assert done.returncode == 0, done.stderr
        assert of_the_host() == before
        yield Run(done, folder, took_s, load)


def test_what_is_reproduced_is_the_invoking_users(quick: Run) -> None:
    assert_owned(quick.folder, UID, GID)
    assert {p.name for p in quick.folder.iterdir()} >= {"capture.cwnd", "measurements.parquet", "latency.png"}


@pytest.mark.skipif("CWNDTRACE_VM" in os.environ, reason="an emulated machine is ten times slower: sudo make test")
def test_quick_is_done_in_half_a_minute(quick: Run) -> None:
    busy = quick.load > 0.5 * (os.cpu_count() or 1)
    print(f"{quick.took_s:.1f} s, load average {quick.load:.1f}{', so twice the time is allowed' if busy else ''}")
    assert quick.took_s < (60 if busy else 30)


def test_quick_shows_a_megabyte_twice_as_slow_after_a_rest(quick: Run) -> None:
    taken = pd.read_parquet(quick.folder / "measurements.parquet")
    assert sorted(taken.groupby(["setting", "burst_bytes"]).size()) == [4] * 4
    medians = taken[taken["burst_bytes"] == 1_000_000].groupby("setting")["latency_ms"].median()
    assert medians["on"] >= 2 * medians["off"]
    fell = taken["cwnd_after"] < taken["cwnd_before"]
    assert list(fell) == list(taken["setting"] == "on")
    assert (taken["idle_ms"] > taken["rto_ms"]).all()
    lines = quick.done.stdout.splitlines()
    assert len(ROW.findall(quick.done.stdout)) == len(taken)
    (said,) = (line for line in lines if re.match(r" *1 MB +0\.8 s ", line))
    assert f" {medians['on']:.0f} ms " in said
    assert f" {medians['off']:.0f} ms " in said
    # What somebody new should read comes last.
    cost, picture = lines[-2:]
    assert re.fullmatch(
        rf"Result: tcp_slow_start_after_idle cost up to \d+ ms \(\d\.\d round trips\): 1 MB after 0\.8 s"
        rf" took {medians['on']:.0f} ms with it and {medians['off']:.0f} ms without\.",
        cost,
    )
    assert picture == f"Picture: {quick.folder / 'latency.png'}"


def test_quick_has_every_reset_in_the_capture(quick: Run) -> None:
    taken, trace = pd.read_parquet(quick.folder / "measurements.parquet"), assert_opens(quick.folder)
    assert unrecorded(taken, trace.resets) == []
    assert "0 that TCP_INFO saw are missing from the capture" in quick.done.stdout
    # On a busy machine the kernel skips a run here and there, which counts, since it may have been a record.
    assert trace.meta["counts"]["cwnd_reset"]["lost"] <= 2
    # What the check itself is worth: without a record it finds the burst.
    assert len(unrecorded(taken, trace.resets.iloc[:0])) == 8


def test_predicted_and_measured_stand_side_by_side(quick: Run) -> None:
    found = re.search(
        r"^Predicted from the records alone \(estimate\): median (\d+) ms extra, measured (\d+) ms; off by (\d+) ms",
        quick.done.stdout,
        re.MULTILINE,
    )
    assert found
    # A round trip here is 50 ms.
    assert int(found[3]) < 50


def test_its_capture_can_be_drawn_again(quick: Run) -> None:
    picture = quick.folder.with_name("again.png")
    done = call("plot", quick.folder / "capture.cwnd", "-o", picture, before=BY_SUDO)
    assert done.returncode == 0, done.stderr
    assert matplotlib.image.imread(picture).size
    assert picture.stat().st_uid == UID


def test_ctrl_c_reports_what_there_is(tmp_path: Path) -> None:
    scenario = ("--rtt", "10ms", "--burst", "20k", "--idle", "10ms", "--rounds", "1000")
    with started("reproduce", *scenario, "-o", tmp_path / "a") as run:
        run.wait_for(ROW)
        code, said = run.end(signal.SIGINT)
        assert code == 0, said
        assert not processes_of(run.process.pid)
        assert not leftovers_of(run.process.pid)
    taken = pd.read_parquet(tmp_path / "a" / "measurements.parquet")
    assert 1 <= len(taken) == len(ROW.findall(said)) < 1000
    assert "nan" not in said
    assert_opens(tmp_path / "a")


# ---- against a server ------------------------------------------------------------------------------


def test_against_a_server_the_sysctl_stays(tmp_path: Path) -> None:
    before, current = of_the_host(), "on" if netns.read_sysctl(IDLE_SYSCTL) else "off"
    with serving() as (server, where):
        # Less than loopback's window takes at once: what it does then is known.
        done = call(
            "reproduce", "--against", where, "--burst", "20k", "--idle", "0s,300ms", "--rounds", "3",
            "-o", tmp_path / "a",
        )  # fmt: skip
        # Not SIGINT: what a shell started in the background may have been told to ignore that.
        code, said = server.end(signal.SIGTERM)
    assert done.returncode == 0, done.stderr
    assert of_the_host() == before
    taken = pd.read_parquet(tmp_path / "a" / "measurements.parquet")
    assert list(taken["setting"]) == [current] * 6
    assert f"Sending to {where}; only this side is traced." in done.stderr
    assert "only one setting was measured" in done.stdout.splitlines()[-2]
    assert "nan" not in done.stdout
    assert unrecorded(taken, assert_opens(tmp_path / "a").resets) == []
    assert code == 0, said
    # Each burst is preceded by what warms the connection.
    assert re.search(r"^1 connection; received \d+ bursts? \([\d.]+ [kM]?B\), sent 0 bursts$", said, re.MULTILINE)


def test_both_settings_and_a_send_buffer_that_is_too_small(make_space: Callable[[], tcp.Space], tmp_path: Path) -> None:
    space, before = make_space(), of_the_host()
    space.sysctl("net.ipv4.tcp_wmem", "4096 16384 200000")
    with serving(within(space)) as (_, where):
        done = call(
            "reproduce", "--against", where, "--allow-sysctl", "--burst", "1M", "--idle", "300ms", "--rounds", "1",
            "-o", tmp_path / "a", before=within(space),
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert of_the_host() == before
    assert space.enter(lambda: netns.read_sysctl(IDLE_SYSCTL)) == 1
    taken = pd.read_parquet(tmp_path / "a" / "measurements.parquet")
    assert list(taken["setting"]) == ["on", "off"]
    assert (taken["taken_at_once"] < 1_000_000).all()
    assert re.search(
        r"^note: the burst of 1,000,000 bytes is bigger than the send buffer, which took [\d,]+ bytes at once .*:"
        r" raise net\.ipv4\.tcp_wmem, or the program's SO_SNDBUF$",
        done.stdout,
        re.MULTILINE,
    )


def test_the_sysctl_comes_back_after_a_kill(make_space: Callable[[], tcp.Space], tmp_path: Path) -> None:
    space, host = make_space(), netns.read_sysctl(IDLE_SYSCTL)

    def value() -> int:
        return int(space.enter(lambda: netns.read_sysctl(IDLE_SYSCTL)))

    with serving(within(space)) as (_, where):
        scenario = ("--against", where, "--allow-sysctl", "--burst", "20k", "--idle", "10ms", "--rounds", "1000")
        with started("reproduce", *scenario, "-o", tmp_path / "a", before=within(space)) as run:
            tcp.until(lambda: value() == 0, 60, "the setting to be off")
            run.end(signal.SIGKILL)
        left = value()
        (note,) = leftovers_of(run.process.pid)
        # Not this namespace's business, and so not touched and not told.
        other = call("reproduce", "--cc", "nonesuch", "-o", tmp_path / "b")
        assert other.returncode == 77
        assert Path(note).exists()
        short = (*scenario[:-1], "1", "-o", tmp_path / "c")
        done = call("reproduce", *short, before=within(space))
    assert done.returncode == 0, done.stderr
    assert f"cleaned up after an earlier run: sysctl of {Path(note).name}" in done.stderr
    assert left in (0, 1)
    assert value() == 1
    assert not leftovers_of(run.process.pid)
    assert netns.read_sysctl(IDLE_SYSCTL) == host


def test_a_server_that_goes_away(tmp_path: Path) -> None:
    with serving() as (server, where):
        scenario = ("--against", where, "--burst", "20k", "--idle", "10ms", "--rounds", "1000")
        with started("reproduce", *scenario, "-o", tmp_path / "a") as run:
            run.wait_for(ROW)
            server.end(signal.SIGKILL)
            code, said = run.end()
    cause, cure = said.splitlines()[-2:]
    assert code == 1, said
    assert re.fullmatch(rf"cwndtrace: the server at 127\.0\.0\.1 port {where.split(':')[1]} went away: .+", cause)
    taken = pd.read_parquet(tmp_path / "a" / "measurements.parquet")
    assert cure.startswith(f"  the measurements so far are kept: {plural(len(taken), 'burst')};")
    assert "Traceback" not in said
    assert_opens(tmp_path / "a")


# ---- kills -----------------------------------------------------------------------------------------


def test_what_a_kill_leaves_the_next_start_cleans(tmp_path: Path) -> None:
    before, moments, seen = of_the_host(), random.Random(5), 0
    scenario = ("--rtt", "20ms", "--burst", "300k", "--idle", "300ms", "--rounds", "100")
    for number, measuring in enumerate((False, True, True)):
        with started("reproduce", *scenario, "-o", tmp_path / f"killed-{number}") as run:
            if measuring:
                run.wait_for(HEADER)
            # Not waiting for something: the moment is the point.
            time.sleep(moments.uniform(0.3, 2))
            run.end(signal.SIGKILL)
        pid = run.process.pid
        # The kernel ends the children with their parent, before any sweep.
        assert eventually(lambda pid=pid: not processes_of(pid))  # type: ignore[misc]
        left = leftovers_of(pid)
        seen += bool(left)
        if number < 2:
            # It is refused, and cleans up all the same.
            done = call("reproduce", "--cc", "nonesuch", "-o", tmp_path / "refused")
            assert done.returncode == 77, done.stderr
        else:
            done = call("reproduce", *SHORT, "-o", tmp_path / "next")
            assert done.returncode == 0, done.stderr
        for name in (Path(thing).name for thing in left):
            assert f"cleaned up after an earlier run: namespace {name}\n" in done.stderr
        assert not leftovers_of(pid), left
        assert of_the_host() == before
        if measuring:
            assert left
            trace = cwndtrace.load(tmp_path / f"killed-{number}" / "capture.cwnd")
            assert trace.status == "interrupted"
    assert not (tmp_path / "refused").exists()
    assert seen >= 2


# ---- bad input -------------------------------------------------------------------------------------


def test_an_rtt_that_cannot_be_held(tmp_path: Path) -> None:
    with (
        started("reproduce", "--path", "relay", *SHORT, "--rtt", "5ms", "-o", tmp_path / "a") as run,
        # Awake for a millisecond of 20: no packet goes there and back in 5.
        held_up(run.child(b"cwndtrace.lab.relay"), 0.02, 0.001),
    ):
        code, said = run.end()
    assert code == 1, said
    found = re.fullmatch(
        r"cwndtrace: an RTT of 5 ms can't be held here: the lowest measured RTT is ([\d.]+) ms\n"
        r"  ask for ([\d.]+) ms or more, or reduce the load on this machine\n",
        said,
    )
    assert found, said
    assert float(found[1]) > 5.7
    assert float(found[2]) == pytest.approx(float(found[1]), abs=0.06)
    assert not (tmp_path / "a").exists()


def test_a_rate_that_cannot_be_held(tmp_path: Path) -> None:
    scenario = ("--path", "relay", "--rtt", "20ms", "--rate", "50M", "--burst", "300k", "--idle", "300ms")
    with started("reproduce", *scenario, "--rounds", "1", "-o", tmp_path / "a") as run:
        run.wait_for(HEADER)
        with held_up(run.child(b"cwndtrace.lab.relay"), 0.05, 0.05):
            run.wait_for(re.compile(r"^ +1 +off ", re.MULTILINE))
        code, said = run.end()
    assert code == 0, said
    found = re.search(
        r"^note: the path was not held: the relay forwarded 99 % of the packets at most ([\d.]+) ms late, and the"
        r" others at most [\d.]+ ms late, on an RTT of 20 ms; reduce the load on this machine, or ask for a lower"
        r" rate$",
        said,
        re.MULTILINE,
    )
    assert found, said
    assert float(found[1]) > 2


def test_neither_netem_nor_tun(quick: Run, tmp_path: Path) -> None:
    netem = "by netem" in quick.done.stderr
    # In a mount namespace of its own the folder of the device is empty.
    hidden = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /dev/net && exec "$@"', "sh")
    forced = ("--path", "relay") if netem else ()
    done = call("reproduce", *forced, "-o", tmp_path / "a", before=hidden)
    why = "" if netem else "this kernel has no netem, and "
    assert_short(
        done,
        77,
        rf"no path can be made here: {why}the relay failed \(a TUN device can't be opened: No such file",
        "modprobe tun$",
    )
    assert not (tmp_path / "a").exists()


def test_a_path_that_this_kernel_lacks(quick: Run, tmp_path: Path) -> None:
    if "by netem" in quick.done.stderr:
        pytest.skip("this kernel has netem: nothing to see here")
    done = call("reproduce", "--path", "netem", "-o", tmp_path / "a")
    assert_short(done, 77, "netem can't make the path: this kernel has no netem", "modprobe sch_netem")


def test_not_root(tmp_path: Path) -> None:
    need_readable_checkout()
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    done = call("reproduce", "-o", tmp_path / "a", before=nobody)
    assert_short(done, 1, "reproducing needs root", "prefix the command with sudo")


def test_what_is_not_there(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    absent = call("reproduce", "--against", f"127.0.0.1:{port}", "-o", tmp_path / "a")
    assert_short(
        absent, 1, f"no server at 127.0.0.1 port {port}: Connection refused", f"cwndtrace serve --host :: --port {port}"
    )
    unknown = call("reproduce", "--cc", "nonesuch", "-o", tmp_path / "a")
    assert_short(unknown, 77, "no congestion control nonesuch", "it has: .*reno")
    assert not (tmp_path / "a").exists()
    (tmp_path / "a").mkdir()
    assert_short(call("reproduce", "-o", tmp_path / "a"), 1, "a can't be made: File exists", "-o")


def test_the_labs_own_server_goes_away(tmp_path: Path) -> None:
    scenario = ("--rtt", "10ms", "--burst", "20k", "--idle", "10ms", "--rounds", "1000")
    with started("reproduce", *scenario, "-o", tmp_path / "a") as run:
        run.wait_for(ROW)
        os.kill(run.child(b"server"), signal.SIGKILL)
        code, said = run.end()
    cause, cure = said.splitlines()[-2:]
    assert code == 1, said
    # By the client, or by the parent of both, whoever notices first.
    assert re.fullmatch(r"cwndtrace: (the server went away: .+|the lab's workload process ended \(-9\))", cause)
    assert "dmesg" in cure
    assert "Traceback" not in said
    taken = pd.read_parquet(tmp_path / "a" / "measurements.parquet")
    assert len(taken) == len(ROW.findall(said)) >= 1
    assert_opens(tmp_path / "a")
    assert not leftovers_of(run.process.pid)
