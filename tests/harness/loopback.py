# SPDX-License-Identifier: Apache-2.0
"""Whether tests can reach sockets of their own machine."""

from __future__ import annotations

import socket

import pytest


def need_loopback() -> None:
    """Skip the test where no connection to 127.0.0.1 is possible, as in a new network namespace."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            socket.create_connection(listener.getsockname(), 60).close()
    except OSError as e:
        pytest.skip(f"needs a loopback interface that is up ({e.strerror}): ip link set lo up")
