# SPDX-License-Identifier: Apache-2.0
"""Facts about the kernel of the guest that tools/vm has booted."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Final

KERNEL: Final = os.environ.get("CWNDTRACE_VM", "")
"""The name of the guest, such as 6.12-unpatched; empty outside of a guest."""
PATCHED: Final = bool(KERNEL) and "unpatched" not in KERNEL


def in_guest() -> bool:
    """Return true if the running kernel is the one that tools/vm has booted with virtme-ng, whatever KERNEL says."""
    folder = os.environ.get("CWNDTRACE_VM_KERNEL")
    if not folder or "virtme" not in Path("/proc/cmdline").read_text():
        return False
    return bool(json.loads((Path(folder) / "info.json").read_text())["release"] == platform.release())
