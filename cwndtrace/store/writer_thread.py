# SPDX-License-Identifier: Apache-2.0
"""Write a capture on a separate thread, so that a slow disk costs no records."""

from __future__ import annotations

import math
import queue
import threading
from collections import Counter
from typing import Any, Final

from cwndtrace.errors import CaptureError
from cwndtrace.lazy import pa
from cwndtrace.records.arrow import TimedRecords
from cwndtrace.store.layout import show
from cwndtrace.store.reader import Capture
from cwndtrace.store.writer import BUFFER_ROWS, CaptureWriter

_SOONEST_S: Final = 0.05
_WAIT_S: Final = 60.0


class ThreadedWriter:
    """A ``CaptureWriter`` on a separate thread, which the first row starts, with the methods of the writer.

    ``add`` never waits for the disk. At most BUFFER_ROWS rows are queued for the thread; more are dropped and counted,
    as the writer does with its own.
    """

    def __init__(self, writer: CaptureWriter) -> None:
        self.path = writer.path
        self._writer = writer
        self._queue: queue.SimpleQueue[
            tuple[str, pa.Table | TimedRecords] | dict[str, Any] | int | queue.SimpleQueue[Exception | None] | None
        ] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting = 0
        self._dropped: Counter[str] = Counter()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)

    def add(self, table: str, data: pa.Table | TimedRecords) -> None:
        """Take the rows of ``data``."""
        with self._lock:
            if self._waiting + len(data) > BUFFER_ROWS:
                self._dropped[table] += len(data)
                return
            self._waiting += len(data)
        self._start()
        self._queue.put((table, data))

    def _start(self) -> None:
        with self._lock:
            if self._thread.ident is None:
                self._thread.start()

    def capture(self) -> Capture:
        """Open the capture for reading, as ``CaptureWriter.capture`` does."""
        return self._writer.capture()

    def update_meta(self, **values: Any) -> None:
        """Update ``meta.json`` once the rows queued before are taken; the next ``flush`` raises an error of it."""
        self._start()
        self._queue.put(values)

    def asked(self) -> bool:
        """Return whether another process asks, as ``CaptureWriter.asked`` does."""
        return self._writer.asked()

    def note_written(self, read_ns: int) -> None:
        """Note in ``meta.json`` up to when rows are on disk, once those queued before are."""
        self._start()
        self._queue.put(read_ns)

    def flush(self) -> None:
        """Raise the error of the last attempt to write, if it failed. The thread itself writes the parts."""
        if self._failure is not None:
            raise self._failure

    def wait(self) -> None:
        """Wait until all rows queued before are on disk. Any thread may call this.

        Raises the error of writing them.
        """
        self._start()
        answer: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._queue.put(answer)
        try:
            error = answer.get(timeout=_WAIT_S)
        except queue.Empty:
            cause = f"The disk hasn't taken the rows of {show(self.path)} for {_WAIT_S:.0f} s."
            error = CaptureError(cause, "See dmesg, or write to another disk with -o.")
        if error:
            raise error

    def close(self, status: str = "complete", **meta: Any) -> None:
        """Close the writer, as ``CaptureWriter.close`` does, once all queued rows are taken."""
        if self._thread.ident is not None:
            self._queue.put(None)
            self._thread.join()
        self._writer.lost.update(self._dropped)
        self._dropped.clear()
        failed = self._failure if not isinstance(self._failure, CaptureError) else None
        self._writer.close("failed" if failed else status, **meta)
        if failed:
            raise failed

    def _run(self) -> None:
        while True:
            try:
                due = self._writer.due_s()
                # Never wait 0 s: a write that fails for another reason than the disk stays due, and would be retried
                # without a pause.
                item = self._queue.get(timeout=None if due == math.inf else max(due, _SOONEST_S))
                if item is None:
                    return
                if isinstance(item, queue.SimpleQueue):
                    item.put(self._forced())
                elif isinstance(item, dict):
                    self._writer.update_meta(**item)
                elif isinstance(item, int):
                    self._writer.note_written(item)
                else:
                    self._add(*item)
            except queue.Empty:
                pass
            except Exception as e:  # to be raised by flush() and close(), instead of ending the thread
                self._failure = e
            self._flush()

    def _add(self, table: str, data: pa.Table | TimedRecords) -> None:
        try:
            self._writer.add(table, data)
        finally:
            with self._lock:
                self._waiting -= len(data)

    def _forced(self) -> Exception | None:
        try:
            self._writer.flush(force=True)
        except Exception as e:
            return e
        return None

    def _flush(self) -> None:
        try:
            self._writer.flush(late=not self._queue.empty())
        except Exception as e:  # as above: bad records may only show when they are written
            self._failure = e
        else:
            if isinstance(self._failure, CaptureError):
                self._failure = None
