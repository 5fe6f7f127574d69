# SPDX-License-Identifier: Apache-2.0
"""Print in any locale."""

from __future__ import annotations

import codecs
import io
import sys


class _Ascii(io.TextIOWrapper):
    """An ASCII stream without ``buffer``: click would write UTF-8 to the binary buffer of a stream that is ASCII."""

    buffer = None  # type: ignore[assignment]


def print_all() -> None:
    """Make stdout and stderr print ``?`` for each character that their encoding lacks, in any locale.

    Process names may hold any character, because any user can choose them. Call this once, before anything is printed.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue
        stream.reconfigure(errors="replace")
        if codecs.lookup(stream.encoding).name == "ascii" and not isinstance(stream, _Ascii):
            binary = open(stream.fileno(), "wb", closefd=False)  # noqa: SIM115  (a descriptor)
            setattr(sys, name, _Ascii(binary, "ascii", "replace", line_buffering=stream.line_buffering))
