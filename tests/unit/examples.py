# SPDX-License-Identifier: Apache-2.0
"""How many examples the slow property tests take, and the fast ones."""

from __future__ import annotations

from typing import Final

from hypothesis import settings

FEW: Final = settings(max_examples=max(1, settings().max_examples * 2 // 5))
"""For a test whose example takes about 0.1 s: two fifths of what the profile in tests/conftest.py gives."""
FEWEST: Final = settings(max_examples=max(1, settings().max_examples // 5))
"""For a test whose example reports on a capture or draws it, which takes 0.3 s or more: a fifth."""
MANY: Final = settings(max_examples=12 * settings().max_examples)
"""For a test whose example takes a few milliseconds, and whose mistakes few examples show: twelve times as many."""
