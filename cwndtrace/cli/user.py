# SPDX-License-Identifier: Apache-2.0
"""The user for whom a command started as root works, and how it becomes that user."""

from __future__ import annotations

import os
import pwd
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from cwndtrace import privileges
from cwndtrace.errors import PermissionNeeded

_PACKAGES: Final = ("json", "numpy", "pandas", "pyarrow", "matplotlib", "cwndtrace")
_FOLDER_VARIABLES: Final = (
    "MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_RUNTIME_DIR", "XDG_STATE_HOME"
)  # fmt: skip
"""Variables that may name folders of root. Without them, libraries use folders below HOME."""


def invoking() -> privileges.User | None:
    """Return the user who called sudo, or None without sudo.

    Raises PermissionNeeded if this process can't become that user, or that user can't read the installation.
    """
    try:
        user = privileges.invoking_user()
    except PermissionError as e:
        cure = "Use sudo itself, or, if root works for no other user, unset both: env -u SUDO_UID -u SUDO_GID ..."
        raise PermissionNeeded(str(e.strerror), cure) from e
    if user is not None:
        # Python imports modules later too, and that user couldn't read an installation below /root.
        specs = (find_spec(name) for name in _PACKAGES)
        unreadable = privileges.unreadable(user, [Path(spec.origin) for spec in specs if spec and spec.origin])
        if unreadable is not None:
            cause = f"{user.name} may not read {unreadable}, a part of this installation."
            raise PermissionNeeded(cause, "Install it where every user can read it: make install puts it into /opt.")
    return user


def drop_privileges() -> None:
    """Become the user who called sudo, or stay the same user without sudo; drop all capabilities for good.

    Raises PermissionNeeded if that fails; the command must not continue then.
    """
    if os.geteuid() != 0 and not privileges.held():
        return
    user = invoking()
    try:
        privileges.drop(user)
        if threads := privileges.still_privileged():
            raise PermissionError(1, f"these threads still have privileges: {', '.join(threads)}")
    except OSError as e:
        cause = f"Root privileges can't be dropped: {e.strerror}."
        raise PermissionNeeded(cause, "Run this command as yourself, without sudo.") from e
    if user is not None:
        _set_home(user)


def _set_home(user: privileges.User) -> None:
    try:
        home = pwd.getpwuid(user.uid).pw_dir
    except KeyError:
        home = "/"
    os.environ.update(HOME=home, USER=user.name, LOGNAME=user.name)
    for name in _FOLDER_VARIABLES:
        os.environ.pop(name, None)
