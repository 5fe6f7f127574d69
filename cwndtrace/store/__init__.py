# SPDX-License-Identifier: Apache-2.0
"""Captures on disk: a directory with ``meta.json`` and a folder of Parquet parts for each table.

No file on disk is ever incomplete. Each part and ``meta.json`` is written under a name that readers skip, flushed to
the device and then renamed. A writer that is killed, or whose disk fills up, loses only the rows that it still held in
memory.
"""

from cwndtrace.store.layout import SCHEMA_VERSION
from cwndtrace.store.reader import MOST_ROWS, Capture, open_capture
from cwndtrace.store.writer import CaptureWriter
from cwndtrace.store.writer_thread import ThreadedWriter

__all__ = ["MOST_ROWS", "SCHEMA_VERSION", "Capture", "CaptureWriter", "ThreadedWriter", "open_capture"]
