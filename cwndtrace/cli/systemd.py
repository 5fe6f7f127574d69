# SPDX-License-Identifier: Apache-2.0
"""What a service manager wants to know of a trace, by sd_notify(3)'s protocol: a datagram to a Unix socket."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

_address = ""


def take() -> None:
    """Take the manager's address out of the environment: it is this process's, and no child's."""
    global _address
    _address = os.environ.pop("NOTIFY_SOCKET", "")


def tell(state: str) -> None:
    """Send ``state``, without waiting, where somebody wants to know; what becomes of it is theirs to care for.

    The address may be anybody's: it is to be called when power has been given up, and nothing is read.
    """
    if not _address.startswith(("/", "@")):
        return
    address = f"\0{_address[1:]}" if _address.startswith("@") else _address
    with suppress(OSError, ValueError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.setblocking(False)
        made.sendto(state.encode("ascii"), os.fsencode(address))
