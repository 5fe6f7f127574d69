# SPDX-License-Identifier: Apache-2.0
"""Tests of finding how much memory the process may use, on made folders of cgroups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cwndtrace.errors import NotFound
from cwndtrace.kernel import cgroups, memory

MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The process's own cgroup, /a/b."""
    folder = tmp_path / "top/a/b"
    folder.mkdir(parents=True)
    listed = tmp_path / "cgroup"
    listed.write_text("4:memory:/other\n0::/a/b\n")
    monkeypatch.setattr(cgroups, "root", lambda: tmp_path / "top")
    monkeypatch.setattr(memory, "_OWN", listed)
    return folder


@pytest.mark.parametrize(
    ("above", "below", "limit"),
    [
        ("max\n", "max\n", MACHINE),
        ("max\n", "268435456\n", 1 << 28),
        ("134217728\n", "268435456\n", 1 << 27),
        ("134217728\n", "max\n", 1 << 27),
        (f"{1 << 60}\n", "max\n", MACHINE),
    ],
)
def test_the_least_limit_counts(own: Path, above: str, below: str, limit: int) -> None:
    (own.parent.parent.parent / "memory.max").write_text("1")  # not a cgroup's
    (own.parent / "memory.max").write_text(above)
    (own / "memory.max").write_text(below)
    assert memory.limit() == limit


def test_without_limits_it_is_the_machines_memory(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.limit() == MACHINE

    def refused() -> Path:
        raise NotFound("no cgroup v2", "mount it")

    monkeypatch.setattr(cgroups, "root", refused)
    (own / "memory.max").write_text("1")
    assert memory.limit() == MACHINE
