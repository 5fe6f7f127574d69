# SPDX-License-Identifier: Apache-2.0
"""Tests of processes and cgroups with more members than a filter holds, with changing members, or hidden ones."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

import cwndtrace
from cwndtrace.capture import bpf_syscall
from cwndtrace.capture.live import Kernel
from cwndtrace.capture.privsep import Helper
from cwndtrace.capture.source import Filters
from cwndtrace.errors import NotFound
from cwndtrace.kernel import cgroups
from cwndtrace.report.content import report
from tests.harness import tcp
from tests.harness.command import LONG_S, call, running, send_after_idle, within
from tests.harness.tcp import Connect

pytestmark = pytest.mark.live

ROOM: Final = 16_384
"""The size of the map of cgroups in the kernel."""
SOCKETS: Final = 65_536
"""The size of the map of a process's sockets."""


def remove(folder: Path) -> None:
    """Remove a cgroup without processes, and all cgroups below it, however deep."""
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in [entry.name for entry in os.scandir(at) if entry.is_dir(follow_symlinks=False)]:
            with contextlib.suppress(OSError):
                os.rmdir(name, dir_fd=at)
                continue
            remove(folder / name)
    finally:
        os.close(at)
    tcp.until(lambda: _gone(folder), 20, f"{folder} to be empty")


def _gone(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        folder.rmdir()
    return not folder.exists()


@pytest.fixture
def cgroup() -> Iterator[Path]:
    try:
        folder = cgroups.mount_point() / f"{tcp.PREFIX}{os.getpid()}-hostile"
    except NotFound as e:
        pytest.skip(f"{e.cause}; {e.remedy}")
    folder.mkdir()
    try:
        yield folder
    finally:
        remove(folder)


def test_a_cgroup_is_found_by_each_form_of_its_name(cgroup: Path) -> None:
    inner = cgroup / "nginx.service"
    inner.mkdir()
    relative = inner.relative_to(cgroups.mount_point())
    for name in (str(relative), f"/{relative}", str(inner)):
        assert cgroups.find(name) == inner
    assert cgroups.ids(cgroup) == ({cgroup.stat().st_ino, inner.stat().st_ino}, 0)
    with pytest.raises(NotFound, match=f"no cgroup {relative}x") as caught:
        cgroups.find(f"{relative}x")
    assert str(cgroups.mount_point()) in caught.value.remedy


def test_a_cgroup_v1_is_named_as_one(cgroup: Path) -> None:
    mounts = Path("/proc/self/mounts").read_text(encoding="ascii").splitlines()
    mounted = [line.split()[1] for line in mounts if line.split()[2] == "cgroup" and "pids" in line.split()[3]]
    if not mounted:
        pytest.skip("no cgroup v1 is mounted; boot with systemd.unified_cgroup_hierarchy=0")
    folder = Path(mounted[0], f"{cgroup.name}-v1")
    folder.mkdir()
    try:
        for name in (folder.name, str(folder)):
            with pytest.raises(NotFound, match=f"{folder} is a cgroup v1") as caught:
                cgroups.find(name)
            assert "0::" in caught.value.remedy
    finally:
        folder.rmdir()


def test_cgroups_that_vanish_meanwhile_do_no_harm(cgroup: Path) -> None:
    stopped = threading.Event()
    rounds = [0]

    def churn() -> None:
        while not stopped.is_set():
            for number in range(50):
                (cgroup / str(number) / "below").mkdir(parents=True)
            for number in range(50):
                (cgroup / str(number) / "below").rmdir()
                (cgroup / str(number)).rmdir()
            rounds[0] += 1

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        reads = 0
        deadline = time.monotonic() + 60
        while (rounds[0] < 20 or reads < 200) and time.monotonic() < deadline:
            ids, unseen = cgroups.ids(cgroup)
            assert cgroup.stat().st_ino in ids
            assert unseen == 0
            reads += 1
    finally:
        stopped.set()
        thread.join()
    assert rounds[0] >= 20
    assert reads >= 200


def test_cgroups_deeper_than_the_recursion_limit_are_found(cgroup: Path) -> None:
    depth = sys.getrecursionlimit() + 200
    folder, levels = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY), 0
    try:
        for _ in range(depth):
            try:
                os.mkdir("d", dir_fd=folder)
            except OSError:
                break
            levels += 1
            below = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=folder)
            os.close(folder)
            folder = below
        ids, unseen = cgroups.ids(cgroup)
        assert levels == depth
        assert (len(ids), unseen) == (depth + 1, 0)
    finally:
        os.close(folder)
        # Only an empty cgroup can be removed, so the deepest comes first.
        for level in range(levels, 0, -1):
            (cgroup / "/".join(["d"] * level)).rmdir()


def test_more_cgroups_than_the_filter_holds_are_reported(
    cgroup: Path, space: tcp.Space, connect: Connect, tmp_path: Path
) -> None:
    """The trace goes on with the cgroups for which there is room, and the capture has the number of the others."""
    holder = tcp.Holder(space, cgroup)
    try:
        connection = connect(by=holder)
        with running("-c", cgroup, "--no-block", "-o", tmp_path / "a.cwnd") as run:
            for number in range(ROOM + 116):
                (cgroup / str(number)).mkdir()
            run.wait_for(re.compile(r"^warning: at least [\d,]+ requested cgroups aren't traced"), LONG_S)
            send_after_idle(connection)
            code, _, stderr = run.end()
    finally:
        holder.close()
    assert code == 0, stderr
    assert stderr.count("aren't traced") == 1
    trace = cwndtrace.load(tmp_path / "a.cwnd")
    assert trace.status == "complete"
    assert len(trace.resets) >= 1
    assert 1 <= trace.left_out["cgroups"] <= 117
    assert "left out" in dict(trace.facts())
    assert any("requested cgroups" in line for line in report(trace).caveats["limits"])


MANY_SOCKETS: Final = f"""
import resource, socket, sys
resource.setrlimit(resource.RLIMIT_NOFILE, ({SOCKETS + 400}, {SOCKETS + 400}))
held = []
for _ in range({SOCKETS + 300}):
    held.append(socket.socket())
print("made", flush=True)
sys.stdin.read()
"""


def test_more_sockets_than_the_filter_holds_are_reported(tmp_path: Path) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < SOCKETS + 400:
        pytest.skip(f"a process may open {most} files at once: ulimit -Hn {SOCKETS + 400}, as root")
    holder = subprocess.Popen(
        [sys.executable, "-I", "-c", MANY_SOCKETS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "made\n"
        with running("-p", str(holder.pid), "--no-block", "-o", tmp_path / "a.cwnd") as run:
            run.wait_for(re.compile(r"^warning: at least 300 requested sockets aren't traced"), LONG_S)
            code, _, stderr = run.end(signal.SIGINT)
    finally:
        holder.kill()
        holder.communicate()
    assert code == 0, stderr
    trace = cwndtrace.load(tmp_path / "a.cwnd")
    assert (trace.status, trace.left_out) == ("complete", {"sockets": 300})


class Crowded(Helper):
    """A helper that reports the sockets ``inodes`` for the traced process, without a limit of open files."""

    inodes = frozenset(range(1, SOCKETS + 301))

    def pid_sockets(self) -> set[int]:
        return set(self.inodes)


def test_a_full_filter_takes_new_sockets_for_closed_ones() -> None:
    filters = Filters(pid=os.getpid())
    helper = Crowded(filters)
    kernel = Kernel(filters, block=False, reasons=("idle",), helper=helper)
    try:
        assert kernel.counts().left_out == {"sockets": 300}
        first, *_ = kernel._resets
        held = {int.from_bytes(key, "little") for key in bpf_syscall.keys(first._maps["pid_sockets"][0], 8)}
        assert held == set(range(1, SOCKETS + 1))
        helper.inodes = frozenset(range(SOCKETS, SOCKETS + 1000))
        kernel._refresh_sets()
        held = {int.from_bytes(key, "little") for key in bpf_syscall.keys(first._maps["pid_sockets"][0], 8)}
        assert held == set(helper.inodes)
        assert kernel.counts().left_out == {"sockets": 300}
    finally:
        kernel.close()


def test_a_cgroup_is_found_under_ip_netns_exec(
    cgroup: Path, make_space: Callable[[], tcp.Space], drain: tcp.Drain, tmp_path: Path
) -> None:
    """ip netns exec mounts another /sys, which has no cgroups."""
    space = make_space()
    holder = tcp.Holder(space, cgroup)
    try:
        connection = tcp.connect(space, drain, by=holder)
        name = str(cgroup.relative_to(cgroups.mount_point()))
        with running("-c", name, "--no-block", "-o", tmp_path / "a.cwnd", before=within(space)) as run:
            send_after_idle(connection)
            code, _, stderr = run.end()
        connection.close()
    finally:
        holder.close()
    assert code == 0, stderr
    trace = cwndtrace.load(tmp_path / "a.cwnd")
    assert len(trace.resets) >= 1
    assert trace.meta["filters"]["cgroup"] == f"/{name}"
    done = call("run", "-c", "nothing", "-d", "1s", "-o", tmp_path / "b.cwnd", before=within(space))
    assert done.returncode == 1
    assert "no cgroup nothing" in done.stderr


def test_the_header_names_the_namespace_of_a_pid(
    make_space: Callable[[], tcp.Space], cgroup: Path, tmp_path: Path
) -> None:
    space = make_space()
    holder = tcp.Holder(space, cgroup)
    pid = holder.pid
    try:
        with running("-n", str(pid), "-P", "443", "--no-block", "-o", tmp_path / "a.cwnd") as run:
            code, _, stderr = run.end()
    finally:
        holder.close()
    assert code == 0, stderr
    comm = stderr.partition("in network namespace ")[2].partition("[")[0]
    assert f"Tracing port 443 in network namespace {comm}[{pid}] (inode {space.inode}): " in stderr
    assert comm
    named = cwndtrace.load(tmp_path / "a.cwnd").meta["filters"]
    assert (named["netns"], named["netns_name"]) == (space.inode, f"{comm}[{pid}]")
