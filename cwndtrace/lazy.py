# SPDX-License-Identifier: Apache-2.0
"""``pa`` (pyarrow) and ``pq`` (pyarrow.parquet), which are imported when an attribute of theirs is first used.

A trace attaches before it needs them, and its helper process never does. importlib.util.LazyLoader isn't used, because
up to Python 3.11.7 two threads that use a module for the first time at once may find it half loaded (cpython#114763).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["pa", "pq"]

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
else:

    class _LazyModule:
        """Has the attributes of a module."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, name: str) -> Any:
            return getattr(import_module(self._name), name)

    pa, pq = _LazyModule("pyarrow"), _LazyModule("pyarrow.parquet")
