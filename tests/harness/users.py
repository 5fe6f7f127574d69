# SPDX-License-Identifier: Apache-2.0
"""The user for whom sudo works, that user's files, and the privileges that processes hold.

No passwd file has this user, since only SUDO_UID and SUDO_GID count.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness.command import CHECKOUT, Running
from tests.harness.processes import children

UID, GID = 54321, 54322
BY_SUDO = ("env", f"SUDO_UID={UID}", f"SUDO_GID={GID}")
"""Stands before a command that sudo starts for that user."""
BY_ROOT = ("env", "-u", "SUDO_UID", "-u", "SUDO_GID")
"""Stands before a command that root starts without sudo."""


def need_readable_checkout() -> None:
    """Skip the test where other users can't read the checkout or its Python, since theirs don't start there."""
    for file in (Path(CHECKOUT), Path(sys.prefix)):
        for folder in (file, *file.parents):
            if not folder.stat().st_mode & stat.S_IXOTH:
                pytest.skip(f"needs a checkout that every user can read, which {folder} hides: clone it into /srv")


def need_command() -> None:
    """Skip the test where the command can't start: as root it becomes another user, who has to read the checkout."""
    if os.geteuid() == 0:
        need_readable_checkout()


def need_user_namespace() -> None:
    """Skip the test where this process can't create a user namespace."""
    attempt = subprocess.run(["unshare", "--map-root-user", "true"], capture_output=True, text=True, check=False)
    if attempt.returncode:
        pytest.skip(
            f"needs a user namespace ({attempt.stderr.strip()}), which the kernel allows nobody in a chroot, and some"
            " distributions allow only root: run sudo make test outside of a chroot"
        )


@contextmanager
def home_of(uid: int, gid: int) -> Iterator[Path]:
    """Yield a folder that belongs to a user, on a path that this user can walk; delete it on exit."""
    need_readable_checkout()
    home = Path(tempfile.mkdtemp(prefix="cwndtrace-test-", dir="/tmp"))
    os.chown(home, uid, gid)
    home.chmod(0o755)
    try:
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


def thread_status(pid: int) -> list[dict[str, str]]:
    """Return the fields of /proc/PID/task/TID/status of each thread of a process."""
    threads = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        lines = (task / "status").read_text().splitlines()
        threads.append({name: value.strip() for name, _, value in (line.partition(":") for line in lines)})
    return threads


def assert_privileges(pid: int, uid: int, gid: int, capabilities: frozenset[int]) -> None:
    """Assert that every thread has exactly these ids and capabilities, and can't gain others."""
    mask = f"{sum(1 << number for number in capabilities):016x}"
    for thread in thread_status(pid):
        assert thread["Uid"].split() == [str(uid)] * 4, thread
        assert thread["Gid"].split() == [str(gid)] * 4, thread
        for which in ("CapPrm", "CapEff", "CapBnd"):
            assert thread[which] == mask, (thread["Name"], which, thread[which])
        assert (int(thread["CapInh"], 16), int(thread["CapAmb"], 16), thread["NoNewPrivs"]) == (0, 0, "1"), thread
        if uid:
            assert thread["Groups"].split() == [str(gid)], thread


def helper_of(run: Running) -> int:
    """Return the pid of a trace's helper process, the only child that the trace has."""
    (pid,) = children(run.process.pid)
    return pid


def assert_owned(capture: Path, uid: int, gid: int) -> None:
    """Assert that all files of a capture belong to one user, and that no other user may read them."""
    paths = [capture, *capture.rglob("*")]
    assert len(paths) > 3
    for path in paths:
        status = path.lstat()
        assert (status.st_uid, status.st_gid) == (uid, gid), path
        assert stat.S_IMODE(status.st_mode) == (0o700 if path.is_dir() else 0o600), path
