# SPDX-License-Identifier: Apache-2.0
"""Work in several threads, which pays where Arrow or numpy don't hold the interpreter's lock."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from cwndtrace.errors import making_sense
from cwndtrace.store import files

_T = TypeVar("_T")

_ROOM: Final = 256 << 20
"""Without this much free memory, in bytes, no thread is started: where it finds none for a library's data of its own,
the C library ends the process."""


def roomy(size: int) -> bool:
    """Return whether a thread may be started for work that takes this much memory, in bytes."""
    return files.has_memory(size + _ROOM)


def each(work: Sequence[Callable[[], _T]]) -> list[_T]:
    """Return what each function returns; all but the first run in threads of their own, if there is memory for them."""
    if len(work) == 1 or not roomy(0):
        return [one() for one in work]
    with ThreadPoolExecutor(max_workers=len(work) - 1) as pool:
        started = []
        for function in work[1:]:
            try:
                # A thread doesn't take over how numpy treats errors.
                started.append(pool.submit(making_sense()(function)))
            except RuntimeError:
                break
        return [work[0](), *(one.result() for one in started), *(one() for one in work[1 + len(started) :])]


def ahead(items: Iterator[_T]) -> Iterator[_T]:
    """Yield ``items``, none of which is None, and make the next one in another thread meanwhile."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        following = making_sense()(lambda: next(items, None))
        try:
            future = pool.submit(following)
        except RuntimeError:  # no thread could be started, so no item was taken
            yield from items
            return
        while (item := future.result()) is not None:
            future = pool.submit(following)
            yield item
