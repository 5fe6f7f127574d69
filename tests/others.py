# SPDX-License-Identifier: Apache-2.0
"""What tests need that act as another user."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]


def need_readable_checkout() -> None:
    """Skip where other users can't read the checkout or its Python: what acts as one of them doesn't start there."""
    for file in (CHECKOUT, Path(sys.prefix)):
        for folder in (file, *file.parents):
            if not folder.stat().st_mode & stat.S_IXOTH:
                pytest.skip(f"needs a checkout that every user can read, which {folder} hides: clone it into /srv")
