# SPDX-License-Identifier: Apache-2.0
"""The HTTP server for Prometheus: /metrics, as text or OpenMetrics, and /healthz.

A request never makes tracing wait. The server has a thread of its own and one for each connection, of which there are
few. It accepts few a second, because all threads of a Python take turns. A connection is closed after some seconds,
whatever its peer does. The figures are made into text once a second at most.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.utils import floatToGoString

from cwndtrace.errors import UsageError
from cwndtrace.metrics.families import Buckets, Snapshot

Address = tuple[str, int]
"""An IP address and a port; 0 is any that is free."""

_MOST_OPEN: Final = 8
_MOST_S: Final = 5.0
_POLL_S: Final = 2.0
_ACCEPT_EVERY_S: Final = 0.05
_RENDER_EVERY_S: Final = 1.0
_PLAIN: Final = "text/plain; charset=utf-8"


def listen(address: Address) -> socket.socket:
    """Return a socket that listens there. Raises UsageError where that can't be."""
    host, port = address
    where = shown(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = None
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((host, port))
        sock.listen(_MOST_OPEN)
    except OSError as e:
        if sock is not None:
            sock.close()
        if e.errno == errno.EADDRINUSE:
            raise UsageError(
                f"metrics can't be served on {where}: another process listens there",
                f"choose another port, such as --metrics {shown((host, port + 1 if port < 65535 else 9464))}",
            ) from e
        if e.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            raise UsageError(
                f"metrics can't be served on {where}: this machine doesn't have that address",
                f"choose one that `ip address` lists, such as --metrics {shown(('127.0.0.1', port))}",
            ) from e
        raise UsageError(
            f"metrics can't be served on {where}: {os.strerror(e.errno or 0)}", "choose another address"
        ) from e
    return sock


def shown(address: Address) -> str:
    """Return an address as it stands in a URL."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Exposition(Collector):
    """Metrics in Prometheus' formats. ``snapshot`` returns what is to be shown."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self._lock = threading.Lock()
        self._made: dict[str, tuple[float, bytes]] = {}

    def describe(self) -> list[Any]:
        """Return nothing: the names are fixed, and can't collide with others in a registry of one collector."""
        return []

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily]:
        """Yield each family with its samples."""
        for family, series in self._snapshot().items():
            if family.kind == "histogram":
                histogram = HistogramMetricFamily(family.prometheus, family.help, labels=family.labels)
                for labels, value in series.items():
                    assert isinstance(value, Buckets)
                    total, buckets = 0, []
                    for edge, count in zip((*family.edges, float("inf")), value.counts, strict=True):
                        total += count
                        buckets.append((str(floatToGoString(edge)), total))  # type: ignore[no-untyped-call]
                    histogram.add_metric(labels, buckets, value.sum)
                yield histogram
                continue
            kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
            metric = kind(family.prometheus, family.help, labels=family.labels)
            for labels, value in series.items():
                assert not isinstance(value, Buckets)
                metric.add_metric(labels, value)
            yield metric

    def text(self, accept: str) -> tuple[str, bytes]:
        """Return the content type and the text for a client that accepts these types."""
        encode, content_type = choose_encoder(accept)
        with self._lock:
            at, text = self._made.get(content_type, (0.0, b""))
            if not text or time.monotonic() - at >= _RENDER_EVERY_S:
                text = encode(self._registry)
                # A client may ask for as many versions of the format as it likes.
                if len(self._made) >= _MOST_OPEN:
                    self._made.clear()
                self._made[content_type] = time.monotonic(), text
        return content_type, text


class MetricsServer(ThreadingHTTPServer):
    """Serves ``exposition`` on a socket that listens; ``health`` returns why no events flow, empty where they do."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, sock: socket.socket, exposition: Exposition, health: Callable[[], str]) -> None:
        super().__init__(sock.getsockname()[:2], _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = sock
        self.exposition = exposition
        self.health = health
        self._lock = threading.Lock()
        self._open: dict[Any, float] = {}
        self._thread = threading.Thread(target=self.serve_forever, args=(_POLL_S,), name="metrics server", daemon=True)

    def start(self) -> None:
        """Start serving. The threads have the privileges that the caller has now."""
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        if self._thread.ident is not None:
            self.shutdown()
        self.server_close()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection, after a pause."""
        time.sleep(_ACCEPT_EVERY_S)
        return super().get_request()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread, unless there are too many."""
        with self._lock:
            room = len(self._open) < _MOST_OPEN
            if room:
                self._open[request] = time.monotonic() + _MOST_S
        if room:
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Cut connections that have lasted too long. The server calls this every two seconds or more often."""
        now = time.monotonic()
        with self._lock:
            for request, until in self._open.items():
                if now > until:
                    with suppress(OSError):
                        request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Do nothing: an error is that of a client, which leaves or sends nonsense."""


class _Handler(BaseHTTPRequestHandler):
    server: MetricsServer
    timeout = _MOST_S
    server_version, sys_version = "cwndtrace", ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/healthz":
            why = self.server.health()
            self._answer(503 if why else 200, _PLAIN, f"{why or 'events flow'}\n".encode())
        elif path == "/metrics":
            self._answer(200, *self.server.exposition.text(self.headers.get("Accept", "")))
        else:
            self._answer(404, _PLAIN, b"there are /metrics and /healthz\n")

    do_HEAD = do_GET

    def _answer(self, code: int, kind: str, text: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Print nothing."""
