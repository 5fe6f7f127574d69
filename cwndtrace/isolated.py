# SPDX-License-Identifier: Apache-2.0
"""Python and its libraries without what the current folder, the environment and a home may bring in.

Whoever may run cwndtrace by sudo chooses the folder it starts in, and root without sudo has the environment of whoever
it was before. Neither may choose what code runs, which commands are found or which settings are read.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Final

_PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"
_KEPT: Final = re.compile(
    r"""SUDO_(?:UID|GID|USER)|NOTIFY_SOCKET  # whom it works for, and who wants to know that it began
    |(?:TERM|COLUMNS|LINES|NO_COLOR)         # the terminal
    |(?:LANG|LANGUAGE|LC_[A-Z]+|TZ)          # the user's language and hours""",
    re.VERBOSE,
)
# As sudo has it: what names a file makes the C library open it.
_NAMES_NO_FILE: Final = re.compile(r"[^/%]*")
_HOURS: Final = re.compile(r"[A-Za-z0-9_+<>,.-]+(?:/[A-Za-z0-9_+-]+)*")


def python(*arguments: str) -> list[str]:
    """The command line of this Python with ``arguments``, which looks for modules where it is installed alone."""
    # -I ignores PYTHONDONTWRITEBYTECODE too.
    return [sys.executable, "-I", *(["-B"] if sys.dont_write_bytecode else []), *arguments]


def environment() -> dict[str, str]:
    """The environment for processes that this one starts: the terminal, the language, and commands of the system."""
    kept = {name: value for name, value in os.environ.items() if _KEPT.fullmatch(name) and _harmless(name, value)}
    return kept | {"PATH": _PATH}


def _harmless(name: str, value: str) -> bool:
    if name == "TZ":
        return _HOURS.fullmatch(value) is not None
    return not name.startswith(("LANG", "LC_")) or _NAMES_NO_FILE.fullmatch(value) is not None
