# SPDX-License-Identifier: Apache-2.0
"""Tests of the reader's CPU priority where it isn't raised. live/test_privileges.py has the others."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from cwndtrace.capture import priority


def in_a_thread(check: Callable[[], None]) -> None:
    """Run ``check`` in a thread that ends, because a nice value can't be lowered again."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(check).result()


@pytest.mark.parametrize("call", ["setpriority", "sched_setscheduler"])
def test_a_refusal_changes_nothing(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    asked = []

    def refused(*arguments: object) -> None:
        asked.append(arguments)
        raise PermissionError(1, "no CAP_SYS_NICE")

    monkeypatch.setattr(os, call, refused)
    monkeypatch.setattr(priority, "nice", lambda: 0)
    # The tests themselves may run at idle priority.
    monkeypatch.setattr(os, "sched_getscheduler", lambda _: os.SCHED_OTHER)

    def trace() -> None:
        before = os.getpriority(os.PRIO_PROCESS, 0)
        with priority.raised():
            assert os.getpriority(os.PRIO_PROCESS, 0) == before
            raise OSError(5, "the trace's own error")

    with pytest.raises(OSError, match="own error"):
        in_a_thread(trace)
    assert len(asked) == 1


def test_a_nice_value_that_the_user_chose_stays() -> None:
    def check() -> None:
        chosen = min(priority.nice() + 1, 19)
        os.setpriority(os.PRIO_PROCESS, 0, chosen)
        with priority.raised():
            assert priority.nice() == chosen
        assert priority.nice() == chosen

    in_a_thread(check)
