# SPDX-License-Identifier: Apache-2.0
"""Tuning of the C library's memory allocator for large arrays."""

from __future__ import annotations

from typing import Final

from cwndtrace import _libc

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_* of malloc.h
_LARGE: Final = 1 << 30


def keep_freed() -> None:
    """Make the C library reuse the memory of freed large arrays, if it has mallopt(3).

    By default it returns such memory to the kernel at once, and the kernel clears each page that it hands out again:
    with columns of 80 MB this takes as long as the calculation. Call this only in a command that ends when its work is
    done.
    """
    if (mallopt := getattr(_libc.lib, "mallopt", None)) is not None:
        mallopt(_MMAP_THRESHOLD, _LARGE)
        mallopt(_TRIM_THRESHOLD, _LARGE)
