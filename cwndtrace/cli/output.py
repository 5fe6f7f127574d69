# SPDX-License-Identifier: Apache-2.0
"""When what is printed can't be: whoever read it has gone or doesn't read, its terminal has, or the disk is full."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from typing import Final, TextIO

import click

_GONE: Final = (errno.EPIPE, errno.EIO, errno.ENXIO)
_MOST_WAITING: Final = 4 << 20
_LOOK_S: Final = 0.1


class OutputError(Exception):
    """Something couldn't be printed; ``failed`` unless it was only that nobody reads any more."""

    def __init__(self, failed: bool) -> None:
        super().__init__()
        self.failed = failed


def reopen_std_fds() -> None:
    """Open what of stdin, stdout and stderr is closed, or the next file opened, a capture's, would be printed into."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    # Python has none where they were closed.
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def output_closed(*descriptors: int) -> bool:
    """Whether who read stdout (or these descriptors) has gone: a pipe's other end is closed, a terminal hung up."""
    poll = select.poll()
    for descriptor in descriptors or (1,):
        poll.register(descriptor, 0)
    return any(state & (select.POLLERR | select.POLLHUP) for _, state in poll.poll(0))


@contextmanager
def printing() -> Iterator[None]:
    """What is printed in it goes out at once, or Unprinted is raised, and what follows goes nowhere.

    A reader that has left isn't worth a word; any other error is said, once.
    """
    try:
        yield
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError as e:
        gone = e.errno in _GONE
        broken = [d for d in (1, 2) if output_closed(d)] if gone else [1]
        nowhere = os.open(os.devnull, os.O_WRONLY)
        # Python flushes both once more when it ends.
        for descriptor in broken:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)
        if not gone:
            click.echo(f"cwndtrace: what is printed can't be written: {e.strerror}; the trace ends.", err=True)
        raise OutputError(not gone) from e


class _OutputThread:
    """A file that is printed to from a thread of its own, which the first text starts."""

    def __init__(self) -> None:
        self._texts: list[tuple[int, bytes]] = []
        self._size = 0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="printer", daemon=True)
        self.failure: OSError | None = None

    def put(self, descriptor: int, text: bytes, *, force: bool = False) -> bool:
        """Queue a text unless too much is waiting already; ``force`` queues it all the same. Returns whether it did."""
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
        """Whether nothing is waiting any more, after so long at most."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._size, timeout_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._texts)
                texts, self._texts = self._texts, []
            for descriptor, some in groupby(texts, itemgetter(0)):
                self._write(descriptor, b"".join(text for _, text in some))
            with self._changed:
                self._size -= sum(len(text) for _, text in texts)
                self._changed.notify_all()

    def _write(self, descriptor: int, text: bytes) -> None:
        while text and self.failure is None:
            try:
                # Not by the stream: its lock, held by a write that waits for ever, would spoil the process's end.
                text = text[os.write(descriptor, text) :]
            except BlockingIOError:
                # Somebody else who has this terminal or pipe wants not to wait there; this thread does.
                select.select([], [descriptor], [])
            except OSError as e:
                self.failure = e


class _QueuedStream(io.TextIOBase):
    """Stands for a stream and queues its texts for an ``_OutputThread``.

    ``output_dropped`` makes the line that says how many lines were dropped.
    """

    def __init__(
        self, stream: TextIO, thread: _OutputThread, output_dropped: Callable[[int], str], *, tells: bool
    ) -> None:
        self._stream = stream
        self._thread_of = thread
        self._note = output_dropped
        self._tells = tells
        self._dropped = 0

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
        note = f"{self._note(self._dropped)}\n" if self._dropped else ""
        if self._put(note + text):
            self._dropped = 0
        else:
            self._dropped += text.count("\n")
        return len(text)

    def _put(self, text: str, *, force: bool = False) -> bool:
        return self._thread_of.put(self.fileno(), text.encode(self.encoding, "replace"), force=force)

    def flush(self) -> None:
        """Raise what printing failed with, once."""
        if self._tells and self._thread_of.failure is not None:
            self._tells = False
            raise self._thread_of.failure

    def close(self) -> None:
        """Without a flush: what Python 3.13 closes as garbage shows a traceback of what that raises."""

    def finish(self, hurried: Callable[[], bool]) -> None:
        if self._dropped:
            self._put(f"{self._note(self._dropped)}\n", force=True)
        while not self._thread_of.printed(_LOOK_S):
            if hurried():
                with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
                    os.dup2(nowhere.fileno(), self.fileno())
                return


@contextmanager
def buffered_output(output_dropped: Callable[[int], str], hurried: Callable[[], bool]) -> Iterator[None]:
    """While it is entered, printing never waits: a stopped terminal, or a slow reader, holds up nothing but itself.

    A few megabytes of text are held; of more, whole texts are dropped, and a line of ``output_dropped`` says of how
    many lines. At the end it waits until all is printed, or until ``hurried``: then the rest, and what follows, goes
    nowhere. An error of stdout comes from the next flush, or at the end as ``printing`` has it; one of stderr is
    nobody's business.
    """
    old = sys.stdout, sys.stderr
    threads: dict[tuple[int, int], _OutputThread] = {}
    new = []
    for stream in old:
        file = os.fstat(stream.fileno())
        # One for both if they are the same terminal: what is printed keeps its order.
        thread = threads.setdefault((file.st_dev, file.st_ino), _OutputThread())
        new.append(_QueuedStream(stream, thread, output_dropped, tells=stream is old[0]))
    sys.stdout, sys.stderr = new
    try:
        yield
    finally:
        for later in new:
            later.finish(hurried)
        sys.stdout, sys.stderr = old
    with printing():
        new[0].flush()
