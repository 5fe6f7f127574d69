# SPDX-License-Identifier: Apache-2.0
"""A thread moves into the namespace that was meant, or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from cwndtrace import _libc
from cwndtrace.errors import NotFound
from cwndtrace.kernel import netns, setns

OWN = Path("/proc/self/ns/net")


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the inodes of the namespaces that were entered, without entering them."""
    inodes: list[int] = []
    monkeypatch.setattr(_libc, "setns", lambda fd: inodes.append(os.fstat(fd).st_ino))
    return inodes


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_the_namespace_that_was_meant_is_entered(entered: list[int]) -> None:
    inode, before = OWN.stat().st_ino, descriptors()
    setns.enter(OWN, inode)
    assert entered == [inode]
    assert descriptors() == before


def test_another_namespace_at_the_same_path_is_refused(entered: list[int]) -> None:
    before = descriptors()
    with pytest.raises(OSError, match="another network namespace is there now") as caught:
        setns.enter(OWN, OWN.stat().st_ino + 1)
    assert (caught.value.errno, entered, descriptors()) == (errno.ESTALE, [], before)


@pytest.mark.parametrize(
    ("path", "why"), [("/proc/self/ns/mnt", "not a network namespace"), ("/dev/null", "not a namespace")]
)
def test_other_files_are_no_network_namespaces(path: str, why: str) -> None:
    before = descriptors()
    with pytest.raises(OSError, match=why):
        setns.opened(path)
    assert descriptors() == before


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a namespace"):
        setns.opened(tmp_path / "pipe")


def test_a_namespace_that_cannot_be_entered_is_no_place_for_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int) -> None:  # noqa: ARG001
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    here = netns.own()
    worked: list[str] = []
    monkeypatch.setattr(netns, "own", lambda: netns.Namespace(1, "other", Path("/none")))
    monkeypatch.setattr(_libc, "setns", refuse)
    with pytest.raises(NotFound, match=f"network namespace {here.name} can't be entered: Operation not permitted"):
        netns.inside(here, lambda: worked.append("here"))
    gone = netns.Namespace(here.inode, "blue", Path("/none"))
    with pytest.raises(NotFound, match="network namespace blue is gone: No such file"):
        netns.inside(gone, lambda: worked.append("there"))
    assert worked == []


def test_work_in_the_own_namespace_enters_none(entered: list[int]) -> None:
    assert netns.inside(netns.own(), lambda: 7) == 7
    assert entered == []
