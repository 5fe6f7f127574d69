# SPDX-License-Identifier: Apache-2.0
"""How the C library gives memory to arrays."""

from __future__ import annotations

from typing import Final

from cwndtrace import _libc

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_* of malloc.h
_LARGE: Final = 1 << 30


def keep_freed() -> None:
    """Have large arrays take the place of those that were freed before, where the C library knows how.

    It would give such memory back at once otherwise, and the kernel clears each page that it gives out: with columns of
    80 MB that is as much work as what is calculated with them. Only for commands that end when they are done.
    """
    if (mallopt := getattr(_libc.lib, "mallopt", None)) is not None:
        mallopt(_MMAP_THRESHOLD, _LARGE)
        mallopt(_TRIM_THRESHOLD, _LARGE)
