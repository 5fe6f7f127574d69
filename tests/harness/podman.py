# SPDX-License-Identifier: Apache-2.0
"""podman with a storage of its own, so that no image or container of this machine is touched, and all of them go again.

No registry is asked for anything: base images come from the roots of ``chroot``.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.harness import chroot

_PAUSE = "localhost/pause"
_NEEDED = ("podman", "runc")
_MOST = 4096
"""The number of processes, and of files open at once, that a container may have at most."""


def need_podman() -> None:
    """Skip the test if podman or runc is missing."""
    chroot.need_tools()
    missing = [tool for tool in _NEEDED if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: sudo make test-distributions installs it")


@dataclass(frozen=True)
class Podman:
    """Commands of podman with the storage in ``folder``."""

    folder: Path

    def command(self, *arguments: str) -> list[str]:
        """Return a command that begins with podman."""
        return ["podman", "--root", str(self.folder / "storage"), "--runroot", str(self.folder / "run"), *arguments]

    @property
    def environment(self) -> dict[str, str]:
        """The environment of such a command."""
        return {**os.environ, "CONTAINERS_CONF": str(self.folder / "containers.conf")}

    def call(self, *arguments: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            self.command(*arguments),
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
        )

    def good(self, *arguments: str, seconds: float = 120) -> str:
        """Run a command that must succeed, and return its stdout."""
        done = self.call(*arguments, seconds=seconds)
        assert done.returncode == 0, (shlex.join(arguments), done.stdout[-2000:], done.stderr[-2000:])
        return done.stdout

    def inspect(self, container: str) -> dict[str, Any]:
        """Return what podman knows about a container."""
        (found,) = json.loads(self.good("inspect", container))
        assert isinstance(found, dict)
        return found

    def build(self, tag: str, containerfile: Path, base: str, suite: str) -> None:
        """Build an image from the checkout; ``base``, which it begins from, is made from a bare root of a suite."""
        with chroot.unpacked(suite) as root:
            with subprocess.Popen(["tar", "-C", str(root.path), "-c", "."], stdout=subprocess.PIPE) as tar:
                done = subprocess.run(
                    self.command("import", "-", base), env=self.environment, stdin=tar.stdout, capture_output=True
                )
            assert (done.returncode, tar.returncode) == (0, 0), done.stderr
            # pip may have an index in folders of this machine, as in the root.
            binds = [option for folder in root.binds for option in ("--volume", f"{folder}:{folder}:ro")]
            options = ["--pull=never", "--isolation=chroot", "--network=host", *binds]
            self.good("build", *options, "-t", tag, "-f", str(containerfile), str(chroot.CHECKOUT), seconds=1200)

    def make_pause(self, base: str) -> None:
        """Make the image for the container that holds a pod's namespaces; podman would ask a registry for it."""
        file = self.folder / "Pause"
        file.write_text(f'FROM {base}\nENTRYPOINT ["sleep", "infinity"]\n')
        self.good("build", "--pull=never", "--isolation=chroot", "-t", _PAUSE, "-f", str(file), str(self.folder))


@contextmanager
def storage() -> Iterator[Podman]:
    """Yield podman with an empty storage, and delete that with all its containers and images on exit.

    The storage is in the cache folder, and a run waits there for another one. What a killed run left is deleted first.
    """
    chroot.cache_dir().mkdir(parents=True, exist_ok=True)
    podman = Podman(chroot.cache_dir() / "podman")
    lock = os.open(podman.folder.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _delete(podman)
        podman.folder.mkdir()
        _configure(podman.folder)
        try:
            yield podman
        finally:
            _delete(podman)
    finally:
        os.close(lock)


def _configure(folder: Path) -> None:
    # runc also runs on hosts with cgroups of both versions, where crun refuses to, and cgroupfs without systemd. podman
    # would raise these limits, which takes CAP_SYS_RESOURCE.
    kinds = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}
    limits = [f"{name}={most}:{most}" for name, most in ((name, _limit(kind)) for name, kind in kinds.items())]
    (folder / "containers.conf").write_text(
        f"[containers]\ndefault_ulimits = {json.dumps(limits)}\n"
        f'[engine]\ncgroup_manager = "cgroupfs"\nruntime = "runc"\nevents_logger = "file"\ninfra_image = "{_PAUSE}"\n'
    )


def _limit(kind: int) -> int:
    most = resource.getrlimit(kind)[1]
    return _MOST if most == resource.RLIM_INFINITY else min(most, _MOST)


def _delete(podman: Podman) -> None:
    if not podman.folder.exists():
        return
    if (podman.folder / "containers.conf").exists():
        podman.good("rm", "--all", "--force", "--time", "1")
        podman.good("rmi", "--all", "--force")
    with suppress(OSError):
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        below = [place for place in (line.split(" ")[4] for line in mounts) if place.startswith(f"{podman.folder}/")]
        for place in sorted(below, reverse=True):
            subprocess.run(["umount", place], check=False, capture_output=True)
    shutil.rmtree(podman.folder)
