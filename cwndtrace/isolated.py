# SPDX-License-Identifier: Apache-2.0
"""Isolate Python and its libraries from the current folder, the environment and the home directory.

A user who may run cwndtrace with sudo chooses the folder in which it starts, and root without sudo may have kept the
environment of another user. Neither may decide which code runs, which commands are found or which settings are read.
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
    r"""SUDO_(?:UID|GID|USER)|NOTIFY_SOCKET  # the user it works for, and systemd's socket
    |(?:TERM|COLUMNS|LINES|NO_COLOR)         # the terminal
    |(?:LANG|LANGUAGE|LC_[A-Z]+|TZ)          # the user's language and time zone
    |WATCHDOG_(?:USEC|PID)                   # systemd's watchdog
    # Where metrics are sent, how often, and as whose. Those that name files, modules or detectors aren't among them.
    |OTEL_EXPORTER_OTLP_(?:METRICS_)?(?:ENDPOINT|HEADERS|TIMEOUT|COMPRESSION|PROTOCOL)
    |OTEL_(?:METRICS_EXPORTER|METRIC_EXPORT_INTERVAL|RESOURCE_ATTRIBUTES|SERVICE_NAME|SDK_DISABLED)""",
    re.VERBOSE,
)
# As in sudo: the C library opens a file if a locale's value names one.
_NAMES_NO_FILE: Final = re.compile(r"[^/%]*")
_TIME_ZONE: Final = re.compile(r"[A-Za-z0-9_+<>,.-]+(?:/[A-Za-z0-9_+-]+)*")


_SETTINGS: Final = Path(__file__).parent / "plot"
"""The folder with this project's matplotlibrc."""
_begun = False


def begin() -> None:
    """Isolate a command. Call this before importing libraries that read the environment.

    Root's environment is replaced by ``environment()``, because libbcc, clang, Arrow and others read it. Another user's
    environment stays, because it can't give that user any more rights.
    """
    global _begun
    _begun = True
    if os.geteuid() == 0:
        kept = environment()
        os.environ.clear()
        os.environ.update(kept)


def load_matplotlib() -> None:
    """Import matplotlib with the project's settings, in a command or an isolated Python; elsewhere do nothing.

    On import matplotlib reads the first matplotlibrc that it finds. The current folder's comes first, before
    MATPLOTLIBRC and the user's.
    """
    if "matplotlib" in sys.modules or not (_begun or sys.flags.isolated):
        return
    # If this user can't enter the current folder, matplotlib finds no file there either when it is imported later.
    with suppress(OSError):
        here = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.chdir(_SETTINGS)
            import_module("matplotlib")
        finally:
            os.fchdir(here)
            os.close(here)
    # matplotlib warns while it builds its font cache, and where it can't store it. Neither matters to the user.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)


def python(*arguments: str) -> list[str]:
    """Return the command line of this Python with ``arguments``, which imports only installed modules."""
    # -I ignores PYTHONDONTWRITEBYTECODE too.
    return [sys.executable, "-I", *(["-B"] if sys.dont_write_bytecode else []), *arguments]


def environment() -> dict[str, str]:
    """Return the environment for child processes: variables of the terminal and the language, and a system PATH."""
    kept = {name: value for name, value in os.environ.items() if _KEPT.fullmatch(name) and _harmless(name, value)}
    return kept | {"PATH": _PATH}


def _harmless(name: str, value: str) -> bool:
    if name == "TZ":
        return _TIME_ZONE.fullmatch(value) is not None
    return not name.startswith(("LANG", "LC_")) or _NAMES_NO_FILE.fullmatch(value) is not None
