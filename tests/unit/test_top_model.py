# SPDX-License-Identifier: Apache-2.0
"""The figures of ``top`` agree with those of a Trace, and stay bounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cwndtrace.store.follow import Follower
from cwndtrace.top import devices, history, model
from cwndtrace.top.devices import Devices, OneDevice
from cwndtrace.top.history import BARS, History, plot, spark
from cwndtrace.top.model import WANTED, Model
from cwndtrace.trace import Trace
from tests.unit import frames


def read(path: Path) -> Model:
    follower = Follower(path, WANTED)
    made = Model(follower.about)
    for name, rows in follower.new_rows(60):
        made.add(name, rows)
    return made


def empty() -> Model:
    return Model(frames.about())


def add(to: Model, table: str, *records: Any) -> None:
    rows = frames.snapshots(*records) if table == "connections" else frames.table(table, *records)
    to.add(table, rows.select(WANTED[table]))


def only(of: Model) -> model.Watched:
    (one,) = of.connections
    return one


def test_sums_equal_those_of_the_report(tmp_path: Path) -> None:
    trace = frames.two_idle_connections(tmp_path / "a.cwnd")
    made = read(tmp_path / "a.cwnd")
    rows = {row["dport"]: row for row in trace.summary().to_dict("records")}
    assert len(rows) == 2
    for one in made.connections:
        row = rows[one.ends[4]]
        assert (one.resets, one.idle_longest_us) == (row["resets"], row["idle_longest_us"])
        assert one.cost_us == pytest.approx(row["lost_us"])
        assert one.cookie == row["sock_cookie"]
    assert made.resets == len(trace.resets)
    assert made.cost_us == pytest.approx(trace.summary()["lost_us"].sum())


def costs(path: Path, *recoveries: Any, resets: tuple[Any, ...]) -> tuple[float, float]:
    """Return the cost by the report and by top."""
    trace = frames.capture(
        path,
        resets=frames.table("cwnd_reset", *resets),
        recoveries=frames.table("cwnd_recovery", *recoveries),
        connections=frames.snapshots(frames.snapshot(9)),
    )
    return float(trace.summary()["lost_us"].sum()), read(path).cost_us


@pytest.mark.quick(3)
@pytest.mark.parametrize(
    "recoveries",
    [
        (frames.recovered(1, 3, cost_us=50_000), frames.recovered(2, 0.5, cost_us=20_000)),
        (frames.recovered(2, 0.5, cost_us=20_000), frames.recovered(1, 3, cost_us=50_000)),
        (frames.recovered(1, 0.5, cost_us=50_000), frames.recovered(2, 0.5, cost_us=20_000)),
        (frames.recovered(1, 0.5, cost_us=10, outcome="capture_end"),),
        (frames.recovered(1, 0.5, cost_us=10, after_loss_us=900_000),),
        (frames.recovered(1, 0.5, cost_us=80_000, after_loss_us=900_000),),
        (frames.recovered(1, 0.5), frames.recovered(1, 0.5)),
    ],
    ids=["outer first", "inner first", "apart", "unknown", "loss", "both", "twice"],
)
def test_a_cost_counts_as_in_the_report(tmp_path: Path, recoveries: tuple[Any, ...]) -> None:
    both = (frames.reset(1), frames.reset(2, reason="app_limited"))
    by_report, by_top = costs(tmp_path / "a.cwnd", *recoveries, resets=both)
    assert by_top == pytest.approx(by_report)


def test_a_cost_may_come_before_its_reset() -> None:
    made = empty()
    add(made, "cwnd_recovery", frames.recovered(1, cost_us=5_000))
    assert made.cost_us == 0
    add(made, "cwnd_reset", frames.reset(1))
    assert (made.cost_us, only(made).costs) == (5_000, 1)


def test_a_connection_whose_cookie_comes_late_is_one() -> None:
    made = empty()
    add(made, "cwnd_reset", frames.reset(1, sock_cookie=0))
    add(made, "connections", frames.snapshot(2, sock_cookie=7))
    add(made, "cwnd_reset", frames.reset(3, sock_cookie=7), frames.reset(4, sock_cookie=0))
    assert (only(made).resets, only(made).cookie) == (3, 7)


def test_two_connections_with_the_same_ports_are_two() -> None:
    made = empty()
    add(made, "cwnd_reset", frames.reset(1, sock_cookie=7), frames.reset(2, sock_cookie=8))
    assert sorted(one.cookie for one in made.connections) == [7, 8]


def test_connections_that_are_gone_leave_unless_they_had_a_reset() -> None:
    made = empty()
    add(made, "connections", frames.snapshot(1, sock_cookie=1, sport=1), frames.snapshot(1, sock_cookie=2, sport=2))
    add(made, "cwnd_reset", frames.reset(1.5, sock_cookie=2, sport=2))
    assert all(map(made.is_open, made.connections))
    add(made, "connections", frames.snapshot(9, sock_cookie=3, sport=3))
    assert {one.cookie: made.is_open(one) for one in made.connections} == {2: False, 3: True}


@pytest.mark.slow
def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, most in (("MOST_CONNECTIONS", 50), ("MOST_AWAITED", 30)):
        monkeypatch.setattr(model, name, most)
    monkeypatch.setattr(history, "MOST_POINTS", 100)
    monkeypatch.setattr(devices, "MOST", 5)
    made = empty()
    for n in range(1, 301):
        add(made, "cwnd_reset", frames.reset(n, sock_cookie=n, sport=n))
        add(made, "cwnd_recovery", frames.recovered(n + 0.5, cost_us=n), frames.recovered(n, cost_us=n))
        add(made, "block_io", frames.block(n, dev=n << 20))
    assert len(list(made.connections)) <= 50
    assert made.left_out + len(list(made.connections)) == made.resets == 300
    assert made.cost_us == sum(range(1, 301))
    assert {300, 299, 298} < {one.cookie for one in made.connections}
    assert (len(made._early), len(made._awaiting)) <= (30, 30)
    assert made.history._number <= 102
    assert len(made.devices.by_pair) == 6
    assert made.devices.by_pair[devices.OTHERS].latency.count == 295
    assert len(made._last) == len(made._known)


def test_rows_of_older_versions_do_no_harm() -> None:
    made = empty()
    lacking = ("process", "unacked_bytes", "tcp_state", "ca_name")
    rows = frames.table("cwnd_reset", frames.reset(1), frames.reset(2)).select(WANTED["cwnd_reset"])
    for name in lacking:
        at = rows.column_names.index(name)
        rows = rows.set_column(at, name, pa.nulls(2, rows.schema.field(name).type))
    made.add("cwnd_reset", rows)
    # What a verdict needs is lacking, so that they don't count.
    assert made.resets == 0
    made.add("cwnd_reset", rows.set_column(rows.column_names.index("ca_name"), "ca_name", pa.array(["cubic", "reno"])))
    assert made.resets == 2
    assert {each.row["label"] for each in made.falls} == {"idle"}


def test_workloads_and_processes_have_the_names_of_the_report(tmp_path: Path) -> None:
    trace = frames.two_idle_connections(tmp_path / "a.cwnd")
    groups = frames.workloads({"cgroup_id": 1, "path": "/system.slice/web.service", "unit": "web.service"})
    named: Trace = frames.capture(
        tmp_path / "b.cwnd",
        resets=trace._capture.table("cwnd_reset"),
        connections=trace._capture.table("connections"),
        workloads=groups,
        processes=frames.processes({"pid": 4242, "comm": "real-name", "cgroup": "/system.slice/web.service"}),
        cgroups="v2",
    )
    made = read(tmp_path / "b.cwnd")
    assert {made.workload(one) for one in made.connections} == set(named.summary()["workload"]) == {"web"}
    assert {made.process(one) for one in made.connections} == set(named.summary()["process"]) == {"real-name"}
    sums = made.workloads()["web"]
    assert (sums.connections, sums.resets) == (2, made.resets)
    assert sums.cost_us == pytest.approx(made.cost_us)
    assert sums.worst is max(made.connections, key=lambda one: one.cost_us)


def test_devices_count_as_the_report_does(tmp_path: Path) -> None:
    trace = frames.two_idle_connections(tmp_path / "a.cwnd")
    found = read(tmp_path / "a.cwnd").devices
    rows = {(row["device"], row["op"]): row for row in trace.block_summary().to_dict("records")}
    assert len(rows) == 2
    for (device, op), one in found.by_pair.items():
        row = rows[found.name(device), op]
        assert (one.latency.count, one.errors) == (row["count"], row["errors"])
        assert one.latency.percentile(99) == pytest.approx(row["latency_p99_us"], rel=0.011)
        assert one.latency.max_us == pytest.approx(row["latency_max_us"])


def test_seconds_of_a_device_are_those_that_are_shown() -> None:
    made = Devices()
    s = frames.SECOND
    for at, latency_us in ((10, 5_000), (69, 100), (69.5, 300), (70, 200)):
        rows = frames.table("block_io", frames.block(at - frames.MONO / s, latency_us, bytes=1000))
        made.add(rows.select(WANTED["block_io"]))
    (one,) = made.by_pair.values()
    assert one.worst(71 * s)[-2:] == [300.0, 200.0]
    assert sum(one.worst(71 * s)[:-2]) == 0  # the second 10 is over
    assert one.rates(71 * s) == (0.2, 200.0)
    assert one.rates(500 * s) == (0.0, 0.0)
    assert sum(OneDevice().worst(0)) == 0


def test_a_spark_has_a_bar_for_each_number() -> None:
    assert spark([0, 1, 500, 1000]) == "_▁▄█"
    assert spark([]) == ""
    assert spark([0.0, 0.0]) == "__"


def test_a_plot_falls_where_the_window_does() -> None:
    times = np.array([0, 50, 90], np.int64)
    lines = plot(times, np.array([100, 20, 100], np.int32), (0, 100), (10, 5))
    assert [len(line) for line in lines] == [10] * 5
    assert lines[0] == "█████░   ░"  # 20 is a fifth of 100; in two columns both were seen
    assert lines[-1] == BARS[-1] * 10


def test_a_plot_is_empty_before_the_first_point() -> None:
    lines = plot(np.array([50], np.int64), np.array([3], np.int32), (0, 100), (4, 2))
    assert lines == ["  ██", "  ██"]


def test_history_finds_points_by_cookie_or_by_socket() -> None:
    made = History()
    made.add(
        cookie=np.array([1, 0, 2]), skaddr=np.array([9, 9, 9]), ts_ns=np.array([3, 1, 2]), cwnd=np.array([4, 5, 6])
    )
    assert [each.tolist() for each in made.of(1, 9)] == [[1, 3], [5, 4]]
    assert [each.tolist() for each in made.of(0, 9)] == [[1], [5]]
    assert [each.tolist() for each in made.of(0, 0)] == [[], []]
