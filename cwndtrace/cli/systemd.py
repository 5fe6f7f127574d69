# SPDX-License-Identifier: Apache-2.0
"""Notifications to a service manager by the protocol of sd_notify(3): datagrams to a Unix socket."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

_address = ""


def take() -> None:
    """Take the address of the manager out of the environment, so that no child process inherits it."""
    global _address
    _address = os.environ.pop("NOTIFY_SOCKET", "")


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
