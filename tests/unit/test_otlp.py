# SPDX-License-Identifier: Apache-2.0
"""OTLP carries the figures that Prometheus gets, to where the standard variables say, and waits for nobody."""

from __future__ import annotations

import time
from typing import Any

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from cwndtrace.cli import metrics as cli_metrics
from cwndtrace.errors import UsageError
from cwndtrace.metrics import families
from cwndtrace.metrics.families import FAMILIES, RESETS, Buckets, Snapshot
from cwndtrace.metrics.otlp import Begins, Export, endpoint
from tests.harness.otlp import receiving
from tests.harness.tcp import until

ATTRIBUTES = {"service.name": "cwndtrace", "host.name": "a"}
EVERY: Snapshot = {
    family: {
        (f"é{number}",) * len(family.labels): Buckets(tuple(range(len(family.edges) + 1)), 2.5)
        if family.kind == "histogram"
        else number + 0.5
    }
    for number, family in enumerate(FAMILIES)
}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ENDPOINT", "METRICS_ENDPOINT", "HEADERS", "PROTOCOL", "TIMEOUT"):
        monkeypatch.delenv(f"OTEL_EXPORTER_OTLP_{name}", raising=False)


def exporting(monkeypatch: pytest.MonkeyPatch, url: str, **more: str) -> Export:
    names = {"EXPORTER_OTLP_ENDPOINT": url, "METRIC_EXPORT_INTERVAL": "100", **more}
    environ = {f"OTEL_{name}": value for name, value in names.items()}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)  # the SDK reads them itself
    return Export(environ, ATTRIBUTES)


def values(message: ExportMetricsServiceRequest) -> dict[str, Any]:
    """Return the value of each metric by its name, with its unit and its labels."""
    (resource,) = message.resource_metrics
    (scope,) = resource.scope_metrics
    out = {}
    for metric in scope.metrics:
        kind = metric.WhichOneof("data")
        (point,) = getattr(metric, str(kind)).data_points
        labels = {each.key: each.value.string_value for each in point.attributes}
        value = (list(point.bucket_counts), point.sum) if kind == "histogram" else point.as_double
        out[metric.name] = (kind, metric.unit, labels, value)
    return out


def test_a_receiver_decodes_what_was_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as receiver:
        more = {"EXPORTER_OTLP_HEADERS": "x-key=7", "RESOURCE_ATTRIBUTES": "k8s.pod.name=p,host.name=b"}
        export = exporting(monkeypatch, receiver.url, **more)
        export.start(lambda: EVERY, 1000, "1.2")
        until(lambda: receiver.got, 20, "an export")
        export.close()
    path, headers, message = receiver.got[0]
    assert (path, headers["x-key"]) == ("/v1/metrics", "7")
    resource = {a.key: a.value.string_value for a in message.resource_metrics[0].resource.attributes}
    assert resource.items() >= {"service.name": "cwndtrace", "host.name": "b", "k8s.pod.name": "p"}.items()
    found = values(message)
    for family in FAMILIES:
        ((labels, value),) = EVERY[family].items()
        kind, unit, attributes, got = found[family.name]
        assert kind == {"counter": "sum"}.get(family.kind, family.kind)
        assert (unit, attributes) == (family.unit, dict(zip(family.labels, labels, strict=True)))
        assert got == ((list(value.counts), value.sum) if isinstance(value, Buckets) else value)
    sums = [m.sum for m in message.resource_metrics[0].scope_metrics[0].metrics if m.WhichOneof("data") == "sum"]
    assert all(each.is_monotonic and each.aggregation_temporality == 2 for each in sums)
    assert {point.start_time_unix_nano for each in sums for point in each.data_points} == {1000}


def test_a_series_that_was_dropped_begins_anew() -> None:
    """A counter never falls without a later start."""
    shown: list[Snapshot] = [{RESETS: {("a",): 5}}, {RESETS: {("a",): 6, ("b",): 2}}, {RESETS: {("b",): 1}}]
    shown += [{RESETS: {("a",): 7, ("b",): 1}}]
    begins, found = Begins(1000), []
    for now_ns, snapshot in zip((2000, 3000, 4000, 5000), shown, strict=True):
        begun_ns = begins.take(snapshot, now_ns)
        found.append([begun_ns(RESETS, labels) for labels in snapshot[RESETS]])
    assert found == [[1000], [1000, 2000], [3000], [4000, 3000]]


def test_the_last_figures_are_sent_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as receiver:
        export = exporting(monkeypatch, receiver.url, METRIC_EXPORT_INTERVAL="3600000")
        export.start(lambda: EVERY, 0, "1.2")
        export.close()
        assert len(receiver.got) == 1


@pytest.mark.slow
@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "nonsense", "file:///etc/passwd"])
def test_a_dead_endpoint_is_noticed_and_holds_up_nothing(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    export = exporting(monkeypatch, url, EXPORTER_OTLP_TIMEOUT="1")
    telemetry = cli_metrics.Telemetry(None, export)
    export.start(lambda: EVERY, 0, "1.2")
    until(lambda: export.failing, 20, "the failure")
    assert "couldn't be sent to" in (telemetry.news() or "")
    assert telemetry.news() is None
    begin = time.monotonic()
    export.close()
    assert time.monotonic() - begin < 10


def test_a_refusal_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving(answer=401) as receiver:
        export = exporting(monkeypatch, receiver.url)
        export.start(lambda: EVERY, 0, "1.2")
        until(lambda: export.failing, 20, "the failure")
        export.close()


@pytest.mark.parametrize(
    ("environ", "sends"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a"}, True),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://a"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_SDK_DISABLED": "TRUE"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_METRICS_EXPORTER": "none"}, False),
        ({"OTEL_METRICS_EXPORTER": "otlp"}, True),
        ({"OTEL_SERVICE_NAME": "a"}, False),
    ],
)
def test_the_standard_variables_switch_it(environ: dict[str, str], sends: bool) -> None:
    assert cli_metrics.exports(environ) is sends


def test_no_password_is_shown() -> None:
    assert endpoint({"OTEL_EXPORTER_OTLP_ENDPOINT": "https://u:secret@h:1/x/"}) == "https://h:1/x/v1/metrics"
    assert endpoint({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "https://u:secret@h/y?k=secret"}) == "https://h/y"
    assert endpoint({}) == "http://localhost:4318/v1/metrics"


@pytest.mark.parametrize(
    ("name", "value"),
    [("EXPORTER_OTLP_PROTOCOL", "grpc"), ("METRIC_EXPORT_INTERVAL", "soon"), ("METRIC_EXPORT_INTERVAL", "0")],
)
def test_a_variable_that_makes_no_sense_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    with pytest.raises(UsageError) as refused:
        exporting(monkeypatch, "http://127.0.0.1:1", **{name: value})
    assert value in refused.value.cause
    assert refused.value.remedy


def test_every_family_is_tried() -> None:
    assert set(EVERY) == set(families.FAMILIES)
