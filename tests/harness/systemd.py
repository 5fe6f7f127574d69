# SPDX-License-Identifier: Apache-2.0
"""systemd as the first process of an unpacked root, in namespaces of its own; the network is this machine's."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.harness import chroot
from tests.harness.processes import children
from tests.harness.tcp import until

_BOOTS_S: Final = 60
_ENDS_S: Final = 90

# As systemd asks of containers (CONTAINER_INTERFACE), it can change neither settings of the kernel, which are this
# machine's, nor its devices: it applies sysctl.d and tmpfiles.d when it boots.
_BOOT: Final = """
mount --rbind "$1" "$1"
mount -o remount,bind,suid,dev,exec "$1"
mount -t proc proc "$1/proc"
mount --bind "$1/proc/sys" "$1/proc/sys"
mount -t sysfs sysfs "$1/sys"
for tree in "$1/proc/sys" "$1/sys"; do mount -o remount,bind,ro "$tree"; done
mount -t cgroup2 cgroup2 "$1/sys/fs/cgroup"
mount -t tracefs tracefs "$1/sys/kernel/tracing"
mount -t tmpfs -o mode=755 tmpfs "$1/dev"
for node in null zero full random urandom tty; do
    touch "$1/dev/$node"
    mount --bind "/dev/$node" "$1/dev/$node"
done
ln -s pts/ptmx "$1/dev/ptmx"
mount -t tmpfs tmpfs "$1/run"
mount -t tmpfs tmpfs "$1/tmp"
cd "$1"
mkdir -p .old
pivot_root . .old
umount -l /.old
exec env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --unit=basic.target
"""


@dataclass(frozen=True)
class Booted:
    """A running systemd; ``pid`` is that of its first process as this machine sees it."""

    pid: int

    def run(self, *command: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command beside its services; ``stdout`` of the result has both streams."""
        enter = ("nsenter", f"--target={self.pid}", "--mount", "--pid", "--uts", "--ipc", "--cgroup", "--root", "--wd")
        return subprocess.run(
            [*enter, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=seconds,
        )

    def good(self, *command: str, seconds: float = 60) -> str:
        """Run a command that must succeed, and return its output."""
        done = self.run(*command, seconds=seconds)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def shown(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.good("systemctl", "show", "--value", f"--property={name}", unit).strip()


def _cgroup2() -> Path:
    line = next(line for line in Path("/proc/self/mounts").read_text().splitlines() if line.split()[2] == "cgroup2")
    return Path(line.split()[1])


@contextmanager
def booted(root: chroot.Root) -> Iterator[Booted]:
    """Boot a root that has systemd, in a cgroup of its own; end all its processes on exit."""
    group = Path(tempfile.mkdtemp(prefix="cwndtrace-boot-", dir=_cgroup2()))
    join = 'echo $$ > "$2/cgroup.procs"; exec unshare --pid --fork --kill-child --mount --uts --ipc --cgroup'
    script = f'{join} --propagation=private sh -euc "$3" sh "$1"'
    process = subprocess.Popen(
        ["sh", "-euc", script, "sh", str(root.path), str(group), _BOOT],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until(lambda: _first(process) or process.poll() is not None, _BOOTS_S, "systemd to start")
        pid = _first(process)
        assert pid is not None, f"systemd didn't start: exit code {process.returncode}"
        machine = Booted(pid)

        def up() -> bool:
            return machine.run("systemctl", "is-system-running").stdout.strip() in ("running", "degraded")

        until(up, _BOOTS_S, "systemd to have booted")
        yield machine
        os.kill(pid, signal.SIGRTMIN + 3)  # systemd(1): halt
        process.wait(_ENDS_S)
    finally:
        process.kill()  # with it, unshare's child and so all processes of the namespace
        process.wait()
        for folder in sorted(group.rglob("*"), reverse=True):
            if folder.is_dir():
                until(lambda folder=folder: _removed(folder), _BOOTS_S, f"{folder} to be empty")  # type: ignore[misc]
        until(lambda: _removed(group), _BOOTS_S, f"{group} to be empty")


def _first(process: subprocess.Popen[bytes]) -> int | None:
    """Return the pid of systemd, the child of unshare, once the shell before it has become systemd."""
    for pid in children(process.pid):
        if Path(f"/proc/{pid}/comm").read_text().strip() == "systemd":
            return pid
    return None


def _removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
