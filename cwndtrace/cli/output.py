# SPDX-License-Identifier: Apache-2.0
"""Output that copes with a reader that is gone or too slow, a terminal that is hung up, and a full disk."""

from __future__ import annotations

import errno
import io
import os
import select
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from typing import Final, TextIO

import click

_READER_GONE: Final = (errno.EPIPE, errno.EIO, errno.ENXIO)
_MOST_WAITING: Final = 4 << 20
_CHECK_INTERVAL_S: Final = 0.1


class OutputError(Exception):
    """Output failed. ``failed`` is false if the only reason is that the reader is gone."""

    def __init__(self, failed: bool) -> None:
        super().__init__()
        self.failed = failed


def reopen_std_fds() -> None:
    """Open /dev/null for each of stdin, stdout and stderr that is closed.

    Otherwise the next file that is opened, such as a capture's, would get that descriptor and be printed into.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    # Python sets a stream that was closed to None.
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def output_closed(*descriptors: int) -> bool:
    """Return true if the reader of stdout, or of one of these descriptors, is gone.

    That is so once the other end of a pipe is closed or a terminal is hung up.
    """
    poll = select.poll()
    for descriptor in descriptors or (1,):
        poll.register(descriptor, 0)
    return any(state & (select.POLLERR | select.POLLHUP) for _, state in poll.poll(0))


def output_discarded(descriptor: int = 1) -> bool:
    """Return true if stdout, or this descriptor, is /dev/null (null(4)): nobody will read what is printed."""
    found = os.fstat(descriptor)
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == os.makedev(1, 3)


@contextmanager
def printing() -> Iterator[None]:
    """Flush stdout and stderr at the end of this context. Raises OutputError if printing fails.

    The stream that failed then discards all later output. The error is reported, unless the reader is gone.
    """
    try:
        yield
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError as e:
        gone = e.errno in _READER_GONE
        broken = [d for d in (1, 2) if output_closed(d)] if gone else [1]
        devnull = os.open(os.devnull, os.O_WRONLY)
        # Python flushes both streams once more at exit.
        for descriptor in broken:
            os.dup2(devnull, descriptor)
        os.close(devnull)
        if not gone:
            click.echo(f"cwndtrace: the output can't be written: {e.strerror}; the trace ends.", err=True)
        raise OutputError(not gone) from e


class _OutputThread:
    """A thread that writes queued texts to a file. The first text starts it."""

    def __init__(self) -> None:
        self._texts: list[tuple[int, bytes]] = []
        self._size = 0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="printer", daemon=True)
        self.failure: OSError | None = None

    def put(self, descriptor: int, text: bytes, *, force: bool = False) -> bool:
        """Queue a text, and return true. If too much is queued already, drop it and return false.

        With ``force`` the text is always queued.
        """
        with self._changed:
            if self._size + len(text) > _MOST_WAITING and not force:
                return False
            self._texts.append((descriptor, text))
            self._size += len(text)
            if len(self._texts) == 1:
                self._changed.notify()
        if self._thread.ident is None:
            self._thread.start()
        return True

    def printed(self, timeout_s: float) -> bool:
        """Wait until everything is written, at most ``timeout_s`` seconds; return true if it is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._size, timeout_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._texts)
                texts, self._texts = self._texts, []
            for descriptor, group in groupby(texts, itemgetter(0)):
                self._write(descriptor, b"".join(text for _, text in group))
            with self._changed:
                self._size -= sum(len(text) for _, text in texts)
                self._changed.notify_all()

    def _write(self, descriptor: int, text: bytes) -> None:
        while text and self.failure is None:
            try:
                # The stream isn't used, because a write that blocks forever would hold its lock when the process ends.
                text = text[os.write(descriptor, text) :]
            except BlockingIOError:
                # Another process has set this terminal or pipe to non-blocking; this thread may wait.
                select.select([], [descriptor], [])
            except OSError as e:
                self.failure = e


class _QueuedStream(io.TextIOBase):
    """A replacement for a stream that queues its texts for an ``_OutputThread``.

    ``output_dropped`` returns the line that reports how many lines were dropped. ``flush`` raises an error of the
    thread once if ``raises`` is set.
    """

    def __init__(
        self, stream: TextIO, thread: _OutputThread, output_dropped: Callable[[int], str], *, raises: bool
    ) -> None:
        self._stream = stream
        self._output_thread = thread
        self._output_dropped = output_dropped
        self._raises = raises
        self._dropped = 0
        self.all_dropped = 0

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self._stream.errors

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        notice = f"{self._output_dropped(self._dropped)}\n" if self._dropped else ""
        if self._put(notice + text):
            self._dropped = 0
        else:
            self._dropped += text.count("\n")
            self.all_dropped += text.count("\n")
        return len(text)

    def _put(self, text: str, *, force: bool = False) -> bool:
        return self._output_thread.put(self.fileno(), text.encode(self.encoding, "replace"), force=force)

    def flush(self) -> None:
        """Raise the error with which writing failed, once."""
        if self._raises and self._output_thread.failure is not None:
            self._raises = False
            raise self._output_thread.failure

    def close(self) -> None:
        """Do nothing. A flush could raise, and Python 3.13 prints a traceback of that when it collects the stream."""

    def finish(self, hurried: Callable[[], bool]) -> None:
        if self._dropped:
            self._put(f"{self._output_dropped(self._dropped)}\n", force=True)
        while not self._output_thread.printed(_CHECK_INTERVAL_S):
            if hurried():
                with open(os.devnull, "wb") as devnull:  # noqa: PTH123
                    os.dup2(devnull.fileno(), self.fileno())
                return


@contextmanager
def buffered_output(output_dropped: Callable[[int], str], hurried: Callable[[], bool]) -> Iterator[Callable[[], int]]:
    """Write stdout and stderr from threads, so that a stopped terminal or a slow reader never blocks the caller.

    At most 4 MiB of text are queued. Beyond that, texts are dropped, and a line from ``output_dropped`` reports the
    number of lines. On exit it waits until all is written, or until ``hurried`` returns true: then the rest and all
    later output is discarded. An error on stdout is raised by the next flush, or on exit by ``printing``. An error on
    stderr is ignored. Yields a function that returns the number of lines dropped so far.
    """
    old = sys.stdout, sys.stderr
    threads: dict[tuple[int, int], _OutputThread] = {}
    new = []
    for stream in old:
        file = os.fstat(stream.fileno())
        # Both streams share a thread if they are the same file, so that their texts stay in order.
        thread = threads.setdefault((file.st_dev, file.st_ino), _OutputThread())
        new.append(_QueuedStream(stream, thread, output_dropped, raises=stream is old[0]))
    sys.stdout, sys.stderr = new
    try:
        yield lambda: sum(queued.all_dropped for queued in new)
    finally:
        for queued in new:
            queued.finish(hurried)
        sys.stdout, sys.stderr = old
    with printing():
        new[0].flush()
