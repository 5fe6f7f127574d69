# SPDX-License-Identifier: Apache-2.0
"""Real programs on the ends of a path, each with a long-lived connection over it on which the near end sends bursts."""

from __future__ import annotations

import http.client
import importlib.util
import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.harness import tcp
from tests.harness.ends import PATIENCE_S, Asked, Ends, Kept
from tests.harness.lab import PathEnd

SIZE: Final = 500_000
"""The bytes of a burst, without what the protocol adds."""
SMALL: Final = 30_000
"""The bytes of each of several answers in turn."""
# Debian has PostgreSQL's own programs outside of PATH.
_FOLDERS: Final = ["/usr/sbin", *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True))]
# PostgreSQL refuses to run as root.
_NOBODY: Final = "nobody"


class Missing(Exception):
    """A program that isn't installed."""


def _need(*names: str) -> list[str]:
    """Return the paths of programs. Raises Missing."""
    paths = [shutil.which(name) or shutil.which(name, path=os.pathsep.join(_FOLDERS)) for name in names]
    for name, path in zip(names, paths, strict=True):
        if path is None:
            raise Missing(f"needs {name}: sudo make develop")
    return [path for path in paths if path]


def _asking(client: Asked, line: str, least: int = 1) -> Callable[[], object]:
    """Return a function that asks for a line of at least this many bytes."""

    def ask() -> None:
        answer = client.ask(line)
        assert len(answer) >= least, answer

    return ask


def _nginx(ends: Ends, port: int, options: str) -> None:
    """Serve a file with nginx."""
    (program,) = _need("nginx")
    folder = ends.new_folder(f"nginx-{port}")
    for size in (SIZE, SMALL):
        (folder / str(size)).write_bytes(bytes(size))
    (folder / "conf").write_text(
        f"daemon off; user root; worker_processes 1; pid {folder}/pid; error_log stderr; events {{}}"
        f"http {{ access_log off; {options} server {{ listen {ends.near.address}:{port}; root {folder}; }} }}"
    )
    ends.serve(port, program, "-e", "stderr", "-c", folder / "conf")


def _http(ends: Ends, port: int, size: int = SIZE, times: int = 1, buffer: int | None = None) -> Kept:
    """Get a file so many times in turn over a connection that is kept, with a receive buffer of this many bytes."""
    client = http.client.HTTPConnection(ends.near.address, port, timeout=PATIENCE_S)
    ends.stack.callback(client.close)

    def get() -> None:
        for _ in range(times):
            client.request("GET", f"/{size}")
            assert len(client.getresponse().read()) == size

    def open_socket() -> socket.socket:
        sock = socket.socket()
        if buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        sock.settimeout(PATIENCE_S)
        sock.connect((ends.near.address, port))
        return sock

    def connect() -> Callable[[], object]:
        client.sock = ends.far.enter(open_socket)
        return get

    return ends.keep(port, connect)


def nginx(ends: Ends) -> list[Kept]:
    """nginx sends a file with sendfile(), reads it on threads of their own, or calls sendfile() on them.

    Another client gets small files in turn, and another has a receive buffer that is smaller than a burst.
    """
    options = "sendfile on;", "aio threads; output_buffers 4 64k;", "sendfile on; aio threads;"
    for port, how in enumerate(options, 8080):
        _nginx(ends, port, how)
    connections = [_http(ends, port) for port, _ in enumerate(options, 8080)]
    return [*connections, _http(ends, 8080, SMALL, times=10), _http(ends, 8080, buffer=64_000)]


def haproxy(ends: Ends) -> list[Kept]:
    """HAProxy sends over the path what it gets from nginx on the same host."""
    (program,) = _need("haproxy")
    _nginx(ends, 8083, "sendfile on;")
    address = ends.near.address
    (ends.folder / "haproxy").write_text(
        "defaults\n mode http\n timeout connect 30s\n timeout client 60s\n timeout server 60s\n"
        f"frontend near\n bind {address}:8084\n default_backend nginx\nbackend nginx\n server nginx {address}:8083\n"
    )
    ends.serve(8084, program, "-db", "-f", ends.folder / "haproxy")
    return [_http(ends, 8084)]


class Postgres:
    """A PostgreSQL server at the near end, with two programs that connect to it."""

    def __init__(self, ends: Ends) -> None:
        initdb, server, self._psql, self._receiver = _need("initdb", "postgres", "psql", "pg_receivewal")
        self._ends, self._folder = ends, ends.new_folder("postgres")
        shutil.chown(self._folder, _NOBODY)
        data = self._folder / "data"
        made = ends.start(
            ends.near, initdb, "-D", data, "-A", "trust", "-U", "tests", "--no-sync", "--locale=C", user=_NOBODY
        )
        assert made.wait(PATIENCE_S) == 0, ends.log()
        with (data / "pg_hba.conf").open("a") as file:
            file.write("host all,replication all samenet trust\n")
        # Commits wait until the receiver has written them.
        settings = {
            "listen_addresses": ends.near.address,
            "unix_socket_directories": self._folder,
            "fsync": "off",
            "synchronous_standby_names": "*",
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        ends.serve(5432, server, "-D", data, *options, user=_NOBODY)
        status = data / "postmaster.pid"
        tcp.until(lambda: "ready" in status.read_text(), PATIENCE_S, "PostgreSQL to be ready")

    def _session(self, where: PathEnd, host: str | Path) -> Asked:
        session = self._ends.ask(where, self._psql, "-XAtq", "-h", host, "-U", "tests", "postgres")
        session.ask("SELECT 1;")
        return session

    def query(self) -> Kept:
        """A client asks for a large value."""

        def connect() -> Callable[[], object]:
            session = self._session(self._ends.far, self._ends.near.address)
            return _asking(session, f"SELECT repeat('x', {SIZE});", SIZE)

        return self._ends.keep(5432, connect)

    def replication(self) -> Kept:
        """A receiver gets the log of a large write, for which the writer at the near end waits."""
        folder = self._ends.new_folder("wal")
        writer = self._session(self._ends.near, self._folder)

        def connect() -> Callable[[], object]:
            options = "-D", folder, "-h", self._ends.near.address, "-U", "tests", "--synchronous", "--no-loop"
            self._ends.start(self._ends.far, self._receiver, *options)
            return _asking(writer, f"SELECT pg_logical_emit_message(true, '', repeat('x', {SIZE}));")

        return self._ends.keep(5432, connect)


class Redis:
    """A Redis server at the near end, with a client and a replica that connect to it."""

    def __init__(self, ends: Ends) -> None:
        self._server, self._client = _need("redis-server", "redis-cli")
        self._ends = ends
        self._serve(ends.near, 6379, "--repl-diskless-sync-delay", "0")
        self._writer = self._ask(ends.near, ends.near, 6379)

    def _serve(self, where: PathEnd, port: int, *options: str) -> None:
        folder = self._ends.new_folder(f"redis-{port}")
        fixed = "--port", str(port), "--bind", where.address, "--protected-mode", "no", "--save", "", "--dir", folder
        self._ends.serve(port, self._server, *fixed, "--logfile", folder / "log", *options, at=where)

    def _ask(self, where: PathEnd, of: PathEnd, port: int) -> Asked:
        return self._ends.ask(where, self._client, "-h", of.address, "-p", str(port))

    def _write(self) -> None:
        """Set a large value. The server sends the replica the value, and not the script."""
        script = f"redis.call('SET', 'large', string.rep('x', {SIZE})) return 1"
        assert self._writer.ask(f'EVAL "{script}" 0') == b"1"

    def query(self) -> Kept:
        """A client gets a large value."""
        self._write()

        def connect() -> Callable[[], object]:
            client = self._ask(self._ends.far, self._ends.near, 6379)
            assert client.ask("PING") == b"PONG"
            return _asking(client, "GET large", SIZE)

        return self._ends.keep(6379, connect)

    def replication(self) -> Kept:
        """A replica gets a large write, and tells a client at the far end of it."""

        def connect() -> Callable[[], object]:
            # The master pings its replicas once a second, and each ping resets the window further.
            self._writer.ask("CONFIG SET repl-ping-replica-period 1")
            master = "--replicaof", f"{self._ends.near.address} 6379"
            self._serve(self._ends.far, 6380, *master, "--notify-keyspace-events", "E$")
            observer = self._ask(self._ends.far, self._ends.far, 6380)
            # What is written before the replica has its first copy isn't sent as a command.
            tcp.until(lambda: b"connected" in observer.ask("ROLE", 5), PATIENCE_S, "the replica's first copy")
            observer.ask("SUBSCRIBE __keyevent@0__:set", 3)

            def write() -> None:
                self._write()
                observer.read(3)

            return write

        return self._ends.keep(6379, connect)


def grpc(ends: Ends) -> list[Kept]:
    """A gRPC client calls over a channel that it keeps."""
    if importlib.util.find_spec("grpc") is None:
        raise Missing("needs grpcio: make develop")
    command = sys.executable, "-P", "-m", "tests.harness.channel"
    where = f"{ends.near.address}:50051", str(SIZE)
    ends.serve(50051, *command, "serve", *where)

    def connect() -> Callable[[], object]:
        client = ends.ask(ends.far, *command, "call", *where)
        client.ask("")
        return _asking(client, "")

    return [ends.keep(50051, connect)]


def postgres(ends: Ends) -> list[Kept]:
    """PostgreSQL answers a query, and sends its log to a receiver."""
    server = Postgres(ends)
    return [server.query(), server.replication()]


def redis(ends: Ends) -> list[Kept]:
    """Redis answers a query, and sends a write to a replica."""
    server = Redis(ends)
    return [server.query(), server.replication()]


PROGRAMS: Final[dict[Callable[[Ends], list[Kept]], tuple[str, ...]]] = {
    nginx: (
        "nginx sendfile",
        "nginx aio threads",
        "nginx sendfile on threads",
        "nginx answers in turn",
        "nginx to a small receive buffer",
    ),
    haproxy: ("HAProxy",),
    postgres: ("PostgreSQL query", "PostgreSQL replication"),
    redis: ("Redis query", "Redis replication"),
    grpc: ("gRPC",),
}
"""The functions that start programs, with the names of the connections that they return."""
