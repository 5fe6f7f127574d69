# SPDX-License-Identifier: Apache-2.0
"""Measure the cost of the patches while nothing traces: ``tools/vm cost`` runs this in both kernels, in turns.

It prints one line of JSON with the seconds of each repeat of a bulk transfer and of a request/response exchange over
loopback.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from typing import Final

BULK_BYTES: Final = 512 << 20
EXCHANGES: Final = 5_000
REPEATS: Final = 5
MESSAGE: Final = b"x" * 64
_CHUNK: Final = bytes(1 << 20)


def connected(serve: Callable[[socket.socket], None]) -> tuple[socket.socket, int]:
    """Return the client's end of a loopback connection, and the pid of the process that runs ``serve`` on the other."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server, _ = listener.accept()
    pid = os.fork()
    if not pid:
        client.close()
        try:
            serve(server)
        finally:
            os._exit(0)
    server.close()
    return client, pid


def drain(sock: socket.socket) -> None:
    """Read until the peer closes the connection, and answer each complete transfer with one byte."""
    buffer, taken = bytearray(1 << 20), 0
    while n := sock.recv_into(buffer):
        taken += n
        if taken == BULK_BYTES:
            sock.send(b".")
            taken = 0


def echo(sock: socket.socket) -> None:
    """Send received data back until the peer closes the connection."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while data := sock.recv(64):
        sock.send(data)


def bulk(sock: socket.socket) -> None:
    """Make one transfer, and wait until the other end has received all of it."""
    for _ in range(BULK_BYTES // len(_CHUNK)):
        sock.sendall(_CHUNK)
    sock.recv(1)


def exchanges(sock: socket.socket) -> None:
    """Make EXCHANGES requests, each after the response to the one before."""
    for _ in range(EXCHANGES):
        sock.send(MESSAGE)
        sock.recv(64)


def seconds(serve: Callable[[socket.socket], None], work: Callable[[socket.socket], None]) -> list[float]:
    """Return the seconds that each repeat of ``work`` took, without the first one, which warms up."""
    client, pid = connected(serve)
    taken = []
    with client:
        for _ in range(REPEATS + 1):
            begin = time.monotonic()
            work(client)
            taken.append(time.monotonic() - begin)
    os.waitpid(pid, 0)
    return taken[1:]


if __name__ == "__main__":
    print(json.dumps({"bulk": seconds(drain, bulk), "exchange": seconds(echo, exchanges)}), flush=True)
