# SPDX-License-Identifier: Apache-2.0
"""Checks of captures that a trace has written or is still writing."""

from __future__ import annotations

from pathlib import Path

import cwndtrace


def assert_complete(path: Path, resets: int) -> None:
    """Assert that a capture is complete, with this number of resets, no warnings and no temporary files."""
    trace = cwndtrace.load(path)
    assert (trace.status, len(trace.resets), trace.warnings) == ("complete", resets, [])
    assert trace.meta["ended"]
    assert not list(path.rglob(".*"))


def block_io_rows(path: Path) -> int:
    """Return the number of block I/O rows that a capture has so far."""
    return len(cwndtrace.load(path).block_io)
