# SPDX-License-Identifier: Apache-2.0
"""Notifications to a service manager by the protocol of sd_notify(3): datagrams to a Unix socket."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress

_address = ""
_watchdog_s = 0.0
_alive_at = 0.0


def take() -> None:
    """Take the address of the manager out of the environment, so that no child process inherits it."""
    global _address, _watchdog_s
    _address = os.environ.pop("NOTIFY_SOCKET", "")
    limit, pid = (os.environ.pop(f"WATCHDOG_{name}", "") for name in ("USEC", "PID"))
    mine = pid in ("", str(os.getpid()))
    _watchdog_s = int(limit) / 1e6 if mine and limit.isascii() and limit.isdecimal() and len(limit) < 16 else 0.0


def alive() -> None:
    """Tell the service manager's watchdog, if there is one, that the trace goes on; a third of its limit apart."""
    global _alive_at
    if _watchdog_s and (now := time.monotonic()) >= _alive_at:
        _alive_at = now + _watchdog_s / 3
        tell("WATCHDOG=1")


def tell(state: str) -> None:
    """Send ``state`` to the service manager, if there is one, without waiting. Errors are ignored.

    The address is untrusted, so call this only after privileges are dropped. No answer is read.
    """
    if not _address.startswith(("/", "@")):
        return
    address = f"\0{_address[1:]}" if _address.startswith("@") else _address
    with suppress(OSError, ValueError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        sender.sendto(state.encode("ascii"), os.fsencode(address))
