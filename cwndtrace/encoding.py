# SPDX-License-Identifier: Apache-2.0
"""Printing in any locale."""

from __future__ import annotations

import codecs
import io
import sys


class _Ascii(io.TextIOWrapper):
    """click goes past a stream that says it is ASCII, to the bytes below, and writes UTF-8 there."""

    buffer = None  # type: ignore[assignment]


def print_all() -> None:
    """Have stdout and stderr print ``?`` for what their encoding lacks, whatever the locale: any user names processes.

    To be called once, before anything is printed.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue
        stream.reconfigure(errors="replace")
        if codecs.lookup(stream.encoding).name == "ascii" and not isinstance(stream, _Ascii):
            binary = open(stream.fileno(), "wb", closefd=False)  # noqa: SIM115  (a descriptor)
            setattr(sys, name, _Ascii(binary, "ascii", "replace", line_buffering=stream.line_buffering))
