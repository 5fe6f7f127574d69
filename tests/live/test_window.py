# SPDX-License-Identifier: Apache-2.0
"""A window of the past under load, and dumps of it, on this machine's kernel.

The windows are of seconds, so that parts leave them within a test; ``make soak`` has one of two minutes.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pyarrow.compute as pc
import pytest

import cwndtrace
from cwndtrace.cli.dump import ARRIVED_S
from cwndtrace.records import arrow
from cwndtrace.store import open_capture
from cwndtrace.store.dump import clock_column
from cwndtrace.store.window import NAMES
from tests.harness import tcp
from tests.harness.command import ENVIRONMENT, LONG_S, Running, call, running, send_after_idle
from tests.harness.disk import Disk, loop
from tests.harness.soak import SECONDS
from tests.harness.tcp import Connect
from tests.harness.users import GID, UID, need_readable_checkout

pytestmark = pytest.mark.live

KEEP_S = 10
LASTING_S = SECONDS or 2 * KEEP_S
LASTING_KEEP_S = min(120, max(KEEP_S, LASTING_S // 5))
DUMPED = re.compile(r"dumped to (\S+) because of (.+?): ")


@contextmanager
def load(connect: Connect, device: Disk) -> Iterator[None]:
    """Read a device and send after idle time, both without an end, until this context ends."""
    over = threading.Event()
    failures: list[BaseException] = []

    def forever(work: Callable[[], object]) -> None:
        try:
            while not over.is_set():
                work()
        except BaseException as e:
            failures.append(e)

    connection = connect()
    works = (lambda: device.read(*range(200)), lambda: send_after_idle(connection))
    threads = [threading.Thread(target=forever, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert failures == []


def rows(path: Path, table: str, start_ns: int, end_ns: int) -> pd.DataFrame:
    """Return the rows of a capture's table in a span, as pandas filters them; of block requests, this process's.

    The last requests of a trace's own writing wait in memory for ten seconds.
    """
    whole = open_capture(path).table(table)
    column = clock_column(table)
    frame = whole.filter((pc.field(column) >= start_ns) & (pc.field(column) < end_ns)).to_pandas()
    frame = frame.astype({name: "str" for name in frame.columns if isinstance(frame[name].dtype, pd.CategoricalDtype)})
    if table == "block_io":
        frame = frame[frame["tgid"] == os.getpid()]
    return pd.DataFrame(frame.sort_values(list(frame.columns), ignore_index=True))


def assert_exact(dump: Path, whole: Path) -> None:
    """Assert that a dump has the rows that another capture has of its span, and that it opens as any other."""
    opened = cwndtrace.load(dump)
    assert (opened.status, opened.gaps()) == ("complete", [])
    about = opened.about
    assert about.begin
    assert about.end
    for table in set(arrow.TABLES) - NAMES:
        span = about.begin.mono_ns, about.end.mono_ns
        found, expected = rows(dump, table, 0, 1 << 62), rows(whole, table, *span)
        if ended := {"cwnd_recovery": "end_ts_ns", "block_io": "done_ns"}.get(table):
            # What hadn't ended when the dump was made has no row in it, and one in the whole capture.
            found, expected = (
                frame[frame[ended] < about.end.mono_ns].reset_index(drop=True) for frame in (found, expected)
            )
        if table == "cwnd_recovery":
            # A window that was back is followed until the next restart, which may come after the dump was made. So the
            # last row of a connection may be missing, and no other one.
            last = expected.groupby("sock_cookie")["reset_ts_ns"].transform("max") == expected["reset_ts_ns"]
            there = expected["reset_ts_ns"].isin(found["reset_ts_ns"])
            expected = expected[there | ~last].reset_index(drop=True)
        pd.testing.assert_frame_equal(found, expected)
    assert len(rows(dump, "block_io", 0, 1 << 62)) > 100
    assert not opened.workloads.empty


def assert_same_requests(ours: pd.DataFrame, theirs: pd.DataFrame) -> None:
    """Assert that two traces kept the same requests of a span; each tracer stamps them itself, not quite alike."""
    assert len(ours) > 100
    assert abs(len(ours) - len(theirs)) <= 4  # those at both ends of the span
    inner = ours.iloc[5:-5]
    first = int((theirs["start_ns"].astype("int64") - int(inner["start_ns"].iloc[0])).abs().argmin())
    other = theirs.iloc[first : first + len(inner)]
    columns = ["sector", "bytes", "op", "tid", "dev"]
    pd.testing.assert_frame_equal(inner[columns].reset_index(drop=True), other[columns].reset_index(drop=True))


def facts(run: Running, capture: Path) -> tuple[int, int, int]:
    """Return the bytes of a capture, and the memory in kB and the number of open files of the process that traces."""
    size = 0
    for path in capture.rglob("*"):
        try:
            size += path.stat().st_size
        except FileNotFoundError:
            continue
    status = Path(f"/proc/{run.process.pid}/status").read_text()
    memory = int(re.search(r"^VmRSS:\s+(\d+)", status, re.MULTILINE)[1])  # type: ignore[index]
    return size, memory, len(list(Path(f"/proc/{run.process.pid}/fd").iterdir()))


def until_moved(capture: Path, times: int, keep_s: float = KEEP_S) -> None:
    """Wait until the beginning of a window of ``keep_s`` seconds has moved so many times."""
    seen: set[int] = set()

    def moved() -> bool:
        seen.add(open_capture(capture).about.kept_from or 0)
        return len(seen) > times

    tcp.until(moved, LONG_S + times * keep_s, "parts that leave the window")


@pytest.mark.soak
@pytest.mark.timeout(LASTING_S * 2 + 900)
def test_a_window_is_flat_and_has_what_a_plain_trace_has(connect: Connect, space: tcp.Space, tmp_path: Path) -> None:
    plain, kept = tmp_path / "plain.cwnd", tmp_path / "kept.cwnd"
    measured: list[tuple[int, int, int]] = []
    with loop() as disk, running("-n", space.name, "--block", "-q", "-o", plain, stdout=-3, wait=False) as beside:
        tcp.until(lambda: plain.exists(), LONG_S, "the plain trace")
        with (
            running("-n", space.name, "--block", "--keep", f"{LASTING_KEEP_S}s", "-o", kept, stdout=-3) as run,
            load(connect, disk),
        ):
            until_moved(kept, 5, LASTING_KEEP_S)
            begun = time.monotonic()
            while time.monotonic() < begun + LASTING_S:
                measured.append(facts(run, kept))
                until_moved(kept, 1, LASTING_KEEP_S)
            code, _, _ = run.end()
        beside.end()
    assert code == 0
    half = len(measured) // 2
    print(f"bytes, kB of memory and open files, {len(measured)} times in {LASTING_S} s: {measured}")
    for name, most, values in zip(("bytes", "kB", "files"), (1.5, 1.2, 1.2), zip(*measured, strict=True), strict=True):
        assert max(values[half:]) <= most * max(values[:half]), (name, values)
    opened = cwndtrace.load(kept)
    assert (opened.status, opened.gaps()) == ("complete", [])
    about = opened.about
    assert about.kept_from is not None
    assert about.end
    assert LASTING_KEEP_S <= (about.end.mono_ns - about.kept_from) / 1e9 <= 2 * LASTING_KEEP_S
    for table in ("cwnd_reset", "block_io", "cwnd_recovery"):
        span = about.kept_from, about.end.mono_ns - 1_000_000_000
        ours, theirs = rows(kept, table, *span), rows(plain, table, *span)
        assert len(ours) > 2
        if table == "block_io":
            assert_same_requests(ours, theirs)
        else:
            apart = ours[clock_column(table)].astype("int64") - theirs[clock_column(table)].astype("int64")
            assert len(ours) == len(theirs)
            assert apart.abs().max() < 50_000_000  # a connection's resets are further apart
    assert call("report", kept).stdout.count("The capture holds a window of the trace") == 1


def test_dumps_by_command_signal_and_condition_are_exact(connect: Connect, space: tcp.Space, tmp_path: Path) -> None:
    whole = tmp_path / "a.cwnd"
    options = ("--dump-on", "resets > 2/min", "--dump-on", "block_latency > 1h", "--dump-every", "1h")
    with loop() as disk, running("-n", space.name, "--block", *options, "-o", whole, stdout=-3) as run:
        with load(connect, disk):
            run.wait_for(re.compile("because of resets > 2/min"))
            run.process.send_signal(signal.SIGUSR1)
            run.wait_for(re.compile("because of SIGUSR1"))
            done = call("dump", whole, "--last", "4s", "-o", tmp_path / "by-command.cwnd")
        code, _, stderr = run.end()
    assert (code, done.returncode) == (0, 0), done.stderr
    dumps = {why: Path(path) for path, why in DUMPED.findall(stderr)}
    assert set(dumps) == {"resets > 2/min", "SIGUSR1"}
    for dump in (*dumps.values(), tmp_path / "by-command.cwnd"):
        assert_exact(dump, whole)
    assert len(cwndtrace.load(dumps["resets > 2/min"]).resets) >= 3


def test_a_dump_waits_for_a_trace_that_is_late(connect: Connect, space: tcp.Space, tmp_path: Path) -> None:
    """A process that gets no CPU is like one that is stopped."""
    whole, made = tmp_path / "a.cwnd", tmp_path / "b.cwnd"
    dump: list[str | Path] = [sys.executable, "-P", "-m", "cwndtrace", "dump", whole, "-o", made]
    with loop() as disk, running("-n", space.name, "--block", "-o", whole, stdout=-3) as run:
        with load(connect, disk):
            tcp.until(lambda: len(open_capture(whole).table("cwnd_reset")) > 2, LONG_S, "resets in the capture")
            run.process.send_signal(signal.SIGSTOP)
            try:
                dumping = subprocess.Popen(dump, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
                with pytest.raises(subprocess.TimeoutExpired):
                    dumping.wait(ARRIVED_S + 3)
            finally:
                run.process.send_signal(signal.SIGCONT)
            _, warnings = dumping.communicate(timeout=LONG_S)
        assert run.end()[0] == 0
    assert (dumping.returncode, warnings) == (0, "")
    assert_exact(made, whole)


def test_dumps_of_a_window_that_moves_are_exact(connect: Connect, space: tcp.Space, tmp_path: Path) -> None:
    """A plain trace beside it has the same records of block I/O."""
    kept, plain = tmp_path / "kept.cwnd", tmp_path / "plain.cwnd"
    with loop() as disk, running("-n", space.name, "--block", "-q", "-o", plain, stdout=-3, wait=False) as beside:
        tcp.until(lambda: plain.exists(), LONG_S, "the plain trace")
        with running("-n", space.name, "--block", "--keep", f"{KEEP_S}s", "-o", kept, stdout=-3) as run:
            with load(connect, disk):
                until_moved(kept, 3)
                made = [tmp_path / f"{number}.cwnd" for number in range(3)]
                done = [call("dump", kept, "-o", path) for path in made]
                run.process.send_signal(signal.SIGUSR1)
                run.wait_for(re.compile("because of SIGUSR1"))
            _, _, stderr = run.end()
        beside.end()
    assert [each.returncode for each in done] == [0, 0, 0]
    for dump in (*made, *(Path(path) for path, _ in DUMPED.findall(stderr))):
        about = cwndtrace.load(dump).about
        assert about.begin
        assert about.end
        assert (about.end.mono_ns - about.begin.mono_ns) / 1e9 >= KEEP_S / 2
        span = about.begin.mono_ns, about.end.mono_ns
        assert_same_requests(rows(dump, "block_io", 0, 1 << 62), rows(plain, "block_io", *span))


@pytest.mark.parametrize("kill", range(5))
def test_a_kill_leaves_the_window_and_the_dumps_open(
    connect: Connect, space: tcp.Space, tmp_path: Path, kill: int
) -> None:
    kept = tmp_path / "a.cwnd"
    options = ("--keep", f"{KEEP_S}s", "--dump-on", "block_latency > 1us", "--dump-every", "0s", "--dump-keep", "2")
    with (
        loop() as disk,
        running("-n", space.name, "--block", *options, "-o", kept, stdout=-3) as run,
        load(connect, disk),
    ):
        until_moved(kept, 2)
        dumps = [path for path in tmp_path.iterdir() if "-dump-" in path.name]
        # Each time the moment is another one of those in which a dump is made and the one before is removed.
        tcp.until(lambda: [p for p in tmp_path.iterdir() if "-dump-" in p.name] != dumps, LONG_S, "another dump")
        threading.Event().wait(kill * 0.02)
        run.end(signal.SIGKILL)
    opened = cwndtrace.load(kept)
    assert (opened.status, opened.gaps(), opened.warnings) == ("interrupted", [], [])
    assert not opened.block_io.empty
    found = [path for path in tmp_path.iterdir() if "-dump-" in path.name and not path.name.startswith(".")]
    assert 1 <= len(found) <= 3
    for path in found:
        dump = cwndtrace.load(path)
        assert (dump.status, dump.gaps(), dump.warnings) == ("complete", [], [])
        assert call("report", path).returncode == 0


def test_whoever_may_read_a_capture_can_dump_it(space: tcp.Space, tmp_path: Path) -> None:
    """The dump holds copies, because the files aren't that user's own, and it belongs to that user."""
    need_readable_checkout()
    kept = tmp_path / "a.cwnd"
    tmp_path.chmod(0o777)
    for above in tmp_path.parents[:2]:
        above.chmod(0o755)
    become = ("setpriv", f"--reuid={UID}", f"--regid={GID}", "--clear-groups")
    with loop() as disk, running("-n", space.name, "--block", "-o", kept, stdout=-3) as run:
        disk.read(*range(300))
        assert run.end()[0] == 0
    subprocess.run(["chmod", "-R", "a+rX", kept], check=True)
    done = call("dump", kept, "-o", tmp_path / "b.cwnd", before=become)
    assert done.returncode == 0, done.stderr
    assert_exact(tmp_path / "b.cwnd", kept)
    files = [path.stat() for path in (tmp_path / "b.cwnd").rglob("*.parquet")]
    assert {(each.st_uid, each.st_nlink, each.st_mode & 0o777) for each in files} == {(UID, 1, 0o600)}
