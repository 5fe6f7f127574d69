# SPDX-License-Identifier: Apache-2.0
"""A terminal of a given width at stdout, and what was printed to it."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import click
import pytest

from cwndtrace.cli.table import cells

_END: Final = b"\0"


@contextmanager
def terminal(columns: int, encoding: str = "utf-8") -> Iterator[Callable[[], list[str]]]:
    """Make stdout a terminal of ``columns`` columns; yield a function that returns its lines after the exit."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    chunks: list[bytes] = []

    def drain() -> None:
        # Read up to a mark while the other end is still open. A read while it closes may fail although text is left,
        # because n_tty_read() in drivers/tty/n_tty.c checks for text first, and then whether the other end is closed.
        while not (chunks and chunks[-1].endswith(_END)):
            chunks.append(os.read(master, 65536))

    def lines() -> list[str]:
        text = b"".join(chunks).removesuffix(_END).decode(encoding)
        return click.unstyle(text).replace("\r\n", "\n").split("\n")[:-1]

    reader = threading.Thread(target=drain)
    reader.start()
    stream = os.fdopen(slave, "w", encoding=encoding, errors="replace", closefd=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "__stdout__", stream)
        patch.delenv("COLUMNS", raising=False)
        try:
            yield lines
        finally:
            stream.flush()
            os.write(slave, _END)
            reader.join()
            os.close(slave)
            os.close(master)


def printed_lines(columns: int, print_it: Callable[[], object], encoding: str = "utf-8") -> list[str]:
    """Return the lines that ``print_it`` prints in such a terminal, and assert that none is wider."""
    with terminal(columns, encoding) as lines:
        print_it()
    assert lines()
    assert [line for line in lines() if cells(line) > columns] == []
    return lines()
