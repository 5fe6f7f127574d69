# SPDX-License-Identifier: Apache-2.0
"""What makes the unit tests faster, which of them are slow, and how many slow ones were left out."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Final

import pytest

_SLOWEST: Final = (
    "test_fleet_report", "test_top_screen", "test_verdict", "test_remedy", "test_report", "test_cured", "test_metrics",
    "test_fleet_summary", "test_hostile_captures", "test_dump", "test_window", "test_fleet_tables", "test_locales",
)  # fmt: skip
"""The files that take longest. They begin first, so that no process is left alone with one of them at the end."""
_CASES: Final = pytest.StashKey[Counter[str]]()
"""How many cases of a test were collected, by its name."""
_LEFT_OUT: Final = pytest.StashKey[int]()
"""How many slow tests were left out."""


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark the cases of a test slow that come after those which its mark ``quick`` counts."""
    if mark := item.get_closest_marker("quick"):
        cases = item.config.stash.setdefault(_CASES, Counter())
        name = item.nodeid.partition("[")[0]
        cases[name] += 1
        if cases[name] > mark.args[0]:
            item.add_marker("slow")


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    """Count the slow tests that aren't run. pytest-xdist asks each of its processes for its count."""
    config = items[0].config
    count = sum(item.get_closest_marker("slow") is not None for item in items)
    config.stash[_LEFT_OUT] = config.stash.get(_LEFT_OUT, 0) + count
    if hasattr(config, "workeroutput"):
        config.workeroutput["left_out"] = config.stash[_LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take the count of a process, which is that of each of them."""
    node.config.stash[_LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many slow tests were left out."""
    if count := terminalreporter.config.stash.get(_LEFT_OUT, 0):
        terminalreporter.write_line(f"{count} slow tests were left out. To run them: make test-slow")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the slowest files begin. tools/test tells pytest-xdist to keep this order."""
    items.sort(key=lambda item: item.path.stem not in _SLOWEST)


def pytest_collection_finish() -> None:
    """Keep the garbage collector from looking at the modules of all libraries again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


@pytest.fixture(scope="session", autouse=True)
def leave_unsynced() -> Iterator[None]:
    """Don't wait for the disk: what a test has written is gone with its folder, and no test cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield
