# SPDX-License-Identifier: Apache-2.0
"""Tests of the commands run, doctor and plot as processes, on this machine's kernel."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pty
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import cwndtrace
from cwndtrace.cli.live import RESETS_SHOWN
from cwndtrace.kernel import ladder, netns
from cwndtrace.store import open_capture
from tests.harness import tcp
from tests.harness.command import (
    COMMAND,
    ENVIRONMENT,
    LONG_S,
    assert_short,
    call,
    lasting,
    read_until,
    running,
    send_after_idle,
    within,
)
from tests.harness.disk import loop
from tests.harness.tcp import Connect
from tests.harness.tracing import left_out
from tests.harness.users import need_readable_checkout
from tests.harness.workers import serving

pytestmark = pytest.mark.live

IDLE = "net.ipv4.tcp_slow_start_after_idle"


# ---- run -------------------------------------------------------------------------------------------


def test_a_trace_prints_header_resets_and_summary(connect: Connect, space: tcp.Space, tmp_path: Path) -> None:
    with running("-i", "lo", "-n", space.name, "-d", "4s", "-o", tmp_path / "a.cwnd") as run:
        connection = connect()
        sends = [send_after_idle(connection) for _ in range(3)]
        code, stdout, stderr = run.end(None)
    assert code == 0
    header, *lines = stdout.splitlines()
    assert re.split(" {2,}", header) == [column.title for column in RESETS_SHOWN]
    ends = f"{connection.saddr}:{connection.sport} > {connection.daddr}:{connection.dport}"
    resets = [line for line in lines if re.match(r"\d\d:\d\d:\d\d\.\d+  idle ", line)]
    assert len(resets) == 3
    for line, send in zip(resets, sends, strict=True):
        assert f"{send.before.cwnd} -> {send.after.cwnd}" in line
        assert f"[{os.getpid()}]" in line
        assert line.index(ends) == header.index("CONNECTION")
    assert re.search(r"^CONNECTION +PROCESS +CC +RESETS", stdout, re.MULTILINE)
    row = next(line for line in lines[4:] if line.startswith(ends) and "cubic" in line)
    assert re.search(r"cubic +3 +3 +0 +0 ", row)
    assert re.search(r"^kept 3 resets, \d[\d,]* block I/Os; lost [0-2] resets?, ", stdout, re.MULTILINE)
    assert "\x1b" not in stdout + stderr
    assert "waiting for" not in stderr
    assert lasting(stderr)[0].startswith(f"Tracing lo in network namespace {space.name} (inode ")
    assert f"The capture is in {tmp_path / 'a.cwnd'}" in stderr
    assert f"cwndtrace plot {tmp_path / 'a.cwnd'}" in stderr
    trace = cwndtrace.load(tmp_path / "a.cwnd")
    assert trace.status == "complete"
    assert list(trace.resets["cwnd_after"]) == [send.after.cwnd for send in sends]
    assert not trace.connections.empty
    assert trace.warnings == []


def test_a_signal_ends_a_trace_cleanly(space: tcp.Space, tmp_path: Path) -> None:
    with running("-n", space.name, "-o", tmp_path / "a.cwnd") as run:
        code, stdout, stderr = run.end(signal.SIGTERM)
    assert code == 0
    assert "kept 0 resets" in stdout
    assert "The capture is in" in stderr
    assert cwndtrace.load(tmp_path / "a.cwnd").status == "complete"


def test_a_third_signal_aborts(space: tcp.Space, tmp_path: Path) -> None:
    with running("-n", space.name, "--no-block", "-o", tmp_path / "a.cwnd") as run:
        # The process gets all of them when it continues, so the last one surely comes while it handles the first.
        for number in (signal.SIGSTOP, signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGCONT):
            run.process.send_signal(number)
        code, _, stderr = run.end(None)
    assert code == 1
    assert stderr.endswith("Aborted!\n")
    assert "Traceback" not in stderr
    assert cwndtrace.load(tmp_path / "a.cwnd").status in ("failed", "complete")


def test_a_killed_trace_opens_as_interrupted(connect: Connect, space: tcp.Space, tmp_path: Path) -> None:
    with running("-n", space.name, "--no-block", "-o", tmp_path / "a.cwnd") as run:
        send_after_idle(connect())
        folder = tmp_path / "a.cwnd" / "cwnd_reset"
        tcp.until(lambda: list(folder.glob("part-*.parquet")), 20, "the first part on disk")
        assert cwndtrace.load(tmp_path / "a.cwnd").status == "running"
        run.end(signal.SIGKILL)
    trace = cwndtrace.load(tmp_path / "a.cwnd")
    assert trace.status == "interrupted"
    assert len(trace.resets) == 1
    assert call("plot", tmp_path / "a.cwnd", "-o", tmp_path / "a.png").returncode == 0


def test_stdout_has_only_json(connect: Connect, space: tcp.Space, tmp_path: Path) -> None:
    with loop() as disk, running("-n", space.name, "--json", "--block", "-o", tmp_path / "a.cwnd") as run:
        send = send_after_idle(connect())
        disk.read(*range(10))
        code, stdout, _ = run.end()
    assert code == 0
    rows: list[dict[str, Any]] = [json.loads(line, parse_constant=pytest.fail) for line in stdout.splitlines()]
    assert {row["event"] for row in rows} <= {
        *("started", "cwnd_reset", "cwnd_recovery", "block_io", "workloads", "lost", "summary")
    }
    assert [row["event"] for row in rows].index("started") == 0
    assert rows[0]["capture"] == str(tmp_path / "a.cwnd")
    assert rows[0]["probes"]["idle"]
    (reset,) = (row for row in rows if row["event"] == "cwnd_reset")
    assert (reset["cwnd_before"], reset["cwnd_after"]) == (send.before.cwnd, send.after.cwnd)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", reset["time"])
    own = [row for row in rows if row["event"] == "block_io" and row["dev"] == disk.dev and row["tgid"] == os.getpid()]
    assert len(own) >= 9
    assert rows[-1]["event"] == "summary"
    assert rows[-1]["kept"]["cwnd_reset"] == 1
    assert rows[-1]["capture"] == str(tmp_path / "a.cwnd")
    assert {row["dev"] for row in rows[-1]["block_io"]} >= {disk.dev}


def test_quiet_prints_only_the_summary(space: tcp.Space, tmp_path: Path) -> None:
    done = call("run", "-q", "-n", space.name, "-d", "200ms", "--no-block", "-o", tmp_path / "a.cwnd")
    assert (done.returncode, done.stderr) == (0, "")
    assert "kept 0 resets; lost 0 resets" in done.stdout


@pytest.mark.parametrize("abstract", [False, True])
def test_a_service_manager_is_notified(space: tcp.Space, tmp_path: Path, abstract: bool) -> None:
    """It gets messages when all is attached and at the end; a quiet trace prints nothing on stderr."""
    name = f"\0cwt-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name)
        manager.settimeout(LONG_S)
        address = name.replace("\0", "@")
        arguments = ("-q", "-n", space.name, "--no-block", "-o", tmp_path / "a.cwnd")
        with running(*arguments, before=("env", f"NOTIFY_SOCKET={address}"), wait=False) as run:
            assert manager.recv(100) == b"READY=1"
            assert (tmp_path / "a.cwnd" / "meta.json").exists()
            code, _, stderr = run.end(signal.SIGTERM)
            assert manager.recv(100) == b"STOPPING=1"
        assert (code, stderr) == (0, "")
        manager.setblocking(False)
        with pytest.raises(BlockingIOError):
            manager.recv(100)


def test_verbose_explains_why_better_probes_are_not_used(space: tcp.Space, tmp_path: Path) -> None:
    done = call("run", "-v", "-n", space.name, "-d", "50ms", "--no-block", cwd=tmp_path)
    assert done.returncode == 0
    (capture,) = tmp_path.iterdir()
    assert re.fullmatch(r"cwndtrace-\d{8}-\d{6}\.cwnd", capture.name)
    order = [probe.name for probe in ladder.PROBES]
    for name in order[: order.index(cwndtrace.load(capture).meta["probes"]["idle"])]:
        assert f"  idle: not {name}: " in done.stderr


def test_a_trace_ends_when_the_reader_of_stdout_ends(connect: Connect, space: tcp.Space, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with running("-n", space.name, "--no-block", "-o", tmp_path / "a.cwnd", stdout=writer) as run:
        os.close(writer)
        assert os.read(reader, 4).startswith(b"TIME")
        send_after_idle(connect())
        folder = tmp_path / "a.cwnd" / "cwnd_reset"
        tcp.until(folder.exists, 20, "the reset")
        os.close(reader)
        code, _, stderr = run.end(None)
    assert code == 0
    assert "Traceback" not in stderr
    assert "Broken pipe" not in stderr
    trace = cwndtrace.load(tmp_path / "a.cwnd")
    assert (trace.status, len(trace.resets)) == ("complete", 1)


def test_a_trace_ends_when_the_reader_ends_before_any_output(space: tcp.Space, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with running("-n", space.name, "--no-block", "-o", tmp_path / "a.cwnd", stdout=writer) as run:
        os.close(writer)
        assert os.read(reader, 4).startswith(b"TIME")
        os.close(reader)
        # The trace prints nothing that would fail.
        code, _, stderr = run.end(None)
    assert code == 0
    assert "Traceback" not in stderr
    assert cwndtrace.load(tmp_path / "a.cwnd").status == "complete"


def test_a_terminal_gets_colours_and_a_status_line(connect: Connect, space: tcp.Space, tmp_path: Path) -> None:
    master, slave = pty.openpty()
    command = [*COMMAND, "run", "-n", space.name, "-o", str(tmp_path / "a.cwnd")]
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=ENVIRONMENT) as process:
        try:
            os.close(slave)
            output = read_until(master, rb"waiting for idle time longer than the RTO")
            send_after_idle(connect())
            output = read_until(master, rb"\x1b\[33m *\d+ -> \d+\x1b\[0m", output)
            output = read_until(master, rb"\r\x1b\[K1 reset ", output)
            process.send_signal(signal.SIGINT)
            output = read_until(master, rb"These commands read it:", output)
            with contextlib.suppress(OSError):  # the other end is closed
                while more := os.read(master, 65536):
                    output += more
            assert process.wait(60) == 0
        finally:
            process.kill()
            os.close(master)
    assert b"\x1b[1m" in output
    assert b"Traceback" not in output


def test_two_traces_at_once_record_the_same_reset(connect: Connect, space: tcp.Space, tmp_path: Path) -> None:
    def arguments(name: str) -> list[str | Path]:
        return ["-n", space.name, "--no-block", "-o", tmp_path / name]

    with running(*arguments("a.cwnd")) as one, running(*arguments("b.cwnd")) as two:
        send = send_after_idle(connect())
        assert one.end()[0] == two.end()[0] == 0
    for name in ("a.cwnd", "b.cwnd"):
        assert list(cwndtrace.load(tmp_path / name).resets["cwnd_before"]) == [send.before.cwnd]


def test_a_full_disk_is_reported_and_the_trace_goes_on(space: tcp.Space, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    tcp.run("mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small))
    try:
        with loop() as disk, running("-n", space.name, "-o", small / "a.cwnd") as run:
            (small / "filler").write_bytes(bytes((os.statvfs(small).f_bavail - 1) * 4096))
            disk.read(*range(3000))
            run.wait_for(re.compile("No space left on device"), 30)
            run.wait_for(re.compile("Free some space there, or write to another disk with -o"), 5)
            assert run.process.poll() is None
            (small / "filler").unlink()
            parts = small / "a.cwnd" / "block_io"
            tcp.until(lambda: list(parts.glob("part-*.parquet")), 30, "the rows that waited")
            code, stdout, stderr = run.end()
        assert code == 0, stderr
        assert stderr.count("No space left on device") == 1
        assert "Traceback" not in stderr
        trace = cwndtrace.load(small / "a.cwnd")
        assert trace.status == "complete"
        kept = trace.meta["counts"]["block_io"]["kept"]
        assert len(trace.block_io) == kept > 2900
        assert "kept 0 resets" in stdout
    finally:
        tcp.run("umount", str(small))


# ---- warnings --------------------------------------------------------------------------------------


def test_warns_that_the_setting_is_off_and_there_is_no_connection(
    make_space: Callable[[], tcp.Space], tmp_path: Path
) -> None:
    space = make_space()
    space.sysctl(IDLE, "0")
    done = call("run", "-i", "lo", "-d", "2500ms", "--no-block", "-o", tmp_path / "a.cwnd", before=within(space))
    assert done.returncode == 0
    # The warning comes once, although connections are checked again after two seconds.
    assert done.stderr.count(f"warning: {IDLE} is 0 in this network namespace") == 1
    assert f"(sysctl -w {IDLE}=1 turns it on)" in done.stderr
    assert done.stderr.count("warning: lo carries no TCP connection now") == 1
    assert "No TCP connection was seen." in done.stdout


def test_warns_that_every_connection_is_exempt(
    make_space: Callable[[], tcp.Space], drain: tcp.Drain, tmp_path: Path
) -> None:
    if "bbr" not in Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split():
        pytest.skip("this kernel has no bbr: modprobe tcp_bbr")
    space = make_space()
    exempt = tcp.connect(space, drain, ca="bbr")
    try:
        # The peer has the default congestion control of the namespace otherwise.
        exempt.peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"bbr")
        done = call("run", "-i", "lo", "-n", space.name, "-d", "2s", "--no-block", "-o", tmp_path / "a.cwnd")
        place = rf"lo in network namespace {space.name} \(inode \d+\)"
        assert re.search(rf"warning: every connection on {place} uses bbr, which is exempt", done.stderr)
    finally:
        exempt.close()


# ---- bad input -------------------------------------------------------------------------------------


def test_run_and_doctor_need_root(tmp_path: Path) -> None:
    need_readable_checkout()
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    for arguments in (["run", "-o", str(tmp_path / "a.cwnd")], ["doctor"]):
        done = call(*arguments, before=nobody)
        assert_short(done, 1, "needs root", "sudo")


def test_an_unknown_interface_is_refused(space: tcp.Space, tmp_path: Path) -> None:
    done = call("run", "-i", "eth\x1b[2J", "-n", space.name, "-o", tmp_path / "a.cwnd")
    assert_short(done, 1, "no interface eth", "there are: lo$")
    assert "\x1b" not in done.stderr
    assert not (tmp_path / "a.cwnd").exists()


def test_the_error_names_the_namespace_of_an_interface(make_space: Callable[[], tcp.Space], tmp_path: Path) -> None:
    space = make_space()
    space.ip("link", "add", "cwttest0", "type", "veth", "peer", "name", "cwttest1")
    done = call("run", "-i", "cwttest0", "-o", tmp_path / "a.cwnd")
    assert_short(done, 1, f"cwttest0 is in network namespace {space.name}, not in this", f"--netns {space.name}")


@pytest.mark.parametrize(
    ("arguments", "patterns"),
    [
        (["-p", "4194305"], ["no process 4194305"]),
        (["-c", "no/such"], ["no cgroup no/such", "give a folder below /"]),
        (["-n", "nowhere"], ["no network namespace nowhere", "there are: this"]),
        (["-n", "4194305"], ["no network namespace 4194305"]),
    ],
)
def test_an_unknown_process_cgroup_or_namespace_is_refused(
    arguments: list[str], patterns: list[str], tmp_path: Path
) -> None:
    assert_short(call("run", *arguments, "-o", tmp_path / "a.cwnd"), 1, *patterns)
    assert not (tmp_path / "a.cwnd").exists()


@pytest.mark.parametrize("arguments", [["-P", "70000"], ["-P", "0"]])
def test_ports_out_of_range_are_refused(arguments: list[str]) -> None:
    assert_short(call("run", *arguments), 2, "ports go from 1 to 65535")


def test_an_unknown_probe_is_refused() -> None:
    done = call("run", "--probe", "crystal-ball")
    assert done.returncode == 2
    assert "'crystal-ball' is not one of 'tracepoint', 'fentry', 'kprobe', 'sendmsg', 'tcp_probe'" in done.stderr


def test_a_probe_that_this_kernel_lacks_is_refused(tmp_path: Path) -> None:
    missing = left_out()
    assert missing, "this kernel has every probe, so no error occurs"
    for name, why in missing.items():
        done = call("run", "--probe", name, "-o", tmp_path / "a.cwnd")
        assert_short(
            done, 77, "no probe can see idle resets on this kernel", f"{name}: {re.escape(why[:20])}", "doctor"
        )
    assert not (tmp_path / "a.cwnd").exists()


def test_an_unusable_path_for_the_capture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.cwnd").mkdir()
    (tmp_path / "file").touch()
    assert_short(call("run", "-o", tmp_path / "a.cwnd"), 1, "exists already", "-o")
    assert_short(call("run", "-o", tmp_path / "missing" / "a.cwnd"), 1, "missing doesn't exist", "-o")
    assert_short(call("run", "-o", tmp_path / "file" / "a.cwnd"), 1, "can't be made: Not a directory", "-o")
    assert_short(call("run", "-o", tmp_path / ".."), 1, "exists already", "-o")
    nowhere = r"/proc/a\.cwnd can't be made: nothing can be made in that file system"
    assert_short(call("run", "--no-block", "-o", "/proc/a.cwnd"), 1, nowhere, "-o")


def test_a_capture_has_the_settings_at_the_start_and_at_the_end(
    make_space: Callable[[], tcp.Space], tmp_path: Path
) -> None:
    changed = make_space()
    with running("-o", str(tmp_path / "a.cwnd"), "--no-block") as run:
        changed.sysctl(IDLE, "0")
        young = make_space()
        code, _, stderr = run.end()
    assert code == 0, stderr
    trace = cwndtrace.load(tmp_path / "a.cwnd")
    spaces = trace.about.namespaces
    ends = [(spaces[str(s.inode)].idle_start, spaces[str(s.inode)].idle_end) for s in (changed, young)]
    assert ends == [(1, 0), (None, 1)]
    notes = dict(zip(trace.audit()["netns_ino"], trace.audit()["note"], strict=True))
    assert notes[changed.inode].startswith(f"{IDLE} was 1 at the start of the capture and 0 at its end")
    assert notes[young.inode].startswith("the namespace is younger than the trace")


# ---- doctor ----------------------------------------------------------------------------------------


def test_doctor_reports_the_facts_of_this_machine(space: tcp.Space) -> None:
    space.sysctl(IDLE, "0")
    try:
        done = call("doctor", "--json")
    finally:
        space.sysctl(IDLE, "1")
    assert done.returncode == 0, done.stderr
    assert lasting(done.stderr) == []
    machine = json.loads(done.stdout)
    by_name = {fact["name"]: fact for fact in machine["facts"]}
    assert by_name["kernel"]["value"].startswith(f"Linux {os.uname().release}")
    for name in ("BTF", "bcc", "tracefs", "lockdown", "block I/O", "congestion control"):
        assert by_name[name]["value"]
    for name, why in left_out().items():
        fact = by_name[f"probe {name}"]
        assert (fact["state"], fact["value"]) == ("lack", why)
        assert fact["remedy"]
    assert machine["probes"]["idle"] not in (None, *left_out())
    assert "= 0: no window is reset" in by_name[f"sysctl in {space.name}"]["value"]
    assert f"{IDLE} = {netns.idle_sysctl(netns.own())}" in by_name["sysctl in this"]["value"]


# ---- names from outside ----------------------------------------------------------------------------

EVIL = b"\x1b[2J\x07evil\n"


@contextmanager
def evil_thread_name(name: bytes = EVIL) -> Iterator[None]:
    libc = ctypes.CDLL(None)
    old = tcp.thread_name().encode()
    libc.prctl(15, name, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(15, old, 0, 0, 0)


def test_a_hostile_name_never_reaches_the_terminal(connect: Connect, space: tcp.Space, tmp_path: Path) -> None:
    with loop() as disk, running("-n", space.name, "--block", "-o", tmp_path / "a.cwnd") as run:
        connection = connect()
        connection.grow()
        with evil_thread_name():
            time.sleep(connection.info().rto_us / 1e6 + 0.15)
            connection.send()
            disk.read(1, 2, 3)
        code, stdout, stderr = run.end()
    with evil_thread_name():
        # The snapshots find a connection of this process under that name, and doctor a namespace.
        plot = call("plot", tmp_path / "a.cwnd", "-o", tmp_path / "a.svg")
        doctor = call("doctor")
        missing = call("run", "-n", "nowhere")
    assert code == plot.returncode == doctor.returncode == 0
    assert "?[2J?evil?" in stdout
    for text in (stdout, stderr, plot.stdout, plot.stderr, doctor.stdout, doctor.stderr, missing.stderr):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    assert "sudo cwndtrace run --iface NAME will work here." in doctor.stdout
    assert "fix: " in doctor.stdout
    assert "\x1b" not in (tmp_path / "a.svg").read_text(encoding="utf-8")
    # The file has the name unchanged, and a frame has a printable form.
    assert set(open_capture(tmp_path / "a.cwnd").table("cwnd_reset")["comm"].to_pylist()) == {EVIL.decode()}
    assert set(cwndtrace.load(tmp_path / "a.cwnd").resets["comm"]) == {"?[2J?evil?"}


@pytest.mark.parametrize("as_json", [False, True])
def test_a_name_that_cannot_be_printed_is_replaced(
    connect: Connect, space: tcp.Space, tmp_path: Path, as_json: bool
) -> None:
    """The encoding is latin-1 with strict errors, and the file name isn't valid UTF-8."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.cwnd"))
    json_too = ["--json"] if as_json else []
    strict = ("env", "PYTHONIOENCODING=latin-1:strict")
    with loop() as disk, running("-n", space.name, "--block", *json_too, "-o", path, before=strict) as run:
        connection = connect()
        connection.grow()
        with evil_thread_name(b"\xff\xfe\xff"):
            time.sleep(connection.info().rto_us / 1e6 + 0.15)
            connection.send()
            disk.read(1, 2, 3)
        code, stdout, stderr = run.end()
    assert code == 0, stderr
    assert "Traceback" not in stderr
    if as_json:
        assert stdout.isascii()
        names = {row.get("comm") for row in map(json.loads, stdout.splitlines()) if row["event"] == "cwnd_reset"}
        assert names == {"\ufffd" * 3}
    else:
        assert f"???[{os.getpid()}]" in stdout
        assert "kept 1 reset" in stdout
    trace = cwndtrace.load(path)
    assert (trace.status, len(trace.resets)) == ("complete", 1)


def test_a_trace_of_one_worker_warns_of_the_others(tmp_path: Path) -> None:
    with serving(1, 2) as server:
        first, second = server.workers
        done = call("run", "-p", str(first), "-d", "50ms", "--no-block", "--json", "-o", tmp_path / "a.cwnd")
        assert done.returncode == 0, done.stderr
        assert re.search(
            rf"^warning: process {first} has 1 of 3 connections of its program: python\S*\[{second}\] holds 2 that "
            rf"aren't traced \((--cgroup \S+|--port {server.port}) traces all of them\)$",
            done.stderr,
            re.MULTILINE,
        )
        assert "aren't" not in done.stdout
    with serving(2) as server:
        worker = str(server.workers[0])
        done = call("run", "-p", worker, "-d", "50ms", "--no-block", "-o", tmp_path / "b.cwnd")
    assert done.returncode == 0, done.stderr
    assert "of its program" not in done.stderr
