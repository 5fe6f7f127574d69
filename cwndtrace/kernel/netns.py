# SPDX-License-Identifier: Apache-2.0
"""Finds network namespaces, runs functions in them, and reads their settings."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from cwndtrace.errors import NotFound
from cwndtrace.kernel import host, setns
from cwndtrace.kernel.sockets import comm, pids
from cwndtrace.tcp import CONTROL_SYSCTL, IDLE_SYSCTL

# EINVAL is for a file that had a namespace mounted on it and is a plain file again.
_GONE: Final = (errno.ENOENT, errno.ESRCH, errno.ESTALE, errno.EINVAL)
T = TypeVar("T")


@dataclass(frozen=True)
class Namespace:
    """A network namespace: the inode that records carry, a name for users, and a file that opens it."""

    inode: int
    name: str
    path: Path

    @property
    def address(self) -> str:
        """Return inode and path, which another process needs to enter this namespace and no other."""
        return f"{self.inode}:{self.path}"


def own() -> Namespace:
    """Return the network namespace that the calling thread is in."""
    path = Path("/proc/thread-self/ns/net")
    return Namespace(path.stat().st_ino, "this", path)


def _named() -> Path:
    """Return the folder of the namespaces of ``ip netns``, the host's also from inside a container."""
    return host.root() / "run/netns"


def hosts_inode() -> int | None:
    """Return the inode of the host's network namespace, that of its process 1; None where that can't be seen."""
    for path in host.namespaces("net"):
        with suppress(OSError):
            return path.stat().st_ino
    return None


def all_reachable() -> Iterator[Namespace]:
    """Yield each namespace once: this process's, those of ``ip netns``, and those that other processes are in."""
    seen: set[int] = set()
    device = own().path.stat().st_dev
    for name, path in _candidates():
        try:
            status = os.stat(path)  # noqa: PTH116
        except OSError:
            continue
        inode = status.st_ino
        if inode not in seen and status.st_dev == device:
            seen.add(inode)
            yield Namespace(inode, name or f"{comm(int(path.split('/')[2]))}[{path.split('/')[2]}]", Path(path))


def _candidates() -> Iterator[tuple[str, str]]:
    """Yield names and paths. Processes have no name here: there are many, and few have a namespace of their own."""
    yield "this", "/proc/thread-self/ns/net"
    with suppress(OSError):
        for name in sorted(os.listdir(_named())):  # noqa: PTH208
            yield name, str(_named() / name)
    for pid in sorted(pids()):
        yield "", f"/proc/{pid}/ns/net"


def find(text: str) -> Namespace:
    """Return the namespace that ``text`` names: a name in ``ip netns``, a pid, an inode, or a path.

    Raises NotFound, which lists the existing namespaces.
    """
    process = Path(f"/proc/{text}/ns/net") if text.isdigit() else None
    for path in (_named() / text, process, Path(text)):
        if path is not None and (inode := _inode(path)) is not None:
            return Namespace(inode, f"{comm(int(text))}[{text}]" if path == process else text, path)
    known = list(all_reachable())
    for namespace in known:
        if text.isdigit() and namespace.inode == int(text):
            return namespace
    names = ", ".join(n.name for n in known[:20])
    raise NotFound(f"no network namespace {text}", f"there are: {names}; or give a pid, an inode or a path")


def _inode(path: Path) -> int | None:
    """Return the inode of the network namespace that ``path`` opens; None where it opens anything else, or nothing."""
    try:
        fd = setns.opened(path)
    except (OSError, ValueError):
        return None
    try:
        return os.fstat(fd).st_ino
    finally:
        os.close(fd)


def inside(namespace: Namespace, work: Callable[[], T]) -> T:
    """Run ``work`` in ``namespace`` and return its result.

    A separate thread enters the namespace, so that no other thread moves there. If the calling thread is in it already,
    no privileges and no other thread are needed. Raises NotFound where the namespace is gone or may not be entered, and
    the errors of ``work``.
    """

    def enter_and_work() -> T:
        try:
            setns.enter(namespace.path, namespace.inode)
        except OSError as e:
            state = "is gone" if e.errno in _GONE else "can't be entered"
            raise NotFound(f"network namespace {namespace.name} {state}: {e.strerror}") from e
        return work()

    if namespace.inode == own().inode:
        return work()
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(enter_and_work).result()


def settings() -> dict[str, dict[str, Any]]:
    """Return the settings that affect idle resets in each reachable namespace, by inode, as ``sysctls`` in meta.json.

    A setting that can't be read is None. ``host`` is true for the namespace of the host's process 1.
    """
    hosts = hosts_inode()
    return {
        str(n.inode): {
            "name": n.name, "host": n.inode == hosts, IDLE_SYSCTL: idle_sysctl(n), CONTROL_SYSCTL: _control(n)
        }
        for n in all_reachable()
    }  # fmt: skip


def _control(namespace: Namespace) -> str | None:
    file = Path("/proc/sys", *CONTROL_SYSCTL.split("."))
    try:
        return inside(namespace, lambda: file.read_text(encoding="ascii").strip())
    except (NotFound, OSError):
        return None


def read_sysctl(name: str) -> int:
    """Return the value of a sysctl in the namespace that the calling thread is in."""
    return int(Path("/proc/sys", *name.split(".")).read_text())


def idle_sysctl(namespace: Namespace) -> int | None:
    """Return ``net.ipv4.tcp_slow_start_after_idle`` in a namespace; None where it can't be read."""
    try:
        return inside(namespace, lambda: read_sysctl(IDLE_SYSCTL))
    except (NotFound, OSError):
        return None
