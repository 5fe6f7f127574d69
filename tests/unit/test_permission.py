# SPDX-License-Identifier: Apache-2.0
"""The reason why a process may not trace is found in /proc."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest

from cwndtrace import errors
from cwndtrace.errors import CwndtraceError, KernelLacks, PermissionNeeded
from cwndtrace.kernel import permission

ALL_UIDS = "         0          0 4294967295\n"


def process(folder: Path, capabilities: int, *, seccomp: int = 0, uid_map: str = ALL_UIDS) -> Path:
    (folder / "status").write_text(f"Name:\tx\nCapEff:\t{capabilities:016x}\nSeccomp:\t{seccomp}\n")
    (folder / "uid_map").write_text(uid_map)
    return folder


@pytest.mark.parametrize("held", [1 << 21, 1 << 38 | 1 << 39, (1 << 41) - 1])
def test_sufficient_capabilities_pass_the_check(tmp_path: Path, held: int) -> None:
    permission.check(process(tmp_path, held), "integrity")
    assert permission.refused(tmp_path) is None


@pytest.mark.parametrize(
    ("held", "lockdown", "uid_map", "error", "cause"),
    [
        (0, "none", ALL_UIDS, PermissionNeeded, "lacks CAP_BPF and CAP_PERFMON"),
        (1 << 39, "none", ALL_UIDS, PermissionNeeded, "lacks CAP_PERFMON"),
        ((1 << 41) - 1, "none", "0 1000 1\n", PermissionNeeded, "user namespace"),
        ((1 << 41) - 1, "confidentiality", ALL_UIDS, KernelLacks, "lockdown=confidentiality"),
    ],
)
def test_insufficient_permission_raises_an_error_with_a_remedy(
    tmp_path: Path, held: int, lockdown: str, uid_map: str, error: type[CwndtraceError], cause: str
) -> None:
    with pytest.raises(error, match=cause) as caught:
        permission.check(process(tmp_path, held, uid_map=uid_map), lockdown)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("level", "held", "allowed"),
    [
        (None, (1 << 41) - 1, False),
        (2, 1 << 38 | 1 << 39, True),
        (3, 1 << 38 | 1 << 39, False),
        (4, 1 << 38 | 1 << 39, False),
        (3, 1 << 21, True),
    ],
)
def test_debian_keeps_kprobes_from_processes_without_cap_sys_admin(
    tmp_path: Path, level: int | None, held: int, allowed: bool
) -> None:
    if level is not None:
        (tmp_path / "perf_event_paranoid").write_text(f"{level}\n")
    assert permission.perf_events(process(tmp_path, held), tmp_path) == (level, allowed)


def test_a_kernel_without_seccomp_has_no_filter(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name:\tx\n")
    assert permission.refused(tmp_path) is None


def test_a_seccomp_filter_is_named(tmp_path: Path) -> None:
    error = permission.refused(process(tmp_path, (1 << 41) - 1, seccomp=2))
    assert error is not None
    assert "seccomp" in error.cause


@pytest.mark.parametrize(
    ("number", "cause", "cure"),
    [(errno.EMFILE, "this process may have", "ulimit -n 1024"), (errno.ENFILE, "this machine has", "fs.file-max")],
)
def test_a_limit_of_open_files_is_named(number: int, cause: str, cure: str) -> None:
    error = errors.too_many_files(OSError(number, os.strerror(number)))
    assert error is not None
    assert error.cause.startswith(cause)
    assert cure in error.remedy
    assert errors.too_many_files(OSError(errno.ENOENT, "")) is None


def test_a_low_limit_of_open_files_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    open_now = len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (open_now + 100, 4096))
    with pytest.raises(errors.CwndtraceError, match="128 more") as caught:
        permission.check_files()
    assert "ulimit -n 1024" in caught.value.remedy
    monkeypatch.setattr(resource, "getrlimit", lambda _: (open_now + 200, 4096))
    permission.check_files()
