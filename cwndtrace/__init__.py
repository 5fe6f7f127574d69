# SPDX-License-Identifier: Apache-2.0
"""cwndtrace: congestion-window resets made visible, exact and costed, beside block I/O on the same clock.

with cwndtrace.stream(iface="eth0") as batches:
    for batch in batches:
        print(batch.to_pandas())

trace = cwndtrace.load("cwndtrace-20260102-030405.cwnd")
trace.resets, trace.block_io, trace.connections, trace.meta
"""

from cwndtrace.capture.session import Batch
from cwndtrace.capture.stream import Stream, stream
from cwndtrace.errors import (
    BccError,
    CaptureError,
    CwndtraceError,
    KernelLacks,
    NoRung,
    NotFound,
    PermissionNeeded,
    UsageError,
)
from cwndtrace.trace import Trace, load

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "BccError",
    "CaptureError",
    "CwndtraceError",
    "KernelLacks",
    "NoRung",
    "NotFound",
    "PermissionNeeded",
    "Stream",
    "Trace",
    "UsageError",
    "load",
    "stream",
]
