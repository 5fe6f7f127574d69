# SPDX-License-Identifier: Apache-2.0
"""Settings of this machine's kernel for as long as a test needs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def sysctl(name: str, value: int) -> Iterator[None]:
    """Set a sysctl, such as ``kernel.bpf_stats_enabled``, until the exit."""
    path = Path("/proc/sys", *name.split("."))
    before = path.read_text()
    path.write_text(str(value))
    try:
        yield
    finally:
        path.write_text(before)
