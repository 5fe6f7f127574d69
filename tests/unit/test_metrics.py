# SPDX-License-Identifier: Apache-2.0
"""The metrics of a trace equal the rows of its capture, are bounded, and hold up nothing."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pytest
import yaml
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as text_format

import cwndtrace
from cwndtrace.analysis.histogram import LatencyHistogram
from cwndtrace.capture.session import Batch, Session
from cwndtrace.cli.live import BlockFigures
from cwndtrace.cli.metrics import Address
from cwndtrace.errors import UsageError
from cwndtrace.metrics import families, live
from cwndtrace.metrics.families import BUSY, CONNECTIONS, COST, EXEMPT, FAMILIES, JUDGED, LATENCY, REQUESTS, RESETS
from cwndtrace.metrics.figures import seconds
from cwndtrace.metrics.judge import MOST_WAITING, Judge, News
from cwndtrace.metrics.live import MOST_WORKLOADS, Metrics
from cwndtrace.metrics.server import Exposition, MetricsServer, listen
from cwndtrace.metrics.slots import OTHER, UNKNOWN, Slots
from cwndtrace.records import arrow, layout
from cwndtrace.store import CaptureWriter
from tests.harness.loopback import need_loopback
from tests.harness.replay import Replay
from tests.harness.tcp import until
from tests.record import FILE
from tests.unit.fake_source import FakeSource, session_of
from tests.unit.playing import start_of

ROOT = Path(__file__).parents[2]
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


@pytest.fixture(autouse=True)
def time_to_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    """pandas may take longer to load than the end of a trace waits, on a busy machine."""
    monkeypatch.setattr(live, "_LAST_S", 60.0)


@pytest.fixture(autouse=True)
def any_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the end of a trace wait until all is counted, however busy this machine is, and know none of its devices."""
    monkeypatch.setattr("cwndtrace.metrics.live._LAST_S", 60.0)
    monkeypatch.setattr("cwndtrace.metrics.live.devices", dict)


@contextmanager
def counting(session: Session, block: BlockFigures | None = None) -> Iterator[Metrics]:
    metrics = Metrics(session, block or BlockFigures(), version="1.2", cgroups="v2", startup_s=lambda: 0.25)
    metrics.start()
    try:
        yield metrics
    finally:
        metrics.finish([])


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    """The metrics of a session in which nothing happens by itself."""
    with session_of(FakeSource()) as session, counting(session) as made:
        yield made


def rows(event: str, **columns: Any) -> arrow.TimedRecords:
    """Return records that are zero but for ``columns``."""
    number = max(np.size(value) for value in columns.values())
    records = np.zeros(number, layout.event(event).dtype)
    for name, value in columns.items():
        records[name] = value
    return arrow.TimedRecords(event, records.tobytes(), np.zeros(number, np.int64))


def resets(number: int, **columns: Any) -> Batch:
    """Return idle resets, each of a connection of its own."""
    ids = np.arange(1, number + 1)
    known = {"sock_cookie": ids, "skaddr": ids, "ts_ns": 10**9 + ids, "idle_us": 300_000, "rto_us": 200_000}
    return Batch("cwnd_reset", rows("cwnd_reset", **known | {"cwnd_before": 100, "cwnd_after": 10} | columns))


def connections(number: int, busy_us: int = 0, ts_ns: int = 0, first: int = 1) -> Batch:
    """Return a snapshot."""
    table = arrow.schema("connections").empty_table()
    ids = np.arange(first, first + number, dtype=np.uint64)
    columns = [
        pa.nulls(number, field.type).fill_null("") if pa.types.is_dictionary(field.type)
        else pa.array(np.zeros(number, np.int64)).cast(field.type)
        for field in table.schema
    ]  # fmt: skip
    new = {
        "sock_cookie": ids,
        "sport": np.arange(number, dtype=np.uint16),
        "busy_us": np.full(number, busy_us, np.uint64),
        "ts_ns": np.full(number, ts_ns, np.uint64),
        "ca_name": pa.array(["bbr" if n % 4 == 0 else "cubic" for n in range(number)]).dictionary_encode(),
    }
    made = pa.Table.from_arrays(columns, schema=table.schema)
    for name, column in new.items():
        place = made.schema.get_field_index(name)
        made = made.set_column(place, table.schema.field(name), pa.array(column, table.schema.field(name).type))
    return Batch("connections", made)


def workload(number: int, name: str) -> Batch:
    """Return the name of a cgroup."""
    row = {field.name: [0 if not pa.types.is_dictionary(field.type) else ""] for field in arrow.schema("workloads")}
    row |= {"cgroup_id": [number], "path": [f"/{name}"], "kind": ["unit"], "unit": [name]}
    arrays = [pa.array(row[field.name]).cast(field.type) for field in arrow.schema("workloads")]
    return Batch("workloads", pa.Table.from_arrays(arrays, schema=arrow.schema("workloads")))


def total(values: families.Series, **labels: str) -> float:
    """Return the sum of the series, or of those with this ``verdict``."""
    chosen = [value for key, value in values.items() if not labels or key[1] == labels["verdict"]]
    return sum(value for value in chosen if not isinstance(value, families.Buckets))


def series(metrics: Metrics) -> set[tuple[str, tuple[str, ...]]]:
    return {(family.name, labels) for family, values in metrics.snapshot().items() for labels in values}


# ---- what is counted -------------------------------------------------------------------------------


def test_the_metrics_equal_the_rows_of_the_capture(tmp_path: Path) -> None:
    block = BlockFigures()
    with session_of(Replay(FILE)) as session, counting(session, block) as metrics:
        writer = CaptureWriter.create(tmp_path / "x.cwnd", start_of(session))

        def take(batches: list[Batch]) -> None:
            for batch in batches:
                writer.add(batch.event, batch.rows)
                if batch.event == "block_io":
                    block.add(batch)

        for batches in session.turns(lambda: False):
            take(batches)
            metrics.turn(batches)
        last = session.finish()
        take(last)
        metrics.finish(last)
        writer.close("complete", **session.meta())
        found = metrics.snapshot()
    trace = cwndtrace.load(tmp_path / "x.cwnd")
    judged, requests = trace.verdicts, trace.block_io
    assert total(found[RESETS]) == len(judged) > 0
    by_kind = Counter({key[:2]: int(number) for key, number in found[RESETS].items()})  # type: ignore[arg-type]
    assert by_kind == Counter(zip(judged["reason"], judged["probe"], strict=True))
    assert {key[2] for key in found[RESETS]} == {name or UNKNOWN for name in judged["workload"]}
    for verdict in judged["verdict"].unique():
        mine = judged[judged["verdict"] == verdict]
        assert total(found[JUDGED], verdict=verdict) == len(mine)
        assert total(found[COST], verdict=verdict) == pytest.approx(mine["lost_us"].sum() / 1e6)
    for op in requests["op"].unique():
        mine = requests[requests["op"] == op]
        labels = str(mine["dev"].iloc[0]), str(op)
        assert found[REQUESTS][labels] == len(mine)
        assert found[families.BYTES][labels] == mine["bytes"].sum()
        assert found[families.ERRORS][labels] == (mine["error"] != "ok").sum()
        latency = found[LATENCY][labels]
        assert isinstance(latency, families.Buckets)
        assert sum(latency.counts) == len(mine)
        assert latency.sum == pytest.approx(mine["latency_us"].sum() / 1e6)
    idle = found[families.IDLE][()]
    assert isinstance(idle, families.Buckets)
    assert idle.sum == pytest.approx(judged["idle_us"].sum() / 1e6)
    assert found[families.KEPT]["cwnd_reset",] == len(judged)


def test_the_edges_of_latencies_are_exact_to_one_percent() -> None:
    latencies = np.random.default_rng(1).lognormal(6, 3, 20_000)
    histogram = LatencyHistogram()
    histogram.add(latencies)
    upto = np.cumsum(seconds(histogram, LATENCY).counts)
    assert upto[-1] == len(latencies)
    for edge, number in zip(LATENCY.edges, upto, strict=False):
        assert (latencies <= edge * 1e6 / 1.0101).sum() <= number <= (latencies <= edge * 1e6).sum()


def test_busy_time_is_that_between_snapshots(metrics: Metrics) -> None:
    metrics.turn([connections(4, busy_us=5_000_000, ts_ns=10**9)])
    metrics.turn([connections(4, busy_us=5_500_000, ts_ns=3 * 10**9)])
    # One more, which can have been busy for as long as it says since the last snapshot, and one that can't.
    metrics.turn([connections(5, busy_us=5_500_000, ts_ns=20 * 10**9)])
    metrics.turn([connections(6, busy_us=5_500_000, ts_ns=21 * 10**9)])
    metrics.finish([])
    found = metrics.snapshot()
    assert found[BUSY][()] == pytest.approx(4 * 0.5 + 5.5)
    assert (found[CONNECTIONS][()], found[EXEMPT][()]) == (6, 2)


@pytest.mark.slow
def test_ten_thousand_connections_add_no_series(metrics: Metrics) -> None:
    named = [workload(7, "web.service")]
    metrics.turn([*named, resets(1, cgroup_id=7), connections(1), connections(1)])
    until(lambda: COST in metrics.snapshot(), 30, "the first reset to be counted")
    before = series(metrics)
    many = {"sport": np.arange(10_000), "tgid": np.arange(10_000), "cgroup_id": 7}
    metrics.turn([resets(10_000, **many), connections(10_000)])
    until(lambda: total(metrics.snapshot()[JUDGED]) == 10_001, 30, "all to be counted")
    assert series(metrics) == before


# ---- labels ----------------------------------------------------------------------------------------


def test_workloads_beyond_the_bound_are_counted_together(metrics: Metrics) -> None:
    many = MOST_WORKLOADS + 9
    ids = np.arange(1, many + 1)
    metrics.turn([*(workload(n, f"{n}.service") for n in ids.tolist()), resets(many, cgroup_id=ids)])
    metrics.finish([])
    found = metrics.snapshot()[RESETS]
    assert len(found) == MOST_WORKLOADS + 1
    assert found["idle", "tracepoint", OTHER] == 9


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", ['a"} 1\ncwndtrace_x 1', "\x1b[31mred", "a\\", "\u202eevil", "x" * 5000, "é" * 60])
def test_a_hostile_name_stays_one_label(metrics: Metrics, name: str) -> None:
    metrics.turn([workload(7, name), resets(3, cgroup_id=7)])
    metrics.finish([])
    exposition = Exposition(metrics.snapshot)
    for accept, parse in (("", text_format), (OPENMETRICS, openmetrics)):
        text = exposition.text(accept)[1].decode()
        found = [s for f in parse(text) for s in f.samples if s.name == "cwndtrace_resets_total"]
        assert [s.value for s in found] == [3]
        label = found[0].labels["workload"]
        assert label.isprintable()
        assert len(label) <= 100


def test_a_name_that_is_not_used_for_an_hour_makes_room() -> None:
    now, gone = [0.0], list[str]()
    slots = Slots(2, gone.append, lambda: now[0])
    assert [slots.label(name) for name in ("a", "b", "c", "")] == ["a", "b", OTHER, UNKNOWN]
    now[0] = 3000
    assert slots.label("a") == "a"
    now[0] = 3601
    assert [slots.label(name) for name in ("c", "b")] == ["c", OTHER]
    assert gone == ["b"]


def test_the_costliest_names_have_the_labels() -> None:
    now, gone = [0.0], list[str]()
    slots = Slots(2, gone.append, lambda: now[0])
    assert [slots.label("a", 1.0), slots.label("b", 3.0)] == ["a", "b"]
    assert [slots.label("c", 2.0), slots.label("d", 1.5)] == [OTHER, OTHER]  # twice as much as "a" isn't more
    assert [slots.label("c", 0.1), slots.label("a"), slots.label("b"), slots.label("c")] == ["c", OTHER, "b", "c"]
    assert gone == ["a"]
    # "a" comes back with what it had cost before, once it is ahead again.
    assert slots.label("a", 3.3) == "a"
    assert gone == ["a", "c"]
    # What cost much an hour ago counts half: "b" has 1.5 then and "a" has 2.15.
    now[0] = 3000
    assert [slots.label("a"), slots.label("b")] == ["a", "b"]
    now[0] = 3600
    assert slots.label("e", 3.1) == "e"
    assert gone == ["a", "c", "b"]


@pytest.mark.slow
def test_a_workload_that_costs_much_gets_a_label_later(metrics: Metrics) -> None:
    """Before that it is counted as ``other``; all labels together have every reset."""
    many = MOST_WORKLOADS + 1
    named = [workload(n, f"{n}.service") for n in range(1, many + 1)]
    metrics.turn([*named, resets(MOST_WORKLOADS, cgroup_id=np.arange(1, many))])
    until(lambda: total(metrics.snapshot().get(JUDGED, {})) == MOST_WORKLOADS, 30, "the first resets")
    assert metrics._slots.label(f"{many}.service") == OTHER
    metrics._slots.label(f"{many}.service", 1000.0)
    metrics.turn([resets(3, cgroup_id=many)])
    metrics.finish([])
    found = metrics.snapshot()[RESETS]
    assert found["idle", "tracepoint", f"{many}.service"] == 3
    assert len(found) == MOST_WORKLOADS  # one has been given up


@pytest.mark.slow
def test_a_name_without_a_label_any_more_has_no_series(metrics: Metrics) -> None:
    metrics.turn([workload(7, "a.service"), resets(3, cgroup_id=7)])
    until(lambda: RESETS in metrics.snapshot(), 30, "the resets to be counted")
    metrics._figures.drop("workload", "a.service")
    assert not metrics.snapshot().get(RESETS)


# ---- bursts that have ended ------------------------------------------------------------------------


def judge(*, follows: bool = True) -> Judge:
    return Judge(cgroups="v2", follows=follows, recorded=True, started_ns=0)


def recoveries(skaddr: int, *reset_ts_ns: int, **columns: Any) -> arrow.TimedRecords:
    number = len(reset_ts_ns)
    known = {"skaddr": [skaddr] * number, "reset_ts_ns": reset_ts_ns, "end_ts_ns": np.array(reset_ts_ns) + 10}
    return rows("cwnd_recovery", **known | columns)


LATER = 10**12


def taken(it: Judge, news: News, now_ns: int = LATER) -> list[tuple[int, str, float]]:
    _, judged = it.take(news, {}, now_ns)
    return list(judged[["ts_ns", "verdict", "lost_us"]].itertuples(index=False, name=None))


def test_a_reset_is_judged_once_its_burst_has_ended() -> None:
    it = judge()
    one = resets(1, skaddr=5, ts_ns=100).rows
    assert isinstance(one, arrow.TimedRecords)
    assert taken(it, News(resets=[one])) == []
    found = News(recoveries=[recoveries(5, 100, cost_us=7000)])
    assert taken(it, found, now_ns=200) == []  # block requests may still be under way
    assert taken(it, News()) == [(100, "harmful", 7000)]
    assert taken(it, News()) == []


def test_a_recovery_may_come_in_before_its_reset() -> None:
    it = judge()
    assert taken(it, News(recoveries=[recoveries(5, 100, cost_us=7000)])) == []
    assert taken(it, News(resets=[rows("cwnd_reset", skaddr=5, ts_ns=100)])) == [(100, "harmful", 7000)]


def test_a_reset_that_was_not_followed_is_unknown_once_a_later_one_was() -> None:
    it = judge()
    taken(it, News(resets=[rows("cwnd_reset", skaddr=[5, 5, 6], ts_ns=[100, 200, 150])]))
    assert taken(it, News(recoveries=[recoveries(5, 200, cost_us=7000)])) == [
        (100, "unknown", 0),
        (200, "harmful", 7000),
    ]


def test_the_same_waiting_is_not_counted_twice() -> None:
    """The second span, of another reason, ends first, and the cost is that of the one that began first."""
    it = judge()
    app_limited = next(code for code, label in layout.header().enums["reason"].items() if label == "app_limited")
    taken(it, News(resets=[rows("cwnd_reset", skaddr=[5, 5], ts_ns=[100, 200], reason=[0, app_limited])]))
    assert taken(it, News(recoveries=[recoveries(5, 200, end_ts_ns=300, cost_us=7000)])) == []
    first = News(recoveries=[recoveries(5, 100, end_ts_ns=400, cost_us=9000)])
    assert sorted(cost for *_, cost in taken(it, first)) == [0, 9000]


def test_losses_are_judged_at_once_and_without_following_all_are() -> None:
    loss = next(code for code, label in layout.header().enums["reason"].items() if label == "rto_loss")
    news = News(resets=[rows("cwnd_reset", skaddr=[5, 6], ts_ns=[100, 200], reason=[loss, 0], snd_wnd=10**6)])
    assert taken(judge(), news) == [(100, "loss", 0)]
    assert [verdict for _, verdict, _ in taken(judge(follows=False), news)] == ["loss", "unknown"]


def test_resets_that_wait_are_bounded() -> None:
    it = judge()
    ids = np.arange(MOST_WAITING + 10)
    found = taken(it, News(resets=[rows("cwnd_reset", skaddr=ids, ts_ns=ids)]))
    assert found == [(n, "unknown", 0) for n in range(10)]


def test_block_io_that_is_not_kept_any_more_leaves_the_cause_unknown() -> None:
    at = 5 * 10**9
    known = {"skaddr": 5, "ts_ns": at, "idle_us": 1_000_000, "tgid": 7, "tid": 7, "last_rcv_us": 1_000_000}
    requests = [rows("block_io", start_ns=at - 10**9, done_ns=at - 1000, issue_ns=1, tgid=7, tid=7)]
    causes = {}
    for name, kept, gone_ns in (("disk", requests, 0), ("application", [], 0), ("unknown", [], at - 5 * 10**8)):
        news = News([rows("cwnd_reset", **known)], [recoveries(5, at)], requests=kept, gone_ns=gone_ns)
        causes[name] = judge().take(news, {}, LATER)[1]["cause"].tolist()
    assert causes == {name: [name] for name in causes}


def test_requests_that_are_kept_are_bounded(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_MOST_REQUESTS", 100)
    for n in range(5):
        done = np.arange(40) + 1000 * n
        metrics.turn([Batch("block_io", rows("block_io", start_ns=done, done_ns=done))])
    assert sum(map(len, metrics._kept_requests)) == metrics._rows == 80
    assert metrics._gone_ns == 2039


# ---- serving ---------------------------------------------------------------------------------------


@contextmanager
def serving(snapshot: Callable[[], families.Snapshot], health: Callable[[], str] = str) -> Iterator[int]:
    need_loopback()
    sock = listen(("127.0.0.1", 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cwndtrace.metrics.server._POLL_S", 0.1)  # closing it waits so long
        server = MetricsServer(sock, Exposition(snapshot), health)
        server.start()
        try:
            yield sock.getsockname()[1]
        finally:
            server.close()


def get(port: int, path: str, **headers: str) -> tuple[int, str, str]:
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        client.request("GET", path, headers=headers)
        answer = client.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read().decode()
    finally:
        client.close()


@pytest.mark.slow
def test_text_and_openmetrics_say_the_same(metrics: Metrics) -> None:
    metrics.turn([resets(3), connections(5)])
    until(lambda: RESETS in metrics.snapshot(), 30, "the resets to be counted")
    with serving(metrics.snapshot) as port:
        code, kind, text = get(port, "/metrics")
        assert (code, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
        code, kind, modern = get(port, "/metrics?x=1", Accept=OPENMETRICS)
        assert (code, kind.partition(";")[0]) == (200, "application/openmetrics-text")
    both = [
        {(s.name, *sorted(s.labels.items())): s.value for f in parse(body) for s in f.samples}
        for body, parse in ((text, text_format), (modern, openmetrics))
    ]
    assert both[0] == both[1]
    assert both[0]["cwndtrace_resets_total", ("probe", "tracepoint"), ("reason", "idle"), ("workload", UNKNOWN)] == 3


def need_promtool() -> None:
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool: sudo make develop installs Debian's prometheus, which has it")


@pytest.mark.slow
def test_promtool_accepts_every_metric() -> None:
    need_promtool()
    full = {
        family: {
            ("x",) * len(family.labels): families.Buckets((1,) * (len(family.edges) + 1), 1.5)
            if family.kind == "histogram"
            else 1.0
        }
        for family in FAMILIES
    }
    text = Exposition(lambda: full).text("")[1]
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert text.count(b"# TYPE") == len(FAMILIES)


def test_health_says_whether_events_flow(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(metrics.snapshot, metrics.health) as port:
        metrics.turn([])
        assert get(port, "/healthz")[::2] == (200, "events flow\n")
        monkeypatch.setattr(live, "_SILENT_S", -1.0)
        assert get(port, "/healthz")[::2] == (503, "the trace has done nothing for 0 s\n")
        metrics.stopping()
        assert get(port, "/healthz")[::2] == (503, "the trace is ending\n")
        assert get(port, "/other")[0] == 404


def test_an_error_in_counting_ends_no_trace_and_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Metrics, "_count", lambda *_, **__: 1 / 0)
    with session_of(FakeSource()) as session, counting(session) as metrics:
        until(metrics.health, 10, "the error")
        assert "aren't counted any more: ZeroDivisionError" in metrics.health()
        metrics.turn([resets(3)])


@pytest.mark.slow
def test_the_loop_never_waits_for_a_request(metrics: Metrics) -> None:
    asked, answer = threading.Event(), threading.Event()

    def slow() -> families.Snapshot:
        asked.set()
        answer.wait(30)
        return metrics.snapshot()

    with serving(slow) as port:
        client = threading.Thread(target=get, args=(port, "/metrics"))
        client.start()
        assert asked.wait(10)
        metrics.turn([resets(3)])  # it would hang here
        answer.set()
        client.join(20)
    assert not client.is_alive()


@pytest.mark.slow
def test_silent_clients_are_few_and_are_cut(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cwndtrace.metrics.server._MOST_S", 2.0)
    with serving(metrics.snapshot) as port:
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(12)]
        later: list[threading.Timer] = []

        def send_more(client: socket.socket) -> None:
            with suppress(OSError):  # on a busy machine it is cut first
                client.send(b"i")

        try:
            for number, client in zip(count(), silent, strict=False):
                client.settimeout(20)
                client.sendall(b"GET /metr")
                if number < 8:
                    # It keeps sending, so that only the limit on the whole connection can end it.
                    later.append(threading.Timer(1.5, send_more, (client,)))
                    later[-1].start()
            assert [client.recv(1) for client in silent[8:]] == [b""] * 4
            assert all(client.recv(100).startswith((b"", b"HTTP")) for client in silent[:8])
            assert get(port, "/metrics")[0] == 200
        finally:
            for timer in later:
                timer.cancel()
                timer.join()
            for client in silent:
                client.close()


def test_a_place_that_cannot_be_served_is_refused_with_a_cure() -> None:
    need_loopback()  # without it, any address can be bound
    with listen(("127.0.0.1", 0)) as sock, pytest.raises(UsageError) as busy:
        listen(sock.getsockname())
    assert "another process listens there" in busy.value.cause
    with pytest.raises(UsageError) as elsewhere:
        listen(("192.0.2.77", 9464))
    assert "192.0.2.77:9464: this machine doesn't have that address" in elsewhere.value.cause
    assert "127.0.0.1:9464" in elsewhere.value.remedy


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("9464", ("127.0.0.1", 9464)),
        ("localhost:9464", ("127.0.0.1", 9464)),
        ("[::1]:0", ("::1", 0)),
        ("0.0.0.0:65535", ("0.0.0.0", 65535)),
    ],
)
def test_an_address_is_read(text: str, address: tuple[str, int]) -> None:
    assert Address().convert(text, None, None) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        ":9464",
        "::1:9464",
        "[]:9464",
        "host.example:9464",
        "127.0.0.1:",
        "65536",
        "-1",
        "1\n",
        "80",
        "1.2.3.4:22",
    ],
)
def test_what_is_no_address_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(click.BadParameter, match=r"9464|from 1024 on"):
        Address().convert(text, None, None)


def test_counting_stops_in_time_while_much_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    hang = threading.Event()
    monkeypatch.setattr(live, "_LAST_S", 0.1)
    monkeypatch.setattr(Metrics, "_count", lambda *_, **__: hang.wait(30))
    with session_of(FakeSource()) as session, counting(session) as metrics:
        begin = time.monotonic()
        metrics.finish([])
        assert time.monotonic() - begin < 10
        hang.set()


# ---- names -----------------------------------------------------------------------------------------


def test_names_follow_the_conventions() -> None:
    assert len({family.prometheus for family in FAMILIES}) == len({family.name for family in FAMILIES}) == len(FAMILIES)
    for family in FAMILIES:
        assert not family.name.endswith("total")
        assert not {"port", "pid", "address", "connection"} & set(family.labels)
        assert family.help.endswith(".") or family is families.BUILD


def test_the_page_lists_every_metric() -> None:
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    for family in FAMILIES:
        total = "_total" if family.kind == "counter" else ""
        labels = ", ".join(f"`{label}`" for label in family.labels)
        assert f"\n| `{family.prometheus}{total}` | {labels} |" in page, family.name


# ---- contrib/grafana -------------------------------------------------------------------------------

GRAFANA = ROOT / "contrib/grafana"


def names() -> set[str]:
    """Return the names of all time series that Prometheus may have."""
    kinds = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
    return {f"{family.prometheus}{end}" for family in FAMILIES for end in kinds[family.kind]}


def expressions() -> list[str]:
    """Return the dashboard's expressions, with values for the variables of Grafana."""
    panels = json.loads((GRAFANA / "dashboard.json").read_text(encoding="utf-8"))["panels"]
    found = [target["expr"] for panel in panels for target in panel["targets"]]
    known = {"$instance": ".*", "$__rate_interval": "1m", "$__range": "6h"}
    return [re.sub(r"\$\w+", lambda match: known[match[0]], each) for each in found]


def test_the_dashboard_and_the_alerts_know_only_metrics_that_exist() -> None:
    for text in (*expressions(), (GRAFANA / "alerts.yaml").read_text(encoding="utf-8")):
        assert set(re.findall(r"\bcwndtrace_\w+", text)) <= names(), text


def test_the_page_describes_each_alert() -> None:
    rules = yaml.safe_load((GRAFANA / "alerts.yaml").read_text(encoding="utf-8"))["groups"][0]["rules"]
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (Cwnd\w+)", page, re.MULTILINE) == [rule["alert"] for rule in rules]


def test_grafana_knows_every_part_of_the_dashboard() -> None:
    """Its own library reads the file and writes it again, and nothing is lost or changed."""
    plugins.register_default_plugins()
    raw = json.loads((GRAFANA / "dashboard.json").read_text(encoding="utf-8"))
    again = json.loads(JSONEncoder().encode(Dashboard.from_json(raw)))

    def assert_kept(before: Any, after: Any, where: str) -> None:
        if isinstance(before, dict):
            for name, value in before.items():
                assert name in after, f"{where}.{name}"
                assert_kept(value, after[name], f"{where}.{name}")
        elif isinstance(before, list):
            assert len(before) == len(after), where
            for number, (one, other) in enumerate(zip(before, after, strict=True)):
                assert_kept(one, other, f"{where}[{number}]")
        else:
            assert before == after, where

    assert_kept(raw, again, "")


def test_promtool_accepts_the_alerts_and_the_expressions_of_the_dashboard(tmp_path: Path) -> None:
    need_promtool()
    rules = [{"record": f"a{number}", "expr": expression} for number, expression in enumerate(expressions())]
    (tmp_path / "dashboard.yaml").write_text(yaml.safe_dump({"groups": [{"name": "a", "rules": rules}]}))
    for file, number in ((GRAFANA / "alerts.yaml", 4), (tmp_path / "dashboard.yaml", len(rules))):
        done = subprocess.run(["promtool", "check", "rules", file], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert f"SUCCESS: {number} rules found" in done.stdout


def test_panels_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in json.loads((GRAFANA / "dashboard.json").read_text())["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
