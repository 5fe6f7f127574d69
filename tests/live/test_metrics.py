# SPDX-License-Identifier: Apache-2.0
"""What `run --metrics` serves equals the capture that it writes, and Prometheus reads the same."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import cwndtrace
from tests.harness import tcp
from tests.harness.command import Running, assert_short, call, running, send_after_idle
from tests.harness.disk import loop
from tests.harness.otlp import receiving
from tests.harness.tcp import Connect, until

pytestmark = pytest.mark.live

AT = re.compile(r"Metrics are at http://127\.0\.0\.1:(\d+)/metrics\.")
Figures = dict[tuple[str, ...], float]


def port_of(run: Running) -> int:
    run.wait_for(AT)
    match = AT.search(run.stderr)
    assert match is not None
    return int(match[1])


def get(port: int, path: str) -> tuple[int, str]:
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        client.request("GET", path)
        answer = client.getresponse()
        return answer.status, answer.read().decode()
    finally:
        client.close()


def scrape(port: int) -> Figures:
    """Return each sample by its name and the values of its labels, which are in the order of the labels' names."""
    families = text_string_to_metric_families(get(port, "/metrics")[1])
    samples = [sample for family in families for sample in family.samples]
    return {(s.name, *(s.labels[name] for name in sorted(s.labels))): s.value for s in samples}


def total(figures: Figures, name: str) -> float:
    return sum(value for key, value in figures.items() if key[0] == name)


def settled(port: int, done: Callable[[Figures], bool]) -> Figures:
    """Scrape until ``done``, and return the figures."""
    last: Figures = {}

    def ready() -> bool:
        nonlocal last
        last = scrape(port)
        return done(last)

    until(ready, 60, "the figures")
    return last


def test_the_figures_equal_the_rows_of_the_capture(connect: Connect, space: tcp.Space, tmp_path: Path) -> None:
    with loop() as disk, running("-n", space.name, "--metrics", "0", "-o", tmp_path / "a.cwnd") as run:
        port = port_of(run)
        connection = connect()
        sends = [send_after_idle(connection) for _ in range(4)]
        connection.grow()  # the last burst ends
        disk.read(*range(300))
        key = disk.path.name, "read"

        def counted(figures: Figures) -> bool:
            judged = total(figures, "cwndtrace_judged_resets_total")
            return figures.get(("cwndtrace_block_requests_total", *key), 0) >= 300 and judged >= len(sends) - 1

        found = settled(port, counted)
        assert get(port, "/healthz") == (200, "events flow\n")
        code, _, _ = run.end()
    assert code == 0
    trace = cwndtrace.load(tmp_path / "a.cwnd")
    assert total(found, "cwndtrace_resets_total") == len(trace.resets) == len(sends)
    workloads = set(trace.resets["workload"])
    assert {key[3] for key in found if key[0] == "cwndtrace_resets_total"} == workloads
    assert total(found, "cwndtrace_reset_idle_seconds_sum") == pytest.approx(trace.resets["idle_us"].sum() / 1e6)
    judged = trace.verdicts.sort_values("ts_ns").head(int(total(found, "cwndtrace_judged_resets_total")))
    assert total(found, "cwndtrace_reset_cost_seconds_total") == pytest.approx(judged["lost_us"].sum() / 1e6)
    mine = trace.block_io[trace.block_io["device"] == disk.path.name]
    reads = mine[mine["op"] == "read"]
    assert found["cwndtrace_block_requests_total", *key] == len(reads) > 0
    assert found["cwndtrace_block_io_bytes_total", *key] == reads["bytes"].sum()
    assert found["cwndtrace_block_latency_seconds_sum", *key] == pytest.approx(reads["latency_us"].sum() / 1e6)
    assert found["cwndtrace_slow_start_after_idle",] == 1
    assert found["cwndtrace_connections",] == 2


def test_no_thread_keeps_privileges(space: tcp.Space, tmp_path: Path) -> None:
    with running("-n", space.name, "--metrics", "0", "-o", tmp_path / "a.cwnd") as run:
        scrape(port_of(run))
        tasks = list(Path(f"/proc/{run.process.pid}/task").iterdir())
        status = [(task / "status").read_text() for task in tasks]
        run.end()
    for text in status:
        assert "CapPrm:\t0000000000000000" in text


def test_a_receiver_of_otlp_gets_the_figures_of_the_capture(connect: Connect, space: tcp.Space, tmp_path: Path) -> None:
    with loop() as disk, receiving() as receiver:
        before = (
            "env",
            f"OTEL_EXPORTER_OTLP_ENDPOINT={receiver.url}",
            "OTEL_RESOURCE_ATTRIBUTES=k8s.pod.name=tracer",
        )
        with running("-n", space.name, "--block", "-o", tmp_path / "a.cwnd", before=before) as run:
            connection = connect()
            sends = [send_after_idle(connection) for _ in range(2)]
            disk.read(*range(300))
            code, _, stderr = run.end()  # the last figures are sent at the end
        assert "Metrics are sent to" in stderr
    assert code == 0
    (resource,) = receiver.got[-1][2].resource_metrics
    attributes = {each.key: each.value.string_value for each in resource.resource.attributes}
    assert (attributes["k8s.pod.name"], attributes["host.name"]) == ("tracer", socket.gethostname())
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for metric in resource.scope_metrics[0].metrics:
        points = getattr(metric, str(metric.WhichOneof("data"))).data_points
        for point in points:
            labels = {each.key: each.value.string_value for each in point.attributes}
            value = point.sum if metric.HasField("histogram") else getattr(point, point.WhichOneof("value"))
            found.setdefault(metric.name, []).append((labels, value))
    trace = cwndtrace.load(tmp_path / "a.cwnd")
    names = {labels["workload"]: value for labels, value in found["cwndtrace.resets"]}
    assert names == dict(trace.resets["workload"].value_counts())
    assert sum(names.values()) == len(sends)
    reads = trace.block_io[(trace.block_io["device"] == disk.path.name) & (trace.block_io["op"] == "read")]
    mine = {"device": disk.path.name, "operation": "read"}
    ((_, requests),) = (each for each in found["cwndtrace.block.requests"] if each[0] == mine)
    ((_, latency_s),) = (each for each in found["cwndtrace.block.latency"] if each[0] == mine)
    assert requests == len(reads) >= 300
    assert latency_s == pytest.approx(reads["latency_us"].sum() / 1e6)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@contextmanager
def prometheus(target: int, folder: Path) -> Iterator[Callable[..., list[dict[str, Any]]]]:
    """Run Debian's Prometheus, which scrapes a port each second; yields a function that evaluates an expression."""
    if shutil.which("prometheus") is None:
        pytest.skip("needs prometheus: sudo make develop installs it")
    job = {"job_name": "cwndtrace", "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}
    config = {"global": {"scrape_interval": "1s", "scrape_timeout": "1s"}, "scrape_configs": [job]}
    (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    port = free_port()
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
    ]

    def query(expression: str, **more: float) -> list[dict[str, Any]]:
        code, text = get(port, f"/api/v1/query?{urllib.parse.urlencode({'query': expression, **more})}")
        assert code == 200, text
        found: list[dict[str, Any]] = json.loads(text)["data"]["result"]
        return found

    def ready() -> bool:
        try:
            return get(port, "/-/ready")[0] == 200
        except OSError:
            return False

    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            until(ready, 60, "Prometheus to be ready")
            yield query
        finally:
            process.terminate()
            process.wait(30)


def test_prometheus_scrapes_it_and_increase_agrees(connect: Connect, space: tcp.Space, tmp_path: Path) -> None:
    with running("-n", space.name, "--metrics", "0", "-o", tmp_path / "a.cwnd") as run:
        port = port_of(run)
        connection = connect()
        send_after_idle(connection)
        # increase() doesn't see what a series begins with.
        with prometheus(port, tmp_path) as query:
            until(lambda: query("cwndtrace_resets_total"), 60, "the first reset to be scraped")
            begin = time.monotonic()
            for _ in range(5):
                send_after_idle(connection)
            # The wait for Prometheus was idle time, too, so there may be more than these.
            found = settled(port, lambda figures: total(figures, "cwndtrace_judged_resets_total") >= 5)
            number = total(found, "cwndtrace_resets_total")
            until(lambda: float(query("sum(cwndtrace_resets_total)")[0]["value"][1]) == number, 30, "the last scrape")
            now, span = time.time(), int(time.monotonic() - begin) + 2
            samples = query(f"cwndtrace_resets_total[{span}s]", time=now)
            (increase,) = query(f"sum(increase(cwndtrace_resets_total[{span}s]))", time=now)
            (up,) = query('up{job="cwndtrace"}')
        run.end()
    assert up["value"][1] == "1"
    ((first_s, first), *_, (last_s, last)) = samples[0]["values"]
    assert (len(samples), float(last)) == (1, number)
    # It extrapolates from the first and the last scrape within the range to the range's ends.
    counted = float(last) - float(first)
    assert counted >= 5
    assert counted <= float(increase["value"][1]) <= counted * span / (last_s - first_s) * 1.001
    assert len(cwndtrace.load(tmp_path / "a.cwnd").resets) == number >= 6


def test_a_place_that_cannot_be_served_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        taken = f"127.0.0.1:{sock.getsockname()[1]}"
        assert_short(call("run", "--metrics", taken, "-o", tmp_path / "a.cwnd"), 2, taken, "another process listens")
    done = call("run", "--metrics", "192.0.2.77:9464", "-o", tmp_path / "a.cwnd")
    assert_short(done, 2, r"192\.0\.2\.77:9464", "doesn't have that address", "ip address")
    assert not (tmp_path / "a.cwnd").exists()
