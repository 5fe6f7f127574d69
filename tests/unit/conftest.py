# SPDX-License-Identifier: Apache-2.0
"""What makes the unit tests faster, and changes nothing that they say."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Final

import pytest

_SLOWEST: Final = ("test_notebooks", "test_fleet_cluster", "test_hostile_captures", "test_locales", "test_page")
"""The files that take longest. They begin first, so that no process is left alone with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the slowest files begin. tools/test tells pytest-xdist to keep this order."""
    items.sort(key=lambda item: item.path.stem not in _SLOWEST)


def pytest_collection_finish() -> None:
    """Keep the garbage collector from looking at the modules of all libraries again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def leave_unsynced() -> Iterator[None]:
    """Don't wait for the disk: what a test has written is gone with its folder, and no test cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield
