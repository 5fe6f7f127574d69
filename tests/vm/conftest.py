# SPDX-License-Identifier: Apache-2.0
"""The tests in virtual machines use the live tests' namespaces and connections."""

from tests.live.conftest import connect, drain, make_space, space

__all__ = ["connect", "drain", "make_space", "space"]
