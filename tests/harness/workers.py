# SPDX-License-Identifier: Apache-2.0
"""A server with several worker processes, each of which holds connections."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Final

_MASTER: Final = """
import os, socket, sys
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
numbers = [int(argument) for argument in sys.argv[1:]]
held = [[listener.accept()[0] for _ in range(number)] for number in numbers]
alive, master = os.pipe()
pids = []
for mine in held:
    ready, closed = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(master)
        for sock in {sock for socks in held for sock in socks} - set(mine):
            sock.close()
        os.close(closed)
        os.close(ready)
        os.read(alive, 1)
        os._exit(0)
    os.close(closed)
    os.read(ready, 1)
    pids.append(pid)
for sock in {sock for socks in held for sock in socks}:
    sock.close()
print(*pids, flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class WorkerServer:
    """The pids of a master, which holds only the listening socket, and of its workers; and the port."""

    master: int
    workers: list[int]
    port: int


@contextmanager
def serving(*numbers: int) -> Iterator[WorkerServer]:
    """Run a server on loopback whose workers hold these numbers of connections; all of it ends on exit."""
    with ExitStack() as stack:
        command = [sys.executable, "-c", _MASTER, *map(str, numbers)]
        pipe = subprocess.PIPE
        process = stack.enter_context(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))
        stack.callback(process.kill)
        assert process.stdout is not None
        port = int(process.stdout.readline())
        for _ in range(sum(numbers)):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        yield WorkerServer(process.pid, [int(pid) for pid in process.stdout.readline().split()], port)
