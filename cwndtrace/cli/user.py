# SPDX-License-Identifier: Apache-2.0
"""Whom a command works for where it was started as root, and going on as them."""

from __future__ import annotations

import os
import pwd
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from cwndtrace import privileges
from cwndtrace.errors import PermissionNeeded

_PARTS: Final = ("json", "numpy", "pandas", "pyarrow", "matplotlib", "cwndtrace")
_OF_ROOT: Final = (
    "MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_RUNTIME_DIR", "XDG_STATE_HOME"
)  # fmt: skip
"""Names of folders that may be root's, and for each of which libraries take one below HOME."""


def invoking() -> privileges.User | None:
    """Whom sudo works for; None where it wasn't sudo. Raises PermissionNeeded where one can't go on as them."""
    try:
        user = privileges.invoking_user()
    except PermissionError as e:
        cure = "Use sudo itself; where this root works for nobody, take both away: env -u SUDO_UID -u SUDO_GID ..."
        raise PermissionNeeded(str(e.strerror), cure) from e
    if user is not None:
        # Python reads modules as it goes: what lies below /root would be out of reach.
        specs = (find_spec(name) for name in _PARTS)
        closed = privileges.unreadable(user, [Path(spec.origin) for spec in specs if spec and spec.origin])
        if closed is not None:
            cause = f"{user.name} may not read {closed}, a part of this installation."
            raise PermissionNeeded(cause, "Install it where everybody may read: make install puts it into /opt.")
    return user


def give_up_power() -> None:
    """Go on, for good, as whom sudo works for, or as who we are, with no capability and no way to any.

    Raises PermissionNeeded where that can't be done; then nothing may go on.
    """
    if os.geteuid() != 0 and not privileges.held():
        return
    user = invoking()
    try:
        privileges.drop(user)
        if left := privileges.still_powerful():
            raise PermissionError(1, f"threads still have it: {', '.join(left)}")
    except OSError as e:
        cause = f"Root's power can't be given up: {e.strerror}."
        raise PermissionNeeded(cause, "Run this command as yourself, without sudo.") from e
    if user is not None:
        _be_at_home(user)


def _be_at_home(user: privileges.User) -> None:
    try:
        home = pwd.getpwuid(user.uid).pw_dir
    except KeyError:
        home = "/"
    os.environ.update(HOME=home, USER=user.name, LOGNAME=user.name)
    for name in _OF_ROOT:
        os.environ.pop(name, None)
