# SPDX-License-Identifier: Apache-2.0
"""The setup of all tests. Tests that need root are skipped without it, and name the command that runs them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import hypothesis
import pytest

from cwndtrace.cli import user

# There is no database of examples because the checkout may belong to another user, and no deadline because the machine
# may be busy. Runs with few examples take the same ones each time, so that a change fails by its own faults. make fuzz
# draws many others.
_EXAMPLES = int(os.environ.get("CWNDTRACE_EXAMPLES", "25"))
hypothesis.settings.register_profile(
    "cwndtrace", database=None, deadline=None, max_examples=_EXAMPLES, derandomize=_EXAMPLES < 100
)
hypothesis.settings.load_profile("cwndtrace")

# nohup ignores SIGHUP, and child processes inherit that. They don't inherit a handler.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

# sudo make test sets these. Tests run as root without an invoking user, and tests of sudo set the variables themselves.
for _name in ("SUDO_UID", "SUDO_GID"):
    os.environ.pop(_name, None)

_NEEDS_ROOT = {"live": "sudo make test", "chroot": "sudo make test-distributions"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that renews the texts of tests/data/texts."""
    parser.addoption("--renew-texts", action="store_true", help="write the reviewed texts of commands anew")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that needs root, before its fixtures are set up."""
    if os.geteuid() == 0:
        return
    for marker, command in _NEEDS_ROOT.items():
        if item.get_closest_marker(marker):
            pytest.skip(f"needs root: {command}")


@pytest.fixture(scope="session", autouse=True)
def keep_privileges() -> Iterator[None]:
    """Keep commands that tests call in their own process from dropping its privileges, which can't be regained.

    The tests in tests/live start commands as processes, and check that each drops its privileges.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(user, "drop_privileges", lambda: None)
        yield
