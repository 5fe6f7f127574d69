# SPDX-License-Identifier: Apache-2.0
"""Sends the metrics by OTLP over HTTP, as the standard variables OTEL_* ask for it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

import requests
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricExportResult,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from cwndtrace.errors import UsageError
from cwndtrace.metrics.families import Buckets, Family, Series, Snapshot

_EVERY_MS: Final = 60_000
_LAST_S: Final = 2.0
"""How long the end of a trace waits for the last figures to be sent."""


class Export:
    """Sends ``snapshot()`` in a thread of its own, every OTEL_METRIC_EXPORT_INTERVAL milliseconds and at the end.

    An endpoint that is dead or slow holds up nothing but this thread. ``attributes`` describe the process; those of
    OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME take precedence. Raises UsageError for variables that make no sense.
    """

    def __init__(self, environ: Mapping[str, str], attributes: Mapping[str, str]) -> None:
        protocol = environ.get("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
        if protocol not in (None, "", "http/protobuf"):
            raise UsageError(
                f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol}, which cwndtrace can't speak", "set it to http/protobuf"
            )
        self.where = endpoint(environ)
        interval = environ.get("OTEL_METRIC_EXPORT_INTERVAL") or str(_EVERY_MS)
        # What can't be sent is reported once, by the caller, and not in each attempt.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL + 1)
        # Otherwise requests would look for passwords in the user's .netrc.
        session = requests.Session()
        session.trust_env = False
        try:
            if not interval.isdecimal() or not int(interval):
                raise ValueError(f"OTEL_METRIC_EXPORT_INTERVAL is {interval}, which is no number of milliseconds")
            self._exporter = OTLPMetricExporter(session=session)
        except ValueError as e:
            raise UsageError(f"the metrics can't be sent: {e}", "correct that variable, or unset it") from e
        self._every_s = int(interval) / 1000
        self._resource = _resource(attributes)
        self._stop = threading.Event()
        self.failing = False
        self._thread: threading.Thread | None = None

    def start(self, snapshot: Callable[[], Snapshot], begun_ns: int, version: str) -> None:
        """Start sending what ``snapshot`` returns, counted since ``begun_ns`` of the wall clock."""

        def run() -> None:
            last, begins = False, Begins(begun_ns)
            while not last:
                last = self._stop.wait(self._every_s)
                data = metrics_data(snapshot(), self._resource, begins, time.time_ns(), version)
                try:
                    self.failing = self._exporter.export(data) is not MetricExportResult.SUCCESS
                except Exception:  # a URL that is none; requests has many errors
                    self.failing = True

        self._thread = threading.Thread(target=run, name="metrics export", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Send the last figures, and stop. That takes two seconds at most."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(_LAST_S)
            self._exporter.shutdown()


def endpoint(environ: Mapping[str, str]) -> str:
    """Return where metrics are sent, for people: without a user and a password."""
    metrics, base = (environ.get(f"OTEL_EXPORTER_OTLP_{name}", "") for name in ("METRICS_ENDPOINT", "ENDPOINT"))
    url = metrics or f"{(base or 'http://localhost:4318').rstrip('/')}/v1/metrics"
    scheme, place, path, *_ = urlsplit(url)
    return f"{scheme}://{place.rpartition('@')[2]}{path}"


def _resource(attributes: Mapping[str, str]) -> Resource:
    asked = Resource.create()
    chosen = {name: value for name, value in asked.attributes.items() if value != "" and not _unnamed(name, value)}
    return Resource({**attributes, **chosen})


def _unnamed(name: str, value: Any) -> bool:
    return name == "service.name" and str(value).startswith("unknown_service")


class Begins:
    """When each series began to be counted, ns since 1970, which at first is ``begun_ns``.

    A series may be dropped and come back from zero. By OpenTelemetry's data model it is another one then, which begins
    after the last figure of the one before.
    """

    def __init__(self, begun_ns: int) -> None:
        self._last_ns = begun_ns
        self._known: dict[tuple[Family, tuple[str, ...]], tuple[int, float]] = {}

    def take(self, snapshot: Snapshot, now_ns: int) -> Callable[[Family, tuple[str, ...]], int]:
        """Return when each series of the next snapshot began, by its family and labels."""
        before, self._known = self._known, {}
        for family, series in snapshot.items():
            for labels, value in series.items():
                count = sum(value.counts) if isinstance(value, Buckets) else value
                begin_ns, least = before.get((family, labels), (self._last_ns, count))
                self._known[family, labels] = begin_ns if count >= least else self._last_ns, count
        self._last_ns = now_ns
        return lambda family, labels: self._known[family, labels][0]


def metrics_data(snapshot: Snapshot, resource: Resource, begins: Begins, now_ns: int, version: str) -> MetricsData:
    """Return a snapshot as the SDK's exporters take it. Counters and histograms are cumulative."""
    begun_ns = begins.take(snapshot, now_ns)
    metrics = [
        Metric(family.name, family.help, family.unit, _data(family, series, begun_ns, now_ns))
        for family, series in snapshot.items()
    ]
    scope = ScopeMetrics(InstrumentationScope("cwndtrace", version), metrics, "")
    return MetricsData([ResourceMetrics(resource, [scope], "")])


def _data(
    family: Family, series: Series, begun_ns: Callable[[Family, tuple[str, ...]], int], now_ns: int
) -> Sum | Gauge | Histogram:
    points: list[Any] = []
    for labels, value in series.items():
        attributes = dict(zip(family.labels, labels, strict=True))
        if isinstance(value, Buckets):
            known: Any = {"min": None, "max": None}
            points.append(
                HistogramDataPoint(
                    attributes=attributes,
                    start_time_unix_nano=begun_ns(family, labels),
                    time_unix_nano=now_ns,
                    count=sum(value.counts),
                    sum=value.sum,
                    bucket_counts=value.counts,
                    explicit_bounds=family.edges,
                    **known,
                )
            )
        else:
            points.append(NumberDataPoint(attributes, begun_ns(family, labels), now_ns, value))
    if family.kind == "gauge":
        return Gauge(points)
    if family.kind == "histogram":
        return Histogram(points, AggregationTemporality.CUMULATIVE)
    return Sum(points, AggregationTemporality.CUMULATIVE, is_monotonic=True)
