# SPDX-License-Identifier: Apache-2.0
"""What tests need that act as another user, or in a user namespace."""

from __future__ import annotations

import stat
import subprocess
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


def need_user_namespace() -> None:
    """Skip where this process gets no user namespace."""
    made = subprocess.run(["unshare", "--map-root-user", "true"], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(
            f"needs a user namespace ({made.stderr.strip()}), which a kernel gives nobody in a chroot, and some"
            " distributions give to root alone: sudo make test, outside of one"
        )
