# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the live tests that the tests in virtual machines use too."""

from __future__ import annotations

import pytest

from tests.live.conftest import connect, drain, make_space, space

# This comes second: tests.live.conftest has pytest rewrite the assertions of tests.harness, which must be new then.
from tests.harness.guest import PATCHED  # isort: skip

__all__ = ["connect", "drain", "make_space", "space"]


@pytest.fixture
def patched() -> None:
    """Skip the tests on a kernel without the patches, which doesn't have the event."""
    if not PATCHED:
        pytest.skip("needs a kernel with kernel-patches/: make vm-test")
