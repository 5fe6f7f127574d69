# SPDX-License-Identifier: Apache-2.0
"""Network namespaces: finding them, working in them, and what is set in them."""

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
from cwndtrace.kernel import setns
from cwndtrace.kernel.sockets import comm, pids
from cwndtrace.tcp import CONTROL_SYSCTL, IDLE_SYSCTL

# EINVAL is of a file that was a namespace and is a plain one again.
_GONE: Final = (errno.ENOENT, errno.ESRCH, errno.ESTALE, errno.EINVAL)
_NAMED: Final = Path("/run/netns")
T = TypeVar("T")


@dataclass(frozen=True)
class Namespace:
    """A network namespace: the inode that records carry, a name for people, and a file that opens it."""

    inode: int
    name: str
    path: Path

    @property
    def address(self) -> str:
        """All that another process needs to enter this one and no other: inode and path."""
        return f"{self.inode}:{self.path}"


def own() -> Namespace:
    """The one that this process is in."""
    path = Path("/proc/thread-self/ns/net")
    return Namespace(path.stat().st_ino, "this", path)


def all_reachable() -> Iterator[Namespace]:
    """Each namespace once: this process's, those of ``ip netns``, and those that some process is in."""
    seen: set[int] = set()
    device = own().path.stat().st_dev
    for name, path in _candidates():
        try:
            found = os.stat(path)  # noqa: PTH116
        except OSError:
            continue
        inode = found.st_ino
        if inode not in seen and found.st_dev == device:
            seen.add(inode)
            yield Namespace(inode, name or f"{comm(int(path.split('/')[2]))}[{path.split('/')[2]}]", Path(path))


def _candidates() -> Iterator[tuple[str, str]]:
    """Names and paths; no name for processes, of which there are many, and hardly one is in a namespace of its own."""
    yield "this", "/proc/thread-self/ns/net"
    with suppress(OSError):
        for name in sorted(os.listdir(_NAMED)):  # noqa: PTH208
            yield name, str(_NAMED / name)
    for pid in sorted(pids()):
        yield "", f"/proc/{pid}/ns/net"


def find(text: str) -> Namespace:
    """The namespace that a person names: as in ``ip netns``, a process's pid, an inode, or a path.

    Raises NotFound, listing those there are.
    """
    process = Path(f"/proc/{text}/ns/net") if text.isdigit() else None
    for path in (_NAMED / text, process, Path(text)):
        if path is not None and (inode := _inode(path)) is not None:
            return Namespace(inode, f"{comm(int(text))}[{text}]" if path == process else text, path)
    known = list(all_reachable())
    for each in known:
        if text.isdigit() and each.inode == int(text):
            return each
    names = ", ".join(n.name for n in known[:20])
    raise NotFound(f"no network namespace {text}", f"there are: {names}; or give a pid, an inode or a path")


def _inode(path: Path) -> int | None:
    """The inode of the network namespace that ``path`` opens; None where it opens something else, or nothing."""
    try:
        fd = setns.opened(path)
    except (OSError, ValueError):
        return None
    try:
        return os.fstat(fd).st_ino
    finally:
        os.close(fd)


def inside(namespace: Namespace, work: Callable[[], T]) -> T:
    """The result of ``work`` run in ``namespace``, on a thread of its own so that no other one moves there.

    In the one that this thread is in already, that takes no power and no thread.

    Raises NotFound where the namespace is gone or may not be entered, and what ``work`` raises.
    """

    def enter_and_work() -> T:
        try:
            setns.enter(namespace.path, namespace.inode)
        except OSError as e:
            what = "is gone" if e.errno in _GONE else "can't be entered"
            raise NotFound(f"network namespace {namespace.name} {what}: {e.strerror}") from e
        return work()

    if namespace.inode == own().inode:
        return work()
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(enter_and_work).result()


def settings() -> dict[str, dict[str, Any]]:
    """What decides about idle resets in each reachable namespace, by inode: as ``sysctls`` of meta.json holds it.

    A setting that can't be read is None. ``host`` says whether it is the namespace of process 1.
    """
    try:
        host = Path("/proc/1/ns/net").stat().st_ino
    except OSError:
        host = 0
    return {
        str(n.inode): {
            "name": n.name, "host": n.inode == host, IDLE_SYSCTL: idle_sysctl(n), CONTROL_SYSCTL: _control(n)
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
    """A sysctl of the namespace that the calling thread is in."""
    return int(Path("/proc/sys", *name.split(".")).read_text())


def idle_sysctl(namespace: Namespace) -> int | None:
    """``net.ipv4.tcp_slow_start_after_idle`` there; None where the namespace can't be entered."""
    try:
        return inside(namespace, lambda: read_sysctl(IDLE_SYSCTL))
    except (NotFound, OSError):
        return None
