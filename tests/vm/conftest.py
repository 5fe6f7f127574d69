# SPDX-License-Identifier: Apache-2.0
"""The tests in virtual machines use the live tests' namespaces and connections."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

from tests.live.conftest import connect, drain, make_space, space

__all__ = ["connect", "drain", "in_guest", "make_space", "space"]


def in_guest() -> bool:
    """Whether the kernel that runs is the one that tools/vm has booted, and by virtme-ng."""
    folder = os.environ.get("CWNDTRACE_VM_KERNEL")
    if not folder or "virtme" not in Path("/proc/cmdline").read_text():
        return False
    return bool(json.loads((Path(folder) / "info.json").read_text())["release"] == platform.release())
