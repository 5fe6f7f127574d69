# SPDX-License-Identifier: Apache-2.0
"""Record every TCP congestion-window reset, with block I/O on the same clock, and measure the cost of each.

with cwndtrace.stream(iface="eth0") as batches:
    for batch in batches:
        print(batch.to_pandas())

trace = cwndtrace.load("cwndtrace-20260102-030405.cwnd")
trace.resets, trace.block_io, trace.connections, trace.meta
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cwndtrace.capture.session import Batch
    from cwndtrace.capture.stream import Stream, stream
    from cwndtrace.errors import (
        BccError,
        CaptureError,
        CwndtraceError,
        KernelLacks,
        NoProbe,
        NotFound,
        PermissionNeeded,
        UsageError,
    )
    from cwndtrace.fleet.result import fleet
    from cwndtrace.trace import Trace, load

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "BccError",
    "CaptureError",
    "CwndtraceError",
    "KernelLacks",
    "NoProbe",
    "NotFound",
    "PermissionNeeded",
    "Stream",
    "Trace",
    "UsageError",
    "fleet",
    "load",
    "stream",
]

_ELSEWHERE = {
    "Batch": "capture.session",
    "Stream": "capture.stream",
    "stream": "capture.stream",
    "Trace": "trace",
    "load": "trace",
}


def __getattr__(name: str) -> Any:
    # Names are imported on first use: pandas and pyroute2 take most of a second to load, and not every part needs them.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "fleet":
        return import_module("cwndtrace.fleet")  # a package that can be called
    value = getattr(import_module(f"{__name__}.{_ELSEWHERE.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
