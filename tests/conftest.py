# SPDX-License-Identifier: Apache-2.0
"""What all tests share: tests that need root are skipped without it, with the command that would run them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import hypothesis
import pytest

from cwndtrace.cli import user

# No database of examples: the checkout may be somebody else's. No deadline: the machine may be busy.
hypothesis.settings.register_profile("cwndtrace", database=None, deadline=None)
hypothesis.settings.load_profile("cwndtrace")

# Under nohup it is ignored, which what the tests start would inherit: a handler is not.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

# By sudo make test they would be set: root's tests are root's, and those of sudo say for whom it works.
for _name in ("SUDO_UID", "SUDO_GID"):
    os.environ.pop(_name, None)

_NEEDS_ROOT = {"live": "sudo make test", "chroot": "sudo make test-distributions"}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip before any fixture is made."""
    if os.geteuid() == 0:
        return
    for marker, command in _NEEDS_ROOT.items():
        if item.get_closest_marker(marker):
            pytest.skip(f"needs root: {command}")


@pytest.fixture(scope="session", autouse=True)
def power_stays() -> Iterator[None]:
    """A command that is called within the tests' own process would take its power for good, and with it the tests'.

    That each command does so is shown by those that are started as processes, in tests/live.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(user, "give_up_power", lambda: None)
        yield
