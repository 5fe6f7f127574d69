# SPDX-License-Identifier: Apache-2.0
"""The metrics of ``run``: the option --metrics, the variables OTEL_*, and what is started for them."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import cwndtrace
from cwndtrace.errors import need
from cwndtrace.kernel import cgroups, sockets
from cwndtrace.names import place
from cwndtrace.names.lookup import Lookup

if TYPE_CHECKING:
    from cwndtrace.capture.session import Session
    from cwndtrace.metrics.live import Metrics, Requests
    from cwndtrace.metrics.otlp import Export

_LEAST_PORT = 1024


class Address(click.ParamType[tuple[str, int]]):
    """An address and a port, or a port on 127.0.0.1. A name other than localhost is refused: it may lead anywhere."""

    name = "address"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        """Return the address and the port."""
        match = re.fullmatch(r"(?:(?:\[([^]]*)\]|([^:\[\]]*)):)?([0-9]{1,5})", str(value))
        host = "127.0.0.1" if match is None or match[1] is match[2] is None else match[1] or match[2]
        host = "127.0.0.1" if host == "localhost" else host
        try:
            port = int(match[3]) if match else -1
            text = str(ipaddress.ip_address(host))
        except ValueError:
            port, text = -1, ""
        if not 0 <= port <= 65535:
            self.fail(f"{value!r} is no address and port: write 127.0.0.1:9464 or [::1]:9464", param, ctx)
        if 0 < port < _LEAST_PORT:
            self.fail(f"port {port} is for root's services, and a trace isn't one: choose one from 1024 on", param, ctx)
        return text, port


class Telemetry:
    """What is to be done with the metrics of a trace. ``describe`` says where they are, and ``news`` what is wrong."""

    def __init__(self, address: tuple[str, int] | None, export: Export | None) -> None:
        self._address = address
        self._export = export
        self._sock: socket.socket | None = None
        self._server: Any = None
        self._failing = False
        self.metrics: Metrics | None = None

    def prepare(self, session: Session, block: Requests) -> None:
        """Make the metrics of a session, and listen. Nothing is served yet."""
        from cwndtrace.metrics.live import Metrics

        self.metrics = Metrics(
            session, block, version=cwndtrace.__version__, cgroups=cgroups.version(), startup_s=running_s
        )
        if self._address is not None:
            from cwndtrace.metrics.server import listen

            self._sock = listen(self._address)

    def start(self, dropped: Callable[[], int]) -> None:
        """Start the threads, with the privileges that the caller has now. ``dropped`` counts lines of output."""
        assert self.metrics is not None
        self.metrics.dropped = dropped
        self.metrics.start()
        if self._sock is not None:
            from cwndtrace.metrics.server import Exposition, MetricsServer

            self._server = MetricsServer(self._sock, Exposition(self.metrics.snapshot), self.metrics.health)
            self._server.start()
        if self._export is not None:
            self._export.start(self.metrics.snapshot, self.metrics.begun_ns, cwndtrace.__version__)

    def describe(self) -> list[str]:
        """Return a sentence for each place where the metrics are or go to."""
        lines = []
        if self._sock is not None:
            from cwndtrace.metrics.server import shown

            lines.append(f"Metrics are at http://{shown(self._sock.getsockname()[:2])}/metrics.")
        if self._export is not None:
            lines.append(f"Metrics are sent to {self._export.where}, because the environment's OTEL_ variables say so.")
        return lines

    def news(self) -> str | None:
        """Return a sentence once when the metrics can't be sent any more."""
        before, self._failing = self._failing, self._export is not None and self._export.failing
        if self._export is None or before or not self._failing:
            return None
        return f"the metrics couldn't be sent to {self._export.where}; it is tried again later"

    def close(self) -> None:
        """Stop serving, and send the last figures."""
        if self._server is not None:
            self._server.close()
        elif self._sock is not None:
            self._sock.close()
        if self._export is not None:
            self._export.close()


def asked(address: tuple[str, int] | None, environ: Mapping[str, str]) -> Telemetry | None:
    """Return what the option and the variables ask for; None where that is nothing.

    Raises UsageError where it can't be done.
    """
    if address is not None:
        need("prometheus_client", "metrics", "--metrics")
        from cwndtrace.metrics.server import listen

        # An unusable place is refused at once, and not after seconds of attaching. The socket that serves is opened
        # once the helper process is there, which shouldn't inherit it.
        listen(address).close()
    export = None
    if exports(environ):
        need("opentelemetry.exporter.otlp.proto.http", "otlp", "sending metrics, for which OTEL_ variables ask,")
        from cwndtrace.metrics.otlp import Export

        export = Export(environ, attributes())
    return None if address is None and export is None else Telemetry(address, export)


def exports(environ: Mapping[str, str]) -> bool:
    """Return whether the variables of OpenTelemetry ask for metrics by OTLP."""
    exporter = environ.get("OTEL_METRICS_EXPORTER", "").strip().lower()
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or exporter not in ("", "otlp"):
        return False
    names = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT")
    return exporter == "otlp" or any(environ.get(name) for name in names)


def attributes() -> dict[str, str]:
    """Return OpenTelemetry's attributes of this process and its container, as far as they are known here."""
    try:
        path = place.of_process(Path("/proc/self/cgroup").read_text(encoding="utf-8", errors="replace"))
        own = Lookup(cmdline=False).workload(path, 0)
        known = {"container.id": own.container_id, "k8s.pod.name": own.names.pod_name}
    except OSError:
        known = {}
    known |= {"service.name": "cwndtrace", "service.version": cwndtrace.__version__, "host.name": socket.gethostname()}
    return {name: value for name, value in known.items() if value}


def running_s() -> float:
    """Return for how many seconds this process has been running, to a hundredth."""
    ticks = int(sockets.stat("self")[19])  # field 22 of proc_pid_stat(5)
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
