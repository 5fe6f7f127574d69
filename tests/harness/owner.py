# SPDX-License-Identifier: Apache-2.0
"""Block I/O that kernel threads submit for the processes of a cgroup."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pandas as pd

from cwndtrace.kernel import cgroups
from tests.harness.disk import Disk, loop, new_device
from tests.harness.tcp import PREFIX, run, until

BLOCKS: Final = 200
"""The number of blocks that ``written`` writes. No two are neighbours, so that no two become one request."""
ROOT: Final = 1
"""The id of the root cgroup."""
_CONTROLLERS: Final = {"io", "memory"}
"""The controllers that the kernel needs to charge write-back to the cgroup that wrote."""
_WRITER: Final = """
import mmap, os, sys
fd, buffer = os.open(sys.argv[1], os.O_WRONLY | int(sys.argv[2])), mmap.mmap(-1, 4096)
assert sys.stdin.readline()
for block in range(int(sys.argv[3])):
    assert os.pwritev(fd, [buffer], 2 * block * 4096) == 4096
"""


def told() -> bool:
    """Return true if this kernel charges block I/O to cgroups of v2; v1 may have the controllers, or nothing."""
    return set((cgroups.mount_point() / "cgroup.controllers").read_text().split()) >= _CONTROLLERS


@contextmanager
def made(name: str, parent: Path | None = None, *, controllers: bool = True) -> Iterator[Path]:
    """Yield a new cgroup below another one, by default the root, which gives it io and memory if the kernel has them.

    At exit the cgroup is removed, and its parent is as it was.
    """
    parent = parent or cgroups.mount_point()
    switch = parent / "cgroup.subtree_control"
    missing = _CONTROLLERS - set(switch.read_text().split()) if controllers and told() else set()
    folder = parent / name
    folder.mkdir()
    try:
        switch.write_text(" ".join(f"+{controller}" for controller in missing))
        yield folder
    finally:
        until(lambda: _removed(folder), 20, f"{folder} to be empty")
        switch.write_text(" ".join(f"-{controller}" for controller in missing))


def _removed(folder: Path) -> bool:
    with suppress(OSError):
        folder.rmdir()
    return not folder.exists()


def written(cgroup: Path, path: Path, flags: int = 0) -> int:
    """Let a new process of ``cgroup`` write ``BLOCKS`` blocks of a device; return its id. ``flags`` are of open(2)."""
    command = [sys.executable, "-S", "-c", _WRITER, str(path), str(flags), str(BLOCKS)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as writer:
        try:
            (cgroup / "cgroup.procs").write_text(str(writer.pid))
            writer.communicate("go\n", timeout=60)
        finally:
            writer.kill()
    assert writer.returncode == 0
    return writer.pid


@contextmanager
def above(disk: Disk) -> Iterator[Disk]:
    """Yield a loop device over a disk: its kernel thread submits the requests of the disk."""
    path = Path(run("losetup", "--find", "--show", "--direct-io=on", str(disk.path)).strip())
    try:
        yield Disk(path, -1, disk.size)
    finally:
        run("losetup", "--detach", str(path))


@dataclass(frozen=True)
class Writes:
    """What a process of ``cgroup`` and one of ``lower``, which is below it and has no controllers, write to disks.

    The names of the disks say how: ``buffered`` and ``lower`` (by the process in ``lower``) by write-back; ``loop``
    directly (by the latter), and ``under`` is the disk under that loop device.
    """

    cgroup: Path
    lower: Path
    disks: dict[str, Disk]

    def make(self) -> None:
        """Write, and return when the kernel has written all of it to the disks."""
        written(self.cgroup, self.disks["buffered"].path)
        written(self.lower, self.disks["lower"].path)
        written(self.lower, self.disks["loop"].path, os.O_DIRECT)
        os.sync()

    def wrong(self, records: pd.DataFrame) -> list[str]:
        """Return a line for each disk whose writes haven't the right cgroups."""
        cgroup, lower = self.cgroup.stat().st_ino, self.lower.stat().st_ino
        # The kernel charges the nearest cgroup with the controllers.
        by_kernel = {(ROOT, cgroup if told() else ROOT)}
        right = {
            "buffered": by_kernel,
            "lower": by_kernel,
            "loop": {(lower, lower)},
            # Some kernels do a loop device's requests in the task that submits them, if it needn't wait.
            "under": by_kernel | {(lower, lower)},
        }
        lines = []
        for name, pairs in right.items():
            writes = records[(records["dev"] == self.disks[name].dev) & (records["op"] == "write")]
            found = set(zip(writes["cgroup_id"].tolist(), writes["owner_cgroup_id"].tolist(), strict=True))
            if len(writes) < BLOCKS or not found <= pairs:
                lines.append(f"{name}: {len(writes)} of {BLOCKS} writes, submitters and owners {found} and not {pairs}")
        return lines


@contextmanager
def writes() -> Iterator[Writes]:
    """Yield ``Writes`` with cgroups and disks of their own, which are removed at exit."""
    with (
        made(f"{PREFIX}{os.getpid()}-owner") as cgroup,
        made("lower", cgroup, controllers=False) as lower,
        # The kernel charges all write-back of a device to the cgroup that wrote to it first.
        new_device() as one,
        new_device() as two,
        loop(device=one) as buffered,
        loop(device=two) as below,
        loop() as under,
        above(under) as top,
    ):
        yield Writes(cgroup, lower, {"buffered": buffered, "lower": below, "loop": top, "under": under})
