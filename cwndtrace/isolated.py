# SPDX-License-Identifier: Apache-2.0
"""Python and its libraries without what the current folder, the environment and a home may bring in.

Whoever may run cwndtrace by sudo chooses the folder it starts in, and root without sudo has the environment of whoever
it was before. Neither may choose what code runs, which commands are found or which settings are read.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
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


_SETTINGS: Final = Path(__file__).parent / "plot"
"""The folder with the project's own matplotlibrc."""
_begun = False


def begin() -> None:
    """To be called by a command before it imports what looks at the environment.

    Root's own is replaced by ``environment()``, since libbcc, clang, Arrow and others look into it. Somebody else's
    stays: it can't give them what they haven't got.
    """
    global _begun
    _begun = True
    if os.geteuid() == 0:
        kept = environment()
        os.environ.clear()
        os.environ.update(kept)


def load_matplotlib() -> None:
    """Import matplotlib with the project's settings, in a command or an isolated Python; elsewhere do nothing.

    As it is imported it reads the first matplotlibrc it finds, and the current folder's comes first, before
    MATPLOTLIBRC and the user's.
    """
    if "matplotlib" in sys.modules or not (_begun or sys.flags.isolated):
        return
    # A folder that this user may not enter is none that matplotlib finds a file in.
    with suppress(OSError):
        here = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.chdir(_SETTINGS)
            import_module("matplotlib")
        finally:
            os.fchdir(here)
            os.close(here)
    # It warns where it may not keep its list of fonts, and while it makes it: that is nobody's business.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)


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
