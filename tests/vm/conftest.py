# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the live tests that the tests in virtual machines use too."""

from __future__ import annotations

from tests.live.conftest import connect, drain, make_space, space

__all__ = ["connect", "drain", "make_space", "space"]
