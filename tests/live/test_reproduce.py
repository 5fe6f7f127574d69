# SPDX-License-Identifier: Apache-2.0
"""Tests of the commands ``cwndtrace reproduce`` and ``cwndtrace serve``: their output, files and errors.

They run over the lab's own path, or on loopback in this network namespace or in one that a test makes.
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
from tests.harness.lab import leftovers_of, processes_of, serving, started, tcp_sysctls, unrecorded
from tests.harness.users import BY_SUDO, GID, UID, assert_owned, home_of, need_readable_checkout

pytestmark = pytest.mark.live

PICTURES = ("latency", "sawtooth", "staircase", "cost")
HEADER = re.compile(r"^ROUND +SETTING", re.MULTILINE)
ROW = re.compile(r"^ +\d+ +(on|off) ", re.MULTILINE)
# This is the shortest experiment, for tests that only need it to start.
SHORT = ("--rtt", "20ms", "--burst", "20k", "--idle", "0s", "--rounds", "1")


@contextmanager
def held_up(pid: int, stopped_s: float, running_s: float) -> Iterator[None]:
    """Stop and continue a process in turns meanwhile, as if the machine had no time for it."""
    # A pidfd is used because a pid may be taken by another process.
    fd = os.pidfd_open(pid)
    done = threading.Event()

    def work() -> None:
        # The relay has the priority 1, and would run for longer whenever this thread waited for a CPU.
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(2))
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
    """Assert that all files of a run can be read, and return its capture."""
    for name in PICTURES:
        height, width = matplotlib.image.imread(folder / f"{name}.png").shape[:2]
        assert min(height, width) > 300
    trace = cwndtrace.load(folder / "capture.cwnd")
    assert trace.status == "complete"
    assert trace.warnings == []
    return trace


def host_state() -> tuple[list[str], dict[str, str]]:
    """Return the names of the host's interfaces, and its TCP settings."""
    return sorted(name for _, name in socket.if_nameindex()), tcp_sysctls()


# ---- a whole run -------------------------------------------------------------------------------


@dataclass
class Run:
    """A finished run."""

    done: Done
    folder: Path
    took_s: float
    load: float
    """The machine's load average at the start."""


@pytest.fixture(scope="module")
def quick() -> Iterator[Run]:
    """A run of ``reproduce --preset quick`` by sudo, which several tests check."""
    with home_of(UID, GID) as home:
        folder, load = home / "quick", os.getloadavg()[0]
        before, begin = host_state(), time.monotonic()
        done = call("reproduce", "--preset", "quick", "-o", folder, before=BY_SUDO, seconds=300)
        took_s = time.monotonic() - begin
        assert done.returncode == 0, done.stderr
        assert host_state() == before
        yield Run(done, folder, took_s, load)


def test_all_files_belong_to_the_invoking_user(quick: Run) -> None:
    assert_owned(quick.folder, UID, GID)
    assert {p.name for p in quick.folder.iterdir()} >= {"capture.cwnd", "measurements.parquet", "latency.png"}


@pytest.mark.skipif("CWNDTRACE_VM" in os.environ, reason="an emulated machine is ten times slower: sudo make test")
def test_quick_takes_at_most_half_a_minute(quick: Run) -> None:
    busy = quick.load > 0.5 * (os.cpu_count() or 1)
    print(f"{quick.took_s:.1f} s, load average {quick.load:.1f}{', so twice the time is allowed' if busy else ''}")
    assert quick.took_s < (60 if busy else 30)


def test_quick_shows_a_megabyte_twice_as_slow_after_idle_time(quick: Run) -> None:
    taken = pd.read_parquet(quick.folder / "measurements.parquet")
    assert sorted(taken.groupby(["setting", "burst_bytes"]).size()) == [4] * 4
    medians = taken[taken["burst_bytes"] == 1_000_000].groupby("setting")["latency_ms"].median()
    assert medians["on"] >= 2 * medians["off"]
    fell = taken["cwnd_after"] < taken["cwnd_before"]
    assert list(fell) == list(taken["setting"] == "on")
    assert (taken["idle_ms"] > taken["rto_ms"]).all()
    lines = quick.done.stdout.splitlines()
    assert len(ROW.findall(quick.done.stdout)) == len(taken)
    (row,) = (line for line in lines if re.match(r" *1 MB +0\.8 s ", line))
    assert f" {medians['on']:.0f} ms " in row
    assert f" {medians['off']:.0f} ms " in row
    # The last two lines are the result and the picture, which a new user should read.
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
    # On a busy machine the kernel skips a run now and then, which counts as lost, since it may have been a reset.
    assert trace.meta["counts"]["cwnd_reset"]["lost"] <= 2
    # Without a record the check reports the burst.
    assert len(unrecorded(taken, trace.resets.iloc[:0])) == 8


def test_the_cost_by_the_records_and_by_the_clock_are_printed(quick: Run) -> None:
    match = re.search(
        r"^Cost by the records: \+(\d+) ms a burst on average, by the receiver's clock \+(\d+) ms; of each burst the "
        r"two differ by (\d+) ms at the median and (\d+) ms at most\. Predicted from the windows alone \(estimate\): "
        r"\+\d+ ms\.$",
        quick.done.stdout,
        re.MULTILINE,
    )
    assert match
    recorded, measured, median, most = map(int, match.groups())
    # A round trip of this path takes 50 ms.
    assert median < 50
    assert median <= most
    # Each is rounded.
    assert abs(recorded - measured) <= most + 1
    assert not re.search(r"[+-]0 ", quick.done.stdout)


def test_windows_belong_to_the_times_that_they_are_drawn_at(quick: Run) -> None:
    taken, trace = pd.read_parquet(quick.folder / "measurements.parquet"), assert_opens(quick.folder)
    fell = taken[taken["cwnd_after"] < taken["cwnd_before"]]
    followed = 0
    for row in fell.itertuples():
        samples = trace.samples[(trace.samples["ts_ns"] >= row.start_ns) & (trace.samples["ts_ns"] <= row.acked_ns)]
        # A window that grows after its reset never falls until the burst is acknowledged, unless a packet was lost.
        windows = [row.cwnd_after, *samples["cwnd"], row.cwnd_end]
        assert row.retrans or windows == sorted(windows)
        followed += len(samples)
    assert followed


def test_the_capture_can_be_plotted_again(quick: Run) -> None:
    picture = quick.folder.with_name("again.png")
    done = call("plot", quick.folder / "capture.cwnd", "-o", picture, before=BY_SUDO)
    assert done.returncode == 0, done.stderr
    assert matplotlib.image.imread(picture).size
    assert picture.stat().st_uid == UID


def test_ctrl_c_reports_the_measurements_so_far(tmp_path: Path) -> None:
    scenario = ("--rtt", "10ms", "--burst", "20k", "--idle", "10ms", "--rounds", "1000")
    with started("reproduce", *scenario, "-o", tmp_path / "a") as run:
        run.wait_for(ROW)
        code, output = run.end(signal.SIGINT)
        assert code == 0, output
        assert not processes_of(run.process.pid)
        assert not leftovers_of(run.process.pid)
    taken = pd.read_parquet(tmp_path / "a" / "measurements.parquet")
    assert 1 <= len(taken) == len(ROW.findall(output)) < 1000
    assert "nan" not in output
    assert_opens(tmp_path / "a")


# ---- against a server ------------------------------------------------------------------------------


def test_the_sysctl_stays_against_a_server(tmp_path: Path) -> None:
    before, current = host_state(), "on" if netns.read_sysctl(IDLE_SYSCTL) else "off"
    with serving() as (server, where):
        # The burst is smaller than the window of loopback, so resets are predictable.
        done = call(
            "reproduce", "--against", where, "--burst", "20k", "--idle", "0s,300ms", "--rounds", "3",
            "-o", tmp_path / "a",
        )  # fmt: skip
        # SIGTERM is used, because a shell may start background processes with SIGINT ignored.
        code, output = server.end(signal.SIGTERM)
    assert done.returncode == 0, done.stderr
    assert host_state() == before
    taken = pd.read_parquet(tmp_path / "a" / "measurements.parquet")
    assert list(taken["setting"]) == [current] * 6
    assert f"Sending to {where}; only this side is traced." in done.stderr
    assert "only one setting was measured" in done.stdout.splitlines()[-2]
    assert "nan" not in done.stdout
    assert unrecorded(taken, assert_opens(tmp_path / "a").resets) == []
    assert code == 0, output
    # The server counts the bursts that warm the connection too.
    assert re.search(r"^1 connection; received \d+ bursts? \([\d.]+ [kM]?B\), sent 0 bursts$", output, re.MULTILINE)


def test_both_settings_are_measured_and_a_small_send_buffer_is_noted(
    make_space: Callable[[], tcp.Space], tmp_path: Path
) -> None:
    space, before = make_space(), host_state()
    space.sysctl("net.ipv4.tcp_wmem", "4096 16384 200000")
    with serving(within(space)) as (_, where):
        done = call(
            "reproduce", "--against", where, "--allow-sysctl", "--burst", "1M", "--idle", "300ms", "--rounds", "1",
            "-o", tmp_path / "a", before=within(space),
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert host_state() == before
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


def test_the_next_run_restores_the_sysctl_after_a_kill(make_space: Callable[[], tcp.Space], tmp_path: Path) -> None:
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
        # A run in another namespace neither uses nor reports the note.
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


def test_measurements_stay_when_the_server_goes_away(tmp_path: Path) -> None:
    with serving() as (server, where):
        scenario = ("--against", where, "--burst", "20k", "--idle", "10ms", "--rounds", "1000")
        with started("reproduce", *scenario, "-o", tmp_path / "a") as run:
            run.wait_for(ROW)
            server.end(signal.SIGKILL)
            code, output = run.end()
    cause, cure = output.splitlines()[-2:]
    assert code == 1, output
    assert re.fullmatch(rf"cwndtrace: the server at 127\.0\.0\.1 port {where.split(':')[1]} went away: .+", cause)
    taken = pd.read_parquet(tmp_path / "a" / "measurements.parquet")
    assert cure.startswith(f"  the measurements so far are kept: {plural(len(taken), 'burst')};")
    assert "Traceback" not in output
    assert_opens(tmp_path / "a")


# ---- kills -----------------------------------------------------------------------------------------


def test_the_next_run_removes_the_leftovers_of_a_kill(tmp_path: Path) -> None:
    before, moments, seen = host_state(), random.Random(5), 0
    scenario = ("--rtt", "20ms", "--burst", "300k", "--idle", "300ms", "--rounds", "100")
    for number, measuring in enumerate((False, True, True)):
        with started("reproduce", *scenario, "-o", tmp_path / f"killed-{number}") as run:
            if measuring:
                run.wait_for(HEADER)
            # The kill comes at a random moment, so there is no event to wait for.
            time.sleep(moments.uniform(0.3, 2))
            run.end(signal.SIGKILL)
        pid = run.process.pid
        # The kernel kills the children with their parent, before any cleanup.
        tcp.until(lambda pid=pid: not processes_of(pid), 10, "the processes to end")  # type: ignore[misc]
        left = leftovers_of(pid)
        seen += bool(left)
        if number < 2:
            # The run is refused, and cleans up nevertheless.
            done = call("reproduce", "--cc", "nonesuch", "-o", tmp_path / "refused")
            assert done.returncode == 77, done.stderr
        else:
            done = call("reproduce", *SHORT, "-o", tmp_path / "next")
            assert done.returncode == 0, done.stderr
        for name in (Path(thing).name for thing in left):
            assert f"cleaned up after an earlier run: namespace {name}\n" in done.stderr
        assert not leftovers_of(pid), left
        assert host_state() == before
        if measuring:
            assert left
            trace = cwndtrace.load(tmp_path / f"killed-{number}" / "capture.cwnd")
            assert trace.status == "interrupted"
    assert not (tmp_path / "refused").exists()
    assert seen >= 2


# ---- bad input -------------------------------------------------------------------------------------


def test_an_rtt_that_cannot_be_held_is_refused(tmp_path: Path) -> None:
    with (
        started("reproduce", "--path", "relay", *SHORT, "--rtt", "5ms", "-o", tmp_path / "a") as run,
        # The relay runs 1 ms of every 21 ms, so no round trip takes only 5 ms.
        held_up(run.child(b"cwndtrace.lab.relay"), 0.02, 0.001),
    ):
        code, output = run.end()
    assert code == 1, output
    match = re.fullmatch(
        r"cwndtrace: an RTT of 5 ms can't be held here: the lowest measured RTT is ([\d.]+) ms\n"
        r"  ask for ([\d.]+) ms or more, or reduce the load on this machine\n",
        output,
    )
    assert match, output
    assert float(match[1]) > 5.7
    assert float(match[2]) == pytest.approx(float(match[1]), abs=0.06)
    assert not (tmp_path / "a").exists()


def test_a_rate_that_cannot_be_held_is_noted(tmp_path: Path) -> None:
    scenario = ("--path", "relay", "--rtt", "20ms", "--rate", "50M", "--burst", "300k", "--idle", "300ms")
    with started("reproduce", *scenario, "--rounds", "1", "-o", tmp_path / "a") as run:
        run.wait_for(HEADER)
        with held_up(run.child(b"cwndtrace.lab.relay"), 0.05, 0.05):
            run.wait_for(re.compile(r"^ +1 +off ", re.MULTILINE))
        code, output = run.end()
    assert code == 0, output
    match = re.search(
        r"^note: the path was not held: the relay forwarded 99 % of the packets at most ([\d.]+) ms late, and the"
        r" others at most [\d.]+ ms late, on an RTT of 20 ms; reduce the load on this machine, or ask for a lower"
        r" rate$",
        output,
        re.MULTILINE,
    )
    assert match, output
    assert float(match[1]) > 2


def test_the_error_names_the_missing_netem_and_tun(quick: Run, tmp_path: Path) -> None:
    netem = "by netem" in quick.done.stderr
    # In a separate mount namespace the folder of the TUN device is empty.
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


def test_netem_is_refused_if_the_kernel_lacks_it(quick: Run, tmp_path: Path) -> None:
    if "by netem" in quick.done.stderr:
        pytest.skip("this kernel has netem, so the error doesn't occur")
    done = call("reproduce", "--path", "netem", "-o", tmp_path / "a")
    assert_short(done, 77, "netem can't make the path: this kernel has no netem", "modprobe sch_netem")


def test_reproduce_needs_root(tmp_path: Path) -> None:
    need_readable_checkout()
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    done = call("reproduce", "-o", tmp_path / "a", before=nobody)
    assert_short(done, 1, "reproducing needs root", "prefix the command with sudo")


def test_a_missing_server_or_congestion_control_is_reported(tmp_path: Path) -> None:
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


def test_measurements_stay_when_the_labs_own_server_is_killed(tmp_path: Path) -> None:
    scenario = ("--rtt", "10ms", "--burst", "20k", "--idle", "10ms", "--rounds", "1000")
    with started("reproduce", *scenario, "-o", tmp_path / "a") as run:
        run.wait_for(ROW)
        os.kill(run.child(b"server"), signal.SIGKILL)
        code, output = run.end()
    cause, cure = output.splitlines()[-2:]
    assert code == 1, output
    # The client or the parent of both reports it, whichever notices first.
    assert re.fullmatch(r"cwndtrace: (the server went away: .+|the lab's workload process ended \(-9\))", cause)
    assert "dmesg" in cure
    assert "Traceback" not in output
    taken = pd.read_parquet(tmp_path / "a" / "measurements.parquet")
    assert len(taken) == len(ROW.findall(output)) >= 1
    assert_opens(tmp_path / "a")
    assert not leftovers_of(run.process.pid)
