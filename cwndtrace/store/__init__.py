# SPDX-License-Identifier: Apache-2.0
"""Captures on disk: a directory with ``meta.json`` and a folder of Parquet parts for each table.

No Parquet part is ever incomplete. Each one, and ``meta.json``, is written under a name that readers skip, flushed to
the device and then renamed. Records that come too fast for that are appended to raw parts, which become Parquet later;
readers leave out the last frame of one if it isn't whole. A writer that is killed, or whose disk fills up, loses only
the rows that it still held in memory.
"""

from cwndtrace.store.layout import SCHEMA_VERSION
from cwndtrace.store.reader import MOST_ROWS, Capture, open_capture
from cwndtrace.store.writer import CaptureWriter
from cwndtrace.store.writer_thread import ThreadedWriter

__all__ = ["MOST_ROWS", "SCHEMA_VERSION", "Capture", "CaptureWriter", "ThreadedWriter", "open_capture"]
