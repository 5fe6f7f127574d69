# SPDX-License-Identifier: Apache-2.0
"""When what is printed can't be: whoever read it has gone, its terminal has, or the file's disk is full."""

from __future__ import annotations

import errno
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import click

_GONE: Final = (errno.EPIPE, errno.EIO, errno.ENXIO)


class Unprinted(Exception):
    """Something couldn't be printed; ``failed`` unless it was only that nobody reads any more."""

    def __init__(self, failed: bool) -> None:
        super().__init__()
        self.failed = failed


def hold_standard() -> None:
    """Open what of stdin, stdout and stderr is closed, or the next file opened, a capture's, would be printed into."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    # Python has none where they were closed.
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def nobody_reads(*descriptors: int) -> bool:
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
        broken = [d for d in (1, 2) if nobody_reads(d)] if gone else [1]
        nowhere = os.open(os.devnull, os.O_WRONLY)
        # Python flushes both once more when it ends.
        for descriptor in broken:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)
        if not gone:
            click.echo(f"cwndtrace: what is printed can't be written: {e.strerror}; the trace ends.", err=True)
        raise Unprinted(not gone) from e
