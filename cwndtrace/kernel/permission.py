# SPDX-License-Identifier: Apache-2.0
"""Checks whether this process may load BPF programs for tracing, and finds out what forbids it."""

from __future__ import annotations

import re
import resource
from pathlib import Path
from typing import Final

from cwndtrace import privileges
from cwndtrace.errors import MORE_FILES, CwndtraceError, KernelLacks, PermissionNeeded, too_many_files
from cwndtrace.kernel import facts

_NEEDED: Final = {privileges.BPF: "CAP_BPF", privileges.PERFMON: "CAP_PERFMON"}
_SELF: Final = Path("/proc/self")
_SYSCTLS: Final = Path("/proc/sys/kernel")
_DEBIAN_RESTRICTED: Final = 3
_DESCRIPTORS: Final = 128
"""The most descriptors that maps, programs, attachments and the compiler take."""


def _holds(status: str, capability: int) -> bool:
    return int(_field(status, "CapEff") or "0", 16) >> capability & 1 == 1


def perf_events(process: Path = _SELF, sysctls: Path = _SYSCTLS) -> tuple[int | None, bool]:
    """Return kernel.perf_event_paranoid (None without perf events), and whether this process may make kprobes then.

    Linux itself wants CAP_PERFMON for them, as for loading the programs. Debian's kernels have a patch (Ubuntu's a
    similar one) that from 3 on, Debian's default, refuses perf_event_open(2) with EACCES without CAP_SYS_ADMIN.
    """
    try:
        level = int((sysctls / "perf_event_paranoid").read_text(encoding="ascii"))
    except OSError:
        return None, False
    status = (process / "status").read_text(encoding="utf-8", errors="replace")
    return level, level < _DEBIAN_RESTRICTED or _holds(status, privileges.SYS_ADMIN)


def check(process: Path = _SELF, lockdown: str | None = None) -> None:
    """Raise PermissionNeeded or KernelLacks, with cause and remedy, where the kernel would refuse to load programs."""
    status = (process / "status").read_text(encoding="utf-8", errors="replace")
    lacking = [name for capability, name in _NEEDED.items() if not _holds(status, capability)]
    if _holds(status, privileges.SYS_ADMIN):
        lacking = []
    if (process / "uid_map").read_text(encoding="ascii").split() != ["0", "0", "4294967295"]:
        raise PermissionNeeded(
            "root in a user namespace, as in a rootless container, has no right to trace the kernel",
            "trace on the host (it sees the containers' connections too), or in a container of the host's root",
        )
    if lacking:
        raise PermissionNeeded(
            f"this process lacks {' and '.join(lacking)}",
            "trace on the host as root, or start the container with --cap-add SYS_ADMIN or --privileged",
        )
    if (lockdown if lockdown is not None else facts.lockdown()) == "confidentiality":
        raise KernelLacks(
            "lockdown=confidentiality keeps BPF from reading kernel memory",
            "boot with lockdown=integrity, or without lockdown",
        )


def check_files(process: Path = _SELF) -> None:
    """Raise CwndtraceError where this process may open too few files for tracing. BPF objects are descriptors too."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        now = sum(1 for _ in (process / "fd").iterdir())
    except OSError as e:
        if (limit := too_many_files(e)) is not None:
            raise limit from e
        raise
    if most != resource.RLIM_INFINITY and most - now < _DESCRIPTORS:
        cause = (
            f"this process may have {most:,} files open at once and has {now:,}; tracing takes {_DESCRIPTORS:,} more"
        )
        raise CwndtraceError(cause, MORE_FILES)


def refused(process: Path = _SELF) -> PermissionNeeded | None:
    """Return the error for a refusal without a visible reason if this process has a seccomp filter, else None."""
    status = (process / "status").read_text(encoding="utf-8", errors="replace")
    if _field(status, "Seccomp") != "2":
        return None
    return PermissionNeeded(
        "a seccomp filter refuses bpf(2) to this process, as containers' default profiles do",
        "trace on the host, or start the container with --security-opt seccomp=unconfined",
    )


def _field(status: str, name: str) -> str:
    match = re.search(rf"^{name}:\s*(\S+)", status, re.MULTILINE)
    return match[1] if match else ""
