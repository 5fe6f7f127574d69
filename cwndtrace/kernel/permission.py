# SPDX-License-Identifier: Apache-2.0
"""Whether this process may load BPF programs that trace, and if not, what it is that forbids it."""

from __future__ import annotations

import re
import resource
from pathlib import Path
from typing import Final

from cwndtrace import privileges
from cwndtrace.errors import MORE_FILES, CwndtraceError, KernelLacks, PermissionNeeded, too_many_files
from cwndtrace.kernel import facts

_ENOUGH: Final = {privileges.BPF: "CAP_BPF", privileges.PERFMON: "CAP_PERFMON"}
_SYSTEM: Final = Path("/proc/self")
_DESCRIPTORS: Final = 128
"""What maps, programs, what is attached, and the compiler take at most."""


def check(process: Path = _SYSTEM, lockdown: str | None = None) -> None:
    """Raise PermissionNeeded or KernelLacks, with cause and cure, where loading is bound to be refused."""
    status = (process / "status").read_text(encoding="utf-8", errors="replace")
    held = int(_field(status, "CapEff") or "0", 16)
    lacking = [] if held >> privileges.SYS_ADMIN & 1 else [name for bit, name in _ENOUGH.items() if not held >> bit & 1]
    if (process / "uid_map").read_text(encoding="ascii").split() != ["0", "0", "4294967295"]:
        raise PermissionNeeded(
            "root in a user namespace, as in a rootless container, is nobody to the kernel's tracing",
            "trace on the host (it sees the containers' connections too), or in a container of the host's root",
        )
    if lacking:
        raise PermissionNeeded(
            f"this process lacks {' and '.join(lacking)}",
            "trace on the host as root, or start the container with --cap-add SYS_ADMIN or --privileged",
        )
    if (lockdown if lockdown is not None else facts.lockdown()) == "confidentiality":
        raise KernelLacks(
            "lockdown=confidentiality keeps BPF from reading what it traces",
            "boot with lockdown=integrity, or without lockdown",
        )


def check_files(process: Path = _SYSTEM) -> None:
    """Raise CwndtraceError where this process may not open what tracing takes: the kernel's objects are files too."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        now = sum(1 for _ in (process / "fd").iterdir())
    except OSError as e:
        if (limit := too_many_files(e)) is not None:
            raise limit from e
        raise
    if most != resource.RLIM_INFINITY and most - now < _DESCRIPTORS:
        cause = (
            f"this process may have {most:,} files open at once, and has {now:,}: tracing takes {_DESCRIPTORS:,} more"
        )
        raise CwndtraceError(cause, MORE_FILES)


def refused(process: Path = _SYSTEM) -> PermissionNeeded | None:
    """What a refusal for no visible reason comes from: a seccomp filter, if there is one."""
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
