# SPDX-License-Identifier: Apache-2.0
"""Tests of traces that end early: by SIGKILL, by each signal, without a reader of the output, and on a failing disk."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import cwndtrace
from tests.harness import tcp
from tests.harness.captures import assert_complete, block_io_rows
from tests.harness.command import COMMAND, ENVIRONMENT, call, read_until, running, send_after_idle
from tests.harness.disk import Traced, file_system, go, loop, reader
from tests.harness.processes import children
from tests.harness.soak import Load, amount, without_row
from tests.harness.tcp import Connect

pytestmark = pytest.mark.live

AT_ONCE = 5
SECOND = 1_000_000_000


def waited_ns(pid: int) -> int:
    """Return the time for which a process's threads have waited for a CPU so far, in ns."""
    total = 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # The thread ended meanwhile.
            total += int((thread / "schedstat").read_text().split()[1])
    return total


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_a_trace_killed_at_random_moments_loses_only_the_last_second(
    connect: Connect, space: tcp.Space, tmp_path: Path
) -> None:
    """SIGKILL under load loses no row that is a second old, and leaves no unreadable part.

    While the trace waits for a CPU it can't save rows, so that time is added to the second.
    """
    chance, killed = random.Random(8), dict[Path, tuple[int, int, int]]()
    connections = [connect() for _ in range(4)]
    with (
        loop() as disk,
        Traced() as witness,
        Load(disk, connections, 1000) as load,
        contextlib.ExitStack() as stack,
    ):
        for batch in range(amount(1, 10)):
            names = [tmp_path / f"{batch}-{i}.cwnd" for i in range(AT_ONCE)]
            runs = {name: start(stack, "-n", space.name, "-q", "-o", name) for name in names}
            for name in names:
                tcp.until(lambda name=name: (name / "meta.json").exists(), 120, "all to be attached")  # type: ignore[misc]
            attached, waited = time.monotonic_ns(), {name: waited_ns(run.pid) for name, run in runs.items()}
            for moment, name in sorted((attached / 1e9 + chance.uniform(0.05, 5), name) for name in names):
                time.sleep(max(0.0, moment - time.monotonic()))
                killed[name] = attached, time.monotonic_ns(), waited_ns(runs[name].pid) - waited[name]
                runs[name].kill()
                runs[name].wait()
    # A security policy may hide the end of a request from every tracer. The witness has no row of it either. A tracer
    # counts it only when the request's memory is used again.
    reads, seen, checked, too_old = load.reads, witness.records(disk), [0, 0], dict[str, list[int]]()
    hidden = without_row(seen, disk, reads)
    for name, (attached, end, owed) in killed.items():
        trace = cwndtrace.load(name)
        rows = trace.block_io, trace.resets, trace.connections, trace.samples, trace.recoveries
        assert (trace.status, trace.warnings) == ("interrupted", []), name
        # The first snapshot takes longer where five traces start at once.
        assert end < attached + 3 * SECOND or not rows[2].empty
        last = end - SECOND - owed
        due = [r for r, unseen in zip(reads, hidden, strict=True) if not unseen]
        due = [r for r in due if r.begin_ns > attached and r.end_ns < last]
        gone = [r for r, without in zip(due, without_row(rows[0], disk, due), strict=True) if without]
        if gone:
            too_old[f"{name.name} after {(end - attached) / 1e9:.2f} s"] = [(end - r.end_ns) // 1_000_000 for r in gone]
        sends = [s for s in load.resets() if s.start_ns > attached and s.end_ns < last]
        stamps = trace.resets["ts_ns"].to_numpy()
        assert all(((stamps >= s.start_ns) & (stamps <= s.end_ns)).any() for s in sends), name
        checked = [checked[0] + len(due), checked[1] + len(sends)]
    print(
        f"killed {len(killed)} times: {checked[0]} reads and {checked[1]} resets looked for, those missing by age "
        f"in ms: {too_old}; {hidden.sum()} of {len(reads)} reads hidden from every tracer; waited for a CPU, ms: "
        f"{[owed // 1_000_000 for _, _, owed in killed.values()]}"
    )
    assert not too_old
    assert checked[0] > 1000
    assert checked[1] > 5


def start(stack: contextlib.ExitStack, *arguments: str | Path) -> subprocess.Popen[str]:
    """Start ``cwndtrace run`` without waiting; it is killed when the stack is closed."""
    process = subprocess.Popen(
        [*COMMAND, "run", *map(str, arguments)], stdout=subprocess.DEVNULL, env=ENVIRONMENT, text=True
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


def test_a_trace_killed_while_it_compiles_leaves_no_process(tmp_path: Path) -> None:
    # No program with this filter is in the cache. The image of this probe is larger than a pipe.
    idle = f"{random.SystemRandom().randint(1_000_000, 2_000_000_000)}us"
    with running("--probe", "sendmsg", "--min-idle", idle, "-q", "-o", tmp_path / "a.cwnd", wait=False) as run:

        def compiling() -> bool:
            """Return whether there are two children: the helper, which has no output, and one with the trace's."""
            outputs = set()
            for pid in children(run.process.pid):
                with contextlib.suppress(FileNotFoundError):
                    outputs.add(Path(f"/proc/{pid}/fd/1").readlink())
            return outputs == {Path(os.devnull), Path(f"/proc/{run.process.pid}/fd/1").readlink()}

        tcp.until(compiling, 30, "the compiler")
        run.process.kill()
        # The end of its output comes once no process has it open.
        run.process.communicate(timeout=30)


# ---- signals and closed outputs -------------------------------------------------------------------------


ENDS: dict[str, tuple[signal.Signals, ...]] = {
    "term": (signal.SIGTERM,),
    "hup": (signal.SIGHUP,),
    "int": (signal.SIGINT,),
    # The process gets both when it continues, so the second signal comes while it handles the first.
    "int twice": (signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGCONT),
}


def test_signals_end_a_trace_cleanly(connect: Connect, space: tcp.Space, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        runs = {
            name: stack.enter_context(running("-n", space.name, "--no-block", "-o", tmp_path / f"{name}.cwnd"))
            for name in ENDS
        }
        send_after_idle(connect())
        for name, numbers in ENDS.items():
            for number in numbers:
                runs[name].process.send_signal(number)
            code, stdout, stderr = runs[name].end(None)
            assert code == 0, (name, stderr)
            assert "The capture is in" in stderr
            # After a second signal there is no summary.
            assert ("kept 1 reset; lost 0 resets" in stdout) == (name != "int twice")
            assert "Traceback" not in stderr
            assert_complete(tmp_path / f"{name}.cwnd", 1)


def test_a_trace_ends_when_the_terminal_hangs_up(connect: Connect, space: tcp.Space, tmp_path: Path) -> None:
    """As when an ssh connection breaks, SIGHUP comes, and writing to the terminal fails from then on."""
    master, slave = os.openpty()

    def lead() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    command = [*COMMAND, "run", "-n", space.name, "--no-block", "-o", str(tmp_path / "a.cwnd")]
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=ENVIRONMENT, preexec_fn=lead, text=True
    )
    os.close(slave)
    try:
        read_until(master, rb"^Tracing .+: idle by \w+")
        send_after_idle(connect())
        tcp.until(lambda: (tmp_path / "a.cwnd" / "cwnd_reset").exists(), 20, "the reset")
    finally:
        os.close(master)
    try:
        assert process.wait(60) == 0
    finally:
        process.kill()
    assert_complete(tmp_path / "a.cwnd", 1)


@pytest.mark.parametrize("insist", [False, True])
def test_a_trace_goes_on_while_the_terminal_is_stopped(
    connect: Connect, space: tcp.Space, tmp_path: Path, insist: bool
) -> None:
    """Ctrl-S stops a terminal. Resets are saved although none can be printed; a second signal ends the wait for it."""
    path = tmp_path / "a.cwnd"
    master, slave = os.openpty()
    command = [*COMMAND, "run", "-n", space.name, "--no-block", "-o", str(path)]
    output = b""
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=ENVIRONMENT) as process:
        try:
            read_until(master, rb"waiting for idle time")
            termios.tcflow(slave, termios.TCOOFF)
            for resets in (1, 2, 3):
                send_after_idle(connect())
                tcp.until(lambda n=resets: len(cwndtrace.load(path).resets) == n, 20, "another reset")  # type: ignore[misc]
            process.send_signal(signal.SIGINT)
            tcp.until(lambda: cwndtrace.load(path).status == "complete", 20, "the end")
            assert process.poll() is None
            if insist:
                # This is another signal, because the same one within a second would count as the first.
                process.send_signal(signal.SIGTERM)
            else:
                termios.tcflow(slave, termios.TCOON)
                output = read_until(master, rb"These commands read it")
            assert process.wait(20) == 0
        finally:
            process.kill()
            os.close(master)
            os.close(slave)
    assert len(re.findall(rb"\d+ -> \d+", output)) == (0 if insist else 3)
    assert (b"kept 3 resets" in output) != insist
    assert_complete(path, 3)


PARENT = """
import subprocess, sys, time
subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE)
time.sleep(1000)
"""


def test_a_trace_ends_when_its_parent_is_killed(connect: Connect, space: tcp.Space, tmp_path: Path) -> None:
    """No process reads the output any more, and the trace prints nothing that would fail."""
    path = tmp_path / "a.cwnd"
    command = [*COMMAND, "run", "-n", space.name, "--no-block", "-o", str(path)]
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, *command], env=ENVIRONMENT, stderr=subprocess.DEVNULL
    ) as parent:
        try:
            tcp.until(lambda: (path / "meta.json").exists(), 60, "a trace under way")
            send_after_idle(connect())
            tcp.until(lambda: (path / "cwnd_reset").exists(), 20, "the reset")
        finally:
            parent.kill()
    tcp.until(lambda: cwndtrace.load(path).status != "running", 30, "the trace's end")
    assert_complete(path, 1)


def test_a_full_disk_for_stdout_is_reported(space: tcp.Space, tmp_path: Path) -> None:
    with (
        Path("/dev/full").open("w") as full,
        running("-n", space.name, "--no-block", "-o", tmp_path / "a.cwnd", stdout=full.fileno()) as run,
    ):
        code, _, stderr = run.end(None)
    assert code == 1
    assert stderr.count("the output can't be written: No space left on device") == 1
    assert "Traceback" not in stderr
    assert_complete(tmp_path / "a.cwnd", 0)


def test_a_trace_runs_when_stderr_is_closed(space: tcp.Space, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    command = [*COMMAND, "run", "-n", space.name, "--no-block", "-d", "1s", "-o", str(tmp_path / "a.cwnd")]
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=closed, env=ENVIRONMENT, timeout=60, check=False)
    assert done.returncode == 0
    assert b"kept 0 resets" in done.stdout
    assert_complete(tmp_path / "a.cwnd", 0)


def test_a_trace_runs_when_all_standard_descriptors_are_closed(space: tcp.Space, tmp_path: Path) -> None:
    """Output must not go into the capture's files, which may get these descriptors."""
    closed = ("sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-')
    done = call("run", "-n", space.name, "--no-block", "-d", "1s", "-o", tmp_path / "a.cwnd", before=closed)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert_complete(tmp_path / "a.cwnd", 0)


# ---- a disk that fails -------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    path.mkdir()
    tcp.run("mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(path))
    try:
        yield path
    finally:
        tcp.run("umount", "-l", str(path))


def test_a_disk_that_becomes_read_only_makes_a_trace_wait_or_stop(space: tcp.Space, tmp_path: Path) -> None:
    """One trace waits until it may write again, the other one stops; the rows so far stay readable."""
    with small_disk(tmp_path / "small") as small, loop() as disk:
        waits, stops = small / "waits.cwnd", small / "stops.cwnd"
        with (
            running("-n", space.name, "-o", waits) as one,
            running("-n", space.name, "--unwritable", "stop", "-o", stops) as two,
        ):
            disk.read(*range(100))
            for path in (waits, stops):
                tcp.until(lambda path=path: (path / "block_io").exists() and block_io_rows(path) >= 100, 20, "the rows")  # type: ignore[misc]
            tcp.until(lambda: remount(small, "ro"), 10, "the disk to be read-only")
            disk.read(*range(500))
            one.wait_for(re.compile("Read-only file system"), 20)
            code, _, stderr = two.end(None)
            assert code == 1
            assert "Read-only file system" in stderr
            assert "Traceback" not in stderr
            assert block_io_rows(stops) >= 100
            assert one.process.poll() is None
            assert remount(small, "rw")
            tcp.until(lambda: block_io_rows(waits) >= 600, 20, "the rows that waited")
            code, _, stderr = one.end()
        assert (code, stderr.count("Read-only file system")) == (0, 1)
        trace = cwndtrace.load(waits)
        assert (trace.status, trace.warnings) == ("complete", [])
        assert len(trace.block_io) == trace.meta["counts"]["block_io"]["kept"]


def remount(path: Path, how: str) -> bool:
    """Return true if remounting succeeded; it fails while a part is being written."""
    return (
        subprocess.run(["mount", "-o", f"remount,{how}", str(path)], check=False, capture_output=True).returncode == 0
    )


@contextlib.contextmanager
def hanging(path: Path) -> Iterator[None]:
    """Freeze a file system meanwhile, so that every write to it blocks."""
    tcp.run("fsfreeze", "--freeze", str(path))
    try:
        yield
    finally:
        tcp.run("fsfreeze", "--unfreeze", str(path))


def waits_for_a_disk(pid: int) -> bool:
    """Return true if a thread of the process is in uninterruptible sleep."""
    stats = Path(f"/proc/{pid}/task").glob("*/stat")
    return any(stat.read_text().rpartition(")")[2].split()[0] == "D" for stat in stats)


def test_a_disk_that_hangs_blocks_only_the_writing_thread(tmp_path: Path) -> None:
    """Records that come meanwhile are kept or counted, and the trace ends cleanly afterwards."""
    reads = 140_000
    with (
        loop() as slow,
        file_system(slow, tmp_path / "slow") as folder,
        loop() as disk,
        reader(disk, reads) as child,
        running("-p", str(child.pid), "-o", folder / "a.cwnd") as run,
    ):
        with hanging(folder):
            with disk.counted(reads):
                go(child)
            tcp.until(lambda: waits_for_a_disk(run.process.pid), 20, "the trace to wait for the disk")
            run.process.send_signal(signal.SIGINT)
        code, _, stderr = run.end(None)
        assert (code, "Traceback" in stderr) == (0, False), stderr
        trace = cwndtrace.load(folder / "a.cwnd")
        counts = trace.meta["counts"]["block_io"]
        print(f"{reads} reads while the disk hung: {counts}")
        assert (trace.status, trace.warnings) == ("complete", [])
        assert len(trace.block_io) == counts["kept"]
        assert counts["kept"] + counts["lost"] == reads


def test_a_trace_fails_when_its_folder_is_removed(space: tcp.Space, tmp_path: Path) -> None:
    path = tmp_path / "a.cwnd"
    with loop() as disk, running("-n", space.name, "-o", path) as run:
        disk.read(*range(100))
        tcp.until(lambda: (path / "block_io").exists() and block_io_rows(path) >= 100, 20, "the rows")
        tcp.run("rm", "-rf", str(path))
        disk.read(*range(100))
        run.wait_for(re.compile("No such file or directory"), 20)
        assert run.process.poll() is None
        code, stdout, stderr = run.end()
    assert code == 1
    assert re.search(r"cwndtrace: [\d,]+ rows of \w+.* never reached .*a\.cwnd: No such file or directory", stderr)
    # The error is reported once when it occurs, and once at the end, with the lost rows.
    assert stderr.count("No such file or directory") == 2
    assert "Traceback" not in stderr + stdout
    assert not path.exists()
