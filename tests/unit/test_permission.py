# SPDX-License-Identifier: Apache-2.0
"""What forbids tracing to a process is told from what /proc says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cwndtrace.errors import CwndtraceError, KernelLacks, PermissionNeeded
from cwndtrace.kernel import permission

WHOLE = "         0          0 4294967295\n"


def process(folder: Path, capabilities: int, *, seccomp: int = 0, uid_map: str = WHOLE) -> Path:
    (folder / "status").write_text(f"Name:\tx\nCapEff:\t{capabilities:016x}\nSeccomp:\t{seccomp}\n")
    (folder / "uid_map").write_text(uid_map)
    return folder


@pytest.mark.parametrize("held", [1 << 21, 1 << 38 | 1 << 39, (1 << 41) - 1])
def test_what_is_enough(tmp_path: Path, held: int) -> None:
    permission.check(process(tmp_path, held), "integrity")
    assert permission.refused(tmp_path) is None


@pytest.mark.parametrize(
    ("held", "lockdown", "uid_map", "kind", "cause"),
    [
        (0, "none", WHOLE, PermissionNeeded, "lacks CAP_BPF and CAP_PERFMON"),
        (1 << 39, "none", WHOLE, PermissionNeeded, "lacks CAP_PERFMON"),
        ((1 << 41) - 1, "none", "0 1000 1\n", PermissionNeeded, "user namespace"),
        ((1 << 41) - 1, "confidentiality", WHOLE, KernelLacks, "lockdown=confidentiality"),
    ],
)
def test_what_is_not(
    tmp_path: Path, held: int, lockdown: str, uid_map: str, kind: type[CwndtraceError], cause: str
) -> None:
    with pytest.raises(kind, match=cause) as caught:
        permission.check(process(tmp_path, held, uid_map=uid_map), lockdown)
    assert caught.value.remedy


def test_a_filter_is_named(tmp_path: Path) -> None:
    found = permission.refused(process(tmp_path, (1 << 41) - 1, seccomp=2))
    assert found is not None
    assert "seccomp" in found.cause
